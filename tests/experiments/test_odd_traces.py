"""Odd files: a form is never guessed in silence, and no line takes more than itself with it."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import tarfile
from pathlib import Path
from typing import Any

import pytest

from experiments.test_commands import run
from prefixcache.errors import InvalidRequest
from prefixcache.types import unpack
from prefixcache_bench.commands.replay import replay
from prefixcache_bench.experiments.readers import lines
from prefixcache_bench.experiments.readers.load import Form, load

DEEP = b'{"tokens": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n"

LINE = b'{"tokens": [1, 2]}\n'

CHAT = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def put(path: Path, *objects: Any, head: bytes = b"", encoding: str = "utf-8") -> str:
    text = "".join(json.dumps(one, ensure_ascii=False) + "\n" for one in objects)
    path.write_bytes(head + text.encode(encoding))
    return str(path)


def moon(number: int, ids: list[Any], length: int = 1400, **more: Any) -> dict[str, Any]:
    return {"timestamp": number * 100, "input_length": length, "hash_ids": ids} | more


# ---------------------------------------------------------------------- bytes


def test_a_byte_order_mark_changes_nothing(tmp_path: Path) -> None:
    mark = b"\xef\xbb\xbf"
    chats = [{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]
    for name, objects in {
        "tokens": [{"tokens": [1, 2]}],
        "hashes": [moon(0, [1, 2, 3])],
        "lines": chats,
        "array": [chats],
    }.items():
        plain = load(put(tmp_path / f"{name}.json", *objects))
        marked = load(put(tmp_path / f"{name}.json", *objects, head=mark))
        assert marked.requests == plain.requests
        assert not marked.broken


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
def test_other_encodings_are_named_with_what_to_do(tmp_path: Path, encoding: str) -> None:
    path = put(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]}, encoding=encoding)
    with pytest.raises(InvalidRequest, match=f"is {encoding[:6].upper()}; .* iconv -f UTF-"):
        load(path)


@pytest.mark.parametrize(
    ("data", "named"),
    [
        (gzip.compress(gzip.compress(LINE, mtime=0), mtime=0), "gzip within gzip: .*gunzip"),
        (lzma.compress(LINE), "packed with xz"),
        (bz2.compress(LINE), "packed with bzip2"),
        (b"\x28\xb5\x2f\xfd" + bytes(99), "packed with zstd: unpack it, zstd -d"),
        (b"PK\x03\x04" + bytes(26) + b"\n" + LINE * 9, "a zip archive"),
        (b"PAR1" + bytes(99), "Parquet: write its rows"),
        (json.dumps(json.loads(LINE), indent=2).encode(), r"several lines each; .* jq -c \."),
        (b'{"t": 1,\n"tokens": [1]}\n' * 3, "several lines each"),
    ],
)
def test_what_is_packed_otherwise_is_named_with_what_to_do(
    tmp_path: Path, data: bytes, named: str
) -> None:
    (tmp_path / "t.jsonl").write_bytes(data)
    with pytest.raises(InvalidRequest, match=named):
        load(str(tmp_path / "t.jsonl"))


@pytest.mark.parametrize("form", [None, *Form])
def test_what_is_nested_too_deeply_is_one_broken_line(tmp_path: Path, form: Form | None) -> None:
    (tmp_path / "deep.jsonl").write_bytes(DEEP)
    with pytest.raises(InvalidRequest):
        load(str(tmp_path / "deep.jsonl"), form=form)
    (tmp_path / "one.jsonl").write_bytes(b'{"tokens": [1]}\n' + DEEP)
    trace = load(str(tmp_path / "one.jsonl"))
    assert [str(one) for one in trace.broken] == ["line 2: it is nested too deeply"]


def test_a_line_that_is_too_long_is_left_out_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lines, "LONGEST_LINE", 2**20)
    long = b'{"tokens": [' + b"1," * 2**20 + b"1]}\n"
    path = tmp_path / "long.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"tokens": [1]}\n' + long + b'{"tokens": [2]}\n'))
    trace = load(str(path))
    assert [unpack(one.tokens).tolist() for one in trace] == [[1], [2]]
    assert [str(one) for one in trace.broken] == [
        "line 2: it has 2,097,167 bytes; a line has at most 1,048,576"
    ]
    held = 0
    with lines.Source(str(path)) as source:
        for _, line in source.lines():
            held = max(held, len(line))
    assert held < 100


@pytest.mark.parametrize(
    ("bound", "message"),
    [
        ("MOST_UNZIPPED", "line .*: the file breaks off: it unpacks to more than 1,000,000 bytes"),
        ("ENDLESS", "line 1: it does not end within 1,000,000 bytes; the rest is not read"),
    ],
)
def test_a_small_file_cannot_become_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, message: str
) -> None:
    monkeypatch.setattr(lines, bound, 1_000_000)
    monkeypatch.setattr(lines, "LONGEST_LINE", 300_000)
    path = tmp_path / "bomb.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"tokens": [' + b"1," * 2**22))
    with pytest.raises(InvalidRequest, match=message):
        load(str(path), form=Form.JSONL)


@pytest.mark.parametrize(("bound", "noun"), [("MOST_LINES", "lines"), ("MOST_TOKENS", "tokens")])
def test_requests_in_memory_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bound: str, noun: str
) -> None:
    monkeypatch.setattr(lines, bound, 10)
    path = put(tmp_path / "many.jsonl", *({"tokens": [1]} for _ in range(11)))
    with pytest.raises(InvalidRequest, match=f"many has more than 10 {noun}"):
        load(path)


def test_a_skeleton_cannot_name_conversations_that_fill_the_memory(tmp_path: Path) -> None:
    (tmp_path / "s.convs.jsonl.gz").write_bytes(
        gzip.compress(b'{"conv": 0, "parent": -1, "lcp": 0, "len": 1000000000000}\n')
    )
    (tmp_path / "s.requests.jsonl.gz").write_bytes(gzip.compress(b"{}\n"))
    with pytest.raises(InvalidRequest, match=r"at most 16777216 are read"):
        load(str(tmp_path))


def test_bytes_that_are_no_text_cost_their_record_in_an_array_too(tmp_path: Path) -> None:
    texts = ["ü" + "x" * 99, "ö" + "x" * 99, "plain"]
    records = [{"messages": [{"role": "user", "content": text}]} for text in texts]
    latin = put(tmp_path / "a.json", records, encoding="latin-1")
    trace = load(latin)
    assert [str(one) for one in trace.broken] == [
        "record 1: it holds bytes that are not UTF-8",
        "record 2: it holds bytes that are not UTF-8",
    ]
    assert len(trace) == 1


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("cut.jsonl.gz", gzip.compress(LINE * 1000, mtime=0)[:-20]),
        ("garbage.jsonl.gz", gzip.compress(LINE, mtime=0) + b"garbage"),
        ("cut.json", json.dumps([{"messages": CHAT}] * 9).encode()[:-20]),
        ("two.json", (json.dumps([{"messages": CHAT}] * 9) + "\n[]").encode()),
    ],
)
def test_of_a_file_that_breaks_off_nobody_knows_the_share(
    tmp_path: Path, name: str, data: bytes
) -> None:
    path = tmp_path / name
    path.write_bytes(data)
    assert load(str(path)).breaks_off
    result = run(replay, path)
    assert result.exit_code == 1
    assert ", and all that is behind the last of them" in result.stdout.splitlines()[0]
    assert "the file breaks off, and how much is behind that nobody knows" in result.stderr
    assert json.loads(run(replay, path, "--json").stdout)["breaks_off"] is True


def test_zeros_behind_a_gzip_stream_are_none_of_it(tmp_path: Path) -> None:
    path = tmp_path / "tape.jsonl.gz"
    path.write_bytes(gzip.compress(LINE) + bytes(700) + gzip.compress(LINE) + bytes(1 << 19))
    trace = load(str(path))
    assert (len(trace), trace.broken) == (2, [])


def test_a_key_that_is_null_decides_no_form(tmp_path: Path) -> None:
    for name in ("tokens", "hash_ids", "input_ids"):
        trace = load(put(tmp_path / "t.jsonl", {name: None, "messages": CHAT[:1]}))
        assert (len(trace), trace.broken) == (1, [])


def test_lines_that_fit_another_unit_as_well_are_not_guessed_at(tmp_path: Path) -> None:
    both = [moon(0, [1, 2, 3], 3 * 512), moon(1, [1, 2, 3], 3 * 16)]
    with pytest.raises(InvalidRequest, match=r"1 of 2 lines do not fit .* assumed; 1 fit .* 16"):
        load(put(tmp_path / "two.jsonl", *both))
    assert len(load(put(tmp_path / "two.jsonl", *both), hash_block=512)) == 1
    short = put(tmp_path / "short.jsonl", moon(0, [7], 300), moon(1, [7], 300))
    assert load(short).notes == [
        "512 tokens a hash are assumed; 1024 to 1048576 fit the lines as well: --hash-block says "
        "which"
    ]
    assert load(short, hash_block=1024).notes == []
    assert load(put(tmp_path / "whole.jsonl", moon(0, [1, 2, 3]))).notes == []


def test_requests_without_a_time_among_others_are_told(tmp_path: Path) -> None:
    mixed = load(put(tmp_path / "t.jsonl", {"t": 5, "tokens": [1]}, {"tokens": [2]}))
    assert mixed.notes == [
        "1 of 2 requests have no time: they are served at 0 s, whatever is before them in the file"
    ]
    assert load(put(tmp_path / "t.jsonl", {"tokens": [1]}, {"tokens": [2]})).notes == []


# ---------------------------------------------------------------------- what is no trace


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty: there is no request in it$"),
        ("\n \n", "is empty: .* but 3 bytes of blank lines"),
        ("\ufeff", "is empty"),
        ("5\nnull\n", r"its first line is a JSON int, not an object .*\{\"tokens\""),
        ("5\n", "its first line is a JSON int"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\n1,2,3\n", "looks like CSV.*Known are"),
        ('{"texts": "a"}\n', "the fields of its first line are 'texts'.*Known are"),
        ("hello\n", "no JSON object .hello.*--format kvtrace"),
        ("\x1b]0;x\x07\n", r"\\x1b\]0;x\\x07"),
    ],
)
def test_what_is_no_trace_is_told_what_would_be(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "odd.txt"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        load(str(path))


def test_what_can_be_opened_and_not_read_is_told() -> None:
    with pytest.raises(InvalidRequest, match="cannot read /proc/self/mem: Input/output error"):
        load("/proc/self/mem")


# ---------------------------------------------------------------------- units, ids, times


def bailian(number: int, ids: list[int], length: int) -> dict[str, Any]:
    return {"chat_id": number, "timestamp": number, "input_length": length, "hash_ids": ids}


def test_the_unit_comes_from_the_form_and_must_fit_the_lines(tmp_path: Path) -> None:
    blocks = [bailian(n, [*range(12), 100 + n], 204) for n in range(3)]
    trace = load(put(tmp_path / "b.jsonl", *blocks, bailian(3, [7], 12)))
    assert (trace.unit, len(trace), trace.broken) == (16, 4, [])
    assert [request.t for request in trace] == [0, 1, 2, 3]
    unnamed = [{k: v for k, v in one.items() if k != "chat_id"} for one in blocks]
    path = put(tmp_path / "m.jsonl", *unnamed, moon(3, [7], 12))
    with pytest.raises(
        InvalidRequest,
        match=r"3 of 4 lines do not fit blocks of 512 tokens, which is assumed; 4 fit .*-block 16",
    ):
        load(path)
    assert load(path, hash_block=16).unit == 16
    with pytest.raises(InvalidRequest, match=r"of 32 tokens, as --hash-block says; 4 fit .* 16"):
        load(path, hash_block=32)
    with pytest.raises(InvalidRequest, match="--hash-block 48 is not a power of two"):
        load(path, hash_block=48)


@pytest.mark.parametrize(
    "ids",
    [
        [[(n << 32) + 7, (n << 32) + 8, 9] for n in range(3)],
        [[-5, -6, -7 - n] for n in range(3)],
        [[2**64 - 1, 2**70, n] for n in range(3)],
        [["a", "b", f"c{n}"] for n in range(3)],
        [[0xFFFFFFFE, 1, n] for n in range(3)],
    ],
)
def test_ids_of_any_size_stay_apart_and_equal_ones_equal(
    tmp_path: Path, ids: list[list[Any]]
) -> None:
    path = put(tmp_path / "m.jsonl", *(moon(n, one) for n, one in enumerate(ids)))
    trace = load(path)
    assert not trace.broken
    names: dict[Any, int] = {}
    for given, request in zip(ids, trace, strict=True):
        for one, word in zip(given, unpack(request.tokens), strict=True):
            assert names.setdefault(one, word) == word
    assert len(set(names.values())) == len(names)


def test_what_is_no_id_is_a_broken_line(tmp_path: Path) -> None:
    odd = [[1, 2, None], [1, 2, 1.5], [1, 2, True], [1, 2, ""], None, "abc", [[1], 2, 3], []]
    path = put(tmp_path / "m.jsonl", moon(0, [1, 2, 3]), *(moon(1, one) for one in odd))  # type: ignore[arg-type]
    assert [one.number for one in load(path).broken] == list(range(2, 10))


@pytest.mark.parametrize(
    "place",
    [
        {"model": "m"},
        {"lora_name": "a"},
        {"lora_request": {"lora_int_id": 7}},
        {"cache_salt": "s"},
        {"extra_key": "s"},
    ],
)
def test_hashes_of_other_models_adapters_and_salts_share_nothing(
    tmp_path: Path, place: dict[str, Any]
) -> None:
    agentic = {"t_ms": 1, "trace": "s", "i": 0, "input_length": 128, "keep": 0, "tail": [1, 2]}
    header = {"format": "delta-hash-v1"}
    for lines_ in ([moon(0, [1, 2, 3])], [header, agentic]):
        one, other = load(put(tmp_path / "t.jsonl", *lines_, lines_[-1] | place))
        assert one.tokens == other.tokens
        assert one.namespace != other.namespace


@pytest.mark.parametrize(
    "line", [moon(0, [1, 2, 3]), {"tokens": [1, 2]}, {"messages": [{"role": "user"}]}]
)
def test_a_field_that_is_not_read_is_told_in_every_form(
    tmp_path: Path, line: dict[str, Any]
) -> None:
    path = put(tmp_path / "t.jsonl", line, line | {"expert": 7, "block_size": 64})
    told = [one for one in load(path).notes if "not read" in one]
    assert told == [
        "1 of 2 lines have fields that are not read, and may decide what is shared: block_size, "
        "expert"
    ]


def test_the_text_of_ids_may_stand_beside_them(tmp_path: Path) -> None:
    path = put(tmp_path / "t.jsonl", {"prompt": "hello", "prompt_token_ids": [1, 2]})
    assert [unpack(one.tokens).tolist() for one in load(path)] == [[1, 2]]


def test_sessions_without_times_follow_their_delays(tmp_path: Path) -> None:
    turns = [
        {"session_id": name, "input_length": 512 * size, "hash_ids": list(range(size))}
        | ({"delay": 1500} if size > 1 else {})
        for name in ("x", "y")
        for size in (1, 2)
    ]
    trace = load(put(tmp_path / "s.jsonl", *turns))
    assert [(one.t, one.prompt) for one in trace] == [(0, 1), (0, 1), (1.5, 2), (1.5, 2)]
    assert "4 of 4 requests have no timestamp" in trace.notes[0]
    assert "2 begin at 0 s" in trace.notes[0]
    with pytest.raises(InvalidRequest, match="no field 'timestamp'"):
        load(put(tmp_path / "n.jsonl", {"input_length": 1, "hash_ids": [1], "session_id": None}))


def test_lines_out_of_order_are_noted(tmp_path: Path) -> None:
    trace = load(put(tmp_path / "m.jsonl", *(moon(n, [1, 2, 3]) for n in (0, 5, 2, 3, 9))))
    assert [one.t for one in trace] == [0, 0.5, 0.2, 0.3, 0.9]
    assert trace.notes == [
        "2 of 5 lines are older than one before them; they are served in the order of the file"
    ]


@pytest.mark.parametrize(
    "time", ["NaN", "Infinity", "-Infinity", "1e999", '"soon"', "true", "1e30"]
)
def test_a_time_that_is_none_is_a_broken_line(tmp_path: Path, time: str) -> None:
    good = {
        "t": '{"tokens": [1], "t": %s}',
        "timestamp": '{"hash_ids": [1], "input_length": 5, "timestamp": %s}',
        "created": '{"messages": [{"role": "user", "content": "a"}], "created": %s}',
        "t_ms": '{"trace": 1, "input_length": 64, "keep": 0, "tail": [1], "t_ms": %s}',
    }
    for name, line in good.items():
        path = tmp_path / f"{name}.jsonl"
        form = Form.AGENTIC if name == "t_ms" else None
        path.write_text(line % "3" + "\n" + line % time + "\n")
        trace = load(str(path), form=form)
        assert [one.number for one in trace.broken] == [2]


def test_null_and_empty_are_as_good_as_absent(tmp_path: Path) -> None:
    line = {"tokens": [1, 2], "t": None, "namespace": None, "prompt": ""}
    assert (
        load(put(tmp_path / "t.jsonl", line)).requests
        == load(put(tmp_path / "t.jsonl", {"tokens": [1, 2]})).requests
    )
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for name in (None, ""):
        path = put(tmp_path / "s.json", [{"id": name, "conversations": turns}] * 3)
        trace = load(path)
        assert (len(trace), trace.broken) == (3, [])


# ---------------------------------------------------------------------- forms


@pytest.mark.parametrize(
    "fields",
    [
        {"conversation": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
        {
            "conversations": [
                {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"},
            ]
        },
        {"messages": [{"role": "user", "content": "a"}]},
        {"prompt_token_ids": [1, 2, 3]},
        {"input_ids": [1, 2, 3]},
    ],
)
def test_the_forms_of_public_sets_are_read(tmp_path: Path, fields: dict[str, Any]) -> None:
    assert len(load(put(tmp_path / "a.jsonl", fields, fields))) == 2


def test_dates_are_times(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    path = put(
        tmp_path / "a.jsonl",
        chat | {"timestamp": "2023-04-09T00:02:53Z"},
        chat | {"timestamp": "2023-04-09T00:03:00"},
    )
    assert [one.t for one in load(path)] == [0.0, 7.0]


@pytest.mark.parametrize(
    "times",
    [("1700000000", "1700000007.0"), (" 2023-04-09 00:02:53 UTC", "2023-04-09 00:03:00UTC")],
)
def test_a_time_may_be_a_text(tmp_path: Path, times: tuple[str, str]) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}]}
    path = put(tmp_path / "a.jsonl", *(chat | {"timestamp": one} for one in times))
    assert [one.t for one in load(path)] == [0.0, 7.0]


@pytest.mark.parametrize(
    ("time", "told"),
    [
        (1_700_000_000_000, "in ms it were of 2023-11-14: write seconds"),
        (1_700_000_000_000_000, "in µs it were of 2023-11-14"),
        (1_700_000_000_000_000_000, "in ns it were of 2023-11-14"),
        ("1700000000000", "in ms it were of 2023-11-14"),
        (10**40, "which is no time$"),
        ("noon", "'noon', neither a date nor a number"),
        ("nan", "timestamp is nan, which is no time$"),
    ],
)
def test_a_time_in_another_unit_is_refused_with_the_unit(
    tmp_path: Path, time: Any, told: str
) -> None:
    chat = {"messages": [{"role": "user", "content": "a"}], "timestamp": time}
    with pytest.raises(InvalidRequest, match=told):
        load(put(tmp_path / "a.jsonl", chat))


HELLO = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("lines", "prompts"),
    [
        ([{"text": "hello you"}, {"text": "hello"}], 2),
        ([{"text": ["hello you", "hello"]}, {"messages": [HELLO]}], 3),
        ([[1, 2, 3], [4]], 2),
        ([[[1, 2], [3]], [4]], 3),
        ([["hello you", "hello"], ["hello"]], 3),
        ([[HELLO], [HELLO, HELLO]], 2),
        ([{"messages": [HELLO]}, [HELLO], {"text": "hello"}, "hello", 5], 3),
        ([{"tokens": [1]}, [1, 2], 7, None], 2),
        ([[HELLO]], 1),
        ([[list(range(50_000))]], 1),
    ],
)
def test_a_line_may_be_whatever_a_request_may_be(
    tmp_path: Path, lines: list[Any], prompts: int
) -> None:
    trace = load(put(tmp_path / "t.jsonl", *lines))
    assert len(trace) == prompts
    assert len(trace.broken) == sum(not isinstance(one, dict | list) for one in lines)


@pytest.mark.parametrize(
    ("array", "prompts"),
    [
        ([{"messages": [HELLO]}, [HELLO], {"text": "hello"}], 3),
        ([[HELLO], [HELLO, HELLO]], 2),
        ([{"text": "hello"}, {"prompt": [1, 2]}], 2),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_array_of_records_is_a_record_each(
    tmp_path: Path, array: list[Any], prompts: int, indent: int | None
) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps(array, indent=indent))
    trace = load(str(path))
    assert len(trace) == prompts
    assert not trace.broken


# ------------------------------------------------- one record with several readings


def test_a_turn_that_is_left_out_of_a_chat_is_told(tmp_path: Path) -> None:
    ask, answer = {"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}
    for turns in (
        [ask, answer, ask, ask, answer],
        [answer, ask, answer],
        [ask, answer, {"from": "system", "value": "s"}, ask, answer],
        [ask, answer, ask],
    ):
        trace = load(put(tmp_path / "s.jsonl", {"conversations": turns}))
        assert trace.not_counted == [
            "1 of 1 requests have messages out of turn or without an answer, which are not counted"
        ]
    assert not load(put(tmp_path / "s.jsonl", {"conversations": [ask, answer]})).not_counted


def test_a_speaker_is_known_in_any_case_and_under_role_too(tmp_path: Path) -> None:
    said = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    other = {"conversations": [{"role": "User", "content": "a"}, {"role": "GPT", "content": "b"}]}
    first = load(put(tmp_path / "s.jsonl", said)).requests
    assert load(put(tmp_path / "s.jsonl", other)).requests == first
    asked = {"messages": [{"role": "user", "content": "a"}, {"role": "model", "content": "b"}]}
    assert "somebody else than assistant" in load(put(tmp_path / "s.jsonl", asked)).not_counted[0]


@pytest.mark.parametrize(
    "line",
    [
        '{"tokens": [1, 2], "tokens": [3]}',
        '{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        '{"timestamp": 1, "input_length": 512, "hash_ids": [1], "hash_ids": [2]}',
        '[{"prompt": "a", "prompt": "b"}]',
        '{"messages": "[{\\"role\\": \\"user\\", \\"role\\": \\"system\\"}]"}',
    ],
)
def test_a_field_that_is_there_twice_is_a_broken_line(tmp_path: Path, line: str) -> None:
    (tmp_path / "t.jsonl").write_text(line)
    with pytest.raises(InvalidRequest, match="is there twice"):
        load(str(tmp_path / "t.jsonl"))


def test_a_record_of_an_array_with_a_field_twice_costs_itself_alone(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text('[{"prompt": "a"}, {"id": 1, "id": 2}, {"prompt": "b"}]')
    trace = load(str(tmp_path / "t.json"))
    assert len(trace.requests) == 2
    assert [str(one) for one in trace.broken] == ["record 2: the field 'id' is there twice"]


def test_what_else_of_a_record_may_be_a_prompt_is_told(tmp_path: Path) -> None:
    for name, record in {
        "prompt": {"messages": CHAT, "prompt": "x"},
        "conversations": {"messages": CHAT, "conversations": [{"from": "human", "value": "x"}]},
        "text": {"prompt": "x", "text": "y"},
        "prompt ": {"input": "x", "prompt": "y"},
        "created_at": {"tokens": [1], "created_at": "2024-01-01"},
        "start_time": {"prompt": "x", "start_time": 5},
        "instructions": {"messages": CHAT, "system": "x", "instructions": "y"},
        "system_prompt": {"input": "x", "instructions": "y", "system_prompt": "z"},
        "model_name": {"prompt": "x", "model": "m", "model_name": "n"},
        "extra_key": {"prompt": "x", "cache_salt": "m", "extra_key": "n"},
    }.items():
        notes = load(put(tmp_path / "t.jsonl", record)).notes
        assert any(one.endswith(f"shared: {name.strip()}") for one in notes)
    with pytest.raises(InvalidRequest, match="system is false"):
        load(put(tmp_path / "t.jsonl", {"messages": CHAT, "system": False}))
    both = {"input": "x", "instructions": "y", "system": "z"}
    assert not any("not read" in one for one in load(put(tmp_path / "t.jsonl", both)).notes)
    for record in ({"prompt": "x", "text": "x"}, {"tokens": [1], "prompt": "x"}):
        assert not any("not read" in one for one in load(put(tmp_path / "t.jsonl", record)).notes)


def test_ids_under_two_names_are_refused_if_they_differ(tmp_path: Path) -> None:
    assert load(put(tmp_path / "t.jsonl", {"tokens": [1], "input_ids": [1]})).requests
    with pytest.raises(InvalidRequest, match="tokens and input_ids differ"):
        load(put(tmp_path / "t.jsonl", {"tokens": [1], "input_ids": [2]}))


def test_a_call_that_names_no_function_is_refused_and_one_of_a_custom_tool_read(
    tmp_path: Path,
) -> None:
    def call(**fields: Any) -> str:
        made = {"role": "assistant", "content": None, "tool_calls": [fields]}
        return put(tmp_path / "t.jsonl", {"messages": [CHAT[0], made, CHAT[0]]})

    for fields in ({}, {"function": None}, {"function": {"arguments": "{}"}}, {"id": "x"}):
        with pytest.raises(InvalidRequest, match="names no function"):
            load(call(**fields))
    first = load(call(type="custom", custom={"name": "f", "input": "one"}))
    other = load(call(type="custom", custom={"name": "f", "input": "two"}))
    assert first.requests[0].tokens != other.requests[0].tokens


# ------------------------------------------------------------- where a file ends


def test_a_plain_file_that_is_cut_in_its_last_line_breaks_off(tmp_path: Path) -> None:
    whole = json.dumps({"messages": [{"role": "user", "content": "é"}]}, ensure_ascii=False)
    path = tmp_path / "t.jsonl"
    data = whole.encode()
    for size in (5, 20, data.index("é".encode()) + 1, len(data) - 1):
        path.write_bytes(data + b"\n" + data[:size])
        assert load(str(path)).breaks_off
    for rest in (b"", b"\n", data, b"rubbish", data + b"}"):
        path.write_bytes(data + b"\n" + rest)
        assert not load(str(path)).breaks_off


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_an_archive_is_no_trace(tmp_path: Path, mode: Any) -> None:
    put(tmp_path / "t.jsonl", *[{"tokens": [1, 2]}] * 3)
    with tarfile.open(tmp_path / "t.tar", mode) as archive:
        archive.add(tmp_path / "t.jsonl", "t.jsonl")
    with pytest.raises(InvalidRequest, match="a tar archive: unpack it"):
        load(str(tmp_path / "t.tar"))


def test_an_array_of_lists_may_have_a_list_a_line(tmp_path: Path) -> None:
    for indent in (1, 4):
        (tmp_path / "t.json").write_text(json.dumps([[1, 2, 3], [1, 2]], indent=indent))
        assert [one.prompt for one in load(str(tmp_path / "t.json")).requests] == [3, 2]
    (tmp_path / "t.json").write_text("[\n[1, 2, 3],\n[1, 2]\n]\n")
    assert [one.prompt for one in load(str(tmp_path / "t.json")).requests] == [3, 2]


# --------------------------------------------------- traces that tell only changes


def turn(i: int, keep: int, *tail: Any) -> dict[str, Any]:
    length = 64 * (keep + len(tail))
    return {"t_ms": i, "trace": "s", "i": i, "input_length": length, "keep": keep, "tail": [*tail]}


AGENTIC = {"format": "delta-hash-v1", "block_size": 64}


def test_what_follows_a_request_that_misses_is_left_out(tmp_path: Path) -> None:
    lines = [
        AGENTIC,
        turn(0, 0, 1, 2),
        turn(1, 2, 3.5),
        turn(2, 2, 4),
        turn(3, 0, 5),
        turn(4, 1, 6),
    ]
    trace = load(put(tmp_path / "s.jsonl", *lines))
    assert [unpack(one.tokens).tolist() for one in trace.requests] == [[1, 2], [5], [5, 6]]
    assert [one.number for one in trace.broken] == [3, 4]
    trace = load(put(tmp_path / "s.jsonl", AGENTIC, turn(0, 0, 1, 2), turn(2, 1, 4)))
    assert "keeps blocks of request 1" in str(trace.broken[0])


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (
            {"format": "delta-hash-v1", "block_size": 16},
            "two headers, of blocks of 64 and of 16",
        ),
        ({"format": "delta-hash-v2"}, "has the format 'delta-hash-v2'; delta-hash-v1 is read"),
    ],
)
def test_a_header_of_something_else_is_refused(
    tmp_path: Path, header: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        load(put(tmp_path / "s.jsonl", AGENTIC, turn(0, 0, 1), header, turn(0, 0, 1)))
    assert load(put(tmp_path / "s.jsonl", AGENTIC, turn(0, 0, 1), AGENTIC, turn(0, 0, 1)))


def test_a_conversation_that_cannot_be_read_keeps_its_number(tmp_path: Path) -> None:
    header = {"format": "kvtrace-v1"}
    asked = {"t_ms": 0, "conv": 2, "prompt_len": 1, "cached_len": 1}
    for odd in (b"{\n", b'{"tokens": [1.5]}\n', b'{"tokens": ["a"]}\n'):
        lines = [json.dumps(one).encode() + b"\n" for one in (header, {"tokens": [7]})]
        lines += [odd, b'{"tokens": [9]}\n']
        (tmp_path / "s.convs.jsonl.gz").write_bytes(gzip.compress(b"".join(lines)))
        requests = "".join(json.dumps(one) + "\n" for one in (header, asked))
        (tmp_path / "s.requests.jsonl.gz").write_bytes(gzip.compress(requests.encode()))
        trace = load(str(tmp_path))
        assert [unpack(one.tokens).tolist() for one in trace.requests] == [[9]]
        assert len(trace.broken) == 1
    wrong = json.dumps({"format": "kvtrace-v2"}).encode()
    (tmp_path / "s.convs.jsonl.gz").write_bytes(gzip.compress(wrong))
    with pytest.raises(InvalidRequest, match="has the format 'kvtrace-v2'"):
        load(str(tmp_path))
