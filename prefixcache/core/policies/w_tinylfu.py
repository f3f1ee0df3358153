"""W-TinyLFU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, Lanes, Mark, Queue, register
from prefixcache.core.policies.lru_list import LruList

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_WINDOW, _PROBATION, _PROTECTED, _GHOST = 0, 1, 2, 3
_MOST = 15
_STEPS = 4


@register
class WTinyLfu(LanePolicy):
    """W-TinyLFU: a small LRU window, and a segmented LRU that lets in only what is used more often.

    When the window (1 %) is too large, its oldest leaf competes with the leaf that the main area
    would evict: the one with the smaller count goes.  Counts go up to 15 and are halved every ten
    capacities of uses.

    Source: Einziger, Friedman and Manes, *TinyLFU: a highly efficient cache admission policy*, ACM
    TOS 2017; the segments (protected: 80 % of main) are those of its implementation Caffeine.
    Instead of a sketch, the counts stand at the blocks and at their ghosts, exactly.  State:
    (segment, stamp, count, epoch) per run.  O(nodes on the path) a use, O(log leaves) an eviction,
    amortised.
    """

    name: ClassVar[str] = "w-tinylfu"
    num_lanes: ClassVar[int] = 3
    ghosts: ClassVar[float] = 4.0

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._window_limit = max(1, num_blocks // 100)
        self._protected_limit = int(0.8 * (num_blocks - self._window_limit))
        self._num_window = 0
        self._protected = LruList()
        self._epoch = 0
        self._num_used = 0
        self._stamp = 0
        self._owed = False
        """Whether a candidate was let in for which the main area's victim must go."""
        self._wins = False
        """Whether the candidate chosen is let in."""
        self._lanes = Lanes(self)

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Count the use of the path's blocks; new ones enter the window, others are protected."""
        self._stamp = stamp
        while node is not top and node.parent is not None:
            mark, size = node.mark, len(node.blocks)
            self._num_used += size
            count = min(_MOST, self._count(mark) + 1)
            segment = _PROTECTED
            if mark is None or mark[0] in {_WINDOW, _GHOST}:
                segment = _WINDOW
                if mark is None or mark[0] == _GHOST:
                    self._num_window += size
            elif mark[0] == _PROTECTED:
                self._protected.leave(mark[1], size)
            if segment == _PROTECTED:
                self._protected.enter(stamp, size)
            node.mark = (segment, stamp, count, self._epoch)
            node = node.parent
        self._protected.shrink(self._protected_limit, stamp)
        # The main area is filled from the window in small steps, as long as there is room.
        for _ in range(_STEPS):
            self._wins = self._num_window > self._window_limit
            if not self._wins or not self._lanes.respite(_WINDOW):
                break
        if self._num_used > 10 * self.num_blocks:
            self._num_used = 0
            self._epoch += 1

    def queue(self) -> Queue:
        """Give the lanes."""
        return self._lanes

    def _count(self, mark: Mark) -> int:
        """Give the count by now: halved once per epoch since."""
        return 0 if mark is None else int(mark[2]) >> (self._epoch - mark[3])

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Remember the count."""
        mark = node.mark
        if mark is None or mark[0] == _GHOST:
            return mark
        if mark[0] == _WINDOW:
            self._num_window -= num_blocks
        elif mark[0] == _PROTECTED:
            self._protected.leave(mark[1], num_blocks)
        return (_GHOST, 0, mark[2], mark[3])

    def revived(self, ghost: Node) -> None:
        """Keep the mark: `used` reads it."""

    def lane(self, node: Node) -> int:
        """Give the segment, demoted blocks being still among the protected."""
        mark = node.mark
        return _WINDOW if mark is None or mark[0] == _GHOST else int(mark[0])

    def key(self, node: Node) -> float:
        """Give the time of entry, which is that of the last use."""
        mark = node.mark
        return node.last_used if mark is None or mark[0] == _GHOST else int(mark[1])

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Fill the main area from the window; once it is full, let the window's oldest compete."""
        main = self._main(heads)
        candidate = heads[_WINDOW]
        if candidate is None or main is None or self._owed:
            self._wins = candidate is not None and self._num_window > self._window_limit
            return _WINDOW if main is None else main
        self._wins = self._num_window > self._window_limit
        if not self._wins:
            victim = heads[main]
            assert victim is not None
            self._owed = self._wins = self._count(candidate.mark) > self._count(victim.mark)
        return _WINDOW

    def _main(self, heads: Sequence[Node | None]) -> int | None:
        """Give the segment whose head the main area would evict; None if it has no leaf."""
        probation, protected = heads[_PROBATION], heads[_PROTECTED]
        if probation is None:
            return None if protected is None else _PROTECTED
        if protected is None:
            return _PROBATION
        demoted = self._protected.fell_at(protected.mark[1])
        return _PROTECTED if demoted is not None and demoted < self.key(probation) else _PROBATION

    def spares(self, node: Node) -> bool:
        """Move a candidate that won to the main area, with what is above it."""
        if self.lane(node) != _WINDOW:
            self._owed = False
            return False
        if not self._wins:
            return False
        at: Node | None = node
        while at is not None and at.mark is not None and at.mark[0] == _WINDOW:
            self._num_window -= len(at.blocks)
            at.mark = (_PROBATION, self._stamp, at.mark[2], at.mark[3])
            at = at.parent
        return at is not node
