"""A message, however long and slow, does not keep others waiting: it is answered in slices."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Generator, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from core.effort import calls, most_in_one_go
from patience import PATIENCE_S
from prefixcache.client import codec, unary
from prefixcache.config import load
from prefixcache.outline import Branch, Extent, NamespaceOutline, Outline
from prefixcache.service import turns as service_turns
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc import session
from prefixcache.service.grpc import unary as unary_calls
from prefixcache.service.grpc.pieces import in_pieces
from prefixcache.service.handlers import Handlers
from prefixcache.service.http.dashboard import Dashboard
from prefixcache.service.http.metrics import Scrape
from prefixcache.service.turns import Turns
from prefixcache.service.verbs.inspect import Seen
from prefixcache.service.worker import Visitor
from prefixcache.service.workers import Workers
from prefixcache.types import (
    Grant,
    Layout,
    Ledger,
    Namespace,
    PinInfo,
    Reset,
    Snapshot,
    WorkerId,
    pack,
)
from prefixcache.v1 import prefixcache_pb2 as pb

LAYOUT = Layout(1, 1, 2, "float32")

Fill = Callable[[Any], object]


def whole(num_blocks: int = 64) -> Handlers:
    """A whole service without a socket."""
    settings = load({"memory": num_blocks * 4 * LAYOUT.token_bytes, "block_size": 4})
    settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT})
    backing = Backing(settings)
    deliveries = Deliveries(backing)
    return Handlers(settings, backing, deliveries, Workers(backing, deliveries, settings))


@pytest.fixture
def handlers() -> Handlers:
    return whole()


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes all the time of a slice."""
    monkeypatch.setattr(service_turns, "_SLICE_NS", 0)


def message(num_ops: int) -> pb.OpBatch:
    """That many ops of the same kind."""
    batch = pb.OpBatch()
    for i in range(num_ops):
        op = batch.ops.add()
        op.id = i + 1
        op.renew.SetInParent()
    return batch


@pytest.fixture
def one_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """Others have the loop for one round at a time."""
    monkeypatch.setattr(service_turns, "_OTHERS_NS", 0)


async def with_another(answering: Coroutine[Any, Any, pb.OpResults]) -> tuple[int, pb.OpResults]:
    """Count how often another task has its turn until an answer is there; give both."""
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            had += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await asyncio.sleep(0)
    had = 0
    results = await answering
    beside.cancel()
    return had, results


async def turns(handlers: Handlers, num_ops: int) -> tuple[int, list[int]]:
    """Count how often another task has its turn while a message is answered; give the answers."""
    stream: Any = session.SessionStream(handlers, None, LOCAL)
    task = asyncio.current_task()
    hello = pb.OpBatch()
    attach = hello.ops.add().attach
    codec.write_namespace(Namespace("m"), attach.namespace)
    codec.write_layout(LAYOUT, attach.layout)
    await stream.answer(hello, task)
    had, results = await with_another(stream.answer(message(num_ops), task))
    return had, [result.id for result in results.results]


def clock(step_ns: int) -> Iterator[int]:
    now = 0
    while True:
        yield now
        now += step_ns


@pytest.mark.parametrize(
    ("op_ns", "num_ops", "slices"),
    [
        (1_000, 64, 1),  # short and quick: in one go
        (1_000, 65, 2),  # 64 ops end a slice
        (1_000, 640, 10),
        (200_000, 9, 3),  # and so does half a millisecond: three of these ops
        (600_000, 5, 5),  # one op that takes longer is a slice of its own
    ],
)
def test_others_have_their_turn_between_slices(
    handlers: Handlers,
    one_round: None,
    monkeypatch: pytest.MonkeyPatch,
    op_ns: int,
    num_ops: int,
    slices: int,
) -> None:
    """By the number of ops and by the time they take; answers stay in order, and none is lost."""
    ticks = clock(op_ns)
    monkeypatch.setattr(session, "clock", lambda: next(ticks))
    had, answered = asyncio.run(turns(handlers, num_ops))
    assert had == slices - 1
    assert answered == list(range(1, num_ops + 1))


def batch_of(*fills: Fill) -> pb.OpBatch:
    """One op for each, numbered from 1."""
    batch = pb.OpBatch()
    for number, fill in enumerate(fills, 1):
        fill(batch.ops.add(id=number))
    return batch


