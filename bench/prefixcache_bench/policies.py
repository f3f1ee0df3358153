"""`python -m prefixcache_bench.policies FOLDER`: every policy on the development traces.

Replays each trace at several capacities under every registered policy, beside Belady's bound, and
writes the tables between the markers of docs/policies.md.  The folder holds the block-hash traces
`mooncake_conversation.jsonl.gz` and `weka-agentic.jsonl.gz` and the kvtrace workloads `sharegpt`,
`tau-airline` and `gsm8k-8shot`.  About 12 minutes on two cores; `--quick` leaves out all but the
first workload.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from prefixcache.core.eviction import POLICIES
from prefixcache_bench.belady import belady
from prefixcache_bench.paths import paths
from prefixcache_bench.provenance import provenance
from prefixcache_bench.readers.load import System, load
from prefixcache_bench.replay import Configuration, replay
from prefixcache_bench.sweep import cores
from prefixcache_bench.traces import Trace

DOCUMENT = Path("docs/policies.md")
BEGIN, END = "<!-- tables: begin -->", "<!-- tables: end -->"
BELADY, BYPASS = "belady", "belady, with bypass"


@dataclass(frozen=True)
class Workload:
    """A trace, a block size, and capacities in blocks."""

    title: str
    file: str
    """In the folder; empty for a kvtrace workload."""
    name: str
    block_size: int
    capacities: tuple[int, ...]
    system: System = System.NONE

    def load(self, folder: Path) -> Trace:
        """Read the trace."""
        if self.file:
            return load(str(folder / self.file))
        return load(str(folder), name=self.name, system=self.system)


WORKLOADS = (
    Workload(
        "Mooncake conversation (12,031 requests of real chat, 1 h; blocks of 512; share of blocks)",
        "mooncake_conversation.jsonl.gz",
        "",
        512,
        (1000, 2000, 5000, 10_000, 20_000, 30_000, 50_000, 100_000),
    ),
    Workload(
        "Agentic (964 requests of 20 coding sessions; blocks of 64; share of tokens)",
        "weka-agentic.jsonl.gz",
        "",
        64,
        (7812, 15_625, 31_250, 50_000),
    ),
    *(
        Workload(
            f"ShareGPT{text} (16,019 requests, think times synthetic; blocks of {size}; "
            "share of tokens)",
            "",
            "sharegpt",
            size,
            tuple(tokens // size for tokens in (32_768, 65_536, 131_072, 262_144, 524_288)),
            system,
        )
        for size in (16, 64, 256)
        for text, system in (
            ("", System.NONE),
            (", one system prompt", System.ONE),
            (", four system prompts", System.FOUR),
        )
    ),
    *(
        Workload(
            f"tau-airline (1,229 requests of agents with tools; blocks of {size}; share of tokens)",
            "",
            "tau-airline",
            size,
            tuple(tokens // size for tokens in (16_384, 32_768, 65_536)),
        )
        for size in (16, 64, 256)
    ),
    Workload(
        "GSM8K, 8 shots (660 requests; blocks of 16; share of tokens)",
        "",
        "gsm8k-8shot",
        16,
        (1024, 2048, 4096),
    ),
)


class Cell(NamedTuple):
    """One replay."""

    policy: str
    capacity: int
    rate: float
    cpu_us: float
    """Per request."""


_trace: Trace | None = None


def _cell(task: tuple[str, int, int]) -> Cell:
    policy, size, capacity = task
    trace = _trace
    assert trace is not None
    if policy in POLICIES:
        ghosts = int(POLICIES[policy].ghosts * capacity)
        out = replay(trace, Configuration(size, capacity, policy, ghosts=ghosts))
        rate = out.block_hit_rate if trace.counts_last else out.hit_rate
        return Cell(policy, capacity, rate, 1e6 * out.cpu_s / out.requests)
    started = time.process_time()
    requests = paths(trace, size)
    hits = sum(belady(requests, capacity, bypass=policy == BYPASS))
    if trace.counts_last:
        rate = hits / sum(request.prompt_blocks for request in requests)
    else:
        rate = hits * size / trace.prompt_tokens
    return Cell(policy, capacity, rate, 1e6 * (time.process_time() - started) / len(requests))


def measure(workload: Workload, trace: Trace, jobs: int) -> list[Cell]:
    """Replay one workload under every policy and both bounds, on `jobs` processes."""
    global _trace
    _trace = trace
    tasks = [
        (policy, workload.block_size, capacity)
        for policy in (*POLICIES, BELADY, BYPASS)
        for capacity in workload.capacities
    ]
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        return pool.map(_cell, tasks, chunksize=1)


def table(workload: Workload, cells: list[Cell]) -> Iterator[str]:
    """Write one workload's table, in Markdown."""
    rates = {(cell.policy, cell.capacity): cell.rate for cell in cells}
    cost = {policy: _cost(policy, cells) for policy in POLICIES}
    heads = " | ".join(f"{capacity:,}" for capacity in workload.capacities)
    yield f"### {workload.title}"
    yield ""
    yield f"| policy · blocks | {heads} | CPU, of LRU |"
    yield "|---|" + "---:|" * (len(workload.capacities) + 1)
    order = sorted(POLICIES, key=lambda name: (name != "lru", name))
    for policy in (*order, BELADY, BYPASS):
        row = " | ".join(f"{rates[policy, capacity]:.4f}" for capacity in workload.capacities)
        factor = f"{cost[policy] / cost['lru']:.1f}" if policy in POLICIES else "-"
        yield f"| {policy} | {row} | {factor} |"
    yield ""


