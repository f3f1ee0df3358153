"""Invariants: the walk that finds a wrong count, lock or owner, and draws the trees."""

from __future__ import annotations

from collections import Counter

from prefixcache.core.account import Account
from prefixcache.core.introspect import draw
from prefixcache.core.lease import Lease, LeaseTable
from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Node
from prefixcache.core.quota import Quotas


def check(lessor: Lessor) -> None:
    """Walk everything and assert that every invariant holds; a failure prints the trees."""
    blocks = lessor.blocks
    tree = blocks.tree
    roots = list(lessor.roots.values())
    try:
        locks: Counter[Node] = Counter()
        for lease in lessor.leases.all():
            _check_lease(lessor, lease)
            locks[lease.node] += 1
            if lease.tail is not None:
                locks[lease.tail] += 1
        indexed = tree.check(roots, locks)
        private: Counter[int] = Counter()
        held: Counter[int] = Counter()
        for lease in lessor.leases.all():
            private.update(lease.private_blocks())
            if lease.source is not None:
                held[lease.source] += 1
            if lease.tail_is_shared:
                held[lease.table[-1]] += 1
        lessor.blocks.pool.check(private, indexed, held)
        lessor.inflight.check()
        lessor.waiting.check()
        lessor.pins.check()
        lessor.tallies.check()
        _check_ages(lessor)
        _check_quotas(blocks.quotas, lessor.leases)
    except AssertionError as error:
        drawn = "\n".join(draw(root) for root in [*roots, *tree.retired])
        raise AssertionError(f"{error}\n{drawn}") from error


def _check_ages(lessor: Lessor) -> None:
    held = [lease for member in lessor.leases.workers.values() for lease in member.leases.values()]
    held.sort(key=lambda lease: lease.serial)
    assert lessor.leases.all() == held, "the leases by age are not those of the workers"


def _check_lease(lessor: Lessor, lease: Lease) -> None:
    size = lessor.blocks.block_size
    whole = len(lease.node.table())
    assert whole * size == lease.start, f"lease {lease.id} starts at {lease.start}, not {whole}"
    assert lease.start <= lease.committed <= lease.num_tokens, f"lease {lease.id}: counts"
    assert lease.committed <= len(lease.table) * size, f"lease {lease.id} has no room"
    assert lease.committed - lease.start < size, f"lease {lease.id}: a whole block is not indexed"
    indexed_tail = lease.tail is not None or lease.tail_is_shared
    assert lease.private_from == whole + indexed_tail, f"lease {lease.id}: private from where?"
    own = lease.node.table()
    for index, (mine, trees) in enumerate(zip(lease.table, own, strict=False)):
        assert (mine != trees) == (index in lease.duplicates), f"lease {lease.id}: block {index}"


def _check_quotas(quotas: Quotas, leases: LeaseTable) -> None:
    """Assert that the counts are those of the leases.  O(leases + namespaces)."""
    living = leases.all()
    private: dict[Account, int] = {}
    in_root: Counter[object] = Counter(lease.node.root for lease in living)
    for tenant in quotas.tenants():
        own = [lease.serial for lease in living if lease.namespace.tenant == tenant.scope]
        assert list(leases.of_tenant(tenant.tenant)) == own, f"{tenant}: leases"
        below = list(tenant.namespaces.values())
        for what in ("private", "quarantined", "num_held", "num_stored"):
            there, summed = getattr(tenant, what), sum(getattr(one, what) for one in below)
            assert there == summed, f"{tenant}: {what} {there}, not {summed}"
        for root in (root for one in below for root in one.roots):
            counted = in_root[root]
            assert root.num_leases == counted, f"{root.namespace}: {root.num_leases} leases"
    for lease in living:
        assert lease.num_private == lease.count_private(), f"lease {lease.id}: private blocks"
        private[lease.account] = private.get(lease.account, 0) + lease.num_private
    for account in quotas.namespaces(None):
        counted = private.pop(account, 0)
        assert account.private == counted, f"{account}: {account.private}, not {counted}"
    assert not private, "a lease of an account that nobody knows"
    known = (*quotas.tenants(), *quotas.namespaces(None))
    limited = {account for account in known if account.has_quota}
    assert set(quotas.limited()) == limited, "the accounts with a quota"
