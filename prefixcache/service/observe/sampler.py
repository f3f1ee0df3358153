"""The sampler: once a second the numbers are written down, so that rates can be told.

```
ops      … ── minute ────────────── now      what the last minute's ops took, from two readings
ledger   … ── an hour ───────────── now      second by second
```
"""

from __future__ import annotations

import asyncio
from collections import deque
from dataclasses import dataclass
from time import monotonic, time

from prefixcache.service.backing import Backing
from prefixcache.service.observe.latency import SUM, LatencyHistograms, quantile, total
from prefixcache.types import Ledger

WINDOW_S = 60
"""What "now" means for rates and quantiles."""

HISTORY = 3600
"""Seconds of which the ledger is kept, second by second."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One second's reading: of the numbers, those of which there is an hour."""

    at: float
    """Seconds since the epoch, to be shown."""
    clock: float
    """Seconds by a clock that nobody sets, for rates."""
    requests: int
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class VerbRate:
    """What a verb did in the last minute."""

    verb: str
    count: int
    """Since the start."""
    refused: int
    """Since the start."""
    per_s: float
    p50_s: float | None
    p99_s: float | None


class Sampler:
    """Reads the numbers every second, for as long as the service lives.

    Args:
        backing: whose cache is read, once there is one.
        latency: what the ops are counted in.
    """

    def __init__(self, backing: Backing, latency: LatencyHistograms) -> None:
        self._backing = backing
        self._latency = latency
        self._rows: deque[tuple[float, dict[str, list[int]]]] = deque(maxlen=WINDOW_S + 1)
        self.samples: deque[Sample] = deque(maxlen=HISTORY)
        self._timer: asyncio.TimerHandle | None = None
        self._copy_rows(monotonic())

    def start(self) -> None:
        """Begin; needs a running loop."""
        self._timer = asyncio.get_running_loop().call_later(1.0, self._tick)

    def close(self) -> None:
        """Stop.  Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def read(self) -> None:
        """Write this moment's numbers down.  O(verbs), however much there is of anything else."""
        now = monotonic()
        self._copy_rows(now)
        cache = self._backing.cache
        if cache is None:
            return
        counts = cache.counts(now=now)
        self.samples.append(Sample(time(), now, counts.requests, counts.ledger))

    def requests_per_s(self) -> float:
        """Say how many requests were granted a second in the last minute."""
        samples = self.samples
        if len(samples) < 2:
            return 0.0
        first, last = samples[max(0, len(samples) - WINDOW_S - 1)], samples[-1]
        return (last.requests - first.requests) / max(1e-9, last.clock - first.clock)

    def rates(self) -> list[VerbRate]:
        """Say what each verb that was ever used did in the last minute.  O(verbs)."""
        then, before = self._rows[0]
        span_s = max(1e-9, monotonic() - then)
        refused: dict[str, int] = {}
        for (verb, _), count in self._latency.refused.items():
            refused[verb] = refused.get(verb, 0) + count
        rates = []
        for verb, row in self._latency.rows.items():
            if not row[SUM]:
                continue
            recent = [now - was for now, was in zip(row, before[verb], strict=True)]
            count = total(recent)
            rates.append(
                VerbRate(
                    verb,
                    total(row),
                    refused.get(verb, 0),
                    count / span_s,
                    quantile(recent, 0.5),
                    quantile(recent, 0.99),
                )
            )
        return rates

    def _copy_rows(self, now: float) -> None:
        self._rows.append((now, {verb: row[:] for verb, row in self._latency.rows.items()}))

    def _tick(self) -> None:
        self.read()
        self.start()
