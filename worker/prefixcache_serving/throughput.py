"""How many answers are finished in a second in which any is being computed.

```
        busy              idle                busy
finished  1 1  1 1                           1  1 11       those count, by how long ago they were
time      ─────────                          ────────      so does this; of an idle time nothing
```
Who finds the queue full is told by it when to come again.  Averaged over a past in which there was
nothing to do, it would be far too low just when a crowd arrives.
"""

from __future__ import annotations

import math
from typing import Final

FORGET_S: Final = 30.0
"""Busy seconds after which what was measured counts as a third."""


class Throughput:
    """Answers finished, and the time that they took.  O(1).

    >>> measured = Throughput()
    >>> measured.begin(1000.0)
    >>> measured.wait_s(20, 1000.0) is None
    True
    >>> for tenth in range(1, 11):
    ...     measured.count(1000.0 + tenth / 10)
    >>> measured.wait_s(20, 1001.0)
    2.0
    """

    def __init__(self) -> None:
        self._count = 0.0
        self._busy_s = 0.0
        self._until_s = 0.0
        self._is_known = False

    def begin(self, now: float) -> None:
        """Note that until now nothing was being computed."""
        self._until_s = now

    def count(self, now: float) -> None:
        """Note that an answer was finished."""
        self._pass(now)
        self._count += 1
        self._is_known = True

    def wait_s(self, num: int, now: float) -> float | None:
        """Say how long so many answers take; None: it is not known, as none was finished yet."""
        self._pass(now)
        if not self._is_known:
            return None
        return num * self._busy_s / self._count if self._count else math.inf

    def _pass(self, now: float) -> None:
        passed_s = max(0.0, now - self._until_s)
        kept = math.exp(-passed_s / FORGET_S)
        self._count *= kept
        self._busy_s = self._busy_s * kept + passed_s
        self._until_s = now
