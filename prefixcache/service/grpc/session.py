"""Sessions: one stream per worker, a batch of ops in, their results out.

```
OpBatch ─► run each op in order ─► OpResults     a slice in one go, then others' turn
               └ waits ─► Deliveries ─► outcome ─► OpResults    later, one for all that settled
```
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from functools import partial
from itertools import chain
from types import GeneratorType
from typing import Any

import grpc
import grpc.aio
import structlog

from prefixcache.client.codec import WRITE, write_error
from prefixcache.errors import CacheError, InvalidRequest, NotFound
from prefixcache.service.answers import REPEATABLE, Question, question
from prefixcache.service.auth.identity import Identity
from prefixcache.service.auth.standing import STANDING
from prefixcache.service.deliveries import Outcome
from prefixcache.service.grpc.bad_request import BadRequest
from prefixcache.service.handlers import Handlers
from prefixcache.service.observe.latency import SUM, clock, empty_row
from prefixcache.service.worker import Visitor, Worker
from prefixcache.types import Grant, Waiting
from prefixcache.v1 import prefixcache_pb2 as pb

log = structlog.get_logger(__name__)

_INTERNAL = 13

_SLICE = 64
"""Ops that run in one go at most; then others have their turn, however many are in a message."""
_SLICE_NS = 500_000
"""Time after which they have it anyhow: some ops take many times as long as others."""
ANSWER_BYTES = 1 << 20
"""Of results in one message, about: more are written first, so that an answer as large as the ops
can make it is never in memory as a whole.  A single result may be larger."""
_MOST_SNAPSHOTS = 1
"""Of so many ops: each walks all namespaces."""


class SessionStream:
    """One open stream.  Its end without a detach is the death of its worker."""

    def __init__(self, handlers: Handlers, context: Any, identity: Identity) -> None:
        self._visitor = Visitor(identity)
        self._handlers = handlers
        self._context = context
        self._worker: Worker | None = None
        self._writing = asyncio.Lock()
        self._late = pb.OpResults()
        self._flushing: asyncio.Task[None] | None = None
        self._steps: Generator[None, None, None] | None = None
        """Of the op that is answered now, or made way for, where that takes several."""
        self._again: pb.Op | None = None
        """The op for which way was made: it is run next."""
        self._let_go: Callable[[], None] | None = None
        """What to call once the long answer that was made last has been written."""
        self._no_room: CacheError | None = None
        """Why the long answer that is to be made next is not."""
        # Of the message that is answered now; bytes of results that are not yet written.
        self._num_ops = self._num_snapshots = self._num_bytes = 0

    async def serve(self) -> None:
        """Answer batches until the client hangs up or dies.

        Raises:
            Unauthenticated: its identity is no longer in the file as it was.
        """
        task = asyncio.current_task()
        assert task is not None
        read = self._context.read
        standing = STANDING.get()
        try:
            while (batch := await read()) is not grpc.aio.EOF:
                if standing is not None:
                    standing.check()
                if batch.__class__ is BadRequest:
                    await self._context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(batch))
                if len(batch.ops) > self._handlers.settings.max_ops:
                    await self._context.abort(
                        grpc.StatusCode.INVALID_ARGUMENT,
                        f"{len(batch.ops):,} ops in one message; the limit is "
                        f"{self._handlers.settings.max_ops:,} (--max-ops)",
                    )
                async with self._writing:
                    results = await self.answer(batch, task)
                    await self._write(results)
                    self._is_taken()
        finally:
            self._is_taken()
            if self._flushing is not None:
                self._flushing.cancel()
            if self._worker is not None:
                self._handlers.workers.leave(self._worker, gone=False)

    async def answer(self, batch: pb.OpBatch, task: asyncio.Task[None]) -> pb.OpResults:
        """Run a batch, in slices: others are served between them.  Ops fail independently.

        However many sessions have a long batch at once, only one of them has a slice between two of
        anybody else's ops.
        """
        results = pb.OpResults()
        ops, settle = batch.ops, self._handlers.deliveries.settle
        turns, tenant = self._handlers.turns, self._visitor.identity.tenant or ""
        tracer = self._handlers.tracer
        spent = (
            {} if tracer is None else {v: r[SUM] for v, r in self._handlers.latency.rows.items()}
        )
        self._num_ops = self._num_snapshots = 0
        pending = iter(ops)

        def run_slice() -> None:
            # What settled before a slice comes before it: tables change in the order of answers.
            results.MergeFrom(self._late)
            self._late.Clear()
            self._num_bytes = results.ByteSize()
            self._slice(pending, results, task)
            settle()

        run_slice()
        while True:
            if self._steps is not None:
                steps, self._steps = self._steps, None
                if self._again is None:
                    await self._make_room(tenant)
                await turns.run(steps, tenant)
                settle()
            if self._num_ops >= len(ops):
                break
            if self._num_bytes > ANSWER_BYTES:
                await self._write(results)
                results = pb.OpResults()
                self._is_taken()
            await turns.take_one(run_slice, tenant)
        if tracer is not None:
            rows = self._handlers.latency.rows
            counts = Counter([op.WhichOneof("op") for op in ops])
            self._handlers.failures.spare(
                "tracing",
                tracer.message,
                {verb: (n, rows[verb][SUM] - spent[verb]) for verb, n in counts.items() if verb},
                self._worker.name if self._worker is not None else "",
            )
        return results

    async def _make_room(self, tenant: str) -> None:
        """Wait until a long answer may be made; the answer itself is told why it may not."""
        self._no_room = None
        if self._let_go is None:  # else it has the place of the one before, in the same message
            try:
                self._let_go = await self._handlers.unread.room(tenant, is_long=True)
            except CacheError as error:
                self._no_room = error

    def _is_taken(self) -> None:
        """Note that all results have been written, and taken."""
        if self._let_go is not None:
            self._let_go()
            self._let_go = None

    def _slice(self, ops: Iterator[pb.Op], results: pb.OpResults, task: asyncio.Task[None]) -> None:
        """Run the next ops."""
        add = results.results.add
        rows, unknown = self._handlers.latency.rows, empty_row()
        start = began = clock()
        count = 0
        for op in ops if self._again is None else chain((self._again,), ops):
            if self._worker is not None and self._worker.tickets:
                self._catch_up(results)
            verb = op.WhichOneof("op")
            if op is self._again:
                self._again = None
            elif self._worker is not None and verb is not None:
                self._steps = self._handlers.clear_way(self._worker, verb, getattr(op, verb))
                if self._steps is not None:
                    self._again = op
                    break
            count += 1
            if verb == "snapshot" and self._is_one_too_many(self._num_ops + count):
                refused = InvalidRequest(
                    f"more than {_MOST_SNAPSHOTS} snapshot in {_SLICE} ops: "
                    "each walks all namespaces"
                )
                result = add()
                result.id = op.id
                write_error(refused, result.error)
            else:
                self._run(op, verb, add, task)
            now = clock()
            row = rows.get(verb, unknown)
            row[(now - began).bit_length()] += 1
            row[SUM] += now - began
            began = now
            if count == _SLICE or now - start > _SLICE_NS or self._num_bytes > ANSWER_BYTES:
                break
            if self._steps is not None:
                break
        self._num_ops += count

    def _catch_up(self, results: pb.OpResults) -> None:
        """Let what the ops before this one have settled be answered before it, and not after.

        The table of a lease that waited to grow has changed already: what this op says of it comes
        on top.  And whoever cancels is told nothing more of that op afterwards.
        """
        self._handlers.deliveries.settle()
        if self._late.results:
            self._num_bytes += self._late.ByteSize()
            results.MergeFrom(self._late)
            self._late.Clear()

    def _is_one_too_many(self, num_ops: int) -> bool:
        """Count a snapshot, the `num_ops`th op of its message; say whether it is refused."""
        self._num_snapshots += 1
        return self._num_snapshots > _MOST_SNAPSHOTS * -(-num_ops // _SLICE)

    def _run(self, op: pb.Op, verb: Any, add: Any, task: asyncio.Task[None] | None) -> None:
        """Run one op and add its result, unless it has to wait."""
        worker, verbs = self._worker, self._handlers.verbs
        try:
            if worker is None or verb not in verbs:
                self._first(op, verb, add, task)
                return
            if op.id in worker.tickets:
                raise InvalidRequest(f"op {op.id} still waits: give each op a number of its own")
            handler, write = verbs[verb]
            request = getattr(op, verb)
            asked = question(worker.key, verb, request) if verb in REPEATABLE else None
            if asked is not None:
                earlier = self._handlers.earlier(worker, asked)
                if earlier is not None:
                    result = add()
                    result.id = op.id
                    getattr(result, verb).CopyFrom(earlier)
                    self._num_bytes += result.ByteSize()
                    return
            answer = handler(worker, request)
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this op's alone
            result = add()
            result.id = op.id
            self._refuse(result, verb, error)
            return
        if answer.__class__ is GeneratorType:
            result = add()
            result.id = op.id
            self._steps = self._in_steps(result, verb, answer, write)
            return
        if answer.__class__ is Waiting:
            worker.tickets[op.id] = answer.ticket
            self._handlers.deliveries.enter(
                answer.ticket, partial(self._settled, op.id, verb, asked, request.request_id)
            )
            return
        if worker.handed and isinstance(answer, Grant):
            worker.take(request.request_id, answer.lease)
        result = add()
        result.id = op.id
        write(answer, getattr(result, verb))
        self._num_bytes += result.ByteSize()
        if asked is not None:
            kept = type(getattr(result, verb))()
            kept.CopyFrom(getattr(result, verb))
            self._handlers.keep(worker, asked, kept)
        if verb == "detach":
            self._worker = None

    def _refuse(self, result: pb.OpResult, verb: str | None, error: Exception) -> None:
        if isinstance(error, CacheError):
            write_error(error, result.error)
        else:
            log.error("an op failed in a way that nobody foresaw", verb=verb, exc_info=error)
            result.error.code = _INTERNAL
            result.error.message = f"{verb} failed inside the service; its log has the details"
        self._handlers.latency.refuse(verb or "none", error)

    def _in_steps(
        self, result: pb.OpResult, verb: str, steps: Generator[None, None, Any], write: Any
    ) -> Generator[None, None, None]:
        """Answer an op in steps: others are served in between, and then the ops that follow it."""
        try:
            if self._no_room is not None:
                raise self._no_room
            answer = yield from steps
            writing = write(answer, getattr(result, verb)) or ()
            answer = None  # who writes it frees it, a part at a time
            yield from writing
        except Exception as error:  # noqa: BLE001 - whatever it is, it is this op's alone
            result.ClearField(verb)
            self._refuse(result, verb, error)
        self._num_bytes += result.ByteSize()

    def _first(
        self, op: pb.Op, verb: str | None, add: Any, task: asyncio.Task[None] | None
    ) -> None:
        """Serve what is not an everyday op: attach, and ops that come before it."""
        if verb is None:
            raise InvalidRequest(
                "an op without a verb, or with one that this service does not know"
            )
        if verb != "attach":
            raise NotFound(f"{verb} before attach: the first op of a session is an attach")
        hang_up = task.cancel if task is not None else None
        answer = self._handlers.attach(self._worker or self._visitor, op.attach, hang_up)
        self._worker = answer.worker
        result = add()
        result.id = op.id
        self._handlers.write_attach(answer, result.attach)

    def _settled(
        self, op_id: int, verb: str, asked: Question | None, request_id: str, outcome: Outcome
    ) -> None:
        """Answer an op that waited.  Runs inside somebody else's step, so it must not raise."""
        if self._worker is not None:
            self._worker.tickets.pop(op_id, None)
        result = self._late.results.add()
        result.id = op_id
        if isinstance(outcome, CacheError):
            write_error(outcome, result.error)
        else:
            message = getattr(result, verb)
            WRITE[verb](outcome, message)
            if isinstance(outcome, Grant) and self._worker is not None:
                self._worker.take(request_id, outcome.lease)
            if asked is not None and self._worker is not None:
                kept = type(message)()
                kept.CopyFrom(message)
                self._handlers.keep(self._worker, asked, kept)
        if self._flushing is None:
            self._flushing = asyncio.get_running_loop().create_task(self._flush())

    async def _write(self, results: pb.OpResults) -> None:
        """Write results in messages of about `ANSWER_BYTES`, each once there is room for it."""
        if results.ByteSize() <= ANSWER_BYTES:
            if results.results:
                await self._context.write(results)
            return
        part, size = pb.OpResults(), 0
        for result in results.results:
            more = result.ByteSize()
            if part.results and size + more > ANSWER_BYTES:
                await self._context.write(part)
                part, size = pb.OpResults(), 0
            part.results.append(result)
            size += more
        await self._context.write(part)

    async def _flush(self) -> None:
        try:
            async with self._writing:
                while self._late.results:
                    late, self._late = self._late, pb.OpResults()
                    await self._write(late)
        except asyncio.CancelledError:
            raise
        except grpc.aio.BaseError as error:
            # The stream ended while its last outcomes were being written: its worker is gone, or
            # is about to be, when its own reading ends.
            log.debug("late results for a stream that has ended", cause=str(error))
        finally:
            self._flushing = None
