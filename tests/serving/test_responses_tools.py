"""JSON and calls of tools of `/v1/responses`, by OpenAI's own client and schema."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import pydantic
import pytest
import torch

from prefixcache_serving.ask import read_ask
from prefixcache_serving.fields import CHAT, RESPONSES
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel
from prefixcache_worker.model import Model
from serving.bench import ABOUT, save_tokenizer
from serving.openai_schema import complaints
from serving.talking import TEMPLATES, save_words, talk
from worker.zoo import talker

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")

ASKED = "What is the weather in Paris?"
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "unit": {"enum": ["C", "F"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}
SCHEMAS = {
    "response.created": "ResponseCreatedEvent",
    "response.in_progress": "ResponseInProgressEvent",
    "response.output_item.added": "ResponseOutputItemAddedEvent",
    "response.function_call_arguments.delta": "ResponseFunctionCallArgumentsDeltaEvent",
    "response.function_call_arguments.done": "ResponseFunctionCallArgumentsDoneEvent",
    "response.output_item.done": "ResponseOutputItemDoneEvent",
    "response.completed": "ResponseCompletedEvent",
}


class Person(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)


@pytest.fixture(scope="module")
def model() -> Model:
    pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")
    torch.set_num_threads(1)
    return talker()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(tmp_path_factory.mktemp("hermes"), TEMPLATES["hermes"])


def terms(**more: Any) -> dict[str, Any]:
    return {"model": "played", "max_output_tokens": 300, "extra_body": {"seed": 3}, **more}


def test_an_answer_is_parsed_by_its_schema(model: Model, folder: Path) -> None:
    def use(client: Any) -> Any:
        return client.responses.parse(input=ASKED, text_format=Person, **terms())

    told = talk(folder, model, use)
    assert isinstance(told.output_parsed, Person)
    assert told.text.format.type == "json_schema"


def test_a_tool_is_called_and_what_it_gives_is_sent_back(model: Model, folder: Path) -> None:
    def use(client: Any) -> Any:
        first = client.responses.create(
            input=ASKED, tools=[TOOL], tool_choice="required", parallel_tool_calls=False, **terms()
        )
        (call,) = first.output
        given = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
        items = [{"role": "user", "content": ASKED}, *first.output, given]
        return first, client.responses.create(input=items, tools=[TOOL], **terms())

    first, second = talk(folder, model, use)
    (call,) = first.output
    assert (call.type, call.name) == ("function_call", "weather")
    assert set(json.loads(call.arguments)) == {"city", "unit"}
    assert first.status == call.status == "completed"
    assert [one.name for one in first.tools] == ["weather"]
    assert (first.tool_choice, first.parallel_tool_calls) == ("required", False)
    assert second.usage.input_tokens > first.usage.input_tokens


def test_a_call_is_streamed_as_openai_s_events(model: Model, folder: Path) -> None:
    def use(client: Any) -> Any:
        more = terms(input=ASKED, tools=[TOOL], tool_choice={"type": "function", "name": "weather"})
        events = list(client.responses.create(stream=True, **more))
        return events, client.responses.create(**more)

    events, whole = talk(folder, model, use)
    assert list(dict.fromkeys(one.type for one in events)) == list(SCHEMAS)
    told = [one.to_dict() for one in events]
    assert not [bad for one in told for bad in complaints(SCHEMAS[one["type"]], one)]
    assert not complaints("Response", whole.to_dict())
    parts = [one.delta for one in events if one.type == "response.function_call_arguments.delta"]
    (call,) = events[-1].response.output
    assert "".join(parts) == call.arguments == whole.output[0].arguments


@pytest.fixture
def words(tmp_path: Path) -> ServedModel:
    save_tokenizer(tmp_path)
    return ServedModel("m", tmp_path, ABOUT)


def ask(words: ServedModel, **more: Any) -> Any:
    return read_ask({"model": "m", "input": "w5", **more}, RESPONSES, words)


def test_what_is_asked_of_the_workers_is_what_a_chat_asks(words: ServedModel) -> None:
    inner = {"name": "weather", "parameters": WEATHER, "strict": True}
    form = {"name": "city", "schema": WEATHER, "strict": True}
    chat = {
        "model": "m",
        "messages": [{"role": "user", "content": "w5"}],
        "tools": [{"type": "function", "function": inner}],
        "response_format": {"type": "json_schema", "json_schema": form},
    }
    there = read_ask(chat, CHAT, words)
    here = ask(words, tools=[TOOL], text={"format": {"type": "json_schema", **form}})
    assert (here.grammar, here.prompts) == (there.grammar, there.prompts)
    assert here.grammar is not None


def test_what_is_said_of_no_tools_asks_for_nothing(words: ServedModel) -> None:
    for more in ({"tool_choice": "auto"}, {"parallel_tool_calls": True}, {"tools": []}):
        assert ask(words, **more).use is None


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [TOOL | {"defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [TOOL], "tool_choice": {"type": "mcp"}}, "tool_choice"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ],
)
def test_what_is_not_served_is_refused_by_place(
    words: ServedModel, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(Refused) as told:
        ask(words, **more)
    assert told.value.param == param
