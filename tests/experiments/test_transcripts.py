from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from prefixcache.errors import InvalidRequest
from prefixcache.prompts.logged_request import read_logged
from prefixcache.types import Namespace, unpack
from prefixcache_bench.experiments.readers import lines, tokenizers, transcripts
from prefixcache_bench.experiments.readers.load import load
from prefixcache_bench.experiments.traces import Request, Trace

START, END = 1000, 1001


class Bytes:
    """One token per byte."""

    name = "bytes"
    start, end = START, END

    def encode(self, text: str) -> Sequence[int]:
        return list(text.encode())


@pytest.fixture(autouse=True)
def one_token_per_byte(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "real_tokenizer" not in request.node.name:
        monkeypatch.setattr(transcripts, "named", lambda name: Bytes())


def text(request: Request, *, prompt: bool = False) -> str:
    ids = unpack(request.tokens).tolist()
    marks = {START: "<", END: ">"}
    shown = "".join(marks.get(one, chr(one) if one < 256 else "?") for one in ids)
    return shown[: request.prompt] if prompt else shown


def openai(path: Path, *lines: object) -> Trace:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return load(str(path))


def test_every_answer_of_a_chat_was_a_request(tmp_path: Path) -> None:
    trace = openai(
        tmp_path / "log.jsonl",
        {
            "messages": [
                {"role": "system", "content": "S"},
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": "A"},
                {"role": "user", "content": [{"type": "text", "text": "R"}]},
                {"role": "assistant", "content": "B"},
            ]
        },
    )
    first, second = trace
    assert text(first, prompt=True) == "<system\nS>\n<user\nQ>\n<assistant\n"
    assert text(first) == "<system\nS>\n<user\nQ>\n<assistant\nA"
    assert text(second, prompt=True) == text(first) + ">\n<user\nR>\n<assistant\n"
    assert 5 <= second.t - first.t <= 120.001


def test_a_logged_request_without_an_answer_is_one_request(tmp_path: Path) -> None:
    question = {"role": "user", "content": "Q"}
    answer = {"role": "assistant", "content": "A"}
    trace = openai(
        tmp_path / "log.jsonl",
        {"body": {"messages": [question, answer, question]}, "created": 1700000003},
        {"messages": [question], "timestamp": 1700000001.5},
    )
    assert [request.t for request in trace] == [0.0, 1.5]
    assert text(trace.requests[0]) == "<user\nQ>\n<assistant\n"
    assert text(trace.requests[1]) == "<user\nQ>\n<assistant\nA>\n<user\nQ>\n<assistant\n"
    assert all(4 * request.prompt == len(request.tokens) for request in trace)


def test_tool_calls_are_text_of_the_answer(tmp_path: Path) -> None:
    calls = [{"id": 1, "function": {"name": "f"}}]
    trace = openai(
        tmp_path / "log.jsonl",
        {
            "messages": [
                {"role": "user", "content": "Q"},
                {"role": "assistant", "content": None, "tool_calls": calls},
            ]
        },
    )
    called = '[{"id": 1, "function": {"name": "f", "arguments": {}}}]'
    assert text(trace.requests[0]).endswith("<assistant\n" + called)


def test_broken_chats_are_counted(tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "Q"}]}
    trace = openai(tmp_path / "log.jsonl", good, {"messages": []}, {"messages": [{}]}, good)
    assert len(trace) == 2
    assert [one.number for one in trace.broken] == [2, 3]


