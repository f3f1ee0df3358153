"""No step costs what everybody has: the work is counted in calls, not timed.

Each case is done once beside few and once beside many leases, namespaces or blocks of others.
"""

from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from math import inf
from random import Random
from typing import Any

import pytest

from core.effort import calls, most_in_one_go
from prefixcache.client import codec
from prefixcache.core import kv_events, protection, stats
from prefixcache.core.cache import PrefixCache
from prefixcache.core.kv_events import Replay
from prefixcache.errors import CacheError, InvalidRequest, NotFound, PoolExhausted
from prefixcache.service.verbs.inspect import without_salted_tokens
from prefixcache.types import BlockId, Grant, LeaseId, Namespace, Waiting, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb

ME = WorkerId(1)
HERE = Namespace("m")
OTHER = Namespace("m", tenant="t")


def store(cache: PrefixCache, tokens: Sequence[int], space: Namespace = HERE) -> None:
    lease = cache.acquire(ME, space, pack(tokens), now=0.0).lease
    cache.commit(ME, lease, len(tokens), now=0.0)
    cache.release(ME, lease, now=0.0)


def crowded(num_leases: int, num_blocks: int = 8192, *, full: bool = True) -> PrefixCache:
    cache = PrefixCache(num_blocks, 4)
    cache.attach(ME, HERE, now=0.0)
    for number in range(num_leases):
        cache.acquire(ME, HERE, pack([number, 1, 2]), now=0.0)
    if full:
        cache.acquire(ME, HERE, pack(range(4 * (num_blocks - num_leases))), now=0.0)
    return cache


@pytest.mark.parametrize("quota", [False, True], ids=["pool", "quota"])
def test_a_refusal_costs_the_same_however_many_leases_are_out(quota: bool):
    def refused(num_leases: int) -> int:
        cache = crowded(num_leases, full=not quota)
        if quota:
            cache.set_quota("", max_held=num_leases + 5, guaranteed=0, now=0.0)

        def step() -> None:
            with pytest.raises(PoolExhausted, match=r"held by [\d,]+ leases \(oldest 1#1"):
                cache.acquire(ME, HERE, pack(range(24)), now=1.0)

        step()
        return calls(step)

    assert refused(2000) <= refused(20) + 20


def test_a_release_tries_none_of_those_in_line_for_whom_nothing_has_changed():
    def released(num_namespaces: int) -> int:
        cache = crowded(4)
        for number in range(num_namespaces):
            space = Namespace("m", salt=str(number))
            cache.attach(ME, space, now=0.0)
            waiting = cache.acquire(ME, space, pack(range(4000)), wait_s=9.0, now=0.0)
            assert isinstance(waiting, Waiting)
        cache.release(ME, LeaseId(1), now=0.1)
        return calls(lambda: cache.release(ME, LeaseId(2), now=0.2))

    few, many = released(10), released(1010)
    assert (many - few) / 1000 < 25  # a look; a try takes three times as many


def test_who_waits_in_line_is_tried_again_once_its_prefix_is_stored():
    cache = crowded(4, 16)
    cache.release(ME, LeaseId(5), now=0.0)  # 12 blocks are free
    other = cache.acquire(ME, HERE, pack(range(40)), now=0.0)  # 2 are
    waiting = cache.acquire(ME, HERE, pack([*range(39), 7, 8, 9, 10, 11]), wait_s=9.0, now=0.0)
    assert isinstance(waiting, Waiting)
    cache.commit(ME, other.lease, 40, now=0.1)
    assert [type(one[1]).__name__ for one in cache.take_outcomes()] == ["Grant"]
    cache.check()


def test_an_acquire_under_a_tenants_quota_costs_the_same_beside_many_namespaces():
    def acquired(num_namespaces: int) -> int:
        cache = crowded(4, full=False)
        for number in range(num_namespaces):
            cache.attach(ME, Namespace(f"m{number}"), now=0.0)
        cache.set_quota("", max_held=8000, guaranteed=0, now=0.0)
        return calls(lambda: cache.acquire(ME, HERE, pack([9, 9, 9]), now=0.1))

    assert acquired(3000) <= acquired(30) + 5


def test_a_tenants_numbers_follow_resets_with_and_without_leases():
    cache = crowded(3, full=False)
    kept = cache.acquire(ME, HERE, pack(range(16)), now=0.0).lease
    cache.commit(ME, kept, 16, now=0.0)
    gone = cache.acquire(ME, HERE, pack(range(50, 66)), now=0.0).lease
    cache.commit(ME, gone, 16, now=0.0)
    cache.release(ME, gone, now=0.0)
    assert (cache.quota("").num_held, cache.quota("").num_stored) == (7, 11)
    assert cache.reset(HERE).num_leases == 4
    assert (cache.quota("").num_held, cache.quota("").num_stored) == (7, 7)
    cache.release(ME, kept, now=0.0)
    assert (cache.quota("").num_held, cache.quota("").num_stored) == (3, 3)
    cache.check()


