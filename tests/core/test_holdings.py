"""Holdings: whose blocks leave a tier first, by examples, and beside a naive list of all."""

from __future__ import annotations

from array import array
from dataclasses import dataclass

from hypothesis import given, settings
from hypothesis import strategies as st

from core.test_tiers import Shelf
from prefixcache.core.holdings import Holdings
from prefixcache.core.node import Node, Root, Run
from prefixcache.core.tiers import Tier
from prefixcache.types import Grant, HoldingInfo, Namespace, WorkerId, pack

ME = WorkerId(1)
TENANTS = ("a", "b", "c")


def buried(tokens: bytes, root: Root, number: int) -> Node:
    ghost = Run(tokens, array("i"), root, 0)
    ghost.burial = number
    return ghost


class Tenants(Shelf):
    """A pool of eight blocks of two tokens, and tenants of whom each has a namespace."""

    def __init__(self, *known: str, host: int = 8, disk: int = 0, host_ahead: int = 0) -> None:
        super().__init__(host=host, disk=disk, host_ahead=host_ahead, piece=1)
        self.spaces = {name: Namespace("m", tenant=name) for name in (*TENANTS, "stranger")}
        for space in self.spaces.values():
            self.cache.attach(ME, space, now=0.0)
        self.cache.set_tenants(known)

    def give(self, tenant: str, *firsts: int) -> None:
        """Have some blocks of a tenant cached, each of them for itself, and what is older sunk."""
        for first in firsts:
            self.now += 1.0
            prompt = pack([first, first])
            grant = self.cache.acquire(ME, self.spaces[tenant], prompt, now=self.now)
            assert isinstance(grant, Grant)
            self.cache.commit(ME, grant.lease, 2, now=self.now)
            self.cache.release(ME, grant.lease, now=self.now)
            self.carry()

    def lie_below(self, tenant: str, *firsts: int) -> list[int]:
        """Give those of some blocks that lie below the pool."""
        space, now = self.spaces[tenant], self.now
        told = {
            first: self.cache.explain(space, pack([first, first, 9]), now=now) for first in firsts
        }
        return [first for first, one in told.items() if one.num_below]

    def held(self, tenant: str) -> tuple[int, int]:
        """Give how many blocks a tenant has below the pool, and how many of them in memory."""
        hauls = self.cache._lessor.hauls
        assert hauls is not None
        return hauls.tier.holdings.num_blocks(tenant), hauls.tier.num_host_of(tenant)


def test_who_has_more_than_its_part_pushes_out_its_own_and_nobody_elses() -> None:
    tenants = Tenants("a", "b", host=8)  # two of eight places are kept for each
    tenants.give("b", 1, 2)
    tenants.give("a", *range(10, 40))
    assert tenants.held("b") == (2, 2)
    assert tenants.lie_below("b", 1, 2) == [1, 2]
    assert tenants.held("a") == (6, 6)


def test_without_identities_the_oldest_goes_whoevers_it_is() -> None:
    tenants = Tenants(host=8)
    tenants.give("b", 1, 2)
    tenants.give("a", *range(10, 40))
    assert tenants.held("b") == (0, 0)


def test_what_one_does_not_use_others_may_until_it_does() -> None:
    tenants = Tenants("a", "b", host=8)
    tenants.give("a", *range(10, 30))
    assert tenants.held("a") == (8, 8)
    tenants.give("b", *range(1, 9))
    tenants.give("a", *range(40, 46))  # b's go down
    assert tenants.held("b")[0] >= 2
    tenants.give("a", *range(50, 80))
    assert tenants.held("b") == (2, 2)


def test_as_large_a_part_is_kept_below_as_is_guaranteed_of_the_pool() -> None:
    tenants = Tenants(host=8)
    tenants.cache.set_quota("b", max_held=None, guaranteed=4, now=0.0)  # half of it
    tenants.give("b", *range(1, 10))
    tenants.give("a", *range(10, 40))
    tenants.give("c", *range(50, 80))
    assert tenants.held("b") == (4, 4)
    tenants.cache.set_quota("b", max_held=None, guaranteed=0, now=0.0)
    tenants.give("a", *range(80, 110))
    assert tenants.held("b")[0] == 0


