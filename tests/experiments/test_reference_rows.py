"""Every printed digit of independent simulators, on real traces.

The traces are large and optional.  PREFIXCACHE_TRACES names a folder with kvtrace files, block-hash
traces and `reference_tokens.csv`, `reference_mooncake.csv`, `reference_weka.csv`.  A spread of rows
is checked then; with PREFIXCACHE_SOAK set, all of them are.

Of the block-hash reference, the LFU rows are those of a flat set of blocks, which drops blocks
whose children it keeps: its `block_any` exceeds its `block_prefix`, and in a tree the two are one.
So they are compared with `lfu-flat`; how near the tree's `lfu` comes is tested beside it.
"""

from __future__ import annotations

import csv
import os
from functools import cache
from pathlib import Path

import pytest

from prefixcache.types import Namespace
from prefixcache_bench.experiments.curve import Curve, curve
from prefixcache_bench.experiments.flat import FLAT_LFU, flat_lfu
from prefixcache_bench.experiments.outcome import Outcome
from prefixcache_bench.experiments.paths import paths
from prefixcache_bench.experiments.readers import kvtrace
from prefixcache_bench.experiments.readers.lines import Source
from prefixcache_bench.experiments.readers.load import System, load
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace

FOLDER = os.environ.get("PREFIXCACHE_TRACES", "")
ALL_ROWS = bool(os.environ.get("PREFIXCACHE_SOAK"))
SYSTEMS = {"none": System.NONE, "sys1": System.ONE, "sys4": System.FOUR}
PRINTED = ("hit_rate", "hit_rate_partial", "mean_request_hit", "block_hit_rate_ceil")
SAME = {
    "block_prefix": "block_prefix",
    "token_prefix": "token_prefix",
    "mean_req_block": "mean_request_block_prefix",
    "mean_req_token": "mean_request_hit",
}
COUNTED = ("requests", "prompt_tokens", "hit_tokens", "evictions", "peak_blocks")

Row = dict[str, str]


def name_of(row: Row) -> str:
    return "-".join(list(row.values())[:4])


def rows(name: str, every: int, **only: str) -> list[Row]:
    """Give the rows of a reference that have these values; one out of `every` unless all are."""
    path = Path(FOLDER) / name
    if not FOLDER or not path.exists():
        reason = f"set PREFIXCACHE_TRACES to a folder with {name} and its traces"
        return [pytest.param({}, marks=pytest.mark.skip(reason=reason))]  # type: ignore[list-item]
    with path.open() as file:
        found = [row for row in csv.DictReader(file) if only.items() <= row.items()]
    return found[:: 1 if ALL_ROWS else every]


@cache
def workload(name: str) -> Trace:
    name, _, system = name.rpartition("-")
    if system in SYSTEMS:
        return load(FOLDER, name=name, system=SYSTEMS[system])
    return load(FOLDER, name=f"{name}-{system}")


@cache
def hashed(name: str) -> Trace:
    return load(str(Path(FOLDER) / f"{name}.jsonl.gz"))


@cache
def outcome(name: str, block_size: int, blocks: int | None) -> Outcome:
    return replay(workload(name), Configuration(block_size, blocks))


@cache
def one_pass(name: str, block_size: int) -> Curve:
    return curve(workload(name), block_size)


def hits_at(found: Curve, tokens: int) -> int:
    at = tokens // found.block_size if tokens else found.working_set
    return found.hit_tokens([at])[0]


@cache
def blocks_of_conversations(name: str, block_size: int) -> int:
    """Count the distinct blocks of whole conversations, also of what comes after all answers."""
    with Source(str(Path(FOLDER) / (name + kvtrace.CONVERSATIONS))) as source:
        whole = [one for one in kvtrace.conversations(source) if one]
    space = Namespace(name)
    return curve(
        Trace(name, [Request(0.0, space, one, 1, 1) for one in whole]), block_size
    ).working_set


@pytest.mark.parametrize("row", rows("reference_tokens.csv", 23), ids=name_of)
def test_token_traces(row: Row) -> None:
    size, tokens = int(row["block"]), int(row["cap_tokens"])
    found = outcome(row["workload"], size, tokens // size if tokens else None)
    fields = found.fields()
    for name in COUNTED:
        assert fields[name] == int(row[name]), name
    assert found.hit_tokens + found.partial_tokens == int(row["hit_tokens_partial"])
    for name in PRINTED:
        assert fields[name] == float(row[name]), name
    name, (size_1, size_b) = row["workload"], (one_pass(row["workload"], n) for n in (1, size))
    finest = hits_at(size_1, tokens) / found.prompt_tokens
    assert round(finest, 6) == float(row["hit_rate_token_granular_same_capacity"])
    assert hits_at(size_b, tokens) == found.hit_tokens
    if not name.endswith(("sys1", "sys4")):
        unique = blocks_of_conversations(name.removesuffix("-none"), size)
        assert unique == int(row["unique_blocks"])


@pytest.mark.parametrize("row", rows("reference_mooncake.csv", 2, policy="LRU"), ids=name_of)
def test_mooncake(row: Row) -> None:
    trace, size = hashed(row["trace"]), int(row["block_tokens"])
    memory = row["capacity_blocks_of_512"]
    blocks = int(memory) * 512 // size if memory else None
    fields = replay(trace, Configuration(size, blocks)).fields()
    for theirs, ours in SAME.items():
        if row[theirs]:
            assert fields[ours] == float(row[theirs]), theirs
    swept = curve(trace, size)
    at = swept.working_set if blocks is None else blocks
    by_curve = swept.hit_blocks([at])[0] / swept.prompt_blocks
    assert round(by_curve, 6) == float(row["block_prefix"])
    assert round(swept.hit_rates([at])[0], 6) == fields["token_prefix"]


@pytest.mark.parametrize("row", rows("reference_mooncake.csv", 3, policy="LFU"), ids=name_of)
def test_mooncake_under_lfu(row: Row) -> None:
    trace, size = hashed(row["trace"]), int(row["block_tokens"])
    memory = row["capacity_blocks_of_512"]
    blocks = int(memory) if memory else None
    flat = replay(trace, Configuration(size, blocks, FLAT_LFU)).fields()
    for theirs, ours in SAME.items():
        assert flat[ours] == float(row[theirs]), theirs
    anywhere = sum(flat_lfu(paths(trace, size), blocks).anywhere)
    assert round(anywhere / sum(one.prompt for one in trace), 6) == float(row["block_any"])
    ours = replay(trace, Configuration(size, blocks, "lfu")).block_hit_rate
    if row["block_any"] == row["block_prefix"]:  # nothing was stranded
        assert round(ours, 6) == float(row["block_prefix"])
    else:
        assert abs(ours - float(row["block_prefix"])) < 0.0001


@pytest.mark.parametrize("row", rows("reference_weka.csv", 1), ids=name_of)
def test_weka(row: Row) -> None:
    trace, size, tokens = hashed(row["workload"]), int(row["block"]), int(row["cap_tokens"])
    found = replay(trace, Configuration(size, tokens // size if tokens else None))
    fields = found.fields()
    for name in ("requests", "prompt_tokens", "hit_tokens"):
        assert fields[name] == int(row[name]), name
    assert fields["hit_rate"] == float(row["hit_rate"])
    assert fields["block_hit_rate_ceil"] == float(row["block_hit_rate"])
