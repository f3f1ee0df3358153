"""What all verbs stand on: the state of the service, and what every one of them checks."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from prefixcache import core_build
from prefixcache.client import codec, unary
from prefixcache.config import ServeSettings
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, NotFound, ServiceUnavailable
from prefixcache.service.answers import KeptAnswers
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.events.event_log import EventLog
from prefixcache.service.events.recorder import Recorder
from prefixcache.service.failures import Failures
from prefixcache.service.observe.latency import LatencyHistograms
from prefixcache.service.observe.sampler import Sampler
from prefixcache.service.shadow.caches import ShadowCaches
from prefixcache.service.turns import Turns
from prefixcache.service.unread import Unread
from prefixcache.service.worker import Asker, Worker
from prefixcache.service.workers import Workers
from prefixcache.types import LeaseId, Namespace

if TYPE_CHECKING:
    from prefixcache.service.observe.tracing import Tracer


class Verbs:
    """The state of the service that its verbs share."""

    def __init__(
        self, settings: ServeSettings, backing: Backing, deliveries: Deliveries, workers: Workers
    ) -> None:
        self.settings = settings
        self.backing = backing
        self.deliveries = deliveries
        self.workers = workers
        self.draining = False
        self.listening: list[str] = []
        self.recorder: Recorder | None = None
        self.tracer: Tracer | None = None
        self.latency = LatencyHistograms((*unary.RPCS, "cancel"))
        self.sampler = Sampler(backing, self.latency)
        self.turns = Turns()
        self.unread = Unread()
        self.answers = KeptAnswers()
        self.failures = Failures()
        self.events = EventLog(backing, settings.max_watchers, failures=self.failures)
        self.shadows = ShadowCaches(settings, backing, self.failures) if settings.shadow else None
        self.core = core_build.kind()
        self._started_at = monotonic()

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return monotonic() - self._started_at

    def granted(self, worker: Worker, verb: str, request_id: str) -> tuple[LeaseId, ...]:
        """Give the leases that an acquire or a fork was granted under an id.  O(leases).

        Those of an acquire live; children of a fork may have ended.
        """
        if verb == "acquire":
            found = self._cache().lease_of(worker.id, request_id)
            return () if found is None else (found,)
        kept = self.answers.get(worker.key, request_id)
        if kept is None or kept.question.verb != verb:
            return ()
        return tuple(LeaseId(child.lease) for child in kept.answer.children)

    def forget_answer(self, worker: Worker, verb: str, request_id: str) -> None:
        """Forget what a worker was told: its leases have ended.  O(1).  Idempotent."""
        kept = self.answers.get(worker.key, request_id)
        if kept is not None and kept.question.verb == verb:
            self.answers.forget(kept.question)

    def _cache(self) -> PrefixCache:
        cache = self.backing.cache
        if cache is None:
            raise NotFound(
                "nothing is stored: no worker has attached, and the service was started without "
                "--layout or --model"
            )
        return cache

    def _refuse_if_draining(self) -> None:
        if self.draining:
            raise ServiceUnavailable("the service is draining: it gives no new leases")

    def _named(self, asker: Asker, request: Any) -> Namespace:
        if request.HasField("namespace"):
            namespace = codec.read_namespace(request.namespace)
            return asker.identity.own(namespace)
        if not isinstance(asker, Worker):
            raise InvalidRequest("name a namespace, or the worker that has attached it")
        return asker.namespaces.at(request.namespace_index)
