"""What the prompts of requests that wait or are computed take: so much, and no more."""

from __future__ import annotations

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, PoolExhausted
from prefixcache.types import Grant, Namespace, Waiting, WorkerId, pack

RED, BLUE = WorkerId(1), WorkerId(2)
OF_RED, OF_BLUE = Namespace("m", tenant="red"), Namespace("m", tenant="blue")
PROMPT = list(range(1000))
BYTES = len(pack(PROMPT))


def pool(num_prompts: int) -> PrefixCache:
    """A pool with room for so many prompts, in which red has computed one."""
    cache = PrefixCache(1024, 1, max_prompt_bytes=num_prompts * BYTES)
    for worker, space in ((RED, OF_RED), (BLUE, OF_BLUE)):
        cache.attach(worker, space, now=0.0)
    first = granted(cache, RED)
    cache.commit(RED, first.lease, len(PROMPT), now=0.0)
    cache.release(RED, first.lease, now=0.0)
    return cache


def granted(cache: PrefixCache, worker: WorkerId, tokens: list[int] = PROMPT) -> Grant:
    space = OF_RED if worker is RED else OF_BLUE
    grant = cache.acquire(worker, space, pack(tokens), now=0.0)
    assert isinstance(grant, Grant)
    return grant


def test_leases_that_hold_one_block_each_keep_only_so_many_bytes_of_prompts() -> None:
    cache = pool(3)
    leases = [granted(cache, RED) for _ in range(3)]
    assert {lease.num_cached for lease in leases} == {len(PROMPT) - 1}
    with pytest.raises(PoolExhausted, match=r"12,000 bytes of prompts .* 4,000 more .* 12,000"):
        granted(cache, RED)
    cache.check()
    cache.commit(RED, leases[0].lease, len(PROMPT), now=0.0)  # nothing of it is kept any more
    cache.release(RED, granted(cache, RED).lease, now=0.0)
    cache.release(RED, leases[1].lease, now=0.0)
    granted(cache, RED)
    cache.check()


def test_a_request_that_waits_counts_until_it_is_served_or_given_up() -> None:
    cache = pool(3)
    whole = granted(cache, RED, list(range(7000, 8000)))
    waits = cache.acquire(RED, OF_RED, pack(PROMPT), wait_s=9.0, reserve=20, now=0.0)
    served = cache.acquire(RED, OF_RED, pack([*PROMPT[:-1], 9]), wait_s=9.0, now=0.0)
    assert isinstance(waits, Waiting)
    assert isinstance(served, Waiting)
    with pytest.raises(PoolExhausted, match="bytes of prompts"):
        cache.acquire(RED, OF_RED, pack(PROMPT), wait_s=9.0, now=0.0)
    cache.check()
    cache.cancel(RED, waits.ticket, now=0.0)
    cache.release(RED, whole.lease, now=0.0)
    (_, outcome), *_ = cache.take_outcomes()
    assert isinstance(outcome, Grant)
    cache.check()
    cache.release(RED, outcome.lease, now=0.0)
    granted(cache, RED)
    cache.check()


def test_one_that_is_refused_evicts_nothing() -> None:
    cache = pool(1)
    granted(cache, RED, [1, 2, 3])
    other, indexed = pack(range(7000, 8000)), cache.num_indexed
    assert not cache.clear_way(RED, OF_RED, other, now=0.0)
    with pytest.raises(PoolExhausted, match="bytes of prompts"):
        cache.acquire(RED, OF_RED, other, now=0.0)
    assert cache.num_indexed == indexed


def test_one_tenant_leaves_the_others_their_part() -> None:
    cache = pool(4)
    cache.set_tenants(["red", "blue"])
    for _ in range(3):
        granted(cache, RED)
    with pytest.raises(CacheError, match="kept for the other tenant"):
        granted(cache, RED)
    granted(cache, BLUE, PROMPT[:20])
    cache.check()


def test_a_part_is_kept_from_when_tenants_are_known_also_of_what_is_out() -> None:
    cache = pool(4)
    first, *_ = (granted(cache, RED) for _ in range(3))
    cache.set_tenants(["red", "blue"])
    cache.check()
    with pytest.raises(CacheError, match=r"red.* 12,000 bytes .* 4,000 are kept for the other"):
        granted(cache, RED)
    granted(cache, BLUE, PROMPT[:20])
    cache.release(RED, first.lease, now=0.0)
    cache.check()
    cache.set_tenants([""])
    granted(cache, RED)
    cache.check()
    with pytest.raises(PoolExhausted, match="12,080 bytes"):
        granted(cache, BLUE)
