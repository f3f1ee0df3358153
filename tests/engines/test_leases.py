"""What an engine's requests hold: examples, and any order of everything against the real cache."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest

from engines.simulated import TTL_S, Engine, Job, Machine
from prefixcache.client import MediaItem
from prefixcache.errors import InvalidRequest
from prefixcache.types import pack
from prefixcache_vllm.leases import PATIENCE_STEPS, Bounds, Leases, Room

SIZE = 4
CAT, DOG = b"c" * 32, b"d" * 32
BOUNDS = Bounds(max_tokens=64, reserve=6, ahead=4, window=2, wait_s=20.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch, 64, SIZE)


def job(name: str, length: int = 10, num_new: int = 6, seed: int = 0) -> Job:
    return Job(name, [100 * seed + at for at in range(length)], num_new)


def test_what_one_engine_computed_another_reads_to_the_token(machine: Machine) -> None:
    one, two = Engine(machine, "one", BOUNDS), Engine(machine, "two", BOUNDS)
    first, second = job("a"), job("b", num_new=9)
    one.add(first)
    one.run()
    two.add(second)
    two.run()
    assert first.is_done
    assert second.is_done
    assert two.leases.counts.reused_tokens == 9  # all but the last one of its prompt
    machine.check_idle()


def test_an_image_is_read_by_who_shows_the_same_one_and_its_text_by_all(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS)
    prompt = [1, 2, 3, 4, 5, *[9] * 8, 6, 7]
    read = []
    for count, shown in enumerate((CAT, DOG, CAT)):
        one = Job(f"r{count}", list(prompt), 3, media=(MediaItem(5, 8, shown),))
        engine.add(one)
        engine.run()
        read.append(engine.leases.counts.reused_tokens)
    assert read == [0, 5, 5 + 14]
    refused = engine.leases.ask("r9", prompt, left=1, media=[MediaItem(5, 99, CAT)]).refused
    assert isinstance(refused, InvalidRequest)
    engine.leases.pop("r9")
    machine.check_idle()


def test_a_step_is_one_message_and_nobody_waits_for_its_answers(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS)
    for name in "abc":
        engine.add(job(name, seed=ord(name)))
    engine.begin()
    assert len(engine.session.sent) == 1
    engine.finish()  # nothing was granted yet, and nothing computed
    assert not engine.running
    machine.deliver(engine.session)
    engine.run()
    counts = engine.leases.counts
    assert counts.granted == 3
    assert counts.ops > counts.messages
    machine.check_idle()


def test_few_requests_hold_blocks_before_they_are_computed(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS, max_running=1)
    for name in "abcdef":
        engine.add(job(name, seed=ord(name)))
    engine.begin()
    machine.deliver(engine.session)
    engine.finish()
    assert machine.cache.snapshot(now=machine.now).num_leases <= BOUNDS.window + 1
    engine.run()
    machine.check_idle()


def test_who_waits_for_a_prefix_lets_others_pass_and_reads_it(machine: Machine) -> None:
    one, two = Engine(machine, "one", BOUNDS), Engine(machine, "two", BOUNDS)
    one.add(job("long", length=40))
    one.begin()
    machine.deliver(one.session)
    one.finish()
    waits, passes = job("waits", length=40, num_new=2), job("passes", seed=3)
    two.add(waits)
    two.add(passes)
    two.step(20)
    assert passes.is_done
    assert not waits.is_done
    one.run()
    two.run()
    assert machine.cache.snapshot(now=machine.now).ledger.joined == 36
    machine.check_idle()


def test_an_abort_gives_back_what_is_asked_for_granted_or_in_use(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS)
    jobs = [job(name, seed=at) for at, name in enumerate("abcd")]
    engine.add(jobs[0])
    engine.abort(jobs[0])  # before it was sent
    engine.add(jobs[1])
    engine.leases.flush()
    engine.abort(jobs[1])  # sent, and not answered
    engine.add(jobs[2])
    engine.leases.flush()
    machine.deliver(engine.session)
    engine.abort(jobs[2])  # granted, and not computed
    engine.add(jobs[3])
    engine.begin()
    machine.deliver(engine.session)
    engine.finish()
    engine.begin()
    engine.abort(jobs[3])  # in the middle of its step
    engine.finish()
    machine.deliver(engine.session)
    machine.check_idle()


def test_a_stopped_engine_drops_what_it_computed_and_its_blocks_come_back(
    machine: Machine,
) -> None:
    one, two = Engine(machine, "one", BOUNDS), Engine(machine, "two", BOUNDS)
    stopped = job("stopped", num_new=20)
    one.add(stopped)
    one.step(4)
    one.begin()
    machine.pass_time(2 * TTL_S, silent=one.session)
    assert machine.cache.snapshot(now=machine.now).quarantined
    two.add(job("other", length=50, seed=7))
    two.run()
    one.finish()
    assert one.num_dropped == 1
    assert not stopped.is_done
    one.run()
    assert stopped.is_done
    machine.check_idle()


def test_under_pressure_everybody_gets_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch, 12, SIZE)  # a third of what all of them need
    engines = [Engine(machine, name, BOUNDS, max_running=4) for name in "xy"]
    jobs = [job(f"{at}", length=8, num_new=12, seed=at) for at in range(8)]
    for at, one in enumerate(jobs):
        engines[at % 2].add(one)
    for _ in range(3000):
        if all(one.is_done for one in jobs):
            break
        for engine in engines:
            engine.step()
        machine.pass_time(0.1)
    assert all(one.is_done for one in jobs)
    assert sum(engine.num_preempted for engine in engines)
    machine.check_idle()


def test_who_has_no_block_for_its_next_token_sits_out_until_it_comes_or_another_gives_way(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, 6, SIZE)
    bounds = replace(BOUNDS, reserve=0, ahead=0)
    one, two = (Engine(machine, name, bounds).leases for name in ("one", "two"))
    for leases, name, length in ((one, "a", 8), (two, "b", 12)):
        leases.ask(name, [length] * length, left=20)
        leases.flush()
        machine.deliver(machine.sessions[0 if leases is one else 1])
        assert leases.ready(name)
        leases.start(name)
    assert one.room("a", 8) is Room.THERE
    assert one.room("a", 13) is Room.COMING  # asks for two blocks, and one is free
    one.flush()
    machine.deliver(machine.sessions[0])
    steps = [one.room("a", 13) for _ in range(PATIENCE_STEPS)]
    assert steps == [Room.COMING] * (PATIENCE_STEPS - 1) + [Room.MISSING]
    assert one.room("a", 13) is Room.COMING
    two.end(two.pop("b"))
    two.flush()
    machine.deliver(machine.sessions[1])
    machine.deliver(machine.sessions[0])
    assert one.room("a", 13) is Room.THERE
    assert one.counts.sat_out == PATIENCE_STEPS + 1
    assert one.counts.asked == 1
    one.end(one.pop("a"))
    one.flush()
    machine.deliver(machine.sessions[0])
    machine.check_idle()


@pytest.mark.parametrize("is_looked_at", [False, True])
def test_who_runs_gets_the_room_of_who_was_granted_and_is_not_computed_yet(
    monkeypatch: pytest.MonkeyPatch, *, is_looked_at: bool
) -> None:
    machine = Machine(monkeypatch, 6, SIZE)
    session = machine.attach("one")
    leases = Leases(session, replace(BOUNDS, reserve=0, ahead=0))
    for name, length in (("runs", 8), ("waits", 12)):
        leases.ask(name, [length] * length, left=20)
    leases.flush()
    machine.deliver(session)
    assert leases.ready("runs")
    leases.start("runs")
    assert not is_looked_at or leases.ready("waits")  # ready, and the step had no room for it
    assert leases.room("runs", 16) is Room.COMING  # two blocks more, and one is free
    leases.flush()
    machine.deliver(session)
    assert leases.room("runs", 16) is Room.THERE
    leases.end(leases.pop("runs"))
    leases.flush()
    machine.deliver(session)
    machine.check_idle()


def test_without_the_service_what_runs_goes_on_and_what_comes_takes_spare_blocks(
    machine: Machine,
) -> None:
    bounds = Bounds(max_tokens=64, reserve=6, ahead=4, wait_s=20.0, spare_blocks=12)
    engine = Engine(machine, "one", bounds)
    before, after = job("before", num_new=30), [job(f"{at}", seed=at) for at in range(1, 6)]
    engine.add(before)
    engine.step(3)
    machine.die()
    machine.now += 10 * TTL_S  # no lease lives so long, but nobody lends its blocks any more
    for one in after:
        engine.add(one)
    engine.run()
    assert before.is_done
    assert all(one.is_done for one in after), "what they need is more than the spare blocks at once"
    assert engine.num_dropped == 0
    large = engine.leases.ask("large", [1] * 61, left=3)
    assert engine.leases.ready("large") is None
    assert "of 13 blocks that are left: ask again once there is a service" in str(large.refused)


def test_when_another_service_takes_the_memory_over_everything_is_lost(machine: Machine) -> None:
    engine = Engine(machine, "one", replace(BOUNDS, spare_blocks=20))
    engine.add(job("a", num_new=20))
    engine.step(3)
    machine.die()
    engine.begin()
    engine.finish()
    assert engine.running
    engine.begin()
    machine.is_abandoned = False
    machine.now += 2 * TTL_S
    engine.finish()
    assert engine.num_dropped == 1
    (waiting,) = engine.waiting
    for _ in range(2):
        engine.begin()
        engine.finish()
    assert waiting.name not in engine.leases.held  # it waits until the engine has joined that one
    engine.leases.never_joins = "start this engine again"
    engine.begin()
    assert "start this engine again" in str(engine.leases.held[waiting.name].refused)
    engine.leases.pop(waiting.name)
    machine.is_abandoned = True  # that one is dead as well; the spare blocks were the first one's
    engine.begin()
    assert not engine.running


def test_a_session_that_a_living_service_has_ended_loses_all_at_once(machine: Machine) -> None:
    """What its leases protected may be another's by now, long before their deadlines."""
    engine = Engine(machine, "one", replace(BOUNDS, spare_blocks=4))
    for name in "abcde":
        engine.add(job(name, num_new=20, seed=ord(name)))
    engine.step(3)
    assert len(engine.running) == 3
    machine.cut(engine.session)
    engine.begin()
    assert not engine.running
    assert engine.num_dropped == 3
    engine.leases.let_go()
    engine.leases.flush()
    assert engine.session.is_spent  # so that attaching again lifts the quarantine
    assert machine.cache.snapshot(now=machine.now).quarantined
    assert not engine.leases.has_room("a", 1)
    machine.end(engine.session)
    machine.check_idle()


