"""Every policy: safe, exact in number, never looking at all leaves; and each by its character."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Hashable
from itertools import pairwise, product
from math import exp
from typing import Any

import pytest

from core.test_eviction import random_sequences
from prefixcache.core import eviction
from prefixcache.core.bulk_load import StoredRun
from prefixcache.core.cache import PrefixCache
from prefixcache.core.eviction import EvictionPolicy, Queue
from prefixcache.core.node import Node, Root, Run
from prefixcache.core.policies import POLICIES, policy_named
from prefixcache.core.policies.arc import Arc
from prefixcache.core.policies.hazard import Access, AgeGrid, Hazard, Hazards
from prefixcache.core.policies.lru_list import LruList
from prefixcache.errors import InvalidRequest
from prefixcache.types import Grant, LeaseId, Namespace, Partial, WorkerId, pack

ME, SPACE = WorkerId(1), Namespace("m")
SCRATCH = [0xFFFFFFFF]


class Tiny:
    """A cache of a few blocks of one token: a letter, or any number, is a block."""

    def __init__(self, policy: str, num_blocks: int, **options: int) -> None:
        self.num_blocks = num_blocks
        self.cache = PrefixCache(
            num_blocks + 1, 1, policy=policy, partial=Partial.OFF, ttl_s=1e9, **options
        )
        self.now = 0.0

    def serve(self, *requests: object, level: int | None = None) -> int:
        """Serve one request after the other; give how many blocks the last one found."""
        hits = 0
        for request in requests:
            tokens = self._tokens(request)[: self.num_blocks]
            lease, hits = self.open(tokens)
            if level is not None:
                self.cache.retain(ME, lease, level, ttl_s=100.0, now=self.now)
            self.cache.release(ME, lease, now=self.now)
        return hits

    def open(self, tokens: list[int], namespace: Namespace = SPACE) -> tuple[LeaseId, int]:
        self.now += 1.0
        self.cache.attach(ME, namespace, now=self.now)
        grant = self.cache.acquire(ME, namespace, pack(tokens + SCRATCH), now=self.now)
        assert isinstance(grant, Grant)
        self.cache.commit(ME, grant.lease, len(tokens), now=self.now)
        return grant.lease, grant.ledger.hit

    def holds(self, request: object) -> int:
        """Count the leading blocks that are cached."""
        return self.cache.lookup(SPACE, pack(self._tokens(request) + SCRATCH)).num_hit

    @staticmethod
    def _tokens(request: object) -> list[int]:
        if isinstance(request, str):
            return [ord(letter) for letter in request]
        assert isinstance(request, int | list)
        return [request] if isinstance(request, int) else request


every_policy = pytest.mark.parametrize("policy", POLICIES)


# ---------------------------------------------------------------------- all of them


@pytest.mark.walk
@every_policy
def test_asked_for_blocks_it_evicts_exactly_so_many(policy: str) -> None:
    rng = random.Random(policy)
    tiny = Tiny(policy, 60)
    for number, (_, tokens, _) in enumerate(random_sequences(rng, 150, 30)):
        before = tiny.cache.snapshot(now=tiny.now)
        lease, hits = tiny.open(list(tokens))
        after = tiny.cache.snapshot(now=tiny.now)
        need = len(tokens) + 1 - hits - before.free
        assert after.evicted - before.evicted == max(0, need), f"request {number}"
        tiny.cache.release(ME, lease, now=tiny.now)
        tiny.cache.check()


@every_policy
def test_what_a_lease_holds_is_never_evicted(policy: str) -> None:
    rng = random.Random(policy)
    tiny = Tiny(policy, 40)
    lease, _ = tiny.open([1, 2, 3, 4, 5])
    for _, tokens, _ in random_sequences(rng, 100, 30):
        tiny.serve(list(tokens))
        assert tiny.holds([1, 2, 3, 4, 5]) == 5
    tiny.cache.release(ME, lease, now=tiny.now)


@pytest.mark.slow
@pytest.mark.pure_core
@every_policy
def test_no_eviction_looks_at_all_leaves(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Tiny(policy, 4000)
    for number in range(4000):
        tiny.serve(number)
    looks = 0
    original = Node.is_evictable.fget
    assert original is not None

    def counting(node: Node) -> bool:
        nonlocal looks
        looks += 1
        return original(node)

    cell_of = AgeGrid._cell

    def counting_too(grid: AgeGrid, use: Access) -> int:
        nonlocal looks
        looks += 1  # it asks the same of a leaf, written out
        return cell_of(grid, use)

    monkeypatch.setattr(Node, "is_evictable", property(counting))
    monkeypatch.setattr(AgeGrid, "_cell", counting_too)
    for number in range(4000, 4100):
        tiny.serve(number)
    assert 1 <= looks / 100 < 60


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], object]], int]:
    """Count how many leaves are looked at in one step."""
    original = Node.is_evictable.fget
    assert original is not None
    num_looks = 0

    def counting(node: Node) -> bool:
        nonlocal num_looks
        num_looks += 1
        return original(node)

    def looks_of(step: Callable[[], object]) -> int:
        before = num_looks
        step()
        return num_looks - before

    monkeypatch.setattr(Node, "is_evictable", property(counting))
    monkeypatch.setattr(eviction, "_MOST_DEAD", 100)
    return looks_of


@pytest.mark.slow
@pytest.mark.pure_core
@pytest.mark.parametrize("policy", ["lru", "slru", "priority"])  # each kind of queue
def test_no_single_step_looks_at_more_than_a_few_leaves(
    policy: str, looks: Callable[[Callable[[], object]], int]
) -> None:
    """Leaves come, are used again, and are leased in any order: nothing is tidied up in one go."""
    tiny, rng = Tiny(policy, 4000), random.Random(policy)
    most = max(looks(lambda n=number: tiny.serve(n)) for number in range(4000))
    for number in range(4000, 5000):
        most = max(most, looks(lambda n=number: tiny.serve(n)))
        again = rng.randrange(number - 3000, number)
        most = max(most, looks(lambda n=again: tiny.serve(n)))
    assert most < 100
    tiny.cache.check()


@pytest.mark.slow
@pytest.mark.pure_core
@pytest.mark.parametrize("policy", ["lru", "slru", "priority"])  # each kind of queue
@pytest.mark.parametrize("first", ["oldest", "youngest"])
def test_who_needs_room_beside_thousands_of_leased_leaves_looks_at_a_few(
    policy: str, first: str, looks: Callable[[Callable[[], object]], int]
) -> None:
    """They would all go before the one that can."""
    tiny = Tiny(policy, 4000)
    for number in range(4000):
        tiny.serve(number)
    numbers = range(1900) if first == "oldest" else range(1899, -1, -1)
    held = []
    most = max(looks(lambda n=number: held.append(tiny.open([n])[0])) for number in numbers)
    most = max(most, looks(lambda: tiny.serve(9000)))
    for lease in held:
        most = max(most, looks(lambda one=lease: tiny.cache.release(ME, one, now=tiny.now)))
    assert most < 500
    tiny.cache.check()


@pytest.mark.pure_core
@pytest.mark.parametrize("policy", ["lru", "slru"])  # each kind of queue
def test_a_prefix_that_others_go_on_from_is_used_again_without_a_look_at_any_leaf(
    policy: str, looks: Callable[[Callable[[], object]], int]
) -> None:
    """It was a leaf once, and is in the queue still: with one entry, however often it is used."""
    tiny = Tiny(policy, 4000)
    for number in range(1100):
        tiny.serve(number)
    tiny.serve([5000])
    held, _ = tiny.open([5000])
    tiny.serve([5000, 5001])
    tiny.cache.release(ME, held, now=tiny.now)
    tree = tiny.cache._lessor.tree

    def use() -> None:
        match = tree.match(tiny.cache._lessor.roots[SPACE], pack([5000]))
        assert match.node.is_inner
        assert match.node.queued
        tree.unlock(tree.lock(match))

    assert sum(looks(use) for _ in range(400)) == 0


def test_a_policy_of_ones_own_is_a_plain_class_and_so_may_its_queue_be(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever the core runs as: here, who was stored last goes first, off a stack."""
    heard: list[str] = []

    class Stack(list[Node]):
        def push(self, node: Node) -> None:
            if not node.queued:
                node.queued = 1
                self.append(node)

        def pop(self) -> Node | None:  # type: ignore[override]
            while self:
                node = super().pop()
                node.queued = 0
                if node.is_evictable:
                    return node
            return None

    class Newest(EvictionPolicy):
        name = "newest"

        def queue(self) -> Queue:
            return Stack()

        def used(self, node: Node, stamp: int, top: Node) -> None:
            heard.append("used")
            if node.mark is None:
                node.mark = ("first used", stamp)

        def lost(self, node: Node, num_blocks: int) -> object:
            assert num_blocks == 1
            assert node.mark[0] == "first used"
            heard.append("lost")
            return node.mark

        def revived(self, ghost: Node) -> None:
            assert ghost.mark[0] == "first used"
            heard.append("revived")

        def forgotten(self, mark: object, num_blocks: int) -> None:
            heard.append("forgotten")

    monkeypatch.setitem(POLICIES, "newest", Newest)
    tiny = Tiny("newest", 3)
    tiny.serve("a", "b", "c", "d")
    assert [tiny.holds(one) for one in "abcd"] == [1, 1, 0, 1]
    tiny.serve("c")
    assert [tiny.holds(one) for one in "abcd"] == [1, 1, 1, 0]
    tiny.cache.check()
    assert heard.count("used") == 5
    assert heard.count("lost") == 2
    assert heard.count("revived") == 1


