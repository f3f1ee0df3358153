"""The attention of one decode step on a CPU: the paged pool against a DynamicCache.

    python -m prefixcache_bench.speed.decode [--quick] [--dtype float32] [--tables scattered]
                                             [--json]

Both sides get the same queries, keys and values, of the shape of SmolLM2-135M (30 layers, 9 heads,
3 key heads of 64), and take turns in one process, step after step, each step one token longer:

```
transformers   per layer: DynamicCache.update, sdpa_attention_forward
paged          once: Plan.build;  per layer: store_kv, paged_attention
```

`equal` batches have one length, so that DynamicCache needs no mask.  In `mixed` batches lengths
differ by up to a quarter; DynamicCache pads on the left and masks (the mask is made ahead, for
free).  `runs` tables are what a fresh pool gives: a prompt's blocks in a row, those of decode taken
in turn.  `scattered` ones are a random permutation of the pool: the worst a long life can do.

A ratio above 1 says that the paged side is faster.  With one thread, times are processor time: on a
quiet machine the same as time passed, on a busy one without the neighbours' share.  Exit code 1 if
the answers differ.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from prefixcache.plain_json import json_text
from prefixcache.types import DTYPE_ALIASES, Layout
from prefixcache_bench.reports.provenance import provenance
from prefixcache_kernels import TORCH_DTYPES, Plan, SharedPool, paged_attention, store_kv

HEADS: Final = 9
LAYOUT: Final = Layout(num_layers=30, num_kv_heads=3, head_dim=64)
BLOCK_SIZE: Final = 16
SCALE: Final = LAYOUT.head_dim**-0.5


@dataclass(frozen=True, slots=True)
class Case:
    """One batch."""

    dtype: str
    lengths: str
    tables: str
    batch: int
    context: int


@dataclass(frozen=True, slots=True)
class Row:
    """What one case took, in milliseconds per step of all layers."""

    dtype: str
    lengths: str
    tables: str
    batch: int
    context: int
    transformers_ms: tuple[float, float, float]
    """Minimum, median, maximum."""
    paged_ms: tuple[float, float, float]
    ratio: float
    """Median of transformers over median of paged."""
    difference: float
    """Largest difference between the two answers."""


class Tokens:
    """The queries, keys and values of each step: the same for both sides, other in each layer.

    Views in both sides' shapes are made here, outside of what is timed: a model's projections come
    in either.
    """

    def __init__(self, case: Case, generator: torch.Generator) -> None:
        shape = (LAYOUT.num_layers, 2, case.batch, LAYOUT.num_kv_heads, LAYOUT.head_dim)
        dtype = TORCH_DTYPES[case.dtype]
        new = torch.randn(shape, generator=generator).to(dtype)
        rows = (case.batch, HEADS, LAYOUT.head_dim)
        self.query = torch.randn(rows, generator=generator).to(dtype)
        self.paged = [(keys, values) for keys, values in new]
        self.dense = [(keys.unsqueeze(2), values.unsqueeze(2)) for keys, values in new]


class Dense:
    """transformers' side: a DynamicCache, padded on the left where lengths differ."""

    class _Module(nn.Module):
        num_key_value_groups = HEADS // LAYOUT.num_kv_heads
        is_causal = True

    def __init__(self, prompts: list[Tensor], steps: int) -> None:
        self.cache = DynamicCache()
        self.module = self._Module()
        lens = [prompt.shape[2] for prompt in prompts]
        longest = max(lens)
        for layer in range(LAYOUT.num_layers):
            shape = (2, len(prompts), LAYOUT.num_kv_heads, longest, LAYOUT.head_dim)
            padded = torch.zeros(shape, dtype=prompts[0].dtype)
            for s, prompt in enumerate(prompts):
                padded[:, s, :, longest - lens[s] :] = prompt[layer].transpose(1, 2)
            self.cache.update(padded[0], padded[1], layer)
        self.mask: Tensor | None = None
        if min(lens) < longest:
            at = torch.arange(longest + steps)
            self.mask = (at >= longest - torch.tensor(lens)[:, None])[:, None, None]
        self.length = longest

    def step(self, tokens: Tokens) -> Tensor:
        """Attend in all layers; the answer of the last, `[batch, heads, head_dim]`."""
        self.length += 1
        mask = None if self.mask is None else self.mask[..., : self.length]
        query = tokens.query.unsqueeze(2)
        for layer, (key, value) in enumerate(tokens.dense):
            keys, values = self.cache.update(key, value, layer)
            out, _ = sdpa_attention_forward(self.module, query, keys, values, mask, scaling=SCALE)
        answer: Tensor = out[:, 0]
        return answer


