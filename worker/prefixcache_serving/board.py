"""The board: what the front's page and `prefixcache top` show of the workers.

```
w1  ready     [r7  412 read, 31 written] [r9  0 of 900 read]     38.2 tokens/s
w2  set aside                                                    stopped, or drained
w3  starting
queue  2 answers
```
Computed once for all of a tenant who look, some times a second, and only while somebody does.
It names answers by numbers: nothing of a prompt, a key or a client is in it.  Of answers of others
a tenant is told how many there are; how long their prompts are, and how much of them is cached,
only they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from itertools import islice
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_serving.journey import Journey
from prefixcache_serving.router import Router

EVERY_S: Final = 0.25
MOST_VIEWERS: Final = 32
"""Others are told to come later: an open page costs a connection."""
MOST_ANSWERS: Final = 64
"""Of a worker that are listed; how many it has of all tenants is told besides."""
_WINDOW_S: Final = 2.0
"""Tokens a second are those of so long."""


class Board:
    """What is under way.

    Args:
        router: has it.
        model: its name, as requests call it.
        workers: the names of all, also of those that are not there now.
    """

    def __init__(self, router: Router, model: str, workers: Sequence[str] = ()) -> None:
        self._router = router
        self._model = model
        self._workers = tuple(workers)
        self._past: deque[tuple[float, dict[str, int]]] = deque()
        self._latest: dict[str, str] = {}
        """For each tenant who looks."""
        self._fresh = asyncio.Event()
        self._painter: asyncio.Task[None] | None = None
        self._is_closed = False
        self.viewers: Counter[str] = Counter()
        """Pages that are open, by tenant."""

    def close(self) -> None:
        """End all streams.  Idempotent."""
        self._is_closed = True
        self._fresh.set()

    def state(self, tenant: str = "") -> dict[str, Any]:
        """Give what a tenant is shown.  O(answers that are under way)."""
        router = self._router
        rates = self._rates(time.monotonic())
        names = dict.fromkeys([*self._workers, *router.stations])
        return {
            "model": self._model,
            "is_draining": router.is_draining,
            "waiting": router.num_waiting,
            "longest_queue": router.longest_queue,
            "tokens": router.num_generated,
            "tokens_per_s": round(sum(rates.values()), 1),
            "moved": router.num_moved,
            "computed_again": router.num_computed_again,
            "workers": [self._worker(name, rates.get(name, 0.0), tenant) for name in names],
        }

    @contextlib.contextmanager
    def viewed(self, tenant: str) -> Iterator[None]:
        """Count a page that is open."""
        self.viewers[tenant] += 1
        try:
            yield
        finally:
            self.viewers[tenant] -= 1

    async def live(self, tenant: str = "") -> AsyncIterator[str]:
        """Give events for one viewer, for as long as it reads; it gets the newest."""
        if self._painter is None:
            self._painter = asyncio.create_task(self._paint())
        while not self._is_closed:
            fresh = self._fresh
            if told := self._latest.get(tenant):
                yield f"data: {told}\n\n"
            await fresh.wait()

    async def _paint(self) -> None:
        try:
            while not self._is_closed and self.viewers.total():
                self._latest = {
                    tenant: json_text(self.state(tenant), separators=(",", ":"))
                    for tenant, count in self.viewers.items()
                    if count
                }
                fresh, self._fresh = self._fresh, asyncio.Event()
                fresh.set()
                await asyncio.sleep(EVERY_S)
        finally:
            self._latest = {}
            self._painter = None

    def _worker(self, name: str, rate: float, tenant: str) -> dict[str, Any]:
        station = self._router.stations.get(name)
        if station is None:
            return {"worker": name, "state": "starting", "running": 0, "answers": []}
        theirs = (one for one in station.journeys.values() if one.tenant == tenant)
        return {
            "worker": name,
            "state": "ready" if station.is_open else "set aside",
            "pid": station.recipient.pid,
            "seats": station.seats,
            "running": len(station.journeys),
            "tokens": station.num_generated,
            "tokens_per_s": round(rate, 1),
            "answers": [_answer(journey) for journey in islice(theirs, MOST_ANSWERS)],
        }

    def _rates(self, now: float) -> dict[str, float]:
        """Give each worker's tokens a second of late."""
        counts = {name: one.num_generated for name, one in self._router.stations.items()}
        self._past.append((now, counts))
        while len(self._past) > 2 and self._past[1][0] <= now - _WINDOW_S:
            self._past.popleft()
        then, first = self._past[0]
        if now <= then:
            return {}
        # One that was replaced meanwhile has begun to count anew.
        return {
            name: max(0, count - first.get(name, 0)) / (now - then)
            for name, count in counts.items()
        }


def _answer(journey: Journey) -> dict[str, Any]:
    return {
        "id": journey.id,
        "prompt": journey.num_context - len(journey.tokens),
        "generated": len(journey.tokens),
        "most": journey.line["max_new_tokens"],
        "due": 0 if journey.ledger is not None and journey.due == 1 else journey.due,
        "workers": journey.workers[-4:],
    }
