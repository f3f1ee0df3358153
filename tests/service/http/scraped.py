"""A service that has seen everything there is to see, and what it says at /metrics."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import prefixcache
from patience import PATIENCE_S
from prefixcache.errors import PoolExhausted
from service.service_process import LAYOUT, ServiceProcess


def url_of(service: ServiceProcess) -> str:
    (line,) = [line for line in service.lines if line.startswith("page at ")]
    return line.split()[2].rstrip("/")


def get(
    url: str, headers: dict[str, str] | None = None, method: str = "GET"
) -> tuple[int, str, dict[str, str]]:
    """Fetch a page; give status, text and headers, also of a refusal."""
    assert url.startswith("http://127.0.0.1:")
    request = urllib.request.Request(url, headers=headers or {}, method=method)  # noqa: S310
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:  # noqa: S310
            return answer.status, answer.read().decode(), dict(answer.headers)
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(), dict(error.headers)


def drive(target: str, rounds: int = 12) -> int:
    """Send hits, copies, evictions, a join and a refusal; give the tokens of granted prompts.

    The pool has 64 blocks of 4 tokens.
    """
    sent = 0
    with prefixcache.connect(target) as client:
        one = client.attach("tiny", LAYOUT, tenant="acme", name="one")
        two = client.attach("tiny", LAYOUT, tenant="acme", name="two")
        other = client.attach("tiny", LAYOUT, adapter="poet", name="other")
        for number in range(rounds):
            for session in (one, other):
                prompt = [*range(40), *range(1000 * number, 1000 * number + 23)]
                with session.acquire(prompt) as lease:
                    lease.commit(len(prompt))
                sent += len(prompt)
        evicted = 1000 * max(0, rounds - 6)
        one.acquire([*range(40), *range(evicted, evicted + 23)]).release()
        sent += 63
        for number in range(2):
            sent += join(one, two, 9000 + 100 * number)
        with one.acquire(range(200)), contextlib.suppress(PoolExhausted):
            other.acquire(range(500, 700))
        sent += 200
    return sent


def join(first: object, second: object, start: int) -> int:
    """Let one session wait for what another computes."""
    prompt = [*range(start, start + 41)]
    lease = first.acquire(prompt)  # type: ignore[attr-defined]

    def wait() -> None:
        with second.acquire([*prompt, 7], wait_s=10.0) as got:  # type: ignore[attr-defined]
            assert got.ledger.joined

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.1)
    lease.commit(len(prompt))
    waiting.join(PATIENCE_S)
    lease.release()
    return 41 + 42


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


FLAGS = ("--http", "127.0.0.1:0")
DOCS = Path(__file__).resolve().parents[3] / "docs" / "operations"
