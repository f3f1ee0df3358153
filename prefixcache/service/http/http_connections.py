"""Connections to the page: bounded in number, and none that only sits there.

```
accept ─► more than there may be? the longest idle one goes; none idle: of the page, the one that
   │   has asked most often without a pause and waits again; none has: the new one goes
   └ more than 200 come a second: fewer are let in
   └ 10 s without a whole request, or between two ─► closed
   └ 10 s in which an answer is not read ──────────► closed, whatever is left of it
   └ a body in hundreds of crumbs, or none of HTTP ► closed
   └ it has sent ahead, and hung up ───────────────► what is answered ends
```
uvicorn counts requests, not connections, waits for a request's head as long as it takes, and for a
reader likewise.  Any user of this machine can connect here, so each of these needs an end.
"""

from __future__ import annotations

import asyncio
import select
import socket
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from prefixcache.service.newcomers import Newcomers

IDLE_S = 10.0
"""How long a request's head, and the time until the next one, may take."""
STALL_S = 10.0
"""How long an answer may wait for its reader."""
KEPT = "prefixcache.kept"
"""Of a request's scope: set by who answers it where its connection is to make room for nobody."""
_PAUSE_S = 0.1
_MOST_A_SECOND = 200
_LOOK_S = 0.25
"""How often it is looked whether who has sent ahead has hung up."""
_LONGEST_HEAD = 1 << 14
"""Bytes of a request's head, or of what stands around a chunk: each line takes time to read."""
_FEW = 256
"""Chunks of a body from which on it is looked how long they are on average, which is ..."""
_CRUMB = 128
"""... so many bytes at least: each takes as long to read as thousands of bytes do."""


class Bound:
    """The connections that there are.

    Args:
        limit: How many there may be.
        hurried_go: Whether one that asks without a pause, and waits for an answer again, makes
            room for a new one.
        only_kept_stay: Whether the longest one does whose request is not `KEPT`.
    """

    def __init__(
        self, limit: int, *, hurried_go: bool = False, only_kept_stay: bool = False
    ) -> None:
        self.limit = limit
        self._hurried_go = hurried_go
        self._only_kept_stay = only_kept_stay
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
            if goes is None and self._only_kept_stay:
                goes = next((one for one in self._open if not one.is_kept), None)
            if goes is None:
                return False
            self.leave(goes)
            goes.end()
        self._open[connection] = None
        return True

    def leave(self, connection: HttpConnection) -> None:
        """Forget a connection.  Idempotent."""
        self._open.pop(connection, None)


class _Sent(h11.Connection):
    """What a client sends, as events.  A body in hundreds of crumbs is none."""

    _num_chunks = 0
    _num_bytes = 0

    def next_event(self) -> Any:
        """Give the next one.

        Raises:
            h11.RemoteProtocolError: what was sent is no HTTP, or crumbs of it.
        """
        event = super().next_event()
        if isinstance(event, h11.Request):
            self._num_chunks = self._num_bytes = 0
        elif isinstance(event, h11.Data):
            self._num_chunks += event.chunk_start
            self._num_bytes += len(event.data)
            if self._num_chunks > _FEW and self._num_bytes < _CRUMB * self._num_chunks:
                raise h11.RemoteProtocolError("the chunks of the body are too small")
        return event


class HttpConnection(H11Protocol):
    """One connection.  Subclasses made by `within` know their bound."""

    bound: Bound
    stall_s: float
    num_in_a_row = 0
    """Questions that came with the answer to the one before, up to now."""
    _answered_at = float("-inf")
    _idle: asyncio.TimerHandle | None = None
    _stalled: asyncio.TimerHandle | None = None
    _looks: asyncio.TimerHandle | None = None

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.conn = _Sent(h11.SERVER, _LONGEST_HEAD)

    @property
    def is_busy(self) -> bool:
        """Whether a request is being answered."""
        return self.cycle is not None and not self.cycle.response_complete

    @property
    def is_waiting(self) -> bool:
        """Whether it has asked, and no part of the answer has been sent."""
        return self.is_busy and not self.cycle.response_started

    @property
    def is_kept(self) -> bool:
        """Whether what is asked of it is worth more than any newcomer."""
        return self.is_busy and KEPT in self.scope

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
        for at in range(0, len(data), _LONGEST_HEAD):
            if not self.transport.is_closing():
                super().data_received(data[at : at + _LONGEST_HEAD])
        if self.is_busy and not was_busy:
            paused = self.loop.time() - self._answered_at > _PAUSE_S
            self.num_in_a_row = 0 if paused else self.num_in_a_row + 1
        if self.is_busy and self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP; who is answering a request that turned out to be none is told."""
        if self.is_busy:
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        super().send_400_response(msg)

    def handle_events(self) -> None:
        """Take what has come; who sends anything but HTTP behind a request is told nothing more."""
        try:
            super().handle_events()
        except h11.LocalProtocolError:  # it was being answered, or has been
            self.end()
            return
        if self.is_busy and self.flow.read_paused and self._looks is None:
            self._looks = self.loop.call_later(_LOOK_S, self._look)

    def _look(self) -> None:
        """See whether who has sent ahead has hung up: behind what is not read, nobody hears it."""
        self._looks = None
        if not (self.is_busy and self.flow.read_paused):
            return
        if _has_hung_up(self.transport.get_extra_info("socket")):
            self.end()
            return
        self._looks = self.loop.call_later(_LOOK_S, self._look)

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
        for timer in (self._idle, self._stalled, self._looks):
            if timer is not None:
                timer.cancel()
        self._idle = self._stalled = self._looks = None


def _has_hung_up(connection: socket.socket) -> bool:
    """Whether the other end will send no more, or is gone; whatever of it was not read yet."""
    poll = select.poll()
    poll.register(connection.fileno(), getattr(select, "POLLRDHUP", 0))
    return bool(poll.poll(0))


def within(bound: Bound, *, stall_s: float = STALL_S) -> type[HttpConnection]:
    """Give the class of the connections of one server; `stall_s` is how long readers may stall."""
    return type("BoundConnection", (HttpConnection,), {"bound": bound, "stall_s": stall_s})
