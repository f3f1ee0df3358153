"""The synchronous session: one worker's life, for a scheduler that is a plain loop.

```
caller thread      writer (gRPC)        the wire        reader thread         heartbeat thread
batch ─ bytes ──►  queue ─────────────► OpBatch
   waits           ◄──────────────────  OpResults ────► settles replies
                                        renew    ◄───────────────────────────  every ttl / 3
```
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc

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
    from prefixcache.client.sync import Client


class Session:
    """One worker's life at the service.  Safe to use from several threads.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
    """

    def __init__(self, client: Client, request: pb.AttachRequest, *, keep_alive: bool) -> None:
        self._client = client
        self._outbox: SimpleQueue[bytes | None] = SimpleQueue()
        self._arrived = threading.Condition()
        self._pending: dict[int, Reply[Any]] = {}
        self._lost: CacheError | None = None
        self._closed = threading.Event()
        self._max_bytes, self._max_ops = unary.FIRST_MESSAGE_BYTES, 1
        self._key = ""
        self.ids: Iterator[int] = itertools.count(1)
        self.signs = SignsOfLife()
        stream: Any = client.channel.stream_stream(
            unary.SESSION_PATH, None, pb.OpResults.FromString
        )
        self._call = stream(
            iter(self._outbox.get, None), wait_for_ready=True, metadata=client.metadata
        )
        self._reader = threading.Thread(target=self._read, name="prefixcache-reader", daemon=True)
        self._reader.start()
        step = Step(self.ids)
        reply = step.attach(request)
        try:
            self._run(step)
            answer = reply.result()
        except BaseException:
            self._lose(ServiceUnavailable("the session was never attached"))
            self._hang_up()
            raise
        self._key = answer.worker_key
        self._max_bytes, self._max_ops = answer.max_message_bytes, answer.max_ops
        self.attachment: Attachment = codec.read_attach(answer)
        self._heartbeat = threading.Thread(
            target=self._beat, name="prefixcache-heartbeat", daemon=True
        )
        if keep_alive:
            self._heartbeat.start()

    @property
    def pool(self) -> PoolHandle:
        """Where the pool's memory is."""
        return self.attachment.pool

    @property
    def alive(self) -> bool:
        """Whether the session still stands: False after `close` and once the service is lost."""
        return self._lost is None and not self._closed.is_set()

    def batch(self) -> Batch:
        """Open a step: `with session.batch() as batch: ...` sends all its ops in one message."""
        return Batch(self)

    def acquire(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
    ) -> Lease:
        """Lease blocks for a prompt: match, pin and allocate in one atomic step.

        Args:
            tokens: the prompt; fastest as packed bytes or a numpy int32 array.
            reserve: tokens that may be added after it; their blocks are taken now.
            wait_s: how long to wait if another worker is computing the prefix now.
            request_id: makes a repeated call give the same lease.

        Raises:
            PoolExhausted: not enough blocks; `retry_after_s` is a hint.
            InvalidRequest: it can never be served as it is.
            ServiceUnavailable: the service is lost.
        """
        batch = self.batch()
        reply = batch.acquire(tokens, reserve=reserve, wait_s=wait_s, request_id=request_id)
        try:
            self._run(batch.step)
            self._await(reply)
        except BaseException:  # Ctrl-C while waiting: nobody would release what is granted now
            self._abandon(reply)
            raise
        return reply.result()

    def acquire_later(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 60.0,
        request_id: str = "",
    ) -> Future[Lease]:
        """Like `acquire`, without blocking while another worker computes the prefix.

        Cancelling the future gives up waiting.  Its callbacks run in the reader thread: keep them
        short, and make no calls of this session in them.
        """
        batch = self.batch()
        reply = batch.acquire(tokens, reserve=reserve, wait_s=wait_s, request_id=request_id)
        future: Future[Lease] = Future()

        def arrived(reply: Reply[Lease]) -> None:
            if not future.set_running_or_notify_cancel():
                if reply.error is None:
                    self._give_back([reply.result().id])
            elif reply.error is not None:
                future.set_exception(reply.error)
            else:
                future.set_result(reply.result())

        def cancelled(future: Future[Lease]) -> None:
            if future.cancelled() and not reply.done:
                self._abandon(reply)

        reply.listener = arrived
        future.add_done_callback(cancelled)
        self._send(batch.step)
        return future

    def lookup(self, tokens: TokensLike) -> Lookup:
        """Ask what `acquire` would find, without taking anything."""
        with self.batch() as batch:
            reply = batch.lookup(tokens)
        return reply.result()

    def explain(self, tokens: TokensLike) -> Explanation:
        """Ask why each token would or would not be reused."""
        with self.batch() as batch:
            reply = batch.explain(tokens)
        return reply.result()

    def reset(self) -> Reset:
        """Make the session's namespace forget what it has stored.  Leases live on."""
        with self.batch() as batch:
            reply = batch.reset()
        return reply.result()

    def pin(self, tokens: TokensLike, *, ttl_s: float) -> Pinned:
        """Let what the session's namespace stores of a prefix be evicted last for `ttl_s`."""
        with self.batch() as batch:
            reply = batch.pin(tokens, ttl_s=ttl_s)
        return reply.result()

    def unpin(self, tokens: TokensLike = b"") -> Unpinned:
        """End the pin of exactly this prefix, or all pins of the session's namespace."""
        with self.batch() as batch:
            reply = batch.unpin(tokens)
        return reply.result()

    def snapshot(self) -> Snapshot:
        """Ask for the state of the whole cache."""
        with self.batch() as batch:
            reply = batch.snapshot()
        return reply.result()

    def renew(self) -> None:
        """Send a sign of life now.  The heartbeats do this by themselves."""
        sent_at = time.monotonic()
        step = Step(self.ids)
        reply = step.renew()
        reply.finish = lambda _: self._renewed(sent_at)
        self._run(step)
        reply.result()

    def close(self) -> None:
        """End the session.  Idempotent.  All its leases end.

        States that this process writes to none of their blocks any more, also when the service was
        lost before: attaching again passes that on.
        """
        if self._closed.is_set():
            return
        self._closed.set()
        if self._lost is None:
            step = Step(self.ids)
            step.detach()
            self._run(step)
        if self._lost is not None and self._key:
            self._client.finished.append(self._key)
        self._lose(ServiceUnavailable("the session is closed"))
        self._hang_up()

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # ------------------------------------------------------------------------ sending, receiving

    def make_lease(self, grant: Grant, sent_at: float) -> Lease:
        """Wrap a grant; for batches."""
        return Lease(grant, self, sent_at)

    def _send(self, step: Step) -> None:
        parts = step.cut(self._max_bytes, self._max_ops)
        replies = [reply for reply in step.replies if not reply.done]
        with self._arrived:
            lost = self._lost
            if lost is None:
                for reply in replies:
                    self._pending[reply.op_id] = reply
                for part in parts:
                    self._outbox.put(part)
        if lost is not None:
            for reply in replies:
                reply.settle(type(lost)(*lost.args))

    def _run(self, step: Step) -> None:
        """Send a step and wait until every op that does not choose to wait is answered."""
        self._send(step)
        prompt = [reply for reply in step.replies if not reply.wait_s]
        self._await(*prompt)

    def _await(self, *replies: Reply[Any]) -> None:
        limit_s = self._client.timeout_s + max((reply.wait_s for reply in replies), default=0.0)
        with self._arrived:
            answered = self._arrived.wait_for(lambda: all(r.done for r in replies), limit_s)
        if not answered:
            # Whatever the service still does with these ops is undone when it sees the stream end.
            self._lose(self._client.address.unavailable(f"no answer within {limit_s:g} s"))
            self._call.cancel()

    def _read(self) -> None:
        error: CacheError = ServiceUnavailable("this session can no longer read its answers")
        try:
            for results in self._call:
                orphans: list[LeaseId] = []
                with self._arrived:
                    replies = [(self._pending.pop(r.id, None), r) for r in results.results]
                for reply, result in replies:
                    if reply is not None:
                        reply.settle(read_result(result))
                    elif result.WhichOneof("result") == "acquire":
                        orphans.append(LeaseId(result.acquire.grant.lease))
                if orphans:
                    self._give_back(orphans)
                with self._arrived:
                    self._arrived.notify_all()
            error = self._client.address.unavailable("it ended the session")
        except grpc.RpcError as rpc_error:
            error = unary.read_stream_error(rpc_error, self._client.address)
        finally:
            self._lose(error)

    def _run_waiting(self, step: Step, reply: Reply[TableUpdate]) -> None:
        """Send a step whose only op changes a table, perhaps later, and wait for it."""
        try:
            self._run(step)
            self._await(reply)
        except BaseException:  # Ctrl-C: the table may still change, and that must not be missed
            step = Step(self.ids)
            step.cancel(reply.op_id).finish = lambda _: self._forget(reply.op_id)
            self._send(step)
            raise

    def _forget(self, op_id: int) -> None:
        with self._arrived:
            self._pending.pop(op_id, None)

    def _abandon(self, reply: Reply[Lease]) -> None:
        with self._arrived:
            pending = self._pending.pop(reply.op_id, None) is not None
        if pending:
            step = Step(self.ids)
            step.cancel(reply.op_id)
            self._send(step)
        elif reply.done and reply.error is None:
            self._give_back([reply.result().id])

    def _give_back(self, leases: list[LeaseId]) -> None:
        step = Step(self.ids)
        for lease in leases:
            step.release(lease)
        self._send(step)

    def _lose(self, error: CacheError) -> None:
        with self._arrived:
            if self._lost is None:
                self._lost = error
                self._outbox.put(None)  # ends gRPC's thread that waits for more to send
            replies = list(self._pending.values())
            self._pending.clear()
        for reply in replies:
            reply.settle(type(error)(*error.args))
        with self._arrived:
            self._arrived.notify_all()

    def _hang_up(self) -> None:
        self._call.cancel()
        if threading.current_thread() is not self._reader:
            self._reader.join(self._client.timeout_s)

    def _renewed(self, sent_at: float) -> None:
        self.signs.note(sent_at, time.monotonic(), lifetime_of(self.attachment.ttl_s))

    def _beat(self) -> None:
        while not self._closed.wait(self.attachment.ttl_s / 3) and self._lost is None:
            step = Step(self.ids)
            reply = step.renew()
            sent_at = time.monotonic()
            reply.finish = lambda _, sent_at=sent_at: self._renewed(sent_at)
            self._send(step)


