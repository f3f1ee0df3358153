"""Decoding behind shared prefixes on a CPU: read per sequence, and read once per group.

    python -m prefixcache_bench.speed.grouped [--quick] [--dtype float32] [--json]

All sides attend to the same pool, of SmolLM2-135M's shape (30 layers, 9 heads, 3 key heads of 64),
and take turns in one process, layer after layer; plans are made once per step, for all layers.

```
flash          once: Plan.build;         per layer: gather, PyTorch's flash attention
per sequence   once: Plan.build;         per layer: paged_attention
grouped        once: GroupedPlan.build;  per layer: shared_prefix_attention
```
`over flash` and `over own` are the ratios of the first two to the third: what a serving process
gains over PyTorch, and the part of it that comes from sharing.  Without a C compiler the first two
are the same.  Goals are against PyTorch's attention per sequence.

`shared` and `own` are tokens of each sequence; `700+300` are two levels: 700 that all share and 300
that every fourth shares.  The cost model may refuse to share (`model`); what it would have meant is
measured all the same.  `runs` tables lie in order and are read in place, `scattered` ones are a
random permutation of the pool.

The second table is the plan itself: how long it takes to find what a batch shares from its tables,
and how long the batch that stays on the device takes to pack a step in which nobody came or went.

With one thread, times are processor time.  A ratio above 1 says that grouped is faster.  Exit code
1 if the answers differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from array import array
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.plain_json import json_text
from prefixcache.types import DTYPE_ALIASES, Layout
from prefixcache_bench.reports.provenance import provenance
from prefixcache_kernels import (
    TORCH_DTYPES,
    GroupedPlan,
    GroupPlan,
    Plan,
    SharedPool,
    SharingCost,
    paged_attention,
    reference,
    shared_prefix_attention,
)
from prefixcache_kernels.cpu.library import describe, library
from prefixcache_kernels.groups import FREE
from prefixcache_worker.batch import Piece
from prefixcache_worker.device_batch import DeviceBatch

HEADS: Final = 9
KV_HEADS: Final = 3
HEAD_DIM: Final = 64
LAYERS: Final = 30
BLOCK_SIZE: Final = 16
SCALE: Final = HEAD_DIM**-0.5
TOLERANCE: Final = {"float32": 1e-5, "bfloat16": 1e-2}
GOALS: Final[dict[tuple[int, tuple[int, ...], int], float]] = {
    (8, (768,), 256): 2.0,
    (32, (4096,), 128): 8.0,
}
"""Batch, shared, own, and the ratio to reach."""
LEVEL: Final = 4
"""Groups of the second level."""


@dataclass(frozen=True, slots=True)
class Case:
    """One batch of decoding sequences."""

    dtype: str
    tables: str
    batch: int
    shared: tuple[int, ...]
    own: int

    @property
    def context(self) -> int:
        """Tokens of each sequence."""
        return sum(self.shared) + self.own

    @property
    def name(self) -> str:
        """Its shared tokens, as in the table."""
        return "+".join(map(str, self.shared))


@dataclass(frozen=True, slots=True)
class Row:
    """What one case took, in milliseconds per layer, and read, in MB per layer."""

    dtype: str
    tables: str
    batch: int
    shared: str
    own: int
    flash_ms: tuple[float, float, float]
    """Minimum, median, maximum."""
    per_sequence_ms: tuple[float, float, float]
    grouped_ms: tuple[float, float, float]
    over_flash: float
    """Median of flash over median of grouped."""
    over_own: float
    """Median of per sequence over median of grouped."""
    per_sequence_mb: float
    grouped_mb: float
    model: str
    """What the cost model chooses: share, or apart."""
    difference: float
    """Norm of the largest difference of the answers, relative to flash attention's."""
    goal: float | None


