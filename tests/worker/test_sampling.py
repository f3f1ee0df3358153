from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_worker.draws import Place, exponentials
from prefixcache_worker.sampling import Sampler, Sampling, choose, logprobs, top_two

LOGITS = torch.tensor([0.0, 3.0, 2.0, -1.0, 2.5])


def draw(sampling: Sampling, count: int, logits: Tensor = LOGITS, first: int = 0) -> list[int]:
    """Choose the tokens of some positions, all from the same logits."""
    positions = range(first, first + count)
    return choose([Sampler(sampling)] * count, logits.expand(count, -1), positions)


def test_greedy_takes_the_most_likely_token() -> None:
    assert draw(Sampling(), 3) == [1, 1, 1]


def test_the_same_seed_draws_the_same_tokens() -> None:
    assert draw(Sampling(1.0, seed=4), 50) == draw(Sampling(1.0, seed=4), 50)
    assert draw(Sampling(1.0, seed=4), 50) != draw(Sampling(1.0, seed=5), 50)
    assert draw(Sampling(1.0), 50) != draw(Sampling(1.0), 50)


def test_a_token_depends_on_its_position_and_not_on_what_was_drawn_before() -> None:
    """So another worker goes on where one has stopped."""
    all_of_them = draw(Sampling(1.0, seed=4), 50)
    assert draw(Sampling(1.0, seed=4), 20, first=30) == all_of_them[30:]


def test_samples_of_one_seed_are_drawn_apart() -> None:
    one, two = (draw(Sampling(1.0, seed=4, sample=sample), 200) for sample in (0, 1))
    assert sum(a == b for a, b in zip(one, two, strict=True)) < 120  # 72 by chance


def test_a_seed_that_was_made_up_can_be_named() -> None:
    sampler = Sampler(Sampling(1.0))
    drawn = choose([sampler] * 50, LOGITS.expand(50, -1), range(50))
    assert drawn == draw(Sampling(1.0, seed=sampler.seed), 50)


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_their_probability_says() -> None:
    drawn = torch.bincount(torch.tensor(draw(Sampling(0.7, seed=0), 20000)), minlength=5) / 20000
    torch.testing.assert_close(drawn, torch.softmax(LOGITS / 0.7, -1), atol=0.01, rtol=0)


@pytest.mark.slow
def test_tokens_of_many_groups_are_drawn_as_often_as_their_probability_says() -> None:
    logits = torch.full((3000,), -50.0)
    some = torch.tensor([0, 1, 255, 256, 700, 2999])
    logits[some] = torch.tensor([1.0, 0.0, 2.0, 1.5, 0.5, 1.0])
    drawn = torch.tensor(draw(Sampling(1.0, seed=3), 20000, logits))
    shares = torch.bincount(drawn, minlength=3000)[some] / 20000
    torch.testing.assert_close(shares, torch.softmax(logits, -1)[some], atol=0.01, rtol=0)


def test_top_p_draws_only_from_the_nucleus() -> None:
    # The probabilities are about .50, .30, .18, .02, .01.
    assert set(draw(Sampling(1.0, top_p=0.4, seed=0), 300)) == {1}
    assert set(draw(Sampling(1.0, top_p=0.6, seed=0), 300)) == {1, 4}
    assert set(draw(Sampling(1.0, top_p=0.9, seed=0), 300)) == {1, 4, 2}


@pytest.mark.parametrize("temperature", [1e-300, 1e-30, 1e-4, 1e30, 1e300])
def test_temperatures_near_nothing_and_without_end_draw_a_token(temperature: float) -> None:
    drawn = set(draw(Sampling(temperature, seed=1), 100))
    assert drawn == ({1} if temperature < 1 else {0, 1, 2, 3, 4})


def by_share(shares: Tensor) -> list[int]:
    """Sort all tokens, the most likely one first."""
    return sorted(range(len(shares)), key=lambda token: (-float(shares[token]), token))


def sorted_nucleus(shares: Tensor, top_p: float, top_k: int = 0, min_p: float = 0.0) -> list[int]:
    """Sort all, leave out what `min_p` and `top_k` do, and walk until `top_p` of it is filled."""
    order = by_share(shares)
    floor = torch.tensor(min_p) * shares.max()
    order = [token for token in order if shares[token] >= floor][: top_k or None]
    shares = shares.double()
    whole = float(shares[order].sum()) if top_k or min_p else 1.0
    kept, filled = [], 0.0
    for token in order:
        if top_p < 1.0 and filled >= top_p * whole:
            break
        kept.append(token)
        filled += float(shares[token])
    return kept


