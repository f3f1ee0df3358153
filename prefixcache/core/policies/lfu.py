"""Least frequently used."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import EvictionPolicy, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node


@register
class Lfu(EvictionPolicy):
    """Least frequently used, by the number of leases that used a block while it was cached.

    Among equals the oldest goes first; a count is forgotten when the block is evicted (in-cache
    LFU, without ageing).

    Source: folklore; Robinson and Devarakonda, *Data cache management using frequency-based
    replacement*, SIGMETRICS 1990, for its weakness.  State: the count, per run.  O(nodes on the
    path) a use, O(log leaves) an eviction.
    """

    name: ClassVar[str] = "lfu"

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Count one more use of every block on the path."""
        while node is not top and node.parent is not None:
            node.mark = (node.mark or 0) + 1
            node = node.parent

    def key(self, node: Node) -> float:
        """Give the count, and the last use among equal counts.  An integer: exact at any size."""
        return ((node.mark or 0) << 64) + node.last_used

    def uses(self, node: Node) -> int | None:
        """Give the count."""
        return node.mark or 0
