from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache_worker.penalties import Penalties

VOCAB = 200
TOKENS = st.lists(st.integers(0, VOCAB - 1), max_size=150)
LOGITS = torch.linspace(-4, 4, VOCAB)


def naive(
    prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float
) -> list[float]:
    """As OpenAI's and Hugging Face's documents say it, a token at a time."""
    out = []
    for token, logit in enumerate(LOGITS.tolist()):
        if token in prompt or token in answer:
            logit = logit / repetition if logit > 0 else logit * repetition
        out.append(logit - frequency * answer.count(token) - presence * (token in answer))
    return out


@given(
    TOKENS,
    TOKENS,
    st.sampled_from([1.0, 0.5, 1.3]),
    st.sampled_from([0.0, -2.0, 0.7]),
    st.sampled_from([0.0, 2.0, -0.1]),
)
@settings(max_examples=100, deadline=None)
def test_they_are_those_of_counting_each_token(
    prompt: list[int], answer: list[int], repetition: float, presence: float, frequency: float
) -> None:
    penalties = Penalties(prompt, repetition, presence, frequency)
    for token in answer:
        penalties.add(token)
    logits = LOGITS.clone()
    penalties.apply(logits)
    want = naive(prompt, answer, repetition, presence, frequency)
    assert logits.tolist() == pytest.approx(want, abs=1e-4)


def test_what_is_ruled_out_stays_so() -> None:
    penalties = Penalties([3], 1.5, 1.0, 1.0)
    penalties.add(3)
    logits = torch.full((5,), -torch.inf)
    penalties.apply(logits)
    assert logits.tolist() == [-torch.inf] * 5


@pytest.mark.parametrize("repetition", [1.0, 1.5])
def test_more_different_tokens_than_there_are_places_at_first_are_all_counted(
    repetition: float,
) -> None:
    prompt, answer = [*range(40)], [*range(30, VOCAB), *range(0, VOCAB, 3)]
    penalties = Penalties(prompt, repetition, 0.5, 0.25)
    for token in answer:
        penalties.add(token)
    logits = LOGITS.clone()
    penalties.apply(logits)
    want = naive(prompt, answer, repetition, 0.5, 0.25)
    assert logits.tolist() == pytest.approx(want, abs=1e-4)
