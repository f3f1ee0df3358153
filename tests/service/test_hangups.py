"""Callers that hang up while their call waits: nobody else notices, and nothing stays out.

`PREFIXCACHE_HANGUPS=10000 pytest -s tests/service/test_hangups.py` tries as many as you like and
says what came of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client, codec, unary
from prefixcache.errors import CacheError, PoolExhausted, ServiceUnavailable
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.deliveries import Deliveries, Outcome
from prefixcache.service.grpc import unary as unary_calls
from prefixcache.service.handlers import Handlers
from prefixcache.types import TicketId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, eventually, running, sizes
from service.test_turns import LAYOUT as SMALL
from service.test_turns import whole

HANGUPS = int(os.environ.get("PREFIXCACHE_HANGUPS", "120"))
AT_A_TIME = 10
WORKERS = 4


@pytest.mark.parametrize("whose", ["the client", "a stub that names its requests", "a rude stub"])
def test_callers_that_hang_up_harm_nobody_and_leave_nothing(tmp_path: Path, whose: str) -> None:
    ended: list[str] = []
    answered = [0] * WORKERS
    stop = threading.Event()

    def work(client: Client, number: int) -> None:
        chance = random.Random(number)
        try:
            with client.attach("tiny", LAYOUT, salt=f"w{number}", name=f"w{number}") as session:
                while not stop.is_set():
                    tokens = [chance.randrange(1000) for _ in range(chance.randrange(20, 200))]
                    try:
                        with session.acquire(tokens, wait_s=30.0) as lease:
                            lease.commit(len(tokens))
                    except PoolExhausted:
                        pass  # an answer, too
                    answered[number] += 1
        except CacheError as error:
            ended.append(f"w{number}: {error}")

    # An answer that was on its way already is a lease of which its caller knows nothing.  Who does
    # not give it back by its request's id keeps it until its time to live is over, and its blocks
    # as long as he may write to them.
    is_rude = whose == "a rude stub"
    how = [*sizes(1024, 4), "--ttl", "2"] if is_rude else [*sizes(64, 4), "--ttl", "60"]
    with (
        running(f"unix:{tmp_path}/s.sock", *how) as service,
        prefixcache.connect(service.target, timeout_s=PATIENCE_S) as client,
    ):
        threads = [threading.Thread(target=work, args=(client, n)) for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        key, granted = asyncio.run(hang_up_often(service.target, whose, HANGUPS))
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        unanswered = [n for n, thread in enumerate(threads) if thread.is_alive()]
        assert (ended, unanswered) == ([], [])
        assert min(answered) > 0
        eventually(lambda: not client.snapshot().leases and not client.snapshot().waiting)
        sys.stdout.write(
            f"{whose}: {HANGUPS:,} calls, {HANGUPS - granted:,} hung up, {granted:,} granted; "
            f"{sum(answered):,} requests of {WORKERS} sessions answered meanwhile: "
            f"{len(ended)} sessions ended, {len(unanswered)} answers missing, "
            f"{len(client.snapshot().leases)} leases left\n"
        )
        if not is_rude:
            client.call("detach", pb.DetachRequest(worker_key=key))
            assert client.snapshot().quarantined == 0
        assert "Traceback" not in service.log()


async def hang_up_often(target: str, whose: str, count: int) -> tuple[str, int]:
    """Make `count` unary calls that wait, and hang up at random.

    Returns:
        The key of their worker, and how many were granted.
    """
    chance = random.Random(7)
    granted = 0
    async with (
        grpc.aio.insecure_channel(target) as channel,
        await prefixcache.connect_async(target) as client,
    ):

        async def call(verb: str, **fields: Any) -> Any:
            request = unary.RPCS[verb].request(**fields)
            if whose == "the client":
                return await client.call(verb, request)
            return await unary.asking(channel, verb)(request)

        space, layout = pb.Namespace(model="tiny"), pb.Layout()
        codec.write_layout(LAYOUT, layout)
        key = (await call("attach", namespace=space, layout=layout)).worker_key

        async def one(number: int) -> None:
            nonlocal granted, key
            fields: dict[str, Any] = {"tokens": pack([number] * chance.randrange(20, 200))}
            if whose == "a stub that names its requests":
                fields["request_id"] = f"r{number}"
            try:
                async with asyncio.timeout(chance.random() * 0.05):
                    answer = await call("acquire", worker_key=key, wait_s=60.0, **fields)
            except TimeoutError:
                if "request_id" in fields:
                    await call("release", worker_key=key, request_id=fields["request_id"])
                return
            except grpc.RpcError as error:  # so slow a machine that it was silent for its ttl
                if whose != "a rude stub" or error.code() is not grpc.StatusCode.NOT_FOUND:
                    raise
                key = (await call("attach", namespace=space, layout=layout)).worker_key
                return
            granted += 1
            with contextlib.suppress(*([grpc.RpcError] if whose == "a rude stub" else [])):
                await call("release", worker_key=key, lease=answer.grant.lease)

        for start in range(0, count, AT_A_TIME):
            await asyncio.gather(*(one(n) for n in range(start, min(count, start + AT_A_TIME))))
    return key, granted


def test_callers_that_hang_up_in_the_very_moment_in_which_room_comes_back(tmp_path: Path) -> None:
    rpc = unary.RPCS["acquire"]
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target, timeout_s=PATIENCE_S) as client,
        client.attach("tiny", LAYOUT) as holder,
        client.attach("tiny", LAYOUT, salt="other") as third,
        grpc.insecure_channel(service.target) as channel,
    ):
        space, layout = pb.Namespace(model="tiny"), pb.Layout()
        codec.write_layout(LAYOUT, layout)
        method: Any = channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        for turn in range(5):
            caller = client.call("attach", pb.AttachRequest(namespace=space, layout=layout))
            everything = holder.acquire(list(range(256)))
            calls = [
                method.future(
                    pb.AcquireRequest(
                        worker_key=caller.worker_key,
                        tokens=pack([turn * 100 + n] * 12),
                        wait_s=30.0,
                    )
                )
                for n in range(60)
            ]
            eventually(lambda calls=calls: client.snapshot().waiting == len(calls))
            with ThreadPoolExecutor() as pool:
                behind_them = pool.submit(third.acquire, [turn] * 16, wait_s=30.0)
                eventually(lambda calls=calls: client.snapshot().waiting == len(calls) + 1)
                service.signal(signal.SIGSTOP)  # so that it hears of all this at once
                for call in calls:
                    call.cancel()
                released = pool.submit(everything.release)
                time.sleep(0.05)
                service.signal(signal.SIGCONT)
                released.result(PATIENCE_S)
                behind_them.result(PATIENCE_S).release()
            # An answer that was on its way already is a lease of which its caller knows nothing.
            client.call("detach", pb.DetachRequest(worker_key=caller.worker_key))
            eventually(lambda: not client.snapshot().leases)
        assert holder.alive
        assert third.alive


class Caller:
    """Who a call came from, as the service sees it."""

    def __init__(self, *, is_gone: bool = False) -> None:
        self.is_gone = is_gone
        self.hears = asyncio.Event()
        self.hears.set()

    async def send_initial_metadata(self, metadata: Any) -> None:
        await self.hears.wait()
        if self.is_gone:
            raise grpc.aio.BaseError("its stream was reset")

    def add_done_callback(self, callback: Any) -> None:
        pass


Serve = Callable[..., "asyncio.Task[Any]"]


async def attached_to(handlers: Handlers) -> tuple[str, Serve]:
    """Attach by unary calls; give the worker's key, and what makes calls."""
    serve: Any = {
        verb: unary_calls._serve(handlers, verb, unary.RPCS[verb].response)
        for verb in ("attach", "acquire", "commit", "fork", "release")
    }

    def call(verb: str, caller: Any = None, **fields: Any) -> asyncio.Task[Any]:
        request = unary.RPCS[verb].request(**fields)
        return asyncio.create_task(serve[verb](request, caller or Caller(), LOCAL))

    space, layout = pb.Namespace(model="tiny"), pb.Layout()
    codec.write_layout(SMALL, layout)
    return (await call("attach", namespace=space, layout=layout)).worker_key, call


