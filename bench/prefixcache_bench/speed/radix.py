"""What the tree costs, beside the smallest tree that will do, measured in turns in one run.

```
hit       find a stored chat and 37 tokens after it         miss    find as many unknown tokens
lock      protect its path, and let it go                   insert  store 293 tokens after it
evict     take 1,024 tokens' blocks from the coldest leaves
```
Microseconds per call.  A ratio is that of the medians.

    python -m prefixcache_bench.speed.radix [--quick] [--full] [--rounds N] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from prefixcache.config import format_size
from prefixcache.plain_json import json_text
from prefixcache.types import TOKEN_BYTES, Grant, Partial
from prefixcache_bench.speed import radix_peers, radix_scaling
from prefixcache_bench.speed.radix_subjects import (
    BLOCK_SIZE,
    SPACE,
    WORKER,
    Baseline,
    Call,
    Core,
    Subject,
)
from prefixcache_bench.speed.radix_workload import DECODED_TOKENS, FRESH_TOKENS, Workload, build

LENGTHS = (1_000, 4_000, 32_000)
EVICTED_BLOCKS = 64
EVICTIONS = 16
RATIO_GOAL = 2.0


@dataclass(slots=True)
class Column:
    """One kind of call: microseconds per call and subject, one number per round."""

    name: str
    goal: float | None = RATIO_GOAL
    core: list[float] = field(default_factory=list)
    baseline: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float | None:
        """Core's median over the baseline's."""
        if not self.baseline:
            return None
        return statistics.median(self.core) / statistics.median(self.baseline)

    @property
    def is_met(self) -> bool | None:
        """Whether the goal is met; None where there is none."""
        ratio = self.ratio
        return None if self.goal is None or ratio is None else ratio <= self.goal

    def report(self) -> dict[str, object]:
        """Give all figures by name."""
        return {
            **asdict(self),
            "ratio": self.ratio,
            "is_met": self.is_met,
        }


def per_call_us(calls: Sequence[Call], repeat: int = 1) -> float:
    """Run calls one after the other; give the mean time of one."""
    clock = time.perf_counter_ns
    started = clock()
    for _ in range(repeat):
        for call in calls:
            call()
    return (clock() - started) / (1e3 * repeat * len(calls))


@contextmanager
def still() -> Iterator[None]:
    """Keep the garbage collector out of the way, as the service does."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


class TreeBenchmark:
    """Both subjects, filled with the same workload, and the columns."""

    def __init__(self, workload: Workload, subjects: tuple[Core, Baseline]) -> None:
        self.workload = workload
        self.core, self.baseline = subjects
        self.columns: dict[str, Column] = {}
        for subject in subjects:
            for sequence in workload.sequences:
                subject.store(sequence)

    def measure(self, rounds: int) -> None:
        """Run all columns in turns."""
        lengths = tuple(self.workload.probes)
        for number in range(rounds):
            for length in lengths:
                self._take(f"hit {_short(length)}", number, self._hits(length))
            for length in lengths:
                self._take(f"miss {_short(length)}", number, self._misses(length))
            for length in lengths:
                self._take(f"lock {_short(length)}", number, self._pins(length))
            for length in lengths:
                self._insert(f"insert {_short(length)}", number, length)
            self._take("evict 1,024", number, self._evictions, repeat=1)
        for length in lengths:
            self._verbs(length, rounds)

    def _take(
        self,
        name: str,
        number: int,
        prepare: Callable[[Subject], list[Call]],
        *,
        repeat: int = 8,
    ) -> None:
        subjects: list[Subject] = [self.core, self.baseline]
        for subject in subjects if number % 2 else reversed(subjects):
            calls = prepare(subject)
            for call in calls[: repeat - 1]:
                call()
            self._add(name, subject, per_call_us(calls, repeat))

    def _add(self, name: str, subject: Subject, figure: float) -> None:
        column = self.columns.setdefault(name, Column(name))
        (column.core if subject is self.core else column.baseline).append(figure)

    def _hits(self, length: int) -> Callable[[Subject], list[Call]]:
        return lambda subject: [subject.find(one.hit) for one in self.workload.probes[length]]

    def _misses(self, length: int) -> Callable[[Subject], list[Call]]:
        return lambda subject: [subject.find(one.miss) for one in self.workload.probes[length]]

    def _pins(self, length: int) -> Callable[[Subject], list[Call]]:
        return lambda subject: [subject.pin(one.stored) for one in self.workload.probes[length]]

    @staticmethod
    def _evictions(subject: Subject) -> list[Call]:
        return [subject.evict(EVICTED_BLOCKS)] * EVICTIONS

    def _insert(self, name: str, number: int, length: int) -> None:
        """Store something new after each probe, another thing in each round."""
        more = number.to_bytes(TOKEN_BYTES, "little") * DECODED_TOKENS
        subjects: list[Subject] = [self.core, self.baseline]
        for subject in subjects if number % 2 else reversed(subjects):
            prepared = [
                subject.insert(one.hit[:-TOKEN_BYTES] + more[:TOKEN_BYTES], more)
                for one in self.workload.probes[length]
            ]
            self._add(name, subject, per_call_us([call for call, _ in prepared]))
            for _, finish in prepared:
                finish()

    def _verbs(self, length: int, rounds: int) -> None:
        """Whole verbs, leases and ledger and all: stored chats, each time with a new message."""
        core, cache, fresh = self.core, self.core.cache, random.Random(length)
        names = [f"{verb} {_short(length)}" for verb in ("acquire", "commit", "release")]
        columns = [self.columns.setdefault(name, Column(name, goal=None)) for name in names]
        for _ in range(rounds):
            times = [0, 0, 0]
            for probe in self.workload.probes[length]:
                prompt = probe.stored + fresh.randbytes(FRESH_TOKENS * TOKEN_BYTES)
                decoded = fresh.randbytes(DECODED_TOKENS * TOKEN_BYTES)
                core.now += 1.0
                total = len(prompt) // TOKEN_BYTES + DECODED_TOKENS
                marks = [time.perf_counter_ns()]
                grant = cache.acquire(WORKER, SPACE, prompt, reserve=DECODED_TOKENS, now=core.now)
                marks.append(time.perf_counter_ns())
                if not isinstance(grant, Grant):
                    raise TypeError("nobody else computes anything here")
                cache.commit(WORKER, grant.lease, total, decoded, now=core.now)
                marks.append(time.perf_counter_ns())
                cache.release(WORKER, grant.lease, now=core.now)
                marks.append(time.perf_counter_ns())
                for index in range(3):
                    times[index] += marks[index + 1] - marks[index]
            for column, spent in zip(columns, times, strict=True):
                column.core.append(spent / 1e3 / len(self.workload.probes[length]))


