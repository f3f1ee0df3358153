"""A pool on a GPU: its owner process, its handle, its death.

Without a GPU everything but CUDA itself runs as it is: real processes, the real protocol, and real
shared memory in the place of device memory.  What needs a GPU is marked so.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from select import select
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from kernels.shared_memory_driver import SharedMemoryDriver
from patience import PATIENCE_S
from prefixcache import connect
from prefixcache.device import CudaDriver
from prefixcache.errors import (
    EpochMismatch,
    InvalidRequest,
    LayoutMismatch,
    NotFound,
    PoolExhausted,
    ServiceUnavailable,
    Unsupported,
)
from prefixcache.service.pool.device_owner import DeviceOwner, own
from prefixcache.types import Layout, Ledger, PoolHandle
from prefixcache_kernels import imported
from prefixcache_kernels.fence import Fence
from prefixcache_kernels.imported import open_device
from prefixcache_kernels.pool import SharedPool

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
LAYOUT = Layout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float32")
NO_GPU = not torch.cuda.is_available()


OWNER = f"""
import sys
sys.path[:0] = ({str(ROOT)!r}, {str(ROOT / "tests" / "kernels")!r})
from shared_memory_driver import SharedMemoryDriver
from prefixcache.service.pool.device_owner import own
sys.exit(own(SharedMemoryDriver(sys.argv[1]), sys.stdin, sys.stdout))
"""


@contextmanager
def owner(folder: Path, num_blocks: int = 4) -> Iterator[DeviceOwner]:
    command = [sys.executable, "-c", OWNER, str(folder)]
    with DeviceOwner.start(LAYOUT, num_blocks, 16, command=command) as made:
        yield made


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[DeviceOwner, Path]]:
    folder = tmp_path_factory.mktemp("device")
    with owner(folder) as made:
        yield made, folder


def test_the_owner_zeroes_the_pool_and_writes_what_it_is(shared: tuple[DeviceOwner, Path]) -> None:
    made, folder = shared
    memory = open_device(made.handle, SharedMemoryDriver(str(folder)))
    assert made.handle.kind == "cuda-ipc"
    assert memory.num_bytes == made.handle.offset + made.handle.num_bytes
    assert memory.read(memory.num_bytes)[made.handle.offset :] == bytes(made.handle.num_bytes)
    assert memory.epoch() == made.handle.epoch
    assert memory.__cuda_array_interface__["shape"] == (memory.num_bytes,)


def test_a_handle_of_another_life_or_shape_is_refused_and_closed(
    shared: tuple[DeviceOwner, Path],
) -> None:
    made, folder = shared
    driver = SharedMemoryDriver(str(folder))
    with pytest.raises(EpochMismatch, match="the pool on the GPU is of epoch"):
        open_device(replace(made.handle, epoch=made.handle.epoch + 2), driver)
    with pytest.raises(LayoutMismatch, match="4 blocks of 16 tokens"):
        open_device(replace(made.handle, num_blocks=5), driver)
    with pytest.raises(NotFound):
        open_device(replace(made.handle, name="gone"), driver)
    assert not driver.maps


def test_memory_is_closed_with_its_last_user(shared: tuple[DeviceOwner, Path]) -> None:
    made, folder = shared
    driver = SharedMemoryDriver(str(folder))
    memory = open_device(made.handle, driver)
    assert len(driver.maps) == 1
    del memory
    assert not driver.maps


def test_memory_is_closed_when_the_device_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that were queued may read it after the last tensor is gone."""
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda ordinal: done.append(f"wait {ordinal}"))
    driver = SimpleNamespace(ordinal=3, close=lambda address: done.append(f"close {address}"))
    imported._close(driver, 7, os.getpid() + 1)  # type: ignore[arg-type]
    assert not done, "a forked child has neither the memory nor a driver that works"
    imported._close(driver, 7, os.getpid())  # type: ignore[arg-type]
    assert done == ["wait 3", "close 7"]


