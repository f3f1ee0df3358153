"""A service with memory below its pool: what it evicts comes back, what fails costs no answer."""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.cli import status
from prefixcache.client import Client
from prefixcache.config import ServeSettings, load
from prefixcache.core.hauls import Haul
from prefixcache.pool import PoolFile
from prefixcache.service.backing import Backing, Sizes
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.failures import Failures
from prefixcache.service.haulage import Haulage
from prefixcache.service.tiers.orders import pack_haul
from prefixcache.types import HaulId, Layout
from service.below import (
    CHAT,
    NUM_BLOCKS,
    SIZE,
    SPACE,
    Writer,
    comes_back,
    eventually_here,
    fill,
    filled,
    porters,
    settled,
    shared_files,
    slots,
)
from service.service_process import LAYOUT, ServiceProcess, environment, eventually, running, sizes


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/cache.sock"


@pytest.fixture
def service(target: str) -> Iterator[ServiceProcess]:
    flags = (*sizes(NUM_BLOCKS, SIZE), "--host", slots(400), "--partial", "off", "--grace", "1")
    with running(target, *flags) as service:
        eventually(lambda: "porter at work" in service.log())
        yield service


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


def test_a_start_says_what_lies_below_in_tokens(service: ServiceProcess) -> None:
    assert any("below the pool" in line and "1,600 tokens" in line for line in service.lines)


def test_what_was_evicted_comes_back_as_it_was(client: Client) -> None:
    writer = Writer(client)
    for number in range(40):  # 200 blocks through a pool of 64
        writer.ask(number)
        eventually(lambda: settled(client))
    told = client.snapshot()
    assert told.sunk >= 100
    eventually(lambda: comes_back(writer, range(40)))
    eventually(lambda: comes_back(writer, range(20)) and client.snapshot().restored >= 100)
    assert writer.num_wrong == 0
    assert client.snapshot().spoilt == 0
    assert client.check().failure == ""


def test_who_does_not_wait_computes_and_nobody_is_kept(client: Client) -> None:
    writer = Writer(client)
    for number in range(20):
        writer.ask(number)
        eventually(lambda: settled(client))
    ledger = writer.ask(0, wait_s=0.0)
    assert (ledger.restored, ledger.evicted) == (0, CHAT)
    told = client.explain(SPACE, writer.chat(1))
    assert told.num_below == CHAT
    (span,) = told.below
    assert (span.tier, span.start, span.end) == ("host", 0, CHAT)
    assert (span.compute_s, span.is_worth) == (None, True), "chats are too short to tell"
    assert span.fetch_s == told.below_s > 0
    assert writer.num_wrong == 0


def test_a_porter_that_is_killed_is_replaced_and_what_was_below_is_kept(
    client: Client, service: ServiceProcess
) -> None:
    writer = filled(client)
    (first,) = porters(service)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: porters(service) not in ([], [first]))
    eventually(lambda: not status.read(client).info.failures)
    eventually(lambda: comes_back(writer, range(30)))
    assert writer.num_wrong == 0
    assert client.check().failure == ""


def test_a_porter_who_came_after_a_worker_does_not_keep_what_that_one_held(
    client: Client, service: ServiceProcess
) -> None:
    arguments = [sys.executable, "-m", "service.victim", service.target, "40", "0"]
    with subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment()
    ) as worker:
        assert worker.stdout is not None
        assert b"holding" in worker.stdout.readline()
        (first,) = porters(service)
        os.kill(first, signal.SIGKILL)  # as from now on he is younger than that worker
        eventually(lambda: "porter at work" in service.log().partition("porter at work")[2])
        worker.kill()
    eventually(lambda: not client.snapshot().leases)
    eventually(lambda: not client.snapshot().quarantined)


def test_who_waits_for_a_porter_that_dies_is_served_without_him(
    client: Client, service: ServiceProcess
) -> None:
    writer = filled(client)
    (first,) = porters(service)
    os.kill(first, signal.SIGSTOP)
    try:
        waiting = writer.session.acquire_later(writer.chat(0), wait_s=600.0)
        eventually(lambda: client.snapshot().num_flights or waiting.done())
    finally:
        os.kill(first, signal.SIGKILL)
    with waiting.result(PATIENCE_S) as lease:
        assert lease.num_cached == 0
    eventually(lambda: [one.worker for one in client.snapshot().leases] == [])
    assert client.check().failure == ""


