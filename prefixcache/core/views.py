"""What can be seen from outside: look-ups, numbers, and the walk over all invariants.

Nothing here changes the cache.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator
from itertools import islice
from typing import Final

from prefixcache.core.desk import Desk
from prefixcache.core.drawing import draw
from prefixcache.core.leases import Lease
from prefixcache.core.ledger import Tally
from prefixcache.core.node import Node, Root
from prefixcache.core.vitals import vitals
from prefixcache.types import (
    TOKEN_BYTES,
    LeaseInfo,
    Ledger,
    Lookup,
    Namespace,
    Partial,
    QuotaInfo,
    Snapshot,
)

MOST_LEASES: Final = 1000
"""Listed in one snapshot."""
_MOST_LOOKED_AT: Final = 8 * MOST_LEASES
"""For who may see some of a tenant's namespaces only."""
_PAUSE_EVERY: Final = 200
"""Rows that are told in one go."""


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
) -> Generator[None, None, Snapshot]:
    """Give the numbers of this moment, then rows: each as it is when its turn comes.

    In steps of some hundred rows: between them other verbs may be called.  What has ended by then
    is left out.
    """
    head = vitals(desk, now)
    shortage, pinned = desk.history.shortage.steps(), desk.pins.num_pinned

    def is_shown(namespace: Namespace) -> bool:
        mine = tenant is None or namespace.tenant == tenant
        return mine and (sees is None or sees(namespace))

    own = desk.leases.by_age if tenant is None else desk.holdings.quotas.tenant_leases(tenant)
    if sees is None:
        num_leases, most = len(own), MOST_LEASES
    else:
        num_leases, most = (yield from _count_leases(desk, tenant, sees)), _MOST_LOOKED_AT
    leases = yield from _leases(desk, list(islice(own.values(), most)), now, is_shown)
    yield
    namespaces, total = yield from _namespaces(desk, is_shown)
    yield
    pins = yield from desk.pins.infos(now, is_shown)
    yield
    quotas = yield from _quotas(desk, tenant, is_shown)
    return Snapshot(
        num_blocks=head.num_blocks,
        block_size=head.block_size,
        free=head.free,
        private=head.private,
        indexed=head.indexed,
        quarantined=head.quarantined,
        evictable=head.evictable,
        ghosts=head.ghosts,
        nodes=head.nodes,
        leases=leases,
        waiting=head.waiting,
        evicted=head.evicted,
        requests=head.total.requests,
        ledger=head.total.ledger if tenant is None and sees is None else total,
        namespaces=namespaces,
        pinned=pinned,
        max_pinned=desk.pins.max_pinned,
        pins=pins,
        quotas=quotas,
        shortage=shortage,
        num_leases=num_leases,
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
    """Tell the oldest leases.  O(most), however many are out."""
    return [lease_info(desk, lease, now) for lease in islice(desk.leases.by_age.values(), most)]


def _leases(
    desk: Desk, oldest: list[Lease], now: float, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[LeaseInfo, ...]]:
    """Tell the first of some leases that are shown and have not ended."""
    found: list[LeaseInfo] = []
    for number, lease in enumerate(oldest, 1):
        if desk.leases.lives(lease) and is_shown(lease.namespace):
            found.append(lease_info(desk, lease, now))
            if len(found) == MOST_LEASES:
                break
        if number % _PAUSE_EVERY == 0:
            yield
    return tuple(found)


def _count_leases(
    desk: Desk, tenant: str | None, sees: Callable[[Namespace], bool]
) -> Generator[None, None, int]:
    """Count the leases of the namespaces that are seen."""
    count = steps = 0
    for account in desk.holdings.quotas.namespaces(tenant):
        assert isinstance(account.scope, Namespace)
        if sees(account.scope):
            count += sum([root.num_leases for root in account.roots])
        steps += 1 + len(account.roots)
        if steps >= _PAUSE_EVERY:
            steps = 0
            yield
    return count


def _namespaces(
    desk: Desk, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[dict[Namespace, Ledger], Ledger]]:
    """Tell what became of the requests of the namespaces that are shown, and of them together."""
    found: dict[Namespace, Ledger] = {}
    total = Tally()
    for number, space in enumerate(desk.tallies.names(), 1):
        if is_shown(space) and (tally := desk.tallies.get(space)) is not None:
            found[space] = tally.total()
            total.merge(tally)
        if number % _PAUSE_EVERY == 0:
            yield
    return found, total.total()


def _quotas(
    desk: Desk, tenant: str | None, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[QuotaInfo, ...]]:
    """Tell the quotas of the namespaces that are shown, and of the tenant."""
    found = []
    for number, account in enumerate(desk.holdings.quotas.limited(), 1):
        scope = account.scope
        shown = is_shown(scope) if isinstance(scope, Namespace) else tenant in (None, scope)
        if shown and account.has_quota:
            found.append(account.info())
        if number % _PAUSE_EVERY == 0:
            yield
    return tuple(found)


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