def test_a_reset_costs_the_same_beside_many_leases_and_after_many_resets():
    few, many = crowded(2100), crowded(6000)  # the last 2,048 requests are remembered
    most = calls(lambda: few.reset(HERE))
    assert calls(lambda: many.reset(HERE)) <= most + 5
    assert max(calls(lambda: many.reset(HERE)) for _ in range(300)) < 150


def test_forks_share_one_table_until_they_differ():
    cache = PrefixCache(64, 4)
    cache.attach(ME, HERE, now=0.0)
    lease = cache.acquire(ME, HERE, pack(range(30)), now=0.0).lease
    cache.commit(ME, lease, 30, now=0.0)
    first, second, third = cache.fork(ME, lease, 3, now=0.0)
    assert first.block_table is second.block_table is third.block_table
    table = first.block_table[:]
    grown = cache.extend(ME, first.lease, 40, now=0.0)
    cache.truncate(ME, second.lease, 10, now=0.0)
    assert third.block_table == table  # an answer that was given does not change
    assert grown.keep == 7
    assert len(grown.blocks) == 3
    cache.check()
    assert cache.truncate(ME, third.lease, 30, now=0.0).keep == 8
    for one in (first, second, third):
        cache.release(ME, one.lease, now=0.0)
    cache.check()


def test_a_fork_costs_the_same_however_long_the_lease():
    def forked(num_tokens: int) -> int:
        cache = PrefixCache(8192, 4)
        cache.attach(ME, HERE, now=0.0)
        lease = cache.acquire(ME, HERE, pack(range(num_tokens)), now=0.0).lease
        cache.commit(ME, lease, num_tokens, now=0.0)
        grants: list[Any] = []
        count = calls(lambda: grants.extend(cache.fork(ME, lease, 100, now=0.0)))
        assert len({id(grant.block_table) for grant in grants}) == 1
        return count

    assert forked(30_000) == forked(5_000)  # that of a large table is counted, beyond those
    assert forked(3_000) == forked(32)


def test_a_snapshot_lists_the_oldest_thousand_leases_and_counts_all():
    few, many = crowded(1100), crowded(0, full=False)
    granted = [many.acquire(ME, HERE, pack([n, 1, 2]), now=0.0).lease for n in range(6000)]
    seen = many.snapshot(now=1.0)
    assert [one.lease for one in seen.leases] == granted[:1000]
    assert seen.num_leases == 6000
    assert calls(lambda: many.snapshot(now=1.0)) <= calls(lambda: few.snapshot(now=1.0)) + 20


def test_a_snapshot_counts_and_lists_what_its_caller_may_see():
    cache = crowded(2000, full=False)
    mine, hidden = Namespace("m", tenant="b"), Namespace("secret", tenant="b")
    for space in (mine, hidden):
        cache.attach(ME, space, now=0.0)
        for number in range(3):
            cache.acquire(ME, space, pack([number, 5]), now=0.0)
    seen = cache.snapshot(now=1.0, tenant="b", sees=lambda space: space == mine)
    assert [one.namespace for one in seen.leases] == [mine] * 3  # though others' are older
    assert seen.num_leases == 3
    cache.reset(mine)
    assert cache.snapshot(now=1.0, tenant="b", sees=lambda space: space == mine).num_leases == 3


def test_the_oldest_leases_are_told_however_many_are_out():
    few, many = crowded(100), crowded(4000)
    assert many.oldest_leases(20, now=1.0) == list(many.snapshot(now=1.0).leases[:20])
    cost = calls(lambda: few.oldest_leases(20, now=1.0))
    assert calls(lambda: many.oldest_leases(20, now=1.0)) <= cost


def in_many_namespaces(num_namespaces: int, num_quotas: int = 0) -> PrefixCache:
    """Each with a request, a lease that is out, and a pin."""
    cache = PrefixCache(16_384, 4, max_pinned=16_384)
    for number in range(num_namespaces):
        space = Namespace(f"m{number}", tenant=f"t{number % 7}")
        cache.attach(ME, space, now=0.0)
        lease = cache.acquire(ME, space, pack([1, 2, 3, 4, 5]), now=0.0).lease
        cache.commit(ME, lease, 4, now=0.0)
        cache.pin(space, pack([1, 2, 3, 4]), ttl_s=99.0, now=0.0)
        if number < num_quotas:
            cache.set_quota(space, max_held=9, guaranteed=0, now=0.0)
    return cache


def test_what_is_read_every_second_costs_the_same_beside_many_namespaces():
    few, many = in_many_namespaces(60), in_many_namespaces(3000)
    assert many.counts(now=1.0).num_namespaces == 3000
    assert len(many.series()) == 51
    assert calls(lambda: many.counts(now=1.0)) <= calls(lambda: few.counts(now=1.0))
    assert calls(many.series) <= calls(few.series)
    assert calls(lambda: many.oldest_leases(20, now=1.0)) <= calls(
        lambda: few.oldest_leases(20, now=1.0)
    )


