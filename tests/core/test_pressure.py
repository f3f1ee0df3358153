"""A full pool: who waits, who is passed, what pins and quotas keep, and that nothing wedges."""

from __future__ import annotations

from random import Random

import pytest

from core.oracle import LeafLru
from prefixcache.core.cache import PrefixCache
from prefixcache.core.wait_queue import MAX_BYPASSES
from prefixcache.errors import InvalidRequest, LeaseExpired, PoolExhausted, QuotaExceeded
from prefixcache.types import (
    Grant,
    LeaseId,
    Namespace,
    TableUpdate,
    TicketId,
    Waiting,
    WorkerId,
    pack,
)

ME = WorkerId(1)
A, B, C = (Namespace("model", tenant=name) for name in "abc")


def pool(num_blocks: int, **options: object) -> PrefixCache:
    cache = PrefixCache(num_blocks, 1, ttl_s=100.0, **options)  # type: ignore[arg-type]
    for namespace in (A, B, C):
        cache.attach(ME, namespace, now=0.0)
    return cache


def take(cache: PrefixCache, tokens: list[int], space: Namespace = A, now: float = 0.0) -> LeaseId:
    grant = cache.acquire(ME, space, pack(tokens), now=now)
    assert isinstance(grant, Grant)
    return grant.lease


def queue(cache: PrefixCache, size: int, space: Namespace = A, wait_s: float = 50.0) -> TicketId:
    answer = cache.acquire(
        ME, space, pack([1000 + ord(space.tenant)] * size), wait_s=wait_s, now=0.0
    )
    assert isinstance(answer, Waiting)
    assert answer.owner is None
    return answer.ticket


def store(cache: PrefixCache, tokens: list[int], space: Namespace = A) -> None:
    lease = take(cache, tokens, space)
    cache.commit(ME, lease, len(tokens), now=0.0)
    cache.release(ME, lease, now=0.0)
    cache.check()


def served(cache: PrefixCache) -> list[TicketId]:
    return [
        ticket for ticket, outcome in cache.take_outcomes() if not isinstance(outcome, Exception)
    ]


# ------------------------------------------------------------------------------------ the line


def test_namespaces_take_turns_however_many_requests_one_of_them_has() -> None:
    cache = pool(4)
    leases = [take(cache, [n, n]) for n in range(2)]
    crowd = [queue(cache, 2, A) for _ in range(4)]
    lone, other = queue(cache, 2, B), queue(cache, 2, C)
    order: list[TicketId] = []
    while leases:
        cache.release(ME, leases.pop(), now=1.0)
        for ticket, outcome in cache.take_outcomes():
            assert isinstance(outcome, Grant)
            order.append(ticket)
            leases.append(outcome.lease)
        cache.check()
    assert order == [crowd[0], lone, other, *crowd[1:]]


def test_a_large_request_is_passed_by_small_ones_only_so_often() -> None:
    cache = pool(4)
    small = [take(cache, [n]) for n in range(3)]
    large = queue(cache, 4)
    for n in range(MAX_BYPASSES):
        small.append(take(cache, [100 + n], B))
        cache.release(ME, small.pop(0), now=1.0)
    with pytest.raises(PoolExhausted, match="no other may pass any more"):
        take(cache, [1000], B)
    behind = queue(cache, 1, B)
    while small:
        cache.release(ME, small.pop(), now=1.0)
    assert served(cache) == [large]
    cache.cancel(ME, behind, now=2.0)
    cache.check()


def test_the_line_is_bounded_and_says_so() -> None:
    cache = pool(2, max_line=2)
    take(cache, [1, 2])
    queue(cache, 1), queue(cache, 1)
    with pytest.raises(PoolExhausted, match="2 requests wait for room already, --max-line"):
        queue(cache, 1)


def test_a_wait_for_room_ends_at_its_deadline_with_the_arithmetic() -> None:
    cache = pool(4)
    take(cache, [1, 2, 3])
    ticket = queue(cache, 3, wait_s=5.0)
    assert cache.next_deadline() == 5.0
    cache.expire(now=4.9)
    assert cache.take_outcomes() == []
    cache.expire(now=5.1)
    [(settled, error)] = cache.take_outcomes()
    assert settled == ticket
    assert isinstance(error, PoolExhausted)
    assert "needs 3 blocks; 1 free, 0 evictable; 3 blocks held by 1 lease (" in str(error)


