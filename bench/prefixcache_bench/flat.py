"""A cache of block hashes without a tree: LFU as the simulators of the field have it.

Every block is an entry of its own; nothing says that a block is useless once its prefix is gone.
The reference rows for LFU were made by such a cache: it evicts the oldest of the blocks with the
smallest count, which, touched from the root on, is the *head* of a path, and leaves the rest
stranded.  The service never does that (`lfu` there evicts leaves only), so its figures differ in
the fourth digit; this simulator shows that the trace and the definitions are the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from prefixcache_bench.paths import Path


@dataclass(frozen=True, slots=True)
class FlatHits:
    """What a flat cache found."""

    anywhere: list[int]
    """Blocks found, per request, whatever was before them."""
    leading: list[int]
    """Blocks found from the root on: those that can be used."""


def flat_lfu(requests: list[Path], num_blocks: int) -> FlatHits:
    """Simulate least frequently used, oldest first among equals.  O(blocks · log blocks).

    >>> flat_lfu([Path([0, 1], 2, 2), Path([2], 1, 1), Path([0, 1], 2, 2)], 2)
    FlatHits(anywhere=[0, 0, 1], leading=[0, 0, 0])
    """
    uses: dict[int, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []
    anywhere, leading = [], []
    clock = 0
    for request in requests:
        blocks = request.blocks
        anywhere.append(sum(block in uses for block in blocks))
        leading.append(next((i for i, one in enumerate(blocks) if one not in uses), len(blocks)))
        for block in blocks:
            clock += 1
            count = uses[block][0] if block in uses else 0
            if not count and len(uses) >= num_blocks:
                _evict_one(heap, uses)
            uses[block] = (count + 1, clock)
            heappush(heap, (count + 1, clock, block))
    return FlatHits(anywhere, leading)


def _evict_one(heap: list[tuple[int, int, int]], uses: dict[int, tuple[int, int]]) -> None:
    while True:
        count, clock, block = heappop(heap)
        if uses.get(block) == (count, clock):
            del uses[block]
            return
