"""The verbs that look: lookup, explain, tree, check, the state of the whole.  Nothing changes."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from itertools import chain
from time import monotonic

import structlog

from prefixcache import __version__
from prefixcache.client import codec
from prefixcache.core.stats import NameBudget
from prefixcache.errors import InvalidRequest
from prefixcache.outline import Branch, Outline
from prefixcache.service.auth.identity import Identity
from prefixcache.service.auth.redaction import redact
from prefixcache.service.shadow.caches import write_shadows
from prefixcache.service.turns import let_go
from prefixcache.service.verbs.base import Verbs
from prefixcache.service.worker import Asker, Worker
from prefixcache.types import Explanation, Lookup, Namespace, Snapshot
from prefixcache.v1 import prefixcache_pb2 as pb

MAX_BRANCHES = 20_000
"""Branches of one outline."""

MAX_TREES = 1000
"""Namespaces of one outline, the largest or hottest; it says how many there are besides."""

MOST_TOLD_BYTES = 1 << 20
"""Of a recent request's prompt: its first 262,144 tokens."""

_PAUSE_EVERY = 16
"""Branches that are copied in one go."""
_ROWS_IN_ONE_GO = 16
"""Workers or flights that are told in one go, the namespaces counted that must be looked at."""
_CHECKED_IN_ONE_GO = 500
"""Runs and leases, unless the caller lets everybody wait for more: 15 ms."""
_MOST_FAILURE = 100_000
"""Characters of a failed check, the tree included."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Seen:
    """Answer of `snapshot`, and who asked: not everybody sees all of it."""

    snapshot: Snapshot
    identity: Identity


class InspectVerbs(Verbs):
    """The verbs that only look."""

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
        if isinstance(asker, Worker) or request.HasField("namespace"):
            may_see: Callable[[Namespace], bool] = self._named(asker, request).__eq__
        else:

            def may_see(namespace: Namespace) -> bool:
                return not namespace.salt and asker.identity.sees(namespace)

        told = self._cache().explain_request(request.request_id, may_see, now=monotonic())
        if told.past is None or len(told.past.tokens) <= MOST_TOLD_BYTES:
            return told
        return replace(told, past=replace(told.past, tokens=told.past.tokens[:MOST_TOLD_BYTES]))

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
        outline = self._cache().outline(
            chosen,
            order=codec.read_order(request.order),
            max_branches=request.max_branches or 1000,
            max_depth=request.max_depth or None,
            ghosts=not request.without_ghosts,
            sees=None if asker.identity.sees_all else asker.identity.sees,
            max_namespaces=MAX_TREES,
            now=monotonic(),
        )
        return outline if request.HasField("namespace") else without_salted_tokens(outline)

    def write_tree(self, answer: Outline, message: pb.TreeResponse) -> Generator[None, None, None]:
        """Fill `message`, in steps; free what nobody else holds."""
        yield from codec.write_outline(answer, message)
        branches = list(chain.from_iterable([tree.branches for tree in answer.namespaces]))
        del answer
        yield from let_go(branches)

    def check(
        self, asker: Asker, request: pb.CheckRequest
    ) -> Generator[None, None, pb.CheckResponse]:
        """Check every invariant, in steps if there is much to walk.

        Raises:
            PermissionDenied: only an admin may have it walked.
        """
        asker.identity.refuse_unless_admin("check the index")
        return self._checked(request)

    def _checked(self, request: pb.CheckRequest) -> Generator[None, None, pb.CheckResponse]:
        cache = self.backing.cache
        if cache is None:
            return pb.CheckResponse()
        started, counts = monotonic(), cache.counts(now=monotonic())
        answer = pb.CheckResponse(runs=counts.nodes)
        try:
            if counts.nodes + counts.num_leases <= (request.max_runs or _CHECKED_IN_ONE_GO):
                cache.check()
            else:
                found = yield from cache.check_in_steps()
                answer.runs = found.num_runs
                answer.left_out.extend(found.left_out)
        except AssertionError as error:
            answer.failure = str(error)[:_MOST_FAILURE]
            log.error("an invariant does not hold", failure=str(error).partition("\n")[0])
        answer.seconds = monotonic() - started
        return answer

    def snapshot(self, asker: Asker, request: pb.SnapshotRequest) -> Generator[None, None, Seen]:
        """Tell what the caller may see of the cache, in steps; zeros before a layout is known."""
        identity, cache = asker.identity, self.backing.cache
        if cache is None:
            return Seen(Snapshot(block_size=self.settings.block_size), identity)
        told = yield from cache.snapshot_in_steps(
            now=monotonic(),
            tenant=None if identity.admin else identity.tenant,
            sees=None if "*" in identity.models else identity.sees,
        )
        return Seen(told, identity)

    def write_snapshot(
        self, answer: Seen, message: pb.SnapshotResponse
    ) -> Generator[None, None, None]:
        """Fill `message` with what its caller may see, in steps; free what nobody else holds."""
        told, identity = answer.snapshot, answer.identity
        yield from codec.write_snapshot(told, message)
        rows = [*told.leases, *told.namespaces.values(), *told.pins, *told.quotas, *told.holdings]
        del answer, told
        yield from let_go(rows)
        yield from self._write_workers(identity, message)
        yield from self._write_flights(identity, message)
        self._write_watched(message)
        self._write_service(message.service)
        if not identity.sees_all:
            redact(message, identity)

    def _write_service(self, info: pb.ServiceInfo) -> None:
        info.version = __version__
        info.core = self.core
        info.pid = os.getpid()
        info.uptime_s = self.uptime_s
        info.listening.extend(self.listening)
        if self.backing.handle is not None:
            codec.write_pool(self.backing.handle, info.pool)
        info.memory_bytes = self.settings.memory
        info.policy = self.settings.policy
        info.partial = codec.PARTIALS[self.settings.partial]
        info.ttl_s = self.settings.ttl
        info.workers = len(self.workers)
        info.sessions = self.workers.num_streams
        info.draining = self.draining
        info.failures.update(self.failures.causes())
        if self.backing.state is not None:
            for name, value in self.backing.state.condition._asdict().items():
                setattr(info.state, name, value)
        if (disk := self.backing.disk) is not None:
            info.disk.folder = str(disk.path)
            info.disk.cold = disk.cold
            info.disk.found_blocks = disk.num_found
            info.disk.damaged_slots = disk.found.num_damaged
            info.disk.scan_s = disk.found.seconds

    def _write_watched(self, message: pb.SnapshotResponse) -> None:
        """Fill in what the service observes beside the cache."""
        for rate in self.sampler.rates():
            message.verbs.add(
                verb=rate.verb,
                count=rate.count,
                refused=rate.refused,
                per_s=rate.per_s,
                p50_s=rate.p50_s,
                p99_s=rate.p99_s,
            )
        message.requests_per_s = self.sampler.requests_per_s()
        if self.shadows is not None:
            write_shadows(self.shadows, message)

    def _write_workers(
        self, identity: Identity, message: pb.SnapshotResponse
    ) -> Generator[None, None, None]:
        """Tell of the workers all of whose namespaces the caller may see."""
        now, steps = monotonic(), 0
        for worker in self.workers.roll():
            steps += 1 if identity.sees_all else 1 + len(worker.namespaces)
            if steps >= _ROWS_IN_ONE_GO:
                steps = 0
                yield
            if not (identity.admin or worker.identity.tenant == identity.tenant):
                continue
            if not (identity.sees_all or all(map(identity.sees, worker.namespaces))):
                continue
            message.workers.add(**self.workers.status(worker, identity, now)._asdict())

    def _write_flights(
        self, identity: Identity, message: pb.SnapshotResponse
    ) -> Generator[None, None, None]:
        """Tell of the flights in namespaces that the caller may see."""
        cache = self.backing.cache
        if cache is None:
            return
        names = NameBudget()
        for number, flight in enumerate(cache.flights(), 1):
            if number % _ROWS_IN_ONE_GO == 0:
                yield
            if not (identity.sees(flight.namespace) and names.fit(flight.namespace)):
                continue
            info = message.flights.add(
                lease=flight.lease,
                worker=flight.worker,
                num_tokens=flight.num_tokens,
                num_committed=flight.num_committed,
                num_waiting=flight.num_waiting,
            )
            codec.show_namespace(flight.namespace, info.namespace)


def without_salted_tokens(
    steps: Generator[None, None, Outline],
) -> Generator[None, None, Outline]:
    """Draw an outline without the tokens behind a salt: only who names it may read them."""
    outline = yield from steps
    trees, num_copied = [], 0
    for tree in outline.namespaces:
        if tree.namespace.salt:
            branches: list[Branch] = []
            for branch in tree.branches:
                branches.append(replace(branch, tokens=b""))
                num_copied += 1
                if num_copied % _PAUSE_EVERY == 0:
                    yield
            tree = replace(tree, branches=tuple(branches))
        trees.append(tree)
    return replace(outline, namespaces=tuple(trees))
