"""Which process a worker lives in: what is believed of a claim, and what a dead one left behind."""

from __future__ import annotations

import asyncio
import itertools
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

import prefixcache
from prefixcache.client import Client, codec
from prefixcache.client.address import this_host
from prefixcache.service import processes
from prefixcache.service.processes import Process, Processes, User, facts
from prefixcache.types import pack
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache.v1.prefixcache_pb2_grpc import PrefixCacheStub
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    flags = ("--ttl", "2", "--quarantine", "1", "--max-workers", "32")
    with running(f"unix:{tmp_path}/s", *sizes(64, 4), *flags) as service:
        yield service


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Give a process that is nobody's worker."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


# ------------------------------------------------------------------------------ what is believed


def test_a_process_that_cannot_be_the_worker_is_not_watched(
    sleeper: subprocess.Popen[bytes],
) -> None:
    async def claims() -> dict[str, str | Process]:
        watching = Processes()
        nothing = User(lambda: None, lambda: None)
        gone = await asyncio.create_subprocess_exec("true")
        await gone.wait()
        own = await asyncio.create_subprocess_exec("sleep", "600")
        watching.own = lambda: own.pid
        claims = {
            "init": (1, os.getuid()),
            "the service itself": (os.getpid(), os.getuid()),
            "a process that has ended": (gone.pid, os.getuid()),
            "another user's": (sleeper.pid, os.getuid() + 1),
            "none": (2**31 - 1, os.getuid()),
            "beyond all": (2**32 - 1, os.getuid()),
            "below all": (-1, os.getuid()),
            "it": (sleeper.pid, os.getuid()),
            "the service's porter": (own.pid, os.getuid()),
        }
        told = {
            name: watching.watch(pid, uid, name, nothing, lambda: "")
            for name, (pid, uid) in claims.items()
        }
        assert len(watching) == 1
        watching.close()
        own.kill()
        await own.wait()
        return told

    told = asyncio.run(claims())
    assert isinstance(told.pop("it"), Process)
    assert all(isinstance(why, str) and why for why in told.values()), told
    assert "belongs to user" in str(told["another user's"])


