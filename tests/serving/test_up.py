"""`prefixcache up` as people run it: real processes, a tiny model, and signals."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from certificate_file import write
from patience import PATIENCE_S
from prefixcache.service.pool.model_layout import read_layout
from prefixcache_serving.ask import _salt
from prefixcache_worker.identity import identify
from worker.zoo import save

pytestmark = pytest.mark.slow

COUNT = 200
PROMPT = [5, 9, 2, 14] * 8
MARK = "PREFIXCACHE_UP_TEST"


class Up:
    """One run of it.

    Args:
        model: its folder.
        folder: of the service's socket.
        options: more of them; with `--json`, what is read is its standard output.
    """

    def __init__(self, model: Path, folder: Path, *options: str) -> None:
        self.mark = uuid.uuid4().hex
        roots = (".", "kernels", "worker", "tests")
        path = os.pathsep.join(str(Path(__file__).parents[2] / root) for root in roots)
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefixcache_serving", "--model", str(model)),
                *("--name", "tiny", "--dtype", "float32", "--http", "127.0.0.1:0"),
                *("--connect", f"unix:{folder}/s.sock", *options),
            ],
            env=os.environ | {"PYTHONPATH": path, MARK: self.mark},
            **{"stdout" if "--json" in options else "stderr": subprocess.PIPE},
            text=True,
        )
        self._output: Any = self.process.stdout or self.process.stderr
        self.said: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        self.said.extend(iter(self._output.readline, ""))

    def until(self, condition: Callable[[], Any]) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while not (found := condition()):
            assert time.monotonic() < deadline, "".join(self.said)
            assert self.process.poll() is None, "".join(self.said)
            time.sleep(0.01)
        return found

    def says(self, pattern: str, since: int = 0) -> re.Match[str]:
        def look() -> re.Match[str] | None:
            return re.search(pattern, "".join(self.said[since:]))

        found: re.Match[str] = self.until(look)
        return found

    def tells(self, event: str, since: int = 0) -> dict[str, Any]:
        """Wait for a line of JSON."""

        def look() -> dict[str, Any] | None:
            told = map(json.loads, self.said[since:])
            return next((one for one in told if one["event"] == event), None)

        found: dict[str, Any] = self.until(look)
        return found

    @property
    def port(self) -> int:
        return int(self.says(r"http://127\.0\.0\.1:(\d+)/v1")[1])

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE_S)

    def stream(self, **more: Any) -> Stream:
        connection = self.connect()
        told = {"model": "tiny", "prompt": PROMPT, "max_tokens": COUNT, "stream": True}
        body = json.dumps(told | {"stream_options": {"include_usage": True}} | more)
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200
        return Stream(connection, answer)

    def meters(self) -> dict[str, float]:
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", "/metrics")
            lines = connection.getresponse().read().decode().splitlines()
        pairs = [line.rsplit(" ", 1) for line in lines if not line.startswith("#")]
        return {name.removeprefix("prefixcache_front_"): float(value) for name, value in pairs}

    def busy(self) -> tuple[str, int] | None:
        """The worker that has an answer, and its pid; None if none has."""
        for name, value in self.meters().items():
            if name.startswith("worker_answers{") and value:
                worker = name.split('"')[1]
                pids = re.findall(rf"{worker} \(pid (\d+)\) is ready", "".join(self.said))
                return worker, int(pids[-1])
        return None

    def alive(self) -> list[int]:
        """Processes of this run, itself included."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdecimal():
                try:
                    marked = f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes()
                    dead = " Z " in (entry / "stat").read_text()
                except OSError:
                    continue
                if marked and not dead:
                    found.append(int(entry.name))
        return found

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.end_by_itself()

    def end_by_itself(self) -> int:
        code = self.process.wait(PATIENCE_S)
        self._reader.join()
        self._output.close()
        return code


class Stream:
    """A streamed completion, read piece by piece."""

    def __init__(
        self, connection: http.client.HTTPConnection, answer: http.client.HTTPResponse
    ) -> None:
        self._connection = connection
        self._answer = answer
        self.text = ""
        self.usage: dict[str, Any] = {}
        self.is_done = False

    def read(self, num_events: int = 10**9) -> str:
        for _ in range(num_events):
            line = self._answer.readline()
            while line == b"\n" or line.startswith(b":"):
                line = self._answer.readline()
            if not line:
                self.close()
                break
            if line == b"data: [DONE]\n":
                self.is_done = True
                continue
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                self.text += choice["text"]
            self.usage = chunk["usage"] or self.usage
        return self.text

    def close(self) -> None:
        self._answer.close()
        self._connection.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@pytest.fixture(scope="module")
def up(model: Path) -> Iterator[Up]:
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        found = Up(model, Path(folder), "--memory", "8MiB", "--wait", "0")
        try:
            for name in ("w1", "w2"):
                found.says(rf"{name} \(pid \d+\) is ready")
            yield found
        finally:
            found.end()


