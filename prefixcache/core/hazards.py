"""How likely blocks of a kind come back, by the time since their last use; and what they are worth.

Time is counted in block visits: a request over n blocks takes n.  Ages fall into `NUM_AGES` buckets
whose edges grow by a constant factor, up to the horizon of the ghosts.

```
age      0 ─┬──┬───┬────┬───── … ─────┬────── 20 capacities
bucket    0 │1 │ 2 │ 3  │             │ 23
            of `exposed[kind][age]` blocks that reached the bucket unused,
               `returned[kind][age]` were used in it; their ratio is the hazard
```

Ghosts count like resident blocks, so what was evicted teaches as much as what was kept.
"""

from __future__ import annotations

from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NUM_AGES = 24
_FIRST = 0.02
_GROWTH = 1.35
HORIZON = _FIRST * _GROWTH ** (NUM_AGES - 1)
"""Capacities of block visits after which a block that did not return is forgotten: about 20."""

_SURE = 0.98
"""The largest hazard believed; and 1 minus it the largest one in the last bucket."""
_PRIOR_REQUESTS = 8.0
_GROUP_REQUESTS = 12.0
"""As if so many requests had been seen that behaved like all kinds, and like the group."""


class Hazards:
    """Counts of returns by kind and age, and the order of worth that follows from them.

    Args:
        num_groups: Groups of kinds that are much alike.
        num_members: Kinds in a group; kind `group * num_members + member`.
        num_blocks: The pool's capacity, the unit of time.
    """

    def __init__(self, num_groups: int, num_members: int, num_blocks: int) -> None:
        self.num_kinds = num_groups * num_members
        self.edges = [0.0, *(_FIRST * num_blocks * _GROWTH**age for age in range(NUM_AGES))]
        self.returned = [[0.0] * NUM_AGES for _ in range(self.num_kinds)]
        self.exposed = [[0.0] * NUM_AGES for _ in range(self.num_kinds)]
        self._shape = (num_groups, num_members, NUM_AGES)
        self._inner = self.edges[1:-1]
        edges = np.array(self.edges)
        self._width: Floats = np.diff(edges)
        middle = (edges[:-1] + edges[1:]) / 2
        # Before anything is known: a hazard that falls with age like 0.3 / age.
        self._prior: Floats = 1 - np.exp(-0.3 * self._width / (middle + edges[1]))
        # Stopping before one has begun is no choice.
        self._impossible = np.tril(np.ones((NUM_AGES, NUM_AGES), dtype=bool), -1)
        kinds, ages = np.divmod(np.arange(self.num_kinds * NUM_AGES), NUM_AGES)
        self._kinds, self._ages = kinds, -ages

    def bucket(self, age: float) -> int:
        """Give the bucket of an age."""
        return bisect_right(self._inner, age)

    def halve(self) -> None:
        """Forget half, so that what is learnt can change."""
        for table in (self.returned, self.exposed):
            for row in table:
                row[:] = [value / 2 for value in row]

    def estimate(self, run: float) -> Floats:
        """Give the hazard of every kind and age, `[kinds, ages]`.

        A kind leans on its group, a group on all kinds, and those on the prior, as if a few
        requests had been seen.  Blocks of a request return together, so `run` blocks, those of an
        average request, are one observation.
        """
        returned = np.array(self.returned).reshape(self._shape)
        exposed = np.array(self.exposed).reshape(self._shape)
        few = _PRIOR_REQUESTS * max(1.0, run)
        shared = (returned.sum(axis=(0, 1)) + few * self._prior) / (exposed.sum(axis=(0, 1)) + few)
        shared[-1] = min(shared[-1], 1 - _SURE)
        few = _GROUP_REQUESTS * max(1.0, run)
        group = (returned.sum(axis=1) + few * shared) / (exposed.sum(axis=1) + few)
        hazard = (returned + few * group[:, None, :]) / (exposed + few)
        believed: Floats = np.minimum(_SURE, hazard).reshape(self.num_kinds, NUM_AGES)
        return believed

    def worth(self, run: float) -> Floats:
        """Give the index of every kind and age: hits per block and visit, `[kinds, ages]`.

        The Gittins index: the largest ratio, over all ages at which one could give up, of the
        chance that the block returns until then to the time it is held until then.  Unlike the
        hazard it may rise with age, and does: nobody asks again while he is still reading.

        O(kinds · ages²), in numpy; about 0.1 ms.
        """
        hazard = self.estimate(run)
        alive = np.ones_like(hazard)
        np.cumprod(1 - hazard[:, :-1], axis=1, out=alive[:, 1:])
        # Sums from each age to the end: their differences stay exact however few are left.
        hits = np.cumsum((alive * hazard)[:, ::-1], axis=1)[:, ::-1]
        held = np.cumsum((alive * self._width * (1 - hazard / 2))[:, ::-1], axis=1)[:, ::-1]
        upto_hits = np.concatenate([hits[:, 1:], np.zeros_like(hits[:, :1])], axis=1)
        upto_held = np.concatenate([held[:, 1:], np.zeros_like(held[:, :1])], axis=1)
        gain = hits[:, :, None] - upto_hits[:, None, :]
        time = held[:, :, None] - upto_held[:, None, :]
        time[:, self._impossible] = 1.0
        gain[:, self._impossible] = 0.0
        best: Floats = (gain / time).max(axis=2)
        return best

    def order(self, run: float) -> list[int]:
        """Give the cells (`kind * NUM_AGES + age`), the worst first; of equals the oldest."""
        order: list[int] = np.lexsort((self._kinds, self._ages, self.worth(run).ravel())).tolist()
        return order
