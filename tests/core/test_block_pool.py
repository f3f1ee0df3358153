"""The pool and the last tenant of its blocks, held against one dict entry per block."""

from __future__ import annotations

from array import array
from collections import Counter
from random import Random

import pytest

from prefixcache.core.block_pool import BlockPool, LastTenant
from prefixcache.errors import PoolExhausted
from prefixcache.types import BlockId, BlockTable, LeaseId, WorkerId

WORKERS = [WorkerId(1), WorkerId(2)]
NONE: BlockTable = array("i")


class Writers:
    """Who listens to what may be written to."""

    def __init__(self) -> None:
        self.now: Counter[int] = Counter()

    def given(self, blocks: BlockTable) -> None:
        self.now.update(blocks)

    def ended(self, blocks: BlockTable) -> None:
        self.now.subtract(blocks)


@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("size", [6, 300])
@pytest.mark.parametrize("seed", range(4))
def test_each_block_has_the_owners_that_were_counted_one_by_one(
    seed: int, size: int, first: int
) -> None:
    draw, pool = Random(f"{seed} {size}"), BlockPool(size, first)
    pool.write_listener = writers = Writers()
    owners: Counter[int] = Counter()
    aside: dict[tuple[WorkerId, LeaseId], list[int]] = {}
    leases = 0
    for _ in range(200):
        what = draw.random()
        live = sorted(owners)
        if what < 0.4:
            count = draw.randrange(1 + size // 2)
            free = size - len(owners) - sum(map(len, aside.values()))
            if count > free:
                with pytest.raises(PoolExhausted, match=f"; {free} free"):
                    pool.allocate(count)
            else:
                given = pool.allocate(count)
                assert len(set(given)) == count
                assert not set(given) & (owners.keys() | {b for ids in aside.values() for b in ids})
                owners.update(given)
        elif what < 0.55 and live:
            pool.add_ref(BlockId(block := draw.choice(live)))
            owners[block] += 1
        elif what < 0.8 and live:
            gone = draw.sample(live, draw.randrange(len(live) + 1))
            freed = [block for block in gone if owners[block] == 1]
            if draw.random() < 0.3:
                for block in gone:
                    pool.release_one(BlockId(block))
            else:
                assert pool.release(array("i", gone)) == len(freed)
            owners -= Counter(gone)
        elif what < 0.9 and live:
            alone = [block for block in live if owners[block] == 1]
            gone = draw.sample(alone, draw.randrange(len(alone) + 1))
            worker, leases = draw.choice(WORKERS), leases + 1
            assert pool.quarantine(worker, LeaseId(leases), array("i", gone)) == len(gone)
            if gone:
                aside[worker, LeaseId(leases)] = gone
            for block in gone:
                del owners[block]
        else:
            worker = draw.choice(WORKERS)
            mine = [lease for one, lease in aside if one == worker]
            only = draw.choice([None, LeaseId(leases + 1), *mine])
            ended = [key for key in aside if key[0] == worker and only in (None, key[1])]
            told = pool.count_quarantined_leases(worker, only)
            assert told == {key[1]: len(aside[key]) for key in ended}
            assert pool.release_quarantine(worker, only) == sum(told.values())
            for key in ended:
                del aside[key]
        for worker in WORKERS:
            waiting = [len(ids) for (one, _), ids in aside.items() if one == worker]
            assert pool.count_quarantined(worker) == sum(waiting)
        everything = {block for ids in aside.values() for block in ids}
        assert pool.num_quarantined == len(everything)
        assert pool.num_free == size - len(owners) - len(everything)
        assert pool.refs == {block: count - 1 for block, count in owners.items() if count > 1}
        assert +writers.now == Counter([*owners, *everything])
        assert all(first <= block < pool.num_used for block in everything | owners.keys())
        live_now, quarantined = pool.states()
        assert set(live_now.nonzero()[0].tolist()) == set(owners)
        assert set(quarantined.nonzero()[0].tolist()) == everything
        pool.check(array("i", owners), array("i", Counter(pool.refs).elements()))


def test_a_copy_that_still_reads_a_block_keeps_it_when_its_last_writer_has_gone() -> None:
    pool = BlockPool(4)
    block = BlockId(pool.allocate(1)[0])
    pool.add_ref(block)
    pool.quarantine(WORKERS[0], LeaseId(1), array("i", [block]))
    assert pool.release_quarantine(WORKERS[0]) == 0
    assert (pool.num_free, pool.refs) == (3, {})
    pool.check(array("i", [block]), NONE)
    pool.release_one(block)
    assert pool.num_free == 4


def test_a_pool_begins_anew_with_what_was_indexed_and_what_was_set_aside() -> None:
    for indexed, aside in (([4, 6], [3, 9]), ([], [5]), ([11], []), ([], [])):
        pool = BlockPool(10, first=2)
        pool.allocate(7)
        pool.restore(array("i", indexed), array("i", aside), WORKERS[0])
        assert pool.num_free == 10 - len(indexed) - len(aside)
        assert pool.num_used == max([*indexed, *aside, 1]) + 1
        pool.check(array("i", indexed), NONE)
        rest = pool.allocate(pool.num_free)
        assert sorted([*rest, *indexed, *aside]) == list(range(2, 12))
        assert pool.release_quarantine(WORKERS[0]) == len(aside)
        owned = array("i", [*rest, *indexed])
        pool.check(owned, NONE)
        for wrong in (owned[1:], owned + owned[:1], owned + array("i", [1]), array("i", [12])):
            with pytest.raises(AssertionError, match=r"block \d+"):
                pool.check(wrong, NONE)
        with pytest.raises(AssertionError, match=f"block {owned[3]}: 2 owners, expected 1"):
            pool.check(owned, owned[3:4])


@pytest.mark.parametrize("size", [8, 200])
@pytest.mark.parametrize("is_restored", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_wiped_is_what_another_tenant_has_used_since_and_nothing_else(
    seed: int, is_restored: bool, size: int
) -> None:
    draw, wiped = Random(f"{seed} {size}"), []
    last, owner = LastTenant(size), dict[int, str]()
    used = 0
    if is_restored:
        mine = draw.sample(range(size), size // 2)
        last.restore([("red", array("i", mine[::2])), ("blue", array("i", mine[1::2]))])
        owner = dict.fromkeys(range(size), "who knows?")
        owner |= dict.fromkeys(mine[::2], "red") | dict.fromkeys(mine[1::2], "blue")
        used = size
    last.wipe = wiped.extend
    for number in range(300):
        tenant = "red" if number < 60 else draw.choice(["red", "blue", "", f"t{number // 100}"])
        most = min(size, used + draw.randrange(1 + size // 4))
        blocks = draw.sample(range(most), draw.randrange(most + 1))
        foreign = [block for block in blocks if owner.get(block, tenant) != tenant]
        last.assign(array("i", blocks), tenant, used)
        used = max(used, most)
        assert wiped == foreign, f"loan {number}"
        wiped.clear()
        if number >= 60 or is_restored:
            owner |= dict.fromkeys(blocks, tenant)
        else:  # of one tenant alone nothing is kept but how far the pool was used
            owner = dict.fromkeys(range(used), "red")


def test_numbers_of_tenants_without_a_block_are_forgotten_and_those_of_others_are_not() -> None:
    last, wiped = LastTenant(4), list[int]()
    last.wipe = wiped.extend
    last.assign(array("i", [0]), "kept", 0)
    for number in range(5000):
        last.assign(array("i", [1]), f"t{number}", 1)
        assert len(last._numbers) <= 2 * 4 + 1024
    wiped.clear()
    last.assign(array("i", [0]), "kept", 4)
    assert not wiped
    last.assign(array("i", [1]), "kept", 4)
    assert wiped == [1]


def test_who_is_lent_nothing_or_has_no_memory_is_nobody_s_heir() -> None:
    last, wiped = LastTenant(4), list[int]()
    last.assign(array("i", [0]), "before there was memory", 0)
    last.wipe = wiped.extend
    last.assign(array("i"), "nobody", 1)
    last.assign(array("i", [0]), "first", 1)
    last.assign(array("i", [0]), "first", 1)
    assert not wiped
    last.assign(array("i", [0]), "second", 1)
    assert wiped == [0]
