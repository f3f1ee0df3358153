"""The verbs by example: one short story each."""

import pytest

from core.innards import table_of
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, InvalidRequest, LeaseExpired, NotFound, PoolExhausted
from prefixcache.types import (
    Copy,
    Grant,
    Ledger,
    Namespace,
    Partial,
    Span,
    Waiting,
    WorkerId,
    pack,
)

ALICE, BOB = WorkerId(1), WorkerId(2)
CHAT = Namespace("tiny-model")
SYSTEM = list(range(100, 110))


@pytest.fixture
def cache() -> PrefixCache:
    cache = PrefixCache(32, 4, ttl_s=10.0)
    for worker in (ALICE, BOB):
        cache.attach(worker, CHAT, now=0.0)
    return cache


def acquire(cache: PrefixCache, worker: WorkerId, tokens: list[int], **kwargs: object) -> Grant:
    grant = cache.acquire(worker, CHAT, pack(tokens), now=0.0, **kwargs)  # type: ignore[arg-type]
    assert isinstance(grant, Grant)
    return grant


def serve(cache: PrefixCache, worker: WorkerId, tokens: list[int]) -> Grant:
    """Acquire, compute and commit everything, release."""
    grant = acquire(cache, worker, tokens)
    cache.commit(worker, grant.lease, len(tokens), now=0.0)
    cache.release(worker, grant.lease, now=0.0)
    cache.check()
    return grant


def test_what_one_worker_commits_another_reads_in_place(cache: PrefixCache):
    first = serve(cache, ALICE, SYSTEM)
    second = acquire(cache, BOB, [*SYSTEM, 1, 2])
    assert second.num_cached == 10
    assert second.block_table[:2] == first.block_table[:2]
    source, copy = first.block_table[2], second.block_table[2]
    assert second.copies == (Copy(source, copy, 2),)
    assert second.ledger == Ledger(hit=8, partial=2, cold=2)


