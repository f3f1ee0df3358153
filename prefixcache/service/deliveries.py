"""Requests that wait, and the one timer of the service.

The core decides; this only passes its outcomes on to who asked, and calls it when time is due.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeAlias

import structlog

from prefixcache.errors import CacheError
from prefixcache.service.backing import Backing
from prefixcache.service.observe.latency import LatencyHistograms, clock, empty_row
from prefixcache.types import Grant, TableUpdate, TicketId

Outcome: TypeAlias = "Grant | TableUpdate | CacheError"
Deliver: TypeAlias = "Callable[[Outcome], None]"

_SLACK_S = 0.001
"""The event loop rounds to milliseconds; waking up early would only mean waking up twice."""

MOST_ENDS = 64
"""Leases that end in one go; others are served before the next ones."""

log = structlog.get_logger(__name__)


class Deliveries:
    """Who waits for which ticket, and when the core next wants to be called."""

    def __init__(self, backing: Backing) -> None:
        self._backing = backing
        self._waiting: dict[TicketId, tuple[Deliver, int]] = {}
        self.waits = empty_row()
        """How long requests waited that got an outcome."""
        self.on_end: Callable[[], object] = lambda: None
        """Is called after some leases of workers that leave have ended."""
        self.on_settle: Callable[[], object] = lambda: None
        """Is called after every step that may have changed something.

        What either raises is logged: the step, which is somebody's, does not notice.
        """
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0

    def enter(self, ticket: TicketId, deliver: Deliver) -> None:
        """Have `deliver` called with the outcome of `ticket`, once.

        It runs inside the step that settled the ticket, which is somebody else's.  So it must not
        raise; if it does all the same, that is logged, and neither that step nor the outcomes
        behind this one notice.
        """
        self._waiting[ticket] = (deliver, clock())

    def leave(self, ticket: TicketId) -> None:
        """Forget a ticket: who asked does not want its outcome any more."""
        self._waiting.pop(ticket, None)

    def refuse(self, ticket: TicketId, error: CacheError) -> None:
        """Answer a ticket with an error, if it still waits.  The core is not told."""
        if waiting := self._waiting.pop(ticket, None):
            _deliver(ticket, waiting[0], error)

    def settle(self) -> None:
        """Deliver what has settled and set the timer.  After every op that may change something.

        O(1) when nothing has settled.
        """
        cache = self._backing.cache
        if cache is None:
            return
        _tell(self.on_settle)
        # Who wants an outcome no more gives its lease back, which may settle others.
        while self._waiting and (settled := cache.take_outcomes()):
            for ticket, outcome in settled:
                waiting = self._waiting.pop(ticket, None)
                if waiting is not None:
                    deliver, since = waiting
                    LatencyHistograms.took(self.waits, clock() - since)
                    _deliver(ticket, deliver, outcome)
        due = cache.next_deadline()
        if due is None or (self._timer is not None and self._due <= due):
            return  # a timer that fires too early finds nothing to do, and sets itself anew
        if self._timer is not None:
            self._timer.cancel()
        delay_s = max(0.0, due - time.monotonic()) + _SLACK_S
        self._due = due
        self._timer = asyncio.get_running_loop().call_later(delay_s, self._expire)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _expire(self) -> None:
        self._timer = None
        cache = self._backing.cache
        if cache is None:
            return
        leaving = cache.is_leaving()
        ended = cache.expire(now=time.monotonic(), most=MOST_ENDS)
        if leaving:
            _tell(self.on_end)
        elif ended.leases:
            log.warning(
                "leases expired without a sign of life",
                leases=len(ended.leases),
                freed=ended.num_freed,
                quarantined=ended.num_quarantined,
            )
        self.settle()


def _tell(hook: Callable[[], object]) -> None:
    try:
        hook()
    except Exception:
        log.exception("what hears of each step has raised")


def _deliver(ticket: TicketId, deliver: Deliver, outcome: Outcome) -> None:
    try:
        deliver(outcome)
    except Exception:
        log.exception("an outcome could not be delivered", ticket=ticket)
