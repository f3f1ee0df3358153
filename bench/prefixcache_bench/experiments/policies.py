"""`python -m prefixcache_bench.experiments.policies [FOLDER]`: every policy on the development set.

Replays each workload at several capacities, beside Belady's bounds, and writes the tables between
the markers of docs/policies.md, after each workload anew.  The folder is that of
PREFIXCACHE_TRACES if not given; without one, the document is left as it is.  About 5 minutes on two
idle cores; `--quick` takes the first workload alone and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from prefixcache.core.policies import POLICIES
from prefixcache_bench.commands.table import markdown
from prefixcache_bench.experiments.ablations import VARIANTS, registered
from prefixcache_bench.experiments.belady import belady
from prefixcache_bench.experiments.development import DEVELOPMENT_SET, Workload
from prefixcache_bench.experiments.forks import cores, forked, inherited
from prefixcache_bench.experiments.paths import paths
from prefixcache_bench.experiments.progress import Progress
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Trace
from prefixcache_bench.reports.provenance import provenance

DOCUMENT = Path("docs/policies.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
BELADY, BYPASS = "Belady", "Belady, with bypass"
BASE, LEARNS = "lru", "hazard"
OTHERS = tuple(sorted(name for name in POLICIES if name != BASE))
"""All registered policies but LRU."""
_LOSS = 0.005
"""Points of hit rate below which two results are called equal."""
_CPU_ROUNDS = 3


class Cell(NamedTuple):
    """One replay."""

    policy: str
    capacity: int
    rate: float


class Result(NamedTuple):
    """All replays of one workload."""

    workload: Workload
    rates: dict[tuple[str, int], float]
    """Hit rates by policy and capacity."""

    def gain(self, policy: str, capacity: int) -> float:
        """Give the points of hit rate by which a policy is ahead of LRU."""
        return 100 * (self.rates[policy, capacity] - self.rates[BASE, capacity])


class Cost(NamedTuple):
    """Processor time of the policy that learns, and of LRU, in one process."""

    workload: Workload
    capacity: int
    base_us: float
    """Per request."""
    learns_us: float

    @property
    def ratio(self) -> float:
        """Give how many times LRU's."""
        return self.learns_us / self.base_us


def _cell(task: tuple[str, int, int]) -> Cell:
    policy, size, capacity = task
    trace = inherited()
    if policy not in {BELADY, BYPASS}:
        out = replay(trace, _as_served(policy, size, capacity))
        return Cell(policy, capacity, out.block_hit_rate if trace.counts_last else out.hit_rate)
    requests = paths(trace, size)
    hits = sum(belady(requests, capacity, bypass=policy == BYPASS))
    if trace.counts_last:
        return Cell(policy, capacity, hits / sum(request.prompt_blocks for request in requests))
    return Cell(policy, capacity, hits * size / trace.prompt_tokens)


def _as_served(policy: str, size: int, capacity: int) -> Configuration:
    """Give a configuration with as many ghosts as the service would keep."""
    return Configuration(
        size, capacity, policy, ghosts=int(POLICIES[policy].ghosts * (capacity + 1))
    )


def measure(workload: Workload, trace: Trace, jobs: int, progress: Progress) -> Result:
    """Replay one workload on `jobs` processes."""
    tasks = [
        (policy, workload.block_size, capacity)
        for policy in policies_on(workload)
        for capacity in workload.capacities
    ]
    tasks += [
        (variant.name, workload.block_size, capacity)
        for variant in VARIANTS
        for capacity in workload.ablated_at
    ]
    rates = {}
    with registered(), forked(trace, jobs) as pool:
        for cell in pool.imap_unordered(_cell, tasks):
            rates[cell.policy, cell.capacity] = cell.rate
            progress.advance()
    return Result(workload, rates)


def policies_on(workload: Workload) -> list[str]:
    """Name what is compared on a workload, LRU first and the bounds last."""
    if not workload.every_policy:
        return [BASE, LEARNS]
    return [BASE, *OTHERS, BELADY, BYPASS]


def num_replays(workload: Workload) -> int:
    """Count what `measure` replays."""
    return len(policies_on(workload)) * len(workload.capacities) + len(VARIANTS) * len(
        workload.ablated_at
    )


def measure_cost(workload: Workload, trace: Trace, capacity: int) -> Cost:
    """Replay under LRU and the policy that learns, in turn; the least time of each counts."""
    least: dict[str, float] = {}
    for _ in range(_CPU_ROUNDS):
        for policy in (BASE, LEARNS):
            began = time.process_time()
            asked = _as_served(policy, workload.block_size, capacity)
            replay(trace, replace(asked, history_bytes=1 << 20))
            took = time.process_time() - began
            least[policy] = min(took, least.get(policy, took))
    base, learns = (1e6 * least[policy] / len(trace) for policy in (BASE, LEARNS))
    return Cost(workload, capacity, base, learns)


def tables(results: list[Result], costs: list[Cost]) -> Iterator[str]:
    """Write all tables, in Markdown."""
    yield from _against_lru(results)
    yield from _learns_everywhere(results)
    yield from _costs(costs)
    yield from _ablations(results)
    for result in results:
        if result.workload.every_policy:
            yield from _table(result)


def _table(result: Result) -> Iterator[str]:
    workload, rates = result.workload, result.rates
    rows = [("policy · capacity in blocks", *(f"{at:,}" for at in workload.capacities))]
    rows += [
        (policy, *(f"{rates[policy, at]:.4f}" for at in workload.capacities))
        for policy in policies_on(workload)
    ]
    rows.append(
        ("*of the gap from LRU to Belady, `hazard` closes*", *_closed(workload.capacities, rates))
    )
    yield f"### {workload.title}"
    yield f"\n{workload.about}.\n"
    yield markdown(rows)
    yield ""


