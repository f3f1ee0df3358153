"""The service dies, and comes back.

```
vllm-1   request ── tokens ── tokens ── tokens ── done       with what it holds, and spare blocks
vllm-2                           new request ── done         in spare blocks
service          ✗ SIGKILL                          another one, with an empty pool
vllm-1                                              goes on by itself, until it is started again
```
An engine computes in the dead service's memory, which the new one does not have: it goes on with
its spare blocks, and shares nothing.  Started again, it is on the new pool.
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
        running, meanwhile, back: requests that ran when it died, came then, and came when another
            service answered but the engine was not started again.
        again: asked of engines that were started again, one after the other.
    """

    answered_before: int = 0
    running: Request | None = None
    meanwhile: Request | None = None
    back: Request | None = None
    again: list[Request] = field(default_factory=list)

    @property
    def requests(self) -> list[Request]:
        """All of them."""
        found = (self.running, self.meanwhile, self.back)
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
