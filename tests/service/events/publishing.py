"""A publisher of events that has bound its addresses, and nothing to tell."""

from __future__ import annotations

from prefixcache.config import load
from prefixcache.service.backing import Backing
from prefixcache.service.events.event_log import EventLog
from prefixcache.service.failures import Failures


async def published(endpoint: str, replay: str | None) -> None:
    """Publish at these endpoints for a moment."""
    from prefixcache.service.events.publisher import Publisher  # of an extra

    backing = Backing(load({"pool": "none"}))
    publisher = Publisher(backing, Failures(), EventLog(backing), endpoint, replay)
    try:
        publisher.start()
    finally:
        await publisher.close()
