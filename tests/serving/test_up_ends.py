"""How `prefixcache up` begins and ends: what it says for programs, Ctrl-C, two at the same time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache_serving.notices import EVENTS
from serving.test_up import PROMPT, Up
from worker.zoo import save

pytestmark = pytest.mark.slow

ONE = ("--memory", "8MiB", "--workers", "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save(folder)
    return folder


@contextlib.contextmanager
def folder_of_a_socket() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        yield Path(folder)


def test_for_programs_it_says_what_happens_and_who_still_waits_at_its_end_is_told(
    model: Path,
) -> None:
    with folder_of_a_socket() as folder:
        up = Up(model, folder, *ONE, "--json", "--grace", "0")
        try:
            ready = up.tells("ready")
            assert up.tells("starting")["url"] == ready["url"]
            assert (ready["model"], ready["workers"]) == ("tiny", 1)
            service = up.tells("service")
            assert service["is_ours"]
            first = up.tells("worker_ready")
            assert first["worker"] == "w1"
            assert {first["pid"], service["pid"], up.process.pid} <= set(up.alive())
            since = len(up.said)
            os.kill(first["pid"], signal.SIGKILL)
            ended = up.tells("worker_ended", since)
            assert (ended["pid"], ended["exit_code"]) == (first["pid"], -signal.SIGKILL)
            assert up.tells("worker_ready", since)["pid"] != first["pid"]
            up.until(lambda: up.meters()["workers_ready"] == 1)

            for _ in range(20):  # on a bad day the answer is whole before its worker is stopped
                stream = up.stream(temperature=0)
                stream.read(3)
                os.kill(up.tells("worker_ready", since)["pid"], signal.SIGSTOP)
                if up.meters()["requests_open"]:
                    break
                os.kill(up.tells("worker_ready", since)["pid"], signal.SIGCONT)
                stream.read()
            waits = up.connect()
            body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 3}
            kind = {"content-type": "application/json"}
            waits.request("POST", "/v1/completions", json.dumps(body), kind)
            up.until(lambda: up.meters()["requests_open"] == 2)
            up.process.send_signal(signal.SIGTERM)
            with pytest.raises(AssertionError, match="'code': 'ended'"):
                stream.read()
            assert not stream.is_done
            stream.close()
            answer = waits.getresponse()
            assert answer.status == 503
            assert json.loads(answer.read())["error"]["code"] == "ended"
            waits.close()
        finally:
            code = up.end()
        assert code == 0
        told = [json.loads(line) for line in up.said]
        assert {one["event"] for one in told} <= set(EVENTS)
        # That the worker is stopped may be noticed at any moment.
        last = [one["event"] for one in told if not one["event"].startswith("worker")][-3:]
        assert last == ["ending", "unfinished", "ended"]
        assert [one["at"] for one in told] == sorted(one["at"] for one in told)
        assert up.alive() == []


def test_of_two_that_are_started_at_once_one_starts_the_service_and_both_answer(
    model: Path,
) -> None:
    with folder_of_a_socket() as folder:
        both = [Up(model, folder, "--workers", "1", "--json") for _ in range(2)]
        try:
            told = [up.tells("service") for up in both]
            assert sorted(one["is_ours"] for one in told) == [False, True]
            for up in both:
                up.tells("ready")
            stream = both[0].stream(max_tokens=3)
            stream.read()
            stream = both[1].stream(max_tokens=3)
            stream.read()
            assert stream.usage["prompt_tokens_details"]["cached_tokens"] == len(PROMPT) - 1
        finally:
            for up in both:
                up.end()
        assert not any(json.loads(line)["event"] == "failed" for up in both for line in up.said)


def catches(pid: int) -> bool:
    """Whether a process has something to do at Ctrl-C, as Python has from its first moment on."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (caught,) = (int(line.split()[1], 16) for line in lines if line.startswith("SigCgt"))
    return bool(caught >> (signal.SIGINT - 1) & 1)


def until(condition: Any) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


@pytest.mark.parametrize("later_s", [0, 0.3, 0.8, 2.0])
def test_ctrl_c_ends_it_at_any_moment_of_its_start_without_a_traceback(
    model: Path, later_s: float
) -> None:
    """From its first own line on; before that, Python itself is being started."""
    with folder_of_a_socket() as folder:
        up = Up(model, folder, *ONE)
        until(lambda: catches(up.process.pid))
        until(lambda: not catches(up.process.pid))
        time.sleep(later_s)
        up.process.send_signal(signal.SIGINT)
        assert up.end_by_itself() in (0, 130, -signal.SIGINT)
    said = "".join(up.said)
    assert "Traceback" not in said
    assert "ignored" not in said
    assert up.alive() == []


@pytest.mark.parametrize("time_", range(6))
def test_ctrl_c_ends_it_without_a_traceback_when_its_imports_have_just_ended(
    model: Path, time_: int
) -> None:
    """A moment in which it already counts, and nobody has begun to listen to it."""
    with folder_of_a_socket() as folder:
        up = Up(model, folder, *ONE)
        until(lambda: catches(up.process.pid))
        until(lambda: not catches(up.process.pid))
        until(lambda: catches(up.process.pid))
        up.process.send_signal(signal.SIGINT)
        assert up.end_by_itself() in (0, 130, -signal.SIGINT)
    assert "Traceback" not in "".join(up.said)


def test_who_is_in_a_hurry_ends_it_by_a_third_ctrl_c(model: Path) -> None:
    """The second one ends it at once, but for a worker that does not listen, which has seconds."""
    with folder_of_a_socket() as folder:
        up = Up(model, folder, *ONE, "--json")
        worker = up.tells("worker_ready")["pid"]
        up.tells("ready")
        os.kill(worker, signal.SIGSTOP)
        for _ in range(3):
            up.process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        assert up.end_by_itself() == 0
    assert json.loads(up.said[-1])["event"] == "ended"
    assert up.alive() == []
