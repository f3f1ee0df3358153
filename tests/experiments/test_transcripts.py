from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from prefixcache.errors import InvalidRequest
from prefixcache.types import unpack
from prefixcache_bench.readers import tokenizers, transcripts
from prefixcache_bench.readers.load import load
from prefixcache_bench.traces import Request, Trace

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
    assert text(trace.requests[0]).endswith('<assistant\n[{"id": 1, "function": {"name": "f"}}]')


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
