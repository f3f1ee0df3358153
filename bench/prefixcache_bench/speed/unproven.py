"""Somebody who proves nothing asks as fast as he can: what is left for who has proven himself?

```
process 1   look-ups with a token over TCP, 5 ms between them; now and then a new client
process 2   64 connections, each as hostile as HTTP allows: to another service ── to the first
```
The goal is that of `neighbour`: nothing takes more than 50 ms, and the p99 is at most three times
that beside another service that is flooded in the same way: both share this machine's cores with
whoever floods, and that is not the service's doing.

    python -m prefixcache_bench.speed.unproven [--seconds 3] [--json FILE] [--publish]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter, sleep

import prefixcache
from prefixcache.config import parse_layout
from prefixcache.errors import CacheError
from prefixcache.plain_json import json_text
from prefixcache.types import Namespace, pack
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.speed.served import served

TOKEN = "a-token-of-the-benchmark"  # noqa: S105 - opens what this file has started
IDENTITIES = """
[[identity]]
name = "worker"
tenant = "acme"
token_sha256 = ["{digest}"]
"""
LAYOUT = "1x1x1:bfloat16"
MEMORY = "4MiB"
DOCUMENT = Path("docs/reliability.md")
GOAL_MS, GOAL_RATIO = 50.0, 3.0
CONNECTIONS = 64
HERE = Namespace("m")
BLOCK = 16

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
LOOKUP, CHECK = "/prefixcache.v1.PrefixCache/Lookup", "/grpc.health.v1.Health/Check"
EMPTY_MESSAGE = bytes(5)


def header(name: str, value: str) -> bytes:
    """Write a header field for HTTP/2: literal, not indexed (RFC 7541, 6.2.2)."""
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """Write a frame of HTTP/2."""
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def calls(path: str, count: int, first: int = 1) -> bytes:
    """Write so many calls without proof, each with an empty message."""
    fields = b"".join(
        header(name, value)
        for name, value in (
            (":method", "POST"),
            (":scheme", "http"),
            (":path", path),
            (":authority", "x"),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
        )
    )
    streams = range(first, first + 2 * count, 2)
    return b"".join(frame(1, 4, one, fields) + frame(0, 1, one, EMPTY_MESSAGE) for one in streams)


@dataclass(frozen=True, slots=True)
class Flood:
    """What each of the connections sends, again and again.

    Attributes:
        said: What it is, in words.
        opening: Sent once.
        path: Of the calls that are sent then; none: only connections are made.
        count: Calls at a time.
        rounds: How often, until a new connection is made.
        is_web: Whether the page is asked, not gRPC.
    """

    said: str
    opening: bytes = PREFACE
    path: str = ""
    count: int = 0
    rounds: int = 1
    is_web: bool = False


GET = b"GET /metrics HTTP/1.1\r\nhost: 127.0.0.1:%d\r\n\r\n"
FLOODS = {
    "kept": Flood("calls, connections kept", path=LOOKUP, count=16, rounds=1 << 20),
    "many": Flood("1,000 calls each connection", path=LOOKUP, count=1000),
    "one": Flood("one call each connection", path=LOOKUP, count=1),
    "health": Flood("health checks", path=CHECK, count=16, rounds=1 << 20),
    "healths": Flood("1,000 health checks each connection", path=CHECK, count=1000),
    "bare": Flood("connections alone", opening=b""),
    "metrics": Flood("metrics, connections kept", b"", rounds=1 << 20, count=1, is_web=True),
    "pages": Flood("metrics, a connection each", b"", count=1, is_web=True),
    "knocks": Flood("connections to the page", b"", is_web=True),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One flood.  Times in ms: min, median, p99, max."""

    flood: str
    idle: tuple[float, float, float, float]
    beside: tuple[float, float, float, float]
    under: tuple[float, float, float, float]
    new_ms: float
    """Until a new client of who can prove himself had its first answer meanwhile."""
    num_failed: int
    """Look-ups that were not answered."""
    a_second: float
    """Connections that the flood made."""

    @property
    def verdict(self) -> str:
        """Whether the goal is met."""
        if self.num_failed:
            return "missed"
        if self.under[3] <= GOAL_MS and self.under[2] <= GOAL_RATIO * self.idle[2]:
            return "met"
        return "by machine" if self.under[2] <= GOAL_RATIO * self.beside[2] else "missed"


async def flood(kind: Flood, host: str, port: int, seconds: float) -> int:
    """Do it for so long; give how many connections were made."""
    ends = perf_counter() + seconds
    made = 0
    get = GET % port

    async def one() -> None:
        nonlocal made
        while perf_counter() < ends:
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout_at(asyncio.get_running_loop().time() + 2):
                    reader, writer = await asyncio.open_connection(host, port)
                made += 1
                try:
                    async with asyncio.timeout(max(0.1, ends - perf_counter())):
                        await talk(reader, writer)
                finally:
                    writer.transport.abort()

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(kind.opening)
        stream = 1
        for _ in range(kind.rounds if kind.count else 0):
            writer.write(get if kind.is_web else calls(kind.path, kind.count, stream))
            stream += 2 * kind.count
            await writer.drain()
            if not await reader.read(1 << 16):
                return

    await asyncio.gather(*(one() for _ in range(CONNECTIONS)))
    return made


