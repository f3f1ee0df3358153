"""Segmented LRU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, Mark, register
from prefixcache.core.policies.lru_list import LruList

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_ONCE, _AGAIN = 0, 1


@register
class Slru(LanePolicy):
    """Segmented LRU: what was used again is protected, up to 80 % of the pool.

    New blocks go on probation.  A second use protects them; the oldest uses that no longer fit into
    the protected segment are put back to the young end of the probation.  The oldest leaf on
    probation goes first.

    Source: Karedla, Love and Wherry, *Caching strategies to improve disk system performance*, IEEE
    Computer 1994; the share of 80 % is that of later practice.  Demotion here is by whole uses.
    State: (segment, stamp) per run, a count per living use.  O(nodes on the path) a use, O(log
    leaves) an eviction.
    """

    name: ClassVar[str] = "slru"
    protected: ClassVar[float] = 0.8

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._again = LruList()
        self._limit = int(self.protected * num_blocks)

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Put new blocks of the path on probation, protect the others."""
        again = self._again
        while node is not top and node.parent is not None:
            mark, size = node.mark, len(node.blocks)
            if mark is None:
                node.mark = (_ONCE, stamp)
            else:
                if mark[0] == _AGAIN:
                    again.leave(mark[1], size)
                node.mark = (_AGAIN, stamp)
                again.enter(stamp, size)
            node = node.parent
        again.shrink(self._limit, stamp)

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Forget evicted blocks."""
        if node.mark is not None and node.mark[0] == _AGAIN:
            self._again.leave(node.mark[1], num_blocks)

    def lane(self, node: Node) -> int:
        """Give the segment, demoted blocks being still among the protected."""
        return _ONCE if node.mark is None else int(node.mark[0])

    def key(self, node: Node) -> float:
        """Give the last use."""
        return node.last_used if node.mark is None else int(node.mark[1])

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take from the probation, demoted blocks included: who came to it first."""
        once, again = heads
        if once is None or again is None:
            return _AGAIN if once is None else _ONCE
        demoted = self._again.fell_at(again.mark[1])
        return _AGAIN if demoted is not None and demoted < self.key(once) else _ONCE
