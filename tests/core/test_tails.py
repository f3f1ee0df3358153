"""Tails: they go before whole blocks, whatever the policy, until they earn their place."""

from __future__ import annotations

from array import array
from random import Random

import pytest

from core.effort import calls
from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import FRESH, Root, Tail
from prefixcache.core.policies import POLICIES
from prefixcache.core.policies.hazard import Hazard
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.tails import Tails
from prefixcache.types import Grant, Namespace, WorkerId, pack

ME, SPACE = WorkerId(1), Namespace("m")
every_policy = pytest.mark.parametrize("policy", POLICIES)


class Service:
    """A cache, of blocks of 4 tokens if not said otherwise, served one request at a time."""

    def __init__(self, num_blocks: int, policy: str = "lru", block_size: int = 4) -> None:
        self.cache = PrefixCache(num_blocks, block_size, policy=policy)
        self.now = 0.0

    def serve(self, *prompts: list[int], space: Namespace = SPACE, commit: bool = True) -> None:
        for prompt in prompts:
            self.now += 1.0
            self.cache.attach(ME, space, now=self.now)
            grant = self.cache.acquire(ME, space, pack(prompt), now=self.now)
            assert isinstance(grant, Grant)
            if commit:
                self.cache.commit(ME, grant.lease, len(prompt), now=self.now)
            self.cache.release(ME, grant.lease, now=self.now)
            self.cache.check()

    def holds(self, prompt: list[int], space: Namespace = SPACE) -> int:
        found = self.cache.lookup(space, pack([*prompt, 10**6]))
        return found.num_hit + found.num_partial


@every_policy
def test_a_tail_goes_before_a_whole_block_that_was_used_longer_ago(policy: str) -> None:
    service = Service(4, policy)
    service.serve([1] * 4, [2] * 6, [3] * 8)
    assert [service.holds(one) for one in ([1] * 4, [2] * 6, [3] * 8)] == [4, 4, 8]


def test_of_tails_the_one_goes_first_that_was_used_longest_ago() -> None:
    service = Service(6)
    service.serve([1] * 5, [2] * 5, [3] * 5, [4] * 1)
    assert [service.holds(one * 5) for one in ([1], [2], [3])] == [4, 5, 5]


@every_policy
def test_a_tail_that_was_found_again_goes_after_what_was_used_before_it(policy: str) -> None:
    service = Service(12, policy)
    others = [[one] * 4 for one in range(4, 12)]
    service.serve([1] * 4, [2] * 6, *others, *[[2] * 6] * 20, [3] * 8)
    assert [service.holds(one) for one in ([2] * 6, [3] * 8)] == [6, 8]
    assert sum(not service.holds(one) for one in ([1] * 4, *others)) == 1


def test_a_tail_of_one_token_that_a_request_covers_is_found() -> None:
    """The last token of a prompt is always computed, so there is nothing to copy."""
    service = Service(4)
    service.serve([1] * 4, *[[2] * 5] * 2, [3] * 8)
    assert [service.holds(one) for one in ([1] * 4, [2] * 5)] == [0, 5]


IN_ORDER_OF_COMING = {"fifo", "2q"}
"""Those to which what was stored first is the oldest, however often it is used soon after."""


@every_policy
@pytest.mark.parametrize("num_copied", [1, 3, 8, 15])
def test_what_is_asked_for_by_copy_goes_after_what_was_asked_for_once(
    policy: str, num_copied: int
) -> None:
    service = Service(33, policy, 16)
    service.serve(*[[one] * 16 for one in range(1, 33)])
    for _ in range(20):  # they go another way, and keep nothing
        service.serve([1] * num_copied + [0], commit=False)
    service.serve([40] * 32)
    assert service.holds([1] * 16) == (0 if policy in IN_ORDER_OF_COMING else 16)


