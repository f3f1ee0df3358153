"""The verbs of workers: attach, detach, renew."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from time import monotonic
from typing import Final

import structlog

from prefixcache.client import codec
from prefixcache.errors import InvalidRequest
from prefixcache.service.verbs.base import Verbs
from prefixcache.service.verbs.request_texts import check_texts
from prefixcache.service.worker import Asker, Worker
from prefixcache.types import Ended, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb

MOST_FINISHED: Final = 1024
"""Lost workers that one attach speaks for."""

_LEASES = 2**31
"""A worker's leases are numbered from somewhere below this, where nobody expects it."""

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Attached:
    """Answer of `attach`, with what the wire says beside the core's part."""

    worker: Worker
    namespace_index: int
    namespace: Namespace


class WorkerVerbs(Verbs):
    """The verbs of a worker."""

    def attach(
        self,
        asker: Asker,
        request: pb.AttachRequest,
        hang_up: Callable[[], object] | None,
    ) -> Attached:
        """Let a worker, new or known, join a namespace; if it has many, it leaves an idle one.

        Raises:
            LayoutMismatch: the pool holds another layout, or blocks of another size.
            InvalidRequest: a text cannot be kept or shown, the layout is none, it speaks for too
                many lost workers, or what is stored elsewhere needs another name of the model.
            NotFound: it names another tenant, or a model that it may not use.
            ServiceUnavailable: the service is about to end.
        """
        self._refuse_if_draining()
        if len(request.finished) > MOST_FINISHED:  # before its texts are looked at
            raise InvalidRequest(
                f"an attach speaks for {len(request.finished):,} lost workers; up to "
                f"{MOST_FINISHED:,} are heard at a time: name the others with the next one"
            )
        check_texts(request)
        namespace = codec.read_namespace(request.namespace)
        if not namespace.model:
            raise InvalidRequest("a namespace needs the name of a model")
        namespace = asker.identity.own(namespace)
        if self.settings.remote is not None and "@" not in namespace.model:
            raise InvalidRequest(
                f"model {namespace.model!r}: with --remote, a model's name says which weights it "
                "has, since machines with others use the same store: call it NAME@REVISION"
            )
        if not isinstance(asker, Worker):  # who is refused must not settle the layout for all
            self.workers.check_new(asker.identity, request.name, request.group)
        fresh = self.backing.cache is None
        cache = self.backing.settle_layout(codec.read_layout(request.layout), request.block_size)
        if fresh:
            log.info("pool created", sizes=str(self.backing.sizes))
        if fresh and self.shadows is not None:
            self.failures.spare("shadow caches", self.shadows.begin)
        cache.make_way(namespace)
        worker = (
            asker
            if isinstance(asker, Worker)
            else self.workers.join(
                asker.identity, request.name, request.pid, request.host, hang_up, request.group
            )
        )
        attached = worker.namespaces
        if namespace not in attached and (idle := attached.idle()) is not None:
            attached.leave(idle)
            cache.quit(worker.id, idle)
        index = attached.add(namespace)
        cache.attach(
            worker.id,
            namespace,
            name=worker.name,
            first_lease=1 + secrets.randbelow(_LEASES),
            now=monotonic(),
        )
        self.workers.finished(request.finished, worker.identity)
        return Attached(worker, index, namespace)

    def write_attach(self, answer: Attached, message: pb.AttachResponse) -> None:
        """Fill `message`."""
        message.worker = answer.worker.name
        message.worker_key = answer.worker.key
        if self.backing.handle is not None:
            codec.write_pool(self.backing.handle, message.pool)
        message.ttl_s = self.settings.ttl
        message.namespace_index = answer.namespace_index
        message.max_message_bytes = self.settings.max_message
        message.max_ops = self.settings.max_ops
        message.acquires_by_name = message.reuses_as_asked = True
        certificates, handle = self.backing.certificates, self.backing.handle
        if certificates is not None and handle is not None:
            again = certificates.cheapest(answer.namespace, handle.layout)
            if again is not None:
                codec.write_again(again, message.segments)

    def detach(self, worker: Worker, request: pb.DetachRequest) -> Ended:
        """End a worker that says it writes to nothing any more."""
        return self.workers.leave(worker, gone=True)

    def renew(self, worker: Worker, request: pb.RenewRequest) -> int:
        """Take a sign of life, and what the worker tells of its progress; tell who is in line.

        Raises:
            InvalidRequest: it tells of a time that is none.
        """
        for field in ("stalled_s", "oldest_untaken_s"):
            if not 0 <= (told := getattr(request, field)) < inf:
                raise InvalidRequest(f"{field} must be 0 or more seconds, not {told}")
        now = monotonic()
        self._cache().renew(worker.id, now=now)
        worker.in_hand, worker.stepped_at = request.in_hand, now - request.stalled_s
        worker.untaken, worker.untaken_since = request.untaken, now - request.oldest_untaken_s
        return self._cache().num_in_line
