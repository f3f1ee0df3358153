"""Real worker processes within milliseconds: one process has imported and loaded, and forks them.

```
test ── Unix socket ──► nursery (python -m serving.nursery MODEL SOCKET): torch, the model
  │ "fork, with this end of a pair"   └─ fork ─► WorkerProcess on it: own engine, own session
  └───────────────── lines, events ──────────────┘
```
A worker may be told what becomes of it at an exact place: after which token, and where in a step.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from patience import PATIENCE_S
from prefixcache_worker.child import ProcessFailed

SPIN = 0
"""In the place of a signal: the engine turns in a circle for ever."""


@dataclass(frozen=True)
class Fate:
    """What becomes of a worker.

    Args:
        at: after so many tokens that it has chosen.
        where: `computed` (nobody knows of them yet), `settled` (the service does), `told`.
        signal: that it sends itself, or SPIN.
    """

    at: int
    where: str
    signal: int


class Nursery:
    """The process that forks."""

    def __init__(self, model: Path, folder: Path) -> None:
        self._path = folder / "nursery.sock"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "serving.nursery", str(model), str(self._path)]
        )
        self._socket = socket.socket(socket.AF_UNIX)
        deadline = time.monotonic() + PATIENCE_S
        while self._socket.connect_ex(str(self._path)):
            assert self._process.poll() is None, "the nursery did not start"
            assert time.monotonic() < deadline, "the nursery did not start"
            time.sleep(0.02)

    def fork(self, name: str, target: str, fate: Fate | None) -> tuple[int, socket.socket]:
        """Start a worker; give its pid, and where it reads and writes."""
        ours, its = socket.socketpair()
        order = {"name": name, "target": target, "fate": fate and asdict(fate)}
        socket.send_fds(self._socket, [json.dumps(order).encode()], [its.fileno()])
        its.close()
        return int(self._socket.recv(64)), ours

    def stop(self) -> None:
        self._socket.close()
        self._process.wait(PATIENCE_S)


class ForkedWorker:
    """A worker as the fleet sees one."""

    def __init__(
        self,
        nursery: Nursery,
        name: str,
        tell: Callable[[dict[str, Any]], None],
        target: str,
        fate: Fate | None = None,
    ) -> None:
        self.name = name
        self.pid = 0
        self.about: dict[str, Any] = {}
        self.exit_code: int | None = None
        """Nobody waits for it."""
        self.gone = asyncio.Event()
        self.events: list[dict[str, Any]] = []
        self.lines: list[dict[str, Any]] = []
        self._tell = tell
        self._order = (nursery, target, fate)
        self._reader: asyncio.Task[None] | None = None
        self._writer: asyncio.StreamWriter | None = None

    async def ready(self, timeout_s: float = 0) -> None:
        nursery, target, fate = self._order
        self.pid, ours = nursery.fork(self.name, target, fate)
        reader, self._writer = await asyncio.open_connection(sock=ours, limit=1 << 24)
        if not (line := await reader.readline()):
            self.gone.set()
            raise ProcessFailed(f"{self.name} did not start")
        self.about = json.loads(line)
        self._reader = asyncio.create_task(self._listen(reader))

    def send(self, line: dict[str, Any]) -> None:
        if self._writer is None or self.gone.is_set():
            raise ProcessFailed(f"{self.name} is gone")
        if "tokens" in line:
            self.lines.append(line)
        self._writer.write(json.dumps(line).encode() + b"\n")

    def signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)

    async def stop(self) -> None:
        if self._writer is not None:
            self.kill()
            self._writer.close()
            await self.gone.wait()

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            with contextlib.suppress(ConnectionError):
                async for line in reader:
                    if line.endswith(b"\n"):
                        self.events.append(event := json.loads(line))
                        self._tell(event)
        finally:
            self.gone.set()


def _main(model: str, path: str) -> None:
    import gc

    from prefixcache_worker import process  # noqa: F401 - so that those who are forked need not
    from prefixcache_worker.model import Model

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them: they leave no trace
    loaded = Model.load(model, dtype="float32", threads=1)
    gc.collect()
    gc.freeze()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(1)
        connection, _ = listening.accept()
    for order, end in _orders(connection):
        pid = os.fork()
        if not pid:
            connection.close()
            _work(loaded, order, end)
        os.close(end)
        connection.send(str(pid).encode())


def _orders(connection: socket.socket) -> Iterator[tuple[dict[str, Any], int]]:
    while True:
        data, ends, _, _ = socket.recv_fds(connection, 1 << 16, 1)
        if not data:
            return
        yield json.loads(data), ends[0]


def _work(model: Any, order: dict[str, Any], end: int) -> None:
    from prefixcache_worker.process import WorkerProcess

    code = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.dup2(end, 0)
        os.dup2(end, 1)
        os.close(end)
        worker = WorkerProcess(
            model, order["target"], name=order["name"], chunk=64, max_batch=4, tells_steps=True
        )
        if order["fate"]:
            _doom(worker, Fate(**order["fate"]))
        worker.run()
        code = 0
    finally:
        os._exit(code)


def _doom(worker: Any, fate: Fate) -> None:
    """Let it meet its fate."""
    engine: Any = worker.engine
    told, settle, write = engine._told, engine._settle, worker._write
    num_chosen = num_told = 0
    is_met = False

    def meet(place: str, count: int) -> None:
        nonlocal is_met
        if place == fate.where and count >= fate.at and not is_met:
            is_met = True
            while fate.signal == SPIN:
                pass
            os.kill(os.getpid(), fate.signal)

    def choose(*given: Any) -> Any:
        nonlocal num_chosen
        num_chosen += 1
        return told(*given)

    def settle_all(jobs: Any) -> None:
        meet("computed", num_chosen)
        settle(jobs)
        meet("settled", num_chosen)

    def write_one(event: dict[str, Any]) -> None:
        nonlocal num_told
        write(event)
        num_told += event["event"] == "token"
        meet("told", num_told)

    engine._told, engine._settle, worker._write = choose, settle_all, write_one


if __name__ == "__main__":
    _main(*sys.argv[1:])
