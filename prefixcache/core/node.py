"""A node of the radix tree and its sorted children, a root, and where a descent ended.

The best partly matching sibling is always a sorted neighbour, so it is found in O(log siblings).
Half of all nodes have an only child, most often a tail: the node itself refers to that, without a
dict.  Of several, up to a few hundred stand in a sorted list, which is the fastest; beyond that
`sortedcontainers` takes over.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Collection, Iterable, Iterator
from typing import Any, TypeVar

from sortedcontainers import SortedList

from prefixcache.core.account import Account, Sums
from prefixcache.types import TOKEN_BYTES, BlockId, BlockTable, Namespace

Child = TypeVar("Child")

_LIST_UNTIL = 512
_WORD = 64
"""Bytes that are compared as one big integer."""
_number = int.from_bytes


def common_prefix(a: bytes, a_off: int, b: bytes, b_off: int, size: int) -> int:
    """Count the equal leading bytes of `a[a_off:][:size]` and `b[b_off:][:size]`.

    Both must hold `size` bytes from there.  Doubling windows, then halving, compared as slices
    (memcmp); the last 64 bytes by one XOR of big integers.  O(result) bytes touched.

    >>> common_prefix(b"abcdef", 1, b"bcx", 0, 3)
    2
    """
    low, high = 0, size
    if size > _WORD:
        step = 256
        while low < size:
            high = low + step
            if high > size:
                high = size
            if a[a_off + low : a_off + high] != b[b_off + low : b_off + high]:
                break
            low = high
            step <<= 1
        else:
            return size
        while high - low > _WORD:
            middle = (low + high) >> 1
            if a[a_off + low : a_off + middle] == b[b_off + low : b_off + middle]:
                low = middle
            else:
                high = middle
    differ = _number(a[a_off + low : a_off + high], "big") ^ _number(
        b[b_off + low : b_off + high], "big"
    )
    return high - ((differ.bit_length() + 7) >> 3)


class Children(dict[bytes, Child]):
    """Children by first-block bytes; from the second one on also in sorted order.

    Replace the value of an existing key with `[]`, add with `put`, remove with `drop`.

    >>> from prefixcache.types import pack
    >>> siblings = Children()
    >>> for tokens in ([1, 1], [1, 2], [3, 3]):
    ...     _ = siblings.put(pack(tokens), tokens)
    >>> siblings.nearest(pack([1, 7]))[1]
    4
    """

    __slots__ = ("_order", "num_tails")

    def __init__(self) -> None:
        self.num_tails = 0
        """How many of them are tails: who puts and drops them counts."""
        self._order: Any = None  # None, a list, or a SortedList

    def put(self, key: bytes, child: Child) -> Child | None:
        """Add a child under a new key; give the one with the largest key below it.  O(log n)."""
        order = self._order
        if order is None:
            if not self:
                self[key] = child
                return None
            order = self._order = list(self)
        self[key] = child
        if type(order) is list:
            at = bisect_left(order, key)
            order.insert(at, key)
            if len(order) > _LIST_UNTIL:
                self._order = SortedList(order)
        else:
            at = order.bisect_left(key)
            order.add(key)
        return self[order[at - 1]] if at else None

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
        order = self._order
        around: Iterable[bytes] = self
        if order is not None:
            at = bisect_left(order, key) if type(order) is list else order.bisect_left(key)
            around = order[at - 1 : at + 1] if at else order[:1]
        best: bytes | None = None
        most, size, first = 0, len(key), key[:TOKEN_BYTES]
        for other in around:
            if other.startswith(first):
                short = size if size <= len(other) else len(other)
                same = common_prefix(key, 0, other, 0, short) & ~3
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

    def stored(self, key: bytes) -> bytes:
        """Give a key, which must be one, as the object that stands here.  O(log n)."""
        order = self._order
        if order is None:
            return next(iter(self))
        at = bisect_left(order, key) if type(order) is list else order.bisect_left(key)
        other: bytes = order[at]
        return other

    def last(self) -> Child:
        """Give the child with the largest key: there must be one.  O(log n)."""
        order = self._order
        return self[order[-1]] if order else next(iter(self.values()))

    def is_in_order(self, key: bytes) -> bool:
        """Whether the order has a key where it is looked for.  O(log n)."""
        order = self._order
        if order is None:
            return len(self) < 2
        if type(order) is not list:
            return len(order) == len(self) and key in order
        at = bisect_left(order, key)
        return len(order) == len(self) and order[at : at + 1] == [key]

    def check(self) -> None:
        """Assert that the order holds exactly the keys.  O(n log n)."""
        if self._order is not None:
            assert list(self._order) == sorted(self), "the order and the keys differ"
        else:
            assert len(self) < 2, "several children without an order"


FRESH, FOUND = 1, 2
"""`node.tail` of a tail that no request has found since it was stored, and of the others."""
_NO_TAIL = 0
_OF_BOTH: tuple[str, ...] = (
    "blocks",
    "in_root",
    "last_used",
    "lock_ref",
    "parent",
    "queued",
    "tokens",
)
"""What runs and tails have; not written out there, or mypy took it for all that a node may have."""


class Place:
    """One place, and how many requests parted there."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Node:
    """A run below its parent: of whole blocks, or a tail, which is one that is partly filled.

    Nearly half of all are tails, which have no slots for what only a run has: it reads as nothing,
    and whoever sets it at a node knows that it is a run.
    """

    __slots__ = _OF_BOTH

    tokens: bytes
    """Packed tokens of the run."""
    blocks: BlockTable
    """Its physical blocks; empty for a ghost and for a root."""
    parent: Node | None
    """None for a root, and for a node that is no longer part of the tree."""
    in_root: Root | None
    """Where it hangs; None for a root: who refers to itself waits for the garbage collector."""
    lock_ref: int
    """Locks on this very node, plus the number of locked children.  Of a ghost, which nobody can
    lock, its `burial`."""
    last_used: int
    """The stamp of the last use; of a ghost, that of its blocks."""
    tail: int
    """Whether this is a tail: 0 no, 1 one that no request has found yet, 2 one that was found."""
    queued: int
    """Whether a queue has this leaf: 0 no, 1 the policy's, 2 the protected, 3 what was reset,
    4 the pinned.  Tails have places of their own."""

    # Of runs; it reads as nothing of a tail.

    only: Node | None
    """Its child, if it has but one."""
    several: Children[Node] | None
    """Its children, if they are more."""
    ghosts: Children[Node] | None
    pinned: int
    """How many pins cover these blocks."""
    copied: int
    """Tokens of the first block that leases have copied since a policy heard of a use of it."""
    mark: Any
    """What the eviction policy knows about these blocks; equal for all of them."""
    places: BlockTable | None
    """Of a ghost: the slots below the pool in which its first blocks lie; None: they are gone."""
    divergence: dict[int, Place] | None
    """Where requests left the stored tokens after this node, by tokens into the next block."""

    @property
    def root(self) -> Root:
        """Give the root that this hangs below; a root gives itself."""
        root = self.in_root
        if root is None:
            raise AssertionError("only a root hangs below nothing")
        return root

    @property
    def burial(self) -> int:
        """Say as the how many-th this ghost was buried.  O(1)."""
        return self.lock_ref

    @burial.setter
    def burial(self, number: int) -> None:
        self.lock_ref = number

    @property
    def is_evictable(self) -> bool:
        """Whether this is an unprotected leaf of the tree that holds blocks; tails aside."""
        if self.lock_ref or self.parent is None or not self.blocks:
            return False
        if (only := self.only) is not None:
            return only.tail != 0
        several = self.several
        return several is None or several.num_tails == len(several)

    @property
    def is_inner(self) -> bool:
        """Whether whole blocks follow."""
        if (only := self.only) is not None:
            return not only.tail
        several = self.several
        return several is not None and several.num_tails < len(several)

    @property
    def children(self) -> Collection[Node]:
        """Give the nodes below, in no order; ghosts are none.  Changes nothing.  O(1)."""
        if self.only is not None:
            return (self.only,)
        return () if self.several is None else self.several.values()

    def any_child(self) -> Node | None:
        """Give one of the children, if there are any.  Changes nothing.  O(1)."""
        several = self.several
        return self.only if several is None else next(iter(several.values()))

    def put(self, child: Node, width: int) -> Node | None:
        """Add a child whose first `width` bytes begin no other one.  O(log siblings).

        Returns:
            The child before it in the order of tokens, if there is any.
        """
        only, several = self.only, self.several
        if several is None:
            if only is None:
                self.only = child
                return None
            self.only, self.several = None, (several := Children())
            several.put(only.tokens[:width], only)
            several.num_tails = 1 if only.tail else 0
        if child.tail:
            several.num_tails += 1
        return several.put(child.tokens[:width], child)

    def drop(self, child: Node, width: int) -> None:
        """Remove a child, which must be one.  O(log siblings)."""
        several = self.several
        if several is None:
            assert self.only is child
            self.only = None
            return
        several.drop(child.tokens[:width])
        if child.tail:
            several.num_tails -= 1
        if len(several) == 1:
            self.only, self.several = several.last(), None

    def replace(self, child: Node, other: Node, width: int) -> None:
        """Let another node, with the same first block, stand in the place of a child.

        O(1); O(log siblings) if it has but that block.
        """
        several = self.several
        if several is not None:
            if len(other.tokens) == width:
                other.tokens = several.stored(other.tokens)  # the same bytes, and so kept once
            several[other.tokens[:width]] = other
        else:
            assert self.only is child
            self.only = other

    def nearest(self, key: bytes) -> tuple[Node | None, int]:
        """Find the child whose first block shares most leading tokens with `key`, a block or less.

        As `Children.nearest` says.
        """
        only = self.only
        if only is None:
            return (None, 0) if self.several is None else self.several.nearest(key)
        size, run = len(key), only.tokens
        same = common_prefix(key, 0, run, 0, size if size < len(run) else len(run)) & ~3
        return (only, same) if same else (None, 0)

    def table(self) -> BlockTable:
        """Give the blocks from the root to the end of this node.  Changes nothing.  O(blocks)."""
        parts: list[BlockTable] = []
        node, above = self, self.parent
        while above is not None:
            parts.append(node.blocks)
            node, above = above, above.parent
        if len(parts) == 1:
            return self.blocks[:]
        table = array("i")
        for part in reversed(parts):
            table += part
        return table