def test_what_is_larger_than_the_cap_has_no_pin_to_wait_for() -> None:
    cache = pool(8, max_pinned=2)
    store(cache, [1, 2, 3])
    with pytest.raises(PoolExhausted, match=r"pinning 3 blocks, 3 of them new, would make 3") as no:
        cache.pin(A, pack([1, 2, 3]), ttl_s=30.0, now=10.0)
    assert no.value.retry_after_s == 0.0


def test_who_waited_for_a_flight_may_stand_in_line_next() -> None:
    cache = pool(8)
    flight = take(cache, [1, 2])
    waiting = cache.acquire(ME, A, pack([1, 2, 3]), wait_s=50.0, now=0.0)
    assert isinstance(waiting, Waiting)
    assert waiting.owner == flight
    full = take(cache, [7] * 6, B)
    cache.commit(ME, flight, 2, now=1.0)
    assert cache.take_outcomes() == []  # its prefix is there, and no room for the rest
    assert cache.counts(now=1.0).waiting == 1
    cache.release(ME, full, now=2.0)
    assert served(cache) == [waiting.ticket]


def test_who_takes_from_the_line_may_wait_for_a_flight_next() -> None:
    cache = pool(8)
    full = take(cache, list(range(8)))
    first, second = queue(cache, 4), queue(cache, 5)
    cache.release(ME, full, now=1.0)
    [(ticket, grant)] = cache.take_outcomes()
    assert ticket == first
    assert isinstance(grant, Grant)
    cache.commit(ME, grant.lease, 4, now=1.0)
    [(ticket, joined)] = cache.take_outcomes()
    assert ticket == second
    assert isinstance(joined, Grant)
    assert joined.ledger.joined == 4


def test_leases_that_grow_come_before_new_requests() -> None:
    cache = pool(4)
    large, lease = take(cache, [1, 2]), take(cache, [7, 8])
    new = queue(cache, 1)
    growing = cache.extend(ME, lease, 4, wait_s=50.0, now=0.0)
    assert isinstance(growing, Waiting)
    cache.release(ME, large, now=1.0)
    [(ticket, update)] = cache.take_outcomes()
    assert ticket == growing.ticket
    assert isinstance(update, TableUpdate)
    assert (update.keep, len(update.blocks)) == (2, 2)
    cache.release(ME, lease, now=2.0)
    assert served(cache) == [new]
    cache.check()


def test_a_lease_that_ends_while_it_waits_is_told_so() -> None:
    cache = pool(3)
    take(cache, [1, 2])
    lease = take(cache, [7])
    assert isinstance(cache.extend(ME, lease, 2, wait_s=50.0, now=0.0), Waiting)
    with pytest.raises(InvalidRequest, match="waits for room already"):
        cache.extend(ME, lease, 3, now=0.0)
    cache.release(ME, lease, now=1.0)
    [(_, error)] = cache.take_outcomes()
    assert isinstance(error, LeaseExpired)
    cache.check()


# ------------------------------------------------------------------------------- decode deadlock


def decode(reserve: int) -> tuple[int, int]:
    """Answer 8 requests of 2 tokens with 6 more each, in a pool for two; count done and stuck."""
    cache = pool(16)
    waiting = list(range(8))
    running: dict[LeaseId, int] = {}
    done = 0
    for _ in range(100):
        while waiting:
            try:
                prompt = pack([waiting[0], waiting[0] + 100])
                grant = cache.acquire(ME, A, prompt, reserve=reserve, now=0.0)
            except PoolExhausted:
                break
            assert isinstance(grant, Grant)
            waiting.pop(0)
            running[grant.lease] = 2
            cache.commit(ME, grant.lease, 2, now=0.0)
        moved = False
        for lease, length in list(running.items()):
            try:
                cache.extend(ME, lease, length + 1, now=0.0)
            except PoolExhausted:
                continue
            moved = True
            cache.commit(ME, lease, length + 1, pack([length]), now=0.0)
            running[lease] = length + 1
            if length + 1 == 8:
                cache.release(ME, lease, now=0.0)
                del running[lease]
                done += 1
        if not moved:
            break
    return done, len(running)


