"""LeaseTable: a worker's right to a set of blocks until a deadline.

```
tokens   0 ──────────── start ──────── committed ──────── num_tokens ─────── len(table)·block_size
         whole blocks in the tree,    │ the tail: ours,  │ known, not yet   │ room
         protected by a lock on `node`│ perhaps indexed  │ computed         │
```

A lease owns the blocks of its table from `private_from` on, and those at the indices `duplicates`:
blocks it computed although somebody else had indexed the same tokens first.  All others belong to
the tree.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from prefixcache.core.account import Account
from prefixcache.core.ledger import Begun
from prefixcache.core.node import Node, Root
from prefixcache.core.shares import Shares
from prefixcache.errors import LeaseExpired, NotFound, PoolExhausted, QuotaExceeded
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    BlockId,
    BlockTable,
    Grant,
    LeaseId,
    Namespace,
    WorkerId,
)

_REMEMBERED_ENDS = 256
"""Of one worker's leases."""
_SPARE_DEADLINES = 4096
_DROPPED = 512
"""Deadlines of leases that have ended, which are dropped in one go."""
_REMEMBERED_REQUESTS = 256
"""Of each worker: those that may be interrupted at the same time, and come again."""
_SHOWN_BYTES = 16 * TOKEN_BYTES
_NO_BLOCKS: BlockTable = array("i")
"""The table of a lease that has still to be given one; never changed."""


class Lease:
    """One lease.  Plain state; `PrefixCache` is the only one that changes it."""

    __slots__ = (
        "account",
        "asked",
        "base",
        "committed",
        "computed_from",
        "copied",
        "copied_at",
        "copied_tokens",
        "deadline",
        "donors",
        "duplicates",
        "flight",
        "grant",
        "id",
        "namespace",
        "node",
        "num_cached",
        "num_copied",
        "num_private",
        "private_from",
        "request_id",
        "rest",
        "root",
        "serial",
        "shares_table",
        "since",
        "source",
        "start",
        "stored",
        "table",
        "table_bytes",
        "tail",
        "tail_is_shared",
        "worker",
    )

    def __init__(
        self,
        lease: LeaseId,
        serial: int,
        worker: WorkerId,
        root: Root,
        node: Node,
        since: float,
        deadline: float,
    ) -> None:
        self.id = lease
        """What its worker calls it; only with the worker is it a name."""
        self.serial = serial
        """What it is called in here: greater than those of all that were granted before."""
        self.worker = worker
        self.since = since
        self.deadline = deadline
        self.node = node
        """Locked; ends where the lease's whole indexed blocks end."""
        self.root = root
        """Of its namespace; the same as long as it lives."""
        self.namespace = root.namespace
        self.account: Account = root.account  # type: ignore[assignment]
        """Who answers for what it holds."""
        self.table_bytes = 0
        """What its table takes, as that is counted: nothing, if it is short."""
        self.num_private = 0
        """Its own blocks, as its account has counted them."""
        self.start = 0
        """Tokens up to the end of `node`; a multiple of the block size."""
        self.rest = b""
        """Packed tokens from `start` on."""
        self.committed = 0
        """Tokens from position 0 that hold valid KV."""
        self.computed_from = 0
        """Tokens that were there already when its request first came; the others are its own."""
        self.num_cached = 0
        """Tokens that were there when it was granted."""
        self.stored = 0
        """Blocks of its prefix that were handed on to be stored for other machines."""
        self.table: BlockTable = _NO_BLOCKS
        self.shares_table = False
        """Whether that very array is others' too: those of one fork share it until they differ."""
        self.private_from = 0
        """Index in the table from which all blocks are the lease's own."""
        self.duplicates: list[int] = []
        self.tail: Node | None = None
        """The leaf that shows this lease's partly filled block to others; locked."""
        self.tail_is_shared = False
        """After a fork: the last block is shared, and copied before the first write."""
        self.copied: Node | None = None
        """The block that a copy read, which counts as used when the lease ends …"""
        self.copied_tokens = b""
        """… what it holds, …"""
        self.copied_at = 0
        """… the index of the first of them …"""
        self.num_copied = 0
        """… and how many of them were copied."""
        self.source: BlockId | None = None
        """The block that a copy reads; held until the first commit."""
        self.donors: BlockTable = _NO_BLOCKS
        """The blocks that segments are moved from, each once; held as long."""
        self.base: Node | None = None
        """Where the exact prefix ends that is copied along with them; locked as long."""
        self.flight: bytes | None = None
        """The prompt, while others may wait for it."""
        self.grant: Grant | None = None
        self.request_id = ""
        self.asked = 0
        """Digest of what that request asked for."""

    def begun(self) -> Begun | None:
        """Say what its request has computed itself so far; None if nothing.  O(1)."""
        if self.committed <= self.computed_from:
            return None
        at = (self.committed - self.start) * TOKEN_BYTES
        last = (self.node.tokens[-_SHOWN_BYTES:] + self.rest[:at])[-_SHOWN_BYTES:]
        return Begun(self.namespace, self.computed_from, self.committed, last)

    def prefix(self, num_bytes: int) -> bytes:
        """Give its first tokens, packed.  O(tokens), a copy."""
        parts, node = [self.rest], self.node
        while node.parent is not None:
            parts.append(node.tokens)
            node = node.parent
        return b"".join(reversed(parts))[:num_bytes]

    @property
    def num_tokens(self) -> int:
        """Tokens the lease knows: computed, and to be computed."""
        return self.start + len(self.rest) // TOKEN_BYTES

    def count_private(self) -> int:
        """Count the blocks that the lease owns.  O(1)."""
        return len(self.table) - self.private_from + len(self.duplicates)

    def own_table(self) -> BlockTable:
        """Give the table to be changed: a copy of what was shared until now.  O(blocks) once."""
        if self.shares_table:
            self.table = self.table[:]
            self.shares_table = False
        return self.table

    def private_blocks(self) -> BlockTable:
        """Give the blocks that the lease owns."""
        private = self.table[self.private_from :]
        if self.duplicates:
            private.extend(self.table[index] for index in self.duplicates)
        return private


