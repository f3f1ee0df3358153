"""Leaves by kind and age: cells in an order of worth that may change at any time.

```
cell       kind 3, age 7   heap of uses, the oldest first   ← one bit in `filled`, at its rank
             │ the use grows older: it is put into (3, 8)
             │ its leaf is used again, or evicted: what is left here is dropped at the top
```

A use is in the cell of its leaf.  Re-ranking touches cells, never leaves.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from itertools import compress
from typing import TYPE_CHECKING

from prefixcache.core.hazards import NUM_AGES
from prefixcache.core.uses import Shadow, Use

if TYPE_CHECKING:
    from prefixcache.core.node import Node


_SPARE = 1024
"""Entries out of date that may be kept beside three times as many as there are leaves."""


class Cells:
    """The unprotected leaves; the worst cell gives first, or, while the shadow leads, the oldest.

    Marks are `(use, uses, kind)`.
    """

    __slots__ = (
        "_ages",
        "_bits",
        "_filled",
        "_heaps",
        "_num_kinds",
        "_num_put",
        "_order",
        "_powers",
        "_shadow",
        "_tidy_at",
        "_unmarked",
    )

    def __init__(self, num_kinds: int, shadow: Shadow) -> None:
        self._num_kinds = num_kinds
        self._shadow = shadow
        self._heaps: list[list[tuple[int, Use]]] = [[] for _ in range(num_kinds * NUM_AGES)]
        self._powers = [1 << rank for rank in range(num_kinds * NUM_AGES)]
        self._order: list[int] = []
        self._bits: list[int] = []
        self._filled = 0
        self._ages: list[int] = []
        """The bits of all cells of one age, the oldest first; empty until needed."""
        self._unmarked: list[Node] = []
        self._num_put = 0
        """Entries made since all were looked at."""
        self._tidy_at = _SPARE

    def rank(self, order: list[int]) -> None:
        """Give the cells a new order, the worst first.  O(cells)."""
        bits = [0] * len(order)
        for cell, bit in zip(order, self._powers, strict=True):
            bits[cell] = bit
        filled = sum(compress(bits, self._heaps))  # those of the heaps that are not empty
        self._order, self._bits, self._filled, self._ages = order, bits, filled, []

    def push(self, node: Node) -> None:
        """Add a leaf.  O(log leaves), amortised."""
        node.queued = True
        if node.mark is None:
            self._unmarked.append(node)
            self._count()
        else:
            use = node.mark[0]
            use.leaf = node
            cell = self._cell(use)
            if cell >= 0:
                self._put(cell, use)

    def age(self, use: Use) -> None:
        """Put a use that has just grown older into its next cell.  O(log leaves), amortised.

        Uses grow older in order: what is before it in the cell that it leaves is out of date.
        """
        cell = self._cell(use)
        if cell < 0:
            use.leaf = None  # not a leaf now; if it becomes one again, it is pushed
            return
        number = use.number
        left = self._heaps[cell - 1]
        while left and left[0][0] <= number:
            heappop(left)
        self._put(cell, use)

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.  O(log leaves)."""
        while self._unmarked:
            node = self._unmarked.pop()
            node.queued = False
            if node.is_evictable and node.mark is None:
                return node
            if node.is_evictable:
                self.push(node)
        use = self._oldest() if self._shadow.leads else self._worst()
        if use is None or use.leaf is None:
            return None
        heappop(self._heaps[self._cell(use)])
        use.leaf.queued = False
        return use.leaf

    def _put(self, cell: int, use: Use) -> None:
        heappush(self._heaps[cell], (use.number, use))
        self._filled |= self._bits[cell]
        self._count()

    def _count(self) -> None:
        """Count an entry; now and then drop what belongs elsewhere by now.  Amortised O(1)."""
        self._num_put += 1
        if self._num_put <= self._tidy_at:
            return
        self._num_put = 0
        self._unmarked = [
            node
            for node in dict.fromkeys(self._unmarked)
            if node.is_evictable and node.mark is None
        ]
        living = len(self._unmarked)
        for cell, heap in enumerate(self._heaps):
            if heap:
                there = {entry[0]: entry for entry in heap if self._cell(entry[1]) == cell}
                heap[:] = there.values()
                heapify(heap)
                living += len(heap)
        self._tidy_at = max(_SPARE, 2 * living)

    def _worst(self) -> Use | None:
        while self._filled:
            lowest = self._filled & -self._filled
            use = self._head(self._order[lowest.bit_length() - 1])
            if use is not None:
                return use
        return None

    def _oldest(self) -> Use | None:
        """Give the oldest use.  O(kinds), and O(cells) once after each ranking."""
        if not self._ages:
            self._ages = [sum(self._bits[age::NUM_AGES]) for age in range(NUM_AGES - 1, -1, -1)]
        for mask in self._ages:
            oldest: Use | None = None
            left = self._filled & mask
            while left:
                lowest = left & -left
                left ^= lowest
                use = self._head(self._order[lowest.bit_length() - 1])
                if use is not None and (oldest is None or use.number < oldest.number):
                    oldest = use
            if oldest is not None:
                return oldest
        return None

    def _head(self, cell: int) -> Use | None:
        """Give a cell's oldest use; drop those that are elsewhere by now."""
        heap = self._heaps[cell]
        while heap:
            use = heap[0][1]
            if self._cell(use) == cell:
                return use
            heappop(heap)
        self._filled &= ~self._bits[cell]
        return None

    def _cell(self, use: Use) -> int:
        """Give where a use belongs; -1 if it has no leaf now."""
        leaf = use.leaf
        # `leaf.is_evictable`, written out: this is the policy's most frequent question.
        if leaf is None or leaf.ref or leaf.children or leaf.parent is None or not leaf.blocks:
            return -1
        mark = leaf.mark
        if mark is None or mark[0] is not use:
            return -1
        kind: int = mark[2]
        age = use.age
        return kind * NUM_AGES + (age if age < NUM_AGES else NUM_AGES - 1)
