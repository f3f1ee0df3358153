from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_bench.experiments.generators import Arrival, Kind, Shape, generate
from prefixcache_bench.experiments.replay import Configuration, replay

SHAPE = Shape(count=30, seed=5, prefix_tokens=100, question_tokens=20, answer_tokens=30)


@pytest.mark.parametrize("kind", Kind)
def test_a_seed_gives_the_same_trace_and_another_gives_another(kind: Kind) -> None:
    first = generate(kind, SHAPE)
    assert generate(kind, SHAPE).requests == first.requests
    assert generate(kind, replace(SHAPE, seed=6)).fingerprint != first.fingerprint


@pytest.mark.parametrize("kind", Kind)
def test_requests_are_in_order_of_time_and_have_an_answer(kind: Kind) -> None:
    trace = generate(kind, SHAPE)
    times = [request.t for request in trace]
    assert times == sorted(times)
    assert all(0 < request.prompt < len(request.tokens) / 4 for request in trace)
    assert len(trace) >= SHAPE.count


def test_the_trace_of_a_seed_never_changes() -> None:
    shape = Shape(count=3, turns=2, prefix_tokens=20, question_tokens=5, answer_tokens=5)
    found = {kind.value: generate(kind, shape).fingerprint for kind in Kind}
    assert found == FINGERPRINTS


FINGERPRINTS = {
    "chats": "bbd94ceb",
    "few-shot": "ef8385cd",
    "agents": "04e353f4",
    "rag": "4e09f0a0",
    "tree": "d1cbf154",
}


def test_arrivals_have_the_rate_that_was_asked_for() -> None:
    for arrival in Arrival:
        trace = generate(
            Kind.FEW_SHOT, replace(SHAPE, count=2000, rate=4.0, arrival=arrival, answer_tokens=1)
        )
        assert trace.requests[-1].t == pytest.approx(500, rel=0.2)
    gaps = Counter(request.t for request in trace)
    assert set(gaps.values()) == {10}  # bursts


def test_sizes_are_around_the_mean_that_was_asked_for() -> None:
    trace = generate(Kind.FEW_SHOT, replace(SHAPE, count=3000))
    answers = [len(request.tokens) // 4 - request.prompt for request in trace]
    assert sum(answers) / len(answers) == pytest.approx(30, rel=0.05)
    even = generate(Kind.FEW_SHOT, replace(SHAPE, spread=0.0))
    assert {request.prompt for request in even} == {120}


def test_documents_in_any_order_share_less_than_examples_in_one() -> None:
    shape = replace(SHAPE, count=100, documents=8, document_tokens=100, prefixes=1, spread=0.0)
    rag = replay(generate(Kind.RAG, replace(shape, picked=3)), Configuration(4))
    examples = replace(shape, prefix_tokens=400)
    few_shot = replay(generate(Kind.FEW_SHOT, examples), Configuration(4))
    assert few_shot.prompt_tokens == rag.prompt_tokens
    assert 0.4 < rag.hit_rate < few_shot.hit_rate


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("picked", 0, "more than 0, not 0"),
        ("prefix_tokens", 2**63, "at most 10,000,000, not 9,223,372,036,854,775,808"),
        ("count", 10**400, "at most 10,000,000, not 10,000"),
        ("think_s", float("inf"), "at most 1,000,000,000, not inf"),
        ("rate", float("nan"), "at most 1,000,000,000, not nan"),
        ("spread", 1e300, "at most 10, not 1"),
        ("popularity", float("nan"), "at most 20, not nan"),
    ],
)
def test_a_number_out_of_range_is_refused(field: str, value: float, message: str) -> None:
    with pytest.raises(InvalidRequest, match=f"{field} must be {message}"):
        generate(Kind.RAG, replace(SHAPE, **{field: value}))  # type: ignore[arg-type]
