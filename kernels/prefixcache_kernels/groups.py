"""Which sequences of a batch read the same blocks: found once a step, so that each is read once.

The service's tree stores a shared prefix in one run of blocks, and every lease that uses it names
these blocks in its table.  So the tables of a batch are a picture of the tree: where two of them
begin with the same ids, the sequences share a path.

```
row   block table              sorted                  runs, a forest of several levels
0     7 8 9 4 4a               1   7 8 9 2 3 .         ┌ 7 8 9 ────────────┐ level 0: positions 0-2
1     7 8 9 2 3                0   7 8 9 4 4a          │ 2 3 │ 4 4a │ 4 4b │   own parts, or
2     7 8 9 4 4b               2   7 8 9 4 4b          │     └ 4 ──────────┤ level 1: positions 1-2
3     5 6                      3   5 6                 5 6 ───────────────── shares nothing
```

A *position* is a sequence's place in this order.  Every key of a sequence lies in exactly one run
on its path or in its own part, so attention over each of them, merged by log-sum-exp, is attention
over all.  Shared are whole blocks that lie before all queries of a sequence: they are written and
never change while a lease holds them, and no query needs a mask there.

A run costs a pass of its own and one partial answer per sequence.  `SharingCost` says in bytes when
that is less than what it saves; where it is not, the blocks stay in the sequences' own parts.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.checks import check_tensors, is_plain, same_memory

Tables: TypeAlias = npt.NDArray[np.int32]

MAX_LEVELS: Final = 4
"""Runs on one path.  Deeper sharing stays in the own parts: correct, only read more often."""


class Run(NamedTuple):
    """Neighbouring positions that read the same blocks."""

    row: int
    """A batch row whose table names the blocks."""
    first: int
    """Index in that table of the first of them."""
    blocks: int
    """How many; all of them whole."""
    start: int
    """The first position that reads them."""
    end: int
    """One after the last."""
    level: int
    """Runs above it on the path."""


_NO_RUN: Final = Run(0, 0, 0, 0, 0, 0)
"""Padding of a plan: reads nothing, for nobody."""


@dataclass(frozen=True, slots=True)
class SharingCost:
    """When to read a run once for all, counted in bytes that one layer moves.

    ```
    saved   (readers - 1) * blocks * block_bytes       readers: passes over these blocks otherwise
    spent   run_bytes + members * partial_bytes        members: sequences that merge an answer more
    ```
    """

    block_bytes: int
    """Keys and values of a block."""
    partial_bytes: int
    """What writing, reading and merging a sequence's partial answer is worth."""
    run_bytes: int
    """What a pass of its own is worth: starting it takes as long as reading so much."""

    def pays(self, readers: int, members: int, blocks: int) -> bool:
        """Tell whether reading `blocks` once saves more than it spends."""
        saved = (readers - 1) * blocks * self.block_bytes
        return saved > self.run_bytes + members * self.partial_bytes

    @classmethod
    def cpu(
        cls,
        *,
        block_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        itemsize: int,
        native: bool = True,
    ) -> SharingCost:
        """Give the cost on a processor, in C (`native`) or in PyTorch.

        In C, partial answers are written and read once; but what many rows share is bound by
        arithmetic, so that a byte that is saved is worth less than one that is read.  Measured (one
        thread, SmolLM2's shapes): even at 0.8 MB saved in float32, at 0.2 MB in bfloat16.

        In PyTorch, a run takes two dozen operators, most of them on few bytes.  Measured: even at
        0.8 MB saved with 2 sequences, at 1.2 MB with 4 and at 1.4 MB with 8, in either type.
        """
        answer = 4 * heads * (head_dim + 1)
        return cls(
            block_bytes=2 * block_size * kv_heads * head_dim * itemsize,
            partial_bytes=(2 if native else 16) * answer,
            run_bytes=(192 << 10) * itemsize if native else 1 << 20,
        )

    @classmethod
    def gpu(
        cls, *, block_size: int, heads: int, kv_heads: int, head_dim: int, itemsize: int
    ) -> SharingCost:
        """Give the cost in a kernel that runs all runs at once: partial answers, twice in float32.

        A run's own cost is that of a program's start, about what it reads in a microsecond.
        """
        return cls(
            block_bytes=2 * block_size * kv_heads * head_dim * itemsize,
            partial_bytes=2 * 4 * heads * (head_dim + 1),
            run_bytes=32 << 10,
        )


