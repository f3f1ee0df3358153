"""What the cache remembers for people: partings, depths of ghosts, recent requests, differences."""

from __future__ import annotations

import random
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache.core import history
from prefixcache.core.cache import PrefixCache
from prefixcache.core.history import WINDOW_S, Divergence
from prefixcache.core.node import Node, Run
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.types import (
    Explanation,
    Grant,
    LeaseId,
    Ledger,
    Namespace,
    Partial,
    WorkerId,
    pack,
)

ME, CHAT = WorkerId(1), Namespace("chat")


def made(num_blocks: int, partial: Partial = Partial.TAILS, **options: int) -> PrefixCache:
    cache = PrefixCache(num_blocks, 4, partial=partial, **options)
    cache.attach(ME, CHAT, now=0.0)
    return cache


def serve(cache: PrefixCache, tokens: list[int], now: float = 0.0, request_id: str = "") -> Grant:
    grant = cache.acquire(ME, CHAT, pack(tokens), now=now, request_id=request_id)
    assert isinstance(grant, Grant)
    cache.commit(ME, grant.lease, len(tokens), now=now)
    cache.release(ME, grant.lease, now=now)
    return grant


# ------------------------------------------------------------------------------------- partings


def test_requests_that_part_at_a_place_are_counted_for_an_hour() -> None:
    cache = made(256)
    for minute in range(90):
        serve(cache, [7] * 10 + [100 + minute] * 4, now=60.0 * minute)
    asked = pack([7] * 10 + [99])
    assert cache.explain(CHAT, asked, now=60.0 * 89).num_parted == 60
    assert cache.explain(CHAT, asked, now=60.0 * 119).num_parted == 30
    assert cache.explain(CHAT, asked, now=60.0 * 300).num_parted == 0


def test_the_hour_goes_by_minute_by_minute() -> None:
    cache = made(256)
    serve(cache, [7] * 10 + [1] * 4, now=0.0)
    for second in (0.0, 59.0, 60.0, 119.0):
        serve(cache, [7] * 10 + [100 + int(second)] * 4, now=second)
    asked = pack([7] * 10 + [99])
    counted = [cache.explain(CHAT, asked, now=now).num_parted for now in (3599, 3600, 3660)]
    assert counted == [4, 2, 0]


