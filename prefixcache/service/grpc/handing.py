"""Leases on their way to unary calls: what nobody is told of is given back.

```
asked ─► waits ─► granted ─► its stream stands? ─► sent
     hung up │        │              │               └─ lost on the way: nothing tells the service;
             ▼        ▼              ▼                  `release` by the request's id does
          nothing   every lease is given back
```
Several calls may ask with one id, one after the other or at the same time: they are granted the
same leases, which are given back once the last of these calls has ended, if none was told of them.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence
from time import monotonic
from types import TracebackType
from typing import Any

import grpc.aio

from prefixcache.errors import CacheError
from prefixcache.service.handlers import Handlers
from prefixcache.service.verbs.leases import Forked
from prefixcache.service.worker import Handed, Worker
from prefixcache.types import Grant, LeaseId


class Handing:
    """What one call hands out.  Context manager: with it end leases that nobody was told of."""

    __slots__ = ("_asked", "_handed", "_handlers", "_is_told", "_worker")

    def __init__(self, handlers: Handlers) -> None:
        self._handlers = handlers
        self._worker: Worker | None = None
        self._asked: tuple[str, str] | None = None
        self._handed = Handed()
        self._is_told = False

    def begin(self, worker: Worker, verb: str, request_id: str) -> None:
        """Note who asks for what, before he is answered.  O(1)."""
        self._worker = worker
        if request_id:
            self._asked = verb, request_id
            found = worker.handed.get(self._asked)
            if found is None:
                # What was granted before, and is handed to nobody now: somebody was told.
                granted = self._handlers.granted(worker, verb, request_id)
                found = Handed(leases=granted, is_taken=bool(granted))
                worker.handed[self._asked] = found
            self._handed = found
        self._handed.num_calls += 1

    def note_answer(self, answer: Any) -> None:
        """Note what is granted, if anything is.  O(leases)."""
        if isinstance(answer, Grant):
            self._handed.note((answer.lease,))
        elif isinstance(answer, Forked):
            self._handed.note(tuple(child.lease for child in answer.children))

    async def told(self, context: Any) -> None:
        """See whether the caller is still there; if so, he counts as told.

        A stream that was reset takes no metadata.  What ends it after this is seen by nobody.

        Raises:
            CancelledError: he is not.
        """
        try:
            await context.send_initial_metadata(())
        except grpc.aio.BaseError:
            raise asyncio.CancelledError from None
        await asyncio.sleep(0)  # an end that came meanwhile cancels this
        self._is_told = True

    def __enter__(self) -> Handing:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        worker, handed = self._worker, self._handed
        if worker is None:
            return
        handed.num_calls -= 1
        handed.is_taken |= self._is_told
        if handed.num_calls:
            return
        if self._asked is not None:
            del worker.handed[self._asked]
        if handed.leases and not handed.is_taken:
            self._give_back(worker, handed.leases)

    def _give_back(self, worker: Worker, leases: Sequence[LeaseId]) -> None:
        cache, now = self._handlers.backing.cache, monotonic()
        if self._asked is not None:
            self._handlers.forget_answer(worker, *self._asked)
        for lease in leases:
            with contextlib.suppress(CacheError):  # it may have ended meanwhile
                if cache is not None:
                    cache.release(worker.id, lease, now=now)
        self._handlers.deliveries.settle()