class Bench:
    """One case: a pool, tables, and both sides' plans."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        dtype = TORCH_DTYPES[case.dtype]
        self.rows = tables(case, seed)
        num_blocks = 1 + max(map(max, self.rows))
        layout = Layout(LAYERS, KV_HEADS, HEAD_DIM, case.dtype)
        self.pool = SharedPool.private(layout, num_blocks, BLOCK_SIZE)
        self.pool.blocks.normal_(generator=torch.Generator().manual_seed(seed))
        self.query = torch.randn(case.batch, HEADS, HEAD_DIM).to(dtype)
        self.tables = torch.tensor(self.rows, dtype=torch.int32)
        self.starts = torch.arange(case.batch + 1, dtype=torch.int32)
        self.contexts = torch.full((case.batch,), case.context, dtype=torch.int32)
        self.cost = SharingCost.cpu(
            block_size=BLOCK_SIZE,
            heads=HEADS,
            kv_heads=KV_HEADS,
            head_dim=HEAD_DIM,
            itemsize=dtype.itemsize,
            native=library() is not None,
        )
        self.limits = [(case.context - 1) // BLOCK_SIZE] * case.batch
        self.groups = GroupPlan.build(self.tables, self.limits, FREE)
        self._args = (self.tables, self.starts, self.contexts)

    def flash(self) -> Tensor:
        """Attend in all layers as PyTorch does, each sequence to all of its keys."""
        return self._apart(reference.paged_attention)

    def per_sequence(self) -> Tensor:
        """Attend in all layers, each sequence to all of its keys; the last layer's answer."""
        return self._apart(paged_attention)

    def _apart(self, attend: Callable[..., Tensor]) -> Tensor:
        plan = Plan.build(*self._args, BLOCK_SIZE)
        for layer in range(LAYERS):
            caches = self.pool.keys(layer), self.pool.values(layer)
            out = attend(self.query, *caches, *self._args, scale=SCALE, plan=plan)
        return out

    def grouped(self) -> Tensor:
        """Attend in all layers, to what is shared once; the last layer's answer."""
        plan = GroupedPlan.build(*self._args, BLOCK_SIZE, self.groups)
        for layer in range(LAYERS):
            caches = self.pool.keys(layer), self.pool.values(layer)
            out = shared_prefix_attention(
                self.query, *caches, *self._args, self.groups, scale=SCALE, plan=plan
            )
        return out

    def row(self, rounds: int) -> Row:
        """Measure all sides in turn."""
        sides = {"flash": self.flash, "alone": self.per_sequence, "grouped": self.grouped}
        took: dict[str, list[float]] = {name: [] for name in sides}
        want, *others = (side().double() for side in sides.values())
        clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
        for i in range(rounds):
            for name in sorted(sides, reverse=bool(i % 2)):
                started = clock()
                sides[name]()
                took[name].append((clock() - started) * 1e3 / LAYERS)
        median = {name: statistics.median(values) for name, values in took.items()}
        token = 2 * KV_HEADS * HEAD_DIM * self.query.element_size()
        alone = self.case.batch * self.case.context * token
        chosen = GroupPlan.build(self.tables, self.limits, self.cost)
        case = self.case
        return Row(
            case.dtype,
            case.tables,
            case.batch,
            case.name,
            case.own,
            flash_ms=three(took["flash"]),
            per_sequence_ms=three(took["alone"]),
            grouped_ms=three(took["grouped"]),
            over_flash=median["flash"] / median["grouped"],
            over_own=median["alone"] / median["grouped"],
            per_sequence_mb=alone / 1e6,
            grouped_mb=(alone - self.groups.saved_blocks * BLOCK_SIZE * token) / 1e6,
            model="share" if chosen.num_runs else "apart",
            difference=max(float((want - got).norm() / want.norm()) for got in others),
            goal=GOALS.get((case.batch, case.shared, case.own)),
        )