@pytest.mark.parametrize("hung_up", ["before room came", "after it came", "after it was told"])
def test_a_call_that_is_made_again_keeps_the_lease_when_the_first_one_is_hung_up(hung_up: str):
    asyncio.run(ask_again(hung_up))


async def ask_again(hung_up: str) -> None:
    """Ask twice with one id, hang the first call up, and use the lease that the second one got."""
    handlers = whole()
    key, call = await attached_to(handlers)
    all_of_it = await call("acquire", worker_key=key, tokens=pack(range(256)))
    fields = {"worker_key": key, "tokens": pack([7] * 12), "request_id": "r", "wait_s": 60.0}
    first = call("acquire", **fields)
    second = call("acquire", **fields) if hung_up != "after it was told" else None
    await asyncio.sleep(0)
    if hung_up == "before room came":
        first.cancel()  # it hears of that in its next turn
    worker = handlers.workers.find(key, LOCAL)
    handlers.release(worker, pb.ReleaseRequest(lease=all_of_it.grant.lease))
    handlers.deliveries.settle()
    if second is None:
        told: Any = handlers.acquire(worker, pb.AcquireRequest(**fields))
        worker.take("r", told.lease)  # as a session does
        lease = told.lease
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    if second is not None:
        lease = (await second).grant.lease
    await call("commit", worker_key=key, lease=lease, num_tokens=12)
    assert handlers.backing.cache is not None
    assert not worker.handed
    handlers.backing.cache.check()


