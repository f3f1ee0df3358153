"""PrefixCache: all verbs.  Each is one atomic, synchronous step; a failed one changes nothing.

| verbs | of whom |
|---|---|
| attach, quit, renew, detach, worker_gone | workers |
| acquire, commit, extend, fork, truncate, release; take_outcomes, cancel, expire | requests |
| reset, pin, unpin, quota, rank, retain | who runs the machine |
| lookup, explain, outline, snapshot, counts, check | who looks |

```
acquire ─► commit … ─► extend / commit … ─► release
   │          └ visible to all     │           └ stays cached until evicted
   └ or Waiting: for a prefix that └ or Waiting: for room
     another lease computes, or for room
```

The service, the client's contract tests and the experiments all run this very class.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Collection, Generator, Iterable, Sequence
from itertools import islice
from math import inf
from typing import TYPE_CHECKING

from prefixcache.core import bulk_load, explain, introspect, invariants, stats
from prefixcache.core.block_keys import BlockKeys, Generations
from prefixcache.core.block_manager import LARGE_TABLE, SHARED_TABLE
from prefixcache.core.block_pool import BlockPool, Wipe, WriteListener
from prefixcache.core.found import Remains
from prefixcache.core.hauls import NEVER, Haul, TierSizes
from prefixcache.core.kv_events import ExactOnly, IndexListener, IndexListeners, Replay
from prefixcache.core.lease import Worker
from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Root, blocks_below
from prefixcache.core.oplog import COMMITTED, RESET, TRUNCATED, Put
from prefixcache.core.policies import policy_named
from prefixcache.core.policies.priority import HIGHEST, LOWEST, Priority
from prefixcache.core.protection import ProtectedQueue
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.remote import Question, QuestionId
from prefixcache.core.rolling_index import RollingIndex
from prefixcache.core.segments import Segments, beside, check_again
from prefixcache.core.stats import FlightInfo, SeriesCounts
from prefixcache.core.tiers import PlaceListener
from prefixcache.core.wait_queue import Extension, Request
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    NotFound,
    PoolExhausted,
    QuotaExceeded,
    Unsupported,
)
from prefixcache.outline import Order, Outline
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    Again,
    BlockTable,
    Checked,
    Committed,
    Counts,
    Ended,
    Explanation,
    Grant,
    HaulId,
    HoldingInfo,
    LeaseId,
    LeaseInfo,
    Lookup,
    Namespace,
    Partial,
    Pinned,
    QuotaInfo,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TicketId,
    Unpinned,
    Waiting,
    WorkerId,
)

if TYPE_CHECKING:
    from prefixcache.types import LeaseId, Namespace, WorkerId


_LOOKED_AT = 16
_NO_TIERS = TierSizes()


class PrefixCache:
    """Which blocks hold which prefix, and who may use them.

    Pure: no clock, no I/O, no thread.  `now` is any clock in seconds that never goes back.

    Args:
        num_blocks: Blocks that can be lent.
        block_size: Tokens per block: a power of two, 1 to 1024.
        policy: Order of eviction, by name.
        partial: How much of a partly matching block is reused.
        num_ghosts: Evicted blocks to remember; if not given, what the policy asks for: for most, as
            many as the pool has.
        ttl_s: How long a lease lives without a sign of life.
        max_pinned: Blocks that may be pinned at the same time; by default a quarter.
        max_line: Requests that may wait for room at the same time.
        max_leases: Leases that may be out at the same time.
        max_namespaces: Namespaces that there may be at the same time: where there are more, the
            next one takes the place of one that is only cached.
        max_prompt_bytes: What the prompts may take that wait or are being computed: each is kept
            whole until its last token is committed, however much of it is shared.
        max_table_bytes: What the block tables of leases may take: a lease has the ids of all blocks
            of its prompt, however many others read the same blocks.
        history_bytes: What may be remembered for people, for `explain` and the stats, of requests
            that are over.  It decides nothing: experiments, which only count, do with 0.
        first_block: The id of the first block: what is below it is memory that nobody is ever lent.
        segments_secret: At least 16 bytes that nobody else knows: keep an index of all whole
            blocks, in which requests that ask for segments find tokens at other places.  By
            default none is kept, and such requests are refused.
        tiers: What there is below the pool: evicted blocks go there, once `set_porter` has said
            that somebody moves them.

    Raises:
        InvalidRequest: an argument is out of range.

    >>> from prefixcache.types import Ledger, Namespace, WorkerId, pack
    >>> cache, me, space = PrefixCache(64, 4), WorkerId(1), Namespace("tiny-model")
    >>> cache.attach(me, space, now=0.0)
    >>> first = cache.acquire(me, space, pack(range(10)), now=0.0)
    >>> cache.commit(me, first.lease, 10, now=0.1).num_indexed
    3
    >>> cache.release(me, first.lease, now=0.2).num_freed
    0
    >>> cache.acquire(me, space, pack([*range(10), 99]), now=0.3).ledger == Ledger(8, 2, cold=1)
    True
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int = 16,
        *,
        policy: str = "lru",
        partial: Partial = Partial.TAILS,
        num_ghosts: int | None = None,
        ttl_s: float = 30.0,
        max_pinned: int | None = None,
        max_line: int = 4096,
        max_leases: int = 1 << 40,
        max_namespaces: int = 1 << 40,
        max_prompt_bytes: int = 512 << 20,
        max_table_bytes: int = 1 << 30,
        history_bytes: int = 1 << 20,
        first_block: int = 0,
        segments_secret: bytes | None = None,
        tiers: TierSizes = _NO_TIERS,
    ) -> None:
        if num_blocks < 1:
            raise InvalidRequest(f"a pool of {num_blocks} blocks holds nothing; give at least 1")
        if not 1 <= block_size <= 1024 or block_size & (block_size - 1):
            raise InvalidRequest(f"block size {block_size} is not a power of two from 1 to 1024")
        if history_bytes < 0:
            raise InvalidRequest(f"a history of {history_bytes} bytes; give 0 or more")
        if first_block < 0:
            raise InvalidRequest(f"the first block is {first_block}; give 0 or more")
        if tiers.remote < 0:
            raise InvalidRequest(f"a haul of {tiers.remote} blocks to a store; give 0 or more")
        if tiers.below and not (0 < tiers.ahead < num_blocks and tiers.piece > 0):
            raise InvalidRequest(
                f"{tiers}: at least one block is kept free for what goes down, and fewer than the "
                f"pool's {num_blocks:,}; a piece has at least one"
            )
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.partial = Partial(partial)
        order = policy_named(policy, num_blocks)
        tree = RadixTree(
            block_size,
            policy=order,
            num_ghosts=int(order.ghosts * num_blocks) if num_ghosts is None else num_ghosts,
        )
        self._lessor = Lessor(
            tree,
            BlockPool(num_blocks, first_block),
            self.partial,
            ttl_s=ttl_s,
            max_pinned=num_blocks // 4 if max_pinned is None else min(max_pinned, num_blocks),
            max_line=max_line,
            max_leases=max_leases,
            max_namespaces=max_namespaces,
            max_prompt_bytes=max_prompt_bytes,
            max_table_bytes=max_table_bytes,
            history_bytes=history_bytes,
            tiers=tiers,
        )
        if segments_secret is not None:
            index = RollingIndex(first_block + num_blocks, block_size, segments_secret)
            self._lessor.segments = Segments(tree, index, self.partial)
            self.observe(index)

    @property
    def num_indexed(self) -> int:
        """Blocks that the tree holds.  O(1)."""
        return self._lessor.tree.num_blocks

    @property
    def num_leases(self) -> int:
        """Leases that are out.  O(1)."""
        return self._lessor.leases.count

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit is kept; by default for nobody.  O(tenants)."""
        lessor = self._lessor
        lessor.leases.set_tenants(tenants)
        lessor.prompts.set_tenants(tenants)
        lessor.tables.set_tenants(tenants)
        if lessor.hauls is not None:
            lessor.hauls.tier.set_tenants(tenants)
        if lessor.hauls is not None and lessor.hauls.remote is not None:
            lessor.hauls.remote.set_tenants(tenants)
        for shares in (
            lessor.namespaces.shares,
            lessor.waiting.line.shares,
            *lessor.pins.shares,
            lessor.blocks.aside,
        ):
            shares.set_tenants(tenants)

    def make_way(self, namespace: Namespace) -> None:
        """Let a namespace be attached next; see `attach`.

        Raises:
            PoolExhausted: there are too many namespaces, and none that only caches.
        """
        self._lessor.make_way(namespace)

    def count_leases(self, worker: WorkerId) -> int:
        """Give how many leases a worker has out; 0 if it is not attached.  O(1)."""
        member = self._lessor.leases.workers.get(worker)
        return 0 if member is None else len(member.leases)

    def lease_of(self, worker: WorkerId, request_id: str) -> LeaseId | None:
        """Give the living lease that a worker acquired under a request id, if any.  O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        found = self._lessor.leases.worker(worker).requests.get(request_id)
        return None if found is None else found.id

    def uncommitted_since(self, worker: WorkerId) -> float | None:
        """Give when a worker was granted the oldest lease that has tokens to compute; else None.

        Looks at its 16 oldest leases.  O(1).
        """
        member = self._lessor.leases.workers.get(worker)
        oldest = () if member is None else islice(member.leases.values(), _LOOKED_AT)
        return next((one.since for one in oldest if one.committed < one.num_tokens), None)

    def count_quarantined(self, worker: WorkerId) -> int:
        """Give how many blocks are set aside since a worker may still write to them.  O(1)."""
        return self._lessor.blocks.pool.count_quarantined(worker)

    def knows(self, namespace: Namespace) -> bool:
        """Whether anybody has attached it, or it stores something.  O(1)."""
        return namespace in self._lessor.roots

    def namespaces(self) -> list[Namespace]:
        """Give the namespaces that anybody has attached, or that store something."""
        return list(self._lessor.roots)

    # ------------------------------------------------------------------ workers come and go

    def attach(
        self,
        worker: WorkerId,
        namespace: Namespace,
        *,
        now: float,
        name: str = "",
        first_lease: int = 1,
    ) -> None:
        """Let a worker use a namespace.  Idempotent.

        Args:
            worker: Who.
            namespace: What.
            name: How a new worker is called where people look; by default by its number.
            first_lease: Number of a new worker's first lease.  One that nobody expects keeps a
                worker from taking another's lease for its own.
            now: The time.

        Raises:
            PoolExhausted: there are too many namespaces, and none that only caches.
            NotFound: it was detached, and its leases have not all ended yet.
        """
        lessor = self._lessor
        members = lessor.leases.workers
        if worker in lessor.leases.leaving:
            raise NotFound("this worker is leaving: attach again when its leases have ended")
        lessor.make_way(namespace)
        lessor.root(namespace)
        if worker not in members:
            members[worker] = Worker(worker, name or str(worker), first_lease=first_lease)
        if namespace not in members[worker].namespaces:
            members[worker].namespaces.add(namespace)
            lessor.namespaces.join(namespace)
        self.renew(worker, now=now)

    def quit(self, worker: WorkerId, namespace: Namespace) -> None:
        """End a worker's use of one namespace; its leases and waits there go on.  Idempotent.

        O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        spaces = self._lessor.leases.worker(worker).namespaces
        if namespace in spaces:
            spaces.discard(namespace)
            self._lessor.namespaces.leave(namespace)

    def renew(self, worker: WorkerId, *, now: float) -> None:
        """Take a sign of life: all leases of the worker live for another TTL.  O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        self._lessor.leases.worker(worker).renewed_until = now + self._lessor.leases.ttl_s

    @property
    def num_in_line(self) -> int:
        """Count who is first in line for blocks, one for each namespace; but for full quotas.

        O(namespaces in line).
        """
        line = self._lessor.waiting.line
        return sum(not ticket.over_quota for ticket in line.heads()) if line else 0

    def detach(self, worker: WorkerId, *, now: float, gone: bool, most: int | None = None) -> Ended:
        """End a worker's session and its leases; its waiting requests are dropped.

        Args:
            worker: Who leaves.
            now: The time.
            gone: Whether it can no longer write to the pool (it said goodbye, or its process is
                known to be dead).  If not, the blocks it could write to are quarantined until
                `worker_gone`.
            most: How many leases are ended in this step, by default all.  The worker may do nothing
                any more, and `expire` ends the others.

        Returns:
            What was ended in this step.

        Raises:
            NotFound: the worker is not attached.
        """
        lessor = self._lessor
        member = lessor.leases.worker(worker)
        for ticket in lessor.waiting.of(worker):
            lessor.waiting.leave(ticket)
        lessor.leases.begin_to_leave(member, gone=gone)
        limit = inf if most is None else most
        ended = Ended.total(lessor.end_leaving(now, limit))
        lessor.serve(now, inf if most is None else None)
        return ended

    def is_leaving(self, worker: WorkerId | None = None) -> bool:
        """Whether leases of a worker (or of any) that was detached are still out.  O(1)."""
        leaving = self._lessor.leases.leaving
        return bool(leaving) if worker is None else worker in leaving

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """Take note that a worker's process has ended: free all it held, and its quarantine.

        Of one that is leaving, the leases that have still to be ended follow.

        Returns:
            How many blocks became free.
        """
        member = self._lessor.leases.workers.get(worker)
        if member is not None and member.is_gone is None:
            return self.detach(worker, now=now, gone=True).num_freed
        if member is not None:
            member.is_gone = True
        freed = self._lessor.blocks.release_quarantine(worker)
        self._lessor.serve(now)
        return freed

    # ------------------------------------------------------------------ a request

    def acquire(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        now: float,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        attached: bool = True,
        reuse: bool = True,
        min_partial: int = 0,
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Grant | Waiting:
        """Match, protect and allocate, in one step.

        O(nodes on the path + new blocks), with segments also O(tokens, up to 16,384).  At least one
        token is left to compute, for its logits.

        Args:
            worker: Who asks; attached to `namespace`, unless `attached` is False.
            namespace: What may be shared with whom.
            tokens: The prompt, packed.
            reserve: Tokens of room beyond the prompt (the expected output).
            wait_s: How long to wait for a prefix that another lease is computing, or for room; 0
                does not wait.
            request_id: Makes the call safe to repeat: while the lease lives, the same id of the
                same worker gets the same grant.
            attached: If False, the worker need not be attached to the namespace, and is not
                afterwards: for one that is used once, such as a salt for each request.
            reuse: If False, nothing that is stored is used, nor waited for: every token is computed
                (for who wants the logits of the prompt).  What it commits is shared as always.
            min_partial: Tokens in a partly matching block from which on it is copied; 0 and 1 copy
                for a single token, more than a block has for none.
            for_room: If False, it waits for a prefix only: where there is no room it is refused at
                once (for who can do without).
            segments: If given, what of the prompt is stored elsewhere may be used as well, and says
                what of it is computed again.  An approximation: the answer is not that of a full
                prefill, and the grant says `approximate` where anything was found.  What such a
                lease commits is found only by who asks for segments, too.  Where there is no room
                for the copies, or its namespace has a quota of its own, it is served exactly.
            now: The time.

        Returns:
            The grant; or `Waiting`, and the outcome comes from `take_outcomes`.

        Raises:
            InvalidRequest: no tokens, a torn token, more than the pool can ever hold, the request
                id of a lease that was asked for with something else, or segments without reuse.
            Unsupported: segments, of which no index is kept here.
            NotFound: the worker is not attached to the namespace.
            PoolExhausted: not enough blocks are free or evictable now; or, if it chose to wait,
                too many wait for room; or prompts that wait or are computed, or tables, take all
                that they may.
            QuotaExceeded: its namespace or tenant may not hold so many blocks (now, or ever).
        """
        lessor = self._lessor
        member = lessor.leases.worker(worker, namespace if attached else None)
        _check_tokens(tokens, "prompt")
        if reserve < 0:
            raise InvalidRequest(f"cannot reserve {reserve} tokens; give 0 or more")
        if min_partial < 0:
            raise InvalidRequest(f"cannot reuse from {min_partial} tokens on; give 0 or more")
        if segments is not None:
            if lessor.segments is None:
                raise Unsupported(
                    "no index of segments is kept here: serve with --segments, or ask without"
                )
            if not reuse:
                raise InvalidRequest("segments are reused: ask without them, or with reuse")
            check_again(segments)
        if not attached:
            lessor.make_way(namespace)
            lessor.root(namespace)
        request = Request(
            worker, namespace, tokens, reserve, request_id, reuse, min_partial, for_room, segments
        )
        return lessor.acquire(member, request, wait_s, now)

    def clear_way(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        now: float,
        reserve: int = 0,
        request_id: str = "",
        reuse: bool = True,
        min_partial: int = 0,
    ) -> bool:
        """Evict some of the blocks that an `acquire` with these arguments is about to need.

        One that needs tens of thousands in a full cache takes long; after this has been called
        until it says no, it does not.  Between the calls anything else may be done.  Nothing is
        evicted for what would be refused, or would wait.  O(tokens that match).

        Returns:
            Whether to call again before it is asked for.

        Raises:
            InvalidRequest, NotFound: as `acquire` says.
        """
        lessor = self._lessor
        member = lessor.leases.worker(worker)
        _check_tokens(tokens, "prompt")
        if reserve < 0 or (request_id and request_id in member.requests):
            return False
        if lessor.waiting.tickets and lessor.waiting.line.is_blocked_by_head(None):
            return False
        request = Request(worker, namespace, tokens, reserve, request_id, reuse, min_partial)
        return lessor.clear_way(request, now)

    def clear_way_to_extend(
        self, worker: WorkerId, lease: LeaseId, num_tokens: int, *, now: float
    ) -> bool:
        """Evict some of the blocks that an `extend` is about to need, as `clear_way` does.

        Raises:
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._lessor.leases.get(worker, lease, now)
        return self._lessor.clear_way(Extension(worker, own, num_tokens), now)

    def take_outcomes(self) -> list[tuple[TicketId, Grant | TableUpdate | CacheError]]:
        """Take the outcomes of waiting requests since the last call."""
        settled, self._lessor.settled = self._lessor.settled, []
        return settled

    def cancel(self, worker: WorkerId, ticket: TicketId, *, now: float) -> bool:
        """Stop waiting.  If the grant is there already, its lease is released.  Idempotent.

        Returns:
            False if it is an `extend` that has its room already: the outcome comes all the same,
            since the table has changed.
        """
        lessor = self._lessor
        found = lessor.waiting.tickets.get(ticket)
        if found is not None and found.request.worker == worker:
            lessor.waiting.leave(found)
            lessor.serve(now)  # who could not pass it may now
        for settled in lessor.settled:
            if settled[0] == ticket:
                if isinstance(settled[1], TableUpdate):
                    return False
                lessor.settled.remove(settled)
                if isinstance(settled[1], Grant):
                    self.release(worker, settled[1].lease, now=now)
                break
        return True

    # ------------------------------------------------------------------ a lease's life

    def commit(
        self,
        worker: WorkerId,
        lease: LeaseId,
        num_tokens: int,
        new_tokens: bytes = b"",
        *,
        now: float,
    ) -> Committed:
        """Say that the slots below `num_tokens` hold valid KV: they become visible to all.

        O(new tokens + nodes passed).  What somebody else committed first stays; this lease keeps
        its own blocks for these tokens until its end.

        Args:
            worker: The lease's owner.
            lease: The lease.
            num_tokens: Counted from position 0; never less than before.
            new_tokens: Tokens that follow those the lease knows (generated ones), packed.
            now: The time.

        Raises:
            InvalidRequest: `num_tokens` is out of range; the message has the range.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._lessor.leases.get(worker, lease, now)
        if len(new_tokens) % TOKEN_BYTES:
            raise InvalidRequest(
                f"{many(len(new_tokens), 'byte', 'are')} not whole tokens of {TOKEN_BYTES}"
            )
        known = own.start + (len(own.rest) + len(new_tokens)) // TOKEN_BYTES
        room = len(own.table) * self.block_size
        if num_tokens < own.committed or num_tokens > known or num_tokens > room:
            raise InvalidRequest(
                f"cannot commit {many(num_tokens, 'token')} of lease {lease}: {own.committed:,} "
                f"are committed, {known:,} known, and its {many(len(own.table), 'block', 'have')} "
                f"room for {room:,}"
            )
        if own.tail_is_shared and num_tokens > own.committed:
            raise InvalidRequest(
                f"the last block of lease {lease} is shared by a fork; extend it before writing"
            )
        lessor = self._lessor
        own.rest += new_tokens
        # The first token that others may see from now on: without tails, that of a whole block.
        news = own.committed if self.partial is Partial.TAILS else own.start
        lessor.blocks.release_copy_source(own)
        indexed = 0
        if num_tokens > own.committed:
            indexed = lessor.blocks.commit(own, num_tokens)
            lessor.blocks.count_private(own)
        if lessor.oplog is not None:
            lessor.oplog((COMMITTED, own.serial, num_tokens, new_tokens, None))
        if lessor.hauls is not None:
            lessor.store(own)
        if own.flight is not None and own.committed * TOKEN_BYTES >= len(own.flight):
            lessor.learn_rate(own, len(own.flight) // TOKEN_BYTES, now)
            lessor.inflight.remove(own)
        if lessor.waiting.tickets:
            lessor.call(own)
            if indexed:
                lessor.landed(own, news)
            lessor.serve(now)
        return Committed(num_tokens, indexed)

    def extend(
        self,
        worker: WorkerId,
        lease: LeaseId,
        num_tokens: int,
        *,
        now: float,
        wait_s: float = 0.0,
    ) -> TableUpdate | Waiting:
        """Make room for `num_tokens` tokens in all.  O(new blocks).

        The first `extend` of a forked lease beyond what it shares also gives it a last block of its
        own, to be copied before writing.  Leases that all wait for each other's blocks get none
        until a deadline ends: `reserve` at `acquire` what will be needed, and it cannot happen.

        Args:
            worker: The lease's owner.
            lease: The lease.
            num_tokens: Counted from position 0.
            wait_s: How long to wait for room; 0 does not wait.
            now: The time.

        Returns:
            How the table changed; or `Waiting`, and the outcome comes from `take_outcomes`.

        Raises:
            InvalidRequest: more than the pool can ever hold, or this lease waits already.
            PoolExhausted: not enough blocks are free or evictable now; or, if it chose to wait,
                too many wait for room.
            QuotaExceeded: its namespace or tenant may not hold so many blocks.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        lessor = self._lessor
        own = lessor.leases.get(worker, lease, now)
        if num_tokens < 0:
            raise InvalidRequest(f"cannot make room for {num_tokens} tokens; give 0 or more")
        if lessor.waiting.line:
            lessor.waiting.line.refuse_second(own)
        try:
            return lessor.extend(own, num_tokens, now)
        except PoolExhausted as short:
            if wait_s <= 0:
                raise
            tenant = own.namespace.tenant
            lessor.waiting.line.refuse_if_full(short, tenant)
            ticket = lessor.waiting.enter(Extension(worker, own, num_tokens), tenant, now + wait_s)
            ticket.over_quota = isinstance(short, QuotaExceeded)
            lessor.waiting.wait_for_room(ticket)
            return Waiting(ticket.id, None, 0)

    def fork(self, worker: WorkerId, lease: LeaseId, n: int, *, now: float) -> tuple[Grant, ...]:
        """Make `n` leases that share every committed block of this one.  Allocates nothing.

        O(n + blocks): the children share one table, in the answer too, until they differ.

        For parallel sampling and beam search.  Each child knows the committed tokens; it calls
        `extend` before it writes, and gets a copy of the last, partly filled block then.

        Raises:
            InvalidRequest: `n` is less than 1, or nothing is committed.
            PoolExhausted: there are too many leases, or their tables take all that they may.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._lessor.leases.get(worker, lease, now)
        if n < 1:
            raise InvalidRequest(f"cannot fork into {n} leases; ask for at least 1")
        if not own.committed:
            raise InvalidRequest(f"nothing of lease {lease} is committed; commit before forking")
        member = self._lessor.leases.worker(worker)
        self._lessor.leases.admit(own.namespace.tenant, n)
        num_blocks = -(-own.committed // self.block_size)
        if num_blocks >= LARGE_TABLE:
            self._lessor.tables.admit(own.namespace.tenant, n * num_blocks * SHARED_TABLE)
        table = self._lessor.blocks.shared_table(own)
        return tuple(self._lessor.fork(member, own, table, now) for _ in range(n))

    def num_committed_blocks(self, worker: WorkerId, lease: LeaseId, *, now: float) -> int:
        """Count the blocks of a lease's committed tokens: those a fork has.  O(1).

        Raises:
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        return -(-self._lessor.leases.get(worker, lease, now).committed // self.block_size)

    def truncate(
        self, worker: WorkerId, lease: LeaseId, num_tokens: int, *, now: float
    ) -> TableUpdate:
        """Roll back to `num_tokens` tokens (speculative decoding, an edited chat).

        What was committed stays cached for others.  Below the committed tokens, the blocks from
        there on are given up; a block cut inside is copied before the first write.  Room that the
        lease owns stays with it.

        Raises:
            InvalidRequest: the lease knows fewer tokens.
            PoolExhausted: the copy of a cut block needs a block, and there is none.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._lessor.leases.get(worker, lease, now)
        if not 0 <= num_tokens <= own.num_tokens:
            raise InvalidRequest(
                f"cannot truncate lease {lease} to {many(num_tokens, 'token')}; it knows "
                f"{own.num_tokens:,}"
            )
        try:
            update = self._lessor.blocks.truncate(own, num_tokens)
        except PoolExhausted as short:
            raise self._lessor.refusal(short, own.namespace.tenant, now) from None
        self._lessor.blocks.count_private(own)
        if self._lessor.oplog is not None:
            self._lessor.oplog((TRUNCATED, own.serial, num_tokens, b"", None))
        if (prompt := own.flight) is not None:
            self._lessor.inflight.remove(own)
            self._lessor.inflight.add(own, prompt[: num_tokens * TOKEN_BYTES])
        self._lessor.call(own, everyone=True)
        self._lessor.serve(now)
        return update

    def release(self, worker: WorkerId, lease: LeaseId, *, now: float) -> Released:
        """End a lease: the worker writes to none of its blocks any more.  Idempotent.

        Its committed blocks stay cached until they are evicted.  Of a lease that has ended by
        itself, the blocks that were quarantined come back.

        Raises:
            NotFound: the worker never had that lease.
        """
        lessor = self._lessor
        member = lessor.leases.worker(worker)
        own = member.leases.get(lease)
        if own is not None:
            freed, _ = lessor.end(own, now, writes_on=False)
        elif member.was_granted(lease):
            freed = lessor.blocks.release_quarantine(worker, lease)
        else:
            raise NotFound(f"no lease {lease} of worker {member.name!r}")
        if own is not None or freed:
            lessor.serve(now)
        return Released(freed)

    def expire(self, *, now: float, most: int | None = None) -> Ended:
        """End what time has ended: leases, pins, waits; and go on with what steps have left.

        Shared blocks come back at once; those the owner could still write to are quarantined.

        Args:
            now: The time.
            most: How many leases and pins each are ended, or looked at, in this step, by default
                all: first those of workers that leave.  `next_deadline` says that there are others.
        """
        lessor = self._lessor
        limit, work = (inf, inf) if most is None else (most, None)
        lessor.pins.expire(now, limit)
        lessor.give_up_restores(now)
        lessor.waiting.call_late(now)
        over = lessor.end_leaving(now, limit)
        if not over or most is None:
            due = lessor.leases.due(now, limit)
            over += [Ended((one.id,), *lessor.end(one, now, writes_on=True)) for one in due]
        if over:
            lessor.serve(now, work)
        else:
            lessor.go_on(now, work)
        next_end = lessor.leases.next_deadline()
        all_ended = not lessor.leases.leaving and (next_end is None or next_end >= now)
        if all_ended and lessor.give_up(now, work):  # whoever waits has had what these gave back
            lessor.serve(now, work)
        return Ended.total(over)

    def next_deadline(self) -> float | None:
        """Give a time before which `expire` has nothing to do; None if nothing can expire.

        O(1), amortised.  Where steps have left something to do, it is over already.
        """
        lessor = self._lessor
        if lessor.is_behind or lessor.leases.leaving or lessor.pins.is_behind:
            return -inf
        times = (
            lessor.leases.next_deadline(),
            lessor.waiting.next_deadline(),
            lessor.pins.next_deadline(),
            None if lessor.hauls is None else lessor.hauls.next_due(),
        )
        # Those of a restore have no end of their own.
        return min((time for time in times if time is not None and time < NEVER), default=None)

    # ------------------------------------------------------------------ what is kept, and for whom

    def reset(self, namespace: Namespace) -> Reset:
        """Forget a namespace's prefixes.  Amortised O(1), also while leases are out.

        Leases keep their blocks until they end; all other blocks of the namespace are the first to
        be reused.  What is approximate beside it goes with it.
        """
        lessor = self._lessor
        if lessor.segments is None or namespace.approximate:
            return self._reset(namespace)
        exact, other = self._reset(namespace), self._reset(beside(namespace))
        return Reset(
            exact.num_blocks + other.num_blocks,
            exact.num_leased + other.num_leased,
            exact.num_leases + other.num_leases,
            exact.num_pins,
        )

    def _reset(self, namespace: Namespace) -> Reset:
        lessor = self._lessor
        if lessor.generations is not None:  # of what nobody has asked for yet, too
            lessor.generations.advance(namespace)
        root = lessor.roots.get(namespace)
        if root is None:
            return Reset(0, 0)
        lessor.history.request_log.forget(namespace)
        unpinned = lessor.pins.unpin(namespace.tenant, root, None)
        lessor.tree.drop_namespace(root)
        lessor.roots[namespace] = fresh = Root(namespace)
        lessor.blocks.quotas.open(fresh)
        if lessor.oplog is not None and not namespace.approximate:
            lessor.oplog((RESET, 0, 0, b"", namespace))
        return Reset(
            num_blocks=root.num_blocks,
            num_leased=root.num_blocks - root.evictable,
            num_leases=root.num_leases,
            num_pins=unpinned.num_pins,
        )

    def pin(self, namespace: Namespace, tokens: bytes, *, ttl_s: float, now: float) -> Pinned:
        """Let what is stored of a prefix, in whole blocks, be evicted last until `now + ttl_s`.

        Takes no reference: what leases need they get, also from pinned blocks, so pins can never
        wedge the pool.  Pinning the same again prolongs.  O(nodes on the path).

        Returns:
            What is pinned; zeros if nothing of the prefix is stored.

        Raises:
            InvalidRequest: no tokens, a torn token, or no time.
            PoolExhausted: more blocks would be pinned than the cap; the message has the arithmetic.

        >>> from prefixcache.types import WorkerId, pack
        >>> cache, me, space = PrefixCache(64, 4), WorkerId(1), Namespace("tiny-model")
        >>> cache.attach(me, space, now=0.0)
        >>> lease = cache.acquire(me, space, pack(range(10)), now=0.0).lease
        >>> _ = cache.commit(me, lease, 10, now=0.0)
        >>> pinned = cache.pin(space, pack(range(10)), ttl_s=3600.0, now=0.0)
        >>> pinned.num_tokens, pinned.num_blocks, pinned.max_pinned
        (8, 2, 16)
        """
        lessor = self._lessor
        _check_tokens(tokens, "prefix")
        if not 0 < ttl_s < inf:
            raise InvalidRequest(f"cannot pin for {ttl_s:g} s; give a time above 0")
        root = lessor.roots.get(namespace)
        if root is None:
            pins = lessor.pins
            pinned = pins.num_pinned_of(namespace.tenant)
            return Pinned(0, 0, 0, 0, 0.0, pinned, pins.max_pinned)
        answer = lessor.pins.pin(lessor.tree.match(root, tokens), ttl_s, now)
        if answer.num_blocks:
            self._protect()
        return answer

    def unpin(self, namespace: Namespace, tokens: bytes = b"") -> Unpinned:
        """End the pin of exactly this prefix; without tokens, all pins of the namespace.

        Its blocks stay cached, in the usual order of eviction.  O(nodes on the path).

        Raises:
            InvalidRequest: a torn token.
        """
        lessor = self._lessor
        root = lessor.roots.get(namespace)
        if not tokens:
            return lessor.pins.unpin(namespace.tenant, root, None)
        _check_tokens(tokens, "prefix")
        return lessor.pins.unpin(
            namespace.tenant, root, None if root is None else lessor.tree.match(root, tokens)
        )

    def set_quota(
        self, scope: Namespace | str, *, max_held: int | None, guaranteed: int, now: float
    ) -> QuotaInfo:
        """Say what a namespace, or a tenant (its name) with all its namespaces, may hold.

        Nothing is taken away: who holds more than `max_held` gets nothing new until it holds less.

        Args:
            scope: Whose quota.
            max_held: Most blocks that its leases may hold; None is no limit.
            guaranteed: Stored blocks up to which nothing of it is evicted while others have
                evictable ones; and as large a part of what lies below the pool.
            now: The time.

        Raises:
            InvalidRequest: a number is out of range, or all shares together exceed the pool.
        """
        lessor = self._lessor
        answer = lessor.blocks.quotas.set(scope, max_held, guaranteed)
        if guaranteed or lessor.blocks.quotas.shares:
            self._protect()
        if isinstance(lessor.tree.queue, ProtectedQueue):
            lessor.tree.queue.unprotect_all()
        if lessor.hauls is not None:
            lessor.hauls.tier.set_guaranteed(lessor.blocks.quotas.guaranteed(), self.num_blocks)
        lessor.serve(now)
        return answer

    def quota(self, scope: Namespace | str) -> QuotaInfo:
        """Say what a namespace or a tenant may hold, and holds.  Changes nothing."""
        return self._lessor.blocks.quotas.get(scope)

    def _protect(self) -> None:
        tree = self._lessor.tree
        if not isinstance(tree.queue, ProtectedQueue):
            queue = ProtectedQueue(tree, self._lessor.blocks.quotas)
            tree.set_queue(queue, queue.shelter)

    def rank(self, namespace: Namespace, level: int, *, ttl_s: float = inf) -> None:
        """Give all that is used in a namespace from now on a level, for `ttl_s` after each use.

        O(1).  For the policy `priority`; the others know no levels.  Not on the wire yet.

        Raises:
            InvalidRequest: the level is out of range, or the cache's policy has no levels.

        >>> from prefixcache.types import Namespace
        >>> cache = PrefixCache(8, 4, policy="priority")
        >>> cache.rank(Namespace("system-prompts"), 8, ttl_s=3600.0)
        """
        self._levels(level).rank(namespace, level, ttl_s)

    def retain(
        self, worker: WorkerId, lease: LeaseId, level: int, *, ttl_s: float, now: float
    ) -> None:
        """Give what a lease uses and has stored so far a level until `now + ttl_s`.

        O(nodes on the path).  Call it after the commit and before the release.

        Raises:
            InvalidRequest: the level is out of range, or the cache's policy has no levels.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        policy = self._levels(level)
        own = self._lessor.leases.get(worker, lease, now)
        policy.retain(own.node, level, now + ttl_s)

    def _levels(self, level: int) -> Priority:
        policy = self._lessor.tree.policy
        if not isinstance(policy, Priority):
            raise InvalidRequest(
                f"policy {policy.name!r} has no levels; serve with --policy priority"
            )
        if not LOWEST <= level <= HIGHEST:
            raise InvalidRequest(f"level {level} is not one of {LOWEST} (goes first) to {HIGHEST}")
        return policy

    # ------------------------------------------------------------------ what moves between tiers

    def set_porter(self, *, is_there: bool, now: float) -> None:
        """Say whether somebody moves blocks between the pool and the tier below it.

        When he has ended, what he had in hand is over: blocks that were going down are free, and
        who waited for what was coming up is tried again.  Before that he must be known to be unable
        to write.  Without a tier it changes nothing.
        """
        lessor = self._lessor
        if lessor.hauls is not None and lessor.hauls.has_porter != is_there:
            lessor.hauls.has_porter = is_there
            if not is_there:
                lessor.lose_hauls(now)

    def hauls(self, *, now: float) -> list[Haul]:
        """Take the hauls to begin now, in order; see that enough blocks are free ahead of need.

        After each verb.  O(1) where there is nothing to move; else O(blocks that are evicted).
        """
        hauls = self._lessor.hauls
        if hauls is None or not hauls.has_porter:
            return []
        self._lessor.sink(now)
        return hauls.take_new()

    def put_down(self) -> None:
        """Have all go to DISK that is cached in the pool and in memory below it, from now on.

        For the end of a service whose disk outlives it.  What is pinned stays, and what is within a
        guaranteed share.  Without a disk it changes nothing.
        """
        hauls = self._lessor.hauls
        if hauls is not None and hauls.sizes.disk:
            hauls.is_ending = True
            hauls.tier.begin_ending()

    @property
    def num_above_disk(self) -> int:
        """Blocks that are cached, and not on DISK yet; without those that leases hold.  O(1)."""
        hauls = self._lessor.hauls
        if hauls is None:
            return 0
        return self._lessor.tree.evictable + hauls.num_leaving + hauls.tier.num_host_used

    def waits_to_write(self, now: float) -> bool:
        """Whether as much has been written to DISK of late as may be: in a moment more may.  O(1).

        Without a limit it never is.
        """
        hauls = self._lessor.hauls
        if hauls is None or math.isinf(hauls.limit.per_s):
            return False
        return hauls.limit.allowed(now) < 1

    def hold_disk(self, *, until: float) -> None:
        """Let nothing be written to the tier on disk before that time: it fails.  O(1).

        What would go there is given up: the oldest blocks of the tier above it, if there is one.
        """
        if self._lessor.hauls is not None:
            self._lessor.hauls.limit.hold_until(until)

    def keep_below(
        self,
        secret: bytes,
        generations: Generations,
        remains: Remains,
        abandoned: Callable[[Haul], None],
    ) -> int:
        """Let what lies on DISK be found by another life, and take over what one has left there.

        Before anything else, and only where there is a tier on DISK.  O(slots log slots), in C.

        Args:
            secret: For the keys of blocks: the same in each life, and nobody else's.
            generations: Counts the resets of namespaces, in all lives together.
            remains: What was left.
            abandoned: Is told of each haul whose blocks are about to be somebody else's.

        Returns:
            How many blocks can be found now.

        Raises:
            InvalidRequest: There is no such tier, or the secret is too short.
        """
        lessor = self._lessor
        if lessor.hauls is None or not lessor.hauls.tier.num_disk:
            raise InvalidRequest("nothing below the pool outlives it: there is no tier on a disk")
        lessor.tree.keys = BlockKeys(secret, self.block_size, generations)
        lessor.hauls.abandoned = abandoned
        self.count_resets(generations)
        return lessor.hauls.tier.adopt(remains)

    def count_resets(self, generations: Generations) -> None:
        """Have resets counted for longer than this life, for what outlives it elsewhere.  O(1).

        Before anything else.  Without a tier that outlives it, it changes nothing.
        """
        lessor = self._lessor
        if lessor.hauls is None:
            return
        lessor.generations = generations
        if lessor.hauls.remote is not None:
            lessor.hauls.remote.generations = generations

    def forget_found(self) -> None:
        """Let all go that another life has left on DISK, since all of it was reset.

        Without this it would count as found, although nobody can.  O(slots), in C.
        """
        if self._lessor.hauls is not None:
            self._lessor.hauls.tier.forget_found()

    def hauled(self, haul: HaulId, num_good: int, seconds: float, *, now: float) -> None:
        """Take note that a haul has ended: in the order in which they were begun.

        One of before `set_porter` was told that nobody moves blocks changes nothing.

        Args:
            haul: Which.
            num_good: Of its blocks, how many, from the first on, have arrived as they should be.
            seconds: What it took, once it was begun.
            now: The time.
        """
        self._lessor.hauled(haul, num_good, seconds, now)

    def spare(self, haul: HaulId) -> bool:
        """Have a haul that has not begun never begin, if it would be for nothing.

        Of what goes down the blocks may have been needed meanwhile.  Whoever moves blocks asks just
        before he begins.  O(blocks).

        Returns:
            Whether it is over, and need not be told of (`hauled`).
        """
        hauls = self._lessor.hauls
        return hauls is not None and hauls.spare(haul)

    # ------------------------------------------------------------------ what others have, too

    def set_remote(self, *, is_there: bool, now: float) -> None:
        """Say whether somebody answers questions about the store elsewhere, fetches and stores.

        When he has ended, no question brings anything any more, and nothing waits to be stored;
        what he had in hand is told of as always.  Without such a store it changes nothing.
        """
        hauls = self._lessor.hauls
        if hauls is None or (remote := hauls.remote) is None or remote.is_there == is_there:
            return
        remote.is_there = is_there
        if not is_there:
            self._lessor.lose_remote(now)

    def hold_remote(self, *, until: float) -> None:
        """Let nothing be asked of the store elsewhere before that time: it fails.  O(1)."""
        hauls = self._lessor.hauls
        if hauls is not None and hauls.remote is not None:
            hauls.remote.hold_until(until)

    def questions(self, *, now: float) -> list[Question]:
        """Take the questions to be asked now, in order.  After each verb.

        O(1) where there are none, else O(tokens), a copy.
        """
        hauls = self._lessor.hauls
        if hauls is None or hauls.remote is None:
            return []
        return hauls.remote.take_new(now)

    def answered(
        self, question: QuestionId, is_there: bytes, names: bytes = b"", *, now: float
    ) -> None:
        """Take the answer to a question.  One that is not out (any more) changes nothing.

        Args:
            question: Which.
            is_there: Of each block that was asked for, from the first on, a byte: 0 if it is not
                there.  Of the last ones it may say nothing.
            names: Of the objects that hold, or are to hold these blocks; `NAME_BYTES` each.
            now: The time.
        """
        self._lessor.answered(question, is_there, names, now)

    def note_wrong(self, num_blocks: int) -> None:
        """Count blocks that came from elsewhere and were not what they should be.  O(1)."""
        hauls = self._lessor.hauls
        if hauls is not None and hauls.remote is not None:
            hauls.remote.num_wrong += num_blocks

    # ------------------------------------------------------------------ looking

    def lookup(self, namespace: Namespace, tokens: bytes) -> Lookup:
        """Say what `acquire` would find.  Changes nothing, takes no reference.

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        _check_tokens(tokens, "prompt")
        return stats.lookup(self._lessor, self._lessor.roots.get(namespace), tokens)

    def explain(self, namespace: Namespace, tokens: bytes, *, now: float) -> Explanation:
        """Say what would become of each token, and where the prompt parts from what is stored.

        Changes nothing, takes no reference.  O(nodes on the path + other namespaces).  A store that
        other machines have, too, is asked what of it lies there: who explains the same prompt
        again within a second, once that is answered, is told.

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        _check_tokens(tokens, "prompt")
        return explain.explain(self._lessor, namespace, tokens, now)

    def explain_request(
        self, request: str, may_see: Callable[[Namespace], bool], *, now: float
    ) -> Explanation:
        """Say why a recent request was answered as it was.  Changes nothing.  O(recent requests).

        Args:
            request: Its request id (or that without its last `/part`), or `worker#lease`.
            may_see: Whether the caller may know of a namespace.
            now: The time.

        Raises:
            NotFound: there is none, or the caller may not know of it.
        """
        recents = self._lessor.history.request_log
        for one, prompt in recents:
            if one.is_called(request) and may_see(one.namespace):
                return explain.recount(self._lessor, one, prompt, now)
        raise NotFound(
            f"no recent request {request!r} (the last {len(recents):,} are remembered; "
            "--history gives room for more); name it by its request id, or as worker#lease"
        )

    def outline(
        self,
        namespaces: Iterable[Namespace] | None = None,
        *,
        now: float,
        order: Order = Order.TOKENS,
        max_branches: int = 1000,
        max_depth: int | None = None,
        ghosts: bool = True,
        sees: Callable[[Namespace], bool] | None = None,
        max_namespaces: int | None = None,
    ) -> Generator[None, None, Outline]:
        """Sum the trees up, and keep their largest or hottest branches.  Changes nothing.

        O(runs + namespaces), in steps of some dozen: between them other verbs may be called.

        Args:
            namespaces: Which; all, if None.  One that stores nothing is left out.
            order: Which branches are kept, and which comes first.
            max_branches: How many are kept in all.
            max_depth: Runs below the root beyond which all is summed up.
            ghosts: Whether evicted runs are shown.
            sees: Which of the namespaces are shown, as the walk comes to them; None: all.
            max_namespaces: How many are shown, the first by the order; the rest is summed up.
                None: all.
            now: The time.

        Raises:
            InvalidRequest: a bound below 1.
        """
        if max_branches < 1 or (max_depth is not None and max_depth < 1):
            raise InvalidRequest(f"{max_branches} branches to depth {max_depth}: give at least 1")
        chosen = list(self._lessor.roots) if namespaces is None else namespaces
        walk = introspect.Walk(self._lessor, order, max_branches, max_depth, ghosts=ghosts)
        return walk.run(chosen, sees, max_namespaces, now)

    def snapshot(
        self,
        *,
        now: float,
        tenant: str | None = None,
        sees: Callable[[Namespace], bool] | None = None,
    ) -> Snapshot:
        """Give the numbers of this moment, and who holds what.  O(namespaces + pins).

        Args:
            now: The time.
            tenant: Whose leases, namespaces, pins and quotas are listed and counted; None:
                everybody's.
            sees: Whether those of a namespace are; None: all.
        """
        steps = self.snapshot_in_steps(now=now, tenant=tenant, sees=sees)
        while True:
            try:
                next(steps)
            except StopIteration as end:
                told: Snapshot = end.value
                return told

    def snapshot_in_steps(
        self,
        *,
        now: float,
        tenant: str | None = None,
        sees: Callable[[Namespace], bool] | None = None,
    ) -> Generator[None, None, Snapshot]:
        """Give what `snapshot` gives, in steps of some dozen rows.

        Between them other verbs may be called.  The numbers are those of the first step's moment;
        each row is as it is when its turn comes, and what has ended by then is left out.
        """
        return stats.snapshot(self._lessor, now, tenant, sees)

    def oldest_leases(self, most: int, *, now: float) -> list[LeaseInfo]:
        """Tell up to `most` leases, oldest first.  O(most)."""
        return stats.oldest_leases(self._lessor, most, now)

    def counts(self, *, now: float) -> Counts:
        """Give the numbers of this moment.  O(1)."""
        return stats.counts(self._lessor, now)

    def series(self) -> dict[Namespace, SeriesCounts]:
        """Tell what became of the requests of each series, which `counts` sums up.

        At most `ledger.MOST_SERIES` names and `ledger.OTHER`.  O(these), however many namespaces
        there are.
        """
        return stats.series(self._lessor)

    def holdings(self, most: int = 1000) -> list[HoldingInfo]:
        """Tell what up to `most` tenants have below the pool.  O(most)."""
        return stats.holdings(self._lessor, most)

    def flights(self, most: int = 1000) -> list[FlightInfo]:
        """Give up to `most` of the prompts that leases are computing."""
        return stats.flights(self._lessor, most)

    def block_map(self, num_cells: int = 1024) -> Generator[None, None, tuple[int, ...]]:
        """Draw the pool: per cell the index in `blockmap.STATES` of what most of its blocks are.

        O(runs + blocks), in steps of some dozen runs: between them other verbs may be called.
        """
        return introspect.block_map(self._lessor, num_cells)

    # ------------------------------------------------------------------ who listens; another life

    def observe(
        self,
        listener: IndexListener,
        writes: WriteListener | None = None,
        below: PlaceListener | None = None,
    ) -> None:
        """Tell `listener` of every change of the index from now on, beside those told already.

        Nobody is told of what is approximate.

        Args:
            listener: Hears of the index.
            writes: Hears which blocks may be written to; at most one does.
            below: Hears where blocks lie below the pool, if there is anything; at most one does.
        """
        tree = self._lessor.tree
        if self._lessor.segments is not None:
            listener = ExactOnly(listener)
        tree.listener = (
            listener if tree.listener is None else IndexListeners(tree.listener, listener)
        )
        if writes is not None:
            self._lessor.blocks.pool.write_listener = writes
        if below is not None and self._lessor.hauls is not None:
            self._lessor.hauls.tier.listener = below

    def wipe_with(self, wipe: Wipe) -> None:
        """Have blocks overwritten with zeros before they are lent to another tenant than before."""
        self._lessor.blocks.last_tenant.wipe = wipe

    def replay(self, listener: IndexListener, below: PlaceListener | None = None) -> Replay:
        """Prepare to tell `listener` what is indexed, as if it was stored just now.  O(1).

        Args:
            listener: Is told.
            below: Is told what lies below the pool; None: nobody is.
        """
        lessor = self._lessor
        tier = None if lessor.hauls is None else lessor.hauls.tier
        tree = lessor.tree
        return Replay(lessor.roots, tree.block_bytes, listener, tree.walks, below, tier)

    def record(self, put: Put | None) -> None:
        """Log each operation from now on, so that another cache can play it again.

        Args:
            put: Takes an entry of `core.oplog`; None ends it.
        """
        self._lessor.oplog = put

    def restore(
        self, runs: Sequence[bulk_load.StoredRun], aside: BlockTable, worker: WorkerId
    ) -> int:
        """Take over what an earlier life of the pool left.  Only while the cache is empty.

        O(num_blocks + runs · log siblings).

        Args:
            runs: What is indexed, parents first; each block in one run only.
            aside: Blocks that processes of that life may still write to: quarantined.  All that is
                named here are blocks that can be lent.
            worker: Under whose number they are, which nobody else has; `worker_gone` frees them.

        Returns:
            How many blocks are indexed now.
        """
        lessor = self._lessor
        for run in runs:
            lessor.root(run.namespace)
        count = bulk_load.load(lessor.tree, lessor.roots, runs)
        indexed = array("i")
        for root in lessor.roots.values():
            indexed.extend(blocks_below(root))
        lessor.blocks.pool.restore(indexed, aside, worker)
        if lessor.segments is not None:
            for _ in self.replay(lessor.segments.index).run():
                pass
        lessor.blocks.last_tenant.restore(
            (root.namespace.tenant, blocks_below(root)) for root in lessor.roots.values()
        )
        return count

    def check(self) -> None:
        """Walk everything and assert that every invariant holds.  O(everything).

        Raises:
            AssertionError: one does not; the message has the tree.
        """
        invariants.check(self._lessor)

    def check_in_steps(self) -> Generator[None, None, Checked]:
        """Walk everything in short steps, between which anything may be called.  O(everything).

        Never wrong if it finds a fault.  What changes in every walk, and lists too long to be
        looked at in one step, are left out; the answer says which.

        Raises:
            AssertionError: an invariant does not hold.
        """
        return invariants.check_in_steps(self._lessor)


def _check_tokens(tokens: bytes, what: str) -> None:
    if not tokens or len(tokens) % TOKEN_BYTES:
        raise InvalidRequest(
            f"a {what} of {many(len(tokens), 'byte')} is not one or more tokens of "
            f"{TOKEN_BYTES} bytes"
        )
