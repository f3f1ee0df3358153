"""Worker processes that live and get nowhere: `doctor` names them, and takes it back."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from prefixcache.cli.status import read
from prefixcache.client import Client
from worker.zoo import Service, random_tokens, save

STALLED_AFTER_S = 0.5
PROMPT = random_tokens(20)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save(path)
    return path


@pytest.fixture
def service(folder: Path) -> Iterator[Service]:
    """A service whose workers give signs of life three times a second."""
    service = Service(folder, "1MiB", "--ttl", "1")
    service.start()
    yield service
    service.stop()


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str) -> subprocess.Popen[bytes]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        )
        assert json.loads(started[-1].stdout.readline())["event"] == "ready"  # type: ignore[union-attr]
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def send(process: subprocess.Popen[bytes], *requests: dict[str, Any]) -> None:
    assert process.stdin is not None
    process.stdin.write(b"".join(json.dumps(one).encode() + b"\n" for one in requests))
    process.stdin.flush()


def stuck(service: Service) -> list[str]:
    """What `prefixcache doctor` says is wrong about the workers' progress."""
    told = subprocess.run(
        [
            *(sys.executable, "-m", "prefixcache.cli", "doctor", "--connect", service.target),
            *("--json", "--stalled-after", str(STALLED_AFTER_S)),
        ],
        capture_output=True,
        check=False,
    )
    found = json.loads(told.stdout)["findings"]
    texts = [one["text"] for one in found if (one["look"], one["level"]) == ("progress", "wrong")]
    assert told.returncode == 1 or not texts
    return texts


def stuck_text(service: Service, client: Client) -> str:
    """Wait until the service has been told for long enough; say what `doctor` says then."""
    until(lambda: max(_ages(client), default=0.0) > STALLED_AFTER_S)
    (text,) = stuck(service)
    return text


def _ages(client: Client) -> list[float]:
    workers = [one for one in read(client).workers if one.state == "attached"]
    return [max(one.stalled_s, one.oldest_untaken_s) for one in workers]


def until(seen: Callable[[], object]) -> None:
    while not seen():  # the suite's own limit ends it
        time.sleep(0.05)


def test_a_hung_engine_is_named_with_what_it_has_and_what_lies_before_it(
    start: Start, service: Service, client: Client, folder: Path, model_folder: Path
) -> None:
    gate = folder / "gate"
    gate.touch()
    worker = start("worker.hung", str(gate), str(model_folder), service.target)
    send(worker, {"id": "a", "tokens": PROMPT, "max_new_tokens": 2})
    until(lambda: any(one.in_hand for one in read(client).workers))
    send(worker, {"id": "b", "tokens": PROMPT}, {"cancel": "a"})
    until(lambda: any(one.untaken == 2 for one in read(client).workers))
    until(lambda: min(_ages(client), default=0.0) > STALLED_AFTER_S)
    text = stuck_text(service, client)
    assert f"Worker hung (pid {worker.pid}) has 1 request in hand and made no step for" in text
    until(lambda: "has 2 requests before it and took the oldest" in stuck_text(service, client))
    gate.unlink()
    out, _ = worker.communicate()
    assert worker.returncode == 0
    ends = {e["id"]: e["event"] for e in map(json.loads, out.splitlines()) if "id" in e}
    assert ends == {"a": "finished", "b": "finished"}
    assert stuck(service) == []


def test_a_worker_whose_answers_nobody_reads_is_named_until_somebody_does(
    start: Start, service: Service, client: Client, model_folder: Path
) -> None:
    worker = start(
        *("prefixcache_worker", "--model", str(model_folder), "--dtype", "float32"),
        *("--connect", service.target, "--name", "unread"),
    )
    count = 24  # their tokens are more than a pipe holds
    for number in range(count):
        send(worker, {"id": number, "tokens": PROMPT, "max_new_tokens": 200, "log_logits": True})
    assert "Worker unread" in stuck_text(service, client)
    out, _ = worker.communicate()
    assert sum(json.loads(line)["event"] == "finished" for line in out.splitlines()) == count
    assert stuck(service) == []


def test_a_reader_that_cannot_go_on_is_named_though_nothing_is_in_hand(
    start: Start, service: Service, client: Client, model_folder: Path
) -> None:
    worker = start(
        *("prefixcache_worker", "--model", str(model_folder), "--dtype", "float32"),
        *("--connect", service.target, "--name", "deaf"),
    )
    count = 1000  # their refusals are more than a pipe holds
    send(worker, *({"id": number, "tokens": "none"} for number in range(count)))
    text = stuck_text(service, client)
    assert "Worker deaf" in text
    assert "has 1 request before it" in text
    assert "in hand" not in text
    out, _ = worker.communicate()
    assert [json.loads(line)["event"] for line in out.splitlines()] == ["failed"] * count
    assert stuck(service) == []