RECORDS = [
    {"id": "a_0", "conversations": [
        {"from": "gpt", "value": "left over"}, {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"}, {"from": "human", "value": "R"}]},
    {"id": "a_0", "conversations": [{"from": "human", "value": "Q"}]},
    {"id": "b_0", "conversations": [{"from": "alien", "value": "Q"}]},
    {"id": "c_0", "conversations": [
        {"from": "user", "value": "Ü"}, {"from": "chatgpt", "value": "B"}]},
]  # fmt: skip


def test_sharegpt_keeps_questions_with_their_answers(tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    path.write_text(json.dumps(RECORDS, indent=1))
    trace = load(str(path))
    assert [text(request) for request in trace] == [
        "<user\nQ>\n<assistant\nA",
        "<user\nÃ\x9c>\n<assistant\nB",
    ]
    assert [str(one) for one in trace.broken] == [
        "record 2: record 'a_0' was there before",
        "record 3: 'alien' speaks, who is neither human nor gpt",
    ]


def test_sharegpt_that_breaks_off_gives_the_whole_records(tmp_path: Path) -> None:
    path = tmp_path / "share.json"
    path.write_text(json.dumps(RECORDS[:1] + RECORDS[3:])[:-30])
    trace = load(str(path))
    assert len(trace) == 1
    assert trace.broken[-1].number == 2
    assert "breaks off" in trace.broken[-1].reason


def test_a_real_tokenizer_is_read_from_a_folder(tmp_path: Path) -> None:
    vocabulary = {"[UNK]": 0, "user": 1, "assistant": 2, "hello": 3, "<|im_start|>": 9}
    made = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "hello <|im_start|>"}]}))
    trace = load(str(path), tokenizer=str(tmp_path))
    ids = unpack(trace.requests[0].tokens).tolist()
    assert ids[:3] == [9, 1, 3]
    assert ids[-2:] == [9, 2]
    assert 9 not in ids[3:-2]


def test_a_real_tokenizer_of_an_older_form_is_left_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Older:
        def get_vocab(self) -> dict[str, int]:
            return {"a": 0, "<|im_end|>": 7}

        def __len__(self) -> int:
            return 8

        def encode(self, text: str, **asked: bool) -> list[int]:
            assert asked == {"add_special_tokens": False, "split_special_tokens": True}
            return [0] * len(text)

    class Transformers(ModuleType):
        class AutoTokenizer:
            @staticmethod
            def from_pretrained(folder: str, *, local_files_only: bool) -> Older:
                assert local_files_only
                return Older()

    monkeypatch.setitem(sys.modules, "transformers", Transformers("transformers"))
    (tmp_path / "tokenizer_config.json").write_text("{}")
    found = tokenizers.named(str(tmp_path))
    assert (found.start, found.end, found.encode("abc")) == (8, 7, [0, 0, 0])


def test_without_a_real_tokenizer_the_message_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tiktoken", None)
    with pytest.raises(InvalidRequest, match="pip install tiktoken"):
        tokenizers.named(None)
    with pytest.raises(InvalidRequest, match=r"there is no tokenizer .*save_pretrained"):
        tokenizers.named(str(tmp_path))
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InvalidRequest, match="cannot read the tokenizer"):
        tokenizers.named(str(tmp_path))


def one_request(**fields: object) -> Request:
    """Lay out one logged request."""
    (found,) = asked(fields)
    return found


def asked(*lines: object) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        return openai(Path(folder) / "log.jsonl", *lines)


QUESTION = {"role": "user", "content": "Q"}
WORDS = "You book journeys. " * 20
TOOL = {"type": "function", "function": {"name": "f"}}
ASKED = {"role": "user", "content": WORDS}
ANSWERED = {"from": "gpt", "value": "ok"}


def said(words: str) -> dict[str, object]:
    return {"type": "text", "text": words}


def user(words: str) -> dict[str, object]:
    return {"role": "user", "content": words}


def shows(*parts: object) -> dict[str, object]:
    return {"messages": [{"role": "user", "content": [*parts, said("Q")]}]}


