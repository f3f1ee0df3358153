"""Invariants: the walk that finds a wrong count, lock or owner, and draws the trees.

`check` walks everything in one go.  `check_in_steps` lets others have their turn in between, so
what it walks changes meanwhile:

```
one run, lease, list    looked at in one go              what is wrong there is wrong
owners, sums            counted over many steps          what differs in every walk is suspected
what is suspected       locks: counted in one go; the others: all of it checked in one go
```
Nothing is called wrong that was not seen wrong in one go.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from prefixcache.core.account import Account
from prefixcache.core.block_manager import LARGE_TABLE, OWN_TABLE, SHARED_TABLE
from prefixcache.core.hauls import Hauls
from prefixcache.core.introspect import draw
from prefixcache.core.lease import Lease, LeaseTable
from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Node, Root
from prefixcache.core.quota import Quotas
from prefixcache.core.wait_queue import Request
from prefixcache.types import TOKEN_BYTES, BlockTable, Checked


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
            if lease.base is not None:
                locks[lease.base] += 1
        owned = tree.check(roots, locks)
        if lessor.hauls is not None:
            owned.extend(lessor.hauls.leaving())
            _check_hauls(lessor.hauls, roots)
        held: BlockTable = array("i")
        for lease in lessor.leases.all():
            owned.extend(lease.private_blocks())
            if lease.source is not None:
                held.append(lease.source)
            held.extend(lease.donors)
            if lease.tail_is_shared:
                held.append(lease.table[-1])
        blocks.pool.check(owned, held)
        lessor.inflight.check()
        lessor.waiting.check()
        _check_prompts(lessor)
        _check_tables(lessor)
        _check_segments(lessor)
        lessor.pins.check()
        lessor.tallies.check()
        _check_ages(lessor)
        _check_quotas(blocks.quotas, lessor.leases)
    except AssertionError as error:
        drawn = "\n".join(draw(root) for root in [*roots, *tree.retired])
        raise AssertionError(f"{error}\n{drawn}") from error


_AT_ONCE = 16
"""Runs or leases that are looked at in one go."""
_SMALL = 2000
"""Entries of a list up to which it is checked in one go; a longer one is left out."""
_WALKS = 6
"""Only what differs in each of so many is suspected."""
_CONFIRMED = 20_000
"""Runs and leases up to which a suspicion is looked into in one go: about 0.6 s."""
_BLOCKS_IN_ONE_GO = 4096
"""Of a lease or a run, that count as one more of them."""


def check_in_steps(lessor: Lessor) -> Generator[None, None, Checked]:
    """Walk everything in steps, while it changes.  O(everything), in steps of some dozen.

    Raises:
        AssertionError: an invariant does not hold; the message has the trees, if they are small.
    """
    left_out = list(_check_lists(lessor))
    yield
    suspected: set[object] | None = None
    walk = _Walk(lessor)
    for _ in range(_WALKS):
        walk = _Walk(lessor)
        found = yield from walk.run()
        suspected = found if suspected is None else suspected & found
        if not suspected:
            return Checked(walk.num_runs, left_out=tuple(left_out))
    if walk.num_runs + lessor.leases.count <= _CONFIRMED:
        check(lessor)
        return Checked(walk.num_runs, left_out=tuple(left_out))
    what = ", ".join(sorted(map(str, islice(suspected or (), 3))))
    left_out.append(
        f"what differed in each of {_WALKS} walks, but may have changed each time: {what}"
    )
    return Checked(walk.num_runs, left_out=tuple(left_out))


def _check_lists(lessor: Lessor) -> Iterator[str]:
    """Check each list that is short in one go; say which ones are not."""
    leases, quotas = lessor.leases, lessor.blocks.quotas
    num_tenants = len(list(quotas.tenants()))
    lists: tuple[tuple[str, int, Callable[[], None]], ...] = (
        (
            "prefixes in flight",
            sum(map(len, lessor.inflight.below.values())),
            lessor.inflight.check,
        ),
        ("requests that wait", len(lessor.waiting.tickets), lessor.waiting.check),
        ("pins", len(lessor.pins), lessor.pins.check),
        ("namespaces' sums", len(lessor.tallies), lessor.tallies.check),
        ("tables of leases", leases.count, lambda: _check_tables(lessor)),
        ("leases by age", leases.count, lambda: _check_ages(lessor)),
        (
            "leases by account",
            leases.count * num_tenants + len(lessor.roots),
            lambda: _check_quotas(quotas, leases),
        ),
    )
    for name, size, check_list in lists:
        if size <= _SMALL:
            check_list()
        else:
            yield f"{name}: too many to check while others are served ({size:,})"


class _Walk:
    """One walk over leases, trees and blocks, in steps."""

    def __init__(self, lessor: Lessor) -> None:
        self._lessor = lessor
        self._tree = lessor.blocks.tree
        self._owners: NDArray[np.int32] = np.zeros(lessor.blocks.pool.end, np.int32)
        self._locks: Counter[Node] = Counter()
        self._odd: list[Node] = []
        """Runs whose locks are not those of the leases that were seen."""
        self._suspected: set[object] = set()
        self._done = 0
        self.num_runs = 0

    def run(self) -> Generator[None, None, set[object]]:
        """Walk.

        Returns:
            What does not agree, which may be because it changed meanwhile.

        Raises:
            AssertionError: an invariant does not hold.
        """
        lessor, tree = self._lessor, self._tree
        for lease in lessor.leases.all():
            if lessor.leases.lives(lease):
                self._look_at(lease)
            if self._is_due(1 + len(lease.table) // _BLOCKS_IN_ONE_GO):
                yield
        before = self._age(tree.num_evicted)
        for root in [*lessor.roots.values(), *tree.retired]:
            yield from self._below(root)
        if before == self._age(tree.num_evicted) and tree.num_nodes != self.num_runs:
            self._suspected.add(f"the number of runs, {tree.num_nodes:,}")
        self._check_locks()
        yield
        if lessor.hauls is not None:
            self._own(lessor.hauls.leaving())
        owners, expected = lessor.blocks.pool.count_owners()
        differ = np.flatnonzero(owners + self._owners != expected).tolist()
        self._suspected.update(f"the owners of block {block}" for block in differ)
        yield
        self._check_sums()
        return self._suspected

    def _is_due(self, more: int) -> bool:
        self._done += more
        if self._done < _AT_ONCE:
            return False
        self._done = 0
        return True

    def _age(self, changes: int) -> tuple[int, ...]:
        """Give numbers of which one differs, as a rule, once leases have come or gone."""
        leases = self._lessor.leases
        return changes, self._tree.clock, leases.num_opened, leases.count

    def _own(self, blocks: BlockTable) -> None:
        if blocks:
            np.add.at(self._owners, np.array(blocks, np.intp), 1)

    def _look_at(self, lease: Lease) -> None:
        _check_lease(self._lessor, lease)
        self._locks[lease.node] += 1
        if lease.tail is not None:
            self._locks[lease.tail] += 1
        if lease.base is not None:
            self._locks[lease.base] += 1
        self._own(lease.private_blocks())
        if lease.source is not None:
            self._owners[lease.source] += 1
        self._own(lease.donors)
        if lease.tail_is_shared:
            self._owners[lease.table[-1]] += 1

    def _below(self, root: Root) -> Generator[None, None, None]:
        """Walk one tree.

        What is below a run is found by its key when its turn comes: a split or a merge of it leaves
        that the same.
        """
        before, blocks, free = self._age(root.num_changes), 0, 0
        stack: list[tuple[Node, Iterator[bytes]]] = [(root, self._enter(root))]
        while stack:
            above, keys = stack[-1]
            first = next(keys, None)
            if first is None:
                stack.pop()
                continue
            if self._is_due(1):
                yield
            node = self._tree.child(above, first)
            if node is None:
                continue
            self._tree.check_child(above, first, node)
            if above.several is not None:
                assert above.several.is_in_order(first), "a child that is not in order"
            self.num_runs += 1
            blocks += len(node.blocks)
            free += 0 if node.lock_ref else len(node.blocks)
            if self._is_due(len(node.blocks) // _BLOCKS_IN_ONE_GO):
                yield
            stack.append((node, self._enter(node)))
        if before != self._age(root.num_changes):
            return
        if (root.num_blocks, root.evictable) != (blocks, free):
            self._suspected.add(f"the counts of namespace {root.namespace.model!r}")

    def _enter(self, node: Node) -> Iterator[bytes]:
        """Look at one run; give the keys of those below it."""
        if self._tree.check_run(node) != self._locks[node]:
            self._odd.append(node)
        self._own(node.blocks)
        for ghost in islice((node.ghosts or {}).values(), _SMALL):
            self._tree.check_ghost(node, ghost)
        if node.only is not None:
            return iter((node.only.tokens[: self._tree.block_bytes],))
        return iter(list(node.several or ()))

    def _check_locks(self) -> None:
        """Count the locks of those that are odd in one go: leases came and went meanwhile."""
        odd = set(self._odd)
        locks: Counter[Node] = Counter()
        for lease in self._lessor.leases.by_age.values():
            if lease.node in odd:
                locks[lease.node] += 1
            if lease.tail is not None and lease.tail in odd:
                locks[lease.tail] += 1
            if lease.base is not None and lease.base in odd:
                locks[lease.base] += 1
        for node in odd:
            # Without blocks it was evicted meanwhile: it is a ghost, or nothing.
            if node.blocks or isinstance(node, Root):
                outside, counted = self._tree.check_run(node), locks[node]
                assert outside == counted, f"{node.tokens[:16].hex()}: ref {node.lock_ref}"

    def _check_sums(self) -> None:
        """Assert that what is counted over all trees is the sum of theirs.  O(namespaces)."""
        tree = self._tree
        known, gone = self._lessor.roots.values(), tree.retired
        blocks = sum(root.num_blocks for root in known) + sum(root.num_blocks for root in gone)
        free = sum(root.evictable for root in known) + sum(root.evictable for root in gone)
        assert tree.num_blocks == blocks, f"{tree.num_blocks} blocks, not {blocks}"
        assert tree.evictable == free, f"{free} evictable, not {tree.evictable}"


def _check_ages(lessor: Lessor) -> None:
    held = [lease for member in lessor.leases.workers.values() for lease in member.leases.values()]
    held.sort(key=lambda lease: lease.serial)
    assert lessor.leases.all() == held, "the leases by age are not those of the workers"


def _check_lease(lessor: Lessor, lease: Lease) -> None:
    size = lessor.blocks.block_size
    own = lease.node.table()
    whole = len(own)
    assert whole * size == lease.start, f"lease {lease.id} starts at {lease.start}, not {whole}"
    assert lease.start <= lease.committed <= lease.num_tokens, f"lease {lease.id}: counts"
    assert lease.committed <= len(lease.table) * size, f"lease {lease.id} has no room"
    assert lease.committed - lease.start < size, f"lease {lease.id}: a whole block is not indexed"
    indexed_tail = lease.tail is not None or lease.tail_is_shared
    assert lease.private_from == whole + indexed_tail, f"lease {lease.id}: private from where?"
    if not lease.duplicates and own == lease.table[:whole]:
        return
    for index, (mine, trees) in enumerate(zip(lease.table, own, strict=False)):
        assert (mine != trees) == (index in lease.duplicates), f"lease {lease.id}: block {index}"


def _check_segments(lessor: Lessor) -> None:
    """Assert that exactly the whole blocks of what is exact may be donors.  O(blocks)."""
    for lease in lessor.leases.all():
        assert lease.namespace.approximate or not lease.donors, f"lease {lease.id} moves segments"
        assert lease.base is None or lease.donors, f"lease {lease.id} keeps a prefix it copied"
    if lessor.segments is None:
        assert not any(space.approximate for space in lessor.roots), "something is approximate"
        return
    index, size = lessor.segments.index, lessor.blocks.block_size * TOKEN_BYTES
    for space, root in lessor.roots.items():
        whole: list[int] = []
        stack: list[Node] = [] if space.approximate else [root]
        while stack:
            node = stack.pop()
            whole.extend(node.blocks[: len(node.tokens) // size])
            stack.extend(node.children)
        assert index.blocks_of(space) == sorted(whole), f"{space}: the blocks that may be donors"


def _check_hauls(hauls: Hauls, roots: list[Root]) -> None:
    """Assert that slots and blocks are those of ghosts and hauls.  O(slots + ghosts)."""
    hauls.check()
    found: list[Node] = []
    stack: list[Node] = [*roots]
    while stack:
        node = stack.pop()
        assert node.places is None or not node.blocks, "slots of what is in the pool"
        if node.places is not None:
            found.append(node)
        stack.extend(node.children)
        stack.extend((node.ghosts or {}).values())
    hauls.tier.check(found, hauls.busy(), hauls.moving())


def _check_prompts(lessor: Lessor) -> None:
    """Assert that the bytes of prompts are those that are kept.  O(flights + tickets)."""
    kept: Counter[str] = Counter()
    for lease in lessor.inflight.all():
        assert lease.flight is not None, f"lease {lease.id} flies without a prompt"
        kept[lease.namespace.tenant] += len(lease.flight)
    for ticket in lessor.waiting.tickets.values():
        if isinstance(ticket.request, Request):
            kept[ticket.tenant] += len(ticket.request.tokens)
    lessor.prompts.check(dict(kept))


def _check_tables(lessor: Lessor) -> None:
    """Assert that the bytes of large tables are those of the leases.  O(leases)."""
    kept: Counter[str] = Counter()
    for lease in lessor.leases.all():
        size, is_large = len(lease.table), len(lease.table) >= LARGE_TABLE
        size *= SHARED_TABLE if lease.shares_table else OWN_TABLE
        assert lease.table_bytes == size * is_large, f"lease {lease.id}: {lease.table_bytes} bytes"
        if is_large:
            kept[lease.namespace.tenant] += size
    lessor.tables.check(dict(kept))


def _check_quotas(quotas: Quotas, leases: LeaseTable) -> None:
    """Assert that the counts are those of the leases.  O(leases + namespaces)."""
    living = leases.all()
    private: dict[Account, int] = {}
    in_root: Counter[object] = Counter(lease.node.root for lease in living)
    of_tenants: dict[str, list[int]] = {}
    for lease in living:
        of_tenants.setdefault(lease.namespace.tenant, []).append(lease.serial)
    for tenant in quotas.tenants():
        own = of_tenants.get(tenant.tenant, [])
        assert list(leases.of_tenant(tenant.tenant)) == own, f"{tenant}: leases"
        below = list(tenant.namespaces.values())
        for what in ("private", "quarantined", "num_held", "num_stored"):
            there, summed = getattr(tenant, what), sum([getattr(one, what) for one in below])
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