@pytest.mark.walk
@every_policy
def test_retired_namespaces_tails_and_forgotten_ghosts_leave_no_trace_in_the_counts(
    policy: str,
) -> None:
    rng = random.Random(policy)
    cache = PrefixCache(24, 2, policy=policy, partial=Partial.TAILS, num_ghosts=5)
    now = 0.0
    for number, (which, tokens, _) in enumerate(random_sequences(rng, 400, 30)):
        now += 1.0
        namespace = Namespace("m", tenant=str(which))
        cache.attach(ME, namespace, now=now)
        grant = cache.acquire(ME, namespace, pack(tokens), now=now)
        assert isinstance(grant, Grant)
        cache.commit(ME, grant.lease, len(tokens), now=now)
        cache.release(ME, grant.lease, now=now)
        if number % 37 == 36:
            cache.reset(namespace)
        cache.check()


COUNTED: dict[str, tuple[tuple[str, int], ...]] = {
    "arc": (("_num_once", 0),),
    "2q": (("_num_in", 0),),
    "s3fifo": (("_num_small", 0),),
    "w-tinylfu": (("_num_window", 0), ("_protected", 2)),
    "slru": (("_again", 1),),
}
"""What a policy counts, and what the marks of such blocks begin with."""


@pytest.mark.parametrize("policy", COUNTED)
@pytest.mark.parametrize("seed", range(4))
def test_what_a_policy_counts_is_what_a_walk_over_the_marks_finds(policy: str, seed: int) -> None:
    rng = random.Random(f"{policy} {seed}")
    tiny = Tiny(policy, 40)
    counting: Any = tiny.cache._lessor.tree.policy
    for _, tokens, _ in random_sequences(rng, 150, 30):
        tiny.serve(list(tokens))
        found: dict[int, int] = {}
        stack: list[Node] = list(tiny.cache._lessor.roots[SPACE].children)
        while stack:
            node = stack.pop()
            if node.mark is not None:
                found[node.mark[0]] = found.get(node.mark[0], 0) + len(node.blocks)
            stack.extend(node.children)
        for name, kind in COUNTED[policy]:
            counted = getattr(counting, name)
            if isinstance(counted, LruList):
                counted = sum(counted._counts.values())  # those that fell out keep their mark
            assert counted == found.get(kind, 0), name


