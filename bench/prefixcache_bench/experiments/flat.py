"""A cache of block hashes without a tree: LFU as the simulators of the field have it.

```
path  A ─ B ─ C    touched from the root on: of blocks used equally often, A is the oldest
evict one          flat: A, and B and C are stranded         a tree: C, and A ─ B stays usable
```

Every block is an entry of its own; nothing says that a block is useless once its prefix is gone.
Published figures for LFU come from such caches.  They find more blocks anywhere than in an unbroken
prefix, which no cache that keeps prefixes whole can do, whatever its order: there the two numbers
are one.  So the service has no such policy; the experiments have it, as `lfu-flat`, to show that
the traces and the definitions are the same.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from heapq import heappop, heappush

from prefixcache.types import Ledger, Partial
from prefixcache_bench.experiments.outcome import Outcome, Sums
from prefixcache_bench.experiments.paths import Path, paths
from prefixcache_bench.experiments.traces import Trace
from prefixcache_bench.experiments.windows import Windows

FLAT_LFU = "lfu-flat"
"""Its name, where experiments take a policy's."""


@dataclass(frozen=True, slots=True)
class FlatHits:
    """What a flat cache found."""

    anywhere: list[int]
    """Blocks found, per request, whatever was before them."""
    leading: list[int]
    """Blocks found from the root on: those that can be used."""
    evictions: int
    peak: int
    """Most blocks held."""


def flat_lfu(requests: list[Path], num_blocks: int | None) -> FlatHits:
    """Simulate least frequently used, oldest first among equals.  O(blocks · log blocks).

    Args:
        requests: All of them, in order.
        num_blocks: Capacity; None for infinite memory.

    >>> flat_lfu([Path([0, 1], 2, 2), Path([2], 1, 1), Path([0, 1], 2, 2)], 2)
    FlatHits(anywhere=[0, 0, 1], leading=[0, 0, 0], evictions=3, peak=2)
    """
    uses: dict[int, tuple[int, int]] = {}
    heap: list[tuple[int, int, int]] = []
    anywhere, leading = [], []
    clock = evictions = peak = 0
    for request in requests:
        blocks = request.blocks
        anywhere.append(sum(block in uses for block in blocks))
        leading.append(next((i for i, one in enumerate(blocks) if one not in uses), len(blocks)))
        for block in blocks:
            clock += 1
            count = uses[block][0] if block in uses else 0
            if not count and num_blocks is not None and len(uses) >= num_blocks:
                _evict_one(heap, uses)
                evictions += 1
            uses[block] = (count + 1, clock)
            heappush(heap, (count + 1, clock, block))
        peak = max(peak, len(uses))
    return FlatHits(anywhere, leading, evictions, peak)


def replay_flat(
    trace: Trace, block_size: int, num_blocks: int | None, num_windows: int = 1
) -> Outcome:
    """Serve a whole trace from a flat cache under LFU: whole blocks, from the root on.

    Reads the trace only.  What a block was found of whose prefix is gone is booked as evicted.

    Raises:
        InvalidRequest: the block size does not suit the trace.
    """
    began = time.process_time()
    words = trace.words(block_size)
    requests = paths(trace, block_size)
    found = flat_lfu(requests, num_blocks)
    sums = Sums(trace.unit, words, counts_partial=True)
    windows = Windows(trace, sums, num_windows)
    known: set[int] = set()
    now = 0.0
    for request, path, hit in zip(trace.grouped(words), requests, found.leading, strict=True):
        now = max(now, request.t)
        if now >= windows.ends_at:
            windows.turn(now)
        blocks = path.blocks
        seen = next((i for i, one in enumerate(blocks) if one not in known), len(blocks))
        known.update(blocks)
        fates = Ledger(hit=hit * words, evicted=(seen - hit) * words)
        sums.add(fates, request.prompt, request.length)
    windows.turn(now)
    return sums.outcome(
        trace,
        block_size=block_size,
        capacity_blocks=num_blocks,
        policy=FLAT_LFU,
        partial=Partial.OFF,
        evictions=found.evictions,
        peak_blocks=found.peak,
        windows=windows.done,
        cpu_s=time.process_time() - began,
    )


def _evict_one(heap: list[tuple[int, int, int]], uses: dict[int, tuple[int, int]]) -> None:
    while True:
        count, clock, block = heappop(heap)
        if uses.get(block) == (count, clock):
            del uses[block]
            return