def probe(target: str) -> None:
    """Look up until the input ends; print what each took, in ms, and what a new client did."""
    took, new, failed = [], [], []
    tokens = pack(range(BLOCK))
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    def come() -> None:
        while not ended.wait(0.5):
            began = perf_counter()
            try:
                with prefixcache.connect(target, token=TOKEN, timeout_s=60.0) as client:
                    client.lookup(HERE, tokens)
            except CacheError as error:
                failed.append(str(error))
            new.append(1e3 * (perf_counter() - began))

    with prefixcache.connect(target, token=TOKEN, timeout_s=60.0) as client:
        client.lookup(HERE, tokens)
        print("ready", flush=True)
        threading.Thread(target=wait, daemon=True).start()
        newcomer = threading.Thread(target=come)
        newcomer.start()
        while not ended.wait(0.005):
            began = perf_counter()
            try:
                client.lookup(HERE, tokens)
            except CacheError as error:
                failed.append(str(error))
            took.append(1e3 * (perf_counter() - began))
        newcomer.join()
    print(json_text([took, new, failed]))


@contextlib.contextmanager
def probed(target: str, seen: list[tuple[list[float], list[float], list[str]]]) -> Iterator[None]:
    """Have another process look up meanwhile."""
    command = [sys.executable, "-m", "prefixcache_bench.speed.unproven", "--probe", target]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()
        yield
        took, new, failed = json.loads(process.communicate()[0])
        seen.append((sorted(took), sorted(new), failed))


@contextlib.contextmanager
def prepared() -> Iterator[tuple[str, int, int]]:
    """Start a service with identities, at TCP and with a page; give its address and the ports."""
    with tempfile.TemporaryDirectory(prefix="prefixcache-") as folder, socket.socket() as free:
        path = Path(folder) / "identities.toml"
        path.write_text(IDENTITIES.format(digest=sha256(TOKEN.encode()).hexdigest()))
        path.chmod(0o600)
        free.bind(("127.0.0.1", 0))
        page = int(free.getsockname()[1])
        free.close()
        flags = ("--memory", MEMORY, "--identities", str(path), "--http", f"127.0.0.1:{page}")
        with served(*flags, layout=LAYOUT, at="127.0.0.1:0") as (target, _):
            with prefixcache.connect(target, token=TOKEN, timeout_s=60.0) as client:
                client.attach("m", parse_layout(LAYOUT)).close()
            yield target, int(target.rpartition(":")[2]), page


def measure(name: str, seconds: float) -> Row:
    """Measure look-ups alone, beside another service that is flooded, and beside the flood."""
    seen: list[tuple[list[float], list[float], list[str]]] = []
    made = 0
    with prepared() as (target, *ports), prepared() as (_, *elsewhere):
        is_web = FLOODS[name].is_web
        with probed(target, seen):
            sleep(seconds)
        for each in (elsewhere, ports):
            command = [sys.executable, "-m", "prefixcache_bench.speed.unproven", "--flood", name]
            command += ["--port", str(each[is_web]), "--seconds", str(seconds)]
            with probed(target, seen):
                made = int(subprocess.check_output(command))
    (idle, *_), (beside, *_), (under, new, failed) = seen
    return Row(
        FLOODS[name].said,
        figures(idle),
        figures(beside),
        figures(under),
        max(new, default=float("inf")),
        len(failed),
        made / seconds,
    )


def figures(times: list[float]) -> tuple[float, float, float, float]:
    """Give min, median, p99, max of what is in order."""
    last = len(times) - 1
    return times[0], times[last // 2], times[round(last * 0.99)], times[last]


def table(rows: list[Row]) -> str:
    """Write the rows."""
    lines = [
        f"{'min, median, p99, max in ms':<36}{'idle':^28}  {'beside another':^28}  "
        f"{'meanwhile':^28}  p99 to idle, beside   a new one  failed  connections/s  goal"
    ]
    for row in rows:
        idle, beside, under = (
            "".join(f"{one:>7.1f}" for one in each) for each in (row.idle, row.beside, row.under)
        )
        ratios = f"x {row.under[2] / row.idle[2]:>5.1f}  x {row.under[2] / row.beside[2]:>5.1f}"
        lines.append(
            f"{row.flood:<36}{idle}  {beside}  {under}  {ratios:<20}"
            f"{row.new_ms:>8.0f} ms{row.num_failed:>8}{row.a_second:>13,.0f}    {row.verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Measure, print, and publish if asked to."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.speed.unproven", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="of each measurement")
    parser.add_argument("--only", nargs="*", choices=FLOODS, default=list(FLOODS), help="of these")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    parser.add_argument("--publish", action="store_true", help=f"put the table into {DOCUMENT}")
    parser.add_argument("--probe", metavar="TARGET", help=argparse.SUPPRESS)
    parser.add_argument("--flood", choices=FLOODS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.probe:
        probe(options.probe)
        return
    if options.flood:
        work = flood(FLOODS[options.flood], "127.0.0.1", options.port, options.seconds)
        print(asyncio.run(work))
        return
    rows = []
    for number, name in enumerate(options.only):
        rows.append(measure(name, options.seconds))
        lines = table(rows).splitlines()
        print(*(lines[-1:] if number else lines), sep="\n", flush=True)
    if options.json:
        options.json.write_text(json_text([asdict(row) for row in rows], indent=2))
    if options.publish:
        text = f"$ python -m prefixcache_bench.speed.unproven\n{table(rows)}"
        publish(DOCUMENT, "unproven", text)


if __name__ == "__main__":
    main()
