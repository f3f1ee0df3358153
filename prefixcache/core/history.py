"""History: what a cache remembers for people, of requests that are over.

```
before the lock   look ──► Seen: where it parts, and from what; how deep the ghosts were
after the lock    note ──► partings of the hour · shortage · recent requests
```

Two short calls per request, none of which looks at more than the request's own path.
"""

from __future__ import annotations

from typing import Final, NamedTuple

from prefixcache.core.ages import Ages
from prefixcache.core.node import Match, Node
from prefixcache.core.partings import Partings
from prefixcache.core.radix import RadixTree
from prefixcache.core.recent import Recent, Recents
from prefixcache.core.shortage import Shortage
from prefixcache.types import TOKEN_BYTES, Grant, Ledger, Namespace

SHOWN_TOKENS: Final = 64
"""How much of a stored continuation is told."""


class Seen(NamedTuple):
    """What a request looked like before anything was locked for it."""

    parted_at: int | None
    into: int
    """Tokens from the end of the whole blocks to the parting."""
    stored_next: bytes
    extra_blocks: int | None


class History:
    """Partings, shortage, recent requests and the clock's readings of one cache."""

    __slots__ = ("ages", "partings", "recents", "shortage")

    def __init__(self, num_blocks: int) -> None:
        self.ages = Ages()
        self.partings = Partings()
        self.recents = Recents()
        self.shortage = Shortage(num_blocks)

    def look(self, tree: RadixTree, match: Match, tokens: bytes, ledger: Ledger) -> Seen:
        """See where a request parts from what is stored, and what it lacks.

        Counts the shortage.  O(log siblings + ghosts on the path).
        """
        extra = None
        if ledger.evicted:
            for depth, num_tokens in depths(tree, match, tokens, ledger.evicted):
                self.shortage.note(depth, num_tokens)
                extra = depth if extra is None or depth > extra else extra
        run = tree.parting(match, tokens, SHOWN_TOKENS * TOKEN_BYTES)
        if run is None:
            return Seen(None, 0, b"", extra)
        into = match.partial_tokens
        return Seen(match.end // TOKEN_BYTES + into, into, run[into * TOKEN_BYTES :], extra)

    def note(
        self,
        seen: Seen,
        node: Node,
        worker: str,
        namespace: Namespace,
        tokens: bytes,
        request_id: str,
        grant: Grant,
        now: float,
    ) -> None:
        """Remember a granted request.  O(1).  `node`: where its whole blocks end, locked."""
        if seen.parted_at is not None:
            self.partings.note(node, seen.into, now)
        self.recents.add(
            Recent(
                request_id,
                worker,
                grant.lease,
                namespace,
                tokens,
                grant.ledger,
                now,
                seen.parted_at,
                seen.stored_next,
                seen.extra_blocks,
            )
        )


def depths(tree: RadixTree, match: Match, tokens: bytes, num_evicted: int) -> list[tuple[int, int]]:
    """Give (extra blocks that would have kept them, tokens) of a prompt's evicted tokens.

    Changes nothing.  O(ghosts on the path).
    """
    found = []
    skip = match.partial_tokens  # those a resident sibling has too
    for count, serial in tree.trail(match, tokens):
        told = min(count - min(skip, count), num_evicted)
        skip -= min(skip, count)
        num_evicted -= told
        if told:
            found.append((tree.ghosts.depth(serial), told))
    return found
