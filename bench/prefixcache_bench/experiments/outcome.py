"""What an experiment found: the sums, the ledger, and the ledger over time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from prefixcache.types import Ledger, Partial
from prefixcache_bench.experiments.traces import Trace

FATES = ("hit", "partial", "joined", "cold", "evicted", "granularity")
_DIGITS = 6


class Sums:
    """Running sums over requests.

    Args:
        unit: Tokens per word of the trace.
        words: Words per block.
        counts_partial: Partial reuse is off: count what it would have given, which the ledger books
            under `granularity`.
    """

    __slots__ = (
        "_counts_partial",
        "_unit",
        "_words",
        "cold",
        "evicted",
        "granularity",
        "hit_blocks",
        "hit_tokens",
        "partial_tokens",
        "prompt_blocks",
        "request_blocks",
        "request_hits",
        "requests",
    )

    def __init__(self, unit: int, words: int, *, counts_partial: bool) -> None:
        self._unit, self._words, self._counts_partial = unit, words, counts_partial
        self.requests = self.hit_tokens = self.partial_tokens = 0
        self.cold = self.evicted = self.granularity = 0
        self.hit_blocks = self.prompt_blocks = 0
        self.request_hits = self.request_blocks = 0.0

    def add(self, ledger: Ledger, prompt: int, length: int) -> None:
        """Count one request.

        Args:
            ledger: Fates of all words that will exist, in words; the prompt is their head.
            prompt: Words of the prompt.
            length: Tokens of the prompt.
        """
        unit, words = self._unit, self._words
        hit = ledger.hit
        reused = hit + ledger.partial
        stored = reused + ledger.granularity
        # A block-hash trace names only what was looked up: nothing in it has to be computed.
        limit = prompt - 1 if unit == 1 else prompt
        whole = min(hit, limit // words * words)
        part = min(stored if self._counts_partial else reused, limit) - whole
        known = min(stored + ledger.evicted, prompt)
        stored = min(stored, prompt)
        blocks = whole // words
        if unit == 1:
            of_prompt = -(-prompt // words)
        else:
            whole, known, stored, of_prompt, part = self._in_tokens(
                whole, known, stored, prompt, part, length
            )
        self.requests += 1
        self.hit_tokens += whole
        self.partial_tokens += part
        self.granularity += stored - whole - (0 if self._counts_partial else part)
        self.evicted += known - stored
        self.cold += length - known
        self.hit_blocks += blocks
        self.prompt_blocks += of_prompt
        self.request_hits += whole / length
        if of_prompt:
            self.request_blocks += blocks / of_prompt

    def _in_tokens(
        self, whole: int, known: int, stored: int, prompt: int, part: int, length: int
    ) -> tuple[int, int, int, int, int]:
        """Turn counts of hashed blocks, of which the last may be partly filled, into tokens."""
        unit = self._unit
        hit = min(whole * unit, length)
        return (
            hit,
            min(known * unit, length),
            min(stored * unit, length),
            prompt // self._words,
            min((whole + part) * unit, length) - hit,
        )

    def ledger(self) -> Ledger:
        """Give the fates of all prompt tokens so far."""
        return Ledger(
            hit=self.hit_tokens,
            partial=0 if self._counts_partial else self.partial_tokens,
            cold=self.cold,
            evicted=self.evicted,
            granularity=self.granularity,
        )

    def outcome(
        self,
        trace: Trace,
        *,
        block_size: int,
        capacity_blocks: int | None,
        policy: str,
        partial: Partial,
        evictions: int,
        peak_blocks: int,
        windows: Sequence[Window],
        cpu_s: float,
    ) -> Outcome:
        """Say what one configuration gave on a whole trace, of which each request was counted.

        Args:
            trace: The requests, grouped or not.
            block_size: Tokens per block.
            capacity_blocks: What might stay stored; None: everything.
            policy: The order of eviction.
            partial: The mode of partial reuse.
            evictions: Blocks that were evicted.
            peak_blocks: Most blocks that were stored after a request.
            windows: The ledger over time.
            cpu_s: What it took.
        """
        return Outcome(
            block_size=block_size,
            capacity_blocks=capacity_blocks,
            policy=policy,
            partial=partial,
            unit=self._unit,
            requests=len(trace),
            prompt_tokens=trace.prompt_tokens,
            hit_tokens=self.hit_tokens,
            partial_tokens=self.partial_tokens,
            hit_blocks=self.hit_blocks,
            prompt_blocks=self.prompt_blocks,
            mean_request_hit=self.request_hits / max(1, len(trace)),
            mean_request_blocks=self.request_blocks / max(1, len(trace)),
            evictions=evictions,
            peak_blocks=peak_blocks,
            ledger=self.ledger(),
            windows=tuple(windows),
            broken_lines=len(trace.broken),
            cpu_s=cpu_s,
        )


@dataclass(frozen=True, slots=True)
class Window:
    """The ledger of one part of the trace's time."""

    start_s: float
    requests: int
    ledger: Ledger

    @classmethod
    def between(
        cls, start_s: float, before: tuple[int, Ledger], requests: int, ledger: Ledger
    ) -> Window:
        """Make a window from the sums before it and after it."""
        fates = {fate: getattr(ledger, fate) - getattr(before[1], fate) for fate in FATES}
        return cls(start_s, requests - before[0], Ledger(**fates))


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one configuration gave on one trace.  Rates are of prompt tokens."""

    block_size: int
    capacity_blocks: int | None
    policy: str
    partial: Partial
    unit: int
    requests: int
    prompt_tokens: int
    hit_tokens: int
    """In whole blocks."""
    partial_tokens: int
    """Reused by copying a part of a block; with partial reuse off: what it would have given."""
    hit_blocks: int
    prompt_blocks: int
    mean_request_hit: float
    mean_request_blocks: float
    evictions: int
    peak_blocks: int
    ledger: Ledger
    windows: tuple[Window, ...]
    broken_lines: int
    cpu_s: float

    @property
    def hit_rate(self) -> float:
        """Share of the prompt tokens that whole blocks held."""
        return self.hit_tokens / max(1, self.prompt_tokens)

    @property
    def hit_rate_partial(self) -> float:
        """The same with parts of blocks."""
        return (self.hit_tokens + self.partial_tokens) / max(1, self.prompt_tokens)

    @property
    def reused_rate(self) -> float:
        """Share of the prompt tokens that this configuration need not compute."""
        return self.ledger.reused / max(1, self.prompt_tokens)

    @property
    def block_hit_rate(self) -> float:
        """Share of the prompts' blocks that were stored."""
        return self.hit_blocks / max(1, self.prompt_blocks)

    def fields(self) -> dict[str, Any]:
        """Give everything by name, as `--json` prints it."""
        capacity = self.capacity_blocks
        found: dict[str, Any] = {
            "block_size": self.block_size,
            "capacity_blocks": capacity,
            "capacity_tokens": None if capacity is None else capacity * self.block_size,
            "policy": self.policy,
            "partial": self.partial.value,
            "requests": self.requests,
            "prompt_tokens": self.prompt_tokens,
            "hit_tokens": self.hit_tokens,
            "partial_tokens": self.partial_tokens,
            "hit_rate": round(self.hit_rate, _DIGITS),
            "hit_rate_partial": round(self.hit_rate_partial, _DIGITS),
            "reused_rate": round(self.reused_rate, _DIGITS),
            "mean_request_hit": round(self.mean_request_hit, _DIGITS),
            "block_hit_rate_ceil": round(self.block_hit_rate, _DIGITS),
            "evictions": self.evictions,
            "peak_blocks": self.peak_blocks,
            "broken_lines": self.broken_lines,
            "cpu_s": round(self.cpu_s, 3),
        }
        if self.unit > 1:
            found |= {
                "block_prefix": round(self.block_hit_rate, _DIGITS),
                "token_prefix": round(self.hit_rate, _DIGITS),
                "mean_request_block_prefix": round(self.mean_request_blocks, _DIGITS),
            }
        found["ledger"] = ledger_fields(self.ledger)
        found["ledger_percent"] = percentages(self.ledger)
        return found

    def window_fields(self) -> list[dict[str, Any]]:
        """Give the ledger over time, by name."""
        return [
            {"start_s": round(window.start_s, 3), "requests": window.requests}
            | ledger_fields(window.ledger)
            for window in self.windows
        ]


def ledger_fields(ledger: Ledger) -> dict[str, int]:
    """Give a ledger's fields in the order in which they are shown."""
    return {fate: getattr(ledger, fate) for fate in FATES} | {"total": ledger.total}


def percentages(ledger: Ledger) -> dict[str, float]:
    """Give each fate in percent, to three digits, adding up to 100.000 exactly.

    The largest remainders are rounded up, so that nothing is lost to rounding.

    >>> percentages(Ledger(hit=1, cold=1, evicted=1))["hit"]
    33.334
    """
    total = ledger.total
    if not total:
        return dict.fromkeys(FATES, 0.0)
    exact = {fate: divmod(getattr(ledger, fate) * 100_000, total) for fate in FATES}
    lacking = 100_000 - sum(whole for whole, _ in exact.values())
    first = sorted(FATES, key=lambda fate: -exact[fate][1])[:lacking]
    return {fate: (whole + (fate in first)) / 1000 for fate, (whole, _) in exact.items()}