def attach(op: Any, salt: str = "") -> None:
    codec.write_namespace(Namespace("m", salt=salt), op.attach.namespace)
    codec.write_layout(LAYOUT, op.attach.layout)


def acquire(op: Any, index: int) -> None:
    op.acquire.namespace_index = index
    op.acquire.tokens = pack([1, 2, 3])


def snapshot(op: Any) -> None:
    op.snapshot.SetInParent()


def renew(op: Any) -> None:
    op.renew.SetInParent()


def reset_sealed(op: Any) -> None:
    """Name the salt as it is shown, as only an admin may."""
    codec.show_namespace(Namespace("m", salt="99"), op.reset.namespace)


def reset_unknown(op: Any) -> None:
    codec.write_namespace(Namespace("m", salt="sealed-0"), op.reset.namespace)


async def answered(handlers: Handlers, *fills: Fill) -> tuple[list[str], int]:
    """Attach 256 namespaces, then send some ops; give their results, and the turns of others."""
    stream: Any = session.SessionStream(handlers, None, LOCAL)
    task = asyncio.current_task()
    salts = batch_of(*[partial(attach, salt=str(number)) for number in range(256)])
    await stream.answer(salts, task)
    had, results = await with_another(stream.answer(batch_of(*fills), task))
    assert [result.id for result in results.results] == list(range(1, len(fills) + 1))
    return [result.WhichOneof("result") for result in results.results], had


@pytest.mark.usefixtures("slow")
def test_an_op_that_is_answered_in_steps_keeps_its_place(handlers: Handlers) -> None:
    """Others are served meanwhile; the ops after it run when it is done."""
    told, had = asyncio.run(answered(handlers, renew, snapshot, renew, reset_sealed, renew))
    assert told == ["renew", "snapshot", "renew", "reset", "renew"]
    assert had >= 8


def vast(op: Any) -> None:
    op.acquire.tokens = pack(range(10_000, 10_000 + 4 * 2000))


def grow(op: Any) -> None:
    """The first lease of all, which was numbered by chance, grows."""
    op.extend.num_tokens = 4 * 2000


class Call:
    """What gRPC tells of a call whose stream stands."""

    async def send_initial_metadata(self, metadata: Any) -> None:
        """Nobody has hung up."""


@pytest.mark.usefixtures("slow")
@pytest.mark.parametrize("way", ["session", "unary"])
@pytest.mark.parametrize("verb", ["acquire", "extend"])
def test_others_have_their_turn_while_a_cache_is_emptied_for_one_request(
    verb: str, way: str
) -> None:
    """It evicts two thousand leaves: some hundred at a time."""
    handlers = whole(2048)

    async def ask() -> tuple[list[pb.OpResult], int]:
        stream: Any = session.SessionStream(handlers, None, LOCAL)
        task = asyncio.current_task()
        lease = pb.AcquireRequest(tokens=pack([1, 2, 3]))
        hello = batch_of(attach, lambda op: op.acquire.CopyFrom(lease))
        told = (await stream.answer(hello, task)).results
        lease_id, key = told[1].acquire.grant.lease, told[0].attach.worker_key
        cache = handlers.backing.cache
        assert cache is not None
        me, space = stream._worker.id, Namespace("m")
        for number in range(2047):
            one = cache.acquire(me, space, pack([number] * 4), now=0.0)
            assert isinstance(one, Grant)
            cache.commit(me, one.lease, 4, now=0.0)
            cache.release(me, one.lease, now=0.0)
        batch = batch_of(renew, vast if verb == "acquire" else grow, renew)
        if verb == "extend":
            batch.ops[1].extend.lease = lease_id
        had = 0

        async def other() -> None:
            nonlocal had
            while True:
                had += 1
                await asyncio.sleep(0)

        beside = asyncio.create_task(other())
        await asyncio.sleep(0)
        had = 0
        if way == "session":
            results = list((await stream.answer(batch, task)).results)
        else:
            request = getattr(batch.ops[1], verb)
            request.worker_key = key
            serve = unary_calls._serve(handlers, verb, unary.RPCS[verb].response)
            answer = await serve(request, Call(), LOCAL)
            results = [pb.OpResult(id=2, **{verb: answer})]
        beside.cancel()
        cache.check()
        return results, had

    results, had = asyncio.run(ask())
    assert had >= 7
    answer = getattr(next(one for one in results if one.id == 2), verb)
    grown = answer.grant.block_table if verb == "acquire" else answer.blocks
    assert len(grown) >= 4 * 1999
    if way == "session":
        assert [one.id for one in results] == [1, 2, 3]
        assert [one.WhichOneof("result") for one in results] == ["renew", verb, "renew"]


