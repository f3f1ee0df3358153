"""Lines of a worker's input: each odd one is that line's failure, and nothing else's."""

from __future__ import annotations

import io
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers

from prefixcache.errors import CacheError, InvalidRequest
from prefixcache_worker import process
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.process import WorkerProcess, read_lines
from prefixcache_worker.request import Failed, Finished, Request
from prefixcache_worker.request_line import (
    LONGEST_LINE,
    name_of,
    read_id,
    read_object,
    read_request,
)
from prefixcache_worker.sampling import Sampling
from worker.zoo import build

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.fixture(scope="module")
def model(demo_folder: Path) -> Model:
    """A tiny network behind the demo model's tokenizer and template."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(demo_folder)
    return Model.of(build("llama", vocab_size=49152), name="tiny", tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"prompt": 5}, "prompt is 5; it takes a text"),
        ({"prompt": None}, "one of messages, prompt and tokens is needed"),
        ({"prompt": ["a"]}, "prompt is ['a']; it takes a text"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5'; it takes a whole number"),
        ({"max_new_tokens": 1e999}, "max_new_tokens is inf; it takes a whole number"),
        ({"max_new_tokens": True}, "max_new_tokens is true; it takes a whole number"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0; it takes one from 1"),
        ({"max_new_tokens": 10**12}, "the model takes"),
        ({"max_new_tokens": 10**400}, "max_new_tokens is a number of 1329 bits"),
        ({"stop": 5}, "stop is 5; it takes a text or up to 1,024 of them"),
        ({"stop": [5]}, "stop holds 5; it takes texts"),
        ({"stop": ""}, "stop holds an empty text"),
        ({"stop": ["a", ""]}, "stop holds an empty text"),
        ({"stop_ids": 7}, "stop_ids is 7; it takes up to 1,024 token ids"),
        ({"stop_ids": [1e999]}, "an id of stop_ids is inf"),
        ({"seed": 2**70}, "seed is 1180591620717411303424; it takes one from"),
        ({"seed": 1.0}, "seed is 1.0; it takes a whole number"),
        ({"top_k": -2}, "top_k is -2; it takes one from -1"),
        ({"top_k": 1.0}, "top_k is 1.0; it takes a whole number"),
        ({"min_p": 1.5}, "min_p is 1.5; it takes a number from 0 to 1"),
        ({"presence_penalty": 3}, "presence_penalty is 3; it takes a number from -2 to 2"),
        ({"frequency_penalty": "x"}, "frequency_penalty is 'x'; it takes a number"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it takes a number from 0.01 to 100"),
        (
            {"repetition_penalty": -1},
            "repetition_penalty is -1; it takes a number from 0.01 to 100",
        ),
        ({"logit_bias": [1]}, "logit_bias is [1]; it takes an object of up to 1,024"),
        ({"logit_bias": {"x": 1}}, "logit_bias names 'x'; it takes token ids"),
        ({"logit_bias": {"-1": 1}}, "logit_bias names '-1'; it takes token ids"),
        ({"logit_bias": {"1": 1e9}}, "logit_bias is 1000000000.0; it takes a number from -100"),
        ({"logit_bias": {"1": None}}, "logit_bias is None; it takes a number"),
        ({"logit_bias": {str(i): 1 for i in range(1025)}}, "up to 1,024 token ids"),
        ({"min_tokens": -1}, "min_tokens is -1; it takes one from 0"),
        ({"min_tokens": 4, "max_new_tokens": 3}, "min_tokens is 4, and its answer may have 3"),
        ({"ignore_eos": 1}, "ignore_eos is 1; it takes true or false"),
        ({"ignore_eos": 1, "stop_ids": [1]}, "ignore_eos is 1; it takes true or false"),
        ({"logprobs": 5}, "logprobs is 5; it takes true or false"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs is 21; it takes one from 0 to 20"),
        ({"top_logprobs": 2}, "top_logprobs is 2; it goes with logprobs"),
        ({"sample": -1}, "sample is -1; it takes one from 0"),
        ({"generated": 5}, "generated is 5; it takes token ids"),
        ({"generated": [True]}, "an id of generated is true; it takes a whole number"),
        ({"generated": [2**32]}, "an id of generated is 4294967296; it takes one from 0"),
        ({"generated": [7] * 129}, "129 tokens are generated, more than the 128"),
        ({"temperature": "hot"}, "temperature is 'hot'; it takes a number"),
        ({"temperature": float("nan")}, "temperature is nan; it takes a number from 0 on"),
        ({"wait_s": float("inf")}, "wait_s is inf; it takes a number from 0 to 86400"),
        ({"log_logits": "no"}, "log_logits is 'no'; it takes true or false"),
        ({"tokens": [1.7, 2.2]}, "tokens holds 1.7; a token id is a whole number"),
        ({"tokens": [True]}, "tokens holds true; a token id is a whole number"),
        ({"tokens": [2**80]}, "tokens holds a number of 81 bits"),
        ({"messages": "hi"}, "messages is 'hi'; it takes a list of messages"),
        ({"messages": [5]}, "message 1 is 5; it takes an object"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1: content is 5"),
        ({"messages": [{"role": 1, "content": "x"}]}, "message 1: role is 1"),
        ({"messages": [{"role": "user", "content": "a\ud83d"}]}, "half a character"),
        ({"prompt": "a\ud83d"}, "half a character"),
        ({"prompt": "a", "tools": []}, "tools go with messages"),
        ({"prompt": "a", "id": ["x"]}, "id is ['x']; it takes a text or a whole number"),
        ({"prompt": "a", "id": "x" * 5000}, "id has 5,000 characters; at most 200"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "takes text; the messages hold a medium",
        ),
    ],
)
def test_a_wrong_field_is_named_with_what_it_is_and_what_it_takes(
    model: Model, fields: dict[str, Any], said: str
) -> None:
    base: dict[str, Any] = {} if {"messages", "tokens", "prompt"} & set(fields) else {"prompt": "a"}
    with pytest.raises(InvalidRequest) as told:
        read_request(base | fields, model)
    assert said in str(told.value)


def test_a_history_with_a_tool_call_is_read_as_servers_do(model: Model) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "q"}]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
        {"role": "assistant", "tool_calls": []},
    ]
    request = read_request({"messages": messages, "tools": [{"name": "f"}]}, model)
    texts = ("q", "", "42", "")
    plain = [
        {"role": one["role"], "content": text} for one, text in zip(messages, texts, strict=True)
    ]
    assert request.tokens == model.tokenizer.apply_chat_template(
        plain, add_generation_prompt=True, return_dict=False
    )
    assert request.left_out == (
        "tool calls that the template does not show",
        "tools that the template does not show",
    )


ODD = [
    b'{"id":"null","messages":[{"role":"user","content":null},{"role":"assistant"}],'
    b'"max_new_tokens":1e999}',
    b'{"id":"text","messages":"hi"}',
    b'{"id":"deep","messages":' + b"[" * 100_000,
    b"[" * 100_000,
    b"5",
    b"\xff\xfe",
    b'{"id":"half","prompt":"a\\ud83d"}',
    b'{"id":"h\\ud83d","prompt":"a"}',
    b'{"cancel":["a"]}',
    b'{"id":"seed","prompt":"a","temperature":1,"seed":' + b"9" * 400 + b"}",
    b'{"id":"digits","prompt":"a","seed":' + b"9" * 5000 + b"}",
]


def served(model: Model, lines: Iterator[bytes] | list[bytes]) -> list[dict[str, Any]]:
    out = io.BytesIO()
    WorkerProcess(model, None, solo=True, lines=lines, out=out).run()
    return [json.loads(line) for line in out.getvalue().splitlines()]


def test_no_odd_line_keeps_the_next_one_from_being_served(model: Model) -> None:
    good = b'{"prompt":"Hello","max_new_tokens":2}'
    lines = [one for odd in ODD for one in (odd, b"\xef\xbb\xbf" + good + b"\r")]
    events = served(model, lines)
    failed = [one["id"] for one in events if one["event"] == "failed"]
    assert failed == ["null", "text", "deep", "", "", "", "half", "h\ud83d", "", "seed", "digits"]
    done = [one for one in events if one["event"] == "finished"]
    assert len(done) == len(ODD)
    assert len({one["id"] for one in done}) == len(ODD)  # made up, each another one


def test_what_is_longer_than_a_line_may_be_ends_its_request_alone(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who reads the lines would take a longer one for the end of this worker."""
    monkeypatch.setattr("prefixcache_worker.process.LINE_BYTES", 2000)
    lines = [
        b'{"id":"found","prompt":"Hello","max_new_tokens":40,"beams":8,"n":8,"ignore_eos":true}',
        b'{"id":"scored","tokens":'
        + str([5] * 200).encode()
        + b',"prompt_logprobs":20,"max_new_tokens":3}',
        b'{"id":"short","prompt":"Hello","max_new_tokens":2}',
    ]
    events = served(model, lines)
    failed = {one["id"]: one for one in events if one["event"] == "failed"}
    assert set(failed) == {"found", "scored"}
    for one in failed.values():
        assert "a line has 2,000 at most" in one["message"]
    done = {one["id"]: one["reason"] for one in events if one["event"] == "finished"}
    assert done == {"scored": "cancelled", "short": "length"}


