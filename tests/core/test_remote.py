"""A store that several machines have: what is asked of it, fetched from it, and stored there."""

from __future__ import annotations

import pytest

from prefixcache.core.block_keys import PassingGenerations
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, Hauls, TierSizes
from prefixcache.core.remote import NAME_BYTES, Question
from prefixcache.errors import PoolExhausted
from prefixcache.types import (
    TOKEN_BYTES,
    Explanation,
    Grant,
    Namespace,
    Partial,
    Waiting,
    WorkerId,
    pack,
)

ME, OTHER = WorkerId(1), WorkerId(2)
SPACE = Namespace("model@1")
SIZE, PIECE = 4, 8
PROMPT = pack(range(100, 181))
"""Twenty whole blocks, and a token to compute."""


def name_of(question: Question, at: int) -> bytes:
    """What an object is called: another name for each prefix, and after each reset."""
    prefix = question.tokens[: (at + 1) * SIZE * TOKEN_BYTES]
    return f"{question.namespace.salt} {question.resets} {hash(prefix):x}".encode().ljust(
        NAME_BYTES
    )


class Machine:
    """A cache, and a carrier between it and a store."""

    def __init__(self, store: dict[bytes, bytes], num_blocks: int = 512, host: int = 0) -> None:
        sizes = TierSizes.of(num_blocks, host=host, remote=PIECE)
        self.cache = PrefixCache(num_blocks, SIZE, partial=Partial.OFF, tiers=sizes)
        self.store = store
        self.num_asked = 0
        self.now = 0.0
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.set_remote(is_there=True, now=0.0)
        for worker in (ME, OTHER):
            self.cache.attach(worker, SPACE, now=0.0)

    @property
    def told(self):  # type: ignore[no-untyped-def]
        return self.cache.counts(now=self.now)

    def acquire(
        self, prompt: bytes = PROMPT, *, worker: WorkerId = ME, wait_s: float = 60.0
    ) -> Grant | Waiting:
        return self.cache.acquire(worker, SPACE, prompt, wait_s=wait_s, now=self.now)

    def answer(self) -> list[Question]:
        """Answer all that is asked; give it."""
        asked = self.cache.questions(now=self.now)
        for one in asked:
            self.num_asked += 1
            count = len(one.tokens) // (SIZE * TOKEN_BYTES)
            names = [name_of(one, at) for at in range(one.first, count)]
            there = bytes(name in self.store for name in names)
            self.cache.answered(one.id, there, b"".join(names), now=self.now)
        return asked

    def carry(self, *, good: int | None = None) -> list[Haul]:
        """Carry out all hauls; `good`: of each only so many blocks are as they should be."""
        hauls = self.cache.hauls(now=self.now)
        for haul in hauls:
            width, num_good = len(haul.tokens) // len(haul.blocks), 0
            for at in range(len(haul.blocks)):
                name = haul.names[at * NAME_BYTES : (at + 1) * NAME_BYTES]
                tokens = haul.tokens[at * width : (at + 1) * width]
                if not haul.is_up:
                    self.store[name] = tokens
                elif self.store.get(name) != tokens:
                    break
                num_good += 1
            num_good = num_good if good is None else min(good, num_good)
            self.cache.hauled(haul.id, num_good, 0.001, now=self.now)
            self.cache.check()
        return hauls

    def settle(self) -> None:
        """Go on until there is nothing more to do."""
        while self.answer() or self.carry():
            self.cache.check()

    def compute(self, prompt: bytes = PROMPT) -> Grant:
        """Have a prompt computed, and what that stores stored."""
        grant = self.acquire(prompt)
        if isinstance(grant, Waiting):
            self.settle()
            ((_, grant),) = self.cache.take_outcomes()
        assert isinstance(grant, Grant)
        self.cache.commit(ME, grant.lease, len(prompt) // TOKEN_BYTES - 1, now=self.now)
        self.cache.release(ME, grant.lease, now=self.now)
        self.settle()
        return grant

    def outcome(self, *, ends: bool = False) -> Grant:
        """The one grant that has settled; `ends`: its lease is given back at once."""
        ((_, grant),) = self.cache.take_outcomes()
        assert isinstance(grant, Grant)
        if ends:
            self.cache.release(ME, grant.lease, now=self.now)
        return grant


@pytest.fixture
def store() -> dict[bytes, bytes]:
    return {}


@pytest.fixture
def full(store: dict[bytes, bytes]) -> dict[bytes, bytes]:
    """A store to which one machine has given the prompt."""
    Machine(store).compute()
    return store


def test_what_one_machine_computes_another_fetches(full: dict[bytes, bytes]) -> None:
    assert len(full) == 20
    other = Machine(full)
    assert isinstance(other.acquire(), Waiting)
    other.settle()
    grant = other.outcome()
    assert grant.num_cached == 80
    assert (grant.ledger.restored, grant.ledger.cold) == (80, 1)
    told = other.told
    assert (told.remote_restored, told.restored, told.spoilt) == (20, 20, 0)
    assert told.remote_stored == 0, "it lies there already"


def test_one_question_and_one_haul_for_all_who_want_it(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    assert isinstance(other.acquire(), Waiting)
    assert isinstance(other.acquire(worker=OTHER), Waiting)
    longer = PROMPT + pack(range(5))
    assert isinstance(other.acquire(longer), Waiting)
    other.settle()
    grants = [grant for _, grant in other.cache.take_outcomes()]
    assert [grant.num_cached for grant in grants if isinstance(grant, Grant)] == [80, 80, 80]
    assert other.num_asked == 1
    assert other.told.remote_restored == 20


def test_what_is_there_in_part_is_fetched_up_to_the_gap(full: dict[bytes, bytes]) -> None:
    del full[list(full)[7]]
    other = Machine(full)
    other.acquire()
    other.settle()
    assert other.outcome().num_cached == 7 * SIZE
    assert other.num_asked == 1, "what was not there is not asked for again at once"


def test_a_store_that_has_lost_a_block_is_given_it_again(full: dict[bytes, bytes]) -> None:
    lost = list(full)[3]
    del full[lost]
    machine = Machine(full)
    machine.compute()
    assert machine.told.remote_stored == 1
    assert lost in full


def test_nobody_is_asked_for_a_few_tokens(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    assert isinstance(machine.acquire(pack(range(60))), Grant)
    assert machine.answer() == []


def test_who_does_not_wait_is_granted_at_once(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    assert isinstance(other.acquire(wait_s=0.0), Grant)
    assert other.answer() == []


def test_what_is_not_named_by_its_weights_stays_here(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    plain = Namespace("model")
    machine.cache.attach(ME, plain, now=0.0)
    grant = machine.cache.acquire(ME, plain, PROMPT, wait_s=60.0, now=0.0)
    assert isinstance(grant, Grant)
    machine.cache.commit(ME, grant.lease, 80, now=0.0)
    machine.cache.release(ME, grant.lease, now=0.0)
    machine.settle()
    assert store == {}


def test_after_a_reset_nothing_of_before_is_found(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    machine.compute()
    machine.cache.reset(SPACE)
    grant = machine.compute()
    assert grant.num_cached == 0
    assert len(store) == 40, "under other names"
    assert machine.told.remote_stored == 40


def test_a_reset_of_what_nobody_has_asked_for_here_counts(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    strange = Namespace(SPACE.model, tenant="of whom nothing is known here")
    machine.cache.reset(strange)
    machine.cache.attach(ME, strange, now=0.0)
    assert isinstance(machine.cache.acquire(ME, strange, PROMPT, wait_s=60.0, now=0.0), Waiting)
    assert [question.resets for question in machine.answer()] == [1]


def test_who_wants_to_know_what_lies_there_has_it_asked_and_is_told_next_time(
    full: dict[bytes, bytes],
) -> None:
    other = Machine(full)

    def told(now: float, prompt: bytes = PROMPT) -> list[tuple[str, int, int]]:
        below = other.cache.explain(SPACE, prompt, now=now).below
        return [(one.tier, one.start, one.end) for one in below]

    assert told(0.0) == told(0.0) == []
    (question,) = other.answer()
    assert question.is_to_store, "nobody waits for it"
    assert told(0.9) == [("remote", 0, 80)]
    assert other.answer() == []
    assert told(0.9, PROMPT[: 4 * 60]) == [], "nobody is asked for so few"
    assert other.answer() == []
    del full[next(iter(full))]
    other.now = 1.1
    assert told(1.1) == [], "it may have gone"
    other.answer()
    assert told(1.1) == []
    other.cache.explain(Namespace("unknown@1"), PROMPT, now=1.1)
    assert [one.namespace for one in other.answer()] == [Namespace("unknown@1")]
    assert other.cache.explain(Namespace("model"), PROMPT, now=1.1).below == ()
    assert other.answer() == []
    other.cache.check()


def test_only_so_much_is_looked_for_at_the_same_time(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    for number in range(200):
        other.cache.explain(SPACE, pack([number, *range(80)]), now=0.0)
    assert len(other.cache.questions(now=0.0)) == 64
    other.cache.check()
    other.cache.set_remote(is_there=False, now=0.0)
    other.cache.check()
    other.cache.set_remote(is_there=True, now=0.0)
    other.cache.explain(SPACE, PROMPT, now=0.0)
    assert len(other.answer()) == 1


def test_another_life_goes_on_counting_resets(store: dict[bytes, bytes]) -> None:
    counted = PassingGenerations()
    for life in range(2):
        machine = Machine(store)
        machine.cache.count_resets(counted)
        for _ in range(2):
            assert machine.compute().num_cached == 0, "of before a reset"
            assert machine.compute().num_cached == 80
            machine.cache.reset(SPACE)
        assert len(store) == 40 * (life + 1)
    assert Machine(store).compute().num_cached == 80, "a life that is told of no resets"


@pytest.mark.parametrize("tenant", [SPACE.tenant, None])
def test_a_reset_of_all_counts_for_what_has_no_name_yet(
    full: dict[bytes, bytes], tenant: str | None
) -> None:
    counted, other = PassingGenerations(), Machine(full)
    other.cache.count_resets(counted)
    seen = {0}
    for _ in range(3):
        counted.advance_all(tenant)
        assert counted.of(SPACE) not in seen
        seen.add(counted.of(SPACE))
        counted.advance(SPACE)
        assert counted.of(SPACE) not in seen
        seen.add(counted.of(SPACE))
    assert other.compute().num_cached == 0


def test_who_asks_waits_for_a_moment_only(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    other.acquire()
    (question,) = other.cache.questions(now=0.0)
    other.now = 0.06
    other.cache.expire(now=other.now)
    assert other.outcome(ends=True).num_cached == 0
    other.cache.check()
    assert other.told.remote_late == 1
    # It is not asked for a second; and an answer that comes late changes nothing.
    other.cache.answered(question.id, b"\1" * 20, b"x" * 20 * NAME_BYTES, now=other.now)
    assert isinstance(other.acquire(worker=OTHER), Grant)
    other.now = 1.5
    assert isinstance(other.acquire(worker=OTHER), Waiting)


def test_a_fetch_that_takes_too_long_is_waited_for_no_longer(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    other.acquire()
    other.answer()
    hauls = other.cache.hauls(now=0.0)
    assert {haul.is_up for haul in hauls} == {True}
    due = other.cache.next_deadline()
    assert due is not None
    other.now = due + 1.0
    other.cache.expire(now=other.now)
    assert other.outcome().num_cached == 0
    assert other.told.leaving == 0
    for haul in hauls:  # what comes all the same is kept
        other.cache.hauled(haul.id, len(haul.blocks), 9.0, now=other.now)
    other.cache.check()
    assert other.told.remote_restored == 20


def test_what_is_not_what_it_should_be_is_computed(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    other.acquire()
    other.answer()
    other.carry(good=3)
    other.settle()
    assert other.outcome().num_cached == 3 * SIZE
    assert other.told.spoilt == 0


def test_a_store_that_says_what_is_not_true_is_asked_once(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    full.update(dict.fromkeys(full, b"something else"))
    other.acquire()
    other.settle()
    assert other.outcome().num_cached == 0
    assert other.num_asked == 1


def test_who_answers_ends_and_nobody_waits(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    other.acquire()
    (_,) = other.cache.questions(now=0.0)
    other.cache.set_remote(is_there=False, now=0.0)
    assert other.outcome(ends=True).num_cached == 0
    other.cache.check()
    assert isinstance(other.acquire(worker=OTHER), Grant)
    assert other.cache.questions(now=0.0) == []


def test_the_porter_ends_with_all_that_is_on_its_way(full: dict[bytes, bytes]) -> None:
    other = Machine(full)
    other.acquire()
    other.answer()
    assert other.cache.hauls(now=0.0)
    other.cache.set_porter(is_there=False, now=0.0)
    assert other.outcome().num_cached == 0
    other.cache.check()
    assert other.told.num_leases == 1, "that of the worker"


def test_a_failing_store_is_neither_asked_nor_given_anything(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    machine.cache.hold_remote(until=5.0)
    machine.compute()
    assert store == {}
    machine.now = 6.0
    machine.settle()
    assert len(store) == 20, "what waited is stored then"


@pytest.mark.pure_core
def test_what_is_too_much_to_wait_is_not_stored(
    store: dict[bytes, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache.core.remote._LINE_BYTES", 3 * 80 * TOKEN_BYTES)
    machine = Machine(store)
    machine.cache.hold_remote(until=5.0)
    for number in range(5):
        grant = machine.acquire(pack(range(number * 100, number * 100 + 81)), wait_s=0.0)
        assert isinstance(grant, Grant)
        machine.cache.commit(ME, grant.lease, 80, now=0.0)
        machine.cache.release(ME, grant.lease, now=0.0)
        machine.cache.check()
    assert machine.told.remote_unstored == 40
    machine.cache.set_remote(is_there=False, now=0.0)
    machine.cache.check()
    assert machine.told.remote_unstored == 100
    assert store == {}


def test_what_is_stored_is_not_evicted_meanwhile(store: dict[bytes, bytes]) -> None:
    machine = Machine(store, num_blocks=64)
    grant = machine.acquire()
    assert isinstance(grant, Waiting)
    machine.answer()
    lease = machine.outcome().lease
    machine.cache.commit(ME, lease, 80, now=0.0)
    machine.cache.release(ME, lease, now=0.0)
    machine.answer()
    hauls = machine.cache.hauls(now=0.0)
    blocks = {block for haul in hauls for block in haul.blocks}
    assert len(blocks) == 4, "of a sixteenth of the pool at the same time"
    with pytest.raises(PoolExhausted):
        machine.acquire(pack(range(1000, 1000 + 61 * SIZE)), wait_s=0.0)
    other = machine.acquire(pack(range(1000, 1000 + 60 * SIZE)), wait_s=0.0)
    assert isinstance(other, Grant)
    assert not blocks & set(other.block_table)
    machine.cache.check()


def test_what_is_evicted_before_it_is_stored_is_counted(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    machine.acquire()
    machine.answer()
    lease = machine.outcome().lease
    machine.cache.commit(ME, lease, 80, now=0.0)
    machine.cache.release(ME, lease, now=0.0)
    lessor = machine.cache._lessor
    lessor.blocks.pool.release(lessor.tree.evict(5))
    machine.settle()
    assert (len(store), machine.told.remote_stored, machine.told.remote_unstored) == (15, 15, 5)


def test_a_commit_stores_sixteen_blocks_together(store: dict[bytes, bytes]) -> None:
    machine = Machine(store)
    machine.acquire()
    machine.answer()
    lease = machine.outcome().lease
    for end in range(8, 81, 8):
        machine.cache.commit(ME, lease, end, now=0.0)
        machine.settle()
        assert len(store) == (0 if end < 64 else 16)
    machine.cache.release(ME, lease, now=0.0)
    machine.settle()
    assert len(store) == 20


@pytest.mark.pure_core
def test_what_is_fetched_slowly_is_computed_and_found_quick_again(
    full: dict[bytes, bytes],
) -> None:
    other = Machine(full, num_blocks=4096)
    cached = []
    for number in range(300):
        other.now = 10.0 * number
        grant = other.acquire(wait_s=60.0 if number else 0.0)
        other.answer()  # of a request that waits, or of nobody's
        for haul in other.cache.hauls(now=other.now):
            took = 20.0 if number < 100 else 0.001
            other.cache.hauled(haul.id, len(haul.blocks), took, now=other.now)
        if isinstance(grant, Waiting):
            grant = other.outcome()
        cached.append(grant.num_cached)
        other.now += 1.0  # to compute it, or what is left
        other.cache.commit(ME, grant.lease, 80, now=other.now)
        other.cache.release(ME, grant.lease, now=other.now)
        other.settle()
        lessor = other.cache._lessor
        lessor.blocks.pool.release(lessor.tree.evict(20))
    assert cached[:2] == [0, 80], "nothing is known of the store yet"
    assert set(cached[2:100]) == {0}
    assert other.told.declined_slow > 64
    assert cached[-1] == 80, "it pays again"


class Lagging(Machine):
    """A machine with all tiers, of which each brings all it should, just before it is too late."""

    def __init__(self, store: dict[bytes, bytes]) -> None:
        super().__init__(store)
        sizes = TierSizes(host=24, ahead=40, piece=4, disk=64, host_ahead=2, remote=PIECE)
        self.cache = PrefixCache(64, SIZE, partial=Partial.OFF, tiers=sizes)
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.set_remote(is_there=True, now=0.0)
        self.cache.attach(ME, SPACE, now=0.0)

    def carry(self, *, good: int | None = None) -> list[Haul]:
        hauls = self.cache.hauls(now=self.now)
        for haul in hauls:
            num_good = max(len(haul.blocks), len(haul.slots)) if good is None else good
            self.cache.hauled(haul.id, num_good, 0.001, now=self.now)
            self.cache.check()
        return hauls

    def wait(self, prompt: bytes) -> float:
        """Have a request wait; give how long it did."""
        started = self.now
        assert isinstance(self.acquire(prompt), Waiting)
        while not (outcomes := self.cache.take_outcomes()):
            due, alarm = self.hauls.next_due(), self.cache.next_deadline()
            assert due is not None
            assert alarm is not None
            if alarm < due - STEP_S:
                self.now = max(self.now, alarm) + STEP_S / 100
                self.cache.expire(now=self.now)
            else:
                self.now = max(self.now, due - STEP_S)
                self.answer()
                self.carry()
            self.cache.check()
        ((_, grant),) = outcomes
        assert isinstance(grant, Grant)
        self.cache.release(ME, grant.lease, now=self.now)
        return self.now - started

    def below(self, prompt: bytes) -> Explanation:
        """Say where the blocks of a prompt lie, also elsewhere: that has to be asked first."""
        self.cache.explain(SPACE, prompt, now=self.now)
        self.answer()
        return self.cache.explain(SPACE, prompt, now=self.now)

    @property
    def hauls(self) -> Hauls:
        hauls = self.cache._lessor.hauls
        assert hauls is not None
        return hauls


STEP_S = 0.001
LONG = pack(range(100, 261))
"""Forty blocks, of which the first twenty are those of the prompt, and a token."""


def test_who_waits_for_several_tiers_waits_past_what_is_predicted_once(
    store: dict[bytes, bytes],
) -> None:
    Machine(store).compute(LONG)
    lagging = Lagging(store)
    lagging.compute()
    for _ in range(2):  # the second time they come back: so it is known how long that takes
        for other in range(4):
            first = 1000 * (1 + other)
            lagging.compute(pack(range(first, first + 33)))
    told = lagging.below(LONG)
    assert [part.tier for part in told.below] == ["host", "disk", "remote"]
    assert told.below_s == pytest.approx(told.below[1].fetch_s), "what is before it is in that"
    predicted = told.below_s + told.below[-1].fetch_s
    assert predicted < 0.02
    took = lagging.wait(LONG)
    assert took > 0.05, "each of them is late"
    assert took <= 2 * predicted + 0.05 + STEP_S
