"""Attachments: the namespaces that one worker has attached, by index.

```
attach a, b, …      index 0  1  2 … 255 │ 256        left for it is the one that was used least
                    a     ·  c  …       │ z          lately: b; no index ever means another one
```
A worker may live for months and attach a namespace for each user, or each request: there are never
more than `MAX_ATTACHED`.  What it leases where it has left goes on.
"""

from __future__ import annotations

from collections.abc import Iterator

from prefixcache.errors import NotFound
from prefixcache.texts import many
from prefixcache.types import Namespace

MAX_ATTACHED = 256
"""Namespaces that a worker has attached at the same time."""


class Attachments:
    """What one worker has attached.  Each method is O(1).

    >>> mine = Attachments()
    >>> mine.add(Namespace("m", salt="one")), mine.add(Namespace("m", salt="two"))
    (0, 1)
    >>> mine.add(Namespace("m", salt="one"))
    0
    >>> mine.at(1).salt
    'two'
    """

    __slots__ = ("_by_index", "_indices", "_next")

    def __init__(self) -> None:
        self._by_index: dict[int, Namespace] = {}
        self._indices: dict[Namespace, int] = {}
        """What was used last comes last."""
        self._next = 0

    def __len__(self) -> int:
        return len(self._indices)

    def __iter__(self) -> Iterator[Namespace]:
        """Give them in the order of attaching."""
        return iter(self._by_index.values())

    def __contains__(self, namespace: Namespace) -> bool:
        return namespace in self._indices

    def add(self, namespace: Namespace) -> int:
        """Give the index of one; a new one gets the next, which was never given before."""
        index = self._indices.pop(namespace, None)
        if index is None:
            index, self._next = self._next, self._next + 1
            self._by_index[index] = namespace
        self._indices[namespace] = index
        return index

    def idle(self) -> Namespace | None:
        """Give the one to be left before another is added; None while there is room."""
        return next(iter(self._indices)) if len(self._indices) >= MAX_ATTACHED else None

    def leave(self, namespace: Namespace) -> None:
        """Forget one."""
        del self._by_index[self._indices.pop(namespace)]

    def at(self, index: int) -> Namespace:
        """Give one by its index; it counts as used.

        Raises:
            NotFound: there is none, or it was left.
        """
        namespace = self._by_index.get(index)
        if namespace is not None:
            self._indices[namespace] = self._indices.pop(namespace)
            return namespace
        if 0 <= index < self._next:
            raise NotFound(
                f"the namespace at index {index} was left: of {self._next:,} attached ones the "
                f"{len(self)} that were used last are kept. Attach it again, or name it in the "
                "request."
            )
        known = many(self._next, "namespace", "are")
        raise NotFound(f"{known} attached, there is none at index {index}")
