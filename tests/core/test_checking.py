"""The check that walks while everything changes: it finds what is wrong, and nothing else."""

from collections.abc import Callable, Generator
from random import Random
from typing import Any

import pytest

from core.effort import most_in_one_go
from core.rules import NAMES, Rules, step
from core.test_machine import Seeded, shape_for
from core.world import World
from prefixcache.core import invariants
from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import Node, Run
from prefixcache.types import Checked, Grant, LeaseId, Namespace, Partial, WorkerId, pack

ME = WorkerId(1)
HERE, GONE = Namespace("m"), Namespace("gone")


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "_AT_ONCE", 1)


class Storm:
    """Prompts that collide come and go; one stays, with its lease."""

    def __init__(self, seed: int) -> None:
        self.draw = Random(seed)
        self.cache = PrefixCache(200, 4, num_ghosts=50)
        self.cache.attach(ME, HERE, now=0.0)
        kept = self.cache.acquire(ME, HERE, pack([7] * 40), now=0.0)
        self.cache.commit(ME, kept.lease, 40, now=0.0)
        match = self.tree.match(self.cache._lessor.roots[HERE], pack([7] * 40))
        self.kept: Node = match.node
        self.held: list[LeaseId] = []
        for _ in range(150):
            self.disturb()

    @property
    def tree(self) -> Any:
        return self.cache._lessor.tree

    def disturb(self) -> None:
        if self.held and (len(self.held) > 6 or self.draw.random() < 0.4):
            lease = self.held.pop(self.draw.randrange(len(self.held)))
            self.cache.release(ME, lease, now=0.0)
            return
        prompt = [
            one for _ in range(self.draw.randrange(1, 9)) for one in [self.draw.randrange(3)] * 4
        ]
        grant = self.cache.acquire(ME, HERE, pack([*prompt, 9]), now=0.0)
        most = max(grant.num_cached, self.draw.choice([4, len(prompt), len(prompt) + 1]))
        self.cache.commit(ME, grant.lease, most, now=0.0)
        self.held.append(grant.lease)

    def check(self, most: int = 3) -> Checked:
        told: list[Checked] = []

        def work() -> Generator[None, None, None]:
            told.append((yield from self.cache.check_in_steps()))

        for _ in work():
            for _ in range(self.draw.randrange(most)):
                self.disturb()
        return told[0]

    def check_again(self) -> None:
        """A block that changes hands in each walk may have to wait for the next check."""
        for _ in range(5):
            self.check()


@pytest.mark.walk
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("seed", range(30))
def test_nothing_is_called_wrong_while_everything_changes(seed: int):
    storm = Storm(seed)
    storm.cache.check()
    assert storm.check().num_runs > 3
    storm.cache.check()


@pytest.mark.slow
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("partial", list(Partial))
def test_every_verb_may_come_between_two_steps(partial: Partial):
    for sequence in range(12):
        draw = Seeded(("check", partial.value, sequence))
        world = World(shape_for("lru", partial, 2, draw))
        rules = Rules(world, draw)
        rules.attach()
        work, num_ended, through = world.cache.check_in_steps(), 0, object()
        for _ in range(120):
            step(rules, rules.choose(NAMES))
            if next(work, through) is not None:
                work, num_ended = world.cache.check_in_steps(), num_ended + 1
        assert num_ended


def a_lock_too_many(storm: Storm) -> None:
    storm.kept.lock_ref += 1


def a_lock_too_few(storm: Storm) -> None:
    storm.kept.lock_ref -= 1


def a_block_that_is_lost(storm: Storm) -> None:
    storm.cache._lessor.blocks.pool.allocate(1)


def a_block_of_two(storm: Storm) -> None:
    for lease in storm.cache._lessor.leases.all():
        if lease.id == 1:
            lease.table.append(storm.kept.blocks[0])


def a_block_that_is_also_free(storm: Storm) -> None:
    pool = storm.cache._lessor.blocks.pool
    pool._stack.insert(0, storm.kept.blocks[0])
    pool.num_free += 1


def a_reference_too_many(storm: Storm) -> None:
    storm.cache._lessor.blocks.pool.add_ref(storm.kept.blocks[2])  # type: ignore[arg-type]


