"""Whoever stops waiting ends their own call and nothing else, at whatever moment it comes."""

from __future__ import annotations

import asyncio
import random
import sys
import threading
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from client.conftest import CtrlC
from patience import PATIENCE_S
from prefixcache.client import AsyncLease, AsyncSession, connect_async
from prefixcache.client import session as session_module
from prefixcache.client.ops import Reply, Step
from prefixcache.client.session_core import SessionCore
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

PROMPT = list(range(10))
NUM_TICKS = 9
"""Turns of the loop after which a call is cancelled: from before it began until it is answered."""
PACES = {"in a hurry": 0.0, "at leisure": 0.003}
"""Seconds that a turn takes.  At leisure the answer is often there before the call is cancelled."""


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    # A ttl of a minute: what is still there at the end was leaked, not merely kept alive.
    with running(f"unix:{sockets}/cancel.sock", *sizes(256, 4), "--ttl", "60") as process:
        yield process


async def cancelled(call: Awaitable[Any], ticks: int, turn_s: float = 0.0) -> Any:
    """Cancel a call after so many turns of the loop; give what it gave if it was quicker."""
    task = asyncio.ensure_future(call)
    for _ in range(ticks):
        await asyncio.sleep(turn_s)
    task.cancel()
    try:
        return await task
    except (asyncio.CancelledError, CacheError):
        return None


async def no_leases(session: AsyncSession) -> None:
    for _ in range(1000):
        if not (await session.snapshot()).leases:
            return
        await asyncio.sleep(0.01)
    raise AssertionError((await session.snapshot()).leases)


async def leave(lease: AsyncLease) -> None:
    async with lease:
        await asyncio.sleep(0)


async def batch_of(session: AsyncSession, lease: AsyncLease) -> list[AsyncLease]:
    """Ask for several things; each may fail alone, and what was granted is given."""
    async with session.batch() as batch:
        acquired = batch.acquire(PROMPT)
        batch.extend(lease, 20)
        forked = batch.fork(lease, 3)  # refused while nothing of the lease is committed
    given = [] if acquired.error else [acquired.result()]
    return given if forked.error else [*given, *forked.result()]


async def give_back(given: Any) -> None:
    """Release what a call gave: each release is sent by its call, whoever is cancelled here."""
    leases = given if isinstance(given, list) else [given]
    await asyncio.gather(*[lease.release() for lease in leases if isinstance(lease, AsyncLease)])


CALLS: dict[str, Callable[[AsyncSession, AsyncLease], Awaitable[Any]]] = {
    "acquire": lambda session, lease: session.acquire(PROMPT),
    "acquire a long one": lambda session, lease: session.acquire(list(range(900))),
    "acquire and wait": lambda session, lease: session.acquire(list(range(1000)), wait_s=30.0),
    "commit": lambda session, lease: lease.commit(5),
    "extend": lambda session, lease: lease.extend(17),
    "extend and wait": lambda session, lease: lease.extend(1000, wait_s=30.0),
    "truncate": lambda session, lease: lease.truncate(9),
    "fork": lambda session, lease: lease.fork(2),
    "release": lambda session, lease: lease.release(),
    "leave": lambda session, lease: leave(lease),
    "lookup": lambda session, lease: session.lookup(PROMPT),
    "explain": lambda session, lease: session.explain(PROMPT),
    "snapshot": lambda session, lease: session.snapshot(),
    "renew": lambda session, lease: session.renew(),
    "batch": batch_of,
}


@pytest.mark.parametrize("pace", PACES)
@pytest.mark.parametrize("what", CALLS)
def test_a_call_that_is_cancelled_at_any_turn_of_the_loop_ends_alone(
    service: ServiceProcess, what: str, pace: str
) -> None:
    async def run() -> None:
        async with (
            await connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):
            for ticks in range(NUM_TICKS):
                bystander = await session.acquire([7] * 12)
                lease = await session.acquire(PROMPT, reserve=10)
                given = await cancelled(CALLS[what](session, lease), ticks, PACES[pace])
                assert session.alive, ticks
                await bystander.commit(12)
                if what != "release":
                    await lease.release()
                await give_back(given)
                await bystander.release()
                await no_leases(session)
                assert not session._pending

    asyncio.run(run())


