"""A machine over all verbs: every step is compared with an oracle that cannot be wrong.

Two drivers share the rules.  The seeded one runs many sequences, and cuts a failing one down by
leaving out steps. Hypothesis runs fewer, and shrinks every single choice.
"""

from __future__ import annotations

import os
import random
import traceback
from dataclasses import replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from core.in_parts import InParts
from core.porter import TIERED, TieredRules, TieredWorld
from core.rules import NAMES, Rules, step
from core.world import PLENTY, Shape, World
from prefixcache.core import kv_events
from prefixcache.core.policies import POLICIES
from prefixcache.types import Partial

pytestmark = pytest.mark.slow

SOAK = float(os.environ.get("PREFIXCACHE_SOAK", "1"))
STEPS = 50

KINDS = [(partial, block_size) for partial in Partial for block_size in (1, 2, 4)]
CASES = [(policy, partial, block_size) for policy in POLICIES for partial, block_size in KINDS]
SEQUENCES_PER_CASE = round(-(-540 // len(CASES)) * SOAK)
EXAMPLES_PER_KIND = round(8 * SOAK)


class Seeded:
    """A source of choice with a seed."""

    def __init__(self, seed: object) -> None:
        self._random = random.Random(repr(seed))

    def below(self, bound: int) -> int:
        """Give an integer from 0 to `bound` - 1."""
        return int(self._random.random() * bound)


def shape_for(
    policy: str, partial: Partial, block_size: int, draw: Seeded, *, segments: bool = False
) -> Shape:
    """Draw a pool: mostly so small that all is evicted, at times so large that nothing is."""
    num_blocks = (3, 5, 8, 12, 20, 400)[draw.below(6)]
    return Shape(
        num_blocks=num_blocks,
        block_size=block_size,
        partial=partial,
        policy=policy,
        vocabulary=2 + draw.below(2),
        num_ghosts=(None, 0, 3, PLENTY)[draw.below(4)],
        first_block=draw.below(3),
        segments=segments,
    )


def run(shape: Shape, steps: list[int]) -> World:
    """Run one sequence: each step has its own seed, so leaving one out leaves the rest alone."""
    world = TieredWorld(shape) if shape.host or shape.disk else World(shape)
    tiered = isinstance(world, TieredWorld)
    rules = TieredRules(world, Seeded(0)) if tiered else Rules(world, Seeded(0))
    names = TIERED if tiered else NAMES
    try:
        rules.attach()
        for seed in steps:
            rules.draw = Seeded(seed)
            step(rules, rules.choose(names))
        rules.draw = Seeded(-1)
        rules.drain()
    except Exception as failure:
        failure.add_note("\n".join([repr(shape), *world.log]))
        raise
    return world


def place(failure: BaseException) -> object:
    """Name the failure by its kind and by the line that found it."""
    lines = [frame.lineno for frame in traceback.extract_tb(failure.__traceback__)]
    return type(failure), lines[-1]


def shrink(shape: Shape, steps: list[int], failure: Exception) -> Exception:
    """Leave out steps while the sequence still fails in the same way."""
    size = len(steps)
    while size:
        size //= 2
        start = 0
        while start < len(steps):
            fewer = steps[:start] + steps[start + max(1, size) :]
            try:
                run(shape, fewer)
            except Exception as again:  # noqa: BLE001 - whatever it is, it is compared
                if place(again) == place(failure):
                    steps, failure = fewer, again
                    continue
            start += max(1, size)
    return failure


def run_case(
    policy: str,
    partial: Partial,
    block_size: int,
    count: int,
    *,
    segments: bool = False,
    tiered: bool = False,
) -> set[str]:
    """Run many sequences; give what they reached."""
    reached: set[str] = set()
    for sequence in range(count):
        draw = Seeded((policy, partial.value, block_size, sequence))
        shape = shape_for(policy, partial, block_size, draw, segments=segments)
        if tiered:
            num_blocks = (5, 8, 12, 20)[draw.below(4)]
            host, ahead = 1 + draw.below(16), 1 + draw.below(num_blocks // 2)
            shape = replace(shape, num_blocks=num_blocks, host=host, ahead=ahead)
            if disk := draw.below(3) * (1 + draw.below(8)):
                host = draw.below(5)
                host_ahead = host and 1 + draw.below(host)
                shape = replace(shape, host=host, disk=disk, host_ahead=host_ahead)
        steps = [draw.below(1 << 30) for _ in range(STEPS)]
        try:
            reached |= set(run(shape, steps).counts)
        except Exception as failure:  # noqa: BLE001 - raised again, cut down
            raise shrink(shape, steps, failure) from None
    return reached


@pytest.mark.parametrize(("policy", "partial", "block_size"), CASES)
def test_every_step_agrees_with_the_oracle(policy: str, partial: Partial, block_size: int) -> None:
    run_case(policy, partial, block_size, SEQUENCES_PER_CASE)


@pytest.mark.parametrize(("policy", "partial", "block_size"), CASES)
def test_every_step_agrees_with_the_oracle_where_requests_ask_for_segments(
    policy: str, partial: Partial, block_size: int
) -> None:
    run_case(policy, partial, block_size, SEQUENCES_PER_CASE, segments=True)


@pytest.mark.parametrize(("partial", "block_size"), KINDS)
def test_every_step_that_is_made_in_parts_agrees_with_the_oracle(
    partial: Partial, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache.core.lessor._MOST_WORK", 1)
    monkeypatch.setattr("prefixcache.core.wait_queue._CALLED", 1)
    monkeypatch.setattr("prefixcache.core.wait_queue._SEARCHED", 1)
    monkeypatch.setattr("core.world.PrefixCache", InParts)
    run_case("lru", partial, block_size, SEQUENCES_PER_CASE)


@pytest.mark.parametrize(("policy", "partial", "block_size"), CASES)
def test_every_step_beside_a_tier_agrees_with_the_oracle(
    policy: str, partial: Partial, block_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    monkeypatch.setattr(kv_events, "_BLOCKS_IN_ONE_GO", 2)
    run_case(policy, partial, block_size, SEQUENCES_PER_CASE, tiered=True)


def test_the_rules_reach_every_corner_of_a_tier() -> None:
    reached = run_case("lru", Partial.TAILS, 2, 120, tiered=True)
    expected = {"sunk", "restores begun", "restored", "failed", "spoilt", "lost", "late"}
    expected |= {"told late", "moved on", "held", "spared"}
    assert expected <= reached, f"never reached: {expected - reached}"


def test_the_rules_reach_every_corner() -> None:
    reached = run_case("lru", Partial.TAILS, 4, 80)
    expected = {"grants", "partial", "joined", "evicted tokens", "repeated", "forked", "unshared"}
    expected |= {"waiting", "settled", "settled by an error", "cancelled", "rolled back", "reset"}
    expected |= {"expired", "died", "detached", "absolved"}
    expected |= {"waiting for room", "found room", "waiting to grow", "grown", "pinned", "limited"}
    expected |= {"QuotaExceeded", "reuses nothing", "absolved one lease"}
    expected |= {"PoolExhausted", "InvalidRequest", "NotFound", "LeaseExpired"}
    assert expected <= reached, f"never reached: {expected - reached}"


def test_the_rules_reach_every_corner_of_segments() -> None:
    reached = run_case("lru", Partial.TAILS, 2, 80, segments=True)
    expected = {"approximate", "found beside", "moved inside blocks", "joined", "forked"}
    expected |= {"repeated", "reset", "expired", "died", "settled", "PoolExhausted"}
    assert expected <= reached, f"never reached: {expected - reached}"


class FromHypothesis:
    """Every choice is drawn from hypothesis, which can then shrink it."""

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def below(self, bound: int) -> int:
        """Give an integer from 0 to `bound` - 1."""
        return int(self._data.draw(st.integers(0, bound - 1)))


def machine(partial: Partial, block_size: int) -> type[RuleBasedStateMachine]:
    """Make the state machine of one kind of pool out of the rules."""

    class Machine(RuleBasedStateMachine):
        rules: Rules

        @initialize(
            num_blocks=st.sampled_from([3, 5, 8, 12, 400]),
            policy=st.sampled_from(sorted(POLICIES)),
            first_block=st.integers(0, 2),
            segments=st.booleans(),
            data=st.data(),
        )
        def start(
            self,
            num_blocks: int,
            policy: str,
            first_block: int,
            segments: bool,
            data: st.DataObject,
        ) -> None:
            shape = Shape(
                num_blocks, block_size, partial, policy, first_block=first_block, segments=segments
            )
            world = World(shape)
            self.rules = Rules(world, FromHypothesis(data))
            self.rules.attach()

        @rule(name=st.sampled_from(NAMES), data=st.data())
        def act(self, name: str, data: st.DataObject) -> None:
            self.rules.draw = FromHypothesis(data)
            try:
                step(self.rules, name)
            except Exception as failure:
                failure.add_note("\n".join(self.rules.world.log))
                raise

    return Machine


@pytest.mark.parametrize(("partial", "block_size"), KINDS)
def test_hypothesis_finds_no_disagreement(partial: Partial, block_size: int) -> None:
    run_state_machine_as_test(
        machine(partial, block_size),
        settings=settings(max_examples=EXAMPLES_PER_KIND, stateful_step_count=STEPS),
    )
