"""ARC: adaptive replacement cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, Mark, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_T1, _T2, _B1 = 0, 1, 2
"""Of what is in the ghost list of T1 or T2, the mark is larger by `_B1`."""


@register
class Arc(LanePolicy):
    """ARC: two LRU lists, used once and used again, whose shares are learnt from ghosts.

    A block that comes back after it was evicted from T1 says that T1 should have been larger, one
    evicted from T2 the opposite; the target `p` of T1 moves by as much.

    Source: Megiddo and Modha, *ARC: a self-tuning, low overhead replacement cache*, FAST 2003.
    State: the list per run, three sizes, `p`.  The lengths of the ghost lists are kept by counting
    what was evicted since, not by unlinking.  O(nodes on the path) a use, O(log leaves) an
    eviction.
    """

    name: ClassVar[str] = "arc"
    ghosts: ClassVar[float] = 1.0

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._num_once = 0
        """Blocks in T1."""
        self._ghosts = [0, 0]
        """Blocks in B1 and in B2."""
        self._clocks = [0, 0]
        """Blocks ever evicted from T1 and from T2."""
        self._p = 0.0
        self._grain = max(1, num_blocks // 64)

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Move new blocks of the path to T1, the others to T2; learn from those that came back."""
        while node is not top and node.parent is not None:
            mark, size = node.mark, len(node.blocks)
            if mark is None:
                node.mark = _ONCE
                self._num_once += size
            elif mark[0] == _T1:
                node.mark = _AGAIN
                self._num_once -= size
            elif mark[0] >= _B1:
                self._return(node, mark[0] - _B1, mark[1], size)
            node = node.parent

    def _return(self, node: Node, which: int, at: int, size: int) -> None:
        """Take a run back that was evicted; it counts as remembered if its list reaches so far."""
        ghosts = self._ghosts
        if self._clocks[which] - at > self._room(which):
            node.mark = _ONCE
            self._num_once += size
            return
        step = size * max(1.0, ghosts[1 - which] / max(1, ghosts[which]))
        if which == _T1:
            self._p = min(float(self.num_blocks), self._p + step)
        else:
            self._p = max(0.0, self._p - step)
        ghosts[which] = max(0, ghosts[which] - size)
        node.mark = _AGAIN

    def _room(self, which: int) -> int:
        """Give how many ghosts of T1, or of T2, may be remembered now."""
        return self.num_blocks - (self._num_once if which == _T1 else self._ghosts[0])

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Move evicted blocks to the ghost list of theirs (in steps of 1/64 of a pool)."""
        if node.mark is None or node.mark[0] >= _B1:
            return None
        which, ghosts = node.mark[0], self._ghosts
        if which == _T1:
            self._num_once -= num_blocks
        self._clocks[which] += num_blocks
        ghosts[which] = min(ghosts[which] + num_blocks, self._room(which))
        return (_B1 + which, self._clocks[which] // self._grain * self._grain)

    def revived(self, ghost: Node) -> None:
        """Keep the mark: `used` reads it."""

    def lane(self, node: Node) -> int:
        """Give the list."""
        return _T2 if node.mark is not None and node.mark[0] == _T2 else _T1

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take from T1 while it is larger than its target."""
        if heads[_T1] is None or heads[_T2] is None:
            return _T1 if heads[_T2] is None else _T2
        return _T1 if self._num_once > self._p else _T2


_ONCE, _AGAIN = (_T1, 0), (_T2, 0)
