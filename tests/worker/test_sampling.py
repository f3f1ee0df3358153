from __future__ import annotations

import pytest
import torch

from prefixcache.errors import InvalidRequest
from prefixcache_worker.sampling import Sampler, Sampling, top_two

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.5])


def draw(sampling: Sampling, count: int) -> list[int]:
    sampler = Sampler(sampling)
    return [sampler.choose(LOGITS) for _ in range(count)]


def test_greedy_takes_the_most_likely_token() -> None:
    assert draw(Sampling(), 3) == [1, 1, 1]


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draw(Sampling(1.0, seed=4), 50) == draw(Sampling(1.0, seed=4), 50)
    assert draw(Sampling(1.0, seed=4), 50) != draw(Sampling(1.0, seed=5), 50)
    assert draw(Sampling(1.0), 50) != draw(Sampling(1.0), 50)


def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    drawn = torch.bincount(torch.tensor(draw(Sampling(0.7, seed=0), 20000)), minlength=5) / 20000
    torch.testing.assert_close(drawn, torch.softmax(LOGITS / 0.7, -1), atol=0.01, rtol=0)


def test_top_p_draws_only_from_the_nucleus() -> None:
    # The probabilities are about .50, .30, .18, .02, .01.
    assert set(draw(Sampling(1.0, top_p=0.4, seed=0), 300)) == {1}
    assert set(draw(Sampling(1.0, top_p=0.6, seed=0), 300)) == {1, 4}
    assert set(draw(Sampling(1.0, top_p=0.9, seed=0), 300)) == {1, 4, 2}


def test_the_two_best_logits_come_best_first() -> None:
    top = top_two(LOGITS)
    assert (top.tokens, top.logits) == ((1, 4), (3.0, 2.5))


@pytest.mark.parametrize("wrong", [(-1.0, 1.0), (float("nan"), 1.0), (1.0, 0.0), (1.0, 1.5)])
def test_senseless_settings_are_refused(wrong: tuple[float, float]) -> None:
    with pytest.raises(InvalidRequest):
        Sampling(*wrong)