@dataclass(slots=True)
class Worker:
    """One attached worker."""

    id: WorkerId
    name: str
    """What people are shown; it decides nothing."""
    namespaces: set[Namespace] = field(default_factory=set)
    leases: dict[LeaseId, Lease] = field(default_factory=dict)
    first_lease: int = 1
    """Number of its first lease; the next ones follow it, so that they tell nothing of others."""
    num_granted: int = 0
    """Leases that it was ever granted."""
    expired: OrderedDict[LeaseId, tuple[float, int]] = field(default_factory=OrderedDict)
    """When its last leases ended that it did not end itself, and with how many blocks."""
    requests: dict[str, Lease] = field(default_factory=dict)
    """Living leases by request id, so that an acquire can be repeated safely."""
    begun: OrderedDict[str, Begun] = field(default_factory=OrderedDict)
    """What requests had computed whose leases ended lately, by request id."""

    def was_granted(self, lease: LeaseId) -> bool:
        """Whether a lease is, or ever was, one of its own.  O(1)."""
        return 0 <= lease - self.first_lease < self.num_granted

    def remember(self, request_id: str, begun: Begun) -> None:
        """Let a request that comes again be told apart.  O(1)."""
        self.begun[request_id] = begun
        if len(self.begun) > _REMEMBERED_REQUESTS:
            self.begun.popitem(last=False)

    renewed_until: float = 0.0
    is_gone: bool | None = None
    """Once it leaves: whether it can no longer write to the pool."""
    ending: list[Lease] = field(default_factory=list)
    """Once it leaves: its leases that have still to be ended, the oldest last."""


