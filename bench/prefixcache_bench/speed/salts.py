"""A salt for each request, and each used once: what the service's memory does.

```
8 lanes ──► attach once ──► acquire behind 64 salts, commit, release ──► 64 others ──► … ──► detach
```
The service is the real one on a Unix socket, with a state, a shadow cache, a watcher, and a page
that is scraped at the end.  Its own memory (`RssAnon`) and that of the processes that it started
are read on the way.  Until the rings and ghosts are full both grow; after that, nothing may.

    python -m prefixcache_bench.speed.salts [--count 1000000] [--seconds 1800] [--publish]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import http.client
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from prefixcache.client import codec, unary
from prefixcache.client.address import this_host
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = Layout(1, 1, 4, "float32")
BLOCK_SIZE = 16
NUM_BLOCKS = 4096
TOKENS = 2 * BLOCK_SIZE
LANES, SALTS_PER_MESSAGE = 8, 64
FIRST, EVERY = (1_000, 10_000), 100_000
SETTLED = 200_000
"""From here on nothing may grow: rings, ghosts and kept answers are full."""
MOST_GROWTH = 1.05
DOCUMENT = Path("docs/reliability.md")


def serve(folder: Path, port: int) -> None:
    """Run the service."""
    from prefixcache.config import load
    from prefixcache.service import server

    flags = {
        "listen": [f"unix:{folder}/sock"],
        "http": f"127.0.0.1:{port}",
        "memory": NUM_BLOCKS * BLOCK_SIZE * LAYOUT.token_bytes,
        "block_size": BLOCK_SIZE,
        "layout": LAYOUT,
        "log_level": "error",
        "state": folder / "state",
        "shadow": ["policy=lru"],
    }
    server.run(load(flags), print)


@contextlib.contextmanager
def started(folder: Path, port: int) -> Iterator[subprocess.Popen[str]]:
    """Start the service in a process of its own."""
    command = [sys.executable, "-m", "prefixcache_bench.speed.salts", "--serve", str(folder)]
    command += ["--port", str(port)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not any(line.startswith("listening") for line in process.stdout or ()):
                raise SystemExit("the service did not start")
            yield process
        finally:
            process.terminate()


class Salts:
    """One run: who uses salts, who watches, and what is read on the way."""

    def __init__(self, folder: Path, pid: int, count: int, seconds: float, seed: int) -> None:
        self._target = f"unix:{folder}/sock"
        self._channel: Any = None
        self._pid = pid
        self._count = count
        self._until = time.monotonic() + seconds
        self._seed = seed
        self._begun = 0
        self.done = 0
        self.heard = 0
        self.rows: list[tuple[int, float, float]] = []
        """Salts used, MiB of the service, MiB of its children."""

    async def run(self) -> float:
        """Use the salts; give how many a second."""
        self._channel = grpc.aio.insecure_channel(self._target, unary.CHANNEL_OPTIONS)
        start = time.monotonic()
        watcher = asyncio.create_task(self._watch())
        await asyncio.gather(*(self._lane(number) for number in range(LANES)))
        took = time.monotonic() - start
        if not self.rows or self.rows[-1][0] < self.done:
            self._note()
        watcher.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watcher
        await self._channel.close()
        return self.done / took

    async def _watch(self) -> None:
        call: Any = self._channel.unary_stream(
            unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
        )
        async for _ in call(pb.WatchRequest()):
            self.heard += 1

    async def _lane(self, number: int) -> None:
        """Be one worker, whose one session names another namespace with each request."""
        random = np.random.default_rng((self._seed, number))
        stream: Any = self._channel.stream_stream(
            unary.SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )
        call = stream()
        batch = pb.OpBatch()
        attach = batch.ops.add(id=1).attach
        attach.pid, attach.host = os.getpid(), this_host()
        codec.write_namespace(Namespace("salts"), attach.namespace)
        codec.write_layout(LAYOUT, attach.layout)
        await _ask(call, batch)
        while self._begun < self._count and time.monotonic() < self._until:
            await self._message(call, random)
        batch = pb.OpBatch()
        batch.ops.add(id=5).detach.SetInParent()
        await _ask(call, batch)
        await call.done_writing()

    async def _message(self, call: Any, random: np.random.Generator) -> None:
        """Use some salts, each once."""
        size = min(SALTS_PER_MESSAGE, self._count - self._begun)
        batch = pb.OpBatch()
        for salt in range(self._begun, self._begun + size):
            acquire = batch.ops.add(id=2).acquire
            codec.write_namespace(Namespace("salts", salt=f"user {salt}"), acquire.namespace)
            acquire.tokens = random.integers(0, 50_000, TOKENS, np.uint32).tobytes()
        self._begun += size
        answers = await _ask(call, batch)
        batch = pb.OpBatch()
        for answer in answers.results:
            commit = batch.ops.add(id=3).commit
            commit.lease, commit.num_tokens = answer.acquire.grant.lease, TOKENS
            batch.ops.add(id=4).release.lease = commit.lease
        await _ask(call, batch)
        before, self.done = self.done, self.done + size
        if any(before < mark <= self.done for mark in FIRST) or before // EVERY < (
            self.done // EVERY
        ):
            self._note()

    def _note(self) -> None:
        children = Path(f"/proc/{self._pid}/task/{self._pid}/children").read_text().split()
        row = (self.done, private_mib(self._pid), sum(private_mib(int(pid)) for pid in children))
        self.rows.append(row)
        sys.stderr.write("{:,} salts: {:.1f} MiB, children {:.1f} MiB\n".format(*row))


async def _ask(call: Any, batch: pb.OpBatch) -> pb.OpResults:
    await call.write(batch)
    answers: pb.OpResults = pb.OpResults()
    while len(answers.results) < len(batch.ops):  # an answer may come in parts
        part = await call.read()
        if part is grpc.aio.EOF:
            raise SystemExit("the service ended a session")
        answers.MergeFrom(part)
    for answer in answers.results:
        if answer.HasField("error"):
            raise SystemExit(f"the service refused: {answer.error.message}")
    return answers


def private_mib(pid: int) -> float:
    """Memory that is the process' own: neither files nor what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell the memory of a process")


