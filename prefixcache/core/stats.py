"""Stats: the numbers of every second, snapshots and look-ups.  Nothing here changes the cache."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import islice
from typing import Any, Final

from prefixcache.core.hauls import Hauls
from prefixcache.core.lease import Lease
from prefixcache.core.ledger import Tally
from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Root
from prefixcache.core.worth import TIER_NAMES, Worth
from prefixcache.types import (
    TOKEN_BYTES,
    Counts,
    HoldingInfo,
    LeaseId,
    LeaseInfo,
    Ledger,
    Lookup,
    Namespace,
    Partial,
    QuotaInfo,
    Snapshot,
)


@dataclass(frozen=True, slots=True)
class SeriesCounts:
    """What became of one series' requests since the start."""

    requests: int
    joins: int
    """Requests that waited for another lease's prefill and read it in place: flights saved."""
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class FlightInfo:
    """A prompt that a lease is computing."""

    lease: LeaseId
    worker: str
    """Its name."""
    namespace: Namespace
    num_tokens: int
    num_committed: int
    num_waiting: int
    """Requests that wait for it."""


def flights(lessor: Lessor, most: int) -> list[FlightInfo]:
    """Give up to `most` flights.  Changes nothing."""
    return [
        FlightInfo(
            lease.id,
            lessor.leases.workers[lease.worker].name,
            lease.namespace,
            len(lease.flight or b"") // TOKEN_BYTES,
            lease.committed,
            lessor.waiting.waiting_for(lease.serial),
        )
        for lease in islice(lessor.inflight.all(), most)
    ]


def counts(lessor: Lessor, now: float) -> Counts:
    """Read the numbers.  Changes nothing.  O(1)."""
    blocks, history, pins = lessor.blocks, lessor.history, lessor.pins
    pool, tree = blocks.pool, blocks.tree
    quarantined, stamp = pool.num_quarantined, tree.last_evicted
    indexed, free = tree.num_blocks - tree.num_forgotten, blocks.num_free
    requests, joins, ledger = lessor.tallies.total().counts()
    hauls = lessor.hauls
    leaving = 0 if hauls is None else hauls.num_leaving
    return Counts(
        num_blocks=pool.num_blocks,
        block_size=blocks.block_size,
        free=free,
        private=pool.num_blocks - free - indexed - quarantined - leaving,
        indexed=indexed,
        quarantined=quarantined,
        evictable=tree.evictable - tree.forgotten_evictable,
        pinned=pins.num_pinned,
        max_pinned=pins.max_pinned,
        ghosts=tree.ghosts.num_blocks + tree.ghosts.num_tails,
        nodes=tree.num_nodes,
        num_leases=lessor.leases.count,
        num_flights=len(lessor.inflight),
        num_namespaces=len(lessor.tallies),
        waiting=len(lessor.waiting.tickets),
        requests=requests,
        flights_saved=joins,
        ledger=ledger,
        evicted=tree.num_evicted,
        eviction_age_s=None if stamp is None else history.idle_clock.idle_s(stamp, now),
        index_bytes=tree.num_bytes + _segment_bytes(lessor),
        history_bytes=history.num_bytes,
        max_history_bytes=history.max_bytes,
        leaving=leaving,
        host_blocks=0 if hauls is None else hauls.tier.num_host,
        host_used=0 if hauls is None else hauls.tier.num_host_used,
        disk_blocks=0 if hauls is None else hauls.tier.num_disk,
        disk_used=0 if hauls is None else hauls.tier.num_disk_used,
        disk_found=0 if hauls is None else hauls.tier.num_found,
        disk_written=0 if hauls is None else hauls.num_sunk_to_disk + hauls.num_moved,
        disk_moved=0 if hauls is None else hauls.num_moved,
        disk_restored=0 if hauls is None else hauls.num_restored_from_disk,
        sunk=0 if hauls is None else hauls.num_sunk,
        restored=0 if hauls is None else hauls.num_restored,
        spoilt=0 if hauls is None else hauls.num_bad,
        **({} if hauls is None else _worth(hauls.worth)),
        **_remote(hauls),
    )


def _worth(worth: Worth) -> dict[str, Any]:
    """Tell how often fetching was declined, and what it has brought.  O(tiers)."""
    told: dict[str, Any] = {f"declined_{why}": count for why, count in worth.declined.items()}
    for at, speed in enumerate(worth.speeds):
        told[f"{TIER_NAMES[at]}_advantage"] = speed.advantage or 0.0
    return told


