"""Simulated engines on one cache: a scheduler as engines have it, without an engine.

Messages and answers of a session lie in queues until the test delivers them; the clock is the
test's.  The pool's memory knows for each slot which prefix was written there last, so that whatever
is read wrongly is seen.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, Protocol

from core.oracle import Memory
from prefixcache.client import MediaItem, codec
from prefixcache.client.lease import LeaseState
from prefixcache.client.session import Batch
from prefixcache.client.session_core import SessionCore
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, ServiceUnavailable
from prefixcache.types import (
    Attachment,
    Grant,
    Layout,
    LeaseId,
    Namespace,
    PoolHandle,
    TicketId,
    Waiting,
    WorkerId,
)
from prefixcache.v1 import prefixcache_pb2 as pb
from prefixcache_vllm.leases import Bounds, Held, Leases, Room

LAYOUT = Layout(1, 1, 8, "float32")
MODEL = Namespace("model")
TTL_S = 10.0


class Session(SessionCore[LeaseState]):
    """A client's session whose messages wait until they are delivered."""

    def __init__(self, machine: Machine, worker: WorkerId) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # it has no use for its connection here
        self.machine, self.worker = machine, worker
        self.sent: deque[bytes] = deque()
        self.answers: deque[pb.OpResults] = deque()
        self.late = pb.OpResults()
        self.tickets: dict[int, TicketId] = {}
        pool = PoolHandle("none", "", machine.cache.num_blocks, machine.size, LAYOUT, 1, 0)
        self.attachment = Attachment(str(worker), pool, TTL_S)
        self._max_bytes, self._max_ops = 1 << 20, 1000
        self._namespace = MODEL
        self._acquires_by_name = self._reuses_as_asked = True

    @property
    def memory_is_abandoned(self) -> bool:
        return self.machine.is_abandoned

    def emit(self, message: bytes | None) -> None:
        if message is not None:
            self.sent.append(message)

    def hang_up(self) -> None:
        """Do nothing: there is no stream to close."""

    def close(self) -> None:
        """Leave, and say that nothing is written any more."""
        self.lose(ServiceUnavailable("the session is closed"))
        self.machine.end(self)

    lease_type = LeaseState

    def batch(self) -> Batch:
        return Batch(self)  # type: ignore[arg-type]

    def acquire(self, tokens: bytes, **terms: Any) -> LeaseState:
        batch = self.batch()
        reply = batch.acquire(tokens, **terms)
        self.post(batch)  # type: ignore[arg-type]
        self.machine.deliver(self)
        return reply.result()  # type: ignore[return-value]


class Patches(Protocol):
    """What a clock is put in place with: pytest's `monkeypatch`, or another."""

    def setattr(self, name: str, value: object) -> None:
        """Put something in the place of what a dotted name says."""


