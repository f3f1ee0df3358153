"""Somebody who proves nothing asks as fast as he can: what is left for who has proven himself?

```
process 1   look-ups with a token over TCP, 5 ms between them; now and then a new client
process 2   64 connections, each as hostile as HTTP allows: to another service ── to the first
```
The goal is that of `beside`; both services share this machine's cores with whoever floods, and that
is not the service's doing.

    python -m prefixcache_bench.speed.unproven [--seconds 3] [--only FLOOD …] [--publish]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter, sleep

import prefixcache
from prefixcache.config import parse_layout
from prefixcache_bench.speed.beside import (
    LAYOUT,
    MEMORY,
    Row,
    Seen,
    options_of,
    probed,
    report,
)
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import ending_in_order

TOKEN = "a-token-of-the-benchmark"  # noqa: S105 - opens what this file has started
IDENTITIES = """
[[identity]]
name = "worker"
tenant = "acme"
token_sha256 = ["{digest}"]
"""
CONNECTIONS = 64

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
class FloodRow(Row):
    """One flood."""

    new_ms: float
    """Until a new client of who can prove himself had its first answer meanwhile."""
    a_second: float
    """Connections that the flood made."""

    def more(self) -> str:
        """Give what else the table says of this row."""
        return f"{self.new_ms:>10.0f} ms{self.num_failed:>8}{self.a_second:>15,.0f}"


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


def measure(name: str, seconds: float) -> FloodRow:
    """Measure look-ups alone, beside another service that is flooded, and beside the flood."""
    seen: list[Seen] = []
    made = 0
    with prepared() as (target, *ports), prepared() as (_, *elsewhere):
        is_web = FLOODS[name].is_web
        with probed(target, seen, TOKEN):
            sleep(seconds)
        for each in (elsewhere, ports):
            command = [sys.executable, "-m", "prefixcache_bench.speed.unproven", "--flood", name]
            command += ["--port", str(each[is_web]), "--seconds", str(seconds)]
            with probed(target, seen, TOKEN):
                made = int(subprocess.check_output(command))
    idle, beside, under = seen
    return FloodRow(
        FLOODS[name].said,
        *(idle.times, beside.times, under.times),
        num_failed=under.num_failed,
        new_ms=under.new_ms,
        a_second=made / seconds,
    )


def main() -> None:
    """Measure, print, and publish if asked to."""
    parser = options_of("unproven", __doc__, FLOODS)
    parser.add_argument("--flood", choices=FLOODS, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.flood:
        work = flood(FLOODS[options.flood], "127.0.0.1", options.port, options.seconds)
        print(asyncio.run(work))
        return
    report("unproven", options, measure, "    a new one  failed  connections/s")


if __name__ == "__main__":
    with ending_in_order():
        main()
