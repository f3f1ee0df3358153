"""The inbox: what was handed to a worker, until its engine takes it.

```
lines ── begin ──► being read ── put ──► items ── take ──► the engine's own lists
                      └─ failed ── done           └ the oldest one's age is told with signs of life
```
"""

from __future__ import annotations

import time
from collections import deque
from typing import Generic, TypeVar

from prefixcache.client import Inbox as Untaken

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Items in the order in which they came, with when.  Any thread puts, one takes; O(1) each."""

    def __init__(self) -> None:
        self._items: deque[tuple[float, Item]] = deque()
        self._begun: float | None = None

    def __bool__(self) -> bool:
        return bool(self._items)

    def begin(self) -> None:
        """Note that something has come and is being read: until `done`, it counts as untaken."""
        self._begun = time.monotonic()

    def done(self) -> None:
        """Note that it was read: it was put, or is answered."""
        self._begun = None

    def put(self, item: Item) -> None:
        """Add an item."""
        self._items.append((time.monotonic(), item))

    def take(self) -> Item:
        """Remove the oldest item and give it.

        Raises:
            IndexError: there is none.
        """
        return self._items.popleft()[1]

    def untaken(self) -> Untaken:
        """Say what lies there, and since when."""
        came = [one for one in (self._first(), self._begun) if one is not None]
        if not came:
            return Untaken()
        count = len(self._items) + (self._begun is not None)
        return Untaken(max(1, count), time.monotonic() - min(came))

    def _first(self) -> float | None:
        try:
            return self._items[0][0]
        except IndexError:  # another thread may have taken the last one just now
            return None
