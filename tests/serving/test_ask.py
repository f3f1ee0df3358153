"""A body as what the workers are asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from prefixcache_serving.ask import Ask, read_ask
from prefixcache_serving.fields import CHAT, COMPLETIONS
from prefixcache_serving.refusals import Refused
from prefixcache_serving.served_model import ServedModel
from serving.bench import ABOUT, save_tokenizer


@pytest.fixture
def model(tokenizer_folder: Path) -> ServedModel:
    return ServedModel("m", tokenizer_folder, ABOUT)


def chat(model: ServedModel, *messages: Any, **more: Any) -> Ask:
    return read_ask({"model": "m", "messages": list(messages), **more}, CHAT, model)


USER = {"role": "user", "content": "w5"}
TEXT = {"type": "text", "text": "w5"}
CALL: dict[str, Any] = {"type": "function", "id": "c", "function": {"name": "f", "arguments": "{}"}}
CALLING: dict[str, Any] = {"role": "assistant", "tool_calls": [CALL]}


def test_tenants_and_salts_make_namespaces_that_nobody_else_has(model: ServedModel) -> None:
    def salt(tenant: str, given: str | None) -> Any:
        body = {"model": "m", "prompt": "w5", "cache_salt": given}
        return read_ask(body, COMPLETIONS, model, tenant).lines()[0].get("salt")

    assert salt("", None) is None  # all workers of the machine share
    pairs = [("a", None), ("b", None), ("", "a"), ("", "b"), ("a", "b"), ("ab", None), ("", "ab")]
    made = [salt(*pair) for pair in pairs]
    assert len(set(made)) == len(pairs)
    assert made == [salt(*pair) for pair in pairs]


def test_what_decides_the_choice_of_a_token_goes_to_the_worker(model: ServedModel) -> None:
    how = {"top_k": 5, "min_p": 0.1, "min_tokens": 2, "logit_bias": {"7": 1.0}, "seed": 3}
    how_else = {"ignore_eos": True, "segments": True, "max_tokens": 9}
    (first, second) = chat(model, USER, n=2, **how_else, **how).lines()
    assert first == {
        "tokens": [0, 5, 1],
        "max_new_tokens": 9,
        "temperature": 1.0,
        "top_p": 1.0,
        "ignore_eos": True,
        "segments": True,
        **how,
    }
    assert second == first | {"sample": 1}


def test_a_nucleus_of_nothing_takes_the_most_likely_token(model: ServedModel) -> None:
    (line,) = chat(model, USER, top_p=0).lines()
    assert "temperature" not in line


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([7], "messages[0]"),
        ([{"content": "x"}], "messages[0].role"),
        ([{"role": "boss", "content": "x"}], "messages[0].role"),
        ([{"role": "user"}], "messages[0].content"),
        ([USER, {"role": "user", "content": "x", "weight": 1}], "messages[1].weight"),
        ([{"role": "user", "content": 7}], "messages[0].content"),
        ([{"role": "user", "content": []}], "messages[0].content"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
            "messages[0].content[0].type",
        ),
        ([{"role": "user", "content": [TEXT | {"weight": 1}]}], "messages[0].content[0].weight"),
        ([{"role": "user", "content": [TEXT, {"type": "text"}]}], "messages[0].content[1].text"),
        ([USER | {"name": {"a": "b"}}], "messages[0].name"),
        ([USER | {"tool_call_id": "c"}], "messages[0].tool_call_id"),
        ([USER | {"refusal": "no"}], "messages[0].refusal"),
        ([{"role": "user", "content": "x", "tool_calls": []}], "messages[0].tool_calls"),
        ([CALLING | {"tool_calls": [7]}], "messages[0].tool_calls[0]"),
        ([CALLING | {"tool_calls": [{"type": "custom"}]}], "messages[0].tool_calls[0]"),
        (
            [CALLING | {"tool_calls": [{"function": {"name": "f"}}]}],
            "messages[0].tool_calls[0].function.arguments",
        ),
        ([CALLING | {"tool_calls": [CALL | {"id": 7}]}], "messages[0].tool_calls[0].id"),
        ([CALLING | {"tool_calls": [CALL | {"state": 1}]}], "messages[0].tool_calls[0].state"),
        (
            [CALLING | {"tool_calls": [CALL | {"function": CALL["function"] | {"strict": True}}]}],
            "messages[0].tool_calls[0].function.strict",
        ),
        ([CALLING, {"role": "tool", "content": [7]}], "messages[1].content[0]"),
    ],
)
def test_messages_that_would_not_be_seen_are_refused_by_place(
    model: ServedModel, messages: list[Any], param: str
) -> None:
    with pytest.raises(Refused) as told:
        chat(model, *messages)
    assert told.value.param == param


def test_what_clients_add_to_a_message_without_meaning_anything_by_it_is_taken(
    model: ServedModel,
) -> None:
    part = TEXT | {"cache_control": {"type": "ephemeral"}}
    assert chat(model, {"role": "user", "content": [part]}).prompts == chat(model, USER).prompts
    listed = CALLING | {"tool_calls": [CALL | {"index": 0}], "refusal": None, "audio": None}
    answer = {"role": "tool", "tool_call_id": "c", "content": "w7"}
    assert chat(model, USER, listed, answer).prompts == chat(model, USER, CALLING, answer).prompts


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"logit_bias": {"97": 1}}, "logit_bias"),
        ({"max_tokens": 600}, "max_tokens"),
        ({"n": 128, "max_tokens": 300, "logprobs": True, "top_logprobs": 20}, "logprobs"),
        ({"chat_template_kwargs": {"no_such_option": 1}}, "chat_template_kwargs"),
    ],
)
def test_fields_that_do_not_go_together_are_refused(
    model: ServedModel, more: dict[str, Any], param: str
) -> None:
    with pytest.raises(Refused) as told:
        chat(model, USER, **more)
    assert told.value.param == param


def test_a_template_that_leaves_something_out_is_told(tmp_path: Path) -> None:
    save_tokenizer(tmp_path, "{{ messages[-1]['content'] }}")
    told = chat(ServedModel("m", tmp_path, ABOUT), {"role": "system", "content": "w9"}, USER)
    assert told.left_out == ("messages that the template does not show in full",)