def test_a_lease_that_the_service_does_not_know_any_more_is_lost(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS)
    engine.add(job("a", num_new=20))
    engine.step(3)
    lease = engine.leases.held["a"].lease
    assert lease is not None
    machine.cache.release(engine.session.worker, lease.id, now=machine.now)
    engine.run()
    assert engine.num_dropped == 1
    machine.check_idle()


def test_who_asks_again_before_his_blocks_are_given_back_gets_others(machine: Machine) -> None:
    """As with several steps in flight: the former ones may still be written to."""
    engine = Engine(machine, "one", BOUNDS)
    leases, tokens = engine.leases, list(range(10))
    tables = []
    for _ in range(3):
        leases.ask("a", tokens, left=4, reuse=False)
        leases.flush()
        machine.deliver(engine.session)
        held = leases.ready("a")
        assert held is not None
        tables.append(set(held.table))
        leases.pop("a")
    assert not tables[0] & tables[1]
    assert not tables[1] & tables[2]


def test_what_never_fits_is_refused_for_good(machine: Machine) -> None:
    engine = Engine(machine, "one", Bounds(max_tokens=1000))
    engine.add(job("long", length=4 * 65))
    engine.begin()
    machine.deliver(engine.session)
    engine.finish()
    engine.begin()
    assert isinstance(engine.leases.held["long"].refused, InvalidRequest)
    machine.deliver(engine.session)
    engine.abort(engine.waiting[0])
    machine.check_idle()


