"""Carriage: the service's end of the carrier.  Asks him, has him fetch and store.

```
core ─ questions ─► carrier ─► core: fetch these, store those
core ─ hauls up ──► slots ─► carrier fetches ─► porter compares, in the pool ─► core
core ─ hauls down ► slots ─► porter copies ──► carrier stores ────────────────► core
```
What is fetched and what is stored have slots of their own, half of all each: neither waits for the
other.  What a call that hangs has in its slots stays there until it has returned, or the carrier
has ended; the pool was never its target.

After a failure the store is neither asked nor given anything for a pause that doubles each time,
from 1 s to 30 s; then one request asks again.  A carrier that has ended is replaced after such a
pause, too (`supervisor.py`); one that has not answered for ten seconds is killed.
"""

from __future__ import annotations

import asyncio
import socket
import time
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import structlog

from prefixcache.core.hauls import Haul
from prefixcache.core.remote import NAME_BYTES, Question
from prefixcache.plain_json import json_text
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.failures import Failures
from prefixcache.service.supervisor import FIRST_PAUSE_S, LONGEST_PAUSE_S, SILENT_S, Supervisor
from prefixcache.service.tiers.errands import (
    HEAD_BYTES,
    READY,
    Answer,
    Errand,
    Kind,
    length_of,
    pack_errand,
    read_answer,
)
from prefixcache.service.tiers.remote.store import Got
from prefixcache.types import HaulId

PART: Final = "the carrier"
STORE: Final = "the remote store"
"""How they are called among the parts that have ended."""

