"""Several answers by one line: the first one's lane computes the prompt, the others find it."""

from __future__ import annotations

import pytest

from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import (
    Event,
    Failed,
    Finished,
    Request,
    Scored,
    Started,
    Token,
    to_json,
)
from prefixcache_worker.request_line import read_request
from prefixcache_worker.sampling import Sampling
from worker.zoo import answers, engine_at, random_tokens

PROMPT = random_tokens(70)
NEW = 8
DRAWN = Sampling(1.0, seed=5)


def alone(tiny: Model, sample: int) -> tuple[int, ...]:
    """The answer of one sample by a request of its own."""
    how = Sampling(1.0, seed=5, sample=sample)
    return answers(Engine(tiny, None, None), Request("a", PROMPT, NEW, how))["a"].tokens


def told_of(events: list[Event], name: str) -> dict[int, tuple[int, ...]]:
    """The answers by their samples, as `finished` and as tokens one by one."""
    done = {
        event.sample: event.tokens
        for event in events
        if isinstance(event, Finished) and event.id == name
    }
    for sample, tokens in done.items():
        mine = [e for e in events if isinstance(e, Token) and (e.id, e.sample) == (name, sample)]
        assert tuple(event.token for event in mine) == tokens
    return {sample: tokens for sample, tokens in done.items() if sample is not None}


def test_the_prompt_is_computed_once_and_each_other_answer_computes_a_token_of_it(
    tiny: Model, client: Client
) -> None:
    engine = engine_at(client, tiny, chunk=32, max_batch=3)
    engine.submit(Request("a", PROMPT, NEW, DRAWN, n=5, prompt_logprobs=0))
    events = list(engine.run())
    begun = {event.sample: event for event in events if isinstance(event, Started)}
    assert {sample: one.num_to_compute for sample, one in begun.items()} == {
        0: 70,
        1: 1,
        2: 1,
        3: 1,
        4: 1,
    }
    for sample in range(1, 5):
        ledger = begun[sample].ledger
        assert (ledger.hit + ledger.partial, ledger.joined) == (69, 0)
    assert engine.num_computed == 70 + 4 + 5 * (NEW - 1)
    assert told_of(events, "a") == {sample: alone(tiny, sample) for sample in range(5)}
    assert sum(len(e.logprobs) for e in events if isinstance(e, Scored)) == 69  # once
    engine.close()
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())


def test_without_a_service_too(tiny: Model) -> None:
    engine = Engine(tiny, None, None)
    engine.submit(Request("a", PROMPT, NEW, Sampling(1.0, seed=5, sample=3), n=2))
    events = list(engine.run())
    assert told_of(events, "a") == {0: alone(tiny, 3), 1: alone(tiny, 4)}
    assert engine.idle


def test_who_is_cancelled_is_told_of_each_answer_once(tiny: Model, client: Client) -> None:
    engine = engine_at(client, tiny, chunk=16)
    engine.submit(Request("a", PROMPT, NEW, DRAWN, n=3))
    events = engine.step()
    with pytest.raises(InvalidRequest, match="a request 'a' is in hand"):
        engine.submit(Request("a", PROMPT, NEW))
    engine.cancel("a")
    events += list(engine.run())
    done = [event for event in events if isinstance(event, Finished)]
    assert sorted(event.sample or 0 for event in done) == [0, 1, 2]
    assert {event.reason for event in done} == {"cancelled"}
    answers(engine, Request("a", PROMPT, NEW))  # the id is free again
    engine.close()
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())


def test_a_prompt_that_cannot_be_served_fails_each_of_them(tiny: Model) -> None:
    engine = Engine(tiny, None, None)
    engine.submit(Request("a", random_tokens(300), NEW, DRAWN, n=3))
    failed = [event for event in engine.run() if isinstance(event, Failed)]
    assert [event.sample for event in failed] == [0, 1, 2]
    assert engine.idle


def test_a_line_asks_for_them(tiny: Model) -> None:
    assert read_request({"tokens": [5], "n": 3}, tiny).n == 3
    assert to_json(Token("a", 7, "x", sample=2))["sample"] == 2
    assert "sample" not in to_json(Token("a", 7, "x"))
    for wrong in ({"n": 0}, {"n": 129}, {"n": "2"}, {"n": 2, "generated": [5]}):
        with pytest.raises(InvalidRequest, match="n is"):
            read_request({"tokens": [5], **wrong}, tiny)
