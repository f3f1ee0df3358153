"""Belady's bound: what a cache could find that knew all future requests.

```
now          request ■ ■ ■ ■ ■      its whole path is in memory while it runs, whatever comes
cached       ● next use 3 · ● next use 7 · ● never again     the farthest goes first
```

The next use of a block is never before that of its parent, so the farthest block is a leaf (the
deepest one of several): the bound keeps every prefix whole, like the service.

*Without bypass* the running path takes its place in the cache: room for its new blocks must be made
even if they are never used again.  That is how the service works, and this is the bound for it.
*With bypass* a request runs in memory of its own, and only the best of what was cached and what is
new is kept: a bound for engines that can leave results uncached.
"""

from __future__ import annotations

from heapq import heappop, heappush

from prefixcache_bench.experiments.paths import Path

_NEVER = 1 << 60


def belady(requests: list[Path], num_blocks: int, *, bypass: bool = False) -> list[int]:
    """Simulate the optimal cache.  O(blocks · log blocks).

    Args:
        requests: All of them, in order.
        num_blocks: Capacity.  A path that is longer keeps its head.
        bypass: Whether a request may leave its blocks uncached.

    Returns:
        Leading blocks found, per request.
    """
    following = _next_uses(requests)
    next_use: dict[int, int] = {}
    heap: list[tuple[int, int, int]] = []
    hits = []
    for number, request in enumerate(requests):
        blocks = request.blocks
        cached = next((i for i, one in enumerate(blocks) if one not in next_use), len(blocks))
        hits.append(min(cached, request.askable))
        kept = blocks[:num_blocks]
        if not bypass:
            # Room first: the blocks of this request are not to be touched.
            for block in kept[:cached]:
                next_use[block] = number
            short = len(next_use) + len(kept) - min(cached, len(kept)) - num_blocks
            _evict(heap, next_use, short, number)
        for depth, (block, after) in enumerate(zip(kept, following[number], strict=False)):
            next_use[block] = after
            heappush(heap, (-after, -depth, block))
        _evict(heap, next_use, len(next_use) - num_blocks, number)
    return hits


def _next_uses(requests: list[Path]) -> list[list[int]]:
    """Give, for every block of every request, the number of the next request that has it."""
    seen: dict[int, int] = {}
    following: list[list[int]] = [[] for _ in requests]
    for number in range(len(requests) - 1, -1, -1):
        blocks = requests[number].blocks
        following[number] = [seen.get(block, _NEVER) for block in blocks]
        seen.update(dict.fromkeys(blocks, number))
    return following


def _evict(
    heap: list[tuple[int, int, int]], next_use: dict[int, int], count: int, now: int
) -> None:
    """Remove the blocks whose next use is farthest; entries that are out of date are dropped."""
    while count > 0:
        after, _, block = heappop(heap)
        if next_use.get(block) == -after and -after != now:
            del next_use[block]
            count -= 1
