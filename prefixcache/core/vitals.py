"""Vitals: the numbers of a cache that are cheap enough to be read every second.

What `Snapshot` lists lease by lease is counted here, and the sums are those of a few series.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice

from prefixcache.core.desk import Desk
from prefixcache.core.ledger import Tally
from prefixcache.types import TOKEN_BYTES, LeaseId, Ledger, Namespace, Partial


@dataclass(frozen=True, slots=True)
class Account:
    """What became of one series' requests since the start, or of all."""

    requests: int
    joins: int
    """Requests that waited for another lease's prefill and read it in place: flights saved."""
    ledger: Ledger


@dataclass(frozen=True, slots=True)
class Vitals:
    """Numbers of one moment.  free + private + indexed + quarantined = num_blocks."""

    num_blocks: int
    block_size: int
    free: int
    private: int
    indexed: int
    quarantined: int
    evictable: int
    ghosts: int
    nodes: int
    leases: int
    flights: int
    waiting: int
    evicted: int
    """Blocks evicted since the start."""
    overshot: int
    """Of these, blocks beyond what was asked for."""
    eviction_age_s: float | None
    """Time since the last use of what was evicted last; None before the first eviction."""
    smallest_hit: int
    """Tokens of the shortest prefix that can be reused."""
    namespaces: int
    """Those with requests."""
    total: Account
    accounts: dict[Namespace, Account]
    """What `total` is the sum of; at most `tallies.MOST_SERIES` names and `tallies.OTHER`."""


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


def flights(desk: Desk, most: int) -> list[FlightInfo]:
    """Give up to `most` flights.  Changes nothing."""
    return [
        FlightInfo(
            lease.id,
            desk.leases.workers[lease.worker].name,
            lease.namespace,
            len(lease.flight or b"") // TOKEN_BYTES,
            lease.committed,
            desk.room.waiting_for(lease.serial),
        )
        for lease in islice(desk.flights.all(), most)
    ]


def vitals(desk: Desk, now: float) -> Vitals:
    """Read the numbers.  Changes nothing.  O(series), however many namespaces there are."""
    holdings = desk.holdings
    pool, tree = holdings.pool, holdings.tree
    quarantined, stamp = pool.num_quarantined, tree.last_evicted
    indexed, free = tree.num_blocks - tree.num_forgotten, holdings.num_free
    return Vitals(
        num_blocks=pool.num_blocks,
        block_size=holdings.block_size,
        free=free,
        private=pool.num_blocks - free - indexed - quarantined,
        indexed=indexed,
        quarantined=quarantined,
        evictable=tree.evictable - tree.forgotten_evictable,
        ghosts=tree.ghosts.num_blocks,
        nodes=tree.num_nodes,
        leases=desk.leases.count,
        flights=len(desk.flights),
        waiting=len(desk.room.tickets),
        evicted=tree.num_evicted,
        overshot=holdings.num_overshot,
        eviction_age_s=None if stamp is None else desk.history.ages.idle_s(stamp, now),
        smallest_hit=holdings.block_size if desk.partial is Partial.OFF else 1,
        namespaces=len(desk.tallies),
        total=_account(desk.tallies.total()),
        accounts={name: _account(tally) for name, tally in desk.tallies.series.items()},
    )


def _account(tally: Tally) -> Account:
    return Account(*tally.counts())
