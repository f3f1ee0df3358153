"""2Q."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, Mark, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_IN, _MAIN, _OUT = 0, 1, 2


@register
class TwoQueue(LanePolicy):
    """2Q: new blocks pass through a FIFO of a quarter of the pool; who returns after it stays.

    A use while in the FIFO (A1in) changes nothing.  Blocks evicted from it are remembered (A1out,
    half a pool); a block that comes back while it is remembered goes to the main LRU (Am).

    Source: Johnson and Shasha, *2Q: a low overhead high performance buffer management replacement
    algorithm*, VLDB 1994, full version, Kin = 25 %, Kout = 50 %.  State: the queue, and when it
    came there, per run.  O(nodes on the path) a use, O(log leaves) an eviction.
    """

    name: ClassVar[str] = "2q"
    ghosts: ClassVar[float] = 1.0

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._num_in = 0
        self._num_out = 0
        """Blocks ever evicted from A1in: the clock of A1out."""
        self._kin = num_blocks // 4
        self._kout = num_blocks // 2
        self._grain = max(1, num_blocks // 64)

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Let new blocks of the path in; those that came back from A1out go to the main queue."""
        while node is not top and node.parent is not None:
            mark = node.mark
            if mark is None or (mark[0] == _OUT and self._num_out - mark[1] > self._kout):
                node.mark = (_IN, stamp)
                self._num_in += len(node.blocks)
            elif mark[0] == _OUT:
                node.mark = _RETURNED
            node = node.parent

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Remember what leaves A1in, and when (in steps of 1/64 of a pool, so runs stay whole)."""
        if node.mark is None or node.mark[0] != _IN:
            return None
        self._num_in -= num_blocks
        self._num_out += num_blocks
        return (_OUT, self._num_out // self._grain * self._grain)

    def revived(self, ghost: Node) -> None:
        """Keep the mark: `used` reads it."""

    def lane(self, node: Node) -> int:
        """Give the queue."""
        return _MAIN if node.mark is not None and node.mark[0] == _MAIN else _IN

    def key(self, node: Node) -> float:
        """Give the time of entry into A1in, that of the last use in Am."""
        if node.mark is None or node.mark[0] != _IN:
            return node.last_used
        return int(node.mark[1])

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take from A1in while it is too large."""
        if heads[_IN] is None or heads[_MAIN] is None:
            return _IN if heads[_MAIN] is None else _MAIN
        return _IN if self._num_in > self._kin else _MAIN


_RETURNED = (_MAIN, 0)
