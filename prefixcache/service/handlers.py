"""The verbs, once: unary calls and sessions are both served by these handlers.

A handler reads a request, passes the time and the worker to the core, and gives the core's answer.
Everything it does is synchronous and short.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, replace
from time import monotonic
from typing import TYPE_CHECKING, Any, TypeAlias

import structlog

from prefixcache import __version__
from prefixcache.client import codec, outlines, unary
from prefixcache.config import ServeSettings
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, NotFound, PoolExhausted, ServiceUnavailable
from prefixcache.outline import Outline
from prefixcache.service.events import EventLog
from prefixcache.service.holdings import Holdings
from prefixcache.service.identities import Identity
from prefixcache.service.meter import Meter
from prefixcache.service.pulse import Pulse
from prefixcache.service.recorder import Recorder
from prefixcache.service.shadows import Shadows, write_shadows
from prefixcache.service.sight import narrow
from prefixcache.service.waiting import WaitingLine
from prefixcache.service.workers import MAX_NAMESPACES, Asker, Worker, Workers
from prefixcache.types import (
    Committed,
    Ended,
    Explanation,
    Grant,
    LeaseId,
    Ledger,
    Lookup,
    Namespace,
    Pinned,
    QuotaInfo,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    Unpinned,
    Waiting,
)
from prefixcache.v1 import prefixcache_pb2 as pb

MAX_BRANCHES = 20_000
"""Branches of one outline."""

_CHECK_S = 30e-6
"""Seconds that a check takes per run, about."""
_MOST_FAILURE = 100_000
"""Characters of a failed check, the tree included."""

if TYPE_CHECKING:
    from prefixcache.service.tracing import Tracer

MAX_TEXT = 1024
"""Characters of a namespace's field or of a request id."""

Verb: TypeAlias = "tuple[Callable[[Any, Any], Any], Callable[[Any, Any], None]]"

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Attached:
    """Answer of `attach`, with what the wire says beside the core's part."""

    worker: Worker
    namespace_index: int


@dataclass(frozen=True, slots=True)
class Seen:
    """Answer of `snapshot`, and who asked: not everybody sees all of it."""

    snapshot: Snapshot
    identity: Identity