SEES = {
    "everything": {},
    "one tenant": {"tenant": "t3"},
    "some models": {"sees": lambda space: space.model.endswith("3")},
    "some models of a tenant": {"tenant": "t3", "sees": lambda space: space.model.endswith("3")},
}


@pytest.mark.slow
@pytest.mark.parametrize("scope", SEES)
def test_a_snapshot_of_thousands_of_rows_is_made_and_written_in_parts(scope: str):
    def told(num_namespaces: int) -> tuple[int, int]:
        cache = in_many_namespaces(num_namespaces, num_quotas=600)
        made, seen = most_in_one_go(cache.snapshot_in_steps(now=1.0, **SEES[scope]))
        assert seen == cache.snapshot(now=1.0, **SEES[scope])
        written, _ = most_in_one_go(codec.write_snapshot(seen, pb.SnapshotResponse()))
        return made, written

    few, many = told(1500), told(6000)
    assert many[0] <= few[0] * 1.1 + 50
    assert many[1] <= max(few[1] * 1.1, 200 * 40)


def test_rows_may_come_and_go_while_a_snapshot_is_made(monkeypatch: pytest.MonkeyPatch):
    """All that is listed ends after some of its steps: what was told by then is told, no more."""
    for module in (stats, protection):
        monkeypatch.setattr(module, "_PAUSE_EVERY", 10)
    told: dict[str, set[int]] = {"leases": set(), "pins": set(), "quotas": set()}
    for after in range(1, 28):
        cache = in_many_namespaces(30, num_quotas=30)
        steps = cache.snapshot_in_steps(now=1.0)
        for _ in range(after):
            next(steps, None)
        for number in range(30):
            space = Namespace(f"m{number}", tenant=f"t{number % 7}")
            cache.unpin(space)
            cache.set_quota(space, max_held=None, guaranteed=0, now=1.0)
        cache.detach(ME, now=1.0, gone=True)
        for number in range(30):  # and more of it comes
            cache.attach(WorkerId(2), Namespace("n", salt=str(number)), now=1.0)
        _, seen = most_in_one_go(steps)
        if seen is None:  # it was through
            break
        assert (seen.num_leases, seen.requests) == (30, 30)  # those of the first step
        for what, counts in told.items():
            counts.add(len(getattr(seen, what)))
        cache.check()
    assert told == {
        "leases": {10, 20, 30},
        "pins": {0, *range(5, 31, 5)},
        "quotas": {0, 10, 20, 30},
    }


def test_pins_on_one_long_path_are_told_in_parts():
    cache = crowded(0, full=False)
    cache.set_tenants([])
    lease = cache.acquire(ME, HERE, pack(range(8000)), now=0.0).lease
    cache.commit(ME, lease, 8000, now=0.0)
    for number in range(1, 600):
        cache.pin(HERE, pack(range(4 * number)), ttl_s=99.0, now=0.0)
    gone = 0
    for _ in cache.snapshot_in_steps(now=1.0):
        gone += 1
    assert gone >= 599 * 600 // 2 // 1000  # a path of 600 nodes is told alone


@pytest.mark.slow
def test_an_outline_of_thousands_of_namespaces_is_made_in_parts():
    def drawn(num_namespaces: int, **scope: Any) -> int:
        cache = in_many_namespaces(num_namespaces)
        steps = cache.outline(max_branches=600, max_namespaces=100, now=1.0, **scope)
        most, outline = most_in_one_go(steps)
        seen = num_namespaces if not scope else num_namespaces // 10
        assert len(outline.namespaces) == min(100, seen)
        assert outline.num_more == seen - len(outline.namespaces)
        assert outline.more.blocks == outline.num_more
        return most

    assert drawn(6000) <= drawn(1500) * 1.1
    few_models = SEES["some models"]
    assert drawn(6000, **few_models) <= drawn(1500, **few_models) * 1.1


@pytest.mark.slow
def test_the_pins_of_a_namespace_end_at_the_same_cost_beside_many_of_others():
    def ended(num_namespaces: int) -> int:
        cache = in_many_namespaces(num_namespaces)
        return calls(lambda: cache.reset(Namespace("m3", tenant="t3")))

    assert ended(6000) <= ended(2100) + 5  # the last 2,048 requests are remembered


def test_a_quota_costs_the_same_beside_many_namespaces():
    def set_one(num_namespaces: int) -> int:
        cache = in_many_namespaces(num_namespaces)
        return calls(lambda: cache.set_quota("t1", max_held=9, guaranteed=0, now=1.0))

    assert set_one(3000) <= set_one(30) + 5


def test_many_leases_expire_in_parts():
    cache = crowded(500)
    sizes = []
    while (due := cache.next_deadline()) is not None and due < 1000.0:
        sizes.append(len(cache.expire(now=1000.0, most=200).leases))
    assert sizes == [200, 200, 101]
    cache.check()


