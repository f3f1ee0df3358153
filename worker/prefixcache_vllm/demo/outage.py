"""The service dies, and comes back.

```
vllm-1   request ── tokens ── tokens ── tokens ── done       with what it holds, and spare blocks
vllm-2                           new request ── done         in spare blocks
service          ✗ SIGKILL                          another one, with an empty pool
vllm-1                                                        request ── computes
vllm-2                                                        request ── reads what vllm-1 computed
```
Until another service answers, engines compute in the dead one's memory, with spare blocks, and
share nothing.  Then they put the new pool's memory in its place by themselves.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final

from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.record import Request

ANSWER_TOKENS: Final = 160
"""Enough for a small model to be still answering when the service dies."""


@dataclass(slots=True)
class Outage:
    """What was seen.

    Attributes:
        answered_before: tokens of the running request that were there when the service was killed.
        running, meanwhile: requests that ran when it died, and came then.
        again: asked of one engine after another when they had joined another service.
    """

    answered_before: int = 0
    running: Request | None = None
    meanwhile: Request | None = None
    again: list[Request] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        found = (self.running, self.meanwhile)
        return [request for request in found if request is not None] + self.again

    @property
    def went_on(self) -> bool:
        """Whether the running request was in mid-answer at the kill, and ended."""
        done = self.running is not None and self.running.done_s is not None
        return done and 0 < self.answered_before < len(self.running.answer)  # type: ignore[union-attr]


async def kill_while_answering(
    outage: Outage,
    dispatcher: Dispatcher,
    kill: Callable[[], Awaitable[None]],
    running: tuple[Request, str],
    meanwhile: tuple[Request, str],
) -> None:
    """Kill the service while an engine answers, and ask another engine something new.

    Args:
        outage: filled with what is seen.
        dispatcher: sends requests.
        kill: kills the service, and returns when it is dead.
        running: the request that runs, and its engine.
        meanwhile: the one that comes then, and its engine.
    """
    request, engine = running
    outage.running = request
    task = asyncio.ensure_future(dispatcher.ask(request, engine))
    try:
        await dispatcher.until(lambda: len(request.answer) >= 2 or task.done())
        outage.answered_before = len(request.answer)
        await kill()
        outage.meanwhile = meanwhile[0]
        await dispatcher.ask(*meanwhile)
        await task
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
