"""Trust domains: each with a pool, a tree and workers of its own, behind the same doors.

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
from prefixcache.service.handlers import Handlers
from prefixcache.service.holdings import Holdings
from prefixcache.service.waiting import WaitingLine
from prefixcache.service.workers import Workers


@dataclass(frozen=True, slots=True)
class Domain:
    """What one trust domain owns."""

    holdings: Holdings
    line: WaitingLine
    workers: Workers
    handlers: Handlers

    @classmethod
    def make(
        cls, settings: ServeSettings, make_holdings: Callable[[ServeSettings], Holdings]
    ) -> Domain:
        """Make everything; the pool, too, if its layout is known."""
        holdings = make_holdings(settings)
        line = WaitingLine(holdings)
        workers = Workers(holdings, line, settings)
        return cls(holdings, line, workers, Handlers(settings, holdings, line, workers))

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit is kept."""
        self.workers.shares.set_tenants(tenants)
        self.handlers.events.shares.set_tenants(tenants)
        self.handlers.answers.set_tenants(tenants)
        self.holdings.set_tenants(tenants)

    def close(self) -> None:
        """Let go of everything."""
        self.handlers.events.close()
        if self.handlers.shadows is not None:
            self.handlers.shadows.close()
        self.handlers.pulse.close()
        self.workers.close()
        self.line.close()
        self.holdings.close()


def make_domains(
    settings: ServeSettings,
    memory: Mapping[str, int],
    make_holdings: Callable[[ServeSettings], Holdings],
) -> dict[str, Domain]:
    """Make the domain without a name, and those that have one.

    Args:
        settings: The service's; what a domain keeps on disk is in a folder of its own.
        memory: Bytes of each named domain's pool.
        make_holdings: What a domain owns.
    """
    domains = {"": Domain.make(settings, make_holdings)}
    try:
        for name, num_bytes in memory.items():
            state = None if settings.state is None else settings.state / f"domain-{name}"
            own = settings.model_copy(update={"memory": num_bytes, "state": state, "shadow": []})
            domains[name] = Domain.make(own, make_holdings)
    except BaseException:
        for domain in domains.values():
            domain.close()
        raise
    return domains
