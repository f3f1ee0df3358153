"""Children of a node, by the bytes of their first block: exact look-up, and nearest neighbours.

The best partly matching sibling is always a sorted neighbour, so it is found in O(log siblings).
One child needs no order; up to a few hundred a sorted list is the fastest; beyond that
`sortedcontainers` takes over.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import Any, TypeVar

from sortedcontainers import SortedList

Child = TypeVar("Child")

_LIST_UNTIL = 512


def common_prefix(a: bytes, a_off: int, b: bytes, b_off: int, size: int) -> int:
    """Count the equal leading bytes of `a[a_off:][:size]` and `b[b_off:][:size]`.

    Both must hold `size` bytes from there.  Doubling windows, then halving, compared as slices
    (memcmp); the last 64 bytes by one XOR of big integers.  O(result) bytes touched.

    >>> common_prefix(b"abcdef", 1, b"bcx", 0, 3)
    2
    """
    low, step = 0, 256
    while low < size:
        high = min(low + step, size)
        if a[a_off + low : a_off + high] != b[b_off + low : b_off + high]:
            break
        low = high
        step <<= 1
    else:
        return size
    while high - low > 64:
        middle = (low + high) >> 1
        if a[a_off + low : a_off + middle] == b[b_off + low : b_off + middle]:
            low = middle
        else:
            high = middle
    differ = int.from_bytes(a[a_off + low : a_off + high], "big") ^ int.from_bytes(
        b[b_off + low : b_off + high], "big"
    )
    return high - ((differ.bit_length() + 7) >> 3)


class Children(dict[bytes, Child]):
    """Children by first-block bytes; from the second one on also in sorted order.

    Replace the value of an existing key with `[]`, add with `put`, remove with `drop`.

    >>> from prefixcache.types import pack
    >>> siblings = Children()
    >>> for tokens in ([1, 1], [1, 2], [3, 3]):
    ...     siblings.put(pack(tokens), tokens)
    >>> siblings.nearest(pack([1, 7]))[1]
    4
    """

    __slots__ = ("_order",)

    def __init__(self) -> None:
        super().__init__()
        self._order: Any = None  # None, a list, or a SortedList

    def put(self, key: bytes, child: Child) -> None:
        """Add a child under a new key.  O(log n)."""
        self[key] = child
        order = self._order
        if order is None:
            if len(self) > 1:
                self._order = sorted(self)
        elif type(order) is list:
            insort(order, key)
            if len(order) > _LIST_UNTIL:
                self._order = SortedList(order)
        else:
            order.add(key)

    def sort(self) -> None:
        """Bring the order up to date after keys were set in bulk.  O(n log n)."""
        self._order = None
        if len(self) > 1:
            self._order = sorted(self) if len(self) <= _LIST_UNTIL else SortedList(self)

    def drop(self, key: bytes) -> None:
        """Remove a child.  O(log n).

        Raises:
            KeyError: there is none.
        """
        del self[key]
        order = self._order
        if order is None:
            return
        if type(order) is list:
            del order[bisect_left(order, key)]
        else:
            order.remove(key)

    def nearest(self, key: bytes) -> tuple[Child | None, int]:
        """Find the child whose first block shares most leading tokens with `key`.

        Changes nothing.  O(log n).

        Returns:
            The child and the number of equal bytes, whole tokens only; None and 0 if none shares
            a token.
        """
        best: bytes | None = None
        most = 0
        for other in self._around(key):
            same = common_prefix(key, 0, other, 0, min(len(key), len(other))) & ~3
            if same > most:
                best, most = other, same
        return (None, 0) if best is None else (self[best], most)

    def before(self, key: bytes) -> Child | None:
        """Give the child with the largest key below `key`.  O(log n)."""
        order = self._order
        if order is None:
            other = next(iter(self), None)
            return None if other is None or other >= key else self[other]
        at = bisect_left(order, key) if type(order) is list else order.bisect_left(key)
        return self[order[at - 1]] if at else None

    def after(self, key: bytes) -> Child | None:
        """Give the child with the smallest key above `key`, which must be a key.  O(log n)."""
        order = self._order
        if order is None:
            return None
        at = bisect_left(order, key) if type(order) is list else order.bisect_left(key)
        return self[order[at + 1]] if at + 1 < len(order) else None

    def _around(self, key: bytes) -> list[bytes]:
        order = self._order
        if order is None:
            return list(self)
        at = bisect_left(order, key) if type(order) is list else order.bisect_left(key)
        return list(order[at - 1 : at + 1]) if at else list(order[:1])

    def check(self) -> None:
        """Assert that the order holds exactly the keys.  O(n log n)."""
        if self._order is not None:
            assert list(self._order) == sorted(self), "the order and the keys differ"
        else:
            assert len(self) < 2, "several children without an order"