@given(
    steps=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 900)), max_size=60),
    later=st.integers(0, 5000),
)
def test_the_window_counts_what_a_list_of_all_partings_does(
    steps: list[tuple[int, int]], later: int
) -> None:
    partings, node, now, seen = Divergence(1 << 20), Run(b"", [], None, 0), 0, []  # type: ignore[arg-type]
    for into, wait in steps:
        now += wait
        partings.note(node, into, float(now))
        seen.append((into, now // 60))
    now += later
    for into in range(4):
        kept = [at for one, at in seen if one == into and now // 60 - at < WINDOW_S // 60]
        assert partings.at(node, into, float(now)) == len(kept)


def test_places_are_bounded_in_a_minute_and_at_a_node() -> None:
    partings = Divergence(1 << 20)
    nodes = [Run(b"", [], None, 0) for _ in range(1200)]  # type: ignore[arg-type]
    for node in nodes:
        partings.note(node, 1, 0.0)
    assert sum(partings.at(node, 1, 0.0) for node in nodes) == 1024
    for minute in range(40):
        for into in range(20):
            partings.note(nodes[0], 100 * minute + into, 4000.0 * minute)
    assert len(nodes[0].divergence or ()) <= 32 + 20


def test_places_are_bounded_in_bytes_by_dropping_the_oldest_minutes() -> None:
    partings = Divergence(max_bytes=100_000)
    nodes = [Run(b"", [], None, 0) for _ in range(3000)]  # type: ignore[arg-type]
    for number, node in enumerate(nodes):
        partings.note(node, 1, float(number))
        assert partings.num_bytes <= 100_000
    kept = [partings.at(node, 1, 3000.0) for node in nodes]
    assert kept == sorted(kept)
    assert 100 < sum(kept) < 500


def test_a_parting_stays_where_it_is_when_its_run_is_cut_by_eviction() -> None:
    cache = made(8)
    for last in (1, 2):
        serve(cache, [7] * 8 + [last] * 4)
    serve(cache, [9] * 24)  # evicts the ends, then a part of what was shared
    told = cache.explain(CHAT, pack([7] * 4 + [5] * 4), now=0.0)
    assert told.num_parted == 0
    cache.check()


# ------------------------------------------------------------------------------- depth of ghosts


def test_so_many_blocks_more_would_have_kept_what_was_evicted() -> None:
    cache = made(8)
    serve(cache, [1] * 16)
    serve(cache, [2] * 16)
    serve(cache, [3] * 16)  # evicts the 4 blocks of the first prompt
    told = cache.explain(CHAT, pack([1] * 16 + [0]), now=0.0)
    assert (told.ledger.evicted, told.extra_blocks) == (16, 4)
    larger = made(8 + 4)
    for prompt in ([1] * 16, [2] * 16, [3] * 16):
        serve(larger, prompt)
    assert larger.explain(CHAT, pack([1] * 16 + [0]), now=0.0).ledger.evicted == 0


@settings(max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    num_blocks=st.integers(6, 24),
    partial=st.sampled_from([Partial.OFF, Partial.BLOCKS]),
)
def test_with_the_memory_that_shortage_names_nothing_remembered_is_evicted(
    seed: int, num_blocks: int, partial: Partial
) -> None:
    """The forecast, held against a pool of that size: it is exact for whole blocks and LRU."""
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(3)] * 4 * draw.randrange(1, 3) + [10 + draw.randrange(6)] * 4
        for _ in range(30)
    ]
    small = made(num_blocks, partial, num_ghosts=1000)
    for prompt in prompts:
        serve(small, prompt)
    told = small.snapshot(now=0.0)
    assert sum(tokens for _, tokens in told.shortage) == told.ledger.evicted
    extra = max((blocks for blocks, tokens in told.shortage if tokens), default=0)
    large = made(num_blocks + extra + 1, partial, num_ghosts=1000)
    for prompt in prompts:
        serve(large, prompt)
    assert large.snapshot(now=0.0).ledger.evicted == 0
    assert large.snapshot(now=0.0).ledger.cold == told.ledger.cold


@settings(max_examples=60)
@given(seed=st.integers(0, 10_000), num_blocks=st.integers(6, 24))
def test_a_miss_names_exactly_the_blocks_that_would_have_made_it_a_hit(
    seed: int, num_blocks: int
) -> None:
    """Held from both sides against pools of that size and of one block less.

    Each prompt ends in a token that no block is full of: every request takes one block for it, and
    the others are an LRU.
    """
    draw = random.Random(seed)
    prompts = [
        [draw.randrange(3)] * 4 * draw.randrange(1, 3) + [10 + draw.randrange(6)] * 4
        for _ in range(30)
    ]
    asked = pack([*draw.choice(prompts), 0])

    def explained(size: int) -> Explanation:
        cache = made(size, Partial.OFF, num_ghosts=1000)
        for prompt in prompts:
            serve(cache, [*prompt, 0])
        return cache.explain(CHAT, asked, now=0.0)

    told = explained(num_blocks)
    if told.extra_blocks is None:
        assert told.ledger.evicted == 0
        return
    assert explained(num_blocks + told.extra_blocks).ledger.evicted == 0
    assert explained(num_blocks + told.extra_blocks - 1).ledger.evicted > 0


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), num_blocks=st.integers(4, 16), limit=st.integers(0, 40))
def test_ghosts_are_counted_by_when_they_were_buried(
    seed: int, num_blocks: int, limit: int
) -> None:
    draw = random.Random(seed)
    cache = made(num_blocks, num_ghosts=limit)
    for _ in range(30):
        serve(cache, [draw.randrange(3) for _ in range(draw.randrange(1, 4 * num_blocks))])
    ghosts = cache._lessor.tree.ghosts
    assert ghosts.depth(0) == ghosts.num_blocks <= limit
    assert all(count > 0 for count in ghosts._living.values())


# ------------------------------------------------------------------------------- recent requests


def may_see_all(namespace: Namespace) -> bool:
    return True


