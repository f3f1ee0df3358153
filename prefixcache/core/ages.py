"""Ages: when the logical clock showed what, so that people are told seconds."""

from __future__ import annotations

from bisect import bisect_left

_EVERY_S = 1.0
_MOST = 8192


class Ages:
    """Readings of the tree's clock, at most one a second, the last two hours at least.

    >>> ages = Ages()
    >>> for stamp, now in ((1, 10.0), (2, 20.0), (3, 30.0)):
    ...     ages.note(stamp, now)
    >>> ages.idle_s(2, now=35.0)
    15.0
    """

    __slots__ = ("_stamps", "_times")

    def __init__(self) -> None:
        self._stamps: list[int] = []
        self._times: list[float] = []

    def note(self, stamp: int, now: float) -> None:
        """Take a reading.  Amortised O(1)."""
        times = self._times
        if times and now - times[-1] < _EVERY_S:
            return
        self._stamps.append(stamp)
        times.append(now)
        if len(times) > 2 * _MOST:
            del times[:_MOST], self._stamps[:_MOST]

    def idle_s(self, stamp: int, now: float) -> float | None:
        """Say how long ago the clock showed `stamp`, to a second; None if nobody remembers.

        Changes nothing.  O(log readings).
        """
        if not self._times:
            return None
        # A stamp after the last reading is less than a second younger than that.
        at = min(bisect_left(self._stamps, stamp), len(self._times) - 1)
        if at == 0 and stamp < self._stamps[0] and len(self._times) >= _MOST:
            return None
        return now - self._times[at]
