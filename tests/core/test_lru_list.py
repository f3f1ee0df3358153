"""The LRU list by whole uses agrees with a list of single blocks."""

from __future__ import annotations

from random import Random

import pytest

from prefixcache.core.policies.lru_list import LruList


@pytest.mark.parametrize("seed", range(10))
def test_it_has_what_a_list_of_blocks_has_whatever_enters_leaves_and_falls_out(seed: int) -> None:
    draw, there = Random(seed), LruList()
    inside: list[int] = []  # the stamp of each block, oldest first
    fallen: list[int] = []
    fell: dict[int, int] = {}
    stamp = 0
    for now in range(300):
        stamp += draw.randrange(2)
        what = draw.random()
        if what < 0.5:
            there.enter(stamp, count := draw.randrange(1, 5))
            inside += [stamp] * count
        elif what < 0.8 and (every := inside + fallen):
            gone = draw.choice(every)
            own = inside if gone in inside else fallen
            there.leave(gone, count := draw.randrange(1, own.count(gone) + 1))
            for _ in range(count):
                own.remove(gone)
        else:
            there.shrink(limit := draw.randrange(12), now)
            while len(inside) > limit:
                oldest = inside[0]
                fallen += [one for one in inside if one == oldest]
                inside = [one for one in inside if one != oldest]
                fell[oldest] = now
            stamp += 1  # what falls out whole is not entered again
        assert there.size == len(inside)
        for one in inside:
            assert there.fell_at(one) is None
        for one in fallen:
            assert there.fell_at(one) == fell[one]


def test_uses_that_own_nothing_any_more_are_forgotten() -> None:
    there = LruList()
    there.enter(0, 1)
    for stamp in range(1, 10_000):
        there.enter(stamp, 1)
        there.leave(stamp, 1)
        assert len(there._order) <= 70
    there.shrink(0, 5)
    assert there.fell_at(0) == 5
    there.leave(0, 1)
    assert not there._fell


def test_uses_are_sorted_out_only_where_most_of_them_own_nothing_any_more() -> None:
    there, order = LruList(), None
    for stamp in range(1000):
        there.enter(stamp, 2)
        order = order or there._order
        assert there._order is order  # all own something: to look at each again would find nothing
    for stamp in range(1000):
        there.leave(stamp, 2)
    there.enter(1000, 1)
    assert list(there._order) == [1000]
