"""Worth: whether what lies below the pool is fetched, or computed again.

```
fetch    latency + (blocks before it + its own) · seconds a block     learnt of each tier
compute  tokens · seconds a token                                     learnt of each namespace

fetched if  fetch < 0.8 · compute            tokens 1,024-2,048 lie on HOST: 29 ms to fetch,
                                             740 ms to compute
```

**A tier** is known by its last few hauls: what they took together, by all their blocks.  What a
restore took beyond its hauls is its latency; half of the last few took less, so that a porter who
was stopped once is not taken for slow.  One that is late teaches at once: the haul that has not
come back yet takes at least as long as it has taken so far, whatever those before it took.

**A namespace** is known by what its own leases take from the grant until their prompt is committed.
Who computes may be idle in between, or make it up; it cannot compute faster than it does.  So the
quicker ones count: a quarter of the last ones took less.  Who reports nonsense decides about its
own namespace alone.

**Who knows nothing fetches**: of the tier, or of the namespace.  What is declined is looked at
again, one piece for which nobody waits, at first soon, then more and more rarely: so a tier that
was slow once is found again, and that costs no request anything.  Quick as it was then it is taken
to be.

**While nothing pays**, next to nothing of the pool is kept free for what goes down, for some
requests at a time; then there is something to look at again.

All blocks of a pool have the same bytes, so seconds a block are seconds a byte, times a constant.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Final, NamedTuple

TIER_NAMES: Final = ("host", "disk", "remote")
"""From the pool downwards, as people are told."""
_FIRST_GUESS_S: Final = 0.005
"""For a block of the first tier, before any was restored, and as much more for each one below: only
for how long is waited."""

_WORTH: Final = 0.8
"""Part of computing that fetching may take: what is about as long is computed, which is certain."""
_PIECES: Final = 8
"""Hauls by which a tier is known."""
_SAMPLES: Final = 16
"""Leases by which a namespace is known, of each length."""
_QUICKER: Final = 4
"""One in so many of them took less than what counts."""
_LEAST_TOKENS: Final = 64
"""Of a lease that tells how long computing takes: fewer are mostly something else."""
_LENGTHS: Final = (512, 2048)
"""Where one class of lengths ends, and the next begins: attention makes long prefills dearer."""
_EXPLORED: Final = 64
"""One in so many that are declined is looked at again, at least: the first of them after something
has come back in time, and from look to look half as many …"""
_PAUSE_S: Final = 1.0
"""… if so much time has passed since the last one."""
_EXPLORED_S: Final = 0.1
"""… of as many blocks as are expected to take that long: others wait behind them."""
_MUCH_QUICKER: Final = 2
_UNWORTHY: Final = 64
"""Requests for which it was not worth it, and none for which it was: then the tiers do not pay …"""
_IDLE: Final = 1024
"""… for so many requests."""
_KEPT: Final = 15 / 16
"""Of the advantage so far, when another restore has arrived."""


class Rate:
    """How long a namespace takes to compute, by how many tokens.

    >>> rate = Rate()
    >>> rate.compute_s(1000) is None
    True
    >>> rate.note(1000, seconds=2.0)
    >>> rate.note(1000, seconds=1e6)  # it was idle
    >>> round(rate.compute_s(2000), 3)
    4.0
    """

    __slots__ = ("_counts", "_samples")

    def __init__(self) -> None:
        self._samples = tuple(array("f") for _ in range(len(_LENGTHS) + 1))
        """Seconds a token, the last few of each class; 64 bytes each at most."""
        self._counts = [0] * len(self._samples)

    def note(self, num_tokens: int, seconds: float) -> None:
        """Take note that a lease has computed its prompt.  Few tokens tell nothing.  O(1)."""
        if num_tokens < _LEAST_TOKENS:
            return
        at = _length(num_tokens)
        samples, one = self._samples[at], max(0.0, seconds) / num_tokens
        if len(samples) < _SAMPLES:
            samples.append(one)
        else:
            samples[self._counts[at] % _SAMPLES] = one
        self._counts[at] += 1

    def compute_s(self, num_tokens: int) -> float | None:
        """Say about how long so many tokens take; None: nobody knows.  O(1)."""
        at = _length(num_tokens)
        nearest = sorted(range(len(self._samples)), key=lambda other: abs(other - at))
        for samples in [self._samples[other] for other in nearest]:
            if samples:
                return num_tokens * sorted(samples)[len(samples) // _QUICKER]
        return None


def _length(num_tokens: int) -> int:
    return sum(num_tokens >= end for end in _LENGTHS)


class Speed:
    """How fast blocks come back from one tier, and what that has brought."""

    __slots__ = (
        "_every",
        "_explored_at",
        "_latencies",
        "_pieces",
        "_since",
        "_spared_s",
        "_spent_s",
        "block_s",
        "latency_s",
    )

    def __init__(self, first_guess_s: float) -> None:
        self.block_s = first_guess_s
        """Seconds a block."""
        self.latency_s = 0.0
        """What a restore takes beyond its hauls."""
        self._pieces: deque[tuple[int, float]] = deque(maxlen=_PIECES)
        self._latencies: deque[float] = deque(maxlen=_PIECES)
        self._since = 0
        """Declined since it was explored last."""
        self._every = 1
        """After how many it is explored next."""
        self._explored_at: float | None = None
        self._spent_s = self._spared_s = 0.0

    @property
    def is_known(self) -> bool:
        """Whether anything was restored from there, or should have been."""
        return bool(self._pieces)

    @property
    def advantage(self) -> float | None:
        """How many times as long as fetching computing would have taken, of late; None: unknown."""
        return self._spared_s / self._spent_s if self._spent_s > 0 else None

    def note(self, num_blocks: int, seconds: float) -> None:
        """Take note that a haul took so long.  O(1)."""
        self._pieces.append((num_blocks, max(0.0, seconds)))
        blocks = sum([count for count, _ in self._pieces])
        self.block_s = sum([took for _, took in self._pieces]) / blocks

    def note_explored(self, num_blocks: int, seconds: float) -> None:
        """Take note of a haul for which nobody waited.  O(1).

        If it was much quicker than was thought, nothing of what was known before holds any more.
        """
        if seconds < num_blocks * self.block_s / _MUCH_QUICKER:
            self._pieces.clear()
        self.note(num_blocks, seconds)

    def note_late(self, num_blocks: int, seconds: float) -> None:
        """Take note that a haul takes longer than that, and has not ended.  O(1).

        If that is longer than was thought, nothing of what was known before holds any more.
        """
        if seconds > num_blocks * self.block_s:
            self._pieces.clear()
            self.note(num_blocks, seconds)

    def note_restore(self, latency_s: float) -> None:
        """Take note of what a restore took that has ended, beside its hauls.  O(1)."""
        self._latencies.append(max(0.0, latency_s))
        self.latency_s = sorted(self._latencies)[(len(self._latencies) - 1) // 2]

    def note_gain(self, spent_s: float, spared_s: float) -> None:
        """Take note of how long somebody waited, and how long computing would have taken."""
        self._spent_s = _KEPT * self._spent_s + spent_s
        self._spared_s = _KEPT * self._spared_s + spared_s

    def decline(self, now: float) -> bool:
        """Count a request that did not wait for what lies there, since computing is quicker.

        Returns:
            Whether it is time to look there again.
        """
        self._since += 1
        last = self._explored_at
        return self._since >= self._every and (last is None or not 0 <= now - last < _PAUSE_S)

    def trust(self) -> None:
        """Take note that something has come back in time for who waited for it.  O(1)."""
        self._since, self._every = 0, 1

    def num_explored(self, piece: int) -> int:
        """Say how many blocks are looked at: of a slow tier fewer than a piece.  O(1)."""
        return max(1, min(piece, int(_EXPLORED_S / max(self.block_s, 1e-9))))

    def explore(self, now: float) -> None:
        """Take note that it is looked at now."""
        self._since, self._explored_at = 0, now
        self._every = min(2 * self._every, _EXPLORED)


class Verdict(NamedTuple):
    """Whether some blocks in a row, which lie on one tier, are fetched; with the arithmetic."""

    tier: int
    num_blocks: int
    fetch_s: float
    """Those before them on the way included."""
    compute_s: float | None
    """None: nobody knows."""
    is_worth: bool


class Worth:
    """What is known of the tiers, and how often it spoke against them.

    Args:
        num_tiers: How many there are below the pool.
        block_size: Tokens of a block.
    """

    __slots__ = (
        "_block_size",
        "_idle_until",
        "_num_slow",
        "declined",
        "num_requests",
        "speeds",
        "tokens_each",
    )

    def __init__(self, num_tiers: int, block_size: int) -> None:
        self.speeds = [Speed(_FIRST_GUESS_S * (1 + tier)) for tier in range(num_tiers)]
        self.declined = {"slow": 0, "busy": 0, "room": 0}
        """Requests that would have waited for a restore, by why there was none: computing is
        quicker; as much as may be is on its way; there is no room for it now."""
        self._block_size = block_size
        self._num_slow = self._idle_until = 0
        """Requests for which it was not worth it, since one for which it was."""
        self.num_requests = 0
        """Granted since the start."""
        self.tokens_each = 1
        """Tokens that a token of the cache stands for: more in a replay of hashes."""

    @property
    def pays(self) -> bool:
        """Whether something of late was worth to be fetched, or it is time to try again.  O(1)."""
        return self.num_requests >= self._idle_until

    def decline(self, why: str) -> None:
        """Count a request that did not wait for what lies below."""
        self.declined[why] += 1
        self._num_slow += why == "slow"
        if self._num_slow >= _UNWORTHY:
            self._num_slow, self._idle_until = 0, self.num_requests + _IDLE

    def fetch(self) -> None:
        """Take note that something is being fetched for who waits."""
        self._num_slow = self._idle_until = 0

    def fetch_s(self, tier: int, num_blocks: int, queued: list[int]) -> float:
        """Say about how long so many blocks take to come back from a tier.  O(tiers).

        Args:
            tier: Which.
            num_blocks: How many.
            queued: Of each tier, how many blocks are on their way before them.
        """
        before = sum(
            [speed.block_s * count for speed, count in zip(self.speeds, queued, strict=True)]
        )
        speed = self.speeds[tier]
        return before + speed.latency_s + num_blocks * speed.block_s

    def weigh(self, tier: int, num_blocks: int, queued: list[int], rate: Rate | None) -> Verdict:
        """Say whether some blocks in a row are fetched.  Changes nothing.  O(tiers)."""
        fetch_s = self.fetch_s(tier, num_blocks, queued)
        num_tokens = num_blocks * self._block_size * self.tokens_each
        compute_s = None if rate is None else rate.compute_s(num_tokens)
        is_known = self.speeds[tier].is_known
        is_worth = compute_s is None or not is_known or fetch_s < _WORTH * compute_s
        return Verdict(tier, num_blocks, fetch_s, compute_s, is_worth)
