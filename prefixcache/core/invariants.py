"""Invariants: the walk that finds a wrong count, lock or owner, and draws the trees."""

from __future__ import annotations

from collections import Counter

from prefixcache.core.introspect import draw
from prefixcache.core.lease import Lease
from prefixcache.core.lessor import Desk
from prefixcache.core.node import Node


def check(desk: Desk) -> None:
    """Walk everything and assert that every invariant holds; a failure prints the trees."""
    holdings = desk.holdings
    tree = holdings.tree
    roots = list(desk.roots.values())
    try:
        locks: Counter[Node] = Counter()
        for lease in desk.leases.all():
            _check_lease(desk, lease)
            locks[lease.node] += 1
            if lease.tail is not None:
                locks[lease.tail] += 1
        indexed = tree.check(roots, locks)
        private: Counter[int] = Counter()
        held: Counter[int] = Counter()
        for lease in desk.leases.all():
            private.update(lease.private_blocks())
            if lease.source is not None:
                held[lease.source] += 1
            if lease.tail_is_shared:
                held[lease.table[-1]] += 1
        desk.holdings.pool.check(private, indexed, held)
        desk.flights.check()
        desk.room.check()
        desk.pins.check()
        desk.tallies.check()
        _check_ages(desk)
        holdings.quotas.check(desk.leases.all())
    except AssertionError as error:
        drawn = "\n".join(draw(root) for root in [*roots, *tree.retired])
        raise AssertionError(f"{error}\n{drawn}") from error


def _check_ages(desk: Desk) -> None:
    held = [lease for member in desk.leases.workers.values() for lease in member.leases.values()]
    held.sort(key=lambda lease: lease.serial)
    assert desk.leases.all() == held, "the leases by age are not those of the workers"


def _check_lease(desk: Desk, lease: Lease) -> None:
    size = desk.holdings.block_size
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