def _closed(capacities: tuple[int, ...], rates: dict[tuple[str, int], float]) -> Iterator[str]:
    for at in capacities:
        gap = rates[BELADY, at] - rates[BASE, at]
        share = (rates[LEARNS, at] - rates[BASE, at]) / gap if 100 * gap > 1 else None
        yield "-" if share is None else f"{share:.0%}"


def _against_lru(results: list[Result]) -> Iterator[str]:
    """Write the worst loss and the best gain of every policy against LRU."""
    full = [result for result in results if result.workload.every_policy]
    head = ("policy", "worst", "where", "best", "where", "mean", "cells with a loss")
    rows = [head, *((policy, *_summary(policy, full)) for policy in OTHERS)]
    yield "### Every policy against LRU"
    yield "\nPoints of hit rate, over all cells of the tables below.\n"
    yield markdown(rows)
    yield ""


def _summary(policy: str, results: list[Result]) -> tuple[str, ...]:
    gains = [
        (result.gain(policy, at), f"{result.workload.title}, {at:,}")
        for result in results
        for at in result.workload.capacities
    ]
    (worst, where), (best, there) = min(gains), max(gains)
    mean = sum(gain for gain, _ in gains) / len(gains)
    losses = sum(gain < -_LOSS for gain, _ in gains)
    numbers = f"{worst:+.2f}", where, f"{best:+.2f}", there, f"{mean:+.2f}"
    return (*numbers, f"{losses} of {len(gains)}")


def _learns_everywhere(results: list[Result]) -> Iterator[str]:
    """Write LRU against the policy that learns, over the whole development set."""
    worst, where, best, there, mean, losses = _summary(LEARNS, results)
    yield f"### `{LEARNS}` against LRU, on the whole development set"
    yield (
        f"\n**Worst: {worst} points** ({where} blocks). Best: {best} ({there} blocks). "
        f"Mean: {mean}. Cells with a loss: {losses}.\n"
    )
    rows = [("workload", "capacity in blocks: LRU → `hazard`, points of difference")]
    for result in results:
        cells = [
            f"{at:,}: {result.rates[BASE, at]:.4f} → {result.rates[LEARNS, at]:.4f}, "
            f"{result.gain(LEARNS, at):+.2f}"
            for at in result.workload.capacities
        ]
        rows.append((result.workload.title, " · ".join(cells)))
    yield markdown(rows)
    yield ""


def _costs(costs: list[Cost]) -> Iterator[str]:
    rows = [("workload, capacity in blocks", "LRU, µs", f"`{LEARNS}`, µs", "ratio")]
    for cost in costs:
        name = f"{cost.workload.title}, {cost.capacity:,}"
        rows.append((name, f"{cost.base_us:.0f}", f"{cost.learns_us:.0f}", f"{cost.ratio:.2f}"))
    yield f"### Processor time per request, `{LEARNS}` against LRU"
    yield (
        f"\nWhole replays, {_CPU_ROUNDS} of each in turn in one process, the least time of each. "
        "The machine is shared: trust the ratios.\n"
    )
    yield markdown(rows)
    yield ""


def _ablations(results: list[Result]) -> Iterator[str]:
    """Write what each idea of the policy that learns is worth."""
    cells = [(result, at) for result in results for at in result.workload.ablated_at]
    head = [f"{result.workload.name}, {at:,}" for result, at in cells]
    rows = [(f"points above LRU, or below · {LEARNS} …", *head)]
    rows += [
        (name, *(f"{result.gain(policy, at):+.2f}" for result, at in cells))
        for policy, name in [
            (LEARNS, "as it is"),
            *((variant.name, variant.name) for variant in VARIANTS),
        ]
    ]
    yield f"### What each idea of `{LEARNS}` is worth"
    yield "\nThe same policy with one idea taken out or replaced at a time.\n"
    yield markdown(rows)
    yield ""


def write(document: Path, results: list[Result], costs: list[Cost], total: int) -> None:
    """Put the tables between the markers of the document; say if workloads are missing."""
    made = provenance()
    head = f"Made by `make experiments` from commit {made['commit']}, on {made['machine']}."
    if len(results) < total:
        head += f" **Not finished: {len(results)} of {total} workloads.**"
    before, _, rest = document.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    inside = "\n".join(["", head, "", *tables(results, costs)])
    document.write_text(f"{before}{BEGIN}\n{inside}{END}{after}")


def main(argv: list[str] | None = None) -> int:
    """Measure, and write the tables into the document."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.experiments.policies", description=__doc__
    )
    parser.add_argument("folder", nargs="?", default=os.environ.get("PREFIXCACHE_TRACES", ""))
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="the first workload; writes nothing")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    asked = parser.parse_args(argv)
    if not asked.folder:
        print(f"no folder of traces (PREFIXCACHE_TRACES): {asked.output} is left as it is")
        return 0
    workloads = DEVELOPMENT_SET[: 1 if asked.quick else None]
    results, costs = [], []
    with Progress("policies", sum(map(num_replays, workloads))) as progress:
        for workload in workloads:
            trace = workload.load(Path(asked.folder))
            results.append(measure(workload, trace, asked.jobs, progress))
            costs += [measure_cost(workload, trace, at) for at in workload.timed_at]
            if not asked.quick:  # now, so that nothing is lost if the rest is not waited for
                write(asked.output, results, costs, len(workloads))
    if asked.quick:
        print("\n".join(tables(results, costs)))
        return 0
    print(f"wrote {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
