"""Trust domains: each with a pool, a tree and workers of its own, behind the same endpoints.

```
identity ─► its domain ─┬─ ""      --memory               pool file, 0600
                        ├─ acme    memory of its table    another pool file
                        └─ …
```
Whoever maps a pool can read all of it, whatever the service lends him.  So who must not read each
other's keys and values must not share a pool: he is put into another domain, and gets the handle of
that pool alone.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

from prefixcache.config import ServeSettings
from prefixcache.service.backing import Backing
from prefixcache.service.carriage import Carriage
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.handlers import Handlers
from prefixcache.service.haulage import Haulage
from prefixcache.service.workers import Workers


@dataclass(frozen=True, slots=True)
class Domain:
    """What one trust domain owns."""

    backing: Backing
    deliveries: Deliveries
    workers: Workers
    handlers: Handlers
    haulage: Haulage

    @classmethod
    def make(
        cls, settings: ServeSettings, make_backing: Callable[[ServeSettings], Backing]
    ) -> Domain:
        """Make everything; the pool, too, if its layout is known."""
        backing = make_backing(settings)
        deliveries = Deliveries(backing)
        workers = Workers(backing, deliveries, settings)
        handlers = Handlers(settings, backing, deliveries, workers)
        haulage = Haulage(backing, deliveries, handlers.failures)
        if settings.remote is not None:
            haulage.carriage = Carriage(backing, deliveries, handlers.failures, haulage.hand)
        workers.set_own_process(lambda: haulage.pid)
        return cls(backing, deliveries, workers, handlers, haulage)

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit is kept."""
        self.workers.shares.set_tenants(tenants)
        self.handlers.events.shares.set_tenants(tenants)
        self.handlers.answers.set_tenants(tenants)
        self.backing.set_tenants(tenants)

    def close(self) -> None:
        """Let go of everything."""
        self.handlers.events.close()
        if self.handlers.shadows is not None:
            self.handlers.shadows.close()
        self.handlers.sampler.close()
        self.workers.close()
        self.haulage.close()
        self.deliveries.close()
        self.backing.close()


def make_domains(
    settings: ServeSettings,
    memory: Mapping[str, int],
    make_backing: Callable[[ServeSettings], Backing],
) -> dict[str, Domain]:
    """Make the domain without a name, and those that have one.

    Args:
        settings: The service's; what a domain keeps on disk is in a folder of its own.
        memory: Bytes of each named domain's pool.
        make_backing: What a domain owns.
    """
    domains = {"": Domain.make(settings, make_backing)}
    try:
        for name, num_bytes in memory.items():
            state = None if settings.state is None else settings.state / f"domain-{name}"
            part = num_bytes / settings.memory
            update: dict[str, object] = {
                "memory": num_bytes,
                "host": settings.host and int(settings.host * part),
                "disk": settings.disk and settings.disk.part(part, f"domain-{name}"),
                "disk_write": settings.disk_write and int(settings.disk_write * part),
                "state": state,
                "shadow": [],
            }
            own = settings.model_copy(update=update)
            domains[name] = Domain.make(own, make_backing)
    except BaseException:
        for domain in domains.values():
            domain.close()
        raise
    return domains
