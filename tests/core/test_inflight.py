"""The flight worth waiting for is the one that a walk over all of them would choose."""

from __future__ import annotations

from random import Random

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, Namespace, Partial, Waiting, WorkerId, pack

ME, HERE = WorkerId(1), Namespace("m")
SIZE = 4


def gain(prompt: list[int], tokens: list[int], partial: Partial, stored: int) -> int:
    """Say how many tokens a prompt that is computed now will spare another one."""
    if partial is not Partial.TAILS:
        prompt = prompt[: len(prompt) // SIZE * SIZE]
    common = 0
    while common < min(len(prompt), len(tokens) - 1) and prompt[common] == tokens[common]:
        common += 1
    if partial is Partial.OFF:
        common -= common % SIZE
    return max(0, common - stored)


@pytest.mark.parametrize("partial", list(Partial))
@pytest.mark.parametrize("seed", range(20))
def test_it_is_found_among_many(seed: int, partial: Partial) -> None:
    draw = Random(seed)
    cache = PrefixCache(4096, SIZE, partial=partial)
    cache.attach(ME, HERE, now=0.0)
    flights: dict[int, list[int]] = {}
    for _ in range(30):
        prompt = [draw.randrange(2) for _ in range(draw.randrange(1, 14))]
        grant = cache.acquire(ME, HERE, pack(prompt), now=0.0)
        assert isinstance(grant, Grant)
        flights[grant.lease] = prompt
        if draw.random() < 0.3:
            cache.release(ME, lease := draw.choice(list(flights)), now=0.0)
            del flights[lease]
        cache.check()
    for _ in range(30):
        tokens = [draw.randrange(2) for _ in range(draw.randrange(1, 14))]
        best = max((gain(one, tokens, partial, 0) for one in flights.values()), default=0)
        answer = cache.acquire(ME, HERE, pack(tokens), wait_s=5.0, now=0.0)
        assert isinstance(answer, Waiting) == (best > 0)
        if isinstance(answer, Waiting):
            assert gain(flights[answer.owner], tokens, partial, 0) == best
            cache.cancel(ME, answer.ticket, now=0.0)
        else:
            cache.release(ME, answer.lease, now=0.0)


@pytest.mark.parametrize("partial", [Partial.OFF, Partial.BLOCKS])
def test_a_last_block_that_stays_partly_filled_is_waited_for_by_nobody(partial: Partial) -> None:
    cache = PrefixCache(64, SIZE, partial=partial)
    cache.attach(ME, HERE, now=0.0)
    cache.acquire(ME, HERE, pack([1, 2, 3]), now=0.0)
    assert isinstance(cache.acquire(ME, HERE, pack([1, 2, 3, 9]), wait_s=5.0, now=0.0), Grant)
    cache.acquire(ME, HERE, pack([5, 6, 7, 8, 9]), now=0.0)
    waiting = cache.acquire(ME, HERE, pack([5, 6, 7, 8, 9, 9]), wait_s=5.0, now=0.0)
    assert isinstance(waiting, Waiting)