class Handlers:
    """All verbs of the service.

    `verbs[name]` is `(handler, write)`: `handler(worker, request)` gives an answer or raises a
    `CacheError`, `write(answer, message)` fills the response.  `acquire` may answer `Waiting`: then
    the outcome comes from the waiting line.
    """

    def __init__(
        self, settings: ServeSettings, holdings: Holdings, line: WaitingLine, workers: Workers
    ) -> None:
        self.settings = settings
        self.holdings = holdings
        self.line = line
        self.workers = workers
        self.draining = False
        self.listening: list[str] = []
        self.recorder: Recorder | None = None
        self.tracer: Tracer | None = None
        self.meter = Meter((*unary.RPCS, "cancel"))
        self.pulse = Pulse(holdings, self.meter)
        self.events = EventLog(holdings, settings.max_watchers)
        self.shadows = Shadows(settings, holdings) if settings.shadow else None
        self._started_at = monotonic()
        self.verbs: dict[str, Verb] = {
            name: (getattr(self, name), write) for name, write in codec.WRITE.items()
        }
        self.verbs["snapshot"] = (self.snapshot, self._write_snapshot)
        self.verbs["tree"] = (self.tree, outlines.write_outline)
        self.verbs["check"] = (self.check, lambda answer, message: message.CopyFrom(answer))

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return monotonic() - self._started_at

    # ------------------------------------------------------------------------ coming and going

    def attach(
        self,
        asker: Asker,
        request: pb.AttachRequest,
        hang_up: Callable[[], object] | None,
    ) -> Attached:
        """Let a worker, new or known, join a namespace.

        Raises:
            LayoutMismatch: the pool holds another layout.
            InvalidRequest: a text is too long, or the layout is none.
            NotFound: it names another tenant, or a model that it may not use.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        namespace = codec.read_namespace(request.namespace)
        check_texts((namespace.model, namespace.adapter, namespace.tenant, namespace.salt))
        if not namespace.model:
            raise InvalidRequest("a namespace needs the name of a model")
        namespace = asker.identity.own(namespace)
        known = [] if self.holdings.cache is None else self.holdings.cache.namespaces()
        if len(known) >= self.settings.max_namespaces and namespace not in known:
            raise PoolExhausted(
                f"{len(known):,} namespaces are known, --max-namespaces allows no more"
            )
        fresh = self.holdings.cache is None
        cache = self.holdings.settle_layout(codec.read_layout(request.layout))
        if fresh:
            log.info("pool created", sizes=str(self.holdings.sizes))
        if fresh and self.shadows is not None:
            self.shadows.begin()
        worker = (
            asker
            if isinstance(asker, Worker)
            else self.workers.join(asker.identity, request.name, request.pid, request.host, hang_up)
        )
        if namespace not in worker.namespaces:
            if len(worker.namespaces) >= MAX_NAMESPACES:
                raise InvalidRequest(f"a worker may attach {MAX_NAMESPACES} namespaces, no more")
            worker.namespaces.append(namespace)
        cache.attach(worker.id, namespace, now=monotonic())
        self.workers.finished(request.finished)
        return Attached(worker, worker.namespaces.index(namespace))

    def write_attach(self, answer: Attached, message: pb.AttachResponse) -> None:
        """Fill `message`."""
        message.worker = answer.worker.id
        message.worker_key = answer.worker.key
        if self.holdings.handle is not None:
            codec.write_pool(self.holdings.handle, message.pool)
        message.ttl_s = self.settings.ttl
        message.namespace_index = answer.namespace_index
        message.max_message_bytes = self.settings.max_message
        message.max_ops = self.settings.max_ops

    def detach(self, worker: Worker, request: pb.DetachRequest) -> Ended:
        """End a worker that says it writes to nothing any more."""
        return self.workers.leave(worker, gone=True)

    def renew(self, worker: Worker, request: pb.RenewRequest) -> None:
        """Take a sign of life."""
        self._cache().renew(worker.id, now=monotonic())

    # ------------------------------------------------------------------------ leases

    def acquire(self, worker: Worker, request: pb.AcquireRequest) -> Grant | Waiting:
        """Lease blocks for a prompt.

        Raises:
            InvalidRequest, NotFound, PoolExhausted: as the core says.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        wait_s = request.wait_s
        request_id = request.request_id
        if wait_s:
            self._check_wait(worker, wait_s)
        if len(request_id) > MAX_TEXT:
            check_texts((request_id,))
        self._refuse_lease_beyond_limit(1)
        namespace = self._attached_namespace(worker, request.namespace_index)
        tokens = request.tokens
        answer = self._cache().acquire(
            worker.id,
            namespace,
            tokens,
            reserve=request.reserve,
            wait_s=wait_s,
            request_id=request_id,
            now=monotonic(),
        )
        if self.recorder is not None:
            self.recorder.record(namespace, tokens)
        return answer

    def cancel(self, worker: Worker, request: pb.CancelRequest) -> None:
        """Give up waiting.  Idempotent: the outcome may have crossed it on the way."""
        self.cancel_ticket(worker, request.op)

    def cancel_ticket(self, worker: Worker, op_id: int) -> None:
        """Give up the waiting request that came as `op_id`.  Idempotent.

        The outcome of an `extend` that has its room already comes all the same.
        """
        ticket = worker.tickets.pop(op_id, None)
        if ticket is not None and self._cache().cancel(worker.id, ticket, now=monotonic()):
            self.line.leave(ticket)

    def commit(self, worker: Worker, request: pb.CommitRequest) -> Committed:
        """Make computed KV visible to all."""
        return self._cache().commit(
            worker.id,
            LeaseId(request.lease),
            request.num_tokens,
            request.new_tokens,
            now=monotonic(),
        )

    def extend(self, worker: Worker, request: pb.ExtendRequest) -> TableUpdate | Waiting:
        """Make room."""
        if not request.wait_s:
            return self._cache().extend(
                worker.id, LeaseId(request.lease), request.num_tokens, now=monotonic()
            )
        self._check_wait(worker, request.wait_s)
        return self._cache().extend(
            worker.id,
            LeaseId(request.lease),
            request.num_tokens,
            wait_s=request.wait_s,
            now=monotonic(),
        )

    def fork(self, worker: Worker, request: pb.ForkRequest) -> tuple[Grant, ...]:
        """Make children that share every block.

        Raises:
            InvalidRequest: too many at once.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        if request.count > self.settings.max_forks:
            raise InvalidRequest(
                f"{request.count} children in one fork, --max-forks allows "
                f"{self.settings.max_forks}"
            )
        self._refuse_lease_beyond_limit(request.count)
        return self._cache().fork(worker.id, LeaseId(request.lease), request.count, now=monotonic())

    def truncate(self, worker: Worker, request: pb.TruncateRequest) -> TableUpdate:
        """Roll back."""
        return self._cache().truncate(
            worker.id, LeaseId(request.lease), request.num_tokens, now=monotonic()
        )

    def release(self, worker: Worker, request: pb.ReleaseRequest) -> Released:
        """End a lease."""
        return self._cache().release(worker.id, LeaseId(request.lease), now=monotonic())

    # ------------------------------------------------------------------------ looking

    def lookup(self, asker: Asker, request: pb.LookupRequest) -> Lookup:
        """Say what `acquire` would find."""
        return self._cache().lookup(self._named(asker, request), request.tokens)

    def explain(self, asker: Asker, request: pb.ExplainRequest) -> Explanation:
        """Say why."""
        if request.request_id:
            answer = self._recount(asker, request)
        else:
            namespace = self._named(asker, request)
            answer = self._cache().explain(namespace, request.tokens, now=monotonic())
        shown = tuple(one for one in answer.elsewhere if asker.identity.sees(one[0]))
        return replace(answer, elsewhere=shown)

    def _recount(self, asker: Asker, request: pb.ExplainRequest) -> Explanation:
        """Explain a recent request, where the caller names its namespace, or that has no salt."""
        check_texts((request.request_id,))
        if isinstance(asker, Worker) or request.HasField("namespace"):
            may_see: Callable[[Namespace], bool] = self._named(asker, request).__eq__
        else:

            def may_see(namespace: Namespace) -> bool:
                return not namespace.salt and asker.identity.sees(namespace)

        return self._cache().recount(request.request_id, may_see, now=monotonic())

    def reset(self, asker: Asker, request: pb.ResetRequest) -> Reset:
        """Make a namespace forget."""
        namespace = self._named(asker, request)
        answer = self._cache().reset(namespace)
        log.info("reset", namespace=str(namespace), blocks=answer.num_blocks)
        return answer

    def pin(self, asker: Asker, request: pb.PinRequest) -> Pinned:
        """Let a prefix be evicted last.

        Raises:
            InvalidRequest: for longer than is allowed.
        """
        if not 0 < request.ttl_s <= self.settings.max_pin:
            raise InvalidRequest(
                f"a pin may last up to {self.settings.max_pin:g} s (--max-pin), not "
                f"{request.ttl_s:g}"
            )
        return self._cache().pin(
            self._named(asker, request), request.tokens, ttl_s=request.ttl_s, now=monotonic()
        )

    def unpin(self, asker: Asker, request: pb.UnpinRequest) -> Unpinned:
        """End one pin, or all of a namespace."""
        return self._cache().unpin(self._named(asker, request), request.tokens)

    def quota(self, asker: Asker, request: pb.QuotaRequest) -> QuotaInfo:
        """Tell, or set, what a tenant or a namespace may hold.

        Raises:
            InvalidRequest: it does not say whose.
            NotFound: it names another tenant.
            PermissionDenied: only an admin sets quotas.
        """
        scope: Namespace | str
        match request.WhichOneof("scope"):
            case "namespace":
                scope = codec.read_namespace(request.namespace)
                check_texts((scope.model, scope.adapter, scope.tenant, scope.salt))
            case "tenant":
                scope = request.tenant
                check_texts((scope,))
            case _:
                raise InvalidRequest("name a namespace or a tenant")
        identity = asker.identity
        if isinstance(scope, str):
            if not (identity.admin or identity.tenant in (None, scope)):
                raise NotFound(f"no tenant {scope!r}")
        else:
            scope = identity.own(scope)
        if not request.set:
            return self._cache().quota(scope)
        identity.refuse_unless_admin("set quotas")
        answer = self._cache().set_quota(
            scope,
            max_held=request.max_held if request.HasField("max_held") else None,
            guaranteed=request.guaranteed,
            now=monotonic(),
        )
        log.info("quota", scope=str(scope), max_held=answer.max_held, guaranteed=answer.guaranteed)
        return answer

    def snapshot(self, asker: Asker, request: pb.SnapshotRequest) -> Seen:
        """Tell the state of the cache; all zeros before the layout is known."""
        if self.holdings.cache is None:
            size = self.settings.block_size
            nothing = Snapshot(0, size, 0, 0, 0, 0, 0, 0, 0, (), 0, 0, 0, Ledger(), {})
            return Seen(nothing, asker.identity)
        return Seen(self.holdings.cache.snapshot(now=monotonic()), asker.identity)

    def check(self, asker: Asker, request: pb.CheckRequest) -> pb.CheckResponse:
        """Check every invariant.

        Raises:
            InvalidRequest: the trees have more runs than the caller wants to wait for.
            PermissionDenied: only an admin may hold everybody up.
        """
        asker.identity.refuse_unless_admin("check the index")
        if self.holdings.cache is None:
            return pb.CheckResponse()
        started, runs = monotonic(), self.holdings.cache.snapshot(now=monotonic()).nodes
        if runs > (most := request.max_runs or 20_000):
            raise InvalidRequest(
                f"a check of {runs:,} runs would hold everybody up for about "
                f"{runs * _CHECK_S:.1f} s; allow more than {most:,} if that is fine now"
            )
        failure = ""
        try:
            self.holdings.cache.check()
        except AssertionError as error:
            failure = str(error)
            log.error("an invariant does not hold", failure=failure.partition("\n")[0])
        return pb.CheckResponse(
            failure=failure[:_MOST_FAILURE], runs=runs, seconds=monotonic() - started
        )

    def tree(self, asker: Asker, request: pb.TreeRequest) -> Generator[None, None, Outline]:
        """Draw an outline of the trees, in steps.

        Raises:
            InvalidRequest: more branches than one message should carry.
        """
        if request.max_branches > MAX_BRANCHES:
            raise InvalidRequest(
                f"{request.max_branches:,} branches in one outline; the limit is {MAX_BRANCHES:,}"
            )
        chosen = None
        if request.HasField("namespace"):
            chosen = [self._named(asker, request)]
        elif not asker.identity.admin:
            chosen = [one for one in self._cache().namespaces() if asker.identity.sees(one)]
        return self._cache().outline(
            chosen,
            order=outlines.read_order(request.order),
            max_branches=request.max_branches or 1000,
            max_depth=request.max_depth or None,
            ghosts=not request.without_ghosts,
            now=monotonic(),
        )

    def _write_snapshot(self, answer: Seen, message: pb.SnapshotResponse) -> None:
        self._write_whole(answer.snapshot, message)
        if not answer.identity.admin:
            tenant = answer.identity.tenant
            roll = self.workers.roll()
            narrow(
                message, answer.identity, {one.id for one in roll if one.identity.tenant == tenant}
            )

    def _write_whole(self, answer: Snapshot, message: pb.SnapshotResponse) -> None:
        codec.write_snapshot(answer, message)
        self._write_watched(message)
        info = message.service
        info.version = __version__
        info.pid = os.getpid()
        info.uptime_s = self.uptime_s
        info.listening.extend(self.listening)
        if self.holdings.handle is not None:
            codec.write_pool(self.holdings.handle, info.pool)
        info.memory_bytes = self.settings.memory
        info.policy = self.settings.policy
        info.partial = codec.PARTIALS[self.settings.partial]
        info.ttl_s = self.settings.ttl
        info.workers = len(self.workers)
        info.sessions = self.workers.num_streams
        info.draining = self.draining
        if self.holdings.state is not None:
            for name, value in self.holdings.state.condition._asdict().items():
                setattr(info.state, name, value)

    def _write_watched(self, message: pb.SnapshotResponse) -> None:
        """Fill in what the service observes beside the cache."""
        for rate in self.pulse.rates():
            message.verbs.add(
                verb=rate.verb,
                count=rate.count,
                refused=rate.refused,
                per_s=rate.per_s,
                p50_s=rate.p50_s,
                p99_s=rate.p99_s,
            )
        message.requests_per_s = self.pulse.requests_per_s()
        now = monotonic()
        held = Counter(lease.worker for lease in message.leases)
        for worker in self.workers.roll():
            message.workers.add(
                worker=worker.id,
                pid=worker.pid,
                state=worker.state,
                since_s=now - worker.since,
                leases=held[worker.id] if worker.state == "attached" else 0,
                has_session=worker.hang_up is not None,
            )
        if self.shadows is not None:
            write_shadows(self.shadows, message)
        if self.holdings.cache is None:
            return
        vitals = self.holdings.cache.vitals(now=now)
        message.flights_saved = sum(account.joins for account in vitals.accounts.values())
        message.overshot = vitals.overshot
        for flight in self.holdings.cache.flights():
            info = message.flights.add(
                lease=flight.lease,
                worker=flight.worker,
                num_tokens=flight.num_tokens,
                num_committed=flight.num_committed,
                num_waiting=flight.num_waiting,
            )
            codec.write_namespace(flight.namespace, info.namespace)
        if vitals.eviction_age_s is not None:
            message.eviction_age_s = vitals.eviction_age_s

    # ------------------------------------------------------------------------ shared by verbs

    def _cache(self) -> PrefixCache:
        cache = self.holdings.cache
        if cache is None:
            raise NotFound(
                "nothing is stored: no worker has attached, and the service was started without "
                "--layout or --model"
            )
        return cache

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise ServiceUnavailable("the service is draining: it gives no new leases")

    def _refuse_lease_beyond_limit(self, count: int) -> None:
        out = self._cache().num_leases
        if out + count > self.settings.max_leases:
            raise PoolExhausted(
                f"{out:,} leases are out and {count:,} more are asked for; --max-leases allows "
                f"{self.settings.max_leases:,}",
                retry_after_s=self.settings.ttl,
            )

    def _check_wait(self, worker: Worker, wait_s: float) -> None:
        if not 0 <= wait_s <= self.settings.max_wait:
            limit = f"from 0 to {self.settings.max_wait:g} s (--max-wait)"
            raise InvalidRequest(f"a request may wait {limit}, not {wait_s:g}")
        if len(worker.tickets) >= self.settings.max_waiting:
            raise InvalidRequest(
                f"{len(worker.tickets)} requests of {worker.id} are waiting, --max-waiting allows "
                "no more"
            )

    def _named(self, asker: Asker, request: Any) -> Namespace:
        if request.HasField("namespace"):
            namespace = codec.read_namespace(request.namespace)
            check_texts((namespace.model, namespace.adapter, namespace.tenant, namespace.salt))
            return asker.identity.own(namespace)
        if not isinstance(asker, Worker):
            raise InvalidRequest("name a namespace, or the worker that has attached it")
        return self._attached_namespace(asker, request.namespace_index)

    @staticmethod
    def _attached_namespace(worker: Worker, index: int) -> Namespace:
        try:
            return worker.namespaces[index]
        except IndexError:
            raise NotFound(
                f"{worker.id} has attached {len(worker.namespaces)} namespaces, there is none at "
                f"index {index}"
            ) from None


def check_texts(texts: Iterable[str]) -> None:
    """Refuse texts that are too long to keep.

    Raises:
        InvalidRequest: one is; the message has the limit.
    """
    for text in texts:
        if len(text) > MAX_TEXT:
            raise InvalidRequest(f"a text of {len(text):,} characters; the limit is {MAX_TEXT:,}")
