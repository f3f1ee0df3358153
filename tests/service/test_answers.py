"""Small messages with large answers: each answer has a byte budget, written as it is made."""

from __future__ import annotations

import asyncio
from array import array
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.client import codec
from prefixcache.config import load
from prefixcache.errors import InvalidRequest
from prefixcache.service import answers
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc import session
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe import sampler
from prefixcache.service.verbs import inspect
from prefixcache.service.worker import Visitor
from prefixcache.service.workers import Workers
from prefixcache.types import Grant, Layout, LeaseId, Ledger, Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb

LAYOUT = Layout(1, 1, 2, "float32")
PROMPT = pack(range(1000))


@pytest.fixture
def handlers() -> Handlers:
    """A whole service without a socket: 2,048 blocks of one token."""
    settings = load({"memory": 2048 * LAYOUT.token_bytes, "block_size": 1})
    settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT})
    backing = Backing(settings)
    deliveries = Deliveries(backing)
    return Handlers(settings, backing, deliveries, Workers(backing, deliveries, settings))


class Wire:
    """A stream's other end."""

    def __init__(self) -> None:
        self.written: list[pb.OpResults] = []

    async def write(self, results: pb.OpResults) -> None:
        self.written.append(results)


async def opened(handlers: Handlers) -> tuple[Any, Wire]:
    """Attach, and store one prompt under the request id `big`."""
    wire = Wire()
    stream: Any = session.SessionStream(handlers, wire, LOCAL)
    batch = pb.OpBatch()
    attach = batch.ops.add(id=1).attach
    codec.write_namespace(Namespace("m"), attach.namespace)
    codec.write_layout(LAYOUT, attach.layout)
    acquire = batch.ops.add(id=2).acquire
    acquire.tokens, acquire.request_id = PROMPT, "big"
    results = await stream.answer(batch, asyncio.current_task())
    commit = pb.OpBatch()
    one = commit.ops.add(id=3).commit
    one.lease, one.num_tokens = results.results[1].acquire.grant.lease, 1000
    await stream.answer(commit, asyncio.current_task())
    return stream, wire