DIFFERENT: dict[str, Callable[[int], dict[str, object]]] = {
    "tools": lambda n: {"tools": [{**TOOL, "function": {"name": f"{n}f", "description": WORDS}}]},
    "functions": lambda n: {"functions": [{"name": f"{n}f", "description": WORDS}]},
    "documents": lambda n: {"documents": [{"text": f"{n}{WORDS}"}]},
    "models": lambda n: {"model": f"m{n}"},
    "adapters": lambda n: {"model": "m", "lora_request": {"lora_name": f"a{n}"}},
    "adapters by name": lambda n: {"model": "m", "lora_request": f"a{n}"},
    "salts of a client": lambda n: {"model": "m", "extra_body": {"cache_salt": f"s{n}"}},
    "images of a data set": lambda n: {"images": [f"{n}.png"], "messages": [ASKED]},
    "a picture of a data set": lambda n: {
        "messages": None,
        "image": f"{n}.png",
        "conversations": [{"from": "human", "value": f"<image>{WORDS}"}, ANSWERED],
    },
    "images of a message": lambda n: {"messages": [{**ASKED, "images": [f"A{n}"]}]},
    "images of an engine's form": lambda n: {
        "messages": None,
        "text": WORDS,
        "image_data": [f"A{n}"],
    },
    "a picture where the message has its place": lambda n: {
        "images": [f"{n}.png"],
        "messages": [{"role": "user", "content": [{"type": "image"}, said(WORDS)]}],
    },
    "pictures that are named alone": lambda n: {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "image_url", "image_url": None, "uuid": f"u{n}"}, said(WORDS)],
            }
        ]
    },
    "the same picture in another size": lambda n: {
        "messages": [
            {
                "role": "user",
                "content": [
                    {"type": "video_url", "video_url": {"url": "v"}, "fps": n + 1},
                    said(WORDS),
                ],
            }
        ]
    },
    "adapters by path": lambda n: {"lora_request": {"lora_int_id": 1, "lora_path": f"/{n}"}},
    "adapters by number": lambda n: {"lora_request": {"lora_int_id": n + 1}},
    "adapters by id": lambda n: {"adapter_id": f"a{n}"},
    "adapters whose name is empty": lambda n: {"lora_name": "", "lora_path": f"/{n}"},
    "models of another service": lambda n: {"modelId": f"m{n}"},
    "salts of another engine": lambda n: {"extra_key": f"s{n}"},
    "salts of a client, as text": lambda n: {"extra_body": f'{{"cache_salt": "s{n}"}}'},
    "system under other names": lambda n: {"system_instruction": {"parts": [{"text": f"{n}S"}]}},
    "messages as text": lambda n: {"messages": json.dumps([user(f"{n}{WORDS}")])},
    "what a tracer was given": lambda n: {
        "messages": None,
        "input": {"messages": [user(f"{n}{WORDS}")]},
    },
    "words of messages under another name": lambda n: {
        "messages": [{"role": "user", "text": f"{n}{WORDS}"}]
    },
    "words in parts of another form": lambda n: {
        "messages": [{"role": "user", "parts": [{"type": "text", "content": f"{n}{WORDS}"}]}]
    },
    "settings beside messages": lambda n: {
        "messages": [user(f"{n}{WORDS}")],
        "params": {"temperature": 0},
    },
    "system beside a text": lambda n: {"system": f"{n}{WORDS}", "prompt": WORDS, "messages": None},
    "system beside an input": lambda n: {"system": f"{n}{WORDS}", "input": "Q", "messages": None},
    "tools of a preference": lambda n: {
        "messages": None,
        "prompt": [ASKED],
        "tools": [{**TOOL, "function": {"name": f"{n}f", "description": WORDS}}],
    },
    "batches of a model": lambda n: {
        "model": f"m{n}",
        "body": {"model": None, "messages": [{"role": "user", "content": WORDS}]},
    },
    "salts": lambda n: {"model": "m", "cache_salt": f"s{n}"},
    "system": lambda n: {"system": f"{n}{WORDS}"},
    "batches": lambda n: {
        "body": {"model": f"m{n}", "messages": [{"role": "user", "content": WORDS}]}
    },
}