def test_a_request_is_explained_after_the_fact_as_it_was_then() -> None:
    cache = made(256)
    serve(cache, [7] * 10 + [1] * 20, now=1.0, request_id="first/0")
    serve(cache, [7] * 10 + [2] * 20, now=2.0, request_id="second/0")
    for name in ("second/0", "second", "1#2"):
        told = cache.explain_request(name, may_see_all, now=5.0)
        assert (told.ledger.reused, told.ledger.cold) == (10, 20)
        assert told.parted_at == 10
        assert told.stored_next[:4] == pack([1])
        assert told.past is not None
        assert (told.past.request_id, told.past.age_s) == ("second/0", 3.0)
        assert told.past.tokens == pack([7] * 10 + [2] * 20)
    assert cache.explain(CHAT, pack([7] * 10 + [2] * 20), now=5.0).ledger.reused == 29
    with pytest.raises(NotFound, match="second"):
        cache.explain_request("second", lambda namespace: False, now=5.0)
    with pytest.raises(NotFound, match="sec"):
        cache.explain_request("sec", may_see_all, now=5.0)


def test_what_lacked_memory_is_told_after_the_fact_too() -> None:
    cache = made(8)
    for prompt in ([1] * 16, [2] * 16, [3] * 16):
        serve(cache, prompt)
    serve(cache, [1] * 17, request_id="late")
    told = cache.explain_request("late", may_see_all, now=0.0)
    assert (told.ledger.evicted, told.extra_blocks) == (16, 4)


def test_a_reset_forgets_recent_requests() -> None:
    cache = made(64)
    serve(cache, [1] * 8, request_id="secret")
    cache.reset(CHAT)
    with pytest.raises(NotFound):
        cache.explain_request("secret", may_see_all, now=0.0)


def test_over_the_budget_the_oldest_lose_their_prompts_then_they_go() -> None:
    cache = made(1024, history_bytes=64_000)
    for number in range(200):
        serve(cache, [1] * 300, request_id=f"r{number}")
    log = cache._lessor.history.request_log
    kept = list(log)
    assert len(kept) < 200
    whole = [bool(prompt) for _, prompt in kept]
    assert whole == sorted(whole, reverse=True)
    assert 10 < sum(whole) < len(kept)
    newest = cache.explain_request("r199", may_see_all, now=0.0)
    oldest = cache.explain_request(kept[-1][0].request_id, may_see_all, now=0.0)
    assert newest.past is not None
    assert oldest.past is not None
    assert newest.past.tokens == pack([1] * 300)
    assert (oldest.past.tokens, oldest.past.num_tokens, oldest.ledger.total) == (b"", 300, 300)
    with pytest.raises(NotFound, match=f"last {len(kept)} are remembered"):
        cache.explain_request("r0", may_see_all, now=0.0)


def test_requests_are_bounded_in_number_too() -> None:
    cache = made(64, history_bytes=1 << 30)
    for number in range(history._MOST_REQUESTS + 10):
        serve(cache, [1] * 10, request_id=f"r{number}")
    assert len(cache._lessor.history.request_log) == history._MOST_REQUESTS


def test_over_its_budget_a_log_lets_go_of_an_eighth_and_of_no_more() -> None:
    log = history.RequestLog(max_bytes=80_000)
    record = history.GrantRecord("", "w", LeaseId(1), CHAT, Ledger(), 0.0, None, b"", None, 600)
    sizes = []
    for _ in range(500):
        log.add(record, bytes(2000))
        sizes.append(log.num_bytes)
    assert max(sizes) > 77_000
    assert max(sizes) <= 80_000
    assert 70_000 - 2600 < min(sizes[40:]) <= 70_000  # and not one by one


def test_a_history_of_nothing_remembers_nothing_and_decides_nothing() -> None:
    none, usual = made(64, history_bytes=0), made(64)
    for cache in (none, usual):
        for number in range(20):
            serve(cache, [7] * 10 + [number] * 20, now=float(number), request_id=f"r{number}")
    assert none.snapshot(now=0.0).ledger == usual.snapshot(now=0.0).ledger
    assert none._lessor.history.num_bytes <= 4096
    assert none.explain(CHAT, pack([7] * 10 + [99]), now=20.0).num_parted == 0
    with pytest.raises(NotFound, match="last 0 are remembered"):
        none.explain_request("r19", may_see_all, now=0.0)
    with pytest.raises(InvalidRequest, match="-1 bytes"):
        made(64, history_bytes=-1)