@pytest.mark.parametrize("verb", ["acquire", "fork"])
@pytest.mark.parametrize("how", ["its stream was reset", "it is cancelled while it is told"])
@pytest.mark.parametrize("request_id", ["", "r"])
def test_leases_whose_caller_is_gone_when_they_are_to_be_told_are_given_back(
    verb: str, how: str, request_id: str
) -> None:
    async def run() -> None:
        handlers = whole()
        key, call = await attached_to(handlers)
        tokens = pack(range(12))
        parent = (await call("acquire", worker_key=key, tokens=tokens)).grant.lease
        await call("commit", worker_key=key, lease=parent, num_tokens=12)
        asks: dict[str, Any] = {"worker_key": key, "request_id": request_id}
        asks |= {"lease": parent, "count": 2} if verb == "fork" else {"tokens": pack([7] * 12)}
        cache = handlers.backing.cache
        assert cache is not None
        caller = Caller(is_gone=how == "its stream was reset")
        if how == "it is cancelled while it is told":
            caller.hears.clear()
        lost = call(verb, caller, **asks)
        for _ in range(3):
            await asyncio.sleep(0)
        if not caller.is_gone:
            assert cache.num_leases > 1
            lost.cancel()
        with pytest.raises(asyncio.CancelledError):
            await lost
        assert cache.num_leases == 1
        # The same id is a new request now, and no kept answer names a lease that has ended.
        answer = await call(verb, **asks)
        leases = [answer.grant] if verb == "acquire" else list(answer.children)
        assert cache.num_leases == 1 + len(leases)
        for one in leases:
            await call("release", worker_key=key, lease=one.lease)
        assert cache.num_leases == 1
        cache.check()

    asyncio.run(run())


@pytest.mark.parametrize("verb", ["acquire", "fork"])
def test_a_lease_of_which_somebody_was_told_outlives_a_call_that_asks_again_and_is_hung_up(
    verb: str,
) -> None:
    async def run() -> None:
        handlers = whole()
        key, call = await attached_to(handlers)
        parent = (await call("acquire", worker_key=key, tokens=pack(range(12)))).grant.lease
        await call("commit", worker_key=key, lease=parent, num_tokens=12)
        asks: dict[str, Any] = {"worker_key": key, "request_id": "r"}
        asks |= {"lease": parent, "count": 2} if verb == "fork" else {"tokens": pack([7] * 12)}
        answer = await call(verb, **asks)
        with pytest.raises(asyncio.CancelledError):
            await call(verb, Caller(is_gone=True), **asks)
        assert (await call(verb, **asks)) == answer
        cache = handlers.backing.cache
        assert cache is not None
        assert cache.num_leases == (2 if verb == "acquire" else 3)
        # Whoever does not know whether he was told names the request.
        await call("release", worker_key=key, request_id="r")
        assert cache.num_leases == 1
        assert (await call("release", worker_key=key, request_id="r")).num_freed == 0
        assert (await call(verb, **asks)) != answer
        cache.check()

    asyncio.run(run())


class LosesAnswers:
    """A channel over which calls reach the service, and answers to them come too late."""

    def __init__(self, channel: Any) -> None:
        self._channel = channel

    def unary_unary(self, path: str, *args: Any) -> Any:
        method = self._channel.unary_unary(path, *args)

        def call(request: Any, timeout: float, metadata: Any) -> Any:
            assert method(request, timeout=timeout, metadata=metadata).grant.lease
            return method.future(request, timeout=-1.0, metadata=metadata)

        return method if path.endswith("/Release") else SimpleNamespace(future=call)


