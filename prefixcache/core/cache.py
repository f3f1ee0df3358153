"""PrefixCache: the verbs.  Each is one atomic, synchronous step; a failed one changes nothing.

```
attach ─► acquire ─► commit … ─► extend / commit … ─► release
             │          └ visible to all                └ stays cached until evicted
             └ or Waiting, until the prefix that another lease is computing has landed
```

The service, the client's contract tests and the experiments all run this very class.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Sequence

from prefixcache.core import views
from prefixcache.core.blockmap import block_map
from prefixcache.core.blocks import BlockPool, Rights
from prefixcache.core.desk import Desk
from prefixcache.core.eviction import policy_named
from prefixcache.core.flights import Request
from prefixcache.core.graft import Run, graft
from prefixcache.core.journal import Journal, Journals
from prefixcache.core.leases import Worker
from prefixcache.core.node import Root, blocks_below
from prefixcache.core.outline import Walk
from prefixcache.core.radix import RadixTree
from prefixcache.core.vitals import FlightInfo, Vitals, flights, vitals
from prefixcache.errors import CacheError, InvalidRequest, NotFound, PoolExhausted
from prefixcache.outline import Order, Outline
from prefixcache.types import (
    TOKEN_BYTES,
    BlockTable,
    Committed,
    Ended,
    Explanation,
    Grant,
    LeaseId,
    Lookup,
    Namespace,
    Partial,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TicketId,
    Waiting,
    WorkerId,
)


class PrefixCache:
    """Which blocks hold which prefix, and who may use them.

    Pure: no clock, no I/O, no thread.  `now` is any clock in seconds that never goes back.

    Args:
        num_blocks: Blocks in the pool.
        block_size: Tokens per block: a power of two, 1 to 1024.
        policy: Order of eviction, by name.
        partial: How much of a partly matching block is reused.
        num_ghosts: Evicted blocks to remember; if not given, what the policy asks for: for most, as
            many as the pool has.
        ttl_s: How long a lease lives without a sign of life.

    Raises:
        InvalidRequest: an argument is out of range.

    >>> from prefixcache.types import Namespace, WorkerId, pack
    >>> cache, me, space = PrefixCache(64, 4), WorkerId("w1"), Namespace("tiny-model")
    >>> cache.attach(me, space, now=0.0)
    >>> first = cache.acquire(me, space, pack(range(10)), now=0.0)
    >>> cache.commit(me, first.lease, 10, now=0.1).num_indexed
    3
    >>> cache.release(me, first.lease, now=0.2).num_freed
    0
    >>> cache.acquire(me, space, pack([*range(10), 99]), now=0.3).ledger
    Ledger(hit=8, partial=2, joined=0, cold=1, evicted=0, granularity=0)
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
    ) -> None:
        if num_blocks < 1:
            raise InvalidRequest(f"a pool of {num_blocks} blocks holds nothing; give at least 1")
        if not 1 <= block_size <= 1024 or block_size & (block_size - 1):
            raise InvalidRequest(f"block size {block_size} is not a power of two from 1 to 1024")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.partial = Partial(partial)
        order = policy_named(policy, num_blocks)
        tree = RadixTree(
            block_size,
            policy=order,
            num_ghosts=int(order.ghosts * num_blocks) if num_ghosts is None else num_ghosts,
        )
        self._desk = Desk(tree, BlockPool(num_blocks), self.partial, ttl_s)

    @property
    def num_indexed(self) -> int:
        """Blocks that the tree holds.  O(1)."""
        return self._desk.tree.num_blocks

    def observe(self, journal: Journal, rights: Rights | None = None) -> None:
        """Tell `journal` of every change of the index from now on, beside those told already.

        Args:
            journal: Hears of the index.
            rights: Hears of the rights to write; at most one does.
        """
        tree = self._desk.tree
        tree.journal = journal if tree.journal is None else Journals(tree.journal, journal)
        if rights is not None:
            self._desk.holdings.pool.rights = rights

    def restore(self, runs: Sequence[Run], aside: BlockTable, worker: WorkerId) -> int:
        """Take over what an earlier life of the pool left.  Only while the cache is empty.

        O(num_blocks + runs · log siblings).

        Args:
            runs: What is indexed, parents first; each block in one run only.
            aside: Blocks that processes of that life may still write to: quarantined.
            worker: The name under which they are; `worker_gone` frees them.

        Returns:
            How many blocks are indexed now.
        """
        desk = self._desk
        for run in runs:
            if run.namespace not in desk.roots:
                desk.roots[run.namespace] = Root(run.namespace)
        count = graft(desk.tree, desk.roots, runs)
        indexed = array("i")
        for root in desk.roots.values():
            indexed.extend(blocks_below(root))
        desk.holdings.pool.restore(indexed, aside, worker)
        return count

    # ------------------------------------------------------------------ workers

    def attach(self, worker: WorkerId, namespace: Namespace, *, now: float) -> None:
        """Let a worker use a namespace.  Idempotent."""
        members = self._desk.leases.workers
        if worker not in members:
            members[worker] = Worker(worker)
        members[worker].namespaces.add(namespace)
        self.renew(worker, now=now)

    def renew(self, worker: WorkerId, *, now: float) -> None:
        """Take a sign of life: all leases of the worker live for another TTL.  O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        self._desk.leases.worker(worker).renewed_until = now + self._desk.leases.ttl_s

    def detach(self, worker: WorkerId, *, now: float, gone: bool) -> Ended:
        """End a worker's session and its leases; its waiting requests are dropped.

        Args:
            worker: Who leaves.
            now: The time.
            gone: Whether it can no longer write to the pool (it said goodbye, or its process is
                known to be dead).  If not, the blocks it could write to are quarantined until
                `worker_gone`.

        Raises:
            NotFound: the worker is not attached.
        """
        member = self._desk.leases.worker(worker)
        for ticket in [t for t in self._desk.room.tickets.values() if t.request.worker == worker]:
            self._desk.room.leave(ticket)
        ended = Ended()
        for lease in list(member.leases.values()):
            ended += self._desk.end(lease, now, writes_on=not gone)
        del self._desk.leases.workers[worker]
        if gone:
            ended += Ended(num_freed=self._desk.holdings.pool.absolve(worker))
        return ended

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """Take note that a worker's process has ended: free all it held, and its quarantine.

        Returns:
            How many blocks became free.
        """
        if worker in self._desk.leases.workers:
            return self.detach(worker, now=now, gone=True).num_freed
        return self._desk.holdings.pool.absolve(worker)

    # ------------------------------------------------------------------ acquire

    def acquire(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        now: float,
    ) -> Grant | Waiting:
        """Match, protect and allocate, in one step.

        O(nodes on the path + new blocks).  At least one token is left to compute, for its logits.

        Args:
            worker: Who asks; attached to `namespace`.
            namespace: What may be shared with whom.
            tokens: The prompt, packed.
            reserve: Tokens of room beyond the prompt (the expected output).
            wait_s: How long to wait for a prefix that another lease is computing; 0 does not wait.
            request_id: Makes the call safe to repeat: while the lease lives, the same id of the
                same worker gets the same grant.
            now: The time.

        Returns:
            The grant; or `Waiting`, and the outcome comes from `settled`.

        Raises:
            InvalidRequest: no tokens, a torn token, or more than the pool can ever hold.
            NotFound: the worker is not attached to the namespace.
            PoolExhausted: not enough blocks are free or evictable now.
        """
        member = self._desk.leases.worker(worker, namespace)
        self._check_prompt(tokens)
        if reserve < 0:
            raise InvalidRequest(f"cannot reserve {reserve} tokens; give 0 or more")
        self._desk.holdings.blocks_for(len(tokens) // TOKEN_BYTES + reserve)
        request = Request(worker, namespace, tokens, reserve, request_id)
        outcome = self._desk.attempt(member, request, now, wait=wait_s > 0)
        if isinstance(outcome, Grant):
            return outcome
        ticket = self._desk.room.enter(request, now + wait_s)
        self._desk.room.wait_for(ticket, outcome.owner.id, outcome.target)
        return Waiting(ticket.id, outcome.owner.id, outcome.num_tokens)

    def settled(self) -> list[tuple[TicketId, Grant | CacheError]]:
        """Take the outcomes of waiting requests since the last call."""
        settled, self._desk.settled = self._desk.settled, []
        return settled

    def cancel(self, worker: WorkerId, ticket: TicketId, *, now: float) -> None:
        """Stop waiting.  If the grant is there already, its lease is released.  Idempotent."""
        found = self._desk.room.tickets.get(ticket)
        if found is not None and found.request.worker == worker:
            self._desk.room.leave(found)
        for settled in self._desk.settled:
            if settled[0] == ticket:
                self._desk.settled.remove(settled)
                if isinstance(settled[1], Grant):
                    self.release(worker, settled[1].lease, now=now)
                return

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
        own = self._desk.leases.get(worker, lease, now)
        if len(new_tokens) % TOKEN_BYTES:
            raise InvalidRequest(f"{len(new_tokens)} bytes are not whole tokens of {TOKEN_BYTES}")
        known = own.num_tokens + len(new_tokens) // TOKEN_BYTES
        room = len(own.table) * self.block_size
        if not own.committed <= num_tokens <= min(known, room):
            raise InvalidRequest(
                f"cannot commit {num_tokens} tokens of lease {lease}: {own.committed} are "
                f"committed, {known} known, and its {len(own.table)} blocks have room for {room}"
            )
        if own.tail_is_shared and num_tokens > own.committed:
            raise InvalidRequest(
                f"the last block of lease {lease} is shared by a fork; extend it before writing"
            )
        desk = self._desk
        own.rest += new_tokens
        # The first token that others may see from now on: without tails, that of a whole block.
        news = own.committed if self.partial is Partial.TAILS else own.start
        into = (news - own.start) * TOKEN_BYTES
        token = own.rest[into : into + TOKEN_BYTES]
        desk.holdings.drop_source(own)
        indexed = desk.holdings.publish(own, num_tokens) if num_tokens > own.committed else 0
        if own.flight is not None and own.committed * TOKEN_BYTES >= len(own.flight):
            desk.flights.land(own)
        desk.call(own, now)
        if indexed and desk.room.tickets:
            desk.landed(own, news, token, now)
        return Committed(num_tokens, indexed)

    def extend(
        self, worker: WorkerId, lease: LeaseId, num_tokens: int, *, now: float
    ) -> TableUpdate:
        """Make room for `num_tokens` tokens in all.  O(new blocks).

        The first `extend` of a forked lease beyond what it shares also gives it a last block of its
        own, to be copied before writing.

        Raises:
            InvalidRequest: more than the pool can ever hold.
            PoolExhausted: not enough blocks are free or evictable now.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._desk.leases.get(worker, lease, now)
        need = self._desk.holdings.lacks(own, num_tokens)
        if need:
            self._desk.admit(need, now)
        return self._desk.holdings.extend(own, num_tokens)

    def fork(self, worker: WorkerId, lease: LeaseId, n: int, *, now: float) -> tuple[Grant, ...]:
        """Make `n` leases that share every committed block of this one.  Allocates nothing.

        For parallel sampling and beam search.  Each child knows the committed tokens; it calls
        `extend` before it writes, and gets a copy of the last, partly filled block then.

        Raises:
            InvalidRequest: `n` is less than 1, or nothing is committed.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._desk.leases.get(worker, lease, now)
        if n < 1:
            raise InvalidRequest(f"cannot fork into {n} leases; ask for at least 1")
        if not own.committed:
            raise InvalidRequest(f"nothing of lease {lease} is committed; commit before forking")
        member = self._desk.leases.worker(worker)
        return tuple(self._desk.fork(member, own, now) for _ in range(n))

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
        own = self._desk.leases.get(worker, lease, now)
        if not 0 <= num_tokens <= own.num_tokens:
            raise InvalidRequest(
                f"cannot truncate lease {lease} to {num_tokens} tokens; it knows {own.num_tokens}"
            )
        try:
            update = self._desk.holdings.truncate(own, num_tokens)
        except PoolExhausted as short:
            raise self._desk.refusal(short, now) from None
        if (prompt := own.flight) is not None:
            self._desk.flights.land(own)
            self._desk.flights.start(own, prompt[: num_tokens * TOKEN_BYTES])
        self._desk.call(own, now, everyone=True)
        return update

    def release(self, worker: WorkerId, lease: LeaseId, *, now: float) -> Released:
        """End a lease.  Idempotent.  Its committed blocks stay cached until they are evicted.

        Raises:
            NotFound: the worker never had that lease.
        """
        member = self._desk.leases.worker(worker)
        own = member.leases.get(lease)
        if own is None:
            if self._desk.leases.was_ended(worker, lease):
                return Released(0)
            raise NotFound(f"no lease {lease} of worker {worker!r}")
        return Released(self._desk.end(own, now, writes_on=False).num_freed)

    def expire(self, *, now: float) -> Ended:
        """End the leases whose deadline has passed, and the waits.

        Shared blocks come back at once; those the owner could still write to are quarantined.
        """
        ended = Ended()
        while (lease := self._desk.leases.due(now)) is not None:
            ended += self._desk.end(lease, now, writes_on=True)
        for ticket in self._desk.room.overdue(now):
            if ticket.id in self._desk.room.tickets:
                self._desk.retry(ticket, now, wait=False)
        return ended

    def next_deadline(self) -> float | None:
        """Give a time before which `expire` has nothing to do; None if nothing can expire."""
        times = (self._desk.leases.next_deadline(), self._desk.room.next_deadline())
        return min((time for time in times if time is not None), default=None)

    # ------------------------------------------------------------------ looking, steering

    def lookup(self, namespace: Namespace, tokens: bytes) -> Lookup:
        """Say what `acquire` would find.  Changes nothing, takes no reference.

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        self._check_prompt(tokens)
        return views.lookup(self._desk, self._desk.roots.get(namespace), tokens)

    def explain(self, namespace: Namespace, tokens: bytes) -> Explanation:
        """Say what would become of each token, and where the prompt parts from what is stored.

        Changes nothing, takes no reference.

        Raises:
            InvalidRequest: no tokens, or a torn token.
        """
        self._check_prompt(tokens)
        return views.explain(self._desk, self._desk.roots.get(namespace), tokens)

    def outline(
        self,
        namespaces: Iterable[Namespace] | None = None,
        *,
        order: Order = Order.TOKENS,
        max_branches: int = 1000,
        max_depth: int | None = None,
        ghosts: bool = True,
        now: float,
    ) -> Generator[None, None, Outline]:
        """Sum the trees up, and keep their largest or hottest branches.  Changes nothing.

        O(runs), in steps of some hundred: between them other verbs may be called.

        Args:
            namespaces: Which; all, if None.  One that stores nothing is left out.
            order: Which branches are kept, and which comes first.
            max_branches: How many are kept in all.
            max_depth: Runs below the root beyond which all is summed up.
            ghosts: Whether evicted runs are shown.
            now: The time.

        Raises:
            InvalidRequest: a bound below 1.
        """
        if max_branches < 1 or (max_depth is not None and max_depth < 1):
            raise InvalidRequest(f"{max_branches} branches to depth {max_depth}: give at least 1")
        roots = self._desk.roots
        chosen = list(roots) if namespaces is None else namespaces
        walk = Walk(self._desk, order, max_branches, max_depth, ghosts=ghosts)
        return walk.run([roots[one] for one in chosen if one in roots], now)

    def reset(self, namespace: Namespace) -> Reset:
        """Forget a namespace's prefixes.  O(1), also while leases are out.

        Leases keep their blocks until they end; all other blocks of the namespace are the first to
        be reused.
        """
        root = self._desk.roots.pop(namespace, None)
        if root is None:
            return Reset(0, 0)
        self._desk.tree.retire(root)
        return Reset(root.num_blocks, root.num_blocks - root.evictable)

    def snapshot(self, *, now: float) -> Snapshot:
        """Give the numbers of this moment.  O(leases)."""
        return views.snapshot(self._desk, now)

    def vitals(self, *, now: float) -> Vitals:
        """Give the numbers that are cheap enough for every second.  O(namespaces)."""
        return vitals(self._desk, now)

    def flights(self, most: int = 1000) -> list[FlightInfo]:
        """Give up to `most` of the prompts that leases are computing."""
        return flights(self._desk, most)

    def block_map(self, num_cells: int = 1024) -> Generator[None, None, tuple[int, ...]]:
        """Draw the pool: per cell the index in `blockmap.STATES` of what most of its blocks are.

        O(runs + blocks), in steps of some hundred runs: between them other verbs may be called.
        """
        return block_map(self._desk, num_cells)

    def check(self) -> None:
        """Walk everything and assert that every invariant holds.  O(everything).

        Raises:
            AssertionError: one does not; the message has the tree.
        """
        views.check(self._desk)

    def _check_prompt(self, tokens: bytes) -> None:
        if not tokens or len(tokens) % TOKEN_BYTES:
            raise InvalidRequest(
                f"a prompt of {len(tokens)} bytes is not one or more tokens of {TOKEN_BYTES} bytes"
            )
