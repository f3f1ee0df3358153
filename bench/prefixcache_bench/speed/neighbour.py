"""One client does the largest things that it may: how long do another's look-ups take meanwhile?

Each case has services of its own, and is set up at two of them; the goal is that of `beside`.

    python -m prefixcache_bench.speed.neighbour [--seconds 3] [--only CASE …] [--publish]
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from queue import SimpleQueue
from random import Random
from time import perf_counter, sleep
from typing import Any

import grpc

import prefixcache
from prefixcache.client import Client, codec
from prefixcache.client.unary import CHANNEL_OPTIONS, SESSION_PATH
from prefixcache.config import parse_layout
from prefixcache.errors import PoolExhausted
from prefixcache.types import Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_bench.speed.beside import (
    BLOCK,
    HERE,
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

Load = Callable[[], object]


@dataclass(frozen=True, slots=True)
class CaseRow(Row):
    """One case."""

    loads: int
    """How often it was done."""


def many_leases(client: Client, draw: Random) -> Load:
    """Hold 60,000 leases; ask for snapshots, and for more than there is."""
    session = client.attach("m", parse_layout(LAYOUT), keep_alive=False)
    lease = session.acquire(tokens_of(draw, BLOCK))
    lease.commit(BLOCK)
    held = [lease.fork(1000) for _ in range(60)]
    filler = session.acquire(tokens_of(draw, 65_000 * BLOCK))
    refused = tokens_of(draw, 1000 * BLOCK)

    def load() -> object:
        client.snapshot()
        with contextlib.suppress(PoolExhausted):
            session.acquire(refused)
        return held, filler

    return load


def many_namespaces(client: Client, draw: Random) -> Load:
    """Have 16,128 namespaces, with a block and a lease in each; ask for snapshots."""
    streams = [many_attached(client, str(number), stores=True) for number in range(63)]
    return lambda: (client.snapshot(), streams, draw)


def many_attached(client: Client, salt: str, *, stores: bool = False) -> Any:
    """Open a session with 256 namespaces; store a block in each, if wanted."""
    attaches, acquires, commits = pb.OpBatch(), pb.OpBatch(), pb.OpBatch()
    for number in range(256):
        attach = attaches.ops.add(id=number + 1).attach
        codec.write_namespace(Namespace(f"m{number}", salt=salt), attach.namespace)
        codec.write_layout(parse_layout(LAYOUT), attach.layout)
        acquires.ops.add(id=number + 257).acquire.CopyFrom(
            pb.AcquireRequest(namespace_index=number, tokens=pack(range(BLOCK)))
        )
    channel = grpc.insecure_channel(f"unix:{client.address.path}", CHANNEL_OPTIONS)
    stream: Any = channel.stream_stream(
        SESSION_PATH, pb.OpBatch.SerializeToString, pb.OpResults.FromString
    )
    batches: SimpleQueue[pb.OpBatch] = SimpleQueue()
    call = stream(iter(batches.get, None))

    def ask(batch: pb.OpBatch) -> list[Any]:
        batches.put(batch)
        results: list[Any] = []
        while len(results) < len(batch.ops):
            results.extend(next(call).results)
        assert not any(one.HasField("error") for one in results)
        return results

    ask(attaches)
    if not stores:
        return channel, call, batches
    for one in ask(acquires):
        lease = one.acquire.grant.lease
        commits.ops.add(id=one.id + 512).commit.CopyFrom(
            pb.CommitRequest(lease=lease, num_tokens=BLOCK)
        )
    ask(commits)
    return channel, call, batches


def watched_resets(client: Client, draw: Random) -> Load:
    """Have 64,000 blocks watched; reset an empty namespace 500 times."""
    session = client.attach("m", parse_layout(LAYOUT))
    for _ in range(32):
        store(session, tokens_of(draw, 2000 * BLOCK))
    watch = client.watch()
    threading.Thread(target=lambda: drain(watch), daemon=True).start()
    sleep(2)
    empty = client.attach("m", parse_layout(LAYOUT), salt="empty")
    return lambda: [empty.reset() for _ in range(500)]


def many_branches(client: Client, draw: Random) -> Load:
    """Store 20,000 branches; ask for all of them."""
    branches(client, draw)
    return lambda: client.outline(max_branches=20_000)


def checked(client: Client, draw: Random) -> Load:
    """Store 20,000 branches, with 5,000 leases; have every invariant checked."""
    branches(client, draw)
    session = client.attach("m", parse_layout(LAYOUT), keep_alive=False)
    held = []
    for _ in range(20):
        with session.batch() as batch:
            held += [batch.acquire(tokens_of(draw, BLOCK)) for _ in range(250)]
    return lambda: (client.check(), held)


def first_watch(client: Client, draw: Random) -> Load:
    """Store 20,000 branches; the first watcher comes."""
    branches(client, draw)
    threads: list[threading.Thread] = []

    def load() -> object:
        if not threads:
            watch = client.watch()
            threads.append(threading.Thread(target=lambda: drain(watch), daemon=True))
            threads[0].start()
        sleep(0.1)
        return threads

    return load


def long_prompt(client: Client, draw: Random) -> Load:
    """Look up, explain, acquire and release a prompt of a million tokens."""
    session = client.attach("m", parse_layout(LAYOUT))
    tokens = tokens_of(draw, 1_000_000)
    store(session, tokens)

    def load() -> object:
        client.lookup(HERE, tokens)
        client.explain(HERE, tokens)
        session.acquire(tokens).release()
        return None

    return load


def vast_requests(client: Client, draw: Random) -> Load:
    """Fill the cache with 60,000 prompts of one block each; ask for nearly all blocks at once."""
    for _ in range(3):
        branches(client, draw)
    session = client.attach("m", parse_layout(LAYOUT))

    def load() -> object:
        session.acquire(tokens_of(draw, 62_500 * BLOCK)).release()
        branches(client, draw)
        return None

    return load


def late_watchers(client: Client, draw: Random) -> Load:
    """Have 64,000 blocks in 20,000 branches watched; one watcher after the other comes late."""
    branches(client, draw)
    session = client.attach("m", parse_layout(LAYOUT))
    for _ in range(22):
        store(session, tokens_of(draw, 2000 * BLOCK))
    first = client.watch()
    threading.Thread(target=lambda: drain(first), daemon=True).start()
    sleep(2)

    def load() -> object:
        told = 0
        for message in client.watch():
            told += sum(len(event.stored.block_hashes) for event in message.events)
            if told >= 64_000:
                break
        return first

    return load


def longest_explained(client: Client, draw: Random) -> Load:
    """Explain a prompt of 4,000,000 tokens, as long as a message may be; a fourth is stored."""
    session = client.attach("m", parse_layout(LAYOUT))
    tokens = tokens_of(draw, 4_000_000)
    store(session, tokens[:4_000_000])
    return lambda: client.explain(HERE, tokens)


def many_leases_left(client: Client, draw: Random) -> Load:
    """Have a second client that holds 60,000 leases; it leaves, without a word."""
    leaver = prefixcache.connect(f"unix:{client.address.path}", timeout_s=60.0)
    session = leaver.attach("m", parse_layout(LAYOUT), keep_alive=False)
    lease = session.acquire(tokens_of(draw, BLOCK))
    lease.commit(BLOCK)
    held = [lease.fork(1000) for _ in range(60)]

    def load() -> object:
        leaver.close()
        sleep(0.1)
        return held

    return load


def many_in_line(client: Client, draw: Random) -> Load:
    """Have 4,000 requests of 250 namespaces wait for room, under a quota; give back one block."""
    session = client.attach("m", parse_layout(LAYOUT))
    client.set_quota("", max_held=65_536)
    small = [session.acquire(tokens_of(draw, BLOCK)) for _ in range(500)]
    filler = session.acquire(tokens_of(draw, 60_000 * BLOCK))
    waiting = [many_attached(client, str(number)) for number in range(16)]
    for _, _, batches in waiting:
        batches.put(waiting_calls(draw))

    def load() -> object:
        if small:
            small.pop().release()
        sleep(0.01)
        return filler, waiting

    return load


def waiting_calls(draw: Random) -> pb.OpBatch:
    """Let a request wait for 1,000 blocks in each of 250 namespaces."""
    batch = pb.OpBatch()
    for number in range(250):
        acquire = batch.ops.add(id=1000 + number).acquire
        acquire.namespace_index = number
        acquire.tokens, acquire.reserve = tokens_of(draw, BLOCK), 999 * BLOCK
        acquire.wait_s = 600.0
    return batch


CASES: dict[str, Callable[[Client, Random], Load]] = {
    "60,000 leases, snapshots and refusals": many_leases,
    "16,128 namespaces, snapshots": many_namespaces,
    "64,000 blocks watched, resets": watched_resets,
    "trees of 20,000 branches": many_branches,
    "check of 20,000 runs, 5,000 leases": checked,
    "first watch of 20,000 branches": first_watch,
    "late watchers of 64,000 blocks": late_watchers,
    "prompts of 1,000,000 tokens": long_prompt,
    "62,500 blocks asked for, evicted": vast_requests,
    "explain of 4,000,000 tokens": longest_explained,
    "60,000 leases left at once": many_leases_left,
    "4,000 in line, a quota, releases": many_in_line,
}


def tokens_of(draw: Random, count: int) -> bytes:
    """Draw a prompt."""
    first = draw.randrange(1 << 30)
    return pack(range(first, first + count))


def store(session: Any, tokens: bytes) -> None:
    """Commit a prompt."""
    with session.acquire(tokens) as lease:
        lease.commit(len(tokens) // 4)


def branches(client: Client, draw: Random) -> None:
    """Store 20,000 prompts of one block each."""
    session = client.attach("m", parse_layout(LAYOUT))
    for _ in range(20_000 // 250):
        with session.batch() as batch:
            replies = [batch.acquire(tokens_of(draw, BLOCK)) for _ in range(250)]
        with session.batch() as batch:
            for reply in replies:
                batch.commit(reply.result(), BLOCK)
        with session.batch() as batch:
            for reply in replies:
                batch.release(reply.result())


def drain(watch: Any) -> None:
    """Read until the service ends."""
    with contextlib.suppress(Exception):
        for _ in watch:
            pass


def measure(case: str, seconds: float) -> CaseRow:
    """Set a case up twice; measure look-ups alone, beside the other one, and with it."""
    seen: list[Seen] = []
    with prepared(case) as (target, load), prepared(case) as (_, elsewhere):
        sleep(1)
        with probed(target, seen):
            sleep(seconds)
        with probed(target, seen):
            repeat(elsewhere, seconds)
        with probed(target, seen):
            loads = repeat(load, seconds)
    idle, beside, under = seen
    return CaseRow(case, idle.times, beside.times, under.times, under.num_failed, loads)


@contextlib.contextmanager
def prepared(case: str) -> Iterator[tuple[str, Load]]:
    """Start a service, and set a case up there."""
    with (
        served("--memory", MEMORY, "--ttl", "3600", layout=LAYOUT) as (target, _),
        prefixcache.connect(target, timeout_s=60.0) as client,
    ):
        client.attach("m", parse_layout(LAYOUT)).close()
        yield target, CASES[case](client, Random(len(case)))


def repeat(load: Load, seconds: float) -> int:
    """Do it for so long; say how often that was."""
    loads, ends = 0, perf_counter() + seconds
    while perf_counter() < ends:
        load()
        loads += 1
    return loads


def main() -> None:
    """Measure, print, and publish if asked to."""
    report("neighbour", options_of("neighbour", __doc__, CASES).parse_args(), measure)


if __name__ == "__main__":
    with ending_in_order():
        main()