FREE: Final = SharingCost(block_bytes=1, partial_bytes=0, run_bytes=0)
"""Sharing costs nothing: every shared block is read once.  For tests and for counting."""

NEVER: Final = SharingCost(block_bytes=0, partial_bytes=0, run_bytes=0)
"""Sharing saves nothing: every sequence reads all of its blocks.  To compare with."""


@dataclass(frozen=True, eq=False)
class GroupPlan:
    """A batch's sequences in an order in which those that share blocks are neighbours.

    A plan for the device is one int32 tensor; its parts are views of it, made when they are asked
    for.  The host knows the same as plain numbers: nobody needs to read a tensor back.
    """

    packed: Tensor
    """`[2 * S + 6 * R]` int32: `order`, `own_from`, then the six tensors of the runs."""
    runs: tuple[Run, ...]
    """The runs, parents before children; they form a forest."""
    positions: tuple[int, ...]
    """`order`, on the host."""
    own: tuple[int, ...]
    """`own_from`, on the host."""
    limited: bool = False
    """Whether two sequences would share more if more of their blocks were whole."""

    @classmethod
    def build(
        cls, tables: Tables | Tensor, limits: Sequence[int], cost: SharingCost = FREE
    ) -> GroupPlan:
        """Find what a batch shares.  Changes nothing.  O(table entries) of memcmp, no Python each.

        Args:
            tables: `[S, max_blocks]` int32 block tables on the host, one row per sequence.
            limits: For each row, how many of its first blocks may be shared: whole, and before all
                of its queries, so `(context - queries) // block_size`; 0 shares nothing.  The
                entries after them are not used.
            cost: When sharing pays.

        Raises:
            InvalidRequest: `tables` and `limits` do not fit together, or are something else.

        >>> tables = torch.tensor([[7, 8, 1], [5, 6, 0], [7, 8, 2]], dtype=torch.int32)
        >>> plan = GroupPlan.build(tables, [2, 1, 2])
        >>> plan.order.tolist(), plan.own_from.tolist()
        ([1, 0, 2], [0, 2, 2])
        >>> plan.runs
        (Run(row=0, first=0, blocks=2, start=1, end=3, level=0),)
        """
        if isinstance(tables, Tensor):
            check_tensors(tables=tables)
            if not tables.is_cpu or tables.dtype != torch.int32:
                raise InvalidRequest(f"tables of {tables.dtype} on {tables.device}: not int32, cpu")
            tables = same_memory(tables).numpy()
        if not isinstance(tables, np.ndarray) or not isinstance(limits, list | tuple):
            kinds = f"{type(tables).__name__} and {type(limits).__name__}"
            raise InvalidRequest(f"tables and limits are {kinds}: not a tensor and a list")
        if not set(map(type, limits)) <= {int}:
            raise InvalidRequest("limits that are not all of the class int")
        rows: Tables = tables
        if rows.ndim != 2 or rows.dtype != np.int32 or len(rows) != len(limits):
            raise InvalidRequest(
                f"tables {list(rows.shape)} of {rows.dtype} with {len(limits)} limits: not "
                "[S, max_blocks] int32 and [S]"
            )
        low, high = (min(limits), max(limits)) if limits else (0, 0)
        if low < 0 or high > rows.shape[1]:
            raise InvalidRequest(f"limits {low} to {high} for tables of {rows.shape[1]} blocks")
        order, common, limited = _sorted(rows, limits, low)
        runs, own = _choose(order, common, cost)
        return cls(_packed(order, own, runs), tuple(runs), tuple(order), tuple(own), limited)

    def to(self, device: torch.device | str) -> GroupPlan:
        """Give the plan with its tensors on a device; one copy, or none if they are there."""
        return replace(self, packed=self.packed.to(device, non_blocking=True))

    @classmethod
    def alone(cls, num_seqs: int) -> GroupPlan:
        """Give the plan of a batch that shares nothing, in its own order.

        >>> GroupPlan.alone(2).packed.tolist()
        [0, 1, 0, 0]
        """
        order, own = tuple(range(num_seqs)), (0,) * num_seqs
        return cls(_packed(order, own, ()), (), order, own)

    def check_kinds(self) -> None:
        """Refuse fields of other types than `build` gives.  O(sequences + runs), once for a plan.

        Raises:
            InvalidRequest: As said.
        """
        self._kinds  # noqa: B018 - refuses; what passes is tuples of numbers, which stay

    @cached_property
    def _kinds(self) -> None:
        fields = (self.runs, self.positions, self.own)
        if not all(type(field) is tuple for field in fields):
            kinds = ", ".join(type(field).__name__ for field in fields)
            raise InvalidRequest(f"groups whose runs, positions and own are {kinds}: not tuples")
        if not all(type(run) is Run for run in self.runs):
            raise InvalidRequest("groups whose runs are not all of the class Run")
        rows = (self.positions, self.own, *self.runs)
        if not all(type(number) is int for row in rows for number in row):
            raise InvalidRequest("groups whose numbers are not all of the class int")
        packed, num = self.packed, self.num_seqs
        if (
            not is_plain(packed)
            or packed.dtype != torch.int32
            or packed.shape != (2 * num + 6 * self.num_runs,)
            or not packed.is_contiguous()
            or len(self.own) != num
        ):
            raise InvalidRequest(f"groups of {num} sequences whose parts are of other sizes")

    def check(
        self,
        tables: Tables | None = None,
        limits: Sequence[int] | None = None,
    ) -> None:
        """Refuse runs that are no forest, or that these tables do not share.  Changes nothing.

        O(sequences + runs), and one comparison of the runs' blocks in each of their tables.
        A plan on the host must hold in `packed` what it says; one on a device is not read back.

        Args:
            tables: Of the batch, `[S, max_blocks]` int32 on the host; None: not looked at.
            limits: For each row, how many of its first blocks lie before all of its queries; None:
                not looked at.

        Raises:
            InvalidRequest: As said; `build` makes only plans that pass.
        """
        self.check_kinds()
        num = self.num_seqs
        if tables is not None and len(tables) != num:
            raise InvalidRequest(f"groups of {num} sequences for {len(tables)} tables")
        if sorted(self.positions) != list(range(num)):
            raise InvalidRequest(f"groups whose positions are not the rows 0 to {num - 1}, once")
        own = [0] * num
        path: list[Run] = []
        for run in self.runs:
            row, first, blocks, start, end, level = run
            if run == _NO_RUN:
                continue
            while path and path[-1].end <= start:
                path.pop()
            above = path[-1] if path else None
            if not (
                0 <= row < num
                and (above.start if above else 0) <= start < end <= (above.end if above else num)
                and first == (above.first + above.blocks if above else 0)
                and blocks > 0
                and level == len(path)
            ):
                raise InvalidRequest(f"groups whose {run} is no part of a forest of runs")
            if tables is not None:
                stretch = slice(first, first + blocks)
                if (
                    first + blocks > tables.shape[1]
                    or (
                        tables[list(self.positions[start:end]), stretch] != tables[row, stretch]
                    ).any()
                ):
                    raise InvalidRequest(f"groups whose {run} these tables do not share")
            own[start:end] = [first + blocks] * (end - start)
            path.append(run)
        if own != list(self.own):
            raise InvalidRequest("groups whose own parts do not begin where their runs end")
        if limits is not None and any(
            shared > limits[row] for row, shared in zip(self.positions, own, strict=True)
        ):
            raise InvalidRequest("groups whose runs are not before all queries of their sequences")
        if self.packed.is_cpu and self.packed.tolist() != _flat(self.positions, own, self.runs):
            raise InvalidRequest("groups whose packed is not what their runs and positions say")

    def straight(self) -> GroupPlan:
        """Give the plan for the same batch with its rows put into the plan's order."""
        order = tuple(range(self.num_seqs))
        if self.positions == order:
            return self
        runs = tuple(run._replace(row=run.start) for run in self.runs)
        return GroupPlan(_packed(order, self.own, runs), runs, order, self.own, self.limited)

    def padded(self, num_seqs: int, num_runs: int) -> GroupPlan:
        """Give the plan with rows that share nothing and runs of no blocks behind its own.

        A kernel that was captured with a padded plan serves every plan that fits.

        Raises:
            InvalidRequest: This one does not fit.
        """
        more, room = num_seqs - self.num_seqs, num_runs - self.num_runs
        if more < 0 or room < 0:
            raise InvalidRequest(
                f"a plan of {self.num_seqs} sequences and {self.num_runs} runs does not fit into "
                f"one of {num_seqs} and {num_runs}"
            )
        order = (*self.positions, *range(self.num_seqs, num_seqs))
        own = (*self.own, *[0] * more)
        runs = (*self.runs, *[_NO_RUN] * room)
        return GroupPlan(_packed(order, own, runs), runs, order, own, self.limited)

    def restrict(self, may_share: Sequence[bool]) -> GroupPlan:
        """Give the plan without the runs that some positions must not use.  Changes nothing.

        What a run below such a one reads then begins where the next one above it ends.

        Args:
            may_share: For each position, whether it may attend to runs at all.
        """
        runs: list[Run] = []
        path: list[Run] = []
        own = [0] * self.num_seqs
        for run in self.runs:
            if not all(may_share[run.start : run.end]):
                continue
            while path and path[-1].end <= run.start:
                path.pop()
            depth = run.first + run.blocks
            first = path[-1].first + path[-1].blocks if path else 0
            kept = run._replace(first=first, blocks=depth - first, level=len(path))
            own[run.start : run.end] = [depth] * (run.end - run.start)
            runs.append(kept)
            path.append(kept)
        return replace(
            self, packed=_packed(self.positions, own, runs), runs=tuple(runs), own=tuple(own)
        )

    @cached_property
    def order(self) -> Tensor:
        """`[S]`: the batch row of each position."""
        return self.packed[: self.num_seqs]

    @cached_property
    def own_from(self) -> Tensor:
        """`[S]`, by position: index of the first block that no run on its path covers."""
        return self.packed[self.num_seqs : 2 * self.num_seqs]

    @cached_property
    def run_row(self) -> Tensor:
        """`[R]`: a batch row whose table names the run's blocks."""
        return self._column(0)

    @cached_property
    def run_first(self) -> Tensor:
        """`[R]`: index in that table of the first of them."""
        return self._column(1)

    @cached_property
    def run_blocks(self) -> Tensor:
        """`[R]`: how many whole blocks; at least 1."""
        return self._column(2)

    @cached_property
    def run_start(self) -> Tensor:
        """`[R]`: the first position that reads the run."""
        return self._column(3)

    @cached_property
    def run_end(self) -> Tensor:
        """`[R]`: one after the last; at least two positions read it."""
        return self._column(4)

    @cached_property
    def run_level(self) -> Tensor:
        """`[R]`: runs above it on its path, below `MAX_LEVELS`.

        Runs of one level do not overlap: a sequence has at most one partial answer per level.
        """
        return self._column(5)

    def _column(self, index: int) -> Tensor:
        begin = 2 * self.num_seqs + index * self.num_runs
        return self.packed[begin : begin + self.num_runs]

    @property
    def num_seqs(self) -> int:
        """Sequences of the batch."""
        return len(self.positions)

    @property
    def num_runs(self) -> int:
        """Runs that are read once for several sequences."""
        return len(self.runs)

    @property
    def num_levels(self) -> int:
        """Runs on the longest path."""
        return max((run.level + 1 for run in self.runs), default=0)

    def shares(self) -> list[float]:
        """Count the blocks of runs that each position reads, a run divided among its readers."""
        read = [0.0] * self.num_seqs
        for run in self.runs:
            for position in range(run.start, run.end):
                read[position] += run.blocks / (run.end - run.start)
        return read

    @property
    def saved_blocks(self) -> int:
        """Block reads that sharing saves in one pass over the batch's keys."""
        return sum((run.end - run.start - 1) * run.blocks for run in self.runs)


