"""Replay: the very `PrefixCache` that serves, one request at a time, on the trace's clock.

```
acquire(everything that will exist + one token) ─► ledger ─► commit what is stored ─► release
```

**One request at a time.**  Look up, then store; no concurrency, no time-outs.  What is *stored* are
the whole blocks of prompt and generated tokens, and with `tails` also the partly filled last one.

**Capacity** is what the tree may hold.  A lease also holds the block it is computing, so the pool
gets one block more, in every mode of partial reuse, and every request asks for its whole blocks and
that one.  Without tails it is free again after the release: the tree never holds more than the
capacity, and evicts only for it.  With tails the last tail may stay in it until the next request.

**One acquire tells all.**  The prompt is the head of what will exist, so the fates of its tokens
are the head of the ledger of the whole, and at least its last token is computed.  The token
appended (`BEYOND`) is never stored; it keeps a repeated request from being cut short.

**A sequence longer than the capacity** keeps its head: the service would refuse it, so only the
head that fits is asked for, and its ledger comes from `explain`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from prefixcache.core.cache import PrefixCache
from prefixcache.core.policies import policy_named
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, WorkerId
from prefixcache_bench.experiments.flat import FLAT_LFU, replay_flat
from prefixcache_bench.experiments.outcome import Outcome, Sums
from prefixcache_bench.experiments.traces import Trace
from prefixcache_bench.experiments.windows import Windows

BEYOND = b"\xff" * TOKEN_BYTES
_WORKER = WorkerId(1)
_HOUSEKEEPING = 64


@dataclass(frozen=True, slots=True)
class Configuration:
    """One experiment."""

    block_size: int
    """Tokens."""
    capacity_blocks: int | None = None
    """None: infinite memory."""
    policy: str = "lru"
    partial: Partial = Partial.OFF
    ghosts: int | None = None
    """Evicted blocks that are remembered.  None: all, so that `cold` is what was never seen; but
    for a policy that learns from them as many as it has when it serves, since more would help it.
    """
    history_bytes: int = 0
    """What may be remembered for people, as the service does.  Changes no figure."""


def replay(
    trace: Trace,
    asked: Configuration,
    *,
    num_windows: int = 1,
    advance: Callable[[int], None] | None = None,
) -> Outcome:
    """Serve a whole trace.  Reads the trace only.  30 to 70 µs a request.

    Args:
        trace: The requests.
        asked: Block size, capacity, policy, partial reuse.  The policy may also be `lfu-flat`, of
            which the service knows nothing: see `flat`.
        num_windows: Equal parts of the trace's time for which the ledger is given too.
        advance: Told now and then how many more requests have been served.

    Raises:
        InvalidRequest: the block size does not suit the trace, or there is no such policy.
    """
    if asked.policy == FLAT_LFU:
        return replay_flat(trace, asked.block_size, asked.capacity_blocks, num_windows)
    words = trace.words(asked.block_size)
    width = words * TOKEN_BYTES
    most = trace.most_blocks(asked.block_size)
    capacity = most if asked.capacity_blocks is None else min(asked.capacity_blocks, most)
    ghosts = asked.ghosts
    if ghosts is None and policy_named(asked.policy).revived is None:
        ghosts = most
    cache = PrefixCache(
        capacity + 1,
        words,
        policy=asked.policy,
        partial=asked.partial,
        num_ghosts=ghosts,
        ttl_s=1e9,
        history_bytes=asked.history_bytes,
    )
    tails = asked.partial is Partial.TAILS
    requests = trace.requests if tails else trace.grouped(words)
    room = capacity * width
    sums = Sums(trace.unit, words, counts_partial=asked.partial is Partial.OFF)
    windows = Windows(trace, sums, num_windows)
    tree = cache._lessor.tree  # for its number of blocks alone: a snapshot per request is too dear
    peak = 0
    attached: set[Namespace] = set()
    now = 0.0
    started = time.process_time()
    for number, request in enumerate(requests):
        if request.t > now:
            now = request.t
        if now >= windows.ends_at:
            windows.turn(now)
        namespace, tokens = request.namespace, request.tokens
        if namespace not in attached:
            cache.attach(_WORKER, namespace, now=now)
            attached.add(namespace)
        whole = len(tokens) // width * width
        stored = len(tokens) if tails else whole
        if whole <= room:
            grant = cache.acquire(_WORKER, namespace, tokens + BEYOND, now=now)
            assert isinstance(grant, Grant)
            ledger = grant.ledger
        else:
            ledger = cache.explain(namespace, tokens + BEYOND, now=now).ledger
            # It takes all blocks there are, so the one to copy from cannot stay beside it.
            untaken = ledger.granularity + ledger.partial
            ledger = ledger._replace(partial=0, granularity=untaken)
            stored = room
            head = tokens[:room] + BEYOND
            grant = cache.acquire(_WORKER, namespace, head, now=now)
            assert isinstance(grant, Grant)
        # A copied part of a block may reach beyond the whole blocks that are stored.
        upto = max(stored // TOKEN_BYTES, grant.num_cached)
        cache.commit(_WORKER, grant.lease, upto, now=now)
        cache.release(_WORKER, grant.lease, now=now)
        if tree.num_blocks > peak:
            peak = tree.num_blocks
        sums.add(ledger, request.prompt, request.length)
        if not number % _HOUSEKEEPING:
            if advance is not None:
                advance(_HOUSEKEEPING)
            cache.next_deadline()  # forgets the leases that ended
    windows.turn(now)
    return sums.outcome(
        trace,
        block_size=asked.block_size,
        capacity_blocks=asked.capacity_blocks,
        policy=asked.policy,
        partial=asked.partial,
        evictions=cache.snapshot(now=now).evicted,
        peak_blocks=peak,
        windows=windows.done,
        cpu_s=time.process_time() - started,
    )
