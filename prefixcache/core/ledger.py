"""The ledger: what became of each prompt token, and the sums.

```
prompt   0 ───────── hit ───── joined ───── partial ── stored, not shareable ── ghosts ────── end
                └──── resumed: its own ────┘           granularity             evicted  cold
```
A request that comes again under its id finds what it had computed itself before: that is no hit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

from prefixcache.core.node import Match
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Ledger, Namespace, Span

FATES = ("hit", "joined", "partial", "resumed", "granularity", "evicted", "cold")
"""In the order in which they follow one another in a prompt."""


def settle(
    tree: RadixTree, match: Match, tokens: bytes, *, partial: int, joined: int = 0
) -> Ledger:
    """Say what becomes of each token of a prompt.  Changes nothing.

    Args:
        tree: The tree that the match is from.
        match: The longest stored prefix, of all tokens but the last.
        tokens: The prompt.
        partial: Tokens that are reused by a copy.
        joined: Of the whole blocks' tokens, how many another lease computed while this one waited.
    """
    total = len(tokens) // TOKEN_BYTES
    whole = match.end // TOKEN_BYTES
    left = total - whole - partial
    # What is stored but not shared: what partial reuse may not take, and the last token, which is
    # computed for its logits even if it is stored.
    stored = match.partial_tokens - partial
    ghosts = 0
    if stored + 1 >= left:
        exact = tree.match(match.node.root, tokens)
        stored = exact.end // TOKEN_BYTES + exact.partial_tokens - whole - partial
        if stored < left:
            ghosts = tree.remembered(exact, tokens) // TOKEN_BYTES - exact.partial_tokens
    elif match.node.ghosts:
        ghosts = tree.remembered(match, tokens) // TOKEN_BYTES - match.partial_tokens
    granularity = min(stored, left)
    evicted = min(max(ghosts, 0), left - granularity)
    cold = left - granularity - evicted
    return Ledger(whole - joined, partial, joined, cold, evicted, granularity)


class Begun(NamedTuple):
    """What a request had computed itself when its lease ended: it may come again."""

    namespace: Namespace
    start: int
    """Tokens that it had found; what follows it computed."""
    end: int
    """Tokens that held valid KV in the end."""
    last: bytes
    """The last of these tokens, packed: another prompt under the same id is told apart by them."""

    def is_of(self, namespace: Namespace, tokens: bytes) -> bool:
        """Whether a prompt goes on where that one ended."""
        end = self.end * TOKEN_BYTES
        return namespace == self.namespace and tokens[:end].endswith(self.last)


def resume(ledger: Ledger, begun: Begun) -> Ledger:
    """Tell what a request had computed itself from what others had.  The sum stays the same.

    >>> resume(Ledger(hit=96, partial=3, cold=61), Begun(Namespace("m"), 32, 99, b""))
    Ledger(hit=32, partial=0, joined=0, cold=61, evicted=0, granularity=0, resumed=67)
    """
    kept, at = [], 0
    for count in (ledger.hit, ledger.joined, ledger.partial):
        own = max(0, min(at + count, begun.end) - max(at, begun.start))
        kept.append(count - own)
        at += count
    hit, joined, partial = kept
    return replace(ledger, hit=hit, joined=joined, partial=partial, resumed=at - sum(kept))


def spans(ledger: Ledger) -> tuple[Span, ...]:
    """Lay a ledger out along the prompt.

    >>> spans(Ledger(hit=16, cold=4))
    (Span(start=0, end=16, fate='hit'), Span(start=16, end=20, fate='cold'))
    """
    found, start = [], 0
    for fate in FATES:
        count = getattr(ledger, fate)
        if count:
            found.append(Span(start, start + count, fate))
            start += count
    return tuple(found)


class Tally:
    """Sums of ledgers."""

    __slots__ = (
        "cold",
        "evicted",
        "granularity",
        "hit",
        "joined",
        "joins",
        "partial",
        "requests",
        "resumed",
        "series",
    )

    def __init__(self) -> None:
        self.series: Tally | None = None
        """The sum that counts along, once there was a request; None: this is one."""
        self.requests = 0
        self.joins = 0
        self.hit = self.partial = self.joined = 0
        self.cold = self.evicted = self.granularity = self.resumed = 0

    def add(self, ledger: Ledger) -> None:
        """Count one request; one that goes on where it was interrupted was counted before."""
        if ledger.resumed:
            self.resumed += ledger.resumed
        else:
            self.requests += 1
        self.hit += ledger.hit
        self.partial += ledger.partial
        if ledger.joined:
            self.joined += ledger.joined
            self.joins += 1
        self.cold += ledger.cold
        self.evicted += ledger.evicted
        self.granularity += ledger.granularity

    def merge(self, other: Tally) -> None:
        """Add the sums of another tally."""
        self.requests += other.requests
        self.joins += other.joins
        self.hit += other.hit
        self.partial += other.partial
        self.joined += other.joined
        self.cold += other.cold
        self.evicted += other.evicted
        self.granularity += other.granularity
        self.resumed += other.resumed

    def counts(self) -> tuple[int, int, Ledger]:
        """Give the requests, those that joined a flight, and the sums: all that is compared."""
        return self.requests, self.joins, self.total()

    def total(self) -> Ledger:
        """Give the sums so far."""
        return Ledger(
            hit=self.hit,
            partial=self.partial,
            joined=self.joined,
            cold=self.cold,
            evicted=self.evicted,
            granularity=self.granularity,
            resumed=self.resumed,
        )
