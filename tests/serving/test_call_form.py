"""How calls are written, and read again in pieces of any size."""

from __future__ import annotations

import json
import random

import pytest

from prefixcache_serving.call_form import (
    FORMS,
    HERMES,
    PROBE_ARGUMENTS,
    PROBE_NAME,
    CallForm,
    CallPiece,
    CallReader,
    form_of,
    told_messages,
)

ARGUMENTS = [
    '{"a": 1}',
    "{}",
    '{"b": "}\\n</tool_call>\\n<tool_call>[TOOL_CALLS]", "c": [{"d": "\\\\"}, "]"]}',
    '{"é": "\\"{", "f": {"g": [[]]}}',
]
SAID = "Let me see <tool_ [TOOL"


def read(form: CallForm, parts: list[str]) -> tuple[str, list[tuple[str, str]]]:
    """Read an answer part by part; give what is said, and the calls."""
    reader = CallReader(form)
    said = ""
    calls: list[list[str]] = []
    for part in parts:
        more, pieces = reader.push(part)
        said += more
        for piece in pieces:
            if piece.name is not None:
                assert piece.index == len(calls)
                calls.append([piece.name, ""])
            calls[piece.index][1] += piece.arguments
    assert reader.num_calls == len(calls)
    return said + reader.finish(), [(name, arguments) for name, arguments in calls]


def cut(text: str, draw: random.Random) -> list[str]:
    at = sorted(draw.randint(0, len(text)) for _ in range(draw.randint(0, 30)))
    return [text[one:other] for one, other in zip([0, *at], [*at, len(text)], strict=True)]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}{form.open}{form.middle}")
def test_what_is_written_is_read_however_it_is_cut(form: CallForm) -> None:
    draw = random.Random(5)
    for _ in range(150):
        count = draw.randint(1, 4) if form.between is not None else 1
        calls = [(draw.choice(["f", "fly", "a-b_c"]), draw.choice(ARGUMENTS)) for _ in range(count)]
        said = SAID if form.trigger else ""
        assert read(form, cut(said + form.write(calls), draw)) == (said, calls)
        assert read(form, cut(SAID, draw)) == (SAID, [])


@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form.name}{form.open}{form.middle}")
def test_an_answer_that_is_cut_off_has_as_much_of_a_call(form: CallForm) -> None:
    whole = form.write([("f", '{"a": [1, "x"]}')])
    for length in range(len(whole)):
        said, calls = read(form, [whole[:length]])
        assert whole.startswith(said)
        for name, arguments in calls:
            assert name == "f"
            assert '{"a": [1, "x"]}'.startswith(arguments)


def test_one_piece_tells_all_of_a_call_that_came_at_once() -> None:
    _, pieces = CallReader(HERMES).push(HERMES.write([("f", '{"a": 1}'), ("g", "{}")]))
    assert pieces == [CallPiece(0, "f", '{"a": 1}'), CallPiece(1, "g", "{}")]


def test_a_form_is_known_by_what_a_template_writes() -> None:
    for form in FORMS:
        written = form.write([(PROBE_NAME, PROBE_ARGUMENTS)])
        assert form_of(f"<|assistant|>{written}<|end|>") == form
    (mistral,) = [form for form in FORMS if form.open == "["]
    arguments = json.dumps(PROBE_ARGUMENTS)
    call = f'[TOOL_CALLS][{{"name": "{PROBE_NAME}", "arguments": {arguments}, "id": "123456789"}}]'
    assert form_of(call) == mistral
    for other in ("", f"<function={PROBE_NAME}>", f'{{"name": "{PROBE_NAME}", "args": {{}}}}'):
        assert form_of(other) is None


def test_a_chat_without_a_template_s_help_is_told_in_words() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    chat = [
        {"role": "user", "content": "Do it."},
        {"role": "assistant", "content": "Well.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "done"},
        {"role": "tool", "tool_call_id": "d", "content": [{"type": "text", "text": "too"}]},
        {"role": "assistant", "content": "It is done."},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    system, user, calling, results, last = told_messages(chat, [tool])
    assert system["role"] == "system"
    assert '\n{"name": "f", "parameters": {"type": "object"}}\n' in system["content"]
    assert user == chat[0]
    assert calling == {
        "role": "assistant",
        "content": 'Well.\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
    }
    assert results["role"] == "user"
    assert results["content"] == (
        "<tool_response>\ndone\n</tool_response>\n<tool_response>\ntoo\n</tool_response>"
    )
    assert last == chat[4]
    own = {"role": "system", "content": "Be brief."}
    assert told_messages([own], [tool])[0]["content"].startswith("Be brief.\n\n")
    assert told_messages([own, chat[0]], []) == [own, chat[0]]
