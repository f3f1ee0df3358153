"""Attention through contiguous views on a CPU: against paged attention in C, and against gathering.

    python -m prefixcache_bench.speed.contiguous [--quick] [--rounds 9] [--seed 0] [--json FILE]
                                                 [--publish]

One sequence of SmolLM2-135M's shape (30 layers, 9 heads, 3 key heads of 64) on scattered blocks of
a real pool in shared memory.  All sides attend to the same bytes, in all layers, and take turns:

```
paged     paged_attention on the block table: in C, or without a compiler PyTorch's, which gathers
gather    for each layer: copy keys and values side by side, then scaled_dot_product_attention
view      scaled_dot_product_attention on the view: nothing is copied
map       make the view, read it once (page faults), end it: paid once for each sequence
```
Milliseconds for all layers, min/median/max, of this thread's time.  `/paged` and `/gather` are the
ratios of these to `view`, above 1: the view is faster.  `pays` says after how many such steps the
view and its mapping have cost less than each; `never` where a step is not faster by 5 % at least,
which is what runs differ by.

`planes` is how many places of the pool a block lies in: 60 in our own layout.  With 1, a token's
keys and values of all layers lie side by side, and a block is one mapping.

Exit code 1 if the answers differ.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows
from torch import Tensor

from prefixcache.plain_json import json_text
from prefixcache.pool import PoolFile
from prefixcache.types import Layout
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_kernels import TORCH_DTYPES, Plan, map_pages, paged_attention
from prefixcache_kernels.contiguous import ContiguousView, ContiguousViews
from prefixcache_kernels.cpu.library import describe

DOCUMENT: Final = Path("docs/kernels.md")
LAYERS: Final = 30
HEADS: Final = 9
KV_HEADS: Final = 3
HEAD_DIM: Final = 64
SCALE: Final = HEAD_DIM**-0.5
EVEN: Final = 1.05
"""Ratios below it are none: runs differ by as much."""
TOLERANCE: Final = {"float32": 1e-5, "bfloat16": 1e-2}

Three = tuple[float, float, float]
"""Minimum, median, maximum."""


@dataclass(frozen=True, slots=True)
class Case:
    """One sequence, and what it does."""

    dtype: str
    planes: int
    block_size: int
    context: int
    queries: int
    """1: it decodes; more: it prefills them behind what is cached."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one case took, in milliseconds for all layers."""

    case: Case
    paged_ms: Three
    gather_ms: Three
    view_ms: Three
    num_maps: int
    map_ms: Three
    """Making the view, its first reading over a later one, and ending it."""
    over_paged: float
    """Median of paged over median of view."""
    over_gather: float
    pays_over_paged: int | None
    """After how many steps the view and its mapping have cost less; None: never."""
    pays_over_gather: int | None
    difference: float
    """Norm of the largest difference of the answers, relative to paged attention's."""


