"""An index that is put into an empty cache at once is the one that it was, however it was cut."""

from __future__ import annotations

import random
from array import array

import pytest

from core.innards import indexed_below, root_of
from core.rules import NAMES, Rules, step
from core.test_machine import Seeded
from core.transcript import Transcript
from core.world import Shape, World
from prefixcache.core.bulk_load import StoredRun
from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, Namespace, Partial, WorkerId, pack


def grown(seed: int, block_size: int) -> World:
    """A world after a random story."""
    world = World(Shape(40, block_size, Partial.TAILS, "lru", first_block=seed % 3))
    rules = Rules(world, Seeded(seed))
    rules.attach()
    for number in range(60):
        rules.draw = Seeded((seed, number))
        step(rules, rules.choose(NAMES))
    return world


def cut(transcript: Transcript, draw: random.Random) -> list[StoredRun]:
    """Cut what a transcript knows into runs, at random, each after the one it goes on from."""
    size = transcript.block_size
    runs: list[StoredRun] = []
    ends: dict[int, int] = {}
    for block, (namespace, prefix) in sorted(
        transcript.prefixes.items(), key=lambda item: len(item[1][1])
    ):
        above = transcript.parents[block]
        start = (len(prefix) - 1) // size * size
        tokens = pack(prefix[start:])
        whole = len(prefix) % size == 0
        number = None if above is None else ends.pop(above, None)
        if number is not None and whole and draw.random() < 0.7:
            runs[number].blocks.append(block)
            runs[number] = runs[number]._replace(tokens=runs[number].tokens + tokens)
        else:
            number = len(runs)
            runs.append(
                StoredRun(namespace, -1 if above is None else above, tokens, array("i", [block]))
            )
        ends[block] = number
    return sorted(runs, key=lambda run: len(transcript.prefixes[run.blocks[0]][1]))


def index(cache: PrefixCache, namespace: Namespace) -> set[tuple[int, tuple[int, ...]]]:
    root = root_of(cache, namespace)
    found = () if root is None else indexed_below(root, cache.block_size)
    return {(entry.block, entry.prefix) for entry in found}


@pytest.mark.walk
@pytest.mark.parametrize("block_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(12))
def test_what_is_restored_is_what_was_there(seed: int, block_size: int) -> None:
    world = grown(seed, block_size)
    draw = random.Random(seed)
    runs = cut(world.transcript, draw)
    # What lies under a tail that is locked can be covered by a fuller block: only one is taken.
    fresh = PrefixCache(40, block_size, first_block=seed % 3)
    aside = array("i", [block for block in (37, 39) if block not in world.transcript.prefixes])
    count = fresh.restore(runs, aside, WorkerId(-3))
    fresh.check()
    assert fresh.num_indexed == count
    assert fresh.snapshot(now=0.0).quarantined == len(aside)
    for namespace in world.namespaces:
        before, after = index(world.cache, namespace), index(fresh, namespace)
        assert after <= before
        kept = {prefix for _, prefix in after}
        for _, prefix in before - {entry for entry in before if entry in after}:
            assert len(prefix) % block_size, "a whole block was left out"
            assert any(other[: len(prefix)] == prefix for other in kept), "and nothing covers it"
        for _, prefix in before:
            asked = pack([*prefix, 0])
            assert (
                fresh.lookup(namespace, asked).num_hit
                == world.cache.lookup(namespace, asked).num_hit
            )
    assert fresh.worker_gone(WorkerId(-3), now=0.0) == len(aside)
    live_on(fresh)


def live_on(cache: PrefixCache) -> None:
    """All its blocks can be lent and evicted, and the invariants hold all the way."""
    me, namespace = WorkerId(1), Namespace("m")
    cache.attach(me, namespace, now=0.0)
    for number in range(20):
        tokens = pack([number % 3, *range(number, number + 7 * cache.block_size)])
        grant = cache.acquire(me, namespace, tokens, now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(me, grant.lease, len(tokens) // 4, now=0.0)
        cache.release(me, grant.lease, now=0.0)
        cache.check()


def test_orphans_and_what_is_there_already_are_left_out() -> None:
    space, other = Namespace("m"), Namespace("o")
    cache = PrefixCache(8, 2)
    runs = [
        StoredRun(space, -1, pack([1, 2, 3, 4]), array("i", [0, 1])),
        StoredRun(space, -1, pack([1, 2]), array("i", [2])),
        StoredRun(space, 5, pack([7, 7]), array("i", [3])),
        StoredRun(other, 1, pack([7, 7]), array("i", [4])),
        StoredRun(space, 1, pack([5]), array("i", [6])),
    ]
    assert cache.restore(runs, array("i"), WorkerId(-3)) == 3
    cache.check()
    assert cache.lookup(space, pack([1, 2, 3, 4, 5, 6])).num_partial == 1
    assert cache.lookup(other, pack([7, 7, 7])).num_hit == 0


def test_each_run_goes_on_where_the_one_above_it_ended_however_they_are_cut() -> None:
    space = Namespace("m")
    cache = PrefixCache(16, 2)
    runs = [
        StoredRun(space, -1, pack([1, 2]), array("i", [0])),
        StoredRun(space, 0, pack([3, 4]), array("i", [1])),
        StoredRun(space, 1, pack([5, 6]), array("i", [2])),
        StoredRun(space, 2, pack([7, 8]), array("i", [3])),
        StoredRun(space, 2, pack([9, 9]), array("i", [4])),
        StoredRun(space, 4, pack([1]), array("i", [5])),
    ]
    assert cache.restore(runs, array("i"), WorkerId(-3)) == 6
    cache.check()
    assert cache.snapshot(now=0.0).nodes == 4  # one for each stretch without a fork, and a tail
    assert cache.lookup(space, pack([1, 2, 3, 4, 5, 6, 7, 8, 0])).num_hit == 8
    told = cache.lookup(space, pack([1, 2, 3, 4, 5, 6, 9, 9, 1, 0]))
    assert (told.num_hit, told.num_partial) == (8, 1)


def test_a_tail_that_a_fuller_sibling_holds_too_is_left_out() -> None:
    space = Namespace("m")
    cache = PrefixCache(16, 4)
    runs = [
        StoredRun(space, -1, pack([1, 2, 3, 4]), array("i", [0])),
        StoredRun(space, 0, pack([5]), array("i", [1])),
        StoredRun(space, 0, pack([5, 6, 7, 8]), array("i", [2])),
        StoredRun(space, 0, pack([6, 6]), array("i", [3])),
    ]
    assert cache.restore(runs, array("i"), WorkerId(-3)) == 3
    cache.check()
    assert {block for block, _ in index(cache, space)} == {0, 2, 3}