def test_a_release_that_never_ran_has_released(service: ServiceProcess) -> None:
    async def run() -> None:
        async with (
            await connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):
            lease = await session.acquire(PROMPT)
            assert await cancelled(lease.release(), ticks=0) is None
            await no_leases(session)

    asyncio.run(run())


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_of_calls_that_are_cancelled_leaves_nothing_behind(
    service: ServiceProcess, seed: int
) -> None:
    chance = random.Random(seed)

    async def one(session: AsyncSession, number: int) -> None:
        async with await session.acquire([number, *PROMPT], reserve=8) as lease:
            for _ in range(chance.randrange(4)):
                await give_back(await CALLS[chance.choice([*CALLS])](session, lease))

    async def run() -> None:
        async with (
            await connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):
            bystander = await session.acquire([7] * 12)
            for _ in range(6):
                tasks = [asyncio.create_task(one(session, number)) for number in range(12)]
                for task in chance.sample(tasks, len(tasks)):
                    for _ in range(chance.randrange(NUM_TICKS)):
                        await asyncio.sleep(0)
                    task.cancel()
                for outcome in await asyncio.gather(*tasks, return_exceptions=True):
                    assert outcome is None or isinstance(
                        outcome, CacheError | asyncio.CancelledError
                    )
                assert session.alive
                await bystander.commit(12)
            await bystander.release()
            await no_leases(session)
            assert not session._pending

    asyncio.run(run())


@pytest.mark.parametrize("ticks", range(8))
@pytest.mark.parametrize("whose", ["session", "client"])
def test_a_close_that_is_cancelled_closes_all_the_same(
    service: ServiceProcess, whose: str, ticks: int
) -> None:
    async def run() -> None:
        client = await connect_async(service.target)
        session = await client.attach("model", LAYOUT)
        await session.acquire(PROMPT)
        closer = session if whose == "session" else client
        await cancelled(closer.close(), ticks)
        await closer.close()
        assert not session.alive
        if whose == "session":
            snapshot = await client.snapshot()
            assert (snapshot.leases, snapshot.quarantined) == ((), 0)
            await client.close()

    asyncio.run(run())
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().leases == ()
        assert client.snapshot().quarantined == 0


def test_a_client_in_another_event_loop_says_so(service: ServiceProcess) -> None:
    async def opened() -> tuple[Any, AsyncSession, AsyncLease]:
        client = await connect_async(service.target)
        session = await client.attach("model", LAYOUT)
        return client, session, await session.acquire(PROMPT)

    client, session, lease = asyncio.run(opened())

    async def run(call: Callable[[], Awaitable[Any]]) -> Any:
        return await call()

    calls = (
        client.snapshot,
        lambda: client.attach("model", LAYOUT),
        lambda: session.acquire(PROMPT),
        session.renew,
        lambda: lease.commit(3),
        lambda: lease.release(),
    )
    for call in calls:
        with pytest.raises(InvalidRequest, match="belongs to another event loop"):
            asyncio.run(run(call))
    for outside in (lambda: session.post(session.batch()), lease.release):
        with pytest.raises(InvalidRequest, match="belongs to another event loop"):
            outside()  # there is none in this thread
    asyncio.run(run(session.close))
    asyncio.run(run(client.close))
    assert not session.alive


def test_a_session_that_ended_says_what_was_lost_and_not_that_there_is_no_service(
    service: ServiceProcess,
) -> None:
    with prefixcache.connect(service.target) as client:
        session = client.attach("model", LAYOUT)
        leases = [session.acquire([number]) for number in range(3)]
        session._call.cancel()
        eventually(lambda: not session.alive)
        with pytest.raises(ServiceUnavailable, match=r"the session ended: .*; 3 leases") as told:
            leases[0].commit(1)
        assert "attach again" in str(told.value)
        assert "Start one with" not in str(told.value)