@pytest.mark.parametrize(("num_copied", "copies_a_use"), [(1, 8), (3, 3), (7, 2), (8, 1), (15, 1)])
def test_parts_that_are_copied_add_up_to_a_use_that_a_policy_counts(
    num_copied: int, copies_a_use: int
) -> None:
    service = Service(8, "lfu", 16)
    service.serve([1] * 48)
    tree, root = service.cache._lessor.tree, service.cache._lessor.roots[SPACE]
    counted = []
    for _ in range(9):  # of the second of three blocks
        service.serve([1] * (16 + num_copied) + [0], commit=False)
        head = tree.child(root, pack([1] * 16))
        assert head is not None
        below = tree.child(head, pack([1] * 16))
        assert below is not None
        counted.append(tree.policy.uses(below))
    assert counted == [1 + number // copies_a_use for number in range(1, 10)]


@pytest.mark.parametrize(("num_copied", "gone_with"), [(0, 2), (1, 3), (2, 4), (3, 5)])
def test_hazard_passes_over_what_was_copied_for_as_long_as_that_part_is_worth(
    num_copied: int, gone_with: int
) -> None:
    service = Service(9, "hazard")
    service.serve(*[[one] * 4 for one in range(1, 9)])
    if num_copied:
        service.serve([1] * num_copied + [0], commit=False)
    for number in range(1, gone_with + 1):
        assert service.holds([1] * 4), f"gone with {number - 1}"
        service.serve([100 + number] * 4)
    assert not service.holds([1] * 4)


def test_hazard_learns_nothing_of_copies() -> None:
    learnt = []
    for copies in (False, True):
        service = Service(64, "hazard")
        for number in range(40):
            service.serve([number % 7] * 8)
            if copies:
                service.serve([number % 5] * 3 + [99], commit=False)
        policy = service.cache._lessor.tree.policy
        assert isinstance(policy, Hazard)
        learnt.append((policy.hazards.returned, policy.hazards.exposed))
    assert learnt[0] == learnt[1]


def test_what_hazard_passes_over_can_be_had_when_nothing_else_is_left() -> None:
    service = Service(9, "hazard")
    service.serve(*[[one] * 4 for one in range(1, 9)])
    service.serve(*[[one] * 3 + [0] for one in range(1, 9)], commit=False)
    service.serve([9] * 36)
    assert service.holds([9] * 36) == 36


def test_a_step_passes_over_so_many_blocks_at_most_however_many_were_copied() -> None:
    def evicted(num_blocks: int) -> int:
        service = Service(num_blocks + 1, "hazard")
        cache = service.cache
        cache.attach(ME, SPACE, now=0.0)
        for number in range(num_blocks):
            for ask, commits in (([number] * 4, True), ([number] * 3 + [10**6], False)):
                grant = cache.acquire(ME, SPACE, pack(ask), now=0.0)
                assert isinstance(grant, Grant)
                if commits:
                    cache.commit(ME, grant.lease, 4, now=0.0)
                cache.release(ME, grant.lease, now=0.0)
        return calls(lambda: cache._lessor.tree.evict(1))

    assert evicted(2000) < 1.5 * evicted(100)


def test_what_a_copied_block_follows_is_used_once_by_a_lease() -> None:
    service = Service(8, "lfu")
    service.serve([1] * 4 + [2] * 4, [1] * 4 + [2, 2, 2, 7])
    tree = service.cache._lessor.tree
    root = service.cache._lessor.roots[SPACE]
    head = tree.child(root, pack([1] * 4))
    assert head is not None
    uses = {one.tokens: tree.policy.uses(one) for one in head.children}
    assert tree.policy.uses(head) == 2
    assert uses == {pack([2] * 4): 2, pack([2, 2, 2, 7]): 1}


def test_a_tail_within_a_guaranteed_share_stays() -> None:
    service, mine = Service(6), Namespace("m", tenant="mine")
    service.cache.set_quota("mine", max_held=None, guaranteed=2, now=0.0)
    service.serve([1] * 5, space=mine)
    service.serve([2] * 4, [3] * 4, [4] * 8, [5] * 8)
    assert service.holds([1] * 5, mine) == 5


def test_the_tail_below_a_leaf_goes_with_it_when_nothing_else_is_left() -> None:
    service, mine = Service(4), Namespace("m", tenant="mine")
    service.cache.set_quota("mine", max_held=None, guaranteed=4, now=0.0)
    service.serve([1] * 5, space=mine)
    service.serve([2] * 16)
    assert service.holds([1] * 5, mine) == 0
    assert service.holds([2] * 16) == 16


def test_what_a_share_covers_can_be_had_while_its_leaf_is_leased() -> None:
    service, mine = Service(6), Namespace("m", tenant="mine")
    cache = service.cache
    cache.set_quota("mine", max_held=None, guaranteed=6, now=0.0)
    service.serve([1] * 5, [1] * 4 + [2], space=mine)
    held = cache.acquire(ME, mine, pack([1] * 4 + [3]), now=0.0)
    assert isinstance(held, Grant)
    service.serve([4] * 16)
    assert [service.holds([1] * 4 + [one], mine) for one in (1, 2)] == [4, 4]
    assert service.holds([4] * 16) == 16


def test_a_tail_that_was_found_can_be_had_when_nothing_else_is_left() -> None:
    service = Service(8)
    service.serve(*[[1] * 5] * 3)
    held = service.cache.acquire(ME, SPACE, pack([1] * 4 + [3]), reserve=16, now=9.0)
    assert isinstance(held, Grant)
    service.serve([4] * 8)
    assert [service.holds(one) for one in ([1] * 5, [4] * 8)] == [4, 8]


def test_a_lease_that_gave_up_what_it_copied_uses_nothing() -> None:
    service = Service(8, "lfu")
    cache = service.cache
    service.serve([1] * 8)
    grant = cache.acquire(ME, SPACE, pack([1] * 7 + [2]), now=9.0)
    assert isinstance(grant, Grant)
    cache.commit(ME, grant.lease, 8, now=9.0)
    cache.truncate(ME, grant.lease, 0, now=9.0)
    cache.extend(ME, grant.lease, 8, now=9.0)
    cache.commit(ME, grant.lease, 8, pack([3] * 8), now=9.0)
    cache.release(ME, grant.lease, now=9.0)
    cache.check()
    tree, root = cache._lessor.tree, cache._lessor.roots[SPACE]
    head = tree.child(root, pack([1] * 4))
    assert head is not None
    below = tree.child(head, pack([1] * 4))
    assert below is not None
    assert tree.policy.uses(below) == 1


@every_policy
def test_a_tail_that_is_found_again_and_again_waits_once(policy: str) -> None:
    service = Service(16, policy)
    service.serve([1] * 5, [2] * 6)
    for _ in range(20):
        service.serve([1] * 5, [2] * 6)
    assert len(service.cache._lessor.tree.tails) == 2


def test_the_tails_below_a_leaf_cost_the_same_each_however_many_there_are() -> None:
    def evicted(num_tails: int) -> int:
        tree, root = RadixTree(4), Root(SPACE)
        blocks = iter(range(num_tails + 1))
        node = tree.lock(tree.match(root, b""))
        node = tree.insert(node, pack([1] * 4), array("i", [next(blocks)])).node
        for number in range(num_tails):
            tail, _ = tree.insert_tail(node, pack([number]), array("i", [next(blocks)]))
            assert tail is not None
            tree.leave_tail(tail)
            tree.use(tail)
        tree.unlock(node)
        return calls(lambda: tree.evict(8))

    assert evicted(2000) < 1.5 * evicted(50)


def test_tails_push_nothing_out_of_what_a_policy_remembers() -> None:
    cache = PrefixCache(4, 4, num_ghosts=2)
    cache.attach(ME, SPACE, now=0.0)
    for number in range(12):
        grant = cache.acquire(ME, SPACE, pack([number] * 5), now=0.0)
        assert isinstance(grant, Grant)
        cache.commit(ME, grant.lease, 5, now=0.0)
        cache.release(ME, grant.lease, now=0.0)
    ghosts = cache._lessor.tree.ghosts
    assert (ghosts.num_blocks, ghosts.num_tails) == (2, 2)
    cache.check()


@pytest.mark.parametrize("seed", range(3))
def test_tails_stand_in_two_lines_as_they_would_in_two_lists(seed: int) -> None:
    draw, tails, root = Random(seed), Tails(), Root(SPACE)
    known = [Tail(pack([number]), array("i", [number]), root, number) for number in range(12)]
    fresh: list[Tail] = []
    again: list[Tail] = []
    for stamp in range(400):
        tail, deed = draw.choice(known), draw.choice(("offer", "drop", "found"))
        here = fresh if tail.tail == FRESH else again
        if deed == "offer":
            tails.offer(tail)
            here += [] if tail in here else [tail]
        elif deed == "drop":
            tails.drop(tail)
            here[:] = [one for one in here if one is not tail]
        else:
            tails.found(tail, stamp)
            if tail in here:
                here.remove(tail)
                again.append(tail)
        assert len(tails) == len(fresh) + len(again)
        assert [one in tails for one in known] == [one in fresh + again for one in known]
        assert (tails.fresh.first, tails.again.first) == (
            fresh[0] if fresh else None,
            again[0] if again else None,
        )
        assert (tails.fresh.last, tails.again.last) == (
            fresh[-1] if fresh else None,
            again[-1] if again else None,
        )