def scraped(port: int) -> int:
    """Scrape the metrics; give how many lines they are."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    answer = connection.getresponse()
    text = answer.read().decode()
    if answer.status != 200:
        raise SystemExit(f"the metrics cannot be scraped: {answer.status}")
    return len(text.splitlines())


def measure(options: argparse.Namespace) -> int:
    """Use the salts; 1 if the memory went on growing."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="salts-", dir="/dev/shm"))
    try:
        with started(folder, port) as process:
            run = Salts(folder, process.pid, options.count, options.seconds, options.seed)
            rate = asyncio.run(run.run())
            lines = scraped(port)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = "\n".join(
        [f"{'salts':>9}  {'service':>10}  {'its children':>12}"]
        + [f"{count:9,}  {own:6.1f} MiB  {theirs:8.1f} MiB" for count, own, theirs in run.rows]
    )
    settled = [row for row in run.rows if row[0] >= SETTLED] or run.rows
    growth = max(settled[-1][at] / settled[0][at] for at in (1, 2))
    text += (
        f"\nlast / {settled[0][0]:,}: service {settled[-1][1] / settled[0][1]:.3f}, children"
        f" {settled[-1][2] / settled[0][2]:.3f}; {rate:,.0f} salts/s; metrics: {lines} lines"
    )
    print(text)
    if options.publish:
        publish(DOCUMENT, "salts", f"$ python -m prefixcache_bench.speed.salts\n{text}")
    return 0 if growth < MOST_GROWTH else 1


def main(argv: list[str] | None = None) -> int:
    """Use the salts; 1 if the memory went on growing."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.salts", description=__doc__
    )
    parser.add_argument("--count", type=int, default=1_000_000)
    parser.add_argument("--seconds", type=float, default=1800.0, help="stop then, however many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        serve(options.serve, options.port)
        return 0
    with ending_in_order():
        return measure(options)


if __name__ == "__main__":
    raise SystemExit(main())
