"""One use of a path, and the shadow: what an exact LRU of the same capacity would hold.

```
request 7   ■ ■ ■ ■ ■ ■ ■ ■          all 8 blocks belong to use 7
request 9   ■ ■ ■ ▪ ▪                use 9 took the first 3 over; use 7 keeps the last 5
```

A later use of the same path takes a head of it, and eviction cuts at its end (into ghosts, which
stay with the use); so what a use still owns is one stretch at the end of its path, at most one leaf
is in it, and all of it is of one age.
"""

from __future__ import annotations

from collections import deque
from math import exp
from typing import TYPE_CHECKING

from prefixcache.core.children import common_prefix
from prefixcache.types import TOKEN_BYTES

if TYPE_CHECKING:
    from prefixcache.core.node import Match, Node

_BEHIND, _CAUGHT_UP = 0.005, 0.0005
"""Shares of recent blocks by which an LRU must be ahead to take over, and to give back."""


_SPARE = 64


class Use:
    """One use of a path: the blocks that no later use has taken over, resident or ghosts."""

    __slots__ = ("age", "kinds", "leaf", "length", "number", "size", "time")

    def __init__(self, number: int, time: int, length: int) -> None:
        self.number = number
        self.time = time
        """Block visits before it."""
        self.length = length
        """Blocks of its path."""
        self.size = 0
        """Blocks that it still owns, ghosts included."""
        self.kinds: dict[int, int] = {}
        """The same, by kind."""
        self.age = 0
        """The bucket that it has reached; the number of buckets once it is forgotten."""
        self.leaf: Node | None = None
        """The leaf among its blocks, if it was put into the queue."""

    def take(self, kind: int, num_blocks: int) -> None:
        """Own blocks."""
        self.size += num_blocks
        self.kinds[kind] = self.kinds.get(kind, 0) + num_blocks

    def drop(self, kind: int, num_blocks: int) -> None:
        """Own blocks no longer."""
        self.size -= num_blocks
        left = self.kinds[kind] - num_blocks
        if left:
            self.kinds[kind] = left
        else:
            del self.kinds[kind]


class Shadow:
    """An exact LRU of the same capacity, by whole uses, and the score against it.

    Marks are `(use, …)`: a block is in the LRU if its use is not older than `first`; of the use at
    the edge the head of what it owns is.  Ghosts beyond the capacity make that exact.
    """

    __slots__ = (
        "_behind",
        "_edge",
        "_seen",
        "_size",
        "_tidy_at",
        "_uses",
        "first",
        "leads",
        "num_blocks",
    )

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.first = 0
        """Number of the oldest use that is in the LRU as a whole."""
        self.leads = False
        """Whether the LRU is ahead, and should decide."""
        self._uses: deque[Use] = deque()
        self._tidy_at = _SPARE
        """Length of `_uses` at which those are dropped that later ones have taken over whole."""
        self._size = 0
        self._edge: Use | None = None
        self._behind = 0.0
        self._seen = 0.0

    def add(self, use: Use, num_joined: int) -> None:
        """Put a use in; `num_joined` of its blocks were not in it.  Amortised O(1)."""
        self._uses.append(use)
        if len(self._uses) > self._tidy_at:
            self._uses = deque(one for one in self._uses if one.size)
            self._tidy_at = 2 * len(self._uses) + _SPARE
        self._size += num_joined
        while self._size > self.num_blocks:
            self._edge = self._uses.popleft()
            self._size -= self._edge.size
            self.first = self._edge.number + 1

    def compare(self, match: Match, tokens: bytes, width: int, run: float) -> None:
        """Count what the LRU would have found of a request.  O(nodes passed).

        Args:
            match: What was found.
            tokens: The request.
            width: Bytes of a block.
            run: Blocks of an average request.
        """
        size = -(-len(tokens) // width)
        keep = exp(-size / (16 * max(self.num_blocks, 8 * run)))
        ahead = self._found(match, tokens, width) - match.end // width
        self._behind = self._behind * keep + ahead
        self._seen = self._seen * keep + size
        if self.leads:
            self.leads = self._behind >= _CAUGHT_UP * self._seen
        else:
            self.leads = self._behind > max(_BEHIND * self._seen, 2 * run)

    def _found(self, match: Match, tokens: bytes, width: int) -> int:
        """Count the leading blocks of a request that the LRU holds."""
        node, found = match.node, match.end // width
        after = found - match.used
        if match.used == len(node.blocks) and self._holds(node, after, match.used) == match.used:
            return found + self._found_below(node, tokens, match.end, width)
        size = match.used
        at: Node | None = node
        while at is not None and at.parent is not None:
            held = self._holds(at, after, size)
            if held:
                return after + held
            at = at.parent
            size = len(at.blocks)
            after -= size
        return 0

    def _found_below(self, node: Node, tokens: bytes, off: int, width: int) -> int:
        """Count the blocks among the ghosts below a node that the LRU holds."""
        limit = len(tokens) - TOKEN_BYTES
        start = off
        while node.ghosts and off + width <= limit:
            ghost = node.ghosts.get(tokens[off : off + width])
            if ghost is None or ghost.mark is None:
                break
            size = len(ghost.key)
            same = common_prefix(tokens, off, ghost.key, 0, min(size, limit - off)) // width
            held = self._holds(ghost, off // width, same)
            off += held * width
            if held * width < size:
                break
            node = ghost
        return (off - start) // width

    def _holds(self, node: Node, start: int, size: int) -> int:
        """Count how many of a node's first `size` blocks, at `start`, the LRU holds."""
        if node.mark is None:
            return size
        use: Use = node.mark[0]
        if use.number >= self.first:
            return size
        if use is not self._edge:
            return 0
        end = use.length - use.size + self.num_blocks - self._size
        return max(0, min(size, end - start))
