"""A crowd: idle streams, leases without end, readers that do not read.  Does it hurt the others?

```
one busy worker, alone                      p50, p99 of acquire + commit + release
the same, beside --streams idle sessions, --leases leases, --slow sessions that never read
memory of the service before, at the peak, and after all have left
```

    python -m prefixcache_bench.speed.crowd [--streams 1000] [--leases 10000] [--slow 20]
                                            [--json FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import quantiles
from time import perf_counter
from typing import Any

import grpc
import psutil

from prefixcache.client import AsyncClient, AsyncSession, codec, connect_async
from prefixcache.client.unary import CHANNEL_OPTIONS, SESSION_PATH
from prefixcache.config import parse_layout
from prefixcache.plain_json import json_text
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = "1x1x4:float32"
_FLOOD_OPS = 512
_FLOOD_BATCHES = 400


@dataclass(frozen=True, slots=True)
class Figures:
    """What was seen.  Times in ms, memory in MiB."""

    streams: int
    leases: int
    slow: int
    p50_alone: float
    p99_alone: float
    p50_beside: float
    p99_beside: float
    mib_before: float
    mib_peak: float
    mib_after: float
    leases_left: int
    blocks_lost: int


async def busy(session: AsyncSession, rounds: int, salt: int) -> tuple[float, float]:
    """Work as a worker does; give p50 and p99 of a whole turn in ms."""
    took = []
    for number in range(rounds):
        tokens = pack([salt, number, *range(30)])
        began = perf_counter()
        async with await session.acquire(tokens) as lease:
            await lease.commit(32)
        took.append(1e3 * (perf_counter() - began))
    cuts = quantiles(took, n=100)
    return cuts[49], cuts[98]


def flood(target: str) -> tuple[grpc.Channel, Any]:
    """Open a session that asks for large answers as fast as it can, and never reads one."""
    attach = pb.OpBatch()
    first = attach.ops.add(id=1)
    codec.write_namespace(Namespace("flood"), first.attach.namespace)
    codec.write_layout(parse_layout(LAYOUT), first.attach.layout)
    step = pb.OpBatch()
    for number in range(_FLOOD_OPS):
        step.ops.add(id=number + 2).explain.tokens = pack(range(64))
    channel = grpc.insecure_channel(target, CHANNEL_OPTIONS)
    call: Any = channel.stream_stream(SESSION_PATH, pb.OpBatch.SerializeToString, None)
    return channel, call(itertools.chain((attach,), itertools.repeat(step, _FLOOD_BATCHES)))


async def measure(streams: int, leases: int, slow: int, rounds: int) -> Figures:
    """Run everything."""
    layout = parse_layout(LAYOUT)
    memory = str((leases + 4096) * 16 * layout.token_bytes)
    flags = ("--memory", memory, "--max-workers", str(streams + slow + 64), "--ttl", "3600")
    with served(*flags, layout=LAYOUT) as (target, pid):
        process = psutil.Process(pid)

        def mib() -> float:
            return float(process.memory_info().rss) / 2**20

        clients = [await connect_async(target) for _ in range(-(-streams // 100) + 1)]
        front = clients[0]
        worker = await front.attach("busy", layout)
        alone = await busy(worker, rounds, 1)
        before = mib()
        crowd = await _fill(clients[1:], streams)
        for start in range(0, leases, 256):
            session = crowd[start // 256 % len(crowd)]
            async with session.batch() as batch:
                for number in range(start, min(start + 256, leases)):
                    batch.acquire(pack([number, 1, 2]))
        floods = [flood(target) for _ in range(slow)]
        await asyncio.sleep(0.5)
        beside = await busy(worker, rounds, 2)
        held = (await front.snapshot()).num_leases
        peak = mib()
        for channel, call in floods:
            call.cancel()
            channel.close()
        for client in clients[1:]:
            await client.close()
        await asyncio.sleep(0.5)
        left = await front.snapshot()
        after = mib()
        await front.close()
        assert held >= leases, f"{held} leases were granted"
    return Figures(
        streams,
        leases,
        slow,
        *alone,
        *beside,
        before,
        peak,
        after,
        left.num_leases,
        left.num_blocks - left.free - left.evictable,
    )


async def _fill(clients: list[AsyncClient], streams: int) -> list[AsyncSession]:
    layout = parse_layout(LAYOUT)
    sessions: list[AsyncSession] = []
    for number in range(streams):
        client = clients[number % len(clients)]
        sessions.append(await client.attach("idle", layout, keep_alive=False))
    return sessions


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="prefixcache_bench.speed.crowd", description=__doc__, allow_abbrev=False
    )
    parser.add_argument("--streams", type=int, default=1000, help="idle sessions")
    parser.add_argument("--leases", type=int, default=10_000, help="leases they hold")
    parser.add_argument("--slow", type=int, default=20, help="sessions that never read")
    parser.add_argument("--rounds", type=int, default=400, help="turns of the busy worker")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    options = parser.parse_args()
    seen = asyncio.run(measure(options.streams, options.leases, options.slow, options.rounds))
    print(
        f"{seen.streams:,} idle streams, {seen.leases:,} leases, {seen.slow} that never read\n"
        f"  a busy worker's turn   alone {seen.p50_alone:.2f} ms (p99 {seen.p99_alone:.2f})   "
        f"beside them {seen.p50_beside:.2f} ms (p99 {seen.p99_beside:.2f})\n"
        f"  memory of the service  {seen.mib_before:.0f} MiB → {seen.mib_peak:.0f} MiB → "
        f"{seen.mib_after:.0f} MiB after they left\n"
        f"  left behind            {seen.leases_left} leases, {seen.blocks_lost} blocks"
    )
    if options.json:
        options.json.write_text(json_text(asdict(seen), indent=2))


if __name__ == "__main__":
    with ending_in_order():
        main()