class Batch(BatchOps["Lease"]):
    """All ops of one step.  Leaving the `with` block sends them in one message and waits for them.

    An op that waits (`acquire` with `wait_s`) may be answered later: `wait(reply)` waits for it.
    If the block raises, nothing is sent.
    """

    def __init__(self, session: Session) -> None:
        super().__init__(session)
        self._session = session

    def wait(self, reply: Reply[Lease]) -> Lease:
        """Block until an op that chose to wait is answered, and give its answer."""
        self._session._await(reply)
        return reply.result()

    def __enter__(self) -> Batch:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self._session._run(self.step)


class Lease(LeaseState):
    """A lease on blocks.  Context manager; leaving it releases, whatever happened.

    Every call raises `LeaseExpired` once the lease is past its deadline, and `ServiceUnavailable`
    once the service is lost.
    """

    def __init__(self, grant: Grant, session: Session, sent_at: float) -> None:
        super().__init__(grant, session, sent_at)
        self._session = session

    def commit(self, num_tokens: int, new_tokens: TokensLike = b"") -> Committed:
        """Say that slots below `num_tokens` hold valid KV: they become visible to all.

        Call it only after the device has finished writing.  `new_tokens` (generated since) are
        appended to the lease's tokens first.
        """
        with self._session.batch() as batch:
            reply = batch.commit(self, num_tokens, new_tokens)
        return reply.result()

    def extend(self, num_tokens: int, *, wait_s: float = 0.0) -> TableUpdate:
        """Make room for `num_tokens` tokens in all; `block_table` is up to date afterwards.

        Args:
            num_tokens: counted from position 0.
            wait_s: how long to wait for room.  Leases that all wait for each other's blocks get
                none: `reserve` at `acquire` what will be needed.
        """
        batch = self._session.batch()
        reply = batch.extend(self, num_tokens, wait_s=wait_s)
        self._session._run_waiting(batch.step, reply)
        return reply.result()

    def truncate(self, num_tokens: int) -> TableUpdate:
        """Roll back to `num_tokens` tokens; `block_table` is up to date afterwards."""
        with self._session.batch() as batch:
            reply = batch.truncate(self, num_tokens)
        return reply.result()

    def fork(self, n: int) -> list[Lease]:
        """Make `n` children that share every block.  `extend` a child before it writes."""
        with self._session.batch() as batch:
            reply = batch.fork(self, n)
        return reply.result()

    def release(self) -> Released:
        """End the lease.  Idempotent.  What was committed stays cached until it is evicted."""
        with self._session.batch() as batch:
            reply = batch.release(self)
        return reply.result()

    def __enter__(self) -> Lease:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self.released:
            return
        try:
            self.release()
        except (LeaseExpired, NotFound, ServiceUnavailable):
            # The lease is gone already, with its worker or its service; do not mask `error`.
            return