@pytest.mark.slow
def test_a_worker_that_leaves_with_thousands_of_leases_is_ended_in_parts():
    def left(num_leases: int) -> int:
        cache = crowded(num_leases, full=False)
        waiting = cache.acquire(ME, HERE, pack([1, 1, 2]), wait_s=9.0, now=0.0)
        costs = [calls(lambda: cache.detach(ME, now=1.0, gone=False, most=100))]
        with pytest.raises(NotFound, match="not attached"):
            cache.acquire(ME, HERE, pack([9]), now=1.0)
        with pytest.raises(NotFound, match="leaving"):
            cache.attach(ME, HERE, now=1.0)
        while cache.is_leaving(ME):
            assert cache.next_deadline() == -inf
            costs.append(calls(lambda: cache.expire(now=1.0, most=100)))
            cache.check()
        assert cache.worker_gone(ME, now=1.0) == num_leases + isinstance(waiting, Grant)
        assert cache.next_deadline() is None
        return max(costs)

    assert left(4000) <= left(400) + 100


def test_who_leaves_and_is_known_to_be_gone_meanwhile_leaves_no_quarantine():
    cache = crowded(300, full=False)
    cache.detach(ME, now=1.0, gone=False, most=100)
    assert cache.count_quarantined(ME) == 100
    assert cache.worker_gone(ME, now=1.0) == 100
    while cache.is_leaving():
        cache.expire(now=1.0, most=100)
        cache.check()
    assert cache.count_quarantined(ME) == 0
    assert cache.snapshot(now=1.0).free == 8192


def test_deadlines_of_renewed_leases_are_moved_in_parts():
    def moved(num_leases: int) -> int:
        cache = crowded(num_leases, full=False)
        cache.renew(ME, now=20.0)
        costs = []
        while (due := cache.next_deadline()) is not None and due < 40.0:
            costs.append(calls(lambda: cache.expire(now=40.0, most=100)))
        assert cache.num_leases == num_leases
        return max(costs)

    assert moved(4000) <= moved(400) + 20


def test_pins_end_in_parts():
    def ended(num_pins: int) -> int:
        cache = crowded(0, num_blocks=32_768, full=False)
        lease = cache.acquire(ME, HERE, pack(range(4 * num_pins)), now=0.0).lease
        cache.commit(ME, lease, 4 * num_pins, now=0.0)
        cache.release(ME, lease, now=0.0)
        for length in range(4, 4 * num_pins + 4, 4):
            cache.pin(HERE, pack(range(length)), ttl_s=5.0, now=0.0)
        costs = []
        while cache.snapshot(now=9.0).pins:
            assert cache.next_deadline() == 5.0
            costs.append(calls(lambda: cache.expire(now=9.0, most=10)))
        cache.check()
        return max(costs)

    assert ended(200) <= ended(50) + 5


@pytest.mark.parametrize("verb", ["unpin", "reset"])
def test_all_pins_of_a_namespace_end_in_parts(verb: str):
    def ended(num_pins: int) -> int:
        cache = crowded(0, num_blocks=32_768, full=False)
        for number in range(num_pins):
            store(cache, [number, 1, 2, 3])
            cache.pin(HERE, pack([number, 1, 2, 3]), ttl_s=5.0, now=0.0)
        answers: list[Any] = []
        costs = [calls(lambda: answers.append(getattr(cache, verb)(HERE)))]
        assert answers[0].num_pins == num_pins
        cache.check()
        while cache.next_deadline() == -inf:
            costs.append(calls(lambda: cache.expire(now=1.0, most=100)))
        cache.check()
        assert cache.snapshot(now=1.0).pinned == 0
        return max(costs)

    few, many = ended(600), ended(2500)
    assert (many - few) / 1900 < 3  # a mark; an end takes ten times as many


def test_what_is_pinned_again_before_its_pin_has_ended_stays_pinned():
    cache = crowded(0, num_blocks=32_768, full=False)
    for number in range(600):
        store(cache, [number, 1, 2, 3])
        cache.pin(HERE, pack([number, 1, 2, 3]), ttl_s=50.0, now=0.0)
    cache.unpin(HERE)
    assert cache.snapshot(now=1.0).pins == ()
    assert cache.next_deadline() == -inf
    assert cache.unpin(HERE, pack([599, 1, 2, 3])).num_pins == 0  # it ends already
    assert cache.pin(HERE, pack([599, 1, 2, 3]), ttl_s=9.0, now=1.0).ttl_s == 9.0
    while cache.next_deadline() == -inf:
        cache.expire(now=1.0, most=1)
    cache.check()
    assert [pin.expires_in_s for pin in cache.snapshot(now=1.0).pins] == [9.0]


