"""Below: a replay with tiers below the pool, and somebody who moves the blocks on a virtual clock.

```
trace's clock   ── request ──────────────────────────────────────────── request ─►
engine             wait for a restore │ compute what is lacking          idle
porter             pieces up ───────► │ pieces down ─────────► ─────────►
```

It is the same cache as in `replay`, with the tiers and the decisions that it has when it serves
(`prefixcache.core.hauls`, `worth`).  One engine serves one request after the other: who comes while
it is busy begins when it is free.  It computes prompts and answers at one rate.  One porter copies
piece by piece, up before down, each at the speed of its tier.

What a request's first token takes is counted from when the engine begins with it.
"""

from __future__ import annotations

import math
import time
from array import array
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np

from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.core.policies import policy_named
from prefixcache.core.worth import TIER_NAMES
from prefixcache.errors import InvalidRequest
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, Grant, Ledger, Namespace, Partial, WorkerId
from prefixcache_bench.experiments.capacity import Capacity, parse_capacity
from prefixcache_bench.experiments.outcome import Outcome, Sums
from prefixcache_bench.experiments.replay import BEYOND, Configuration
from prefixcache_bench.experiments.traces import Request, Trace
from prefixcache_bench.experiments.windows import Windows

_WORKER = WorkerId(1)
_HOUSEKEEPING = 64
_LONG_S = 1e9
LEAST_POOL = 7
"""Blocks that a pool stores at least of which some can be kept free."""


@dataclass(frozen=True, slots=True)
class Tiers:
    """What there is below the pool, from the nearest tier on."""

    text: str
    """As it was asked for."""
    blocks: tuple[int | None, ...]
    """None: infinitely many."""
    token_s: tuple[float, ...]
    """Seconds that a token of each takes to be copied, down or up."""
    compute_s: float
    """Seconds that a token takes to be computed."""

    @property
    def is_none(self) -> bool:
        """Whether there is nothing below."""
        return not any(blocks is None or blocks > 0 for blocks in self.blocks)

    def check(self, capacity: int | None) -> None:
        """Refuse a pool of so many blocks that is too small for anything below it.

        Raises:
            InvalidRequest: it is; the message has both numbers.
        """
        if not self.is_none and capacity is not None and capacity < LEAST_POOL:
            raise InvalidRequest(
                f"a pool of {many(capacity, 'block')} is too small for a tier below it: it keeps "
                f"an eighth of it free. Give --capacity at least {LEAST_POOL} blocks"
            )


@dataclass(frozen=True, slots=True)
class TierAsked:
    """One tier, as it was asked for."""

    size: Capacity
    tokens_per_s: float = math.inf
    """Copied there, or back."""
    speed: str = ""
    """How that was written, where there are several to be told apart."""


@dataclass(frozen=True, slots=True)
class BelowAsked:
    """What is to be below the pool, from the nearest tier on; None: it is left out.

    >>> from prefixcache_bench.experiments.capacity import parse_capacity
    >>> asked = BelowAsked((TierAsked(parse_capacity("25%"), 1024.0, "1k"),), 100.0)
    >>> asked.text, asked.tiers(16, 6400).blocks
    ('host 25% at 1k/s', (100,))
    """

    asked: tuple[TierAsked | None, ...]
    computed_per_s: float = math.inf

    @property
    def text(self) -> str:
        """What it is called in tables."""
        parts = []
        for name, one in zip(TIER_NAMES, self.asked, strict=False):
            if one is not None:
                at = f" at {one.speed.removesuffix('/s')}/s" if one.speed else ""
                parts.append(f"{name} {one.size.text}{at}")
        return " + ".join(parts) or "none"

    def tiers(self, block_size: int, working_set: int) -> Tiers:
        """Give it in blocks.

        Raises:
            InvalidRequest: not one block fits.
        """
        return Tiers(
            self.text,
            tuple(
                0 if one is None else one.size.blocks(block_size, working_set) for one in self.asked
            ),
            tuple(0.0 if one is None else 1 / one.tokens_per_s for one in self.asked),
            1 / self.computed_per_s,
        )


