"""The asynchronous session: one worker's life, for one event loop.

```
caller's task        writer task            the wire        reader task          heartbeat task
batch ─ bytes ──►    outbox ──────────────► OpBatch
  awaits a future    ◄──────────────────────OpResults ────► settles replies
                                            renew    ◄──────────────────────────  every ttl / 3
```
The writer alone awaits the stream: gRPC ends a stream whose write is cancelled.  A caller puts its
message into the outbox and awaits a future, so that cancelling it ends its own call and no other.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, Concatenate, ParamSpec, TypeVar, Unpack

import grpc
import grpc.aio

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


class AsyncBatch(BatchOps["AsyncLease"]):
    """All ops of one step.  Leaving the `async with` block sends them and waits for the answers.

    `session.post(batch)` sends them and does not wait.  An op that waits (`acquire` with `wait_s`)
    may be answered later: `await batch.wait(reply)`.  If the block raises, nothing is sent.
    """

    _session: AsyncSession

    def acquire_later(
        self, tokens: TokensLike, *, wait_s: float = 60.0, **terms: Unpack[Terms]
    ) -> asyncio.Future[AsyncLease]:
        """Add an `acquire` whose lease comes from a future, when it is there.

        Cancelling the future gives up waiting.
        """
        session = self._session
        session.guard()
        reply = self.acquire(tokens, wait_s=wait_s, **terms)
        future: asyncio.Future[AsyncLease] = asyncio.get_running_loop().create_future()
        session.promise(reply, future, lambda: not future.cancelled())
        return future

    async def wait(self, reply: Reply[AsyncLease]) -> AsyncLease:
        """Wait until an op that chose to wait is answered, and give its answer.

        Raises:
            InvalidRequest: it is no op of this batch, or this is another event loop.
        """
        self._session.guard()
        self.check_reply(reply)
        try:
            await self._session._await([reply])
        except BaseException:
            self._session.abandon([reply])
            raise
        return reply.result()

    async def __aenter__(self) -> AsyncBatch:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            await self._session._run(self.step)


def _alone(
    add: Callable[Concatenate[AsyncBatch, P], Reply[T]],
) -> Callable[Concatenate[AsyncSession, P], Coroutine[Any, Any, T]]:
    """Make the method that sends one op of a session, and waits for it."""

    async def run(self: AsyncSession, /, *args: P.args, **kwargs: P.kwargs) -> T:
        batch = self.batch()
        reply = add(batch, *args, **kwargs)
        await self._run(batch.step, patiently=True)
        return reply.result()

    return described_by(add, run, skip=1)


def _of_lease(
    add: Callable[Concatenate[AsyncBatch, AsyncLease, P], Reply[T]],
) -> Callable[Concatenate[AsyncLease, P], Coroutine[Any, Any, T]]:
    """Make the method that sends one op on a lease, and waits for it."""

    async def run(self: AsyncLease, /, *args: P.args, **kwargs: P.kwargs) -> T:
        batch = self._session.batch()
        reply = add(batch, self, *args, **kwargs)
        await self._session._run(batch.step, patiently=True)
        return reply.result()

    return described_by(add, run, skip=2)


class AsyncLease(LeaseState):
    """A lease on blocks; see `Lease`.  Async context manager; leaving it releases."""

    _session: AsyncSession

    commit = _of_lease(AsyncBatch.commit)
    extend = _of_lease(AsyncBatch.extend)
    truncate = _of_lease(AsyncBatch.truncate)
    fork = _of_lease(AsyncBatch.fork)

    def release(self) -> Coroutine[Any, Any, Released]:
        """End the lease.  Idempotent.  What was committed stays cached until it is evicted.

        Sent by this call itself: a task that is cancelled before it runs has released as well.
        """
        self._session.guard()
        batch = self._session.batch()
        reply = batch.release(self)
        self._session.send(batch.step)
        return self._released_by(batch.step, reply)

    async def _released_by(self, step: Step, reply: Reply[Released]) -> Released:
        await self._session._outcome(step)
        return reply.result()

    async def __aenter__(self) -> AsyncLease:
        return self

    async def __aexit__(self, *_: object) -> None:
        if not (self.released or self._session.is_inherited):
            with suppress(*GONE):
                await self.release()


class AsyncSession(SessionCore["AsyncLease"]):
    """One worker's life at the service; see `Session`.  For one event loop of one process.

    Cancelling a call ends that call alone: what it is granted nevertheless is given back.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
    """

    lease_type = AsyncLease

    def __init__(self, client: Connection) -> None:
        super().__init__(client)
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        self._call = unary.session_of(client.channel)(wait_for_ready=True, metadata=client.metadata)

    async def _open(self, request: pb.AttachRequest, *, keep_alive: bool) -> None:
        self._spawn(self._read())
        self._spawn(self._write())
        with self.attaching(request) as step:
            await self._run(step)
        if keep_alive:
            self._spawn(self._beat())

    def guard(self) -> None:
        """Refuse a call from another event loop, or from another process.

        Raises:
            InvalidRequest: it is one.
        """
        self.refuse_inherited()
        refuse_other_loop(self._loop, "session")

    def batch(self) -> AsyncBatch:
        """Open a step: `async with session.batch() as batch: ...` sends its ops in one message."""
        return AsyncBatch(self)

    acquire = _alone(AsyncBatch.acquire)
    lookup = _alone(AsyncBatch.lookup)
    explain = _alone(AsyncBatch.explain)
    reset = _alone(AsyncBatch.reset)
    pin = _alone(AsyncBatch.pin)
    unpin = _alone(AsyncBatch.unpin)
    snapshot = _alone(AsyncBatch.snapshot)

    def acquire_later(
        self, tokens: TokensLike, *, wait_s: float = 60.0, **terms: Unpack[Terms]
    ) -> asyncio.Task[AsyncLease]:
        """Start an `acquire` and go on.  Cancelling the task gives up waiting."""
        return asyncio.get_running_loop().create_task(self.acquire(tokens, wait_s=wait_s, **terms))

    def post(
        self, batch: BatchOps[AsyncLease], on_error: Callable[[CacheError], object] | None = None
    ) -> None:
        """Send a batch and go on; see `Session.post`.  Also from no coroutine, on its own loop."""
        self.guard()
        super().post(batch, on_error)

    async def renew(self) -> None:
        """Send a sign of life now.  The heartbeats do this by themselves."""
        step, reply = self.renewal()
        await self._run(step)
        reply.result()

    async def close(self) -> None:
        """End the session; see `Session.close`.  Idempotent."""
        if self.is_inherited:
            return
        if self._loop.is_closed():
            self.forget(None)  # its tasks, and with them the stream, ended with the loop
            return
        refuse_other_loop(self._loop, "session")
        if self._closing is None:
            self._closing = self._loop.create_task(self._end())
        # Whoever is cancelled here only stops waiting: the session ends all the same.
        await asyncio.shield(self._closing)

    async def _end(self) -> None:
        with self.leaving() as farewell:
            await self._await(farewell)
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ------------------------------------------------------------------------ sending, receiving

    def emit(self, message: bytes | None) -> None:
        """Put a message into the outbox, which the writer empties.  Never waits."""
        if message is not None:
            self._outbox.append(message)
        if not self._loop.is_closed():
            self._wake.set()

    async def _run(self, step: Step, *, patiently: bool = False) -> None:
        """Send a step and wait for its answers; for those that choose to wait only `patiently`.

        Sent before the first await.  Cancelled, it leaves nothing behind: what is granted
        nevertheless is given back.
        """
        self.guard()
        self.send(step)
        await self._outcome(step, patiently=patiently)

    async def _outcome(self, step: Step, *, patiently: bool = False) -> None:
        try:
            await self._await([r for r in step.replies if patiently or not r.wait_s])
        except BaseException:
            self.abandon(step.replies)
            raise

    async def _await(self, replies: Sequence[Reply[Any]]) -> None:
        waiting = [reply for reply in replies if not reply.done]
        if not waiting:
            return
        limit_s = self.patience(waiting)
        answered: asyncio.Future[bool] = self._loop.create_future()
        missing = len(waiting)

        def arrived(_: Reply[Any]) -> None:
            nonlocal missing
            missing -= 1
            if not missing:
                settle(True)

        def settle(outcome: bool) -> None:
            if not answered.done():
                answered.set_result(outcome)

        for reply in waiting:
            reply.listener = arrived
        # No `wait_for`: it may give an answer to who was cancelled at that moment.
        timer = self._loop.call_later(limit_s, settle, False)
        try:
            in_time = await answered
        finally:
            timer.cancel()
        if not in_time:
            self.give_up(limit_s)

    async def _write(self) -> None:
        try:
            while self._outbox or self._lost is None:
                while self._outbox:
                    await self._call.write(self._outbox.popleft())
                self._wake.clear()
                if self._lost is None:
                    await self._wake.wait()
        except (grpc.aio.AioRpcError, grpc.aio.UsageError, asyncio.InvalidStateError):
            return  # the stream has ended; the reader learns why

    async def _read(self) -> None:
        try:
            async for results in self._call:
                self.receive(results)
            cause: CacheError | str = "the service ended it"
        except grpc.aio.AioRpcError as error:
            cause = unary.read_stream_error(error)
        except asyncio.CancelledError:
            self.lose(ServiceUnavailable("the session is closed"))
            raise
        except BaseException:
            self.lose(ServiceUnavailable("this session can no longer read its answers"))
            raise
        if isinstance(cause, str) and self._lost is None:
            try:
                answers = await asyncio.to_thread(self._client.address.answers)
            except BaseException:
                self.lose(ServiceUnavailable(f"the session ended: {cause}"))
                raise
            cause = self.ended(cause, answers=answers)
        if isinstance(cause, CacheError):
            self.lose(cause)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def hang_up(self) -> None:
        """End the stream, its reader, its writer and the heartbeats."""
        self.cut()
        for task in self._tasks:
            task.cancel()

    async def _beat(self) -> None:
        while self._lost is None:
            await asyncio.sleep(self.attachment.ttl_s / 3)
            self.send(self.renewal()[0])


def refuse_other_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Refuse a call from an event loop that is not the one of a client or session.

    Raises:
        InvalidRequest: it comes from another one, or from a thread that has none.
    """
    try:
        running = asyncio.get_running_loop()
    except RuntimeError:
        running = None
    if running is not loop:
        raise InvalidRequest(
            f"this {what} belongs to another event loop: call connect_async in this one"
        )