class Machine:
    """One service, its pool, and a clock that the test moves."""

    def __init__(self, monkeypatch: Patches, num_blocks: int, size: int) -> None:
        self.cache = PrefixCache(num_blocks, size, ttl_s=TTL_S)
        self.size = size
        self.memory = Memory(size)
        self.now = 100.0
        self.is_abandoned = False
        self.sessions: list[Session] = []
        clock = SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep)
        for module in ("lease", "ops", "session_core", "progress"):
            monkeypatch.setattr(f"prefixcache.client.{module}.time", clock)
        monkeypatch.setattr("prefixcache_vllm.leases.time", clock)

    def _sleep(self, seconds: float) -> None:
        self.now += seconds

    def attach(self, name: str) -> Session:
        worker = WorkerId(1 + len(self.sessions))
        self.cache.attach(worker, MODEL, name=name, first_lease=1000 * worker, now=self.now)
        self.sessions.append(Session(self, worker))
        return self.sessions[-1]

    def deliver(self, session: Session, most: int = 1 << 30) -> None:
        """Let the service take messages of a session, and the session its answers."""
        for _ in range(most):
            if not session.sent or not session.alive:
                break
            self._serve(session, session.sent.popleft())
        while session.answers and session.alive:
            session.receive(session.answers.popleft())

    def _serve(self, session: Session, message: bytes) -> None:
        for op in pb.OpBatch.FromString(message).ops:
            self.settle()
            result = pb.OpResult(id=op.id)
            verb: Any = op.WhichOneof("op")
            try:
                answer = self._run(session, op.id, verb, getattr(op, verb))
            except CacheError as error:
                codec.write_error(error, result.error)
            else:
                if isinstance(answer, Waiting):
                    session.tickets[op.id] = answer.ticket
                    continue
                getattr(result, verb).SetInParent()
                codec.WRITE[verb](answer, getattr(result, verb))
            session.late.results.append(result)
        self.settle()

    def _run(self, session: Session, op_id: int, verb: str, request: Any) -> Any:
        cache, worker, now = self.cache, session.worker, self.now
        lease = LeaseId(getattr(request, "lease", 0))
        match verb:
            case "acquire":
                named = request.HasField("namespace")
                return cache.acquire(
                    worker,
                    codec.read_namespace(request.namespace) if named else MODEL,
                    request.tokens,
                    reserve=request.reserve,
                    wait_s=request.wait_s,
                    request_id=request.request_id,
                    attached=not named,
                    reuse=not request.recompute,
                    min_partial=request.min_partial,
                    for_room=not request.not_for_room,
                    now=now,
                )
            case "cancel":
                ticket = session.tickets.pop(request.op, None)
                return None if ticket is None else cache.cancel(worker, ticket, now=now) and None
            case "extend":
                wait_s = request.wait_s
                return cache.extend(worker, lease, request.num_tokens, wait_s=wait_s, now=now)
            case "commit":
                new = request.new_tokens
                return cache.commit(worker, lease, request.num_tokens, new, now=now)
            case "release":
                return cache.release(worker, lease, now=now)
            case "renew":
                cache.renew(worker, now=now)
                return cache.num_in_line
        raise AssertionError(verb)

    def settle(self) -> None:
        """Let those be answered who waited; what is answered so far follows in this order."""
        for ticket, outcome in self.cache.take_outcomes():
            for session in self.sessions:
                for op_id in [op for op, waits in session.tickets.items() if waits == ticket]:
                    del session.tickets[op_id]
                    result = session.late.results.add(id=op_id)
                    if isinstance(outcome, CacheError):
                        codec.write_error(outcome, result.error)
                    elif isinstance(outcome, Grant):
                        codec.WRITE["acquire"](outcome, result.acquire)
                    else:
                        codec.WRITE["extend"](outcome, result.extend)
        for session in self.sessions:
            if session.late.results:
                session.answers.append(session.late)
                session.late = pb.OpResults()

    def pass_time(self, seconds: float, silent: Session | None = None) -> None:
        """Let time pass, in which all give signs of life but one."""
        for _ in range(8):
            self.now += seconds / 8
            for session in self.sessions:
                if session is not silent and session.alive:
                    session.send(session.renewal()[0])
                    self.deliver(session)
            if not self.is_abandoned:
                self.cache.expire(now=self.now)
                self.settle()

    def die(self) -> None:
        """End the service without a word."""
        self.is_abandoned = True
        for session in self.sessions:
            session.lose(ServiceUnavailable("the service is gone"))

    def cut(self, session: Session) -> None:
        """End a session whose process lives, and may still write."""
        session.lose(ServiceUnavailable("the stream broke"))
        session.tickets.clear()
        self.cache.detach(session.worker, now=self.now, gone=False)
        self.settle()

    def end(self, session: Session) -> None:
        """End a process that has a session, and all that it holds."""
        session.lose(ServiceUnavailable("this process has ended"))
        session.tickets.clear()
        self.cache.worker_gone(session.worker, now=self.now)
        self.settle()

    def check_idle(self) -> None:
        """Assert that nobody holds anything any more."""
        self.cache.check()
        snapshot = self.cache.snapshot(now=self.now)
        held = (snapshot.num_leases, snapshot.private, snapshot.quarantined, snapshot.waiting)
        assert held == (0, 0, 0, 0), "leases, private and quarantined blocks, waiting requests"
        assert not self.cache.flights()


def answer_to(tokens: list[int]) -> int:
    """What the model says next: any function of all that came before."""
    return (sum(tokens) * 31 + len(tokens)) % 7


def alone(prompt: list[int], num_new: int) -> list[int]:
    """What an engine without a cache says."""
    tokens = list(prompt)
    for _ in range(num_new):
        tokens.append(answer_to(tokens))
    return tokens


@dataclass(eq=False)
class Job:
    """One request of an engine."""

    name: str
    prompt: list[int]
    num_new: int
    salt: str = ""
    media: tuple[MediaItem, ...] = ()
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    is_done: bool = False

    @property
    def left(self) -> int:
        return len(self.prompt) + self.num_new - len(self.tokens)

    def seen(self, upto: int) -> tuple[int, ...]:
        """What its keys and values depend on: its tokens, and the images in their places."""
        seen = list(self.tokens)
        for offset, length, digest in self.media:
            for at in range(length):
                seen[offset + at] = int.from_bytes(digest) * length + at
        return tuple(seen[:upto])


