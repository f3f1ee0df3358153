"""One tenant takes all that it can get of a limit; another still finds its part."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.errors import PoolExhausted, QuotaExceeded
from prefixcache.types import Grant, LeaseId, Namespace, Waiting, WorkerId, pack

RED, BLUE = Namespace("m", tenant="red"), Namespace("m", tenant="blue")
WORKERS = {RED: WorkerId(1), BLUE: WorkerId(2)}
BLOCKS = 64


def shared(**limits: int) -> PrefixCache:
    """Give a cache that keeps a part of each limit for two tenants."""
    cache = PrefixCache(BLOCKS, 1, ttl_s=100.0, **limits)  # type: ignore[arg-type]
    cache.set_tenants(["red", "blue"])
    for space, worker in WORKERS.items():
        cache.attach(worker, space, now=0.0)
    return cache


def take(cache: PrefixCache, space: Namespace, tokens: list[int]) -> LeaseId:
    grant = cache.acquire(WORKERS[space], space, pack(tokens), now=0.0)
    assert isinstance(grant, Grant)
    return grant.lease


def store(cache: PrefixCache, space: Namespace, tokens: list[int]) -> None:
    lease = take(cache, space, tokens)
    cache.commit(WORKERS[space], lease, len(tokens), now=0.0)
    cache.release(WORKERS[space], lease, now=0.0)


def as_many_as_it_gets(step: Callable[[int], object], most: int = 10_000) -> tuple[int, str]:
    """Do something until it is refused; give how often it went, and the refusal."""
    for count in range(most):
        try:
            step(count)
        except PoolExhausted as refused:
            return count, str(refused)
    raise AssertionError(f"{most} times, and nobody said no")


def test_leases() -> None:
    cache = shared(max_leases=20)
    lease = take(cache, RED, [1])
    cache.commit(WORKERS[RED], lease, 1, now=0.0)
    count, why = as_many_as_it_gets(lambda _: cache.fork(WORKERS[RED], lease, 1, now=0.0))
    assert count == 14  # with its first one all but the quarter that is kept for the other
    assert "'red' has 15 leases and asks for 1 more; of the 20 of --max-leases 5 are kept" in why
    with pytest.raises(QuotaExceeded):
        take(cache, RED, [2])
    count, _ = as_many_as_it_gets(lambda n: take(cache, BLUE, [100 + n]))
    assert count == 5
    cache.check()


def test_a_request_that_waits_for_a_lease_of_its_tenant_is_in_nobody_s_way() -> None:
    cache = shared(max_leases=20)
    mine = [take(cache, RED, [n]) for n in range(15)]
    assert isinstance(cache.acquire(WORKERS[RED], RED, pack([99]), wait_s=9.0, now=0.0), Waiting)
    for n in range(30):
        cache.release(WORKERS[BLUE], take(cache, BLUE, [100 + n]), now=0.0)
    cache.release(WORKERS[RED], mine[0], now=0.0)
    assert len(cache.take_outcomes()) == 1


def test_the_line() -> None:
    cache = shared(max_line=8)
    cache.set_quota("red", max_held=1, guaranteed=0, now=0.0)
    take(cache, RED, [1])

    def wait(space: Namespace, tokens: list[int]) -> None:
        answer = cache.acquire(WORKERS[space], space, pack(tokens), wait_s=9.0, now=0.0)
        assert isinstance(answer, Waiting)

    count, why = as_many_as_it_gets(lambda n: wait(RED, [10 + n]))
    assert count == 6  # although it waits for nothing but its own quota
    assert "'red' has 6 requests that wait for room" in why
    assert "--max-line 2 are kept" in why
    take(cache, BLUE, list(range(63)))
    wait(BLUE, [7]), wait(BLUE, [8])
    with pytest.raises(PoolExhausted, match="8 requests wait for room already"):
        wait(BLUE, [9])
    cache.check()


def test_pins() -> None:
    cache = shared(max_pinned=16)
    for n in range(16):
        store(cache, RED, [n])
    store(cache, BLUE, [1, 2, 3])
    count, why = as_many_as_it_gets(lambda n: cache.pin(RED, pack([n]), ttl_s=9.0, now=0.0), 16)
    assert count == 12
    assert "'red' has 12 pinned blocks and asks for 1 more; of the 16 of --pin-cap 4 are" in why
    pinned = cache.pin(BLUE, pack([1, 2, 3]), ttl_s=9.0, now=0.0)
    assert (pinned.num_new, pinned.pinned) == (3, 3), "what others have pinned is not told"
    assert cache.unpin(BLUE).pinned == 0
    assert cache.unpin(RED).num_blocks == 12
    cache.check()


def be_cut_off(cache: PrefixCache, number: int) -> None:
    """Let a worker come, take four blocks and lose its connection, while its process lives on."""
    worker = WorkerId(100 + number)
    cache.attach(worker, RED, now=0.0)
    try:
        cache.acquire(worker, RED, pack([number] * 4), now=0.0)
    finally:
        cache.detach(worker, now=0.0, gone=False)


def test_blocks_that_a_worker_may_still_write_to_count_in_its_tenant_s_quota() -> None:
    """Workers that come, take and are cut off, again and again, while their process lives on."""
    cache = shared()
    cache.set_quota("red", max_held=8, guaranteed=0, now=0.0)

    count, why = as_many_as_it_gets(partial(be_cut_off, cache))
    assert count == 2
    assert "tenant 'red' holds 8 of at most 8" in why
    assert cache.quota("red").num_held == cache.snapshot(now=0.0).quarantined == 8
    take(cache, BLUE, list(range(BLOCKS - 8)))
    assert cache.worker_gone(WorkerId(100), now=0.0) == 4
    assert cache.quota("red").num_held == 4
    cache.check()


def test_quarantine_without_a_quota_leaves_the_others_their_part_of_the_pool() -> None:
    cache = shared()

    count, why = as_many_as_it_gets(partial(be_cut_off, cache))
    assert count * 4 == BLOCKS - BLOCKS // 4
    assert "'red' has 48 quarantined blocks" in why
    take(cache, BLUE, list(range(BLOCKS // 4)))
    cache.check()


def test_namespaces() -> None:
    cache = shared(max_namespaces=16)
    red = [Namespace("m", tenant="red", salt=str(n)) for n in range(100)]
    count, why = as_many_as_it_gets(lambda n: cache.attach(WORKERS[RED], red[n], now=0.0))
    assert count == 11  # and the one that it had
    assert "'red' has 12 namespaces and asks for 1 more; of the 16 of --max-namespaces" in why
    for n in range(3):
        cache.attach(WORKERS[BLUE], Namespace("m", tenant="blue", salt=str(n)), now=0.0)
    cache.check()


def test_tenants_that_come_later_get_their_part_as_it_becomes_free() -> None:
    cache = shared(max_leases=20)
    mine = [take(cache, RED, [n]) for n in range(15)]
    cache.set_tenants(["red", "blue", "green"])
    with pytest.raises(PoolExhausted):
        take(cache, RED, [99])
    for lease in mine[:3]:
        cache.release(WORKERS[RED], lease, now=0.0)
    count, _ = as_many_as_it_gets(lambda n: take(cache, RED, [200 + n]))
    assert count == 2  # 14: all but the 3 that are kept for each of the others
    for n in range(3):
        take(cache, BLUE, [300 + n])


# ---------------------------------------------------------------- namespaces that hold nothing


def objects(cache: PrefixCache) -> dict[str, int]:
    """Count all that is kept by namespace."""
    lessor = cache._lessor
    return {
        "roots": len(lessor.roots),
        "accounts": len(lessor.blocks.quotas._namespaces),
        "tallies": len(lessor.tallies),
        "turns": len(lessor.namespaces._turns),
        "users": len(lessor.namespaces._users),
        "retired": len(lessor.tree.retired),
        "sweeps": len(lessor.tree._sweeps),
    }


@pytest.mark.parametrize("asks", [False, True])
def test_salts_that_nobody_uses_any_more_leave_nothing(asks: bool) -> None:
    """A salt for each request, as many as there are: what is kept is what the pool can hold."""
    cache = PrefixCache(8, 1)
    seen: list[dict[str, int]] = []
    for n in range(3000):
        space, worker = Namespace("m", salt=str(n)), WorkerId(n)
        cache.attach(worker, space, now=0.0)
        if asks:
            grant = cache.acquire(worker, space, pack([n, n + 1]), now=0.0)
            assert isinstance(grant, Grant)
            cache.commit(worker, grant.lease, 2, now=0.0)
            cache.release(worker, grant.lease, now=0.0)
        cache.detach(worker, now=0.0, gone=True)
        seen.append(objects(cache))
    cache.check()
    for what in seen[0]:
        assert max(one[what] for one in seen) < 64, what
    told = cache.snapshot(now=0.0)
    assert told.requests == (3000 if asks else 0), "what was counted stays counted"
    assert told.ledger.cold == (6000 if asks else 0)


def test_what_speaks_for_a_namespace_keeps_it() -> None:
    cache = PrefixCache(8, 1, max_namespaces=4)
    kept = [Namespace("m", salt=name) for name in ("quota", "pin", "worker")]
    for space in kept:
        cache.attach(WorkerId(1), space, now=0.0)
        grant = cache.acquire(WorkerId(1), space, pack([1, 2]), now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(WorkerId(1), grant.lease, 2, now=0.0)
        cache.release(WorkerId(1), grant.lease, now=0.0)
    cache.set_quota(kept[0], max_held=5, guaranteed=0, now=0.0)
    cache.pin(kept[1], pack([1, 2]), ttl_s=9.0, now=0.0)
    cache.detach(WorkerId(1), now=0.0, gone=True)
    cache.attach(WorkerId(2), kept[2], now=0.0)
    for n in range(100):
        cache.attach(WorkerId(3), Namespace("m", salt=str(n)), now=0.0)
        cache.detach(WorkerId(3), now=0.0, gone=True)
    for space in kept:
        assert cache.lookup(space, pack([1, 2, 3])).num_hit == 2, f"{space} was forgotten"
    cache.check()


def test_at_the_limit_a_namespace_that_is_only_cached_makes_way() -> None:
    """With a salt for each user, the limit is one of those who are there, not of all ever."""
    cache = PrefixCache(64, 1, max_namespaces=4)
    for n in range(50):
        space = Namespace("m", salt=str(n))
        cache.attach(WorkerId(n), space, now=0.0)
        grant = cache.acquire(WorkerId(n), space, pack([1]), now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(WorkerId(n), grant.lease, 1, now=0.0)
        cache.detach(WorkerId(n), now=0.0, gone=True)
        assert len(cache.namespaces()) <= 4
    cache.check()
    assert cache.lookup(Namespace("m", salt="49"), pack([1, 2])).num_hit == 1
