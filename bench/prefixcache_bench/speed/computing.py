"""Computing: what the demo's model takes for a prompt, of which fetching it is a part."""

from __future__ import annotations

import random
import time
from statistics import median

from prefixcache.types import Layout

CHUNK = 256
"""Tokens of one step, as a worker computes them."""


def computing_s(layout: Layout, num_tokens: int, block_size: int, rounds: int) -> float | None:
    """Give the seconds that one thread takes for a prompt of which nothing is cached.

    Returns:
        The median of some rounds; None if the demo's model has another layout.
    """
    from prefixcache_kernels import SharedPool
    from prefixcache_worker import smollm2
    from prefixcache_worker.batch import Batch, Piece
    from prefixcache_worker.model import Model

    model = Model.load(str(smollm2.folder()), dtype=layout.dtype, threads=1)
    if model.layout != layout:
        return None
    draw = random.Random(1)
    table = list(range(1, 1 + -(-num_tokens // block_size)))
    took = []
    for _ in range(rounds + 1):
        pool = SharedPool.private(layout, 1 + len(table), block_size)
        tokens = [draw.randrange(model.vocab_size) for _ in range(num_tokens)]
        began = time.perf_counter()
        for at in range(0, num_tokens, CHUNK):
            piece = Piece(tokens[at : at + CHUNK], at, table)
            model.forward(Batch.pack([piece], block_size), pool)
        took.append(time.perf_counter() - began)
    return median(took[1:])  # the first one touches everything


def part_of(seconds: float, computed_s: float | None, goal: float) -> str:
    """Write what part of computing something takes, beside what it may; empty if nobody knows."""
    if computed_s is None:
        return ""
    return f"; {seconds / computed_s:.1%} of computing them, goal {goal:.0%}"
