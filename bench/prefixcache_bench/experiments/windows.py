"""The ledger over time: running sums, cut into windows of equal length."""

from __future__ import annotations

from prefixcache.types import Ledger
from prefixcache_bench.experiments.outcome import Sums, Window
from prefixcache_bench.experiments.traces import Trace


class Windows:
    """Cuts the running sums into equal parts of the trace's time.

    Args:
        trace: The requests.
        sums: What grows with each of them.
        count: How many parts.
    """

    def __init__(self, trace: Trace, sums: Sums, count: int) -> None:
        times = [request.t for request in trace.requests] or [0.0]
        self._start = min(times)
        self._span = (max(times) - self._start) / max(1, count)
        self._count = count
        self._sums = sums
        self._before = (0, Ledger())
        self.done: list[Window] = []
        self.ends_at = self._end_of(1)
        """When the window that is open now is over."""

    def turn(self, now: float) -> None:
        """Close the window, and those after it that are over by now."""
        ledger, requests = self._sums.ledger(), self._sums.requests
        index = len(self.done)
        self.done.append(
            Window.between(self._start + index * self._span, self._before, requests, ledger)
        )
        self._before = (requests, ledger)
        while (index := len(self.done)) + 1 < self._count and now >= self._end_of(index + 1):
            self.done.append(
                Window.between(self._start + index * self._span, self._before, requests, ledger)
            )
        self.ends_at = self._end_of(len(self.done) + 1)

    def _end_of(self, number: int) -> float:
        return self._start + number * self._span if number < self._count else float("inf")