class Paged:
    """Our side: a pool, block tables, and a plan per step."""

    def __init__(self, case: Case, prompts: list[Tensor], steps: int, seed: int) -> None:
        self.lens = [prompt.shape[2] for prompt in prompts]
        total = [n + steps for n in self.lens]
        layout = Layout(LAYOUT.num_layers, LAYOUT.num_kv_heads, LAYOUT.head_dim, case.dtype)
        num_blocks = sum(-(-n // BLOCK_SIZE) for n in total)
        self.pool = SharedPool.private(layout, num_blocks, BLOCK_SIZE)
        ids = list(range(num_blocks))
        if case.tables == "scattered":
            random.Random(seed).shuffle(ids)
        free = iter(ids)
        tables = [[next(free) for _ in range(0, n, BLOCK_SIZE)] for n in self.lens]
        while any(len(t) * BLOCK_SIZE < n for t, n in zip(tables, total, strict=True)):
            for table, n in zip(tables, total, strict=True):
                if len(table) * BLOCK_SIZE < n:
                    table.append(next(free))
        width = max(map(len, tables))
        self.tables = torch.tensor([t + [0] * (width - len(t)) for t in tables], dtype=torch.int32)
        flat = self.pool.blocks.view(LAYOUT.num_layers, 2, -1, *self.pool.blocks.shape[4:])
        for s, prompt in enumerate(prompts):
            flat[:, :, self._slots(s, torch.arange(self.lens[s]))] = prompt
        self.starts = torch.arange(case.batch + 1, dtype=torch.int32)

    def _slots(self, seq: int | Tensor, position: Tensor) -> Tensor:
        block = self.tables[seq, position // BLOCK_SIZE].long()
        return block * BLOCK_SIZE + position % BLOCK_SIZE

    def step(self, tokens: Tokens) -> Tensor:
        """Attend in all layers; the answer of the last, `[batch, heads, head_dim]`."""
        position = torch.tensor(self.lens)
        slots = self._slots(torch.arange(len(self.lens)), position)
        self.lens = [n + 1 for n in self.lens]
        contexts = torch.tensor(self.lens, dtype=torch.int32)
        plan = Plan.build(self.tables, self.starts, contexts, BLOCK_SIZE)
        for layer, (key, value) in enumerate(tokens.paged):
            keys, values = self.pool.keys(layer), self.pool.values(layer)
            store_kv(key, value, keys, values, slots)
            out = paged_attention(
                tokens.query,
                keys,
                values,
                self.tables,
                self.starts,
                contexts,
                scale=SCALE,
                plan=plan,
            )
        return out


@torch.inference_mode()
def measure(case: Case, *, steps: int, warmup: int, seed: int) -> Row:
    """Time one case: `steps` steps of each side in turn, after `warmup` that are not counted."""
    generator = torch.Generator().manual_seed(seed)
    rng = random.Random(seed)
    low = case.context if case.lengths == "equal" else case.context * 3 // 4
    lens = [rng.randint(low, case.context) for _ in range(case.batch)]
    lens[0] = case.context  # the longest decides how far the dense side pads
    dtype = TORCH_DTYPES[case.dtype]
    tail = (LAYOUT.num_kv_heads, LAYOUT.head_dim)
    prompts = [
        torch.randn(LAYOUT.num_layers, 2, n, *tail, generator=generator).to(dtype) for n in lens
    ]
    dense = Dense(prompts, steps + warmup)
    paged = Paged(case, prompts, steps + warmup, seed)
    del prompts
    took: dict[str, list[float]] = {"dense": [], "paged": []}
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    difference = 0.0
    for i in range(steps + warmup):
        tokens = Tokens(case, generator)
        order = (
            (("dense", dense), ("paged", paged)) if i % 2 else (("paged", paged), ("dense", dense))
        )
        answers = {}
        for name, side in order:
            start = clock()
            answers[name] = side.step(tokens)
            if i >= warmup:
                took[name].append((clock() - start) * 1e3)
        difference = max(difference, float((answers["dense"] - answers["paged"]).abs().max()))
    paged.pool.close()
    return Row(
        **asdict(case),
        transformers_ms=_summary(took["dense"]),
        paged_ms=_summary(took["paged"]),
        ratio=statistics.median(took["dense"]) / statistics.median(took["paged"]),
        difference=difference,
    )


def _summary(took: list[float]) -> tuple[float, float, float]:
    return min(took), statistics.median(took), max(took)


def cases(*, quick: bool, dtypes: list[str], tables: list[str]) -> Iterator[Case]:
    """Every case, or a few."""
    for dtype in dtypes:
        for table in tables:
            for lengths in ("equal", "mixed"):
                for batch in (1, 8) if quick else (1, 4, 8, 16):
                    if lengths == "mixed" and batch == 1:
                        continue  # one sequence has one length
                    for context in (256, 1000) if quick else (256, 1000, 2000):
                        yield Case(dtype, lengths, table, batch, context)


def _three(values: tuple[float, float, float]) -> str:
    return "/".join(f"{value:.2f}" for value in values)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, and say by the exit code whether both sides gave the same answers."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.decode", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer batches and steps")
    parser.add_argument(
        "--dtype",
        action="append",
        type=lambda name: DTYPE_ALIASES.get(name, name),
        choices=["float32", "bfloat16"],
    )
    parser.add_argument("--tables", action="append", choices=["runs", "scattered"])
    parser.add_argument("--steps", type=int, default=0, help="steps counted (9 to 31, by size)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print numbers, not a table")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    head: dict[str, Any] = provenance() | {
        "seed": options.seed,
        "threads": options.threads,
        "torch": torch.__version__,
    }
    if not options.json:
        print(" · ".join(f"{name} {value}" for name, value in head.items()))
        print("milliseconds per step of 30 layers, min/median/max; ratio > 1: paged is faster")
        print(
            f"{'dtype':9}{'lengths':8}{'tables':10}{'batch':>5}{'context':>8}"
            f"{'DynamicCache+SDPA':>24}{'paged':>24}{'ratio':>7}"
        )
    rows = []
    chosen = cases(
        quick=options.quick,
        dtypes=options.dtype or ["float32", "bfloat16"],
        tables=options.tables or (["runs"] if options.quick else ["runs", "scattered"]),
    )
    for case in chosen:
        steps = options.steps or min(31, max(9, 40_000 // (case.batch * case.context)))
        row = measure(case, steps=steps, warmup=2, seed=options.seed)
        rows.append(row)
        if not options.json:
            print(
                f"{row.dtype:9}{row.lengths:8}{row.tables:10}{row.batch:5}{row.context:8}"
                f"{_three(row.transformers_ms):>24}{_three(row.paged_ms):>24}{row.ratio:7.2f}",
                flush=True,
            )
    differ = [row for row in rows if row.difference > (1e-4 if row.dtype == "float32" else 5e-2)]
    ratios = [row.ratio for row in rows]
    if options.json:
        print(json_text(head | {"rows": [asdict(row) for row in rows]}, indent=2))
    else:
        print(
            f"ratio: lowest {min(ratios):.2f}, geometric mean "
            f"{statistics.geometric_mean(ratios):.2f}, highest {max(ratios):.2f}; "
            f"answers differ by at most {max(row.difference for row in rows):.1e}"
        )
    return int(bool(differ))


if __name__ == "__main__":
    sys.exit(main())
