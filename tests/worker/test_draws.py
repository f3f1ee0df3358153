"""Random numbers by seed, sample and position: the same ones for whoever asks."""

from __future__ import annotations

import math

import pytest
import torch

from prefixcache_worker.draws import Place, exponentials

WORD = 2**64


def philox(key: tuple[int, int], counter: tuple[int, int, int, int]) -> tuple[int, int, int, int]:
    """Philox4x64-10, as its authors write it (Salmon et al., SC 2011)."""
    k0, k1 = key
    a, b, c, d = counter
    for _ in range(10):
        one, two = 0xD2E7470EE14C6C93 * a, 0xCA5A826395121157 * c
        a, b, c, d = two >> 64 ^ b ^ k0, two % WORD, one >> 64 ^ d ^ k1, one % WORD
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) % WORD, (k1 + 0xBB67AE8584CAA73B) % WORD
    return a, b, c, d


@pytest.mark.parametrize(
    ("seed", "sample", "position", "attempt"),
    [(0, 0, 0, 0), (11, 0, 3, 1), (-5, 7, 1000, 0), (2**63 - 1, 2**31 - 1, 2**31, 2000)],
)
def test_they_are_philox_of_seed_sample_position_and_attempt(
    seed: int, sample: int, position: int, attempt: int
) -> None:
    """Another program, or a later version of this one, draws the same by these lines."""
    words = [
        word
        for first in range(1, 4)  # the counter is raised before it is used
        for word in philox((seed % WORD, sample), (first, 0, attempt, position))
    ]
    halves = [half for word in words for half in (word % 2**32, word >> 32)]
    want = [-math.log1p(-(half + 0.5) / 2**32) for half in halves]
    [drawn] = exponentials([Place(seed, sample, position)], len(want), attempt=attempt)
    assert drawn.tolist() == pytest.approx(want, rel=1e-4)


@pytest.mark.parametrize(
    "other", [(12, 0, 3, 0), (11, 1, 3, 0), (11, 0, 4, 0), (11, 0, 3, 1), (-11, 0, 3, 0)]
)
def test_another_seed_sample_position_or_attempt_draws_others(
    other: tuple[int, int, int, int],
) -> None:
    [mine] = exponentials([Place(11, 0, 3)], 1000)
    [theirs] = exponentials([Place(*other[:3])], 1000, attempt=other[3])
    assert not (mine == theirs).any()
    # Nor are they the same ones, a few places away.
    near = {round(one, 6) for one in mine.tolist()} & {round(one, 6) for one in theirs.tolist()}
    assert len(near) < 5


@pytest.mark.parametrize("count", [1, 2, 7, 16, 97, 255, 1024, 1025])
def test_the_first_ones_depend_neither_on_how_many_are_drawn_nor_on_who_draws_as_well(
    count: int,
) -> None:
    """A vocabulary that is padded, and a batch of others, draw the same tokens."""
    mine, others = Place(5, 2, 9), [Place(5, 2, at) for at in range(4)]
    [alone] = exponentials([mine], 2000)
    assert torch.equal(exponentials([*others, mine], count)[-1], alone[:count])


def test_they_are_exponential() -> None:
    places = [Place(seed, 0, at) for seed in range(8) for at in range(32)]
    drawn = exponentials(places, 4096).flatten()
    assert drawn.min() > 0
    assert drawn.mean().item() == pytest.approx(1.0, abs=0.005)
    for bound in (0.001, 0.01, 0.1, 1.0, 3.0, 8.0):
        share = (drawn < bound).float().mean().item()
        want = 1 - math.exp(-bound)
        assert share == pytest.approx(want, abs=4 * (want / len(drawn)) ** 0.5)