class Run(Node):
    """A run of whole blocks."""

    __slots__ = (
        "copied",
        "divergence",
        "ghosts",
        "mark",
        "only",
        "pinned",
        "places",
        "several",
    )

    tail: int = _NO_TAIL

    def __init__(self, key: bytes, blocks: BlockTable, parent: Node | None, born: int) -> None:
        self.tokens = key
        self.blocks = blocks
        self.parent = parent
        self.lock_ref = 0
        self.last_used = born
        self.queued = 0
        self.in_root = None if parent is None else parent.in_root or parent.root
        self.only = None
        self.several = self.ghosts = self.divergence = self.mark = self.places = None
        self.pinned = self.copied = 0


class Tail(Node):
    """A block that is partly filled: nothing is below it, and no policy and no pin knows of it.

    While nobody protects it, it stands in a line of tails, between two others.
    """

    __slots__ = ("older", "tail", "younger")

    only: Node | None = None
    several: Children[Node] | None = None
    ghosts: Children[Node] | None = None
    divergence: dict[int, Place] | None = None
    mark: Any = None
    places: BlockTable | None = None
    pinned: int = 0
    copied: int = 0

    def __init__(self, key: bytes, blocks: BlockTable, parent: Node, born: int) -> None:
        self.tokens = key
        self.blocks = blocks
        self.parent = parent
        self.lock_ref = 0
        self.last_used = born
        self.queued = 0
        self.in_root = parent.in_root or parent.root
        self.tail = FRESH
        self.older: Tail | None = None
        self.younger: Tail | None = None