@st.composite
def a_distribution(draw: st.DrawFn) -> Tensor:
    """Peaked, flat, in steps (many ties), or with a long tail; of a few or of many tokens."""
    count = draw(st.sampled_from([1, 2, 5, 97, 1024, 5000, 40000]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    noise = torch.randn(count, generator=generator)
    kind = draw(st.sampled_from(["peaked", "flat", "steps", "tail", "equal"]))
    logits = {
        "peaked": noise * 8,
        "flat": noise * 0.1,
        "steps": (noise * 2).round(),
        "tail": -torch.arange(1, count + 1).float().log() * 1.1,
        "equal": torch.zeros(count),
    }[kind]
    return torch.softmax(logits[torch.randperm(count, generator=generator)], -1)


def raced(shares: Tensor, place: Place, attempt: int) -> int:
    """Let groups of 256 run, then the tokens of the first one."""
    shares = torch.cat([shares, torch.zeros(-len(shares) % 256)])
    sums = [float(shares[at : at + 256].sum()) for at in range(0, len(shares), 256)]
    times = exponentials([place], 256 + len(sums), attempt=attempt)[0].tolist()
    group = max(range(len(sums)), key=lambda one: sums[one] / times[256 + one])
    inside = shares[group * 256 :][:256].tolist()
    return group * 256 + max(range(256), key=lambda one: inside[one] / times[one])


@given(
    a_distribution(),
    st.floats(0.1, 3.0),
    st.sampled_from([1e-9, 0.01, 0.3, 0.9, 0.99, 1 - 1e-9, 1.0, 1.0]),
    st.sampled_from([0, 0, 1, 3, 50, 2000]),
    st.sampled_from([0.0, 0.0, 0.001, 0.2, 1.0]),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(0, 10**6),
)
@settings(max_examples=200, deadline=None)
def test_the_choice_is_that_of_sorting_all(
    shares: Tensor,
    temperature: float,
    top_p: float,
    top_k: int,
    min_p: float,
    seed: int,
    position: int,
) -> None:
    logits = shares.log()
    sampling = Sampling(temperature, top_p, seed, sample=3, top_k=top_k, min_p=min_p)
    [got] = draw(sampling, 1, logits, first=position)
    warmed = torch.softmax(logits / temperature, -1)
    order = by_share(warmed)
    kept = set(sorted_nucleus(warmed, top_p, top_k, min_p))
    left = warmed.clone()
    for attempt in range(1000):
        want = raced(left, Place(seed, 3, position), attempt)
        if want in kept:
            break
        left[order[order.index(want) :]] = 0.0
    assert got == want


@pytest.mark.slow
def test_drawing_from_a_nucleus_again_and_again_is_drawing_from_it() -> None:
    """Who is not in it is drawn again, from those that are likelier: shares stay as they are."""
    logits = torch.randn(700, generator=torch.Generator().manual_seed(1)) * 2
    shares = torch.softmax(logits, -1)
    kept = sorted_nucleus(shares, 0.3)
    assert 3 < len(kept) < 60
    drawn = torch.tensor(draw(Sampling(1.0, top_p=0.3, seed=9), 20000, logits))
    got = torch.bincount(drawn, minlength=700) / 20000
    assert set(drawn.tolist()) <= set(kept)
    torch.testing.assert_close(got[kept], shares[kept] / shares[kept].sum(), atol=0.012, rtol=0)


def test_rows_of_a_step_are_chosen_as_each_alone() -> None:
    generator = torch.Generator().manual_seed(2)
    logits = torch.randn(5, 300, generator=generator)
    kinds = [
        Sampling(logit_bias=((7, 20.0),)),
        Sampling(1.0, seed=1),
        Sampling(0.5, 0.2, seed=1),
        Sampling(),
        Sampling(2.0),
    ]
    samplers = [Sampler(kind) for kind in kinds]
    positions = [3, 0, 3, 7, 1]
    alone = [
        choose([sampler], row[None], [position])[0]
        for sampler, row, position in zip(samplers, logits, positions, strict=True)
    ]
    before = logits.clone()
    assert choose(samplers, logits, positions) == alone
    assert torch.equal(logits, before)
    assert choose([], logits[:0], []) == []


def test_logits_that_differ_a_little_draw_nearly_always_the_same_tokens() -> None:
    """Another batch, or another worker, rounds differently; a tail has many tokens."""
    generator = torch.Generator().manual_seed(0)
    changed = 0
    for position in range(400):
        logits = torch.randn(20000, generator=generator)
        other = logits + 1e-3 * torch.randn(20000, generator=generator)
        how = Sampling(1.0, seed=1)
        changed += draw(how, 1, logits, position) != draw(how, 1, other, position)
    assert changed <= 8  # a walk along the cumulative sum changes 35


def test_what_cannot_be_is_never_drawn() -> None:
    logits = LOGITS.clone()
    logits[[0, 1]] = -math.inf
    assert set(draw(Sampling(2.0, seed=0), 300, logits)) == {2, 3, 4}


@pytest.mark.parametrize(
    "how",
    [
        Sampling(1e300, top_p=0.5, top_k=3, seed=1, min_tokens=1),
        Sampling(1e300, top_p=0.5, min_p=0.1, seed=1, min_tokens=1),
        Sampling(1.0, top_p=5e-324, top_k=3, seed=1, min_tokens=1),
        Sampling(1e-300, top_p=5e-324, min_p=1.0, seed=1, min_tokens=1),
        Sampling(1.0, top_p=0.5, top_k=3, seed=1, repetition_penalty=0.01, min_tokens=1),
    ],
)
def test_however_extreme_a_token_is_drawn_and_it_is_none_that_is_ruled_out(how: Sampling) -> None:
    logits = torch.linspace(-80, 80, 400).roll(7)
    for flat in (logits, torch.zeros(400)):
        [token] = choose([Sampler(how, range(400), stop_ids=[6])], flat[None], [0])
        assert token != 6


def test_top_k_and_min_p_keep_the_most_likely_ones() -> None:
    # The probabilities are about .50, .30, .18, .02, .01.
    assert set(draw(Sampling(1.0, top_k=2, seed=0), 300)) == {1, 4}
    assert set(draw(Sampling(1.0, top_k=1, seed=0), 300)) == {1}
    assert set(draw(Sampling(1.0, min_p=0.3, seed=0), 300)) == {1, 4, 2}
    # Of the first two, which together have .80, the first one fills 60 %.
    assert set(draw(Sampling(1.0, top_k=2, top_p=0.6, seed=0), 300)) == {1}
    assert set(draw(Sampling(1.0, top_p=0.6, seed=0), 300)) == {1, 4}


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_bias_and_penalties_change_what_is_chosen(temperature: float) -> None:
    bias = Sampling(temperature, seed=0, logit_bias=((3, 100.0), (1, -100.0)))
    assert draw(bias, 20) == [3] * 20
    penalised = Sampling(temperature, seed=0, frequency_penalty=2.0)
    sampler = Sampler(penalised)
    said: list[int] = []
    for position in range(60):
        [token] = choose([sampler], LOGITS[None], [position])
        sampler.add(token)
        said.append(token)
    assert len(set(said)) == 5
    assert max(map(said.count, range(5))) < 20


def test_a_token_that_would_end_the_answer_too_early_is_not_chosen() -> None:
    for how in (Sampling(min_tokens=2), Sampling(1.0, seed=1, min_tokens=2)):
        sampler = Sampler(how, stop_ids=(1, 4))
        rows = LOGITS.expand(40, -1)
        assert not set(choose([sampler] * 40, rows, [1] * 40)) & {1, 4}
        assert 1 in choose([sampler] * 40, rows, range(2, 42))


def test_logprobs_are_those_of_the_model_itself() -> None:
    want = torch.log_softmax(LOGITS, -1)
    told = logprobs(LOGITS, 2, 2)
    assert told.logprob == pytest.approx(float(want[2]))
    assert [token for token, _ in told.top] == [1, 4]
    assert [value for _, value in told.top] == pytest.approx([float(want[1]), float(want[4])])
    assert logprobs(LOGITS, 0, 0).top == ()
    rare = torch.tensor([1.0, -math.inf, 0.0])
    assert [token for token, _ in logprobs(rare, 0, 20).top] == [0, 2]


def test_the_two_best_logits_come_best_first() -> None:
    top = top_two(LOGITS)
    assert (top.tokens, top.logits) == ((1, 4), (3.0, 2.5))


@pytest.mark.parametrize(
    "wrong",
    [
        *({"temperature": odd} for odd in (-1.0, float("nan"), float("inf"))),
        *({"top_p": odd} for odd in (0.0, 1.5, float("nan"))),
        *({"seed": odd} for odd in (2**63, -(2**63) - 1)),
        *({"sample": odd} for odd in (-1, 2**31)),
        *({"top_k": -1}, {"min_tokens": -1}),
        *({"min_p": odd} for odd in (-0.1, 1.1, float("nan"))),
        *({"presence_penalty": odd} for odd in (-2.1, 2.1, float("nan"))),
        *({"frequency_penalty": odd} for odd in (-2.1, 2.1, float("nan"))),
        *({"repetition_penalty": odd} for odd in (0.0, 1e-300, -1.0, 101.0, float("nan"))),
        *({"logit_bias": ((1, odd),)} for odd in (101.0, float("nan"), -float("inf"))),
    ],
)
def test_senseless_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match=next(iter(wrong))):
        Sampling(**wrong)
