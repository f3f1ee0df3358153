"""A service whose disk an earlier one has used: what that one left comes back, and nothing else."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import pytest

import prefixcache
from cli.running import run
from prefixcache.cli import status
from prefixcache.client import Client
from prefixcache.errors import CacheError
from prefixcache.service.tiers.disk import HEADS_AT
from prefixcache.service.tiers.slab import head_type
from prefixcache.types import Namespace
from service.below import (
    CHAT,
    NUM_BLOCKS,
    SIZE,
    SPACE,
    Writer,
    comes_back,
    filled,
    porters,
    slots,
)
from service.service_process import ServiceProcess, eventually, running, sizes, stop

NUM_SLOTS = 400
HEAD = head_type(SIZE)

Start = Callable[..., ServiceProcess]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture(params=["disk", "host and disk"])
def flags(request: pytest.FixtureRequest, folder: Path) -> tuple[str, ...]:
    """What all services of a test are started with."""
    disk = f"{int(slots(NUM_SLOTS)) + HEADS_AT}:{folder}"
    own = (*sizes(NUM_BLOCKS, SIZE), "--disk", disk, "--partial", "off", "--grace", "1")
    return (*own, "--host", slots(32)) if "host" in request.param else own


@pytest.fixture
def start(tmp_path: Path, flags: tuple[str, ...]) -> Iterator[Start]:
    """Give a way to start the next service, once the one before has ended."""
    services: list[ServiceProcess] = []

    def start_next(*more: str) -> ServiceProcess:
        service = ServiceProcess(f"unix:{tmp_path}/cache.sock", *flags, *more)
        services.append(service)
        eventually(lambda: "porter at work" in service.log())
        return service

    yield start_next
    for service in services:
        service.close()


def end(service: ServiceProcess, how: signal.Signals) -> None:
    service.signal(how)
    service.wait()


def told_at_start(service: ServiceProcess) -> str:
    (line,) = [line for line in service.lines if line.startswith("disk: ")]
    return line


def ask_all(client: Client, numbers: range = range(30)) -> tuple[Writer, int]:
    """Ask for all chats; give who has read them, and how many tokens came back from below."""
    writer = Writer(client)
    return writer, sum(writer.ask(number).restored for number in numbers)


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_what_lay_on_disk_is_found_again_and_comes_back_as_it_was(
    start: Start, how: signal.Signals
) -> None:
    service = start()
    assert told_at_start(service) == "disk: nothing found again: nothing lay there"
    with prefixcache.connect(service.target) as client:
        filled(client)
        lay_there = client.snapshot().disk_used
    end(service, how)
    assert lay_there > 50
    service = start()
    with prefixcache.connect(service.target) as client:
        found = client.snapshot().disk_found
        assert found >= lay_there - 2, "but for what was on its way"
        assert f"{found} blocks = {found * SIZE:,} tokens found again" in told_at_start(service)
        assert status.read(client).info.disk.found_blocks == found
        told = client.explain(SPACE, Writer.chat(0))
        assert [(part.tier, part.start, part.end) for part in told.below] == [("disk", 0, CHAT)]
        writer = Writer(client)
        assert comes_back(writer, range(5))
        _, restored = ask_all(client)
        assert restored > 0
        assert writer.num_wrong == 0
        assert client.snapshot().disk_found < found
        assert client.snapshot().spoilt == 0
        assert client.check().failure == ""


def test_what_was_reset_before_the_restart_or_after_it_stays_so(start: Start) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
        client.reset(SPACE)
    end(service, signal.SIGKILL)
    service = start()
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_found > 50
        writer, restored = ask_all(client, range(5))
        assert (restored, writer.num_wrong) == (0, 0)
        filled(client)
    end(service, signal.SIGKILL)
    service = start()
    with prefixcache.connect(service.target) as client:
        client.reset(SPACE)  # nobody has attached it in this life
        writer, restored = ask_all(client, range(5))
        assert (restored, writer.num_wrong) == (0, 0)


def test_a_reset_of_all_is_one_of_what_nobody_has_named_since_the_start(start: Start) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    service = start()
    assert run("reset", "--all", "--connect", service.target).code == 1, "nothing is listed"
    with prefixcache.connect(service.target) as client:
        told = client.snapshot()
        assert (told.disk_found, told.disk_used) == (0, 0)
    end(service, signal.SIGKILL)
    service = start()
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_found > 50, "nobody can tell whose it was"
        writer, restored = ask_all(client, range(10))
        assert (restored, writer.num_wrong) == (0, 0)


def test_a_reset_before_a_worker_has_said_how_blocks_lie_is_one_of_what_lies_there(
    start: Start, tmp_path: Path, folder: Path
) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    open_sizes = "--memory", "64KiB", "--block-size", str(SIZE)
    disk = "--disk", f"{int(slots(NUM_SLOTS)) + HEADS_AT}:{folder}"
    with (
        running(f"unix:{tmp_path}/other.sock", *open_sizes, *disk) as service,
        prefixcache.connect(service.target) as client,
    ):
        assert client.reset(SPACE).num_blocks == 0
        writer = Writer(client)
        eventually(lambda: "porter at work" in service.log())
        assert client.snapshot().disk_found > 50
        assert [writer.ask(number).restored for number in range(5)] == [0] * 5


def test_another_salt_finds_nothing(start: Start) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    service = start()
    with prefixcache.connect(service.target) as client:
        other = client.explain(Namespace("model", salt="other"), Writer.chat(0))
        assert not other.below
        assert client.explain(SPACE, Writer.chat(0)).below


@pytest.mark.parametrize("seed", range(3))
def test_services_that_are_killed_in_the_middle_of_hauls_leave_nothing_wrong(
    start: Start, seed: int
) -> None:
    """Each of them some moment after chats began to come and go, and to come back from the last."""
    random, found = Random(seed), []
    for _ in range(4):
        service = start()
        with prefixcache.connect(service.target) as client:
            found.append(client.snapshot().disk_found)
            writer, is_over = Writer(client), threading.Event()

            def work(writer: Writer = writer, is_over: threading.Event = is_over) -> None:
                numbers = Random(len(found))
                while not is_over.is_set():
                    try:
                        writer.ask(numbers.randrange(40))
                    except CacheError:
                        return

            worker = threading.Thread(target=work)
            worker.start()
            eventually(lambda client=client: client.snapshot().disk_written > 20)
            time.sleep(random.random() / 4)
            end(service, signal.SIGKILL)
            is_over.set()
            worker.join()
            assert writer.num_wrong == 0
    assert found[0] == 0
    assert min(found[1:]) > 0
    service = start()
    with prefixcache.connect(service.target) as client:
        writer, restored = ask_all(client, range(40))
        assert restored > 0
        assert writer.num_wrong == 0
        assert client.snapshot().spoilt == 0
        assert client.check().failure == ""


def test_a_damaged_disk_is_said_to_be_and_never_read(start: Start, folder: Path) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    random = Random(1)
    with (folder / "heads").open("r+b") as file:
        for slot in range(0, NUM_SLOTS, 3):
            file.seek(HEADS_AT + slot * HEAD.itemsize + random.randrange(HEAD.itemsize))
            file.write(random.randbytes(1))
    with (folder / "slab").open("r+b") as file:
        for at in range(0, (folder / "slab").stat().st_size, 300):
            file.seek(at)
            file.write(random.randbytes(1))
    service = start()
    with prefixcache.connect(service.target) as client:
        info = status.read(client).info.disk
        assert info.found_blocks
        assert info.damaged_slots > 50
        assert "damaged" in told_at_start(service)
        writer, _ = ask_all(client)
        assert writer.num_wrong == 0
        assert client.snapshot().spoilt
        assert client.check().failure == ""


def test_a_folder_that_is_not_whole_is_a_cold_start(start: Start, folder: Path) -> None:
    service = start()
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    os.truncate(folder / "heads", 100)
    service = start()
    assert "nothing found again: its heads are cut short" in told_at_start(service)
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_used == 0
        assert "cut short" in status.read(client).info.disk.cold
        writer, restored = ask_all(client, range(5))
        assert (restored, writer.num_wrong) == (0, 0)
        filled(client)
    end(service, signal.SIGTERM)
    service = start()
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_found > 50


def test_at_a_stop_what_is_in_the_pool_and_in_memory_goes_to_the_disk(start: Start) -> None:
    service = start("--grace", "60")
    with prefixcache.connect(service.target) as client:
        filled(client)
        told = client.snapshot()
        cached = told.indexed + told.host_used + told.disk_used
    end(service, signal.SIGTERM)
    assert '"lost": 0, "event": "put on disk"' in service.log()
    service = start()
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_found == cached
        writer = Writer(client)
        assert writer.ask(29).restored == CHAT, "it was in the pool, and first to be asked for"
        assert writer.num_wrong == 0


def test_who_keeps_a_lease_to_the_end_costs_nobody_else_what_is_cached(start: Start) -> None:
    service = start("--grace", "5")
    with prefixcache.connect(service.target) as client:
        writer = filled(client)
        told = client.snapshot()
        cached = told.indexed + told.host_used + told.disk_used
        lease = writer.session.acquire([7, 7, 7, 7, 7])
        end(service, signal.SIGTERM)
        assert "the grace is over" in service.log()
        assert '"lost": 0, "event": "put on disk"' in service.log()
        assert lease.num_cached == 0
    service = start()
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().disk_found >= cached - 2, "but for what that lease took"


def test_a_porter_that_ends_in_the_stop_takes_what_he_had_in_hand_and_no_more(
    tmp_path: Path, folder: Path
) -> None:
    target, disk = f"unix:{tmp_path}/cache.sock", f"{int(slots(400)) + HEADS_AT}:{folder}"
    own = (*sizes(256, SIZE), "--disk", disk, "--partial", "off", "--grace", "600")
    with running(target, *own) as service:
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            writer = Writer(client)
            for number in range(40):
                writer.ask(number)
            assert client.snapshot().indexed > 150
        (porter,) = porters(service)
        stop(porter)
        service.signal(signal.SIGTERM)
        eventually(lambda: '"draining"' in service.log())
        time.sleep(0.1)  # so that he has something in hand; without, it tests less
        os.kill(porter, signal.SIGKILL)
        service.wait()
    with running(target, *own, "--grace", "1") as service:
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            assert client.snapshot().disk_found >= 200 - 4 * 16


def test_a_stop_does_not_wait_for_what_stays_in_the_pool(start: Start) -> None:
    service = start("--grace", "600", "--disk-write", "1GB/s")
    with prefixcache.connect(service.target) as client:
        filled(client)
        client.pin(SPACE, Writer.chat(29)[:CHAT], ttl_s=1000.0)
        end(service, signal.SIGTERM)  # which has less patience than that


def test_with_a_state_the_pool_comes_back_and_what_lay_below_it(
    start: Start, tmp_path: Path
) -> None:
    state = "--state", str(tmp_path / "state")
    service = start(*state)
    with prefixcache.connect(service.target) as client:
        filled(client)
    end(service, signal.SIGTERM)
    service = start(*state)
    with prefixcache.connect(service.target) as client:
        assert client.snapshot().indexed > 20
        writer = Writer(client)
        assert comes_back(writer, range(5))
        assert writer.ask(29).hit == CHAT
        assert writer.num_wrong == 0


def test_a_full_disk_is_found_whole_and_written_to_again(tmp_path: Path, folder: Path) -> None:
    target, disk = f"unix:{tmp_path}/cache.sock", f"{int(slots(40)) + HEADS_AT}:{folder}"
    own = (*sizes(NUM_BLOCKS, SIZE), "--disk", disk, "--partial", "off", "--grace", "1")
    with running(target, *own) as service:
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            filled(client)
            assert client.snapshot().disk_used == 40
    with running(target, *own) as service:
        eventually(lambda: "porter at work" in service.log())
        with prefixcache.connect(target) as client:
            assert client.snapshot().disk_found == 40
            writer = filled(client)
            told = client.snapshot()
            assert told.disk_used == 40
            assert told.disk_found < 40
            assert told.disk_written > 20
            assert writer.num_wrong == 0
            assert client.check().failure == ""
