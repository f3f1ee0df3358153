"""JSON and calls of tools by OpenAI's own client, of a model that would say neither by itself."""

from __future__ import annotations

import asyncio
import json
import re
import runpy
from pathlib import Path
from typing import Any, Literal

import jsonschema
import pydantic
import pytest
import torch

from patience import PATIENCE_S
from prefixcache_serving.call_form import HERMES
from prefixcache_worker.model import Model
from serving.bench import ABOUT, Bench, events
from serving.talking import TEMPLATES, TalkingBench, save_words, talk
from worker.zoo import spelling, talker

openai = pytest.importorskip("openai", reason="the test extra's openai is missing")
pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")

TRIGGER = "[TOOL_CALLS]"
PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
ASKED: Any = [{"role": "user", "content": "What is the weather in Paris?"}]
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 5},
        "unit": {"enum": ["C", "F"]},
    },
    "required": ["city", "unit"],
    "additionalProperties": False,
}
DAYS = {
    "type": "object",
    "properties": {"days": {"type": "integer", "minimum": 0, "maximum": 30}},
    "required": ["days"],
    "additionalProperties": False,
}


def tool(name: str, schema: Any) -> Any:
    function = {"name": name, "description": "It says.", "parameters": schema, "strict": True}
    return {"type": "function", "function": function}


TOOLS = [tool("weather", WEATHER), tool("wait", DAYS)]
SCHEMAS = {"weather": WEATHER, "wait": DAYS}
NAMED: Any = {"type": "function", "function": {"name": "wait"}}
ALLOWED: Any = {
    "type": "allowed_tools",
    "allowed_tools": {"mode": "required", "tools": [NAMED]},
}


class Person(pydantic.BaseModel):
    kind: Literal["cat", "dog"]
    age: int = pydantic.Field(ge=0, le=30)
    friends: list[Literal["Ada", "Bo"]] = pydantic.Field(max_length=2)


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return talker()


