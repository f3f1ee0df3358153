"""Explanations: why each token of a prompt was missed, or would be.

```
prompt   You are a guide. Today is │ 27 Nov. │ Answer briefly and politely …
stored   You are a guide. Today is │ 26 Nov. │ Answer briefly and politely …
                            parted_at         resumes_at ──── num_same ────
```

Nothing here changes the cache.  What lies in a store elsewhere is not known here: it is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from prefixcache.core.history import SHOWN_TOKENS, GrantRecord, depths
from prefixcache.core.ledger import settle, spans
from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Match, Root, common_prefix
from prefixcache.core.worth import TIER_NAMES
from prefixcache.types import (
    TOKEN_BYTES,
    BlockTable,
    Explanation,
    HoldingInfo,
    Ledger,
    Namespace,
    Partial,
    PastRequest,
    TierSpan,
)

_SHOWN_BYTES = SHOWN_TOKENS * TOKEN_BYTES
_COMPARED_BYTES = 4096 * TOKEN_BYTES
"""How far behind a parting the same tokens are looked for."""
_SAME_TOKENS = 16
"""Fewer tokens than this in a row are the same by chance."""
_SKIPS = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512)
"""Where behind a parting a stretch of the prompt is taken to be looked for."""
_MOST_ELSEWHERE = 64
"""Other namespaces that are looked at."""


def explain(lessor: Lessor, namespace: Namespace, tokens: bytes, now: float) -> Explanation:
    """Say what would become of each token, and where the prompt parts from what is stored."""
    tree, root = lessor.blocks.tree, lessor.roots.get(namespace)
    if root is None:
        ledger, nobody = Ledger(cold=len(tokens) // TOKEN_BYTES), Root(namespace)
        below = lessor.below(Match(nobody, 0, 0), tokens)  # an earlier life may have left it
        on_tiers = tuple(_on_tiers(lessor, nobody, below, 0))
        on_remote = tuple(_on_remote(lessor, nobody, tokens, len(below), now))
        return Explanation(
            *(spans(ledger), ledger, None, b"", 0),
            elsewhere=_elsewhere(lessor, namespace, tokens, 0),
            num_below=len(below) * lessor.blocks.block_size,
            below_s=_together_s(lessor, on_tiers),
            below=on_tiers + on_remote,
            holding=_holding(lessor, namespace.tenant),
        )
    match = tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
    partial = 0 if lessor.partial is Partial.OFF else match.partial_tokens
    ledger = settle(tree, match, tokens, partial=partial)
    found = depths(tree, match, tokens, ledger.evicted) if ledger.evicted else []
    gain = lessor.inflight.find(root, match, tokens)
    exact = tree.match(root, tokens)
    run = tree.parting(exact, tokens, _SHOWN_BYTES)
    stored = b"" if run is None else run[exact.partial_tokens * TOKEN_BYTES :]
    parted_at = None if run is None else exact.end // TOKEN_BYTES + exact.partial_tokens
    resumes_at, num_same = _resumption(lessor, root, tokens, parted_at, stored)
    below = lessor.below(match, tokens)
    on_tiers = tuple(_on_tiers(lessor, root, below, match.end // TOKEN_BYTES))
    num_here = match.end // tree.block_bytes + len(below)
    on_remote = tuple(_on_remote(lessor, root, tokens, num_here, now))
    return Explanation(
        spans=spans(ledger),
        ledger=ledger,
        parted_at=parted_at,
        stored_next=stored,
        num_parted=0 if run is None else _num_parted(lessor, exact, now),
        resumes_at=resumes_at,
        num_same=num_same,
        extra_blocks=max((depth for depth, _ in found), default=None),
        num_pending=0 if gain is None else gain.num_tokens,
        elsewhere=_elsewhere(lessor, namespace, tokens, ledger.reused),
        num_below=len(below) * lessor.blocks.block_size,
        below_s=_together_s(lessor, on_tiers),
        below=on_tiers + on_remote,
        holding=_holding(lessor, namespace.tenant),
    )


def _on_remote(
    lessor: Lessor, root: Root, tokens: bytes, num_here: int, now: float
) -> Iterator[TierSpan]:
    """Say which tokens behind those of this machine lay in a store elsewhere a moment ago.

    None if nobody knows that: then the store is asked, and whoever wants to know it next is told.
    """
    hauls, size = lessor.hauls, lessor.blocks.block_size
    if hauls is None or (remote := hauls.remote) is None or not remote.serves(root.namespace):
        return
    start = num_here * lessor.blocks.tree.block_bytes
    end = remote.reach(start, len(tokens))
    count = remote.look(root, tokens[:end], start, now) if end > start else 0
    if count:
        rate = None if root.account is None else root.account.rate
        tier, _, fetch_s, compute_s, is_worth = hauls.weigh_remote(count, rate)
        first = num_here * size
        yield TierSpan(TIER_NAMES[tier], first, first + count * size, fetch_s, compute_s, is_worth)


def _on_tiers(lessor: Lessor, root: Root, below: BlockTable, start: int) -> Iterator[TierSpan]:
    """Say where the tokens from `start` on lie, and whether they are worth to be fetched."""
    if lessor.hauls is None:
        return
    rate = None if root.account is None else root.account.rate
    for tier, num_blocks, fetch_s, compute_s, is_worth in lessor.hauls.weigh(below, rate):
        end = start + num_blocks * lessor.blocks.block_size
        yield TierSpan(TIER_NAMES[tier], start, end, fetch_s, compute_s, is_worth)
        start = end


def _holding(lessor: Lessor, tenant: str) -> HoldingInfo | None:
    """Say what a tenant has below the pool, if there is anything below on this machine."""
    if lessor.hauls is None or not lessor.hauls.sizes.below:
        return None
    return lessor.hauls.tier.holding(tenant)


def _together_s(lessor: Lessor, below: tuple[TierSpan, ...]) -> float:
    """Say about how long all of it takes to come back, one part after the other."""
    if lessor.hauls is None or not below:
        return 0.0
    speeds = lessor.hauls.worth.speeds
    before = [speeds[TIER_NAMES.index(part.tier)].latency_s for part in below[:-1]]
    return below[-1].fetch_s + sum(before)


def recount(lessor: Lessor, past: GrantRecord, tokens: bytes, now: float) -> Explanation:
    """Explain a request that was granted lately, as it was then; `tokens`: what is kept of it."""
    tree, root = lessor.blocks.tree, lessor.roots.get(past.namespace)
    at = past.parted_at
    resumes_at, num_same, num_parted = None, 0, 0
    if root is not None and at is not None and tokens:
        resumes_at, num_same = _resumption(lessor, root, tokens, at, past.stored_next)
        num_parted = _num_parted(lessor, tree.match(root, tokens[: at * TOKEN_BYTES]), now)
    space = past.namespace
    return Explanation(
        spans=spans(past.ledger),
        ledger=past.ledger,
        parted_at=at,
        stored_next=past.stored_next,
        num_parted=num_parted,
        resumes_at=resumes_at,
        num_same=num_same,
        extra_blocks=past.extra_blocks,
        elsewhere=_elsewhere(lessor, space, tokens, past.ledger.reused) if tokens else (),
        past=PastRequest(
            past.request_id,
            past.worker,
            past.lease,
            Namespace(space.model, space.adapter, space.tenant),
            now - past.at,
            past.ledger.total,
            tokens,
        ),
    )


def _num_parted(lessor: Lessor, match: Match, now: float) -> int:
    """Count the requests of the last hour that parted where a match ends."""
    if match.used < len(match.node.blocks):
        return 0
    return lessor.history.divergence.at(match.node, match.partial_tokens, now)


def _resumption(
    lessor: Lessor, root: Root, tokens: bytes, parted_at: int | None, stored: bytes
) -> tuple[int | None, int]:
    """Find where, behind a parting, a prompt is the same again as the stored one."""
    if parted_at is None:
        return None, 0
    cut = parted_at * TOKEN_BYTES
    more = lessor.blocks.tree.continuation(root, tokens[:cut] + stored, _COMPARED_BYTES)
    theirs, ours = stored + more, tokens[cut : cut + _COMPARED_BYTES]
    width = _SAME_TOKENS * TOKEN_BYTES
    for skip in _SKIPS:
        begin = skip * TOKEN_BYTES
        stretch = ours[begin : begin + width]
        if len(stretch) < width:
            break
        there = theirs.find(stretch)
        while there % TOKEN_BYTES and there >= 0:
            there = theirs.find(stretch, there + 1)
        if there < 0:
            continue
        while begin and there and ours[begin - 4 : begin] == theirs[there - 4 : there]:
            begin, there = begin - TOKEN_BYTES, there - TOKEN_BYTES
        size = min(len(ours) - begin, len(theirs) - there)
        same = common_prefix(ours, begin, theirs, there, size) // TOKEN_BYTES
        return parted_at + begin // TOKEN_BYTES, same
    return None, 0


def _elsewhere(
    lessor: Lessor, namespace: Namespace, tokens: bytes, reused: int
) -> tuple[tuple[Namespace, int], ...]:
    """Find namespaces of the same tenant that store more of a prompt; never behind a salt.

    A salt is a secret: only who names it may learn what is stored behind it.
    """
    tree, found = lessor.blocks.tree, []
    limit = len(tokens) - TOKEN_BYTES
    for space, root in islice(lessor.roots.items(), _MOST_ELSEWHERE):
        if space == namespace or space.tenant != namespace.tenant or space.approximate:
            continue
        if space.salt not in ("", namespace.salt):
            continue
        match = tree.match(root, tokens, limit)
        partial = 0 if lessor.partial is Partial.OFF else match.partial_tokens
        if (there := match.end // TOKEN_BYTES + partial) > reused:
            found.append((space, there))
    return tuple(sorted(found, key=lambda one: -one[1]))