@every_policy
def test_what_was_restored_is_evicted_in_its_order_like_what_was_stored(policy: str) -> None:
    cache = PrefixCache(7, 1, policy=policy, partial=Partial.OFF)
    runs = [
        StoredRun(SPACE, -1, pack([1, 2]), array("i", [0, 1])),
        StoredRun(SPACE, -1, pack([5]), array("i", [2])),
        StoredRun(SPACE, 1, pack([3]), array("i", [3])),  # goes on from the first: younger than 5
        StoredRun(SPACE, -1, pack([6]), array("i", [4])),
    ]
    assert cache.restore(runs, array("i"), WorkerId(-3)) == 5
    cache.attach(ME, SPACE, now=0.0)
    grant = cache.acquire(ME, SPACE, pack([8, 9, 10]), now=0.0)
    assert isinstance(grant, Grant)
    left = [cache.lookup(SPACE, pack([*one, 99])).num_hit for one in ([1, 2, 3], [5], [6])]
    assert sum(left) == 4
    if policy == "lru":
        assert left == [3, 0, 1]
    cache.release(ME, grant.lease, now=0.0)
    assert isinstance(cache.acquire(ME, SPACE, pack([20] * 7), now=0.0), Grant)
    cache.check()


@pytest.mark.parametrize("later", [False, True])
def test_ends_of_levels_and_ghosts_are_kept_for_what_is_there_alone(later: bool) -> None:
    tiny = Tiny("priority", 3)
    for number in range(1500):
        tiny.serve("ab"[number % 2] if later else number, level=9)
    policy: Any = tiny.cache._lessor.tree.policy
    assert len(policy._lanes._ends) <= 1024 + 1
    assert len(tiny.cache._lessor.tree.ghosts._fifo) <= 1024 + 1