def test_what_is_guaranteed_comes_off_what_is_kept_for_all() -> None:
    tier = Tier(100, 8)
    tier.set_guaranteed({"a": 5}, 10)
    tier.set_tenants(["a", "b"])
    assert [tier.holdings.kept(name) for name in ("a", "b", "stranger")] == [62, 12, 0]
    tier.set_tenants(["b"])
    assert [tier.holdings.kept(name) for name in ("a", "b")] == [50, 0]


def test_memory_has_shares_of_its_own_and_who_has_more_goes_on_to_disk() -> None:
    tenants = Tenants("a", "b", host=10, disk=20, host_ahead=2)
    tenants.give("b", 1, 2)  # as many as are kept in memory
    tenants.give("a", *range(10, 40))
    assert tenants.held("b") == (2, 2)
    assert tenants.held("a")[0] > tenants.held("a")[1] > 0


def test_where_nothing_may_be_written_to_disk_memory_is_made_free_by_who_has_most_of_it() -> None:
    tenants = Tenants("a", "b", host=10, disk=20, host_ahead=2)
    tenants.give("b", 1, 2)
    tenants.cache.hold_disk(until=1e9)
    tenants.give("a", *range(10, 40))
    assert tenants.held("b") == (2, 2)
    assert tenants.lie_below("b", 1, 2) == [1, 2]


def test_a_tenant_is_told_what_it_has_in_each_tier_and_nothing_of_others() -> None:
    tenants = Tenants("a", "b", host=10, disk=20, host_ahead=2)
    tenants.give("b", 1, 2)
    tenants.give("a", *range(10, 40))
    a, b = HoldingInfo("a", 6, 2, 18, 7), HoldingInfo("b", 2, 2, 0, 7)
    assert {one.tenant: one for one in tenants.cache.holdings()} == {"a": a, "b": b}
    assert set(tenants.cache.snapshot(now=tenants.now).holdings) == {a, b}
    assert tenants.cache.snapshot(now=tenants.now, tenant="b").holdings == (b,)
    assert tenants.cache.snapshot(now=tenants.now, tenant="c").holdings == ()
    told = tenants.cache.explain(tenants.spaces["b"], pack([1, 1, 9]), now=tenants.now)
    assert told.holding == b
    nobody = Namespace("m", tenant="new")
    told = tenants.cache.explain(nobody, pack([1, 1, 9]), now=tenants.now)
    assert told.holding == HoldingInfo("new", 0, 0, 0, 0)


def test_with_one_tenant_nothing_depends_on_what_is_kept_for_it() -> None:
    told = []
    for known in ((), ("a", "b")):
        tenants = Tenants(*known, host=10, disk=8, host_ahead=2)
        if known:
            tenants.cache.set_quota("a", max_held=None, guaranteed=3, now=0.0)
        tenants.give("a", *range(10, 60))
        told.append((tenants.held("a"), tenants.lie_below("a", *range(10, 60))))
    assert told[0] == told[1]


# ---------------------------------------------------------------------------- beside a naive list


@dataclass(eq=False)
class Block:
    """A block that lies below, and how long."""

    tenant: str
    age: tuple[int, int]
    """When it was buried, and from the end of what was buried with it."""


class Naive:
    """All blocks in a list; each of those that must go is looked for from the first on."""

    def __init__(self) -> None:
        self.blocks: list[Block] = []
        self.kept: dict[str, int] = {}

    def held(self, tenant: str) -> int:
        return sum(one.tenant == tenant for one in self.blocks)

    def give_up(self) -> None:
        above = [one for one in self.blocks if self.held(one.tenant) > self.kept.get(one.tenant, 0)]
        self.blocks.remove(min(above or self.blocks, key=lambda one: one.age))