@pytest.mark.slow
def test_an_eviction_costs_the_same_beside_many_older_leaves_that_are_pinned():
    """They wait where they are protected from the time of their pin: it does not move them all."""

    def evicts(num_leaves: int) -> int:
        cache = PrefixCache(8192, 4, max_pinned=8000)
        cache.attach(ME, HERE, now=0.0)
        for number in range(num_leaves):
            store(cache, [number, 1, 2, 3])
            cache.pin(HERE, pack([number, 1, 2, 3]), ttl_s=50.0, now=0.0)
        store(cache, range(7, 7 + 4 * (8192 - num_leaves)))
        cost = calls(lambda: cache.acquire(ME, HERE, pack([1, 2, 3]), now=0.0))
        assert cache.lookup(HERE, pack([0, 1, 2, 3, 4])).num_hit == 4
        cache.check()
        return cost

    # Of what stands for them where they waited some hundred entries may be left, not thousands.
    assert evicts(6000) <= evicts(600) * 2


def beside_guaranteed(num_leaves: int) -> PrefixCache:
    """A full cache: one namespace stores that many leaves, all guaranteed, another the rest."""
    cache = PrefixCache(8192, 4)
    cache.attach(ME, HERE, now=0.0)
    cache.attach(ME, OTHER, now=0.0)
    cache.set_quota(HERE, max_held=None, guaranteed=8000, now=0.0)
    for number in range(num_leaves):
        store(cache, [number, 1, 2, 3])
    store(cache, range(4 * (8192 - num_leaves)), OTHER)
    return cache


def test_an_eviction_costs_the_same_beside_many_leaves_of_anothers_share():
    """They wait where they are protected from the beginning: it does not pass them all."""

    def evicts(num_leaves: int) -> int:
        cache = beside_guaranteed(num_leaves)
        cost = calls(lambda: cache.acquire(ME, OTHER, pack([1, 2, 3]), now=0.0))
        assert cache.lookup(HERE, pack([0, 1, 2, 3, 4])).num_hit == 4
        cache.check()
        return cost

    assert evicts(4000) <= evicts(600) * 1.1


def test_leaves_go_back_in_parts_when_a_quota_is_set():
    def set_again(num_leaves: int) -> int:
        cache = beside_guaranteed(num_leaves)
        cache.acquire(ME, OTHER, pack([1, 2, 3]), now=0.0)  # all leaves wait behind protection now
        cost = calls(lambda: cache.set_quota(HERE, max_held=None, guaranteed=0, now=0.0))
        cost = max(cost, calls(lambda: cache.acquire(ME, OTHER, pack([1, 2, 4]), now=0.0)))
        assert cache.lookup(HERE, pack([0, 1, 2, 3, 4])).num_hit == 0  # the oldest of all
        assert cache.lookup(HERE, pack([1, 1, 2, 3, 4])).num_hit == 4
        cache.check()
        return cost

    assert set_again(4000) <= set_again(600) * 1.1


@pytest.mark.slow
@pytest.mark.parametrize("how", ["commits", "ends", "is overtaken"])
def test_who_waits_for_one_flight_is_tried_in_parts(how: str):
    def called(num_waiting: int) -> int:
        cache = PrefixCache(16_384, 4)
        cache.attach(ME, HERE, now=0.0)
        owner = cache.acquire(ME, HERE, pack(range(40)), now=0.0)
        same = cache.acquire(ME, HERE, pack(range(40)), now=0.0)
        for number in range(num_waiting):
            waiting = cache.acquire(ME, HERE, pack([*range(40), number]), wait_s=9.0, now=0.0)
            assert isinstance(waiting, Waiting)
            assert waiting.owner in (owner.lease, same.lease)
        ahead, behind = same.lease, owner.lease
        if how != "is overtaken":
            ahead, behind = behind, ahead
            if waiting.owner == behind:
                ahead, behind = behind, ahead

        def step() -> None:
            if how == "ends":
                cache.release(ME, ahead, now=1.0)
            else:
                cache.commit(ME, ahead, 40, now=1.0)

        costs, settled = [calls(step)], len(cache.take_outcomes())
        while cache.next_deadline() == -inf:
            costs.append(calls(lambda: cache.expire(now=1.0, most=100)))
            settled += len(cache.take_outcomes())
            if len(costs) % 5 == 0:
                cache.check()
        cache.check()
        assert settled == (0 if how == "ends" else num_waiting)
        return max(costs)

    few, many = called(400), called(1200)
    assert many <= few * 1.2


@pytest.mark.slow
def test_a_release_beside_thousands_in_line_and_a_quota_looks_at_them_in_parts():
    def released(num_namespaces: int) -> int:
        cache = crowded(4)
        cache.set_quota("", max_held=8192, guaranteed=0, now=0.0)
        for number in range(num_namespaces):
            space = Namespace("m", salt=str(number))
            cache.attach(ME, space, now=0.0)
            waiting = cache.acquire(ME, space, pack(range(4000)), wait_s=9.0, now=0.0)
            assert isinstance(waiting, Waiting)
        costs = [calls(lambda: cache.release(ME, LeaseId(1), now=0.1))]
        while cache.next_deadline() == -inf:
            costs.append(calls(lambda: cache.expire(now=0.1, most=100)))
        cache.check()
        return max(costs)

    assert released(3000) <= released(600) * 1.2


