"""Whoever follows what is told knows at every step where each block lies, and never misses one."""

from __future__ import annotations

import random
from array import array

import pytest

from core.churn import ME, SPACES, Churn
from core.follower import Ears, Follower
from prefixcache.core import kv_events
from prefixcache.core.policies import POLICIES
from prefixcache.core.tiers import LEVEL_BITS, Level, Tier


@pytest.mark.parametrize("policy", sorted(POLICIES))
@pytest.mark.parametrize("seed", range(4))
def test_a_follower_knows_where_all_lies_at_every_step(
    policy: str, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the start, and from some later moment on, told what there was while all changes."""
    monkeypatch.setattr(kv_events, "_PAUSE_EVERY", 1)
    monkeypatch.setattr(kv_events, "_BLOCKS_IN_ONE_GO", 1 + seed % 3)
    draw = random.Random(f"{policy} {seed}")
    for _ in range(6):
        disk = draw.randrange(16) if seed % 2 else 0
        churn = Churn(draw, draw.randrange(6, 24), draw.randrange(1, 24), policy, disk)
        early, late = Follower(churn.cache), Follower(churn.cache, late=True)
        followers = [early, late]
        ears = Ears(lambda followers=followers: followers)  # type: ignore[misc]
        churn.cache.observe(ears, below=ears)

        def verify(followers: list[Follower] = followers) -> None:
            for one in followers:
                one.verify()

        churn.after = verify
        for step in range(300):
            churn.step()
            if not followers[1].go_on() and step % 10 == 0:
                followers[1] = Follower(churn.cache, late=True)
        churn.cache.check()
    assert early.prefixes


def test_a_namespace_that_goes_takes_with_it_what_lies_below() -> None:
    draw = random.Random(2)
    churn = Churn(draw, 12, 24)
    early = Follower(churn.cache)
    churn.cache.observe(early, below=early)
    churn.after = early.verify
    for _ in range(200):
        churn.step()
    assert any(place >> LEVEL_BITS for place in early.prefixes)
    lessor = churn.cache._lessor
    churn.cache.worker_gone(ME, now=0.0)
    evicted = lessor.tree.evict(100)
    lessor.blocks.pool.release(evicted)
    early.verify()
    assert early.prefixes
    for _ in SPACES:
        assert lessor._let_go(next(lessor.namespaces.next(1)))
    early.verify()
    assert not early.prefixes


def test_what_a_place_is() -> None:
    assert Level.POOL.places(array("i", [3])).tolist() == [3]
    tier = Tier(1, 8, num_disk=4)
    told = tier.told(tier.take(3, num_disk=2)).tolist()
    assert told == [1 << LEVEL_BITS, (2 << LEVEL_BITS) + 1, (2 << LEVEL_BITS) + 0]
