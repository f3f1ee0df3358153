"""First in, first out."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import EvictionPolicy, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node


@register
class Fifo(EvictionPolicy):
    """First in, first out: by the lease that stored a block, however often it was used since.

    Source: folklore.  State: the stamp of the first use, per run.  O(nodes on the path) a use,
    O(log leaves) an eviction.
    """

    name: ClassVar[str] = "fifo"

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Note when the new blocks of the path came."""
        while node is not top and node.parent is not None:
            if node.mark is None:
                node.mark = stamp
            node = node.parent

    def key(self, node: Node) -> float:
        """Give the stamp of the first use; what nobody has used yet is the newest."""
        return float("inf") if node.mark is None else float(node.mark)