def _flat(order: Sequence[int], own: Sequence[int], runs: Sequence[Run]) -> list[int]:
    flat = [*order, *own]
    for column in zip(*runs, strict=True):
        flat += column
    return flat


def _packed(order: Sequence[int], own: Sequence[int], runs: Sequence[Run]) -> Tensor:
    flat = _flat(order, own, runs)
    return (
        torch.frombuffer(array("i", flat), dtype=torch.int32)
        if flat
        else torch.empty(0, dtype=torch.int32)
    )


def _sorted(rows: Tables, limits: Sequence[int], lowest: int) -> tuple[list[int], list[int], bool]:
    """Sort the tables; give their order, what neighbours have in common, and if limits cut it."""
    if len(limits) < 2 or rows.shape[1] == 0:
        return list(range(len(limits))), [0] * (len(limits) - 1), False
    order, common = _neighbours(rows)
    limited = False
    if common.max() > lowest:
        bound = np.array(limits)
        ends = bound[order]
        limited = bool((common > np.minimum(ends[1:], ends[:-1])).any())
    if limited:
        # A short limit must not stand between two that share more: what lies beyond a limit is
        # made equal, so that such a table sorts to the edge of those that it shares with.
        inside = np.arange(rows.shape[1]) < bound[:, None]
        order, common = _neighbours(np.where(inside, rows, np.int32(-1)))
        ends = bound[order]
        common = np.minimum(common, np.minimum(ends[1:], ends[:-1]))
    return order.tolist(), common.tolist(), limited


