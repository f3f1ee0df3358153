"""The ledger: what became of each prompt token, and the sums.

```
prompt   0 ───────── hit ───── joined ───── partial ── stored, not shareable ── ghosts ────── end
                                                       granularity             evicted  cold
```
"""

from __future__ import annotations

from prefixcache.core.node import Match
from prefixcache.core.radix import RadixTree
from prefixcache.types import TOKEN_BYTES, Ledger, Span

FATES = ("hit", "joined", "partial", "granularity", "evicted", "cold")
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

    __slots__ = ("cold", "evicted", "granularity", "hit", "joined", "joins", "partial", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.joins = 0
        self.hit = self.partial = self.joined = 0
        self.cold = self.evicted = self.granularity = 0

    def add(self, ledger: Ledger) -> None:
        """Count one request."""
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
        self.add(other.total())
        self.requests += other.requests - 1
        self.joins += other.joins - (other.joined > 0)

    def total(self) -> Ledger:
        """Give the sums so far."""
        return Ledger(
            hit=self.hit,
            partial=self.partial,
            joined=self.joined,
            cold=self.cold,
            evicted=self.evicted,
            granularity=self.granularity,
        )