def test_a_process_of_the_kernel_is_not_watched(
    sleeper: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a container there is none to be claimed: the facts are made up."""
    real = facts(sleeper.pid)
    assert real is not None
    made_up = real._replace(flags=real.flags | processes.PF_KTHREAD)
    monkeypatch.setattr(processes, "facts", lambda pid: made_up)

    async def claim() -> str | Process:
        user = User(lambda: None, lambda: None)
        return Processes().watch(sleeper.pid, os.getuid(), "it", user, lambda: "")

    assert asyncio.run(claim()) == f"process {sleeper.pid} is the kernel's"


def quarantined(client: Client) -> int:
    return client.snapshot().quarantined


def take_and_fall_silent(stub: Any, pid: int, group: str = "") -> None:
    """Attach by unary calls, take blocks, and never be heard of again."""
    request = pb.AttachRequest(
        namespace=pb.Namespace(model="tiny"), pid=pid, host=this_host(), group=group
    )
    codec.write_layout(LAYOUT, request.layout)
    answer = stub.Attach(request)
    stub.Acquire(pb.AcquireRequest(worker_key=answer.worker_key, tokens=pack(range(32))))


def test_blocks_of_a_worker_that_claims_to_be_no_worker_come_back_in_time(
    service: ServiceProcess,
) -> None:
    with (
        grpc.insecure_channel(service.target) as channel,
        prefixcache.connect(service.target) as client,
    ):
        stub: Any = PrefixCacheStub(channel)  # type: ignore[no-untyped-call]
        take_and_fall_silent(stub, 1)
        eventually(lambda: quarantined(client) == 8)
        eventually(lambda: quarantined(client) == 0)


# --------------------------------------------------------------------------- what is kept of them


def descriptors(service: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


def test_workers_of_one_process_that_come_and_go_leave_nothing(service: ServiceProcess) -> None:
    """As often as they like: the process lives on, and its lost workers hold no block."""

    request = pb.AttachRequest(
        namespace=pb.Namespace(model="tiny"), pid=os.getpid(), host=this_host()
    )
    codec.write_layout(LAYOUT, request.layout)
    with grpc.insecure_channel(service.target) as channel:
        stub: Any = PrefixCacheStub(channel)  # type: ignore[no-untyped-call]

        def be_cut_off() -> None:
            more = threading.Event()
            batches = [pb.OpBatch(ops=[pb.Op(id=1, attach=request)])]
            call = stub.Session(itertools.chain(batches, (None for _ in iter(more.wait, True))))
            assert next(call).results[0].WhichOneof("result") == "attach"
            call.cancel()
            more.set()

        be_cut_off()
        before = descriptors(service)
        for _ in range(60):  # --max-workers is 32
            be_cut_off()
            eventually(lambda: not attached(stub))
        assert descriptors(service) <= before


def attached(stub: Any) -> list[str]:
    told = stub.Snapshot(pb.SnapshotRequest())
    return [one.worker for one in told.workers if one.state == "attached"]


def test_all_workers_of_a_process_share_one_descriptor(service: ServiceProcess) -> None:
    with prefixcache.connect(service.target) as client, client.attach("tiny", LAYOUT):
        one = descriptors(service)
        sessions = [client.attach("tiny", LAYOUT) for _ in range(20)]
        assert descriptors(service) <= one + 2
        for session in sessions:
            session.close()


FORKING = """
import mmap, os, sys
import prefixcache
from prefixcache.types import Layout
client = prefixcache.connect(sys.argv[1])
session = client.attach("tiny", Layout(*map(int, sys.argv[2:5]), sys.argv[5]))
lease = session.acquire(list(range(32)))
pool = session.attachment.pool
with open(pool.name, "r+b") as file:
    memory = mmap.mmap(file.fileno(), 0)  # not as `map_pool` does it: forked children have it too
if os.fork() == 0:
    os.setsid()
    os.close(0)
    print(os.getpid(), flush=True)
    __import__("signal").pause()
input()
"""


def test_blocks_are_lent_to_nobody_while_what_a_dead_worker_forked_maps_the_pool(
    service: ServiceProcess,
) -> None:
    shape = [str(LAYOUT.num_layers), str(LAYOUT.num_kv_heads), str(LAYOUT.head_dim), LAYOUT.dtype]
    with (
        subprocess.Popen(
            [sys.executable, "-c", FORKING, service.target, *shape],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        ) as worker,
        prefixcache.connect(service.target) as client,
    ):
        assert worker.stdout is not None
        child = int(worker.stdout.readline())
        try:
            worker.kill()
            worker.wait()
            eventually(lambda: quarantined(client) == 8)
            with client.attach("tiny", LAYOUT, name="other") as session:
                for n in range(40):  # time for many looks; and the rest of the pool is lent
                    with session.acquire([1000 + n] * (56 * 4)) as lease:
                        lease.commit(56 * 4)
                assert quarantined(client) == 8
        finally:
            os.kill(child, signal.SIGKILL)
        eventually(lambda: quarantined(client) == 0)


def test_a_mapping_is_found_whatever_the_process_is_called(tmp_path: Path) -> None:
    """The name in /proc/PID/stat may hold brackets and spaces; the pool's file may be unlinked."""
    path = tmp_path / "pool"
    path.write_bytes(bytes(4096))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0):
        before = Path("/proc/self/comm").read_text()
        Path("/proc/self/comm").write_text("a) S 1 (b")
        try:
            assert facts(os.getpid()) is not None
            path.unlink()
            assert processes.maps(os.getpid(), str(path)) is True
        finally:
            Path("/proc/self/comm").write_text(before.strip())
    assert processes.maps(os.getpid(), str(path)) is False


# ------------------------------------------------------------------------------------- groups

MEMBER = """
import sys, time
import prefixcache
from prefixcache.types import Layout
target, group, count, *shape = sys.argv[1:]
layout = Layout(int(shape[0]), int(shape[1]), int(shape[2]), shape[3])
client = prefixcache.connect(target)
session = client.attach("tiny", layout, group=group)
if int(count):
    session.acquire([7] * int(count))
print("ready", flush=True)
input()
"""
"""A worker that holds blocks for so many tokens, or none, and writes to its group's."""


