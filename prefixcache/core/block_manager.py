"""What leases hold: the one place where a lease, the tree and the pool change together.

```
plan ─► allocate ─► commit … ─► (truncate) ─► free
```

Before anything is taken, `admit` compares what is needed with what is free or evictable; what it
lets through cannot fail later.
"""

from __future__ import annotations

from array import array

from prefixcache.core.account import Account
from prefixcache.core.block_pool import BlockPool, LastTenant
from prefixcache.core.hauls import Hauls
from prefixcache.core.lease import KeptBytes, Lease
from prefixcache.core.node import Match, Node
from prefixcache.core.quota import Quotas
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.segments import MOST_EVICTED, Found
from prefixcache.core.shares import Shares
from prefixcache.errors import InvalidRequest, PoolExhausted, QuotaExceeded
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    BlockId,
    BlockTable,
    Copy,
    LeaseId,
    Partial,
    TableUpdate,
    WorkerId,
)

LARGE_TABLE = 1024
"""Blocks of a table from which on its bytes are counted: the number of leases bounds the others."""
OWN_TABLE = 8
"""Bytes for each block: the lease's table, and that of the answer which is kept for its request."""
_NO_BLOCKS: BlockTable = array("i")
"""Never changed."""
SHARED_TABLE = 4
"""Bytes for each block of the table that forks share; of each of them, for it may be the last."""


