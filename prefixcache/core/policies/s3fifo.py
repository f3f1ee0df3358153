"""S3-FIFO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, Mark, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_SMALL, _MAIN, _GHOST = 0, 1, 2


@register
class S3Fifo(LanePolicy):
    """S3-FIFO: a small FIFO of 10 % filters what is used once; the main FIFO gives second chances.

    At the end of the small queue, blocks used at least twice since they came move to the main one,
    the others become ghosts.  A block that comes back as a ghost (remembered for as long as the
    main queue is large) goes to the main queue.  At the end of the main queue a block that was used
    goes round once more, at most three times.

    Source: Yang, Zhang, Qiu, Yue and Rashmi, *FIFO queues are all you need for cache eviction*,
    SOSP 2023.  State: (queue, position, uses up to 3) per run.  O(nodes on the path) a use, O(log
    leaves) an eviction, amortised.
    """

    name: ClassVar[str] = "s3fifo"
    ghosts: ClassVar[float] = 1.0

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._num_small = 0
        self._num_out = 0
        """Blocks ever evicted from the small queue: the clock of the ghosts."""
        self._limit = max(1, num_blocks // 10)
        self._grain = max(1, num_blocks // 64)
        self._stamp = 0

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Let new blocks of the path into a queue; count the use of the others."""
        self._stamp = stamp
        while node is not top and node.parent is not None:
            mark = node.mark
            if mark is None:
                self._enter(node, stamp)
            elif mark[0] == _GHOST:
                if self._num_out - mark[1] <= self.num_blocks - self._limit:
                    node.mark = (_MAIN, stamp, 0)
                else:
                    self._enter(node, stamp)
            elif mark[2] < 3:
                node.mark = (mark[0], mark[1], mark[2] + 1)
            node = node.parent

    def _enter(self, node: Node, stamp: int) -> None:
        node.mark = (_SMALL, stamp, 0)
        self._num_small += len(node.blocks)

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Remember what leaves the small queue, and when (in steps of 1/64 of a pool)."""
        if node.mark is None or node.mark[0] != _SMALL:
            return None
        self._num_small -= num_blocks
        self._num_out += num_blocks
        return (_GHOST, self._num_out // self._grain * self._grain)

    def revived(self, ghost: Node) -> None:
        """Keep the mark: `used` reads it."""

    def lane(self, node: Node) -> int:
        """Give the queue."""
        return _MAIN if node.mark is not None and node.mark[0] == _MAIN else _SMALL

    def key(self, node: Node) -> float:
        """Give the position in the queue."""
        return node.last_used if node.mark is None else int(node.mark[1])

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take from the small queue while it is too large."""
        if heads[_SMALL] is None or heads[_MAIN] is None:
            return _SMALL if heads[_MAIN] is None else _MAIN
        return _SMALL if self._num_small > self._limit else _MAIN

    def spares(self, node: Node) -> bool:
        """Move a block that was used: from small to main, in main to the end."""
        if node.mark is None or node.mark[0] == _GHOST:
            return False
        queue, _, uses = node.mark
        if queue == _SMALL and uses > 1:
            self._num_small -= len(node.blocks)
            node.mark = (_MAIN, self._stamp, 0)
            return True
        if queue == _MAIN and uses:
            node.mark = (_MAIN, self._stamp, uses - 1)
            return True
        return False
