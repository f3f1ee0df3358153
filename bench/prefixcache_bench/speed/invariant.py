"""Are all bits of an answer the same in any company, cold or cached; and what does that cost?

```
alone       each text in one go, on blocks of its own: the bits to compare with
batches     texts cut anywhere (one token, some, hundreds), 1-8 side by side, on other blocks, over
            and over: the logits after each part are compared bit for bit
cost        decoding with and without, taking turns
```
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.plain_json import json_text
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_kernels import SharedPool
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.model import Model

BLOCK: Final = 16
BATCHES: Final = (1, 4, 8, 16)
CONTEXT: Final = 200
GOAL: Final = 0.8


class Texts:
    """Some texts, with the bits of the logits after some of their tokens, each computed alone.

    Args:
        model: what computes.
        draw: where all choices come from.
        count: texts.
        longest: tokens of one.
        rows: tokens of a text after which logits are kept, the last one included.
    """

    def __init__(
        self, model: Model, draw: random.Random, count: int, longest: int, rows: int
    ) -> None:
        self.model, self.draw, self.count = model, draw, count
        self._width = -(-longest // BLOCK)
        self.pool = SharedPool.private(model.layout, 1 + 2 * count * self._width, BLOCK)
        self.tokens, self.cuts, self.alone = [], [], []
        for number in range(count):
            length = draw.randrange(rows + 1, longest + 1)
            tokens = [draw.randrange(model.vocab_size) for _ in range(length)]
            cuts = sorted({length, *draw.sample(range(1, length + 1), rows)})
            logits = self._run([(tokens, 0, self._table(number), length)])
            self.tokens.append(tokens)
            self.cuts.append(cuts)
            self.alone.append({cut: logits[cut - 1].clone() for cut in cuts})

    def play(self, batches: int) -> tuple[int, int]:
        """Compute the texts again, cut at random, in random company.

        Returns:
            Rows of logits that were compared, and how many of them had another bit somewhere.
        """
        draw, compared, wrong = self.draw, 0, 0
        done = [len(tokens) for tokens in self.tokens]
        tables = [self._table(number) for number in range(self.count)]
        for _ in range(batches):
            pieces, ends = [], []
            for number in draw.sample(range(self.count), draw.randint(1, min(8, self.count))):
                if done[number] >= len(self.tokens[number]):  # from the start, or from a prefix
                    done[number] = draw.choice((0, draw.choice(self.cuts[number]) - 1))
                    if not done[number]:
                        tables[number] = self._table(self.count + number)
                at = done[number]
                nearest = min(cut for cut in self.cuts[number] if cut > at)
                end = min(nearest, at + draw.choice((1, 1, 3, 20, 300)))
                pieces.append((self.tokens[number][at:end], at, tables[number], 1))
                ends.append((number, end))
                done[number] = end
            logits = self._run(pieces)
            for row, (number, end) in zip(logits, ends, strict=True):
                if (want := self.alone[number].get(end)) is not None:
                    compared += 1
                    wrong += not torch.equal(row, want)
        return compared, wrong

    def _run(self, parts: list[tuple[list[int], int, list[int], int]]) -> Tensor:
        pieces = [Piece(tokens, at, table, num_rows=rows) for tokens, at, table, rows in parts]
        return self.model.forward(Batch.pack(pieces, BLOCK), self.pool)

    def _table(self, place: int) -> list[int]:
        return [1 + place * self._width + block for block in range(self._width)]


def cost(model: Model, draw: random.Random, rounds: int) -> list[dict[str, Any]]:
    """Compare decoding with and without, by this thread's time; taking turns."""
    both = {"plain": model, "invariant": model.made_invariant()}
    width = -(-(CONTEXT + rounds + 1) // BLOCK)
    pool = SharedPool.private(model.layout, 1 + max(BATCHES) * width, BLOCK)
    rows = []
    for batch in BATCHES:
        tables = [list(range(1 + i * width, 1 + (i + 1) * width)) for i in range(batch)]
        prompt = [draw.randrange(model.vocab_size) for _ in range(CONTEXT)]
        for table in tables:
            model.forward(Batch.pack([Piece(prompt, 0, table)], BLOCK), pool)
        taken: dict[str, list[float]] = {name: [] for name in both}
        for number in range(rounds):
            step = Batch.pack([Piece([7], CONTEXT + number, table) for table in tables], BLOCK)
            for name, one in both.items():
                started = time.thread_time()
                one.forward(step, pool)
                taken[name].append(time.thread_time() - started)
        speeds = {name: batch / statistics.median(times) for name, times in taken.items()}
        rows.append({"batch": batch, **speeds, "ratio": speeds["invariant"] / speeds["plain"]})
    return rows


def main(argv: list[str] | None = None) -> int:
    """Compare, measure, print; 1 if a bit differs, or with `--strict` if the goal is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.invariant", description=__doc__
    )
    parser.add_argument("--batches", type=int, default=1000)
    parser.add_argument("--quick", action="store_true", help="100 batches, few rounds")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strict", action="store_true", help="fail if the goal is missed")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the numbers there")
    options = parser.parse_args(argv)
    batches = 100 if options.quick else options.batches
    result: dict[str, Any] = {**provenance(), "types": {}}
    print(" · ".join(f"{key} {value}" for key, value in result.items() if key != "types") + "\n")
    met, all_wrong = True, 0
    for dtype in ("float32", "bfloat16"):
        draw = random.Random(options.seed)
        model = Model.load(options.model, dtype=dtype, threads=1)
        texts = Texts(model.made_invariant(), draw, 12, 300 if options.quick else 1200, 24)
        compared, wrong = texts.play(batches)
        rows = cost(model, draw, 10 if options.quick else 40)
        result["types"][dtype] = {
            "batches": batches,
            "compared": compared,
            "wrong": wrong,
            "cost": rows,
        }
        all_wrong += wrong
        print(
            f"{dtype}: {batches:,} batches, {compared:,} rows of logits, {wrong} with another bit"
        )
        print("decoding, tokens per second of this thread: plain, invariant, ratio")
        for row in rows:
            print(
                f"  batch {row['batch']:2d}   {row['plain']:5.0f}   {row['invariant']:5.0f}   "
                f"{row['ratio']:.2f}"
            )
            met = met and row["ratio"] >= GOAL
    print(f"\ninvariant at least {GOAL:g} of plain: {'met' if met else 'MISSED'}")
    if options.json:
        options.json.write_text(json_text(result, indent=1), encoding="utf-8")
    return 1 if all_wrong or (options.strict and not met) else 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
