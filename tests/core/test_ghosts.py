"""The memory of what was evicted: which of it goes first, how old it is, and where none is kept."""

from __future__ import annotations

from array import array

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.core.ghosts import Ghosts
from prefixcache.core.node import Node, Root, Run
from prefixcache.types import Namespace, Partial, WorkerId, pack

ME, HERE = WorkerId(1), Namespace("m")


def ghost(above: Node, number: int, num_blocks: int = 1) -> Node:
    return Run(pack([number] * 4 * num_blocks), array("i"), above, 0)


def serve(cache: PrefixCache, tokens: list[int], namespace: Namespace = HERE) -> None:
    grant = cache.acquire(ME, namespace, pack(tokens), now=0.0)
    cache.commit(ME, grant.lease, len(tokens), now=0.0)
    cache.release(ME, grant.lease, now=0.0)


@pytest.mark.parametrize("limit", [1, 3, 511, 512, 1023, 1024, 2000])
def test_the_depth_of_a_ghost_is_what_was_buried_since_to_a_512th_of_the_limit(limit: int) -> None:
    ghosts, root = Ghosts(limit, 16), Root(HERE)
    for number in range(limit):
        ghosts.bury(root, ghost(root, number))
    grain = max(1, limit // 512)
    for since in {1, 2, limit // 2, limit} - {0}:
        if since <= limit:
            assert since <= ghosts.depth(limit + 1 - since) < since + grain


def test_a_ghost_of_several_blocks_counts_as_so_many_and_the_oldest_go_first() -> None:
    ghosts, root = Ghosts(6, 16), Root(HERE)
    first, second, third = (ghost(root, n, size) for n, size in ((1, 2), (2, 3), (3, 1)))
    for one in (first, second, third):
        ghosts.bury(root, one)
    assert (ghosts.num_blocks, ghosts.depth(1), ghosts.depth(2), ghosts.depth(3)) == (6, 6, 4, 1)
    assert ghosts.forget() == []
    ghosts.bury(root, ghost(root, 4))
    assert ghosts.forget() == [root]
    assert (ghosts.num_blocks, first.parent, second.parent) == (5, None, root)


def test_what_was_buried_anew_is_as_young_as_that() -> None:
    ghosts, root = Ghosts(2, 16), Root(HERE)
    again, other = ghost(root, 1), ghost(root, 2)
    ghosts.bury(root, again)
    ghosts.bury(root, other)
    assert ghosts.revive(root, again.tokens) is again
    ghosts.bury(root, again)
    ghosts.bury(root, ghost(root, 3))
    assert ghosts.forget() == [root]
    assert other.parent is None  # the older one now
    assert again.parent is root
    assert ghosts.match(root, again.tokens, 0) == len(again.tokens)
    assert ghosts.match(root, other.tokens, 0) == 0


def test_what_is_tidied_up_are_entries_of_those_buried_anew_and_the_living_go_in_their_turn() -> (
    None
):
    ghosts, root = Ghosts(3, 16), Root(HERE)
    old, again = ghost(root, 1), ghost(root, 2)
    ghosts.bury(root, old)
    ghosts.bury(root, again)
    for _ in range(2000):
        assert ghosts.revive(root, again.tokens) is again
        ghosts.bury(root, again)
        assert ghosts.forget() == []
        assert len(ghosts._fifo) <= 1025
    ghosts.bury(root, ghost(root, 3))
    for number, gone in ((4, old), (5, again)):
        ghosts.bury(root, ghost(root, number))
        assert ghosts.forget() == [root]
        assert gone.parent is None
        assert ghosts.num_blocks == 3


def test_what_was_reset_leaves_no_ghosts_whole_or_in_part() -> None:
    for num_evicted in (1, 3):
        cache = PrefixCache(4, 4, num_ghosts=100)
        cache.attach(ME, HERE, now=0.0)
        serve(cache, [1] * 12)
        cache.reset(HERE)
        other = Namespace("other")
        cache.attach(ME, other, now=0.0)
        cache.acquire(ME, other, pack([2] * 4 * (1 + num_evicted)), now=0.0)
        assert cache.counts(now=0.0).ghosts == 0


def test_without_a_limit_nothing_is_remembered() -> None:
    cache = PrefixCache(4, 4, num_ghosts=0)
    cache.attach(ME, HERE, now=0.0)
    serve(cache, [1] * 12)
    for number in (2, 3):
        serve(cache, [number] * 8)
        assert cache.counts(now=0.0).ghosts == 0


@pytest.mark.parametrize("partial", [Partial.OFF, Partial.TAILS])
def test_what_is_stored_in_part_is_not_evicted_too(partial: Partial) -> None:
    """Of a prompt's tokens those count as evicted that a ghost knows and nothing stored."""
    cache = PrefixCache(8, 4, num_ghosts=100, partial=partial)
    cache.attach(ME, HERE, now=0.0)
    serve(cache, [7] * 8 + [1] * 8)
    serve(cache, [8] * 24)  # evicts the last two blocks of the first
    serve(cache, [7] * 8 + [1, 1, 2, 2])
    grant = cache.acquire(ME, HERE, pack([7] * 8 + [1] * 8 + [9]), now=0.0)
    told = grant.ledger
    assert (told.hit, told.partial + told.granularity, told.evicted, told.cold) == (8, 2, 6, 1)


def test_what_parts_inside_a_ghost_is_not_found_below_it_again() -> None:
    ghosts, root = Ghosts(10, 16), Root(HERE)
    above = ghost(root, 1, 2)
    ghosts.bury(root, above)
    ghosts.bury(above, ghost(above, 2))
    assert ghosts.match(root, pack([1] * 8 + [2] * 4), 0) == 4 * 12
    parting = pack([1] * 4 + [2] * 8)
    assert ghosts.match(root, parting, 0) == 4 * 4
    assert sum(size for size, _ in ghosts.trail(root, parting, 0)) == 4 * 4
