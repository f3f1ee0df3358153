"""The contract: the same tests against the cache in process and against a real service.

64 blocks of 4 tokens, leases live 1 s.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Future
from typing import Any

import pytest

from client.backends import NUM_BLOCKS, TTL_S, Backend
from patience import PATIENCE_S
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    PoolExhausted,
    QuotaExceeded,
)
from prefixcache.types import Copy, Ledger, Lookup, Namespace, Snapshot, TableUpdate, pack


def prompt(length: int, seed: int = 0) -> bytes:
    """Tokens that only prompts of the same seed share."""
    return pack(range(seed * 1000, seed * 1000 + length))


def state(snapshot: Snapshot) -> Snapshot:
    """A snapshot without what only the clock changes."""
    leases = tuple(dataclasses.replace(lease, expires_in_s=0.0) for lease in snapshot.leases)
    return dataclasses.replace(snapshot, leases=leases)


def test_a_cold_prompt_gets_room_for_itself_and_its_reserve(cache: Backend) -> None:
    lease = cache.attach().acquire(prompt(10), reserve=7)
    assert len(lease.block_table) == 5
    assert (lease.num_cached, lease.num_pending, lease.copies) == (0, 0, ())
    assert lease.ledger == Ledger(cold=10)


def test_what_one_worker_commits_another_reads_in_the_same_blocks(cache: Backend) -> None:
    first = cache.attach().acquire(prompt(12))
    assert first.commit(12).num_tokens == 12
    second = cache.attach().acquire(prompt(12) + pack([7]))
    assert second.num_cached == 12
    assert second.block_table[:3] == first.block_table[:3]
    assert second.ledger == Ledger(hit=12, cold=1)


def test_one_token_is_always_left_to_compute(cache: Backend) -> None:
    session = cache.attach()
    with session.acquire(prompt(8)) as lease:
        lease.commit(8)
    again = session.acquire(prompt(8))
    assert again.num_cached == 7
    assert again.ledger == Ledger(hit=4, partial=3, granularity=1)


def test_a_block_that_matches_in_part_is_copied(cache: Backend) -> None:
    session = cache.attach()
    first = session.acquire(prompt(8))
    first.commit(8)
    other = session.acquire(prompt(6) + pack([77, 78, 79]))
    assert other.num_cached == 6
    assert other.copies == (Copy(first.block_table[1], other.block_table[1], 2),)


def test_generated_tokens_are_committed_with_their_ids(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(6))
    lease.commit(6)
    update = lease.extend(9)
    assert update == TableUpdate(2, lease.block_table[2:])
    assert lease.commit(9, pack([501, 502, 503])).num_tokens == 9
    assert session.lookup(prompt(6) + pack([501, 502, 503, 504])).num_hit == 8


def test_children_of_a_fork_share_all_blocks_until_they_write(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(6))
    lease.commit(6)
    before = cache.snapshot().free
    left, right = lease.fork(2)
    assert left.block_table == right.block_table == lease.block_table
    assert cache.snapshot().free == before
    update = left.extend(7)
    assert update.keep == 1
    assert update.copies == (Copy(lease.block_table[1], left.block_table[1], 2),)
    left.commit(7, pack([9]))
    assert right.extend(7).copies[0].dst == right.block_table[1] != left.block_table[1]


def test_truncate_gives_up_what_comes_after(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(12))
    lease.commit(12)
    update = lease.truncate(4)
    assert update.keep == 1
    assert list(lease.block_table[:1]) == list(lease.block_table[: update.keep])
    assert session.lookup(prompt(12) + pack([1])).num_hit == 12  # stays cached for others


def test_release_is_idempotent(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(12))
    assert lease.release().num_freed == 3
    assert lease.release().num_freed == 0


def test_a_lease_of_another_worker_is_not_found(cache: Backend) -> None:
    owner = cache.attach()
    lease = owner.acquire(prompt(12))
    stranger = cache.attach()
    borrowed = stranger.acquire(prompt(4, seed=1))
    inner = getattr(borrowed, "_inner", borrowed)
    inner.id = lease.id
    before = state(cache.snapshot())
    for act in (
        lambda: borrowed.commit(4),
        lambda: borrowed.extend(40),
        lambda: borrowed.truncate(1),
        lambda: borrowed.fork(2),
        lambda: borrowed.release(),
    ):
        with pytest.raises(NotFound):
            act()
    assert state(cache.snapshot()) == before


def test_a_waiter_gets_the_prefix_when_it_lands(cache: Backend) -> None:
    owner = cache.attach().acquire(prompt(16))
    waiting = cache.attach().acquire_later(prompt(16) + pack([5]), wait_s=30.0)
    cache.pass_time(0.1)
    assert not waiting.done()
    assert cache.snapshot().waiting == 1
    owner.commit(16)
    lease = waiting.result(PATIENCE_S)
    assert lease.num_cached == 16
    assert lease.ledger == Ledger(joined=16, cold=1)


def test_a_waiter_takes_over_when_the_owner_gives_up(cache: Backend) -> None:
    owner = cache.attach().acquire(prompt(16))
    waiting = cache.attach().acquire_later(prompt(16), wait_s=30.0)
    owner.release()
    assert waiting.result(PATIENCE_S).num_cached == 0


def test_a_waiter_takes_over_when_the_owner_s_session_ends(cache: Backend) -> None:
    session = cache.attach()
    session.acquire(prompt(16))
    waiting = cache.attach().acquire_later(prompt(16), wait_s=30.0)
    session.close()
    assert waiting.result(PATIENCE_S).ledger.cold == 16


def test_waiting_ends_after_the_time_that_was_chosen(cache: Backend) -> None:
    cache.attach().acquire(prompt(16))
    waiting = cache.attach().acquire_later(prompt(16), wait_s=0.2)
    cache.pass_time(0.4)
    lease = waiting.result(PATIENCE_S)
    assert (lease.num_cached, lease.num_pending) == (0, 15)


def test_a_waiter_can_change_its_mind(cache: Backend) -> None:
    owner = cache.attach().acquire(prompt(16))
    waiting = cache.attach().acquire_later(prompt(16), wait_s=30.0)
    cache.pass_time(0.1)
    assert waiting.cancel()
    cache.pass_time(0.1)
    assert cache.snapshot().waiting == 0
    owner.commit(16)
    assert len(cache.snapshot().leases) == 1


def test_who_does_not_wait_is_told_what_is_pending(cache: Backend) -> None:
    cache.attach().acquire(prompt(16))
    lease = cache.attach().acquire(prompt(16) + pack([5]))
    assert (lease.num_cached, lease.num_pending) == (0, 16)


def test_a_repeated_request_id_gives_the_same_lease(cache: Backend) -> None:
    session = cache.attach()
    first = session.acquire(prompt(16), request_id="r1")
    again = session.acquire(prompt(16), request_id="r1")
    assert (again.id, again.block_table) == (first.id, first.block_table)
    assert session.acquire(prompt(16), request_id="r2").id != first.id


def test_a_full_pool_says_so_and_takes_nothing(cache: Backend) -> None:
    session = cache.attach()
    session.acquire(prompt(200))
    before = state(cache.snapshot())
    with pytest.raises(PoolExhausted, match=r"\d+ blocks") as caught:
        session.acquire(prompt(200, seed=1))
    assert caught.value.retry_after_s > 0
    assert state(cache.snapshot()) == before


@pytest.mark.slow
def test_a_lease_without_a_sign_of_life_expires(cache: Backend) -> None:
    session = cache.attach(keep_alive=False)
    lease = session.acquire(prompt(12))
    lease.commit(8)
    cache.pass_time(1.5 * TTL_S)
    for act in (lambda: lease.commit(12), lambda: lease.extend(20), lambda: lease.fork(1)):
        with pytest.raises(LeaseExpired, match=str(lease.id)):
            act()
    after = cache.snapshot()
    assert after.leases == ()
    assert after.quarantined == 1  # the block that its owner may still be writing to
    assert session.lookup(prompt(12)).num_hit == 8
    session.close()
    assert cache.snapshot().quarantined == 0


@pytest.mark.slow
def test_a_sign_of_life_keeps_a_lease(cache: Backend) -> None:
    session = cache.attach(keep_alive=False)
    lease = session.acquire(prompt(12))
    for _ in range(4):
        cache.pass_time(0.4 * TTL_S)
        session.renew()
    assert lease.commit(12).num_tokens == 12


@pytest.mark.slow
def test_heartbeats_keep_a_lease(cache: Backend) -> None:
    lease = cache.attach().acquire(prompt(12))
    cache.pass_time(1.8 * TTL_S)
    assert lease.commit(12).num_tokens == 12


def test_looking_takes_nothing(cache: Backend) -> None:
    session = cache.attach()
    with session.acquire(prompt(10)) as lease:
        lease.commit(10)
    before = state(cache.snapshot())
    assert session.lookup(prompt(12)) == Lookup(12, 8, 2, 0)
    told = session.explain(prompt(9) + pack([5, 6]))
    assert (told.ledger.hit, told.ledger.partial, told.parted_at) == (8, 1, 9)
    assert told.stored_next == pack([9])
    assert [(span.start, span.end, span.fate) for span in told.spans][:2] == [
        (0, 8, "hit"),
        (8, 9, "partial"),
    ]
    assert state(cache.snapshot()) == before


def test_reset_forgets_and_says_what(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(12))
    lease.commit(12)
    told = session.reset()
    assert (told.num_blocks, told.num_leased) == (3, 3)
    assert session.lookup(prompt(12)).num_hit == 0
    assert lease.extend(16).keep == 3  # the lease lives on
    lease.release()
    after = cache.snapshot()
    assert after.free + after.evictable == NUM_BLOCKS


def test_namespaces_never_share(cache: Backend) -> None:
    with cache.attach("one") as session, session.acquire(prompt(12)) as lease:
        lease.commit(12)
    assert cache.attach("two").acquire(prompt(12)).ledger == Ledger(cold=12)


def test_ops_of_a_batch_run_in_order_and_fail_alone(cache: Backend) -> None:
    session = cache.attach()
    one, two = session.acquire(prompt(8)), session.acquire(prompt(8, seed=1))
    with session.batch() as batch:
        committed = batch.commit(one, 8)
        bad = batch.commit(two, 99)
        found = batch.lookup(prompt(9))
        grown = batch.extend(two, 12)
        third = batch.acquire(prompt(9), reserve=4)
        freed = batch.release(one)
        torn = batch.acquire(b"abc")
    assert committed.result().num_tokens == 8
    with pytest.raises(InvalidRequest, match="99"):
        bad.result()
    assert found.result().num_hit == 8
    assert grown.result().keep == 2
    assert len(two.block_table) == 3
    assert third.result().num_cached == 8
    assert freed.result().num_freed == 0
    with pytest.raises(InvalidRequest, match="3"):
        torn.result()


def test_a_batch_whose_block_raises_sends_nothing(cache: Backend) -> None:
    session = cache.attach()
    lease = session.acquire(prompt(8))
    before = state(cache.snapshot())

    def step() -> None:
        with session.batch() as batch:
            batch.commit(lease, 8)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        step()
    assert state(cache.snapshot()) == before


BAD: dict[str, tuple[Any, type[CacheError], str]] = {
    "torn tokens": (lambda s, lease: s.acquire(b"12345"), InvalidRequest, "5"),
    "no tokens": (lambda s, lease: s.acquire(b""), InvalidRequest, "token"),
    "more tokens than the pool": (lambda s, lease: s.acquire(prompt(257)), InvalidRequest, "64"),
    "a reserve beyond the pool": (
        lambda s, lease: s.acquire(prompt(4), reserve=300),
        InvalidRequest,
        "64",
    ),
    "a negative reserve": (lambda s, lease: s.acquire(prompt(4), reserve=-1), InvalidRequest, "-1"),
    "a commit of unknown tokens": (lambda s, lease: lease.commit(13), InvalidRequest, "13"),
    "a commit that goes back": (lambda s, lease: lease.commit(3), InvalidRequest, "3"),
    "a commit of torn tokens": (lambda s, lease: lease.commit(9, b"123"), InvalidRequest, "3"),
    "an extend beyond the pool": (lambda s, lease: lease.extend(10**9), InvalidRequest, "64"),
    "a truncate upwards": (lambda s, lease: lease.truncate(99), InvalidRequest, "99"),
    "a negative truncate": (lambda s, lease: lease.truncate(-1), InvalidRequest, "-1"),
    "a fork into nothing": (lambda s, lease: lease.fork(0), InvalidRequest, "0"),
    "a lookup of torn tokens": (lambda s, lease: s.lookup(b"123"), InvalidRequest, "3"),
    "an explain of torn tokens": (lambda s, lease: s.explain(b"123"), InvalidRequest, "3"),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_refused_with_its_numbers_and_changes_nothing(
    cache: Backend, case: str
) -> None:
    act, error, text = BAD[case]
    session = cache.attach()
    lease = session.acquire(prompt(8))
    lease.commit(8)
    before = state(cache.snapshot())
    with pytest.raises(error, match=text) as caught:
        act(session, lease)
    assert type(caught.value) is error
    assert state(cache.snapshot()) == before


def test_the_counts_of_a_snapshot_add_up(cache: Backend) -> None:
    session = cache.attach(name="ann")
    lease = session.acquire(prompt(10), reserve=6)
    lease.commit(8)
    seen = cache.snapshot()
    assert seen.free + seen.private + seen.indexed + seen.quarantined == seen.num_blocks
    (info,) = seen.leases
    assert (info.worker, info.num_tokens, info.num_committed) == ("ann", 10, 8)
    assert (info.lease, info.num_blocks) == (lease.id, 4)
    assert 0 < info.expires_in_s <= TTL_S


def test_a_full_pool_is_waited_for_in_line(cache: Backend) -> None:
    session = cache.attach()
    large = session.acquire(list(range(4 * 60)))
    waiting = session.acquire_later([7] * 40, wait_s=20.0)
    cache.pass_time(0.2)
    assert not waiting.done()
    assert cache.snapshot().waiting == 1
    large.release()
    assert waiting.result(PATIENCE_S).ledger.total == 40


def test_a_wait_for_room_ends_with_the_arithmetic(cache: Backend) -> None:
    session = cache.attach()
    session.acquire(list(range(4 * 60)))
    waiting = session.acquire_later([7] * 40, wait_s=0.3)
    cache.pass_time(0.6)
    with pytest.raises(PoolExhausted, match="needs 10 blocks; "):
        waiting.result(PATIENCE_S)


def test_a_lease_can_wait_for_room_to_grow(cache: Backend) -> None:
    session = cache.attach()
    large = session.acquire(list(range(4 * 60)))
    lease = session.acquire([7] * 16)
    growing = later(cache, lease, 24)
    cache.pass_time(0.2)
    assert not growing.done()
    large.release()
    update = growing.result(PATIENCE_S)
    assert (update.keep, len(update.blocks)) == (4, 2)
    assert len(lease.block_table) == 6


def later(cache: Backend, lease: Any, num_tokens: int) -> Future[Any]:
    if hasattr(lease, "extend_later"):
        future: Future[Any] = lease.extend_later(num_tokens, wait_s=20.0)
        return future
    return cache.later(lambda: lease.extend(num_tokens, wait_s=20.0))


def test_a_pin_is_capped_listed_and_ended(cache: Backend) -> None:
    session = cache.attach()
    with session.acquire(list(range(40))) as lease:
        lease.commit(40)
        pinned = session.pin(list(range(10)), ttl_s=60.0)
    assert (pinned.num_tokens, pinned.num_blocks, pinned.num_new, pinned.num_leased) == (8, 2, 2, 2)
    assert (pinned.pinned, pinned.max_pinned) == (2, 16)
    [listed] = cache.snapshot().pins
    assert (listed.num_blocks, round(listed.expires_in_s, -1)) == (2, 60)
    ended = session.unpin(list(range(8)))
    assert (ended.num_pins, ended.num_blocks, ended.pinned) == (1, 2, 0)
    assert session.unpin().num_pins == 0


def test_pins_above_the_cap_are_refused_with_the_arithmetic(cache: Backend) -> None:
    session = cache.attach()
    with session.acquire(list(range(4 * 17))) as lease:
        lease.commit(4 * 17)
    with pytest.raises(PoolExhausted, match="17 blocks, 17 of them new, would make 17; the cap"):
        session.pin(list(range(4 * 17)), ttl_s=60.0)
    assert session.pin(list(range(4 * 16)), ttl_s=60.0).num_blocks == 16


def test_a_pin_ends_by_its_deadline(cache: Backend) -> None:
    session = cache.attach()
    with session.acquire(list(range(8))) as lease:
        lease.commit(8)
    session.pin(list(range(8)), ttl_s=0.3)
    cache.pass_time(0.6)
    assert cache.snapshot().pinned == 0


def test_a_quota_refuses_with_the_arithmetic_of_the_account(cache: Backend) -> None:
    session = cache.attach()
    told = cache.set_quota(Namespace("model"), max_held=10, guaranteed=4)
    assert (told.max_held, told.guaranteed, told.num_held) == (10, 4, 0)
    lease = session.acquire([1] * 32)
    with pytest.raises(QuotaExceeded, match="needs 3 more blocks, and namespace model holds 8 of"):
        session.acquire([2] * 12)
    with pytest.raises(QuotaExceeded, match="needs 11 blocks, and namespace model may hold at"):
        session.acquire([2] * 44, wait_s=5.0)
    assert cache.quota(Namespace("model")).num_held == 8
    waiting = session.acquire_later([2] * 12, wait_s=20.0)
    lease.release()
    assert waiting.result(PATIENCE_S).ledger.total == 12


def test_a_posted_batch_is_not_waited_for_and_its_errors_are_told(cache: Backend) -> None:
    session = cache.attach()
    lease, other = session.acquire(prompt(8)), session.acquire(prompt(8, seed=1))
    failed: list[CacheError] = []
    batch = session.batch()
    batch.commit(lease, 8)
    batch.commit(lease, 7)  # fewer than before
    batch.extend(lease, 12)
    batch.release(other)
    batch.commit(other, 8)  # refused at once: it was released
    session.post(batch, failed.append)
    assert session.lookup(prompt(8) + pack([1])).num_hit == 8  # asked later, answered later
    assert len(lease.block_table) == 3
    assert [type(error) for error in failed] in (
        [InvalidRequest, LeaseExpired],
        [LeaseExpired, InvalidRequest],
    )


def test_a_lease_is_asked_for_inside_a_batch_and_comes_when_it_is_there(cache: Backend) -> None:
    session = cache.attach()
    owner = cache.attach().acquire(prompt(8))
    batch = session.batch()
    now = batch.acquire_later(prompt(8, seed=1), reserve=4)
    later = batch.acquire_later(prompt(8) + pack([5]), wait_s=30.0)
    never = batch.acquire_later(b"", wait_s=0.0)
    session.post(batch)
    assert len(now.result(PATIENCE_S).block_table) == 3
    assert isinstance(never.exception(PATIENCE_S), InvalidRequest)
    assert not later.done()
    owner.commit(8)
    cache.pass_time(0.0)
    assert later.result(PATIENCE_S).ledger.joined == 8


def test_who_wants_every_token_computed_reuses_none_and_shares_what_it_commits(
    cache: Backend,
) -> None:
    session = cache.attach()
    first = session.acquire(prompt(8))
    first.commit(8)
    own = session.acquire(prompt(10), reuse=False)
    assert (own.num_cached, own.copies) == (0, ())
    assert own.ledger == Ledger(cold=2, granularity=8)
    assert not set(own.block_table) & set(first.block_table)
    own.commit(10)
    assert session.acquire(prompt(10) + pack([5])).num_cached == 10
    # Nor does it wait for who computes the same now.
    cache.attach().acquire(prompt(8, seed=1))
    alone = session.acquire(prompt(8, seed=1), reuse=False, wait_s=30.0)
    assert (alone.num_cached, alone.num_pending) == (0, 0)


def test_a_few_tokens_of_a_block_are_not_worth_their_copy(cache: Backend) -> None:
    session = cache.attach()
    session.acquire(prompt(8)).commit(8)
    for least, cached in ((0, 6), (2, 6), (3, 4), (99, 4)):
        with session.acquire(prompt(6) + pack([77, 78]), min_partial=least) as lease:
            assert (lease.num_cached, len(lease.copies)) == (cached, int(cached == 6)), least


def test_one_session_leases_for_many_adapters_and_salts(cache: Backend) -> None:
    session = cache.attach()
    for terms in ({}, {"adapter": "a"}, {"salt": "s"}, {"adapter": "a", "salt": "s"}):
        with session.acquire(prompt(8), **terms) as lease:
            assert lease.num_cached == 0, terms
            lease.commit(8)
        assert session.acquire(prompt(8), **terms).num_cached == 7, terms


@pytest.mark.slow
def test_releasing_a_lease_that_has_ended_lifts_its_quarantine(cache: Backend) -> None:
    session = cache.attach(keep_alive=False)
    lease, other = session.acquire(prompt(12), reserve=4), session.acquire(prompt(8, seed=1))
    cache.pass_time(TTL_S * 1.5)
    assert cache.snapshot().quarantined == 6
    stranger = cache.attach()
    borrowed = stranger.acquire(prompt(4, seed=2))
    inner = getattr(borrowed, "_inner", borrowed)
    inner.id, own = lease.id, inner.id
    with pytest.raises(NotFound):
        borrowed.release()
    assert cache.snapshot().quarantined == 6
    assert lease.release().num_freed == 4
    assert cache.snapshot().quarantined == 2
    assert lease.release().num_freed == 0
    other.release()
    assert cache.snapshot().quarantined == 0
    inner.id = own


@pytest.mark.slow
def test_what_comes_back_from_quarantine_goes_to_who_waits(cache: Backend) -> None:
    session = cache.attach(keep_alive=False)
    lease = session.acquire(prompt(4 * NUM_BLOCKS))
    cache.pass_time(TTL_S * 1.5)
    waiting = cache.attach().acquire_later(prompt(8, seed=1), wait_s=30.0)
    cache.pass_time(0.1)
    assert not waiting.done()
    lease.release()
    assert len(waiting.result(PATIENCE_S).block_table) == 2


def test_who_can_do_without_waits_for_a_prefix_and_not_for_room(cache: Backend) -> None:
    session = cache.attach()
    owner = session.acquire(prompt(8))
    crowd = session.acquire(prompt(4 * (NUM_BLOCKS - 4), seed=1))
    with pytest.raises(PoolExhausted):
        session.acquire_later(prompt(20, seed=2), wait_s=30.0, for_room=False).result(PATIENCE_S)
    shares = session.acquire_later(prompt(8) + pack([5]), wait_s=30.0, for_room=False)
    starves = session.acquire_later(prompt(8) + pack(range(20)), wait_s=30.0, for_room=False)
    cache.pass_time(0.1)
    assert not shares.done()
    assert not starves.done()
    owner.commit(8)
    assert shares.result(PATIENCE_S).ledger.joined == 8
    with pytest.raises(PoolExhausted):  # what it waited for is there, and no room for the rest
        starves.result(PATIENCE_S)
    crowd.release()
