"""The worker as a process: what it is told on stdin, what it tells on stdout, how it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import transformers

from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache_worker.engine import Engine
from prefixcache_worker.model import Model
from prefixcache_worker.request import Request
from worker.zoo import Service, answers, build, random_tokens

PROMPT = random_tokens(60)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory, demo_folder: Path) -> Path:
    """A tiny model with a real tokenizer and chat template, whose vocabulary it has."""
    path = tmp_path_factory.mktemp("model")
    build("llama", vocab_size=49152).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(demo_folder).save_pretrained(path)
    return path


class Worker:
    """A worker process."""

    def __init__(
        self, model: Path, *options: str, program: Sequence[str] = ("-m", "prefixcache_worker")
    ) -> None:
        self.process = subprocess.Popen(
            [
                *(sys.executable, *program, "--model", str(model), "--dtype", "float32"),
                *options,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def send(self, **request: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()

    def until(self, kind: str, request_id: str = "") -> dict[str, Any]:
        """Read events until one of this kind."""
        assert self.process.stdout is not None
        while line := self.process.stdout.readline():
            event: dict[str, Any] = json.loads(line)
            if event["event"] == kind and event.get("id", "") == request_id:
                return event
        assert self.process.stderr is not None
        raise AssertionError(f"ended without {kind}: {self.process.stderr.read().decode()}")

    def end(self) -> tuple[int, list[dict[str, Any]]]:
        """Close its input, wait for its end; its exit code and the events that were left."""
        out, err = self.process.communicate(timeout=PATIENCE_S)
        # The first one packs the weights, and says so.
        assert [line for line in err.splitlines() if not line.startswith(b"packing ")] == []
        return self.process.returncode, [json.loads(line) for line in out.splitlines()]


@pytest.fixture
def start(model_folder: Path) -> Iterator[Callable[..., Worker]]:
    workers: list[Worker] = []

    def start(*options: str, **more: Any) -> Worker:
        workers.append(Worker(model_folder, *options, **more))
        return workers[-1]

    yield start
    for worker in workers:
        worker.process.kill()
        worker.process.communicate()


def test_requests_become_events_and_the_end_of_input_ends_the_worker(
    start: Callable[..., Worker], service: Service, client: Client
) -> None:
    worker = start("--connect", service.target, "--name", "mine", "--chunk", "32")
    ready = worker.until("ready")
    assert ready["shared"]
    assert ready["chunk"] == 32
    assert ready["threads"] == 1
    assert ready["layout"] == {
        "num_layers": 3,
        "num_kv_heads": 2,
        "head_dim": 16,
        "dtype": "float32",
    }
    worker.send(id="a", tokens=PROMPT, max_new_tokens=5, log_logits=True)
    started = worker.until("started", "a")
    assert started["ledger"]["cold"] == started["num_to_compute"] == 60
    assert len(worker.until("token", "a")["top"]) == 2
    first = worker.until("finished", "a")
    assert first["num_computed"] == 64
    assert (len(first["tokens"]), first["reason"]) == (5, "length")
    worker.send(id="b", tokens=PROMPT, max_new_tokens=5)
    worker.send(id="c", messages=[{"role": "user", "content": "Hello"}], max_new_tokens=3)
    worker.send(id="d", prompt="Hello", max_new_tokens=100, temperature=1.5, seed=3, stop="e")
    worker.send(id="bad", tokens=[], max_new_tokens=5)
    worker.send(id="typo", tokens=[1], max_tokens=5)
    code, events = worker.end()
    assert code == 0
    done = {e["id"]: e for e in events if e["event"] == "finished"}
    assert sorted(done) == ["b", "c", "d"]
    assert (done["b"]["tokens"], done["b"]["num_computed"]) == (first["tokens"], 5)
    assert done["d"]["reason"] == "stop"
    assert "e" not in done["d"]["text"]
    shown = "".join(e["text"] for e in events if e["event"] == "token" and e["id"] == "d")
    assert shown == done["d"]["text"]
    failed = {e["id"]: e["message"] for e in events if e["event"] == "failed"}
    assert "0 prompt tokens" in failed["bad"]
    assert "max_tokens" in failed["typo"]
    assert not client.snapshot().leases


def test_a_signal_ends_it_at_once_and_its_blocks_come_back(
    start: Callable[..., Worker], service: Service, client: Client
) -> None:
    worker = start("--connect", service.target)
    worker.until("ready")
    worker.send(id="a", tokens=PROMPT, max_new_tokens=190)
    worker.until("token", "a")
    worker.process.send_signal(signal.SIGTERM)
    worker.process.wait(PATIENCE_S)  # its input is still open
    code, events = worker.end()
    assert code == 0
    assert not [e for e in events if e["event"] == "finished"]
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())


def test_who_reads_it_hears_of_its_end_before_the_process_has_ended(
    start: Callable[..., Worker], client: Client, service: Service, tmp_path: Path
) -> None:
    """What goes on elsewhere does not wait until torch is taken down, which takes long."""
    os.mkfifo(takes_long := tmp_path / "takes-long")
    code = (
        "import atexit, runpy\n"
        f"atexit.register(open, {str(takes_long)!r})\n"
        "runpy.run_module('prefixcache_worker', run_name='__main__', alter_sys=True)"
    )
    worker = start("--connect", service.target, program=("-c", code))
    worker.until("ready")
    worker.send(id="a", tokens=PROMPT, max_new_tokens=190)
    worker.until("token", "a")
    worker.process.send_signal(signal.SIGTERM)
    assert worker.process.stdout is not None
    watchdog = threading.Timer(PATIENCE_S, worker.process.kill)
    watchdog.start()
    worker.process.stdout.read()
    assert watchdog.is_alive()
    watchdog.cancel()
    assert worker.process.poll() is None
    left = client.snapshot()
    assert (left.private, left.leases) == (0, ())
    takes_long.write_text("")
    assert worker.process.wait(PATIENCE_S) == 0


def test_an_unread_output_ends_it_quietly(start: Callable[..., Worker]) -> None:
    worker = start("--solo")
    assert worker.until("ready")["shared"] is False
    assert worker.process.stdout is not None
    worker.process.stdout.close()
    worker.send(id="a", tokens=PROMPT, max_new_tokens=50)
    assert worker.process.wait(PATIENCE_S) == 0
    assert worker.process.stderr is not None
    assert worker.process.stderr.read() == b""


def test_with_a_service_and_without_one_is_not_both(start: Callable[..., Worker]) -> None:
    _, error = start("--solo", "--connect", "unix:/x").process.communicate(timeout=PATIENCE_S)
    assert b"--solo is without a service" in error


def test_without_a_service_it_says_so_and_does_not_start(
    start: Callable[..., Worker], folder: Path
) -> None:
    worker = start("--connect", f"unix:{folder}/nobody.sock")
    _, error = worker.process.communicate(timeout=PATIENCE_S)
    assert worker.process.returncode != 0
    assert b"nobody.sock" in error


def test_a_killed_workers_prefix_is_finished_by_the_one_that_waits(
    start: Callable[..., Worker], service: Service, client: Client, model_folder: Path
) -> None:
    victim = start("--connect", service.target, "--chunk", "16")
    heir = start("--connect", service.target)
    victim.until("ready")
    heir.until("ready")
    victim.process.send_signal(signal.SIGSTOP)  # so that its prefill does not end too early
    victim.send(id="a", tokens=PROMPT, max_new_tokens=5)
    victim.process.send_signal(signal.SIGCONT)
    victim.until("started", "a")
    heir.send(id="b", tokens=PROMPT, max_new_tokens=5)
    victim.process.kill()
    done = heir.until("finished", "b")
    alone = Engine(Model.load(model_folder), None, None)
    assert done["tokens"] == list(answers(alone, Request("b", PROMPT, 5))["b"].tokens)
    deadline = time.monotonic() + PATIENCE_S
    while (left := client.snapshot()).private and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (left.private, left.quarantined, left.leases) == (0, 0, ())


def test_it_outlives_its_service_and_joins_the_next_one(
    start: Callable[..., Worker], service: Service
) -> None:
    worker = start("--connect", service.target)
    worker.until("ready")
    worker.send(id="a", tokens=PROMPT, max_new_tokens=190)
    worker.until("token", "a")
    service.kill()
    worker.until("alone")
    worker.send(id="b", tokens=PROMPT, max_new_tokens=190)
    assert worker.until("started", "b")["shared"] is False
    alone = worker.until("finished", "b")
    service.start()
    worker.until("joined")
    worker.send(id="c", tokens=PROMPT, max_new_tokens=190)
    assert worker.until("started", "c")["shared"] is True
    assert worker.until("finished", "c")["tokens"] == alone["tokens"]
    assert worker.end()[0] == 0