def test_what_an_op_settled_in_its_steps_is_told_before_the_next_op(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[str] = []

    def reset(*_: Any) -> Generator[None, None, Reset]:
        yield
        done.append("reset")
        return Reset(0, 0)

    monkeypatch.setattr(handlers.deliveries, "settle", lambda: done.append("settle"))
    monkeypatch.setitem(handlers.verbs, "reset", (reset, codec.WRITE["reset"]))
    renewed = (lambda *_: done.append("renew") or 0, codec.WRITE["renew"])
    monkeypatch.setitem(handlers.verbs, "renew", renewed)
    asyncio.run(answered(handlers, reset_sealed, renew))
    at = done.index("reset")
    assert done[at + 1 : at + 3] == ["settle", "renew"]


def test_a_salt_that_is_named_as_it_is_shown_is_looked_for_in_parts() -> None:
    def found(num_namespaces: int) -> int:
        handlers = whole()
        assert handlers.backing.cache is not None
        for number in range(num_namespaces):
            space = Namespace("m", salt=str(number))
            handlers.backing.cache.attach(WorkerId(1), space, now=0.0)
        request = pb.ResetRequest()
        codec.show_namespace(Namespace("m", salt=str(num_namespaces - 1)), request.namespace)
        most, answer = most_in_one_go(handlers.reset(Visitor(LOCAL), request))
        assert answer == Reset(0, 0)
        return most

    assert found(2000) <= found(300) * 1.2


def test_a_snapshot_that_is_serialised_in_pieces_is_the_same() -> None:
    ledgers = {Namespace("m", adapter=str(n)): Ledger(hit=n, cold=1) for n in range(700)}
    pins = tuple(PinInfo(space, 4, 1, 9.0) for space in ledgers)
    told = Snapshot(nodes=700, ledger=Ledger(cold=7), namespaces=ledgers, pins=pins)
    whole_one = pb.SnapshotResponse()
    list(codec.write_snapshot(told, whole_one))
    message = pb.SnapshotResponse()
    steps = in_pieces(codec.write_snapshot(told, message), message)
    most, answer = most_in_one_go(steps)
    assert pb.SnapshotResponse.FromString(answer) == whole_one
    assert most < calls(lambda: list(codec.write_snapshot(told, message))) / 3


def a_branch(tokens: bytes = b"") -> Branch:
    return Branch(
        *(0, 0, 4, 1, tokens, Extent(1, 1, 4), Extent(), 0, 0, False, False, None, 0.5, None),
        *(None, 0),
    )


def test_an_outline_that_is_serialised_in_pieces_is_the_same() -> None:
    """Of one large tree and many small ones; no step costs what the whole does."""

    def tree(name: str, num_branches: int) -> NamespaceOutline:
        branches = tuple([replace(a_branch(), start=start) for start in range(num_branches)])
        return NamespaceOutline(Namespace("m", adapter=name), branches)

    trees = (tree("large", 2000), *[tree(str(number), 1) for number in range(300)])
    for outline in (Outline(4, trees, 3), Outline(4, (), 0)):
        whole_one, message = pb.TreeResponse(), pb.TreeResponse()
        list(codec.write_outline(outline, whole_one))
        most, answer = most_in_one_go(in_pieces(codec.write_outline(outline, message), message))
        assert pb.TreeResponse.FromString(answer) == whole_one
        assert most < 2000


class Told(bytes):
    """A part of a row that says when the row is freed."""

    num_freed = 0

    def __del__(self) -> None:
        Told.num_freed += 1


class ToldLedger(Ledger):
    def __del__(self) -> None:
        Told.num_freed += 1


def some_snapshot(handlers: Handlers) -> Generator[None, None, None]:
    rows = {Namespace("m", adapter=str(n)): ToldLedger(hit=n) for n in range(700)}
    seen = Seen(Snapshot(namespaces=rows), LOCAL)
    return handlers.write_snapshot(seen, pb.SnapshotResponse())


def some_outline(handlers: Handlers) -> Generator[None, None, None]:
    branches = tuple([a_branch(Told(b"1234")) for _ in range(700)])
    outline = Outline(4, (NamespaceOutline(Namespace("m"), branches),), 0)
    return handlers.write_tree(outline, pb.TreeResponse())


@pytest.mark.parametrize("some", [some_snapshot, some_outline])
def test_what_was_told_is_freed_in_steps(
    handlers: Handlers, some: Callable[[Handlers], Generator[None, None, None]]
) -> None:
    """Nothing but the writing holds it once it is written, and lets go of a few rows at a time."""
    Told.num_freed = most = before = 0
    for _ in some(handlers):
        most, before = max(most, Told.num_freed - before), Told.num_freed
    assert Told.num_freed == 700
    assert most <= 64


@pytest.mark.parametrize("num_steps", [1, 3])
def test_a_slice_is_as_many_steps_as_fit_in_its_time(
    monkeypatch: pytest.MonkeyPatch, num_steps: int
) -> None:
    ticks = clock(service_turns._SLICE_NS // num_steps + 1)
    monkeypatch.setattr(service_turns, "clock", lambda: next(ticks))
    steps: list[int] = []

    def walk() -> Generator[None, None, None]:
        for number in range(12):
            steps.append(number)
            yield

    async def main() -> None:
        walking = asyncio.create_task(Turns().run(walk()))
        seen = []
        while not walking.done():
            await asyncio.sleep(0)
            seen.append(len(steps))
        assert seen == [*range(num_steps, 13, num_steps), *seen[12 // num_steps :]]

    asyncio.run(main())


def test_an_op_that_fails_in_its_steps_fails_alone(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> Generator[None, None, None]:
        yield
        raise RuntimeError("nobody foresaw this")

    told, _ = asyncio.run(answered(handlers, renew, reset_unknown, renew))
    assert told == ["renew", "error", "renew"]
    monkeypatch.setitem(handlers.verbs, "snapshot", (handlers.snapshot, broken))
    told, _ = asyncio.run(answered(handlers, renew, snapshot, renew))
    assert told == ["renew", "error", "renew"]


@pytest.mark.usefixtures("slow")
def test_who_asks_for_much_at_once_takes_one_step_at_a_time() -> None:
    """A hundred walks take as many turns as one after the other; others wait for one step."""
    steps: list[int] = []
    most = 0

    def walk(number: int) -> Generator[None, None, int]:
        for _ in range(5):
            steps.append(number)
            yield
        return number

    async def main() -> list[int]:
        nonlocal most
        turns = Turns()
        walks = [asyncio.create_task(turns.run(walk(number))) for number in range(100)]
        while not all(one.done() for one in walks):
            before = len(steps)
            await asyncio.sleep(0)
            most = max(most, len(steps) - before)
        return [one.result() for one in walks]

    assert asyncio.run(main()) == list(range(100))
    assert most <= 2
    assert steps == list(range(100)) * 5  # each in turn


@pytest.mark.usefixtures("slow")
def test_tenants_take_turns_however_much_one_of_them_asks_for() -> None:
    steps: list[str] = []

    def walk(tenant: str) -> Generator[None, None, None]:
        for _ in range(5):
            steps.append(tenant)
            yield

    async def main() -> None:
        turns = Turns()
        greedy = [asyncio.create_task(turns.run(walk("red"), "red")) for _ in range(50)]
        await asyncio.sleep(0)
        await turns.run(walk("blue"), "blue")
        assert len(steps) <= 13
        gone = greedy.pop()
        gone.cancel()
        await asyncio.gather(*greedy)

    asyncio.run(main())
    assert steps.count("red") <= 250


@pytest.mark.usefixtures("slow")
def test_a_turn_that_is_hung_up_goes_to_the_next() -> None:
    """Cancelled while it waits, in the moment in which it has its turn, and in its step."""

    def walk() -> Generator[None, None, str]:
        yield
        yield
        return "done"

    async def main() -> None:
        for num_loops in range(12):
            turns = Turns()
            walks = [asyncio.create_task(turns.run(walk(), str(n % 2))) for n in range(4)]
            for _ in range(num_loops):
                await asyncio.sleep(0)
            for hung_up in walks[:2]:
                hung_up.cancel()
            await asyncio.gather(*walks, return_exceptions=True)
            assert [one.result() for one in walks[2:]] == ["done", "done"]
            assert await turns.run(walk()) == "done"

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


@pytest.mark.parametrize("sees", ["all", "some models"])
def test_what_a_service_does_every_second_costs_the_same_beside_many_namespaces(sees: str) -> None:
    """The pulse, the page and the metrics; and no step of a snapshot is long."""

    def cost(num_spaces: int) -> dict[str, int]:
        handlers = whole(num_blocks=16_384)
        page, scrape = Dashboard(handlers), Scrape({"": handlers})
        models = ("*",) if sees == "all" else ("m*",)
        asker = Visitor(replace(LOCAL, models=models))

        async def fill() -> None:
            for number in range(220):
                stream: Any = session.SessionStream(handlers, None, LOCAL)
                fills = [partial(attach, salt=f"{number} {n}") for n in range(num_spaces)]
                await stream.answer(batch_of(*fills), asyncio.current_task())
                asked = [partial(acquire, index=n) for n in range(num_spaces)]
                await stream.answer(batch_of(*asked), asyncio.current_task())

        asyncio.run(fill())
        assert handlers.backing.cache is not None
        assert handlers.backing.cache.counts(now=0.0).requests == 220 * num_spaces
        made, seen = most_in_one_go(handlers.snapshot(asker, pb.SnapshotRequest()))
        assert len(seen.snapshot.namespaces) == 220 * num_spaces
        message = pb.SnapshotResponse()
        written, _ = most_in_one_go(handlers.write_snapshot(seen, message))
        assert len(message.workers) == 220
        return {
            "pulse": calls(handlers.sampler.read),
            "page": calls(page.state),
            "scrape": calls(lambda: list(scrape.collect())),
            "made": made,
            "written": written,
        }

    few, many = cost(4), cost(40)
    for what, most in few.items():
        assert many[what] <= most * 1.15 + 200, what


def test_a_call_waits_for_one_slice_and_not_for_one_in_each_of_its_rounds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now, slices = 0, 0
    monkeypatch.setattr(service_turns, "clock", lambda: now)
    monkeypatch.setattr(service_turns, "_SLICE_NS", 0)

    def walk() -> Generator[None, None, None]:
        nonlocal slices
        while not now:
            slices += 1
            yield

    async def call() -> None:
        nonlocal now
        for _ in range(6):
            await asyncio.sleep(0)
        now = service_turns._OTHERS_NS

    async def both() -> None:
        await asyncio.gather(Turns().run(walk()), call())

    asyncio.run(both())
    assert slices == 1


def test_of_many_sessions_with_long_messages_one_has_a_slice_at_a_time(
    one_round: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has one slice's worth of ops has it at once; the rest take turns."""
    num_sessions, num_slices = 20, 5
    sliced: list[tuple[int, object]] = []
    rounds = 0
    original = session.SessionStream._slice

    def noted(self: session.SessionStream, *arguments: Any) -> None:
        sliced.append((rounds, self))
        original(self, *arguments)

    async def other() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await asyncio.sleep(0)

    async def story() -> None:
        handlers, task = whole(), asyncio.current_task()
        streams: list[Any] = [
            session.SessionStream(handlers, None, LOCAL) for _ in range(num_sessions)
        ]
        for stream in streams:
            hello = pb.OpBatch()
            attach = hello.ops.add(id=1).attach
            codec.write_namespace(Namespace("m"), attach.namespace)
            codec.write_layout(LAYOUT, attach.layout)
            await stream.answer(hello, task)
        monkeypatch.setattr(session.SessionStream, "_slice", noted)
        monkeypatch.setattr(session, "clock", partial(next, clock(1_000)))
        beside = asyncio.create_task(other())
        long = message(num_slices * 64)
        answers = await asyncio.gather(*(stream.answer(long, task) for stream in streams))
        beside.cancel()
        assert all(len(results.results) == len(long.ops) for results in answers)

    asyncio.run(story())
    first: set[object] = set()
    of_rounds: dict[int, int] = {}
    for number, stream in sliced:
        if stream in first:
            of_rounds[number] = of_rounds.get(number, 0) + 1
        first.add(stream)
    assert sum(of_rounds.values()) == num_sessions * (num_slices - 1)
    assert max(of_rounds.values()) == 1