def bytes_without_tails(workload: Workload) -> float:
    """Store it where partly filled blocks are not kept; give what the index takes per token."""
    core = Core(400_000, partial=Partial.BLOCKS)
    for sequence in workload.sequences:
        core.store(sequence)
    return core.index_bytes() / (core.tree.num_blocks * BLOCK_SIZE)


def _short(length: int) -> str:
    return f"{length // 1000}k"


def table(columns: Sequence[Column]) -> Iterator[str]:
    """Draw the columns as lines of text."""
    yield (
        f"{'µs per call':<14}{'core min':>9}{'median':>9}{'max':>9}"
        f"{'baseline':>11}{'median':>9}{'max':>9}{'ratio':>8}  goal"
    )
    for column in columns:
        line = f"{column.name:<14}" + _three(column.core, 9)
        if column.baseline and column.ratio is not None:
            line += _three(column.baseline, 11) + f"{column.ratio:>7.2f}x"
            if column.goal is not None:
                line += f"  <= {column.goal:g}x {'met' if column.is_met else 'MISSED'}"
        yield line


def _three(figures: list[float], first: int) -> str:
    low, middle, high = min(figures), statistics.median(figures), max(figures)
    return f"{low:>{first}.2f}{middle:>9.2f}{high:>9.2f}"


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write JSON if asked."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.radix", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a tenth of the tokens, few rounds")
    parser.add_argument("--full", action="store_true", help="scale to 10 M blocks (needs 4 GiB)")
    parser.add_argument("--rounds", type=int, help="how often each column is measured")
    parser.add_argument("--json", type=Path, help="also write all figures there")
    options = parser.parse_args(argv)
    rounds = options.rounds or (3 if options.quick else 15)
    lengths = LENGTHS[:2] if options.quick else LENGTHS

    workload = build(120_000 if options.quick else 1_200_000, lengths, 4 if options.quick else 16)
    benchmark = TreeBenchmark(workload, (Core(400_000), Baseline()))
    core = benchmark.core
    num_tokens = core.tree.num_blocks * BLOCK_SIZE
    told = core.cache.snapshot(now=core.now)
    sizes = {
        "index": core.index_bytes() / num_tokens,
        "index_without_tails": bytes_without_tails(workload),
        "index_told": told.index_bytes / num_tokens,
        "core": core.num_bytes() / num_tokens,
        "baseline": benchmark.baseline.num_bytes() / num_tokens,
    }
    print(f"{num_tokens:,} tokens in {len(workload.sequences):,} stored turns, blocks of 16")
    with still():
        benchmark.measure(rounds)
    columns = list(benchmark.columns.values())
    print("\n".join(table(columns)))
    print(
        f"bytes per token: index {sizes['index']:.2f} (told in O(1): {sizes['index_told']:.2f}; "
        f"without tails {sizes['index_without_tails']:.2f}), "
        f"baseline {sizes['baseline']:.2f}, ratio {sizes['index'] / sizes['baseline']:.2f}x; "
        f"everything {sizes['core']:.2f}, of which history {told.history_bytes / num_tokens:.2f}: "
        f"{format_size(told.history_bytes)} of {format_size(told.max_history_bytes)}"
    )

    peers = radix_peers.measure(workload)
    print()
    print("\n".join(radix_peers.table(peers)))

    sizes_in_blocks: tuple[int, ...] = (10_000, 100_000)
    if not options.quick:
        sizes_in_blocks += (1_000_000,)
    if options.full:
        sizes_in_blocks += (10_000_000,)
    print()
    scaling = []
    for row in radix_scaling.measure(sizes_in_blocks, rounds, still):
        scaling.append(row)
        print(radix_scaling.line(row, first=len(scaling) == 1), flush=True)
    print("\n".join(radix_scaling.verdict(scaling)))
    if options.json:
        report = {
            "command": [sys.argv[0], *(argv if argv is not None else sys.argv[1:])],
            "tokens": num_tokens,
            "columns": {column.name: column.report() for column in columns},
            "bytes_per_token": sizes,
            "history_bytes": told.history_bytes,
            "scaling": [asdict(row) for row in scaling],
            "peers": [asdict(peer) for peer in peers],
        }
        options.json.write_text(json_text(report, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
