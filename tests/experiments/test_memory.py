from __future__ import annotations

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_bench.experiments.branching import beam_search, parallel_sampling
from prefixcache_bench.experiments.memory import (
    Job,
    Reservation,
    Shares,
    contiguous,
    jobs_of,
    paged,
)
from prefixcache_bench.experiments.traces import Trace

JOBS = [Job(10 + 7 * number % 50, 5 + 13 * number % 90) for number in range(200)]


def total(shares: Shares) -> float:
    return shares.useful + shares.reserved + shares.internal + shares.external


@pytest.mark.parametrize("way", Reservation)
def test_contiguous_shares_add_up(way: Reservation) -> None:
    shares = contiguous(JOBS, 1024, way, 256)
    assert total(shares) == pytest.approx(1)
    assert min(shares.useful, shares.reserved, shares.internal, shares.external) >= 0


@pytest.mark.parametrize("block_size", [1, 4, 16, 64])
def test_paged_shares_add_up(block_size: int) -> None:
    shares = paged(JOBS, 1024, block_size)
    assert total(shares) == pytest.approx(1)
    assert shares.useful > contiguous(JOBS, 1024, Reservation.ORACLE, 256).useful


def test_what_is_known_in_advance_is_never_wasted_inside() -> None:
    assert contiguous(JOBS, 1024, Reservation.ORACLE, 256).internal == 0
    assert contiguous(JOBS, 1024, Reservation.MAX, 256).internal > 0.3


def test_one_sequence_that_fills_the_memory_is_counted_by_hand() -> None:
    # Two in line; only one fits. It grows from 4 to 8 tokens of 8 slots: 4, 5, 6, 7, 8 are useful.
    shares = contiguous([Job(4, 4), Job(4, 4)], 8, Reservation.ORACLE, 8)
    assert shares.useful == pytest.approx((4 + 5 + 6 + 7 + 8) / 5 / 8)
    assert shares.reserved == pytest.approx((4 + 3 + 2 + 1 + 0) / 5 / 8)
    assert shares.external == 0


def test_smaller_blocks_waste_less() -> None:
    useful = [paged(JOBS, 1024, size).useful for size in (1, 16, 64)]
    assert useful == sorted(useful, reverse=True)


def test_a_sequence_that_can_never_fit_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="do not hold"):
        paged([Job(100, 5)], 64, 16)


def test_lengths_are_those_of_each_turn_alone_or_with_its_past(small: Trace) -> None:
    alone = jobs_of(small, longest=10**6, history=False, limit=10**6)
    whole = jobs_of(small, longest=10**6, history=True, limit=10**6)
    assert len(alone) == len(whole) == len(small)
    assert [job.answer for job in alone] == [job.answer for job in whole]
    assert sum(job.prompt for job in whole) == small.prompt_tokens
    assert 0 < sum(job.prompt for job in alone) < small.prompt_tokens / 2
    assert max(job.total for job in jobs_of(small, longest=150, history=True, limit=9)) <= 150


def test_samples_share_the_whole_blocks_of_their_prompt() -> None:
    # 2 samples, 32 prompt tokens, 16 generated, blocks of 16: 2 + 1 + 1 blocks, not 3 + 3.
    assert parallel_sampling([Job(32, 16)], 2, 16) == pytest.approx(1 - 4 / 6)
    # 5 prompt tokens: the partly filled block is copied, nothing is shared.
    assert parallel_sampling([Job(5, 11)], 2, 16) == 0


def test_more_sequences_save_more_and_beams_more_than_samples() -> None:
    jobs = [Job(60, 60), Job(33, 40)]
    samples = [parallel_sampling(jobs, width, 16) for width in (2, 4, 6)]
    beams = [beam_search(jobs, width, 16) for width in (2, 4, 6)]
    assert samples == sorted(samples)
    assert beams == sorted(beams)
    assert all(beam > sample for beam, sample in zip(beams, samples, strict=True))
    assert beam_search(jobs, 4, 16) == beams[1]
