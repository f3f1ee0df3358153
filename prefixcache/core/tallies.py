"""Tallies: what became of all requests, namespace by namespace, and in a few sums that only grow.

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

from prefixcache.core.ledger import Tally
from prefixcache.types import Ledger, Namespace

MOST_SERIES = 50
"""Names with a series of their own."""

OTHER = Namespace("(other)")
"""The series of all others."""


class Tallies:
    """The sums of one cache.

    >>> tallies = Tallies()
    >>> for salt in ("one", "two"):
    ...     tallies.add(Namespace("m", salt=salt), Ledger(hit=3, cold=1))
    >>> len(tallies), list(tallies.series), tallies.total().requests
    (2, [Namespace(model='m', adapter='', tenant='', salt='')], 2)
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
