"""Answers that nobody reads: so much of a tenant's is made, and no more; others notice nothing."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import codec, unary
from prefixcache.config import load
from prefixcache.core import stats
from prefixcache.errors import PoolExhausted
from prefixcache.service import unread as service_unread
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc import unary as unary_calls
from prefixcache.service.handlers import Handlers
from prefixcache.service.unread import MOST_BYTES, MOST_LONG, Unread
from prefixcache.service.verbs import inspect
from prefixcache.service.verbs.inspect import Seen
from prefixcache.service.worker import Visitor
from prefixcache.service.workers import Workers
from prefixcache.types import Layout, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT as SMALL
from service.service_process import running, sizes

LAYOUT = Layout(1, 1, 2, "float32")


class Call:
    """What gRPC tells of a call: when its answer was taken, or its caller hung up."""

    def __init__(self) -> None:
        self._done: list[Any] = []

    def add_done_callback(self, done: Any) -> None:
        self._done.append(done)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Its stream stands."""

    def end(self) -> None:
        for done in self._done:
            done(self)


def whole(num_blocks: int = 4096) -> Handlers:
    """A whole service without a socket."""
    settings = load({"memory": num_blocks * LAYOUT.token_bytes, "block_size": 1})
    settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT})
    backing = Backing(settings)
    deliveries = Deliveries(backing)
    return Handlers(settings, backing, deliveries, Workers(backing, deliveries, settings))


async def settled() -> None:
    """Let everything run that can."""
    for _ in range(50):
        await asyncio.sleep(0)


@pytest.mark.parametrize("verb", ["snapshot", "tree", "check"])
def test_of_long_answers_that_nobody_reads_a_few_are_made(
    monkeypatch: pytest.MonkeyPatch, verb: str
) -> None:
    monkeypatch.setattr(service_unread, "_WAIT_S", 0.05)

    async def story() -> None:
        handlers = whole()
        serve = unary_calls._serve(handlers, verb, unary.RPCS[verb].response)
        request = unary.RPCS[verb].request()
        unread = [Call() for _ in range(MOST_LONG)]
        for call in unread:
            await serve(request, call, LOCAL)
        waiting = asyncio.create_task(serve(request, Call(), LOCAL))
        await settled()
        assert not waiting.done()
        unread[0].end()
        unread[0].end()  # once is enough
        await waiting
        with pytest.raises(PoolExhausted, match="8 long ones of 8: read them"):
            await handlers.unread.room("", is_long=True)

    asyncio.run(story())


def test_large_answers_that_nobody_reads_are_bounded_in_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A prompt's table is told again and again, 16 KiB each time, by a question of some bytes."""
    monkeypatch.setattr(service_unread, "_WAIT_S", 0.05)
    monkeypatch.setattr(service_unread, "MOST_BYTES", 1 << 20)

    async def story() -> None:
        handlers = whole()
        serve = {
            verb: unary_calls._serve(handlers, verb, unary.RPCS[verb].response)
            for verb in ("attach", "acquire", "renew")
        }
        layout = pb.Layout()
        codec.write_layout(LAYOUT, layout)
        hello = pb.AttachRequest(namespace=pb.Namespace(model="m"), layout=layout)
        key = (await serve["attach"](hello, Call(), LOCAL)).worker_key
        request = pb.AcquireRequest(worker_key=key, tokens=pack(range(4096)), request_id="again")
        calls: list[Call] = []
        refused = None
        while refused is None and len(calls) < 200:
            calls.append(Call())
            try:
                await serve["acquire"](request, calls[-1], LOCAL)
            except AttributeError:  # it is refused: this call cannot be aborted
                refused = len(calls)
        assert refused is not None
        assert 60 < refused < 70
        assert handlers.unread.used("")[0] < (1 << 20) + (1 << 15)
        await serve["renew"](pb.RenewRequest(worker_key=key), Call(), LOCAL)  # as ever
        for call in calls:
            call.end()
        assert handlers.unread.used("") == (0, 0)
        await serve["acquire"](request, Call(), LOCAL)

    asyncio.run(story())