@pytest.mark.parametrize(
    "name", ["a\n", "a\x1b[2J", "\u202ea", "a\x00", "\u200b", "\ud800", "a\ud83d\ude00\udc00"]
)
@pytest.mark.parametrize("field", ["id", "cancel"])
def test_a_name_that_cannot_be_shown_or_is_no_text_is_refused(name: str, field: str) -> None:
    with pytest.raises(InvalidRequest, match=field) as told:
        read_id(json.loads(json.dumps({field: name})), field)
    assert str(told.value).isprintable()


@pytest.mark.parametrize("half", ["\ud800", "a\udfffb", "\udc00\ud800"])
@pytest.mark.parametrize("field", ["stop", "prompt"])
def test_half_a_character_is_refused_wherever_a_text_is_taken(
    model: Model, field: str, half: str
) -> None:
    line = json.dumps({"prompt": "a", field: half}).encode()
    with pytest.raises(InvalidRequest, match=f"{field} holds half a character") as told:
        read_request(read_object(line), model)
    str(told.value).encode()  # it can be written


@pytest.mark.parametrize("name", ["1e999", "1.5", "1" * 30, "-1", "1 2", '"a" "b"', '"a', "truth"])
def test_a_line_is_not_told_as_the_failure_of_another_name(name: str) -> None:
    line = b'{"id":%s,"tokens":[1}' % name.encode()
    assert name_of(line) == ""
    assert name_of(b'{"id": 1 ,"tokens":[') == "1"
    assert name_of(b'{"id":"a"}') == "a"