def test_who_waits_for_a_porter_that_hangs_waits_no_longer_than_a_moment(
    client: Client, service: ServiceProcess
) -> None:
    writer = filled(client)
    (first,) = porters(service)
    os.kill(first, signal.SIGSTOP)
    try:
        ledger = writer.ask(0, wait_s=600.0)  # far longer than this test may take
        assert (ledger.restored, ledger.evicted) == (0, CHAT)
        for number in range(100, 130):
            writer.ask(number)  # and nobody waits for a copy
    finally:
        os.kill(first, signal.SIGCONT)
    eventually(lambda: settled(client))
    assert writer.num_wrong == 0
    assert client.check().failure == ""


def here() -> ServeSettings:
    """Settings of a service in this process."""
    memory = NUM_BLOCKS * SIZE * LAYOUT.token_bytes
    return load({"memory": memory, "block_size": SIZE, "layout": LAYOUT, "host": slots(400)})


@pytest.mark.parametrize("what", ["socket.socketpair", "subprocess.Popen", "os.pidfd_open"])
def test_a_porter_for_whom_nothing_is_left_comes_later_and_holds_no_step_up(
    monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    module, _, name = what.partition(".")
    real, failed = getattr(sys.modules[module], name), []

    def fail_twice(*args: Any, **kwargs: Any) -> Any:
        if len(failed) < 2:
            failed.append(args)
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        return real(*args, **kwargs)

    async def story() -> None:
        backing, failures = Backing(here()), Failures()
        deliveries = Deliveries(backing)
        haulage = Haulage(backing, deliveries, failures, first_pause_s=0.01)
        cache = backing.cache
        assert cache is not None
        hauls = cache._lessor.hauls
        assert hauls is not None
        try:
            monkeypatch.setattr(sys.modules[module], name, fail_twice)
            deliveries.settle()
            assert haulage.pid == 0
            assert "cannot be started: [Errno 24]" in str(failures.causes())
            await eventually_here(lambda: hauls.has_porter)
            assert len(failed) == 2
            assert not failures.causes()
        finally:
            haulage.close()
            deliveries.close()
            backing.close()

    asyncio.run(story())


def test_a_porter_that_does_not_report_is_killed_and_replaced() -> None:
    async def story() -> None:
        backing, failures = Backing(here()), Failures()
        deliveries = Deliveries(backing)
        haulage = Haulage(backing, deliveries, failures, silent_s=1.0, first_pause_s=0.01)
        cache = backing.cache
        assert cache is not None
        hauls = cache._lessor.hauls
        assert hauls is not None
        try:
            haulage.pump()
            await eventually_here(lambda: hauls.has_porter)
            first = haulage.pid
            os.kill(first, signal.SIGSTOP)
            fill(cache, deliveries)
            assert hauls.num_leaving, "he has something in hand"
            await eventually_here(lambda: haulage.num_ended > 0 and hauls.has_porter)
            assert haulage.pid != first
            await eventually_here(lambda: not failures.causes() and not hauls.num_leaving)
            cache.check()
        finally:
            haulage.close()
            deliveries.close()
            backing.close()

    asyncio.run(story())


def test_a_porter_that_reports_is_slow_and_does_not_hang() -> None:
    async def story() -> None:
        backing, failures = Backing(here()), Failures()
        deliveries = Deliveries(backing)
        haulage = Haulage(backing, deliveries, failures)
        cache = backing.cache
        assert cache is not None
        try:
            assert haulage.in_hand_since() is None
            haulage.pump()
            await eventually_here(lambda: haulage.is_at_work)
            began = time.monotonic()
            os.kill(haulage.pid, signal.SIGSTOP)
            fill(cache, deliveries)
            given = haulage.in_hand_since()
            assert given is not None
            assert given >= began
            haulage._in_hand[HaulId(-1)] = given  # it stands behind the others
            os.kill(haulage.pid, signal.SIGCONT)
            await eventually_here(lambda: haulage._in_hand.keys() == {HaulId(-1)})
            since = haulage.in_hand_since()
            assert since is not None
            assert since > given, "he has been heard since"
        finally:
            haulage.close()
            deliveries.close()
            backing.close()

    asyncio.run(story())


def test_who_was_slow_is_not_given_what_nobody_may_read_by_now(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = []

    def pack(haul: Haul) -> bytes:
        given.append(haul.id)
        return pack_haul(haul)

    async def story() -> None:
        backing, failures = Backing(here()), Failures()
        deliveries = Deliveries(backing)
        haulage = Haulage(backing, deliveries, failures)
        cache = backing.cache
        assert cache is not None
        hauls = cache._lessor.hauls
        assert hauls is not None
        try:
            haulage.pump()
            await eventually_here(lambda: haulage.is_at_work)
            os.kill(haulage.pid, signal.SIGSTOP)
            fill(cache, deliveries)
            needed = {number for number, haul in hauls._down.items() if not haul.blocks}
            assert needed <= set(given), "others took the blocks of more than he has in hand"
            assert len(given) + len(haulage._down) < hauls._next, "none was for nothing"
            os.kill(haulage.pid, signal.SIGCONT)
            await eventually_here(lambda: not hauls.num_leaving and not haulage._in_hand)
            assert not hauls.busy(), "a place is kept for what nobody writes"
            cache.check()
        finally:
            haulage.close()
            deliveries.close()
            backing.close()

    monkeypatch.setattr("prefixcache.service.haulage._MOST_IN_HAND", 1)
    monkeypatch.setattr("prefixcache.service.haulage.pack_haul", pack)
    asyncio.run(story())


@pytest.mark.parametrize(
    ("layout", "num_down"), [(LAYOUT, 8), (Layout(32, 8, 128, "bfloat16"), 2)], ids=["few", "many"]
)
def test_of_what_goes_down_and_has_many_bytes_few_hauls_are_in_hand(
    layout: Layout, num_down: int
) -> None:
    backing = Backing(here())
    backing.sizes = Sizes(layout, 1 << 40, 16)
    haulage = Haulage(backing, Deliveries(backing), Failures())
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        haulage._line = ours
        for number in range(40):
            haulage.hand(haul(HaulId(number), is_up=number % 2 == 1))
        haulage._give()
        assert [number % 2 for number in haulage._in_hand] == [1] * 8, "what comes back goes first"
        haulage._in_hand.clear()
        haulage._up.clear()
        haulage._give()
        assert len(haulage._in_hand) == num_down
        haulage._line = None
    backing.close()


def haul(number: HaulId, *, is_up: bool) -> Haul:
    tokens = bytes(16 * 4 * SIZE)
    return Haul(
        number, is_up, array("i", [1] * 16), array("i", [1] * 16), array("q", [1] * 16), tokens
    )


def test_a_slab_that_was_changed_by_others_is_read_by_nobody(
    client: Client, service: ServiceProcess
) -> None:
    writer = Writer(client)
    for number in range(30):
        writer.ask(number)
        eventually(lambda: settled(client))
    num_bytes = 400 * LAYOUT.block_bytes(SIZE)
    (slab,) = [path for path in shared_files(service) if path.stat().st_size == 4096 + num_bytes]
    with slab.open("r+b") as file:
        file.seek(4096)
        file.write(os.urandom(num_bytes))
    ledgers = [writer.ask(number) for number in range(10)]
    assert not any(one.restored for one in ledgers)
    eventually(lambda: client.snapshot().spoilt)
    assert writer.num_wrong == 0


def test_nothing_is_left_of_a_service_that_was_killed(target: str, service: ServiceProcess) -> None:
    (porter,) = porters(service)
    os.kill(porter, signal.SIGSTOP)  # he sees no end of anything
    files = shared_files(service)
    assert len(files) == 3  # of pool, slab and heads
    service.signal(signal.SIGKILL)
    service.wait()
    eventually(lambda: not Path(f"/proc/{porter}").exists())
    PoolFile.sweep()
    assert not [path for path in files if path.exists()]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pool", "none"), "--host needs a pool in shared memory"),
        (("--host", "10"), "holds not one block"),
        (("--memory", str(4 * SIZE * 32)), "too small for --host"),
        (("--host", "900TiB"), "--host"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(
    target: str, flags: tuple[str, ...], told: str
) -> None:
    with pytest.raises(AssertionError, match=told):
        ServiceProcess(target, *sizes(NUM_BLOCKS, SIZE), "--host", slots(10), *flags)
