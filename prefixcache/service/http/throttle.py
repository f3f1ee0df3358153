"""Throttle: requests to the page have a fifth of the event loop's time, one after the other.

```
request ─► line ─► its turn: answered in t ─► for 4t nobody has one
             └─ 256 are in it already ─► 503
```
The page asks nobody who he is, and the loop that answers it serves the workers.  So whoever asks
without a pause waits, and nobody else does.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from time import monotonic

_REST = 4
"""Times as long as a request took."""
_LONGEST_REST_S = 0.5


class Throttle:
    """Whose request is answered now, and how long nobody's is after it.

    Args:
        limit: How many may be in the line.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._line = asyncio.Lock()
        self._waiting = 0
        self._next_at = 0.0

    @property
    def is_full(self) -> bool:
        """Whether so many are in the line that nobody else may be."""
        return self._waiting >= self._limit

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait until it is one's turn."""
        self._waiting += 1
        try:
            async with self._line:
                if (rest := self._next_at - monotonic()) > 0:
                    await asyncio.sleep(rest)
                began = monotonic()
                try:
                    yield
                finally:
                    ended = monotonic()
                    self._next_at = ended + min(_REST * (ended - began), _LONGEST_REST_S)
        finally:
            self._waiting -= 1