def test_who_waits_for_room_gets_what_others_keep_to_spare_and_they_lease_it_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine = Machine(monkeypatch, 12, SIZE)
    other = Engine(machine, "other", replace(BOUNDS, spare_blocks=8))
    engine = Engine(machine, "one", BOUNDS)
    large = job("large", length=20)
    engine.add(large)
    engine.leases.flush()
    machine.deliver(engine.session)
    assert machine.cache.num_in_line == 1
    machine.pass_time(4.0)  # some signs of life
    assert other.leases._spare == []
    engine.run()
    assert large.is_done
    machine.pass_time(4.0)
    assert len(other.leases._spare) == 8
    machine.die()
    assert other.leases.is_alone
    other.add(job("after"))
    other.run()
    assert other.num_dropped == 0


def test_spare_blocks_whose_lease_ended_while_the_engine_was_stopped_come_back(
    machine: Machine,
) -> None:
    engine = Engine(machine, "one", replace(BOUNDS, spare_blocks=8))
    machine.pass_time(2 * TTL_S, silent=engine.session)
    assert machine.cache.snapshot(now=machine.now).quarantined == 8
    machine.pass_time(4.0)
    snapshot = machine.cache.snapshot(now=machine.now)
    assert (snapshot.quarantined, snapshot.num_leases) == (0, 1)
    assert len(engine.leases._spare) == 8


