"""Recording live requests: what is in the file, what an anonymised one keeps, and what may fail."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import threading
from itertools import combinations
from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

import prefixcache
from patience import PATIENCE_S
from prefixcache.config import load
from prefixcache.errors import InvalidRequest
from prefixcache.service.events.anonymiser import Anonymiser
from prefixcache.service.events.recorder import Recorder
from prefixcache.service.failures import Failures
from prefixcache.types import Namespace, pack, unpack
from prefixcache_bench.commands.replay import replay
from prefixcache_bench.experiments.readers import token_lines
from prefixcache_bench.experiments.readers.lines import Source
from prefixcache_bench.experiments.traces import Trace
from service.service_process import LAYOUT, command, environment, eventually, running, sizes

IDS = st.one_of(st.integers(0, 3), st.integers(0, 2**32 - 1))
SPACE = Namespace("model")
SENT = [
    ("chat", "", [*range(40)]),
    ("chat", "", [*range(25), *range(900, 915)]),
    ("chat", "acme", [*range(25)]),
    ("other", "", [2**32 - 1, 0, 7]),
    ("chat", "", [*range(41)]),
]
"""(model, tenant, tokens)"""


def read(path: Path) -> Trace:
    with Source(str(path)) as source:
        trace = token_lines.read(source)
    assert not trace.broken
    return trace


def common_prefix(one: bytes, other: bytes) -> int:
    left, right = unpack(one), unpack(other)
    length = 0
    while length < min(len(left), len(right)) and left[length] == right[length]:
        length += 1
    return length


def common_prefixes(prompts: list[bytes]) -> list[int]:
    return [common_prefix(one, other) for one, other in combinations(prompts, 2)]


@given(
    st.lists(st.lists(IDS, min_size=1, max_size=8), min_size=2, max_size=6),
    st.binary(min_size=16, max_size=64),
)
def test_every_pair_of_prompts_keeps_its_common_prefix(lists: list[list[int]], key: bytes) -> None:
    anonymiser = Anonymiser(key)
    prompts = [pack(ids) for ids in lists]
    hidden = [anonymiser.tokens(prompt) for prompt in prompts]
    assert common_prefixes(hidden) == common_prefixes(prompts)
    assert [len(prompt) for prompt in hidden] == [len(prompt) for prompt in prompts]


@given(st.sets(IDS, min_size=1, max_size=100))
def test_no_two_ids_meet_in_one(ids: set[int]) -> None:
    hidden = unpack(Anonymiser().tokens(pack(sorted(ids))))
    assert len(set(hidden)) == len(ids)


def test_a_whole_vocabulary_is_permuted_without_a_collision_and_moved_away() -> None:
    vocabulary = pack(range(2**18))
    hidden = Anonymiser(bytes(32)).tokens(vocabulary)
    assert len(set(unpack(hidden))) == 2**18
    still_there = sum(a == b for a, b in zip(unpack(hidden), unpack(vocabulary), strict=True))
    assert still_there < 10
    assert max(unpack(hidden)) > 2**31
    assert Anonymiser(bytes(31) + b"1").tokens(vocabulary) != hidden


def test_names_are_digests_that_stay_apart_and_empty_fields_stay_empty() -> None:
    anonymiser = Anonymiser()
    hidden = anonymiser.namespace(Namespace("acme", tenant="acme"))
    assert "acme" not in (hidden.model, hidden.tenant)
    assert hidden.model != hidden.tenant
    assert (hidden.adapter, hidden.salt) == ("", "")
    assert anonymiser.namespace(Namespace("acme")).model == hidden.model
    assert Anonymiser().namespace(Namespace("acme")).model != hidden.model


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_closed_recording_has_every_request_and_only_its_user_reads_it(
    tmp_path: Path, name: str
) -> None:
    path = tmp_path / name
    recorder = Recorder(path)
    prompts = [pack(range(number + 1)) for number in range(300)]
    for prompt in prompts:
        recorder.record(SPACE, prompt)
    recorder.close()
    recorder.close()
    assert (recorder.num_kept, recorder.num_dropped) == (300, 0)
    trace = read(path)
    assert [request.tokens for request in trace.requests] == prompts
    assert [request.t for request in trace.requests] == sorted(r.t for r in trace.requests)
    assert 0 <= trace.requests[0].t < 60
    assert path.stat().st_mode & 0o777 == 0o600
    if name.endswith(".gz"):
        assert gzip.decompress(path.read_bytes()).count(b"\n") == 300


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_a_request_is_in_the_file_soon_not_only_at_the_end(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    recorder = Recorder(path)
    recorder.record(SPACE, pack([1, 2, 3]))
    eventually(lambda: recorder.num_kept == 1)
    with Source(str(path)) as source:
        (request,) = token_lines.read(source).requests
    assert request.tokens == pack([1, 2, 3])
    recorder.close()


class Held(Anonymiser):
    """Keeps the thread busy until it is let go: a disk that does not come along."""

    def __init__(self) -> None:
        super().__init__()
        self.reached = threading.Event()
        self.let_go = threading.Event()

    def tokens(self, tokens: bytes) -> bytes:
        self.reached.set()
        assert self.let_go.wait(PATIENCE_S)
        return super().tokens(tokens)


def test_what_cannot_be_kept_up_with_is_dropped_and_counted_and_nobody_waits(
    tmp_path: Path,
) -> None:
    held = Held()
    recorder = Recorder(tmp_path / "trace.jsonl", held, max_pending=20_000)
    recorder.record(SPACE, bytes(4))
    assert held.reached.wait(PATIENCE_S)
    for _ in range(1000):
        recorder.record(SPACE, bytes(4000))
    held.let_go.set()
    recorder.close()
    assert len(read(tmp_path / "trace.jsonl").requests) == recorder.num_kept == 5
    assert recorder.num_dropped == 996


def test_a_file_that_exists_is_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("precious")
    with pytest.raises(InvalidRequest, match="does not overwrite"):
        Recorder(path)
    assert path.read_text() == "precious"
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(InvalidRequest, match="does not overwrite"):
        Recorder(tmp_path / "link")
    with pytest.raises(InvalidRequest, match="No such file"):
        Recorder(tmp_path / "none" / "trace.jsonl")


@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
def test_a_full_disk_ends_the_recording_and_every_request_counts_as_dropped(
    tmp_path: Path, packed: bool
) -> None:
    full = Path("/dev/full")
    if packed:
        full = tmp_path / "full.gz"
        full.symlink_to("/dev/full")
    recorder = Recorder(full)
    for _ in range(100):
        recorder.record(SPACE, os.urandom(4000))
    recorder.close()
    assert (recorder.num_kept, recorder.num_dropped) == (0, 100)


class Broken(Anonymiser):
    def tokens(self, tokens: bytes) -> bytes:
        raise ValueError("nobody thought of this")


def test_a_recording_that_ends_unforeseen_is_told_and_keeps_nothing_back(tmp_path: Path) -> None:
    failures = Failures()
    recorder = Recorder(tmp_path / "t", Broken(), max_pending=20_000, failures=failures)
    recorder.record(SPACE, bytes(4))
    eventually(failures.causes)
    assert "nobody thought of this" in failures.causes()["recording"]
    for _ in range(100):
        recorder.record(SPACE, bytes(4000))
    recorder.close()
    assert (recorder.num_kept, recorder.num_dropped) == (0, 101)


def test_anonymising_without_recording_is_refused() -> None:
    with pytest.raises(InvalidRequest, match=r"--anonymise: .*without --record"):
        load({"anonymise": True})


def test_a_service_refuses_to_overwrite_in_one_line(sockets: Path, tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text("precious")
    target = f"unix:{sockets}/refuses.sock"
    told = subprocess.run(
        command("serve", "--listen", target, *sizes(64, 4), "--record", str(path)),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert told.returncode == 2
    assert told.stderr.strip() == (
        f"prefixcache: {path} exists: a recording does not overwrite. "
        "Remove it or name another file."
    )
    assert path.read_text() == "precious"


def send_all(target: str) -> None:
    with prefixcache.connect(target) as client:
        for model, tenant, ids in SENT:
            session = client.attach(model, LAYOUT, tenant=tenant)
            with session.acquire(ids) as lease:
                lease.commit(len(ids))
        with pytest.raises(InvalidRequest):  # refused: not part of the trace
            session.acquire(range(10_000))


@pytest.mark.parametrize("anonymise", [False, True], ids=["plain", "anonymised"])
def test_a_service_records_what_it_was_sent(sockets: Path, tmp_path: Path, anonymise: bool) -> None:
    path = tmp_path / ("live.jsonl.gz" if anonymise else "live.jsonl")
    flags = ["--record", str(path), *(["--anonymise"] if anonymise else [])]
    target = f"unix:{sockets}/records-{anonymise}.sock"
    with running(target, *sizes(64, 4), *flags) as service:
        send_all(service.target)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        log = service.log()
    assert '"requests": 5, "dropped": 0, "event": "recording ended"' in log
    assert f"recording to {path}: " in "\n".join(service.lines)
    trace = read(path)
    found = [request.tokens for request in trace.requests]
    sent = [pack(ids) for _, _, ids in SENT]
    spaces = [request.namespace for request in trace.requests]
    assert reused(path) == 25 + 40
    if not anonymise:
        assert found == sent
        assert spaces == [Namespace(model, tenant=tenant) for model, tenant, _ in SENT]
        return
    assert common_prefixes(found) == common_prefixes(sent)
    assert not {id_ for prompt in found for id_ in unpack(prompt)} & set(range(1000))
    assert spaces[0] == spaces[1] == spaces[4]
    assert len(set(spaces)) == 3
    assert not {"chat", "acme", "other"} & {space.model for space in spaces}
    assert b"chat" not in gzip.decompress(path.read_bytes())


def reused(path: Path) -> int:
    """Tokens that `prefixcache replay` reuses, by its JSON."""
    app = typer.Typer()
    app.command()(replay)
    told = CliRunner().invoke(
        app, [str(path), "--format", "jsonl", "--block-size", "4", "--partial", "tails", "--json"]
    )
    assert told.exit_code == 0, told.output
    answer = json.loads(told.stdout)
    assert answer["requests"] == len(SENT)
    return int(answer["hit_tokens"]) + int(answer["partial_tokens"])


def test_a_full_disk_does_not_stop_the_service(sockets: Path) -> None:
    target = f"unix:{sockets}/full.sock"
    with running(target, *sizes(64, 4), "--record", "/dev/full") as service:
        send_all(service.target)
        eventually(lambda: "recording failed, the service goes on" in service.log())
        send_all(service.target)
        service.signal(signal.SIGTERM)
        assert service.wait() == 0
        log = service.log()
    assert "No space left on device" in log
    assert '"requests": 0, "dropped": 10, "event": "recording ended"' in log
