"""The router: who computes what.  By load alone, as all workers share one cache.

```
admit ──► queue, a line per tenant ──► worker with the least to do ──► tokens ──► finished
   │ full: 429                  ▲          │ killed, hangs, is drained; the reader is slow
   ▼                            └──────────┘ with what was generated, first in its line
```
Load is the tokens that still have to be computed plus `SEQUENCE_COST` for each sequence in hand: a
prompt of a thousand tokens is not one of ten, and one of which all but a block is cached is.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Set
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Protocol

from prefixcache.types import Ledger
from prefixcache_serving.journey import BEHIND, Journey
from prefixcache_serving.meter import Meter
from prefixcache_serving.pace import Pace
from prefixcache_serving.refusals import Refused
from prefixcache_serving.shares import Shares
from prefixcache_serving.throughput import Throughput
from prefixcache_worker.child import ProcessFailed

SEQUENCE_COST: Final = 32
"""Tokens to compute that a decoding sequence counts as."""

MOST_DEATHS: Final = 3
"""Workers that may die of a request, or hang at it, before it is given up."""

_LONGEST_RETRY_S: Final = 60.0
_PAUSE_S: Final = 0.05
"""Until an answer is tried again that its tenant's quota had no room for; twice that the next time,
up to `_LONGEST_PAUSE_S`."""
_LONGEST_PAUSE_S: Final = 1.0


class Recipient(Protocol):
    """The part of a worker process that the router uses."""

    name: str

    @property
    def pid(self) -> int:
        """Its process id."""

    def send(self, line: dict[str, Any]) -> None:
        """Hand over one line; returns at once."""


@dataclass(slots=True)
class _Line:
    """What waits of one tenant."""

    begun: deque[Journey] = field(default_factory=deque)
    """Answers that somebody had already, which go first."""
    fresh: deque[Journey] = field(default_factory=deque)

    def __len__(self) -> int:
        return len(self.begun) + len(self.fresh)

    def __iter__(self) -> Iterator[Journey]:
        return chain(self.begun, self.fresh)

    def pop(self) -> Journey:
        """Take the next one."""
        return (self.begun or self.fresh).popleft()

    def drop(self, gone: Set[Journey]) -> None:
        """Take some out, wherever they are.  O(those that wait)."""
        if not gone.isdisjoint(self):
            self.begun = deque(one for one in self.begun if one not in gone)
            self.fresh = deque(one for one in self.fresh if one not in gone)


@dataclass(eq=False)
class Station:
    """A worker as the router sees it."""

    recipient: Recipient
    seats: int
    """Requests that it computes at a time."""
    chunk: int = 256
    """Tokens that it computes in a step, at most."""
    journeys: dict[str, Journey] = field(default_factory=dict)
    """In hand, by what the worker calls them."""
    is_open: bool = True
    """Whether it is given more."""
    heard_s: float = field(default_factory=time.monotonic)
    """When it last said something that its engine must have said, or got something to do."""
    pace: Pace = field(default_factory=Pace)
    num_generated: int = 0
    """Tokens that it has told."""

    @property
    def num_next(self) -> int:
        """Tokens of its next step, as far as is known here."""
        return min(self.chunk, sum(journey.due for journey in self.journeys.values()))

    def hear(self, now: float, num_tokens: int | None) -> None:
        """Note that its engine has said something, after a step of so many tokens.

        Args:
            now: when.
            num_tokens: None: as many as it had to compute; 0: there was no step.
        """
        if self.journeys and num_tokens != 0:
            self.pace.take(now - self.heard_s, num_tokens or self.num_next)
        self.heard_s = now

    def is_stuck(self, now: float) -> bool:
        """Whether its engine must have said something by now."""
        silent_s = now - self.heard_s
        return bool(self.journeys) and silent_s > self.pace.patience_s(self.num_next)

    @property
    def load(self) -> float:
        """What it has to do."""
        due = sum(journey.due for journey in self.journeys.values())
        return due + SEQUENCE_COST * sum(one.num_lanes for one in self.journeys.values())


class Router:
    """Hands answers to workers and hears their events.  Belongs to one event loop.

    Args:
        meter: counts what happens.
        longest_queue: answers that may wait.
        tenants: who may ask; each has a part of the queue that the others cannot take.
        longest_wait_s: how long an answer may wait to be begun that its tenant's quota has no room
            for.
    """

    def __init__(
        self,
        meter: Meter,
        *,
        longest_queue: int,
        tenants: Iterable[str] = (),
        longest_wait_s: float = 10.0,
    ) -> None:
        self.stations: dict[str, Station] = {}
        self.meter = meter
        self.longest_queue = longest_queue
        self.is_draining = False
        self._is_given_up = False
        self.num_generated = 0
        """Tokens of all answers."""
        self.num_moved = 0
        """Answers that went on on another worker."""
        self.num_computed_again = 0
        """Tokens that were computed again because of that."""
        self._shares = Shares(longest_queue, tenants)
        self._lines: dict[str, _Line] = {}
        """By tenant, in the order of their turns."""
        self._longest_wait_s = longest_wait_s
        self._paused: dict[Journey, asyncio.TimerHandle] = {}
        """Those that wait for blocks of their own tenant, in nobody's way."""
        self._turn = 0
        self._throughput = Throughput()

    # ------------------------------------------------------------------------------ from requests

    @property
    def num_waiting(self) -> int:
        """Answers that no worker has."""
        return sum(map(len, self._lines.values())) + len(self._paused)

    @property
    def num_running(self) -> int:
        """Answers that workers have."""
        return sum(len(station.journeys) for station in self.stations.values())

    def generated(self) -> dict[str, int]:
        """Count the tokens that each worker has told since it was started."""
        return {name: station.num_generated for name, station in self.stations.items()}

    def answers(self) -> dict[str, int]:
        """Count the answers that each worker has."""
        return {name: len(station.journeys) for name, station in self.stations.items()}

    def admit(self, journeys: list[Journey]) -> None:
        """Take all answers of one request, or none of them.

        Raises:
            Refused: 429 if they find no place in the queue, 503 while nothing is begun any more.
        """
        if self.is_draining:
            raise Refused("going down: nothing new is begun", status=503, retry_after_s=5.0)
        tenant = journeys[0].tenant
        free = sum(max(0, one.seats - len(one.journeys)) for one in self._open())
        held = Counter({one: len(line.fresh) for one, line in self._lines.items()})
        held.update(journey.tenant for journey in self._paused)
        room = self._shares.room(tenant, held) + (free if not self.num_waiting else 0)
        if len(journeys) > room:
            if len(journeys) > self.longest_queue:
                raise Refused(
                    f"{len(journeys)} answers at once; the queue takes {self.longest_queue}",
                    code="invalid_value",
                )
            self.meter.refused.inc()
            raise Refused(
                f"the queue is full: {self.num_waiting} answers wait and {self.num_running} are "
                "being computed; come again later",
                code="rate_limit_exceeded",
                status=429,
                retry_after_s=self._wait_s(),
            )
        self._line(tenant).fresh.extend(journeys)
        self._serve()

    def leave(self, *journeys: Journey) -> None:
        """Give answers up: nobody reads them any more, or their reader has enough.  Idempotent.

        Of several all go before a seat is given to who waits, which may be one of them.  O(those
        that wait).
        """
        for journey in journeys:
            journey.finish("cancelled")
            self._take_back(journey)
            if (timer := self._paused.pop(journey, None)) is not None:
                timer.cancel()
        gone = set(journeys)
        for line in self._lines.values():
            line.drop(gone)
        self._serve()

    def has_read(self, journey: Journey) -> None:
        """Take an answer up again that was set down for its slow reader, if it has caught up."""
        if journey.is_set_down and journey.num_unread <= BEHIND // 2 and not journey.is_over:
            journey.is_set_down = False
            self._again(journey)
            self._serve()

    def give_up(self) -> None:
        """Fail all answers: there will be nobody any more who computes them."""
        self.is_draining = self._is_given_up = True
        for station in self.stations.values():
            for journey in list(station.journeys.values()):
                self._take_back(journey)
                self._again(journey)
        lines, self._lines = self._lines, {}
        for journey in chain.from_iterable(lines.values()):
            self._again(journey)
        for journey, timer in self._paused.items():
            timer.cancel()
            self._again(journey)
        self._paused.clear()

    # ------------------------------------------------------------------------------- from workers

    def join(self, recipient: Recipient, seats: int, chunk: int = 256) -> Station:
        """Take a worker into the team."""
        station = self.stations[recipient.name] = Station(recipient, seats, chunk)
        self._serve()
        return station

    def part(self, name: str, *, died: bool) -> None:
        """Take a worker off the team; what it had goes to others.

        Args:
            name: the worker's.
            died: by itself, so that what it had in hand may be the reason.
        """
        station = self.stations.pop(name, None)
        if station is not None:
            self.hand_over(station, died=died)

    def hand_over(
        self,
        station: Station,
        *,
        died: bool = False,
        is_lost: bool = False,
        hangs: bool = False,
    ) -> None:
        """Give what a worker has in hand to others; it is told to forget it.

        Args:
            station: the worker's.
            died: by itself, so that what it had in hand may be the reason.
            is_lost: it lives and does nothing: what it was computing, nobody should wait for.
            hangs: by itself, likewise.
        """
        for journey in list(station.journeys.values()):
            journey.is_hurried = is_lost or bool(journey.tokens)
            journey.num_deaths += died
            journey.num_hangs += hangs
            self._take_back(journey)
            self.num_moved += 1
            self.meter.moved.inc()
            if journey.num_deaths + journey.num_hangs >= MOST_DEATHS:
                journey.fail(
                    Refused(
                        f"{MOST_DEATHS} workers died, or made no step any more, while they "
                        "computed this answer; it is given up",
                        status=500,
                        code="worker_died",
                    )
                )
            else:
                self._again(journey)
        self._serve()

    def pardon(self, seconds: float) -> None:
        """Let no worker be blamed for a time in which nobody here has listened."""
        for station in self.stations.values():
            station.heard_s += seconds

    def open(self, station: Station, is_open: bool) -> None:
        """Let a worker be given more, or not."""
        station.is_open = is_open
        self._serve()

    def hear(self, name: str, event: Mapping[str, Any]) -> None:
        """Take an event of a worker; of an attempt that is another's by now, nothing is taken."""
        station = self.stations.get(name)
        if station is None:
            return
        if event["event"] != "failed":  # that may be of the thread that reads requests
            station.hear(time.monotonic(), event.get("num_tokens"))
        journey = station.journeys.get(str(event.get("id", "")))
        if journey is None:
            self.meter.late.inc(event["event"] == "token")
            return
        match event["event"]:
            case "started":
                journey.num_pauses = 0
                journey.due = int(event["num_to_compute"])
                if journey.attempt and journey.ledger is not None:
                    self.num_computed_again += journey.due
                    self.meter.recomputed.inc(journey.due)
                journey.is_approximate |= event.get("approximate") is True
                journey.left_out = tuple(map(str, event.get("left_out") or ()))
                if journey.ledger is None:
                    journey.ledger = Ledger(**event["ledger"])
                    self.meter.count_prompt(journey.ledger)
            case "scored":
                journey.add_scores(event)
            case "token":
                journey.add(event)
                station.num_generated += 1
                self.num_generated += 1
                self.meter.generated.inc()
                if journey.num_unread > BEHIND:
                    self._take_back(journey)
                    journey.is_set_down = True
                    self.meter.set_down.inc()
                    self._serve()
            case "searched":  # nothing can be told yet, but it goes on
                journey.due = 1
            case "finished":
                journey.beams = event.get("beams") or []
                del station.journeys[journey.name]
                self._throughput.count(time.monotonic())
                journey.worker = ""
                journey.finish(str(event["reason"]))
                self._serve()
            case "failed":
                del station.journeys[journey.name]
                journey.worker = ""
                if event.get("retry_after_ms") is None:
                    journey.fail(_refusal(event))
                else:
                    self._pause(journey, str(event["message"]), event["retry_after_ms"] / 1e3)
                self._serve()

    # -------------------------------------------------------------------------------------- inside

    def _open(self) -> list[Station]:
        return [one for one in self.stations.values() if one.is_open]

    def _take_back(self, journey: Journey) -> None:
        """Take an answer from its worker, if one has it; what that still says of it is dropped."""
        station = self.stations.get(journey.worker)
        if station is not None and station.journeys.pop(journey.name, None) is not None:
            self._send(station, {"cancel": journey.name})
        journey.worker = ""
        journey.attempt += 1

    def _again(self, journey: Journey) -> None:
        journey.due = journey.num_context
        if reason := journey.ended_by():
            journey.finish(reason)
        elif self._is_given_up:
            journey.fail(Refused("ended before the answer was whole", status=503, code="ended"))
        elif not journey.is_over:
            self._line(journey.tenant).begun.append(journey)

    def _pause(self, journey: Journey, message: str, retry_after_s: float) -> None:
        """Try an answer again in a moment for which its tenant's quota has no room now.

        One that was not begun is refused when that has taken too long.
        """
        now = time.monotonic()
        journey.attempt += 1
        if not journey.num_pauses:
            journey.short_s = now
        if journey.ledger is None and now - journey.short_s >= self._longest_wait_s:
            self.meter.refused.inc()
            journey.fail(
                Refused(
                    message,
                    code="rate_limit_exceeded",
                    status=429,
                    retry_after_s=min(_LONGEST_RETRY_S, max(1.0, retry_after_s)),
                )
            )
            return
        pause_s = min(_LONGEST_PAUSE_S, _PAUSE_S * 2**journey.num_pauses)
        journey.num_pauses += 1
        loop = asyncio.get_running_loop()
        self._paused[journey] = loop.call_later(pause_s, self._resume, journey)

    def _resume(self, journey: Journey) -> None:
        """Queue an answer again, before those of its tenant that came later."""
        del self._paused[journey]
        line = self._line(journey.tenant)
        if journey.ledger is not None:
            line.begun.append(journey)
        else:
            line.fresh.appendleft(journey)
        self._serve()

    def _line(self, tenant: str) -> _Line:
        return self._lines.setdefault(tenant, _Line())

    def _serve(self) -> None:
        """Give what waits to whoever has a seat, the least loaded first.  O(workers) each."""
        while True:
            free = [one for one in self._open() if len(one.journeys) < one.seats]
            if not free or (journey := self._next()) is None:
                return
            self._turn += 1
            order = free[self._turn % len(free) :] + free[: self._turn % len(free)]
            station = min(order, key=lambda one: one.load)
            if not station.journeys:
                station.heard_s = time.monotonic()
                if not self.num_running:
                    self._throughput.begin(station.heard_s)
            journey.worker = station.recipient.name
            journey.workers.append(journey.worker)
            station.journeys[journey.name] = journey
            self._send(station, journey.next_line())

    def _send(self, station: Station, line: dict[str, Any]) -> None:
        try:
            station.recipient.send(line)
        except ProcessFailed:
            station.is_open = False  # it is gone; whoever watches it says so in a moment

    def _next(self) -> Journey | None:
        """Take the next answer: a tenant after the other, of each those that were begun first."""
        for tenant, line in self._lines.items():
            if line:
                journey = line.pop()
                del self._lines[tenant]
                if line:
                    self._lines[tenant] = line  # behind the others
                return journey
        return None

    def _wait_s(self) -> float:
        """When those that wait now will have been computed, by what was finished of late."""
        wait_s = self._throughput.wait_s(self.num_waiting, time.monotonic())
        return 1.0 if wait_s is None else min(_LONGEST_RETRY_S, max(1.0, wait_s))


def _refusal(event: Mapping[str, Any]) -> Refused:
    message = str(event.get("message", "the worker refused it"))
    if event.get("error") in ("InvalidRequest", "Unsupported"):
        return Refused(message, code="invalid_value")
    if event.get("error") == "QuotaExceeded":
        return Refused(message, code="quota_exceeded")
    return Refused(message, status=500, code="worker_failed")