VAST = pack(range(1_000_000, 1_000_000 + 4 * 3900))
"""More than nine tenths of a pool of 4,096 blocks."""
OWN = VAST[: 4 * 4 * 40]


def asked_for_all(verb: str, *, in_parts: bool) -> tuple[list[int], Any, int]:
    """Ask a cache full of leaves for nearly all of it, of which a part is cached: the oldest part.

    Returns:
        What each step costs, the answer, and how many blocks were evicted.
    """
    cache = PrefixCache(4096, 4)
    cache.attach(ME, HERE, now=0.0)
    lease = cache.acquire(ME, HERE, OWN, now=0.0).lease
    cache.commit(ME, lease, len(OWN) // 4, now=0.0)
    if verb == "acquire":
        cache.release(ME, lease, now=0.0)
    for number in range(4096 - 40):
        store(cache, [number] * 4)
    answers: list[Any] = []
    size = len(VAST) // 4

    def clear() -> None:
        if verb == "acquire":
            answers.append(cache.clear_way(ME, HERE, VAST, now=1.0))
        else:
            answers.append(cache.clear_way_to_extend(ME, lease, size, now=1.0))

    def ask() -> None:
        if verb == "acquire":
            answers.append(cache.acquire(ME, HERE, VAST, now=1.0))
        else:
            answers.append(cache.extend(ME, lease, size, now=1.0))

    costs = []
    while in_parts:
        costs.append(calls(clear))
        cache.check()
        in_parts = answers[-1]
    costs.append(calls(ask))
    cache.check()
    return costs, answers[-1], cache.snapshot(now=1.0).evicted


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["acquire", "extend"])
def test_room_for_a_vast_request_is_made_in_parts(verb: str):
    """Whoever asks for the whole cache lets others have their turn while it is emptied for him."""
    [whole], want, evicted = asked_for_all(verb, in_parts=False)
    parts, got, evicted_in_parts = asked_for_all(verb, in_parts=True)
    assert len(parts) > 10
    assert max(parts) < whole / 8
    assert evicted == evicted_in_parts
    if verb == "acquire":
        assert got.ledger == want.ledger
        assert want.ledger.hit == 40 * 4


def test_no_way_is_made_for_what_would_be_refused_or_wait():
    cache = PrefixCache(4096, 4)
    cache.attach(ME, HERE, now=0.0)
    for number in range(4000):
        store(cache, [number] * 4)
    holder = cache.acquire(ME, HERE, pack(range(9_000, 9_000 + 4 * 300)), now=0.0).lease
    before = cache.snapshot(now=0.0).evicted
    assert not cache.clear_way(ME, HERE, VAST, now=0.0)  # too much is held
    joined = pack(range(9_000, 9_000 + 4 * 2000))
    assert not cache.clear_way(ME, HERE, joined, now=0.0)  # it is being computed: it would wait
    with pytest.raises(InvalidRequest):
        cache.clear_way(ME, HERE, b"", now=0.0)
    with pytest.raises(NotFound):
        cache.clear_way(WorkerId(7), HERE, VAST, now=0.0)
    assert cache.snapshot(now=0.0).evicted == before
    cache.release(ME, holder, now=0.0)
    assert cache.clear_way(ME, HERE, VAST, now=0.0)


@pytest.mark.slow
def test_room_for_a_vast_request_in_line_is_made_in_parts():
    def served(size: int) -> int:
        cache = PrefixCache(4096, 4)
        cache.attach(ME, HERE, now=0.0)
        holder = cache.acquire(ME, HERE, pack(range(9_000, 9_000 + 4 * 300)), now=0.0).lease
        for number in range(4096 - 300):
            store(cache, [number] * 4)
        prompt = VAST[: 4 * 4 * size]
        waiting = cache.acquire(ME, HERE, prompt, wait_s=9.0, reserve=4 * (3900 - size), now=0.0)
        assert isinstance(waiting, Waiting)
        costs = [calls(lambda: cache.release(ME, holder, now=0.1))]
        while not (settled := cache.take_outcomes()):
            assert cache.next_deadline() == -inf
            costs.append(calls(lambda: cache.expire(now=0.1, most=100)))
            cache.check()
        [(ticket, grant)] = settled
        assert (ticket, isinstance(grant, Grant)) == (waiting.ticket, True)
        assert len(costs) > 10
        return max(costs)

    assert served(3900) < 60_000
    assert served(10) < 60_000