def parse_tier_sizes(text: str, token_bytes: int | None) -> list[Capacity | None]:
    """Read sizes of one tier, separated by commas, as `parse_capacities` does; 0 is none.

    >>> [None if one is None else one.amount for one in parse_tier_sizes("0,64k", None)]
    [None, 65536.0]

    Raises:
        InvalidRequest: one is no size, or there is none.
    """
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise InvalidRequest(f"{text!r} names no size of a tier; write for example 0,10%,50%")
    found = [None if part == "0" else parse_capacity(part).measured(token_bytes) for part in parts]
    return list(dict.fromkeys(found))


def parse_speed(text: str, token_bytes: int | None) -> float:
    """Read tokens a second, or bytes a second of a model.

    >>> parse_speed("200k", None), parse_speed("1GiB/s", 131072)
    (204800.0, 8192.0)

    Raises:
        InvalidRequest: it is neither.
    """
    clean = text.strip().removesuffix("/s")
    found = parse_capacity(clean).measured(token_bytes)
    if found.kind != "tokens":
        raise InvalidRequest(
            f"{text!r} is no speed; write tokens a second (200k), or bytes with --layout (20GiB/s)"
        )
    return float(found.amount)


def tiers_asked(
    asked: Sequence[tuple[str | None, str]], computed: str, token_bytes: int | None
) -> tuple[BelowAsked, ...]:
    """Give each size of each tier at each of its speeds, with each of the others.

    >>> [one.text for one in tiers_asked([("0,10%", "2k,4k")], "1000", None)]
    ['none', 'host 10% at 2k/s', 'host 10% at 4k/s']
    >>> [one.text for one in tiers_asked([("0,10%", "4k"), ("1m", "2k")], "1000", None)]
    ['disk 1m', 'host 10% + disk 1m']

    Args:
        asked: Sizes and speeds of each tier, from the nearest on; None: there is none.
        computed: Tokens that are computed in a second.
        token_bytes: Of a token's KV, if that is known.

    Raises:
        InvalidRequest: one of them is not what it should be.
    """
    axes = [_axis(sizes, speeds, token_bytes) for sizes, speeds in asked]
    while len(axes) > 1 and axes[-1] == [None]:
        axes.pop()  # as if it had not been asked for
    computed_per_s = parse_speed(computed, None)
    return tuple(dict.fromkeys(BelowAsked(one, computed_per_s) for one in product(*axes)))


def _axis(sizes: str | None, speeds: str, token_bytes: int | None) -> list[TierAsked | None]:
    """Give each size of one tier at each speed; without a tier there is no speed."""
    texts = list(dict.fromkeys(part.strip() for part in speeds.split(",") if part.strip()))
    if not texts:
        raise InvalidRequest(f"{speeds!r} names no speed; write for example 200k")
    rates = {text: parse_speed(text, token_bytes) for text in texts}
    return [
        None if size is None else TierAsked(size, rate, text if len(rates) > 1 else "")
        for size in ([None] if sizes is None else parse_tier_sizes(sizes, token_bytes))
        for text, rate in rates.items()
    ]


@dataclass(frozen=True, slots=True)
class Traffic:
    """What moved between the pool and the tiers, and what that has brought."""

    restored_tokens: int
    """Of the prompts, those that came back."""
    restored_blocks: tuple[int, ...]
    """Blocks that came back from each tier, for whatever."""
    written_blocks: int
    """Blocks that were copied down from the pool."""
    disk_written_blocks: int
    """Blocks that were written to a disk, at once or later."""
    dropped_blocks: int
    """Blocks that were evicted without: room was needed sooner, or they were partly filled."""
    declined: dict[str, int]
    """Requests that did not wait for what lay below, by why."""
    first_token_s: tuple[float, float]
    """From the engine's begin to the first token: the mean, and the 99th percentile."""


