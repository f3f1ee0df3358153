"""`make soak`: half of the rate that the service can take, for half an hour, with the pool full.

```
warm up     as fast as it goes ──► the rate, and a pool, its ghosts and its manifest filled for good
soak        half of that rate, paced; ten windows ──► p99, private memory, pauses of the collector
end         all leases back ──► every block free or evictable
```
The service is the real one, with a pool and a state in shared memory; in its process, the pauses of
the collector are noted by `gc.callbacks`.

    python -m prefixcache_bench.speed.soak [--minutes 30] [--json FILE] [--publish]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np

from prefixcache.client import codec, unary
from prefixcache.client.address import this_host
from prefixcache.plain_json import json_text
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = Layout(1, 1, 4, "float32")
BLOCK_SIZE = 16
NUM_BLOCKS = 20_000
SYSTEMS, SYSTEM_TOKENS, NEW_TOKENS = 32, 960, 100
LANES, REQUESTS_PER_MESSAGE = 4, 8
OPS_PER_REQUEST = 3
WINDOWS = 10
P99_RATIO, RSS_DRIFT, PAUSE_S = 1.5, 0.01, 0.020
DOCUMENT = Path("docs/reliability.md")


def serve(target: str, state: Path, notes: Path) -> None:
    """Run the service, and note every pause of the garbage collector."""
    from prefixcache.config import load
    from prefixcache.service import server

    begun = 0.0
    file = notes.open("w", buffering=1)

    def note(phase: str, info: dict[str, int]) -> None:
        nonlocal begun
        # By the thread's own clock: a collection never lets go of the interpreter, but where it
        # ends in the thread that writes the state, the call below may wait for the event loop.
        if phase == "start":
            begun = time.thread_time()
        else:
            took, now = time.thread_time() - begun, time.perf_counter()
            file.write(f"{took:.6f} {info['generation']} {now:.3f}\n")

    gc.callbacks.append(note)
    memory = NUM_BLOCKS * BLOCK_SIZE * LAYOUT.token_bytes
    flags = {"listen": [target], "memory": memory, "block_size": BLOCK_SIZE, "layout": LAYOUT}
    server.run(load(flags | {"log_level": "warning", "state": state}), print)


@contextlib.contextmanager
def started(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """Start the service in a process of its own."""
    command = [sys.executable, "-m", "prefixcache_bench.speed.soak", "--serve", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            if not any(line.startswith("listening") for line in process.stdout or ()):
                raise SystemExit("the service did not start")
            yield process
        finally:
            process.terminate()


class Load:
    """Workers that lease, commit and release in one message per step, on one session each."""

    def __init__(self, target: str) -> None:
        self.channel = grpc.aio.insecure_channel(target, unary.CHANNEL_OPTIONS)
        random = np.random.default_rng(3)
        self.systems = [
            random.integers(0, 50_000, SYSTEM_TOKENS, np.uint32).tobytes() for _ in range(SYSTEMS)
        ]
        self.latencies: list[float] = []
        self.requests = 0

    async def lane(self, number: int, until: float, per_s: float | None) -> None:
        """Send steps until a moment, as fast as they are answered or `per_s` requests a second."""
        random = np.random.default_rng(number)
        stream: Any = self.channel.stream_stream(
            f"/{unary.SERVICE}/Session", pb.OpBatch.SerializeToString, pb.OpResults.FromString
        )
        call = stream()
        hello = pb.OpBatch()
        attach = hello.ops.add(id=1).attach
        attach.pid, attach.host = os.getpid(), this_host()
        codec.write_namespace(Namespace("soak"), attach.namespace)
        codec.write_layout(LAYOUT, attach.layout)
        await call.write(hello)
        await call.read()
        leases: list[tuple[int, int]] = []
        due = time.perf_counter()
        while time.perf_counter() < until:
            batch = pb.OpBatch()
            add = batch.ops.add
            for lease, count in leases:
                commit = add(id=1).commit
                commit.lease, commit.num_tokens = lease, count
            for lease, _ in leases:
                add(id=2).release.lease = lease
            sizes = random.integers(1, NEW_TOKENS, REQUESTS_PER_MESSAGE)
            for system, size in zip(
                random.integers(0, SYSTEMS, REQUESTS_PER_MESSAGE), sizes, strict=True
            ):
                new = random.integers(0, 50_000, size, np.uint32).tobytes()
                add(id=3).acquire.tokens = self.systems[system] + new
            start = time.perf_counter()
            await call.write(batch)
            results = await call.read()
            self.latencies.append(time.perf_counter() - start)
            grants = [
                r.acquire.grant for r in results.results if r.WhichOneof("result") == "acquire"
            ]
            failed = [r.error.message for r in results.results if r.HasField("error")]
            if failed:
                raise SystemExit(f"the service refused: {failed[0]}")
            leases = [
                (grant.lease, SYSTEM_TOKENS + int(size))
                for grant, size in zip(grants, sizes, strict=True)
            ]
            self.requests += len(grants)
            if per_s is not None:
                due += REQUESTS_PER_MESSAGE / per_s
                await asyncio.sleep(max(0.0, due - time.perf_counter()))
        goodbye = pb.OpBatch()
        goodbye.ops.add(id=1).detach.SetInParent()
        await call.write(goodbye)
        await call.read()
        await call.done_writing()

    async def run(self, seconds: float, per_s: float | None) -> float:
        """Run all lanes; give the requests a second."""
        self.latencies.clear()
        self.requests = 0
        start = time.perf_counter()
        share = None if per_s is None else per_s / LANES
        until = start + seconds
        await asyncio.gather(*(self.lane(n, until, share) for n in range(LANES)))
        return self.requests / (time.perf_counter() - start)

    async def snapshot(self) -> pb.SnapshotResponse:
        """Ask for the state."""
        rpc = unary.RPCS["snapshot"]
        method: Any = self.channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        answer: pb.SnapshotResponse = await method(pb.SnapshotRequest())
        return answer


@dataclass
class Verdict:
    """What a soak showed."""

    minutes: float
    full_per_s: float = 0.0
    per_s: list[float] = field(default_factory=list)
    p50_ms: list[float] = field(default_factory=list)
    p99_ms: list[float] = field(default_factory=list)
    private_mib: list[float] = field(default_factory=list)
    pauses: int = 0
    longest_pause_ms: float = 0.0
    leaked_blocks: int = 0
    left: str = ""

    def rows(self) -> list[tuple[str, str, str, bool]]:
        """Give what, found, wanted, and whether it holds."""
        third = max(1, len(self.p99_ms) // 3)
        early = statistics.median(self.p99_ms[:third])
        late = statistics.median(self.p99_ms[-third:])
        drift = self.private_mib[-1] / self.private_mib[0] - 1
        rate = statistics.median(self.per_s)
        half = self.full_per_s / 2
        return [
            (
                "rate",
                f"{rate:,.0f} requests/s = {OPS_PER_REQUEST * rate:,.0f} ops/s",
                f"half of {self.full_per_s:,.0f}, kept",
                rate > 0.9 * half,
            ),
            (
                "latency of a step, p99",
                f"{early:.2f} ms in the first third, {late:.2f} ms in the last",
                f"at most x {P99_RATIO:g}",
                late <= P99_RATIO * early,
            ),
            (
                "private memory",
                f"{self.private_mib[0]:.1f} MiB, {100 * drift:+.2f} % at the end",
                f"less than {100 * RSS_DRIFT:g} %",
                abs(drift) < RSS_DRIFT,
            ),
            (
                "pauses of the collector",
                f"{self.pauses} times, {self.longest_pause_ms:.2f} ms at most",
                f"less than {1000 * PAUSE_S:g} ms",
                self.longest_pause_ms < 1000 * PAUSE_S,
            ),
            (
                "leaked blocks",
                f"{self.leaked_blocks} {self.left}".strip(),
                "0",
                not self.leaked_blocks,
            ),
        ]


async def soak(minutes: float, folder: Path, process: subprocess.Popen[str]) -> Verdict:
    """Warm up, soak, and count."""
    verdict = Verdict(minutes)
    load = Load(f"unix:{folder}/sock")
    seconds = 60 * minutes
    say = sys.stderr.write
    rates = [await load.run(5.0, None)]
    while (await load.snapshot()).evicted < 3 * NUM_BLOCKS or len(rates) < 3:
        rates.append(await load.run(5.0, None))
    verdict.full_per_s = statistics.median(rates)
    say(f"full: {verdict.full_per_s:,.0f} requests/s; soaking at half of it\n")
    await load.run(min(60.0, seconds / 10), verdict.full_per_s / 2)  # settles at this rate
    begun = time.perf_counter()
    for number in range(WINDOWS):
        verdict.per_s.append(await load.run(seconds / WINDOWS, verdict.full_per_s / 2))
        cuts = statistics.quantiles(load.latencies, n=100)
        verdict.p50_ms.append(1000 * cuts[49])
        verdict.p99_ms.append(1000 * cuts[98])
        verdict.private_mib.append(_private_mib(process.pid))
        say(f"{number + 1} of {WINDOWS}: p99 {verdict.p99_ms[-1]:.2f} ms\n")
    now = await load.snapshot()
    lost = NUM_BLOCKS - now.free - now.evictable
    if lost or now.leases:
        verdict.leaked_blocks = lost
        verdict.left = f"({len(now.leases)} leases, {now.private} private)"
    await load.channel.close()
    notes = [line.split() for line in (folder / "pauses").read_text().splitlines()]
    pauses = [float(took) for took, _, at in notes if float(at) >= begun]  # one clock for both
    verdict.pauses = len(pauses)
    verdict.longest_pause_ms = 1000 * max(pauses, default=0.0)
    return verdict


def _private_mib(pid: int) -> float:
    """Memory that is the process' own: neither files nor what it shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) / 1024
    raise SystemExit("this system does not tell the memory of a process")