def test_a_request_that_came_again_after_it_was_evicted_leaves_nothing_behind() -> None:
    tiny = Tiny("lru", 2)
    for number in range(3000):
        tiny.serve([number % 3])
    assert len(tiny.cache._lessor.tree.ghosts._fifo) <= 1024 + 1


def test_an_unknown_policy_is_refused_with_the_list_of_those_there_are() -> None:
    with pytest.raises(InvalidRequest, match="s3fifo, sieve, slru"):
        policy_named("no such policy")


# ---------------------------------------------------------------------- block by block


class LeafOrder:
    """A block-by-block cache that evicts the leaf with the smallest key, one at a time."""

    def __init__(self, num_blocks: int, key: Callable[[list[int]], object]) -> None:
        self.num_blocks = num_blocks
        self.key = key
        self.stats: dict[tuple[Hashable, tuple[int, ...]], list[int]] = {}
        self.requests = 0

    def serve(self, namespace: Hashable, tokens: tuple[int, ...]) -> int:
        self.requests += 1
        path = [(namespace, tokens[: end + 1]) for end in range(len(tokens))]
        hits = next((i for i, one in enumerate(path) if one not in self.stats), len(path))
        short = len(self.stats) + len(path) - hits - self.num_blocks
        for _ in range(max(0, short)):
            parents = {(space, block[:-1]) for space, block in self.stats}
            leaves = [one for one in self.stats if one not in parents and one not in path]
            del self.stats[min(leaves, key=lambda one: self.key(self.stats[one]))]
        for block in path:
            stat = self.stats.setdefault(block, [0, 0, self.requests])
            stat[0] += 1
            stat[1] = self.requests
        return hits


ORDERS: dict[str, Callable[[list[int]], object]] = {
    "lru": lambda stat: stat[1],
    "lfu": lambda stat: (stat[0], stat[1]),
    "fifo": lambda stat: stat[2],
}


@pytest.mark.walk
@pytest.mark.parametrize("policy", ORDERS)
@pytest.mark.parametrize("capacity", [2, 5, 13, 40])
def test_runs_are_evicted_as_their_blocks_one_by_one_would_be(policy: str, capacity: int) -> None:
    for seed in range(12):
        rng = random.Random(f"{seed} {capacity}")
        tiny = Tiny(policy, capacity)
        naive = LeafOrder(capacity, ORDERS[policy])
        for number, (_, tokens, _) in enumerate(random_sequences(rng, 80, 2 * capacity)):
            cut = tokens[:capacity]
            expected = naive.serve(SPACE, cut)
            assert tiny.serve(list(cut)) == expected, f"request {number} of seed {seed}"


# ---------------------------------------------------------------------- one by one


def test_lru_keeps_what_was_used_last() -> None:
    tiny = Tiny("lru", 2)
    tiny.serve("a", "b", "a", "c")
    assert (tiny.holds("a"), tiny.holds("b")) == (1, 0)


def test_fifo_does_not_care_for_uses() -> None:
    tiny = Tiny("fifo", 2)
    tiny.serve("a", "b", "a", "c")
    assert (tiny.holds("a"), tiny.holds("b")) == (0, 1)


