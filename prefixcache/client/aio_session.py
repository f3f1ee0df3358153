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
import threading
from collections import deque
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any

import grpc
import grpc.aio

from prefixcache.client import unary
from prefixcache.client.batch import BatchOps
from prefixcache.client.connection import Connection
from prefixcache.client.lease import LeaseState
from prefixcache.client.ops import Reply, Step
from prefixcache.client.session_core import SessionCore
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LeaseExpired,
    NotFound,
    ServiceUnavailable,
)
from prefixcache.types import (
    Committed,
    Explanation,
    Grant,
    Lookup,
    Pinned,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TokensLike,
    Unpinned,
)
from prefixcache.v1 import prefixcache_pb2 as pb


class AsyncSession(SessionCore["AsyncLease"]):
    """One worker's life at the service; see `Session`.  For one event loop of one process.

    Cancelling a call ends that call alone: what it is granted nevertheless is given back.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
    """

    def __init__(self, client: Connection) -> None:
        super().__init__(client)
        self._loop = asyncio.get_running_loop()
        self._outbox: deque[bytes] = deque()
        self._wake = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closing: asyncio.Task[None] | None = None
        stream: Any = client.channel.stream_stream(
            unary.SESSION_PATH, None, pb.OpResults.FromString
        )
        self._call = stream(wait_for_ready=True, metadata=client.metadata)

    async def _open(self, request: pb.AttachRequest, *, keep_alive: bool) -> None:
        self._spawn(self._read())
        self._spawn(self._write())
        step = Step(self.ids)
        reply = step.attach(request)
        try:
            await self._run(step)
            self.attached(reply.result())
        except BaseException:
            self.lose(ServiceUnavailable("the session was never attached"))
            self._hang_up()
            raise
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

    async def acquire(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
    ) -> AsyncLease:
        """Lease blocks for a prompt; see `Session.acquire`.  Cancelling it gives up waiting.

        Raises:
            PoolExhausted: not enough blocks; `retry_after_s` is a hint.
            InvalidRequest: it can never be served as it is.
            ServiceUnavailable: the service is lost.
        """
        batch = self.batch()
        reply = batch.acquire(tokens, reserve=reserve, wait_s=wait_s, request_id=request_id)
        await self._run(batch.step, patiently=True)
        return reply.result()

    def acquire_later(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 60.0,
        request_id: str = "",
    ) -> asyncio.Task[AsyncLease]:
        """Start an `acquire` and go on.  Cancelling the task gives up waiting."""
        return asyncio.get_running_loop().create_task(
            self.acquire(tokens, reserve=reserve, wait_s=wait_s, request_id=request_id)
        )

    async def lookup(self, tokens: TokensLike) -> Lookup:
        """Ask what `acquire` would find, without taking anything."""
        async with self.batch() as batch:
            reply = batch.lookup(tokens)
        return reply.result()

    async def explain(self, tokens: TokensLike) -> Explanation:
        """Ask why each token would or would not be reused."""
        async with self.batch() as batch:
            reply = batch.explain(tokens)
        return reply.result()

    async def reset(self) -> Reset:
        """Make the session's namespace forget what it has stored.  Leases live on."""
        async with self.batch() as batch:
            reply = batch.reset()
        return reply.result()

    async def pin(self, tokens: TokensLike, *, ttl_s: float) -> Pinned:
        """Let what the session's namespace stores of a prefix be evicted last for `ttl_s`."""
        async with self.batch() as batch:
            reply = batch.pin(tokens, ttl_s=ttl_s)
        return reply.result()

    async def unpin(self, tokens: TokensLike = b"") -> Unpinned:
        """End the pin of exactly this prefix, or all pins of the session's namespace."""
        async with self.batch() as batch:
            reply = batch.unpin(tokens)
        return reply.result()

    async def snapshot(self) -> Snapshot:
        """Ask for the state of the whole cache."""
        async with self.batch() as batch:
            reply = batch.snapshot()
        return reply.result()

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
        farewell = self.farewell()
        try:
            if farewell is not None:
                await self._await([farewell])
        finally:
            self.forget(farewell)
            self._hang_up()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def __aenter__(self) -> AsyncSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # ------------------------------------------------------------------------ sending, receiving

    def make_lease(self, grant: Grant, sent_at: float) -> AsyncLease:
        """Wrap a grant; for batches."""
        return self.enlist(AsyncLease(grant, self, sent_at))

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
        self.post(step)
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
        limit_s = self._client.timeout_s + max(reply.wait_s for reply in waiting)
        limit_s = min(limit_s, threading.TIMEOUT_MAX)
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
            # Whatever the service still does with these ops is undone when it sees the stream end.
            self.lose(self.ended(f"no answer within {limit_s:g} s", answers=True))
            self._call.cancel()

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

    def _hang_up(self) -> None:
        self._call.cancel()
        for task in self._tasks:
            task.cancel()

    async def _beat(self) -> None:
        while self._lost is None:
            await asyncio.sleep(self.attachment.ttl_s / 3)
            self.post(self.renewal()[0])