def test_the_source_of_a_copy_stays_until_the_first_commit():
    cache = PrefixCache(3, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    serve(cache, ALICE, [1, 2, 3])
    grant = acquire(cache, ALICE, [1, 2, 9])
    with pytest.raises(PoolExhausted, match="needs 2 blocks; 1 free, 0 evictable"):
        acquire(cache, ALICE, [7] * 8)
    cache.commit(ALICE, grant.lease, 3, now=0.0)
    assert acquire(cache, ALICE, [7] * 8).num_cached == 0
    cache.check()


@pytest.mark.parametrize("asked", [[1, 2, 9], [1, 9]])
def test_a_block_of_which_a_part_is_copied_counts_as_used(asked: list[int]):
    cache = PrefixCache(3, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    for prompt in ([1, 2, 3, 4], [5, 6, 7, 8]):
        serve(cache, ALICE, prompt)
    cache.release(ALICE, acquire(cache, ALICE, asked).lease, now=0.0)
    serve(cache, ALICE, [7] * 8)  # one of the two makes room
    assert cache.lookup(CHAT, pack([1, 2, 3, 4, 0])).num_hit == 4
    cache.check()


def test_a_tail_that_every_request_covers_counts_as_used():
    cache = PrefixCache(4, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    for prompt in ([1] * 6, [5, 6, 7, 8], [1] * 6, [7] * 8):
        serve(cache, ALICE, prompt)
    assert cache.lookup(CHAT, pack([1] * 6 + [0])).num_partial == 2


def test_a_whole_prompt_that_is_cached_still_computes_its_last_token(cache: PrefixCache):
    serve(cache, ALICE, [5] * 8)
    again = acquire(cache, BOB, [5] * 8)
    assert again.num_cached == 7
    assert again.ledger == Ledger(hit=4, partial=3, granularity=1)


def test_partial_reuse_can_be_limited_to_full_blocks_or_switched_off():
    expected = {
        Partial.OFF: Ledger(hit=4, cold=1, granularity=2),
        Partial.BLOCKS: Ledger(hit=4, partial=2, cold=1),
    }
    for partial, ledger in expected.items():
        cache = PrefixCache(32, 4, partial=partial)
        cache.attach(ALICE, CHAT, now=0.0)
        serve(cache, ALICE, [1, 2, 3, 4, 5, 6, 7, 8, 9])
        assert acquire(cache, ALICE, [1, 2, 3, 4, 5, 6, 99]).ledger == ledger


def test_an_evicted_prompt_is_told_from_one_never_seen():
    cache = PrefixCache(4, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    serve(cache, ALICE, [1] * 8)
    serve(cache, ALICE, [2] * 16)
    assert acquire(cache, ALICE, [1] * 9).ledger == Ledger(cold=1, evicted=8)


def test_one_prefix_is_computed_once_and_the_waiter_joins(cache: PrefixCache):
    first = acquire(cache, ALICE, [*SYSTEM, 1])
    waiting = cache.acquire(BOB, CHAT, pack([*SYSTEM, 2]), wait_s=5.0, now=0.0)
    assert isinstance(waiting, Waiting)
    assert (waiting.owner, waiting.num_pending) == (first.lease, 10)
    cache.commit(ALICE, first.lease, 8, now=0.1)
    assert cache.take_outcomes() == []
    cache.commit(ALICE, first.lease, 11, now=0.2)
    [(ticket, grant)] = cache.take_outcomes()
    assert ticket == waiting.ticket
    assert isinstance(grant, Grant)
    assert grant.ledger == Ledger(joined=8, partial=2, cold=1)
    cache.check()


def test_who_does_not_wait_is_told_what_is_pending_and_keeps_its_own_blocks(cache: PrefixCache):
    first = acquire(cache, ALICE, SYSTEM)
    second = acquire(cache, BOB, SYSTEM)
    assert (second.num_cached, second.num_pending) == (0, 9)
    cache.commit(ALICE, first.lease, 10, now=0.0)
    assert cache.commit(BOB, second.lease, 10, now=0.0).num_indexed == 0
    cache.check()
    assert cache.release(BOB, second.lease, now=0.0).num_freed == 3


def test_the_first_waiter_takes_over_when_the_owner_dies(cache: PrefixCache):
    acquire(cache, ALICE, SYSTEM)
    tickets = [
        cache.acquire(BOB, CHAT, pack([*SYSTEM, extra]), wait_s=5.0, now=0.0) for extra in (1, 2)
    ]
    cache.detach(ALICE, now=1.0, gone=False)
    [(ticket, grant)] = cache.take_outcomes()
    assert isinstance(tickets[0], Waiting)
    assert ticket == tickets[0].ticket
    assert isinstance(grant, Grant)
    cache.commit(BOB, grant.lease, 11, now=1.0)
    [(_, second)] = cache.take_outcomes()
    assert isinstance(second, Grant)
    assert second.num_cached == 10
    cache.check()


def test_a_wait_ends_at_its_deadline_with_a_grant_to_compute_oneself(cache: PrefixCache):
    acquire(cache, ALICE, SYSTEM)
    cache.acquire(BOB, CHAT, pack(SYSTEM), wait_s=2.0, now=0.0)
    assert cache.next_deadline() == 2.0
    cache.expire(now=2.1)
    [(_, grant)] = cache.take_outcomes()
    assert isinstance(grant, Grant)
    assert (grant.num_cached, grant.num_pending) == (0, 9)


def test_a_repeated_request_gets_the_same_grant(cache: PrefixCache):
    first = acquire(cache, ALICE, SYSTEM, request_id="r1")
    assert acquire(cache, ALICE, SYSTEM, request_id="r1") == first
    assert acquire(cache, BOB, SYSTEM, request_id="r1").block_table != first.block_table


def test_a_repeated_request_gets_a_lease_that_lives_as_long_as_a_new_one(cache: PrefixCache):
    first = acquire(cache, ALICE, SYSTEM, request_id="r1")
    again = cache.acquire(ALICE, CHAT, pack(SYSTEM), request_id="r1", now=9.0)
    assert again == first
    assert cache.expire(now=18.9).leases == ()
    assert cache.expire(now=19.1).leases == (first.lease,)


def test_reserve_keeps_room_for_the_answer_or_refuses_with_the_arithmetic(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 4, reserve=120)
    assert len(grant.block_table) == 31
    before = cache.snapshot(now=0.0)
    with pytest.raises(
        PoolExhausted, match=r"needs 2 blocks; 1 free, 0 evictable; 31 blocks"
    ) as no:
        acquire(cache, BOB, [2] * 4, reserve=4)
    assert no.value.retry_after_s == 10.0
    assert cache.snapshot(now=0.0) == before
    with pytest.raises(InvalidRequest, match="129 tokens need 33 blocks of 4; the whole pool has"):
        acquire(cache, BOB, [2] * 129)


def test_decoding_extends_the_table_and_publishes_the_answer(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 7)
    cache.commit(ALICE, grant.lease, 7, now=0.0)
    update = cache.extend(ALICE, grant.lease, 9, now=0.0)
    assert (update.keep, len(update.blocks)) == (2, 1)
    cache.commit(ALICE, grant.lease, 9, pack([8, 9]), now=0.0)
    cache.release(ALICE, grant.lease, now=0.0)
    assert acquire(cache, BOB, [*[1] * 7, 8, 9, 5]).num_cached == 9


def test_forks_share_every_block_and_copy_the_last_one_before_they_write(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 6)
    cache.commit(ALICE, grant.lease, 6, now=0.0)
    used = 32 - cache.snapshot(now=0.0).free
    left, right = cache.fork(ALICE, grant.lease, 2, now=0.0)
    assert left.block_table == right.block_table == grant.block_table
    assert 32 - cache.snapshot(now=0.0).free == used
    with pytest.raises(InvalidRequest, match="shared by a fork"):
        cache.commit(ALICE, left.lease, 7, pack([8]), now=0.0)
    update = cache.extend(ALICE, left.lease, 7, now=0.0)
    assert update.keep == 1
    assert update.copies == (Copy(grant.block_table[1], update.blocks[0], 2),)
    cache.commit(ALICE, left.lease, 7, pack([8]), now=0.0)
    cache.check()


def test_truncating_keeps_what_was_committed_for_others_and_never_writes_into_it(
    cache: PrefixCache,
):
    grant = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6, 7, 8])
    cache.commit(ALICE, grant.lease, 8, now=0.0)
    update = cache.truncate(ALICE, grant.lease, 6, now=0.0)
    assert update.keep == 1
    assert update.copies == (Copy(grant.block_table[1], update.blocks[0], 2),)
    cache.commit(ALICE, grant.lease, 8, pack([66, 77]), now=0.0)
    cache.release(ALICE, grant.lease, now=0.0)
    cache.check()
    assert acquire(cache, BOB, [1, 2, 3, 4, 5, 6, 7, 8, 9]).num_cached == 8
    assert acquire(cache, BOB, [1, 2, 3, 4, 5, 6, 66, 77, 9]).num_cached == 8


def test_a_silent_worker_loses_its_leases_and_cannot_commit_when_it_wakes(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 6)
    cache.commit(ALICE, grant.lease, 4, now=0.0)
    ended = cache.expire(now=10.5)
    assert ended.leases == (grant.lease,)
    assert ended.num_quarantined == 1
    with pytest.raises(LeaseExpired, match=r"expired 1\.5 s ago; its 1 unpublished blocks"):
        cache.commit(ALICE, grant.lease, 6, now=12.0)
    assert cache.snapshot(now=12.0).quarantined == 1
    assert cache.worker_gone(ALICE, now=13.0) == 1
    cache.check()


def test_a_sign_of_life_renews_all_leases_of_a_worker(cache: PrefixCache):
    acquire(cache, ALICE, [1] * 6)
    cache.renew(ALICE, now=9.0)
    assert cache.expire(now=15.0).leases == ()
    assert len(cache.expire(now=19.5).leases) == 1


def test_foreign_and_unknown_leases_are_not_found(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 6)
    for call in (cache.release, lambda *a, **k: cache.commit(*a, 6, **k)):
        with pytest.raises(NotFound, match=f"no lease {grant.lease} of worker '2'"):
            call(BOB, grant.lease, now=0.0)
    with pytest.raises(NotFound, match="not attached to other"):
        cache.acquire(ALICE, Namespace("other"), pack([1]), now=0.0)


def test_releasing_twice_is_harmless(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 6)
    assert cache.release(ALICE, grant.lease, now=0.0).num_freed == 2
    assert cache.release(ALICE, grant.lease, now=0.0).num_freed == 0


def test_namespaces_never_share(cache: PrefixCache):
    serve(cache, ALICE, SYSTEM)
    other = Namespace("tiny-model", tenant="somebody")
    cache.attach(BOB, other, now=0.0)
    grant = cache.acquire(BOB, other, pack(SYSTEM), now=0.0)
    assert isinstance(grant, Grant)
    assert grant.num_cached == 0


def test_a_reset_forgets_at_once_and_gets_the_blocks_back_when_leases_end(cache: PrefixCache):
    serve(cache, ALICE, [9] * 4)
    grant = acquire(cache, ALICE, SYSTEM)
    cache.commit(ALICE, grant.lease, 10, now=0.0)
    reset = cache.reset(CHAT)
    assert (reset.num_blocks, reset.num_leased) == (4, 3)
    assert cache.lookup(CHAT, pack(SYSTEM)).num_hit == 0
    cache.release(ALICE, grant.lease, now=0.0)
    assert acquire(cache, ALICE, [3] * 128).num_cached == 0
    cache.check()


def test_explain_names_the_fate_of_each_token_and_the_place_of_parting(cache: PrefixCache):
    serve(cache, ALICE, [*SYSTEM, 1, 1, 1])
    serve(cache, ALICE, [*SYSTEM, 2, 2, 2])
    serve(cache, ALICE, [*SYSTEM, 3, 3, 3])
    told = cache.explain(CHAT, pack([*SYSTEM, 4, 4]), now=0.0)
    assert told.spans == (Span(0, 8, "hit"), Span(8, 10, "partial"), Span(10, 12, "cold"))
    assert told.parted_at == 10
    assert told.stored_next[:4] in {pack([1]), pack([2]), pack([3])}
    assert told.num_parted == 2


@pytest.mark.parametrize(
    ("stored", "asked", "again"),
    [
        # All of what comes behind the parting, no token more than has to be the same.
        ([99, *range(20, 36)], [*range(20, 36)], (0, 16)),
        ([99, *range(20, 36)], [*range(20, 35)], (None, 0)),
        # Its bytes are found a byte too early, inside of a token, and then where they are.
        ([99, *[0] * 20], [5, *[0] * 18], (1, 18)),
        ([*[0] * 3, 1 << 24, *[0] * 20], [5, 6, *[0] * 18], (2, 18)),
    ],
)
def test_explain_tells_where_a_prompt_is_the_same_again_as_what_is_stored(
    cache: PrefixCache, stored: list[int], asked: list[int], again: tuple[int | None, int]
):
    serve(cache, ALICE, [*SYSTEM, *stored])
    told = cache.explain(CHAT, pack([*SYSTEM, *asked]), now=0.0)
    at, same = again
    parted = len(SYSTEM)
    assert (told.resumes_at, told.num_same) == (None if at is None else parted + at, same)


@pytest.mark.parametrize(
    ("tokens", "message"),
    [(b"", "0 bytes"), (b"123", "3 bytes"), (pack([1] * 200), "200 tokens need 50 blocks")],
)
def test_bad_input_is_refused_and_changes_nothing(cache: PrefixCache, tokens: bytes, message: str):
    before = cache.snapshot(now=0.0)
    with pytest.raises(InvalidRequest, match=message):
        cache.acquire(ALICE, CHAT, tokens, now=0.0)
    assert cache.snapshot(now=0.0) == before


@pytest.mark.parametrize(("tokens", "message"), [(b"", "0 bytes"), (b"12345", "5 bytes")])
def test_who_only_asks_is_told_of_bad_input_too(cache: PrefixCache, tokens: bytes, message: str):
    with pytest.raises(InvalidRequest, match=message):
        cache.lookup(CHAT, tokens)
    with pytest.raises(InvalidRequest, match=message):
        cache.explain(CHAT, tokens, now=0.0)


@pytest.mark.parametrize(("blocks", "size"), [(0, 16), (4, 0), (4, 3), (4, 2048)])
def test_impossible_pools_are_refused(blocks: int, size: int):
    with pytest.raises(InvalidRequest):
        PrefixCache(blocks, size)


def test_who_waits_for_the_slower_of_two_gets_what_the_faster_one_lands(cache: PrefixCache):
    computing = {acquire(cache, ALICE, [*SYSTEM, extra]).lease for extra in (1, 2)}
    waiting = cache.acquire(BOB, CHAT, pack([*SYSTEM, 3]), wait_s=5.0, now=0.0)
    assert isinstance(waiting, Waiting)
    [faster] = computing - {waiting.owner}
    cache.commit(ALICE, faster, 11, now=0.1)
    [(_, grant)] = cache.take_outcomes()
    assert isinstance(grant, Grant)
    assert grant.num_cached == 10


def test_a_flight_is_found_however_many_prompts_share_its_beginning(cache: PrefixCache):
    document = list(range(50, 58))
    short = acquire(cache, ALICE, SYSTEM)
    acquire(cache, ALICE, [*SYSTEM, *document, 1])
    cache.commit(ALICE, short.lease, 10, now=0.0)
    waiting = cache.acquire(BOB, CHAT, pack([*SYSTEM, *document, 2]), wait_s=5.0, now=0.0)
    assert isinstance(waiting, Waiting)
    assert waiting.num_pending == len(document)


def test_nobody_waits_for_tokens_that_cannot_be_reused():
    cache = PrefixCache(32, 4, partial=Partial.OFF)
    cache.attach(ALICE, CHAT, now=0.0)
    acquire(cache, ALICE, [1, 2, 3, 4, 5])
    assert isinstance(cache.acquire(ALICE, CHAT, pack([1, 2, 3, 9]), wait_s=5.0, now=0.0), Grant)
    waiting = cache.acquire(ALICE, CHAT, pack([1, 2, 3, 4, 5, 6]), wait_s=5.0, now=0.0)
    assert isinstance(waiting, Waiting)
    assert waiting.num_pending == 4


def test_truncating_never_keeps_room_that_a_fork_still_reads():
    cache = PrefixCache(12, 2, partial=Partial.OFF)
    cache.attach(ALICE, CHAT, now=0.0)
    grant = acquire(cache, ALICE, [2])
    cache.extend(ALICE, grant.lease, 3, now=0.0)
    cache.commit(ALICE, grant.lease, 3, pack([2, 0]), now=0.0)
    [child] = cache.fork(ALICE, grant.lease, 1, now=0.0)
    update = cache.truncate(ALICE, grant.lease, 0, now=0.0)
    assert child.block_table[1] not in update.blocks
    cache.check()


def test_a_clean_goodbye_also_frees_what_was_quarantined_before(cache: PrefixCache):
    acquire(cache, ALICE, [1] * 6)
    cache.expire(now=10.5)
    assert cache.detach(ALICE, now=11.0, gone=True).num_freed == 2
    assert cache.snapshot(now=11.0).free == 32


def test_who_waits_for_tokens_that_are_rolled_back_is_tried_again():
    cache = PrefixCache(16, 1)
    cache.attach(ALICE, CHAT, now=0.0)
    first, second = (acquire(cache, ALICE, tokens) for tokens in ([1], [1, 1]))
    cache.commit(ALICE, first.lease, 1, pack([1, 1]), now=0.0)
    waiting = cache.acquire(ALICE, CHAT, pack([1, 1, 0]), wait_s=8.0, now=0.0)
    assert isinstance(waiting, Waiting)
    cache.truncate(ALICE, second.lease, 1, now=0.0)
    [(ticket, _)] = cache.take_outcomes()
    assert ticket == waiting.ticket


def test_after_a_reset_every_number_says_that_nothing_is_stored(cache: PrefixCache):
    serve(cache, ALICE, [1] * 16)
    held = acquire(cache, ALICE, [2] * 8)
    cache.commit(ALICE, held.lease, 8, now=0.0)
    before = cache.snapshot(now=0.0)
    assert (before.indexed, before.free) == (6, 26)
    cache.reset(CHAT)
    after = cache.snapshot(now=0.0)
    assert (after.indexed, after.evictable) == (0, 0)
    assert (after.free, after.private) == (30, 2)  # what a lease holds is its own, and no more
    counts = cache.counts(now=0.0)
    assert (counts.indexed, counts.evictable, counts.free, counts.private) == (0, 0, 30, 2)
    assert cache.release(ALICE, held.lease, now=0.0).num_freed == 2
    assert cache.snapshot(now=0.0).free == 32
    cache.check()


def test_taking_the_blocks_of_what_was_reset_evicts_nothing():
    cache, kept = PrefixCache(32, 4), Namespace("another-model")
    cache.attach(ALICE, CHAT, now=0.0)
    cache.attach(BOB, kept, now=0.0)
    grant = cache.acquire(BOB, kept, pack([1] * 64), now=0.0)
    assert isinstance(grant, Grant)
    cache.commit(BOB, grant.lease, 64, now=0.0)
    cache.release(BOB, grant.lease, now=0.0)
    held = acquire(cache, ALICE, [2] * 60)
    cache.commit(ALICE, held.lease, 60, now=0.0)
    cache.reset(CHAT)  # while a lease holds its blocks: they come back younger than what is stored
    cache.release(ALICE, held.lease, now=0.0)
    for token in range(3, 6):
        acquire(cache, ALICE, [token] * 20)
    assert cache.snapshot(now=0.0).evicted == 0
    assert cache.counts(now=0.0).eviction_age_s is None
    assert cache.lookup(kept, pack([1] * 64)).num_hit == 60
    cache.check()


def test_what_is_committed_after_a_reset_is_visible_to_nobody(cache: PrefixCache):
    held = acquire(cache, ALICE, [2] * 8)
    assert cache.commit(ALICE, held.lease, 4, now=0.0).num_indexed == 1
    cache.reset(CHAT)
    assert cache.commit(ALICE, held.lease, 8, now=0.0).num_indexed == 0
    assert cache.lookup(CHAT, pack([2] * 8)).num_hit == 0


def test_a_request_that_comes_again_under_its_id_is_no_hit_of_its_own(cache: PrefixCache):
    serve(cache, ALICE, [*SYSTEM, 1])
    prompt = [*SYSTEM, *range(40)]
    first = acquire(cache, BOB, prompt, request_id="q")
    assert first.ledger == Ledger(hit=8, partial=2, cold=40)
    cache.commit(BOB, first.lease, 30, now=0.0)
    cache.release(BOB, first.lease, now=0.0)  # interrupted in mid-prefill
    again = acquire(cache, BOB, prompt, request_id="q")
    assert again.num_cached == 30
    assert again.ledger == Ledger(hit=10, cold=20, resumed=20)
    cache.commit(BOB, again.lease, 50, now=0.0)
    cache.release(BOB, again.lease, now=0.0)
    assert cache.snapshot(now=0.0).requests == 2
    thrice = acquire(cache, BOB, prompt, request_id="q")  # what it had found at first stays a hit
    assert thrice.ledger == Ledger(hit=10, granularity=1, resumed=39)
    other = acquire(cache, ALICE, prompt, request_id="q")  # another worker's id, another request
    assert other.ledger == Ledger(hit=48, partial=1, granularity=1)


def test_another_prompt_under_a_known_id_resumes_nothing(cache: PrefixCache):
    first = acquire(cache, BOB, [7] * 20, request_id="q")
    cache.commit(BOB, first.lease, 12, now=0.0)
    cache.release(BOB, first.lease, now=0.0)
    assert acquire(cache, BOB, [7] * 10, request_id="q").ledger.resumed == 0


def test_a_look_up_without_partial_reuse_promises_none():
    cache = PrefixCache(32, 4, partial=Partial.OFF)
    cache.attach(ALICE, CHAT, now=0.0)
    serve(cache, ALICE, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    told = cache.lookup(CHAT, pack([1, 2, 3, 4, 5, 6, 99]))
    assert (told.num_hit, told.num_partial, told.num_pending) == (4, 0, 0)


def test_rolling_back_to_where_one_is_gives_back_nothing_and_says_the_length(cache: PrefixCache):
    grant = acquire(cache, ALICE, [1] * 6)
    cache.commit(ALICE, grant.lease, 6, now=0.0)
    update = cache.truncate(ALICE, grant.lease, 6, now=0.0)
    assert (update.keep, list(update.blocks)) == (2, [])


def test_a_snapshot_for_one_tenant_or_for_some_namespaces_counts_those_alone():
    cache = PrefixCache(32, 4)
    spaces = [Namespace("a", tenant="x"), Namespace("b", tenant="x"), Namespace("c", tenant="y")]
    for space in spaces:
        cache.attach(ALICE, space, now=0.0)
        grant = cache.acquire(ALICE, space, pack([1] * 5), now=0.0)
        assert isinstance(grant, Grant)
    assert cache.snapshot(now=0.0).num_namespaces == 3
    for told, wanted in (
        (cache.snapshot(now=0.0, tenant="x"), 2),
        (cache.snapshot(now=0.0, sees=lambda space: space.model != "b"), 2),
        (cache.snapshot(now=0.0, tenant="x", sees=lambda space: space.model != "b"), 1),
    ):
        assert told.num_namespaces == len(told.namespaces) == len(told.leases) == wanted
        assert told.ledger == Ledger(cold=5 * wanted)


def test_rolling_back_inside_a_tail_that_forks_share_keeps_it_and_says_the_length(
    cache: PrefixCache,
):
    grant = acquire(cache, ALICE, [1] * 6)
    cache.commit(ALICE, grant.lease, 6, now=0.0)
    [child] = cache.fork(ALICE, grant.lease, 1, now=0.0)
    update = cache.truncate(ALICE, child.lease, 5, now=0.0)
    assert (update.keep, list(update.blocks)) == (2, [])
    cache.check()


def test_of_two_that_wait_under_one_id_with_other_prompts_the_second_is_told(cache: PrefixCache):
    held = acquire(cache, BOB, [9] * 128)
    waiting = [
        cache.acquire(ALICE, CHAT, pack(tokens), wait_s=9.0, request_id="same", now=0.0)
        for tokens in ([1] * 8, [2] * 8)
    ]
    assert all(isinstance(one, Waiting) for one in waiting)
    cache.release(BOB, held.lease, now=1.0)
    cache.expire(now=1.0)
    told = dict(cache.take_outcomes())
    first, second = (told[one.ticket] for one in waiting if isinstance(one, Waiting))
    assert isinstance(first, Grant)
    assert isinstance(second, CacheError)
    cache.check()


def test_rolling_back_inside_a_block_of_ones_own_goes_on_in_that_block():
    cache = PrefixCache(8, 4, partial=Partial.BLOCKS)
    cache.attach(ALICE, CHAT, now=0.0)
    grant = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6, 7])
    cache.commit(ALICE, grant.lease, 7, now=0.0)
    update = cache.truncate(ALICE, grant.lease, 6, now=0.0)
    assert (update.keep, list(update.blocks), update.copies) == (1, [grant.block_table[1]], ())
    assert list(table_of(cache, ALICE, grant.lease, 0.0)) == list(grant.block_table)
    cache.extend(ALICE, grant.lease, 8, now=0.0)
    cache.commit(ALICE, grant.lease, 8, pack([8, 9]), now=0.0)
    told = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6, 8, 9, 0])
    assert list(told.block_table[:2]) == list(grant.block_table)
    cache.check()


