"""What a benchmark has started ends with it, however it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache_bench.speed.vllm_load import Engine
from service.service_process import environment

BENCHMARK = """
import subprocess, sys, time
from prefixcache_bench.speed.signals import ending_in_order, tied_to_this
from prefixcache_bench.speed.served import served

sleeping = [sys.executable, "-c", "import time; time.sleep(999)"]
with ending_in_order(), served("--memory", "1MiB") as (_, service):
    child = subprocess.Popen(tied_to_this(sleeping))
    try:
        try:
            print(service, child.pid, flush=True)
            time.sleep(999)
        except Exception:
            print("taken for a failure", flush=True)
    finally:
        child.kill()
        child.wait()
        print("left", flush=True)
"""


@contextmanager
def benchmark() -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A benchmark, and what it has started."""
    with subprocess.Popen(
        [sys.executable, "-c", BENCHMARK], stdout=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stdout is not None
        try:
            yield process, [int(pid) for pid in process.stdout.readline().split()]
        finally:
            process.kill()


def until_gone(pids: list[int]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while there := [pid for pid in pids if is_there(pid)]:
        assert time.monotonic() < deadline, f"left behind: {there}"
        time.sleep(0.02)


def is_there(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_benchmark_that_is_told_to_end_leaves_its_blocks(number: signal.Signals) -> None:
    with benchmark() as (process, started):
        process.send_signal(number)
        said, _ = process.communicate()
        assert (process.returncode, said) == (128 + number, "left\n")
        until_gone(started)


def test_of_a_benchmark_that_is_killed_nothing_is_left() -> None:
    with benchmark() as (process, started):
        process.kill()
        until_gone(started)


def test_an_engines_processes_end_with_it_also_those_that_it_leaves_behind(tmp_path: Path) -> None:
    left = tmp_path / "left"
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\nsleep 999 &\necho $! >{left}.new; mv {left}.new {left}\n")
    python.chmod(0o700)
    engine = Engine(os.fspath(python), "model", "unix:/s", tmp_path / "log")
    deadline = time.monotonic() + PATIENCE_S
    while not left.exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    engine.end()
    until_gone([int(left.read_text())])
