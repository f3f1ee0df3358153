"""Events over ZeroMQ, as routers that know the field's schema read them.  Needs the extra `events`.

```
PUB      topic · sequence, 8 bytes big-endian · msgpack [ts, [event, …], rank]
ROUTER   asked: "" · sequence      answers: "" · sequence · msgpack …, last: "" · -1 · ""
event    ["BlockStored", hashes, parent, token_ids, block_size, lora_id, medium, lora_name]
         ["BlockRemoved", hashes, medium]      ["AllBlocksCleared"]
```
Hashes are the last 64 bits of ours, as integers, which every reader of this schema takes.  Token
ids are sent only with `--watch-tokens`, else the list is empty.  The rank, of an engine among
several of one name, is 0: some readers take no batch without one.  The schema has no namespaces,
and `AllBlocksCleared` makes a reader forget them all: it is sent before the whole state is told
anew, while the reset of one namespace is told as the removal of its blocks.  A subscriber that
comes later asks the second socket, which has the last batches.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections import deque
from collections.abc import Coroutine, Iterable
from pathlib import Path
from time import monotonic, time
from typing import Any

import msgspec
import structlog
import zmq
import zmq.asyncio

from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.private_files import check_path, clear_socket
from prefixcache.service.backing import Backing
from prefixcache.service.events.event_log import (
    MOST_BLOCKS,
    MOST_EVENTS,
    Batch,
    Event,
    EventLog,
    Stored,
)
from prefixcache.service.events.subscribers import Subscribers
from prefixcache.service.failures import Failures
from prefixcache.types import unpack

TOPIC = b"kv-events"
_FILE = "ipc://"
_PORT = re.compile(r"[0-9]{1,5}")
_LAST_PORT = 65_535
END = (-1).to_bytes(8, "big", signed=True)

_KEPT = 10_000
_KEPT_BYTES = 64 * 2**20
_WAITING_BYTES = 64 * 2**20
"""Of messages that may wait for one subscriber before it misses some, which the sequence shows."""
_LEAST_WAITING = 64

_MAX_ASKED = 4096
"""Bytes of one frame that is sent to us."""
_MAX_ASKING = 128
"""Requests for events that may wait, and connections that may wait to be accepted."""
_MAX_ANSWERING = 16
"""Requests for events that are answered at the same time."""
_MAX_ANSWERS = 16
"""Messages that may wait for one who has asked for them again."""
_PATIENCE_S = 5.0
"""How long one who has asked may take nothing."""
_RETRY_S = 0.01
_HANDSHAKE_MS = 5000
_TELL_EVERY_S = 10.0

log = structlog.get_logger(__name__)


class BlockStored(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    """A run of blocks can be found."""

    block_hashes: list[int]
    parent_block_hash: int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class BlockRemoved(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    """Blocks can be found no more."""

    block_hashes: list[int]
    medium: str | None


class AllBlocksCleared(msgspec.Struct, array_like=True, omit_defaults=True, tag=True):
    """Nothing can be found any more."""


class EventBatch(msgspec.Struct, array_like=True, omit_defaults=True):
    """What one message carries."""

    ts: float
    events: list[BlockStored | BlockRemoved | AllBlocksCleared]
    data_parallel_rank: int


class Publisher:
    """Publishes what an `EventLog` tells, for as long as the service lives.

    Args:
        backing: Whose cache is watched.
        failures: Where a task that dies is told.
        events: the log.
        endpoint: where to publish.
        replay: where to give published batches again; None: nowhere.
        max_connections: how many there may be to either address.

    Raises:
        InvalidRequest: an endpoint is one that others than this machine can reach.
    """

    def __init__(
        self,
        backing: Backing,
        failures: Failures,
        events: EventLog,
        endpoint: str,
        replay: str | None,
        max_connections: int = 32,
    ) -> None:
        for address in filter(None, (endpoint, replay)):
            _check(address)
        self._backing, self._failures = backing, failures
        self._events = events
        self._endpoints = (endpoint, replay)
        self._max_connections = max_connections
        self._context = zmq.asyncio.Context()
        self._kept: deque[tuple[int, bytes]] = deque()
        self._kept_bytes = 0
        self._sequence = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._sockets: list[zmq.asyncio.Socket] = []
        self._paths: list[Path] = []
        self._encoder = msgspec.msgpack.Encoder()

    def start(self) -> str:
        """Bind and begin; give where events are published, with the real port.

        Raises:
            ServiceUnavailable: an endpoint cannot be had.
            InvalidRequest: something that is no socket is there, or others may change the folder.
        """
        endpoint, replay = self._endpoints
        publishing = self._bind(zmq.PUB, endpoint)
        self._begin(self._publish(publishing), "the publisher of events")
        self._guard(publishing, endpoint)
        if replay is not None:
            replaying = self._bind(zmq.ROUTER, replay)
            self._begin(self._replay(replaying), "the replay of events")
            self._guard(replaying, replay)
        told = publishing.getsockopt(zmq.LAST_ENDPOINT)
        assert isinstance(told, bytes)
        return told.rstrip(b"\0").decode()

    def _guard(self, bound: zmq.asyncio.Socket, where: str) -> None:
        subscribers = Subscribers(bound, self._max_connections, where)
        self._begin(subscribers.watch(), "who counts the connections to events")

    def _begin(self, work: Coroutine[Any, Any, None], part: str) -> None:
        task = asyncio.create_task(work)
        self._failures.watch(task, part)
        self._tasks.append(task)

    async def close(self) -> None:
        """Stop.  Idempotent."""
        tasks, self._tasks = self._tasks, []
        for task in tasks:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await task
        for socket in self._sockets:
            socket.close(linger=200)
        for path in self._paths:
            path.unlink(missing_ok=True)
        self._context.destroy(linger=200)

    def _bind(self, kind: int, endpoint: str) -> zmq.asyncio.Socket:
        path = Path(endpoint[len(_FILE) :]).absolute() if endpoint.startswith(_FILE) else None
        if path is not None:
            check_path(path.parent, "events at")
            clear_socket(path, "events at")  # ZeroMQ would remove whatever is there
        socket = self._context.socket(kind)
        self._sockets.append(socket)
        socket.setsockopt(zmq.IPV6, "[" in endpoint)
        settings = self._backing.settings
        socket.sndhwm = most_waiting(settings.block_size, settings.watch_tokens)
        # What others send: nothing to the first socket but subscriptions, three short frames to the
        # second.  Who sends more is cut off before it is read.
        socket.setsockopt(zmq.MAXMSGSIZE, _MAX_ASKED)
        socket.setsockopt(zmq.RCVHWM, _MAX_ASKING)
        socket.setsockopt(zmq.HANDSHAKE_IVL, _HANDSHAKE_MS)
        socket.setsockopt(zmq.BACKLOG, _MAX_ASKING)
        if kind == zmq.ROUTER:
            socket.sndhwm = _MAX_ANSWERS
            socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # who is slow is waited for, not left out
        mask = os.umask(0o177)  # an ipc socket is this user's alone
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ServiceUnavailable(
                f"cannot publish events at {endpoint}: {error.strerror}"
            ) from None
        finally:
            os.umask(mask)
        if path is not None:
            self._paths.append(path)
        return socket

    async def _publish(self, socket: zmq.asyncio.Socket) -> None:
        with self._events.watching():
            async for batch in self._events.batches(0):
                if batch.is_snapshot and not batch.events:
                    events: list[Any] = [AllBlocksCleared()]
                else:
                    events = [written for event in batch.events for written in self._write(event)]
                if not events:
                    continue
                payload = self._encoder.encode(EventBatch(_time_of(batch), events, 0))
                self._keep(payload)
                number = self._sequence.to_bytes(8, "big")
                self._sequence += 1
                await socket.send_multipart((TOPIC, number, payload))

    async def _replay(self, socket: zmq.asyncio.Socket) -> None:
        told_at = 0.0
        answering: set[asyncio.Task[None]] = set()
        try:
            while True:
                asked = await socket.recv_multipart()
                if len(asked) == 3 and len(asked[2]) == 8 and len(answering) < _MAX_ANSWERING:
                    start = int.from_bytes(asked[2], "big")
                    task = asyncio.create_task(self._answer(socket, asked[0], start))
                    self._failures.watch(task, "the replay of events")
                    answering.add(task)
                    task.add_done_callback(answering.discard)
                elif monotonic() - told_at > _TELL_EVERY_S:
                    told_at = monotonic()
                    log.warning(
                        "a request for events that is none, or one too many",
                        parts=len(asked),
                        answering=len(answering),
                    )
        finally:
            for task in answering:
                task.cancel()

    async def _answer(self, socket: zmq.asyncio.Socket, asker: bytes, start: int) -> None:
        """Send what is kept from `start` on, as fast as the asker takes it."""
        while self._kept and start < self._sequence:
            first = self._kept[0][0]  # which may have gone on meanwhile
            start = max(start, first)
            number = start.to_bytes(8, "big")
            if not await _send(socket, (asker, b"", number, self._kept[start - first][1])):
                return
            start += 1
        await _send(socket, (asker, b"", END, b""))

    def _keep(self, payload: bytes) -> None:
        self._kept.append((self._sequence, payload))
        self._kept_bytes += len(payload)
        while len(self._kept) > _KEPT or self._kept_bytes > _KEPT_BYTES:
            self._kept_bytes -= len(self._kept.popleft()[1])

    def _write(self, event: Event) -> Iterable[BlockStored | BlockRemoved | AllBlocksCleared]:
        if isinstance(event, Stored):
            cache = self._backing.cache
            assert cache is not None
            shown = self._backing.settings.watch_tokens and not event.namespace.salt
            yield BlockStored(
                [number_of(one) for one in event.hashes],
                None if event.parent is None else number_of(event.parent),
                unpack(event.tokens).tolist() if shown else [],
                cache.block_size,
                None,
                event.medium,
                event.namespace.adapter or None,
            )
        elif event.hashes:
            yield BlockRemoved([number_of(one) for one in event.hashes], event.medium)


async def _send(socket: zmq.asyncio.Socket, parts: tuple[bytes, ...]) -> bool:
    """Send to an asker, or find that it has gone, or takes nothing any more."""
    patience = _PATIENCE_S
    while True:
        try:
            await socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            # Asked for by the clock: of such a socket the poll always says that it can be written.
            if patience <= 0:
                return False
            patience -= _RETRY_S
            await asyncio.sleep(_RETRY_S)
        except zmq.ZMQError:
            return False
        else:
            await asyncio.sleep(0)
            return True


def most_waiting(block_size: int, has_tokens: bool) -> int:
    """Give how many messages may wait for one subscriber: their bytes cannot be bounded.

    >>> most_waiting(16, False), most_waiting(16, True), most_waiting(1024, True)
    (1638, 182, 64)
    """
    block_bytes = 10 + 5 * block_size * has_tokens  # a number of 64 bits is 9, a token 5 at most
    message_bytes = MOST_EVENTS * MOST_BLOCKS * block_bytes
    return max(_LEAST_WAITING, _WAITING_BYTES // message_bytes)  # one has about 1 MiB at most


def number_of(block_hash: bytes) -> int:
    """Give the last 64 bits of a hash."""
    return int.from_bytes(block_hash[-8:], "big")


def _time_of(batch: Batch) -> float:
    return batch.events[-1].at if batch.events else time()


def _check(endpoint: str) -> None:
    local = ("tcp://127.0.0.1:", "tcp://localhost:", "tcp://[::1]:", _FILE)
    # What has no place in the file system has no mode: every user of the machine could read it.
    nowhere = endpoint in (_FILE, f"{_FILE}*") or endpoint.startswith(f"{_FILE}@")
    if nowhere or not endpoint.startswith(local):
        raise InvalidRequest(
            f"refused to publish at {endpoint}: whoever reaches it can read what is stored. "
            "Publish at tcp://127.0.0.1:PORT or ipc://PATH."
        )
    port = endpoint.rpartition(":")[2]
    # ZeroMQ would take another port for one that there is not.
    if not endpoint.startswith(_FILE) and not (_PORT.fullmatch(port) and int(port) <= _LAST_PORT):
        raise InvalidRequest(f"cannot publish at {endpoint}: {port[:40]!a} is no port")