def test_reserve_prevents_the_deadlock_in_which_all_decode_and_none_can_go_on() -> None:
    assert decode(reserve=0) == (0, 8)  # admitted to the last block: nobody ever ends
    assert decode(reserve=6) == (8, 0)


# ------------------------------------------------------------------------------------------ pins


def test_a_pinned_prefix_is_evicted_last() -> None:
    cache = pool(8)
    store(cache, [1, 2])
    cache.pin(A, pack([1, 2]), ttl_s=50.0, now=0.0)
    for n in range(10, 40, 3):
        store(cache, [n, n + 1, n + 2])
    assert cache.lookup(A, pack([1, 2, 3])).num_hit == 2
    cache.unpin(A, pack([1, 2]))
    for n in range(40, 70, 3):
        store(cache, [n, n + 1, n + 2])
    assert cache.lookup(A, pack([1, 2, 3])).num_hit == 0
    cache.check()


def test_no_number_of_pins_wedges_the_pool() -> None:
    cache = pool(8, max_pinned=8)
    for n in range(8):
        store(cache, [n])
        assert cache.pin(A, pack([n]), ttl_s=1000.0, now=0.0).num_new == 1
    assert cache.snapshot(now=0.0).pinned == 8
    lease = take(cache, list(range(100, 108)), C)
    assert cache.snapshot(now=0.0).pinned == 0
    cache.check()
    cache.release(ME, lease, now=0.0)


def test_a_pin_that_loses_blocks_keeps_the_rest_of_its_prefix() -> None:
    cache = pool(4, max_pinned=4)
    store(cache, [1, 2, 3])
    cache.pin(A, pack([1, 2, 3]), ttl_s=50.0, now=0.0)
    lease = take(cache, [7, 8], B)
    [pin] = cache.snapshot(now=0.0).pins
    assert (pin.num_tokens, cache.snapshot(now=0.0).pinned) == (2, 2)
    cache.release(ME, lease, now=0.0)
    cache.check()


def test_a_full_cap_names_when_the_next_pin_ends() -> None:
    cache = pool(8, max_pinned=2)
    store(cache, [1, 2])
    store(cache, [3])
    cache.pin(A, pack([1, 2]), ttl_s=30.0, now=0.0)
    with pytest.raises(PoolExhausted, match=r"pinning 1 block, 1 of them new, would make 3") as no:
        cache.pin(A, pack([3]), ttl_s=30.0, now=10.0)
    assert no.value.retry_after_s == 20.0
    assert cache.pin(A, pack([1, 2]), ttl_s=50.0, now=10.0).num_new == 0
    cache.expire(now=60.1)
    assert cache.pin(A, pack([3]), ttl_s=30.0, now=61.0).num_new == 1


@pytest.mark.parametrize("ttl_s", [0.0, -1.0, float("inf"), float("nan")])
def test_a_pin_needs_a_time(ttl_s: float) -> None:
    with pytest.raises(InvalidRequest, match="cannot pin for"):
        pool(4).pin(A, pack([1]), ttl_s=ttl_s, now=0.0)


def test_a_reset_ends_the_pins_of_its_namespace_and_no_other() -> None:
    cache = pool(8)
    for space in (A, B):
        store(cache, [1], space)
        cache.pin(space, pack([1]), ttl_s=50.0, now=0.0)
    assert cache.reset(A).num_pins == 1
    assert [pin.namespace for pin in cache.snapshot(now=0.0).pins] == [B]
    cache.check()


