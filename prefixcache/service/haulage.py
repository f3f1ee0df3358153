"""Haulage: the service's end of the porter.  Starts him, gives him hauls, watches him.

```
core ─ hauls ─► up   ─┐ at most two    ┌─► porter ─┐
                down ─┴─► in his hands ┘           └─ report ─► core ─► who waits is tried again
```
What goes to a store elsewhere, or comes from there, passes through slots, and through the hands of
a carrier (`carriage.py`).  What comes back goes first: who waits for it waits for a piece that is
going down at most.

What is to be written to a disk that fails is lost, and nothing is written there for a pause that
doubles each time, too.

A porter that has ended is replaced, after a pause that doubles each time, from 1 s to 30 s.  Only
once he is known to have ended is taken back what he had in hand: until then he might write.  One
that has not reported for ten seconds, though he has something in hand, is killed; whoever waits for
him has long been served without.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from typing import Final

import structlog

from prefixcache.core.hauls import Haul
from prefixcache.plain_json import json_text
from prefixcache.service.backing import Backing
from prefixcache.service.carriage import Carriage
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.failures import Failures
from prefixcache.service.tiers.orders import MOST_BYTES, READY, Report, pack_haul, read_report
from prefixcache.texts import many
from prefixcache.types import HaulId

PART: Final = "the porter"
DISK: Final = "the disk below the pool"
"""How they are called among the parts that have ended."""

_IN_HAND: Final = 2
"""Hauls that a porter is given at the same time: while he reports one, he has the next."""
_SILENT_S: Final = 10.0
_START_S: Final = 60.0
"""How long he may take to be ready, on whatever machine."""
_LOOK_S: Final = 0.01
_FIRST_PAUSE_S: Final = 1.0
_LONGEST_PAUSE_S: Final = 30.0

log = structlog.get_logger(__name__)


class Haulage:
    """One porter after the other, and what is to be carried.

    Args:
        backing: The cache whose blocks move, and what is below its pool.
        deliveries: Told when somebody who waits may have an outcome.
        failures: Told of a porter that has ended.
        silent_s: How long he may have something in hand without a report.
        first_pause_s: Between one that has ended and the next.
    """

    def __init__(
        self,
        backing: Backing,
        deliveries: Deliveries,
        failures: Failures,
        *,
        silent_s: float = _SILENT_S,
        first_pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._backing = backing
        self._deliveries = deliveries
        self._failures = failures
        self._silent_s = silent_s
        self._first_pause_s = self._pause_s = first_pause_s
        disk = backing.disk
        self._seed = secrets.randbits(64) if disk is None else disk.seed
        self._up: deque[Haul] = deque()
        self._down: deque[Haul] = deque()
        self._in_hand: dict[HaulId, float] = {}
        """When each haul that he has was given to him."""
        self._to_disk: set[HaulId] = set()
        """Those of them that write to the disk."""
        self._disk_pause_s = first_pause_s
        self._disk_held_until = -math.inf
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._pidfd = -1
        self._timer: asyncio.TimerHandle | None = None
        self.num_ended = 0
        """Porters that have ended before the service."""
        self._is_closed = False
        self.carriage: Carriage | None = None
        """Fetches from a store elsewhere, and stores there, if there is one."""
        deliveries.on_settle = self.pump

    @property
    def pid(self) -> int:
        """The process of the present porter; 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    @property
    def is_at_work(self) -> bool:
        """Whether there is a porter who has said that he is ready."""
        return self._process is not None and READY not in self._in_hand

    def pump(self) -> None:
        """Take new hauls of the core, and give the porter what he has a hand free for.

        After every step.  O(1) where there is nothing to carry.
        """
        cache = self._backing.cache
        if cache is None or not self._backing.has_tiers or self._is_closed:
            return
        if self._process is None:
            if self._timer is None:
                self._start()
            return
        if self.carriage is not None:
            self.carriage.pump()
        for haul in cache.hauls(now=time.monotonic()):
            if haul.names and self.carriage is not None:
                self.carriage.take(haul)
            else:
                self.hand(haul)
        if self.carriage is not None:
            self.carriage.pump()
        self._give()

    async def put_down(self, until: float) -> None:
        """Have all that is cached go to a disk that outlives the service, as far as it gets.

        Args:
            until: When it must be over; what has not got there then is lost.
        """
        cache = self._backing.cache
        if cache is None or not self._backing.loses_pool:
            return
        cache.put_down()
        total = left = cache.num_above_disk
        while left and time.monotonic() < until:
            self.pump()
            moves = self._in_hand or self._up or self._down
            fails = time.monotonic() < self._disk_held_until
            if self._process is None or fails or not (moves or cache.waits_to_write):
                break
            await asyncio.sleep(_LOOK_S)
            left = cache.num_above_disk
        log.info("put on disk", blocks=total - left, lost=left)

    def hand(self, haul: Haul) -> None:
        """Put a haul into the queue: the porter is given it once he has a hand free."""
        (self._up if haul.is_up else self._down).append(haul)

    def _start(self) -> None:
        """Start a porter.  He reports once he is ready."""
        ours = None
        try:
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                number = str(theirs.fileno())
                self._process = subprocess.Popen(  # noqa: S603 - this interpreter
                    [sys.executable, "-m", "prefixcache.service.tiers.porter", number],
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *self._backing.porters_files],
                    start_new_session=True,
                )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:  # no descriptor is left, or no process
            if ours is not None:
                ours.close()
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                self._process = None
            self._timer_to_start(f"cannot be started: {error}")
            return
        order = self._backing.order() | {"seed": self._seed, "parent": os.getpid()}
        ours.setblocking(False)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            ours.send(json_text(order).encode())
        loop = asyncio.get_running_loop()
        self._line = ours
        loop.add_reader(ours, self._hear)
        loop.add_reader(self._pidfd, self._ended)
        self._in_hand[READY] = time.monotonic()
        self._watch()

    def _give(self) -> None:
        line = self._line
        while line is not None and len(self._in_hand) < _IN_HAND and (self._up or self._down):
            queue = self._up or self._down
            try:
                line.send(pack_haul(queue[0]))
            except BlockingIOError:
                return  # he has reports to be read: then again
            except OSError:
                return  # he has ended: that is told apart
            haul = queue.popleft()
            self._in_hand[haul.id] = time.monotonic()
            if not haul.is_up and not haul.names and max(haul.slots) >= self._backing.num_host:
                self._to_disk.add(haul.id)

    def _hear(self) -> None:
        """Take the porter's reports."""
        line, cache = self._line, self._backing.cache
        if line is None or cache is None:
            return
        try:
            message = line.recv(MOST_BYTES)
        except BlockingIOError:
            return
        except OSError:
            message = b""
        try:
            report = read_report(message)
        except ValueError:
            self._kill("hung up" if not message else "sends what is no report")
            return
        now = time.monotonic()
        self._in_hand.pop(report.haul, None)
        if report.haul == READY:
            log.info("porter at work", pid=self.pid)
            self._failures.forget(PART)
            self._pause_s = self._first_pause_s
            cache.set_porter(is_there=True, now=now)
        else:
            self._note_disk(report, now)
            far = self.carriage
            if far is None or not far.copied(report.haul, report.num_good, report.seconds):
                cache.hauled(report.haul, report.num_good, report.seconds, now=now)
        self._deliveries.settle()

    def _note_disk(self, report: Report, now: float) -> None:
        """Let nothing be written to a disk for a while that has just failed."""
        writes = report.haul in self._to_disk
        self._to_disk.discard(report.haul)
        if report.error and now < self._disk_held_until:
            return  # it was on its way before
        if report.error:
            pause_s = self._disk_pause_s
            self._disk_pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            cause = f"{os.strerror(report.error)}; nothing is written there for {pause_s:g} s"
            self._failures.tell(DISK, OSError(cause))
            self._disk_held_until = now + pause_s
            if self._backing.cache is not None:
                self._backing.cache.hold_disk(until=now + pause_s)
        elif writes:
            self._disk_pause_s = self._first_pause_s
            self._failures.forget(DISK)

    def _watch(self) -> None:
        """Look now and then whether the porter still reports."""
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(self._silent_s / 4, self._look)

    def _look(self) -> None:
        self._timer = None
        silent_s = max(self._silent_s, _START_S) if READY in self._in_hand else self._silent_s
        oldest = min(self._in_hand.values(), default=None)
        if oldest is not None and time.monotonic() - oldest > silent_s:
            self._kill(f"has not reported for {silent_s:g} s")
        self._watch()

    def _kill(self, why: str) -> None:
        """Have the porter end; `_ended` follows when he has."""
        if self._line is not None:
            log.error("porter killed", pid=self.pid, why=why)
            asyncio.get_running_loop().remove_reader(self._line)
            self._line.close()
            self._line = None
        if self._process is not None:
            self._process.send_signal(signal.SIGKILL)

    def _ended(self) -> None:
        """Take back what the porter had in hand: he has ended."""
        process, cache = self._process, self._backing.cache
        self._let_go()
        code = 0 if process is None else process.wait()
        self.num_ended += 1
        self._up.clear()
        self._down.clear()
        self._timer_to_start(f"has ended with {code}")
        if cache is not None:
            cache.set_porter(is_there=False, now=time.monotonic())
        if self.carriage is not None:
            self.carriage.porter_ended()
        self._deliveries.settle()

    def _timer_to_start(self, why: str) -> None:
        pause_s = self._pause_s
        self._pause_s = min(2 * self._pause_s, _LONGEST_PAUSE_S)
        why += f" ({many(self.num_ended, 'time')}); the next one comes after {pause_s:g} s"
        self._failures.tell(PART, OSError(why))
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._start_again)

    def _start_again(self) -> None:
        self._timer = None
        self.pump()

    def _let_go(self) -> None:
        loop = asyncio.get_running_loop()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._line is not None:
            loop.remove_reader(self._line)
            self._line.close()
            self._line = None
        if self._pidfd >= 0:
            loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        self._in_hand.clear()
        self._to_disk.clear()
        self._process = None

    def close(self) -> None:
        """End the porter, and the carrier.  Idempotent."""
        self._is_closed = True
        if self.carriage is not None:
            self.carriage.close()
        process = self._process
        self._let_go()
        if process is not None:
            process.kill()  # he has nothing to put in order
            process.wait()
