"""Hit rate against capacity, for *all* capacities, in one pass (Mattson's stack distance).

LRU over the tree's leaves is a stack algorithm.  A request touches its whole path, the deepest
block first, so a parent is always younger than its children and the block that plain LRU would
drop is always a leaf; and what a cache of C blocks holds are the C youngest blocks of one infinite
stack.  (A sequence longer than the cache keeps its head: the head is the youngest part.)

```
stack, youngest first   [ path of the last request ][ what the one before has left ][ … ]
distance of a block     its place in the stack before the request: a hit if it is ≤ C
```

No block is ever handled alone.  All blocks that the same request touched last, and that lie on the
path of the next one, are consecutive there and in the stack: a *segment*, hit at capacities above
`start` in one slope of `length` blocks.  The tree (the service's own, with infinite memory) tells
the segments: its nodes carry the time of last use.  A Fenwick tree over requests counts how many
blocks are younger.  O(requests · segments · log requests).
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from prefixcache.core.node import Node, Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Namespace
from prefixcache_bench.experiments.traces import Trace

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Curve:
    """Hits at every capacity of one trace at one block size, under LRU, whole blocks only."""

    block_size: int
    prompt_tokens: int
    prompt_blocks: int
    working_set: int
    """Distinct blocks of the trace: more memory than that changes nothing."""
    starts: Counts
    """Where the hits of a segment begin to grow with capacity, sorted."""
    ends: Counts
    """Where they stop, sorted."""
    short_at: Counts
    """Distances of last blocks that are partly filled, sorted."""
    short_by: Counts
    """Tokens that they lack of a whole block, summed from the first."""

    def hit_blocks(self, capacities: Iterable[int]) -> list[int]:
        """Count the blocks hit with a cache of so many blocks.  O(log segments) each."""
        asked = np.asarray(list(capacities), dtype=np.int64)
        grown = _area(self.starts, asked) - _area(self.ends, asked)
        return [int(value) for value in grown]

    def hit_tokens(self, capacities: Iterable[int]) -> list[int]:
        """Count the tokens hit with a cache of so many blocks."""
        asked = list(capacities)
        whole = self.hit_blocks(asked)
        last = np.searchsorted(self.short_at, np.asarray(asked, dtype=np.int64), side="right")
        return [
            blocks * self.block_size - (int(self.short_by[at - 1]) if at else 0)
            for blocks, at in zip(whole, last, strict=True)
        ]

    def hit_rates(self, capacities: Iterable[int]) -> list[float]:
        """Give the token hit rate with a cache of so many blocks."""
        return [tokens / max(1, self.prompt_tokens) for tokens in self.hit_tokens(capacities)]

    def smallest_for(self, share: float) -> int:
        """Give the least capacity in blocks that reaches `share` of what infinite memory gives."""
        ceiling = self.hit_tokens([self.working_set])[0]
        low, high = 1, max(1, self.working_set)
        while low < high:
            middle = (low + high) // 2
            if self.hit_tokens([middle])[0] >= share * ceiling:
                high = middle
            else:
                low = middle + 1
        return low

    def capacities(self, count: int = 200) -> list[int]:
        """Give capacities from one block to the working set, evenly spaced by their logarithm."""
        top = max(1, self.working_set)
        spaced = np.geomspace(1, top, num=count)
        return sorted({1, top, *(round(float(value)) for value in spaced)})

    def knee(self) -> int:
        """Give the capacity where more memory begins to pay less.

        On a logarithmic axis of capacity: the point that stands highest above the straight line
        from the first to the last.
        """
        at = self.capacities(400)
        rates = np.asarray(self.hit_rates(at))
        if len(at) < 3 or rates[-1] == rates[0]:
            return at[-1]
        across = np.log(np.asarray(at, dtype=float))
        across = (across - across[0]) / (across[-1] - across[0])
        up = (rates - rates[0]) / (rates[-1] - rates[0])
        return at[int(np.argmax(up - across))]


def curve(trace: Trace, block_size: int) -> Curve:
    """Find the hits at every capacity.  Reads the trace only.  About 40 µs a request.

    Raises:
        InvalidRequest: the block size does not suit the trace.
    """
    words = trace.words(block_size)
    width = words * TOKEN_BYTES
    stack = LruStack(words, len(trace))
    starts, ends = array("q"), array("q")
    short_at: list[tuple[int, int]] = []
    prompt_blocks = 0
    for request in trace.grouped(words):
        whole = len(request.tokens) // width * width
        limit = (request.prompt - 1 if trace.unit == 1 else request.prompt) // words
        prompt_blocks += -(-request.prompt // words) if trace.unit == 1 else request.prompt // words
        depth = 0
        for start, length in stack.touch(request.namespace, request.tokens[:whole]):
            counted = min(length, limit - depth)
            if counted > 0:
                starts.append(start)
                ends.append(start + counted)
            depth += length
            if depth >= limit > 0 and counted > 0 and limit * block_size > request.length:
                short_at.append((start + counted, limit * block_size - request.length))
    short_at.sort()
    return Curve(
        block_size=block_size,
        prompt_tokens=trace.prompt_tokens,
        prompt_blocks=prompt_blocks,
        working_set=stack.size,
        starts=np.sort(np.asarray(starts, dtype=np.int64)),
        ends=np.sort(np.asarray(ends, dtype=np.int64)),
        short_at=np.asarray([at for at, _ in short_at], dtype=np.int64),
        short_by=np.cumsum(np.asarray([by for _, by in short_at], dtype=np.int64)),
    )


def _area(corners: Counts, asked: Counts) -> Counts:
    """Sum max(0, capacity - corner) over all corners, for each capacity."""
    below = np.searchsorted(corners, asked, side="right")
    sums = np.concatenate(([0], np.cumsum(corners)))
    area: Counts = below * asked - sums[below]
    return area


class LruStack:
    """The infinite LRU stack: the service's tree for who is where, counts for how young."""

    def __init__(self, words: int, num_requests: int) -> None:
        self._tree = RadixTree(words)
        self._roots: dict[Namespace, Root] = {}
        self._counts = [0] * (num_requests + 2)
        """Fenwick tree: blocks by the request that touched them last."""
        self.size = 0

    def touch(self, namespace: Namespace, tokens: bytes) -> list[tuple[int, int]]:
        """Bring a path to the top of the stack.

        Args:
            namespace: Whose tree.
            tokens: Whole blocks.

        Returns:
            The segments of the path that are known, from its first block: how many blocks lay
            above each in the stack, and its length in blocks.
        """
        tree = self._tree
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = Root(namespace)
        match = tree.match(root, tokens)
        node = tree.lock(match)
        runs = _runs(node)
        segments: list[tuple[int, int, int, int]] = []
        for last, length in runs:
            above = self.size - self._until(last)
            same = 0
            if segments and segments[-1][2] == last:
                same = segments[-1][3] + segments[-1][1]
            segments.append((above + same, length, last, same))
        new = (len(tokens) - match.end) // tree.block_bytes
        if new:
            node = tree.insert(node, tokens[match.end :], _NO_IDS * new).node
        tree.unlock(node)
        known = 0
        for last, length in runs:
            self._add(last, -length)
            known += length
        self._add(tree.clock, known + new)
        self.size += new
        return [(start, length) for start, length, _, _ in segments]

    def _add(self, at: int, count: int) -> None:
        counts, size = self._counts, len(self._counts)
        while at < size:
            counts[at] += count
            at += at & -at

    def _until(self, at: int) -> int:
        """Count the blocks that were touched last by request `at` or before."""
        counts, total = self._counts, 0
        while at > 0:
            total += counts[at]
            at -= at & -at
        return total


_NO_IDS = array("i", [0])


def _runs(node: Node) -> list[tuple[int, int]]:
    """Give (time of last use, blocks) of the nodes from the root to `node`."""
    runs = []
    while node.parent is not None:
        runs.append((node.last_used, len(node.blocks)))
        node = node.parent
    runs.reverse()
    return runs
