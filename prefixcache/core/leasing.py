"""The verbs of a lease: acquire, commit, extend, fork, truncate, release; waiting, and time.

```
acquire ─► commit … ─► extend / commit … ─► release
   │          └ visible to all     │           └ stays cached until evicted
   └ or Waiting: for a prefix that └ or Waiting: for room
     another lease computes, or for room
```
"""

from __future__ import annotations

from math import inf

from prefixcache.core.desk import Desk
from prefixcache.core.flights import Extension, Request
from prefixcache.core.tape import COMMITTED, TRUNCATED
from prefixcache.errors import CacheError, InvalidRequest, NotFound, PoolExhausted, QuotaExceeded
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    Committed,
    Ended,
    Grant,
    LeaseId,
    Namespace,
    Partial,
    Released,
    TableUpdate,
    TicketId,
    Waiting,
    WorkerId,
)


class Leasing:
    """Everything that a lease goes through."""

    _desk: Desk
    block_size: int
    partial: Partial

    def acquire(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        attached: bool = True,
        now: float,
    ) -> Grant | Waiting:
        """Match, protect and allocate, in one step.

        O(nodes on the path + new blocks).  At least one token is left to compute, for its logits.

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
            now: The time.

        Returns:
            The grant; or `Waiting`, and the outcome comes from `settled`.

        Raises:
            InvalidRequest: no tokens, a torn token, more than the pool can ever hold, or the
                request id of a lease that was asked for with something else.
            NotFound: the worker is not attached to the namespace.
            PoolExhausted: not enough blocks are free or evictable now; or, if it chose to wait,
                too many wait for room.
            QuotaExceeded: its namespace or tenant may not hold so many blocks (now, or ever).
        """
        desk = self._desk
        member = desk.leases.worker(worker, namespace if attached else None)
        self._check_prompt(tokens)
        if reserve < 0:
            raise InvalidRequest(f"cannot reserve {reserve} tokens; give 0 or more")
        if not attached:
            desk.make_way(namespace)
            desk.root(namespace)
        request = Request(worker, namespace, tokens, reserve, request_id)
        if (earlier := desk.earlier(member, request)) is not None:
            return earlier  # whatever has become of quotas and of the line since then
        total = desk.holdings.blocks_for(len(tokens) // TOKEN_BYTES + reserve)
        quotas = desk.holdings.quotas
        if quotas.any_limit:
            quotas.refuse_hopeless(quotas.account(namespace), total)
        line = desk.room.line
        try:
            if line and line.is_closed_for(None):
                raise PoolExhausted(
                    f"needs up to {many(total, 'block')}, and {many(len(line), 'request', 'wait')} "
                    "for room that no other may pass any more",
                    retry_after_s=desk.leases.ttl_s,
                )
            outcome = desk.attempt(member, request, now, wait=wait_s > 0)
        except PoolExhausted as short:
            if wait_s <= 0:
                raise
            line.refuse_if_full(short, namespace.tenant)
            ticket = desk.room.enter(request, namespace.tenant, now + wait_s)
            ticket.over_quota = isinstance(short, QuotaExceeded)
            desk.room.wait_for_room(ticket)
            return Waiting(ticket.id, None, 0)
        if isinstance(outcome, Grant):
            if line:
                line.pass_by(line.heads())
            return outcome
        ticket = desk.room.enter(request, namespace.tenant, now + wait_s)
        desk.room.wait_for(ticket, outcome.owner.serial, outcome.target)
        return Waiting(ticket.id, outcome.owner.id, outcome.num_tokens)

    def settled(self) -> list[tuple[TicketId, Grant | TableUpdate | CacheError]]:
        """Take the outcomes of waiting requests since the last call."""
        settled, self._desk.settled = self._desk.settled, []
        return settled

    def cancel(self, worker: WorkerId, ticket: TicketId, *, now: float) -> bool:
        """Stop waiting.  If the grant is there already, its lease is released.  Idempotent.

        Returns:
            False if it is an `extend` that has its room already: the outcome comes all the same,
            since the table has changed.
        """
        desk = self._desk
        found = desk.room.tickets.get(ticket)
        if found is not None and found.request.worker == worker:
            desk.room.leave(found)
            desk.serve(now)  # who could not pass it may now
        for settled in desk.settled:
            if settled[0] == ticket:
                if isinstance(settled[1], TableUpdate):
                    return False
                desk.settled.remove(settled)
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
        own = self._desk.leases.get(worker, lease, now)
        if len(new_tokens) % TOKEN_BYTES:
            raise InvalidRequest(
                f"{many(len(new_tokens), 'byte', 'are')} not whole tokens of {TOKEN_BYTES}"
            )
        known = own.num_tokens + len(new_tokens) // TOKEN_BYTES
        room = len(own.table) * self.block_size
        if not own.committed <= num_tokens <= min(known, room):
            raise InvalidRequest(
                f"cannot commit {many(num_tokens, 'token')} of lease {lease}: {own.committed:,} "
                f"are committed, {known:,} known, and its {many(len(own.table), 'block', 'have')} "
                f"room for {room:,}"
            )
        if own.tail_is_shared and num_tokens > own.committed:
            raise InvalidRequest(
                f"the last block of lease {lease} is shared by a fork; extend it before writing"
            )
        desk = self._desk
        own.rest += new_tokens
        # The first token that others may see from now on: without tails, that of a whole block.
        news = own.committed if self.partial is Partial.TAILS else own.start
        desk.holdings.drop_source(own)
        indexed = 0
        if num_tokens > own.committed:
            indexed = desk.holdings.publish(own, num_tokens)
            desk.holdings.recount(own)
        if desk.tape is not None:
            desk.tape((COMMITTED, own.serial, num_tokens, new_tokens, None))
        if own.flight is not None and own.committed * TOKEN_BYTES >= len(own.flight):
            desk.flights.land(own)
        if desk.room.tickets:
            desk.call(own)
            if indexed:
                desk.landed(own, news)
            desk.serve(now)
        return Committed(num_tokens, indexed)

    def extend(
        self,
        worker: WorkerId,
        lease: LeaseId,
        num_tokens: int,
        *,
        wait_s: float = 0.0,
        now: float,
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
            How the table changed; or `Waiting`, and the outcome comes from `settled`.

        Raises:
            InvalidRequest: more than the pool can ever hold, or this lease waits already.
            PoolExhausted: not enough blocks are free or evictable now; or, if it chose to wait,
                too many wait for room.
            QuotaExceeded: its namespace or tenant may not hold so many blocks.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        desk = self._desk
        own = desk.leases.get(worker, lease, now)
        if num_tokens < 0:
            raise InvalidRequest(f"cannot make room for {num_tokens} tokens; give 0 or more")
        if desk.room.line:
            desk.room.line.refuse_second(own)
        try:
            return desk.extend(own, num_tokens, now)
        except PoolExhausted as short:
            if wait_s <= 0:
                raise
            tenant = own.namespace.tenant
            desk.room.line.refuse_if_full(short, tenant)
            ticket = desk.room.enter(Extension(worker, own, num_tokens), tenant, now + wait_s)
            ticket.over_quota = isinstance(short, QuotaExceeded)
            desk.room.wait_for_room(ticket)
            return Waiting(ticket.id, None, 0)

    def fork(self, worker: WorkerId, lease: LeaseId, n: int, *, now: float) -> tuple[Grant, ...]:
        """Make `n` leases that share every committed block of this one.  Allocates nothing.

        O(n + blocks): the children share one table, in the answer too, until they differ.

        For parallel sampling and beam search.  Each child knows the committed tokens; it calls
        `extend` before it writes, and gets a copy of the last, partly filled block then.

        Raises:
            InvalidRequest: `n` is less than 1, or nothing is committed.
            PoolExhausted: there are too many leases.
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        own = self._desk.leases.get(worker, lease, now)
        if n < 1:
            raise InvalidRequest(f"cannot fork into {n} leases; ask for at least 1")
        if not own.committed:
            raise InvalidRequest(f"nothing of lease {lease} is committed; commit before forking")
        member = self._desk.leases.worker(worker)
        self._desk.admit_leases(own.namespace.tenant, n)
        table = self._desk.holdings.shared_table(own)
        return tuple(self._desk.fork(member, own, table, now) for _ in range(n))

    def num_committed_blocks(self, worker: WorkerId, lease: LeaseId, *, now: float) -> int:
        """Count the blocks of a lease's committed tokens: those a fork has.  O(1).

        Raises:
            NotFound, LeaseExpired: the lease is not there (any more).
        """
        return -(-self._desk.leases.get(worker, lease, now).committed // self.block_size)

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
                f"cannot truncate lease {lease} to {many(num_tokens, 'token')}; it knows "
                f"{own.num_tokens:,}"
            )
        try:
            update = self._desk.holdings.truncate(own, num_tokens)
        except PoolExhausted as short:
            raise self._desk.refusal(short, own.namespace.tenant, now) from None
        self._desk.holdings.recount(own)
        if self._desk.tape is not None:
            self._desk.tape((TRUNCATED, own.serial, num_tokens, b"", None))
        if (prompt := own.flight) is not None:
            self._desk.flights.land(own)
            self._desk.flights.start(own, prompt[: num_tokens * TOKEN_BYTES])
        self._desk.call(own, everyone=True)
        self._desk.serve(now)
        return update

    def release(self, worker: WorkerId, lease: LeaseId, *, now: float) -> Released:
        """End a lease.  Idempotent.  Its committed blocks stay cached until they are evicted.

        Raises:
            NotFound: the worker never had that lease.
        """
        member = self._desk.leases.worker(worker)
        own = member.leases.get(lease)
        if own is None:
            if member.was_granted(lease):
                return Released(0)
            raise NotFound(f"no lease {lease} of worker {member.name!r}")
        freed = self._desk.end(own, now, writes_on=False).num_freed
        self._desk.serve(now)
        return Released(freed)

    def expire(self, *, now: float, most: int | None = None) -> Ended:
        """End what time has ended: leases, pins, waits; and go on with what steps have left.

        Shared blocks come back at once; those the owner could still write to are quarantined.

        Args:
            now: The time.
            most: How many leases and pins each are ended, or looked at, in this step, by default
                all: first those of workers that leave.  `next_deadline` says that there are others.
        """
        desk = self._desk
        limit, work = (inf, inf) if most is None else (most, None)
        desk.pins.expire(now, limit)
        over = desk.end_leaving(now, limit)
        if not over or most is None:
            due = desk.leases.due(now, limit)
            over += [desk.end(lease, now, writes_on=True) for lease in due]
        if over:
            desk.serve(now, work)
        else:
            desk.go_on(now, work)
        next_end = desk.leases.next_deadline()
        all_ended = not desk.leases.leaving and (next_end is None or next_end >= now)
        if all_ended and desk.give_up(now, work):  # whoever waits has had what these gave back
            desk.serve(now, work)
        return Ended.total(over)

    def next_deadline(self) -> float | None:
        """Give a time before which `expire` has nothing to do; None if nothing can expire.

        O(1), amortised.  Where steps have left something to do, it is over already.
        """
        desk = self._desk
        if desk.is_behind or desk.leases.leaving or desk.pins.is_behind:
            return -inf
        times = (
            desk.leases.next_deadline(),
            desk.room.next_deadline(),
            desk.pins.next_deadline(),
        )
        return min((time for time in times if time is not None), default=None)

    def _check_prompt(self, tokens: bytes) -> None:
        if not tokens or len(tokens) % TOKEN_BYTES:
            raise InvalidRequest(
                f"a prompt of {many(len(tokens), 'byte')} is not one or more tokens of "
                f"{TOKEN_BYTES} bytes"
            )