@pytest.mark.parametrize("kind", DIFFERENT)
def test_requests_that_differ_in_what_comes_first_share_next_to_nothing(kind: str) -> None:
    messages = [{"role": "system", "content": WORDS}, QUESTION]
    trace = asked(*({"messages": messages} | DIFFERENT[kind](n) for n in range(6)))
    assert reused(trace) <= 0.05
    same = asked(*({"messages": messages} | DIFFERENT[kind](0) for _ in range(6)))
    assert reused(same) > 0.75


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"prompt": "Q", "multi_modal_data": {"image": "a.png"}}, "multi_modal_data"),
        ({"prompt_token_ids": [1, 2], "multi_modal_data": {"image": "a"}}, "multi_modal_data"),
        ({"tokens": [1, 2], "images": ["a.png"]}, "images or recordings beside it"),
        ({"prompt": "Q", "prompt_embeds": "AAAA"}, "prompt_embeds"),
        ({"instruction": "Translate", "input": "Q", "output": "A"}, "instruction"),
        ({"image": "a.png", "messages": [{"role": "system", "content": "S"}]}, "none is a user's"),
        (shows({"type": "image"}), "image has no content"),
        (shows({"type": "image_url", "image_url": {"url": ""}}), "image_url has no content"),
        (shows({"type": "image_url", "image_url": {"detail": "low"}}), "image_url has no content"),
        (shows({"type": "image"}, {"type": "image"}) | {"images": ["a"]}, "image has no content"),
        (shows({"type": "image"}) | {"images": ["a", "b"]}, "2 images .* have places for 1"),
        (shows({"type": "text", "words": "Q"}), "without a text"),
        ({"messages": [{"role": "user", "words": "Q"}]}, "message 1 has no content, but words"),
        ({"prompt": "Q", "lora_request": {"rank": 8}}, "an adapter .* that does not name it"),
        ({"prompt": "Q", "multimodal_data": ["A"]}, "multimodal_data"),
        ({"messages": "[{"}, "messages is no JSON"),
    ],
)
def test_what_leaves_open_what_the_prompt_is_is_refused(
    fields: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequest, match=named):
        read_logged(fields)
    if "tokens" in fields or "prompt_token_ids" in fields:
        with pytest.raises(InvalidRequest):
            asked(fields)


@pytest.mark.parametrize(
    ("fields", "kind"),
    [
        ({"prompt": "Q", "suffix": "end"}, "suffixes"),
        ({"messages": [QUESTION], "truncate_prompt_tokens": 4}, "prompts that were cut"),
        ({"prompt": "Q", "tools": [TOOL]}, "tools or documents beside a text"),
        ({"prompt": "Q", "context": [1, 2]}, "earlier turns as token ids"),
        ({"prompt": "Q", "history": [["a", "b"]]}, "earlier turns beside a prompt"),
        ({"prompt": "Q", "template": "{{ .Prompt }}"}, "templates of their own"),
        ({"messages": [QUESTION | {"thinking": "hm"}]}, "thoughts"),
        ({"messages": [QUESTION], "toolConfig": {"tools": []}}, "tools in a form"),
        ({"input": "Q", "prompt": {"id": "p"}}, "stored prompts"),
        ({"input": "Q", "conversation": "c"}, "conversations that are named"),
        ({"messages": [QUESTION], "reasoning_effort": "low"}, "options of a chat template"),
        ({"input": "Q", "reasoning": {"effort": "low"}}, "options of a chat template"),
        ([{"role": "assistant", "content": [{"type": "thinking"}]}, QUESTION], "thoughts"),
    ],
)
def test_what_decides_a_prompt_and_is_not_read_is_said(fields: object, kind: str) -> None:
    (said,) = asked(fields).not_counted
    assert said.startswith(f"1 of 1 requests have {kind}")


def test_a_field_that_is_not_known_is_said_by_name() -> None:
    lines = [
        {"messages": [QUESTION], "expert": n, "temperature": 0, "id": "r", "\x1b[2J": 1}
        for n in range(3)
    ]
    named = {"messages": [{**QUESTION, "name": "ada", "weight": 1}], "tenant": "t"}
    (note,) = (one for one in asked(*lines, {"prompt": "Q"}, named).notes if "not read" in one)
    assert note == (
        "4 of 5 lines have fields that are not read, and may decide what is shared: "
        "\\x1b[2J, expert, name, tenant"
    )
    many = {"messages": [QUESTION]} | {f"field{n}": 1 for n in range(1000)}
    (note,) = (one for one in asked(*[many] * 3).notes if "not read" in one)
    assert len(note) < 200
    assert not any("not read" in one for one in asked({"messages": [QUESTION], "n": 1}).notes)


