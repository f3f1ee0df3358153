"""SIEVE."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LanePolicy, register

if TYPE_CHECKING:
    from prefixcache.core.node import Node

_ROUND = 1 << 64


@register
class Sieve(LanePolicy):
    """SIEVE: a FIFO with a hand that passes over what was used, in place, and evicts the rest.

    ```
    old ──── born ────► young
      v   ·   v   ·   ·          v: used since the hand came by
          ▲ hand: evicts here, clears every v that it passes, begins again at the old end
    ```

    Source: Zhang, Yang, Yue, Vigfusson and Rashmi, *SIEVE is simpler than LRU*, NSDI 2024.  State:
    (born, used) per run, the hand.  A leaf's key is the round in which the hand will meet it, then
    its birth; so the list is a heap.  O(nodes on the path) a use, O(log leaves) an eviction,
    amortised.
    """

    name: ClassVar[str] = "sieve"
    num_lanes: ClassVar[int] = 1

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._round = 0
        self._hand = 0
        """Twice the birth of the block that the hand is at; one more if it has passed it."""

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Put new blocks of the path at the young end; mark the others as used."""
        while node is not top and node.parent is not None:
            mark = node.mark
            if mark is None:
                node.mark = (stamp, False)
            elif not mark[1]:
                node.mark = (mark[0], True)
            node = node.parent

    def lane(self, node: Node) -> int:
        """Give the only lane."""
        return 0

    def key(self, node: Node) -> float:
        """Give the round in which the hand comes by, then the birth.  An integer, exact."""
        born = node.last_used if node.mark is None else int(node.mark[0])
        return (self._round + (2 * born < self._hand)) * _ROUND + born

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take what the hand meets next."""
        return 0

    def spares(self, node: Node) -> bool:
        """Move the hand to this leaf, and past it if it was used."""
        born, used = (node.last_used, False) if node.mark is None else node.mark
        if 2 * born < self._hand:
            self._round += 1
        self._hand = 2 * born + used
        if used:
            node.mark = (born, False)
        return bool(used)