def test_a_lease_lives_no_longer_than_its_time_although_its_worker_never_renewed():
    """The clock may begin at 0, and a time may be shorter than a second."""
    cache = PrefixCache(8, 4, ttl_s=0.25)
    cache.attach(ALICE, CHAT, now=0.0)
    acquire(cache, ALICE, [1, 2, 3])
    assert cache.next_deadline() == 0.25
    cache.expire(now=0.25)
    assert cache.num_leases == 1
    cache.expire(now=0.26)
    assert cache.num_leases == 0
    assert cache.count_quarantined(ALICE) == 1


@pytest.mark.parametrize(("num_blocks", "is_copied"), [(2, False), (3, True)])
def test_a_block_is_copied_only_if_there_is_room_for_both(num_blocks: int, is_copied: bool):
    cache = PrefixCache(num_blocks, 4)
    cache.attach(ALICE, CHAT, now=0.0)
    serve(cache, ALICE, [1, 2, 3, 4, *range(50, 50 + 4 * (num_blocks - 1))])
    grant = acquire(cache, ALICE, [1, 2, 9, 9, 9, 9])
    assert len(grant.copies) == is_copied
    assert grant.num_cached == (2 if is_copied else 0)
    cache.check()


def test_who_computed_the_same_and_more_stands_on_the_blocks_of_who_was_first(cache: PrefixCache):
    first, second = (acquire(cache, who, [1, 2, 3, 4, 5, 6, 7, 8]) for who in (ALICE, BOB))
    cache.commit(ALICE, first.lease, 6, now=0.0)
    cache.release(ALICE, first.lease, now=0.0)  # one run: a whole block, and a tail
    cache.check()
    cache.commit(BOB, second.lease, 8, now=0.0)
    cache.check()
    told = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    assert list(told.block_table[:2]) == [first.block_table[0], second.block_table[1]]
    cache.check()


