"""Cost-aware: what recomputing a block would cost."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import EvictionPolicy, Mark, register
from prefixcache.types import TOKEN_BYTES

if TYPE_CHECKING:
    from prefixcache.core.node import Node


@register
class CostAware(EvictionPolicy):
    """Greedy-dual by cost and frequency: a block deep in a prompt is dearer to compute again.

    `H = L + uses · cost`, with `L` the H of the last block evicted, so that what is not used ages.
    Blocks are of one size; computing a token at position p costs 1 for the linear layers and
    p / 32,768 for attention (about where both are equal in a model of 8 billion parameters).

    Source: Cherkasova, *Improving WWW proxies performance with Greedy-Dual-Size-Frequency caching
    policy*, HP Labs 1998; Young's greedy-dual.  State: (uses, L at the last use) per run, `L`.
    O(nodes on the path) a use; O(log leaves + nodes above) an eviction.
    """

    name: ClassVar[str] = "cost-aware"
    even_at: ClassVar[int] = 32_768
    """Tokens of context at which attention costs as much as the linear layers."""

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._level = 0.0

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Count the use of the path's blocks, and raise them to today's level."""
        level = self._level
        while node is not top and node.parent is not None:
            uses = 1 if node.mark is None else node.mark[0] + 1
            node.mark = (uses, level)
            node = node.parent

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Raise the level to that of what goes."""
        self._level = max(self._level, self.key(node))

    def key(self, node: Node) -> float:
        """Give H of the leaf's last block."""
        uses, level = (0, 0.0) if node.mark is None else node.mark
        position, above = 0, node
        while above.parent is not None:
            position += len(above.tokens)
            above = above.parent
        return float(level + uses * (1.0 + position / (TOKEN_BYTES * self.even_at)))
