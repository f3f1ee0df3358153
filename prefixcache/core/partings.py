"""Partings: how many requests of the last hour left the stored prefixes at which place.

```
node.parted = {8: Place}       8 tokens into the block that follows the node's run
minutes       [.. | {Place: 3} | {Place: 9, …}]    place.count is the sum over the minutes kept
```

A place is where whole blocks end, and the tokens into the next one.  It stands at its node, and is
forgotten with it.  Counting is O(1): one dict entry in this minute's counts; a minute that is an
hour old is taken off again.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from prefixcache.core.node import Node

WINDOW_S: Final = 3600.0
_STEP_S: Final = 60.0
_MOST_PLACES: Final = 1024
"""Places that are counted in one minute; further ones are not."""
_MOST_PER_NODE: Final = 32
"""Places at a node from which on those that nobody parts at any more are dropped."""


class Place:
    """One place, and how many requests parted there."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


class Partings:
    """The counts of the last hour."""

    __slots__ = ("_counts", "_step", "_steps")

    def __init__(self) -> None:
        self._step = -1
        self._counts: dict[Place, int] = {}
        self._steps: deque[tuple[int, dict[Place, int]]] = deque()

    def note(self, node: Node, into: int, now: float) -> None:
        """Count a request that left the stored prefixes `into` tokens after `node`.  O(1)."""
        step = int(now // _STEP_S)
        if step != self._step:
            self._begin(step)
        places = node.parted
        if places is None:
            places = node.parted = {}
        place = places.get(into)
        counts = self._counts
        if place is None or place not in counts:
            if len(counts) >= _MOST_PLACES:
                return
            if place is None:
                if len(places) >= _MOST_PER_NODE:
                    node.parted = places = {at: one for at, one in places.items() if one.count}
                place = places[into] = Place()
            counts[place] = 0
        counts[place] += 1
        place.count += 1

    def at(self, node: Node, into: int, now: float) -> int:
        """Say how many requests of the last hour left there.  Changes nothing.  O(minutes)."""
        place = node.parted.get(into) if node.parted else None
        if place is None:
            return 0
        oldest = _oldest(int(now // _STEP_S))
        return place.count - sum(
            counts.get(place, 0) for step, counts in self._steps if step < oldest
        )

    def most(self, node: Node, now: float) -> tuple[int, int] | None:
        """Give where most requests left after `node`, as tokens into the next block, and how many.

        Changes nothing.  None if none did.
        """
        counts = [(self.at(node, into, now), into) for into in list(node.parted or ())]
        count, into = max(counts, default=(0, 0))
        return (into, count) if count else None

    def _begin(self, step: int) -> None:
        """Begin a minute, and take off those that are too old.  Amortised O(1)."""
        self._step = step
        self._counts = {}
        self._steps.append((step, self._counts))
        oldest = _oldest(step)
        while self._steps[0][0] < oldest:
            for place, count in self._steps.popleft()[1].items():
                place.count -= count


def _oldest(step: int) -> int:
    return step - int(WINDOW_S // _STEP_S) + 1
