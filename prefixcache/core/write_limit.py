"""A limit on what is written to a disk: so many blocks a second, and none while it fails.

```
allowed   ▁▂▃▄▅▆▇█████▃▄▅▆  a second's worth at most is saved up; what is written is taken off
              held: 0 ░░░░ ▁▂▃   after a failure nothing is written for a time
```
What is over the limit is not written later: it is given up.
"""

from __future__ import annotations

import math
from typing import Final

_SAVED_S: Final = 1.0


class WriteLimit:
    """How many blocks may be written now.

    Args:
        per_s: Blocks a second; infinity: no limit.
        least: Blocks that may be written at once when nothing was for long, whatever the rate.

    >>> limit = WriteLimit(100.0, 16)
    >>> limit.allowed(0.0)
    100
    >>> limit.spend(100)
    >>> limit.allowed(0.0), limit.allowed(0.5)
    (0, 50)
    >>> limit.give_back(40)
    >>> limit.allowed(0.5)
    90
    >>> limit.hold_until(9.0)
    >>> limit.allowed(8.9), limit.allowed(9.0)
    (0, 100)
    """

    __slots__ = ("_at", "_held_until", "_left", "_most", "per_s")

    def __init__(self, per_s: float, least: int) -> None:
        self.per_s = per_s
        self._most = max(float(least), per_s * _SAVED_S)
        self._left = self._most
        self._at = -math.inf
        self._held_until = -math.inf

    def allowed(self, now: float) -> int:
        """Say how many blocks may be written now.  O(1)."""
        if now < self._held_until:
            return 0
        if math.isinf(self.per_s):
            return 2**31 - 1
        self._left = min(self._most, self._left + max(0.0, now - self._at) * self.per_s)
        self._at = max(self._at, now)
        return int(self._left)

    def spend(self, num_blocks: int) -> None:
        """Take off what is being written.  O(1)."""
        if not math.isinf(self.per_s):
            self._left -= num_blocks

    def give_back(self, num_blocks: int) -> None:
        """Put back what is not written after all.  O(1)."""
        self.spend(-num_blocks)

    def hold_until(self, when: float) -> None:
        """Let nothing be written before that time.  O(1)."""
        self._held_until = max(self._held_until, when)

    def is_held(self, now: float) -> bool:
        """Whether nothing is written because of a failure.  O(1)."""
        return now < self._held_until
