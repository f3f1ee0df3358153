"""Shortage: how much larger the pool would have had to be for what came back too late.

```
eviction order   oldest ghost … ┊ ghost that a request asks for ┊ … youngest ghost ┊ resident
                                 └──────── its depth, in blocks ────────────────┘
```

An LRU with more room keeps all that the smaller one keeps, and the youngest of its ghosts: a ghost
at depth d would still be there if the pool had d blocks more.  Exact for LRU without leases in the
way; an estimate for other policies.  What no ghost remembers any more is not counted.
"""

from __future__ import annotations

from bisect import bisect_left
from math import ceil

_SHARES = (*(sixteenths / 16 for sixteenths in range(1, 17)), 1.25, 1.5, 2, 3, 4, 6, 8, 12, 16, 32)


class Shortage:
    """Evicted tokens that were asked for again, by the extra blocks that would have kept them.

    >>> shortage = Shortage(800)
    >>> shortage.note(90, num_tokens=64)
    >>> [(extra, tokens) for extra, tokens in shortage.steps() if tokens]
    [(100, 64)]
    """

    __slots__ = ("_extra", "_tokens")

    def __init__(self, num_blocks: int) -> None:
        self._extra = [ceil(share * num_blocks) for share in _SHARES]
        self._tokens = [0] * len(_SHARES)

    def note(self, depth: int, num_tokens: int) -> None:
        """Count tokens of a ghost at that depth.  O(1)."""
        at = bisect_left(self._extra, depth)
        self._tokens[min(at, len(self._tokens) - 1)] += num_tokens

    def steps(self) -> tuple[tuple[int, int], ...]:
        """Give (blocks, tokens that so many more blocks would have kept, and fewer not)."""
        return tuple(zip(self._extra, self._tokens, strict=True))
