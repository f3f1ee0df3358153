"""Events: replayed, they give the index; resumed, nothing is missed; and who may read tokens."""

from __future__ import annotations

import asyncio
import json
import random
import re
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import connect_async
from prefixcache.config import load
from prefixcache.core import kv_events
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, PoolExhausted, ServiceUnavailable
from prefixcache.service import turns
from prefixcache.service.backing import Backing
from prefixcache.service.events.event_log import (
    Batch,
    Cleared,
    EventLog,
    Removed,
    Stored,
    _Space,
    block_hash,
    namespace_hash,
)
from prefixcache.service.failures import Failures
from prefixcache.types import Grant, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.events.publishing import published
from service.http.scraped import free_port
from service.service_process import (
    LAYOUT,
    ServiceProcess,
    command,
    environment,
    eventually,
    running,
    sizes,
)

SPACE = Namespace("model", salt="secret")
ME = WorkerId("w")
HEARS_CTRL_C = (
    "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); "
    "os.execv(sys.argv[1], sys.argv[1:])"
)
"""Becomes a command that Ctrl-C ends: a test run in the background hands on that it is ignored.
Not by `preexec_fn`, which runs Python in a fork of a process in which gRPC's threads are."""


class Mirror:
    """A router's view: what is stored, by hash, from events alone."""

    def __init__(self) -> None:
        self.stored: dict[bytes, bytes | None] = {}

    def hear(self, batch: Batch) -> None:
        if batch.is_snapshot and not batch.events:
            self.stored.clear()
        for event in batch.events:
            if isinstance(event, Stored):
                assert event.parent is None or event.parent in self.stored
                before = event.parent
                for one in event.hashes:
                    assert one not in self.stored
                    self.stored[one] = before
                    before = one
            elif isinstance(event, Removed):
                for one in event.hashes:
                    del self.stored[one]
            else:
                assert isinstance(event, Cleared)
                for one in event.hashes:
                    del self.stored[one]


