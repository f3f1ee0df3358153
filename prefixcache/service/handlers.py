"""The verbs, once: unary calls and sessions are both served by these handlers.

A handler reads a request, passes the time and the worker to the core, and gives the core's answer.
Everything it does is synchronous and short.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic
from typing import Any, TypeAlias

from prefixcache.client import codec
from prefixcache.config import ServeSettings
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.service.answers import Question
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.verbs.admin import AdminVerbs
from prefixcache.service.verbs.inspect import InspectVerbs
from prefixcache.service.verbs.leases import LeaseVerbs
from prefixcache.service.verbs.request_texts import check_texts
from prefixcache.service.verbs.workers import WorkerVerbs
from prefixcache.service.worker import Asker, Worker
from prefixcache.service.workers import Workers
from prefixcache.types import LeaseId

Verb: TypeAlias = "tuple[Callable[[Any, Any], Any], Callable[[Any, Any], Any]]"


class Handlers(WorkerVerbs, LeaseVerbs, InspectVerbs, AdminVerbs):
    """All verbs of the service.

    `verbs[name]` is `(handler, write)`: `handler(worker, request)` gives an answer or raises a
    `CacheError`, `write(answer, message)` fills the response, and may be
    a generator that pauses.  `acquire` may answer `Waiting`: then
    the outcome comes by `Deliveries`.
    """

    def __init__(
        self, settings: ServeSettings, backing: Backing, deliveries: Deliveries, workers: Workers
    ) -> None:
        super().__init__(settings, backing, deliveries, workers)
        self.verbs: dict[str, Verb] = {
            name: (getattr(self, name), write) for name, write in codec.WRITE.items()
        }
        self.verbs["fork"] = (self.fork, self.write_fork)
        workers.on_leave = lambda worker: self.answers.forget_worker(worker.key)
        self.verbs["snapshot"] = (self.snapshot, self.write_snapshot)
        self.verbs["tree"] = (self.tree, self.write_tree)
        self.verbs["check"] = (self.check, lambda answer, message: message.CopyFrom(answer))
        for name, (handler, write) in self.verbs.items():
            self.verbs[name] = (_checked(handler), write)

    def earlier(self, worker: Worker, asked: Question) -> Any:
        """Give the answer that this very request got before; None if it is new.  O(1).

        An answer dies with its lease: then the verb itself says how that ended.

        Raises:
            InvalidRequest: another request got an answer under this id.
        """
        kept = self.answers.get(worker.key, asked.request_id)
        if kept is None:
            return None
        before = kept.question
        try:
            self._cache().num_committed_blocks(worker.id, LeaseId(before.lease), now=monotonic())
        except CacheError:
            self.answers.forget(before)
            return None
        if before != asked:
            raise InvalidRequest(
                f"request id {asked.request_id!r} is that of an earlier {before.verb} of lease "
                f"{before.lease}, which asked for something else: give each request an id of its "
                "own"
            )
        return kept.answer

    def keep(self, worker: Asker, asked: Question, answer: Any) -> None:
        """Keep what a worker is told, unless it has left meanwhile.  Amortised O(1)."""
        if isinstance(worker, Worker) and worker.state == "attached":
            self.answers.keep(asked, answer, worker.tenant)


def _checked(handler: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Let a handler see requests only whose texts can be kept and shown."""

    def run(asker: Any, request: Any) -> Any:
        check_texts(request)
        return handler(asker, request)

    return run
