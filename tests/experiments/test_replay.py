from __future__ import annotations

import pytest

from experiments.oracle import expected
from prefixcache.core.cache import PrefixCache
from prefixcache.core.policies import POLICIES
from prefixcache.errors import InvalidRequest
from prefixcache.types import Ledger, Namespace, Partial, WorkerId, pack, unpack
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.experiments.outcome import FATES, Sums, percentages
from prefixcache_bench.experiments.replay import BEYOND, Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace

TINY = Shape(
    count=20, turns=3, prefixes=2, prefix_tokens=40, question_tokens=7, answer_tokens=12,
    documents=8, document_tokens=20, picked=2, fan_out=2, seed=3,
)  # fmt: skip


@pytest.mark.walk
@pytest.mark.parametrize("capacity_tokens", [64, 600, 2048, 4096, None])
@pytest.mark.parametrize("block_size", [1, 2, 8, 32])
def test_whole_blocks_equal_brute_force(
    small: Trace, block_size: int, capacity_tokens: int | None
) -> None:
    blocks = None if capacity_tokens is None else capacity_tokens // block_size
    naive = expected(small, block_size, blocks)
    found = replay(small, Configuration(block_size, blocks))
    assert found.hit_tokens == naive.hit_tokens
    assert found.partial_tokens == naive.partial_tokens
    assert found.hit_blocks == naive.hit_blocks
    assert found.prompt_blocks == naive.prompt_blocks
    assert found.mean_request_hit == pytest.approx(naive.request_hits / len(small), abs=1e-12)
    assert found.evictions == naive.evictions
    assert found.peak_blocks == naive.peak_blocks


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_every_kind_of_workload_equals_brute_force(kind: Kind, block_size: int) -> None:
    trace = generate(kind, TINY)
    for blocks in (3, 300 // block_size, None):
        naive = expected(trace, block_size, blocks)
        found = replay(trace, Configuration(block_size, blocks))
        assert (found.hit_tokens, found.partial_tokens) == (naive.hit_tokens, naive.partial_tokens)
        assert (found.evictions, found.peak_blocks) == (naive.evictions, naive.peak_blocks)


@pytest.mark.parametrize("block_size", [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024])
def test_tails_with_infinite_memory_reuse_as_much_as_blocks_of_one_token(
    small: Trace, block_size: int
) -> None:
    finest = replay(small, Configuration(1))
    tails = replay(small, Configuration(block_size, partial=Partial.TAILS))
    assert tails.hit_tokens + tails.partial_tokens == finest.hit_tokens
    assert tails.ledger.granularity == finest.ledger.granularity


@pytest.mark.parametrize("partial", Partial)
def test_blocks_of_one_token_are_the_same_in_every_mode(small: Trace, partial: Partial) -> None:
    whole = replay(small, Configuration(1, 1000))
    found = replay(small, Configuration(1, 1000, partial=partial))
    assert found.ledger == whole.ledger
    assert found.evictions == whole.evictions


@pytest.mark.parametrize("partial", Partial)
@pytest.mark.parametrize("blocks", [1, 7, 60, 400, None])
@pytest.mark.parametrize("block_size", [4, 16])
def test_the_ledger_adds_up_and_cold_does_not_depend_on_memory(
    small: Trace, block_size: int, blocks: int | None, partial: Partial
) -> None:
    found = replay(small, Configuration(block_size, blocks, partial=partial))
    ledger = found.ledger
    assert ledger.total == found.prompt_tokens
    assert min(getattr(ledger, fate) for fate in FATES) >= 0
    assert round(sum(percentages(ledger).values()), 3) == 100.0
    spare = partial is Partial.TAILS  # the block in which the running request computes
    assert found.peak_blocks <= (blocks or found.peak_blocks) + spare
    if blocks is None:
        assert ledger.evicted == 0


def test_percentages_add_up_to_a_hundred_whatever_the_rounding() -> None:
    for total in range(1, 200):
        ledger = Ledger(hit=total // 3, partial=total // 7, cold=total - total // 3 - total // 7)
        assert sum(round(1000 * share) for share in percentages(ledger).values()) == 100_000


@pytest.mark.parametrize("partial", Partial)
def test_one_acquire_of_the_whole_tells_what_explaining_the_prompt_would(
    small: Trace, partial: Partial
) -> None:
    size, blocks = 8, 120
    cache = PrefixCache(blocks + 1, size, partial=partial, num_ghosts=10**6)
    me = WorkerId("me")
    for request in small:
        cache.attach(me, request.namespace, now=0.0)
        by_prompt = cache.explain(
            request.namespace, request.tokens[: 4 * request.prompt], now=0.0
        ).ledger
        by_whole = cache.explain(request.namespace, request.tokens + BEYOND, now=0.0).ledger
        sums = Sums(1, size, counts_partial=partial is Partial.OFF)
        sums.add(by_whole, request.prompt, request.length)
        assert sums.ledger() == by_prompt
        kept = request.tokens[: blocks * size * 4]
        grant = cache.acquire(me, request.namespace, kept, now=0.0)
        cache.commit(me, grant.lease, len(kept) // 4, now=0.0)
        cache.release(me, grant.lease, now=0.0)


def test_windows_cut_the_ledger_by_time_and_add_up(small: Trace) -> None:
    found = replay(small, Configuration(8, 200), num_windows=10)
    assert len(found.windows) == 10
    assert sum(window.requests for window in found.windows) == len(small)
    for fate in FATES:
        total = sum(getattr(window.ledger, fate) for window in found.windows)
        assert total == getattr(found.ledger, fate)
    end = max(request.t for request in small)
    assert [window.start_s for window in found.windows] == pytest.approx(
        [end * part / 10 for part in range(10)]
    )


def test_few_ghosts_forget_what_was_evicted_so_it_looks_cold(small: Trace) -> None:
    all_known = replay(small, Configuration(8, 50))
    few_known = replay(small, Configuration(8, 50, ghosts=20))
    assert few_known.hit_tokens == all_known.hit_tokens
    assert few_known.ledger.evicted < all_known.ledger.evicted
    assert few_known.ledger.cold > all_known.ledger.cold


def test_a_sequence_longer_than_the_capacity_keeps_its_head() -> None:
    space = Namespace("m")
    long, short = pack(range(100)), pack(range(24))
    trace = Trace("long", [Request(0, space, long, 100, 100), Request(1, space, short, 24, 24)] * 2)
    found = replay(trace, Configuration(8, 4))
    assert found.peak_blocks == 4
    assert found.hit_tokens == 0 + 16 + 32 + 16
    assert found.ledger.total == 248


def test_hashed_blocks_may_all_hit_and_the_last_counts_what_it_holds() -> None:
    space = Namespace("m")
    ids = pack([1, 2, 3])
    trace = Trace(
        "hashed", [Request(t, space, ids, 3, 1100) for t in range(2)], unit=512, counts_last=True
    )
    found = replay(trace, Configuration(512))
    assert (found.hit_tokens, found.hit_blocks, found.prompt_blocks) == (1100, 3, 6)
    assert found.fields()["block_prefix"] == 0.5
    grouped = replay(trace, Configuration(1024))
    assert (grouped.hit_tokens, grouped.hit_blocks, grouped.prompt_blocks) == (1100, 2, 4)
    assert grouped.ledger == Ledger(hit=1100, cold=1100)


@pytest.mark.parametrize(("unit", "size"), [(1, 3), (1, 0), (512, 256), (512, 768), (64, 96)])
def test_a_block_size_that_the_trace_cannot_give_is_refused(unit: int, size: int) -> None:
    trace = Trace("t", [Request(0, Namespace("m"), pack([1]), 1, unit)], unit=unit)
    with pytest.raises(InvalidRequest, match=f"block size {size} is not a power of two"):
        replay(trace, Configuration(size))


def test_namespaces_never_share(small: Trace) -> None:
    halves = [
        request._replace(namespace=Namespace(str(number % 2)))
        for number, request in enumerate(small)
    ]
    apart = replay(Trace("apart", halves), Configuration(8))
    assert 0 < apart.hit_tokens < replay(small, Configuration(8)).hit_tokens
    assert len(unpack(halves[0].tokens)) > 0


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_remembers_no_more_than_when_it_serves(policy: str, small: Trace) -> None:
    served = int(POLICIES[policy].ghosts * 101)
    found = replay(small, Configuration(16, 100, policy))
    assert (
        found.hit_tokens == replay(small, Configuration(16, 100, policy, ghosts=served)).hit_tokens
    )