TERMS = {"greedy": {"temperature": 0}, "seeded": {"temperature": 1.0, "seed": 5}}


@pytest.mark.parametrize("kind", TERMS)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP, signal.SIGTERM])
def test_a_worker_that_is_lost_in_a_stream_changes_nothing_of_it(
    up: Up, kind: str, how: signal.Signals
) -> None:
    """Killed, stopped, told to end: the other one goes on; then there are two again."""
    before = up.meters()
    for attempt in range(20):  # on a bad day the answer is whole before the signal is sent
        prompt = [*PROMPT, 10 + attempt, int(how), len(kind)]
        stream = up.stream(prompt=prompt, **TERMS[kind])
        stream.read(20)
        since = len(up.said)
        if (found := up.busy()) is not None:
            name, pid = found
            os.kill(pid, how)
        got = stream.read()
        after = up.meters()
        if after["moved_total"] > before["moved_total"]:
            break
    assert after["moved_total"] - before["moved_total"] == 1
    assert after["recomputed_tokens_total"] - before["recomputed_tokens_total"] <= 17
    assert stream.is_done
    assert stream.usage["completion_tokens"] == COUNT
    assert up.stream(prompt=prompt, **TERMS[kind]).read() == got
    if how == signal.SIGSTOP:
        up.says(rf"{name} \(pid {pid}\) is stopped", since)
        os.kill(pid, signal.SIGCONT)
        up.says(rf"{name} \(pid {pid}\) is back", since)
    else:
        up.says(rf"{name} \(pid \d+\) is ready", since)
    up.until(lambda: up.meters()["workers_ready"] == 2)


def test_a_rolling_restart_loses_no_stream(up: Up) -> None:
    stream = up.stream(temperature=0)
    stream.read(5)
    since = len(up.said)
    up.process.send_signal(signal.SIGHUP)
    got = stream.read()
    assert stream.is_done
    up.says("all workers are new", since)
    assert len(re.findall(r"is ready", "".join(up.said[since:]))) == 2
    assert up.stream(temperature=0).read() == got


def test_a_prompt_is_cached_for_all_workers(up: Up) -> None:
    prompt = [7, 8, 9] * 20
    told = [up.stream(prompt=prompt, max_tokens=2) for _ in range(4)]
    for stream in told:
        stream.read()
    for stream in [up.stream(prompt=prompt, max_tokens=2) for _ in range(4)]:
        stream.read()
        assert stream.usage["prompt_tokens_details"]["cached_tokens"] == len(prompt) - 1


def test_told_to_end_it_finishes_what_runs_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        up = Up(model, Path(folder), "--memory", "8MiB", "--workers", "1")
        try:
            up.says(r"w1 \(pid \d+\) is ready")
            stream = up.stream(temperature=0)
            stream.read(5)
            up.process.send_signal(signal.SIGTERM)
            up.says("nothing new is begun")
            stream.read()
            assert stream.usage["completion_tokens"] == COUNT
        finally:
            code = up.end()
    assert code == 0
    assert up.alive() == []


def test_workers_and_service_get_the_options_that_are_theirs(model: Path) -> None:
    given = ("--weights", "int8", "--threads", "2", "--block-size", "8", "--workers", "1")
    given += ("--drafts", "3", "--invariant")
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        up = Up(model, Path(folder), "--memory", "8MiB", *given)
        try:
            pid = up.says(r"w1 \(pid (\d+)\) is ready")[1]
            stream = up.stream(temperature=0, max_tokens=3)
            stream.read()
            with prefixcache.connect(f"unix:{folder}/s.sock") as client:
                snapshot = client.snapshot()
            command = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        finally:
            code = up.end()
    assert code == 0
    assert snapshot.block_size == 8
    [namespace] = snapshot.namespaces
    assert namespace.model.endswith("+int8+invariant")
    assert command[command.index("--threads") + 1] == "2"
    assert command[command.index("--dtype") + 1] == "float32"
    assert command[command.index("--drafts") + 1] == "3"


def test_segments_are_moved_for_who_asks_on_whichever_worker(model: Path) -> None:
    """What a certificate allows; an exact answer is the same before and after."""
    document = [number % 80 + 10 for number in range(0, 96 * 7, 7)]
    asked = [5, 9, *document, 3]
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        measured = {"first 3": ((0.0, 0.1), (0.001, 0.2))}
        file = write(Path(folder), model=identify(str(model), None), measured=measured)
        up = Up(model, Path(folder), "--memory", "8MiB", "--segments", str(file))
        try:
            for name in ("w1", "w2"):
                up.says(rf"{name} \(pid \d+\) is ready")

            def ask(prompt: list[int], **more: Any) -> Stream:
                stream = up.stream(prompt=prompt, max_tokens=4, temperature=0, **more)
                stream.read()
                return stream

            ask([5, 9, 7, *document, 2])
            told = [ask(asked, segments=True).usage for _ in range(4)]
            assert all(usage["approximate"] for usage in told)
            first, *others = [usage["prompt_tokens_details"] for usage in told]
            assert first["approximate_tokens"] >= 5 * 16 - 3
            assert {one["approximate_tokens"] for one in others} == {len(asked) - 1}
            exact = ask(asked)
            assert exact.usage["prompt_tokens_details"]["cached_tokens"] == 2
            assert "approximate" not in exact.usage
            again = ask(asked, segments=True)
            assert again.usage["approximate"] is False
            assert again.text == exact.text == ask(asked).text
            assert up.meters()["approximate_tokens_total"] > 0
        finally:
            code = up.end()
    assert code == 0


