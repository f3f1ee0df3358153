"""The table of leases: what it counts, whose they are, and that nothing stays of what has ended."""

from __future__ import annotations

from random import Random

import pytest

from prefixcache.core.account import Account
from prefixcache.core.lease import Lease, LeaseTable, Worker
from prefixcache.core.node import Root
from prefixcache.errors import PoolExhausted, QuotaExceeded
from prefixcache.types import Namespace, WorkerId

TENANTS = ("a", "b", "c")


def root_for(tenant: str) -> Root:
    root = Root(Namespace("m", tenant=tenant))
    root.account = Account(root.namespace, Account(tenant, None))
    return root


class Table:
    """A table, one worker, and a root of each tenant."""

    def __init__(self, max_leases: int = 1000) -> None:
        self.leases = LeaseTable(10.0, max_leases)
        self.member = self.leases.workers[WorkerId(1)] = Worker(WorkerId(1), "w")
        self.roots = {tenant: root_for(tenant) for tenant in TENANTS}

    def open(self, tenant: str, now: float = 0.0) -> Lease:
        root = self.roots[tenant]
        return self.leases.open(self.member, root, root, now)


def test_those_opened_are_counted_since_the_start_and_those_that_live_now() -> None:
    table = Table()
    leases = [table.open("a") for _ in range(3)]
    assert (table.leases.num_opened, table.leases.count) == (3, 3)
    table.leases.close(leases[0], None, 0)
    assert (table.leases.num_opened, table.leases.count) == (3, 2)
    table.open("a")
    assert (table.leases.num_opened, table.leases.count) == (4, 3)


@pytest.mark.parametrize("seed", range(5))
def test_the_leases_of_each_tenant_are_those_opened_and_not_closed_oldest_first(seed: int) -> None:
    draw, table = Random(seed), Table()
    living: list[tuple[str, Lease]] = []
    for _ in range(200):
        if living and draw.random() < 0.5:
            table.leases.close(living.pop(draw.randrange(len(living)))[1], None, 0)
        else:
            tenant = draw.choice(TENANTS)
            living.append((tenant, table.open(tenant)))
        for tenant in TENANTS:
            mine = [lease for owner, lease in living if owner == tenant]
            assert list(table.leases.of_tenant(tenant).values()) == mine
            assert list(table.leases.of_tenant(tenant)) == [lease.serial for lease in mine]
            assert table.roots[tenant].num_leases == len(mine)
        assert table.leases.all() == [lease for _, lease in living]
        assert table.leases.count == len(table.member.leases) == len(living)


def test_of_a_tenant_whose_last_lease_has_ended_nothing_is_kept() -> None:
    table = Table()
    for tenant in TENANTS:
        first, second = table.open(tenant), table.open(tenant)
        table.leases.close(first, None, 0)
        assert list(table.leases._of_tenants) == [tenant]
        table.leases.close(second, None, 0)
        assert not table.leases._of_tenants


def test_exactly_so_many_leases_may_be_out_and_not_one_more() -> None:
    table = Table(max_leases=4)
    for _ in range(3):
        table.open("a")
    table.leases.admit("a")
    with pytest.raises(PoolExhausted, match=r"3 leases are out and 2 more asked for.* allows 4"):
        table.leases.admit("a", 2)
    table.open("a")
    with pytest.raises(PoolExhausted):
        table.leases.admit("a")


def test_a_part_is_kept_for_each_tenant_and_what_is_out_already_counts() -> None:
    table = Table(max_leases=8)
    out = [table.open("a") for _ in range(4)]
    table.leases.set_tenants(["a", "b"])
    with pytest.raises(QuotaExceeded):
        table.leases.admit("a", 4)
    table.leases.admit("b", 4)
    for lease in out:
        table.leases.close(lease, None, 0)
    table.leases.admit("a", 4)
    table.leases.set_tenants(["a"])
    table.leases.admit("a", 8)


def test_a_lease_ends_after_its_deadline_and_not_at_it_unless_its_worker_renews() -> None:
    table = Table()
    lease, renewed = table.open("a"), table.open("b", now=1.0)
    assert table.leases.next_deadline() == lease.deadline == 10.0
    assert table.leases.due(10.0, most=10) == []
    assert table.leases.due(10.5, most=0) == []
    assert table.leases.due(10.5, most=1) == [lease]
    table.leases.close(lease, 10.0, 2)
    assert not table.leases.lives(lease)
    assert table.member.expired[lease.id] == (10.0, 2)
    table.member.renewed_until = 20.0
    assert table.leases.due(12.0, most=10) == []
    assert table.leases.ends_at(renewed) == table.leases.next_deadline() == 20.0
    assert table.leases.lives(renewed)


def test_of_a_worker_so_many_ends_are_remembered_and_the_oldest_go_first() -> None:
    table = Table()
    leases = [table.open("a") for _ in range(258)]
    for number, lease in enumerate(leases, 1):
        table.leases.close(lease, 10.0, 0)
        assert len(table.member.expired) == min(number, 256)
    assert list(table.member.expired) == [lease.id for lease in leases[2:]]
