"""An answer that one worker has begun goes on with another one as if nothing had been."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import transformers

import prefixcache
from prefixcache.client import Client
from prefixcache.errors import InvalidRequest
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Event, Failed, Finished, Request, Started, Token
from prefixcache_worker.sampling import Sampling
from worker.zoo import Service, answers, build, engine_at, finished, random_tokens

PROMPT = random_tokens(41)
NEW = 18
SAMPLED = Sampling(0.9, top_p=0.95, seed=5, sample=2)


@pytest.fixture(scope="module")
def spoken(demo_folder: Path) -> Model:
    """A tiny network whose tokens are pieces of text, also halves of characters."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder)
    return Model.of(build("llama", vocab_size=49152), name="spoken", tokenizer=tokenizer)


def begun(engine: Engine, request: Request, count: int) -> list[Token]:
    """Let an engine begin an answer; give the first `count` tokens that it told."""
    engine.submit(request)
    told: list[Token] = []
    while len(told) < count:
        told += [event for event in engine.step() if isinstance(event, Token)]
        engine.wait(0.001)
    return told[:count]


def killed(engine: Engine) -> None:
    """The worker says nothing any more: the service ends what it held."""
    assert engine.membership.shared is not None
    engine.membership.shared.session._call.cancel()


PENALISED = Sampling(1.1, 0.9, 7, top_k=400, min_p=0.001, frequency_penalty=0.5, min_tokens=9)


@pytest.mark.parametrize(
    "sampling", [Sampling(), SAMPLED, PENALISED], ids=["greedy", "sampled", "penalised"]
)
def test_killed_at_any_token_an_answer_is_the_same(
    spoken: Model, service: Service, client: Client, sampling: Sampling
) -> None:
    other = engine_at(client, spoken)
    for count in range(1, NEW):
        prompt = random_tokens(41, seed=count)
        asked = Request("asked", prompt, NEW, sampling)
        want = answers(Engine(spoken, None, None), asked)["asked"]
        with prefixcache.connect(service.target) as own:
            engine = engine_at(own, spoken)
            told = begun(engine, asked, count)
            killed(engine)
            other.submit(replace(asked, generated=[event.token for event in told]))
            events = list(other.run())
            engine.close()
        [done] = finished(events).values()
        assert (done.tokens, done.text, done.reason) == (want.tokens, want.text, want.reason)
        rest = [event for event in events if isinstance(event, Token)]
        assert len(rest) == NEW - count
        assert "".join(event.text for event in [*told, *rest]) == want.text
        # What the first had committed is found, and all but its last block had been.
        assert done.num_computed <= NEW - count + 16
    other.close()


STOPS = 3


@pytest.mark.parametrize("at", range(STOPS))
def test_a_stop_string_that_was_half_said_when_its_worker_died_still_ends_the_answer(
    spoken: Model, at: int
) -> None:
    engine = Engine(spoken, None, None)
    whole = answers(engine, Request("whole", PROMPT, NEW, SAMPLED))["whole"]
    first = 3 + at * (len(whole.text) - 12) // STOPS
    stop = whole.text[first : first + 9]  # begins and ends anywhere in a token
    want = answers(engine, Request("want", PROMPT, NEW, SAMPLED, stop_strings=(stop,)))["want"]
    assert want.reason == "stop"
    assert stop not in want.text
    for count in range(len(want.tokens) + 1):
        request = Request(
            f"then{count}",
            PROMPT,
            NEW,
            SAMPLED,
            stop_strings=(stop,),
            generated=want.tokens[:count],
        )
        [done] = answers(engine, request).values()
        assert (done.tokens, done.text, done.reason) == (want.tokens, want.text, "stop")


def test_the_text_goes_on_behind_what_the_lost_worker_had_shown(spoken: Model) -> None:
    """Characters of several tokens, and what may become a stop string, are held back by both."""
    engine = Engine(spoken, None, None)
    request = Request("whole", PROMPT, NEW, SAMPLED, stop_strings=("\n\nQ:",))
    engine.submit(request)
    told = [event for event in engine.run() if isinstance(event, Token)]
    for count in range(1, NEW):
        again = Request(
            "again",
            PROMPT,
            NEW,
            SAMPLED,
            stop_strings=("\n\nQ:",),
            generated=[event.token for event in told[:count]],
        )
        engine.submit(again)
        rest = [event for event in engine.run() if isinstance(event, Token)]
        assert [event.text for event in rest] == [event.text for event in told[count:]]


def test_who_died_between_its_last_token_and_saying_so_is_answered_without_computing(
    tiny: Model,
) -> None:
    engine = Engine(tiny, None, None)
    want = answers(engine, Request("a", random_tokens(9), NEW))["a"]
    before = engine.num_computed
    engine.submit(Request("b", random_tokens(9), NEW, generated=want.tokens))
    events: list[Event] = list(engine.run())
    [done] = events
    assert isinstance(done, Finished)
    assert (done.tokens, done.reason) == (want.tokens, "length")
    stop = want.tokens[4]
    cut = want.tokens[: want.tokens.index(stop) + 1]
    ended = Request("c", random_tokens(9), NEW, stop_ids=(stop,), generated=cut)
    [done] = answers(engine, ended).values()
    assert (done.tokens, done.reason) == (cut, "stop")
    assert engine.num_computed == before


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"generated": range(1, NEW + 2)}, "19 tokens are generated, more than the 18"),
        ({"generated": [5, 6, 7], "stop_ids": (6,)}, "token 2 of 3 generated ones, 6, ends the"),
        ({"generated": [5, 97]}, "must lie between 0 and 96"),
        ({"generated": [-1]}, "must lie between 0 and 96"),
    ],
)
def test_what_no_answer_begins_with_is_refused(
    tiny: Model, options: dict[str, Any], said: str
) -> None:
    engine = Engine(tiny, None, None)
    with pytest.raises(InvalidRequest, match=said):
        engine.submit(Request("a", [1, 2], NEW, **options))
    assert engine.idle
    assert answers(engine, Request("a", [1, 2], 1))  # the name is free


def test_a_prompt_without_room_is_refused_whatever_was_generated(tiny: Model) -> None:
    engine = Engine(tiny, None, None)
    engine.submit(Request("a", random_tokens(tiny.max_tokens), 8, generated=[1]))
    [failed] = engine.run()
    assert isinstance(failed, Failed)
    assert "leaves no room" in failed.message


def test_started_tells_by_which_seed_another_worker_can_go_on(tiny: Model) -> None:
    engine = Engine(tiny, None, None)
    unseeded = Sampling(1.0)
    engine.submit(Request("a", [1, 2, 3], NEW, unseeded))
    events = list(engine.run())
    [one] = [event for event in events if isinstance(event, Started)]
    want = finished(events)["a"]
    assert one.seed is not None
    seeded = Sampling(1.0, seed=one.seed)
    other = Engine(tiny, None, None)
    [done] = answers(
        other, Request("a", [1, 2, 3], NEW, seeded, generated=want.tokens[:7])
    ).values()
    assert done.tokens == want.tokens
    engine.submit(Request("greedy", [1, 2, 3], 1))
    assert [event.seed for event in engine.run() if isinstance(event, Started)] == [None]
