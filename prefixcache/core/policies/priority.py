"""Priority with a time to live."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heappush
from math import inf
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.eviction import LOOKED_AT, Heap, LanePolicy, Lanes, Queue, Tidying, register
from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from prefixcache.core.node import Node
    from prefixcache.types import Namespace

LOWEST, NORMAL, HIGHEST = 0, 4, 9

MAX_RANKS = 1024
"""Namespaces with a level of their own: each was chosen by hand, and is remembered while it is
empty, too."""


@register
class Priority(LanePolicy):
    """Levels 0 to 9, each for a time; the lowest level goes first, within a level the oldest.

    A level is a wish, not a pin: blocks of a high level go too when nothing lower is left, so the
    pool can never wedge.  When its time is over a block is of level 4 again, like all others.

    Give a level to a whole namespace (`rank`, renewed by every use), or to what is stored on the
    path to a node (`retain`); the higher one counts.

    Source: the retention priorities of NVIDIA's TensorRT-LLM and the soft pins that serving engines
    came to.  State: (level, until) per run, a heap of ends.  O(nodes on the path) a use, O(log
    leaves) an eviction and an end.
    """

    name: ClassVar[str] = "priority"
    num_lanes: ClassVar[int] = HIGHEST + 1

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self._now = -inf
        self._ranks: dict[Namespace, tuple[int, float]] = {}
        self._lanes = _TimedLanes(self)

    def rank(self, namespace: Namespace, level: int, ttl_s: float = inf) -> None:
        """Give all that is used in a namespace from now on a level, for `ttl_s` after each use.

        The level of all others forgets it again.

        Raises:
            InvalidRequest: too many namespaces have another one.
        """
        if level == NORMAL:
            self._ranks.pop(namespace, None)
            return
        if namespace not in self._ranks and len(self._ranks) >= MAX_RANKS:
            raise InvalidRequest(
                f"{len(self._ranks)} namespaces have a level of their own; the limit is {MAX_RANKS}"
            )
        self._ranks[namespace] = (level, ttl_s)

    def retain(self, node: Node, level: int, until: float) -> None:
        """Give what is stored on the path to the end of a protected node a level."""
        while node.parent is not None:
            node.mark = self._higher(node.mark, (level, until))
            node = node.parent

    def tick(self, now: float) -> None:
        """Take the time; move what is no longer of a special level."""
        self._now = now
        self._lanes.expire(now)

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Give the path its namespace's level, if that has one."""
        rank = self._ranks.get(node.root.namespace)
        if rank is not None:
            self.retain(node, rank[0], self._now + rank[1])

    def _higher(
        self, mark: tuple[int, float] | None, other: tuple[int, float]
    ) -> tuple[int, float]:
        """Give the one of the higher level; the later one of two of the same level."""
        return other if mark is None or mark[1] <= self._now else max(mark, other)

    def lane(self, node: Node) -> int:
        """Give the level by now."""
        mark = node.mark
        return NORMAL if mark is None or mark[1] <= self._now else int(mark[0])

    def choose(self, heads: Sequence[Node | None]) -> int:
        """Take the lowest level that has a leaf."""
        return next(lane for lane, head in enumerate(heads) if head is not None)

    def queue(self) -> Queue:
        """Give the lanes, which know when a leaf's level ends."""
        return self._lanes


class _TimedLanes(Lanes):
    """Lanes that look at a leaf again when its level's time is over."""

    __slots__ = ("_ends", "_looking")

    def __init__(self, policy: Priority) -> None:
        super().__init__(policy)
        self._ends = Heap()
        self._looking = Tidying()

    def push(self, node: Node) -> None:
        super().push(node)
        if node.mark is not None and node.mark[1] < inf:
            heappush(self._ends.fresh, (node.mark[1], self._serial, node))
            if self._looking.is_on:
                self._looking.seen.add(node)
            if self._looking.is_on or self._looking.is_due(len(self._ends)):
                self._tidy_ends()

    def expire(self, now: float) -> None:
        """Put leaves whose time is over into their new lane.  Amortised O(log leaves)."""
        while (first := self._ends.first()) is not None and first[0] <= now:
            node = self._ends.pop()[2]
            if node.is_evictable:
                super().push(node)

    def _tidy_ends(self) -> None:
        """Look at some ends; keep one per living leaf, that of its present level."""
        ends, looking = self._ends, self._looking
        if not looking.is_on:
            ends.begin()
            looking.begin()
        for _ in range(LOOKED_AT):
            if not ends.old:
                looking.end(len(ends))
                return
            entry = ends.last()
            until, _, node = entry
            is_present = node.mark is not None and node.mark[1] == until
            if node.is_evictable and is_present and node not in looking.seen:
                looking.seen.add(node)
                heappush(ends.fresh, entry)
