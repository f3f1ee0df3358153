"""What observing costs the service: shadow caches, watchers and counting, on the path of an op.

```
plain       the service's handlers, as `prefixcache serve` runs them
shadows     the same with two shadow caches beside it, in their own process
watched     the same with a watcher that hashes every block
```
All live in this process, with real messages but no network, and take turns batch by batch, so that
noise hits them alike.  What counts is CPU time of the event loop's thread; that of the thread which
writes the tape is shown beside it, and added.  The shadows' own process does not count.  A batch is
16 times acquire of a stored prompt of 4,096 tokens plus 37 new ones, commit, release.  With the
network each would take longer, and the ratios would be smaller.

    python -m prefixcache_bench.speed.recording [--quick]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import time
from dataclasses import dataclass, field
from typing import Any

from prefixcache.client import codec
from prefixcache.config import ServeSettings, load
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc.session import SessionStream
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe.latency import SUM, clock, empty_row
from prefixcache.service.workers import Workers
from prefixcache.types import Layout, Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.speed.signals import ending_in_order

LAYOUT = Layout(1, 1, 4, "float32")
PROMPT_TOKENS, NEW_TOKENS = 4096, 37
PAIRS, NUM_PROMPTS = 16, 32
SHADOWS = ["policy=slru,block_size=32", "memory=64MiB"]


@dataclass
class Subject:
    """One service without a network, and the CPU times of its batches."""

    name: str
    stream: SessionStream
    handlers: Handlers
    cpu_us: list[float] = field(default_factory=list)
    beside_us: float = 0.0
    """Of another thread, per pair."""


async def subject(name: str, **given: Any) -> Subject:
    """Make a service that holds nothing yet, and attach a worker."""
    settings: ServeSettings = load(
        {"memory": 32 * 2**20, "layout": LAYOUT, "pool": "none", "log_level": "error"} | given
    )
    backing = Backing(settings)
    deliveries = Deliveries(backing)
    handlers = Handlers(settings, backing, deliveries, Workers(backing, deliveries, settings))
    stream = SessionStream(handlers, None, LOCAL)
    batch = pb.OpBatch()
    request = batch.ops.add(id=1).attach
    codec.write_namespace(Namespace("model"), request.namespace)
    codec.write_layout(LAYOUT, request.layout)
    answer = (await stream.answer(batch, _task())).results[0]
    assert answer.HasField("attach"), answer
    return Subject(name, stream, handlers)


async def run_batch(one: Subject, prompts: list[bytes], draw: random.Random) -> float:
    """Run 16 pairs; give CPU seconds of this thread."""
    asks = pb.OpBatch()
    for number in range(PAIRS):
        op = asks.ops.add(id=number)
        op.acquire.tokens = draw.choice(prompts) + draw.randbytes(4 * NEW_TOKENS)
    asked = asks.SerializeToString()
    began = time.thread_time()
    granted = await one.stream.answer(pb.OpBatch.FromString(asked), _task())
    answered = pb.OpResults.FromString(granted.SerializeToString())
    spent = time.thread_time() - began
    ends = pb.OpBatch()
    for result in answered.results:
        lease = result.acquire.grant.lease
        assert lease, result
        commit = ends.ops.add(id=lease).commit
        commit.lease, commit.num_tokens = lease, PROMPT_TOKENS + NEW_TOKENS
        ends.ops.add(id=lease).release.lease = lease
    ended = ends.SerializeToString()
    began = time.thread_time()
    (await one.stream.answer(pb.OpBatch.FromString(ended), _task())).SerializeToString()
    return spent + time.thread_time() - began


async def measure(rounds: int) -> list[Subject]:
    """Let all subjects take turns."""
    plain, shadowed, watched = (
        await subject("plain"),
        await subject("shadows", shadow=SHADOWS),
        await subject("watched"),
    )
    assert shadowed.handlers.shadows is not None
    shadowed.handlers.shadows.begin()
    subjects = [plain, shadowed, watched]
    watching = asyncio.create_task(_watch(watched.handlers))
    draw = random.Random(1)
    prompts = [
        pack([draw.randrange(50_000) for _ in range(PROMPT_TOKENS)]) for _ in range(NUM_PROMPTS)
    ]
    for round_ in range(-rounds // 10, rounds):
        shift = round_ % len(subjects)
        for one in subjects[shift:] + subjects[:shift]:
            spent = await run_batch(one, prompts, random.Random(round_))
            began = time.thread_time()  # what the loop does afterwards is its part too
            await asyncio.sleep(0.012 if one is watched else 0)
            spent += time.thread_time() - began
            if round_ >= 0:
                one.cpu_us.append(spent * 1e6 / PAIRS)
            elif round_ == -1:
                tape_s = shadowed.handlers.shadows.writing_s
    tape_s = shadowed.handlers.shadows.writing_s - tape_s
    shadowed.beside_us = tape_s * 1e6 / (rounds * PAIRS)
    watching.cancel()
    shadowed.handlers.shadows.close()
    for one in subjects:
        one.handlers.events.close()
        one.handlers.workers.close()
        one.handlers.deliveries.close()
    return subjects


def _task() -> asyncio.Task[None]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def _watch(handlers: Handlers) -> None:
    with handlers.events.watching():
        async for _ in handlers.events.batches(0):
            pass


def count_cost_ns(rounds: int = 200_000) -> float:
    """Give what counting one op takes: two reads of the clock less one, and two additions."""
    row, rows = empty_row(), {"acquire": empty_row()}
    began, last = time.thread_time_ns(), clock()
    for _ in range(rounds):
        now = clock()
        row = rows.get("acquire", row)
        row[(now - last).bit_length()] += 1
        row[SUM] += now - last
        last = now
    whole = time.thread_time_ns() - began
    began = time.thread_time_ns()
    for _ in range(rounds):
        pass
    return (whole - (time.thread_time_ns() - began)) / rounds


def main(argv: list[str] | None = None) -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.recording")
    parser.add_argument("--quick", action="store_true", help="a tenth of the rounds")
    options = parser.parse_args(argv)
    rounds = 150 if options.quick else 1500
    subjects = asyncio.run(measure(rounds))
    base = subjects[0].cpu_us
    plain_us = statistics.median(base)
    print(f"CPU of the service's process per pair, {rounds} batches of {PAIRS}, in turns")
    print(f"{'':10} {'loop µs':>10} {'ratio':>8} {'thread µs':>10} {'with it':>8}")
    for one in subjects:
        ratio = statistics.median(mine / its for mine, its in zip(one.cpu_us, base, strict=True))
        print(
            f"{one.name:10} {statistics.median(one.cpu_us):10.1f} {ratio:8.3f} "
            f"{one.beside_us:10.2f} {ratio + one.beside_us / plain_us:8.3f}"
        )
    print(f"counting one op: {count_cost_ns():.0f} ns")
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