def a_ghost_with_blocks(storm: Storm) -> None:
    ghost = Run(pack([8] * 4), storm.kept.blocks[:1], storm.kept, 0)
    storm.tree.ghosts.bury(storm.kept, ghost)


def a_child_of_another_parent(storm: Storm) -> None:
    storm.kept.parent = Run(b"", storm.kept.blocks[:0], storm.kept.root, 0)


def a_sum_of_blocks(storm: Storm) -> None:
    storm.kept.root.num_blocks += 1


def a_sum_that_can_be_evicted(storm: Storm) -> None:
    storm.tree.evictable -= 1


FAULTS = [
    a_lock_too_many,
    a_lock_too_few,
    a_block_that_is_lost,
    a_block_of_two,
    a_block_that_is_also_free,
    a_reference_too_many,
    a_ghost_with_blocks,
    a_child_of_another_parent,
    a_sum_of_blocks,
    a_sum_that_can_be_evicted,
]


@pytest.mark.walk
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("seed", range(4))
def test_what_is_wrong_is_found_while_everything_changes(fault: Callable[[Storm], None], seed: int):
    storm = Storm(seed)
    fault(storm)
    with pytest.raises(AssertionError):
        storm.check_again()


@pytest.mark.slow
@pytest.mark.parametrize("wide", [False, True], ids=["a chain of runs", "many runs in a row"])
def test_a_check_costs_a_step_the_same_however_much_there_is(wide: bool):
    def checked(num_leases: int) -> int:
        cache = PrefixCache(8192, 4)
        cache.attach(ME, HERE, now=0.0)
        for number in range(num_leases):
            prompt = pack([number if wide else 1, *range(3)] + [number + 5] * 4)
            grant = cache.acquire(ME, HERE, prompt, now=0.0)
            cache.commit(ME, grant.lease, 8, now=0.0)
        most, told = most_in_one_go(cache.check_in_steps())
        assert told.failure == ""
        assert told.num_runs >= num_leases
        return most

    assert checked(3300) < 1.3 * checked(2200)


def test_a_long_list_is_left_out_and_named():
    cache = PrefixCache(8192, 4)
    cache.attach(ME, HERE, now=0.0)
    for number in range(2001):
        cache.acquire(ME, HERE, pack([number]), now=0.0)
    _, told = most_in_one_go(cache.check_in_steps())
    assert [one.partition(":")[0] for one in told.left_out] == [
        "prefixes in flight",
        "tables of leases",
        "leases by age",
        "leases by account",
    ]


def test_a_block_that_is_never_lent_has_no_owner() -> None:
    cache = PrefixCache(4, 4, first_block=2)
    cache.check()
    cache._lessor.blocks.pool._stack.append(1)
    with pytest.raises(AssertionError, match="block 1"):
        cache.check()


def still_life() -> PrefixCache:
    """One of each: a tail, forks that share one, a copy's source, a duplicate, ghosts, a reset."""
    cache = PrefixCache(32, 4, partial=Partial.TAILS, num_ghosts=50)
    for space in (HERE, GONE):
        cache.attach(ME, space, now=0.0)
    for first in (1, 2):
        held = cache.acquire(ME, HERE, pack([first] * 10), now=0.0)
        assert isinstance(held, Grant)
        cache.commit(ME, held.lease, 10, now=0.0)
    cache.fork(ME, held.lease, 2, now=0.0)
    cache.acquire(ME, HERE, pack([1] * 9 + [3]), now=0.0)
    twins = [cache.acquire(ME, HERE, pack([5] * 8), now=0.0) for _ in range(2)]
    for twin in twins:
        assert isinstance(twin, Grant)
        cache.commit(ME, twin.lease, 8, now=0.0)
    gone = cache.acquire(ME, GONE, pack([6] * 6), now=0.0)
    assert isinstance(gone, Grant)
    cache.commit(ME, gone.lease, 6, now=0.0)
    cache.reset(GONE)
    for first in range(10, 20):
        use = cache.acquire(ME, HERE, pack([first] * 8), now=0.0)
        assert isinstance(use, Grant)
        cache.commit(ME, use.lease, 8, now=0.0)
        cache.release(ME, use.lease, now=0.0)
    cache.check()
    return cache