class BlockManager:
    """The tree and the pool, and the steps that move blocks between them and the leases."""

    __slots__ = (
        "_aside",
        "_partial",
        "_tables",
        "_width",
        "aside",
        "block_size",
        "hauls",
        "last_tenant",
        "pool",
        "quotas",
        "tree",
    )

    def __init__(
        self, tree: RadixTree, pool: BlockPool, partial: Partial, tables: KeptBytes
    ) -> None:
        self.tree = tree
        self.pool = pool
        self._tables = tables
        self.quotas = Quotas(pool.num_blocks)
        self.last_tenant = LastTenant(pool.end)
        self.aside = Shares(pool.num_blocks, "the pool", "quarantined blocks")
        """Whose leases they were of, but for those of an earlier life."""
        self._aside: dict[WorkerId, dict[LeaseId, Account]] = {}
        """Who answers for what is quarantined of a lease that has ended."""
        self.block_size = tree.block_bytes // TOKEN_BYTES
        self._width = tree.block_bytes
        self._partial = partial
        self.hauls: Hauls | None = None
        """What is leaving the pool for the tier below it, if there is one."""

    # ------------------------------------------------------------------ room

    def blocks_for(self, num_tokens: int) -> int:
        """Give the blocks that `num_tokens` tokens fill.

        Raises:
            InvalidRequest: the pool can never hold them.
        """
        total = -(-num_tokens // self.block_size)
        if total > self.pool.num_blocks:
            raise InvalidRequest(
                f"{many(num_tokens, 'token', 'need')} {many(total, 'block')} of {self.block_size}; "
                f"the whole pool has {self.pool.num_blocks}. "
                "Send less, or serve with more --memory."
            )
        return total

    def num_obtainable(self, match: Match | None = None) -> int:
        """Count the blocks that eviction can free for sure, once `match` is locked.  O(nodes)."""
        kept = 0 if match is None else match.num_unprotected()
        leaving = 0 if self.hauls is None else self.hauls.num_leaving
        # A block that a copy still reads is not free when the tree lets go of it.
        return self.tree.evictable + leaving - kept - len(self.pool.refs)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing: those on the free list, and what was reset and nobody holds."""
        return self.pool.num_free + self.tree.forgotten_evictable

    @property
    def is_full(self) -> bool:
        """Whether not one block can be had now.  O(1)."""
        return self.pool.num_free <= 0 and self.num_obtainable() <= 0

    def admit(self, need: int, account: Account, match: Match | None = None) -> None:
        """Check that `need` blocks can be had, and that `account` may hold them.  Changes nothing.

        Raises:
            PoolExhausted: they cannot; the message has the arithmetic so far.
            QuotaExceeded: it may not; the message has the arithmetic so far.
        """
        if self.quotas.any_limit:
            kept = 0 if match is None else match.num_unprotected()
            self.quotas.admit(account, need + kept)
        short = need - self.pool.num_free
        if short > 0 and short > (room := self.num_obtainable(match)):
            forgotten = self.tree.forgotten_evictable
            free = self.pool.num_free + min(forgotten, max(0, room))
            evictable = max(0, room - forgotten)
            raise PoolExhausted(
                f"needs {many(need, 'block')}; {free:,} free, {evictable:,} evictable"
            )
        if need and self.aside.total and self.aside.used(account.tenant):
            self._refuse_beyond_share(account.tenant, need)

    def plan(
        self, match: Match, num_blocks: int, account: Account, min_partial: int = 0
    ) -> tuple[int, BlockId | None]:
        """Say how many blocks a sequence of `num_blocks` needs of its own, and which one it copies.

        Changes nothing.  No block is copied if partial reuse is off, for fewer than `min_partial`
        tokens, or if there is no room for what is copied and for the copy.

        Raises:
            PoolExhausted, QuotaExceeded: see `admit`.
        """
        need = num_blocks - match.end // self._width
        self.admit(need, account, match)
        source = match.partial_block
        if source is None or self._partial is Partial.OFF or match.partial_tokens < min_partial:
            return need, None
        short = need - self.pool.num_free
        if short > 0 and short > self.num_obtainable(match) - 1:
            return need, None
        return need, source

    def plan_segments(self, found: Found, num_blocks: int, account: Account) -> int | None:
        """Say how many blocks of its own a sequence needs that takes segments; None: it may not.

        Changes nothing.  Nothing that it reads is evicted for it, and not very much else at once.
        """
        need = num_blocks - found.num_in_place // self._width
        held = len(found.donors) + (found.source is not None)
        short = need - self.pool.num_free
        if short > 0 and short > min(self.num_obtainable(found.kept) - held, MOST_EVICTED):
            return None
        try:
            self.admit(need, account, found.kept)
        except PoolExhausted:
            return None
        return need

    def _refuse_beyond_share(self, tenant: str, need: int) -> None:
        """Lend nothing to a tenant whose quarantined blocks are its part of the pool already."""
        try:
            self.aside.check(tenant, need)
        except PoolExhausted as full:
            raise QuotaExceeded(
                f"needs {many(need, 'block')}; {full} They come back when the processes that may "
                "still write to them have ended"
            ) from None

    def obtain(self, need: int, tenant: str = "") -> BlockTable:
        """Take blocks that were admitted, evicting as many as are lacking.

        What another tenant has used is wiped before this one may read it.
        """
        pool = self.pool
        if self.hauls is not None and need > pool.num_free:
            self.hauls.abandon(need - pool.num_free)
        while (short := need - pool.num_free) > 0:
            evicted = self.tree.evict(short)
            if not evicted:
                raise AssertionError(f"admitted {need} blocks, and {short} cannot be had")
            pool.release(evicted)
        if self.last_tenant.wipe is None:
            return pool.allocate(need)
        num_used = pool.num_used
        blocks = pool.allocate(need)
        self.last_tenant.assign(blocks, tenant, num_used)
        return blocks

    def count_private(self, lease: Lease) -> None:
        """Tell a lease's account how many blocks it owns now; its table has changed.  O(1)."""
        if lease.table_bytes or len(lease.table) >= LARGE_TABLE:
            self._count_table(lease)
        private = len(lease.table) - lease.private_from + len(lease.duplicates)
        if more := private - lease.num_private:
            lease.num_private = private
            account = lease.account
            account.private += more
            if (tenant := account.above) is not None:
                tenant.private += more

    def _count_table(self, lease: Lease, *, ended: bool = False) -> None:
        """Count what a lease's table takes now."""
        num_blocks = 0 if ended else len(lease.table)
        size = num_blocks * (SHARED_TABLE if lease.shares_table else OWN_TABLE)
        more = (size if num_blocks >= LARGE_TABLE else 0) - lease.table_bytes
        lease.table_bytes += more
        if more > 0:
            self._tables.add(lease.namespace.tenant, more)
        elif more:
            self._tables.remove(lease.namespace.tenant, -more)

    # ------------------------------------------------------------------ a lease's blocks

    def allocate(
        self, lease: Lease, match: Match, node: Node, need: int, source: BlockId | None
    ) -> tuple[Copy, ...]:
        """Give a new lease its table: the locked prefix and `need` blocks of its own.

        Returns:
            The copy to make first, if part of a block is reused.
        """
        if source is not None:
            self.pool.add_ref(source)
        if self.hauls is not None:
            self.hauls.note_need(need)
        fresh = self.obtain(need, lease.namespace.tenant)
        table = node.table()
        lease.private_from = len(table)
        table += fresh
        lease.table = table
        self.count_private(lease)
        lease.start = lease.committed = match.end // TOKEN_BYTES
        if source is None:
            return ()
        lease.source = source
        lease.committed += match.partial_tokens
        return (Copy(source, BlockId(fresh[0]), match.partial_tokens),)

    def allocate_segments(
        self, lease: Lease, found: Found, match: Match, node: Node, need: int
    ) -> tuple[Copy, ...]:
        """Give a new lease its table, and hold what its segments are moved from.

        Returns:
            The copy to make first, if part of a block is reused.
        """
        if found.donors:
            self.pool.add_refs(found.donors)
            lease.donors = found.donors
        if found.is_beside:
            return self.allocate(lease, match, node, need, found.source)
        if found.source is not None:
            self.pool.add_ref(found.source)
        self.allocate(lease, match, node, need, None)
        if found.source is None:
            return ()
        lease.source = found.source
        at = found.kept.end // self._width
        return (Copy(found.source, BlockId(lease.table[at]), found.num_source),)

    def commit(self, lease: Lease, num_tokens: int) -> int:
        """Index a lease's blocks up to `num_tokens`.  O(new tokens + nodes passed).

        Returns:
            Blocks that became visible, the tail included: none, if the namespace was reset.
        """
        if lease.tail is not None:
            self.tree.remove_tail(lease.tail)
            lease.tail = None
            lease.private_from -= 1
        at = lease.start // self.block_size
        whole = num_tokens // self.block_size - at
        indexed = 0
        if whole:
            cut = whole * self._width
            grown = self.tree.insert(lease.node, lease.rest[:cut], lease.table[at : at + whole])
            lease.node = grown.node
            lease.start += whole * self.block_size
            lease.rest = lease.rest[cut:]
            lease.duplicates.extend(range(at, at + grown.num_existing))
            lease.private_from = at + whole
            indexed = grown.num_indexed
            if grown.absorbed:
                self.pool.release(array("i", grown.absorbed))
        left = (num_tokens - lease.start) * TOKEN_BYTES
        if left and self._partial is Partial.TAILS:
            last = lease.private_from
            block = lease.table[last : last + 1]
            lease.tail, absorbed = self.tree.insert_tail(lease.node, lease.rest[:left], block)
            if absorbed:
                self.pool.release(array("i", absorbed))
            if lease.tail is not None:
                lease.private_from = last + 1
                indexed += 1
        lease.committed = num_tokens
        return 0 if lease.root.retired else indexed

    def blocks_missing(self, lease: Lease, num_tokens: int) -> int:
        """Count the blocks that room for `num_tokens` tokens takes.  Changes nothing.

        Raises:
            InvalidRequest: the pool can never hold them.
        """
        unshare = lease.tail_is_shared and num_tokens > lease.committed
        return max(0, self.blocks_for(num_tokens) - len(lease.table)) + unshare

    def extend(self, lease: Lease, num_tokens: int) -> TableUpdate:
        """Give a lease room for `num_tokens` tokens, as admitted; unshare its last block."""
        unshare = lease.tail_is_shared and num_tokens > lease.committed
        fresh = self.obtain(self.blocks_missing(lease, num_tokens), lease.namespace.tenant)
        keep = len(lease.table) - unshare
        copies: tuple[Copy, ...] = ()
        table = lease.own_table() if fresh else lease.table
        if unshare:
            lease.source = BlockId(table.pop())  # held since the fork
            lease.tail_is_shared = False
            lease.private_from = keep
            shared_tokens = lease.committed - lease.start
            copies = (Copy(lease.source, BlockId(fresh[0]), shared_tokens),)
        table.extend(fresh)
        return TableUpdate(keep, fresh, copies)

    def shared_table(self, lease: Lease) -> BlockTable:
        """Give the table of every fork of `lease`: the blocks of its committed tokens."""
        table = lease.node.table()
        if lease.committed > lease.start:
            table.append(lease.table[len(table)])
        return table

    def fork(self, lease: Lease, child: Lease, table: BlockTable) -> None:
        """Let a new lease share every committed block of `lease`.  Allocates nothing.

        Args:
            lease: Whose.
            child: The new one.
            table: The table of all that are forked with it, kept, not copied.
        """
        tail_bytes = (lease.committed - lease.start) * TOKEN_BYTES
        child.start, child.committed = lease.start, lease.committed
        child.rest = lease.rest[:tail_bytes]
        child.table, child.shares_table = table, True
        child.private_from = len(table)
        if len(table) >= LARGE_TABLE:
            self._count_table(child)
        if tail_bytes:
            self.pool.add_ref(BlockId(table[-1]))
            child.tail_is_shared = True

    def truncate(self, lease: Lease, num_tokens: int) -> TableUpdate:
        """Roll a lease back to `num_tokens` tokens; see `PrefixCache.truncate`."""
        if num_tokens >= lease.committed:
            lease.rest = lease.rest[: (num_tokens - lease.start) * TOKEN_BYTES]
            return TableUpdate(len(lease.table), array("i"))
        keep, left = divmod(num_tokens, self.block_size)
        if lease.tail_is_shared and num_tokens > lease.start:
            lease.rest = lease.rest[: left * TOKEN_BYTES]
            lease.committed = num_tokens
            return TableUpdate(len(lease.table), array("i"))
        owned = array("i", [lease.table[i] for i in lease.duplicates if i >= keep])
        owned.extend(lease.table[lease.private_from :])
        cut = BlockId(lease.table[keep]) if left else None
        goes_on_in_place = cut in owned and cut not in self.pool.refs
        # What a fork still reads is no room to write into.
        shared = array("i", [b for b in owned if b in self.pool.refs and b != cut])
        for block in shared:
            owned.remove(block)
        copies: tuple[Copy, ...] = ()
        if cut is not None and goes_on_in_place:
            owned.remove(cut)
            owned.insert(0, cut)
        elif cut is not None:
            # Others read the block in which the lease goes on: it goes on in a copy.
            is_ours = cut in owned
            if len(owned) == is_ours:
                self.admit(1, lease.account)
                owned.extend(self.obtain(1, lease.namespace.tenant))
            if is_ours:
                owned.remove(cut)  # ours so far; from now on held as the copy's source
            else:
                self.pool.add_ref(cut)
            self.release_copy_source(lease)
            lease.source = cut
            copies = (Copy(cut, BlockId(owned[0]), left),)
        self.pool.release(shared)
        if lease.tail_is_shared:
            lease.tail_is_shared = False
            self.pool.release(array("i", [lease.own_table().pop()]))
        if not copies and keep * self.block_size < lease.start:
            self.release_copy_source(lease)  # the block it was copied to is given up
        self._step_back(lease, keep, left)
        table = lease.own_table()
        del table[keep:]
        table.extend(owned)
        lease.private_from = keep
        lease.duplicates = [i for i in lease.duplicates if i < keep]
        lease.committed = num_tokens
        return TableUpdate(keep, owned, copies)

    def _step_back(self, lease: Lease, keep: int, left: int) -> None:
        """Move a lease's lock up to the end of its first `keep` blocks; its tail stays cached."""
        if lease.tail is not None:
            self._settle_tail(lease.tail)
            if (absorbed := self.tree.leave_tail(lease.tail)) is not None:
                self.pool.release(absorbed)
            lease.tail = None
        start = keep * self.block_size
        if start < lease.copied_at:
            lease.copied = None  # what was made of the copy is given up
        if start < lease.start:
            match, after = self.tree.place(
                lease.node, lease.start * TOKEN_BYTES, start * TOKEN_BYTES
            )
            node = self.tree.lock(match)
            self._unlock(lease.node)
            lease.node, lease.start, lease.rest = node, start, after
        lease.rest = lease.rest[: left * TOKEN_BYTES]

    def free(self, lease: Lease, *, writes_on: bool) -> tuple[int, int]:
        """End what a lease holds.  O(its own blocks + nodes that become unprotected).

        Args:
            lease: The lease; it must not be used afterwards.
            writes_on: Whether its worker may still write: then all it could write to is set aside.

        Returns:
            How many blocks became free, and how many are quarantined.
        """
        free_before = self.pool.num_free + self.tree.forgotten_evictable
        if lease.source is not None or lease.donors:
            self.release_copy_source(lease)
        private = lease.private_blocks()
        if lease.tail_is_shared:
            self.pool.release(lease.table[-1:])  # nothing of its own comes after it
        if writes_on and lease.tail is not None:
            self.tree.remove_tail(lease.tail)
            private.append(lease.table[lease.private_from - 1])
            lease.tail = None
        if lease.tail is not None:
            self._settle_tail(lease.tail)
        copied = lease.copied
        if copied is not None and copied.parent is None and copied.tokens is lease.copied_tokens:
            copied = None  # it is gone, most often into what the lease itself has stored
        if copied is not None or (lease.tail is None and lease.committed > lease.start):
            self._use_parts(lease, copied)
        self._unlock(lease.node, lease.tail)
        quarantined = 0
        if private and writes_on:
            quarantined = self.pool.quarantine(lease.worker, lease.id, private)
            self._set_aside(lease, quarantined)
        elif private:
            self.pool.release(private)
        if lease.num_private:
            lease.private_from, lease.duplicates = len(lease.table), []
            self.count_private(lease)
        if lease.table_bytes:
            self._count_table(lease, ended=True)
        return self.pool.num_free + self.tree.forgotten_evictable - free_before, quarantined

    def _use_parts(self, lease: Lease, copied: Node | None) -> None:
        """Count the block that a lease copied from as used, and one that covers its tail."""
        tree, cover = self.tree, None
        is_whole = copied is not None and copied.tokens is lease.copied_tokens
        if copied is not None and is_whole and not copied.blocks:
            copied = None  # it was evicted
        elif copied is not None and (copied.lock_ref or not is_whole):
            # It was split or joined, or may be on the lease's own path.
            at = lease.copied_at * TOKEN_BYTES
            copied = tree.after(lease.node, lease.start * TOKEN_BYTES, at, lease.copied_tokens)
        is_own = lease.committed > max(lease.start, lease.computed_from)
        if is_own and lease.tail is None and self._partial is Partial.TAILS:
            left = (lease.committed - lease.start) * TOKEN_BYTES
            cover = tree.cover(lease.node, lease.rest[:left])
        if copied is not None and copied is not cover:
            tree.use(copied, lease.num_copied)
        if cover is not None:
            tree.use(cover)

    def _set_aside(self, lease: Lease, count: int) -> None:
        """Count quarantined blocks as held by who held them."""
        if count:
            self._aside.setdefault(lease.worker, {})[lease.id] = lease.account
            lease.account.count_quarantined(count)
            self.aside.force(lease.account.tenant, count)

    def release_quarantine(self, worker: WorkerId, lease: LeaseId | None = None) -> int:
        """Free the blocks that were set aside for a worker that can no longer write.

        Args:
            worker: Which.
            lease: Only those of one of its leases: it writes on, but not there.

        Returns:
            How many became free.
        """
        counts = self.pool.count_quarantined_leases(worker, lease)
        aside = self._aside.get(worker, {})
        for one, count in counts.items():
            if (account := aside.pop(one, None)) is not None:  # else of an earlier life
                account.count_quarantined(-count)
                self.aside.give(account.tenant, count)
        if not aside:
            self._aside.pop(worker, None)
        return self.pool.release_quarantine(worker, lease)

    def _settle_tail(self, tail: Node) -> None:
        """Note that a lease will not write to its indexed tail any more."""
        if self.pool.write_listener is not None:
            self.pool.write_listener.ended(tail.blocks[-1:])

    def _unlock(self, node: Node, tail: Node | None = None) -> None:
        absorbed = self.tree.unlock(node, tail)
        if absorbed:
            self.pool.release(absorbed)

    def release_copy_source(self, lease: Lease) -> None:
        """Let go of what a lease's copies read."""
        if lease.source is not None:
            self.pool.release_one(lease.source)
            lease.source = None
        if lease.donors:
            self.pool.release(lease.donors)
            lease.donors = _NO_BLOCKS
            if lease.base is not None:
                self._unlock(lease.base)
                lease.base = None