@pytest.mark.parametrize("request_id", ["", "mine"])
def test_a_client_gives_back_what_a_call_may_have_got_whose_answer_came_too_late(
    tmp_path: Path, request_id: str
) -> None:
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), "--ttl", "600") as service,
        prefixcache.connect(service.target, timeout_s=PATIENCE_S) as client,
    ):
        space, layout = pb.Namespace(model="tiny"), pb.Layout()
        codec.write_layout(LAYOUT, layout)
        key = client.call("attach", pb.AttachRequest(namespace=space, layout=layout)).worker_key
        whole_channel, client.channel = client.channel, LosesAnswers(client.channel)
        request = pb.AcquireRequest(worker_key=key, tokens=pack(range(12)), request_id=request_id)
        try:
            with pytest.raises(ServiceUnavailable, match="no answer within"):
                client.call("acquire", request)
        finally:
            client.channel = whole_channel
        # With an id of its own the caller can ask again, and gets the lease.
        eventually(lambda: len(client.snapshot().leases) == bool(request_id))
        asyncio.run(cancel_as_it_comes(service.target, request))
        eventually(lambda: len(client.snapshot().leases) == bool(request_id))


async def cancel_as_it_comes(target: str, request: pb.AcquireRequest) -> None:
    """Be cancelled in the moment in which the answer is there, and nobody has looked at it."""
    async with await prefixcache.connect_async(target) as client:
        whole_channel, answers = client.channel, []

        def unary_unary(path: str, *args: Any) -> Any:
            method = whole_channel.unary_unary(path, *args)

            async def call(*args: Any, **kwargs: Any) -> None:
                answers.append(await method(*args, **kwargs))
                task.cancel()
                await asyncio.sleep(60.0)

            return method if path.endswith("/Release") else call

        client.channel = SimpleNamespace(unary_unary=unary_unary, close=whole_channel.close)
        task = asyncio.create_task(client.call("acquire", request))
        with pytest.raises(asyncio.CancelledError):
            await task
        assert answers[0].grant.lease


def test_an_outcome_that_cannot_be_delivered_stops_neither_the_step_nor_those_behind_it() -> None:
    settled: list[tuple[TicketId, Outcome]] = [
        (TicketId(n), PoolExhausted(f"no {n}")) for n in (1, 2, 3)
    ]
    cache = SimpleNamespace(
        take_outcomes=lambda: [settled.pop(0)] if settled else [], next_deadline=lambda: None
    )
    backing: Any = SimpleNamespace(cache=cache)
    deliveries, heard = Deliveries(backing), []

    def deliver(outcome: Outcome) -> None:
        heard.append(str(outcome))
        if len(heard) == 2:
            raise asyncio.InvalidStateError

    for n in (1, 2, 3):
        deliveries.enter(TicketId(n), deliver)
    deliveries.settle()
    assert heard == ["no 1", "no 2", "no 3"]
    deliveries.enter(TicketId(4), lambda outcome: [][1])
    deliveries.refuse(TicketId(4), PoolExhausted("no 4"))  # no more than that


def test_what_hears_of_each_step_keeps_no_outcome_from_who_waits_for_it() -> None:
    settled: list[tuple[TicketId, Outcome]] = [(TicketId(1), PoolExhausted("no 1"))]
    cache = SimpleNamespace(
        take_outcomes=lambda: [settled.pop(0)] if settled else [], next_deadline=lambda: None
    )
    backing: Any = SimpleNamespace(cache=cache)
    deliveries, heard = Deliveries(backing), []
    deliveries.on_settle = lambda: [][1]
    deliveries.enter(TicketId(1), lambda outcome: heard.append(str(outcome)))
    deliveries.settle()
    assert heard == ["no 1"]


def test_a_call_that_waits_with_a_session_s_key_is_answered_when_the_session_ends(
    tmp_path: Path,
) -> None:
    """It has no stream of its own whose end would tell it, and no ticket any more."""
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target) as client,
    ):
        session = client.attach("tiny", LAYOUT)
        session.acquire(range(128))
        rpc = unary.RPCS["acquire"]
        method: Any = client.channel.unary_unary(
            rpc.path, rpc.request.SerializeToString, rpc.response.FromString
        )
        call = method.future(
            rpc.request(
                worker_key=session.key,
                namespace=pb.Namespace(model="tiny"),
                tokens=pack(range(1000, 1200)),
                wait_s=50.0,
            ),
            timeout=PATIENCE_S,
        )
        eventually(lambda: client.snapshot().waiting == 1)
        session.close()
        error = call.exception(PATIENCE_S)
        assert (error.code(), "left while this call waited" in error.details()) == (
            grpc.StatusCode.NOT_FOUND,
            True,
        )