def test_a_format_of_answers_is_no_form_of_a_trace(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text(json.dumps({"model": "m", "format": "json", "messages": [QUESTION]}))
    assert len(list(load(str(path)))) == 1


@pytest.mark.parametrize(
    "part",
    [
        lambda n: {"type": "image_url", "image_url": {"url": f"https://example.org/{n}.png"}},
        lambda n: {"type": "input_audio", "input_audio": {"data": f"A{n}", "format": "wav"}},
        lambda n: {"type": "image", "source": {"type": "base64", "data": f"A{n}"}},
        lambda n: {"type": "file", "file": {"file_data": f"A{n}"}},
    ],
)
def test_another_picture_is_another_prompt_and_it_is_said(
    part: Callable[[int], dict[str, object]],
) -> None:
    words = {"type": "text", "text": WORDS}
    trace = asked(
        *({"messages": [{"role": "user", "content": [part(n), words]}]} for n in range(6))
    )
    assert reused(trace) <= 0.05
    assert trace.not_counted == [
        "6 of 6 requests have images, recordings or files, counted as stand-ins of 256 tokens"
    ]
    same = asked(*({"messages": [{"role": "user", "content": [part(0), words]}]} for n in range(6)))
    assert reused(same) > 0.75


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "system", "content": "S"}, QUESTION]},
        {"system": "S", "messages": [QUESTION]},
        {"system": [{"type": "text", "text": "S"}], "messages": [QUESTION]},
        {"instructions": "S", "input": "Q"},
        {"instructions": "S", "input": [{"role": "user", "content": "Q"}]},
        {"request": {"system": "S", "messages": [QUESTION]}},
        {"params": {"system": "S", "messages": [QUESTION]}},
    ],
)
def test_a_system_prompt_counts_wherever_it_is_logged(fields: dict[str, object]) -> None:
    assert text(one_request(**fields)) == "<system\nS>\n<user\nQ>\n<assistant\n"


def test_sharegpt_with_system_turns_is_the_same_chats_in_openai_form(tmp_path: Path) -> None:
    chats = [[("system", "S"), ("user", f"Q{n}"), ("assistant", "A")] for n in range(3)]
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    shared = [
        {"id": n, "conversations": [{"from": names[who], "value": said} for who, said in chat]}
        for n, chat in enumerate(chats)
    ]
    at_the_top = [
        {"system": "S", "conversation": one["conversations"][1:]}  # type: ignore[index]
        for one in shared
    ]
    spoken = [{"messages": [{"role": who, "content": said} for who, said in c]} for c in chats]
    expected = openai(tmp_path / "log.jsonl", *spoken)
    for records in (shared, at_the_top):
        (tmp_path / "share.json").write_text(json.dumps(records))
        found = load(str(tmp_path / "share.json"))
        assert [(one.t, one.tokens, one.prompt) for one in found] == [
            (one.t, one.tokens, one.prompt) for one in expected
        ]


def test_the_results_of_tools_take_the_turn_of_who_asks() -> None:
    said = [("human", "Q"), ("function_call", "f"), ("observation", "1"), ("gpt", "A")]
    trace = asked({"conversations": [{"from": who, "value": what} for who, what in said]})
    assert [text(one) for one in trace] == [
        "<user\nQ>\n<assistant\nf",
        "<user\nQ>\n<assistant\nf>\n<tool\n1>\n<assistant\nA",
    ]


@pytest.mark.parametrize(
    ("fields", "prompts"),
    [
        ({"prompt": "ab"}, ["ab"]),
        ({"prompt": ["ab", "c"]}, ["ab", "c"]),
        ({"prompt": [97, 98]}, ["ab"]),
        ({"prompt": [[97], [98]]}, ["a", "b"]),
        ({"input": ["ab", "c"]}, ["ab", "c"]),
        ({"prompt_token_ids": [97, 98]}, ["ab"]),
        ({"input_ids": [[97], [98]]}, ["a", "b"]),
        ({"body": {"prompt": "ab"}}, ["ab"]),
        ({"body": {"prompt_token_ids": [97]}}, ["a"]),
    ],
)
def test_a_prompt_is_a_request_whatever_form_it_has(
    fields: dict[str, object], prompts: list[str]
) -> None:
    trace = asked(fields)
    assert [text(one) for one in trace] == prompts
    assert {one.t for one in trace} == {0.0}