@pytest.mark.walk
@pytest.mark.parametrize("seed", range(30))
def test_everything_may_happen_between_the_parts_of_a_step(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("prefixcache.core.lessor._MOST_WORK", 1)
    monkeypatch.setattr("prefixcache.core.wait_queue._SEARCHED", 2)
    monkeypatch.setattr("prefixcache.core.wait_queue._CALLED", 1)
    draw, cache = Random(seed), PrefixCache(40, 4, ttl_s=10.0, max_line=12)
    spaces = [HERE, Namespace("m", tenant="t"), Namespace("m", salt="s")]
    now, number = 0.0, 0
    attached: dict[WorkerId, list[LeaseId]] = {}
    waiting: dict[int, WorkerId] = {}
    parts = 0

    def prompt() -> bytes:
        return pack(
            [token for _ in range(draw.randrange(1, 6)) for token in [draw.randrange(2)] * 4]
        )

    def take(answer: Any, worker: WorkerId) -> None:
        if isinstance(answer, Waiting):
            waiting[answer.ticket] = worker
        elif isinstance(answer, Grant):
            attached[worker].append(answer.lease)

    def act() -> None:
        nonlocal number
        if len(attached) < 3:
            number += 1
            worker = WorkerId(number)
            for space in spaces:
                cache.attach(worker, space, now=now)
            attached[worker] = []
            return
        worker = draw.choice(sorted(attached))
        kind = draw.random()
        wait_s = draw.choice([0.0, 3.0, 30.0])
        with suppress(CacheError):
            if kind < 0.45 or not attached[worker]:
                space = draw.choice(spaces)
                take(cache.acquire(worker, space, prompt(), wait_s=wait_s, now=now), worker)
            elif kind < 0.65:
                lease = draw.choice(attached[worker])
                cache.commit(worker, lease, 4, now=now)
            elif kind < 0.72:
                lease = draw.choice(attached[worker])
                take(cache.extend(worker, lease, 30, wait_s=wait_s, now=now), worker)
            elif kind < 0.86:
                cache.release(worker, attached[worker].pop(), now=now)
            elif kind < 0.89:
                cache.reset(draw.choice(spaces))
            elif kind < 0.93:
                cache.set_quota("t", max_held=draw.choice([None, 5]), guaranteed=0, now=now)
            elif kind < 0.96:
                cache.pin(HERE, prompt(), ttl_s=3.0, now=now)
            else:
                del attached[worker]
                for ticket in [one for one, whose in waiting.items() if whose == worker]:
                    del waiting[ticket]
                cache.detach(worker, now=now, gone=draw.random() < 0.5, most=1)
                if draw.random() < 0.5:
                    cache.worker_gone(worker, now=now)

    def settle() -> None:
        for ticket, _ in cache.take_outcomes():
            del waiting[ticket]  # each of them once
        assert waiting.keys() == set(cache._lessor.waiting.tickets)

    for _ in range(400):
        act()
        settle()
        cache.check()
        if draw.random() < 0.5:
            now += draw.choice([0.0, 0.5, 4.0])
            parts += cache.next_deadline() == -inf
            cache.expire(now=now, most=draw.choice([1, 2]))
            settle()
            cache.check()
    assert parts
    for _ in range(1000):
        if (due := cache.next_deadline()) is None:
            break
        now = max(now, due + 1.0)
        cache.expire(now=now, most=1)
        settle()
        cache.check()
    for worker in list(range(number + 1)):
        cache.worker_gone(WorkerId(worker), now=now)
    seen = cache.snapshot(now=now)
    assert (seen.private, seen.quarantined, seen.waiting, seen.num_leases) == (0, 0, 0, 0)
    assert not waiting


@pytest.mark.slow
@pytest.mark.parametrize("salted", [False, True])
def test_an_outline_of_thousands_of_branches_is_made_and_written_in_parts(salted: bool):
    def drawn(num_branches: int) -> tuple[int, int]:
        cache = crowded(0, full=False)
        space = Namespace("m", salt="s" if salted else "")
        cache.attach(ME, space, now=0.0)
        for number in range(num_branches):
            store(cache, [number, 1, 2, 3], space)
        # Four times as many as are kept are in the heap when the walk is through.
        steps = cache.outline(max_branches=num_branches // 2, now=1.0)
        made, outline = most_in_one_go(without_salted_tokens(steps))
        assert sum(len(one.branches) for one in outline.namespaces) == num_branches // 2 + 1
        written, _ = most_in_one_go(codec.write_outline(outline, pb.TreeResponse()))
        return made, written

    few, many = drawn(1200), drawn(4800)
    assert many[0] <= few[0] * 1.5
    assert many[1] <= few[1] * 1.5


def test_who_comes_late_is_told_of_thousands_of_runs_in_parts():
    class Ear:
        runs = 0

        def stored(self, *_: Any) -> None:
            self.runs += 1

        def removed(self, *_: Any) -> None: ...

        def cleared(self, *_: Any) -> None: ...

        def left(self, *_: Any) -> None: ...

    def told(num_runs: int) -> int:
        cache = crowded(0, full=False)
        for number in range(num_runs):
            store(cache, [number, 1, 2, 3])
        ear = Ear()
        most, _ = most_in_one_go(cache.replay(ear).run())
        assert ear.runs == num_runs
        return most

    assert told(4000) <= told(600) + 5


def test_who_comes_late_is_told_of_a_long_run_in_parts():
    """Each part below the one before; the tree may change between any two."""
    cache = PrefixCache(8192, 4)
    cache.attach(ME, HERE, now=0.0)
    tokens = pack(range(4 * 2000))
    lease = cache.acquire(ME, HERE, tokens, now=0.0).lease
    cache.commit(ME, lease, 4 * 2000, now=0.0)
    cache.release(ME, lease, now=0.0)
    heard = Strict()
    heard.replay = cache.replay(heard)
    cache.observe(heard)
    sizes = [0]
    for number, _ in enumerate(heard.replay.run()):
        sizes.append(len(heard.known))
        if number == 1:  # a branch leaves what is told, another one what is not
            for at in (4 * 100, 4 * 1900):
                branch = cache.acquire(ME, HERE, tokens[: 4 * at] + pack([7] * 4), now=0.0)
                cache.commit(ME, branch.lease, at + 4, now=0.0)
                cache.release(ME, branch.lease, now=0.0)
    assert max(after - before for before, after in pairwise(sizes)) <= 513
    assert len(heard.known) == 2002


def test_the_upper_part_of_a_run_is_told_though_the_lower_one_is_evicted_before_its_turn(
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    cache = PrefixCache(8, 4, num_ghosts=0)
    cache.attach(ME, HERE, now=0.0)

    def store(*tokens: int) -> LeaseId:
        grant = cache.acquire(ME, HERE, pack(tokens), now=0.0)
        cache.commit(ME, grant.lease, len(tokens), now=0.0)
        return grant.lease

    for run in ([1] * 4 + [2] * 4, [5] * 4):
        cache.release(ME, store(*run), now=0.0)
    late, oracle = Strict(), Strict()
    late.replay = cache.replay(late)
    cache.observe(late)
    telling = late.replay.run()
    for _ in range(2):
        next(telling)
    assert len(late.known) == 1, "the long one waits for its turn"
    store(*[1] * 4, *[3] * 4)
    store(*range(10, 34))
    assert cache.lookup(HERE, pack([*[1] * 4, *[2] * 4, 9])).num_hit == 4
    list(telling)
    late.replay = None
    list(cache.replay(oracle).run())
    assert late.known == oracle.known


class Strict:
    """A journal that takes nothing that does not fit to what it has been told."""

    def __init__(self) -> None:
        self.known: dict[int, bytes] = {}
        self.replay: Replay | None = None

    def stored(self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: Any):
        if self.replay is not None and not self.replay.is_stored(namespace, parent, blocks):
            return
        chain = b"" if parent is None else self.known[parent]
        for at, block in enumerate(blocks):
            assert block not in self.known
            chain += tokens[16 * at : 16 * (at + 1)]
            self.known[block] = chain

    def removed(self, namespace: Namespace, blocks: Any) -> None:
        for block in blocks if self.replay is None else self.replay.removed(namespace, blocks):
            del self.known[block]

    def cleared(self, namespace: Namespace) -> None:
        if self.replay is not None:
            self.replay.cleared(namespace)
        self.known.clear()

    def left(self, namespace: Namespace) -> None: ...


@pytest.mark.parametrize("seed", range(40))
def test_trees_may_change_in_every_way_while_they_are_told(
    seed: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    monkeypatch.setattr(kv_events, "_BLOCKS_IN_ONE_GO", 1 + seed % 3)
    draw, cache = Random(seed), PrefixCache(90, 4, num_ghosts=8)
    cache.attach(ME, HERE, now=0.0)
    held: list[LeaseId] = []

    def disturb() -> None:
        if held and (len(held) > 4 or draw.random() < 0.4):
            cache.release(ME, held.pop(draw.randrange(len(held))), now=0.0)
            return
        if draw.random() < 0.03:
            cache.reset(HERE)
        prompt = [token for _ in range(draw.randrange(1, 9)) for token in [draw.randrange(3)] * 4]
        grant = cache.acquire(ME, HERE, pack([*prompt, 9]), now=0.0)
        cache.commit(ME, grant.lease, max(grant.num_cached, draw.choice([4, len(prompt)])), now=0.0)
        held.append(grant.lease)

    for _ in range(200):
        disturb()
    late, oracle = Strict(), Strict()
    cache.observe(late)
    late.replay = cache.replay(late)
    for _ in late.replay.run():
        for _ in range(draw.randrange(4)):
            disturb()
    late.replay = None
    for _ in range(20):
        disturb()
    list(cache.replay(oracle).run())
    assert late.known == oracle.known