def test_a_line_that_is_gone_with_the_next_sign_of_life_costs_no_spare_blocks(
    machine: Machine,
) -> None:
    engine = Engine(machine, "one", replace(BOUNDS, spare_blocks=8))
    for told in (1, 0, 2, 0):
        engine.leases._hear_of_line(told)
    machine.deliver(engine.session)
    assert len(engine.leases._spare) == 8


def test_who_waits_for_what_others_hold_is_told_with_numbers_each_time(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    machine = Machine(monkeypatch, 12, SIZE)
    other, engine = Engine(machine, "other", BOUNDS), Engine(machine, "one", BOUNDS)
    other.add(job("theirs", length=24, num_new=30))
    other.step(3)
    engine.add(job("long", length=20, seed=7))
    engine.leases.flush()
    machine.deliver(engine.session)
    machine.pass_time(2 * BOUNDS.wait_s)
    assert engine.leases.ready("long") is None
    (said,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert said.startswith("long has no lease yet, and asks again: needs ")
    assert "blocks held by 1 lease" in said
    assert "long" not in engine.leases.held  # it may ask again
    machine.end(machine.sessions[0])
    machine.check_idle()


def test_a_salt_keeps_apart_and_no_reuse_computes_all(machine: Machine) -> None:
    engine = Engine(machine, "one", BOUNDS)
    engine.add(job("a"))
    engine.run()
    salted = job("b")
    salted.salt = "secret"
    engine.add(salted)
    engine.run()
    assert engine.leases.counts.reused_tokens == 0
    held = engine.leases.ask("c", list(range(10)), left=2, reuse=False)
    engine.leases.flush()
    machine.deliver(engine.session)
    assert engine.leases.ready("c") is held
    assert held.num_cached == 0
    engine.leases.end(engine.leases.pop("c"))
    engine.leases.flush()
    machine.deliver(engine.session)
    machine.check_idle()


# ------------------------------------------------------------------------------ any order of things


class Storm:
    """Engines whose requests collide, and everything that may come between."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        self.draw = random.Random(seed)
        size = self.draw.choice([1, 2, 4])
        # The longest request fits beside what both engines keep for bad times.
        self.machine = Machine(monkeypatch, self.draw.choice([24, 40, 200]) // size + 14, size)
        spare = self.draw.choice([0, 0, 4])
        self.bounds = Bounds(
            max_tokens=40,
            reserve=self.draw.randrange(1, 10),
            ahead=self.draw.randrange(1, 8),
            window=self.draw.randrange(1, 4),
            wait_s=15.0,
            spare_blocks=spare,
            min_partial=self.draw.choice([0, 0, 2]),
        )
        self.engines = [Engine(self.machine, f"e{at}", self.bounds, 3) for at in range(2)]
        self.jobs: list[tuple[Engine, Job]] = []
        self.count = 0

    def add(self) -> None:
        engine = self.draw.choice(self.engines)
        self.count += 1
        prompt = [self.draw.choice([1, 2]) for _ in range(self.draw.randrange(1, 16))]
        if self.jobs and self.draw.random() < 0.7:
            earlier = self.draw.choice(self.jobs)[1]
            start = earlier.tokens[: self.draw.randrange(1, 20)]
            prompt = [*start, *prompt][:20]
            media = [item for item in earlier.media if item.offset + item.length <= len(start)]
        else:
            start, media = [], []
        if self.draw.random() < 0.4 and len(start) < len(prompt):
            # Its placeholder is an id that texts have as well.
            length = self.draw.randrange(1, len(prompt) - len(start) + 1)
            media.append(MediaItem(len(start), length, self.draw.choice([CAT, DOG])))
            prompt[len(start) : len(start) + length] = [1] * length
        salt = self.draw.choice(["", "", "", "s"])
        one = Job(f"r{self.count}", prompt, self.draw.randrange(1, 10), salt, tuple(media))
        engine.add(one)
        self.jobs.append((engine, one))

    def abort(self) -> None:
        alive = [(engine, one) for engine, one in self.jobs if not one.is_done]
        if alive:
            engine, one = self.draw.choice(alive)
            engine.abort(one)
            one.is_done = True

    def step(self) -> None:
        engine = self.draw.choice(self.engines)
        if engine.in_step:
            engine.finish()
        else:
            engine.begin(self.draw.randrange(1, 9))

    def deliver(self) -> None:
        self.machine.deliver(self.draw.choice(self.engines).session, self.draw.randrange(1, 4))

    def wait(self) -> None:
        self.machine.pass_time(self.draw.random() * 4)

    def stop(self) -> None:
        stopped = self.draw.choice(self.engines)
        self.machine.pass_time(TTL_S * 1.5, silent=stopped.session)

    def kill(self) -> None:
        at = self.draw.randrange(len(self.engines))
        killed = self.engines[at]
        self.machine.end(killed.session)
        for engine, one in self.jobs:
            one.is_done |= engine is killed
        self.engines[at] = Engine(self.machine, "next", Bounds(40, 4, 2, 2, 15.0), 3)

    def run(self, num_steps: int) -> None:
        acts: list[Any] = [self.add] * 5 + [self.step] * 16 + [self.deliver] * 12
        acts += [self.wait] * 2 + [self.abort, self.stop] + [self.kill] * (self.draw.random() < 0.3)
        for _ in range(num_steps):
            self.draw.choice(acts)()
            self.machine.cache.check()
        self.drain()

    def drain(self) -> None:
        for _ in range(3000):
            if all(one.is_done for _, one in self.jobs):
                break
            for engine in self.engines:
                if engine.in_step:
                    engine.finish()
                engine.step()
            self.machine.pass_time(0.5)
        assert all(one.is_done for _, one in self.jobs), "a request never ends"
        for engine in self.engines:
            engine.close()
        while any(one.session.sent and one.session.alive for one in self.engines):
            # What one gives back is granted to another, who has no use for it any more.
            for engine in self.engines:
                self.machine.deliver(engine.session)
        self.machine.check_idle()


@pytest.mark.parametrize("seed", range(60))
def test_whatever_happens_outputs_are_right_and_nothing_is_left(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    Storm(monkeypatch, seed).run(250)


def test_the_pool_is_whole_again_after_it(monkeypatch: pytest.MonkeyPatch) -> None:
    storm = Storm(monkeypatch, 1)
    storm.run(100)
    machine = storm.machine
    everything = pack([9] * (machine.cache.num_blocks * machine.size))
    session = machine.attach("last")
    assert len(session.acquire(everything, reuse=False).block_table) == machine.cache.num_blocks
