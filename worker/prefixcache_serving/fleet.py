"""The fleet: the workers are started, watched, replaced, and handed over when they are drained.

```
start ──► ready ──► in the team ──┬─ ended by itself ───────► its answers go on elsewhere; another
            │                     ├─ stopped, or stuck ─────► its answers go on elsewhere; it
            │ fails               │                           comes back, or is replaced
            ▼                     └─ drained ───────────────► its answers go on elsewhere; another
        again, later and later
```
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from prefixcache_serving.meter import Meter
from prefixcache_serving.notices import Notice, Say
from prefixcache_serving.router import Router, Station
from prefixcache_worker.child import ProcessFailed
from prefixcache_worker.child_worker import ChildWorker

LOOK_S: Final = 0.03
"""How often it is looked whether workers are stopped or stuck."""
STOPPED_LOOKS: Final = 2
"""Looks in a row at which a process is stopped, until its answers go on elsewhere."""
LATE_S: Final = 0.5
"""A look that is so much too late says nothing about the workers: nobody has listened to them."""
LOST_S: Final = 30.0
"""How long a stopped or stuck worker is waited for before it is killed."""
READY_S: Final = 600.0
"""How long a worker may take to load its model."""
LONGEST_PAUSE_S: Final = 30.0
"""Between two starts of a worker that fails again and again."""


class Make(Protocol):
    """Makes a worker, not started yet."""

    def __call__(self, name: str, tell: Callable[[dict[str, Any]], None]) -> ChildWorker:
        """Give one of that name, which tells its events."""
        ...


class Fleet:
    """The workers.

    Args:
        names: of the workers.
        make: makes one.
        router: has the answers.
        meter: counts the starts.
        say: is told what happens.
    """

    def __init__(
        self,
        names: list[str],
        make: Make,
        router: Router,
        meter: Meter,
        say: Say,
    ) -> None:
        self.names = names
        self.workers: dict[str, ChildWorker] = {}
        """Those that run, or are being started."""
        self.about: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        """What the first worker said of itself when it was ready."""
        self._make = make
        self._router = router
        self._meter = meter
        self._say = say
        self._is_closing = False

    @property
    def num_ready(self) -> int:
        """Workers that are given requests."""
        return sum(station.is_open for station in self._router.stations.values())

    async def run(self) -> None:
        """Keep all workers running, until cancelled.

        Raises:
            ProcessFailed: the first start of a worker failed: the next one would, too.
        """
        async with asyncio.TaskGroup() as group:
            for name in self.names:
                group.create_task(self._keep(name))
            group.create_task(self._watch())

    async def stop(self) -> None:
        """End all workers.  Idempotent."""
        self._is_closing = True
        await asyncio.gather(*(worker.stop() for worker in list(self.workers.values())))

    async def renew(self, name: str) -> None:
        """Replace a worker by a new one; what it has goes on elsewhere.

        Returns when the new one is ready.
        """
        worker, station = self.workers.get(name), self._router.stations.get(name)
        if worker is None or station is None:
            return
        self._tell("drained", worker, "is drained")
        self._router.open(station, False)
        self._router.hand_over(station)
        await worker.stop()
        while self._router.stations.get(name) in (None, station):
            await asyncio.sleep(LOOK_S)

    async def _keep(self, name: str) -> None:
        """Run a worker of this name, and another one after each end."""
        pause_s = 0.0
        while not self._is_closing:
            began_s = time.monotonic()
            worker = self._make(name, lambda event: self._router.hear(name, event))
            self.workers[name] = worker
            self._meter.started.inc()
            try:
                await worker.ready(READY_S)
                if not self.about.done():
                    self.about.set_result(worker.about)
                seconds = time.monotonic() - began_s
                told = f"is ready after {seconds:.1f} s"
                self._tell("ready", worker, told, seconds=round(seconds, 3))
                self._router.join(
                    worker, int(worker.about["max_batch"]), int(worker.about["chunk"])
                )
                pause_s = 0.0
                await worker.gone.wait()
            except ProcessFailed as failure:
                if not self.about.done():
                    raise
                pause_s = min(LONGEST_PAUSE_S, max(1.0, 2 * pause_s))
                self._say(
                    Notice(
                        "worker_failed",
                        f"{failure}; again in {pause_s:.0f} s",
                        worker=name,
                        retry_s=pause_s,
                    )
                )
            finally:
                self._router.part(name, died=not self._is_closing)
                await asyncio.shield(worker.stop())
            if not self._is_closing and pause_s == 0.0:
                self._tell(
                    "ended",
                    worker,
                    f"has ended{how_it_ended(worker)}; another one takes its place",
                    exit_code=worker.exit_code,
                )
            await asyncio.sleep(pause_s)

    async def _watch(self) -> None:
        """Look for workers that are stopped, or that make no step although they have to."""
        looks: dict[str, int] = {}
        lost: dict[str, _Lost] = {}
        last = time.monotonic()
        while True:
            await asyncio.sleep(LOOK_S)
            now = time.monotonic()
            if (late := now - last - LOOK_S) > LATE_S:
                self._router.pardon(late)
            last = now
            for name, station in list(self._router.stations.items()):
                worker = self.workers[name]
                is_stopped = _is_stopped(worker.pid)
                looks[name] = looks.get(name, 0) + 1 if is_stopped else 0
                found = lost.get(name)
                if found is not None and found.station is station:
                    is_back = not is_stopped if found.is_stopped else station.heard_s > found.since
                    if is_back:
                        del lost[name]
                        self._tell("back", worker, "is back")
                        self._router.open(station, True)
                    elif now - found.since > LOST_S:
                        self._tell("killed", worker, f"is killed: it was away for {LOST_S:.0f} s")
                        worker.kill()
                elif looks[name] >= STOPPED_LOOKS or station.is_stuck(now):
                    lost[name] = _Lost(station, now, is_stopped)
                    event = "stopped" if is_stopped else "stuck"
                    what = "is stopped" if is_stopped else "makes no step"
                    self._tell(event, worker, f"{what}: its answers go on elsewhere")
                    self._router.open(station, False)
                    self._router.hand_over(station, is_lost=True, hangs=not is_stopped)

    def _tell(self, event: str, worker: ChildWorker, what: str, **more: Any) -> None:
        told = f"{worker.name} (pid {worker.pid}) {what}"
        self._say(Notice(f"worker_{event}", told, worker=worker.name, pid=worker.pid, **more))


@dataclass(frozen=True, slots=True)
class _Lost:
    """A worker that does not go on."""

    station: Station
    since: float
    is_stopped: bool


def how_it_ended(worker: ChildWorker) -> str:
    """Say how a worker has ended, where that is not as it should; with what it wrote last."""
    code = worker.exit_code
    if not code:
        return ""
    if code < 0:
        return f" ({signal.strsignal(-code)})"
    said = worker.complaint()
    return f" with exit code {code}" + (f", saying:\n{said}\n" if said else "")


def _is_stopped(pid: int) -> bool:
    """Whether a process is stopped by a signal (Linux; elsewhere nobody can tell)."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "Tt"
    return False
