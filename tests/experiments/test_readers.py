from __future__ import annotations

import base64
import gzip
import io
import json
from pathlib import Path

import numpy as np
import pytest

from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, pack, unpack
from prefixcache_bench.experiments.readers import token_lines
from prefixcache_bench.experiments.readers.lines import Source
from prefixcache_bench.experiments.readers.load import Form, System, load, see
from prefixcache_bench.experiments.traces import Trace


def write(path: Path, *lines: object) -> str:
    text = "".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in lines)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    else:
        path.write_text(text)
    return str(path)


def test_own_lines_are_read_in_order_of_time(tmp_path: Path) -> None:
    path = write(
        tmp_path / "mine.jsonl",
        {"t": 2.5, "namespace": "a", "tokens": [1, 2, 3], "prompt": 2},
        {"t": 1, "namespace": ["m", "lora", "acme", "s"], "tokens": [4]},
        {"tokens": base64.b64encode(pack([7, 8])).decode()},
    )
    trace = load(path)
    assert [request.t for request in trace] == [0.0, 1.0, 2.5]
    assert [request.namespace for request in trace] == [
        Namespace(""), Namespace("m", "lora", "acme", "s"), Namespace("a"),
    ]  # fmt: skip
    assert [unpack(request.tokens).tolist() for request in trace] == [[7, 8], [4], [1, 2, 3]]
    assert [request.prompt for request in trace] == [2, 1, 2]
    assert trace.name == "mine"
    assert trace.prompt_tokens == 5


def test_what_is_written_is_read_again(small: Trace, tmp_path: Path) -> None:
    for packed in (False, True):
        path = tmp_path / "again.jsonl"
        with path.open("w") as file:
            assert token_lines.write(small, file, packed=packed) == len(small)
        again = load(str(path))
        assert again.requests == small.requests
        assert again.fingerprint == small.fingerprint


def test_broken_lines_are_reported_with_their_numbers_and_counted(tmp_path: Path) -> None:
    path = write(
        tmp_path / "t.jsonl",
        {"t": 0, "tokens": [1]},
        "{not json",
        "",
        "[1, 2.5]",
        {"t": 1},
        {"tokens": [-1]},
        {"tokens": [1, 2], "prompt": 3},
        {"tokens": []},
        {"tokens": "!!"},
        {"tokens": [1], "namespace": 5},
        {"t": 2, "tokens": [2]},
    )
    trace = load(path)
    assert len(trace) == 2
    assert [one.number for one in trace.broken] == [2, 4, 5, 6, 7, 8, 9, 10]
    assert str(trace.broken[1]) == "line 4: tokens holds 2.5; a token id is a whole number"
    assert trace.broken[2].reason == "no field 'tokens'"


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_a_mooncake_trace_is_seen_and_read(tmp_path: Path, ending: str) -> None:
    path = write(
        tmp_path / f"moon{ending}",
        {"timestamp": 1500, "input_length": 700, "output_length": 5, "hash_ids": [3, 4]},
        {"timestamp": 3000, "input_length": 512, "output_length": 5, "hash_ids": [3, 9]},
        {"timestamp": 4500, "input_length": 900, "output_length": 5, "hash_ids": [3, 4]},
    )
    trace = load(path)
    assert (trace.name, trace.unit, len(trace)) == ("moon", 512, 2)
    assert trace.requests[0].t == 1.5
    assert unpack(trace.requests[0].tokens).tolist() == [3, 4]
    assert (trace.requests[0].prompt, trace.requests[0].length) == (2, 700)
    assert [one.number for one in trace.broken] == [2]


def test_an_agentic_trace_keeps_what_it_does_not_repeat(tmp_path: Path) -> None:
    path = write(
        tmp_path / "agents.jsonl.gz",
        {"format": "delta-hash-v1", "block_size": 64},
        {"t_ms": 0, "trace": 0, "i": 0, "input_length": 200, "keep": 0, "tail": [1, 2, 3]},
        {"t_ms": 1, "trace": 1, "i": 0, "input_length": 64, "keep": 0, "tail": [1]},
        {"t_ms": 2, "trace": 0, "i": 1, "input_length": 270, "keep": 2, "tail": [8, 9]},
        {"t_ms": 3, "trace": 0, "i": 2, "input_length": 70, "keep": 7, "tail": []},
    )
    trace = load(path)
    assert trace.unit == 64
    assert [unpack(request.tokens).tolist() for request in trace] == [[1, 2, 3], [1], [1, 2, 8, 9]]
    assert trace.requests[0].namespace != trace.requests[1].namespace
    assert trace.requests[0].namespace == trace.requests[2].namespace
    assert [one.number for one in trace.broken] == [5]


def kvtrace(folder: Path) -> Path:
    write(
        folder / "real.convs.jsonl.gz",
        {"format": "kvtrace-v1", "kind": "convs"},
        {"conv": 0, "tokens": [5, 6, 7, 8]},
        {"conv": 1, "tokens": [5, 6, 9]},
    )
    write(
        folder / "real.requests.jsonl.gz",
        {"format": "kvtrace-v1", "kind": "requests"},
        {"t_ms": 0, "conv": 0, "turn": 0, "prompt_len": 2, "cached_len": 4},
        {"t_ms": 1000, "conv": 1, "turn": 0, "prompt_len": 3, "cached_len": 3},
        {"t_ms": 2000, "conv": 1, "turn": 1, "prompt_len": 3, "cached_len": 9},
    )
    prompts = [[90], [91], [92], [93]]
    (folder / "system_prompts.cl100k.json").write_text(json.dumps(prompts))
    return folder