class Bench:
    """One case: a pool, scattered blocks, and all sides.  A context manager."""

    def __init__(self, case: Case, seed: int) -> None:
        self.case = case
        dtype = TORCH_DTYPES[case.dtype]
        layout = Layout(LAYERS, KV_HEADS, HEAD_DIM, case.dtype)
        if case.planes == 1:
            size = case.block_size * layout.token_bytes
            layout = Layout(planes=1, page_bytes=size, format=f"tokens/{layout.dtype}")
        width = -(-case.context // case.block_size)
        self.file = PoolFile.create(layout, 2 * width, case.block_size)
        self.blocks = self._tensor(map_pages(self.file.handle))
        self.blocks.normal_(generator=torch.Generator().manual_seed(seed))
        self.table = random.Random(seed).sample(range(2 * width), width)
        self.index = torch.tensor(self.table)
        self.views = ContiguousViews.open(self.file.handle)
        self.view = self.views.view(self.table)
        self.query = torch.randn(case.queries, HEADS, HEAD_DIM).to(dtype)
        self.batch = (
            self.index[None].int(),
            torch.tensor([0, case.queries], dtype=torch.int32),
            torch.tensor([case.context], dtype=torch.int32),
        )
        self.mask = None
        if case.queries > 1:
            shape = (case.queries, case.context)
            self.mask = torch.ones(shape, dtype=torch.bool).tril_(case.context - case.queries)
        self.dense = self._dense(self.view)

    def _tensor(self, pages: Tensor) -> Tensor:
        """Look at pages as `[layers, 2, blocks, slots, kv_heads, head_dim]`."""
        case, dtype = self.case, TORCH_DTYPES[self.case.dtype]
        cells = pages.view(dtype)
        tail = (KV_HEADS, HEAD_DIM)
        if case.planes == 1:
            flat = cells.view(-1, case.block_size, LAYERS, 2, *tail)
            return flat.permute(2, 3, 0, 1, 4, 5)
        return cells.view(LAYERS, 2, -1, case.block_size, *tail)

    def _dense(self, view: ContiguousView) -> Tensor:
        """Look at a view as `[layers, 2, tokens, kv_heads, head_dim]`: no copy."""
        case, dtype = self.case, TORCH_DTYPES[self.case.dtype]
        if case.planes == 1:
            tokens = view.pages().view(dtype).view(-1, LAYERS, 2, KV_HEADS, HEAD_DIM)
            return tokens.permute(1, 2, 0, 3, 4)[:, :, : case.context]
        tokens = view.pages().view(dtype).view(LAYERS, 2, -1, KV_HEADS, HEAD_DIM)
        return tokens[:, :, : case.context]

    def paged(self) -> Tensor:
        """Attend in all layers by the block table; the last layer's answer."""
        plan = Plan.build(*self.batch, self.case.block_size)
        for keys, values in self.blocks:
            out = paged_attention(self.query, keys, values, *self.batch, scale=SCALE, plan=plan)
        return out

    def gather(self) -> Tensor:
        """Copy each layer's keys and values side by side, and attend to the copies."""
        for keys, values in self.blocks:
            out = self._attend(
                keys.index_select(0, self.index).flatten(0, 1)[: self.case.context],
                values.index_select(0, self.index).flatten(0, 1)[: self.case.context],
            )
        return out

    def through_view(self) -> Tensor:
        """Attend to the view."""
        for keys, values in self.dense:
            out = self._attend(keys, values)
        return out

    def _attend(self, keys: Tensor, values: Tensor) -> Tensor:
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        if self.mask is None:  # the heads that share a key are rows: nothing is repeated
            query = self.query.view(1, KV_HEADS, HEADS // KV_HEADS, HEAD_DIM)
            out = F.scaled_dot_product_attention(query, keys, values, scale=SCALE)
            return out.reshape(1, HEADS, HEAD_DIM)
        out = F.scaled_dot_product_attention(
            self.query.transpose(0, 1)[None],
            keys,
            values,
            attn_mask=self.mask,
            scale=SCALE,
            enable_gqa=True,
        )
        return out[0].transpose(0, 1)

    def mapped(self) -> float:
        """Make a view, read a byte of each of its pages, end it; give the milliseconds."""
        started = time.thread_time()
        view = self.views.view(self.table)
        pages = view.pages().view(-1)[::4096]
        pages.max()
        read = time.thread_time()
        pages.max()
        again = time.thread_time()
        view.close()
        return (time.thread_time() - started - (again - read) * 2) * 1e3

    def row(self, rounds: int) -> Row:
        """Measure all sides in turn."""
        sides: dict[str, Callable[[], Tensor]] = {
            "paged": self.paged,
            "gather": self.gather,
            "view": self.through_view,
        }
        want, *others = (side().double() for side in sides.values())
        took: dict[str, list[float]] = {name: [] for name in sides}
        mapping = []
        for i in range(rounds):
            for name in sorted(sides, reverse=bool(i % 2)):
                started = time.thread_time()
                sides[name]()
                took[name].append((time.thread_time() - started) * 1e3)
            mapping.append(self.mapped())
        median = {name: statistics.median(took[name]) for name in sides}
        cost = statistics.median(mapping)
        return Row(
            self.case,
            paged_ms=three(took["paged"]),
            gather_ms=three(took["gather"]),
            view_ms=three(took["view"]),
            num_maps=self.view.num_maps,
            map_ms=three(mapping),
            over_paged=median["paged"] / median["view"],
            over_gather=median["gather"] / median["view"],
            pays_over_paged=pays(cost, median["paged"], median["view"]),
            pays_over_gather=pays(cost, median["gather"], median["view"]),
            difference=max(float((got - want).norm() / want.norm()) for got in others),
        )

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: object) -> None:
        self.views.close()
        self.file.close()


def pays(cost: float, other: float, view: float) -> int | None:
    """Give after how many steps of both the faster one has paid the cost of the view; None: never.

    >>> pays(10, 9, 5), pays(10, 5, 5)
    (3, None)
    """
    return math.ceil(cost / (other - view)) if other > EVEN * view else None


def three(values: list[float]) -> Three:
    """Give minimum, median and maximum."""
    return min(values), statistics.median(values), max(values)


def cases(*, quick: bool) -> Iterator[Case]:
    """Every case, or a few."""
    kinds = (("float32", 60, 16), ("float32", 60, 64), ("bfloat16", 60, 32))
    contexts = (512,) if quick else (1024, 4096)
    for dtype, planes, block_size in (*kinds, ("float32", 1, 16), ("bfloat16", 1, 16)):
        for context in contexts:
            yield Case(dtype, planes, block_size, context, 1)
        yield Case(dtype, planes, block_size, contexts[0], 64)


HEAD: Final = (
    f"{'dtype':9}{'planes':>6}{'block':>6}{'context':>8}{'queries':>8}{'paged':>20}{'gather':>20}"
    f"{'view':>20}{'maps':>6}{'map':>20} /paged /gather   pays over paged, gather"
)


def line(row: Row) -> str:
    """Write a row of the table."""
    case = row.case
    times = (row.paged_ms, row.gather_ms, row.view_ms)
    after = ", ".join(
        "never" if steps is None else f"{steps:,} steps"
        for steps in (row.pays_over_paged, row.pays_over_gather)
    )
    return (
        f"{case.dtype:9}{case.planes:6}{case.block_size:6}{case.context:8,}{case.queries:8}"
        + "".join(f"{shown(one):>20}" for one in times)
        + f"{row.num_maps:6,}{shown(row.map_ms):>20}{row.over_paged:7.2f}{row.over_gather:8.2f}"
        + f"   {after}"
    )


def shown(values: Three) -> str:
    """Write minimum, median and maximum."""
    return "/".join(f"{value:.1f}" for value in values)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether all sides gave the same answers."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.speed.contiguous",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="short contexts, 3 rounds")
    parser.add_argument("--rounds", type=int, default=0, help="rounds counted (3 quick, else 9)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    torch.manual_seed(options.seed)
    rounds = options.rounds or (3 if options.quick else 9)
    head = [
        f"milliseconds for {LAYERS} layers of this thread's time, min/median/max of {rounds}; "
        f"torch {torch.__version__}",
        f"paged attention: {describe()}",
        HEAD,
    ]
    print("\n".join(head), flush=True)
    rows = []
    with torch.inference_mode():
        for case in cases(quick=options.quick):
            with Bench(case, options.seed) as bench:
                rows.append(bench.row(rounds))
            print(line(rows[-1]), flush=True)
    if options.json:
        found = {**provenance(), "rounds": rounds, "rows": [asdict(row) for row in rows]}
        options.json.write_text(json_text(found, indent=1), encoding="utf-8")
    wrong = [row for row in rows if not row.difference <= TOLERANCE[row.case.dtype]]
    for row in wrong:
        print(f"answers differ by {row.difference:.1e}: {row.case}")
    if options.publish and not wrong:
        words = "$ python -m prefixcache_bench.speed.contiguous"
        words += " --quick" * options.quick
        publish(DOCUMENT, "contiguous", "\n".join([words, *head, *map(line, rows)]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