_GOOD, _WRONG = bytes([Got.GOOD]), bytes([Got.WRONG])
_IN_HAND: Final = 2
"""Errands of one kind that a carrier is given at the same time; of questions, as many as come."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Load:
    """A haul on its way through slots."""

    haul: Haul
    slots: list[int]
    seconds: float = 0.0
    """What it has taken so far."""
    num_good: int = 0
    is_dead: bool = False
    """Whether nobody wants it any more: it only keeps its slots until its call returns."""


class Carriage:
    """One carrier after the other, and what he is to do.

    Args:
        backing: The cache, and where the store is.
        deliveries: Told when somebody who waits may have an outcome.
        failures: Told of a carrier that has ended, and of a store that fails.
        hand: Takes hauls for the porter.
        silent_s: How long he may have something in hand without an answer.
        first_pause_s: Between a failure and the next try.
    """

    def __init__(
        self,
        backing: Backing,
        deliveries: Deliveries,
        failures: Failures,
        hand: Callable[[Haul], None],
        *,
        silent_s: float = SILENT_S,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._backing = backing
        self._deliveries = deliveries
        self._failures = failures
        self._hand = hand
        self._supervisor = Supervisor(
            PART,
            "prefixcache.service.tiers.carrier",
            failures,
            in_hand_since=self._in_hand_since,
            ended=self._ended,
            again=self.pump,
            silent_s=silent_s,
            first_pause_s=first_pause_s,
        )
        self._first_pause_s = self._store_pause_s = first_pause_s
        self._held_until = 0.0
        self._waiting: dict[bool, deque[Haul]] = {True: deque(), False: deque()}
        """Hauls up, and down, for which no slot is free."""
        self._free: dict[bool, list[int]] | None = None
        """Slots, once there are any: for what comes up, and for what goes down."""
        self._loads: dict[HaulId, _Load] = {}
        self._queues: dict[Kind, deque[Errand]] = {kind: deque() for kind in Kind}
        self._in_hand: dict[Kind, dict[int, float]] = {kind: {} for kind in Kind}
        """When each errand that he has was given to him."""
        self._meant: dict[int, Question | _Load | None] = {}
        """What each errand is for, that waits or that he has; None: it removes something."""
        self._next = READY
        self._lines: dict[Kind, asyncio.StreamWriter] = {}
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def pid(self) -> int:
        """The process of the present carrier; 0 if there is none."""
        return self._supervisor.pid

    # ------------------------------------------------------------------ what the core wants

    def pump(self) -> None:
        """Take new questions of the core, and give the carrier what he has a hand free for.

        After every step.  O(1) where there is nothing to ask or carry.
        """
        cache = self._backing.cache
        if cache is None or self._backing.stage is None:
            return
        if not self.pid:
            self._start()
            return
        if not self._supervisor.is_ready:
            return
        for question in cache.questions(now=time.monotonic()):
            self._order(Kind.ASK, question, question.tokens)
        self._give()

    def _order(self, kind: Kind, what: Question | _Load | None, text: bytes) -> None:
        """Put an errand into the queue of its kind."""
        self._next += 1
        self._meant[self._next] = what
        first, slots = 0, array("i")
        if isinstance(what, Question):
            first = what.first
            text = self._backing.base_name(what.namespace, what.resets) + text
        elif what is not None:
            slots = array("i", what.slots)
        self._queues[kind].append(Errand(self._next, first, slots, text))

    def take(self, haul: Haul) -> None:
        """Carry out a haul that has names."""
        self._waiting[haul.is_up].append(haul)
        self._begin(haul.is_up)

    def _begin(self, is_up: bool) -> None:
        """Begin with hauls, as far as slots are free."""
        if self._free is None:
            return
        waiting, free = self._waiting[is_up], self._free[is_up]
        while waiting and len(waiting[0].blocks) <= len(free):
            haul = waiting.popleft()
            cut = len(free) - len(haul.blocks)
            slots = free[cut:]
            del free[cut:]
            load = self._loads[haul.id] = _Load(haul, slots)
            if is_up:
                self._order(Kind.GET, load, haul.names)
            else:
                self._hand(haul._replace(slots=array("i", slots)))

    def copied(self, haul: HaulId, num_good: int, seconds: float) -> bool:
        """Take note of what the porter says of a haul; whether it was one of these."""
        load = self._loads.get(haul)
        if load is None:
            return False
        load.seconds += seconds
        if load.haul.is_up:
            if num_good < load.num_good:
                self._remove_wrong(load, num_good)
            self._end(load, num_good)
            return True
        load.num_good = num_good
        if self._supervisor.is_ready:
            self._order(Kind.PUT, load, load.haul.names)
        else:
            self._end(load, 0)
        return True

    def _remove_wrong(self, load: _Load, at: int) -> None:
        """Have an object removed that is not what it should be: others would fetch it as well."""
        cache = self._backing.cache
        log.warning("an object of the remote store is not what it should be, and is removed")
        if cache is not None:
            cache.note_wrong(1)
        name = load.haul.names[at * NAME_BYTES : (at + 1) * NAME_BYTES]
        if self._supervisor.is_ready:
            self._order(Kind.PUT, None, name)

    def porter_ended(self) -> None:
        """Forget all hauls: whoever copies has ended, and the core has been told."""
        for waiting in self._waiting.values():
            waiting.clear()
        for kind in (Kind.GET, Kind.PUT):
            for errand in self._queues[kind]:
                self._meant.pop(errand.number, None)
            self._queues[kind].clear()
        with_carrier = [one for one in self._meant.values() if isinstance(one, _Load)]
        for load in list(self._loads.values()):
            if load in with_carrier:
                load.is_dead = True
            else:
                self._free_slots(load)

    def _free_slots(self, load: _Load) -> None:
        self._loads.pop(load.haul.id, None)
        if self._free is not None:
            self._free[load.haul.is_up].extend(load.slots)

    def _end(self, load: _Load, num_good: int) -> None:
        """End a haul, and begin the next."""
        self._free_slots(load)
        if self._backing.cache is not None and not load.is_dead:
            now = time.monotonic()
            self._backing.cache.hauled(load.haul.id, num_good, load.seconds, now=now)
        self._begin(load.haul.is_up)

    # ------------------------------------------------------------------ what the carrier says

    def _give(self) -> None:
        for kind, queue in self._queues.items():
            line, in_hand = self._lines.get(kind), self._in_hand[kind]
            while line is not None and queue and (kind is Kind.ASK or len(in_hand) < _IN_HAND):
                errand = queue.popleft()
                in_hand[errand.number] = time.monotonic()
                line.write(pack_errand(errand))

    async def _listen(self, kind: Kind, stream: asyncio.StreamReader) -> None:
        """Take the answers to errands of one kind."""
        while True:
            try:
                size = length_of(await stream.readexactly(HEAD_BYTES))
                answer = read_answer(await stream.readexactly(size))
            except (asyncio.IncompleteReadError, ConnectionError):
                return  # he has ended: that is told apart
            except ValueError:
                self._supervisor.kill("sends what is no answer")
                return
            try:
                self._hear(kind, answer)
            except Exception:
                log.exception("an answer of the carrier could not be taken")
            self._deliveries.settle()

    def _hear(self, kind: Kind, answer: Answer) -> None:
        cache, now = self._backing.cache, time.monotonic()
        self._in_hand[kind].pop(answer.number, None)
        if cache is None:
            return
        if answer.number == READY:
            self._supervisor.ready()
            cache.set_remote(is_there=True, now=now)
            return
        if answer.error:
            self._fail(answer.error, now)
        elif now >= self._held_until:
            self._store_pause_s = self._first_pause_s
            self._failures.forget(STORE)
        meant = self._meant.pop(answer.number, None)
        if isinstance(meant, Question):
            each = b"" if answer.error else answer.each  # nobody knows: nothing is done
            cache.answered(meant.id, each, answer.names, now=now)
        elif meant is not None:
            self._arrived(meant, answer)

    def _arrived(self, load: _Load, answer: Answer) -> None:
        """Go on with a haul that has been fetched, or stored."""
        load.seconds += answer.seconds
        num_good = len(answer.each) - len(answer.each.lstrip(_GOOD))
        if answer.each[num_good : num_good + 1] == _WRONG:
            self._remove_wrong(load, num_good)
        if load.is_dead or not load.haul.is_up or not num_good:
            self._end(load, num_good)
            return
        load.num_good = num_good
        haul = load.haul
        if num_good < len(load.slots):  # what came before the gap is of use
            haul = _first(haul, num_good)
        self._hand(haul._replace(slots=array("i", load.slots[:num_good])))

    def _fail(self, cause: str, now: float) -> None:
        """Ask and give the store nothing for a while."""
        if now < self._held_until:
            return  # it was on its way before
        pause_s = self._store_pause_s
        self._store_pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        self._held_until = now + pause_s
        told = f"{cause}; it is asked again after {pause_s:g} s"
        self._failures.tell(STORE, OSError(told))
        if self._backing.cache is not None:
            self._backing.cache.hold_remote(until=now + pause_s)

    # ------------------------------------------------------------------ the process

    def _start(self) -> None:
        """Start a carrier, if it is time.  He says when he is ready."""
        lines = self._supervisor.start([socket.SOCK_STREAM for _ in Kind])
        if not lines:
            return
        if self._free is None:
            slots = list(range(self._backing.num_stage))
            half = len(slots) // 2
            self._free = {True: slots[:half], False: slots[half:]}
        self._tasks = [asyncio.get_running_loop().create_task(self._connect(lines))]

    async def _connect(self, ours: list[socket.socket]) -> None:
        """Say to a new carrier where everything is, and listen to him."""
        order = self._backing.carrier_order()
        for kind, line in zip(Kind, ours, strict=True):
            line.setblocking(False)
            stream, writer = await asyncio.open_connection(sock=line)
            self._lines[kind] = writer
            task = asyncio.get_running_loop().create_task(self._listen(kind, stream))
            self._failures.watch(task, PART)
            self._tasks.append(task)
        self._lines[Kind.ASK].write(json_text(order).encode() + b"\n")

    def _in_hand_since(self) -> float | None:
        given = [at for in_hand in self._in_hand.values() for at in in_hand.values()]
        return min(given, default=None)

    def _ended(self) -> None:
        """Take back what the carrier had in hand: he has ended, and touches no slot any more."""
        cache = self._backing.cache
        lost = [one for one in self._meant.values() if isinstance(one, _Load)]
        self._let_go()
        if cache is not None:
            cache.set_remote(is_there=False, now=time.monotonic())
        for waiting in self._waiting.values():
            lost += [_Load(haul, []) for haul in waiting]
            waiting.clear()
        for load in lost:
            self._end(load, 0)
        self._deliveries.settle()

    def _let_go(self) -> None:
        """Forget the lines, and what was to be done on them."""
        for task in self._tasks:
            task.cancel()
        self._tasks = []
        for line in self._lines.values():
            line.transport.abort()
        self._lines = {}
        for kind in Kind:
            self._queues[kind].clear()
            self._in_hand[kind].clear()
        self._meant.clear()

    def close(self) -> None:
        """End the carrier.  Idempotent."""
        self._let_go()
        self._supervisor.close()


def _first(haul: Haul, count: int) -> Haul:
    """Give the first blocks of a haul."""
    width = len(haul.tokens) // len(haul.blocks)
    return haul._replace(
        blocks=haul.blocks[:count],
        tokens=haul.tokens[: count * width],
        names=haul.names[: count * NAME_BYTES],
    )