class Mover:
    """Copies blocks on a virtual clock, in place of the porter.

    Args:
        cache: Whose.
        block_s: Seconds that a block of each tier takes.
    """

    def __init__(self, cache: PrefixCache, block_s: tuple[float, ...]) -> None:
        self._cache = cache
        self._block_s = block_s
        self._up: deque[Haul] = deque()
        self._down: deque[Haul] = deque()
        self._in_hand: Haul | None = None
        self._begun = self._ends = 0.0
        self.now = 0.0
        self.restored_blocks = [0] * len(block_s)

    def run(self, until: float) -> None:
        """Let time go on to `until`, if that is not past."""
        while self.now < until:
            self.step(until)

    def step(self, until: float) -> None:
        """Let time go on to what comes first: the end of a haul, of somebody's wait, or `until`."""
        cache = self._cache
        for haul in cache.hauls(now=self.now):
            (self._up if haul.is_up else self._down).append(haul)
        if self._in_hand is None and (queue := self._up or self._down):
            self._in_hand = queue.popleft()
            self._begun = self.now
            took = [count * self._block_s[tier] for tier, count in self._runs(self._in_hand)]
            self._ends = self.now + sum(took)
        due = cache.next_deadline()
        at = until if due is None else min(until, math.nextafter(due, math.inf))
        if self._in_hand is not None and self._ends <= at:
            ended, self._in_hand = self._in_hand, None
            self.now = max(self.now, self._ends)
            for tier, count in self._runs(ended) if ended.is_up else ():
                self.restored_blocks[tier] += count
            took_s = self._ends - self._begun
            cache.hauled(ended.id, len(ended.slots), took_s, now=self.now)
        else:
            self.now = max(self.now, at)
            cache.expire(now=self.now)

    def _runs(self, haul: Haul) -> list[tuple[int, int]]:
        """Give which tiers a haul is of, and how many blocks of each."""
        hauls = self._cache._lessor.hauls
        assert hauls is not None
        return hauls.tier.runs(haul.places)  # what goes on to a disk is of it


