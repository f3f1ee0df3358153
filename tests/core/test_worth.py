"""Fetch or compute: the arithmetic by examples, and whole loads beside tiers of any speed."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.core.worth import Rate, Speed, Worth
from prefixcache.types import Grant, Namespace, Waiting, WorkerId, pack

SPACE, ME = Namespace("m"), WorkerId(1)


# ---------------------------------------------------------------------- what is learnt


def test_computing_is_known_by_the_quicker_leases() -> None:
    rate = Rate()
    for seconds in (1.0, 1.0, 1.0, 1.0, 500.0, 500.0, 500.0, 500.0):
        rate.note(1000, seconds)
    assert rate.compute_s(1000) == pytest.approx(1.0), "half of them were idle"


def test_a_prompt_of_few_tokens_tells_nothing() -> None:
    rate = Rate()
    rate.note(63, 1000.0)
    assert rate.compute_s(63) is None
    rate.note(64, 1.0)
    assert rate.compute_s(128) == 2.0


def test_long_prompts_are_known_by_long_ones() -> None:
    rate = Rate()
    rate.note(100, 1.0)
    rate.note(4000, 80.0)
    assert rate.compute_s(200) == pytest.approx(2.0)
    assert rate.compute_s(5000) == pytest.approx(100.0)
    rate.note(1000, 15.0)
    assert rate.compute_s(1000) == pytest.approx(15.0)


def test_who_becomes_quicker_or_slower_is_known_anew() -> None:
    rate = Rate()
    for seconds in [1.0] * 20 + [4.0] * 16:
        rate.note(1000, seconds)
    assert rate.compute_s(1000) == pytest.approx(4.0)


def test_no_number_that_a_client_can_cause_breaks_anything() -> None:
    rate = Rate()
    rate.note(2**31, 0.0)
    rate.note(64, -5.0)
    rate.note(64, 1e300)
    assert rate.compute_s(2**31) == 0.0
    assert rate.compute_s(64) == 0.0


def test_a_tier_is_known_by_its_last_hauls_all_blocks_together() -> None:
    speed = Speed(1.0)
    assert not speed.is_known
    speed.note(16, 0.16)
    speed.note(1, 0.18)
    assert speed.block_s == pytest.approx(0.02)
    for _ in range(8):
        speed.note(10, 1.0)
    assert speed.block_s == pytest.approx(0.1)


def test_what_is_explored_counts_alone_if_it_is_much_quicker_than_thought() -> None:
    speed = Speed(1.0)
    speed.note(16, 16.0)
    speed.note_explored(16, 9.0)
    assert speed.block_s == pytest.approx(25 / 32)
    speed.note_explored(4, 0.04)
    assert speed.block_s == pytest.approx(0.01)


def test_what_is_late_counts_if_it_is_slower_than_thought() -> None:
    speed = Speed(1.0)
    speed.note(16, 0.16)
    speed.note_late(16, 0.1)
    assert speed.block_s == pytest.approx(0.01)
    speed.note_late(16, 16.0)
    assert speed.block_s == pytest.approx(1.0)
    speed.note(16, 0.0)
    assert speed.block_s == pytest.approx(0.5), "and so does what comes then"


def test_fetching_is_worth_it_below_four_fifths_of_computing() -> None:
    worth, rate = Worth(1, block_size=16), Rate()
    worth.speeds[0].note(10, 0.1)
    worth.speeds[0].note_restore(0.02)
    rate.note(160, 1.0)
    verdict = worth.weigh(0, 10, [0], rate)
    assert verdict.fetch_s == pytest.approx(0.12)
    assert verdict.compute_s == pytest.approx(1.0)
    assert verdict.is_worth
    assert worth.weigh(0, 10, [67], rate).is_worth
    assert not worth.weigh(0, 10, [69], rate).is_worth, "of what is queued before it"


def test_who_knows_nothing_fetches() -> None:
    worth, rate = Worth(1, block_size=16), Rate()
    assert worth.weigh(0, 1000, [1000], None).is_worth
    assert worth.weigh(0, 1000, [1000], rate).is_worth
    rate.note(1000, 1e-6)
    assert worth.weigh(0, 1000, [1000], rate).is_worth, "nothing is known of the tier"
    worth.speeds[0].note(1, 1.0)
    assert not worth.weigh(0, 1000, [1000], rate).is_worth
    assert worth.weigh(0, 1000, [1000], None).is_worth, "nothing is known of the namespace"


def test_of_what_nobody_knows_yet_each_tier_is_as_much_slower_as_it_lies_deeper() -> None:
    worth = Worth(3, 16)
    guessed = [worth.weigh(tier, 10, [0, 0, 0], None).fetch_s for tier in range(3)]
    assert guessed == pytest.approx([0.05, 0.1, 0.15])


def test_what_is_declined_is_looked_at_soon_and_then_more_and_more_rarely() -> None:
    speed, times = Speed(1.0), [float(at) for at in range(256)]
    assert explored(speed, times) == [0, 2, 6, 14, 30, 62, 126, 190, 254], "one of 64 in the end"
    speed.trust()
    assert explored(speed, [1000 + at for at in times[:8]]) == [0, 2, 6]
    assert explored(Speed(1.0), [at / 1024 for at in range(4400)]) == [
        *(0, 1024, 2048, 3072, 4096)
    ], "at most one a second"


def test_one_restore_that_took_long_says_nothing_of_the_next() -> None:
    speed = Speed(1.0)
    for latency_s in (0.01, 2.0, 0.03, 2.0):
        speed.note_restore(latency_s)
    assert speed.latency_s == 0.03
    for _ in range(5):
        speed.note_restore(2.0)
    assert speed.latency_s == 2.0


def explored(speed: Speed, times: list[float]) -> list[int]:
    """Which of some requests, which are all declined, are looked at."""
    found = []
    for number, now in enumerate(times):
        if speed.decline(now):
            speed.explore(now)
            found.append(number)
    return found


def test_nothing_is_kept_free_while_nothing_pays_and_again_once_it_does() -> None:
    worth = Worth(1, block_size=16)
    for why in ["slow"] * 63 + ["busy", "room"]:
        worth.decline(why)
    assert worth.pays
    worth.decline("slow")
    assert not worth.pays
    worth.num_requests += 1023
    assert not worth.pays
    worth.num_requests += 1
    assert worth.pays, "it is tried again"
    for _ in range(64):
        worth.decline("slow")
    assert not worth.pays
    worth.fetch()
    assert worth.pays


def test_the_advantage_is_of_late() -> None:
    speed = Speed(1.0)
    assert speed.advantage is None
    speed.note_gain(0.1, 1.0)
    assert speed.advantage == pytest.approx(10.0)
    for _ in range(200):
        speed.note_gain(0.1, 0.2)
    assert speed.advantage == pytest.approx(2.0, rel=0.01)


# ---------------------------------------------------------------------- whole loads


class Engine:
    """One request after the other, on a virtual clock, with a tier of any speed, or with none.

    Args:
        host: Slots below the pool.
        block_s: Seconds that the tier takes for a block, at some time.
        token_s: Seconds that computing a token takes.
    """

    SIZE, PIECE, AHEAD = 16, 16, 64

    def __init__(self, host: int, block_s: Callable[[float], float], token_s: float) -> None:
        tiers = TierSizes(host, self.AHEAD, self.PIECE) if host else TierSizes()
        self.cache = PrefixCache(512, self.SIZE, tiers=tiers, ttl_s=1e9)
        self.cache.attach(ME, SPACE, now=0.0)
        self.cache.set_porter(is_there=True, now=0.0)
        self.block_s, self.token_s = block_s, token_s
        self.down_s = token_s / 10
        self.now = self.begun = self.ends = 0.0
        self.in_hand: Haul | None = None
        self.up: list[Haul] = []
        self.down: list[Haul] = []
        self.waits: list[float] = []
        """Seconds to the first token, of each request."""

    def step(self, until: float) -> None:
        """Let time go on, to what comes first: the end of a haul, of a wait, or some time."""
        for haul in self.cache.hauls(now=self.now):
            (self.up if haul.is_up else self.down).append(haul)
        if self.in_hand is None and (queue := self.up or self.down):
            haul = queue.pop(0)
            took = len(haul.slots) * (self.block_s(self.now) if haul.is_up else self.down_s)
            self.in_hand, self.begun, self.ends = haul, self.now, self.now + took
        due = self.cache.next_deadline()
        at = until if due is None else min(until, due + 1e-6)
        if self.in_hand is not None and self.ends <= at:
            haul, self.in_hand, self.now = self.in_hand, None, max(self.now, self.ends)
            took = self.ends - self.begun
            self.cache.hauled(haul.id, len(haul.slots), took, now=self.now)
            return
        self.now = max(self.now, at)
        self.cache.expire(now=self.now)

    def ask(self, tokens: list[int]) -> Grant:
        """Serve a request; note how long its first token took."""
        began = self.now
        answer = self.cache.acquire(ME, SPACE, pack([*tokens, 0]), wait_s=1e6, now=began)
        while isinstance(answer, Waiting):
            self.step(began + 1e6)
            for _, one in self.cache.take_outcomes():
                answer = one  # type: ignore[assignment]
        assert isinstance(answer, Grant)
        computed = len(tokens) + 1 - answer.num_cached
        end = self.now + computed * self.token_s
        while self.now < end:
            self.step(end)
        self.waits.append(self.now - began)
        self.cache.commit(ME, answer.lease, len(tokens) + 1, now=self.now)
        self.cache.release(ME, answer.lease, now=self.now)
        return answer

    def idle(self, seconds: float) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step(end)

    @property
    def counts(self):  # type: ignore[no-untyped-def]
        return self.cache.counts(now=self.now)


def chats(number: int, seed: int, longest: int = 64) -> list[list[int]]:
    """Prompts of up to so many blocks, of some dozen chats that come back at random."""
    random_ = random.Random(seed)
    lengths = [16 * random_.randint(8, longest) for _ in range(30)]
    order = [random_.randrange(30) for _ in range(number)]
    return [[chat * 10_000 + at for at in range(lengths[chat])] for chat in order]


def p99(waits: list[float]) -> float:
    return sorted(waits)[int(0.99 * len(waits))]


TOKEN_S = 0.001
COMPUTED = 16 * TOKEN_S
"""A block."""


def load(engine: Engine, number: int, seed: int) -> Engine:
    for tokens in chats(number, seed):
        engine.ask(tokens)
        engine.idle(0.02)
    engine.cache.check()
    return engine


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 1 << 20), slow=st.floats(1.0, 12.0))
def test_a_slow_tier_makes_nobody_slower(seed: int, slow: float) -> None:
    without = load(Engine(0, lambda _: 0.0, TOKEN_S), 1000, seed)
    beside = load(Engine(2000, lambda _: slow * COMPUTED, TOKEN_S), 1000, seed)
    assert p99(beside.waits) <= 1.05 * p99(without.waits)
    assert sum(beside.waits) <= 1.05 * sum(without.waits)
    assert beside.counts.declined_slow > 100


@settings(max_examples=4, deadline=None, phases=[Phase.generate])
@given(seed=st.integers(0, 1 << 20), part=st.floats(0.001, 0.3))
def test_a_quick_tier_is_used(seed: int, part: float) -> None:
    without = load(Engine(0, lambda _: 0.0, TOKEN_S), 200, seed)
    beside = load(Engine(2000, lambda _: part * COMPUTED, TOKEN_S), 200, seed)
    assert beside.counts.declined_slow == 0
    assert sum(beside.waits) < (0.4 + part) * sum(without.waits)
    assert beside.counts.host_advantage == pytest.approx(1 / part, rel=0.5)


def test_a_tier_that_was_slow_is_found_again() -> None:
    now_slow = [False]
    engine = Engine(2000, lambda _: COMPUTED * (10 if now_slow[0] else 0.02), TOKEN_S)
    for tokens in chats(100, 1):
        engine.ask(tokens)
    assert engine.counts.declined_slow == 0
    now_slow[0] = True
    prompts = iter(chats(4000, 2))
    for _ in range(300):
        engine.ask(next(prompts))
    assert engine.counts.declined_slow > 64
    now_slow[0] = False
    num_asked = 0
    while engine.ask(next(prompts)).ledger.restored == 0:
        num_asked += 1
    assert num_asked > 10, "first it is looked at"
    declined = engine.counts.declined_slow
    restored = [engine.ask(next(prompts)).ledger.restored for _ in range(100)]
    assert sum(restored) > 0
    assert engine.counts.declined_slow == declined


def test_a_tier_that_was_late_once_is_found_again_soon() -> None:
    hiccups: list[float] = []
    engine = Engine(2000, lambda _: hiccups.pop() if hiccups else 0.02 * COMPUTED, TOKEN_S)
    load(engine, 100, 5)
    assert engine.counts.declined_slow == 0
    hiccups.append(0.3)
    prompts = iter(chats(400, 10))
    while hiccups:
        engine.ask(next(prompts))
    declined = engine.counts.declined_slow
    for _ in range(20):
        engine.ask(next(prompts))
    restored = [engine.ask(next(prompts)).ledger.restored for _ in range(20)]
    assert sum(restored) > 0
    assert engine.counts.declined_slow - declined <= 10


def test_exploring_costs_its_request_nothing() -> None:
    engine = Engine(2000, lambda _: 10 * COMPUTED, TOKEN_S)
    for tokens in chats(100, 3):
        engine.ask(tokens)
    hauls = engine.cache._lessor.hauls
    assert hauls is not None
    explored = set()
    for tokens in chats(2000, 4):
        grant = engine.cache.acquire(ME, SPACE, pack([*tokens, 0]), wait_s=1e6, now=engine.now)
        assert isinstance(grant, Grant), "nobody waits for what is not worth it"
        for serial, restore in hauls.restores.items():
            engine.cache.check()
            explored.add(serial)
            assert restore.lease.flight is None
            assert restore.verdict.num_blocks <= Engine.PIECE
        engine.idle(len(tokens) * TOKEN_S)
        engine.cache.commit(ME, grant.lease, len(tokens) + 1, now=engine.now)
        engine.cache.release(ME, grant.lease, now=engine.now)
    num_declined = engine.counts.declined_slow
    assert 1 < len(explored) <= num_declined / 64 + 7


def test_a_tier_that_stands_still_is_waited_for_by_few() -> None:
    stuck = [False]
    engine = Engine(2000, lambda _: 1e9 if stuck[0] else 0.02 * COMPUTED, TOKEN_S)
    for tokens in chats(100, 5):
        engine.ask(tokens)
    stuck[0] = True
    late = 0
    for tokens in chats(200, 5):
        grant = engine.ask(tokens)
        late += engine.waits[-1] > 1.05 * (len(tokens) + 1 - grant.num_cached) * TOKEN_S + 0.01
    assert late <= 3
    assert engine.counts.declined_slow > engine.counts.declined_busy


def test_of_a_slow_tier_little_is_looked_at_and_of_others_a_piece() -> None:
    speed = Speed(0.2)
    assert speed.num_explored(16) == 1
    speed.note(16, 0.32)
    assert speed.num_explored(16) == 5
    for _ in range(8):
        speed.note(16, 0.0)
    assert speed.num_explored(16) == 16
    engine = Engine(2000, lambda _: 0.2, TOKEN_S)
    looked = set()
    for tokens in chats(400, 9):
        engine.ask(tokens)
        hauls = engine.cache._lessor.hauls
        assert hauls is not None
        looked |= {
            one.verdict.num_blocks for one in hauls.restores.values() if not one.is_waited_for
        }
    assert looked == {1}


def test_one_namespace_says_nothing_of_another() -> None:
    engine = Engine(2000, lambda _: 0.5 * COMPUTED, TOKEN_S)
    load(engine, 60, 6)
    other = Namespace("m", tenant="hostile")
    engine.cache.attach(ME, other, now=engine.now)
    for first in range(40):
        tokens = pack([first * 1000 + at for at in range(640)])
        grant = engine.cache.acquire(ME, other, tokens, now=engine.now)
        assert isinstance(grant, Grant)
        engine.cache.commit(ME, grant.lease, 640, now=engine.now)  # it claims to take no time
        engine.cache.release(ME, grant.lease, now=engine.now)
        engine.idle(0.01)
    before = engine.counts
    load(engine, 60, 6)
    assert engine.counts.declined_slow == before.declined_slow
    assert engine.counts.restored > before.restored
    told = engine.cache.acquire(
        ME, other, pack([*range(39_000, 39_640), 0]), wait_s=5.0, now=engine.now
    )
    assert isinstance(told, Grant), "its own are computed"
    assert engine.counts.declined_slow == before.declined_slow + 1


def test_what_is_known_of_a_namespace_goes_with_it_and_survives_a_reset() -> None:
    engine = Engine(2000, lambda _: 0.01 * COMPUTED, TOKEN_S)
    load(engine, 5, 7)
    quotas = engine.cache._lessor.blocks.quotas
    assert quotas.account(SPACE).rate is not None
    engine.cache.reset(SPACE)
    assert quotas.account(SPACE).rate is not None
    engine.cache.quit(ME, SPACE)
    assert engine.cache._lessor._let_go(SPACE)
    assert quotas.account(SPACE).rate is None


def test_an_explanation_has_the_sum() -> None:
    engine = Engine(2000, lambda _: 0.02 * COMPUTED, TOKEN_S)
    prompts = chats(80, 8)
    load(engine, 80, 8)
    spans = [engine.cache.explain(SPACE, pack([*one, 0]), now=engine.now) for one in prompts]
    told = next(one for one in spans if one.num_below)
    (span,) = told.below
    assert span.tier == "host"
    assert span.end - span.start == told.num_below
    assert span.start == told.ledger.hit
    assert span.compute_s == pytest.approx(told.num_below * TOKEN_S, rel=0.1)
    assert span.fetch_s == told.below_s
    assert span.fetch_s == pytest.approx(told.num_below * TOKEN_S * 0.02, rel=0.5)
    assert span.is_worth