def _remote(hauls: Hauls | None) -> dict[str, Any]:
    """Tell what has gone to a store elsewhere and come back, if there is one.  O(1)."""
    if hauls is None or (remote := hauls.remote) is None:
        return {}
    return {
        "has_remote": True,
        "remote_stored": remote.num_stored,
        "remote_unstored": remote.num_unstored,
        "remote_restored": hauls.num_restored_from_remote,
        "remote_wrong": remote.num_wrong,
        "remote_late": remote.num_late,
    }


def _segment_bytes(lessor: Lessor) -> int:
    """Give what the index of segments takes, about.  O(1)."""
    finder, tree = lessor.segments, lessor.blocks.tree
    return 0 if finder is None else finder.index.block_bytes * tree.num_blocks


def series(lessor: Lessor) -> dict[Namespace, SeriesCounts]:
    """Tell what became of the requests of each series.  Changes nothing.  O(series)."""
    return {name: SeriesCounts(*tally.counts()) for name, tally in lessor.tallies.series.items()}


MOST_LEASES: Final = 1000
"""Listed in one snapshot."""
MOST_NAME_BYTES: Final = 2 << 20
"""Of the names in the rows of one kind, those of namespaces twice as much: with short ones all that
there may be are listed.  Names are as long as whoever chose them liked."""
_MOST_LOOKED_AT: Final = 8 * MOST_LEASES
"""For who may see some of a tenant's namespaces only."""
_PAUSE_EVERY = 16
"""Rows that are told in one go."""
_ROW_BYTES = 64
"""Of a row beside its names, about."""


class NameBudget:
    """Counts the names in some rows.

    Args:
        most: Bytes that they may have together.
    """

    __slots__ = ("_left",)

    def __init__(self, most: int = MOST_NAME_BYTES) -> None:
        self._left = most

    def fit(self, scope: Namespace | str) -> bool:
        """Count those of one more row; say whether it is listed.  O(1)."""
        names = (scope,) if isinstance(scope, str) else scope[:3]
        self._left -= _ROW_BYTES + sum([len(name.encode()) for name in names])
        return self._left >= 0


def lookup(lessor: Lessor, root: Root | None, tokens: bytes) -> Lookup:
    """Say what `acquire` would find."""
    total = len(tokens) // TOKEN_BYTES
    if root is None:
        return Lookup(total, 0, 0, 0)
    match = lessor.blocks.tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
    gain = lessor.inflight.find(root, match, tokens)
    return Lookup(
        num_tokens=total,
        num_hit=match.end // TOKEN_BYTES,
        num_partial=0 if lessor.partial is Partial.OFF else match.partial_tokens,
        num_pending=0 if gain is None else gain.num_tokens,
    )


def snapshot(
    lessor: Lessor,
    now: float,
    tenant: str | None = None,
    sees: Callable[[Namespace], bool] | None = None,
) -> Generator[None, None, Snapshot]:
    """Give the numbers of this moment, then rows: each as it is when its turn comes.

    In steps of some dozen rows: between them other verbs may be called.  What has ended by then
    is left out.
    """
    head = counts(lessor, now).fields()
    shortage = lessor.history.miss_depths.steps()

    def is_shown(namespace: Namespace) -> bool:
        mine = tenant is None or namespace.tenant == tenant
        return mine and (sees is None or sees(namespace))

    own = lessor.leases.by_age if tenant is None else lessor.leases.of_tenant(tenant)
    if sees is None:
        head["num_leases"], most = len(own), MOST_LEASES
    else:
        head["num_leases"], most = (yield from _count_leases(lessor, tenant, sees)), _MOST_LOOKED_AT
    leases = yield from _leases(lessor, list(islice(own.values(), most)), now, is_shown)
    yield
    namespaces, total, count = yield from _namespaces(lessor, is_shown)
    yield
    pinned = NameBudget()
    pins = yield from lessor.pins.infos(now, lambda one: is_shown(one) and pinned.fit(one))
    yield
    quotas = yield from _quotas(lessor, tenant, is_shown)
    yield
    holdings = yield from _holdings(lessor, tenant)
    if tenant is not None or sees is not None:
        head |= {"ledger": total, "num_namespaces": count}
    return Snapshot(
        **head,
        leases=leases,
        namespaces=namespaces,
        pins=pins,
        quotas=quotas,
        holdings=holdings,
        shortage=shortage,
    )


