"""`/v1/responses`: items as a chat's messages, the events of a stream, OpenAI's schema for them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache_serving.ask import Ask, read_ask
from prefixcache_serving.fields import CHAT, RESPONSES
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel
from serving.bench import ABOUT, Bench, continuation, save_tokenizer, words

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")

PATH = "/v1/responses"
JSON = {"content-type": "application/json"}
LOGPROBS = "message.output_text.logprobs"
BODY = {"model": "played", "input": "w5 w7", "max_output_tokens": 6, "temperature": 0}
ANSWER = continuation([0, 5, 7, 1], 6)
EVENTS = [
    *("response.created", "response.in_progress"),
    *("response.output_item.added", "response.content_part.added"),
    "response.output_text.delta",
    *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
    "response.incomplete",
]
CALLS = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} "
    "{% for call in message.tool_calls %}{{ call.function.name }} {{ call.function.arguments }} "
    "{% endfor %}{% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)
"""A template that shows calls."""


@pytest.fixture
def model(tmp_path: Path) -> ServedModel:
    save_tokenizer(tmp_path, CALLS)
    return ServedModel("m", tmp_path, ABOUT)


def ask(model: ServedModel, given: Any, **more: Any) -> Ask:
    return read_ask({"model": "m", "input": given, **more}, RESPONSES, model)


def play(test: Callable[[Bench], Any], folder: Path) -> Any:
    async def main() -> Any:
        bench = Bench(folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping(1e-3):
            return await test(bench)

    return asyncio.run(main())


# ------------------------------------------------------------------------------------- what is read

USER = {"role": "user", "content": "w5"}
CALL = {"type": "function_call", "call_id": "c1", "name": "w8", "arguments": "w9"}
OUTPUT = {"type": "function_call_output", "call_id": "c1", "output": "w10"}
TOLD = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"}
SAID = TOLD | {
    "content": [{"type": "output_text", "text": "w6", "annotations": [], "logprobs": []}]
}
CALLED = {"id": "c1", "type": "function", "function": {"name": "w8", "arguments": "w9"}}
SAME_AS: dict[str, tuple[Any, list[Any]]] = {
    "a text": ("w5", [USER]),
    "messages": ([USER, SAID, USER], [USER, {"role": "assistant", "content": "w6"}, USER]),
    "parts": ([{"role": "user", "content": [{"type": "input_text", "text": "w5"}]}], [USER]),
    "a call of its own": (
        [USER, CALL, OUTPUT],
        [
            USER,
            {"role": "assistant", "tool_calls": [CALLED]},
            {"role": "tool", "tool_call_id": "c1", "content": "w10"},
        ],
    ),
    "calls behind a text": (
        [USER, SAID, CALL, CALL | {"call_id": "c2"}, OUTPUT],
        [
            USER,
            {
                "role": "assistant",
                "content": "w6",
                "tool_calls": [CALLED, CALLED | {"id": "c2"}],
            },
            {"role": "tool", "tool_call_id": "c1", "content": "w10"},
        ],
    ),
}


@pytest.mark.parametrize("kind", SAME_AS)
def test_items_are_the_prompt_of_the_chat_that_says_the_same(model: ServedModel, kind: str) -> None:
    items, messages = SAME_AS[kind]
    chat = read_ask({"model": "m", "messages": messages}, CHAT, model)
    assert ask(model, items).prompts == chat.prompts
    system = {"role": "developer", "content": "w4"}
    chat = read_ask({"model": "m", "messages": [system, *messages]}, CHAT, model)
    assert ask(model, items, instructions="w4").prompts == chat.prompts


@pytest.mark.parametrize(
    ("given", "param"),
    [
        (None, "input"),
        (7, "input"),
        ([], "input"),
        ("\ud800", "input"),
        ([7], "input[0]"),
        ([{"content": "x"}], "input[0].type"),
        ([{"type": ["message"], "role": "user"}], "input[0].type"),
        ([USER, {"type": "item_reference", "id": "msg_1"}], "input[1].type"),
        ([{"type": "reasoning", "id": "rs_1", "summary": []}], "input[0].type"),
        ([{"role": "boss", "content": "x"}], "input[0].role"),
        ([{"role": ["user"], "content": "x"}], "input[0].role"),
        ([{"role": "user"}], "input[0].content"),
        ([USER | {"phase": "commentary"}], "input[0].phase"),
        ([USER | {"status": "over"}], "input[0].status"),
        ([USER | {"status": ["completed"]}], "input[0].status"),
        ([USER | {"id": 7}], "input[0].id"),
        ([USER | {"content": []}], "input[0].content"),
        ([USER | {"content": [7]}], "input[0].content[0]"),
        ([USER | {"content": [{"type": "input_image"}]}], "input[0].content[0].type"),
        ([USER | {"content": [{"type": "input_text"}]}], "input[0].content[0].text"),
        (
            [USER | {"content": [{"type": "input_text", "text": "x", "detail": "low"}]}],
            "input[0].content[0].detail",
        ),
        ([CALL | {"arguments": {}}], "input[0].arguments"),
        ([CALL | {"namespace": "x"}], "input[0].namespace"),
        ([CALL | {"name": None}], "input[0].name"),
        ([OUTPUT | {"output": None}], "input[0].output"),
        ([OUTPUT | {"call_id": None}], "input[0].call_id"),
    ],
)
def test_items_that_would_not_be_seen_are_refused_by_place(
    model: ServedModel, given: Any, param: str
) -> None:
    with pytest.raises(Refused) as told:
        ask(model, given)
    assert (told.value.param, told.value.status) == (param, 400)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"max_output_tokens": 600}, "max_output_tokens"),
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
)
def test_what_cannot_be_had_is_refused_by_name(
    model: ServedModel, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(Refused) as told:
        ask(model, "w5", **more)
    assert told.value.param == param


def test_calls_are_told_in_words_where_the_template_shows_none(tokenizer_folder: Path) -> None:
    model = ServedModel("m", tokenizer_folder, ABOUT)
    calling = {"role": "assistant", "tool_calls": [CALLED]}
    result = {"role": "tool", "tool_call_id": "c1", "content": "w10"}
    chat = {"model": "m", "messages": [USER, calling, result]}
    (prompt,) = ask(model, [USER, CALL, OUTPUT]).prompts
    assert (prompt,) == read_ask(chat, CHAT, model).prompts
    assert {5, 10} <= set(prompt)


# ------------------------------------------------------------------------------------- what is told


def test_an_answer_and_its_usage(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> Any:
        body = BODY | {"input": " ".join(["w7"] * 40), "metadata": {"a": "b"}}
        return await bench.post(body, PATH, **{"x-prefixcache-explain": "1"})

    status, headers, told = play(test, tokenizer_folder)
    assert status == 200
    assert headers["x-request-id"] == told["id"]
    (message,) = told["output"]
    assert message["content"][0]["text"] == words(continuation([0, *[7] * 40, 1], 6))
    assert (told["status"], message["status"]) == ("incomplete", "incomplete")
    assert told["incomplete_details"] == {"reason": "max_output_tokens"}
    assert told["metadata"] == {"a": "b"}
    assert told["store"] is False
    assert told["usage"] == {
        "input_tokens": 42,
        "input_tokens_details": {"cached_tokens": 16},
        "output_tokens": 6,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 48,
    }
    (explained,) = told["prefixcache"]
    assert explained["ledger"]["hit"] == 16


def named(data: bytes) -> list[Any]:
    """Read events whose name is their type."""
    found = []
    for block in data.decode().split("\n\n")[:-1]:
        name, _, value = block.partition("\ndata: ")
        found.append(json.loads(value))
        assert name == f"event: {found[-1]['type']}"
    assert [one["sequence_number"] for one in found] == list(range(len(found)))
    return found


def test_a_stream_has_openai_s_events_in_their_order(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> Any:
        raw = json.dumps(BODY | {"stream": True, "include": [LOGPROBS]}).encode()
        return await bench.exchange("POST", PATH, raw, JSON)

    status, headers, data = play(test, tokenizer_folder)
    assert status == 200
    assert headers["content-type"].startswith("text/event-stream")
    told = named(data)
    assert list(dict.fromkeys(one["type"] for one in told)) == EVENTS
    deltas = [one for one in told if one["type"] == "response.output_text.delta"]
    assert "".join(one["delta"] for one in deltas) == words(ANSWER)
    assert sum(len(one["logprobs"]) for one in deltas) == 6
    last = told[-1]["response"]
    (message,) = last["output"]
    assert message["content"][0]["text"] == words(ANSWER)
    assert last["usage"]["output_tokens"] == 6
    assert {one["item_id"] for one in told if "item_id" in one} == {message["id"]}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.002)


def test_a_worker_that_is_killed_changes_no_event_of_a_stream(tokenizer_folder: Path) -> None:
    async def test(bench: Bench) -> bytes:
        raw = json.dumps(BODY | {"stream": True}).encode()
        asked = asyncio.create_task(bench.exchange("POST", PATH, raw, JSON))
        await until(lambda: any(worker.jobs for worker in bench.workers))
        (worker,) = [worker for worker in bench.workers if worker.jobs]
        worker.step()
        worker.is_gone, worker.jobs = True, {}
        bench.router.part(worker.name, died=True)
        async with bench.stepping(1e-3):
            _, _, data = await asked
        return data

    async def main() -> bytes:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening():
            return await test(bench)

    told = named(asyncio.run(main()))
    assert told[-1]["response"]["output"][0]["content"][0]["text"] == words(ANSWER)
    assert list(dict.fromkeys(one["type"] for one in told)) == EVENTS


def test_a_stream_that_cannot_go_on_ends_with_its_failure(tokenizer_folder: Path) -> None:
    from serving.openai_schema import complaints

    async def main() -> bytes:
        bench = Bench(tokenizer_folder)
        async with asyncio.timeout(PATIENCE_S), bench.listening() as address:
            reader, writer = await asyncio.open_connection(address.host, address.port)
            raw = json.dumps(BODY | {"stream": True}).encode()
            writer.write(bench.head("POST", PATH, len(raw), JSON) + raw)
            await until(lambda: any(worker.jobs for worker in bench.workers))
            (worker,) = [worker for worker in bench.workers if worker.jobs]
            worker.step()
            data = await reader.readuntil(b"output_text.delta")
            told = {"id": worker.lines[0]["id"], "error": "CacheError", "message": "broken"}
            worker.tell({"event": "failed", **told})
            data += await reader.readuntil(b"\r\n0\r\n\r\n")
            writer.close()
        return data

    *_, last = asyncio.run(main()).decode().split("event: ")
    failure = json.loads(last.partition("data: ")[2].partition("\n\n")[0])
    assert failure["type"] == "response.failed"
    assert not complaints("ResponseFailedEvent", failure)
    assert failure["response"]["error"] == {"code": "server_error", "message": "broken"}
    assert failure["response"]["status"] == "failed"


def test_openai_s_client_reads_it(tokenizer_folder: Path) -> None:
    def use(client: Any) -> Any:
        terms = {key: value for key, value in BODY.items() if key != "input"}
        whole = client.responses.create(input="w5 w7", instructions="w3", **terms)
        again = client.responses.create(input=[USER, *whole.output, USER], **terms)
        # Of an answer that was cut off, the client's helper has no final response.
        stop = {"extra_body": {"stop": words(ANSWER[4:5])}}
        with client.responses.stream(input="w5 w7", **terms, **stop) as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        refused = []
        for wrong in ({"store": True}, {"extra_body": {"foo": 1}}):
            try:
                client.responses.create(input="w5", model="played", **wrong)
            except openai.BadRequestError as error:
                refused.append((error.param, error.code))
        return whole, again, text, final, refused

    async def test(bench: Bench) -> Any:
        def run() -> Any:
            url = f"http://{bench.address}/v1"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
                return use(client)

        return await asyncio.to_thread(run)

    whole, again, text, final, refused = play(test, tokenizer_folder)
    assert whole.output_text == words(continuation([2, 3, 0, 5, 7, 1], 6))
    said = [int(word[1:]) for word in whole.output_text.split()]
    assert again.output_text == words(continuation([0, 5, 1, *said, 0, 5, 1], 6))
    assert whole.usage.input_tokens_details.cached_tokens == 5
    assert text == final.output_text
    assert (text.strip(), final.status) == (words(ANSWER[:4]), "completed")
    assert refused == [("store", "unsupported_field"), ("foo", "unknown_field")]


def test_every_body_and_event_is_what_openai_s_schema_says(tokenizer_folder: Path) -> None:
    from serving.openai_schema import complaints

    async def test(bench: Bench) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        more = {"instructions": "w3", "include": [LOGPROBS], "top_logprobs": 1}
        _, _, told = await bench.post(BODY | more, PATH)
        assert len(told["output"][0]["content"][0]["logprobs"]) == 6
        found["whole"] = complaints("Response", told)
        answer = continuation([2, 3, 0, 5, 7, 1], 6)
        for end in ({}, {"stop": words(answer[4:5])}):
            raw = json.dumps(BODY | more | end | {"stream": True}).encode()
            _, _, data = await bench.exchange("POST", PATH, raw, JSON)
            for event in named(data):
                found[event["type"]] = complaints(SCHEMAS[event["type"]], event)
        return found

    found = play(test, tokenizer_folder)
    assert set(found) == {"whole", *EVENTS, "response.completed"}
    assert not {what: errors for what, errors in found.items() if errors}


SCHEMAS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.content_part.added": "ResponseContentPartAddedEvent",
    "response.output_text.delta": "ResponseTextDeltaEvent",
    "response.output_text.done": "ResponseTextDoneEvent",
    "response.content_part.done": "ResponseContentPartDoneEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.completed": "ResponseCompletedEvent",
    "response.incomplete": "ResponseIncompleteEvent",
}
