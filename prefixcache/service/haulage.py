"""Haulage: the service's end of the porter.  Gives him hauls, tells the core how they ended.

```
core ─ hauls ─► up   ─┐ some of them   ┌─► porter ─┐
                down ─┴─► in his hands ┘           └─ report ─► core ─► who waits is tried again
```
What goes to a store elsewhere, or comes from there, passes through slots, and through the hands of
a carrier (`carriage.py`).  What comes back goes first: who waits for it waits for a piece that is
going down at most.

What is to be written to a disk that fails is lost, and nothing is written there for a pause that
doubles each time, too.

A porter that has ended is replaced (`supervisor.py`), and one that has not reported for ten
seconds, though he has something in hand, is killed; whoever waits for him has long been served
without.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import secrets
import socket
import time
from collections import deque
from typing import Final, NamedTuple

import structlog

from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul
from prefixcache.plain_json import json_text
from prefixcache.service.backing import Backing
from prefixcache.service.carriage import Carriage
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.failures import Failures
from prefixcache.service.supervisor import FIRST_PAUSE_S, LONGEST_PAUSE_S, SILENT_S, Supervisor
from prefixcache.service.tiers.orders import MOST_BYTES, READY, Report, pack_haul, read_report
from prefixcache.types import HaulId

PART: Final = "the porter"
DISK: Final = "the disk below the pool"
"""How they are called among the parts that have ended."""

_IN_HAND: Final = 2
"""Hauls that a porter is given at the same time at least: while he reports one, he has the next."""
_MOST_IN_HAND: Final = 8
"""And at most, of what comes back, which goes first in any case, and of what is small: on a
crowded machine each time that he has to be given more costs a turn of the processor."""
_BYTES_IN_HAND: Final = 4 << 20
"""What is small: who waits for what comes back waits for so much that goes down, at most, or for
two hauls."""
_SPARED: Final = 1
"""Porters that may end, and failures of the disk, while all goes there: with more of either what is
left is given up."""

log = structlog.get_logger(__name__)


class _PutsDown(NamedTuple):
    """How it stood when all that is cached began to go to the disk."""

    num_written: int
    num_ended: int
    num_refused: int


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
        silent_s: float = SILENT_S,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._backing = backing
        self._deliveries = deliveries
        self._failures = failures
        self._supervisor = Supervisor(
            PART,
            "prefixcache.service.tiers.porter",
            failures,
            in_hand_since=self.in_hand_since,
            ended=self._ended,
            again=self.pump,
            silent_s=silent_s,
            first_pause_s=first_pause_s,
        )
        disk = backing.disk
        self._seed = secrets.randbits(64) if disk is None else disk.seed
        self._up: deque[Haul] = deque()
        self._down: deque[Haul] = deque()
        self._in_hand: dict[HaulId, float] = {}
        """When each haul that he has was given to him."""
        self._heard_at = -math.inf
        self._to_disk: dict[HaulId, int] = {}
        """Those of them that write to the disk, and how many blocks of each come from the pool."""
        self._first_pause_s = self._disk_pause_s = first_pause_s
        self._disk_held_until = -math.inf
        self._num_refused = 0
        """Times that the disk has failed, but for what was on its way already."""
        self._line: socket.socket | None = None
        self._puts_down: _PutsDown | None = None
        self._num_dropped = 0
        """Blocks that were lost with porters, or by the disk, since that began."""
        self.carriage: Carriage | None = None
        """Fetches from a store elsewhere, and stores there, if there is one."""
        deliveries.on_settle = self.pump

    @property
    def pid(self) -> int:
        """The process of the present porter; 0 if there is none."""
        return self._supervisor.pid

    @property
    def num_ended(self) -> int:
        """Porters that have ended before the service."""
        return self._supervisor.num_ended

    @property
    def is_at_work(self) -> bool:
        """Whether there is a porter who has said that he is ready."""
        return self._supervisor.is_ready

    def in_hand_since(self) -> float | None:
        """Say since when he has had something in hand without a report; None: he has nothing.

        A slow disk makes a slow porter, not one that hangs.
        """
        since = min(self._in_hand.values(), default=None)
        return None if since is None else max(since, self._heard_at)

    def pump(self) -> None:
        """Take new hauls of the core, and give the porter what he has a hand free for.

        After every step.  O(1) where there is nothing to carry.
        """
        cache = self._backing.cache
        if cache is None or not self._backing.has_tiers:
            return
        if not self.pid:
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

    def begin_putting_down(self) -> None:
        """From now on have all that is cached go to a disk, if that outlives the service."""
        cache = self._backing.cache
        if cache is not None and self._backing.loses_pool:
            cache.put_down()
            self._puts_down = _PutsDown(self._num_written(cache), self.num_ended, self._num_refused)
            self._num_dropped = 0

    def is_putting_down(self) -> bool:
        """Whether more of it will get there.  O(blocks that begin to go)."""
        cache, puts = self._backing.cache, self._puts_down
        if cache is None or puts is None:
            return False
        self.pump()
        now = time.monotonic()
        if not cache.num_above_disk:
            return False
        if not self.is_at_work:
            return self.num_ended - puts.num_ended <= _SPARED
        if now < self._disk_held_until:
            return self._num_refused - puts.num_refused <= _SPARED
        moves = self._in_hand or self._up or self._down
        return bool(moves) or cache.waits_to_write(now)

    def end_putting_down(self) -> None:
        """Say what has got there, and what has not."""
        cache, puts = self._backing.cache, self._puts_down
        if cache is not None and puts is not None:
            blocks = self._num_written(cache) - puts.num_written
            lost = cache.num_above_disk + self._num_dropped
            log.info("put on disk", blocks=blocks, lost=lost)

    @staticmethod
    def _num_written(cache: PrefixCache) -> int:
        return cache.counts(now=time.monotonic()).disk_written

    def hand(self, haul: Haul) -> None:
        """Put a haul into the queue: the porter is given it once he has a hand free."""
        (self._up if haul.is_up else self._down).append(haul)

    def _start(self) -> None:
        """Start a porter, if it is time.  He reports once he is ready."""
        lines = self._supervisor.start([socket.SOCK_SEQPACKET], self._backing.porters_files)
        if not lines:
            return
        [self._line] = lines
        order = self._backing.order() | {"seed": self._seed}
        self._line.setblocking(False)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            self._line.send(json_text(order).encode())
        asyncio.get_running_loop().add_reader(self._line, self._hear)

    def _give(self) -> None:
        line, cache = self._line, self._backing.cache
        while line is not None and (queue := self._up or self._down):
            if cache is not None and cache.spare(queue[0].id):
                queue.popleft()
                continue
            if len(self._in_hand) >= self._most_in_hand(queue[0]):
                return
            try:
                line.send(pack_haul(queue[0]))
            except BlockingIOError:
                return  # he has reports to be read: then again
            except OSError:
                return  # he has ended: that is told apart
            haul = queue.popleft()
            self._in_hand[haul.id] = time.monotonic()
            if not haul.is_up and not haul.names and max(haul.slots) >= self._backing.num_host:
                self._to_disk[haul.id] = len(haul.blocks)

    def _most_in_hand(self, haul: Haul) -> int:
        """Say with how many the porter may have this one in hand."""
        sizes = self._backing.sizes
        if haul.is_up or sizes is None:
            return _MOST_IN_HAND
        fitting = _BYTES_IN_HAND // (len(haul.slots) * sizes.block_bytes)
        return min(max(_IN_HAND, fitting), _MOST_IN_HAND)

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
            self._hang_up()
            self._supervisor.kill("hung up" if not message else "sends what is no report")
            return
        now = self._heard_at = time.monotonic()
        self._in_hand.pop(report.haul, None)
        if report.haul == READY:
            self._supervisor.ready()
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
        lost = self._to_disk.pop(report.haul, 0) - report.num_good
        self._num_dropped += max(0, lost)
        if report.error and now < self._disk_held_until:
            return  # it was on its way before
        if report.error:
            pause_s = self._disk_pause_s
            self._disk_pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
            cause = f"{os.strerror(report.error)}; nothing is written there for {pause_s:g} s"
            self._failures.tell(DISK, OSError(cause))
            self._num_refused += 1
            self._disk_held_until = now + pause_s
            if self._backing.cache is not None:
                self._backing.cache.hold_disk(until=now + pause_s)
        elif writes:
            self._disk_pause_s = self._first_pause_s
            self._failures.forget(DISK)

    def _ended(self) -> None:
        """Take back what the porter had in hand: he has ended."""
        cache = self._backing.cache
        self._hang_up()
        self._in_hand.clear()
        self._to_disk.clear()
        self._up.clear()
        self._down.clear()
        if cache is not None:
            before = cache.num_above_disk
            cache.set_porter(is_there=False, now=time.monotonic())
            self._num_dropped += before - cache.num_above_disk
        if self.carriage is not None:
            self.carriage.porter_ended()
        self._deliveries.settle()

    def _hang_up(self) -> None:
        if self._line is not None:
            asyncio.get_running_loop().remove_reader(self._line)
            self._line.close()
            self._line = None

    def close(self) -> None:
        """End the porter, and the carrier.  Idempotent."""
        if self.carriage is not None:
            self.carriage.close()
        self._hang_up()
        self._supervisor.close()