@settings(max_examples=30)
@given(
    budget=st.integers(0, 200_000),
    steps=st.lists(
        st.tuples(st.integers(1, 2000), st.integers(0, 400), st.integers(0, 600)), max_size=60
    ),
)
def test_what_is_remembered_stays_within_its_budget_whatever_is_asked(
    budget: int, steps: list[tuple[int, int, int]]
) -> None:
    cache, now = made(4096, history_bytes=budget), 0.0
    for number, (size, wait, name) in enumerate(steps):
        now += wait
        space = Namespace("chat", salt="s" * name)
        cache.attach(ME, space, now=now)
        prompt = pack([7] * (size // 2) + [number] * (size - size // 2))
        grant = cache.acquire(ME, space, prompt, now=now, request_id="r" * name)
        assert isinstance(grant, Grant)
        cache.release(ME, grant.lease, now=now)
        kept, log = cache._lessor.history, cache._lessor.history.request_log
        assert kept.num_bytes <= max(budget, 8192)
        records, prompts = [one for one, _ in log], [prompt for _, prompt in log]
        assert log.record_bytes == sum(one.num_bytes for one in records)
        assert log.prompt_bytes == sum(map(len, prompts))
        assert all(one.num_bytes > len(one.request_id + one.namespace.salt) for one in records)
        if number % 7 == 6:
            cache.reset(space)
            assert all(one.namespace != space for one, _ in log)
            assert log.num_bytes == sum(one.num_bytes + len(text) for one, text in log)


# ----------------------------------------------------------------------------------- differences


@pytest.mark.parametrize("longer", [0, 3])
def test_where_a_prompt_is_the_same_again_behind_a_difference(longer: int) -> None:
    cache = made(256)
    rest = list(range(200, 260))
    serve(cache, [7] * 10 + [1, 2, 3] + rest)
    told = cache.explain(CHAT, pack([7] * 10 + [4, 5, 6] + [8] * longer + rest), now=0.0)
    assert (told.parted_at, told.resumes_at, told.num_same) == (10, 13 + longer, 60)


def test_what_is_missing_in_the_middle_is_found_too() -> None:
    cache = made(256)
    serve(cache, list(range(100)))
    told = cache.explain(CHAT, pack([*range(40), *range(50, 100)]), now=0.0)
    assert (told.parted_at, told.resumes_at, told.num_same) == (40, 40, 50)


@pytest.mark.parametrize("seed", range(20))
def test_where_a_prompt_goes_on_as_the_stored_one_is_where_a_walk_over_all_pairs_finds_it(
    seed: int,
) -> None:
    """Something is left out, put in or exchanged: what follows is the same, token by token."""
    draw, cache = random.Random(seed), made(4096)
    shared = [7] * draw.randrange(1, 20)
    ours, theirs = ([500 + who] * draw.choice([0, 1, 2, 7, 40]) for who in (1, 2))
    size = draw.choice([24, 40, 300])
    same = [1000 + at for at in range(size)]
    ours_end, theirs_end = ([600 + who] * draw.choice([0, 3, 50]) for who in (1, 2))
    if not (ours or theirs):
        ours = [501]
    stored = [*shared, *theirs, *same, *theirs_end]
    asked = [*shared, *ours, *same, *ours_end]
    serve(cache, stored)
    told = cache.explain(CHAT, pack(asked), now=0.0)
    assert told.parted_at == len(shared)
    assert told.resumes_at == len(shared) + len(ours)
    assert told.num_same == size
    again = serve(cache, asked, request_id="again")
    assert again.ledger.reused == len(shared)
    assert recounted(cache, "again")[:2] == (told.parted_at, told.resumes_at)


def recounted(cache: PrefixCache, name: str) -> tuple[int | None, int | None, int]:
    told = cache.explain_request(name, may_see_all, now=0.0)
    return told.parted_at, told.resumes_at, told.num_parted


def test_after_the_fact_it_counts_who_else_parted_there() -> None:
    cache = made(256)
    serve(cache, [*range(20), *range(500, 540)])
    for number in range(3):
        serve(cache, [*range(20), *range(600 + 100 * number, 640 + 100 * number)], request_id="r")
    assert recounted(cache, "r") == (20, None, 3)


@pytest.mark.parametrize(("num_same", "resumes"), [(15, False), (16, True)])
def test_fewer_than_sixteen_tokens_in_a_row_are_the_same_by_chance(
    num_same: int, resumes: bool
) -> None:
    cache = made(256)
    same = list(range(800, 800 + num_same))
    serve(cache, [*range(20), 500, *same, 501])
    told = cache.explain(CHAT, pack([*range(20), 600, *same, 601]), now=0.0)
    assert (told.resumes_at, told.num_same) == ((21, 16) if resumes else (None, 0))


@pytest.mark.parametrize("skip", [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 512])
def test_it_is_looked_for_behind_so_many_other_tokens(skip: int) -> None:
    cache, same = made(1024), list(range(800, 816))
    serve(cache, [*range(20), *same, 500])
    told = cache.explain(CHAT, pack([*range(20), *[600] * skip, *same, 601]), now=0.0)
    assert (told.resumes_at, told.num_same) == (20 + skip, 16)


def test_readings_of_the_clock_are_bounded_and_the_last_ones_stay() -> None:
    clock = history.IdleClock(max_bytes=0)
    for second in range(5000):
        clock.note(second, float(second))
        assert clock.num_bytes <= 16 * 512
    assert clock.idle_s(4990, now=5000.0) == 10.0
    assert clock.idle_s(10, now=5000.0) is None


def test_readings_of_the_clock_are_taken_a_second_after_the_last_one_and_not_earlier() -> None:
    clock = history.IdleClock(max_bytes=0)
    for stamp, now, taken in ((1, 5.0, 1), (2, 5.5, 1), (3, 6.0, 2), (4, 6.75, 2), (5, 7.0, 3)):
        clock.note(stamp, now)
        assert clock.num_bytes == 16 * taken
    assert [clock.idle_s(stamp, now=10.0) for stamp in (1, 2, 3, 4, 5)] == [5.0, 4.0, 4.0, 3.0, 3.0]
    assert clock.idle_s(6, now=10.0) == 3.0  # at most a second younger than the last reading


def test_what_happened_before_the_first_reading_is_told_until_readings_are_dropped() -> None:
    clock = history.IdleClock(max_bytes=0)
    assert clock.idle_s(1, now=1.0) is None
    for second in range(10, 266):
        clock.note(second, float(second))
    assert clock.idle_s(3, now=300.0) == 290.0
    clock.note(266, 266.0)
    assert clock.idle_s(3, now=300.0) is None
    assert clock.idle_s(10, now=300.0) == 290.0


def test_a_request_that_computed_nothing_yet_is_not_remembered_as_begun() -> None:
    cache = made(64)
    for number, size in enumerate((0, 5, 8)):
        grant = cache.acquire(ME, CHAT, pack([number] * 8), now=0.0, request_id=f"r{number}")
        assert isinstance(grant, Grant)
        cache.commit(ME, grant.lease, size, now=0.0)
        cache.release(ME, grant.lease, now=0.0)
    assert set(cache._lessor.leases.workers[ME].begun) == {"r1", "r2"}


def test_deadlines_of_leases_that_ended_are_forgotten() -> None:
    cache = made(64)
    for number in range(9000):
        grant = cache.acquire(ME, CHAT, pack([number % 3]), now=0.0)
        assert isinstance(grant, Grant)
        cache.release(ME, grant.lease, now=0.0)
    assert len(cache._lessor.leases._deadlines) <= 4096 + 3


def test_what_would_have_needed_more_than_any_step_is_counted_in_the_last_one() -> None:
    depths = history.MissDepths(10)
    depths.note(10**9, 7)
    assert depths.steps()[-1] == (320, 7)


def test_different_prompts_are_not_the_same_again() -> None:
    cache = made(256)
    serve(cache, [*range(20), *range(500, 560)])
    told = cache.explain(CHAT, pack([*range(20), *range(600, 660)]), now=0.0)
    assert (told.parted_at, told.resumes_at, told.num_same) == (20, None, 0)


def test_a_namespace_that_has_more_is_named_but_never_behind_another_salt() -> None:
    cache = made(256)
    spaces = (
        Namespace("chat", adapter="tuned"),
        Namespace("chat", salt="s3cret"),
        Namespace("chat", tenant="other"),
    )
    for space in spaces:
        cache.attach(ME, space, now=0.0)
        grant = cache.acquire(ME, space, pack(range(40)), now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(ME, grant.lease, 40, now=0.0)
    told = cache.explain(CHAT, pack(range(40)), now=0.0)
    assert told.elsewhere == ((spaces[0], 39),)
    assert cache.explain(spaces[1], pack(range(41)), now=0.0).elsewhere == ()


def test_what_another_lease_computes_now_is_told() -> None:
    cache = made(256)
    grant = cache.acquire(ME, CHAT, pack(range(40)), now=0.0)
    assert isinstance(grant, Grant)
    told = cache.explain(CHAT, pack(range(50)), now=0.0)
    assert (told.num_pending, told.ledger.cold) == (40, 50)
    assert cache.lookup(CHAT, pack(range(50))).num_pending == 40
    assert cache.lookup(CHAT, pack(range(1, 50))).num_pending == 0


def test_the_index_tells_what_it_takes_and_the_history_beside_it() -> None:
    cache, draw = made(4096), random.Random(1)
    empty = cache.snapshot(now=0.0)
    for number in range(100):
        serve(cache, [7] * 100 + [draw.randrange(9**9) for _ in range(8)], request_id=f"r{number}")
    told = cache.snapshot(now=0.0)
    nodes = below(cache._lessor.roots[CHAT])
    measured = sum(
        sys.getsizeof(one)
        + sys.getsizeof(one.tokens)
        + sys.getsizeof(one.blocks)
        + (0 if one.several is None else sys.getsizeof(one.several))
        for one in nodes
    )
    assert empty.index_bytes == empty.history_bytes == 0
    assert measured < told.index_bytes < 2.5 * measured
    assert 100 * 108 * 4 < told.history_bytes <= told.max_history_bytes == 1 << 20


def below(node: Node) -> list[Node]:
    children = list(node.children)
    return children + [one for child in children for one in below(child)]


def test_a_prompt_that_parted_nowhere_is_the_same_again_nowhere() -> None:
    cache = made(256)
    serve(cache, list(range(20)), request_id="only")
    told = cache.explain_request("only", may_see_all, now=1.0)
    assert (told.parted_at, told.resumes_at, told.num_same, told.num_parted) == (None, None, 0, 0)
    assert told.elsewhere == ()
    told = cache.explain(Namespace("unknown"), pack(range(20)), now=1.0)
    assert (told.parted_at, told.resumes_at, told.num_same, told.num_parted) == (None, None, 0, 0)
    assert (told.ledger.cold, told.ledger.reused, told.extra_blocks) == (20, 0, None)


def test_a_namespace_that_has_one_token_more_has_more() -> None:
    cache = made(256)
    serve(cache, [5])
    assert cache.explain(Namespace("new"), pack([5, 6]), now=0.0).elsewhere == ((CHAT, 1),)
    assert cache.explain(Namespace("new"), pack([6, 5]), now=0.0).elsewhere == ()
    assert cache.explain(CHAT, pack([5, 6]), now=0.0).elsewhere == ()


def test_tokens_are_the_same_again_where_tokens_begin_and_not_in_between() -> None:
    """The bytes of one token and the next can hold those of a third, askew."""
    cache, same = made(256), [0x01010101] * 16 + list(range(500, 530))
    serve(cache, [7] * 8 + [0x01010100, *same])
    told = cache.explain(CHAT, pack([7] * 8 + [9, *same]), now=0.0)
    assert (told.parted_at, told.resumes_at, told.num_same) == (8, 9, 46)


def test_missing_memory_is_told_in_sixteenths_of_the_pool_and_then_in_larger_steps() -> None:
    steps = [size for size, _ in made(16).snapshot(now=0.0).shortage]
    assert steps == [*range(1, 17), 20, 24, 32, 48, 64, 96, 128, 192, 256, 512]


def test_an_outline_tells_where_most_requests_parted_and_how_many() -> None:
    cache = made(256)
    for last in ([1] * 8, [2] * 8, [7, 7, 3, 3, 3, 3, 3, 3], [7, 4, 4, 4, 4, 4, 4, 4]):
        serve(cache, [7] * 8 + last)
    walk = cache.outline(now=0.0)
    while True:
        try:
            next(walk)
        except StopIteration as end:
            [part] = end.value.namespaces
            break
    told = [(one.parted_at, one.num_parted) for one in part.branches if one.num_tokens == 8]
    assert told[0][0] == 8
    assert told[0][1] == cache.explain(CHAT, pack([7] * 8 + [9]), now=0.0).num_parted > 0
    assert set(told[1:]) == {(None, 0)}
