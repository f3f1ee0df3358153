"""Latency histograms: how long each verb takes, how often it is refused, counted where ops run.

```
ns       1 ──── 2 ──── 4 ──── 8 ── … ── 2^k ──── 2^(k+1)         bucket k+1: 2^k to 2^(k+1) - 1
```
A duration's bucket is its bit length: no search, no float, no allocation.  One op costs two reads
of the clock (one within a batch: the end of an op is the beginning of the next), two additions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from time import perf_counter_ns

NUM_BUCKETS = 64
"""Bucket k holds durations of k bits; 2^63 ns are three centuries."""

SUM = NUM_BUCKETS
"""Index of a row at which the sum of its durations stands, in ns."""

clock = perf_counter_ns


class LatencyHistograms:
    """Rows of counts, one for each verb, and what was refused.

    >>> latency = LatencyHistograms(["acquire"])
    >>> latency.took(latency.rows["acquire"], 1500)
    >>> latency.rows["acquire"][1500 .bit_length()], total(latency.rows["acquire"])
    (1, 1)
    """

    def __init__(self, verbs: Iterable[str]) -> None:
        self.rows: dict[str, list[int]] = {verb: empty_row() for verb in verbs}
        self.refused: Counter[tuple[str, str]] = Counter()
        """By verb and name of the error."""

    @staticmethod
    def took(row: list[int], ns: int) -> None:
        """Count one duration, which is not negative.  O(1)."""
        row[ns.bit_length()] += 1
        row[SUM] += ns

    def refuse(self, verb: str, error: Exception) -> None:
        """Count an op that was answered with an error."""
        self.refused[verb, type(error).__name__] += 1


def empty_row() -> list[int]:
    """Make a row: the counts, and the sum of the durations."""
    return [0] * (NUM_BUCKETS + 1)


def total(row: Sequence[int]) -> int:
    """Count the durations of a row."""
    return sum(row) - row[SUM]


def quantile(row: Sequence[int], share: float) -> float | None:
    """Estimate the duration in seconds that `share` of a row's do not exceed; None if it is empty.

    Linear within its bucket, so at most a factor of two off.

    >>> row = empty_row()
    >>> for ns in range(1024, 2048):
    ...     LatencyHistograms.took(row, ns)
    >>> round(quantile(row, 0.5) * 1e9)
    1536
    """
    count = total(row)
    if not count:
        return None
    rank = share * count
    for bits in range(NUM_BUCKETS):
        if rank <= row[bits]:
            low, high = (1 << bits) >> 1, 1 << bits
            return (low + (high - low) * rank / row[bits] if row[bits] else low) / 1e9
        rank -= row[bits]
    return (1 << (NUM_BUCKETS - 1)) / 1e9