def table(verdict: Verdict) -> str:
    """Write the verdict for people."""
    rows = [("", "found", "wanted", "")]
    rows += [
        (what, found, wanted, "ok" if good else "FAILED")
        for what, found, wanted, good in verdict.rows()
    ]
    widths = [max(len(row[n]) for row in rows) for n in range(3)]
    lines = [
        "  ".join((*(cell.ljust(w) for cell, w in zip(row, widths, strict=False)), row[3])).rstrip()
        for row in rows
    ]
    return "\n".join(lines)


def measure(options: argparse.Namespace) -> int:
    """Soak; 1 if anything does not hold."""
    folder = Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm"))
    try:
        with started(folder) as process:
            verdict = asyncio.run(soak(options.minutes, folder, process))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    text = table(verdict)
    print(text)
    if options.json:
        options.json.write_text(json_text(provenance() | vars(verdict), indent=2) + "\n")
    if options.publish:
        publish(DOCUMENT, "soak", f"$ make soak   # {options.minutes:g} minutes\n{text}")
    return 0 if all(good for *_, good in verdict.rows()) else 1


def main(argv: list[str] | None = None) -> int:
    """Soak; 1 if anything does not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.soak", description=__doc__
    )
    minutes = float(os.environ.get("SOAK_MINUTES", "30"))
    parser.add_argument("--minutes", type=float, default=minutes)
    parser.add_argument("--json", type=Path, help="write the numbers to this file")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.serve:
        folder = options.serve
        serve(f"unix:{folder}/sock", folder / "state", folder / "pauses")
        return 0
    with ending_in_order():
        return measure(options)


if __name__ == "__main__":
    raise SystemExit(main())
