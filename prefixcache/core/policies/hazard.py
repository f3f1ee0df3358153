"""Hazard: learn when which kind of block comes back, and keep what is worth most.

**Hazards.**  How likely blocks of a kind come back, by the time since their last use; and what they
are worth.

Time is counted in block visits: a request over n blocks takes n.  Ages fall into `NUM_AGES` buckets
whose edges grow by a constant factor, up to the horizon of the ghosts.

```
age      0 ─┬──┬───┬────┬───── … ─────┬────── 20 capacities
bucket    0 │1 │ 2 │ 3  │             │ 23
            of `exposed[kind][age]` blocks that reached the bucket unused,
               `returned[kind][age]` were used in it; their ratio is the hazard
```

Ghosts count like resident blocks, so what was evicted teaches as much as what was kept.

**Uses.**  One use of a path, and the shadow: what an exact LRU of the same capacity would hold.

```
request 7   ■ ■ ■ ■ ■ ■ ■ ■          all 8 blocks belong to use 7
request 9   ■ ■ ■ ▪ ▪                use 9 took the first 3 over; use 7 keeps the last 5
```

A later use of the same path takes a head of it, and eviction cuts at its end (into ghosts, which
stay with the use); so what a use still owns is one stretch at the end of its path, at most one leaf
is in it, and all of it is of one age.

**The grid of ages.**  Leaves by kind and age: cells in an order of worth that may
change at any time.

```
cell       kind 3, age 7   heap of uses, the oldest first   ← one bit in `filled`, at its rank
             │ the use grows older: it is put into (3, 8)
             │ its leaf is used again, or evicted: what is left here is dropped at the top
```

A use is in the cell of its leaf.  Re-ranking touches cells, never leaves.

**Copies.**  Who copies a part of a block and goes another way says nothing of when its request
returns, so nothing is learnt of it.  But the block was of use: for as many block visits from then
on as half of that part of a capacity has, it is passed over when it would go.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import deque
from heapq import heapify, heappop, heappush
from itertools import compress
from math import exp
from typing import TYPE_CHECKING, ClassVar

import numpy as np
from numpy.typing import NDArray

from prefixcache.core.eviction import LOOKED_AT, EvictionPolicy, Mark, Queue, register
from prefixcache.core.node import common_prefix
from prefixcache.types import TOKEN_BYTES

if TYPE_CHECKING:
    from prefixcache.core.node import Match, Node


Floats = NDArray[np.float64]

NUM_AGES = 24
_FIRST = 0.02
_GROWTH = 1.35
HORIZON = _FIRST * _GROWTH ** (NUM_AGES - 1)
"""Capacities of block visits after which a block that did not return is forgotten: about 20."""

_SURE = 0.98
"""The largest hazard believed; and 1 minus it the largest one in the last bucket."""
_PRIOR_REQUESTS = 8.0
_GROUP_REQUESTS = 12.0
"""As if so many requests had been seen that behaved like all kinds, and like the group."""


class Hazards:
    """Counts of returns by kind and age, and the order of worth that follows from them.

    Args:
        num_groups: Groups of kinds that are much alike.
        num_members: Kinds in a group; kind `group * num_members + member`.
        num_blocks: The pool's capacity, the unit of time.
    """

    def __init__(self, num_groups: int, num_members: int, num_blocks: int) -> None:
        self.num_kinds = num_groups * num_members
        self.edges = [0.0, *(_FIRST * num_blocks * _GROWTH**age for age in range(NUM_AGES))]
        self.returned = [[0.0] * NUM_AGES for _ in range(self.num_kinds)]
        self.exposed = [[0.0] * NUM_AGES for _ in range(self.num_kinds)]
        self._shape = (num_groups, num_members, NUM_AGES)
        self._inner = self.edges[1:-1]
        edges = np.array(self.edges)
        self._width: Floats = np.diff(edges)
        middle = (edges[:-1] + edges[1:]) / 2
        # Before anything is known: a hazard that falls with age like 0.3 / age.
        self._prior: Floats = 1 - np.exp(-0.3 * self._width / (middle + edges[1]))
        # Stopping before one has begun is no choice.
        self._impossible = np.tril(np.ones((NUM_AGES, NUM_AGES), dtype=bool), -1)
        kinds, ages = np.divmod(np.arange(self.num_kinds * NUM_AGES), NUM_AGES)
        self._kinds, self._ages = kinds, -ages

    def bucket(self, age: float) -> int:
        """Give the bucket of an age."""
        return bisect_right(self._inner, age)

    def halve(self) -> None:
        """Forget half, so that what is learnt can change."""
        for table in (self.returned, self.exposed):
            for row in table:
                row[:] = [value / 2 for value in row]

    def estimate(self, run: float) -> Floats:
        """Give the hazard of every kind and age, `[kinds, ages]`.

        A kind leans on its group, a group on all kinds, and those on the prior, as if a few
        requests had been seen.  Blocks of a request return together, so `run` blocks, those of an
        average request, are one observation.
        """
        returned = np.array(self.returned).reshape(self._shape)
        exposed = np.array(self.exposed).reshape(self._shape)
        few = _PRIOR_REQUESTS * max(1.0, run)
        shared = (returned.sum(axis=(0, 1)) + few * self._prior) / (exposed.sum(axis=(0, 1)) + few)
        shared[-1] = min(shared[-1], 1 - _SURE)
        few = _GROUP_REQUESTS * max(1.0, run)
        group = (returned.sum(axis=1) + few * shared) / (exposed.sum(axis=1) + few)
        hazard = (returned + few * group[:, None, :]) / (exposed + few)
        believed: Floats = np.minimum(_SURE, hazard).reshape(self.num_kinds, NUM_AGES)
        return believed

    def worth(self, run: float) -> Floats:
        """Give the index of every kind and age: hits per block and visit, `[kinds, ages]`.

        The Gittins index: the largest ratio, over all ages at which one could give up, of the
        chance that the block returns until then to the time it is held until then.  Unlike the
        hazard it may rise with age, and does: nobody asks again while he is still reading.

        O(kinds · ages²), in numpy; about 0.1 ms.
        """
        hazard = self.estimate(run)
        alive = np.ones_like(hazard)
        np.cumprod(1 - hazard[:, :-1], axis=1, out=alive[:, 1:])
        # Sums from each age to the end: their differences stay exact however few are left.
        hits = np.cumsum((alive * hazard)[:, ::-1], axis=1)[:, ::-1]
        held = np.cumsum((alive * self._width * (1 - hazard / 2))[:, ::-1], axis=1)[:, ::-1]
        upto_hits = np.concatenate([hits[:, 1:], np.zeros_like(hits[:, :1])], axis=1)
        upto_held = np.concatenate([held[:, 1:], np.zeros_like(held[:, :1])], axis=1)
        gain = hits[:, :, None] - upto_hits[:, None, :]
        time = held[:, :, None] - upto_held[:, None, :]
        time[:, self._impossible] = 1.0  # the gain up to an earlier age is none, or less
        best: Floats = (gain / time).max(axis=2)
        return best

    def order(self, run: float) -> list[int]:
        """Give the cells (`kind * NUM_AGES + age`), the worst first; of equals the oldest."""
        order: list[int] = np.lexsort((self._kinds, self._ages, self.worth(run).ravel())).tolist()
        return order


_BEHIND, _CAUGHT_UP = 0.005, 0.0005
"""Shares of recent blocks by which an LRU must be ahead to take over, and to give back."""


_SPARE = 64


class Access:
    """One use of a path: the blocks that no later use has taken over, resident or ghosts."""

    __slots__ = ("age", "kinds", "leaf", "length", "number", "size", "time")

    def __init__(self, number: int, time: int, length: int) -> None:
        self.number = number
        self.time = time
        """Block visits before it."""
        self.length = length
        """Blocks of its path."""
        self.size = 0
        """Blocks that it still owns, ghosts included."""
        self.kinds: dict[int, int] = {}
        """The same, by kind."""
        self.age = 0
        """The bucket that it has reached; the number of buckets once it is forgotten."""
        self.leaf: Node | None = None
        """The leaf among its blocks, if it was put into the queue."""

    def take(self, kind: int, num_blocks: int) -> None:
        """Own blocks."""
        self.size += num_blocks
        self.kinds[kind] = self.kinds.get(kind, 0) + num_blocks

    def drop(self, kind: int, num_blocks: int) -> None:
        """Own blocks no longer."""
        self.size -= num_blocks
        left = self.kinds[kind] - num_blocks
        if left:
            self.kinds[kind] = left
        else:
            del self.kinds[kind]


class LruReference:
    """An exact LRU of the same capacity, by whole uses, and the score against it.

    Marks are `(use, …)`: a block is in the LRU if its use is not older than `first`; of the use at
    the edge the head of what it owns is.  Ghosts beyond the capacity make that exact.
    """

    __slots__ = (
        "_behind",
        "_edge",
        "_seen",
        "_size",
        "_tidy_at",
        "_uses",
        "first",
        "leads",
        "num_blocks",
    )

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.first = 0
        """Number of the oldest use that is in the LRU as a whole."""
        self.leads = False
        """Whether the LRU is ahead, and should decide."""
        self._uses: deque[Access] = deque()
        self._tidy_at = _SPARE
        """Length of `_uses` at which those are dropped that later ones have taken over whole."""
        self._size = 0
        self._edge: Access | None = None
        self._behind = 0.0
        self._seen = 0.0

    def add(self, use: Access, num_joined: int) -> None:
        """Put a use in; `num_joined` of its blocks were not in it.  Amortised O(1)."""
        self._uses.append(use)
        if len(self._uses) > self._tidy_at:
            self._uses = deque(one for one in self._uses if one.size)
            self._tidy_at = 2 * len(self._uses) + _SPARE
        self._size += num_joined
        while self._size > self.num_blocks:
            self._edge = self._uses.popleft()
            self._size -= self._edge.size
            self.first = self._edge.number + 1

    def compare(self, match: Match, tokens: bytes, width: int, run: float) -> None:
        """Count what the LRU would have found of a request.  O(nodes passed).

        Args:
            match: What was found.
            tokens: The request.
            width: Bytes of a block.
            run: Blocks of an average request.
        """
        size = -(-len(tokens) // width)
        keep = exp(-size / (16 * max(self.num_blocks, 8 * run)))
        ahead = self._found(match, tokens, width) - match.end // width
        self._behind = self._behind * keep + ahead
        self._seen = self._seen * keep + size
        if self.leads:
            self.leads = self._behind >= _CAUGHT_UP * self._seen
        else:
            self.leads = self._behind > max(_BEHIND * self._seen, 2 * run)

    def _found(self, match: Match, tokens: bytes, width: int) -> int:
        """Count the leading blocks of a request that the LRU holds."""
        node, found = match.node, match.end // width
        after = found - match.used
        if match.used == len(node.blocks) and self._holds(node, after, match.used) == match.used:
            return found + self._found_below(node, tokens, match.end, width)
        size = match.used
        at: Node | None = node
        while at is not None and at.parent is not None:
            held = self._holds(at, after, size)
            if held:
                return after + held
            at = at.parent
            size = len(at.blocks)
            after -= size
        return 0

    def _found_below(self, node: Node, tokens: bytes, off: int, width: int) -> int:
        """Count the blocks among the ghosts below a node that the LRU holds."""
        limit = len(tokens) - TOKEN_BYTES
        start = off
        while node.ghosts and off + width <= limit:
            ghost = node.ghosts.get(tokens[off : off + width])
            if ghost is None or ghost.mark is None:
                break
            size = len(ghost.tokens)
            same = common_prefix(tokens, off, ghost.tokens, 0, min(size, limit - off)) // width
            held = self._holds(ghost, off // width, same)
            off += held * width
            if held * width < size:
                break
            node = ghost
        return (off - start) // width

    def _holds(self, node: Node, start: int, size: int) -> int:
        """Count how many of a node's first `size` blocks, at `start`, the LRU holds."""
        if node.mark is None:
            return size
        use: Access = node.mark[0]
        if use.number >= self.first:
            return size
        if use is not self._edge:
            return 0
        end = use.length - use.size + self.num_blocks - self._size
        return max(0, min(size, end - start))