def tables(case: Case, seed: int) -> list[list[int]]:
    """Make the block tables of a case."""
    first, *rest = (tokens // BLOCK_SIZE for tokens in case.shared)
    own = -(-case.own // BLOCK_SIZE)
    ids = list(range(first + sum(rest) * LEVEL + case.batch * own))
    if case.tables == "scattered":
        random.Random(seed).shuffle(ids)
    free = iter(ids)
    root = [next(free) for _ in range(first)]
    branches = [[next(free) for _ in range(sum(rest))] for _ in range(LEVEL)]
    return [
        root + branches[s % LEVEL] + [next(free) for _ in range(own)] for s in range(case.batch)
    ]


def cases(dtypes: list[str], *, quick: bool) -> Iterator[Case]:
    """Every case, or a few."""
    shapes: list[tuple[int, tuple[int, ...], int]] = [
        *GOALS,
        *((batch, (1000 // 16 * 16,), 100) for batch in (2, 4, 8, 16)),
        *((8, (shared,), 256) for shared in (64, 256)),
        (16, (704, 304), 100),
    ]
    for dtype in dtypes:
        for kind in ("runs", "scattered"):
            for batch, shared, own in shapes[:2] if quick else shapes:
                yield Case(dtype, kind, batch, shared, own)


@dataclass(frozen=True, slots=True)
class PlanRow:
    """How long a batch's plan takes, in microseconds."""

    batch: int
    context: int
    runs: int
    build_us: tuple[float, float, float]
    """From the tables, anew."""
    step_us: tuple[float, float, float]
    """Packing a decode step whose plan still holds."""
    step_bytes: int
    """What such a step brings to the device."""


def plan_rows(*, quick: bool) -> Iterator[PlanRow]:
    """Measure plans of two levels, from the tables and from step to step."""
    for batch in (8, 64) if quick else (8, 16, 64, 256):
        for context in (1024,) if quick else (1024, 4096, 32768):
            half = context // 2 // BLOCK_SIZE * BLOCK_SIZE
            case = Case("float32", "scattered", batch, (half, context - half - 128), 128)
            rows = [array("i", row) for row in tables(case, 0)]
            matrix = torch.tensor([row.tolist() for row in rows], dtype=torch.int32)
            limits = [(case.context - 2) // BLOCK_SIZE] * batch
            rounds = 50 if quick else 200

            def build(matrix: Tensor = matrix, limits: list[int] = limits) -> GroupPlan:
                return GroupPlan.build(matrix, limits)

            stay = DeviceBatch(batch, len(rows[0]), BLOCK_SIZE, FREE)
            owners = list(range(batch))
            lengths = iter(range(case.context - 64, case.context))

            def step(
                rows: list[array[int]] = rows,
                owners: list[int] = owners,
                stay: DeviceBatch = stay,
                lengths: Iterator[int] = lengths,
            ) -> None:
                at = next(lengths)
                stay.pack(owners, [Piece((7,), at, row) for row in rows])

            step()
            before = stay.num_bytes
            steps = timed(step, min(rounds, 60))
            yield PlanRow(
                batch,
                context,
                build().num_runs,
                timed(build, rounds),
                steps,
                (stay.num_bytes - before) // min(rounds, 60),
            )


def timed(call: Callable[[], Any], rounds: int) -> tuple[float, float, float]:
    """Time a call; minimum, median, maximum in microseconds."""
    took = []
    for _ in range(rounds):
        started = time.perf_counter()
        call()
        took.append((time.perf_counter() - started) * 1e6)
    return three(took)


def three(values: list[float]) -> tuple[float, float, float]:
    """Give minimum, median and maximum."""
    return min(values), statistics.median(values), max(values)


def shown(values: tuple[float, float, float], digits: int) -> str:
    """Write minimum, median and maximum."""
    return "/".join(f"{value:.{digits}f}" for value in values)


def verdict(row: Row) -> str:
    """Say whether a goal is met."""
    if row.goal is None:
        return ""
    return f"{row.goal:g}x {'met' if row.over_flash >= row.goal else 'MISSED'}"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether both sides gave the same answers."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.speed.grouped",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="the goals' cases, fewer rounds")
    parser.add_argument(
        "--dtype",
        action="append",
        type=lambda name: DTYPE_ALIASES.get(name, name),
        choices=["float32", "bfloat16"],
    )
    parser.add_argument("--rounds", type=int, default=0, help="rounds counted (5 quick, else 15)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print numbers, not tables")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    facts = {"torch": torch.__version__, "threads": str(options.threads), "attention": describe()}
    head = provenance() | facts
    rounds = options.rounds or (5 if options.quick else 15)
    if not options.json:
        print(" · ".join(f"{name} {value}" for name, value in head.items()))
        print(
            f"milliseconds per layer, min/median/max of {rounds}; MB of keys and values per layer"
        )
        print(
            f"{'dtype':9}{'tables':10}{'batch':>5}{'shared':>9}{'own':>5}{'flash':>18}"
            f"{'per sequence':>18}{'grouped':>18} over flash  own{'MB':>7}{'MB':>6}  "
            f"{'model':6} goal"
        )
    rows = []
    with torch.inference_mode():
        for case in cases(options.dtype or ["float32", "bfloat16"], quick=options.quick):
            row = Bench(case, options.seed).row(rounds)
            rows.append(row)
            if not options.json:
                print(
                    f"{row.dtype:9}{row.tables:10}{row.batch:5}{row.shared:>9}{row.own:5}"
                    f"{shown(row.flash_ms, 2):>18}{shown(row.per_sequence_ms, 2):>18}"
                    f"{shown(row.grouped_ms, 2):>18}{row.over_flash:11.2f}{row.over_own:5.2f}"
                    f"{row.per_sequence_mb:7.1f}{row.grouped_mb:6.1f}  "
                    f"{row.model:6} {verdict(row)}".rstrip(),
                    flush=True,
                )
        plans = list(plan_rows(quick=options.quick))
    if options.json:
        print(
            json_text(
                head
                | {"rows": [asdict(row) for row in rows], "plans": [asdict(row) for row in plans]},
                indent=2,
            )
        )
    else:
        print("\nthe plan, microseconds, min/median/max; bytes that a step brings to the device")
        print(
            f"{'batch':>5}{'context':>8}{'runs':>5}{'from the tables':>20}"
            f"{'a step of the batch that stays':>34}{'bytes':>7}"
        )
        for plan in plans:
            print(
                f"{plan.batch:5}{plan.context:8}{plan.runs:5}{shown(plan.build_us, 0):>20}"
                f"{shown(plan.step_us, 0):>34}{plan.step_bytes:7}"
            )
        wide = [plan for plan in plans if plan.batch == 64]
        print(
            f"a plan for 64 sequences of {wide[0].context:,} tokens: {wide[0].build_us[1]:.0f} µs, "
            f"goal at most 50: {'met' if wide[0].build_us[1] <= 50 else 'MISSED'}; "
            f"answers differ by at most {max(row.difference for row in rows):.1e}"
        )
    return int(any(row.difference > TOLERANCE[row.dtype] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
