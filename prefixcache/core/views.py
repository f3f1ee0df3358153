"""What can be seen from outside: look-ups, numbers, and the walk over all invariants.

Nothing here changes the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from heapq import merge
from itertools import chain, islice
from typing import Final

from prefixcache.core.desk import Desk
from prefixcache.core.drawing import draw
from prefixcache.core.leases import Lease
from prefixcache.core.ledger import Tally
from prefixcache.core.node import Node, Root
from prefixcache.types import (
    TOKEN_BYTES,
    LeaseInfo,
    Lookup,
    Namespace,
    Partial,
    Snapshot,
)

MOST_LEASES: Final = 1000
"""Listed in one snapshot."""
_MOST_LOOKED_AT: Final = 8 * MOST_LEASES
"""For who may see some of a tenant's namespaces only."""


def lookup(desk: Desk, root: Root | None, tokens: bytes) -> Lookup:
    """Say what `acquire` would find."""
    total = len(tokens) // TOKEN_BYTES
    if root is None:
        return Lookup(total, 0, 0, 0)
    match = desk.holdings.tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
    gain = desk.flights.find(root, match, tokens)
    return Lookup(
        num_tokens=total,
        num_hit=match.end // TOKEN_BYTES,
        num_partial=0 if desk.partial is Partial.OFF else match.partial_tokens,
        num_pending=0 if gain is None else gain.num_tokens,
    )


def snapshot(
    desk: Desk,
    now: float,
    tenant: str | None = None,
    sees: Callable[[Namespace], bool] | None = None,
) -> Snapshot:
    """Give the numbers of this moment, and the oldest leases of who asks."""
    holdings = desk.holdings
    pool, tree = holdings.pool, holdings.tree
    total = Tally()
    for tally in desk.tallies.values():
        total.merge(tally)
    oldest = _oldest(desk, MOST_LEASES, tenant, sees)
    leases = tuple([lease_info(desk, lease, now) for lease in oldest])
    indexed, free = tree.num_blocks - tree.num_forgotten, holdings.num_free
    return Snapshot(
        num_blocks=pool.num_blocks,
        block_size=holdings.block_size,
        free=free,
        private=pool.num_blocks - free - indexed - pool.num_quarantined,
        indexed=indexed,
        quarantined=pool.num_quarantined,
        evictable=tree.evictable - tree.forgotten_evictable,
        ghosts=tree.ghosts.num_blocks,
        nodes=tree.num_nodes,
        leases=leases,
        waiting=len(desk.room.tickets),
        evicted=tree.num_evicted,
        requests=total.requests,
        ledger=total.total(),
        namespaces={space: tally.total() for space, tally in desk.tallies.items()},
        pinned=desk.pins.num_pinned,
        max_pinned=desk.pins.max_pinned,
        pins=desk.pins.infos(now),
        quotas=holdings.quotas.infos(),
        shortage=desk.history.shortage.steps(),
        num_leases=_count_leases(desk, sees),
    )


def lease_info(desk: Desk, lease: Lease, now: float) -> LeaseInfo:
    """Tell one lease."""
    return LeaseInfo(
        lease=lease.id,
        worker=desk.leases.workers[lease.worker].name,
        namespace=lease.namespace,
        num_tokens=lease.num_tokens,
        num_committed=lease.committed,
        num_blocks=len(lease.table),
        expires_in_s=desk.leases.ends_at(lease) - now,
    )


def oldest_leases(desk: Desk, most: int, now: float) -> list[LeaseInfo]:
    """Tell the oldest leases.  O(tenants + most), however many are out."""
    return [lease_info(desk, lease, now) for lease in _oldest(desk, most, None, None)]


def _oldest(
    desk: Desk, most: int, tenant: str | None, sees: Callable[[Namespace], bool] | None
) -> list[Lease]:
    most_looked_at = most if sees is None else _MOST_LOOKED_AT
    lines = [
        islice(one.leases.values(), most_looked_at)
        for one in desk.holdings.quotas.tenants()
        if tenant is None or one.scope == tenant
    ]
    first = islice(merge(*lines, key=lambda lease: lease.serial), most_looked_at)
    return list(islice((one for one in first if sees is None or sees(one.namespace)), most))


def _count_leases(desk: Desk, sees: Callable[[Namespace], bool] | None) -> int:
    if sees is None:
        return desk.leases.count
    roots = chain(desk.roots.values(), desk.holdings.tree.retired)
    return sum(root.num_leases for root in roots if root.num_leases and sees(root.namespace))


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
        desk.room.line.check()
        desk.pins.check()
        holdings.quotas.check(desk.leases.all())
    except AssertionError as error:
        drawn = "\n".join(draw(root) for root in [*roots, *tree.retired])
        raise AssertionError(f"{error}\n{drawn}") from error


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
