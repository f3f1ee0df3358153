"""Prompts that are told with their answers: how likely they are, and which answer is the best."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from patience import PATIENCE_S
from prefixcache_serving.ask import read_ask
from prefixcache_serving.fields import COMPLETIONS
from prefixcache_serving.journey import Journey
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel
from prefixcache_worker.model import Model
from serving.bench import ABOUT, STOP, Bench, completion, continuation, events, words
from serving.real import post
from worker.zoo import build, random_tokens


@pytest.fixture(scope="module")
def network() -> Any:
    torch.set_num_threads(1)
    return build("llama")


@pytest.fixture(scope="module")
def model(network: Any) -> Model:
    return Model.of(build("llama"), name="tiny")


def played(folder: Path, *bodies: dict[str, Any]) -> list[tuple[int, Any]]:
    """Ask a front with played workers."""

    async def main() -> list[tuple[int, Any]]:
        bench = Bench(folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
            return [(await bench.post(body))[::2] for body in bodies]

    return asyncio.run(main())


def test_multiple_choice_by_log_likelihood_is_what_transformers_says(
    tokenizer_folder: Path, model: Model, network: Any
) -> None:
    """As lm-eval asks: `echo`, `logprobs: 1`, `max_tokens: 1`, a batch of contexts with endings."""
    context = random_tokens(40, seed=3)
    with torch.inference_mode():
        best = int(network(torch.tensor([context])).logits[0, -1].argmax())
    endings = [[best], random_tokens(3, seed=4), random_tokens(17, seed=5), [best, 9]]
    prompts = [context + ending for ending in endings]
    told = post(
        tokenizer_folder,
        model,
        completion(prompts, 1, echo=True, logprobs=1, seed=1234),
    )
    for prompt, choice in zip(prompts, told["choices"], strict=True):
        values = choice["logprobs"]["token_logprobs"]
        tops = choice["logprobs"]["top_logprobs"]
        assert len(values) == len(tops) == len(prompt) + 1  # lm-eval counts on it
        scored = values[len(context) : -1]
        is_greedy = all(
            value == max(top.values())
            for value, top in zip(scored, tops[len(context) : -1], strict=True)
        )
        with torch.inference_mode():
            rows = network(torch.tensor([prompt])).logits[0].double().log_softmax(-1)
        want = [rows[at - 1, prompt[at]] for at in range(len(context), len(prompt))]
        assert sum(scored) == pytest.approx(float(sum(want)), abs=1e-4)
        found = rows[len(context) - 1 : -1].argmax(-1).tolist()
        assert is_greedy == (found == prompt[len(context) :])
    assert told["usage"]["prompt_tokens_details"]["cached_tokens"] == 0


def test_an_end_right_behind_the_prompt_is_told_too(tokenizer_folder: Path, model: Model) -> None:
    """Else whoever leaves the last one out, as lm-eval does, leaves out a token of the prompt."""
    bias = {str(STOP): 100}
    body = completion([[5, 6, 7]], 1, echo=True, logprobs=1, logit_bias=bias)
    (choice,) = post(tokenizer_folder, model, body)["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["tokens"] == ["w5", "w6", "w7", f"w{STOP}"]
    plain = completion([[5, 6, 7]], 1, logprobs=1, logit_bias=bias)
    (choice,) = post(tokenizer_folder, model, plain)["choices"]
    assert choice["logprobs"]["tokens"] == []


def test_the_prompt_comes_first_and_offsets_go_on_behind_it(tokenizer_folder: Path) -> None:
    prompt, answer = [5, 6], continuation([5, 6], 2)
    text, ids, none = (
        told["choices"][0]
        for _, told in played(
            tokenizer_folder,
            completion("w5  w6", 2, echo=True),
            completion(prompt, 2, echo=True, logprobs=1),
            completion(prompt, 0, echo=True, logprobs=1),
        )
    )
    assert text["text"] == "w5  w6" + words(answer)  # as it was given
    assert text["logprobs"] is None
    assert ids["text"] == words(prompt) + words(answer)
    assert ids["logprobs"]["tokens"] == [f"w{token}" for token in prompt + answer]
    assert ids["logprobs"]["token_logprobs"] == [None, -6.0, -0.5, -0.5]
    assert ids["logprobs"]["top_logprobs"][0] is None
    assert ids["logprobs"]["text_offset"] == [0, 2, 5, 5 + len(words(answer[:1]))]
    assert (none["text"], none["finish_reason"]) == (words(prompt), "length")
    assert none["logprobs"]["token_logprobs"] == [None, -6.0]


def test_an_echo_alone_asks_no_worker(tokenizer_folder: Path) -> None:
    [(status, told)] = played(tokenizer_folder, completion(["w5", "w6 w7"], 0, echo=True, n=2))
    assert status == 200
    assert [one["text"] for one in told["choices"]] == ["w5", "w5", "w6 w7", "w6 w7"]
    assert told["usage"]["completion_tokens"] == 0


def test_a_stream_begins_with_the_prompt_of_each_answer(tokenizer_folder: Path) -> None:
    async def main() -> list[Any]:
        bench = Bench(tokenizer_folder)
        body = completion([5, 6], 3, echo=True, logprobs=0, n=2, stream=True)
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
            kind = {"content-type": "application/json"}
            raw = json.dumps(body).encode()
            _, _, data = await bench.exchange("POST", "/v1/completions", raw, kind)
            asked = [line for worker in bench.workers for line in worker.lines]
            assert sum("prompt_logprobs" in line for line in asked) == 1  # once for both
        return events(data)

    *chunks, done = asyncio.run(main())
    assert done == "[DONE]"
    for index in range(2):
        mine = [one["choices"][0] for one in chunks if one["choices"][0]["index"] == index]
        assert mine[0]["text"] == "w5 w6"
        assert mine[0]["logprobs"]["token_logprobs"] == [None, -6.0]
        assert "".join(one["text"] for one in mine[1:]) == words(continuation([5, 6], 3))


def test_who_goes_on_scores_the_prompt_only_if_that_was_not_done() -> None:
    line = {"tokens": [5, 6, 7, 8], "max_new_tokens": 0, "prompt_logprobs": 0}
    journey = Journey("a", line, frozenset())

    def scored(start: int, *values: float) -> None:
        top: list[Any] = [[] for _ in values]
        journey.add_scores({"start": start, "logprobs": list(values), "top_logprobs": top})

    scored(1, -1.0, -2.0)
    assert journey.ended_by() == ""
    assert "prompt_logprobs" in journey.next_line()
    scored(1, -1.5)  # another worker: from the beginning
    scored(2, -2.5, -3.0)
    assert [value for value, _ in journey.scores] == [-1.0, -2.0, -3.0]
    assert journey.ended_by() == "length"
    assert "prompt_logprobs" not in journey.next_line()


def test_the_best_of_several_are_told_best_first(
    tokenizer_folder: Path, model: Model, network: Any
) -> None:
    """By the mean log-probability of their tokens, as the network alone finds it."""
    prompt = random_tokens(12, seed=6)
    # Not the two tokens that are no numbered words.
    how = {"temperature": 1.5, "seed": 7, "logit_bias": {"0": -100, "1": -100}}
    every = post(tokenizer_folder, model, completion(prompt, 4, n=6, **how))
    best = post(tokenizer_folder, model, completion(prompt, 4, n=2, best_of=6, **how))

    def mean(text: str) -> float:
        answer = [int(word[1:]) for word in text.split()]
        with torch.inference_mode():
            rows = network(torch.tensor([prompt + answer])).logits[0].double().log_softmax(-1)
        found = [rows[len(prompt) - 1 + at, token] for at, token in enumerate(answer)]
        return float(sum(found)) / len(found)

    texts = {one["text"]: mean(one["text"]) for one in every["choices"]}
    assert len(texts) == 6
    want = sorted(texts, key=lambda text: -texts[text])[:2]
    assert [one["text"] for one in best["choices"]] == want
    assert [one["index"] for one in best["choices"]] == [0, 1]
    assert {one["logprobs"] for one in best["choices"]} == {None}
    assert best["usage"]["completion_tokens"] == 24  # all that were made
    assert best["usage"]["prompt_tokens"] == len(prompt)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"best_of": 2, "n": 3}, "best_of"),
        ({"best_of": 3, "n": 2, "stream": True}, "best_of"),
        ({"best_of": 3, "stream": True}, "best_of"),
        ({"best_of": 65, "prompt": [[5], [6]]}, "best_of"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(
    tokenizer_folder: Path, more: dict[str, Any], param: str
) -> None:
    served = ServedModel("m", tokenizer_folder, ABOUT)
    with pytest.raises(Refused) as told:
        read_ask({"model": "m", "prompt": [5], **more}, COMPLETIONS, served)
    assert told.value.param == param
    assert read_ask(
        {"model": "m", "prompt": [5], "n": 2, "best_of": 2, "stream": True}, COMPLETIONS, served
    ).stream