class KeptBytes:
    """What is kept of one kind for who has leases or waits, by tenant: `limit` bytes in all.

    Every method but `set_tenants` is O(1).

    Args:
        limit: How many there may be.
        room: What that is called.
        noun: What is counted.
    """

    __slots__ = ("_limit", "_noun", "_of_tenants", "_room", "_shares", "total")

    def __init__(self, limit: int, room: str, noun: str) -> None:
        self._limit = limit
        self._room = room
        self._noun = noun
        self._shares: Shares | None = None
        """Whose they are, where a part is kept for each tenant."""
        self._of_tenants: dict[str, int] = {}
        self.total = 0

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of the limit is kept; by default for nobody.  O(tenants)."""
        self._shares = Shares.between(
            tenants, self._limit, self._room, self._noun, self._of_tenants
        )

    def admit(self, tenant: str, num_bytes: int) -> None:
        """Check that so many bytes more may be kept for a tenant.  Changes nothing.

        Raises:
            PoolExhausted: they may not; the message has the numbers.
        """
        if self._shares is not None:
            self._shares.check(tenant, num_bytes)
        elif self.total + num_bytes > self._limit:
            raise PoolExhausted(
                f"{self.total:,} {self._noun}, and {num_bytes:,} more are asked for; {self._room} "
                f"allows {self._limit:,}"
            )

    def add(self, tenant: str, num_bytes: int) -> None:
        """Count what is kept from now on."""
        self.total += num_bytes
        self._of_tenants[tenant] = self._of_tenants.get(tenant, 0) + num_bytes
        if self._shares is not None:
            self._shares.force(tenant, num_bytes)

    def remove(self, tenant: str, num_bytes: int) -> None:
        """Count what is kept no more."""
        self.total -= num_bytes
        left = self._of_tenants[tenant] = self._of_tenants[tenant] - num_bytes
        if not left:
            del self._of_tenants[tenant]
        if self._shares is not None:
            self._shares.give(tenant, num_bytes)

    def check(self, kept: Mapping[str, int]) -> None:
        """Assert that the counts are those of what is kept.  O(tenants)."""
        assert self._of_tenants == kept, f"{self._noun}: {self._of_tenants}, not {kept}"
        assert self.total == sum(kept.values()), f"{self.total} {self._noun}"
        if self._shares is not None:
            self._shares.check_counts()
            assert self._shares.total == self.total, f"{self._shares.total} bytes in shares"


class LeaseTable:
    """The living leases, by id, by worker, and by deadline; and how the last ones ended.

    Deadlines are ordered by deadline, whatever the order of granting: a heap with lazily corrected
    entries.  A renewal of all leases of a worker is one assignment.
    """

    __slots__ = (
        "_deadlines",
        "_next",
        "_of_tenants",
        "_shares",
        "by_age",
        "leaving",
        "max_leases",
        "ttl_s",
        "workers",
    )

    def __init__(self, ttl_s: float, max_leases: int) -> None:
        self.ttl_s = ttl_s
        self.max_leases = max_leases
        self._shares: Shares | None = None
        """Whose they are, where a part is kept for each tenant."""
        self.by_age: OrderedDict[int, Lease] = OrderedDict()
        """By serial number, oldest first."""
        self._of_tenants: dict[str, OrderedDict[int, Lease]] = {}
        self.workers: dict[WorkerId, Worker] = {}
        self.leaving: OrderedDict[WorkerId, Worker] = OrderedDict()
        """Of the workers, those that may do nothing any more, while their leases are ended."""
        self._deadlines: list[tuple[float, int]] = []
        """With serials: what has ended is in no way kept."""
        self._next = 0

    @property
    def num_opened(self) -> int:
        """Leases since the start.  O(1)."""
        return self._next

    @property
    def count(self) -> int:
        """Living leases.  O(1)."""
        return len(self.by_age)

    def worker(self, worker: WorkerId, namespace: Namespace | None = None) -> Worker:
        """Give an attached worker.

        Raises:
            NotFound: it is not attached (to that namespace).
        """
        member = self.workers.get(worker)
        if member is None or member.is_gone is not None:
            raise NotFound("this worker is not attached; attach first")
        if namespace is not None and namespace not in member.namespaces:
            raise NotFound(
                f"worker {member.name!r} is not attached to {namespace}; attach to it first"
            )
        return member

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of the limit is kept; by default for nobody.  O(tenants)."""
        used = {tenant: len(leases) for tenant, leases in self._of_tenants.items()}
        self._shares = Shares.between(tenants, self.max_leases, "--max-leases", "leases", used)

    def admit(self, tenant: str, count: int = 1) -> None:
        """Check that a tenant may have `count` more leases.  Changes nothing.

        Raises:
            PoolExhausted: there are too many.
            QuotaExceeded: it has too many of them.
        """
        if len(self.by_age) + count > self.max_leases:
            raise PoolExhausted(
                f"{many(len(self.by_age), 'lease', 'are')} out and {count:,} more asked for; "
                f"--max-leases allows {self.max_leases:,}",
                self.ttl_s,
            )
        if self._shares is not None:
            try:
                self._shares.check(tenant, count)
            except PoolExhausted as full:  # it is the part of others that is free
                raise QuotaExceeded(str(full), self.ttl_s) from None

    def open(self, member: Worker, root: Root, node: Node, now: float) -> Lease:
        """Make a lease, which has no table yet.  O(log leases)."""
        lease_id = LeaseId(member.first_lease + member.num_granted)
        member.num_granted += 1
        serial = self._next = self._next + 1
        deadline = now + self.ttl_s
        lease = Lease(lease_id, serial, member.id, root, node, now, deadline)
        member.leases[lease_id] = lease
        root.num_leases += 1
        self.by_age[serial] = lease
        tenant = root.namespace.tenant
        mine = self._of_tenants.get(tenant)
        if mine is None:
            mine = self._of_tenants[tenant] = OrderedDict()
        mine[serial] = lease
        if self._shares is not None:
            self._shares.force(tenant)
        heappush(self._deadlines, (deadline, serial))
        if len(self._deadlines) > 2 * len(self.by_age) + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.by_age]
            heapify(self._deadlines)
        return lease

    def get(self, worker: WorkerId, lease: LeaseId, now: float) -> Lease:
        """Give a living lease of that worker, and renew it.  O(1).

        Raises:
            NotFound: there is no such lease, or it is another worker's.
            LeaseExpired: it has ended; the message says how long ago.
        """
        member = self.worker(worker)
        found = member.leases.get(lease)
        if found is not None:
            if found.deadline < now + self.ttl_s:
                found.deadline = now + self.ttl_s
            return found
        if not member.was_granted(lease):
            raise NotFound(f"no lease {lease} of worker {member.name!r}")
        end = member.expired.get(lease)
        if end is None:
            raise LeaseExpired(f"lease {lease} was released, or ended long ago; acquire again")
        expired_at, quarantined = end
        raise LeaseExpired(
            f"lease {lease} expired {now - expired_at:.1f} s ago; "
            f"its {quarantined} unpublished blocks were quarantined, until it is released. "
            "Acquire again."
        )

    def close(self, lease: Lease, expired_at: float | None, quarantined: int) -> None:
        """Forget a lease, but for how it ended."""
        member = self.workers[lease.worker]
        del member.leases[lease.id]
        lease.root.num_leases -= 1
        del self.by_age[lease.serial]
        mine = self._of_tenants[lease.namespace.tenant]
        del mine[lease.serial]
        if not mine:
            del self._of_tenants[lease.namespace.tenant]
        if self._shares is not None:
            self._shares.give(lease.namespace.tenant)
        if lease.request_id:
            member.requests.pop(lease.request_id, None)
        if expired_at is not None:
            member.expired[lease.id] = (expired_at, quarantined)
            if len(member.expired) > _REMEMBERED_ENDS:
                member.expired.popitem(last=False)

    def begin_to_leave(self, member: Worker, *, gone: bool) -> None:
        """Let a worker do nothing any more; its leases are ended one by one.  O(its leases)."""
        member.is_gone = gone
        member.ending = list(reversed(member.leases.values()))
        self.leaving[member.id] = member

    def leave(self, member: Worker) -> None:
        """Forget a worker that leaves and has no lease any more."""
        del self.leaving[member.id], self.workers[member.id]

    def due(self, now: float, most: float) -> list[Lease]:
        """Give leases whose deadline has passed.

        O(log leases) for each of up to `most` that are looked at: `next_deadline` tells of others.
        """
        heap, found = self._deadlines, []
        while heap and heap[0][0] < now and most > 0:
            most -= 1
            serial = heappop(heap)[1]
            if (lease := self.by_age.get(serial)) is None:
                continue
            deadline = self.ends_at(lease)
            if deadline < now:
                found.append(lease)
            else:
                heappush(heap, (deadline, serial))
        return found

    def next_deadline(self) -> float | None:
        """Give a time before which no lease ends by itself; None if there are none.

        Of those that have ended, few are dropped in one go: then the time is too early.
        """
        heap = self._deadlines
        for _ in range(_DROPPED):
            if not heap or heap[0][1] in self.by_age:
                break
            heappop(heap)
        return heap[0][0] if heap else None

    def all(self) -> list[Lease]:
        """Give all living leases, oldest first."""
        return list(self.by_age.values())

    def of_tenant(self, tenant: str) -> OrderedDict[int, Lease]:
        """Give the living leases of a tenant, by serial number, oldest first.  O(1)."""
        return self._of_tenants.get(tenant) or OrderedDict()

    def ends_at(self, lease: Lease) -> float:
        """Give the deadline, renewals of its worker included."""
        return max(lease.deadline, self.workers[lease.worker].renewed_until)

    def lives(self, lease: Lease) -> bool:
        """Whether it has not ended.  O(1)."""
        return self.by_age.get(lease.serial) is lease