def test_an_answer_of_many_large_results_leaves_in_parts_in_order(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ANSWER_BYTES", 20_000)

    async def ask() -> list[pb.OpResults]:
        stream, wire = await opened(handlers)
        write = stream._write

        async def watched(results: pb.OpResults) -> None:
            made.append(results.ByteSize())
            await write(results)

        stream._write = watched
        batch = pb.OpBatch()
        for number in range(150):
            batch.ops.add(id=number + 10).explain.request_id = "big"
        await watched(await stream.answer(batch, asyncio.current_task()))
        return wire.written

    made: list[int] = []
    written = asyncio.run(ask())
    assert max(made) < 20_000 + 2 * 4500  # never more than that in memory
    assert [one.id for part in written for one in part.results] == list(range(10, 160))
    assert sum(part.ByteSize() for part in written) > 150 * 4000


def test_what_settles_at_once_leaves_in_parts(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "ANSWER_BYTES", 20_000)

    async def ask() -> list[pb.OpResults]:
        stream, wire = await opened(handlers)
        grant = Grant(LeaseId(7), array("i", range(1000)), 0, 0, (), Ledger(), 1.0)
        for number in range(50):
            stream._settled(number, "acquire", None, "", grant)
        await stream._flushing
        return wire.written

    written = asyncio.run(ask())
    assert max(part.ByteSize() for part in written) <= 20_000
    assert [one.id for part in written for one in part.results] == list(range(50))


def lease_of(handlers: Handlers) -> int:
    assert handlers.backing.cache is not None
    return handlers.backing.cache.snapshot(now=0.0).leases[0].lease


@pytest.mark.parametrize("shared", [False, True])
def test_a_fork_is_read_the_same_in_either_form(handlers: Handlers, shared: bool) -> None:
    asyncio.run(opened(handlers))
    worker = next(iter(handlers.workers._attached.values()))
    request = pb.ForkRequest(lease=lease_of(handlers), count=3, shared_table=shared)
    message = pb.ForkResponse()
    handlers.write_fork(handlers.fork(worker, request), message)
    children = codec.READ["fork"](message)
    assert [len(child.block_table) for child in children] == [1000] * 3
    assert len({bytes(child.block_table) for child in children}) == 1
    assert (message.ByteSize() < 2 * 4000) == shared


def test_a_fork_with_too_many_tables_is_refused_with_what_to_do(handlers: Handlers) -> None:
    asyncio.run(opened(handlers))
    handlers.settings = handlers.settings.model_copy(update={"max_message": 100_000})
    worker = next(iter(handlers.workers._attached.values()))
    with pytest.raises(InvalidRequest, match=r"30 block tables of 4,000 bytes.*`shared_table`"):
        handlers.fork(worker, pb.ForkRequest(lease=lease_of(handlers), count=30))
    assert handlers.backing.cache is not None
    assert handlers.backing.cache.num_leases == 1
    told = pb.ForkResponse()
    request = pb.ForkRequest(lease=lease_of(handlers), count=30, shared_table=True)
    handlers.write_fork(handlers.fork(worker, request), told)
    assert told.ByteSize() < 6000


def test_a_long_prompt_is_explained_with_its_beginning(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    asyncio.run(opened(handlers))
    monkeypatch.setattr(inspect, "MOST_TOLD_BYTES", 400)
    told = handlers.explain(Visitor(LOCAL), pb.ExplainRequest(request_id="big"))
    assert told.past is not None
    assert (told.past.tokens, told.past.num_tokens) == (PROMPT[:400], 1000)


def test_kept_answers_are_bounded_for_each_worker_and_in_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(answers, "WORKER_BYTES", 1000)
    monkeypatch.setattr(answers, "ALL_BYTES", 3000)
    kept = answers.KeptAnswers()
    answer = pb.ExtendResponse(blocks=bytes(300))

    def keep(worker: str, request_id: str, answer: pb.ExtendResponse = answer) -> None:
        request = pb.ExtendRequest(lease=1, num_tokens=9, request_id=request_id)
        asked = answers.question(worker, "extend", request)
        assert asked is not None
        kept.keep(asked, answer)

    for number in range(10):
        keep("one", str(number))
    assert [kept.get("one", str(number)) is not None for number in range(5, 10)] == [
        False,
        False,
        True,
        True,
        True,
    ]
    for worker in range(20):
        keep(f"w{worker}", "x")
    assert kept.num_bytes <= 3000
    assert kept.get("w19", "x") is not None
    assert kept.get("one", "9") is None
    keep("w19", "y", pb.ExtendResponse(blocks=bytes(2000)))
    assert kept.get("w19", "y") is not None  # the newest, however large
    assert kept.get("w19", "x") is None


def keep(kept: answers.KeptAnswers, tenant: str, worker: str, request_id: str, size: int) -> None:
    request = pb.ExtendRequest(lease=1, num_tokens=9, request_id=request_id)
    asked = answers.question(worker, "extend", request)
    assert asked is not None
    kept.keep(asked, pb.ExtendResponse(blocks=bytes(size)), tenant)


@given(
    kept_answers=st.lists(
        st.tuples(
            st.sampled_from(["red", "blue", "green", "stranger"]),
            st.integers(0, 3),
            st.integers(0, 9),
            st.integers(0, 400) | st.just(5000),
        ),
        max_size=150,
    )
)
def test_a_tenant_pushes_out_no_answer_that_another_keeps_within_its_share(
    kept_answers: list[tuple[str, int, int, int]],
) -> None:
    """Half of 3,000 bytes is kept for three tenants, 500 for each."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answers, "ALL_BYTES", 3000)
        kept = answers.KeptAnswers()
        kept.set_tenants(["red", "blue", "green"])
        for tenant, worker, number, size in kept_answers:
            before = {one: kept.used(one) for one in ("red", "blue", "green") if one != tenant}
            keep(kept, tenant, f"{tenant}{worker}", str(number), size)
            assert kept.get(f"{tenant}{worker}", str(number)) is not None
            assert kept.num_bytes <= 3000 + 5000
            for other, used in before.items():
                # What is dropped is a whole answer, so that it may end up to one below its share.
                assert kept.used(other) == used or used > 500
            kept._room.check_counts()


def test_answers_go_with_their_worker(handlers: Handlers) -> None:
    asyncio.run(opened(handlers))
    (worker,) = handlers.workers._attached.values()
    request = pb.ExtendRequest(lease=1, num_tokens=9, request_id="r")
    asked = answers.question(worker.key, "extend", request)
    assert asked is not None
    handlers.keep(worker, asked, pb.ExtendResponse(blocks=bytes(300)))
    assert handlers.answers.num_bytes > 300
    handlers.workers.leave(worker, gone=True)
    assert handlers.answers.num_bytes == 0
    handlers.keep(worker, asked, pb.ExtendResponse(blocks=bytes(300)))  # made as it left
    assert handlers.answers.num_bytes == 0


def test_answers_that_nobody_can_wait_for_any_more_make_room(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = 100.0
    monkeypatch.setattr(answers, "monotonic", lambda: clock)
    kept = answers.KeptAnswers()
    keep(kept, "", "one", "a", 300)
    keep(kept, "", "two", "a", 300)
    clock += answers.MOST_AGE_S - 1
    keep(kept, "", "two", "b", 300)
    assert kept.get("one", "a") is not None
    clock += 2
    keep(kept, "", "two", "c", 300)
    assert [kept.get(*one) is not None for one in (("one", "a"), ("two", "a"))] == [False, False]
    assert kept.get("two", "b") is not None


def test_a_clock_that_is_set_back_changes_no_rate(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An hour back between two readings, ten seconds and twenty requests apart."""
    wall, clock = iter((9_000.0, 5_410.0)), iter((100.0, 110.0))
    monkeypatch.setattr(sampler, "time", lambda: next(wall))
    asyncio.run(opened(handlers))
    monkeypatch.setattr(sampler, "monotonic", lambda: next(clock))
    handlers.sampler.read()
    cache = handlers.backing.cache
    assert cache is not None
    for number in range(20):
        worker = next(iter(handlers.workers._attached.values()))
        cache.acquire(worker.id, Namespace("m"), pack([number]), now=1.0)
    handlers.sampler.read()
    assert handlers.sampler.requests_per_s() == pytest.approx(2.0)
