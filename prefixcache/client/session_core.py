"""What a session has asked, and what becomes of it: all of a session but the sending and waiting.

```
        send(step) ──► pending ──► emit(bytes)      in the order of the calls, never waits
                          │
 receive(results) ──► reply.settle ──► finish       a grant becomes a lease, a table changes
                          │
 abandon(replies) ──► cancel, and give back what comes nevertheless
        lose(error) ──► every reply gets the error
```
No answer is ever missed: whoever stops waiting, cancelled or interrupted, leaves its reply pending.
A table changes when the service says so, and leases that nobody waits for are given back: unless
somebody else has the same lease, or is about to get it, by the same request id.

Without a lock: `send` and `lose` may meet in two threads, and a dictionary hands each reply to
exactly one of them.  So nothing here can be left locked by who was interrupted in it.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Generic, TypeVar
from weakref import WeakSet

from prefixcache.client import codec, unary
from prefixcache.client.connection import Connection, refuse_pickle
from prefixcache.client.lease import LeaseState, SignsOfLife, lifetime_of
from prefixcache.client.ops import BatchOps, Reply, Step, read_result
from prefixcache.client.progress import Inbox, Progress
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LayoutMismatch,
    ServiceUnavailable,
    Unsupported,
)
from prefixcache.pool import memory_is_abandoned
from prefixcache.texts import many
from prefixcache.types import Again, Attachment, Grant, LeaseId, Namespace, PoolHandle, shown
from prefixcache.v1 import prefixcache_pb2 as pb

log = logging.getLogger(__name__)

L = TypeVar("L", bound=LeaseState)


def check_callable(name: str, given: object) -> None:
    """Refuse what cannot be called where it is given, and not where it should be called.

    Raises:
        InvalidRequest: it cannot.
    """
    if not callable(given):
        raise InvalidRequest(f"{name} is {shown(given)}, which cannot be called")


class SessionCore(ABC, Generic[L]):
    """One worker's life, without I/O; `Session` and `AsyncSession` send its bytes and wait.

    Attributes:
        attachment: what attach answered: worker, pool, ttl.
        signs: the signs of life that the service has answered.
        key: the right to act for this worker, until it was passed on or is over.
        leases: those that somebody still has in hand.
        watched: those of them that a view was made of, or anything else that ends with them.
        lease_type: what a grant becomes.
        segments: what is to be computed again of segments, at least, so that requests of the
            session's model may ask for them; None: they may not.
    """

    attachment: Attachment
    lease_type: type[L]
    _call: Any
    _namespace: Namespace
    _acquires_by_name: bool
    _reuses_as_asked: bool

    def __init__(self, connection: Connection) -> None:
        self.ids: Iterator[int] = itertools.count(1)
        self.signs = SignsOfLife()
        self.key = ""
        self.leases: WeakSet[LeaseState] = WeakSet()
        self.watched: WeakSet[LeaseState] = WeakSet()
        self._client = connection
        self._pending: dict[int, Reply[Any]] = {}
        self._answered: Reply[Any] | None = None
        """Taken out of `_pending`, and being settled."""
        self._entrusted: dict[int, list[LeaseId]] = {}
        """Leases that are given back, unless the answer of this op brings them again."""
        self._lost: CacheError | None = None
        self._closed = False
        self._pid = os.getpid()
        self._max_bytes, self._max_ops = unary.FIRST_MESSAGE_BYTES, 1
        self.segments: Again | None = None
        self._progress = Progress()
        self._told_in_line: Callable[[int], object] = lambda num_in_line: None

    @property
    def pool(self) -> PoolHandle:
        """Where the pool's memory is."""
        return self.attachment.pool

    @property
    def memory_is_abandoned(self) -> bool:
        """Whether the pool's owner is dead, and not just out of reach.  One look at a file.

        Then nobody will ever lend its blocks to others: leases of this session may be used past
        their deadlines, and what is indexed stays as it is.
        """
        return memory_is_abandoned(self.pool)

    @property
    def alive(self) -> bool:
        """Whether the session still stands, in this process."""
        return self._lost is None and not self._closed and not self.is_inherited

    @property
    def is_inherited(self) -> bool:
        """Whether this object came through a fork: the session is the parent's."""
        return os.getpid() != self._pid

    @property
    def is_spent(self) -> bool:
        """Whether it is lost, and none of its leases may be in use: released, over or dropped."""
        now = time.monotonic()
        return self._lost is not None and not any(
            lease.deadline > now for lease in self._held_leases()
        )

    def __repr__(self) -> str:
        name = type(self).__name__
        if not hasattr(self, "attachment"):
            return f"<{name}: not attached>"
        if self.is_inherited:
            state = "came through fork"
        elif self._closed:
            state = "closed"
        else:
            state = "lost" if self._lost is not None else "alive"
        worker, address = self.attachment.worker, self._client.address
        return f"<{name} {worker} at {address}: {state}, {self._count_leases()}>"

    __reduce_ex__ = refuse_pickle

    def refuse_inherited(self) -> None:
        """Refuse to go on in a process that has the session by a fork.

        Raises:
            InvalidRequest: this is such a process.
        """
        if self.is_inherited:
            raise InvalidRequest(
                f"this session belongs to process {self._pid} and came through fork: connect and "
                "attach in this process"
            )

    # ------------------------------------------------------------------------------- what is asked

    @abstractmethod
    def emit(self, message: bytes | None) -> None:
        """Put a message behind those that are to be sent; None ends the stream.  Never waits."""

    @abstractmethod
    def hang_up(self) -> None:
        """End the stream, and whatever serves it here."""

    def cut(self) -> None:
        """End the stream, whatever is on its way."""
        self._call.cancel()

    def post(
        self, batch: BatchOps[L], on_error: Callable[[CacheError], object] | None = None
    ) -> None:
        """Send a batch and go on: nobody waits for its answers.  For a scheduler's step.

        Tables change and leases are there when the answers come; `Reply.done` says so.  What is
        said of a lease in one batch after another is done in that order.

        Args:
            batch: From `batch()`, without the `with`.
            on_error: Is told of each op that fails, by the thread that reads the answers (or by
                this one, where it is known at once).  It must not wait; what it raises is logged.

        Raises:
            InvalidRequest: this process has the session by a fork, the batch was sent before, or
                another session opened it.
        """
        if not isinstance(batch, BatchOps) or not batch.is_of(self):
            raise InvalidRequest(f"{shown(batch)} is no batch of this session")
        if on_error is not None:
            check_callable("on_error", on_error)
            for reply in batch.step.replies:
                reply.tell_error(on_error)
        self.send(batch.step)

    def send(self, step: Step) -> None:
        """Send a step.  Its replies are settled when the answers come, or at once if it is lost.

        Raises:
            InvalidRequest: this process has the session by a fork, or the step was sent before.
        """
        self.refuse_inherited()
        if step.is_sent:
            raise InvalidRequest("this batch was sent before: open another one for each step")
        step.is_sent = True
        if self._closed and self._lost is None:
            self._refuse(step.replies, ServiceUnavailable("the session is closed"))
        else:
            self._post(step)

    def _post(self, step: Step) -> None:
        parts = step.cut(self._max_bytes, self._max_ops)
        if self._lost is None:
            for reply in step.replies:
                if not reply.done:
                    self._pending[reply.op_id] = reply
            for part in parts:
                self.emit(part)
            if self._lost is None:
                return
            # Lost meanwhile: of each reply either this pop or that of `lose` takes hold.
            left = [r for r in step.replies if self._pending.pop(r.op_id, None) is not None]
            self._refuse(left, self._lost)
        else:
            self._refuse(step.replies, self._lost)

    @staticmethod
    def _refuse(replies: Iterable[Reply[Any]], error: CacheError) -> None:
        for reply in replies:
            reply.settle(type(error)(*error.args))

    def report(self, in_hand: int) -> None:
        """Note that a step was made, and how many requests are in hand after it.  O(1), any thread.

        Signs of life carry it, so that `prefixcache doctor` names a worker that has requests and
        makes no step.  Call it where requests are computed, never from a timer.

        Raises:
            ValueError: `in_hand` is no number of requests.
        """
        self._progress.step(in_hand)

    def watch_inbox(self, look: Callable[[], Inbox]) -> None:
        """Let signs of life carry what was handed to the worker and it has not taken.  O(1).

        `look` is called with each, in the thread that sends them: it must not wait.  If it raises,
        that is logged, and the sign of life tells of no inbox.
        """
        check_callable("look", look)
        self._progress.watch(look)

    def watch_line(self, told: Callable[[int], object]) -> None:
        """Hear with each sign of life how many wait in line for blocks; 0: nobody.

        Counted are leases that wait to grow, as one, and namespaces whose requests wait for more
        than their own quota.  For who holds blocks that others need more.  `told` is called by the
        thread that reads the answers: it must not wait; what it raises is logged.
        """
        check_callable("told", told)
        self._told_in_line = told

    def renewal(self) -> tuple[Step, Reply[Any]]:
        """Make a sign of life."""
        step = Step(self.ids)
        reply = step.renew(self._progress.told())
        reply.finish = partial(self._renewed, time.monotonic())
        return step, reply

    def _renewed(self, sent_at: float, num_in_line: int) -> None:
        self.signs.note(sent_at, time.monotonic(), lifetime_of(self.attachment.ttl_s))
        try:
            self._told_in_line(num_in_line)
        except Exception:
            # Whoever hears of it has no part in the other answers that this thread reads.
            log.exception("who is told how many wait in line has raised")

    @contextmanager
    def attaching(self, request: pb.AttachRequest) -> Iterator[Step]:
        """Give the first step, to be run inside; take over what it is answered, or hang up."""
        step = Step(self.ids)
        reply = step.attach(request)
        try:
            yield step
            self.attached(reply.result(), request)
        except BaseException:
            self.lose(ServiceUnavailable("the session was never attached"))
            self.hang_up()
            raise

    @contextmanager
    def leaving(self) -> Iterator[list[Reply[Any]]]:
        """Send a detach, the last op, and give what is to be waited for inside; then hang up.

        Nothing can be asked from now on.
        """
        self._closed = True
        for lease in tuple(self.watched):
            lease.let_go()
        step = Step(self.ids)
        farewell = None
        try:
            if self._lost is None:
                farewell = step.ask("detach")
                self._post(step)
            yield step.replies
        finally:
            self.forget(farewell)
            self.hang_up()

    def forget(self, farewell: Reply[Any] | None) -> None:
        """Close the books.  Attaching again passes the key on if nobody confirmed the farewell."""
        if farewell is None or not farewell.done or farewell.error is not None:
            self._client.pass_on(self)
        self._client.drop(self)
        self.lose(ServiceUnavailable("the session is closed"))

    # --------------------------------------------------------------------------- what is answered

    def named(self, salt: str | None, adapter: str | None) -> Namespace:
        """Give the session's namespace with another salt or adapter; None: the session's own.

        Raises:
            InvalidRequest: the service would not see it, and share what is to be kept apart.
        """
        if not self._acquires_by_name:
            raise InvalidRequest(
                "this service takes no salt and no adapter with a request: attach a session for "
                "each, or serve with this version"
            )
        own = self._namespace
        return own._replace(
            salt=own.salt if salt is None else salt,
            adapter=own.adapter if adapter is None else adapter,
        )

    def refuse_unheard_terms(self) -> None:
        """Refuse to say how much is reused where nobody would hear it.

        Raises:
            InvalidRequest: the service would reuse all that it finds.
        """
        if not self._reuses_as_asked:
            raise InvalidRequest(
                "this service is not told how much to reuse (`reuse`, `min_partial`), nor what to "
                "wait for (`for_room`): serve with this version"
            )

    def refuse_unheard_segments(self) -> None:
        """Refuse to ask for segments where they are not given.

        Raises:
            Unsupported: the service gives none to this model, or is of an earlier version, and
                would answer as if nobody had asked.
        """
        if self.segments is None:
            raise Unsupported(
                f"this service gives no segments to model {self._namespace.model!r}: it was "
                "started without --segments, or no certificate there allows them (prefixcache "
                "verify-segments makes one); ask without"
            )

    def attached(self, answer: pb.AttachResponse, request: pb.AttachRequest) -> None:
        """Take over what attach answered.

        Raises:
            LayoutMismatch: the service is too old to have compared the block size, and has another.
        """
        self._namespace = codec.read_namespace(request.namespace)
        self._acquires_by_name = answer.acquires_by_name
        self._reuses_as_asked = answer.reuses_as_asked
        self.segments = codec.read_again(answer.segments) if answer.HasField("segments") else None
        self.key = answer.worker_key
        self._max_bytes, self._max_ops = answer.max_message_bytes, answer.max_ops
        self.attachment = codec.read_attach(answer)
        if request.block_size not in (0, found := self.attachment.pool.block_size):
            raise LayoutMismatch(
                f"the pool has blocks of {found} tokens, this worker needs {request.block_size}: "
                f"serve with --block-size {request.block_size}"
            )

    def make_lease(self, grant: Grant, sent_at: float) -> L:
        """Wrap a grant into this session's kind of lease, and remember that somebody has it.

        It counts from when it was asked for, or from the last sign of life that was answered before
        the grant, if that was sent later.  The service answers in the order of its steps, so it
        took that sign before it granted, and the lease's own time began after both.  Where the
        answer is one that it gave before, the lease stood as it was given again, so it stood when
        the sign was taken, which prolonged it.  Without this, who waited through a gap between
        signs of life would be handed a lease that it takes for ended.
        """
        lease = self.lease_type(grant, self, max(sent_at, self.signs.last))
        self.leases.add(lease)
        return lease

    def promise(self, reply: Reply[L], future: Any, is_wanted: Callable[[], bool]) -> None:
        """Let a future have a reply's lease or error; cancelling it gives up waiting.

        Args:
            reply: Of an op that waits.
            future: Of whatever kind the session's callers wait for.
            is_wanted: Whether the future was not cancelled, asked as the answer arrives.
        """

        def arrived(reply: Reply[L]) -> None:
            if not is_wanted():
                self.abandon([reply])
            elif reply.error is not None:
                future.set_exception(reply.error)
            else:
                future.set_result(reply.result())

        def cancelled(_: Any) -> None:
            if future.cancelled():
                self.abandon([reply])

        reply.listener = arrived
        future.add_done_callback(cancelled)
        if reply.done:
            arrived(reply)

    def receive(self, results: pb.OpResults) -> None:
        """Settle what is answered; give back leases that nobody waits for any more."""
        orphans: list[LeaseId] = []
        for result in results.results:
            self._answered = self._pending.get(result.id)
            reply = self._pending.pop(result.id, None)
            if reply is not None:
                reply.settle(read_result(result))
                if reply.is_abandoned:
                    orphans += self._surrendered(reply)
                orphans += self._redeemed(reply)
            elif result.HasField("acquire"):
                orphans += self._unclaimed([LeaseId(result.acquire.grant.lease)])
            elif result.HasField("fork"):
                orphans += [LeaseId(child.lease) for child in result.fork.children]
        self._answered = None
        self.give_back(orphans)

    def abandon(self, replies: Sequence[Reply[Any]]) -> None:
        """Stop waiting: what has been granted is given back, now or when its answer comes.

        The service is told to give up what still waits.  Nothing is waited for.
        """
        for reply in replies:
            reply.is_abandoned = True
        step = Step(self.ids)
        for reply in replies:  # before there is room for them
            if not reply.done and reply.op_id in self._pending:
                step.ask("cancel", op=reply.op_id).finish = partial(self._cancelled, reply.op_id)
        for reply in replies:
            if reply.done:
                for lease in self._surrendered(reply):
                    step.ask("release", lease=lease)
        if step.replies and not self.is_inherited:
            self._post(step)

    def _cancelled(self, op_id: int, _: None) -> None:
        # Answers come in order: what is not answered before its cancel never will be.
        reply = self._pending.pop(op_id, None)
        if reply is not None:
            self.give_back(self._redeemed(reply))

    def give_back(self, leases: Iterable[LeaseId]) -> None:
        """Release leases without waiting.  Idempotent, as `release` is."""
        step = Step(self.ids)
        for lease in leases:
            step.ask("release", lease=lease)
        if step.replies and not self.is_inherited:
            self._post(step)

    def _surrendered(self, reply: Reply[Any]) -> list[LeaseId]:
        """Take the leases of an answer from whoever might still look at it; give those to release.

        O(1); by a request id O(leases + pending).
        """
        if reply.error is not None:
            return []
        answer = reply.result()
        leases = answer if isinstance(answer, list) else [answer]
        held = [lease for lease in leases if isinstance(lease, LeaseState) and not lease.released]
        for lease in held:
            lease.mark_released()
        ids = [lease.id for lease in held]
        return self._unclaimed(ids, reply.request_id) if reply.request_id else ids

    def _unclaimed(self, leases: Iterable[LeaseId], request_id: str = "") -> list[LeaseId]:
        """Give those of the leases that nobody else has, or may get, by the same request id.

        Who may get them decides when it is answered.
        """
        for heir in (*self._pending.values(), self._answered):
            if heir is None or not heir.request_id == request_id != "":
                continue
            self._entrusted.setdefault(heir.op_id, []).extend(leases)
            if not heir.done:  # else it is answered in another thread, by now: whoever takes them
                return []
            leases = self._entrusted.pop(heir.op_id, ())
        held = {lease.id for lease in self._held_leases()}
        return [lease for lease in leases if lease not in held]

    def _redeemed(self, reply: Reply[Any]) -> list[LeaseId]:
        """Give what was entrusted to an op that is answered now, if its answer did not bring it."""
        leases = self._entrusted.pop(reply.op_id, None)
        return self._unclaimed(leases, reply.request_id) if leases else []

    def lose(self, error: CacheError) -> None:
        """Give every reply, now and from now on, an error.  The first one stays.  Idempotent."""
        if self._lost is None:
            self._lost = error
            for lease in tuple(self.watched):
                lease.let_go(in_use=True)
            self.emit(None)
        while self._pending:
            try:
                _, reply = self._pending.popitem()
            except KeyError:  # another thread has taken the last one
                break
            self._refuse((reply,), self._lost)

    def patience(self, replies: Iterable[Reply[Any]]) -> float:
        """Give how many seconds to wait for replies: the client's limit, and what they chose."""
        limit_s = self._client.timeout_s + max((reply.wait_s for reply in replies), default=0.0)
        return min(limit_s, threading.TIMEOUT_MAX)

    def give_up(self, limit_s: float) -> None:
        """Lose a service that did not answer; what it still does is undone as the stream ends."""
        self.lose(self.ended(f"no answer within {limit_s:g} s", answers=True))
        self.cut()

    def ended(self, cause: str, *, answers: bool) -> CacheError:
        """Give the error of a stream that ended: what was lost, and what to do."""
        if not answers:
            return self._client.address.unavailable(cause)
        return ServiceUnavailable(
            f"the session ended: {cause}; {self._count_leases()} ended with it. The service at "
            f"{self._client.address} answers: attach again"
        )

    def _count_leases(self) -> str:
        count = len(self._held_leases())
        return many(count, "lease")

    def _held_leases(self) -> list[LeaseState]:
        return [lease for lease in list(self.leases) if not lease.released]