def test_two_halves_of_a_character_are_one(model: Model) -> None:
    request = read_request(read_object(rb'{"prompt":"a","stop":"\ud83d\ude00","id":"ok"}'), model)
    assert request.stop_strings == ("\U0001f600",)


def test_a_name_that_is_in_hand_is_not_taken_twice(model: Model) -> None:
    line = b'{"id":"a","prompt":"Hello","max_new_tokens":3}'
    (alone,) = (one for one in served(model, [line]) if one["event"] == "finished")

    def lines() -> Iterator[bytes]:
        yield line
        yield b'{"id":"a","prompt":"Other","max_new_tokens":3}'
        yield b'{"id":"b","prompt":"Other","max_new_tokens":3}'

    events = served(model, lines())
    assert [one["id"] for one in events if one["event"] == "failed"] == ["a"]
    done = {one["id"]: one for one in events if one["event"] == "finished"}
    assert sorted(done) == ["a", "b"]
    assert done["a"]["tokens"] == alone["tokens"]


def test_a_name_is_free_again_when_its_request_has_ended(model: Model) -> None:
    engine = Engine(model, None, None)
    for _ in range(2):
        engine.submit(Request("a", [1, 2], 2))
        assert [one.id for one in engine.run() if isinstance(one, Finished)] == ["a"]
    engine.submit(Request("a", [1, 2], 10**9))
    engine.cancel("a")
    assert [one.id for one in engine.run() if isinstance(one, Finished)] == ["a"]
    engine.submit(Request("a", [10**6], 2))
    assert [one.id for one in engine.run() if isinstance(one, Failed)] == ["a"]
    engine.submit(Request("a", [1, 2], 2))
    engine.close()
    engine.submit(Request("a", [1, 2], 2))