def test_a_forked_child_is_told_that_it_has_not_the_memory(
    shared: tuple[DeviceOwner, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made, folder = shared
    memory = open_device(made.handle, SharedMemoryDriver(str(folder)))
    with monkeypatch.context() as child:
        parent = os.getpid()
        child.setattr(os, "getpid", lambda: parent + 1)
        with pytest.raises(InvalidRequest, match=f"process {parent} and came through fork"):
            memory.epoch()
    assert memory.epoch() == made.handle.epoch


def test_a_fence_waits_for_all_streams_that_it_was_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A mark in each; the message comes when the last has been passed."""
    passed = {"present": True, "copies": False}

    def stream(name: str) -> SimpleNamespace:
        mark = SimpleNamespace(query=lambda: passed[name])
        return SimpleNamespace(record_event=lambda: mark)

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream("present"))
    blocks = SimpleNamespace(is_cuda=True, device="cuda:0")
    fence: Fence[str] = Fence.of(blocks, [stream("copies")])  # type: ignore[arg-type, list-item]
    fence.push("committed")
    assert fence.pop() == []
    passed["copies"] = True
    assert fence.pop() == ["committed"]


def test_the_owner_ends_with_the_service_and_is_seen_to_die(tmp_path: Path) -> None:
    with owner(tmp_path) as made:
        assert made.alive
        first = made.handle
    assert not made.alive
    made.close()
    with owner(tmp_path) as again:
        assert again.handle.epoch != first.epoch
        os.kill(again.pid, signal.SIGKILL)
        assert select([again.pidfd], [], [], 10.0)[0], "its pidfd tells of the death"


def test_the_owner_notices_a_service_killed_with_sigkill(tmp_path: Path) -> None:
    code = (
        "import sys; from prefixcache.service.pool.device_owner import DeviceOwner\n"
        "from prefixcache.types import Layout\n"
        "command = [sys.executable, '-c', *sys.argv[1:]]\n"
        "with DeviceOwner.start(Layout(2, 3, 8), 1, 16, command=command) as made:\n"
        "    print(made.pid, flush=True); input()"
    )
    service = subprocess.Popen(
        [sys.executable, "-c", code, OWNER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    with service:
        assert service.stdout is not None
        pidfd = os.pidfd_open(int(service.stdout.readline()))
        service.kill()
        assert select([pidfd], [], [], 10.0)[0]
        os.close(pidfd)


def test_an_owner_that_cannot_says_why(tmp_path: Path) -> None:
    with pytest.raises(PoolExhausted, match="do not fit into"), owner(tmp_path, 100_000):
        pass
    with pytest.raises(InvalidRequest, match="at least 1 block"), owner(tmp_path, 0):
        pass
    with pytest.raises(Unsupported, match="ended with 7 before"):
        DeviceOwner.start(LAYOUT, 1, 1, command=[sys.executable, "-c", "import sys; sys.exit(7)"])
    with pytest.raises(Unsupported, match=r"not answered for 0\.2 s"):
        DeviceOwner.start(LAYOUT, 1, 1, command=["sleep", "60"], timeout_s=0.2)


def test_orders_that_cannot_be_read_are_answered(tmp_path: Path) -> None:
    for order in ("", "{}", '{"layout": 5}', '{"layout": "2x3x8:int8"}', "[1]"):
        answers = io.StringIO()
        assert own(SharedMemoryDriver(str(tmp_path)), io.StringIO(order), answers) == 1
        answer = json.loads(answers.getvalue())
        assert answer["code"] == "INVALID_ARGUMENT", order
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_without_a_gpu_everything_says_what_is_missing() -> None:
    with pytest.raises(Unsupported, match="needs"):
        CudaDriver(0)
    with pytest.raises(Unsupported, match="needs"):
        DeviceOwner.start(LAYOUT, 1, 16)
    handle = PoolHandle("cuda-ipc", "00:00", 4, 16, LAYOUT, 5, 4096)
    with pytest.raises(Unsupported, match=r"built without CUDA|NVIDIA's driver"):
        SharedPool.map(handle)
    with pytest.raises(Unsupported, match="on a GPU, not on cpu"):
        SharedPool.map(handle, "cpu")


def serve(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "prefixcache.cli", "serve", *options]
    return subprocess.run(command, capture_output=True, text=True, env=ENV, check=False)


@pytest.mark.skipif(not NO_GPU, reason="there is a GPU")
def test_serve_refuses_a_gpu_that_is_not_there_and_settings_that_do_not_fit(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path / 's'}"
    ran = serve("--pool", "cuda", "--listen", socket, "--layout", "2x3x8:float32")
    assert ran.returncode
    assert "needs NVIDIA's driver" in ran.stderr or "needs a GPU" in ran.stderr
    assert "Traceback" not in ran.stderr
    ran = serve("--pool", "cuda", "--listen", socket)
    assert ran.returncode
    assert "--pool cuda needs --model or --layout" in ran.stderr


SERVICE = """
import sys
from prefixcache.config import load
from prefixcache.errors import CacheError
from prefixcache.service import backing
from prefixcache.service.pool.device_owner import DeviceOwner
from prefixcache.service.server import run
start, program, folder = DeviceOwner.start, sys.argv[1], sys.argv[2]
class Injected:
    @staticmethod
    def start(*sizes, device):
        made = start(*sizes, command=[sys.executable, "-c", program, folder])
        print("owner", made.pid, flush=True)
        return made
backing.DeviceOwner = Injected
try:
    flags = {"pool": "cuda", "layout": "2x3x8:float32", "memory": 1 << 20}
    run(load(flags | {"listen": [sys.argv[3]]}), lambda line: print(line, flush=True))
except CacheError as error:
    print("ended:", error, flush=True)
"""


def test_a_service_whose_owner_dies_ends_and_the_next_has_another_epoch(tmp_path: Path) -> None:
    socket = f"unix:{tmp_path / 's'}"
    command = [sys.executable, "-c", SERVICE, OWNER, str(tmp_path), socket]
    epochs = []
    for _ in range(2):
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENV)
        with service:
            assert service.stdout is not None
            lines = iter(service.stdout.readline, "")
            pid = next(int(line.split()[1]) for line in lines if line.startswith("owner"))
            assert any(line.startswith("listening") for line in lines)
            with connect(socket) as cache:
                session = cache.attach("llama", LAYOUT)
                assert session.pool.kind == "cuda-ipc"
                memory = open_device(session.pool, SharedMemoryDriver(str(tmp_path)))
                assert memory.epoch() == session.pool.epoch
                epochs.append(session.pool.epoch)
                os.kill(pid, signal.SIGKILL)
                assert "Start the service again" in "".join(lines)
                assert service.wait(PATIENCE_S) == 0
                with pytest.raises(ServiceUnavailable):
                    session.acquire([1, 2, 3])
    assert epochs[0] != epochs[1]


class Stream:
    """A device that has done so many of the things it was given."""

    def __init__(self) -> None:
        self.given = self.done = 0

    def record(self) -> Stream.Event:
        self.given += 1
        return Stream.Event(self, self.given)

    class Event:
        def __init__(self, stream: Stream, number: int) -> None:
            self.stream, self.number = stream, number

        def query(self) -> bool:
            return self.stream.done >= self.number

        def synchronize(self) -> None:
            self.stream.done = max(self.stream.done, self.number)


def test_messages_wait_for_the_device_and_keep_their_order() -> None:
    stream = Stream()
    fence: Fence[str] = Fence(stream.record)
    for message in ("a", "b", "c"):
        fence.push(message)
    assert fence.pop() == []
    stream.done = 2
    assert fence.pop() == ["a", "b"]
    assert len(fence) == 1
    fence.push("d")
    assert fence.drain() == ["c", "d"]
    assert fence.drain() == fence.pop() == []


def test_a_workers_commits_and_releases_leave_after_the_device_is_done() -> None:
    from prefixcache_worker.store import Commit, PrivateClaim, SharedStore

    stream = Stream()

    class Session:
        alive = True
        sent: ClassVar[list[int]] = []

        @contextmanager
        def batch(self) -> Iterator[Session]:
            yield self

        def commit(self, *_: object) -> SimpleNamespace:
            self.sent.append(stream.done)
            return SimpleNamespace(error=None)

        release = commit

    store = SharedStore(Session(), SharedPool.private(LAYOUT, 2, 16))  # type: ignore[arg-type]
    store._fence = Fence(stream.record)
    claim = PrivateClaim(array("i", [0]), Ledger())
    store.settle([Commit(claim, 3, [7])], [claim])
    store.settle([Commit(claim, 4, [8])], [])
    assert Session.sent == [1, 1, 2]


WORKER = """
import json, sys, time, torch
from prefixcache.types import Layout, Ledger, PoolHandle
from prefixcache_kernels.pool import SharedPool
handle = json.loads(sys.argv[1]); handle["layout"] = Layout(**handle["layout"])
pool, mine = SharedPool.map(PoolHandle(**handle)), int(sys.argv[2])
pool.keys(0)[mine] = mine + 1
torch.cuda.synchronize()
print("written", flush=True)
if mine == 0:  # killed in the midst of this
    big = torch.randn(8192, 8192, device="cuda")
    print("busy", flush=True)
    while True:
        big = big @ big / 8192
sys.stdin.readline()
seen = [float(pool.keys(0)[other].mean()) for other in range(3)]
print(json.dumps(seen), flush=True)
sys.stdin.readline()
"""


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no CUDA device")
def test_three_workers_share_a_gpu_pool_and_one_killed_at_work_harms_nobody() -> None:
    with DeviceOwner.start(LAYOUT, 64, 16) as made:
        handle = json.dumps(asdict(made.handle))
        workers = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, handle, str(number)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env=ENV,
            )
            for number in range(3)
        ]
        try:
            for worker in workers:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "written\n"
            assert workers[0].stdout is not None
            assert workers[0].stdout.readline() == "busy\n"
            time.sleep(0.2)
            workers[0].kill()
            workers[0].wait()
            for worker in workers[1:]:
                assert worker.stdin is not None
                assert worker.stdout is not None
                worker.stdin.write("\n")
                worker.stdin.flush()
                assert json.loads(worker.stdout.readline()) == [1.0, 2.0, 3.0]
            assert made.alive
            with SharedPool.map(made.handle, "cuda") as pool:
                assert pool.current
                assert float(pool.keys(0)[2].mean()) == 3.0
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
    with pytest.raises((NotFound, EpochMismatch)):
        SharedPool.map(made.handle)
    with DeviceOwner.start(LAYOUT, 64, 16) as again, SharedPool.map(again.handle) as pool:
        assert int(torch.count_nonzero(pool.blocks)) == 0


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU, reason="no CUDA device")
def test_a_commit_waits_for_the_event_of_its_stream() -> None:
    with DeviceOwner.start(LAYOUT, 64, 16) as made, SharedPool.map(made.handle) as pool:
        fence: Fence[int] = Fence.of(pool.blocks)
        big = torch.randn(8192, 8192, device="cuda")
        torch.cuda.synchronize()
        for _ in range(50):
            big = big @ big / 8192
        pool.keys(0)[0] = 1.0
        fence.push(16)
        assert fence.pop() == []
        assert fence.drain() == [16]
        assert float(pool.keys(0)[0].mean()) == 1.0
