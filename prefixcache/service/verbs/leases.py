"""The verbs of a lease, within the limits of the service."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import suppress
from dataclasses import dataclass
from time import monotonic
from typing import Any

from prefixcache.client import codec
from prefixcache.client.codec.leases import write_fork
from prefixcache.core.cache import PrefixCache
from prefixcache.core.lessor import MOST_EVICTED
from prefixcache.errors import CacheError, InvalidRequest, Unsupported
from prefixcache.service.verbs.base import Verbs
from prefixcache.service.worker import Worker
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    Again,
    Committed,
    Grant,
    LeaseId,
    Namespace,
    Released,
    TableUpdate,
    Waiting,
)
from prefixcache.v1 import prefixcache_pb2 as pb


@dataclass(frozen=True, slots=True)
class Forked:
    """Answer of `fork`, and in which form the caller reads it."""

    children: tuple[Grant, ...]
    has_shared_table: bool


class LeaseVerbs(Verbs):
    """Everything that a lease goes through."""

    def clear_way(
        self, worker: Worker, verb: str | None, request: Any
    ) -> Generator[None, None, None] | None:
        """Give the steps to take before a request that may evict very many blocks.

        In one go those would keep everybody waiting.  None, in O(1), for all that cannot.
        """
        if verb == "acquire":
            num_tokens = len(request.tokens) // TOKEN_BYTES + request.reserve
        elif verb == "extend":
            num_tokens = request.num_tokens
        else:
            return None
        cache = self.backing.cache
        if cache is None or num_tokens <= MOST_EVICTED * cache.block_size:
            return None
        return self._clear_way(cache, worker, verb, request)

    def _clear_way(
        self, cache: PrefixCache, worker: Worker, verb: str, request: Any
    ) -> Generator[None, None, None]:
        """Evict a few hundred blocks a step; whoever then makes the request is told what is wrong.

        Others may take what came free meanwhile: after twice as many as there are it is enough.
        """
        most = 2 * (cache.num_blocks // MOST_EVICTED + 1)
        with suppress(CacheError):
            for _ in range(most):
                if verb == "extend":
                    goes_on = cache.clear_way_to_extend(
                        worker.id, LeaseId(request.lease), request.num_tokens, now=monotonic()
                    )
                else:
                    goes_on = cache.clear_way(
                        worker.id,
                        self._named(worker, request),
                        request.tokens,
                        reserve=request.reserve,
                        request_id=request.request_id,
                        reuse=not request.recompute,
                        min_partial=request.min_partial,
                        now=monotonic(),
                    )
                if not goes_on:
                    return
                yield

    def acquire(self, worker: Worker, request: pb.AcquireRequest) -> Grant | Waiting:
        """Lease blocks for a prompt.

        Raises:
            InvalidRequest, NotFound, PoolExhausted: as the core says.
            Unsupported: segments, of a model or by a policy that no certificate allows.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        wait_s = request.wait_s
        request_id = request.request_id
        if wait_s:
            self._check_wait(worker, wait_s)
        namespace = self._named(worker, request)
        if not namespace.model:
            raise InvalidRequest("a namespace needs the name of a model")
        tokens, segments = request.tokens, None
        if request.HasField("segments"):
            segments = self._allowed(namespace, request.segments)
        answer = self._cache().acquire(
            worker.id,
            namespace,
            tokens,
            reserve=request.reserve,
            wait_s=wait_s,
            request_id=request_id,
            attached=not request.HasField("namespace"),
            reuse=not request.recompute,
            min_partial=request.min_partial,
            for_room=not request.not_for_room,
            segments=segments,
            now=monotonic(),
        )
        if self.recorder is not None:
            self.failures.spare("recording", self.recorder.record, namespace, tokens)
        return answer

    def _allowed(self, namespace: Namespace, message: pb.Again) -> Again:
        """Give the policy of a request for segments, which a certificate allows.

        Raises:
            Unsupported: none does.
        """
        certificates, handle = self.backing.certificates, self.backing.handle
        if certificates is None or handle is None:
            raise Unsupported(
                "this service gives no segments: serve with --segments, or ask without"
            )
        again = codec.read_again(message)
        certificates.refuse_beyond(namespace, handle.layout, again)
        return again

    def cancel(self, worker: Worker, request: pb.CancelRequest) -> None:
        """Give up waiting.  Idempotent: the outcome may have crossed it on the way."""
        self.cancel_ticket(worker, request.op)

    def cancel_ticket(self, worker: Worker, op_id: int) -> None:
        """Give up the waiting request that came as `op_id`.  Idempotent.

        The outcome of an `extend` that has its room already comes all the same.
        """
        ticket = worker.tickets.pop(op_id, None)
        if ticket is not None and self._cache().cancel(worker.id, ticket, now=monotonic()):
            self.deliveries.leave(ticket)

    def commit(self, worker: Worker, request: pb.CommitRequest) -> Committed:
        """Make computed KV visible to all."""
        now = monotonic()
        done = self._cache().commit(
            worker.id, LeaseId(request.lease), request.num_tokens, request.new_tokens, now=now
        )
        worker.committed_at = now
        return done

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

    def fork(self, worker: Worker, request: pb.ForkRequest) -> Forked:
        """Make children that share every block.

        Raises:
            InvalidRequest: too many at once, or more tables than an answer should carry.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        if request.count > self.settings.max_forks:
            raise InvalidRequest(
                f"{request.count} children in one fork, --max-forks allows "
                f"{self.settings.max_forks}"
            )
        cache, lease, now = self._cache(), LeaseId(request.lease), monotonic()
        if not request.shared_table:
            table = 4 * cache.num_committed_blocks(worker.id, lease, now=now)
            if (total := table * request.count) > self.settings.max_message:
                raise InvalidRequest(
                    f"{many(request.count, 'block table')} of {table:,} bytes are {total:,} bytes; "
                    f"an answer may have {self.settings.max_message:,} (--max-message). Set "
                    "`shared_table`, which tells the table once, or fork fewer at a time."
                )
        grants = cache.fork(worker.id, lease, request.count, now=now)
        return Forked(grants, request.shared_table)

    def write_fork(self, answer: Forked, message: pb.ForkResponse) -> None:
        """Fill `message` with the children."""
        write_fork(answer.children, message, shared=answer.has_shared_table)

    def truncate(self, worker: Worker, request: pb.TruncateRequest) -> TableUpdate:
        """Roll back."""
        return self._cache().truncate(
            worker.id, LeaseId(request.lease), request.num_tokens, now=monotonic()
        )

    def release(self, worker: Worker, request: pb.ReleaseRequest) -> Released:
        """End a lease, or those of a request; of what has ended by itself, end the quarantine."""
        if not request.request_id:
            return self._cache().release(worker.id, LeaseId(request.lease), now=monotonic())
        return self._release_granted(worker, request.request_id)

    def _release_granted(self, worker: Worker, request_id: str) -> Released:
        """End what an acquire or a fork was granted, which may be nothing.  O(leases)."""
        freed = 0
        for verb in ("acquire", "fork"):
            leases = self.granted(worker, verb, request_id)
            if leases:
                self.forget_answer(worker, verb, request_id)
            for lease in leases:
                with suppress(CacheError):  # a child may be long forgotten
                    freed += self._cache().release(worker.id, lease, now=monotonic()).num_freed
        return Released(freed)

    def _check_wait(self, worker: Worker, wait_s: float) -> None:
        if not 0 <= wait_s <= self.settings.max_wait:
            limit = f"from 0 to {self.settings.max_wait:g} s (--max-wait)"
            raise InvalidRequest(f"a request may wait {limit}, not {wait_s:g}")
        if len(worker.tickets) >= self.settings.max_waiting:
            raise InvalidRequest(
                f"{worker.name} has {many(len(worker.tickets), 'request')} that wait, "
                "--max-waiting allows no more"
            )
