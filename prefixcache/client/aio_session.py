"""The asynchronous session: one worker's life, for one event loop."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Iterator
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from prefixcache.client import codec, unary
from prefixcache.client.batch import BatchOps
from prefixcache.client.lease import LeaseState, SignsOfLife, lifetime_of
from prefixcache.client.ops import Reply, Step, read_result
from prefixcache.errors import CacheError, LeaseExpired, NotFound, ServiceUnavailable
from prefixcache.types import (
    Attachment,
    Committed,
    Explanation,
    Grant,
    LeaseId,
    Lookup,
    Pinned,
    PoolHandle,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TokensLike,
    Unpinned,
)
from prefixcache.v1 import prefixcache_pb2 as pb

if TYPE_CHECKING:
    from prefixcache.client.aio import AsyncClient


class AsyncSession:
    """One worker's life at the service; see `Session`.  For one event loop.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
    """

    attachment: Attachment

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._pending: dict[int, Reply[Any]] = {}
        self._lost: CacheError | None = None
        self._closed = False
        self._writing = asyncio.Lock()
        self._max_bytes, self._max_ops = unary.FIRST_MESSAGE_BYTES, 1
        self._key = ""
        self._tasks: set[asyncio.Task[None]] = set()
        self.ids: Iterator[int] = itertools.count(1)
        self.signs = SignsOfLife()
        stream: Any = client.channel.stream_stream(
            unary.SESSION_PATH, None, pb.OpResults.FromString
        )
        self._call = stream(wait_for_ready=True, metadata=client.metadata)

    async def _open(self, request: pb.AttachRequest, *, keep_alive: bool) -> None:
        self._spawn(self._read())
        step = Step(self.ids)
        reply = step.attach(request)
        try:
            await self._run(step)
            answer = reply.result()
        except BaseException:
            self._lose(ServiceUnavailable("the session was never attached"))
            await self._hang_up()
            raise
        self._key = answer.worker_key
        self._max_bytes, self._max_ops = answer.max_message_bytes, answer.max_ops
        self.attachment = codec.read_attach(answer)
        if keep_alive:
            self._spawn(self._beat())

    @property
    def pool(self) -> PoolHandle:
        """Where the pool's memory is."""
        return self.attachment.pool

    @property
    def alive(self) -> bool:
        """Whether the session still stands: False after `close` and once the service is lost."""
        return self._lost is None and not self._closed

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
        await self._run(batch.step)
        await self._await(reply)
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
        sent_at = time.monotonic()
        step = Step(self.ids)
        reply = step.renew()
        reply.finish = lambda _: self._renewed(sent_at)
        await self._run(step)
        reply.result()

    async def close(self) -> None:
        """End the session; see `Session.close`.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        if self._lost is None:
            step = Step(self.ids)
            step.detach()
            await self._run(step)
        if self._lost is not None and self._key:
            self._client.finished.append(self._key)
        self._lose(ServiceUnavailable("the session is closed"))
        await self._hang_up()

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
        return AsyncLease(grant, self, sent_at)

    async def _send(self, step: Step) -> None:
        parts = step.cut(self._max_bytes, self._max_ops)
        replies = [reply for reply in step.replies if not reply.done]
        if self._lost is None:
            for reply in replies:
                self._pending[reply.op_id] = reply
            try:
                for part in parts:
                    async with self._writing:
                        await self._call.write(part)
            except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
                # The reader learns why from the stream itself; without it, this is all we know.
                self._lose(self._client.address.unavailable("connection lost"))
        if self._lost is not None:
            for reply in replies:
                reply.settle(type(self._lost)(*self._lost.args))

    async def _run(self, step: Step) -> None:
        """Send a step and wait until every op that does not choose to wait is answered."""
        await self._send(step)
        await self._await(*(reply for reply in step.replies if not reply.wait_s))

    async def _run_waiting(self, step: Step, reply: Reply[TableUpdate]) -> None:
        """Send a step whose only op changes a table, perhaps later, and wait for it."""
        await self._run(step)
        await self._await(reply)

    async def _await(self, *replies: Reply[Any]) -> None:
        waiting = [reply for reply in replies if not reply.done]
        if not waiting:
            return
        limit_s = self._client.timeout_s + max(reply.wait_s for reply in waiting)
        answered: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        missing = len(waiting)

        def arrived(_: Reply[Any]) -> None:
            nonlocal missing
            missing -= 1
            if not missing and not answered.done():
                answered.set_result(None)

        for reply in waiting:
            reply.listener = arrived
        try:
            await asyncio.wait_for(answered, limit_s)
        except TimeoutError:
            # Whatever the service still does with these ops is undone when it sees the stream end.
            self._lose(self._client.address.unavailable(f"no answer within {limit_s:g} s"))
            self._call.cancel()
        except asyncio.CancelledError:
            self._abandon(waiting)
            raise

    def _abandon(self, replies: list[Reply[Any]]) -> None:
        step = Step(self.ids)
        for reply in replies:
            if reply.done:
                if isinstance(lease := reply.result(), AsyncLease):
                    step.release(lease.id)
            elif reply.changes_table:
                # The table may still change, and that must not be missed.
                if reply.wait_s:
                    forget = step.cancel(reply.op_id)
                    forget.finish = partial(self._forget, reply.op_id)
            elif self._pending.pop(reply.op_id, None) is not None and reply.wait_s:
                step.cancel(reply.op_id)
        if step.replies:
            self._spawn(self._send(step))

    def _forget(self, op_id: int, _: None) -> None:
        self._pending.pop(op_id, None)

    async def _read(self) -> None:
        try:
            async for results in self._call:
                orphans: list[LeaseId] = []
                for result in results.results:
                    reply = self._pending.pop(result.id, None)
                    if reply is not None:
                        reply.settle(read_result(result))
                    elif result.WhichOneof("result") == "acquire":
                        orphans.append(LeaseId(result.acquire.grant.lease))
                if orphans:
                    step = Step(self.ids)
                    for lease in orphans:
                        step.release(lease)
                    self._spawn(self._send(step))
            self._lose(self._client.address.unavailable("it ended the session"))
        except grpc.aio.AioRpcError as error:
            self._lose(unary.read_stream_error(error, self._client.address))
        except asyncio.CancelledError:
            self._lose(ServiceUnavailable("the session is closed"))
            raise

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _lose(self, error: CacheError) -> None:
        if self._lost is None:
            self._lost = error
        replies = list(self._pending.values())
        self._pending.clear()
        for reply in replies:
            reply.settle(type(error)(*error.args))

    async def _hang_up(self) -> None:
        self._call.cancel()
        tasks = [task for task in self._tasks if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _renewed(self, sent_at: float) -> None:
        self.signs.note(sent_at, time.monotonic(), lifetime_of(self.attachment.ttl_s))

    async def _beat(self) -> None:
        while self._lost is None:
            await asyncio.sleep(self.attachment.ttl_s / 3)
            step = Step(self.ids)
            reply = step.renew()
            sent_at = time.monotonic()
            reply.finish = lambda _, sent_at=sent_at: self._renewed(sent_at)
            await self._send(step)


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
        await self._session._await(reply)
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
        await self._session._run_waiting(batch.step, reply)
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

    async def release(self) -> Released:
        """End the lease.  Idempotent.  What was committed stays cached until it is evicted."""
        async with self._session.batch() as batch:
            reply = batch.release(self)
        return reply.result()

    async def __aenter__(self) -> AsyncLease:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.released:
            return
        try:
            await self.release()
        except (LeaseExpired, NotFound, ServiceUnavailable):
            # The lease is gone already, with its worker or its service; do not mask `error`.
            return
