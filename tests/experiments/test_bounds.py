"""Belady's bound against exhaustive search; LFU with and without a tree; SIEVE beside it."""

from __future__ import annotations

import random
from collections import deque
from functools import cache
from itertools import combinations
from pathlib import Path

import pytest

from prefixcache.core.policies import POLICIES
from prefixcache.types import Namespace, pack
from prefixcache_bench.experiments.belady import belady
from prefixcache_bench.experiments.development import Workload
from prefixcache_bench.experiments.flat import FLAT_LFU, flat_lfu
from prefixcache_bench.experiments.paths import Path as Blocks
from prefixcache_bench.experiments.paths import paths
from prefixcache_bench.experiments.policies import measure, measure_cost, write
from prefixcache_bench.experiments.progress import Progress
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace


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


@pytest.mark.walk
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
    write(document, [result], [measure_cost(workload, small, 50)], total=2)
    text = document.read_text()
    assert all(f"| {policy} |" in text for policy in [*POLICIES, "Belady", "Belady, with bypass"])
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "1 of 2 workloads" in text


def leaf_safe_lfu(requests: list[Blocks], num_blocks: int) -> int:
    """Count the blocks found by a set of blocks of which only leaves go, by (uses, last use)."""
    uses: dict[int, int] = {}
    last: dict[int, int] = {}
    above: dict[int, int | None] = {}
    hits = 0
    for number, request in enumerate(requests):
        blocks = request.blocks
        above.update(zip(blocks, [None, *blocks], strict=False))
        found = next((i for i, one in enumerate(blocks) if one not in uses), len(blocks))
        hits += min(found, request.askable)
        while len(uses) + len(blocks) - found > num_blocks:
            inner = {above[one] for one in uses}
            leaves = [one for one in uses if one not in inner and one not in blocks]
            del uses[min(leaves, key=lambda one: (uses[one], last[one]))]
        for one in blocks:
            uses[one], last[one] = uses.get(one, 0) + 1, number
    return hits


@pytest.mark.parametrize("num_blocks", [30, 60, 120, 400])
def test_lfu_is_the_leaf_safe_one(num_blocks: int, small: Trace) -> None:
    expected = leaf_safe_lfu(paths(small, 16), num_blocks)
    assert replay(small, Configuration(16, num_blocks, "lfu")).hit_tokens == 16 * expected


def test_a_flat_lfu_strands_blocks_whose_prefix_is_gone(small: Trace) -> None:
    requests = paths(small, 16)
    found = flat_lfu(requests, 60)
    assert sum(found.anywhere) > sum(found.leading)
    outcome = replay(small, Configuration(16, 60, FLAT_LFU), num_windows=3)
    assert outcome.hit_blocks == sum(map(min, found.leading, [one.askable for one in requests]))
    assert outcome.ledger.total == outcome.prompt_tokens
    assert outcome.evictions == found.evictions > 0
    everything = replay(small, Configuration(16, None, FLAT_LFU))
    assert everything.hit_tokens == replay(small, Configuration(16)).hit_tokens


@pytest.mark.parametrize(("share_again", "equal"), [(0.04, True), (0.25, False)])
def test_sieve_is_lfu_until_its_hand_comes_round(share_again: float, equal: bool) -> None:
    """It comes round once what was used again fills the memory; until then it goes by age alone."""
    rng = random.Random(5)
    requests, recent = [], deque[int](maxlen=40)
    for number in range(1500):
        again = number > 40 and rng.random() < share_again
        chat = rng.choice(recent) if again else number
        requests.append(Request(float(number), Namespace("m"), pack([chat, 0, 1, 2]), 4, 4 * 64))
        recent.append(chat)
    trace = Trace("mostly new", requests, 64)
    lfu, sieve = (replay(trace, Configuration(64, 400, name)) for name in ("lfu", "sieve"))
    assert sieve.hit_blocks > 100
    same = (sieve.hit_blocks, sieve.evictions) == (lfu.hit_blocks, lfu.evictions)
    assert same is equal
