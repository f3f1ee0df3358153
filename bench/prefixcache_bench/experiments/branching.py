"""What sharing blocks saves when one prompt has several answers: the cache's own `fork`, counted.

**Parallel sampling**: the prompt is computed once, every further sample is a fork; each gets a copy
of the last, partly filled block when it first writes, and blocks of its own from there on.

**Beam search**: at each step the best `width` of all continuations go on.  A beam with several
continuations is forked, one with none is released.  Which beam continues is drawn (there is no
model here): each beam has a score, each of its continuations loses an exponentially distributed
amount from it, and the best scores win, which makes beams come from one or a few parents.

The saving is counted over all steps: blocks that leases hold, against as many sequences with a
table each to themselves.
"""

from __future__ import annotations

import random
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, LeaseId, Namespace, Partial, WorkerId
from prefixcache_bench.experiments.memory import Job

_WORKER, _SPACE = WorkerId(1), Namespace("decoder")


@dataclass(slots=True)
class _Saving:
    """Block-steps, held and as they would be without sharing."""

    held: int = 0
    alone: int = 0

    @property
    def share(self) -> float:
        return 1 - self.held / max(1, self.alone)


class _Decoder:
    """One request's sequences on a cache of their own."""

    def __init__(self, block_size: int, longest: int, width: int) -> None:
        self.block_size = block_size
        # Enough for every sequence on its own, twice: forks come before releases.
        num_blocks = 2 * width * (-(-longest // block_size) + 1)
        self.cache = PrefixCache(num_blocks, block_size, partial=Partial.OFF, ttl_s=1e9)
        self.cache.attach(_WORKER, _SPACE, now=0.0)
        self._fresh = 0

    def begin(self, prompt: int) -> LeaseId:
        tokens = array("I", range(self._fresh, self._fresh + prompt)).tobytes()
        self._fresh += prompt
        grant = self.cache.acquire(_WORKER, _SPACE, tokens, now=0.0)
        assert isinstance(grant, Grant)
        self.cache.commit(_WORKER, grant.lease, prompt, now=0.0)
        return grant.lease

    def fork(self, lease: LeaseId, count: int) -> list[LeaseId]:
        if not count:
            return []
        return [child.lease for child in self.cache.fork(_WORKER, lease, count, now=0.0)]

    def write(self, lease: LeaseId, start: int, count: int) -> None:
        """Decode `count` tokens that nobody else has, after the first `start`."""
        tokens = array("I", range(self._fresh, self._fresh + count)).tobytes()
        self._fresh += count
        self.cache.extend(_WORKER, lease, start + count, now=0.0)
        self.cache.commit(_WORKER, lease, start + count, tokens, now=0.0)

    def end(self, lease: LeaseId) -> None:
        self.cache.release(_WORKER, lease, now=0.0)

    def count(self, saving: _Saving, sequences: int, tokens: int, steps: int) -> None:
        """Count the blocks that leases hold now, for so many steps."""
        now = self.cache.snapshot(now=0.0)
        saving.held += steps * (now.private + now.indexed - now.evictable)
        saving.alone += steps * sequences * -(-tokens // self.block_size)


def parallel_sampling(jobs: Sequence[Job], samples: int, block_size: int) -> float:
    """Give the share of blocks saved when every prompt has `samples` answers of one length."""
    saving = _Saving()
    for job in jobs:
        decoder = _Decoder(block_size, job.total, samples)
        first = decoder.begin(job.prompt)
        leases = [first, *decoder.fork(first, samples - 1)]
        at = job.prompt
        while at < job.total:
            # Up to the end of a block nothing changes but its filling.
            count = min(block_size - at % block_size, job.total - at)
            for lease in leases:
                decoder.write(lease, at, count)
            at += count
            decoder.count(saving, samples, at, count)
    return saving.share


def beam_search(jobs: Sequence[Job], width: int, block_size: int, *, seed: int = 0) -> float:
    """Give the share of blocks saved by a beam search of `width` beams."""
    saving = _Saving()
    draw = random.Random(seed)
    for job in jobs:
        decoder = _Decoder(block_size, job.total, width)
        first = decoder.begin(job.prompt)
        beams = [(0.0, lease) for lease in [first, *decoder.fork(first, width - 1)]]
        for at in range(job.prompt, job.total):
            for _, lease in beams:
                decoder.write(lease, at, 1)
            decoder.count(saving, width, at + 1, 1)
            if at + 1 < job.total:
                beams = _next_beams(decoder, beams, draw)
    return saving.share


def _next_beams(
    decoder: _Decoder, beams: list[tuple[float, LeaseId]], draw: random.Random
) -> list[tuple[float, LeaseId]]:
    width = len(beams)
    continuations = []
    for score, lease in beams:
        for _ in range(width):
            score -= draw.expovariate(1.0)
            continuations.append((score, lease))
    continuations.sort(reverse=True)
    best = continuations[:width]
    following: list[tuple[float, LeaseId]] = []
    for _, lease in beams:
        scores = [score for score, parent in best if parent == lease]
        if not scores:
            continue
        # The beam itself goes on as its best continuation; the others are forks of it.
        children = [lease, *decoder.fork(lease, len(scores) - 1)]
        following.extend(zip(scores, children, strict=True))
    for _, lease in beams:
        if all(parent != lease for _, parent in best):
            decoder.end(lease)
    return following
