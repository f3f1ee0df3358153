"""`use_beam_search`: the likeliest answers of a request, over HTTP and over a worker's death."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from prefixcache_serving.ask import read_ask
from prefixcache_serving.fields import CHAT, COMPLETIONS
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import Meter
from prefixcache_serving.refusals import Refused
from prefixcache_serving.router import Router
from prefixcache_serving.served_model import ServedModel
from prefixcache_worker.beam_search import BeamSearch
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Finished, Request
from serving.bench import ABOUT, STOP
from serving.real import Worker, post
from worker.zoo import answers, build, random_tokens

PROMPTS = [random_tokens(20, seed=3), random_tokens(33, seed=4)]
NEW = 12


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return Model.of(build("llama"), name="tiny")


def found(model: Model, prompt: list[int], how: BeamSearch, n: int) -> Finished:
    asked = Request("a", prompt, NEW, stop_ids=(), beams=how, n=n)
    return answers(Engine(model, None, None), asked)["a"]


def body(**more: Any) -> dict[str, Any]:
    told = {"model": "played", "prompt": PROMPTS, "max_tokens": NEW, "use_beam_search": True}
    return told | more


def test_the_answers_are_the_engine_s_best_first(tokenizer_folder: Path, model: Model) -> None:
    terms = {"n": 2, "best_of": 4, "length_penalty": 0.5, "early_stopping": "never"}
    told = post(tokenizer_folder, model, body(**terms))
    want = [found(model, prompt, BeamSearch(4, 0.5, "never"), 2) for prompt in PROMPTS]
    texts = [one["text"] for one in told["choices"]]
    names = {0: "user", 1: "assistant"} | {number: f"w{number}" for number in range(2, 97)}
    assert texts == [
        " ".join(names[token] for token in beam.tokens) for one in want for beam in one.beams or ()
    ]
    assert [one["index"] for one in told["choices"]] == [0, 1, 2, 3]
    assert {one["finish_reason"] for one in told["choices"]} == {"length"}
    assert told["usage"]["completion_tokens"] == 4 * NEW
    assert told["usage"]["prompt_tokens"] == sum(map(len, PROMPTS))


def test_who_takes_a_search_over_begins_it_anew(model: Model) -> None:
    router = Router(Meter(), longest_queue=8)
    line = {"tokens": PROMPTS[0], "max_new_tokens": NEW, "stop_ids": [], "beams": 3, "n": 3}
    journey = Journey("a", line, frozenset())
    first, second = Worker(model, router, "first"), Worker(model, router, "second")
    router.join(first, 4)
    router.admit([journey])
    for _ in range(5):
        first.step()
    assert not journey.is_over
    assert journey.due == 1  # it was heard of
    router.join(second, 4)
    router.part("first", died=True)
    while not journey.is_over:
        second.step()
    assert journey.workers == ["first", "second"]
    want = found(model, PROMPTS[0], BeamSearch(3), 3)
    assert [tuple(one["tokens"]) for one in journey.beams] == [
        beam.tokens for beam in want.beams or ()
    ]


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"temperature": 0.5}, "temperature"),
        ({"top_k": 3}, "top_k"),
        ({"stop": ["x"]}, "stop"),
        ({"stream": True}, "stream"),
        ({"stream": True, "n": 2, "best_of": 4}, "stream"),
        ({"logprobs": 0}, "logprobs"),
        ({"echo": True}, "echo"),
        ({"min_tokens": 2}, "min_tokens"),
        ({"logit_bias": {"5": 1}}, "logit_bias"),
        ({"n": 5}, "n"),
        ({"n": 2, "best_of": 5}, "best_of"),
        ({"use_beam_search": False, "length_penalty": 1}, "length_penalty"),
        ({"use_beam_search": None, "early_stopping": True}, "early_stopping"),
    ],
)
def test_what_does_not_go_with_a_search_is_refused_by_name(
    tokenizer_folder: Path, more: dict[str, Any], param: str
) -> None:
    served = ServedModel("played", tokenizer_folder, ABOUT | {"max_batch": 4})
    with pytest.raises(Refused) as told:
        read_ask(body(**more), COMPLETIONS, served)
    assert told.value.param == param
    chat = {"model": "played", "messages": [{"role": "user", "content": "w5"}]}
    held = {"response_format": {"type": "json_object"}, "use_beam_search": True}
    with pytest.raises(Refused) as told:
        read_ask(chat | held, CHAT, served)
    assert told.value.param == "response_format"
    neutral = {"temperature": 1, "top_p": 1, "stop": [], "stream": False, "min_p": 0, "n": 4}
    [line, _] = read_ask(body(**neutral), COMPLETIONS, served).lines()
    assert line == {"tokens": PROMPTS[0], "max_new_tokens": NEW, "beams": 4, "n": 4}
    assert STOP in served.stop_ids
