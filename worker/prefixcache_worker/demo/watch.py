"""Looks at the service's state, many times a second, while the chats are played."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final, Protocol

from prefixcache.types import Snapshot

CALM_S: Final = 0.2
"""Between two looks, normally: what a view needs."""
KEEN_S: Final = 0.005
"""Between two looks while a worker is about to die."""


class Source(Protocol):
    """The part of a client that is looked at."""

    def snapshot(self) -> Snapshot:
        """Ask for the state of the whole cache."""


class Watch:
    """Keeps the newest snapshot.

    Args:
        source: a client of the service; its calls block and run in a thread.
        clock: seconds since the run began.
        tell: called with every snapshot.
    """

    def __init__(
        self, source: Source, clock: Callable[[], float], tell: Callable[[Snapshot], None]
    ) -> None:
        self._source = source
        self._clock = clock
        self._tell = tell
        self._period_s = CALM_S
        self._looked = asyncio.Condition()
        self.latest: Snapshot | None = None
        self.at_s = 0.0
        """When the latest snapshot was asked for."""

    async def run(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await self.look()
            await asyncio.sleep(self._period_s)

    async def look(self) -> Snapshot:
        """Take one snapshot now."""
        asked_s = self._clock()
        snapshot = await asyncio.to_thread(self._source.snapshot)
        async with self._looked:
            self.latest, self.at_s = snapshot, asked_s
            self._looked.notify_all()
        self._tell(snapshot)
        return snapshot

    async def until(
        self, condition: Callable[[Snapshot], bool], timeout_s: float
    ) -> Snapshot | None:
        """Wait for a snapshot that fulfils `condition`; None if there is none in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._looked:
                while self.latest is None or not condition(self.latest):
                    await self._looked.wait()
                return self.latest
        return None

    async def rest(self, timeout_s: float) -> Snapshot:
        """Wait until no lease is out; give that snapshot, or the latest if it takes too long."""
        deadline_s = self._clock() + timeout_s
        while (seen := await self.look()).leases and self._clock() < deadline_s:
            await asyncio.sleep(KEEN_S)
        return seen

    @contextlib.asynccontextmanager
    async def keen(self) -> AsyncIterator[None]:
        """Look as often as is useful while something is about to happen."""
        self._period_s = KEEN_S
        try:
            yield
        finally:
            self._period_s = CALM_S