class Engine:
    """A scheduler with continuous batching and chunked prefill, as an engine has it.

    A step is begun and finished apart: between the two its tokens are being computed.
    """

    def __init__(self, machine: Machine, name: str, bounds: Bounds, max_running: int = 3) -> None:
        self.machine, self.max_running = machine, max_running
        self.session = machine.attach(name)
        self.leases = Leases(self.session, bounds)
        machine.deliver(self.session)
        self.waiting: deque[Job] = deque()
        self.running: list[Job] = []
        self.in_step: list[tuple[Job, Held, int]] = []
        self.num_preempted = self.num_dropped = 0

    def add(self, job: Job) -> None:
        job.tokens = list(job.prompt)
        self.waiting.append(job)
        if self.leases.has_window:
            self.ask(job)

    def ask(self, job: Job) -> None:
        self.leases.ask(job.name, job.tokens, left=job.left, salt=job.salt or None, media=job.media)

    def abort(self, job: Job) -> None:
        for queue in (self.waiting, self.running):
            if job in queue:
                queue.remove(job)
        held = self.leases.pop(job.name)
        self.in_step = [one for one in self.in_step if one[0] is not job]
        self.leases.end(held)
        self.leases.flush()

    def preempt(self, job: Job) -> None:
        self.num_preempted += 1
        self.running.remove(job)
        self.waiting.appendleft(job)
        self.leases.settle(job.name, job.computed, job.tokens, is_last=True)
        self.leases.end(self.leases.pop(job.name))

    def evict_lost(self) -> None:
        for name in self.leases.lost():
            job = next(one for one in self.running if one.name == name)
            self.num_dropped += 1
            self.in_step = [one for one in self.in_step if one[0] is not job]
            self.preempt(job)

    def begin(self, chunk: int = 8) -> None:
        """Decide what is computed, and compute it."""
        assert not self.in_step
        self.evict_lost()
        for job in list(self.running):
            if job not in self.running:
                continue
            room = self.leases.room(job.name, min(job.computed + chunk, len(job.tokens)))
            if room is Room.THERE:
                self._schedule(job, chunk)
            elif room is Room.MISSING:
                self.preempt(self.running[-1])  # whoever came last; it may be this one
        for job in list(self.waiting):
            if len(self.running) >= self.max_running:
                break
            if job.name not in self.leases.held:
                if not self.leases.has_window and job is not self.waiting[0]:
                    continue
                self.ask(job)
            held = self.leases.ready(job.name)
            if held is None:
                continue
            self.waiting.remove(job)
            self.running.append(job)
            self.leases.start(job.name)
            job.computed = held.num_cached
            self._schedule(job, chunk)
        self.leases.flush()
        self.in_step = [one for one in self.in_step if one[0] in self.running]
        for job, held, upto in self.in_step:
            self._compute(job, held, upto)

    def _schedule(self, job: Job, chunk: int) -> None:
        upto = min(job.computed + chunk, len(job.tokens))
        if self.leases.has_room(job.name, upto):
            self.in_step.append((job, self.leases.held[job.name], upto))

    def _compute(self, job: Job, held: Held, upto: int) -> None:
        memory, size = self.machine.memory, self.machine.size
        space = (job.salt,)
        for copy in held.copies:
            memory.copy(copy.src, copy.dst, size)  # whole pages
        held.copies = ()
        table = held.table
        for position in range(job.computed, upto):
            slot = table[position // size], position % size
            memory.write(*slot, (space, job.seen(position + 1)))

    def finish(self) -> None:
        """Take what was computed: what was read under a lease that is over counts no more."""
        self.evict_lost()
        for job, held, upto in self.in_step:
            table = held.table
            wrong = self.machine.memory.wrong(table, (job.salt,), job.seen(upto))
            assert not wrong, f"{job.name}: {wrong}"
            job.computed = upto
            if upto == len(job.tokens):
                job.tokens.append(answer_to(job.tokens))
            if not job.left:
                job.is_done = True
                self.running.remove(job)
                self.leases.settle(job.name, upto, job.tokens, is_last=True)
                self.leases.end(self.leases.pop(job.name))
                assert job.tokens == alone(job.prompt, job.num_new)
            else:
                self.leases.settle(job.name, upto, job.tokens)
        self.in_step = []
        self.leases.flush()

    def step(self, times: int = 1) -> None:
        """Make a step, or some; the service hears of each, and is heard."""
        for _ in range(times):
            self.begin()
            self.machine.deliver(self.session)
            self.finish()
            self.machine.deliver(self.session)

    def run(self, most: int = 2000) -> None:
        """Make steps until all is done."""
        for _ in range(most):
            if not self.running and not self.waiting:
                return
            self.step()
        raise AssertionError(f"{len(self.waiting)} wait, {len(self.running)} run: no end is near")

    def close(self) -> None:
        """Give back what is held to the end."""
        if self.leases._spare_lease is not None and self.session.alive:
            batch = self.session.batch()
            batch.release(self.leases._spare_lease)
            self.session.post(batch)  # type: ignore[arg-type]
            self.machine.deliver(self.session)
