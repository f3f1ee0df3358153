"""`prefixcache up` in a process of its own, for benchmarks that need a real endpoint."""

from __future__ import annotations

import contextlib
import http.client
import json
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Final

from prefixcache.plain_json import json_text

LOAD_S: Final = 600.0
"""How long workers may load."""


class Endpoint:
    """One run of it.

    Args:
        process: that runs.
        target: its service's address.
    """

    def __init__(self, process: subprocess.Popen[str], target: str) -> None:
        self.process = process
        self.target = target
        self.port = 0
        self._lines: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        """What clients are given as their base URL."""
        return f"http://127.0.0.1:{self.port}/v1"

    def until(self, pattern: str) -> re.Match[str]:
        """Wait until it says something."""
        deadline = time.monotonic() + LOAD_S
        said = []
        while time.monotonic() < deadline:
            with contextlib.suppress(queue.Empty):
                said.append(self._lines.get(timeout=0.5))
                if found := re.search(pattern, said[-1]):
                    return found
            if self.process.poll() is not None and self._lines.empty():
                break
        raise SystemExit(f"prefixcache up did not say {pattern!r}, but:\n{''.join(said)}")

    def connect(self) -> http.client.HTTPConnection:
        """Open a connection."""
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=LOAD_S)

    def get(self, path: str) -> bytes:
        """Read a path."""
        with contextlib.closing(self.connect()) as connection:
            connection.request("GET", path)
            return connection.getresponse().read()

    def workers(self) -> list[dict[str, Any]]:
        """Give what it says of its workers."""
        found: list[dict[str, Any]] = json.loads(self.get("/workers"))["workers"]
        return found

    def meter(self, name: str) -> float:
        """Read one of its numbers."""
        for line in self.get("/metrics").decode().splitlines():
            if line.startswith(f"prefixcache_front_{name} "):
                return float(line.split()[1])
        raise SystemExit(f"the front counts no {name}")

    def wait_ready(self) -> None:
        """Wait until all workers are there."""
        deadline = time.monotonic() + LOAD_S
        while any(one["state"] != "ready" for one in self.workers()):
            if time.monotonic() > deadline:
                raise SystemExit("a worker is not there")
            time.sleep(0.05)

    def send(self, body: dict[str, Any]) -> http.client.HTTPConnection:
        """Ask for a completion; give its connection."""
        connection = self.connect()
        told = {"content-type": "application/json"}
        connection.request("POST", "/v1/completions", json_text(body), told)
        return connection

    def close(self) -> None:
        """Let go of what it said, once it has ended."""
        self._reader.join()
        assert self.process.stderr is not None
        self.process.stderr.close()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self._lines.put(line)


@contextlib.contextmanager
def endpoint(*options: str) -> Iterator[Endpoint]:
    """Start `prefixcache up` with a service of its own; all of it ends with the block."""
    with tempfile.TemporaryDirectory(prefix="pfx-") as folder:
        target = f"unix:{folder}/s.sock"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefixcache_serving", "--http", "127.0.0.1:0"),
                *("--connect", target, *options),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        found = Endpoint(process, target)
        try:
            found.port = int(found.until(r"http://127\.0\.0\.1:(\d+)/v1")[1])
            found.wait_ready()
            yield found
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            found.close()


def token_times(answer: http.client.HTTPResponse) -> Iterator[float]:
    """Read a stream to its end; give when each chunk came: mostly a token, if late, a few.

    Raises:
        SystemExit: it broke off.
    """
    reason = None
    while line := answer.readline():
        if line.startswith(b"data: {"):
            for choice in json.loads(line[6:]).get("choices", ()):
                reason = choice["finish_reason"]
                yield time.monotonic()
    if reason != "length":
        raise SystemExit(f"a stream ended because of {reason}")


def random_prompt(draw: Any, count: int) -> Sequence[int]:
    """Draw a prompt of so many tokens, none of them special."""
    return [draw.randrange(1000, 40_000) for _ in range(count)]
