"""No field is ever ignored in silence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixcache_serving.fields import (
    ACCEPTED,
    CHAT,
    COMPLETIONS,
    FIELDS,
    OF,
    REFUSED,
    RESPONSES,
    USED,
    Field,
    read,
    table,
)
from prefixcache_serving.refusals import Refused

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"

RIGHT: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "x"}],
    "prompt": "x",
    "max_completion_tokens": 5,
    "max_tokens": 5,
    "temperature": 0.5,
    "top_p": 0.5,
    "n": 2,
    "seed": -4,
    "stop": ["a", "b"],
    "stream": True,
    "stream_options": {"include_usage": True, "include_obfuscation": False},
    "ignore_eos": True,
    "chat_template_kwargs": {"a": 1},
    "add_generation_prompt": False,
    "continue_final_message": True,
    "user": "u",
    "safety_identifier": "s",
    "metadata": {"a": "b"},
    "store": True,
    "service_tier": "auto",
    "prompt_cache_key": "k",
    "prompt_cache_retention": "24h",
    "cache_salt": "secret",
    "segments": True,
    "frequency_penalty": 0.5,
    "presence_penalty": -0.5,
    "logit_bias": {"5": -100},
    "top_k": 3,
    "min_p": 0.1,
    "repetition_penalty": 1.2,
    "min_tokens": 3,
    "top_logprobs": 3,
    "input": "x",
    "instructions": "x",
    "max_output_tokens": 5,
    "include": ["message.output_text.logprobs"],
    "text": {"format": {"type": "text"}, "verbosity": None},
    "max_tool_calls": 5,
    "reasoning": {"effort": "none", "summary": None},
    "echo": True,
    "best_of": 3,
    "use_beam_search": True,
    "length_penalty": -0.5,
    "early_stopping": "never",
    "response_format": {"type": "json_object"},
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "auto",
    "parallel_tool_calls": False,
}
"""A value of each field that has an effect, or is accepted without one."""

KINDS = (CHAT, COMPLETIONS, RESPONSES)
CASES = [(kind, field) for kind in KINDS for field in OF[kind].values()]


@pytest.mark.parametrize(
    ("kind", "schema"),
    [
        (CHAT, "CreateChatCompletionRequest"),
        (COMPLETIONS, "CreateCompletionRequest"),
        (RESPONSES, "CreateResponse"),
    ],
)
def test_every_field_of_openai_s_requests_is_in_the_table(kind: str, schema: str) -> None:
    from serving import openai_schema

    assert openai_schema.properties(schema) <= set(OF[kind])
    options = openai_schema.properties("ChatCompletionStreamOptions")
    assert options <= {"include_usage", "include_obfuscation"}


@pytest.mark.parametrize(("kind", "field"), CASES, ids=lambda one: getattr(one, "name", one))
def test_a_field_has_its_effect_or_is_listed_or_is_refused_by_name(kind: str, field: Field) -> None:
    assert read({field.name: None}, kind) == {}
    if field.effect == REFUSED:
        with pytest.raises(Refused, match=field.name) as told:
            read({field.name: ["something", 7]}, kind)
        assert told.value.param == field.name
        for harmless in field.harmless:
            assert read({field.name: harmless}, kind) == {}
        return
    right = {"logprobs": True if kind == CHAT else 3} | RIGHT
    if kind == RESPONSES:
        right["stream_options"] = {"include_obfuscation": True}
    found = read({field.name: right[field.name]}, kind)
    assert set(found) == ({field.name} if field.effect == USED else set())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", odd) for odd in (-1, 2.1, "1", True, [], 10**400)),
        *(("top_p", odd) for odd in (-0.1, 1.1, "x", False)),
        *(("n", odd) for odd in (0, 129, 1.5, "2", True)),
        *(("seed", odd) for odd in (2**63, -(2**63) - 1, 1.5, "7")),
        *(("max_tokens", odd) for odd in (-1, 2**31, "5", True, 1e300)),
        *(("stop", odd) for odd in ("", [""], ["a"] * 17, 7, [7], ["\ud800"], "x" * 2000)),
        *(("stream", odd) for odd in (1, "true", [])),
        *(("stream_options", odd) for odd in (True, {"other": 1}, {"include_usage": 1})),
        *(("user", odd) for odd in (7, "x" * 2000)),
        *(("best_of", odd) for odd in (0, 129, True, 1.5, "1")),
        *(("echo", odd) for odd in (0, "yes")),
        *(("early_stopping", odd) for odd in (0, "always")),
        *(("length_penalty", odd) for odd in (11, "1")),
        *(("frequency_penalty", odd) for odd in (2.1, -2.1, False, "0")),
        *(("logit_bias", odd) for odd in ([], {"x": 1}, {"5": 101}, {"05": 1}, {"5": "1"})),
        *(("logprobs", odd) for odd in (6, -1, "yes", 0.5)),
        *(("top_k", odd) for odd in (-2, 0.5, "5")),
        *(("repetition_penalty", odd) for odd in (0, 101)),
        *(("response_format", odd) for odd in ("json", [], 7)),
        *(("parallel_tool_calls", odd) for odd in ("yes", 1)),
        *(("functions", odd) for odd in ([{"name": "f"}], {})),
        *(("function_call", odd) for odd in ("auto", {"name": "f"})),
        *(("cache_salt", odd) for odd in ("", 5, "x" * 2000)),
        *(("no_such_field", odd) for odd in (None, 1, {})),
    ],
)
def test_a_wrong_value_is_refused_by_name(kind: str, name: str, value: Any) -> None:
    if name in OF[kind] or name == "no_such_field":
        with pytest.raises(Refused) as told:
            read({name: value}, kind)
        assert (told.value.param or "").partition(".")[0] == name
        assert told.value.status == 400


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("store", odd) for odd in (True, 0)),
        *(("include", odd) for odd in ("x", [7], ["file_search_call.results"])),
        *(("reasoning", odd) for odd in (7, {"effort": "low"}, {"summary": "auto"}, {"x": 1})),
        *(("text", odd) for odd in ("x", {"format": "text"}, {"verbosity": "low"}, {"x": 1})),
        *(("truncation", odd) for odd in ("auto", True)),
        *(("background", odd) for odd in (True, 1)),
        *(("previous_response_id", odd) for odd in ("resp_1", 7)),
        *(("stream_options", odd) for odd in ({"include_usage": True}, True)),
    ],
)
def test_what_needs_a_memory_or_another_model_is_refused_by_name(name: str, value: Any) -> None:
    test_a_wrong_value_is_refused_by_name(RESPONSES, name, value)


@pytest.mark.parametrize("name", ["\u202ename", "\x1b[2J", "\ufeff", "n" * 5000, "a\nb"])
@pytest.mark.parametrize("body", [CHAT, RESPONSES])
def test_a_name_of_a_client_s_is_told_shortly_and_as_it_can_be_shown(body: str, name: str) -> None:
    fields = {"stream_options", "metadata", "text", "reasoning", ""} & {"", *OF[body]}
    for field in fields:
        with pytest.raises(Refused) as told:
            read({field: {name: 5}} if field else {name: 5}, body)
        for said in (str(told.value), told.value.param or ""):
            assert said.isprintable()
            assert "\ufeff" not in said
            assert len(said) < 300


def test_the_page_has_the_table_of_the_code() -> None:
    assert table() in PAGE.read_text()
    assert {field.effect for field in FIELDS} == {USED, ACCEPTED, REFUSED}