def member(target: str, group: str, count: int = 0) -> subprocess.Popen[str]:
    shape = [str(LAYOUT.num_layers), str(LAYOUT.num_kv_heads), str(LAYOUT.head_dim), LAYOUT.dtype]
    process = subprocess.Popen(
        [sys.executable, "-c", MEMBER, target, group, str(count), *shape],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def end(process: subprocess.Popen[str]) -> None:
    process.kill()
    process.communicate()


def test_what_a_dead_worker_leased_waits_for_the_others_of_its_group(
    service: ServiceProcess,
) -> None:
    with prefixcache.connect(service.target) as client:
        holder = member(service.target, "g", 32)
        writers = [member(service.target, "g") for _ in range(2)]
        stranger = member(service.target, "another")
        end(holder)
        eventually(lambda: quarantined(client) == 8)
        end(writers[0])
        with client.attach("tiny", LAYOUT, name="other") as session:
            for n in range(20):  # time for many looks
                with session.acquire([1000 + n] * (56 * 4)) as lease:
                    lease.commit(56 * 4)
            assert quarantined(client) == 8
        end(writers[1])
        eventually(lambda: quarantined(client) == 0)
        end(stranger)


def test_a_worker_whose_group_has_ended_before_it_waits_for_nobody(
    service: ServiceProcess,
) -> None:
    with prefixcache.connect(service.target) as client:
        holder, writer = member(service.target, "g", 32), member(service.target, "g")
        end(writer)
        eventually(lambda: client.snapshot().private == 8)
        end(holder)
        eventually(lambda: client.snapshot().free == 64)
        assert quarantined(client) == 0
        # Who says that it writes no more is believed, whoever else there is.
        writer = member(service.target, "g")
        with client.attach("tiny", LAYOUT, group="g") as session:
            session.acquire([7] * 32)
        assert client.snapshot().free == 64
        end(writer)


def test_a_writer_that_loses_its_stream_is_waited_for_all_the_same(
    service: ServiceProcess,
) -> None:
    """It has attached, and holds nothing; but it maps the pool, and its process lives."""
    with prefixcache.connect(service.target) as client:
        holder, writer = member(service.target, "g", 32), member(service.target, "g")
        # A second writer of the same process as this test: its stream ends, the process does not.
        with prefixcache.connect(service.target) as other:
            session = other.attach("tiny", LAYOUT, group="g")
            session._call.cancel()
            eventually(lambda: not session.alive)
            end(holder)
            end(writer)
            eventually(lambda: quarantined(client) == 8)
            with client.attach("tiny", LAYOUT, name="other") as looker:
                for n in range(20):  # time for many looks
                    with looker.acquire([1000 + n] * (56 * 4)) as lease:
                        lease.commit(56 * 4)
                assert quarantined(client) == 8
            session.close()
            with other.attach("tiny", LAYOUT):  # passes on that the former one writes no more
                eventually(lambda: quarantined(client) == 0)


def test_a_stopped_writer_is_waited_for_until_it_is_killed(service: ServiceProcess) -> None:
    with (
        grpc.insecure_channel(service.target) as channel,
        prefixcache.connect(service.target) as client,
    ):
        holder, writer = member(service.target, "g", 32), member(service.target, "g")
        os.kill(writer.pid, signal.SIGSTOP)
        end(holder)
        eventually(lambda: quarantined(client) == 8)
        # Another is silent for a ttl, and its quarantine is over: so long nothing came back.
        take_and_fall_silent(PrefixCacheStub(channel), 1)  # type: ignore[no-untyped-call]
        eventually(lambda: quarantined(client) == 16)
        eventually(lambda: quarantined(client) == 8)
        end(writer)
        eventually(lambda: quarantined(client) == 0)


def test_who_cannot_be_watched_waits_for_those_of_its_group_that_can(
    service: ServiceProcess,
) -> None:
    with (
        grpc.insecure_channel(service.target) as channel,
        prefixcache.connect(service.target) as client,
    ):
        stub: Any = PrefixCacheStub(channel)  # type: ignore[no-untyped-call]
        writer = member(service.target, "g")
        take_and_fall_silent(stub, 1, "g")
        eventually(lambda: quarantined(client) == 8)
        take_and_fall_silent(stub, 1)
        eventually(lambda: quarantined(client) == 16)
        eventually(lambda: quarantined(client) == 8)
        end(writer)
        eventually(lambda: quarantined(client) == 0)


def test_a_client_speaks_for_its_own_process_and_not_for_its_group(
    service: ServiceProcess,
) -> None:
    """It lost its stream and attaches again: it writes no more, but its workers may."""
    with prefixcache.connect(service.target) as client:
        writer = member(service.target, "g")
        with prefixcache.connect(service.target) as holder:
            session = holder.attach("tiny", LAYOUT, group="g")
            session.acquire([7] * 32)
            session._call.cancel()
            eventually(lambda: quarantined(client) == 8)
            session.close()
            with holder.attach("tiny", LAYOUT) as again:
                again.lookup([7])
                assert quarantined(client) == 8
                end(writer)
                eventually(lambda: quarantined(client) == 0)
