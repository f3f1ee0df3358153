"""What all verbs stand on: the state of the service, and what every one of them checks."""

from __future__ import annotations

from time import monotonic
from typing import TYPE_CHECKING, Any

from prefixcache.client import codec, unary
from prefixcache.config import ServeSettings
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, NotFound, ServiceUnavailable
from prefixcache.service.events import EventLog
from prefixcache.service.failures import Failures
from prefixcache.service.holdings import Holdings
from prefixcache.service.meter import Meter
from prefixcache.service.pulse import Pulse
from prefixcache.service.recorder import Recorder
from prefixcache.service.shadows import Shadows
from prefixcache.service.turns import Turns
from prefixcache.service.waiting import WaitingLine
from prefixcache.service.workers import Asker, Worker, Workers
from prefixcache.types import Namespace

if TYPE_CHECKING:
    from prefixcache.service.tracing import Tracer


class Verbs:
    """The state of the service that its verbs share."""

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
        self.turns = Turns()
        self.failures = Failures()
        self.events = EventLog(holdings, settings.max_watchers, failures=self.failures)
        self.shadows = Shadows(settings, holdings, self.failures) if settings.shadow else None
        self._started_at = monotonic()

    @property
    def uptime_s(self) -> float:
        """Seconds since the start."""
        return monotonic() - self._started_at

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

    def _named(self, asker: Asker, request: Any) -> Namespace:
        if request.HasField("namespace"):
            namespace = codec.read_namespace(request.namespace)
            return asker.identity.own(namespace)
        if not isinstance(asker, Worker):
            raise InvalidRequest("name a namespace, or the worker that has attached it")
        return asker.namespaces.at(request.namespace_index)
