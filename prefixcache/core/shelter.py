"""The shelter: leaves that are evicted last, because they are pinned or within a guaranteed share.

```
            pop                        nothing else is left
inner queue ───► neither ─► evicted          │
             └─► within its share ─► shares ─┤ first these, the least recently used first
             └─► pinned ───────────► pins ───┘ then these
                       ▲ comes back when the pin ends, or the share is exceeded
```

Put around the policy's queue when the first pin or share is made; without one, nothing is between
the tree and its queue.  Leaves that are neither come out exactly in the policy's order.
"""

from __future__ import annotations

from prefixcache.core.eviction import LeafQueue
from prefixcache.core.node import Node
from prefixcache.core.policies.lru import Lru
from prefixcache.core.quotas import Account, Quotas
from prefixcache.core.radix import RadixTree

_MOST_MOVED = 256
"""Blocks of each that go back in one go: always the oldest, and more than go at a time."""

SHELTERED = 2
"""`node.queued` of a leaf that waits here, and not in the policy's queue."""


class Shelter:
    """A queue around a queue.

    Args:
        tree: Whose queue it takes the place of.
        quotas: Who has a guaranteed share.
    """

    __slots__ = ("_inner", "_pins", "_quotas", "_returning", "_shares", "_tree")

    def __init__(self, tree: RadixTree, quotas: Quotas) -> None:
        self._tree = tree
        self._inner = tree.queue
        self._quotas = quotas
        self._pins = LeafQueue(Lru())
        self._shares: dict[Account, LeafQueue] = {}
        self._returning: list[LeafQueue] = []
        """What waited here under other shares: it goes back, the oldest of each first, in parts."""

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable.  As the inner queue."""
        self._inner.push(node)

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first.  O(log leaves) amortised, plus O(shares)."""
        if self._shares:
            self._let_go_of_excess()
        while True:
            if self._returning:
                self._go_on_returning()
            if (node := self._pop_unsheltered()) is not None:
                return node
            if not self._returning:
                break
        for kept in [*self._shares.values(), self._pins]:
            if (node := kept.pop()) is not None:
                return node
        return None

    def _pop_unsheltered(self) -> Node | None:
        while (node := self._inner.pop()) is not None:
            if node.pinned:
                self._keep(self._pins, node)
            elif (account := self._sharer(node)) is not None:
                self._keep(self._shares.setdefault(account, LeafQueue(Lru())), node)
            else:
                if self._quotas.shares:
                    self._cut_to_excess(node)
                return node
        return None

    def let_go(self, node: Node) -> None:
        """Give a leaf whose pin has ended back to the policy's order, if it waited here."""
        if node.queued == SHELTERED:
            node.queued = 0
            if node.is_evictable:
                self._inner.push(node)

    def let_all_go(self) -> None:
        """Give every leaf back, with the next ones that are evicted: the shares have changed.

        O(shares).
        """
        self._returning += [*self._shares.values(), self._pins]
        self._shares, self._pins = {}, LeafQueue(Lru())

    def _go_on_returning(self) -> None:
        """Give back more leaves than are evicted, the oldest first: none is evicted too early."""
        for kept in self._returning:
            self._move(kept, _MOST_MOVED)
        self._returning = [kept for kept in self._returning if len(kept)]

    def _keep(self, kept: LeafQueue, node: Node) -> None:
        if not node.queued:
            kept.push(node)
        node.queued = SHELTERED

    def _sharer(self, node: Node) -> Account | None:
        """Give the account whose share covers a leaf; None if none does."""
        if not self._quotas.shares:
            return None
        at = node.root.account
        while at is not None:
            if at.guaranteed and not node.root.retired and at.num_stored <= at.guaranteed:
                return at
            at = at.above
        return None

    def _cut_to_excess(self, node: Node) -> None:
        """Leave in a leaf only as many blocks as its accounts have above their shares."""
        at, size = node.root.account, len(node.blocks)
        while at is not None:
            if at.guaranteed and not node.root.retired:
                size = min(size, at.num_stored - at.guaranteed)
            at = at.above
        if size < len(node.blocks):
            self._tree.split_leaf(node, len(node.blocks) - size)

    def _let_go_of_excess(self) -> None:
        """Return as many blocks, the oldest first, as accounts have above their shares."""
        for account, kept in self._shares.items():
            excess = account.num_stored - account.guaranteed
            if excess > 0:
                self._move(kept, min(excess, _MOST_MOVED))

    def _move(self, kept: LeafQueue, num_blocks: int) -> None:
        while num_blocks > 0 and (node := kept.pop()) is not None:
            num_blocks -= len(node.blocks)
            self._inner.push(node)