def test_lfu_keeps_what_was_used_often_and_tells_blocks_of_one_run_apart() -> None:
    tiny = Tiny("lfu", 4)
    tiny.serve("abc", "ab", "x", "x")  # a and b: 2, c: 1, x: 2
    tiny.serve("y")
    assert (tiny.holds("abc"), tiny.holds("x")) == (2, 1)
    tiny.serve("z")  # of equals, y is older than nothing else used once
    assert (tiny.holds("abc"), tiny.holds("y"), tiny.holds("z")) == (2, 0, 1)


def test_slru_protects_what_was_used_twice_from_a_scan_but_not_for_ever() -> None:
    tiny = Tiny("slru", 5)  # 4 protected
    tiny.serve("a", "a", *"bcdefgh")
    assert tiny.holds("a") == 1
    tiny.serve(*"iijjkkll")  # pushes a out of the protected segment
    tiny.serve(*"mnopq")
    assert tiny.holds("a") == 0


def test_2q_takes_into_the_main_queue_only_what_returns_after_the_fifo() -> None:
    tiny = Tiny("2q", 8)
    tiny.serve("a", "a", *"bcdefghi")  # a second use in A1in does not count
    assert tiny.holds("a") == 0
    tiny.serve("a")  # remembered in A1out
    tiny.serve(*"jklmnopqrstu")
    assert tiny.holds("a") == 1


def test_arc_grows_the_list_whose_ghosts_return() -> None:
    tiny = Tiny("arc", 4)
    policy = tiny.cache._lessor.tree.policy
    assert isinstance(policy, Arc)
    tiny.serve("a", "a", *"bcdefg")
    assert tiny.holds("a") == 1  # T2 outlives the scan of T1
    before = policy._p
    tiny.serve("d")  # evicted from T1 not long ago
    assert policy._p > before
    tiny.serve("h")
    assert tiny.holds("d") == 1  # it is in T2 now


@pytest.mark.parametrize(("ghosts", "step"), [((1, 3), 3), ((2, 3), 1.5), ((3, 1), 1), ((0, 3), 3)])
def test_arc_grows_it_by_how_many_ghosts_the_other_list_has_for_each_of_its_own(
    ghosts: tuple[int, int], step: float
) -> None:
    policy = Arc(100)
    policy._ghosts[:] = ghosts
    leaf = Run(pack([1]), array("i", [0]), Root(SPACE), 0)
    policy._return(leaf, 0, 0, 1)
    assert policy._p == step


