"""Found: what an earlier life of the service left below the pool, by the keys of its blocks.

```
keys       ascending   ─► the place of each           a prompt looks for its next blocks
by age     places      ─► the oldest first            given up before anything of this life
```
No tree is built of it: a million blocks are in use again as soon as their keys are sorted, and who
asks for a prefix finds its blocks one behind the other.  Nothing here changes but how far the
oldest have been given up; which of the places still hold what was found there, `Tier` knows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from prefixcache.core.block_keys import Keys

Numbers = npt.NDArray[np.int32]


class Remains(NamedTuple):
    """Slots that hold something from before, in any order."""

    keys: Keys
    """`[n, 2]`, of their blocks."""
    slots: Numbers
    """Their numbers on DISK, from 0."""
    stamps: npt.NDArray[np.int64]
    """What stands beside their bytes."""

    def before(self, num_slots: int) -> Remains:
        """Leave out what lies in slots from that one on.  O(n), in C."""
        kept = self.slots < num_slots
        return Remains(self.keys[kept], self.slots[kept], self.stamps[kept])

    def newest(self) -> Remains:
        """Leave out what another slot holds as well, which was written later; by ascending keys.

        O(n log n), in C; O(n) for what it has given before.
        """
        if (self.keys[1:, 0] > self.keys[:-1, 0]).all():
            return self
        order = np.lexsort((self.stamps, self.keys[:, 0]))
        first = self.keys[order, 0]
        is_last = np.ones(len(order), bool)
        is_last[:-1] = first[1:] != first[:-1]
        kept = order[is_last]
        return Remains(self.keys[kept], self.slots[kept], self.stamps[kept])


class Found:
    """Blocks by their keys.

    Args:
        keys: `[n, 2]`, ascending by the first column, in which no two are equal.
        places: Where each of them lies.
        stamps: How old they are: what was written later has more.
    """

    __slots__ = ("_by_age", "_first", "_num_passed", "_places", "_second")

    def __init__(self, keys: Keys, places: Numbers, stamps: npt.NDArray[np.int64]) -> None:
        self._first = np.ascontiguousarray(keys[:, 0])
        self._second = np.ascontiguousarray(keys[:, 1])
        self._places = places
        self._by_age = places[np.argsort(stamps)]
        self._num_passed = 0

    def look(self, keys: Keys) -> Numbers:
        """Give the place that each of some blocks had; -1 for none.  O(keys · log n), in C.

        >>> found = Found(np.array([[3, 4]], np.uint64), np.array([7], np.int32), np.array([1]))
        >>> found.look(np.array([[3, 4], [3, 5]], np.uint64)).tolist()
        [7, -1]
        """
        at = np.minimum(np.searchsorted(self._first, keys[:, 0]), len(self._first) - 1)
        is_same = (self._first[at] == keys[:, 0]) & (self._second[at] == keys[:, 1])
        return np.where(is_same, self._places[at], np.int32(-1))

    def next_oldest(self, count: int) -> Numbers:
        """Give up to `count` places, the oldest that were not given before.  O(count), in C."""
        part = self._by_age[self._num_passed : self._num_passed + count]
        self._num_passed += len(part)
        return part
