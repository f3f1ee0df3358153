"""A session without I/O, beside a cache in process: every order in which things can happen.

```
emit ──► sent ── serve ──► answers ── receive ──► replies
```
A walk is a word of these steps: `s` the service takes the next message, `r` the client takes the
next answers, `x` the caller gives up, `g` somebody else gives room back, `l` the stream is lost,
`p` the caller asks again.  `s` and `r` do nothing where nothing is on its way; of walks that differ
in such steps only, one is gone.  However a walk went, it ends with everything delivered: then the
service has the leases that somebody holds, and no others.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest

from core.innards import table_of
from prefixcache.client import codec
from prefixcache.client.lease import LeaseState, lifetime_of
from prefixcache.client.ops import BatchOps, Reply
from prefixcache.client.progress import Told
from prefixcache.client.session_core import SessionCore
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError, LeaseExpired, ServiceUnavailable
from prefixcache.types import (
    Attachment,
    Grant,
    LeaseId,
    Namespace,
    PoolHandle,
    TicketId,
    Waiting,
    WorkerId,
    pack,
)
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT

NUM_BLOCKS, BLOCK_SIZE = 32, 4
NAMESPACE = Namespace("model")
WORKER, OTHER = WorkerId("w1"), WorkerId("w2")
NOW = 100.0


class Service:
    """A cache, and the ops of one session: as `grpc/session.py` serves them, nothing else."""

    def __init__(self, ttl_s: float = 1e6, clock: Callable[[], float] = lambda: NOW) -> None:
        self.cache = PrefixCache(NUM_BLOCKS, BLOCK_SIZE, ttl_s=ttl_s)
        self.clock = clock
        for worker, first in ((WORKER, 1000), (OTHER, 2000)):
            self.cache.attach(worker, NAMESPACE, first_lease=first, now=clock())
        self.tickets: dict[int, TicketId] = {}
        self.answers: deque[pb.OpResults] = deque()

    def serve(self, message: bytes) -> None:
        results = pb.OpResults()
        for op in pb.OpBatch.FromString(message).ops:
            self.settle(results)
            result = pb.OpResult(id=op.id)
            verb: Any = op.WhichOneof("op")
            try:
                answer = self.run(op.id, verb, getattr(op, verb))
            except CacheError as error:
                codec.write_error(error, result.error)
            else:
                if isinstance(answer, Waiting):
                    self.tickets[op.id] = answer.ticket
                    continue
                getattr(result, verb).SetInParent()
                codec.WRITE[verb](answer, getattr(result, verb))
            results.results.append(result)
        self.settle(results)
        self.answers.append(results)

    def run(self, op_id: int, verb: str, request: Any) -> Any:
        cache, lease = self.cache, LeaseId(getattr(request, "lease", 0))
        match verb:
            case "acquire":
                return cache.acquire(
                    WORKER,
                    NAMESPACE,
                    request.tokens,
                    wait_s=request.wait_s,
                    request_id=request.request_id,
                    now=self.clock(),
                )
            case "cancel":
                ticket = self.tickets.pop(request.op, None)
                return None if ticket is None else cache.cancel(WORKER, ticket, now=self.clock())
            case "extend":
                wait_s = request.wait_s
                return cache.extend(
                    WORKER, lease, request.num_tokens, wait_s=wait_s, now=self.clock()
                )
            case "fork":
                return cache.fork(WORKER, lease, request.count, now=self.clock())
            case "commit":
                return cache.commit(WORKER, lease, request.num_tokens, b"", now=self.clock())
            case "truncate":
                return cache.truncate(WORKER, lease, request.num_tokens, now=self.clock())
            case "release":
                return cache.release(WORKER, lease, now=self.clock())
            case "lookup":
                return cache.lookup(NAMESPACE, request.tokens)
            case "renew":
                cache.renew(WORKER, now=self.clock())
                return cache.num_in_line
        raise AssertionError(verb)

    def settle(self, results: pb.OpResults) -> None:
        for ticket, outcome in self.cache.take_outcomes():
            asked = [op_id for op_id, waits in self.tickets.items() if waits == ticket]
            for op_id in asked:  # none, if it was cancelled
                del self.tickets[op_id]
                result = results.results.add(id=op_id)
                if isinstance(outcome, CacheError):
                    codec.write_error(outcome, result.error)
                elif isinstance(outcome, Grant):
                    codec.WRITE["acquire"](outcome, result.acquire)
                else:
                    codec.WRITE["extend"](outcome, result.extend)

    def leases(self) -> set[LeaseId]:
        return {i.lease for i in self.cache.snapshot(now=self.clock()).leases if i.worker == WORKER}


class Client(SessionCore[LeaseState]):
    """A session whose messages are in a queue."""

    def __init__(self, ttl_s: float = 1e6) -> None:
        super().__init__(None)  # type: ignore[arg-type]  # it has no use for its connection here
        self.sent: deque[bytes] = deque()
        pool = PoolHandle("none", "", NUM_BLOCKS, BLOCK_SIZE, LAYOUT, 1, 0)
        self.attachment = Attachment(WORKER, pool, ttl_s)
        self._max_bytes, self._max_ops = 1 << 20, 1000

    def emit(self, message: bytes | None) -> None:
        if message is not None:
            self.sent.append(message)

    def hang_up(self) -> None:
        pass

    lease_type = LeaseState


class Scene:
    """One client that has a lease, and another worker that has nearly all the room."""

    def __init__(self, ttl_s: float = 1e6, clock: Callable[[], float] = lambda: NOW) -> None:
        self.service, self.client = Service(ttl_s, clock), Client(ttl_s)
        self.is_lost = False
        self.crowd = self.service.cache.acquire(
            OTHER, NAMESPACE, pack(range(500, 600)), now=clock()
        )
        self.lease = self.asked(lambda batch: batch.acquire(range(10)))
        self.batch = BatchOps(self.client)

    def asked(self, ask: Callable[[BatchOps[LeaseState]], Any]) -> Any:
        """What a call gives that nothing disturbs."""
        batch = BatchOps(self.client)
        reply = ask(batch)
        self.client.send(batch.step)
        self.deliver()
        return reply.result()

    def ask(self, *asks: Callable[[Scene, BatchOps[LeaseState]], Any]) -> None:
        self.batch = BatchOps(self.client)
        for ask in asks:
            ask(self, self.batch)
        self.client.send(self.batch.step)

    def step(self, what: str) -> bool:
        """Make one step; say whether there was anything to do."""
        service, client = self.service, self.client
        if what == "s" and client.sent and not self.is_lost:
            service.serve(client.sent.popleft())
        elif what == "r" and service.answers and not self.is_lost:
            client.receive(service.answers.popleft())
        elif what == "x":
            client.abandon(self.batch.step.replies)
        elif what == "g":
            service.cache.release(OTHER, self.crowd.lease, now=service.clock())
            service.settle(late := pb.OpResults())
            service.answers.append(late)
        elif what == "l":
            client.lose(ServiceUnavailable("lost"))
            self.is_lost = True
        else:
            return False
        return True

    def deliver(self) -> None:
        while any([self.step("s"), self.step("r")]):
            pass

    def check(self, held: list[LeaseState]) -> None:
        """After everything is delivered: the service has what is held, and nothing else."""
        self.service.cache.check()
        assert not self.client._pending
        assert not self.client._entrusted
        if self.is_lost:
            return
        assert self.service.leases() == {lease.id for lease in held}
        for lease in held:
            lease.check()
            assert lease.block_table == table_of(self.service.cache, WORKER, lease.id, NOW)


def walks(letters: str) -> Iterator[str]:
    """Every order of these steps, each once."""
    return iter(sorted({"".join(order) for order in itertools.permutations(letters)}))


Ask = Callable[[Scene, BatchOps[LeaseState]], Any]


def walked(letters: str, asks: tuple[Ask, ...], max_ops: int = 1000) -> Iterator[tuple[str, Scene]]:
    """The scenes after all walks of these steps, with what was done; of the same ones, one."""
    does: dict[str, bool] = {}
    """After what was done, whether the last letter does anything: it does so every time."""
    seen: set[str] = set()
    for walk in walks(letters):
        done = ""
        for what in walk:
            done += what * does.get(done + what, True)
        if done in seen:
            continue
        scene = Scene()
        scene.client._max_ops = max_ops
        scene.ask(*asks)
        done = ""
        for what in walk:
            does[done + what] = scene.step(what)
            done += what * does[done + what]
        if done not in seen:
            seen.add(done)
            yield done, scene


ASKS: dict[str, tuple[Ask, ...]] = {
    "acquire": (lambda s, b: b.acquire(range(50, 60)),),
    "acquire more than there is": (lambda s, b: b.acquire(range(50, 120)),),
    "acquire and wait for a prefix": (lambda s, b: b.acquire(range(500, 520), wait_s=9.0),),
    "acquire and wait for room": (lambda s, b: b.acquire(range(50, 120), wait_s=9.0),),
    "commit": (lambda s, b: b.commit(s.lease, 8),),
    "extend": (lambda s, b: b.extend(s.lease, 17),),
    "extend and wait": (lambda s, b: b.extend(s.lease, 70, wait_s=9.0),),
    "truncate": (lambda s, b: b.truncate(s.lease, 3),),
    "fork": (lambda s, b: b.fork(s.lease, 3),),
    "release": (lambda s, b: b.release(s.lease),),
    "lookup": (lambda s, b: b.lookup(range(10)),),
    "renew": (lambda s, b: b.step.renew(Told()),),
    "acquire, extend, fork": (
        lambda s, b: b.acquire(range(10)),
        lambda s, b: b.extend(s.lease, 20),
        lambda s, b: b.fork(s.lease, 3),
    ),
    "acquire what gives room to the wait behind it": (
        lambda s, b: b.acquire(range(50, 62)),
        lambda s, b: b.extend(s.lease, 24, wait_s=9.0),
    ),
    "wait twice, fork": (
        lambda s, b: b.acquire(range(50, 100), wait_s=9.0),
        lambda s, b: b.extend(s.lease, 60, wait_s=9.0),
        lambda s, b: b.fork(s.lease, 2),
    ),
    "grow, roll back, release": (
        lambda s, b: b.extend(s.lease, 70, wait_s=9.0),
        lambda s, b: b.truncate(s.lease, 3),
        lambda s, b: b.release(s.lease),
    ),
}


def remaining(scene: Scene) -> list[LeaseState]:
    return [] if scene.lease.released else [scene.lease]


@pytest.mark.walk
@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
@pytest.mark.parametrize("max_ops", [1000, 1], ids=["in one message", "in a message each"])
def test_whoever_gives_up_leaves_nothing_behind_in_whatever_order(
    asks: tuple[Ask, ...], max_ops: int
) -> None:
    for _, scene in walked("ssrrxg", asks, max_ops):
        scene.deliver()
        scene.check(remaining(scene))


@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_whoever_waits_gets_what_the_service_has(
    asks: tuple[Ask, ...],
) -> None:
    for _, scene in walked("ssrrg", asks):
        scene.deliver()
        given: list[LeaseState] = []
        for reply in scene.batch.step.replies:
            assert reply.done
            if reply.error is None:
                answer = reply.result()
                leases = answer if isinstance(answer, list) else [answer]
                given += [lease for lease in leases if isinstance(lease, LeaseState)]
        scene.check([*remaining(scene), *given])


@pytest.mark.walk
@pytest.mark.parametrize("asks", ASKS.values(), ids=ASKS)
def test_when_the_stream_is_lost_everything_is_answered(
    asks: tuple[Ask, ...],
) -> None:
    for walk, scene in walked("ssrxgl", asks):
        assert all(reply.done or reply.is_abandoned for reply in scene.batch.step.replies), walk
        scene.check([])


# ------------------------------------------------------------------------- the same request, again


def test_giving_up_a_repeated_request_leaves_the_lease_to_whom_it_was_granted() -> None:
    for walk in walks("ssrrx"):
        scene = Scene()
        held = scene.asked(lambda batch: batch.acquire(range(50, 60), request_id="r"))
        scene.ask(lambda s, b: b.acquire(range(50, 60), request_id="r"))
        for what in walk:
            scene.step(what)
        scene.deliver()
        scene.check([scene.lease, held])


@pytest.mark.parametrize("wait_s", [0.0, 9.0])
def test_whoever_gives_up_and_asks_again_has_the_lease(wait_s: float) -> None:
    """The first answer is given back when the second one is on its way: it is of the same lease."""
    for walk in walks("ssrrxp"):
        scene = Scene()
        scene.ask(lambda s, b: b.acquire(range(50, 60), wait_s=wait_s, request_id="r"))
        first = again = scene.batch
        for what in walk:
            if what == "p":
                again = BatchOps(scene.client)
                reply = again.acquire(range(50, 60), request_id="r")
                scene.client.send(again.step)
            else:
                scene.batch = first
                scene.step(what)
        scene.deliver()
        scene.check([scene.lease, reply.result()])


def test_whoever_gives_up_both_has_nothing() -> None:
    for walk in walks("ssrrxx"):
        scene = Scene()
        batches = [BatchOps(scene.client), BatchOps(scene.client)]
        for batch in batches:
            batch.acquire(range(50, 60), request_id="r")
            scene.client.send(batch.step)
        for what in walk:
            if what == "x":
                scene.batch = batches.pop()
            scene.step(what)
        scene.deliver()
        scene.check([scene.lease])


def test_when_the_repetition_is_refused_the_lease_of_the_first_is_given_back() -> None:
    """It has another prompt under the same number: its answer brings no lease."""
    for walk in walks("ssrrxp"):
        scene = Scene()
        scene.ask(lambda s, b: b.acquire(range(50, 60), request_id="r"))
        first = scene.batch
        for what in walk:
            if what == "p":
                again = BatchOps(scene.client)
                reply = again.acquire(range(70, 80), request_id="r")
                scene.client.send(again.step)
            else:
                scene.batch = first
                scene.step(what)
        scene.deliver()
        if reply.error is None:  # the first one was given back before it was asked
            scene.check([scene.lease, reply.result()])
        else:
            with pytest.raises(CacheError, match="request id"):
                reply.result()
            scene.check([scene.lease])


def test_a_lease_that_was_given_back_says_so() -> None:
    scene = Scene()
    scene.ask(lambda s, b: b.acquire(range(50, 60)))
    scene.deliver()
    lease = scene.batch.step.replies[0].result()
    scene.step("x")
    with pytest.raises(LeaseExpired, match="was released"):
        lease.check()


# ------------------------------------------------------------------------ until when it lives

TTL_S = 10.0


class Hours:
    """A clock that goes on when a walk says so, for the client and for the service."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = NOW
        for module in ("lease", "ops", "session_core"):
            monkeypatch.setattr(f"prefixcache.client.{module}.time", self)

    def monotonic(self) -> float:
        return self.now