def test_who_waits_gets_on_in_turn_and_others_do_not_wait() -> None:
    async def story() -> None:
        unread, done = Unread(), []
        held = unread.hold("red", MOST_BYTES)
        assert held is not None

        async def ask(name: int) -> None:
            await unread.room("red")
            done.append(name)

        waiting = [asyncio.create_task(ask(name)) for name in range(5)]
        await settled()
        await unread.room("blue", is_long=True)
        waiting[1].cancel()
        held()
        await settled()
        assert done == [0, 2, 3, 4]
        assert unread.used("red") == (0, 0)

    asyncio.run(story())


def test_one_who_is_woken_and_gives_up_wakes_the_next() -> None:
    async def story() -> None:
        unread = Unread()
        held = [await unread.room("red", is_long=True) for _ in range(MOST_LONG)]
        first = asyncio.create_task(unread.room("red", is_long=True))
        second = asyncio.create_task(unread.room("red", is_long=True))
        await settled()
        assert held[0] is not None
        held[0]()  # the first one is woken …
        first.cancel()  # … and gives up before it has looked
        await settled()
        assert second.done()
        assert unread.used("red") == (0, MOST_LONG)

    asyncio.run(story())


def many_names(handlers: Handlers, count: int) -> None:
    """As many namespaces, each of names as long as they may be, in letters of four bytes."""
    cache = handlers.backing.cache
    assert cache is not None
    me = WorkerId(1)
    for number in range(count):
        space = Namespace(f"{number:04}" + "\U0001f600" * 1020, "\U0001f600" * 1024, "red")
        cache.attach(me, space, now=0.0)
        grant: Any = cache.acquire(me, space, pack([number, 1]), now=0.0)
        cache.commit(me, grant.lease, 2, now=0.0)
        cache.pin(space, pack([number]), ttl_s=60.0, now=0.0)
        cache.set_quota(space, max_held=9, guaranteed=0, now=0.0)
        cache.acquire(me, space, pack([number, 2, 3]), now=0.0)


def run(steps: Any) -> Any:
    """Run a generator to its value."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def test_a_snapshot_is_bounded_in_bytes_whatever_the_names_are() -> None:
    handlers = whole(8192)
    count = 1024
    many_names(handlers, count)
    cache = handlers.backing.cache
    assert cache is not None
    told = run(cache.snapshot_in_steps(now=0.0))
    message = pb.SnapshotResponse()
    run(handlers.write_snapshot(Seen(told, LOCAL), message))
    assert message.ByteSize() < 16 << 20
    most = stats.MOST_NAME_BYTES
    for rows in (message.leases, message.pins, message.quotas, message.flights):
        assert 0 < len(rows) < count
        assert sum(one.ByteSize() for one in rows) < 1.1 * most
    assert 0 < len(message.namespaces) < count
    # What is not listed is counted.
    for asked in (
        {},
        {"tenant": "red"},
        {"tenant": "red", "sees": lambda space: True},
    ):
        told = run(cache.snapshot_in_steps(now=0.0, **asked))
        assert (told.num_leases, told.num_namespaces) == (2 * count, count)
        assert sum(told.ledger) == 5 * count


def test_an_outline_is_bounded_and_tells_of_the_other_namespaces(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(inspect, "MAX_TREES", 3)
    handlers = whole()
    many_names(handlers, 10)
    steps = handlers.tree(Visitor(LOCAL), pb.TreeRequest())
    message = pb.TreeResponse()
    run(handlers.write_tree(run(steps), message))
    outline = codec.read_outline(pb.TreeResponse.FromString(message.SerializeToString()))
    assert (len(outline.namespaces), outline.num_more) == (3, 7)
    assert outline.more.tokens == 7 * 2


def test_answers_that_are_read_or_hung_up_are_unread_no_more(sockets: Path) -> None:
    """By a real service, over a real socket."""
    path = unary.RPCS["tree"].path
    with (
        running(f"unix:{sockets}/unread.sock", *sizes(64, 4)) as service,
        grpc.insecure_channel(service.target) as channel,
        prefixcache.connect(service.target) as client,
    ):
        client.attach("tiny", SMALL)
        ask: Any = channel.unary_unary(path, pb.TreeRequest.SerializeToString)
        for _ in range(3 * MOST_LONG):
            client.snapshot()
            ask.future(pb.TreeRequest()).cancel()
        for _ in range(3 * MOST_LONG):
            ask(pb.TreeRequest(), timeout=PATIENCE_S)
