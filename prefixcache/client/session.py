"""The synchronous session: one worker's life, for a scheduler that is a plain loop.

```
caller thread      writer (gRPC)        the wire        reader thread         heartbeat thread
batch ─ bytes ──►  queue ─────────────► OpBatch
   waits           ◄──────────────────  OpResults ────► settles replies
                                        renew    ◄───────────────────────────  every ttl / 3
```
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from functools import partial
from queue import Empty, SimpleQueue
from time import monotonic
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import grpc

from prefixcache.client import unary
from prefixcache.client.calls import described_by
from prefixcache.client.connection import Connection
from prefixcache.client.lease import GONE, LeaseState
from prefixcache.client.ops import BatchOps, Reply, Step, Terms
from prefixcache.client.session_core import SessionCore
from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable
from prefixcache.types import Released, TokensLike
from prefixcache.v1 import prefixcache_pb2 as pb

P = ParamSpec("P")
T = TypeVar("T")

_LOOK_S = 0.5
"""Seconds of one look.  Python sees a Ctrl-C that comes just before a wait when the wait ends."""


class _Later(Future[T]):
    """A future whose owner does not keep the frames that its error has passed, as a `Reply`."""

    def result(self, timeout: float | None = None) -> T:
        """Give the answer, or raise a copy of the error."""
        if (error := self.exception(timeout)) is not None:
            raise copy(error)
        return super().result(timeout)


class Batch(BatchOps["Lease"]):
    """All ops of one step.  Leaving the `with` block sends them in one message and waits for them.

    `session.post(batch)` sends them and does not wait.  An op that waits (`acquire` with `wait_s`)
    may be answered later: `wait(reply)` waits for it.  If the block raises, nothing is sent.
    """

    _session: Session

    def acquire_later(
        self, tokens: TokensLike, *, wait_s: float = 60.0, **terms: Unpack[Terms]
    ) -> Future[Lease]:
        """Add an `acquire` whose lease comes from a future, when it is there.

        Cancelling the future gives up waiting.  Its callbacks run in the reader thread: keep them
        short, and make no calls in them that wait.
        """
        reply = self.acquire(tokens, wait_s=wait_s, **terms)
        future = _Later[Lease]()
        self._session.promise(reply, future, future.set_running_or_notify_cancel)
        return future

    def wait(self, reply: Reply[Lease]) -> Lease:
        """Block until an op that chose to wait is answered, and give its answer.

        Raises:
            InvalidRequest: it is no op of this batch.
        """
        self.check_reply(reply)
        try:
            self._session._await([reply])
        except BaseException:
            self._session.abandon([reply])
            raise
        return reply.result()

    def __enter__(self) -> Batch:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            self._session._run(self.step)


def _alone(add: Callable[Concatenate[Batch, P], Reply[T]]) -> Callable[Concatenate[Session, P], T]:
    """Make the method that sends one op of a session, and waits for it."""

    def run(self: Session, /, *args: P.args, **kwargs: P.kwargs) -> T:
        batch = self.batch()
        reply = add(batch, *args, **kwargs)
        self._run(batch.step, patiently=True)
        return reply.result()

    return described_by(add, run, skip=1)


def _of_lease(
    add: Callable[Concatenate[Batch, Lease, P], Reply[T]],
) -> Callable[Concatenate[Lease, P], T]:
    """Make the method that sends one op on a lease, and waits for it."""

    def run(self: Lease, /, *args: P.args, **kwargs: P.kwargs) -> T:
        batch = self._session.batch()
        reply = add(batch, self, *args, **kwargs)
        self._session._run(batch.step, patiently=True)
        return reply.result()

    return described_by(add, run, skip=2)


class Lease(LeaseState):
    """A lease on blocks.  Context manager; leaving it releases, whatever happened.

    Every call raises `LeaseExpired` once the lease is past its deadline, and `ServiceUnavailable`
    once the service is lost.
    """

    _session: Session

    commit = _of_lease(Batch.commit)
    extend = _of_lease(Batch.extend)
    truncate = _of_lease(Batch.truncate)
    fork = _of_lease(Batch.fork)

    def release(self) -> Released:
        """End the lease.  Idempotent.  What was committed stays cached until it is evicted."""
        try:
            with self._session.batch() as batch:
                reply = batch.release(self)
        except BaseException:  # Ctrl-C before it was sent; a second release does no harm
            self._session.give_back([self.id])
            raise
        return reply.result()

    def __enter__(self) -> Lease:
        return self

    def __exit__(self, *_: object) -> None:
        if not (self.released or self._session.is_inherited):
            with suppress(*GONE):
                self.release()


class Session(SessionCore["Lease"]):
    """One worker's life at the service.  Safe to use from several threads, in one process.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
    """

    lease_type = Lease

    def __init__(
        self,
        client: Connection,
        request: pb.AttachRequest,
        *,
        keep_alive: bool,
        speak: Callable[[Callable[[], Any]], Any],
    ) -> None:
        super().__init__(client)
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._bells: set[SimpleQueue[None]] = set()
        """One of each caller who waits.  Ctrl-C leaves no lock of a queue taken."""
        self._over = threading.Event()
        self._speak = speak
        """Does what speaks with gRPC, where no Ctrl-C comes."""
        self._call = None
        self._reader = threading.Thread(target=self._read, name="prefixcache-reader", daemon=True)
        open_ = partial(
            unary.session_of(client.channel),
            iter(self._outbox.get, None),
            wait_for_ready=True,
            metadata=client.metadata,
        )
        with self.attaching(request) as step:
            self._call = speak(open_)
            self._reader.start()
            self._run(step)
        if keep_alive:
            threading.Thread(target=self._beat, name="prefixcache-heartbeat", daemon=True).start()

    def batch(self) -> Batch:
        """Open a step: `with session.batch() as batch: ...` sends all its ops in one message."""
        return Batch(self)

    acquire = _alone(Batch.acquire)
    lookup = _alone(Batch.lookup)
    explain = _alone(Batch.explain)
    reset = _alone(Batch.reset)
    pin = _alone(Batch.pin)
    unpin = _alone(Batch.unpin)
    snapshot = _alone(Batch.snapshot)

    def acquire_later(
        self, tokens: TokensLike, *, wait_s: float = 60.0, **terms: Unpack[Terms]
    ) -> Future[Lease]:
        """Like `acquire`, without blocking while another worker computes the prefix.

        Cancelling the future gives up waiting.  Its callbacks run in the reader thread: keep them
        short, and make no calls in them that wait.
        """
        batch = self.batch()
        future = batch.acquire_later(tokens, wait_s=wait_s, **terms)
        self.send(batch.step)
        return future

    def renew(self) -> None:
        """Send a sign of life now.  The heartbeats do this by themselves."""
        step, reply = self.renewal()
        self._run(step)
        reply.result()

    def close(self) -> None:
        """End the session.  Idempotent.  All its leases end.

        States that this process writes to none of their blocks any more, also when the service was
        lost before: attaching again passes that on.
        """
        if self._closed or self.is_inherited:
            return
        with self.leaving() as farewell:
            self._await(farewell)

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ------------------------------------------------------------------------ sending, receiving

    def emit(self, message: bytes | None) -> None:
        """Put a message into the queue that gRPC's thread empties.  Never waits."""
        self._outbox.put(message)
        if message is None:
            self._over.set()
            self._ring()

    def _ring(self) -> None:
        """Have all who wait look again."""
        for bell in tuple(self._bells):
            self._bells.discard(bell)
            bell.put(None)

    def _run(self, step: Step, *, patiently: bool = False) -> None:
        """Send a step and wait for its answers; for those that choose to wait only `patiently`.

        Interrupted, it leaves nothing behind: what is granted nevertheless is given back.
        """
        if threading.current_thread() is self._reader:
            raise InvalidRequest(
                "a callback of acquire_later runs in the thread that reads the answers and cannot "
                "wait for one: make this call in another thread"
            )
        replies = step.replies
        try:
            self.send(step)
            self._await([reply for reply in replies if patiently or not reply.wait_s])
        except BaseException:  # Ctrl-C too, wherever it comes
            self.abandon(replies)
            raise

    def _await(self, replies: Sequence[Reply[Any]]) -> None:
        limit_s = self.patience(replies)
        due = monotonic() + limit_s
        bell: SimpleQueue[None] = SimpleQueue()
        self._bells.add(bell)  # before each look: what is answered from here on rings
        while not (answered := all(reply.done for reply in replies)) and monotonic() < due:
            with suppress(Empty):
                bell.get(timeout=min(_LOOK_S, limit_s))
            self._bells.add(bell)
        if not answered:
            self.give_up(limit_s)

    def _read(self) -> None:
        error: CacheError | str = "this client can no longer read its answers"
        try:
            for results in self._call:
                self.receive(results)
                self._ring()
            error = "the service ended it"
        except grpc.RpcError as rpc_error:
            error = unary.read_stream_error(rpc_error)
        finally:
            if isinstance(error, str) and self._lost is None:
                error = self.ended(error, answers=self._client.address.answers())
            elif isinstance(error, str):
                error = ServiceUnavailable(error)
            self.lose(error)
            self._ring()

    def hang_up(self) -> None:
        """End the stream, its reader and the heartbeats."""
        self._over.set()
        self.cut()
        if self._reader.is_alive() and threading.current_thread() is not self._reader:
            self._reader.join(self._client.timeout_s)

    def cut(self) -> None:
        """End the stream, whatever is on its way; one that is only being opened ends, too."""
        self._outbox.put(None)
        if self._call is not None:
            self._speak(self._call.cancel)

    def _beat(self) -> None:
        while not self._over.wait(self.attachment.ttl_s / 3):
            self.send(self.renewal()[0])
