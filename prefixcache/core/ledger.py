"""The ledger: what became of each prompt token, and the sums.

```
prompt   0 ── hit ── restored ─ joined ──── partial ── stored, not shareable ── ghosts ────── end
                └──── resumed: its own ────┘           granularity             evicted  cold
```
A request that comes again under its id finds what it had computed itself before: that is no hit.
What one that asks for segments takes of them is approximate, in place of what it would be else.

**Tallies.**  What became of all requests, namespace by namespace, and in a few sums that only grow.

```
namespace   m, salt 1 ──┐
            m, salt 2 ──┼──► series  m         the first 50 names, whatever the salt
            m         ──┘
            z         ─────► series  (other)   all that came later
```
Every request is counted twice: in its namespace, which may go, and in its series, which never does.
So what is read every second is a sum over the series, however many namespaces there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from prefixcache.core.node import Match
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Ledger, Namespace, Span

MOST_SERIES = 50
"""Names with a series of their own."""

OTHER = Namespace("(other)")
"""The series of all others."""

FATES = (
    *("hit", "restored", "joined", "partial", "resumed"),
    *("approximate", "granularity", "evicted", "cold"),
)
"""In the order in which they follow one another in a prompt; what is approximate may lie anywhere
behind what is not, and is told in one piece."""


def settle(
    tree: RadixTree,
    match: Match,
    tokens: bytes,
    *,
    partial: int,
    joined: int = 0,
    restored: int = 0,
) -> Ledger:
    """Say what becomes of each token of a prompt.  Changes nothing.

    Args:
        tree: The tree that the match is from.
        match: The longest stored prefix, of all tokens but the last.
        tokens: The prompt.
        partial: Tokens that are reused by a copy.
        joined: Of the whole blocks' tokens, how many another lease computed while this one waited.
        restored: … and how many came back from a tier.
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
    granularity = stored if stored < left else left
    left -= granularity
    evicted = min(max(ghosts, 0), left) if ghosts else 0
    hit = whole - joined - restored
    return Ledger(hit, partial, joined, left - evicted, evicted, granularity, restored=restored)


def unused(ledger: Ledger) -> Ledger:
    """Tell of a request that wants none of what is stored.  The sum stays the same.

    >>> unused(Ledger(hit=96, partial=3, cold=61)) == Ledger(cold=61, granularity=99)
    True
    """
    return ledger._replace(
        hit=0, partial=0, joined=0, restored=0, granularity=ledger.granularity + ledger.reused
    )


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

    >>> resume(Ledger(hit=96, partial=3, cold=61), Begun(Namespace("m"), 32, 99, b"")).resumed
    67
    """
    kept, at = [], 0
    counts = ledger.hit, ledger.restored, ledger.joined, ledger.partial, ledger.approximate
    for count in counts:
        own = max(0, min(at + count, begun.end) - max(at, begun.start))
        kept.append(count - own)
        at += count
    hit, restored, joined, partial, approximate = kept
    return ledger._replace(
        hit=hit,
        restored=restored,
        joined=joined,
        partial=partial,
        approximate=approximate,
        resumed=at - sum(kept),
    )


def approximated(ledger: Ledger, runs: Sequence[tuple[int, int]], num_tokens: int) -> Ledger:
    """Tell what is approximate from what it would have been.  The sum stays the same.

    O(runs).

    Args:
        ledger: Of the same request, without segments.
        runs: First token and end of each run that is found approximately, in order.
        num_tokens: How many of their tokens are used as they are.

    >>> approximated(Ledger(hit=32, cold=48, evicted=16), [(40, 72)], num_tokens=20)[3:]
    (36, 8, 0, 0, 20, 0)
    """
    left, taken = num_tokens, {}
    for span in spans(ledger):
        own = sum([max(0, min(end, span.end) - max(at, span.start)) for at, end in runs])
        taken[span.fate] = min(own, left)
        left -= min(own, left)
    kept = {fate: getattr(ledger, fate) - count for fate, count in taken.items()}
    return ledger._replace(**kept, approximate=num_tokens)


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
        "approximate",
        "cold",
        "evicted",
        "granularity",
        "hit",
        "joined",
        "joins",
        "partial",
        "requests",
        "restored",
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
        self.approximate = self.restored = 0

    def add(self, ledger: Ledger) -> None:
        """Count one request; one that goes on where it was interrupted was counted before."""
        hit, partial, joined, cold, evicted, granularity, resumed, approximate, restored = ledger
        self.hit += hit
        self.partial += partial
        self.cold += cold
        self.granularity += granularity
        if evicted:
            self.evicted += evicted
        if restored:
            self.restored += restored
        if joined:
            self.joined += joined
            self.joins += 1
        if approximate:
            self.approximate += approximate
        if resumed:
            self.resumed += resumed
        else:
            self.requests += 1

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
        self.approximate += other.approximate
        self.restored += other.restored

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
            approximate=self.approximate,
            restored=self.restored,
        )


class Tallies:
    """The sums of one cache.

    >>> tallies = Tallies()
    >>> for salt in ("one", "two"):
    ...     tallies.add(Namespace("m", salt=salt), Ledger(hit=3, cold=1))
    >>> len(tallies), [name.salt for name in tallies.series], tallies.total().requests
    (2, [''], 2)
    """

    __slots__ = ("_namespaces", "series")

    def __init__(self) -> None:
        self._namespaces: dict[Namespace, Tally] = {}
        self.series: dict[Namespace, Tally] = {}
        """By name without salt, in the order of their first requests; `OTHER` may be among them."""

    def __len__(self) -> int:
        return len(self._namespaces)

    def add(self, namespace: Namespace, ledger: Ledger) -> None:
        """Count a request.  O(1)."""
        tally = self._namespaces.get(namespace)
        if tally is None:
            tally = self._namespaces[namespace] = Tally()
        if (series := tally.series) is None:
            series = tally.series = self._series_of(namespace)
        tally.add(ledger)
        series.add(ledger)

    def rename(self, namespace: Namespace, name: Namespace) -> None:
        """Let what a namespace counted, if anything, be counted under another name.  O(1)."""
        tally = self._namespaces.pop(namespace, None)
        if tally is None:
            return
        self._namespaces.setdefault(name, Tally()).merge(tally)

    def total(self) -> Tally:
        """Give the sums over all.  O(series)."""
        total = Tally()
        for tally in self.series.values():
            total.merge(tally)
        return total

    def names(self) -> list[Namespace]:
        """Give the namespaces that have counted something, oldest first."""
        return list(self._namespaces)

    def get(self, namespace: Namespace) -> Tally | None:
        """Give what one has counted; None: nothing.  O(1)."""
        return self._namespaces.get(namespace)

    def check(self) -> None:
        """Assert that the series have counted what the namespaces have.  O(namespaces)."""
        assert len(self.series) <= MOST_SERIES + 1, f"{len(self.series)} series"
        summed = Tally()
        for tally in self._namespaces.values():
            summed.merge(tally)
        there, wanted = self.total().counts(), summed.counts()
        assert there == wanted, f"the series have counted {there}, the namespaces {wanted}"

    def _series_of(self, namespace: Namespace) -> Tally:
        name = Namespace(namespace.model, namespace.adapter, namespace.tenant)
        if name not in self.series and len(self.series) >= MOST_SERIES:
            name = OTHER
        found = self.series.get(name)
        if found is None:
            found = self.series[name] = Tally()
        return found
