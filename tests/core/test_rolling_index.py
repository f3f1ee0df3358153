"""Stored blocks at any offset: held to a naive search, over stories of storing and forgetting."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.innards import indexed_below, root_of
from prefixcache.core import rolling_index
from prefixcache.core.cache import PrefixCache
from prefixcache.core.rolling_index import Donor, RollingIndex
from prefixcache.errors import InvalidRequest
from prefixcache.types import BlockId, Grant, Namespace, WorkerId, pack

SECRET = bytes(range(16))
MODEL = Namespace("m")
SPACES = (MODEL, Namespace("m", tenant="a"), Namespace("m", tenant="b"), Namespace("m", salt="s"))
END = 24

Stored = dict[int, tuple[Namespace, tuple[int, ...], int]]
"""By block: where, its tokens, the position of the first one."""


def table(*blocks: int) -> array[int]:
    return array("i", blocks)


def naive(stored: Stored, size: int, space: Namespace, prompt: list[int]) -> list[int]:
    """Where blocks are chosen: from the front, each as soon as it fits behind the one before."""
    known = {tokens for where, tokens, _ in stored.values() if where == space}
    chosen, at = [], 0
    while at + size <= len(prompt):
        if tuple(prompt[at : at + size]) in known:
            chosen.append(at)
            at += size
        else:
            at += 1
    return chosen


def hold(index: RollingIndex, stored: Stored, space: Namespace, prompt: list[int]) -> None:
    size = index.block_size
    donors = index.search(space, pack(prompt))
    places = []
    for donor in donors:
        for number, block in enumerate(donor.blocks):
            at = donor.start + number * size
            places.append(at)
            where, tokens, source = stored[block]
            assert where == space
            assert tokens == tuple(prompt[at : at + size])
            assert source == donor.source + number * size
    assert places == naive(stored, size, space, prompt)
    for one, other in pairwise(donors):  # as long as they can be
        behind = one.start + len(one.blocks) * size
        assert (other.start, other.source - one.source) != (behind, behind - one.start)


def whole(index: RollingIndex) -> None:
    """Each indexed block is reached once: in its chain, or behind its equals there."""
    seen: list[int] = []
    end = len(index._space)
    for bucket, first in enumerate(index._first.tolist()):
        while first >= 0:
            assert index._hash[first] & index._mask == bucket
            behind, at = -1, first
            while at >= 0:
                seen.append(at)
                assert len(seen) <= end
                assert index._back[at] == behind
                assert index._space[at] == index._space[first]
                assert (index._tokens[at] == index._tokens[first]).all()
                behind, at = at, int(index._same[at])
            first = int(index._next[first])
    assert sorted(seen) == np.flatnonzero(index._space).tolist()


@st.composite
def stories(draw: st.DrawFn) -> tuple[int, list[tuple[Any, ...]]]:
    size = draw(st.sampled_from([1, 2, 4]))
    space, tokens = st.sampled_from(SPACES), st.integers(0, 2)
    run = st.lists(tokens, min_size=1, max_size=6 * size)
    step = st.one_of(
        st.tuples(st.just("stored"), space, run, st.booleans()),
        st.tuples(st.just("stored"), space, run, st.booleans()),
        st.tuples(st.just("removed"), st.sets(st.integers(0, END - 1), max_size=8)),
        st.tuples(st.just("cleared"), space),
        st.tuples(st.just("asked"), space, st.lists(tokens, max_size=20)),
    )
    return size, draw(st.lists(step, max_size=25))


@given(stories())
def test_it_finds_what_a_naive_search_finds(story: tuple[int, list[tuple[Any, ...]]]) -> None:
    size, steps = story
    index = RollingIndex(END, size, SECRET)
    stored: Stored = {}
    for verb, *given_ in steps:
        if verb == "stored":
            space, tokens, goes_on = given_
            free = [block for block in range(END) if block not in stored]
            num = -(-len(tokens) // size)
            if num > len(free):
                continue
            ends = [one for one, (where, _, _) in stored.items() if where == space]
            parent = BlockId(ends[-1]) if goes_on and ends else None
            start = 0 if parent is None else stored[parent][2] + size
            index.stored(space, parent, pack(tokens), table(*free[:num]))
            for at in range(len(tokens) // size):
                block = tuple(tokens[at * size : (at + 1) * size])
                stored[free[at]] = (space, block, start + at * size)
        elif verb == "removed":
            index.removed(MODEL, table(*given_[0]))
            stored = {one: held for one, held in stored.items() if one not in given_[0]}
        elif verb == "cleared":
            index.cleared(given_[0])
            stored = {one: held for one, held in stored.items() if held[0] != given_[0]}
        else:
            hold(index, stored, *given_)
        whole(index)
    for space in SPACES:
        hold(index, stored, space, [0, 1, 2, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 0, 1, 0, 1])


@given(st.data())
def test_every_run_of_nearly_two_blocks_is_found(data: st.DataObject) -> None:
    size = data.draw(st.sampled_from([1, 2, 4, 8]))
    number, least = st.integers(0, 10**9), 2 * size - 1
    tokens = data.draw(st.lists(number, min_size=least, max_size=6 * size, unique=True))
    index = RollingIndex(END, size, SECRET)
    index.stored(MODEL, None, pack(tokens), table(*range(-(-len(tokens) // size))))
    begin = data.draw(st.integers(0, len(tokens) - (2 * size - 1)))
    run = tokens[begin : begin + 2 * size - 1]
    before = data.draw(st.lists(st.integers(2**31, 2**32 - 1), max_size=9))
    (donor,) = index.search(MODEL, pack([*before, *run, 2**32 - 1]))
    assert len(donor.blocks) == 1
    assert donor.source % size == 0
    assert begin <= donor.source <= begin + size - 1
    assert donor.start == len(before) + donor.source - begin
    assert donor.delta == len(before) - begin


def test_blocks_side_by_side_are_one_donor_wherever_it_was_told_of_them() -> None:
    index = RollingIndex(END, 2, SECRET)
    index.stored(MODEL, None, pack([1, 2, 3, 4, 5]), table(7, 3, 9))
    index.stored(MODEL, BlockId(3), pack([5, 6, 7, 8]), table(4, 5))
    assert index.search(MODEL, pack([9, 1, 2, 3, 4, 5, 6, 7, 8])) == [
        Donor(1, 0, (BlockId(7), BlockId(3), BlockId(4), BlockId(5)))
    ]
    assert index.search(MODEL, pack([9, 1, 2, 3, 4, 5, 6]), start=2) == [
        Donor(3, 2, (BlockId(3), BlockId(4)))
    ]
    assert index.search(MODEL, pack([7, 8, 1, 2])) == [
        Donor(0, 6, (BlockId(5),)),
        Donor(2, 0, (BlockId(7),)),
    ]


def test_no_tenant_finds_what_another_stores() -> None:
    index = RollingIndex(END, 4, SECRET)
    tokens = pack([1, 2, 3, 4])
    for block, space in enumerate(SPACES):
        index.stored(space, None, tokens, table(block))
    for block, space in enumerate(SPACES):
        assert index.search(space, tokens) == [Donor(0, 0, (BlockId(block),))]
    assert index.search(Namespace("m", tenant="c"), tokens) == []


def test_what_is_stored_often_makes_no_chain_longer() -> None:
    """A thousand equal blocks, and all but the last forgotten, a run at a time."""
    index = RollingIndex(4096, 4, SECRET)
    for block in range(0, 1000, 10):
        index.stored(MODEL, None, pack([1, 2, 3, 4] * 10), table(*range(block, block + 10)))
    index.stored(MODEL, None, pack([9, 9, 9, 9]), table(4000))
    assert sum(1 for first in index._first.tolist() if first >= 0) == 2
    assert not (index._next[index._first[index._first >= 0]] >= 0).any()
    for block in range(0, 990, 33):
        index.removed(MODEL, table(*range(block, block + 33)))
        (donor, *_) = index.search(MODEL, pack([1, 2, 3, 4]))
        assert donor.blocks[0] >= block + 33
    assert index.num_blocks == 11


@pytest.mark.pure_core
def test_unequal_blocks_with_equal_hashes_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """The worst that a base can be: everything has one hash, and is in one chain."""
    monkeypatch.setattr(RollingIndex, "_hashes", _one_hash)
    index = RollingIndex(END, 2, SECRET)
    index.stored(MODEL, None, pack([1, 1, 2, 2, 1, 1, 3, 3]), table(0, 1, 2, 3))
    index.stored(MODEL, None, pack([2, 2, 1, 1]), table(4, 5))
    index.stored(SPACES[1], None, pack([4, 4, 2, 2]), table(6, 7))
    assert not index.search(MODEL, pack([4, 4]))
    for gone in ((), (0,), (2, 1), (5,)):
        index.removed(MODEL, table(*gone))
        whole(index)
        found = index.search(MODEL, pack([3, 3, 2, 2, 1, 1]))
        held = {block for donor in found for block in donor.blocks}
        assert 3 in held
        assert held & {1, 4}
        assert bool(held & {0, 2, 5}) is (5 not in gone)


def _one_hash(self: RollingIndex, words: Any, space: Any) -> Any:
    return (words[: len(words) - self.block_size + 1] * 0).astype("int64")


def test_windows_are_hashed_as_a_polynomial() -> None:
    index = RollingIndex(END, 4, SECRET)
    index.stored(MODEL, None, pack([1]), table(0))
    space = index._open(MODEL)
    prime = rolling_index._PRIME
    words = [5, 2**32 - 1, 0, 7, 11]
    want = [
        sum((words[at + i] + space.shift) * space.base ** (3 - i) for i in range(4)) % prime
        for at in range(2)
    ]
    assert index._hashes(np.array(words, np.uint32), space).tolist() == want


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RollingIndex(0, 4, SECRET), "blocks below 0"),
        (lambda: RollingIndex(4, 3, SECRET), "power of two"),
        (lambda: RollingIndex(4, 4, b"short"), "5 bytes: at least 16"),
    ],
)
def test_sizes_that_are_none_are_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidRequest, match=message):
        make()


def in_index(index: RollingIndex, space: Namespace) -> Stored:
    life = index._spaces.get(space)
    if life is None:
        return {}
    return {
        block: (space, tuple(index._tokens[block].tolist()), int(index._source[block]))
        for block in range(len(index._space))
        if index._space[block] == life.number
    }


def in_tree(cache: PrefixCache, space: Namespace, size: int) -> Stored:
    root = root_of(cache, space)
    return {
        one.block: (space, one.prefix[-size:], len(one.prefix) - size)
        for one in (indexed_below(root, size) if root else ())
        if one.num_tokens == size
    }


ME = WorkerId(1)


@given(st.data())
def test_it_has_the_whole_blocks_of_a_cache_whatever_happens_to_it(data: st.DataObject) -> None:
    """Grown, absorbed, evicted, reset: what the tree has is found, and nothing else."""
    size, num_blocks = 2, 12
    cache = PrefixCache(num_blocks, size)
    index = RollingIndex(num_blocks, size, SECRET)
    cache.observe(index)
    spaces = SPACES[:3]
    for space in spaces:
        cache.attach(ME, space, now=0.0)
    prompt = st.lists(st.integers(0, 2), min_size=1, max_size=9)
    for now in range(data.draw(st.integers(1, 12))):
        space = data.draw(st.sampled_from(spaces))
        if data.draw(st.integers(0, 9)) == 0:
            cache.reset(space)
        else:
            tokens = data.draw(prompt)
            grant = cache.acquire(ME, space, pack(tokens), now=float(now))
            assert isinstance(grant, Grant)
            half = max(grant.ledger.reused, len(tokens) // 2)
            if half:
                cache.commit(ME, grant.lease, half, now=float(now))
            cache.commit(ME, grant.lease, len(tokens), now=float(now))
            cache.release(ME, grant.lease, now=float(now))
        for one in spaces:
            stored = in_tree(cache, one, size)
            assert in_index(index, one) == stored
            whole(index)
            hold(index, stored, one, data.draw(prompt))
