"""Connections to the page: bounded in number, and none that only sits there.

```
accept ─► more than there may be? the longest idle one goes; none idle: of the page, the one that
   │   has asked most often without a pause and waits again; none has: the new one goes
   └ more than 200 come a second: fewer are let in
   └ 10 s without a whole request, or between two ─► closed
   └ 10 s in which an answer is not read ──────────► closed, whatever is left of it
```
uvicorn counts requests, not connections, waits for a request's head as long as it takes, and for a
reader likewise.  Any user of this machine can connect here, so each of these needs an end.
"""

from __future__ import annotations

import asyncio

from uvicorn.protocols.http.h11_impl import H11Protocol

from prefixcache.service.newcomers import Newcomers

IDLE_S = 10.0
"""How long a request's head, and the time until the next one, may take."""
STALL_S = 10.0
"""How long an answer may wait for its reader."""
_PAUSE_S = 0.1
_MOST_A_SECOND = 200


class Bound:
    """The connections that there are.

    Args:
        limit: How many there may be.
        hurried_go: Whether one that asks without a pause, and waits for an answer again, makes
            room for a new one.
    """

    def __init__(self, limit: int, *, hurried_go: bool = False) -> None:
        self.limit = limit
        self._hurried_go = hurried_go
        self.newcomers = Newcomers(_MOST_A_SECOND)
        self._open: dict[HttpConnection, None] = {}
        """In the order in which they came."""

    def enter(self, connection: HttpConnection) -> bool:
        """Let a connection in, if need be in the place of another.  O(limit)."""
        if len(self._open) >= self.limit:
            goes = next((one for one in self._open if not one.is_busy), None)
            if goes is None and self._hurried_go:
                waiting = [one for one in self._open if one.is_waiting and one.num_in_a_row]
                goes = max(waiting, key=lambda one: one.num_in_a_row, default=None)
            if goes is None:
                return False
            self.leave(goes)
            goes.end()
        self._open[connection] = None
        return True

    def leave(self, connection: HttpConnection) -> None:
        """Forget a connection.  Idempotent."""
        self._open.pop(connection, None)


class HttpConnection(H11Protocol):
    """One connection.  Subclasses made by `within` know their bound."""

    bound: Bound
    stall_s: float
    num_in_a_row = 0
    """Questions that came with the answer to the one before, up to now."""
    _answered_at = float("-inf")
    _idle: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_waiting(self) -> bool:
        """Whether it has asked, and no part of the answer has been sent."""
        return self.is_busy and not self.cycle.response_started

    def end(self) -> None:
        """Close it at once, whatever is under way."""
        self._stop_timers()
        self.transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin, if there is room."""
        super().connection_made(transport)
        self.bound.newcomers.count()
        if not self.bound.enter(self):
            self.end()
            return
        self._idle = self.loop.call_later(IDLE_S, self.end)

    def connection_lost(self, exc: Exception | None) -> None:
        """Make room."""
        self.bound.leave(self)
        self._stop_timers()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read; a request that has begun to be answered is no longer waited for."""
        was_busy = self.is_busy
        super().data_received(data)
        if self.is_busy and not was_busy:
            paused = self.loop.time() - self._answered_at > _PAUSE_S
            self.num_in_a_row = 0 if paused else self.num_in_a_row + 1
        if self.is_busy and self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def on_response_complete(self) -> None:
        """Wait for the next request, and for the reader of this answer, so long and no longer."""
        self._answered_at = self.loop.time()
        super().on_response_complete()
        self.num_in_a_row += self.is_busy  # the next one was there already
        if self._idle is not None:
            self._idle.cancel()
        self._idle = None if self.is_busy else self.loop.call_later(IDLE_S, self.end)

    def pause_writing(self) -> None:
        """Wait for who does not read so long and no longer."""
        super().pause_writing()
        if self._stalled is None:
            self._stalled = self.loop.call_later(self.stall_s, self.end)

    def resume_writing(self) -> None:
        """It reads again."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()
            self._stalled = None

    def _stop_timers(self) -> None:
        for timer in (self._idle, self._stalled):
            if timer is not None:
                timer.cancel()
        self._idle = self._stalled = None


def within(bound: Bound, *, stall_s: float = STALL_S) -> type[HttpConnection]:
    """Give the class of the connections of one server; `stall_s` is how long readers may stall."""
    return type("BoundConnection", (HttpConnection,), {"bound": bound, "stall_s": stall_s})