def test_nobody_is_told_to_come_back_when_there_is_nothing_to_wait_for():
    cache = PrefixCache(2, 4, ttl_s=10.0)
    cache.attach(ALICE, CHAT, now=0.0)
    acquire(cache, ALICE, [1] * 8)
    with pytest.raises(PoolExhausted) as full:
        cache.acquire(ALICE, CHAT, pack([2]), now=4.0)
    assert full.value.retry_after_s == 6.0
    assert cache.expire(now=10.5).num_quarantined == 2
    with pytest.raises(PoolExhausted) as full:
        cache.acquire(ALICE, CHAT, pack([2]), now=11.0)
    assert full.value.retry_after_s == 0.0


def test_a_worker_may_ask_for_a_namespace_that_it_is_not_attached_to_if_it_says_so():
    cache = PrefixCache(8, 4)
    me, own, other = WorkerId(1), Namespace("own"), Namespace("other")
    cache.attach(me, own, now=0.0)
    with pytest.raises(NotFound, match="not attached"):
        cache.acquire(me, other, pack([1, 2, 3]), now=0.0)
    grant = cache.acquire(me, other, pack([1, 2, 3, 4, 5]), attached=False, now=0.0)
    cache.commit(me, grant.lease, 5, now=0.0)
    cache.release(me, grant.lease, now=0.0)
    assert cache.lookup(other, pack([1, 2, 3, 4, 9])).num_hit == 4
    assert cache.lookup(own, pack([1, 2, 3, 4, 9])).num_hit == 0
    cache.check()


def test_such_a_namespace_counts_among_those_that_there_may_be():
    cache = PrefixCache(8, 4, max_namespaces=3)
    me, tokens = WorkerId(1), pack([1, 2, 3])
    cache.attach(me, Namespace("own"), now=0.0)
    held = [
        cache.acquire(me, Namespace("m", salt=salt), tokens, attached=False, now=0.0)
        for salt in "ab"
    ]
    with pytest.raises(PoolExhausted, match="3 namespaces are known, --max-namespaces allows no"):
        cache.acquire(me, Namespace("m", salt="c"), tokens, attached=False, now=0.0)
    cache.release(me, held[0].lease, now=0.0)
    cache.acquire(me, Namespace("m", salt="c"), tokens, attached=False, now=0.0)
    cache.check()