def refuse_other_loop(loop: asyncio.AbstractEventLoop, what: str) -> None:
    """Refuse a call from an event loop that is not the one of a client or session.

    Raises:
        InvalidRequest: it comes from another one.
    """
    if asyncio.get_running_loop() is not loop:
        raise InvalidRequest(
            f"this {what} belongs to another event loop: call connect_async in this one"
        )


class AsyncBatch(BatchOps["AsyncLease"]):
    """All ops of one step.  Leaving the `async with` block sends them and waits for the answers.

    An op that waits (`acquire` with `wait_s`) may be answered later: `await batch.wait(reply)`.  If
    the block raises, nothing is sent.
    """

    def __init__(self, session: AsyncSession) -> None:
        super().__init__(session)
        self._session = session

    async def wait(self, reply: Reply[AsyncLease]) -> AsyncLease:
        """Wait until an op that chose to wait is answered, and give its answer."""
        self._session.guard()
        try:
            await self._session._await([reply])
        except BaseException:
            self._session.abandon([reply])
            raise
        return reply.result()

    async def __aenter__(self) -> AsyncBatch:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            await self._session._run(self.step)


class AsyncLease(LeaseState):
    """A lease on blocks; see `Lease`.  Async context manager; leaving it releases."""

    def __init__(self, grant: Grant, session: AsyncSession, sent_at: float) -> None:
        super().__init__(grant, session, sent_at)
        self._session = session

    async def commit(self, num_tokens: int, new_tokens: TokensLike = b"") -> Committed:
        """Say that slots below `num_tokens` hold valid KV: they become visible to all."""
        async with self._session.batch() as batch:
            reply = batch.commit(self, num_tokens, new_tokens)
        return reply.result()

    async def extend(self, num_tokens: int, *, wait_s: float = 0.0) -> TableUpdate:
        """Make room for `num_tokens` tokens in all; `block_table` is up to date afterwards.

        Args:
            num_tokens: counted from position 0.
            wait_s: how long to wait for room.  Leases that all wait for each other's blocks get
                none: `reserve` at `acquire` what will be needed.
        """
        batch = self._session.batch()
        reply = batch.extend(self, num_tokens, wait_s=wait_s)
        await self._session._run(batch.step, patiently=True)
        return reply.result()

    async def truncate(self, num_tokens: int) -> TableUpdate:
        """Roll back to `num_tokens` tokens; `block_table` is up to date afterwards."""
        async with self._session.batch() as batch:
            reply = batch.truncate(self, num_tokens)
        return reply.result()

    async def fork(self, n: int) -> list[AsyncLease]:
        """Make `n` children that share every block.  `extend` a child before it writes."""
        async with self._session.batch() as batch:
            reply = batch.fork(self, n)
        return reply.result()

    def release(self) -> Coroutine[Any, Any, Released]:
        """End the lease.  Idempotent.  What was committed stays cached until it is evicted.

        Sent by this call itself: a task that is cancelled before it runs has released as well.
        """
        self._session.guard()
        batch = self._session.batch()
        reply = batch.release(self)
        self._session.post(batch.step)
        return self._released_by(batch.step, reply)

    async def _released_by(self, step: Step, reply: Reply[Released]) -> Released:
        await self._session._outcome(step)
        return reply.result()

    async def __aenter__(self) -> AsyncLease:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.released or self._session.is_inherited:
            return
        try:
            await self.release()
        except (LeaseExpired, NotFound, ServiceUnavailable):
            # The lease is gone already, with its worker or its service; do not mask `error`.
            return