def test_each_field_of_sampling_comes_to_the_request(model: Model) -> None:
    line = (
        b'{"prompt":"a","temperature":1,"top_p":0.5,"seed":-1,"sample":2,"top_k":3,"min_p":0.1,'
        b'"presence_penalty":-2,"frequency_penalty":2,"repetition_penalty":1.5,"min_tokens":4,'
        b'"logit_bias":{"7":-100,"8":1.5},"ignore_eos":true,"logprobs":true,"top_logprobs":5}'
    )
    request = read_request(read_object(line), model)
    bias = ((7, -100.0), (8, 1.5))
    assert request.sampling == Sampling(1.0, 0.5, -1, 2, 3, 0.1, -2.0, 2.0, 1.5, bias, 4)
    assert (request.stop_ids, request.logprobs) == ((), 5)
    plain = read_request(read_object(b'{"prompt":"a","top_k":-1,"logprobs":false}'), model)
    assert (plain.sampling, plain.stop_ids, plain.logprobs) == (Sampling(), None, None)


def test_a_line_goes_on_with_an_answer_that_another_worker_has_begun(model: Model) -> None:
    line = b'{"id":"a","prompt":"Hello","max_new_tokens":9,"temperature":1,"seed":3,"sample":1%s}'
    whole = served(model, [line % b""])
    [want] = [one for one in whole if one["event"] == "finished"]
    begun = json.dumps(want["tokens"][:4]).encode()
    then = served(model, [line % b',"generated":%s' % begun])
    [done] = [one for one in then if one["event"] == "finished"]
    assert (done["tokens"], done["text"]) == (want["tokens"], want["text"])
    told = {one["event"]: one for one in then}
    assert (told["started"]["seed"], told["started"]["max_new_tokens"]) == (3, 9)
    assert sum(one["event"] == "token" for one in then) == 5


def test_an_error_that_nobody_foresaw_fails_its_line(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(fields: dict[str, Any], model: Model) -> Any:
        if "tokens" in fields:
            raise ZeroDivisionError("by zero")
        return read_request(fields, model)

    monkeypatch.setattr(process, "read_request", broken)
    events = served(model, [b'{"id":"a","tokens":[1]}', b'{"prompt":"b","max_new_tokens":1}'])
    failed = next(one for one in events if one["event"] == "failed")
    assert (failed["id"], failed["error"]) == ("a", "ZeroDivisionError")
    assert events[-1]["event"] == "finished"


def test_a_reader_that_breaks_ends_the_worker(model: Model) -> None:
    def lines() -> Iterator[bytes]:
        yield b'{"prompt":"Hello","max_new_tokens":100000000}'
        raise OSError("the terminal is gone")

    with pytest.raises(RuntimeError, match="cannot read requests any more and ends: OSError"):
        served(model, lines())


def test_a_line_without_end_costs_a_bounded_amount_and_itself_alone() -> None:
    read, write = os.pipe()

    def speak() -> None:
        for _ in range((LONGEST_LINE >> 20) + 16):
            os.write(write, b"x" * (1 << 20))
        os.write(write, b'\n{"id": "next"}\nlast')
        os.close(write)

    speaker = threading.Thread(target=speak, daemon=True)
    speaker.start()
    first, second, last = read_lines(read)
    speaker.join()
    os.close(read)
    assert LONGEST_LINE < len(first) <= LONGEST_LINE + (1 << 17)
    with pytest.raises(CacheError, match=r"more than 33,554,432 bytes"):
        read_object(first)
    assert (read_object(second), last) == ({"id": "next"}, b"last")


def test_a_field_that_is_there_twice_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="the field 'seed' is there twice"):
        read_object(b'{"id": "a", "prompt": "x", "seed": 1, "seed": 2}')