def nodes_of(cache: PrefixCache) -> list[Node]:
    tree = cache._lessor.tree
    stack: list[Node] = [*cache._lessor.roots.values(), *tree.retired]
    found: list[Node] = []
    while stack:
        found.append(node := stack.pop())
        stack.extend(node.children)
    return found


@pytest.mark.parametrize("at_once", [1, 16, 1000])
def test_in_what_nobody_changes_nothing_is_suspected(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "_AT_ONCE", at_once)
    monkeypatch.setattr(invariants, "_CONFIRMED", 0)  # else all would be looked at in one go
    cache = still_life()
    _, told = most_in_one_go(cache.check_in_steps())
    assert told.left_out == ()
    assert told.num_runs == cache.snapshot(now=0.0).nodes


@pytest.mark.parametrize("fault", [a_block_that_is_lost, a_reference_too_many])
def test_a_wrong_owner_is_suspected_and_too_many_runs_to_confirm_it_are_told(
    fault: Callable[[Storm], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    storm = Storm(1)
    fault(storm)
    num_runs = storm.cache.snapshot(now=0.0).nodes
    size = num_runs + storm.cache._lessor.leases.count
    monkeypatch.setattr(invariants, "_CONFIRMED", size - 1)
    _, told = most_in_one_go(storm.cache.check_in_steps())
    assert told.num_runs == num_runs
    [why] = told.left_out
    assert why.startswith(
        "what differed in each of 6 walks, but may have changed each time: the ow"
    )
    assert why.count("the owners of block") <= 3
    monkeypatch.setattr(invariants, "_CONFIRMED", size)
    with pytest.raises(AssertionError):
        list(storm.cache.check_in_steps())


def test_runs_that_were_not_counted_are_suspected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(invariants, "_CONFIRMED", 0)
    for sums in ("the number of runs, ", "the counts of namespace 'm'"):
        cache = still_life()
        tree, root = cache._lessor.tree, cache._lessor.roots[HERE]
        if "runs" in sums:
            tree.num_nodes += 1
        else:
            for counted in (tree, root, root.sums):  # so all sums over it are right
                counted.num_blocks += 1
        _, told = most_in_one_go(cache.check_in_steps())
        assert [sums in why for why in told.left_out] == [True]


def test_a_lease_that_is_wrong_in_itself_is_found_wherever_it_stands() -> None:
    cache = still_life()
    for lease in cache._lessor.leases.all():
        lease.start += 4
        finds_fault(cache)
        lease.start -= 4
        lease.private_from += 1
        finds_fault(cache)
        lease.private_from -= 1
    cache.check()


@pytest.mark.parametrize("more", [-2, -1, 1, 2])
@pytest.mark.parametrize("at_once", [1, 1000])
def test_each_lock_and_each_owner_of_each_kind_is_counted(
    more: int, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(invariants, "_AT_ONCE", at_once)
    cache = still_life()
    nodes, pool = nodes_of(cache), cache._lessor.blocks.pool
    locked = [node for node in nodes if node.lock_ref]
    assert len(locked) > 5
    assert pool.refs
    for node in locked:
        node.lock_ref += more
        finds_fault(cache)
        node.lock_ref -= more
    for block in list(pool.refs):
        pool.refs[block] += more
        finds_fault(cache)
        pool.refs[block] -= more
    for lease in cache._lessor.leases.all():
        lease.num_private += more
        finds_fault(cache)
        lease.num_private -= more
    cache.check()


def finds_fault(cache: PrefixCache) -> None:
    for check in (cache.check, lambda: list(cache.check_in_steps())):
        with pytest.raises(AssertionError):
            check()


def test_a_list_is_as_long_as_its_check_is_work() -> None:
    """Leases by account are looked at once for each tenant."""
    cache = PrefixCache(8192, 4)
    for tenant in ("a", "b", "c"):
        cache.attach(ME, Namespace("m", tenant=tenant), now=0.0)
    for number in range(800):
        cache.acquire(ME, Namespace("m", tenant="a"), pack([number]), now=0.0)
    _, told = most_in_one_go(cache.check_in_steps())
    assert [one.partition(":")[0] for one in told.left_out] == ["leases by account"]
