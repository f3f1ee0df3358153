"""`python -m prefixcache_bench.experiments.tails [FOLDER]`: does reuse inside blocks ever cost?

Replays the token traces and the agentic one at every block size and capacity, under LRU and the
policy that learns, with every mode of partial reuse, and holds each cell to

```
off - 0.05  ≤  blocks        blocks - 0.05  ≤  tails        points of the prompt tokens reused
infinite memory: tails, at any block size  =  blocks of one token, to the last token
```

A policy that learns makes of one block more or less at the beginning another history, in which a
mode may gain or lose a tenth of a point either way.  So a cell that is behind in this replay is
replayed from later beginnings, and misses if it is behind in their mean.

Prints every cell, then what misses that, and exits with 1 if anything does.  The tables are put
between the markers of docs/experiments.md, after each workload anew.  The folder is that of
PREFIXCACHE_TRACES if not given.  About 15 minutes on two idle cores; `--quick` takes the smallest
workload alone, and writes nothing.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import Node
from prefixcache.types import TOKEN_BYTES, Grant, Partial, WorkerId
from prefixcache_bench.commands.table import markdown
from prefixcache_bench.experiments.capacity import parse_capacities
from prefixcache_bench.experiments.readers.load import load
from prefixcache_bench.experiments.rows import Row
from prefixcache_bench.experiments.sweep import Grid, ceilings, sweep
from prefixcache_bench.experiments.traces import Trace
from prefixcache_bench.reports.provenance import provenance

DOCUMENT = Path("docs/experiments.md")
BEGIN, END = "<!-- tails: begin -->", "<!-- tails: end -->"
POLICIES = ("lru", "hazard")
_MANY, _FEW = "1%,2%,4.5%,6%,8%,15%,25%,inf", "1%,2%,4.5%,6%,25%,inf"
_PACKED_AT = ((64, "8%"), (256, "8%"), (256, "25%"))
_LOOK_EVERY = 100
TOLERANCE = 0.05
"""Points by which a mode may be behind the one before it."""
BEGINNINGS, APART = 12, 37
"""How many replays decide of a cell that is behind, and how many requests later each begins."""


@dataclass(frozen=True)
class Workload:
    """A trace, and the block sizes at which it is replayed."""

    title: str
    block_sizes: tuple[int, ...]
    kvtrace: str = ""
    file: str = ""
    capacities: str = _MANY

    def load(self, folder: Path) -> Trace:
        """Read the trace.

        Raises:
            InvalidRequest: the folder does not have it.
        """
        return load(str(folder / self.file)) if self.file else load(str(folder), name=self.kvtrace)


WORKLOADS = (
    Workload("GSM8K, 8 shots", (1, 4, 16, 64, 256), kvtrace="gsm8k-8shot"),
    Workload("tau-airline", (1, 4, 16, 64, 256), kvtrace="tau-airline"),
    Workload("Agentic coding", (64, 128, 256), file="weka-agentic.jsonl.gz"),
    Workload("ShareGPT", (1, 16, 64, 256), kvtrace="sharegpt", capacities=_FEW),
)


@dataclass(frozen=True)
class Cell:
    """One policy, block size and capacity, in all modes."""

    workload: str
    policy: str
    block_size: int
    capacity: str
    reused: dict[Partial, int]
    """Prompt tokens, by mode."""
    prompt_tokens: int

    def rate(self, mode: Partial) -> float:
        """Give the share of prompt tokens that is reused, in per cent."""
        return 100 * self.reused[mode] / self.prompt_tokens

    @property
    def blocks_gain(self) -> float:
        """Points that parts of whole blocks bring."""
        return self.rate(Partial.BLOCKS) - self.rate(Partial.OFF)

    @property
    def tails_gain(self) -> float:
        """Points that tails bring beyond that."""
        return self.rate(Partial.TAILS) - self.rate(Partial.BLOCKS)

    def __str__(self) -> str:
        return (
            f"{self.workload}, {self.policy}, blocks of {self.block_size}, {self.capacity}: "
            f"off {self.rate(Partial.OFF):.2f} %, blocks {self.blocks_gain:+.2f}, "
            f"tails {self.tails_gain:+.2f} more"
        )


def measure(
    workload: Workload, trace: Trace, jobs: int | None, policies: tuple[str, ...] = POLICIES
) -> list[Cell]:
    """Replay one workload in every mode on `jobs` processes; all cores if None."""
    capacities = tuple(parse_capacities(workload.capacities))
    grid = Grid(workload.block_sizes, capacities, policies, tuple(Partial))
    rows: list[Row] = []
    working_set = ceilings(trace, ()).working_set
    held = {one.text: one.tokens(max(grid.block_sizes), working_set) for one in grid.capacities}
    # A capacity of less than a block of the largest size is left out.
    fitting = [
        one for one in grid.capacities if (held[one.text] or 1 << 60) >= grid.block_sizes[-1]
    ]
    grid = Grid(grid.block_sizes, tuple(fitting), grid.policies, grid.partials)
    sweep(trace, grid, working_set, [], rows.append, processes=jobs)
    reused: dict[tuple[str, int, str], dict[Partial, int]] = {}
    for row in rows:
        key = row["policy"], row["block_size"], row["capacity"]
        mode = Partial(row["partial"])
        found = row["hit_tokens"] + (0 if mode is Partial.OFF else row["partial_tokens"])
        reused.setdefault(key, {})[mode] = found
    return [
        Cell(workload.title, policy, size, one.text, modes, trace.prompt_tokens)
        for policy in grid.policies
        for size in grid.block_sizes
        for one in grid.capacities
        if (modes := reused[policy, size, one.text])
    ]


class Behind(NamedTuple):
    """A cell in which a mode finds less than the one before it, and what other replays say."""

    cell: Cell
    mode: Partial
    gains: tuple[float, ...]
    """Points that the mode brings in the same trace from later beginnings, this one first."""

    @property
    def is_missed(self) -> bool:
        """Whether it is behind by more than the tolerance in their mean, too."""
        return statistics.mean(self.gains) < -TOLERANCE

    def __str__(self) -> str:
        low, high, mean = min(self.gains), max(self.gains), statistics.mean(self.gains)
        error = statistics.stdev(self.gains) / len(self.gains) ** 0.5
        return (
            f"{self.cell}: {self.mode} {self.gains[0]:+.2f}; from {len(self.gains)} beginnings "
            f"{low:+.2f} to {high:+.2f}, mean {mean:+.3f} ± {error:.3f}"
        )


def behind(workload: Workload, trace: Trace, cells: list[Cell]) -> Iterator[Behind]:
    """Replay cells in which a mode is behind from later beginnings, one after the other."""
    for cell in cells:
        for mode, gain in ((Partial.BLOCKS, cell.blocks_gain), (Partial.TAILS, cell.tails_gain)):
            if gain < -TOLERANCE:
                only = replace(workload, block_sizes=(cell.block_size,), capacities=cell.capacity)
                gains = [gain]
                for number in range(1, BEGINNINGS):
                    later = replace(trace, requests=trace.requests[APART * number :])
                    (one,) = measure(only, later, 1, (cell.policy,))
                    gains.append(one.blocks_gain if mode is Partial.BLOCKS else one.tails_gain)
                yield Behind(cell, mode, tuple(gains))


def misses(cells: list[Cell], found: list[Behind]) -> Iterator[str]:
    """Say which cells of one workload are not what they should be."""
    for one in found:
        if one.is_missed:
            yield f"{one}: it costs"
    finest = min(cell.block_size for cell in cells)
    for cell in cells:
        if cell.capacity == "inf" and finest == 1:
            wanted = next(
                one.reused[Partial.OFF]
                for one in cells
                if (one.capacity, one.block_size, one.policy) == ("inf", finest, cell.policy)
            )
            if cell.reused[Partial.TAILS] != wanted:
                yield f"{cell}: {cell.reused[Partial.TAILS]:,} tokens, blocks of 1 {wanted:,}"


class Packing(NamedTuple):
    """What keeping the tails of one parent in one block would save, over a whole replay."""

    workload: str
    block_size: int
    capacity: str
    tails: int
    """Tails that were stored, summed over the looks …"""
    saved: int
    """… and the blocks that they would take less."""
    blocks: int
    """Blocks that were stored, tails included."""

    def __str__(self) -> str:
        share = 100 * self.saved / max(1, self.blocks)
        return (
            f"{self.workload}, blocks of {self.block_size}, {self.capacity}: "
            f"{self.saved:,} of {self.tails:,} tails, {share:.2f} % of the blocks stored"
        )


def pack_tails(workload: Workload, trace: Trace, size: int, capacity: str) -> Packing:
    """Serve a trace, and pack the tails of each parent, largest first, now and then."""
    working_set = ceilings(trace, ()).working_set
    blocks = parse_capacities(capacity)[0].blocks(size, working_set) or 1
    words = trace.words(size)
    cache, me = PrefixCache(blocks + 1, words, ttl_s=1e9, history_bytes=0), WorkerId(1)
    tails = saved = stored = 0
    for number, request in enumerate(trace.requests):
        cache.attach(me, request.namespace, now=request.t)
        tokens = request.tokens[: blocks * words * TOKEN_BYTES]
        grant = cache.acquire(me, request.namespace, tokens, now=request.t)
        assert isinstance(grant, Grant)
        cache.commit(me, grant.lease, len(tokens) // TOKEN_BYTES, now=request.t)
        cache.release(me, grant.lease, now=request.t)
        cache.next_deadline()
        if number % _LOOK_EVERY == _LOOK_EVERY - 1:
            for fills in _tails_by_parent(cache, words):
                tails, saved = tails + len(fills), saved + len(fills) - _num_bins(fills, words)
            stored += cache.num_indexed
    return Packing(workload.title, size, capacity, tails, saved, stored)


def _tails_by_parent(cache: PrefixCache, words: int) -> Iterator[list[int]]:
    """Give the sizes of the tails below each run that has any."""
    stack: list[Node] = list(cache._lessor.roots.values())
    while stack:
        node = stack.pop()
        below = list(node.children)
        fills = [len(one.tokens) // TOKEN_BYTES for one in below]
        if short := [fill for fill in fills if fill < words]:
            yield short
        stack.extend(below)


def _num_bins(fills: list[int], room: int) -> int:
    """Count the blocks that first-fit, the largest first, packs tails into.

    >>> _num_bins([5, 4, 3, 3], 8)
    2
    """
    left: list[int] = []
    for fill in sorted(fills, reverse=True):
        at = next((i for i, space in enumerate(left) if space >= fill), None)
        if at is None:
            left.append(room - fill)
        else:
            left[at] -= fill
    return len(left)


def tables(
    results: list[list[Cell]], found: list[Behind], missed: list[str], packed: list[Packing]
) -> Iterator[str]:
    """Write all cells, and the worst of them, in Markdown."""
    every = [cell for cells in results for cell in cells]
    for name, gain in (("blocks", "blocks_gain"), ("tails", "tails_gain")):
        worst = min(every, key=lambda cell: getattr(cell, gain))
        lost = sum(round(getattr(cell, gain), 2) < 0 for cell in every)
        yield (
            f"*{name}* against the mode before it, {len(every)} cells: worst "
            f"{getattr(worst, gain):+.2f} points ({worst.workload}, `{worst.policy}`, blocks of "
            f"{worst.block_size}, {worst.capacity}), below 0 in {lost}."
        )
    for one in found:
        yield f"Behind in this replay: {one}."
    yield f"Missed: {'; '.join(missed)}.\n" if missed else "Missed: none.\n"
    capacities = list(dict.fromkeys(cell.capacity for cell in every))
    rows = [("off, % + blocks + tails, points", *capacities)]
    lines: dict[tuple[str, str, int], dict[str, str]] = {}
    for cell in every:
        if cell.block_size == 1:
            text = f"{cell.rate(Partial.OFF):.2f}"
        else:
            text = f"{cell.rate(Partial.OFF):.2f} {cell.blocks_gain:+.2f} {cell.tails_gain:+.2f}"
        lines.setdefault((cell.workload, cell.policy, cell.block_size), {})[cell.capacity] = text
    rows += [
        (f"{workload}, `{policy}`, {size}", *(line.get(one, "-") for one in capacities))
        for (workload, policy, size), line in lines.items()
    ]
    yield markdown(rows)
    yield "\nPacking the tails of one parent into one block would save: "
    yield "; ".join(map(str, packed)) + "."


def write(document: Path, lines: Iterator[str]) -> None:
    """Put the tables between the markers of the document."""
    text = document.read_text()
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    made = provenance()
    head = f"\nMade by `{made['command']}` from commit {made['commit']}, on {made['machine']}.\n\n"
    document.write_text(before + BEGIN + head + "\n".join(lines) + "\n" + END + after)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print, write; give the exit code: 1 if a cell misses."""
    parser = argparse.ArgumentParser(description="Does reuse inside blocks ever cost?")
    parser.add_argument("folder", nargs="?", default=os.environ.get("PREFIXCACHE_TRACES", ""))
    parser.add_argument("--quick", action="store_true", help="the smallest workload; no document")
    parser.add_argument("--jobs", type=int, default=None, help="processes; default: all cores")
    asked = parser.parse_args(arguments)
    if not asked.folder:
        print("give the folder of the traces, or set PREFIXCACHE_TRACES", file=sys.stderr)
        return 2
    results: list[list[Cell]] = []
    found: list[Behind] = []
    missed: list[str] = []
    seen = 0
    packed: list[Packing] = []
    for workload in WORKLOADS[:1] if asked.quick else WORKLOADS:
        trace = workload.load(Path(asked.folder))
        cells = measure(workload, trace, asked.jobs)
        for cell in cells:
            print(cell, flush=True)
        results.append(cells)
        found += behind(workload, trace, cells)
        missed += misses(cells, found[seen:])
        seen = len(found)
        if not asked.quick:
            packed += [pack_tails(workload, trace, *at) for at in _PACKED_AT]
            write(DOCUMENT, tables(results, found, missed, packed))
    for saving in packed:
        print(f"packing: {saving}")
    for one in found:
        print(f"behind in this replay: {one}")
    print(f"{sum(map(len, results))} cells, {len(missed)} missed")
    for miss in missed:
        print(miss)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