def lease_info(lessor: Lessor, lease: Lease, now: float) -> LeaseInfo:
    """Tell one lease."""
    return LeaseInfo(
        lease=lease.id,
        worker=lessor.leases.workers[lease.worker].name,
        namespace=lease.namespace,
        num_tokens=lease.num_tokens,
        num_committed=lease.committed,
        num_blocks=len(lease.table),
        expires_in_s=min(lessor.leases.ends_at(lease) - now, lessor.leases.ttl_s),
    )


def oldest_leases(lessor: Lessor, most: int, now: float) -> list[LeaseInfo]:
    """Tell the oldest leases.  O(most), however many are out."""
    return [lease_info(lessor, lease, now) for lease in islice(lessor.leases.by_age.values(), most)]


def _leases(
    lessor: Lessor, oldest: list[Lease], now: float, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[LeaseInfo, ...]]:
    """Tell the first of some leases that are shown and have not ended."""
    found: list[LeaseInfo] = []
    names = NameBudget()
    for number, lease in enumerate(oldest, 1):
        if lessor.leases.lives(lease) and is_shown(lease.namespace):
            if len(found) == MOST_LEASES or not names.fit(lease.namespace):
                break
            found.append(lease_info(lessor, lease, now))
        if number % _PAUSE_EVERY == 0:
            yield
    return tuple(found)


def _count_leases(
    lessor: Lessor, tenant: str | None, sees: Callable[[Namespace], bool]
) -> Generator[None, None, int]:
    """Count the leases of the namespaces that are seen."""
    count = steps = 0
    for account in lessor.blocks.quotas.namespaces(tenant):
        assert isinstance(account.scope, Namespace)
        if sees(account.scope):
            count += sum([root.num_leases for root in account.roots])
        steps += 1 + len(account.roots)
        if steps >= _PAUSE_EVERY:
            steps = 0
            yield
    return count


def _namespaces(
    lessor: Lessor, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[dict[Namespace, Ledger], Ledger, int]]:
    """Tell what became of the requests of those that are shown, of all together, and how many."""
    found: dict[Namespace, Ledger] = {}
    total, count = Tally(), 0
    names = NameBudget(2 * MOST_NAME_BYTES)
    for number, space in enumerate(lessor.tallies.names(), 1):
        if is_shown(space) and (tally := lessor.tallies.get(space)) is not None:
            count += 1
            if names.fit(space):
                found[space] = tally.total()
            total.merge(tally)
        if number % _PAUSE_EVERY == 0:
            yield
    return found, total.total(), count


def _quotas(
    lessor: Lessor, tenant: str | None, is_shown: Callable[[Namespace], bool]
) -> Generator[None, None, tuple[QuotaInfo, ...]]:
    """Tell the quotas of the namespaces that are shown, and of the tenant."""
    found = []
    names = NameBudget()
    for number, account in enumerate(lessor.blocks.quotas.limited(), 1):
        scope = account.scope
        shown = is_shown(scope) if isinstance(scope, Namespace) else tenant in (None, scope)
        if shown and account.has_quota and names.fit(scope):
            found.append(account.info())
        if number % _PAUSE_EVERY == 0:
            yield
    return tuple(found)


def holdings(lessor: Lessor, most: int) -> list[HoldingInfo]:
    """Tell what up to `most` tenants have below the pool.  O(most)."""
    if lessor.hauls is None:
        return []
    tier = lessor.hauls.tier
    return [tier.holding(name) for name in islice(tier.holdings.tenants(), most)]


def _holdings(lessor: Lessor, tenant: str | None) -> Generator[None, None, tuple[HoldingInfo, ...]]:
    """Tell what tenants have below the pool, or one of them."""
    if lessor.hauls is None:
        return ()
    tier, found = lessor.hauls.tier, []
    names = NameBudget()
    for number, name in enumerate(list(tier.holdings.tenants()), 1):
        if tenant in (None, name) and tier.holdings.num_blocks(name) and names.fit(name):
            found.append(tier.holding(name))
        if number % _PAUSE_EVERY == 0:
            yield
    return tuple(found)