def test_ctrl_c_in_any_place_ends_the_call_alone(service: ServiceProcess, ctrl_c: CtrlC) -> None:
    """A signal comes at a drawn moment of a call of the main thread, many times."""
    chance = random.Random(3)
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        bystander = session.acquire([7] * 12)
        blocker = session.acquire(list(range(900)))
        for number in range(60):
            with pytest.raises(KeyboardInterrupt), ctrl_c(0.0005 + chance.random() * 0.003):
                session.acquire(list(range(2000, 2900)), wait_s=30.0)
            assert session.alive, number
            bystander.commit(12)
        blocker.release()
        bystander.release()
        eventually(lambda: not client.snapshot().leases)
        assert not session._pending


def test_ctrl_c_while_sessions_begin_and_end_harms_no_other_one(
    service: ServiceProcess, ctrl_c: CtrlC
) -> None:
    """A stream that is opened or cancelled by whom it interrupts would leave the channel deaf."""
    chance = random.Random(5)
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as bystander,
    ):

        def come_and_go() -> None:
            while True:
                with client.attach("model", LAYOUT, salt="another") as session:
                    session.lookup([1, 2, 3])

        for number in range(150):
            with pytest.raises(KeyboardInterrupt), ctrl_c(0.0001 + chance.random() * 0.004):
                come_and_go()
            assert bystander.alive, number
            with bystander.acquire([7] * 12) as lease:
                lease.commit(12)


def test_ctrl_c_at_any_step_of_a_wait_leaves_the_session_whole(service: ServiceProcess) -> None:
    """It comes at every line, call and return of what waits, one after the other."""
    watched = (threading.__file__, session_module.__file__)
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        for number in range(1, 1000):
            left = number

            def step(frame: Any, event: str, arg: Any) -> Any:
                nonlocal left
                code = frame.f_code  # Python itself ignores errors as it closes a generator
                left -= code.co_filename in watched and code.co_name != "<genexpr>"
                if not left:
                    raise KeyboardInterrupt
                return step

            sys.settrace(step)
            try:
                session.renew()
                break
            except KeyboardInterrupt:
                sys.settrace(None)
            finally:
                sys.settrace(None)
            session.renew()
            assert session.alive, number
        assert number > 10


def test_what_is_asked_while_the_session_is_being_lost_is_answered() -> None:
    """Another thread loses it after this one has looked, and before its reply is in the books."""

    class Core(SessionCore[Any]):
        def emit(self, message: bytes | None) -> None:
            pass

        def hang_up(self) -> None:
            pass

    class Books(dict[int, Reply[Any]]):
        def __setitem__(self, op_id: int, reply: Reply[Any]) -> None:
            core.lose(ServiceUnavailable("gone"))
            super().__setitem__(op_id, reply)

    core = Core(None)  # type: ignore[arg-type]  # it has no use for its connection here
    core._pending = Books()
    step = Step(core.ids)
    replies = [step.ask("snapshot"), step.ask("renew")]
    core.send(step)
    for reply in replies:
        with pytest.raises(ServiceUnavailable, match="gone"):
            reply.result()
    assert not core._pending


@pytest.mark.slow
def test_a_callback_that_would_wait_for_its_own_thread_is_told(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        told: list[BaseException] = []
        done = threading.Event()

        def callback(_: Any) -> None:
            try:
                session.lookup(PROMPT)
            except BaseException as error:  # noqa: BLE001 - looked at below
                told.append(error)
            done.set()

        session.acquire_later(list(range(30)), wait_s=0.0).add_done_callback(callback)
        assert done.wait(PATIENCE_S)
        # The answer may have come before the callback was hung on it: then this thread ran it.
        assert not told or isinstance(told[0], InvalidRequest)
        assert session.alive
