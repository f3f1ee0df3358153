from __future__ import annotations

import pytest

from prefixcache.types import Namespace
from prefixcache_bench.experiments.curve import curve
from prefixcache_bench.experiments.generators import Kind, Shape, generate
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace


@pytest.mark.walk
@pytest.mark.parametrize("block_size", [1, 4, 32])
def test_the_curve_equals_explicit_replays(small: Trace, block_size: int) -> None:
    found = curve(small, block_size)
    capacities = [*range(1, 40, 3), 75, 150, 300, 700, 1500, found.working_set]
    for blocks, tokens, hits in zip(
        capacities, found.hit_tokens(capacities), found.hit_blocks(capacities), strict=True
    ):
        explicit = replay(small, Configuration(block_size, blocks))
        assert (tokens, hits) == (explicit.hit_tokens, explicit.hit_blocks), f"{blocks} blocks"
    infinite = replay(small, Configuration(block_size))
    assert found.working_set == infinite.peak_blocks
    assert found.hit_rates([found.working_set]) == [infinite.hit_rate]
    assert found.prompt_blocks == infinite.prompt_blocks


@pytest.mark.slow
@pytest.mark.parametrize("kind", Kind)
def test_at_every_single_capacity(kind: Kind) -> None:
    shape = Shape(
        count=8, turns=2, prefixes=2, prefix_tokens=30, question_tokens=6, answer_tokens=10,
        documents=5, document_tokens=16, picked=2, fan_out=2,
    )  # fmt: skip
    made = generate(kind, shape)
    spread = [
        request._replace(namespace=Namespace(str(number % 3 // 2)))
        for number, request in enumerate(made)
    ]
    trace = Trace("spread", spread)
    found = curve(trace, 4)
    capacities = range(1, found.working_set + 2)
    assert found.hit_tokens(capacities) == [
        replay(trace, Configuration(4, blocks)).hit_tokens for blocks in capacities
    ]


def test_partly_filled_hashed_blocks_count_what_they_hold(small: Trace) -> None:
    hashed = [
        request._replace(
            tokens=request.tokens[: 4 * request.prompt], length=16 * request.prompt - 5
        )
        for request in small
    ]
    trace = Trace("hashed", hashed, unit=16, counts_last=True)
    for size in (16, 64):
        found = curve(trace, size)
        capacities = [5, 20, 60, 200, 1000, found.working_set]
        for blocks, tokens in zip(capacities, found.hit_tokens(capacities), strict=True):
            assert tokens == replay(trace, Configuration(size, blocks)).hit_tokens


def test_the_least_capacity_for_a_share_of_the_ceiling_is_the_least(small: Trace) -> None:
    found = curve(small, 8)
    ceiling = found.hit_tokens([found.working_set])[0]
    for share in (0.5, 0.9, 1.0):
        least = found.smallest_for(share)
        assert found.hit_tokens([least])[0] >= share * ceiling > found.hit_tokens([least - 1])[0]


def test_the_knee_is_where_a_step_is() -> None:
    space = Namespace("m")
    tokens = [bytes([0, 0, number, 0]) * 8 for number in range(50)]
    # 50 prompts in turn: nothing hits until all 50 fit, then everything does.
    trace = Trace("loop", [Request(t, space, tokens[t % 50], 8, 8) for t in range(400)])
    found = curve(trace, 4)
    assert found.working_set == 100
    # A request leaves its last block alone: what pays is the first block of each.
    assert found.hit_rates([98]) == [0.0]
    assert found.knee() == 99
