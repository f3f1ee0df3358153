"""A service with a disk below its pool: what it evicts comes back from there, whatever fails."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from structlog.testing import capture_logs

import prefixcache
from prefixcache.cli import status
from prefixcache.client import Client
from prefixcache.config import load
from prefixcache.core.cache import PrefixCache
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.domain import make_domains
from prefixcache.service.failures import Failures
from prefixcache.service.haulage import Haulage
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
    slots,
)
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

HOST = 32
"""Slots in memory: far fewer than what is asked for; four of them are kept free."""


def disk(count: int, folder: Path) -> tuple[str, str]:
    """Let so many blocks lie in a folder."""
    return "--disk", f"{int(slots(count)) + 4096}:{folder}"


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/cache.sock"


@pytest.fixture(params=["disk", "host and disk"])
def service(
    request: pytest.FixtureRequest, target: str, tmp_path: Path
) -> Iterator[ServiceProcess]:
    flags = (*sizes(NUM_BLOCKS, SIZE), *disk(400, tmp_path / "disk"), "--partial", "off")
    if "host" in request.param:
        flags += ("--host", slots(HOST))
    with running(target, *flags, "--grace", "1") as service:
        eventually(lambda: "porter at work" in service.log())
        yield service


@pytest.fixture
def client(service: ServiceProcess) -> Iterator[Client]:
    with prefixcache.connect(service.target) as client:
        yield client


def test_a_start_says_each_tier_in_tokens(service: ServiceProcess, tmp_path: Path) -> None:
    told = [line for line in service.lines if "below the pool" in line]
    assert f"in {tmp_path}/disk = 400 blocks = 1,600 tokens" in told[-1]
    assert len(told) == 1 or "32 blocks = 128 tokens" in told[0]


def test_what_was_evicted_comes_back_from_disk_as_it_was(client: Client) -> None:
    writer = filled(client)
    told = client.snapshot()
    assert told.disk_blocks == 400
    assert told.disk_written >= 50
    assert told.host_used <= max(told.host_blocks, 0)
    eventually(lambda: comes_back(writer, range(30)) and client.snapshot().disk_restored >= 20)
    eventually(lambda: settled(client))
    assert writer.num_wrong == 0
    told = client.snapshot()
    assert told.spoilt == 0
    assert told.disk_moved <= told.disk_written
    assert bool(told.disk_moved) is bool(told.host_blocks)
    assert client.check().failure == ""


def test_explain_says_what_lies_on_disk(client: Client) -> None:
    writer = filled(client)
    told = client.explain(SPACE, writer.chat(0))
    assert [(part.tier, part.start, part.end) for part in told.below] == [("disk", 0, CHAT)]


def test_a_porter_that_is_killed_is_replaced_and_what_lay_on_disk_is_kept(
    client: Client, service: ServiceProcess
) -> None:
    writer = filled(client)
    (first,) = porters(service)
    os.kill(first, signal.SIGKILL)
    eventually(lambda: porters(service) not in ([], [first]))
    eventually(lambda: not status.read(client).info.failures)
    eventually(lambda: comes_back(writer, range(30)) and client.snapshot().disk_restored)
    assert writer.num_wrong == 0
    assert client.check().failure == ""


def test_a_full_disk_costs_what_does_not_fit_and_is_written_to_again_when_it_has_room(
    client: Client, service: ServiceProcess
) -> None:
    (porter,) = porters(service)
    soft, hard = resource.prlimit(porter, resource.RLIMIT_FSIZE)
    resource.prlimit(porter, resource.RLIMIT_FSIZE, (0, hard))
    writer, began = Writer(client), time.monotonic()
    for number in range(60):
        writer.ask(number)
    eventually(lambda: "the disk below the pool" in status.read(client).info.failures)
    assert client.snapshot().disk_written == 0
    num_tries = service.log().count("the disk below the pool failed")
    assert num_tries <= 2 + (time.monotonic() - began), "two in hand, then one a second at most"
    failures = status.read(client).info.failures
    assert "nothing is written there for" in failures["the disk below the pool"]
    assert "File too large" in failures["the disk below the pool"]
    assert client.check().failure == ""
    resource.prlimit(porter, resource.RLIMIT_FSIZE, (soft, hard))
    number = iter(range(1000, 10**6))

    def written() -> bool:
        writer.ask(next(number))
        return client.snapshot().disk_written > 0

    eventually(written)
    eventually(lambda: not status.read(client).info.failures)
    assert porters(service) == [porter], "he had nothing to do with it"
    assert writer.num_wrong == 0
    assert client.check().failure == ""


def test_files_that_are_cut_short_and_overwritten_are_read_by_nobody(
    client: Client, tmp_path: Path
) -> None:
    writer = filled(client)
    size = LAYOUT.block_bytes(SIZE)
    with (tmp_path / "disk" / "slab").open("r+b") as file:
        file.write(os.urandom(100 * size))
    os.truncate(tmp_path / "disk" / "slab", 200 * size)
    for number in range(30):
        writer.ask(number)
    eventually(lambda: client.snapshot().spoilt)
    assert writer.num_wrong == 0
    assert client.check().failure == ""


def test_no_more_is_written_than_is_allowed(target: str, tmp_path: Path) -> None:
    block = int(slots(1))
    flags = (*sizes(NUM_BLOCKS, SIZE), *disk(400, tmp_path / "disk"), "--partial", "off")
    with running(target, *flags, "--disk-write", f"{block}/s", "--grace", "1") as service:
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            writer = Writer(client)
            began = time.monotonic()
            for number in range(60):
                writer.ask(number)
            told = client.snapshot()
            took = time.monotonic() - began
            assert told.evicted > 100
            assert told.disk_written <= 16 + took + 1, "sixteen at once, then one a second"
            assert writer.num_wrong == 0


def test_two_services_do_not_share_a_folder(service: ServiceProcess, tmp_path: Path) -> None:
    other = f"unix:{tmp_path}/other.sock"
    with pytest.raises(AssertionError, match="another service"):
        ServiceProcess(other, *sizes(NUM_BLOCKS, SIZE), *disk(400, tmp_path / "disk"))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--pool", "none"), "--disk needs a pool in shared memory"),
        (("--disk", "10:{0}/d"), "holds not one block"),
        (("--disk", "1GiB"), "names no folder"),
        (("--disk", "1GiB:"), "names no folder"),
        (("--disk", "900TiB:{0}/d"), "do not fit in"),
        (("--disk", "1MiB:{0}/no/such"), "there is no folder"),
        (("--memory", str(4 * SIZE * 32)), "too small for --host and --disk"),
    ],
)
def test_what_cannot_be_is_refused_at_the_start(
    target: str, tmp_path: Path, flags: tuple[str, ...], told: str
) -> None:
    given = [flag.format(tmp_path) for flag in flags]
    with pytest.raises(AssertionError, match=told):
        ServiceProcess(target, *sizes(NUM_BLOCKS, SIZE), "--disk", f"1MiB:{tmp_path}/disk", *given)


def test_a_limit_without_a_disk_is_refused(target: str) -> None:
    with pytest.raises(AssertionError, match="--disk-write is for --disk"):
        ServiceProcess(target, *sizes(NUM_BLOCKS, SIZE), "--disk-write", "1MB/s")


def test_without_a_folder_it_lies_in_that_of_the_state(target: str, tmp_path: Path) -> None:
    flags = (*sizes(NUM_BLOCKS, SIZE), "--state", str(tmp_path / "state"), "--partial", "off")
    with running(target, *flags, "--disk", f"{int(slots(400)) + 4096}", "--grace", "1") as service:
        assert any(f"in {tmp_path}/state/disk = 400 blocks" in line for line in service.lines)
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            writer = filled(client)
            eventually(lambda: comes_back(writer, range(30)) and client.snapshot().disk_restored)
            assert writer.num_wrong == 0
        names = {"slab", "heads", "resets", "secret", "lock"}
        assert {path.name for path in (tmp_path / "state" / "disk").iterdir()} == names
        assert service.stop() == 0
        left = {path.name for path in (tmp_path / "state" / "disk").iterdir()}
        assert left == names, "the next service finds it"


def test_each_trust_domain_has_a_folder_of_its_own(tmp_path: Path) -> None:
    settings = load(
        {
            "memory": NUM_BLOCKS * SIZE * LAYOUT.token_bytes,
            "block_size": SIZE,
            "layout": LAYOUT,
            "disk": f"{int(slots(400)) + 4096}:{tmp_path}/disk",
            "disk_write": "1MB/s",
        }
    )

    async def story() -> None:
        domains = make_domains(settings, {"acme": settings.memory // 2}, Backing)
        try:
            disks = [one.backing.disk for one in domains.values()]
            assert [disk.path.name for disk in disks if disk] == ["disk", "domain-acme"]
            assert [disk.num_slots for disk in disks if disk] == [400, 188]
            assert domains["acme"].backing.settings.disk_write == 500_000
        finally:
            for domain in domains.values():
                domain.close()

    asyncio.run(story())


@asynccontextmanager
async def beside_a_disk_that_fails(
    folder: Path, first_pause_s: float
) -> AsyncIterator[tuple[Haulage, PrefixCache, Failures]]:
    """Give a porter who may write no byte, and a cache of which some is on its way to his disk."""
    memory = NUM_BLOCKS * SIZE * LAYOUT.token_bytes
    own = {"memory": memory, "block_size": SIZE, "layout": LAYOUT, "disk": disk(400, folder)[1]}
    backing, failures = Backing(load(own)), Failures()
    deliveries = Deliveries(backing)
    haulage = Haulage(backing, deliveries, failures, first_pause_s=first_pause_s)
    cache = backing.cache
    assert cache is not None
    try:
        haulage.pump()
        await eventually_here(lambda: haulage.is_at_work)
        hard = resource.prlimit(haulage.pid, resource.RLIMIT_FSIZE)[1]
        resource.prlimit(haulage.pid, resource.RLIMIT_FSIZE, (0, hard))
        fill(cache, deliveries)
        await eventually_here(lambda: bool(failures.causes()))
        yield haulage, cache, failures
        cache.check()
    finally:
        haulage.close()
        deliveries.close()
        backing.close()


def test_nothing_more_is_given_to_a_disk_that_has_just_failed(tmp_path: Path) -> None:
    async def story() -> None:
        async with beside_a_disk_that_fails(tmp_path / "disk", 1e6) as (_, cache, _):
            hauls = cache._lessor.hauls
            assert hauls is not None
            assert hauls.limit.allowed(time.monotonic()) == 0
            await eventually_here(lambda: not hauls.num_leaving)

    asyncio.run(story())


@pytest.mark.parametrize("recovers", [True, False])
def test_at_a_stop_a_disk_that_fails_is_tried_once_more(tmp_path: Path, recovers: bool) -> None:
    async def story() -> None:
        async with beside_a_disk_that_fails(tmp_path / "disk", 0.5) as (haulage, cache, _):
            if recovers:
                hard = resource.prlimit(haulage.pid, resource.RLIMIT_FSIZE)[1]
                resource.prlimit(haulage.pid, resource.RLIMIT_FSIZE, (hard, hard))
            # What the porter was given before fails, too, and counts as lost if it is told later.
            await eventually_here(lambda: haulage.in_hand_since() is None)
            haulage.begin_putting_down()
            await eventually_here(lambda: not haulage.is_putting_down())
            with capture_logs() as told:
                haulage.end_putting_down()
            assert bool(cache.counts(now=time.monotonic()).disk_written) is recovers
            assert not recovers or cache.num_above_disk == 0
            [put_down] = [one for one in told if one["event"] == "put on disk"]
            assert (put_down["lost"] == 0) is recovers

    asyncio.run(story())