@pytest.mark.parametrize("fields", [{"prompt_token_ids": [97]}, {"prompt": "a"}])
def test_model_adapter_and_salt_are_the_namespace(fields: dict[str, object]) -> None:
    found = one_request(**fields, model="m", adapter="a", cache_salt="s")
    assert found.namespace == Namespace("m", "a", salt="s")


def test_an_answer_that_goes_on_is_the_end_of_the_prompt() -> None:
    messages = [QUESTION, {"role": "assistant", "content": "A"}]
    found = one_request(messages=messages, continue_final_message=True, add_generation_prompt=False)
    assert text(found, prompt=True) == "<user\nQ>\n<assistant\nA"
    assert text(one_request(messages=[QUESTION], add_generation_prompt=False)) == "<user\nQ>\n"


def test_what_is_in_no_prompt_is_counted_by_kind() -> None:
    thinking = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    block = {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm"}]}
    trace = asked(
        {"messages": [QUESTION, thinking, QUESTION, thinking]},
        {"messages": [QUESTION, block, QUESTION], "chat_template_kwargs": {"a": 1}},
        {"input": "Q", "previous_response_id": "r"},
    )
    assert trace.not_counted == [
        "1 of 4 requests have earlier responses that are named by id, which are not counted",
        "1 of 4 requests have options of a chat template, which are not counted",
        "3 of 4 requests have thoughts, which are not counted",
    ]


def test_what_is_no_prompt_costs_its_line_alone() -> None:
    trace = asked(
        {"prompt": "a"}, {"prompt": ""}, {"prompt": []}, {"prompt": [-1]}, {"messages": [5]},
        {"prompt": [True]}, {"prompt": "a", "model": 5},
    )  # fmt: skip
    assert len(trace) == 1
    assert [one.number for one in trace.broken] == [2, 3, 4, 5, 6, 7]
    ids = asked({"tokens": [1]}, {"tokens": [-1]}, {"tokens": [2**40]}, {"tokens": [1, "a"]})
    assert len(ids) == 1
    assert [one.number for one in ids.broken] == [2, 3, 4]


def test_what_a_tokenizer_cannot_cut_costs_its_line_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Ascii(Bytes):
        def encode(self, text: str) -> Sequence[int]:
            return list(text.encode("ascii"))

    monkeypatch.setattr(transcripts, "named", lambda name: Ascii())
    trace = asked({"prompt": "a"}, {"prompt": "ä"}, {"prompt": "b"})
    assert [text(one) for one in trace] == ["a", "b"]
    assert [one.number for one in trace.broken] == [2]


def test_a_data_set_may_hold_its_tools_as_text() -> None:
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    tools = [{"type": "function", "function": {"name": "f"}}]
    trace = asked(*({"conversations": turns, "tools": one} for one in (tools, json.dumps(tools))))
    assert trace.requests[0].tokens == trace.requests[1].tokens
    assert text(trace.requests[0]).startswith("<tools\n[{")
    plain = one_request(conversations=turns, tools="", system="")
    assert text(plain) == "<user\nQ>\n<assistant\nA"


def test_the_tokens_of_all_chats_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lines, "MOST_TOKENS", 100)
    with pytest.raises(InvalidRequest, match="more than 100 tokens"):
        asked(*({"messages": [QUESTION]} for _ in range(9)))


def reused(trace: Trace) -> float:
    """Give the share of all prompt tokens that an endless cache has, block by block of 16."""
    seen: set[tuple[Namespace, bytes]] = set()
    found = 0
    for request in trace:
        ends = range(64, 4 * request.prompt + 1, 64)
        blocks = {(request.namespace, request.tokens[:end]) for end in ends}
        found += 16 * len(blocks & seen)
        seen |= blocks
    return found / trace.prompt_tokens