_SPARE = 1024
"""Entries out of date that may be kept beside three times as many as there are leaves."""


class AgeGrid:
    """The unprotected leaves; the worst cell gives first, or, while the shadow leads, the oldest.

    Marks are `(use, uses, kind)`, or of what was copied `(use, uses, kind, until)`: it is passed
    over before that time.
    """

    __slots__ = (
        "_ages",
        "_bits",
        "_filled",
        "_heaps",
        "_num_put",
        "_order",
        "_powers",
        "_serial",
        "_shadow",
        "_spared",
        "_tidy_at",
        "_unmarked",
        "time",
    )

    def __init__(self, num_kinds: int, shadow: LruReference) -> None:
        self.time = 0
        """Block visits so far."""
        self._spared: list[tuple[int, int, Node, Mark]] = []
        """Leaves that were passed over: until when, a number, and what their marks were.

        Each stays for half a capacity of visits at most, used again meanwhile or not, and each
        visit evicts one block at most, which passes over two dozen at most.
        """
        self._serial = 0
        self._shadow = shadow
        self._heaps: list[list[tuple[int, Access]]] = [[] for _ in range(num_kinds * NUM_AGES)]
        self._powers = [1 << rank for rank in range(num_kinds * NUM_AGES)]
        self._order: list[int] = []
        self._bits: list[int] = []
        self._filled = 0
        self._ages: list[int] = []
        """The bits of all cells of one age, the oldest first; empty until needed."""
        self._unmarked: list[Node] = []
        self._num_put = 0
        """Entries made since all were looked at."""
        self._tidy_at = _SPARE

    def rank(self, order: list[int]) -> None:
        """Give the cells a new order, the worst first.  O(cells)."""
        bits = [0] * len(order)
        for cell, bit in zip(order, self._powers, strict=True):
            bits[cell] = bit
        filled = sum(compress(bits, self._heaps))  # those of the heaps that are not empty
        self._order, self._bits, self._filled, self._ages = order, bits, filled, []

    def push(self, node: Node) -> None:
        """Add a leaf.  O(log leaves), amortised."""
        node.queued = 1
        if node.mark is None:
            self._unmarked.append(node)
            self._count()
        else:
            use = node.mark[0]
            use.leaf = node
            cell = self._cell(use)
            if cell >= 0:
                self._put(cell, use)

    def age(self, use: Access) -> None:
        """Put a use that has just grown older into its next cell.  O(log leaves), amortised.

        Uses grow older in order: what is before it in the cell that it leaves is out of date.
        """
        cell = self._cell(use)
        if cell < 0:
            use.leaf = None  # not a leaf now; if it becomes one again, it is pushed
            return
        number = use.number
        left = self._heaps[cell - 1]
        while left and left[0][0] <= number:
            heappop(left)
        self._put(cell, use)

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.

        O(log leaves), for each copy that it passes over, too: two dozen at most.
        """
        for _ in range(LOOKED_AT):
            if not self._spared or self._spared[0][0] > self.time:
                break
            if (node := self._living(heappop(self._spared))) is not None:
                self.push(node)
        while self._unmarked:
            node = self._unmarked.pop()
            node.queued = 0
            if node.is_evictable and node.mark is None:
                return node
            if node.is_evictable:
                self.push(node)
        for left in range(LOOKED_AT, -1, -1):
            use = self._oldest() if self._shadow.leads else self._worst()
            if use is None or use.leaf is None:
                break
            node = use.leaf
            heappop(self._heaps[self._cell(use)])
            if not left or not self._spare(node, use):
                node.queued = 0
                return node
        while self._spared:
            if (last := self._living(heappop(self._spared))) is not None:
                last.queued = 0
                return last
        return None

    def _spare(self, node: Node, use: Access) -> bool:
        """Pass over a leaf that was copied lately.  O(log leaves)."""
        mark = node.mark
        if len(mark) < 4 or mark[3] <= self.time:
            return False
        use.leaf = None  # until it is pushed again
        self._serial += 1
        heappush(self._spared, (mark[3], self._serial, node, mark))
        return True

    @staticmethod
    def _living(spared: tuple[int, int, Node, Mark]) -> Node | None:
        """Give a leaf that was passed over, if nothing has happened to it since."""
        _, _, node, mark = spared
        return node if node.is_evictable and node.mark is mark else None

    def _put(self, cell: int, use: Access) -> None:
        heappush(self._heaps[cell], (use.number, use))
        self._filled |= self._bits[cell]
        self._count()

    def _count(self) -> None:
        """Count an entry; now and then drop what belongs elsewhere by now.  Amortised O(1)."""
        self._num_put += 1
        if self._num_put <= self._tidy_at:
            return
        self._num_put = 0
        self._unmarked = [
            node
            for node in dict.fromkeys(self._unmarked)
            if node.is_evictable and node.mark is None
        ]
        living = len(self._unmarked)
        for cell, heap in enumerate(self._heaps):
            if heap:
                there = {entry[0]: entry for entry in heap if self._cell(entry[1]) == cell}
                heap[:] = there.values()
                heapify(heap)
                living += len(heap)
        self._tidy_at = max(_SPARE, 2 * living)

    def _worst(self) -> Access | None:
        while self._filled:
            lowest = self._filled & -self._filled
            use = self._head(self._order[lowest.bit_length() - 1])
            if use is not None:
                return use
        return None

    def _oldest(self) -> Access | None:
        """Give the oldest use.  O(kinds), and O(cells) once after each ranking."""
        if not self._ages:
            self._ages = [sum(self._bits[age::NUM_AGES]) for age in range(NUM_AGES - 1, -1, -1)]
        for mask in self._ages:
            oldest: Access | None = None
            left = self._filled & mask
            while left:
                lowest = left & -left
                left ^= lowest
                use = self._head(self._order[lowest.bit_length() - 1])
                if use is not None and (oldest is None or use.number < oldest.number):
                    oldest = use
            if oldest is not None:
                return oldest
        return None

    def _head(self, cell: int) -> Access | None:
        """Give a cell's oldest use; drop those that are elsewhere by now."""
        heap = self._heaps[cell]
        while heap:
            use = heap[0][1]
            if self._cell(use) == cell:
                return use
            heappop(heap)
        self._filled &= ~self._bits[cell]
        return None

    def _cell(self, use: Access) -> int:
        """Give where a use belongs; -1 if it has no leaf now."""
        leaf = use.leaf
        # `leaf.is_evictable`, written out: this is the policy's most frequent question.
        if leaf is None or leaf.lock_ref or leaf.parent is None or not leaf.blocks:
            return -1
        if (leaf.only is not None or leaf.several is not None) and leaf.is_inner:
            return -1
        mark = leaf.mark
        if mark is None or mark[0] is not use:
            return -1
        kind: int = mark[2]
        age = use.age
        return kind * NUM_AGES + (age if age < NUM_AGES else NUM_AGES - 1)


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
        self.shadow = LruReference(num_blocks)
        self._cells = AgeGrid(self.hazards.num_kinds, self.shadow)
        self._cells.rank(self.hazards.order(1.0))
        self._by_age: list[deque[Access]] = [deque() for _ in range(NUM_AGES)]
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

    def used(self, node: Node, stamp: int, top: Node) -> None:
        """Learn from the returns on the path, and make it this use's."""
        path, size = [], 0
        at = node
        while at is not top and at.parent is not None:
            path.append(at)
            size += len(at.blocks)
            at = at.parent
        if not path:
            return
        self._num_uses += 1
        self._run += (size - self._run) * max(0.01, 1 / self._num_uses)
        use = Access(self._num_uses, self._time, size)
        self._hand_over(path, use, self._growth(path, size))
        self._by_age[0].append(use)
        self._time += size
        self._cells.time = self._time
        self._age()
        if self._num_uses % _RANKED_EVERY == 0:
            if self._time - self._halved_at >= self.hazards.edges[-1]:
                self._halved_at = self._time
                self.hazards.halve()
            self._cells.rank(self.hazards.order(self._run))

    def copied(self, node: Node, num_tokens: int) -> None:
        """Let a block that was copied from be passed over for a time.  O(1)."""
        if node.mark is not None:
            visits = -(-num_tokens * TOKEN_BYTES * self.num_blocks // (2 * self.block_bytes))
            node.mark = (*node.mark[:3], max([self._time + visits, *node.mark[3:]]))

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

    def _hand_over(self, path: list[Node], use: Access, growth: int) -> None:
        """Count the returns; give all blocks of the path to the new use."""
        hazards, time, first = self.hazards, self._time, self.shadow.first
        joined = use.length
        end = path[0]
        for node in path:
            count = len(node.blocks)
            uses = 1
            if node.mark is not None:
                old, uses, kind = node.mark[:3]
                old.drop(kind, count)
                hazards.returned[kind][hazards.bucket(time - old.time)] += count
                if old.number >= first:
                    joined -= count
                uses = min(_MOST_USES, uses + 1)
            is_end = node is end and count == 1 and not node.is_inner
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