def _cost(policy: str, cells: list[Cell]) -> float:
    """Give a policy's CPU time per request over all capacities."""
    return sum(cell.cpu_us for cell in cells if cell.policy == policy)


def against_lru(results: list[tuple[Workload, list[Cell]]]) -> Iterator[str]:
    """Write the worst loss and the best gain of every policy against LRU."""
    yield "### Against LRU, all cells above (points of hit rate)"
    yield ""
    yield "| policy | worst | where | best | where | mean | cells with a loss | CPU, of LRU |"
    yield "|---|---:|---|---:|---|---:|---:|---:|"
    cost = {name: sum(_cost(name, cells) for _, cells in results) for name in POLICIES}
    for policy in sorted(POLICIES):
        if policy == "lru":
            continue
        gains = []
        for workload, cells in results:
            rates = {(cell.policy, cell.capacity): cell.rate for cell in cells}
            name = workload.title.partition(" (")[0]
            for capacity in workload.capacities:
                gain = 100 * (rates[policy, capacity] - rates["lru", capacity])
                gains.append((gain, f"{name}, {capacity:,} of {workload.block_size}"))
        (worst, where), (best, there) = min(gains), max(gains)
        mean = sum(gain for gain, _ in gains) / len(gains)
        losses = sum(gain < -0.005 for gain, _ in gains)
        yield (
            f"| {policy} | {worst:+.2f} | {where} | {best:+.2f} | {there} | {mean:+.2f} | "
            f"{losses} of {len(gains)} | {cost[policy] / cost['lru']:.1f} |"
        )
    yield ""


def main(argv: list[str] | None = None) -> int:
    """Measure, print, and write the tables into the document."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.policies", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--jobs", type=int, default=cores())
    parser.add_argument("--quick", action="store_true", help="the first workload; writes nothing")
    parser.add_argument("--output", type=Path, default=DOCUMENT)
    asked = parser.parse_args(argv)
    results = []
    lines: list[str] = []
    for workload in WORKLOADS[: 1 if asked.quick else None]:
        cells = measure(workload, workload.load(asked.folder), asked.jobs)
        results.append((workload, cells))
        lines.extend(table(workload, cells))
        print("\n".join(table(workload, cells)), flush=True)
    summary = list(against_lru(results))
    print("\n".join(summary))
    if asked.quick:
        return 0
    made = provenance()
    head = (
        "Made by `python -m prefixcache_bench.policies FOLDER` from commit "
        f"{made['commit']}, on {made['machine']}."
    )
    text = asked.output.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    inside = "\n".join(["", head, "", *summary, *lines])
    asked.output.write_text(f"{before}{BEGIN}\n{inside}{END}{after}")
    print(f"written: {asked.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
