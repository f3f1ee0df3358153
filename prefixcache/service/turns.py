"""Turns: what is made in steps takes them in slices, however much of it is asked for at once.

```
loop    steps of a ─ others ─ steps of b ─ others ─ steps of a ─ others ─ …
        └ 0.2 ms ┘ └ 60 µs  ┘ └ 0.2 ms ┘ └ 60 µs  ┘ └ 0.2 ms ┘
```
A step is some dozen rows.  A slice is as many of them as fit in its time, and between two slices
the loop serves everything else.  A call comes and goes in about five of the loop's rounds, between
which threads of gRPC carry it on: in one round between two slices it would take about five slices
longer.  Others therefore have the loop for as many rounds as fit in their time, and a call is
seldom held up more than once: this, and not the time of the whole walk, is what others notice of
it.  Without turns a hundred that walk at once would take a hundred slices between two of anybody
else's.  Tenants take turns, and within one its callers: who asks for a hundred walks waits for them
itself.  The ops of a session's message have a first slice at once, and take turns for the others.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict, deque
from collections.abc import Callable, Generator
from typing import Any

from prefixcache.service.observe.latency import clock

_SLICE_NS = 200_000
"""How long somebody works before all others have their turn."""
_OTHERS_NS = 60_000
"""How long that turn is, at least."""


class Slice:
    """A slice of time on the event loop, which begins with it."""

    __slots__ = ("_ends",)

    def __init__(self) -> None:
        self._ends = clock() + _SLICE_NS

    @property
    def is_over(self) -> bool:
        """Whether others should have their turn now."""
        return clock() >= self._ends


async def give_way() -> None:
    """Let the loop do everything else, for some of its rounds."""
    ends = clock() + _OTHERS_NS
    await asyncio.sleep(0)
    while clock() < ends:
        await asyncio.sleep(0)


_FREED_IN_ONE_GO = 32


def let_go(rows: list[Any]) -> Generator[None, None, None]:
    """Free what is many in steps: in one go it takes nearly as long as to make it.

    Args:
        rows: The last that hold each of them.
    """
    while rows:
        del rows[-_FREED_IN_ONE_GO:]
        yield


class Turns:
    """The turns of one trust domain: first come, first served, one slice each."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        """Who waits for a turn, by tenant, in the order in which the tenants have theirs."""

    async def run(self, steps: Generator[None, None, Any], tenant: str = "") -> Any:
        """Run a generator to its value, with the loop's other work between its slices."""
        await self._take(tenant)
        while True:
            try:
                mine = Slice()
                next(steps)
                while not mine.is_over:
                    next(steps)
                await give_way()
            except BaseException as end:
                self._pass_on()
                if isinstance(end, StopIteration):
                    return end.value
                raise
            if self._waiting:
                turn = self._queue(tenant)  # before the turn goes on: then it is fair
                self._pass_on()
                await self._wait(turn)

    async def take_one(self, work: Callable[[], None], tenant: str = "") -> None:
        """Do what is a slice by itself, in a turn, after the loop's other work."""
        await self._take(tenant)
        try:
            await give_way()
            work()
        finally:
            self._pass_on()

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