def test_ended_while_it_loads_it_says_so_and_leaves_nothing(model: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        up = Up(model, Path(folder), "--memory", "8MiB")
        up.says("2 workers load")
        up.process.send_signal(signal.SIGINT)
        assert up.end_by_itself() == 0
    assert "no process was left behind" in "".join(up.said)
    assert "Traceback" not in "".join(up.said)
    assert up.alive() == []


def test_what_cannot_be_had_is_said_in_a_line(model: Path, up: Up, tmp_path: Path) -> None:
    service = next(line for line in up.said if "listening at" in line).split("unix:")[1].strip()
    for options, wanted in (
        (["--connect", f"unix:{service}", "--memory", "1GiB"], "--memory is for a service"),
        (["--connect", f"unix:{service}", "--dtype", "bfloat16"], "cannot be used"),
        (["--http", "0.0.0.0:0"], "--api-keys"),
        (["--http", "8000"], "write 127.0.0.1:8000"),
        (["--http", f"127.0.0.1:{up.port}"], "somebody listens"),
        (["--dtype", "float16"], "float32 or bfloat16"),
        (["--chunk", "4"], "--max-batch"),
        (["--invariant", "--weights", "private"], "only the network in C"),
        (["--api-keys", str(tmp_path / "none")], "cannot read"),
        (["--model", str(tmp_path / "nothing")], "on no known place"),
    ):
        one = Up(model, tmp_path, *options)
        assert one.end_by_itself() != 0
        assert wanted in "".join(one.said), options
        assert "Traceback" not in "".join(one.said)
        assert one.alive() == []


def test_what_a_quota_has_no_room_for_is_told_whether_and_when_to_come_again(
    up: Up, model: Path
) -> None:
    def ask(length: int, **more: Any) -> tuple[int, str | None, dict[str, Any]]:
        body = {"model": "tiny", "prompt": [5, 9, 2, 14] * (length // 4), "max_tokens": 4}
        with contextlib.closing(up.connect()) as connection:
            kind = {"content-type": "application/json"}
            connection.request("POST", "/v1/completions", json.dumps(body | more), kind)
            answer = connection.getresponse()
            return answer.status, answer.getheader("retry-after"), json.loads(answer.read())

    target = next(line for line in up.said if "listening at" in line).split("at ")[-1].strip()
    assert ask(8, cache_salt="small")[0] == 200
    with prefixcache.connect(target) as client:
        namespace = next(one for one in client.snapshot().namespaces if one.salt)
        client.set_quota(namespace, max_held=6)
        status, retry, told = ask(128, cache_salt="small")
        assert (status, retry, told["error"]["code"]) == (400, None, "quota_exceeded")
        assert "may hold at most 6" in told["error"]["message"]
        with client.attach(namespace.model, read_layout(model, "float32")) as session:
            with session.acquire([3] * 64, reserve=16, salt=_salt("", "small")):
                status, retry, told = ask(64, cache_salt="small")
                assert (status, told["error"]["code"]) == (429, "rate_limit_exceeded")
                assert "holds 5 of at most 6" in told["error"]["message"]
                assert int(retry or 0) >= 1
                assert ask(64)[0] == 200  # others have none
            assert ask(64, cache_salt="small")[0] == 200
        client.set_quota(namespace, max_held=None)


def test_a_service_that_is_killed_is_started_again_and_joined(up: Up) -> None:
    (service,) = (pid for pid in up.alive() if b"\0serve\0" in _command(pid))
    stream = up.stream(temperature=0)
    stream.read(5)
    since = len(up.said)
    os.kill(service, signal.SIGKILL)
    stream.read()
    assert stream.usage["completion_tokens"] == COUNT
    up.says("the service is there again", since)
    prompt = [11, 12, 13] * 20

    def cached() -> int:
        told = up.stream(prompt=prompt, max_tokens=2)
        told.read()
        return int(told.usage["prompt_tokens_details"]["cached_tokens"])

    # What one of them has computed, all have, as soon as they have found it.
    up.until(lambda: [cached() for _ in range(4)] == [len(prompt) - 1] * 4)


def _command(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
