"""An LRU list of blocks, by whole uses: who is in it, and who has fallen out at its end.

```
stamps   … 17  18  19  20  21            a stamp is one use; its blocks are those that were last
blocks      3   9 │ 2   6   1            used by it
      fallen out  │ in the list          `oldest` = 19
```

Uses fall out whole, oldest first; so membership is one comparison of stamps, and the list costs
nothing per block.
"""

from __future__ import annotations

from collections import deque

_SPARE = 64
"""Uses that own nothing any more, which may be kept beside as many as own something."""


class LruList:
    """How many blocks each use still owns, and from which use on they are in the list."""

    __slots__ = ("_counts", "_fell", "_order", "oldest", "size")

    def __init__(self) -> None:
        self.size = 0
        self.oldest = 0
        self._order: deque[int] = deque()
        self._counts: dict[int, int] = {}
        self._fell: dict[int, int] = {}

    def enter(self, stamp: int, num_blocks: int) -> None:
        """Add blocks at the young end.  Stamps never go back.  Amortised O(1)."""
        counts, order = self._counts, self._order
        counts[stamp] = counts.get(stamp, 0) + num_blocks
        if not order or order[-1] != stamp:
            order.append(stamp)
            if len(order) > 2 * len(counts) + _SPARE:
                self._order = deque(one for one in order if one in counts)
        self.size += num_blocks

    def leave(self, stamp: int, num_blocks: int) -> None:
        """Take blocks that this use owned out, wherever they are.  O(1)."""
        left = self._counts[stamp] - num_blocks
        if left:
            self._counts[stamp] = left
        else:
            del self._counts[stamp]
        if stamp >= self.oldest:
            self.size -= num_blocks
        elif not left:
            del self._fell[stamp]

    def shrink(self, limit: int, now: int) -> None:
        """Let the oldest uses fall out until at most `limit` blocks are left.  Amortised O(1)."""
        while self.size > limit:
            stamp = self._order.popleft()
            self.oldest = stamp + 1
            count = self._counts.get(stamp, 0)
            self.size -= count
            if count:
                self._fell[stamp] = now

    def fell_at(self, stamp: int) -> int | None:
        """Give when the use fell out; None while it is in the list."""
        return None if stamp >= self.oldest else self._fell[stamp]
