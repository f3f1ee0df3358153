"""Subscribers: the connections to one address at which events are published; so many, and no more.

ZeroMQ accepts whoever comes.  Each connection is a descriptor of the service, and those that it has
not are lacking to workers.  What it accepts is told by its monitor; one over the limit is shut
down, which ZeroMQ takes for a peer that has gone.  A thread hears of it: the event loop, which has
to serve others, would be behind whoever comes again and again.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import structlog
import zmq
import zmq.asyncio

_EVENT: Final = struct.Struct("=HI")
"""What a monitor tells: what happened, and to which descriptor."""
_LOOK_MS: Final = 200
"""How often the thread looks whether it is over."""

log = structlog.get_logger(__name__)


class Subscribers:
    """The connections to one bound socket of ZeroMQ.

    Args:
        bound: The socket.
        limit: How many there may be.
        where: Its address, for people.
    """

    def __init__(self, bound: zmq.asyncio.Socket, limit: int, where: str) -> None:
        self.limit = limit
        self._where = where
        endpoint = bound.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(endpoint, bytes)
        self._bound = endpoint.rstrip(b"\0").decode()
        self._open: dict[int, int] = {}
        """Inodes of the connections, by descriptor: a descriptor alone may be another's by now."""
        self._is_told = False
        empty = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._hands: tuple[int, ...] = (empty, os.dup(empty))
        """One descriptor of nothing, and one that takes hold of a connection: also where there is
        not one more to be had."""
        self._is_over = False
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context.shadow(bound.context.underlying)
        self._monitor = context.socket(zmq.PAIR)
        self._monitor.setsockopt(zmq.RCVTIMEO, _LOOK_MS)
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        place = f"inproc://subscribers-{id(self)}"
        bound.monitor(place, zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)
        self._monitor.connect(place)

    async def watch(self) -> None:
        """End the newest ones over the limit, for ever."""
        try:
            await asyncio.to_thread(self._watch)
        finally:
            self._is_over = True

    def _watch(self) -> None:
        try:
            while not self._is_over:
                try:
                    frame, _ = self._monitor.recv_multipart()
                except zmq.Again:
                    continue
                except zmq.ContextTerminated:
                    return
                event, number = _EVENT.unpack(frame)
                if event == zmq.EVENT_ACCEPTED:
                    self._accepted(number)
                elif event == zmq.EVENT_DISCONNECTED:
                    self._open.pop(number, None)
        finally:
            self._monitor.close(linger=0)
            self.close()

    def close(self) -> None:
        """Let go of what it holds.  Idempotent."""
        hands, self._hands = self._hands, ()
        for one in hands:
            os.close(one)

    def _accepted(self, number: int) -> None:
        """Count a connection; shut it down if there are enough."""
        empty, hand = self._hands
        try:
            os.dup2(number, hand, inheritable=False)  # so that it is no other meanwhile
            with _lent(socket.socket(fileno=hand)) as connection:
                # Whatever else has the descriptor by now is at another address, and left alone.
                if _endpoint(connection.getsockname()) == self._bound:
                    self._count(number, connection)
        except OSError:
            return  # it has gone by itself
        finally:
            os.dup2(empty, hand, inheritable=False)

    def _count(self, number: int, connection: socket.socket) -> None:
        self._open[number] = os.fstat(number).st_ino
        if len(self._open) > self.limit:
            self._forget_closed()
        if len(self._open) <= self.limit:
            return
        if not self._is_told:
            self._is_told = True
            log.warning(
                "subscribers of events are turned away: there are too many",
                address=self._where,
                limit=self.limit,
            )
        connection.shutdown(socket.SHUT_RDWR)

    def _forget_closed(self) -> None:
        """Forget those whose end was not told.  O(limit)."""
        for number, inode in tuple(self._open.items()):
            try:
                is_open = os.fstat(number).st_ino == inode
            except OSError:
                is_open = False
            if not is_open:
                del self._open[number]


@contextmanager
def _lent(one: socket.socket) -> Iterator[socket.socket]:
    """Use a socket, and leave its descriptor open."""
    try:
        yield one
    finally:
        one.detach()


def _endpoint(address: Any) -> str:
    """Write a socket's name as ZeroMQ does.

    >>> _endpoint(("127.0.0.1", 5557)), _endpoint(("::1", 5557, 0, 0)), _endpoint("/run/events")
    ('tcp://127.0.0.1:5557', 'tcp://[::1]:5557', 'ipc:///run/events')
    """
    if isinstance(address, tuple):
        host, port = address[:2]
        return f"tcp://[{host}]:{port}" if ":" in host else f"tcp://{host}:{port}"
    return f"ipc://{address}"