STEPS = st.one_of(
    st.tuples(st.just("bury"), st.sampled_from(TENANTS), st.integers(1, 5)),
    st.tuples(st.just("leave"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("known"), st.sets(st.sampled_from(TENANTS)), st.just(0)),
    st.tuples(st.just("share"), st.sampled_from(TENANTS), st.integers(0, 4)),
)


@settings(max_examples=300, deadline=None)
@given(st.integers(4, 16), st.lists(STEPS, max_size=60))
def test_who_goes_first_is_who_a_naive_list_says(num_slots: int, steps: list) -> None:  # type: ignore[type-arg]
    tier, naive = Tier(num_slots, 4), Naive()
    roots = {name: Root(Namespace("m", tenant=name)) for name in TENANTS}
    ghosts: list[Node] = []
    shares: dict[str, int] = {}
    known: set[str] = set()
    for serial, (what, which, count) in enumerate(steps, 1):
        if what == "bury":
            count = min(count, num_slots)
            while num_slots - len(naive.blocks) < count:
                naive.give_up()
            naive.blocks += [Block(which, (serial, -at)) for at in range(count)]
            places = tier.take(count)
            assert len(places) == count
            ghost = buried(bytes(4 * count), roots[which], serial)
            tier.copy(ghost, array("i", range(count)), places)
            tier.enter(ghost)
            tier.written(places[:], count)
            ghosts.append(ghost)
        elif what == "leave" and ghosts:
            gone = ghosts.pop(which % len(ghosts))
            tier.leave(gone)
            naive.blocks = [one for one in naive.blocks if one.age[0] != gone.burial]
        elif what == "known":
            known = which
            tier.set_tenants(known)
        elif what == "share" and sum(shares.values()) - shares.get(which, 0) + count <= 8:
            shares[which] = count
            tier.set_guaranteed(shares, 8)
        naive.kept = {name: part * num_slots // 8 for name, part in shares.items()}
        if len(known) > 1:
            each = (num_slots - sum(naive.kept.values())) // (2 * len(known))
            for name in known:
                naive.kept[name] = naive.kept.get(name, 0) + each
        ghosts = [one for one in ghosts if one.places]
        there = [(one.root.namespace.tenant, one.burial, len(one.places or ())) for one in ghosts]
        told = [
            (one.tenant, one.age[0], sum(two.age[0] == one.age[0] for two in naive.blocks))
            for one in naive.blocks
            if one.age[1] == 0
        ]
        assert there == sorted(told, key=lambda one: one[1])
        for name in TENANTS:
            assert tier.holdings.num_blocks(name) == tier.num_host_of(name) == naive.held(name)
        tier.check(ghosts, array("i"), array("i"))


def test_a_line_does_not_grow_with_all_who_ever_had_something() -> None:
    holdings = Holdings()
    for serial in range(5_000):
        ghost = buried(b"", Root(Namespace("m", tenant=str(serial))), serial)
        holdings.add(str(serial), 1)
        holdings.put(ghost)
        holdings.remove(str(serial), serial)
        holdings.add(str(serial), -1)
        assert len(holdings._all) <= 70 >= len(holdings._above)
    assert holdings.counts() == {}
    assert holdings.next() is None


def test_who_is_passed_over_stands_where_it_stood_afterwards() -> None:
    holdings = Holdings()
    for serial, name in enumerate(TENANTS):
        holdings.add(name, 1)
        holdings.put(buried(b"", Root(Namespace("m", tenant=name)), serial))
    holdings.keep({"a": 1})
    order = []
    while (one := holdings.next()) is not None:
        order.append(one.tenant)
        holdings.pass_over(one)
    assert order == ["b", "c", "a"]
    holdings.recall()
    holdings.check()
    first = holdings.next()
    assert first is not None
    assert first.tenant == "b"


def test_a_ghost_that_left_as_the_only_one_may_come_back() -> None:
    holdings = Holdings()
    ghost = buried(b"", Root(Namespace("m", tenant="a")), 5)
    for _ in range(3):
        holdings.add("a", 1)
        holdings.put(ghost)
        holdings.check()
        holdings.remove("a", 5)
        holdings.add("a", -1)
    holdings.add("a", 1)
    holdings.put(ghost)
    first = holdings.next()
    assert first is not None
    assert first.ghosts == {5: ghost}
