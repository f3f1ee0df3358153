"""Every verb of the wire, given up at any moment: that call ends, and nothing else does."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from client.conftest import CtrlC
from client.test_cancellation import NUM_TICKS, cancelled
from prefixcache.client import codec, unary
from prefixcache.errors import CacheError, ServiceUnavailable
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

SPACE = pb.Namespace(model="model")
PROMPT = pack(range(10))


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    # A ttl of a minute: what is still there at the end was leaked, not merely kept alive.
    flags = ("--ttl", "60", "--max-watchers", "4")
    with running(f"unix:{sockets}/verbs.sock", *sizes(256, 4), *flags) as process:
        yield process


def asked(verb: str, key: str, lease: int) -> Any:
    """Give a request that is granted, with the key of a worker and one of its leases."""
    fields: dict[str, Any] = {}
    request = unary.RPCS[verb].request()
    names = {field.name for field in request.DESCRIPTOR.fields}
    if "worker_key" in names and verb not in ("attach", "detach"):
        fields["worker_key"] = key
    if "lease" in names:
        fields["lease"] = lease
    if "tokens" in names:
        fields["tokens"] = PROMPT
    if "namespace" in names and verb not in ("acquire", "lookup", "explain", "tree", "quota"):
        fields["namespace"] = SPACE
    fields |= {
        "acquire": {"tokens": pack(range(900)), "wait_s": 0.5},
        "commit": {"num_tokens": 10},
        "extend": {"num_tokens": 14},
        "fork": {"count": 2},
        "truncate": {"num_tokens": 10},
        "pin": {"ttl_s": 1.0},
        "quota": {"tenant": "t"},
    }.get(verb, {})
    for name, value in fields.items():
        if hasattr(value, "DESCRIPTOR"):
            getattr(request, name).CopyFrom(value)
        else:
            setattr(request, name, value)
    if verb == "attach":
        codec.write_layout(LAYOUT, request.layout)
    return request


def attached(client: Any) -> Any:
    """Ask for a worker without a stream."""
    request = pb.AttachRequest(namespace=SPACE)
    codec.write_layout(LAYOUT, request.layout)
    return client.call("attach", request)


@pytest.mark.parametrize("verb", unary.RPCS)
def test_a_unary_call_that_is_cancelled_at_any_turn_of_the_loop_ends_alone(
    service: ServiceProcess, verb: str
) -> None:
    async def run() -> None:
        async with (
            await prefixcache.connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):
            key = (await attached(client)).worker_key
            bystander = await session.acquire([7] * 12)
            lost: list[str] = []
            for ticks in range(NUM_TICKS):
                mine = await client.call(
                    "acquire", pb.AcquireRequest(worker_key=key, tokens=PROMPT)
                )
                lease = mine.grant.lease
                await client.call(
                    "commit", pb.CommitRequest(worker_key=key, lease=lease, num_tokens=10)
                )
                request = asked(verb, key, lease)
                if verb == "detach":
                    lost.append((await attached(client)).worker_key)
                    request.worker_key = lost[-1]
                answer = await cancelled(client.call(verb, request), ticks)
                if verb in ("acquire", "fork") and answer is not None:
                    for one in [answer.grant] if verb == "acquire" else answer.children:
                        await client.call(
                            "release", pb.ReleaseRequest(worker_key=key, lease=one.lease)
                        )
                await client.call("release", pb.ReleaseRequest(worker_key=key, lease=lease))
                assert session.alive, ticks
                await bystander.commit(12)
            await bystander.release()
            for _ in range(1000):
                snapshot = await client.snapshot()
                if not (snapshot.leases or snapshot.waiting):
                    break
                await asyncio.sleep(0.01)
            assert (snapshot.leases, snapshot.waiting, snapshot.quarantined) == ((), 0, 0)
            await client.call("detach", pb.DetachRequest(worker_key=key))

    asyncio.run(run())


def test_ctrl_c_in_any_verb_of_the_client_ends_that_call_alone(
    service: ServiceProcess, ctrl_c: CtrlC
) -> None:
    chance = random.Random(11)
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        key = attached(client).worker_key
        bystander = session.acquire([7] * 12)
        num_interrupted = 0
        for verb in (verb for verb in unary.RPCS for _ in range(4)):
            granted = client.call("acquire", pb.AcquireRequest(worker_key=key, tokens=PROMPT))
            lease = granted.grant.lease
            client.call("commit", pb.CommitRequest(worker_key=key, lease=lease, num_tokens=10))
            request = asked(verb, key, lease)
            if verb == "detach":
                request.worker_key = attached(client).worker_key
            answer = None
            try:
                with ctrl_c(0.0002 + chance.random() * 0.002):
                    answer = client.call(verb, request)
            except KeyboardInterrupt:
                num_interrupted += 1
            except CacheError:
                pass
            if verb in ("acquire", "fork") and answer is not None:
                for one in [answer.grant] if verb == "acquire" else answer.children:
                    client.call("release", pb.ReleaseRequest(worker_key=key, lease=one.lease))
            client.call("release", pb.ReleaseRequest(worker_key=key, lease=lease))
            assert session.alive, verb
            bystander.commit(12)
        assert num_interrupted > 10
        bystander.release()
        eventually(lambda: not client.snapshot().leases and not client.snapshot().waiting)
        client.call("detach", pb.DetachRequest(worker_key=key))


@pytest.mark.slow
def test_ctrl_c_in_a_watch_ends_that_watch_alone(service: ServiceProcess, ctrl_c: CtrlC) -> None:
    """There are places for four at a time: one that went on would keep its place."""
    chance = random.Random(3)
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        for number in range(200):
            watching = client.watch()
            with pytest.raises(KeyboardInterrupt), ctrl_c(0.0002 + chance.random() * 0.004):
                for _ in watching:
                    pass
            with session.acquire([number] * 12) as lease:
                lease.commit(12)
            client.snapshot()  # its cancellation went before this call
        with pytest.raises(StopIteration):
            next(watching)
    eventually(lambda: "prefixcache watch" not in {t.name for t in threading.enumerate()})


def test_a_call_is_told_when_another_thread_closes_its_client_before_it_is_made(
    service: ServiceProcess,
) -> None:
    client = prefixcache.connect(service.target)
    client._calls.close()  # what closing does first
    threading.Timer(0.1, client.close).start()
    with pytest.raises(ServiceUnavailable, match="closed"):
        client.snapshot()


def test_a_watch_is_told_when_its_client_is_closed(service: ServiceProcess) -> None:
    client = prefixcache.connect(service.target)
    watching = client.watch()
    next(watching)
    client.close()
    with pytest.raises(ServiceUnavailable):
        next(watching)
    with pytest.raises(ServiceUnavailable, match="closed"):
        next(client.watch())


def test_a_watch_that_is_cancelled_at_any_turn_of_the_loop_ends_alone(
    service: ServiceProcess,
) -> None:
    """There are places for four at a time: one that went on would keep its place."""

    async def run() -> None:
        async with (
            await prefixcache.connect_async(service.target) as client,
            await client.attach("model", LAYOUT) as session,
        ):

            async def look() -> None:
                async for _ in client.watch():
                    pass

            for ticks in range(3 * NUM_TICKS):
                await cancelled(look(), ticks)
                assert session.alive
            async with asyncio.timeout(None):
                watching = client.watch()
                async with await session.acquire([5] * 12) as lease:
                    await lease.commit(12)
                await anext(watching)
                await watching.aclose()

    asyncio.run(run())