@pytest.mark.parametrize(("policy", "share"), [("s3fifo", 10), ("w-tinylfu", 100)])
@pytest.mark.parametrize("num_blocks", [1, 5, 9, 10, 19, 20, 100, 300, 1000])
def test_the_share_of_what_is_new_is_rounded_down_and_at_least_a_block(
    policy: str, share: int, num_blocks: int
) -> None:
    made: Any = policy_named(policy, num_blocks)
    limit = made._limit if policy == "s3fifo" else made._window_limit
    assert limit == (1 if num_blocks < share else num_blocks // share)


def test_s3fifo_lets_what_was_used_once_go_early() -> None:
    tiny = Tiny("s3fifo", 10)
    tiny.serve(*"aaabbb")
    tiny.serve(*range(40))
    assert (tiny.holds("a"), tiny.holds("b")) == (1, 1)
    tiny.serve(39 - 12)  # a ghost: straight into the main queue
    tiny.serve(*range(100, 120))
    assert tiny.holds(39 - 12) == 1


def test_sieve_leaves_what_was_used_in_place_and_follows_what_is_new() -> None:
    tiny = Tiny("sieve", 3)
    tiny.serve(*"abc", "a", "d")  # the hand passes a, evicts b
    assert [tiny.holds(one) for one in "abcd"] == [1, 0, 1, 1]
    tiny.serve("e")  # the hand goes on from there: c
    assert [tiny.holds(one) for one in "acde"] == [1, 0, 1, 1]
    tiny.serve(*"fghi")  # it follows what is new, and never came round to a again
    assert [tiny.holds(one) for one in "aghi"] == [1, 0, 1, 1]


def test_w_tinylfu_lets_nothing_in_that_is_used_less_than_what_would_go() -> None:
    tiny = Tiny("w-tinylfu", 20)
    popular = list("abcdefghij")
    tiny.serve(*popular, *popular, *popular)
    tiny.serve(*range(200))
    assert sum(tiny.holds(one) for one in popular) >= 9


def test_cost_aware_keeps_the_deep_end_that_is_dearer_to_compute_again() -> None:
    long = [1] * 6
    for policy, kept in (("lru", 4), ("cost-aware", 6)):
        tiny = Tiny(policy, 8)
        tiny.serve(long, "a", "b")
        tiny.serve("c", "d") if policy == "lru" else tiny.serve("c")
        assert tiny.holds(long) == kept, policy


def test_priority_evicts_the_lowest_level_first_until_its_time_is_over() -> None:
    tiny = Tiny("priority", 3)
    tiny.serve("a", level=9)
    tiny.serve("b", level=0)
    tiny.serve("c", "d")
    assert [tiny.holds(one) for one in "abcd"] == [1, 0, 1, 1]
    tiny.serve("e", "f")
    assert tiny.holds("a") == 1
    tiny.now += 200.0  # the level of a is over: it is the oldest of all
    tiny.serve("g")
    assert tiny.holds("a") == 0


def test_priority_is_a_wish_and_never_wedges_the_pool() -> None:
    tiny = Tiny("priority", 3)
    tiny.serve(*"abc", level=9)
    tiny.serve("xyz")
    assert tiny.holds("xyz") == 3


def test_priority_of_a_namespace_is_renewed_by_every_use() -> None:
    tiny = Tiny("priority", 3)
    tiny.cache.rank(Namespace("m", tenant="gold"), 8, ttl_s=50.0)
    lease, _ = tiny.open([7], Namespace("m", tenant="gold"))
    tiny.cache.release(ME, lease, now=tiny.now)
    tiny.serve(*"abcdef")
    gold = Namespace("m", tenant="gold")
    assert tiny.cache.lookup(gold, pack([7, *SCRATCH])).num_hit == 1
    tiny.now += 60.0
    tiny.serve(*"ghij")
    assert tiny.cache.lookup(gold, pack([7, *SCRATCH])).num_hit == 0


def test_levels_are_refused_where_the_policy_has_none_or_they_are_out_of_range() -> None:
    with pytest.raises(InvalidRequest, match="has no levels"):
        Tiny("lru", 3).cache.rank(SPACE, 5)
    with pytest.raises(InvalidRequest, match="level 10"):
        Tiny("priority", 3).cache.rank(SPACE, 10)


# ---------------------------------------------------------------------- hazard


def pausing_chats(rng: random.Random, count: int) -> list[list[int]]:
    """Chats of two turns with a pause longer than an LRU keeps them, among prompts seen once."""
    due: dict[int, list[int]] = {}
    requests: list[list[int]] = []
    fresh = 0
    for step in range(count):
        if step in due:
            requests.append([*due[step], 10**6 + step, 10**6 + count + step])
            continue
        fresh += 10
        prompt = list(range(fresh, fresh + 8))
        if rng.random() < 0.3:
            due[step + rng.randint(9, 12)] = prompt
            prompt = [*prompt[:2], *prompt[2:]]
            requests.append(prompt)
        else:
            requests.append(prompt[:3])
    return requests


def hits_of(policy: str, requests: list[list[int]], num_blocks: int) -> int:
    tiny = Tiny(policy, num_blocks)
    return sum(tiny.serve(request) for request in requests)


@pytest.mark.slow
def test_hazard_learns_to_wait_for_what_returns_after_a_pause() -> None:
    requests = pausing_chats(random.Random(1), 4000)
    lru, hazard = (hits_of(policy, requests, 40) for policy in ("lru", "hazard"))
    assert hazard > 2 * max(1, lru)


@pytest.mark.parametrize(
    ("capacity", "seeds"),
    [(3, 1), (8, 2), *[pytest.param(size, 10, marks=pytest.mark.slow) for size in (3, 8, 20, 50)]],
)
def test_the_shadow_of_hazard_is_exactly_an_lru(capacity: int, seeds: int) -> None:
    for seed in range(seeds):
        rng = random.Random(f"{seed} {capacity}")
        hazard, lru = Tiny("hazard", capacity), Tiny("lru", capacity)
        tree = hazard.cache._lessor.tree
        policy = tree.policy
        assert isinstance(policy, Hazard)
        policy.shadow.num_blocks = capacity  # the pool has a block more, for what is computed
        for number, (_, tokens, _) in enumerate(random_sequences(rng, 120, capacity)):
            cut = list(tokens[:capacity])
            root = hazard.cache._lessor.roots.get(SPACE)
            found = 0
            if root is not None:
                asked = pack(cut + SCRATCH)
                match = tree.match(root, asked, 4 * len(cut))
                found = policy.shadow._found(match, asked, 4)
            assert found == lru.serve(cut), f"request {number} of seed {seed}"
            hazard.serve(cut)


@pytest.mark.slow
def test_hazard_falls_back_to_lru_where_its_guess_is_worse() -> None:
    rng = random.Random(3)
    recent: list[list[int]] = []
    requests = []
    for step in range(3000):  # the older, the less likely: nothing beats LRU here
        if recent and rng.random() < 0.7:
            prompt = recent.pop(-min(len(recent), 1 + int(rng.expovariate(0.4))))
        else:
            prompt = list(range(10 * step, 10 * step + 4))
        recent.append(prompt)
        requests.append(prompt)
    total = sum(map(len, requests))
    lru, hazard = (hits_of(policy, requests, 30) for policy in ("lru", "hazard"))
    assert hazard > lru - 0.01 * total


# ---------------------------------------------------------------------- numbers of the papers


def test_arc_takes_back_at_once_even_the_first_block_that_it_ever_evicted() -> None:
    tiny = Tiny("arc", 4)
    tiny.serve(*"abcde")
    assert tiny.holds("a") == 0
    tiny.serve("a")  # its second use: in T2 now
    tiny.serve(*"fghi")
    assert tiny.holds("a") == 1


@pytest.mark.parametrize("policy", POLICIES)
def test_uses_are_counted_one_by_one_or_not_at_all(policy: str) -> None:
    tiny = Tiny(policy, 8)
    for number in range(1, 4):
        tiny.serve("ab")
        root = tiny.cache._lessor.roots[SPACE]
        [run] = root.children
        assert tiny.cache._lessor.tree.policy.uses(run) == (number if policy == "lfu" else None)


def test_attention_costs_as_much_as_the_linear_layers_at_32768_tokens() -> None:
    policy = policy_named("cost-aware")
    leaf = Run(bytes(4 * 32_768), array("i", [0]), Root(SPACE), 0)
    assert policy.key(leaf) == 0.0  # nobody used it: restored
    leaf.mark = (1, 0.0)
    assert policy.key(leaf) == 2.0
    leaf.mark = (3, 5.0)
    assert policy.key(leaf) == 5.0 + 3 * 2.0


@every_policy
def test_a_policy_that_is_told_of_no_pool_is_that_of_one_block(policy: str) -> None:
    assert POLICIES[policy]().num_blocks == policy_named(policy).num_blocks == 1


@pytest.mark.parametrize(("later", "kept"), [(99.5, 1), (100.0, 0), (100.5, 0)])
def test_a_level_ends_at_its_time_and_not_a_moment_later(later: float, kept: int) -> None:
    tiny = Tiny("priority", 3)
    tiny.serve("a", level=9)
    until = tiny.now + 100.0
    tiny.serve("b", "c")
    tiny.now = tiny.now + later - 100.0 + (until - tiny.now) - 1.0
    tiny.serve("d")
    assert tiny.holds("a") == kept


def test_the_last_leaf_there_is_can_be_had_at_the_very_moment_its_level_ends() -> None:
    tiny = Tiny("priority", 1)
    tiny.serve("a", level=9)
    tiny.now += 99.0
    assert tiny.serve("x") == 0
    assert (tiny.holds("a"), tiny.holds("x")) == (0, 1)


@pytest.mark.parametrize("capacity", [2, 4, 7])
def test_sieve_is_a_list_with_a_hand(capacity: int) -> None:
    """Held against the list itself, block by block."""
    draw, tiny = random.Random(capacity), Tiny("sieve", capacity)
    there: list[list[int | bool]] = []  # [what, used since the hand came by], oldest first
    hand = 0
    for number in range(400):
        what = min(draw.randrange(3 * capacity), draw.randrange(3 * capacity))
        found = [one for one in there if one[0] == what]
        assert tiny.serve(what) == len(found), f"request {number}"
        if found:
            found[0][1] = True
            continue
        if len(there) == capacity:
            hand %= capacity
            while there[hand][1]:
                there[hand][1] = False
                hand = (hand + 1) % capacity
            del there[hand]
        there.append([what, False])


@every_policy
def test_what_is_pinned_after_it_was_queued_can_still_be_had(policy: str) -> None:
    tiny = Tiny(policy, 8, max_pinned=9)
    for letter in "abcdefgh":
        tiny.serve(letter)
    for number in range(3):
        pinned = [letter for letter in "abcdefgh" if tiny.holds(letter)]
        for letter in pinned[::2]:
            tiny.cache.pin(SPACE, pack([ord(letter)]), ttl_s=1e6, now=tiny.now)
        tiny.serve([100 * number + one for one in range(8)])  # all that there is
        tiny.cache.check()
        assert tiny.cache.snapshot(now=tiny.now).pinned == 0
        tiny.serve(*"abcdefgh")


@pytest.mark.parametrize("policy", [one for one in POLICIES if one != "hazard"])
def test_the_queue_knows_how_many_leaves_wait_in_it_and_gives_each_once(policy: str) -> None:
    tiny = Tiny(policy, 100)
    tiny.serve(*range(40))
    queue: Any = tiny.cache._lessor.tree.queue
    queue = getattr(queue, "_inner", queue)
    before, given = len(queue), set()
    while (node := queue.pop()) is not None:
        given.add(node.tokens)
        assert node.queued == 0
        assert len(queue) <= before  # a leaf that is spared waits on
        before = len(queue)
    assert given == {pack([number]) for number in range(40)}
    assert len(queue) == 0


@pytest.mark.parametrize("seed", range(3))
def test_hazard_estimates_and_weighs_as_its_formulas_say(seed: int) -> None:
    """Kinds lean on their group by 12 requests, that on all by 8, those on 0.3 / age."""
    draw, table = random.Random(seed), Hazards(2, 3, num_blocks=100)
    edges = [0.0, *(2.0 * 1.35**age for age in range(24))]
    assert table.edges == pytest.approx(edges)
    widths = [after - before for before, after in pairwise(edges)]
    middles = [(after + before) / 2 for before, after in pairwise(edges)]
    for kind, age in product(range(6), range(24)):
        table.exposed[kind][age] = exposed = draw.choice([0.0, draw.uniform(0, 500)])
        table.returned[kind][age] = exposed * draw.choice([0.0, 0.5, 1.0])
    for run in (0.5, 1.0, 7.0):
        found, worth, size = table.estimate(run), table.worth(run), max(1.0, run)
        hazard = [[0.0] * 24 for _ in range(6)]
        for age in range(24):
            prior = 1 - exp(-0.3 * widths[age] / (middles[age] + edges[1]))
            returned, exposed = (
                [row[age] for row in each] for each in (table.returned, table.exposed)
            )
            shared = (sum(returned) + 8 * size * prior) / (sum(exposed) + 8 * size)
            if age == 23:
                shared = min(shared, 0.02)
            for group in (range(3), range(3, 6)):
                near = (sum(returned[kind] for kind in group) + 12 * size * shared) / (
                    sum(exposed[kind] for kind in group) + 12 * size
                )
                for kind in group:
                    own = (returned[kind] + 12 * size * near) / (exposed[kind] + 12 * size)
                    hazard[kind][age] = min(0.98, own)
        for kind in range(6):
            assert found[kind].tolist() == pytest.approx(hazard[kind])
            for age in range(24):
                alive, hits, held, best = 1.0, 0.0, 0.0, 0.0
                for later in range(age, 24):
                    chance = hazard[kind][later]
                    hits += alive * chance
                    held += alive * widths[later] * (1 - chance / 2)
                    alive *= 1 - chance
                    best = max(best, hits / held)
                assert worth[kind][age] == pytest.approx(best, rel=1e-6)