class Replay:
    """The index by brute force: every whole block that can be found, by hash."""

    def of(self, cache: PrefixCache) -> set[bytes]:
        self.found: set[bytes] = set()
        self.by_block: dict[int, bytes] = {}
        self.width = cache.block_size * 4
        list(cache.replay(self).run())
        return self.found

    def stored(self, namespace: Namespace, parent: Any, tokens: bytes, blocks: Any) -> None:
        chain = namespace_hash(namespace) if parent is None else self.by_block[parent]
        for at in range(len(tokens) // self.width):
            chain = block_hash(chain, tokens[at * self.width : (at + 1) * self.width])
            self.by_block[blocks[at]] = chain
            self.found.add(chain)

    def removed(self, *_: Any) -> None:
        raise AssertionError("nothing is removed by a recital")

    cleared = removed


class OneCache(Backing):
    def __init__(self, cache: PrefixCache | None) -> None:
        self.cache, self.handle = cache, None


def some_cache() -> PrefixCache:
    cache = PrefixCache(48, 4)
    cache.attach(ME, SPACE, now=0.0)
    return cache


def disturb(cache: PrefixCache, draw: random.Random, steps: int, held: list[Any]) -> None:
    """Store, let go, evict, and now and then reset."""
    for _ in range(steps):
        if held and (len(held) > 3 or draw.random() < 0.4):
            cache.release(ME, held.pop(draw.randrange(len(held))), now=0.0)
        elif draw.random() < 0.02:
            cache.reset(SPACE)
        else:
            prompt = [draw.randrange(3) for _ in range(4)] * draw.randrange(1, 4)
            prompt += [draw.randrange(2) for _ in range(draw.randrange(1, 20))]
            try:
                grant = cache.acquire(ME, SPACE, pack(prompt), now=0.0)
            except PoolExhausted:
                continue
            held.append(grant.lease)
            cache.commit(ME, grant.lease, len(prompt), now=0.0)


@pytest.mark.parametrize("seed", range(4))
def test_events_replayed_are_the_index_for_early_late_and_slow_watchers(seed: int) -> None:
    """One watches from the start, one comes later, one is slow: the ring is far too short."""
    draw, cache = random.Random(seed), some_cache()
    log = EventLog(OneCache(cache), ring=64)
    held: list[Any] = []

    async def follow(mirror: Mirror, pause_s: float) -> None:
        with log.watching():
            async for batch in log.batches(0):
                mirror.hear(batch)
                await asyncio.sleep(pause_s)

    async def story() -> tuple[Mirror, ...]:
        mirrors = Mirror(), Mirror(), Mirror()
        disturb(cache, draw, 30, held)
        tasks = [asyncio.create_task(follow(mirrors[0], 0))]
        tasks.append(asyncio.create_task(follow(mirrors[2], 0.03)))
        for round_ in range(12):
            disturb(cache, draw, 40, held)
            await asyncio.sleep(0.015)
            if round_ == 6:
                tasks.append(asyncio.create_task(follow(mirrors[1], 0)))
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        log.close()
        return mirrors

    early, late, slow = asyncio.run(story())
    truth = Replay().of(cache)
    assert truth
    assert set(early.stored) == set(late.stored) == set(slow.stored) == truth
    assert log.num_gaps


def test_a_reset_is_told_in_parts_and_costs_what_was_stored_there() -> None:
    """What others store is not looked at: neither by one large reset, nor by many empty ones."""
    cache, empty = PrefixCache(4096, 4), Namespace("empty")
    for space in (SPACE, Namespace("another"), empty):
        cache.attach(ME, space, now=0.0)
    for space in (SPACE, Namespace("another")):
        lease = cache.acquire(ME, space, pack(range(4 * 2000)), now=0.0).lease  # type: ignore[union-attr]
        cache.commit(ME, lease, 4 * 2000, now=0.0)
    log = EventLog(OneCache(cache))
    heard: list[Any] = []

    async def follow() -> None:
        with log.watching():
            async for batch in log.batches(0):
                heard.extend([] if batch.is_snapshot else batch.events)

    async def story() -> None:
        task = asyncio.create_task(follow())
        await asyncio.sleep(0.3)
        cache.reset(SPACE)
        for _ in range(100):
            cache.reset(empty)
        while len(heard) < 132:
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        log.close()

    asyncio.run(asyncio.wait_for(story(), PATIENCE_S))
    parts = [(type(event), len(event.hashes)) for event in heard]
    assert parts[:32] == [*[(Removed, 64)] * 31, (Cleared, 16)]
    assert parts[32:] == [(Cleared, 0)] * 100


@pytest.mark.parametrize("seed", range(20))
def test_the_index_may_change_while_the_first_watcher_is_told_of_it(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read run by run, and between any two somebody stores, splits, merges or resets."""
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    monkeypatch.setattr(turns, "_OTHERS_NS", 0)  # somebody does one thing at a time
    draw, cache = random.Random(seed), some_cache()
    log = EventLog(OneCache(cache))
    held: list[Any] = []
    disturb(cache, draw, 100, held)

    async def follow(mirror: Mirror) -> None:
        with log.watching():
            async for batch in log.batches(0):
                mirror.hear(batch)

    async def story() -> Mirror:
        mirror = Mirror()
        task = asyncio.create_task(follow(mirror))
        await asyncio.sleep(0)
        assert log._replay is not None
        during = 0
        while log._replay is not None:
            disturb(cache, draw, 2, held)
            during += 1
            await asyncio.sleep(0.001 if log._digest is None else 0)
        assert during > 1
        for _ in range(50):
            await asyncio.sleep(0.002)
        task.cancel()
        return mirror

    mirror = asyncio.run(story())
    assert set(mirror.stored) == Replay().of(cache)
    cache.check()


def test_a_long_run_is_hashed_and_told_in_parts() -> None:
    cache = PrefixCache(4096, 4)
    cache.attach(ME, SPACE, now=0.0)
    log = EventLog(OneCache(cache))

    def store(first: int) -> None:
        lease = cache.acquire(ME, SPACE, pack(range(first, first + 8000)), now=0.0).lease
        cache.commit(ME, lease, 8000, now=0.0)
        cache.release(ME, lease, now=0.0)

    async def story() -> list[list[int]]:
        store(0)
        told: list[list[int]] = []
        with log.watching():
            async for batch in log.batches(0):
                told.append([len(event.hashes) for event in batch.events])
                told_of = sum(map(sum, told))
                if told_of == 2000:
                    store(10_000)
                if told_of == 4000:
                    assert cache.reset(SPACE)
                if told_of == 8000:
                    return told
        raise AssertionError("a watch does not end")

    told = asyncio.run(asyncio.wait_for(story(), PATIENCE_S))
    assert max(map(max, filter(None, told))) <= 512
    assert max(map(sum, told)) <= 1 << 14


def test_nothing_is_hashed_while_nobody_watches() -> None:
    cache = some_cache()
    log = EventLog(OneCache(cache))
    disturb(cache, random.Random(1), 50, [])
    assert cache._lessor.tree.listener is None
    assert (log.num_events, log.watchers) == (0, 0)


def test_who_comes_back_in_time_misses_nothing_and_otherwise_is_told() -> None:
    cache = some_cache()
    log = EventLog(OneCache(cache), ring=8)

    async def take(start: int, enough: Callable[[list[Batch]], bool]) -> list[Batch]:
        got: list[Batch] = []
        with log.watching():
            async for batch in log.batches(start):
                got.append(batch)
                if enough(got):
                    return got
        return got

    def store(prompt: list[int]) -> None:
        grant = cache.acquire(ME, SPACE, pack(prompt), now=0.0)
        cache.commit(ME, grant.lease, len(prompt), now=0.0)
        cache.release(ME, grant.lease, now=0.0)

    async def story() -> None:
        (begin,) = await take(0, bool)
        assert begin.is_snapshot
        store([1] * 8)
        store([2] * 8)
        got = await take(begin.next, lambda batches: sum(len(b.events) for b in batches) >= 2)
        assert [b.is_snapshot for b in got] == [False] * len(got)
        assert got[0].first == begin.next
        place = got[-1].next
        for number in range(3, 20):
            store([number] * 8)
        await asyncio.sleep(0.1)
        gap, state = await take(place, lambda batches: len(batches) == 2)
        assert gap.lost == (place, gap.next)
        assert gap.is_snapshot
        assert len({one for event in state.events for one in event.hashes}) == 38
        (future, *_) = await take(gap.next + 10**9, bool)
        assert future.lost is not None
        log.close()

    asyncio.run(story())


def test_hashes_tell_prefixes_namespaces_and_salts_apart() -> None:
    spaces = [Namespace("ab"), Namespace("a", "b"), Namespace("a", tenant="b"), SPACE]
    assert len({namespace_hash(space) for space in spaces}) == 4
    start = namespace_hash(SPACE)
    assert block_hash(start, pack([1, 2])) != block_hash(start, pack([1, 2, 0]))


# ------------------------------------------------------------------------ over the wire


def store(target: str, *prompts: list[int], **where: str) -> None:
    with prefixcache.connect(target) as client:
        session = client.attach("model", LAYOUT, **where)  # type: ignore[arg-type]
        for prompt in prompts:
            with session.acquire(prompt) as lease:
                lease.commit(len(prompt))


def hear(messages: Iterator[pb.WatchResponse], kinds: list[str]) -> list[pb.CacheEvent]:
    events: list[pb.CacheEvent] = []
    while len(events) < len(kinds):
        events += next(messages).events
    assert [event.WhichOneof("event") for event in events] == kinds
    return events


class Awaited:
    """The watch of an asynchronous client, for a test that runs on no loop."""

    def __init__(self, target: str) -> None:
        self.runner = asyncio.Runner()
        self.client = self.runner.run(self.make(connect_async(target)))
        self.streams: list[Any] = []

    @staticmethod
    async def make(what: Awaitable[Any]) -> Any:
        return await what

    def watch(self, *args: Any, **kwargs: Any) -> Iterator[pb.WatchResponse]:
        stream = self.client.watch(*args, **kwargs)
        self.streams.append(stream)
        try:
            while True:
                yield self.runner.run(self.make(anext(stream)))
        finally:
            if stream in self.streams:
                self.runner.run(stream.aclose())

    def __enter__(self) -> Awaited:
        return self

    def __exit__(self, *_: object) -> None:
        while self.streams:
            self.runner.run(self.streams.pop().aclose())
        self.runner.run(self.client.close())
        self.runner.close()


@pytest.fixture(params=[prefixcache.connect, Awaited], ids=["sync", "async"])
def watcher(request: pytest.FixtureRequest) -> Callable[[str], Any]:
    """How a client is made that watches: `with watcher(target) as watching`."""
    return request.param


def test_a_watcher_hears_what_others_store_and_reset(
    sockets: Path, watcher: Callable[[str], Any]
) -> None:
    with (
        running(f"unix:{sockets}/watch.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target) as client,
        watcher(service.target) as watching,
    ):
        messages = watching.watch()
        first = next(messages)
        assert first.is_snapshot
        store(service.target, list(range(10)), list(range(16)), salt="s", adapter="poet")
        one, two = hear(messages, ["stored", "stored"])
        assert len(one.stored.block_hashes) == len(two.stored.block_hashes) == 2
        assert two.stored.parent_block_hash == one.stored.block_hashes[-1]
        assert (one.stored.block_size, one.stored.medium) == (4, "CPU")
        assert (one.stored.token_ids, one.namespace.salt) == (b"", "")
        assert one.namespace.adapter == "poet"
        assert (one.sequence, two.sequence) == (first.next_sequence, first.next_sequence + 1)
        assert abs(one.at - time.time()) < 60
        client.reset(Namespace("model", adapter="poet", salt="s"))
        (gone,) = hear(messages, ["cleared"])
        assert gone.sequence == two.sequence + 1
        again = watching.watch(two.sequence)
        assert next(again).events[0].sequence == two.sequence
        only = watching.watch(namespace=Namespace("else"))
        assert next(only).is_snapshot
        for stream in (messages, again, only):
            stream.close()
        with pytest.raises(InvalidRequest, match="--watch-tokens"):
            next(watching.watch(tokens=True))


def test_too_many_watchers_are_refused_and_one_that_leaves_makes_room(
    sockets: Path, watcher: Callable[[str], Any]
) -> None:
    flags = [*sizes(64, 4), "--max-watchers", "1"]
    with (
        running(f"unix:{sockets}/crowd.sock", *flags) as service,
        watcher(service.target) as watching,
    ):
        one = watching.watch()
        next(one)
        with pytest.raises(PoolExhausted, match="--max-watchers"):
            next(watching.watch())
        one.close()

        def admitted() -> bool:
            try:
                return next(watching.watch()).is_snapshot
            except PoolExhausted:
                return False

        eventually(admitted)


def test_a_watcher_learns_that_the_service_has_died(
    sockets: Path, watcher: Callable[[str], Any]
) -> None:
    with (
        running(f"unix:{sockets}/dies.sock", *sizes(64, 4)) as service,
        watcher(service.target) as watching,
    ):
        messages = watching.watch()
        next(messages)
        service.process.kill()
        with pytest.raises(ServiceUnavailable):
            next(messages)


def test_a_watcher_may_come_before_the_first_worker(
    sockets: Path, watcher: Callable[[str], Any]
) -> None:
    with (
        running(f"unix:{sockets}/early.sock", "--memory", "64KiB", "--block-size", "4") as service,
        watcher(service.target) as watching,
    ):
        messages = watching.watch()
        assert next(messages).is_snapshot
        store(service.target, list(range(10)))
        hear(messages, ["stored"])


def test_the_command_prints_lines_that_programs_read(sockets: Path) -> None:
    flags = [*sizes(64, 4), "--watch-tokens"]
    with running(f"unix:{sockets}/command.sock", *flags) as service:
        store(service.target, list(range(10)))
        watch = command("watch", "--connect", service.target, "--json", "--tokens")
        watching = subprocess.Popen(
            [sys.executable, "-c", HEARS_CTRL_C, *watch],
            stdout=subprocess.PIPE,
            env=environment(),
            text=True,
        )
        assert watching.stdout is not None
        begin, stored = (json.loads(watching.stdout.readline()) for _ in range(2))
        assert begin["event"] == "Snapshot"
        assert stored["event"] == "BlockStored"
        assert stored["token_ids"] == list(range(8))
        assert stored["namespace"] == {"model": "model", "adapter": "", "tenant": ""}
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE_S) == 0
        watching.stdout.close()


# ------------------------------------------------------------------------ over ZeroMQ

Message = tuple[int, Any]


def test_a_router_reads_the_same_over_zeromq(sockets: Path) -> None:
    zmq = pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    msgspec = pytest.importorskip("msgspec", reason="the extra 'events' is not installed")
    endpoint, replay = f"tcp://127.0.0.1:{free_port()}", f"ipc://{sockets}/replay"
    flags = [*sizes(64, 4), "--events", endpoint, "--events-replay", replay, "--watch-tokens"]
    with running(f"unix:{sockets}/zmq.sock", *flags) as service, zmq.Context() as context:
        heard = context.socket(zmq.SUB)
        heard.linger = 0
        heard.rcvtimeo = 10_000
        heard.connect(endpoint)
        heard.subscribe(b"kv-events")

        def again(start: int) -> list[Message]:
            with context.socket(zmq.DEALER) as asking:
                asking.linger = 0
                asking.rcvtimeo = 10_000
                asking.connect(replay)
                asking.send_multipart((b"", start.to_bytes(8, "big")))
                found: list[Message] = []
                while (parts := asking.recv_multipart())[1] != b"\xff" * 8:
                    found.append((int.from_bytes(parts[1], "big"), decode(parts[2])))
                return found

        def decode(payload: bytes) -> Any:
            ts, events, rank = msgspec.msgpack.decode(payload)
            assert rank == 0
            assert abs(ts - time.time()) < 60
            return events

        eventually(lambda: [events for _, events in again(0)] == [[["AllBlocksCleared"]]])
        time.sleep(0.2)  # a subscription takes its way
        store(service.target, list(range(10)), adapter="poet")
        topic, number, payload = heard.recv_multipart()
        if number == bytes(8):  # it came early enough to hear of the beginning
            topic, number, payload = heard.recv_multipart()
        assert (topic, int.from_bytes(number, "big")) == (b"kv-events", 1)
        ((kind, hashes, parent, tokens, size, lora_id, medium, lora_name),) = decode(payload)
        start = namespace_hash(Namespace("model", "poet"))
        one = block_hash(start, pack(range(4)))
        two = block_hash(one, pack(range(4, 8)))
        assert hashes == [int.from_bytes(digest[-8:], "big") for digest in (one, two)]
        assert (kind, parent, tokens, size) == ("BlockStored", None, list(range(8)), 4)
        assert (lora_id, medium, lora_name) == (None, "CPU", "poet")
        with prefixcache.connect(service.target) as client:
            client.reset(Namespace("model", "poet"))
        _, _, payload = heard.recv_multipart()
        assert decode(payload) == [["BlockRemoved", hashes, "CPU"]]
        assert [number for number, _ in again(1)] == [1, 2]
        heard.close()


def peak_mib(pid: int) -> int:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    assert found is not None
    return int(found[1]) // 1024


def test_what_is_sent_to_the_sockets_of_events_is_bounded(sockets: Path) -> None:
    zmq = pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    endpoint, replay = f"ipc://{sockets}/events", f"ipc://{sockets}/replay"
    flags = [*sizes(64, 4), "--events", endpoint, "--events-replay", replay]
    with running(f"unix:{sockets}/zmq.sock", *flags) as service:
        before = peak_mib(service.process.pid)
        assert stat.S_IMODE((sockets / "replay").stat().st_mode) == 0o600
        assert stat.S_IMODE((sockets / "events").stat().st_mode) == 0o600
        with zmq.Context() as context:
            context.linger = 0
            for kind, place in ((zmq.XSUB, endpoint), (zmq.DEALER, replay)):
                with context.socket(kind) as huge, context.socket(zmq.DEALER) as asking:
                    huge.connect(place)
                    huge.send_multipart((b"\x01", bytes(128 * 2**20), bytes(8)))
                    huge.poll(1000)  # cut off, it gets no answer
                    asking.rcvtimeo = 10_000
                    asking.connect(replay)
                    asking.send_multipart((b"", bytes(8)))
                    while asking.recv_multipart()[1] != b"\xff" * 8:
                        pass
        assert peak_mib(service.process.pid) < before + 32


def test_one_who_asks_and_does_not_read_holds_nobody_up(sockets: Path) -> None:
    zmq = pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    endpoint, replay = f"ipc://{sockets}/events", f"ipc://{sockets}/replay"
    flags = [*sizes(64, 4), "--events", endpoint, "--events-replay", replay]
    with running(f"unix:{sockets}/zmq.sock", *flags) as service, zmq.Context() as context:
        store(service.target, *([number] * 24 for number in range(200)))
        idle = [context.socket(zmq.DEALER) for _ in range(8)]
        for one in idle:
            one.linger, one.rcvhwm = 0, 1
            one.connect(replay)
            one.send_multipart((b"", bytes(8)))
        with context.socket(zmq.DEALER) as asking:
            asking.linger, asking.rcvtimeo = 0, 20_000
            asking.connect(replay)
            asking.send_multipart((b"", bytes(8)))
            count = 0
            while asking.recv_multipart()[1] != b"\xff" * 8:
                count += 1
        assert count
        for one in idle:
            one.close()


def test_a_publisher_that_ends_is_told() -> None:
    pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    from prefixcache.service.events.publisher import Publisher

    class Broken:
        def watching(self) -> object:
            raise ValueError("nobody thought of this")

    class Some:
        failures = Failures()
        settings = load({})

    async def story() -> dict[str, str]:
        publisher = Publisher(Some, Some.failures, Broken(), f"tcp://127.0.0.1:{free_port()}", None)  # type: ignore[arg-type]
        publisher.start()
        await asyncio.sleep(0.05)
        await publisher.close()
        return Some.failures.causes()

    causes = asyncio.run(story())
    assert "nobody thought of this" in causes["the publisher of events"]


def test_subscribers_take_no_descriptor_that_workers_need(sockets: Path) -> None:
    """Of 256: each address of events has 16, however many come, and come again and again."""
    zmq = pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    place = f"tcp://127.0.0.1:{free_port()}"
    flags = (*sizes(64, 4), "--events", place)
    service = ServiceProcess(f"unix:{sockets}/crowd.sock", *flags, num_files=256)
    context = zmq.Context()
    crowd = []
    try:
        for _ in range(300):
            one = context.socket(zmq.SUB)
            one.linger = 0
            one.subscribe(b"")
            one.connect(place)
            crowd.append(one)
        eventually(lambda: "subscribers of events are turned away" in service.log())

        def works() -> bool:
            try:
                with (
                    prefixcache.connect(service.target, timeout_s=5.0) as client,
                    client.attach("tiny", LAYOUT) as session,
                ):
                    session.acquire([1, 2, 3]).release()
            except ServiceUnavailable:
                return False
            return True

        eventually(works)
        for one in crowd[1:]:
            one.close()
        count = Path(f"/proc/{service.process.pid}/fd")
        eventually(lambda: len(list(count.iterdir())) < 100)
    finally:
        for one in crowd:
            one.close()
        context.term()
        service.close()


@pytest.mark.parametrize("place", ["tcp://0.0.0.0:5557", "ipc://@abstract", "ipc://*"])
def test_events_are_published_on_this_machine_only(sockets: Path, place: str) -> None:
    told = subprocess.run(
        command("serve", "--listen", f"unix:{sockets}/x.sock", "--events", place),
        env=environment(),
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert told.returncode == 2
    assert f"refused to publish at {place}" in told.stderr


@pytest.mark.parametrize(
    "port", ["", "65536", "99999", "-1", "+80", "*", "5x", "\u0663", "9" * 5000]
)
def test_no_other_port_is_taken_for_one_that_there_is_not(port: str) -> None:
    pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    for host in ("127.0.0.1", "[::1]", "localhost"):
        with pytest.raises(InvalidRequest, match="is no port"):
            asyncio.run(published(f"tcp://{host}:{port}", None))


def test_watchers_that_do_not_read_hold_nobody_up(sockets: Path) -> None:
    with (
        running(f"unix:{sockets}/slow.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target) as client,
    ):
        idle = [client.watch() for _ in range(8)]
        for stream in idle:
            next(stream)
        done = threading.Event()

        def work() -> None:
            store(service.target, *([number] * 24 for number in range(60)))
            done.set()

        threading.Thread(target=work).start()
        assert done.wait(PATIENCE_S)
        assert client.snapshot().requests == 60
        for stream in idle:
            stream.close()  # type: ignore[attr-defined]


def test_what_is_kept_for_slow_watchers_is_bounded_in_bytes() -> None:
    """Long prompts push the oldest events out, and who needed those is told of the gap."""
    cache = PrefixCache(512, 4)
    cache.attach(ME, SPACE, now=0.0)
    log = EventLog(OneCache(cache), ring_bytes=20_000)

    async def story() -> None:
        with log.watching():
            batches = log.batches(0)
            first = await anext(batches)
            for number in range(200):
                grant = cache.acquire(ME, SPACE, pack([number] * 64), now=0.0)
                assert isinstance(grant, Grant)
                cache.commit(ME, grant.lease, 64, now=0.0)
                cache.release(ME, grant.lease, now=0.0)
                await asyncio.sleep(0.02 if number % 10 == 9 else 0)
            await asyncio.sleep(0.1)
            kept = sum(len(event.tokens) for event in log._ring if isinstance(event, Stored))
            assert 0 < kept <= 20_000
            told = await anext(batches)
            assert told.lost is not None
            assert told.lost[0] == first.next
            assert told.is_snapshot
        log.close()

    asyncio.run(story())


def test_what_nobody_watches_any_more_is_freed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """And who comes meanwhile begins anew, with all that is stored."""
    monkeypatch.setattr("prefixcache.service.events.event_log._DROPPED", 50)
    cache = PrefixCache(1024, 4)
    cache.attach(ME, SPACE, now=0.0)
    log = EventLog(OneCache(cache))

    def num_kept() -> int:
        tables = [one for one in log._dropped if isinstance(one, dict)]
        spaces = [one for table in tables for one in table.values() if isinstance(one, _Space)]
        levels = [level for space in spaces for level in space.levels]
        rings = [one for one in log._dropped if not isinstance(one, dict)]
        return sum(map(len, [*tables, *levels, *rings])) - len(spaces)

    async def story() -> None:
        with log.watching():
            batches = log.batches(0)
            await anext(batches)
            for number in range(300):
                lease = cache.acquire(ME, SPACE, pack([number] * 9), now=0.0).lease
                cache.commit(ME, lease, 9, now=0.0)
                cache.release(ME, lease, now=0.0)
            await asyncio.sleep(0.1)
        log._stop()
        sizes = [num_kept()]
        while log._dropped:
            await asyncio.sleep(0)
            sizes.append(num_kept())
        assert sizes[0] > 400
        assert max(before - after for before, after in pairwise(sizes)) <= 55
        mirror = Mirror()
        with log.watching():
            async for batch in log.batches(0):
                mirror.hear(batch)
                if len(mirror.stored) == len(Replay().of(cache)):
                    break
        assert mirror.stored.keys() == Replay().of(cache)
        log.close()

    asyncio.run(story())
