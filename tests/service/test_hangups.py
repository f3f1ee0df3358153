"""Callers that hang up while their call waits: nobody else notices, and nothing stays out.

`PREFIXCACHE_HANGUPS=10000 pytest -s tests/service/test_hangups.py` tries as many as you like and
says what came of them.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import threading
import time
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
from prefixcache.errors import CacheError, PoolExhausted
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.deliveries import Deliveries, Outcome
from prefixcache.service.grpc import unary as unary_calls
from prefixcache.types import TicketId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, eventually, running, sizes
from service.test_turns import LAYOUT as SMALL
from service.test_turns import whole

HANGUPS = int(os.environ.get("PREFIXCACHE_HANGUPS", "400"))
AT_A_TIME = 50
WORKERS = 4


def test_callers_that_hang_up_harm_nobody_and_leave_nothing(tmp_path: Path) -> None:
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

    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service,
        prefixcache.connect(service.target, timeout_s=PATIENCE_S) as client,
    ):
        threads = [threading.Thread(target=work, args=(client, n)) for n in range(WORKERS)]
        for thread in threads:
            thread.start()
        granted = asyncio.run(hang_up_often(service.target, HANGUPS))
        stop.set()
        for thread in threads:
            thread.join(PATIENCE_S)
        unanswered = [n for n, thread in enumerate(threads) if thread.is_alive()]
        assert (ended, unanswered) == ([], [])
        assert min(answered) > 0
        eventually(lambda: not client.snapshot().leases and not client.snapshot().waiting)
        sys.stdout.write(
            f"{HANGUPS:,} calls, {HANGUPS - granted:,} hung up, {granted:,} granted; "
            f"{sum(answered):,} requests of {WORKERS} sessions answered meanwhile: "
            f"{len(ended)} sessions ended, {len(unanswered)} answers missing, "
            f"{len(client.snapshot().leases)} leases left\n"
        )
        assert "Traceback" not in service.log()


async def hang_up_often(target: str, count: int) -> int:
    """Make `count` unary calls that wait, and hang up at random; give how many were granted."""
    chance = random.Random(7)
    granted = 0
    async with grpc.aio.insecure_channel(target) as channel:

        def call(verb: str, **fields: Any) -> Any:
            rpc = unary.RPCS[verb]
            method: Any = channel.unary_unary(
                rpc.path, rpc.request.SerializeToString, rpc.response.FromString
            )
            return method(rpc.request(**fields))

        space, layout = pb.Namespace(model="tiny"), pb.Layout()
        codec.write_layout(LAYOUT, layout)
        key = (await call("attach", namespace=space, layout=layout)).worker_key

        async def one(number: int) -> None:
            nonlocal granted
            tokens = pack([number] * chance.randrange(20, 200))
            fields = {"worker_key": key, "tokens": tokens, "request_id": f"r{number}"}
            asked = call("acquire", wait_s=60.0, **fields)
            try:
                async with asyncio.timeout(chance.random() * 0.05):
                    answer = await asked
                granted += 1
            except TimeoutError:
                asked.cancel()
                # The answer may be on its way, which no server can see.  The id tells.
                try:
                    answer = await call("acquire", **fields)
                except grpc.RpcError:
                    return
            await call("release", worker_key=key, lease=answer.grant.lease)

        for start in range(0, count, AT_A_TIME):
            await asyncio.gather(*(one(n) for n in range(start, min(count, start + AT_A_TIME))))
    return granted


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


@pytest.mark.parametrize("hung_up", ["before room came", "after it came", "after it was told"])
def test_a_call_that_is_made_again_keeps_the_lease_when_the_first_one_is_hung_up(hung_up: str):
    asyncio.run(ask_again(hung_up))


async def ask_again(hung_up: str) -> None:
    """Ask twice with one id, hang the first call up, and use the lease that the second one got."""
    handlers = whole()
    serve: Any = {
        verb: unary_calls._serve(handlers, verb, unary.RPCS[verb].response)
        for verb in ("attach", "acquire", "commit")
    }

    def call(verb: str, **fields: Any) -> asyncio.Task[Any]:
        request = unary.RPCS[verb].request(**fields)
        return asyncio.create_task(serve[verb](request, None, LOCAL))

    space, layout = pb.Namespace(model="tiny"), pb.Layout()
    codec.write_layout(SMALL, layout)
    key = (await call("attach", namespace=space, layout=layout)).worker_key
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