def replay_below(
    trace: Trace,
    asked: Configuration,
    tiers: Tiers,
    *,
    advance: Callable[[int], None] | None = None,
) -> tuple[Outcome, Traffic]:
    """Serve a whole trace with tiers below the pool.  Reads the trace only.

    In the outcome what came back counts as hit.  Without tiers it is that of `replay`.

    Args:
        trace: The requests.
        asked: Block size, capacity of the pool, policy, partial reuse.
        tiers: What there is below, and how fast.
        advance: Told now and then how many more requests have been served.

    Raises:
        InvalidRequest: the block size does not suit the trace, there is no such policy, or the pool
            is too small to keep a block free.
    """
    words = trace.words(asked.block_size)
    width = words * TOKEN_BYTES
    cache = _cache(trace, asked, tiers, words)
    most, lessor = trace.most_blocks(asked.block_size), cache._lessor
    capacity = most if asked.capacity_blocks is None else min(asked.capacity_blocks, most)
    if lessor.hauls is not None:
        lessor.hauls.worth.tokens_each = trace.unit
    mover = Mover(cache, tuple(asked.block_size * one for one in tiers.token_s))
    tails = asked.partial is Partial.TAILS
    requests = trace.requests if tails else trace.grouped(words)
    sums = Sums(trace.unit, words, counts_partial=asked.partial is Partial.OFF)
    windows = Windows(trace, sums, 1)
    attached: set[Namespace] = set()
    first_s = array("d")
    restored_tokens = peak = 0
    started = time.process_time()
    for number, request in enumerate(requests):
        mover.run(request.t)
        began, namespace, tokens = mover.now, request.namespace, request.tokens
        if namespace not in attached:
            cache.attach(_WORKER, namespace, now=began)
            attached.add(namespace)
        stored = len(tokens) if tails else len(tokens) // width * width
        is_cut = len(tokens) // width > capacity
        if is_cut:
            seen = cache.explain(namespace, tokens + BEYOND, now=began).ledger
            stored = capacity * width
            tokens = tokens[:stored]
        grant = _granted(cache, mover, namespace, tokens + BEYOND)
        own = lessor.leases.workers[_WORKER].leases[grant.lease]
        ledger = _of_all(seen, grant.ledger) if is_cut else grant.ledger
        waited_s = mover.now - began
        lacking = len(tokens) // TOKEN_BYTES - grant.num_cached
        mover.run(mover.now + max(0, lacking) * trace.unit * tiers.compute_s)
        upto = max(stored // TOKEN_BYTES, grant.num_cached)
        cache.commit(_WORKER, grant.lease, upto, now=mover.now)
        if own.flight is not None and lacking > 0:  # the token beyond it is never computed
            lessor.learn_rate(own, own.num_cached + lacking, mover.now)
        cache.release(_WORKER, grant.lease, now=mover.now)
        peak = max(peak, lessor.tree.num_blocks)
        restored_tokens += _restored(ledger, request, trace.unit, words)
        ledger = ledger._replace(hit=ledger.hit + ledger.restored, restored=0)
        known = sums.ledger().reused
        sums.add(ledger, request.prompt, request.length)
        computed = request.length - (sums.ledger().reused - known)
        first_s.append(waited_s + computed * tiers.compute_s)
        if advance is not None and not number % _HOUSEKEEPING:
            advance(_HOUSEKEEPING)
    windows.turn(mover.now)
    told = cache.counts(now=mover.now)
    outcome = sums.outcome(
        trace,
        block_size=asked.block_size,
        capacity_blocks=asked.capacity_blocks,
        policy=asked.policy,
        partial=asked.partial,
        evictions=told.evicted,
        peak_blocks=peak,
        windows=windows.done,
        cpu_s=time.process_time() - started,
    )
    times = np.sort(np.frombuffer(first_s or array("d", [0.0])))
    traffic = Traffic(
        restored_tokens,
        tuple(mover.restored_blocks),
        written_blocks=told.sunk,
        disk_written_blocks=told.disk_written,
        dropped_blocks=0 if tiers.is_none else told.evicted - told.sunk - told.leaving,
        declined={
            "slow": told.declined_slow,
            "busy": told.declined_busy,
            "room": told.declined_room,
        },
        first_token_s=(float(times.mean()), float(times[int(0.99 * (len(times) - 1))])),
    )
    return outcome, traffic


def _cache(trace: Trace, asked: Configuration, tiers: Tiers, words: int) -> PrefixCache:
    """Make the cache: of as many blocks as `replay` gives it, with the tiers below."""
    most = trace.most_blocks(asked.block_size)
    capacity = most if asked.capacity_blocks is None else min(asked.capacity_blocks, most)
    ghosts = asked.ghosts
    if ghosts is None and policy_named(asked.policy).revived is None:
        ghosts = most
    sizes = TierSizes()
    if not tiers.is_none:
        tiers.check(capacity)
        held = [most if one is None else min(one, most) for one in tiers.blocks]
        sizes = TierSizes.of(capacity + 1, **dict(zip(TIER_NAMES, held, strict=False)))
    cache = PrefixCache(
        capacity + 1,
        words,
        policy=asked.policy,
        partial=asked.partial,
        num_ghosts=ghosts,
        ttl_s=_LONG_S,
        history_bytes=asked.history_bytes,
        tiers=sizes,
    )
    cache.set_porter(is_there=True, now=0.0)
    return cache


def _granted(cache: PrefixCache, mover: Mover, namespace: Namespace, tokens: bytes) -> Grant:
    """Acquire, and let time go on until it is granted."""
    answer = cache.acquire(_WORKER, namespace, tokens, wait_s=_LONG_S, now=mover.now)
    while not isinstance(answer, Grant):
        mover.step(mover.now + _LONG_S)
        for _, outcome in cache.take_outcomes():
            assert isinstance(outcome, Grant), outcome
            answer = outcome
    return answer


def _of_all(seen: Ledger, head: Ledger) -> Ledger:
    """Give the fates of a sequence that is longer than the pool, of which only the head is asked.

    Args:
        seen: Of all, as it was explained.
        head: Of the head, as it was granted.
    """
    untaken = seen.granularity + seen.partial
    restored = min(head.restored, seen.evicted)
    return seen._replace(
        partial=0, granularity=untaken, restored=restored, evicted=seen.evicted - restored
    )


def _restored(ledger: Ledger, request: Request, unit: int, words: int) -> int:
    """Count the tokens of a prompt that came back, of those that are reused in whole blocks."""
    limit = (request.prompt - 1 if unit == 1 else request.prompt) // words * words
    here = min(ledger.hit, limit)
    found = min(ledger.hit + ledger.restored, limit)
    return min(found * unit, request.length) - min(here * unit, request.length)