def sign(scene: Scene) -> None:
    step, _ = scene.client.renewal()
    scene.client.send(step)


def test_who_waited_through_a_gap_between_signs_of_life_may_use_what_he_is_granted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hours = Hours(monkeypatch)
    scene = Scene(TTL_S, hours.monotonic)
    scene.ask(lambda s, b: b.acquire(range(50, 120), wait_s=99.0))
    scene.deliver()
    hours.now += 2 * TTL_S  # nobody on this machine had a turn
    scene.service.cache.renew(OTHER, now=hours.now)
    sign(scene)
    sent_at = hours.now
    hours.now += 1.0
    scene.deliver()
    scene.step("g")
    hours.now += 1.0
    scene.deliver()
    lease = scene.batch.step.replies[0].result()
    lease.check()
    assert lease.deadline == sent_at + lifetime_of(TTL_S)


@pytest.mark.parametrize("seed", range(8))
def test_no_lease_lives_longer_for_the_client_than_for_the_service(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signs of life, requests that wait, repeated ones and answers in any order, with any delay."""
    random, num_alive = Random(seed), 0
    for _ in range(60):
        hours = Hours(monkeypatch)
        scene = Scene(TTL_S, hours.monotonic)
        asked: list[Reply[Any]] = []
        for what in random.choices("ssrrrgntteapf", k=40):
            if what == "n":
                sign(scene)
            elif what == "t":
                hours.now += random.choice((0.5, 3.0, 8.0))
                scene.service.cache.renew(OTHER, now=hours.now)
            elif what == "e":
                scene.service.cache.expire(now=hours.now)
                scene.service.settle(late := pb.OpResults())
                scene.service.answers.append(late)
            elif what in "apf":
                batch = BatchOps(scene.client)
                if what == "a":
                    asked.append(
                        batch.acquire(range(50, 50 + random.choice((10, 70))), wait_s=99.0)
                    )
                elif what == "p":
                    asked.append(batch.acquire(range(8), request_id="r"))
                elif scene.client.leases:
                    parent = min(scene.client.leases, key=lambda lease: lease.id)
                    asked.append(batch.fork(parent, 2))
                scene.client.send(batch.step)
            else:
                scene.step(what)
            given = {scene.lease.id: scene.lease}
            for reply in asked:
                if reply.done and reply.error is None:
                    answer = reply.result()
                    for lease in answer if isinstance(answer, list) else [answer]:
                        given[lease.id] = lease
            leases = scene.service.cache.snapshot(now=hours.now).leases
            left_s = {info.lease: info.expires_in_s for info in leases}
            for lease in given.values():
                if lease.deadline >= hours.now:
                    assert lease.deadline - hours.now < left_s[lease.id]
                    num_alive += 1
    assert num_alive > 300