def test_what_is_not_pinned_still_goes_exactly_by_least_recent_use() -> None:
    """Beside pinned blocks, the rest behaves like an LRU of what is left of the pool."""
    num_blocks, num_pinned = 24, 6
    cache, oracle = pool(num_blocks), LeafLru(num_blocks - num_pinned, 1)
    store(cache, [900 + n for n in range(num_pinned)], B)
    cache.pin(B, pack([900 + n for n in range(num_pinned)]), ttl_s=1e6, now=0.0)
    state = 1
    for _ in range(400):
        state = (state * 1103515245 + 12345) % 2**31
        prompt = [state % 5, 10 + state // 7 % 4, 100 + state // 31 % 9, 200 + state // 97 % 5]
        found = cache.lookup(A, pack(prompt)).num_hit
        assert found == oracle.lookup(A, tuple(prompt))
        store(cache, prompt)
        oracle.insert(A, tuple(prompt))
    assert oracle.num_evicted > 100
    assert cache.lookup(B, pack([900 + n for n in range(num_pinned)])).num_hit == num_pinned - 1


@pytest.mark.parametrize("later", [0.0, 20.0])
def test_a_pin_is_told_with_the_time_that_is_left(later: float) -> None:
    cache = pool(8, max_pinned=8)
    store(cache, [1, 2])
    cache.pin(A, pack([1, 2]), ttl_s=50.0, now=10.0)
    [pin] = cache.snapshot(now=10.0 + later).pins
    assert (pin.namespace, pin.num_tokens, pin.num_blocks) == (A, 2, 2)
    assert pin.expires_in_s == 50.0 - later


# ---------------------------------------------------------------------------------------- quotas


@pytest.mark.walk
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("is_tenant", [True, False])
def test_who_is_within_a_share_goes_after_all_others_and_who_is_beyond_it_in_its_turn(
    seed: int, is_tenant: bool
) -> None:
    """Held against a list: prompts of one block, the least recently used first."""
    draw, cache = Random(seed), pool(12, max_pinned=12)
    shares = {A: 0, B: 0, C: 0}
    there: list[tuple[Namespace, int]] = []  # the oldest first
    pinned: set[tuple[Namespace, int]] = set()

    def goes_next() -> tuple[Namespace, int]:
        stored = {space: sum(one[0] == space for one in there) for space in shares}
        free = [one for one in there if one not in pinned]
        beyond = [one for one in free if stored[one[0]] > shares[one[0]]]
        return (beyond or free or there)[0]

    for number in range(400):
        what = draw.random()
        space = draw.choice([A, A, B, C])
        if what < 0.03:
            # One share at a time: which of two goes first, when nothing else is left, is open.
            shares = dict.fromkeys(shares, 0)
            shares[space] = draw.randrange(1, 6)
            for one in (A, B, C):
                scope = one.tenant if is_tenant else one
                cache.set_quota(scope, max_held=None, guaranteed=shares[one], now=0.0)
        elif what < 0.06 and there:
            pinned.add(one := draw.choice(there))
            cache.pin(one[0], pack([one[1]]), ttl_s=1e6, now=0.0)
        elif what < 0.08 and pinned:
            one = pinned.pop()
            cache.unpin(one[0], pack([one[1]]))
        else:
            entry = (space, draw.randrange(12))
            found = entry in there
            if found:
                there.remove(entry)
            elif len(there) == 11:  # the scratch block of a request's last token needs one, too
                gone = goes_next()
                there.remove(gone)
                pinned.discard(gone)
            there.append(entry)
            lease = take(cache, [entry[1], 99], space)
            cache.commit(ME, lease, 1, now=0.0)
            cache.release(ME, lease, now=0.0)
        held = {one for one in there if cache.lookup(one[0], pack([one[1], 99])).num_hit}
        assert held == set(there), f"step {number}"
        cache.check()


def test_nobody_takes_the_guaranteed_share_of_another() -> None:
    cache = pool(10)
    cache.set_quota("a", max_held=None, guaranteed=3, now=0.0)
    store(cache, [1, 2, 3], A)
    for n in range(10, 100, 5):
        store(cache, [n, n + 1, n + 2, n + 3, n + 4], B)
    assert cache.lookup(A, pack([1, 2, 3, 4])).num_hit == 3
    store(cache, [4, 5], A)  # more than its share: the surplus goes like anybody's
    for n in range(100, 200, 5):
        store(cache, [n, n + 1, n + 2, n + 3, n + 4], B)
    assert cache.snapshot(now=0.0).quotas[0].num_stored == 3
    lease = take(cache, list(range(500, 510)), B)  # and it is soft: a lease gets what it needs
    assert cache.quota("a").num_stored == 0
    cache.release(ME, lease, now=0.0)
    cache.check()


def test_a_full_quota_delays_only_its_own_tenant() -> None:
    cache = pool(10)
    cache.set_quota("a", max_held=3, guaranteed=0, now=0.0)
    lease = take(cache, [1, 2], A)
    with pytest.raises(QuotaExceeded, match="needs 2 more blocks, and tenant 'a' holds 2 of at"):
        take(cache, [5, 6], A)
    waiting = queue(cache, 2, A)
    for n in range(3 * MAX_BYPASSES):
        cache.release(ME, take(cache, [50 + n, 60 + n], B), now=1.0)
    cache.release(ME, lease, now=2.0)
    assert served(cache) == [waiting]


def test_more_than_the_quota_ever_allows_is_refused_at_once() -> None:
    cache = pool(10)
    cache.set_quota(A, max_held=3, guaranteed=0, now=0.0)
    with pytest.raises(QuotaExceeded, match="needs 4 blocks, and namespace a/model may hold at"):
        cache.acquire(ME, A, pack([1] * 4), wait_s=10.0, now=0.0)


def test_cached_blocks_count_once_they_are_held() -> None:
    cache = pool(10)
    cache.set_quota("a", max_held=4, guaranteed=0, now=0.0)
    store(cache, [1, 2, 3])
    assert (cache.quota("a").num_held, cache.quota("a").num_stored) == (0, 3)
    take(cache, [1, 2, 3, 4])
    take_more = [1, 2, 3, 9]
    with pytest.raises(QuotaExceeded, match="needs 1 more block, and tenant 'a' holds 4 of at"):
        take(cache, take_more)


def test_shares_beyond_the_pool_are_refused() -> None:
    cache = pool(10)
    cache.set_quota("a", max_held=None, guaranteed=6, now=0.0)
    with pytest.raises(InvalidRequest, match="5 guaranteed blocks and 6 of others are more than"):
        cache.set_quota("b", max_held=None, guaranteed=5, now=0.0)
    assert cache.set_quota("a", max_held=None, guaranteed=10, now=0.0).guaranteed == 10


def test_a_pin_counts_what_nobody_had_pinned_on_the_whole_way_down() -> None:
    cache = pool(16, max_pinned=8)
    for end in ([3, 4], [5, 6]):
        store(cache, [1, 2, *end])
    lease = take(cache, [1, 2, 9])
    told = cache.pin(A, pack([1, 2, 3, 4]), ttl_s=50.0, now=0.0)
    assert (told.num_blocks, told.num_new, told.num_leased, told.pinned) == (4, 4, 2, 4)
    told = cache.pin(A, pack([1, 2, 5, 6]), ttl_s=50.0, now=0.0)
    assert (told.num_blocks, told.num_new, told.num_leased, told.pinned) == (4, 2, 2, 6)
    cache.release(ME, lease, now=0.0)
    cache.check()


def test_the_end_of_pins_counts_what_is_leased_of_what_nobody_pins_any_more() -> None:
    cache = pool(16, max_pinned=8)
    for end in ([3, 4], [5, 6]):
        store(cache, [1, 2, *end])
        cache.pin(A, pack([1, 2, *end]), ttl_s=50.0, now=0.0)
    lease = take(cache, [1, 2, 3, 9])
    told = cache.unpin(A, pack([1, 2, 3, 4]))
    assert (told.num_pins, told.num_blocks, told.num_leased, told.pinned) == (1, 2, 1, 4)
    cache.pin(A, pack([1, 2, 3, 4]), ttl_s=50.0, now=0.0)
    told = cache.unpin(A)
    assert (told.num_pins, told.num_blocks, told.num_leased, told.pinned) == (2, 6, 3, 0)
    cache.release(ME, lease, now=0.0)
    cache.check()


def test_of_very_many_pins_those_that_wait_to_end_are_pins_no_more() -> None:
    cache = pool(512, max_pinned=512)
    for number in range(300):
        lease = take(cache, [number])
        cache.commit(ME, lease, 1, now=0.0)
        cache.release(ME, lease, now=0.0)
        cache.pin(A, pack([number]), ttl_s=50.0, now=0.0)
    told = cache.unpin(A)
    assert told.num_pins == 300
    assert 0 < told.num_blocks < 300
    assert cache.unpin(A).num_pins == 0
    assert cache.snapshot(now=0.0).pins == ()
    cache.check()
    assert cache.pin(A, pack([299]), ttl_s=50.0, now=0.0).num_blocks == 1
    while cache.snapshot(now=1.0).pinned > 1:
        before = cache.snapshot(now=1.0).pinned
        cache.expire(now=1.0)
        assert cache.snapshot(now=1.0).pinned < before
    [pin] = cache.snapshot(now=1.0).pins
    assert pin.num_tokens == 1
    cache.check()