def test_a_folder_of_kvtrace_files_is_read_by_name_or_by_one_of_its_files(tmp_path: Path) -> None:
    folder = kvtrace(tmp_path)
    for path, name in (
        (str(folder), "real"),
        (str(folder), None),
        (str(folder / "real.requests.jsonl.gz"), None),
    ):
        trace = load(path, name=name)
        assert trace.name == "real"
        assert [unpack(one.tokens).tolist() for one in trace] == [[5, 6, 7, 8], [5, 6, 9]]
        assert [one.prompt for one in trace] == [2, 3]
        assert [str(one) for one in trace.broken] == [
            "line 4: conversation 1 has no 3 and 9 tokens"
        ]


def test_system_prompts_go_before_every_conversation(tmp_path: Path) -> None:
    folder = kvtrace(tmp_path)
    one = load(str(folder), system=System.ONE)
    assert [unpack(request.tokens)[0] for request in one] == [90, 90]
    assert [request.prompt for request in one] == [3, 4]
    four = load(str(folder), system=System.FOUR)
    assert {unpack(request.tokens)[0] for request in four} <= {90, 91, 92, 93}


def test_a_skeleton_keeps_every_common_prefix(tmp_path: Path) -> None:
    write(
        tmp_path / "s.convs.jsonl.gz",
        {"format": "kvtrace-v1"},
        {"conv": 0, "parent": -1, "lcp": 0, "len": 9},
        {"conv": 1, "parent": 0, "lcp": 4, "len": 7},
        {"conv": 2, "parent": 1, "lcp": 6, "len": 6},
        {"conv": 3, "parent": 0, "lcp": 50, "len": 60},
    )
    write(
        tmp_path / "s.requests.jsonl.gz",
        {"format": "kvtrace-v1"},
        *(
            {"t_ms": conv, "conv": conv, "prompt_len": size, "cached_len": size}
            for conv, size in enumerate((9, 7, 6))
        ),
    )
    trace = load(str(tmp_path))
    tokens = [unpack(request.tokens).tolist() for request in trace]
    assert tokens[0][:4] == tokens[1][:4]
    assert tokens[0][4] != tokens[1][4]
    assert tokens[2] == tokens[1][:6]
    assert tokens[0][0] == 1_000_000
    assert tokens[0][2] == 2 * 104_729 % 50_000
    assert [str(one) for one in trace.broken] == ["line 5: conversation 0 has no 50 tokens"]


def test_stdin_is_read_plain_or_zipped(monkeypatch: pytest.MonkeyPatch) -> None:
    line = json.dumps({"timestamp": 0, "input_length": 5, "hash_ids": [1]}).encode() + b"\n"
    for given in (line, gzip.compress(line)):
        stdin = io.TextIOWrapper(io.BufferedReader(io.BytesIO(given)))
        monkeypatch.setattr("sys.stdin", stdin)
        trace = load("-")
        assert (trace.name, len(trace)) == ("stdin", 1)


def test_a_zipped_file_that_breaks_off_gives_what_is_whole(tmp_path: Path) -> None:
    noise = np.random.default_rng(1)
    lines = [
        {"t": number, "tokens": noise.integers(0, 2**31, 400).tolist()} for number in range(300)
    ]
    path = tmp_path / "cut.jsonl.gz"
    write(path, *lines)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    trace = load(str(path))
    assert 50 < len(trace) < 250
    assert "breaks off" in trace.broken[0].reason
    assert all(len(request.tokens) == 1600 for request in trace)


def test_long_files_are_read_in_pieces(tmp_path: Path) -> None:
    path = write(tmp_path / "long.txt", *(f"line {number} {'x' * 999}" for number in range(5000)))
    with Source(path) as source:
        lines = list(source.lines())
    assert [number for number, _ in lines] == list(range(1, 5001))
    assert all(line.startswith(f"line {number - 1} ".encode()) for number, line in lines)


@pytest.mark.parametrize(
    ("path", "form", "message"),
    [
        ("nowhere", None, "there is no file or folder nowhere"),
        ("empty.jsonl", None, "empty.jsonl is empty"),
        ("empty.jsonl", Form.MOONCAKE, "empty.jsonl is empty"),
        ("bad.jsonl", None, "no request could be read from .*; line 1: "),
        (".", Form.JSONL, "is a folder; only kvtrace"),
        (".", None, "name a workload with --name; . has: none"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str, form: Form | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    write(tmp_path / "bad.jsonl", {"tokens": []})
    with pytest.raises(InvalidRequest, match=message):
        load(path, form=form)


def test_the_form_is_seen_also_behind_a_broken_first_line() -> None:
    assert see(b'{oops\n{"timestamp": 1, "hash_ids": []}\n') is Form.MOONCAKE
    assert see(b'{"t": 0, "tokens": [' + b"1, " * 60_000) is Form.JSONL
    assert see(b' [ {"id": 1}') is Form.CHAT
    assert see(b'{"format": "kvtrace-v1"}\n') is Form.KVTRACE
    assert see(b"hello") is None
