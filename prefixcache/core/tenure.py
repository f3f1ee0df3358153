"""Tenure: whose data a block holds, so that nobody is lent what another tenant wrote.

```
block    lent to a      free, cached, …      lent to b: wiped first      lent to b again: as it is
```

While one tenant alone has used the pool, nothing is kept up to date and nothing is looked at.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable

import numpy as np

from prefixcache.types import BlockTable

Wipe = Callable[[BlockTable], None]
"""Overwrites blocks, in every layer, with zeros.  Returns when it is done."""

_CLEAN, _UNKNOWN = 0, -1
"""Tenants are numbered from 1."""
_SPARE_NUMBERS = 1024
"""Of tenants without a block, which may be kept beside twice as many as there are blocks."""
_SHORT_RUN = 24
"""Up to this many blocks a Python loop beats the fixed cost of numpy calls."""


class Tenure:
    """The last tenant of every block.

    Args:
        num_blocks: Of the pool, which holds nothing but zeros yet.
    """

    __slots__ = ("_last", "_num_blocks", "_numbers", "_of", "_only", "num_wiped", "wipe")

    def __init__(self, num_blocks: int) -> None:
        self.wipe: Wipe | None = None
        """None where there is no memory to wipe."""
        self.num_wiped = 0
        """Blocks since the start."""
        self._num_blocks = num_blocks
        self._of = np.zeros(0, np.int32)
        self._numbers: dict[str, int] = {}
        """Of the tenants whose data some block may hold; of others, a few."""
        self._last = 0
        self._only: str | None = None
        """The one tenant so far: all that is not clean may be its."""

    def lend(self, blocks: BlockTable, tenant: str, num_used: int) -> None:
        """Wipe what another tenant has used, before `tenant` may read it.

        O(1) while there is one tenant; else O(blocks), and the wiping of those that change hands.

        Args:
            blocks: About to be lent.
            tenant: To whom.
            num_used: Ids below this one may have been lent before, all others never.
        """
        if self.wipe is None or not blocks:
            return
        if not self._numbers:
            if self._only is None:
                self._only = tenant
            if self._only == tenant:
                return
            first = self._number(self._only)
            self._of = np.zeros(self._num_blocks, np.int32)
            self._of[:num_used] = first
        mine = self._number(tenant)
        of = self._of
        if len(blocks) <= _SHORT_RUN:
            foreign = array("i", [one for one in blocks if of[one] not in (mine, _CLEAN)])
            for one in blocks:
                of[one] = mine
        else:
            index = np.frombuffer(blocks, np.int32)
            last = of[index]
            foreign = array("i")
            foreign.frombytes(index[(last != mine) & (last != _CLEAN)].tobytes())
            of[index] = mine
        if foreign:
            self.wipe(foreign)
            self.num_wiped += len(foreign)

    def restore(self, runs: Iterable[tuple[str, BlockTable]]) -> None:
        """Take over a pool of an earlier life: what is not in a run may hold anybody's data."""
        self._of = np.full(self._num_blocks, _UNKNOWN, np.int32)
        for tenant, blocks in runs:
            self._of[np.frombuffer(blocks, np.int32)] = self._number(tenant)
        if not self._numbers:
            self._number("")

    def _number(self, tenant: str) -> int:
        """Give a tenant's number.  Amortised O(1): those without a block are forgotten in bulk."""
        found = self._numbers.get(tenant)
        if found is None:
            if len(self._numbers) >= 2 * self._num_blocks + _SPARE_NUMBERS:
                there = set(np.unique(self._of).tolist())
                self._numbers = {name: n for name, n in self._numbers.items() if n in there}
            self._last += 1
            found = self._numbers[tenant] = self._last
        return found
