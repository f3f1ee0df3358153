"""How much memory would fix it: what was evicted and asked for again, by the blocks it lacked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prefixcache.cli.advice import round_up
from prefixcache.config import format_size
from prefixcache.texts import many

if TYPE_CHECKING:
    from prefixcache.cli.status import Status

Step = tuple[int, int]
"""Extra blocks, and the tokens that they would have kept and fewer would not."""


def enough(steps: Sequence[Step], share: float) -> int | None:
    """Give the extra blocks that would have kept that share of all that was evicted too early.

    >>> enough([(10, 60), (20, 30), (40, 10)], 0.9)
    20
    """
    total, kept = sum(tokens for _, tokens in steps), 0
    for blocks, tokens in steps:
        kept += tokens
        if tokens and kept >= share * total:
            return blocks
    return None


def lines(steps: Sequence[Step], evicted: int, now: Status) -> list[str]:
    """Say what more memory would have kept, in a few lines; nothing if nothing was lost."""
    known = sum(tokens for _, tokens in steps)
    if not evicted or not known:
        return []
    policy = now.info.policy
    sure = "by LRU's order" if policy == "lru" else f"an estimate: by LRU's order, not {policy}'s"
    told = [f"{many(evicted, 'token', 'were')} evicted before they were asked for again ({sure}):"]
    shown: set[int] = set()
    for share in (0.5, 0.9, 1.0):
        blocks = enough(steps, share)
        if blocks is None or blocks in shown:
            continue
        shown.add(blocks)
        kept = sum(tokens for extra, tokens in steps if extra <= blocks)
        total = now.snapshot.num_blocks + blocks
        size = ""
        if now.block_bytes:
            more = format_size(blocks * now.block_bytes)
            size = f" (+{more}: --memory {round_up(now.memory_of(total))})"
        told.append(
            f"  {kept / known:.0%} would still be there with {many(blocks, 'block')} more{size}"
        )
    if 0.95 < now.snapshot.ghosts / max(1, now.snapshot.num_blocks) <= 1:
        told.append(
            "  what was evicted longer ago is not remembered and counts as cold: serve with more "
            "--ghosts to know"
        )
    return told
