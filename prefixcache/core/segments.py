"""Segments: what a request takes of the same tokens at another place, and where that is kept.

```
exact tree          S S S S ─ D D D D ─ E E E E            computed in full, found by everybody
                      │ exact   └──────┐ donors: whole blocks, at any offset
approximate tree    S S S S ─ x ─ D D D D ─ y y            found only by who asks for segments
```
**The taint is a namespace.**  A request that takes segments leases in the approximate namespace
beside its own: a tree, with all that a tree has.  So what was moved, and all that was computed on
top of it, is never in the exact tree, and no listener is told of it: nobody publishes it, keeps it
across a restart, or indexes it as a donor.  What is exact of such a prompt is copied there.

The next turn of such a chat finds it there.  Which tree is read is decided once for a request: the
approximate one, where that has a block more of it than the exact one.

**What is looked for.**  Whole blocks of the request's own namespace, at any offset behind what was
found already (`rolling_index`): of each stored run of `2 * block_size - 1` tokens at least one.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from prefixcache.core.node import Match, Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.rolling_index import Donor, RollingIndex
from prefixcache.errors import InvalidRequest
from prefixcache.types import (
    TOKEN_BYTES,
    Again,
    BlockId,
    BlockTable,
    Namespace,
    Partial,
    Segment,
)

MOST_SEARCHED = 16384
"""Tokens of a prompt that are looked for elsewhere in one step: about 3 ms."""
MOST_EVICTED = 1024
"""Blocks that are evicted at once for one request's copies; with more, it is served exactly."""


class Found(NamedTuple):
    """What a request would take, and how."""

    kept: Match
    """What is locked for it."""
    is_beside: bool
    """Whether that is of the approximate tree, and read in place; else of the exact one, and copied
    along."""
    source: BlockId | None
    """The block that is copied in part."""
    num_source: int
    """Of so many tokens."""
    num_cached: int
    """Tokens from position 0."""
    segments: tuple[Segment, ...]
    donors: BlockTable
    """Their blocks but for those of `kept`, each once."""
    runs: tuple[tuple[int, int], ...]
    """First token and end of what is approximate, in order."""
    num_approximate: int
    """Tokens of these that are not computed again."""

    @property
    def num_in_place(self) -> int:
        """Bytes of tokens whose blocks are read in place."""
        return self.kept.end if self.is_beside else 0


class Segments:
    """Finds segments, where the cache keeps an index of them.

    Args:
        tree: All trees.
        index: Of the whole blocks of the exact ones.
        partial: How much of a partly matching block is reused.
    """

    __slots__ = ("_partial", "_tree", "index")

    def __init__(self, tree: RadixTree, index: RollingIndex, partial: Partial) -> None:
        self._tree = tree
        self.index = index
        self._partial = partial

    def find(
        self,
        exact: Match,
        beside: Root | None,
        tokens: bytes,
        again: Again,
        min_partial: int,
    ) -> Found | None:
        """Find what a prompt may take beside its exact prefix; None: nothing.  Changes nothing.

        O(tokens, up to `MOST_SEARCHED`), and a step in Python for each block found.

        Args:
            exact: Its exact prefix, in its own namespace.
            beside: The root of the approximate namespace, if there is one.
            tokens: The prompt.
            again: What is computed again.
            min_partial: Tokens in a partly matching block from which on it is copied.
        """
        tree, size = self._tree, self.index.block_size
        limit = len(tokens) - TOKEN_BYTES
        kept, is_beside = exact, False
        source, num_source = self._usable(exact, min_partial)
        num_cached = exact.end // TOKEN_BYTES + num_source
        if beside is not None:
            near = tree.match(beside, tokens, limit)
            other, num_other = self._usable(near, min_partial)
            num_near = near.end // TOKEN_BYTES + num_other
            if num_near >= num_cached + size:
                kept, is_beside, num_cached = near, True, num_near
                source, num_source = other, num_other
        end = min(limit, (num_cached + MOST_SEARCHED) * TOKEN_BYTES)
        found = self.index.search(exact.node.root.namespace, tokens[:end], num_cached)
        found = [one for one in found if len(one.blocks) * size > again.first]
        if not (found or is_beside):
            return None
        moved = [
            Segment(one.start, one.source, array("i", one.blocks), again.first) for one in found
        ]
        runs = [(one.start + again.first, one.start + len(one.blocks) * size) for one in found]
        num_moved = sum(len(one.blocks) for one in found) * size
        num_used = num_moved - len(found) * again.first - again.count(num_moved)
        if is_beside:
            runs.insert(0, (0, num_cached))
            num_used += num_cached
        elif whole := exact.end // tree.block_bytes:
            moved.insert(0, Segment(0, 0, exact.node.table()[:whole]))
        return Found(
            kept=kept,
            is_beside=is_beside,
            source=source,
            num_source=num_source,
            num_cached=num_cached,
            segments=tuple(moved),
            donors=_each_once(found),
            runs=tuple(runs),
            num_approximate=num_used,
        )

    def _usable(self, match: Match, min_partial: int) -> tuple[BlockId | None, int]:
        """Give the block that is copied in part, and how much of it."""
        source, num_tokens = match.partial_block, match.partial_tokens
        if source is None or self._partial is Partial.OFF or num_tokens < min_partial:
            return None, 0
        return source, num_tokens


def beside(namespace: Namespace) -> Namespace:
    """Give the namespace of what is approximate beside an exact one."""
    return namespace._replace(approximate=True)


def check_again(again: Again) -> None:
    """Refuse a policy that means nothing.

    Raises:
        InvalidRequest: As said.
    """
    if again.first < 0 or not 0 <= again.share <= 1 or (again.first and again.share):
        raise InvalidRequest(
            f"segments of which the first {again.first} tokens and {again.share:g} of all are "
            "computed again: give a number of first tokens, or a share from 0 to 1, not both"
        )


def _each_once(found: Sequence[Donor]) -> BlockTable:
    ids = np.array([block for one in found for block in one.blocks], np.int32)
    return array("i", np.unique(ids).tobytes())
