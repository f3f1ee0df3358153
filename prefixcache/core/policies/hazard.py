"""Hazard: learn when which kind of block comes back, and keep what is worth most."""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, ClassVar

from prefixcache.core.cells import Cells
from prefixcache.core.eviction import EvictionPolicy, Mark, Queue, register
from prefixcache.core.hazards import HORIZON, NUM_AGES, Hazards
from prefixcache.core.uses import Shadow, Use

if TYPE_CHECKING:
    from prefixcache.core.node import Match, Node

_MOST_USES = 4
_FRESH_SHORT, _FRESH, _FRESH_LONG, _GREW_MUCH, _GREW_LITTLE = range(5)
_NUM_GROWTHS = 5
_RANKED_EVERY = 16


@register
class Hazard(EvictionPolicy):
    """Evict what is worth least: hits to expect per block and time, learnt online by kind and age.

    A kind is: how often the block was used (1 to 4 and more) · whether it is the last block of its
    path · how the request that used it last grew: a new prompt (below half, above three times, or
    around the length of an average one), or the continuation of a known one (by more than a quarter
    of an average one, or not).  All blocks of a request are of one age, and return together.

    It never has to guess whether that pays: an exact LRU of the same capacity runs along as a
    shadow (tokens of ghosts and counters only), and decides while it is ahead by half a per cent of
    recent blocks.

    Source: our own; the index is Gittins' (*Bandit processes and dynamic allocation indices*, 1979)
    for a job that may never end, hazards by age are those of Beckmann, Chen and Cidon, *LHD:
    improving cache hit rate by maximizing hit density*, NSDI 2018, with two differences: ages of
    ghosts count too, and whole requests are observed.  State: (use, count, kind) per run; a record
    per use within 20 capacities; ghosts for as long.  O(nodes on the path) a use, amortised, and
    0.2 ms every 16 uses; O(log leaves) an eviction.
    """

    name: ClassVar[str] = "hazard"
    ghosts: ClassVar[float] = HORIZON
    marks_ends: ClassVar[bool] = True

    def __init__(self, num_blocks: int = 1) -> None:
        super().__init__(num_blocks)
        self.hazards = Hazards(2 * _MOST_USES, _NUM_GROWTHS, num_blocks)
        self.shadow = Shadow(num_blocks)
        self._cells = Cells(self.hazards.num_kinds, self.shadow)
        self._cells.rank(self.hazards.order(1.0))
        self._by_age: list[deque[Use]] = [deque() for _ in range(NUM_AGES)]
        self._ends = self.hazards.edges[1:]
        self._time = 0
        """Block visits so far."""
        self._halved_at = 0
        self._num_uses = 0
        self._run = 0.0
        """Blocks of an average request, lately."""

    def queue(self) -> Queue:
        """Give the cells."""
        return self._cells

    def asked(self, match: Match, tokens: bytes) -> None:
        """Compare with what the shadow would have found."""
        self.shadow.compare(match, tokens, self.block_bytes, self._run)

    def used(self, node: Node, stamp: int) -> None:
        """Learn from the returns on the path, and make it this use's."""
        path, size = [], 0
        at = node
        while at.parent is not None:
            path.append(at)
            size += len(at.blocks)
            at = at.parent
        if not path:
            return
        self._num_uses += 1
        self._run += (size - self._run) * max(0.01, 1 / self._num_uses)
        use = Use(self._num_uses, self._time, size)
        self._hand_over(path, use, self._growth(path, size))
        self._by_age[0].append(use)
        self._time += size
        self._age()
        if self._num_uses % _RANKED_EVERY == 0:
            if self._time - self._halved_at >= self.hazards.edges[-1]:
                self._halved_at = self._time
                self.hazards.halve()
            self._cells.rank(self.hazards.order(self._run))

    def _growth(self, path: list[Node], size: int) -> int:
        """Say how a request grew out of what was known."""
        known = size
        for node in path:
            if node.mark is not None:
                break
            known -= len(node.blocks)
        if known <= 1:
            if size >= 3 * self._run:
                return _FRESH_LONG
            return _FRESH_SHORT if size < self._run / 2 else _FRESH
        return _GREW_MUCH if size - known >= self._run / 4 else _GREW_LITTLE

    def _hand_over(self, path: list[Node], use: Use, growth: int) -> None:
        """Count the returns; give all blocks of the path to the new use."""
        hazards, time, first = self.hazards, self._time, self.shadow.first
        joined = use.length
        end = path[0]
        for node in path:
            count = len(node.blocks)
            uses = 1
            if node.mark is not None:
                old, uses, kind = node.mark
                old.drop(kind, count)
                hazards.returned[kind][hazards.bucket(time - old.time)] += count
                if old.number >= first:
                    joined -= count
                uses = min(_MOST_USES, uses + 1)
            is_end = node is end and count == 1 and not node.children
            kind = (2 * uses - 1 - is_end) * _NUM_GROWTHS + growth
            node.mark = (use, uses, kind)
            use.take(kind, count)
        for kind, count in use.kinds.items():
            hazards.exposed[kind][0] += count
        self.shadow.add(use, joined)

    def _age(self) -> None:
        """Move on the uses that have reached the next bucket.  Amortised O(ages) a use."""
        time, exposed, by_age = self._time, self.hazards.exposed, self._by_age
        for age, (queue, edge) in enumerate(zip(by_age, self._ends, strict=True), 1):
            before = time - edge
            while queue and queue[0].time <= before:
                use = queue.popleft()
                use.age = age
                if not use.size or age == NUM_AGES:
                    continue  # nothing to learn any more; a leaf stays where it is
                for kind, count in use.kinds.items():
                    exposed[kind][age] += count
                by_age[age].append(use)
                if use.leaf is not None:
                    self._cells.age(use)

    def lost(self, node: Node, num_blocks: int) -> Mark:
        """Let the ghost stay with its use, which forgets the node."""
        mark = node.mark
        if mark is not None and mark[0].leaf is node:
            mark[0].leaf = None  # what has blocks left is pushed again
        return mark

    def forgotten(self, mark: Mark, num_blocks: int) -> None:
        """Take blocks without a ghost from their use."""
        if mark is not None:
            mark[0].drop(mark[2], num_blocks)

    def revived(self, ghost: Node) -> None:
        """Treat a ghost from beyond the horizon as new."""
        mark = ghost.mark
        if mark is not None and mark[0].age == NUM_AGES:
            mark[0].drop(mark[2], len(ghost.blocks))
            ghost.mark = None
