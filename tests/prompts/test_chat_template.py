"""From a logged request to a prompt: as transformers writes it, in every form, within bounds."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from prefixcache.errors import InvalidRequest
from prefixcache.prompts.chat_template import ChatTemplate, _shows_all, prompt_of
from prefixcache.prompts.logged_request import MEDIA_TOKENS, read_logged
from prefixcache_worker import smollm2

PLAIN = (
    "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] + '|' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLS = """
{%- if tools %}{% for tool in tools %}{{ tool | tojson(indent=2) }}
{% endfor %}{% endif %}
{%- if thinking is defined and thinking %}(think){% endif %}
{%- for d in documents or [] %}[{{ d.title }}: {{ d.text }}]{% endfor %}
{%- for m in messages %}
{%- if m.tool_calls %}
{%- for call in m.tool_calls %}
<call>{{ call.function.name }} {% for k, v in call.function.arguments | items %}{{ k }}={{ v }}
{%- endfor %}</call>
{%- endfor %}
{%- elif m.content is none %}{{ raise_exception('no content') }}
{%- else %}{% generation %}<{{ m.role }}>{{ m.content | trim }}{% endgeneration %}
{%- endif %}
{%- if loop.last %}{% break %}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<assistant>{% endif %}
"""
SYSTEMLESS = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system, please') }}{% endif %}"
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}"
    "{% for part in m.content %}{% if part.type == 'text' %}({{ part.text }}){% endif %}"
    "{% endfor %}{% endif %}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"q": "Grüße"}}}
WRITTEN = CALL | {"function": {"name": "f", "arguments": '{"q": "Grüße"}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "<b>ä</b>"}}
ASKED = {"role": "user", "content": " Wie geht's? 你好 "}
SAID = {"role": "assistant", "content": "Gut, danke. "}


class Read(str):
    """A text that counts how much of it is read."""

    num_read = 0

    def find(self, part: str, start: int = 0, end: int | None = None) -> int:  # type: ignore[override]
        end = len(self) if end is None else end
        at = super().find(part, start, end)
        self.num_read += (end if at < 0 else at) - start
        return at


@pytest.mark.parametrize("roles", [["user"], ["system", "user", "assistant"]])
def test_whether_all_messages_are_shown_is_seen_by_reading_a_prompt_some_times(
    roles: list[str],
) -> None:
    """However many there are, and in whatever order the template writes them."""
    messages = [{"role": role, "content": f"{at}-"} for at in range(3000) for role in roles]
    for order, most in ((messages, len(roles)), (messages[::-1], 66)):
        text = Read("".join(f"<{one['role']}>{one['content']}" for one in order))
        assert _shows_all(text, messages) is (order is messages)
        assert text.num_read <= most * len(text)
    few = messages[:4]
    assert _shows_all("3- 2- 1- 0-", few)  # not so many that it would take long
    assert not _shows_all("3- 2- 1- ", messages)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return transformers.AutoTokenizer.from_pretrained(smollm2.folder(quiet=True))


def written(template: str, **request: Any) -> str:
    (logged,) = read_logged(request)
    return ChatTemplate(template, SPECIAL).render(logged)[0]


def by_transformers(tokenizer: Any, template: str, messages: Any, **options: Any) -> str:
    tokenizer.bos_token = "<s>"
    text: str = tokenizer.apply_chat_template(
        messages,
        chat_template=template,
        tokenize=False,
        **({"add_generation_prompt": True} | options),
    )
    return text


@pytest.mark.parametrize(
    ("template", "messages", "options"),
    [
        (None, [ASKED], {}),
        (None, [ASKED, SAID, ASKED], {}),
        (None, [{"role": "system", "content": "S"}, ASKED], {}),
        (None, [ASKED, SAID], {"continue_final_message": True, "add_generation_prompt": False}),
        (PLAIN, [ASKED, SAID], {"add_generation_prompt": False}),
        (TOOLS, [ASKED], {"tools": [TOOL, TOOL]}),
        (TOOLS, [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}], {}),
        (TOOLS, [ASKED], {"documents": [{"title": "a", "text": "b"}]}),
        (TOOLS, [ASKED], {"chat_template_kwargs": {"thinking": True}}),
        (TOOLS, [ASKED, SAID], {"continue_final_message": True, "add_generation_prompt": False}),
        (SYSTEMLESS, [ASKED, SAID, ASKED], {}),
        (PARTS, [{"role": "user", "content": [{"type": "text", "text": "a"}] * 2}, SAID], {}),
    ],
)
def test_it_writes_what_transformers_writes(
    tokenizer: Any, template: str | None, messages: list[Any], options: dict[str, Any]
) -> None:
    template = template or tokenizer.chat_template
    assert template is not None
    given = {key: one for key, one in options.items() if key != "chat_template_kwargs"}
    wanted = by_transformers(
        tokenizer, template, messages, **given, **options.get("chat_template_kwargs", {})
    )
    assert written(template, messages=messages, **options) == wanted


EQUAL: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({"messages": [ASKED], "system": "S"},
     {"messages": [{"role": "system", "content": "S"}, ASKED]}),
    (
        {"messages": [ASKED], "system": [{"type": "text", "text": "S"}]},
        {"messages": [{"role": "system", "content": "S"}, ASKED]},
    ),
    (
        {"instructions": "S", "input": "q"},
        {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]},
    ),
    (
        {"input": [{"role": "user", "content": [{"type": "input_text", "text": "q"}]}]},
        {"messages": [{"role": "user", "content": "q"}]},
    ),
    (
        {"input": [
            {"type": "function_call", "call_id": "1", "name": "f", "arguments": '{"q": "Grüße"}'},
            {"type": "function_call_output", "call_id": "1", "output": "42"}]},
        {"messages": [{"role": "assistant", "tool_calls": [WRITTEN]},
                      {"role": "tool", "tool_call_id": "1", "content": "42"}]},
    ),
    (
        {"messages": [
            {"role": "assistant", "content": [
                {"type": "tool_use", "id": "1", "name": "f", "input": {"q": "Grüße"}}]},
            {"role": "user", "content": [
                {"type": "tool_result", "tool_use_id": "1", "content": "42"}]}]},
        {"messages": [{"role": "assistant", "content": None, "tool_calls": [WRITTEN]},
                      {"role": "tool", "content": "42"}]},
    ),
    ({"messages": [ASKED], "functions": [TOOL["function"]]},
     {"messages": [ASKED], "tools": [TOOL]}),
    ({"messages": [ASKED], "tools": [{"name": "f", "description": "<b>ä</b>"}]},
     {"messages": [ASKED], "tools": [TOOL]}),
    ({"conversations": [{"from": "system", "value": "S"}, {"from": "human", "value": "q"}]},
     {"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "q"}]}),
    ({"conversation": [ASKED], "turn": 1}, {"messages": [ASKED]}),
    ({"custom_id": "r", "body": {"messages": [ASKED], "tools": None}}, {"messages": [ASKED]}),
    ({"messages": [{"role": "user", "content": "", "parts": [{"type": "text", "text": "q"}]}]},
     {"messages": [{"role": "user", "content": "q"}]}),
    ({"messages": '[{"role": "user", "content": "q"}]', "chat_template_kwargs": "{}"},
     {"messages": [{"role": "user", "content": "q"}]}),
    ({"messages": [{"role": "user", "content": {"type": "text", "text": "q"}}]},
     {"messages": [{"role": "user", "content": "q"}]}),
    ({"messages": [ASKED], "system_prompt": "S"}, {"messages": [ASKED], "system": "S"}),
    ({"messages": [{"role": "assistant", "content": None, "refusal": "no"}]},
     {"messages": [{"role": "assistant", "content": "no"}]}),
]  # fmt: skip


@pytest.mark.parametrize(("one", "other"), EQUAL)
def test_the_same_request_in_two_forms_is_the_same_prompt(
    one: dict[str, Any], other: dict[str, Any]
) -> None:
    assert written(TOOLS, **one) == written(TOOLS, **other)


def tokens_of(template: str, **request: Any) -> bytes:
    (logged,) = read_logged(request)
    made = ChatTemplate(template, SPECIAL)
    return prompt_of(logged, lambda: made, lambda text, special: list(text.encode())).tokens


def picture(url: Any, form: str = "image_url") -> list[Any]:
    part = {"type": form, form: url}
    if form == "image":
        part = {"type": form, "source": {"type": "base64", "data": url}}
    return [{"role": "user", "content": [part, {"type": "text", "text": "What is it?"}]}]


@pytest.mark.parametrize("template", [PLAIN, PARTS])
def test_a_picture_stands_for_itself_and_for_no_other(template: str) -> None:
    one = tokens_of(template, messages=picture({"url": "data:image/png;base64,AAAA"}))
    same = tokens_of(template, messages=picture("AAAA", "image"))
    other = tokens_of(template, messages=picture({"url": "data:image/png;base64,AAAB"}))
    assert one == same
    assert len(one) == len(other) > 4 * MEDIA_TOKENS
    shared = next(at for at, pair in enumerate(zip(one, other, strict=True)) if len({*pair}) > 1)
    assert shared < 100


def test_what_may_be_shared_is_named_by_model_adapter_and_salt() -> None:
    (told,) = read_logged(
        {
            "body": {
                "model": "m",
                "lora_request": {"lora_name": "a"},
                "cache_salt": "s",
                "prompt": "x",
            }
        }
    )
    assert (told.model, told.adapter, told.salt, told.text) == ("m", "a", "s", "x")
    assert read_logged({"model": "m", "body": {"prompt": "x"}})[0].model == "m"


def test_a_completion_may_have_several_prompts() -> None:
    assert [one.text for one in read_logged({"prompt": ["a", "b"]})] == ["a", "b"]
    assert len(read_logged({"prompt": [[1, 2], [3]]})) == 2
    assert read_logged({"prompt": [1, 2, 3]})[0].tokens == read_logged([1, 2, 3])[0].tokens


@pytest.mark.parametrize(
    ("request_", "kinds"),
    [
        ({"messages": [ASKED], "tools": [TOOL]}, ["tools that the template does not show"]),
        ({"messages": [ASKED], "documents": [{"text": "x"}]},
         ["documents that the template does not show"]),
        ({"messages": [ASKED], "chat_template_kwargs": {"thinking": True}},
         ["options that the template does not know"]),
        ({"messages": [ASKED], "chat_template": "{{ 1 }}"}, ["chat templates of their own"]),
        ({"messages": [{"role": "assistant", "tool_calls": [CALL]}]},
         ["tool calls that the template does not show"]),
        ({"messages": [{"role": "assistant", "content": [
            {"type": "thinking", "thinking": "hm"}, {"type": "text", "text": "a"}]}]},
         ["thoughts"]),
    ],
)  # fmt: skip
def test_what_is_left_out_is_told(request_: dict[str, Any], kinds: list[str]) -> None:
    (logged,) = read_logged(request_)
    assert sorted(ChatTemplate(PLAIN, SPECIAL).render(logged)[2]) == kinds


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(10**9) %}x{% endfor %}",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
        "{% endfor %}",
        "{% set n = namespace(x='a') %}{% for i in range(60) %}"
        "{% set n.x = n.x | replace('a', 'aaaa') %}{% endfor %}",
        pytest.param(
            "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
            "{{ f(60) }}",
            marks=pytest.mark.slow,
        ),
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ 'a' * 10**10 }}",
        "{{ [1] * 10**10 }}",
        "{{ 10**10**2 ** 9 }}",
        "{{ 'a'.ljust(10**10) }}",
        "{{ 'a' | center(10**10) }}",
        "{{ 'a' | indent(10**9) }}",
        "{{ '%10000000000d' % 1 }}",
        "{{ '{:10000000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 10**10) }}",
        pytest.param(
            "{{ range(99999) | map('string') | join('a' * 999999) }}", marks=pytest.mark.slow
        ),
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('not so') }}",
        "{{ nothing.at.all }}",
        "{% if %}",
        "{{ " + "(" * 5000,
    ],
)
def test_a_template_stays_within_its_bounds(template: str) -> None:
    with pytest.raises(InvalidRequest, match=r"the chat template (says|is none)"):
        written(template, messages=[ASKED])


def test_a_record_nested_without_end_is_refused() -> None:
    value: Any = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(InvalidRequest):
        read_logged(value)
    with pytest.raises(InvalidRequest):
        read_logged({"messages": [{"role": "user", "content": value}]})


@pytest.mark.parametrize("value", [5, None, "x", {}, [], [{}], {"messages": []}, {"input": {}}])
def test_what_is_no_request_is_refused(value: Any) -> None:
    with pytest.raises(InvalidRequest):
        read_logged(value)


def test_a_field_that_is_not_known_is_told_by_name() -> None:
    (logged,) = read_logged({"messages": [ASKED], "expert": 7, "temperature": 0})
    made = ChatTemplate(PLAIN, SPECIAL)
    told = prompt_of(logged, lambda: made, lambda text, special: list(text.encode())).left_out
    assert list(told) == ["fields that are not read: expert"]


def test_a_model_may_have_a_template_for_requests_with_tools() -> None:
    named = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools[0].function.name }}"},
    ]
    for source in (named, {one["name"]: one["template"] for one in named}):
        made = ChatTemplate.of_config({"chat_template": source, "bos_token": {"content": 5}})
        (bare,) = read_logged({"messages": [ASKED]})
        (with_tools,) = read_logged({"messages": [ASKED], "tools": [TOOL]})
        assert made.render(bare)[0] == "plain"
        assert made.render(with_tools)[0] == TOOL["function"]["name"]


@pytest.mark.parametrize(
    "name", ["media before the content", "digest of a medium beside the message"]
)
def test_what_was_read_already_is_known_by_what_no_record_can_say(name: str) -> None:
    for odd in (5, "x", [5], {"type": 5}):
        message = {"role": "user", "content": [{"type": "text", "text": "Q", name: odd}], name: odd}
        (logged,) = read_logged({"messages": [message]})
        assert logged.messages[0]["content"] == [{"type": "text", "text": "Q"}]


def _refuse(text: str, special: bool) -> list[int]:
    text.encode()  # as tokenizers do: half a character is no text to them
    return [1]


@pytest.mark.parametrize(
    "beside",
    [
        {"documents": [{"title": "\ud800", "text": "t"}]},
        {
            "messages": [
                {"role": "user", "content": "x"},
                {"role": "assistant", "tool_calls": [{"function": {"name": "f\ud800"}}]},
            ]
        },
    ],
    ids=lambda value: next(iter(value)),
)
def test_half_a_character_anywhere_in_a_chat_is_refused_by_name(beside: dict[str, Any]) -> None:
    (request,) = read_logged({"messages": [{"role": "user", "content": "x"}], **beside})
    with pytest.raises(InvalidRequest, match="holds half a character"):
        prompt_of(request, lambda: ChatTemplate(TOOLS, SPECIAL), _refuse)


@pytest.mark.parametrize("name", ["self", "messages", "context", "tools", "", "raise_exception"])
def test_an_option_of_any_name_is_no_argument_of_ours(name: str) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "chat_template_kwargs": {name: 3}}
    (request,) = read_logged(asked)
    made = prompt_of(request, lambda: ChatTemplate(TOOLS, SPECIAL), _refuse)
    assert made.left_out == {"options that the template does not know": 1}
