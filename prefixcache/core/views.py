"""What can be seen from outside: look-ups, explanations, numbers, and the walk over all invariants.

Nothing here changes the cache, but for the count of partings.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from prefixcache.core.drawing import draw
from prefixcache.core.flights import Flights, WaitingRoom
from prefixcache.core.holdings import Holdings
from prefixcache.core.leases import Lease, Leases
from prefixcache.core.ledger import Tally, settle, spans
from prefixcache.core.node import Match, Node, Root
from prefixcache.core.radix import RadixTree
from prefixcache.types import (
    TOKEN_BYTES,
    Explanation,
    LeaseInfo,
    Ledger,
    Lookup,
    Namespace,
    Partial,
    Snapshot,
)

_SHOWN_TOKENS = 8


@dataclass(frozen=True, slots=True)
class View:
    """The parts of a cache, to look at."""

    holdings: Holdings
    leases: Leases
    flights: Flights
    room: WaitingRoom
    roots: dict[Namespace, Root]
    tallies: dict[Namespace, Tally]
    partial: Partial


def lookup(view: View, root: Root | None, tokens: bytes) -> Lookup:
    """Say what `acquire` would find."""
    total = len(tokens) // TOKEN_BYTES
    if root is None:
        return Lookup(total, 0, 0, 0)
    limit = len(tokens) - TOKEN_BYTES
    match = view.holdings.tree.match(root, tokens, limit)
    flight = view.flights.find(match, tokens, limit)
    return Lookup(
        num_tokens=total,
        num_hit=match.end // TOKEN_BYTES,
        num_partial=0 if view.partial is Partial.OFF else match.partial_tokens,
        num_pending=0 if flight is None else max(0, flight[1] - match.partial_tokens),
    )


def explain(view: View, root: Root | None, tokens: bytes) -> Explanation:
    """Say what would become of each token, and where the prompt parts from what is stored."""
    tree = view.holdings.tree
    if root is None:
        ledger = Ledger(cold=len(tokens) // TOKEN_BYTES)
        return Explanation(spans(ledger), ledger, None, b"", 0)
    match = tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
    partial = 0 if view.partial is Partial.OFF else match.partial_tokens
    ledger = settle(tree, match, tokens, partial=partial)
    exact = tree.match(root, tokens)
    run = tree.parting(exact, tokens)
    if run is None:
        return Explanation(spans(ledger), ledger, None, b"", 0)
    into = exact.partial_tokens * TOKEN_BYTES
    return Explanation(
        spans=spans(ledger),
        ledger=ledger,
        parted_at=exact.end // TOKEN_BYTES + exact.partial_tokens,
        stored_next=run[into : into + _SHOWN_TOKENS * TOKEN_BYTES],
        num_parted=_partings(exact).get(exact.partial_tokens, 0),
    )


def note_parting(tree: RadixTree, match: Match, tokens: bytes) -> None:
    """Count that a request leaves the stored prefixes where its match ends.  O(log siblings).

    The count stands at the node where the whole blocks end; it goes with the node.
    """
    if tree.parting(match, tokens) is None:
        return
    node = match.node
    if match.used < len(node.blocks):
        return  # the first to leave inside a run: the place becomes a node when it is locked
    if node.parted is None:
        node.parted = {}
    node.parted[match.partial_tokens] = node.parted.get(match.partial_tokens, 0) + 1


def _partings(match: Match) -> dict[int, int]:
    if match.used < len(match.node.blocks):
        return {}
    return match.node.parted or {}


def snapshot(view: View, now: float) -> Snapshot:
    """Give the numbers of this moment."""
    holdings = view.holdings
    pool, tree = holdings.pool, holdings.tree
    total = Tally()
    for tally in view.tallies.values():
        total.merge(tally)
    leases = tuple(
        LeaseInfo(
            lease=lease.id,
            worker=lease.worker,
            namespace=lease.namespace,
            num_tokens=lease.num_tokens,
            num_committed=lease.committed,
            num_blocks=len(lease.table),
            expires_in_s=view.leases.ends_at(lease) - now,
        )
        for lease in view.leases.all()
    )
    used = pool.num_blocks - pool.num_free
    return Snapshot(
        num_blocks=pool.num_blocks,
        block_size=holdings.block_size,
        free=pool.num_free,
        private=used - tree.num_blocks - pool.num_quarantined,
        indexed=tree.num_blocks,
        quarantined=pool.num_quarantined,
        evictable=tree.evictable,
        ghosts=tree.ghosts.num_blocks,
        nodes=tree.num_nodes,
        leases=leases,
        waiting=len(view.room.tickets),
        evicted=holdings.num_evicted,
        requests=total.requests,
        ledger=total.total(),
        namespaces={space: tally.total() for space, tally in view.tallies.items()},
    )


def check(view: View) -> None:
    """Walk everything and assert that every invariant holds; a failure prints the trees."""
    tree = view.holdings.tree
    roots = list(view.roots.values())
    try:
        locks: Counter[Node] = Counter()
        for lease in view.leases.all():
            _check_lease(view, lease)
            locks[lease.node] += 1
            if lease.tail is not None:
                locks[lease.tail] += 1
        indexed = tree.check(roots, locks)
        private: Counter[int] = Counter()
        held: Counter[int] = Counter()
        for lease in view.leases.all():
            private.update(lease.private_blocks())
            if lease.source is not None:
                held[lease.source] += 1
            if lease.tail_is_shared:
                held[lease.table[-1]] += 1
        view.holdings.pool.check(private, indexed, held)
        view.flights.check()
    except AssertionError as error:
        drawn = "\n".join(draw(root) for root in [*roots, *tree.retired])
        raise AssertionError(f"{error}\n{drawn}") from error


def _check_lease(view: View, lease: Lease) -> None:
    size = view.holdings.block_size
    whole = len(view.holdings.tree.table(lease.node))
    assert whole * size == lease.start, f"lease {lease.id} starts at {lease.start}, not {whole}"
    assert lease.start <= lease.committed <= lease.num_tokens, f"lease {lease.id}: counts"
    assert lease.committed <= len(lease.table) * size, f"lease {lease.id} has no room"
    assert lease.committed - lease.start < size, f"lease {lease.id}: a whole block is not indexed"
    indexed_tail = lease.tail is not None or lease.tail_is_shared
    assert lease.private_from == whole + indexed_tail, f"lease {lease.id}: private from where?"
    own = view.holdings.tree.table(lease.node)
    for index, (mine, trees) in enumerate(zip(lease.table, own, strict=False)):
        assert (mine != trees) == (index in lease.duplicates), f"lease {lease.id}: block {index}"