@pytest.fixture(scope="module", params=TEMPLATES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a model whose template shows tools in some way, or not at all."""
    return save_words(tmp_path_factory.mktemp(request.param), TEMPLATES[request.param])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_words(tmp_path_factory.mktemp("plain"), TEMPLATES["plain"])


def ask(client: Any, **more: Any) -> Any:
    terms = {"model": "played", "messages": ASKED, "max_tokens": 300, "seed": 3}
    return client.chat.completions.create(**terms | more)


def check(calls: Any, least: int = 1) -> None:
    assert len(calls) >= least
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])


def test_a_model_of_pydantic_is_what_comes_back(plain: Path, model: Model) -> None:
    def use(client: Any) -> list[Any]:
        found = client.chat.completions.parse(
            model="played", messages=ASKED, response_format=Person, n=3, seed=1
        )
        return [choice.message.parsed for choice in found.choices]

    people = talk(plain, model, use)
    assert [type(one) for one in people] == [Person] * 3
    assert len({one.model_dump_json() for one in people}) > 1


def test_json_mode_is_an_object(plain: Path, model: Model) -> None:
    def use(client: Any) -> Any:
        return [
            ask(client, response_format={"type": "json_object"}, seed=seed, temperature=1.3)
            for seed in range(4)
        ]

    told = [one.choices[0] for one in talk(plain, model, use)]
    whole = [json.loads(one.message.content) for one in told if one.finish_reason == "stop"]
    assert all(isinstance(one, dict) for one in whole)
    assert all(one.message.content.startswith("{") for one in told)


def test_what_is_required_is_called(folder: Path, model: Model) -> None:
    def use(client: Any) -> None:
        told = ask(client, tools=TOOLS, tool_choice="required", n=2).choices
        for choice in told:
            assert choice.finish_reason == "tool_calls"
            assert choice.message.content is None
            check(choice.message.tool_calls)
        for choice in (NAMED, ALLOWED):
            told = ask(client, tools=TOOLS, tool_choice=choice, parallel_tool_calls=False)
            (call,) = told.choices[0].message.tool_calls
            assert call.function.name == "wait"
            check([call])

    talk(folder, model, use)


def test_a_stream_of_calls_is_the_answer_in_pieces(folder: Path, model: Model) -> None:
    def use(client: Any) -> None:
        terms = {"tools": TOOLS, "tool_choice": "required"}
        want = ask(client, **terms).choices[0]
        pieces = list(ask(client, **terms, stream=True))
        calls: list[dict[str, str]] = []
        for chunk in pieces:
            for one in chunk.choices[0].delta.tool_calls or []:
                if one.function.name is not None:
                    assert one.index == len(calls)
                    assert one.type == "function"
                    calls.append({"name": one.function.name, "arguments": "", "id": one.id})
                calls[one.index]["arguments"] += one.function.arguments
        assert [(one["name"], one["arguments"]) for one in calls] == [
            (one.function.name, one.function.arguments) for one in want.message.tool_calls
        ]
        assert pieces[-1].choices[0].finish_reason == "tool_calls"
        assert len(pieces) >= 3
        with client.chat.completions.stream(
            model="played", messages=ASKED, max_tokens=300, seed=3, **terms
        ) as stream:
            final = stream.get_final_completion().choices[0].message
        assert [one.function.arguments for one in final.tool_calls] == [
            one.function.arguments for one in want.message.tool_calls
        ]
        assert all(isinstance(one.function.parsed_arguments, dict) for one in final.tool_calls)

    talk(folder, model, use)


def test_left_to_itself_it_may_talk_and_what_it_calls_is_right(folder: Path, model: Model) -> None:
    """Its tokens are drawn from nearly all: now and then what it says begins as a call does."""

    def use(client: Any) -> list[Any]:
        return [ask(client, tools=TOOLS, seed=seed, max_tokens=60).choices[0] for seed in range(4)]

    for choice in talk(folder, model, use):
        assert choice.finish_reason in ("stop", "length", "tool_calls")
        if choice.message.tool_calls:
            check(choice.message.tool_calls)
        else:
            assert choice.message.content


def test_a_token_that_begins_calls_is_held_to_one(tmp_path: Path, model: Model) -> None:
    """The token is made likely; without its grammar, nonsense would follow."""
    token = str(model.tokenizer.convert_tokens_to_ids("[TOOL_CALLS]"))

    def use(client: Any) -> None:
        kinds = set()
        for seed in range(4):
            terms = {"tools": TOOLS, "seed": seed, "logit_bias": {token: 5}, "max_tokens": 200}
            choice = ask(client, **terms, parallel_tool_calls=False).choices[0]
            kinds.add(choice.finish_reason)
            assert "[TOOL_CALLS]" not in (choice.message.content or "")
            if choice.finish_reason == "tool_calls":
                check(choice.message.tool_calls)
        assert "tool_calls" in kinds

    talk(save_words(tmp_path / "m", TEMPLATES["mistral"]), model, use)


EXAMPLES = re.findall(r"^```py\n(.*?)^```", PAGE.read_text(), re.S | re.M)


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_the_page_s_examples_run(plain: Path, model: Model, number: int, tmp_path: Path) -> None:
    example = tmp_path / "example.py"

    def use(client: Any) -> None:
        here = EXAMPLES[number].replace("http://127.0.0.1:8000/v1", str(client.base_url))
        example.write_text(here.replace("smollm2", "played"))
        runpy.run_path(str(example), run_name="example")

    assert len(EXAMPLES) >= 3
    talk(plain, model, use)


def test_calls_and_what_they_gave_go_back_into_the_chat(folder: Path, model: Model) -> None:
    def use(client: Any) -> Any:
        first = ask(client, tools=TOOLS, tool_choice="required").choices[0].message
        gave = {"role": "tool", "content": "22 degrees"}
        results = [gave | {"tool_call_id": call.id} for call in first.tool_calls]
        given: list[Any] = [*ASKED, first, *results]
        told = ask(client, messages=given, tools=TOOLS, tool_choice="none", max_tokens=5)
        assert told.choices[0].message.tool_calls is None
        return ask(client, messages=given, tools=TOOLS, max_tokens=5).usage.prompt_tokens

    assert talk(folder, model, use) > 200


def test_an_answer_that_is_cut_off_says_so(plain: Path, model: Model) -> None:
    def use(client: Any) -> None:
        whole = ask(client, tools=TOOLS, tool_choice=NAMED).choices[0].message.tool_calls[0]
        seen = set()
        for count in range(1, 60, 6):
            choice = ask(client, tools=TOOLS, tool_choice=NAMED, max_tokens=count).choices[0]
            seen.add(choice.finish_reason)
            if choice.finish_reason == "length":
                assert not choice.message.content
            for call in choice.message.tool_calls or []:
                assert whole.function.arguments.startswith(call.function.arguments)
        assert seen == {"length", "tool_calls"}
        stop = ask(client, response_format={"type": "json_object"}, stop=["{"])
        assert (stop.choices[0].message.content, stop.choices[0].finish_reason) == ("", "stop")

    talk(plain, model, use)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"tool_choice": "auto"}, "tool_choice"),
    ({"parallel_tool_calls": True}, "parallel_tool_calls"),
    ({"tools": 7}, "tools"),
    ({"tools": TOOLS * 65}, "tools"),
    ({"tools": [*TOOLS, TOOLS[0]]}, "tools"),
    ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].custom"),
    ({"tools": [{"type": "custom"}]}, "tools[0].type"),
    ({"tools": [{"type": "function"}]}, "tools[0].function"),
    ({"tools": [tool("a b", {})]}, "tools[0].function.name"),
    ({"tools": [tool("f", {"type": "array"})]}, "tools[0].function.parameters"),
    ({"tools": [tool("f", {"type": "object", "not": {}})]}, "tools"),
    ({"tools": [tool("f", {"properties": {"a": {"multipleOf": 999983}}})]}, "tools"),
    ({"tools": TOOLS, "tool_choice": "some"}, "tool_choice"),
    ({"tools": TOOLS, "tool_choice": {"type": "custom"}}, "tool_choice"),
    (
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
        "tool_choice.function.name",
    ),
    ({"functions": [{"name": "f"}]}, "functions"),
    ({"response_format": {"type": "xml"}}, "response_format.type"),
    ({"response_format": {"type": "json_object", "schema": {}}}, "response_format.schema"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    (
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}},
        "response_format.json_schema.name",
    ),
]
for _schema in (
    {"type": "nothing"},
    {"maximum": 10**40},
    {"pattern": "(", "type": "string"},
):
    _form = {"type": "json_schema", "json_schema": {"name": "n", "schema": _schema}}
    WRONG.append(({"response_format": _form}, "response_format"))


def test_what_is_wrong_is_refused_with_its_field(plain: Path, model: Model) -> None:
    def use(client: Any) -> list[tuple[str, str]]:
        told = []
        for wrong, _ in WRONG:
            with pytest.raises(openai.BadRequestError) as error:
                client.post("/chat/completions", body=body(wrong), cast_to=object)
            told.append(error.value.param)
        return told

    def body(wrong: dict[str, Any]) -> dict[str, Any]:
        return {"model": "played", "messages": ASKED, "max_tokens": 5} | wrong

    assert talk(plain, model, use) == [param for _, param in WRONG]


def test_what_a_lenient_schema_has_no_effect_of_is_told(plain: Path, model: Model) -> None:
    schema = {"type": "array", "items": {"const": 1}, "maxItems": 2, "uniqueItems": True}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}

    def use(client: Any) -> Any:
        raw = client.chat.completions.with_raw_response.create(
            model="played", messages=ASKED, response_format=form, max_tokens=20, stream=True
        )
        told = raw.headers["x-prefixcache-left-out"]
        form["json_schema"] |= {"strict": True}  # type: ignore[operator]
        with pytest.raises(openai.BadRequestError, match="uniqueItems"):
            ask(client, response_format=form)
        return told

    assert talk(plain, model, use).endswith('not enforced: Unimplemented keys: ["uniqueItems"]')


def test_json_beside_tools_is_one_or_the_other(tmp_path: Path, model: Model) -> None:
    terms = {"tools": TOOLS, "response_format": {"type": "json_object"}, "max_tokens": 200}

    def use(client: Any) -> None:
        for seed in range(3):
            choice = ask(client, **terms, seed=seed).choices[0]
            if choice.message.tool_calls:
                check(choice.message.tool_calls)
            else:
                assert choice.message.content.startswith("{")

    def refused(client: Any) -> None:
        with pytest.raises(openai.BadRequestError, match="response_format beside tools"):
            ask(client, **terms)

    talk(save_words(tmp_path / "h", TEMPLATES["hermes"]), model, use)
    talk(save_words(tmp_path / "l", TEMPLATES["llama"]), model, refused)


def test_every_body_with_calls_is_what_openai_s_schema_says(plain: Path, model: Model) -> None:
    import asyncio

    from patience import PATIENCE_S
    from serving.bench import events
    from serving.openai_schema import complaints

    async def main() -> dict[str, list[str]]:
        bench = TalkingBench(plain, model)
        found: dict[str, list[str]] = {}
        terms = {"tools": TOOLS, "tool_choice": "required", "seed": 3, "max_tokens": 300}
        chat = {"model": "played", "messages": ASKED, **terms}
        path = "/v1/chat/completions"
        async with asyncio.timeout(PATIENCE_S), bench.listening(), bench.stepping():
            _, _, told = await bench.post(chat, path)
            assert told["choices"][0]["message"]["tool_calls"]
            found["whole"] = complaints("CreateChatCompletionResponse", told)
            raw = json.dumps(chat | {"stream": True}).encode()
            kind = {"content-type": "application/json"}
            _, _, data = await bench.exchange("POST", path, raw, kind)
            for number, chunk in enumerate(events(data)[:-1]):
                found[f"{number}"] = complaints("CreateChatCompletionStreamResponse", chunk)
        return found

    found = asyncio.run(main())
    assert len(found) > 3
    assert not {what: errors for what, errors in found.items() if errors}


def test_the_template_decides_how_calls_are_written(tmp_path: Path, model: Model) -> None:
    forms = {
        name: TalkingBench(save_words(tmp_path / name, template), model).model.call_form
        for name, template in TEMPLATES.items()
    }
    assert forms["plain"] is None
    assert forms["hermes"] == HERMES
    names = {name: form.name for name, form in forms.items() if form is not None}
    assert names == {"hermes": "hermes", "mistral": "mistral", "llama": "llama"}


@pytest.mark.parametrize(
    ("said", "wanted"),
    [
        (["Say [TOOL_CALLS] and {."], ("Say [TOOL_CALLS] and {.", [])),
        (
            ["Now [TOOL_CALLS]", TRIGGER, '[{"name": "wait", "arguments": {"days": 3}}]'],
            ("Now [TOOL_CALLS]", [("wait", '{"days": 3}')]),
        ),
        ([TRIGGER, '[{"name": "wait", "arguments": {"days'], (None, [("wait", '{"days')])),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_the_text_of_a_trigger_that_is_a_token_of_its_own_is_text(
    tmp_path: Path, said: list[str], wanted: tuple[str | None, list[tuple[str, str]]], stream: bool
) -> None:
    """A model may say it, and is held to nothing behind it: no call, and none of it is lost."""
    folder = save_words(tmp_path / "model", TEMPLATES["mistral"])
    tokenizer = spelling().backend_tokenizer
    (trigger,) = tokenizer.encode(TRIGGER, add_special_tokens=False).ids
    tokens: list[int] = []
    for part in said:
        tokens += (
            [trigger]
            if part is TRIGGER
            else [tokenizer.token_to_id(sign) for sign in part.replace(" ", "Ġ")]
        )
    body = {"model": "played", "messages": ASKED, "tools": TOOLS, "stream": stream}

    async def main() -> Any:
        bench = Bench(folder, workers=1, about=ABOUT | {"vocab_size": 300, "max_tokens": 4096})
        (worker,) = bench.workers
        async with asyncio.timeout(PATIENCE_S), bench.listening():
            raw, told = json.dumps(body).encode(), {"content-type": "application/json"}
            path = "/v1/chat/completions"
            asked = asyncio.create_task(bench.exchange("POST", path, raw, told))
            while not worker.lines:
                await asyncio.sleep(0.002)
            name = worker.lines[0]["id"]
            ledger = {"ledger": {"cold": 1}, "num_to_compute": 1}
            worker.tell({"event": "started", "id": name, **ledger})
            for token in tokens:
                worker.tell({"event": "token", "id": name, "token": token})
            worker.tell({"event": "finished", "id": name, "reason": "stop"})
            return await asked

    status, _, data = asyncio.run(main())
    assert status == 200
    if not stream:
        message = json.loads(data)["choices"][0]["message"]
        text, calls = message["content"], message.get("tool_calls", [])
    else:
        deltas = [one["choices"][0]["delta"] for one in events(data)[:-1]]
        text = "".join(delta.get("content", "") for delta in deltas) or None
        calls = [call for delta in deltas for call in delta.get("tool_calls", [])]
    got = [(call["function"]["name"], call["function"]["arguments"]) for call in calls]
    assert (text, got) == wanted
