"""Turns: what is made in steps takes them one at a time, however much of it is asked for at once.

```
loop    step of a ─ others ─ step of b ─ others ─ step of a ─ others ─ …
```
Each step is short, and in between the loop serves everything else that is ready, for as long as
the step took.  Without turns a hundred that walk at once would take a hundred steps between two of
anybody else's.  Tenants take turns, and within one its callers: who asks for a hundred walks waits
for them itself.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Generator
from typing import Any

from prefixcache.service.observe.latency import clock

_LONGEST_PAUSE_S = 0.005
"""A step that took longer was held up by the machine."""


class Turns:
    """The turns of one trust domain: first come, first served, one step each."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits for a turn, by tenant, in the order in which the tenants have theirs."""

    async def run(self, steps: Generator[None, None, Any], tenant: str = "") -> Any:
        """Run a generator to its value, with the loop's other work between its steps."""
        await self._take(tenant)
        while True:
            try:
                began = clock()
                next(steps)
                await asyncio.sleep(min(_LONGEST_PAUSE_S, (clock() - began) / 1e9))
            except BaseException as end:
                self._pass_on()
                if isinstance(end, StopIteration):
                    return end.value
                raise
            if self._waiting:
                turn = self._queue(tenant)  # before the turn goes on: then it is fair
                self._pass_on()
                await self._wait(turn)

    async def _take(self, tenant: str) -> None:
        """Wait for a turn.  O(1)."""
        if self._is_taken:
            await self._wait(self._queue(tenant))
        self._is_taken = True

    def _queue(self, tenant: str) -> asyncio.Future[None]:
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(tenant, deque()).append(turn)
        return turn

    async def _wait(self, turn: asyncio.Future[None]) -> None:
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        """Give the turn to the next tenant's first caller that still waits.  Amortised O(1)."""
        while self._waiting:
            tenant, callers = self._waiting.popitem(last=False)
            turn = callers.popleft()
            if callers:
                self._waiting[tenant] = callers
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False
