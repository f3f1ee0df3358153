"""The order of eviction is that of a block-by-block LRU over leaves, request by request."""

from __future__ import annotations

import random
from array import array

import pytest

from core.oracle import LeafLru, Tokens
from core.replay import Replay
from prefixcache.core.cache import PrefixCache
from prefixcache.core.eviction import LeafQueue
from prefixcache.core.node import Root, Run
from prefixcache.core.policies import POLICIES
from prefixcache.core.policies.lru import Lru
from prefixcache.types import Grant, Namespace, WorkerId, pack

NAMESPACES = (Namespace("a"), Namespace("b"))


def random_sequences(rng: random.Random, count: int, longest: int) -> list[tuple[int, Tokens, int]]:
    """Draw (namespace, tokens left behind, prompt length); most continue or cut an earlier one."""
    sequences: list[tuple[int, Tokens, int]] = []
    vocabulary = rng.choice((2, 3, 50))
    for _ in range(count):
        start: Tokens = ()
        if sequences and rng.random() < 0.7:
            earlier = rng.choice(sequences)[1]
            start = earlier[: rng.randint(0, len(earlier))]
        fresh = rng.randint(0, longest // 2)
        tokens = (*start, *(rng.randrange(vocabulary) for _ in range(fresh)))[:longest] or (0,)
        sequences.append((rng.choice((0, 0, 1)), tokens, rng.randint(1, len(tokens))))
    return sequences


@pytest.mark.walk
@pytest.mark.parametrize("block_size", [1, 2, 4, 16])
@pytest.mark.parametrize("capacity", [1, 2, 3, 5, 8, 13, 40, 1000])
def test_hits_equal_those_of_a_block_by_block_leaf_lru(block_size: int, capacity: int) -> None:
    for seed in range(6):
        rng = random.Random(f"{seed} {block_size} {capacity}")
        ours = Replay(capacity, block_size, num_ghosts=(None, 0, 2)[seed % 3])
        naive = LeafLru(capacity, block_size)
        longest = block_size * rng.choice((4, 8, 2 * min(capacity, 10)))
        for number, (which, tokens, prompt_len) in enumerate(random_sequences(rng, 60, longest)):
            namespace = NAMESPACES[which]
            expected = naive.lookup(namespace, tokens[:prompt_len]) * block_size
            naive.insert(namespace, tokens)
            found, _ = ours.request(namespace, pack(tokens[:prompt_len]), pack(tokens))
            assert found == expected, f"request {number} of seed {seed}: {tokens[:prompt_len]}"
            snapshot = ours.cache.snapshot(now=0.0)
            assert snapshot.indexed == len(naive.last_used), f"request {number} of seed {seed}"
            assert snapshot.evicted == naive.num_evicted, f"request {number} of seed {seed}"
        ours.cache.check()


@pytest.mark.walk
@pytest.mark.parametrize("policy", [name for name in POLICIES if name != "hazard"])
def test_leaves_that_were_reset_do_not_wait_for_their_turn(policy: str) -> None:
    """They are evicted before all others: the policy's queue would never come to them."""
    cache, me, space = PrefixCache(8, 1, policy=policy, ttl_s=1e9), WorkerId(1), Namespace("m")
    for _ in range(1400):
        cache.attach(me, space, now=0.0)
        grant = cache.acquire(me, space, pack([1, 2]), now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(me, grant.lease, 2, now=0.0)
        cache.release(me, grant.lease, now=0.0)
        cache.reset(space)
    assert len(cache._lessor.tree.queue) <= 1024 + 1
    cache.check()


@pytest.mark.parametrize("seed", range(5))
def test_leaves_of_the_same_age_go_in_the_order_in_which_they_came(seed: int) -> None:
    draw, queue, root = random.Random(seed), LeafQueue(Lru()), Root(NAMESPACES[0])
    waiting: list[Run] = []
    for number in range(2_000):
        if draw.random() < 0.6:
            age = number // 100 - draw.choice((0, 0, 0, 1, 5))
            waiting.append(leaf := Run(pack([number]), array("i", [number]), root, age))
            queue.push(leaf)
        elif waiting:
            first = min(waiting, key=lambda leaf: leaf.last_used)  # of equal ones, the first
            waiting.remove(first)
            assert queue.pop() is first
