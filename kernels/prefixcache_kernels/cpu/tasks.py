"""A batch cut into tasks: some queries and one stretch of keys that they attend.

```
sequence 0   P P P P a a        tasks of a batch          queries      keys
sequence 1   P P P P b          the run                   0 1 2        P P P P
sequence 2   P P P P c c c      own parts                 0 | 1 | 2    a a | b | c c c
```

Long stretches are cut again, so that all cores have work, and so that sums stay short; so are many
queries, whose tasks each read the keys once.  A query has a *place* in every task that it is in.
Its partial answers are merged in the order of its places, whatever the number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt

from prefixcache_kernels.groups import Run

Array32 = npt.NDArray[np.int32]
Array64 = npt.NDArray[np.int64]

MAX_ROWS: Final = 192
"""Rows (queries times heads of a group) of a task: they and a tile of keys stay in the cache."""

MAX_KEYS: Final = 1024
"""Keys of a task, if its queries are few enough that more partial answers are cheap."""

TILE: Final = 16
"""Keys that the library attends at a time: that of `tile.h`."""

MAX_SPLIT: Final = 64
"""Queries up to which the keys of a task are cut: more than that have many tasks anyway."""


@dataclass(slots=True)
class Tasks:
    """What the library works on; the arrays of `struct call` in `attend.c`."""

    tasks: Array64
    """`[num, 5]`: first place, queries, first id in `blocks`, slots skipped, keys."""
    queries: Array32
    """`[places]`: the packed query."""
    low: Array32
    """`[places]`: its first key of the task."""
    high: Array32
    """`[places]`: its last key, plus 1."""
    blocks: Array32
    """The block tables, row after row."""
    merge_start: Array32
    """`[queries + 1]`: where a query's places begin in `merge`."""
    merge: Array32
    """`[places]`, sorted by query."""

    @classmethod
    def cut(
        cls,
        tables: Array32,
        starts: Array64,
        contexts: Array64,
        block_size: int,
        group: int,
        window: int | None = None,
        own_from: Array64 | None = None,
        runs: Sequence[Run] = (),
        positions: Sequence[int] = (),
        *,
        fixed: bool = False,
    ) -> Tasks:
        """Cut a batch.  Changes nothing.  A few dozen NumPy calls, none per sequence or token.

        Args:
            tables: `[S, max_blocks]`, rows one after the other in memory; kept, not copied.
            starts: `[S + 1]`; sequence s has the packed queries `starts[s]` up to `starts[s + 1]`.
            contexts: `[S]`; keys of each sequence, its new tokens included.
            block_size: Tokens of a block.
            group: Query heads that share a key head.
            window: Keys that a query attends at most, itself included; None: all before it.
            own_from: `[S]`; for each sequence, how many of its first blocks the runs attend.
            runs: What the tables share, before all queries and windows.
            positions: The rows that runs speak of: `GroupPlan.positions`.
            fixed: Cut a query's keys where its own positions say, whatever else is in the batch;
                without runs.

        >>> from prefixcache_kernels.groups import GroupPlan
        >>> table = np.array([[7, 8], [7, 9]], np.int32)
        >>> plan = GroupPlan.build(table, [1, 1])  # both begin with block 7
        >>> step = table, np.array([0, 1, 2]), np.array([6, 5]), 4
        >>> own_from = np.array([1, 1])
        >>> made = Tasks.cut(*step, 1, None, own_from, plan.runs, plan.positions)
        >>> made.tasks.tolist()  # the run; then what each has behind it
        [[0, 2, 0, 0, 4], [2, 1, 1, 0, 2], [3, 1, 3, 0, 1]]
        >>> made.merge_start.tolist(), made.merge.tolist()
        ([0, 2, 4], [0, 2, 1, 3])
        """
        lens = np.diff(starts)
        begin = np.zeros(len(lens), np.int64) if own_from is None else own_from * block_size
        stretches = _Stretches.of_own(lens, contexts, begin, window)
        if runs := [run for run in runs if run.blocks]:
            members = _Stretches.of_runs(runs, positions, starts, lens, block_size)
            stretches = members.then(stretches)
        cut = stretches.by_queries(max(1, MAX_ROWS // group))
        cut = cut.by_position() if fixed else cut.by_keys()
        num_keys = cut.end - cut.begin
        first = _sums(cut.num)
        blocks = cut.row * tables.shape[1] + cut.begin // block_size
        tasks = np.stack([first[:-1], cut.num, blocks, cut.begin % block_size, num_keys], 1)
        base, most = np.repeat(cut.begin, cut.num), np.repeat(num_keys, cut.num)
        counts = np.bincount(cut.query, minlength=int(starts[-1]))
        return cls(
            tasks,
            cut.query.astype(np.int32),
            np.clip(cut.low - base, 0, most).astype(np.int32),
            np.clip(cut.high - base, 0, most).astype(np.int32),
            tables.reshape(-1),
            _sums(counts).astype(np.int32),
            np.argsort(cut.query, kind="stable").astype(np.int32),
        )

    def ids(self, block_size: int) -> Array32:
        """Give the blocks that are read, as often as tasks name them."""
        _, _, first, skip, keys = self.tasks.T
        return self.blocks[_ranges(first, -(-(skip + keys) // block_size))]


@dataclass(slots=True)
class _Stretches:
    """Consecutive keys with the queries that attend them, whose visibility is absolute."""

    num: Array64
    """`[N]`: queries of each."""
    row: Array64
    """`[N]`: a table row that names the blocks."""
    begin: Array64
    end: Array64
    """`[N]`: the keys."""
    query: Array64
    """`[places]`, one stretch after the other: the packed query."""
    low: Array64
    high: Array64
    """`[places]`: the keys that it sees, whether they are in the stretch or not."""

    @classmethod
    def of_own(
        cls, lens: Array64, contexts: Array64, begin: Array64, window: int | None
    ) -> _Stretches:
        """What each sequence has for itself, from `begin` on; none if it has no queries."""
        total = int(lens.sum())
        query = np.arange(total)
        behind = np.repeat(contexts - np.cumsum(lens), lens)
        high = query + behind + 1
        low = np.zeros(total, np.int64) if window is None else np.maximum(high - window, 0)
        row = np.flatnonzero(lens)
        return cls(lens[row], row, begin[row], contexts[row], query, low, high)

    @classmethod
    def of_runs(
        cls,
        runs: Sequence[Run],
        positions: Sequence[int],
        starts: Array64,
        lens: Array64,
        block_size: int,
    ) -> _Stretches:
        """The runs with the queries of their members, all of which see all of its keys."""
        row, first, blocks, start, end, _ = np.array(runs, np.int64).T
        members = np.array(positions)[_ranges(start, end - start)]
        query = _ranges(starts[members], lens[members])
        ends = _sums(lens[members])[_sums(end - start)]
        num = np.diff(ends)
        low, high = first * block_size, (first + blocks) * block_size
        made = cls(num, row, low, high, query, np.repeat(low, num), np.repeat(high, num))
        return made if num.all() else made._picked(np.flatnonzero(num))  # some have no queries

    def _picked(self, which: Array64) -> _Stretches:
        """Give some of them, in an order; the places stay as they are."""
        num, row, begin, end = (part[which] for part in (self.num, self.row, self.begin, self.end))
        return replace(self, num=num, row=row, begin=begin, end=end)

    def then(self, other: _Stretches) -> _Stretches:
        """Give these and others behind them."""
        return _Stretches(
            *(
                np.concatenate([getattr(self, name), getattr(other, name)])
                for name in self.__slots__
            )
        )

    def by_queries(self, most: int) -> _Stretches:
        """Cut those with more than `most` queries; each part has the keys that its queries see."""
        if not (self.num > most).any():
            return self._seen()
        parts = -(-self.num // most)
        which = np.repeat(np.arange(len(parts)), parts)
        num = np.minimum(self.num[which] - most * _ranges(0 * parts, parts), most)
        return replace(self._picked(which), num=num)._seen()

    def _seen(self) -> _Stretches:
        """Leave out keys before the first and after the last that some query sees."""
        last = np.cumsum(self.num)
        begin = np.maximum(self.begin, self.low[last - self.num])
        return replace(self, begin=begin, end=np.minimum(self.end, self.high[last - 1]))

    def by_keys(self) -> _Stretches:
        """Cut those with more than `MAX_KEYS` keys, if their queries are few."""
        keys = self.end - self.begin
        parts = np.where(self.num <= MAX_SPLIT, -(-keys // MAX_KEYS), 1)
        if not (parts > 1).any():
            return self
        size = -(-keys // parts)
        parts = -(-keys // size)  # none is left empty by rounding
        which = np.repeat(np.arange(len(parts)), parts)
        begin = self.begin[which] + size[which] * _ranges(0 * parts, parts)
        return self._parts(which, begin, begin + size[which])

    def by_position(self) -> _Stretches:
        """Cut all at every `MAX_KEYS`-th key, and begin with a whole tile.

        So which keys a query's partial answers are of depends on its position alone: those that it
        does not see add nothing.
        """
        first, last = self.begin // MAX_KEYS, (self.end - 1) // MAX_KEYS
        parts = last - first + 1
        which = np.repeat(np.arange(len(parts)), parts)
        begin = MAX_KEYS * _ranges(first, parts)
        start = self.begin[which] // TILE * TILE
        return self._parts(which, np.maximum(begin, start), begin + MAX_KEYS)

    def _parts(self, which: Array64, begin: Array64, end: Array64) -> _Stretches:
        """Give parts of these, from `begin` up to `end`, at most to their own end."""
        made = self._picked(which)
        places = _ranges((np.cumsum(self.num) - self.num)[which], made.num)
        return replace(
            made,
            begin=begin,
            end=np.minimum(end, made.end),
            query=self.query[places],
            low=self.low[places],
            high=self.high[places],
        )


def _sums(counts: Array64) -> Array64:
    """Give 0 and the running sums.

    >>> _sums(np.array([2, 0, 3])).tolist()
    [0, 2, 2, 5]
    """
    return np.concatenate([[0], np.cumsum(counts)])


def _ranges(starts: Array64, counts: Array64) -> Array64:
    """Give some ranges, one after the other.

    >>> _ranges(np.array([5, 1]), np.array([2, 3])).tolist()
    [5, 6, 1, 2, 3]
    """
    ends = np.cumsum(counts)
    return np.repeat(starts - ends + counts, counts) + np.arange(int(ends[-1]) if len(ends) else 0)
