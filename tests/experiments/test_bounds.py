"""Belady's bound against exhaustive search; the flat LFU against the reference's rows."""

from __future__ import annotations

import csv
import os
import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from prefixcache.core.eviction import POLICIES
from prefixcache_bench.belady import belady
from prefixcache_bench.development import DEVELOPMENT_SET, Workload
from prefixcache_bench.flat import flat_lfu
from prefixcache_bench.paths import Path as Blocks
from prefixcache_bench.paths import paths
from prefixcache_bench.policies import measure, measure_cost, tables, write
from prefixcache_bench.progress import Progress
from prefixcache_bench.readers.load import load
from prefixcache_bench.replay import Configuration, replay
from prefixcache_bench.traces import Trace

FOLDER = os.environ.get("PREFIXCACHE_TRACES", "")


def random_requests(rng: random.Random, count: int) -> list[Blocks]:
    """Draw paths in a small binary tree; a block's id is its number in heap order."""
    requests = []
    for _ in range(count):
        node, blocks = 0, []
        for _ in range(rng.randint(1, 4)):
            node = 2 * node + 1 + (rng.random() < 0.4)
            blocks.append(node)
        requests.append(Blocks(blocks, len(blocks), len(blocks)))
    return requests


def best_possible(requests: list[Blocks], num_blocks: int, *, bypass: bool) -> int:
    """Try everything that a cache could keep."""

    @cache
    def from_here(number: int, cached: frozenset[int]) -> int:
        if number == len(requests):
            return 0
        blocks = requests[number].blocks
        hits = next((i for i, one in enumerate(blocks) if one not in cached), len(blocks))
        running = frozenset(blocks[:num_blocks])
        best = 0
        known = sorted(cached | running)
        for size in range(min(num_blocks, len(known)) + 1):
            for kept in map(frozenset, combinations(known, size)):
                whole = all(one < 3 or (one - 1) // 2 in kept for one in kept)
                if whole and (bypass or running <= kept):
                    best = max(best, from_here(number + 1, kept))
        return hits + best

    return from_here(0, frozenset())


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("num_blocks", [1, 2, 3, 5])
def test_belady_is_the_best_that_can_be(num_blocks: int, bypass: bool) -> None:
    for seed in range(12):
        requests = random_requests(random.Random(f"{seed} {num_blocks}"), 7)
        expected = best_possible(requests, num_blocks, bypass=bypass)
        assert sum(belady(requests, num_blocks, bypass=bypass)) == expected, f"seed {seed}"


@pytest.mark.parametrize("policy", POLICIES)
def test_no_policy_beats_belady(policy: str, small: Trace) -> None:
    requests = paths(small, 16)
    for capacity in (30, 100, 300):
        bound = 16 * sum(belady(requests, capacity))
        assert replay(small, Configuration(16, capacity, policy)).hit_tokens <= bound


def test_the_tables_have_every_policy_and_both_bounds(small: Trace, tmp_path: Path) -> None:
    workload = Workload("small", "A trace", 16, (50, 200), every_policy=True, timed_at=(50,))
    with Progress("", 1, quiet=True) as progress:
        result = measure(workload, small, 1, progress)
    document = tmp_path / "policies.md"
    document.write_text("before <!-- tables: begin -->old<!-- tables: end --> after\n")
    write(document, tables([result], [measure_cost(workload, small, 50)]))
    text = document.read_text()
    assert all(f"| {policy} |" in text for policy in [*POLICIES, "Belady", "Belady, with bypass"])
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text


def reference_rows() -> list[object]:
    path = Path(FOLDER) / "reference_mooncake.csv"
    if not FOLDER or not path.exists():
        reason = f"set PREFIXCACHE_TRACES to a folder with {path.name} and its trace"
        return [pytest.param({}, marks=pytest.mark.skip(reason=reason))]
    with path.open() as file:
        rows = csv.DictReader(file)
        return [row for row in rows if row["policy"] == "LFU" and row["capacity_blocks_of_512"]]


@pytest.mark.parametrize("row", reference_rows())
def test_a_flat_lfu_equals_the_reference_and_the_leaf_safe_one_is_near(row: dict[str, str]) -> None:
    trace = load(str(Path(FOLDER) / DEVELOPMENT_SET[0].file))
    capacity = int(row["capacity_blocks_of_512"])
    requests = paths(trace, 512)
    found = flat_lfu(requests, capacity)
    total = sum(request.prompt_blocks for request in requests)
    assert f"{round(sum(found.anywhere) / total, 6)}" == row["block_any"]
    assert f"{round(sum(found.leading) / total, 6)}" == row["block_prefix"]
    ours = replay(trace, Configuration(512, capacity, "lfu")).block_hit_rate
    assert abs(ours - float(row["block_prefix"])) < 0.0002