class Root(Run):
    """The empty prefix of one namespace.  Always protected, never evicted."""

    __slots__ = (
        "account",
        "evictable",
        "name_size",
        "namespace",
        "num_blocks",
        "num_changes",
        "num_leases",
        "retired",
        "sums",
    )

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(b"", array("i"), None, 0)
        self.lock_ref = 1
        self.namespace = namespace
        self.name_size = namespace.num_characters
        self.num_blocks = 0
        self.evictable = 0
        self.sums = Sums()
        """Those of its tenant, which are kept with its own."""
        self.num_leases = 0
        self.num_changes = 0
        """How often something came or went: a match, or what waiting brings, may differ since."""
        self.account: Account | None = None
        """Who answers for what is stored here."""
        self.retired = False
        """Whether the namespace was reset: nothing below can be found any more."""

    @property
    def root(self) -> Root:
        """Give itself."""
        return self


class Match:
    """Where a descent ended.  `lock` continues from here; valid until the tree changes."""

    __slots__ = ("end", "near", "node", "partial_block", "partial_tokens", "used")

    def __init__(
        self,
        node: Node,
        used: int,
        end: int,
        partial_block: BlockId | None = None,
        partial_tokens: int = 0,
        near: Node | None = None,
    ) -> None:
        self.node = node
        self.used = used
        """Blocks of the node's run that matched."""
        self.end = end
        """Bytes of the tokens that matched in whole blocks."""
        self.partial_block = partial_block
        """The block whose first tokens match best what follows."""
        self.partial_tokens = partial_tokens
        self.near = near
        """The child that holds that block, where the node's whole run matched."""

    def num_unprotected(self) -> int:
        """Count the matched blocks that no lease protects now.  Changes nothing.  O(nodes)."""
        node = self.node
        count = 0
        if not node.lock_ref:
            count = self.used
            above = node.parent
            while above is not None and not above.lock_ref:
                count += len(above.blocks)
                above = above.parent
        return count


class Inserted:
    """Answer of `RadixTree.insert`."""

    __slots__ = ("absorbed", "node", "num_existing", "num_indexed")

    def __init__(
        self, node: Node, num_existing: int, num_indexed: int, absorbed: list[int]
    ) -> None:
        self.node = node
        """The node that the caller's lock is on now."""
        self.num_existing = num_existing
        """Leading blocks that somebody else had indexed already."""
        self.num_indexed = num_indexed
        self.absorbed = absorbed
        """Blocks of tails that the new run made superfluous.  They have left the tree."""


def blocks_below(root: Root) -> BlockTable:
    """Give all blocks that a tree holds, in no order.  Changes nothing.  O(blocks)."""
    parts = []
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        parts.append(node.blocks.tobytes())
        stack.extend(node.children)
    return array("i", b"".join(parts))


def evictable_leaves(root: Root) -> Iterator[Node]:
    """Give the unprotected leaves below a retired root, children before parents.

    Lazily, while the tree changes: a node that is gone is skipped, and so is a protected one, which
    is offered again when it is unlocked.
    """
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, seen = stack.pop()
        if not seen and (node.only is not None or node.several is not None):
            stack.append((node, True))
            stack.extend((child, False) for child in node.children)
            continue
        while node.is_evictable:
            yield node