def _neighbours(rows: Tables) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """Sort rows as strings of bytes; give the order and the common prefix of each two neighbours.

    Any order in which equal prefixes are neighbours will do, so little-endian bytes do.
    """
    rows = np.ascontiguousarray(rows)
    width = rows.shape[1]
    order = rows.view(f"V{4 * width}").ravel().argsort(kind="stable")
    lined = rows.take(order, axis=0)
    same = lined[1:] == lined[:-1]
    common = same.argmin(axis=1)  # 0 also where all are the same
    if same[:, 0].any():
        common[same.all(axis=1)] = width
    return order, common


def _choose(order: list[int], common: list[int], cost: SharingCost) -> tuple[list[Run], list[int]]:
    """Choose the runs that pay, of all intervals of neighbours with a common prefix."""
    own = [0] * len(order)
    if not any(common):
        return [], own
    # Every interval closes where the common prefix becomes shorter: children before parents.
    # First as if each parent were read once for all; `fewer` counts passes that runs inside save.
    intervals: list[tuple[int, int, int, int, bool]] = []  # start, end, depth, readers, chosen
    opened = [[0, 0, 0]]  # depth, start, fewer
    top = 0
    for at, depth in enumerate([*common, 0]):
        if depth == top:
            continue  # as in a group of many, most of the time
        start, top = at, depth
        while opened[-1][0] > depth:
            deep, start, fewer = opened.pop()
            above = max(opened[-1][0], depth)
            members = at + 1 - start
            chosen = cost.pays(members - fewer, members, deep - above)
            intervals.append((start, at + 1, deep, members - fewer, chosen))
            fewer = members - 1 if chosen else fewer
            if opened[-1][0] >= depth:
                opened[-1][2] += fewer
            else:
                opened.append([depth, start, fewer])
        if opened[-1][0] < depth:
            opened.append([depth, start, 0])
    # Then from the top: below a parent that does not pay, a child reads the parent's blocks too.
    runs: list[Run] = []
    path: list[Run] = []
    for start, end, deep, readers, chosen in sorted(intervals, key=lambda i: (i[0], -i[1])):
        while path and path[-1].end <= start:
            path.pop()
        first = path[-1].first + path[-1].blocks if path else 0
        if len(path) < MAX_LEVELS and (chosen or cost.pays(readers, end - start, deep - first)):
            run = Run(order[start], first, deep - first, start, end, len(path))
            own[start:end] = [deep] * (end - start)
            runs.append(run)
            path.append(run)
    return runs, own
