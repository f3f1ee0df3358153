"""The lessor: grants leases, lets requests wait, ends leases.

It holds all state of a cache and takes the decisions that the verbs share; `PrefixCache` checks
what callers send, and names the verbs.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable
from math import inf

import numpy as np

from prefixcache.core.account import Account
from prefixcache.core.block_keys import Generations
from prefixcache.core.block_manager import LARGE_TABLE, OWN_TABLE, BlockManager
from prefixcache.core.block_pool import BlockPool
from prefixcache.core.hauls import NEVER, PORTER, Hauls, Restore, TierSizes
from prefixcache.core.history import History
from prefixcache.core.inflight import Inflight, JoinGain
from prefixcache.core.lease import KeptBytes, Lease, LeaseTable, Worker
from prefixcache.core.ledger import Tallies, approximated, resume, settle, unused
from prefixcache.core.namespaces import NamespaceTable
from prefixcache.core.node import Match, Root
from prefixcache.core.oplog import ENDED, FORKED, GRANTED, Put
from prefixcache.core.protection import Pins
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.remote import NAME_BYTES, REMOTE, QuestionId, Remote, Storing
from prefixcache.core.segments import Segments, beside
from prefixcache.core.tiers import Tier
from prefixcache.core.wait_queue import Extension, Request, Ticket, WaitQueue
from prefixcache.core.worth import Rate, Verdict
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LeaseExpired,
    PoolExhausted,
    QuotaExceeded,
)
from prefixcache.texts import many
from prefixcache.types import (
    TOKEN_BYTES,
    BlockTable,
    Ended,
    Grant,
    HaulId,
    Ledger,
    Namespace,
    Partial,
    TableUpdate,
    TicketId,
    Waiting,
)

_LOOKED_AT = 4
"""Namespaces that are looked at, whether they still hold anything, when another one comes."""
_LOOKED_AT_IN_NEED = 256
_MOST_WORK = 128
"""What is done in one step for requests that wait, in looks at one of them: about half a ms."""
_TRY = 8
"""Looks that trying a request counts as, and once more for each `_TRIED_BYTES` of its prompt."""
_TRIED_BYTES = 8192
_RESTORED_SHARE = 4
"""What part of the pool may be coming back from the tier at the same time."""
MOST_EVICTED = 256
"""Blocks that are evicted in one go for a request that can be made a little later."""


class Lessor:
    """All state of one cache, and the steps from a request to the end of its lease."""

    __slots__ = (
        "blocks",
        "generations",
        "hauls",
        "history",
        "inflight",
        "leases",
        "namespaces",
        "oplog",
        "partial",
        "pins",
        "prompts",
        "roots",
        "segments",
        "settled",
        "tables",
        "tallies",
        "tick",
        "tree",
        "waiting",
    )

    def __init__(
        self,
        tree: RadixTree,
        pool: BlockPool,
        partial: Partial,
        *,
        ttl_s: float,
        max_pinned: int,
        max_line: int,
        max_leases: int,
        max_namespaces: int,
        max_prompt_bytes: int,
        max_table_bytes: int,
        history_bytes: int,
        tiers: TierSizes,
    ) -> None:
        self.tree = tree
        if partial is Partial.TAILS and tree.block_bytes > TOKEN_BYTES:
            tree.weigh_tails(pool.num_blocks)
        self.tick: Callable[[float], None] | None = tree.policy.tick
        self.oplog: Put | None = None
        self.partial = partial
        self.tables = KeptBytes(
            max_table_bytes, "the room for tables of leases", "bytes of block tables"
        )
        self.blocks = BlockManager(tree, pool, partial, self.tables)
        self.leases = LeaseTable(ttl_s, max_leases)
        self.prompts = KeptBytes(
            max_prompt_bytes, "the room for prompts", "bytes of prompts that wait or are computed"
        )
        self.inflight = Inflight(tree.block_bytes // TOKEN_BYTES, partial, self.prompts)
        self.waiting = WaitQueue(max_line, self.prompts)
        self.pins = tree.pins = Pins(tree, max_pinned)
        self.roots: dict[Namespace, Root] = {}
        self.segments: Segments | None = None
        """Finds the same tokens at other places, where that is wanted."""
        self.namespaces = NamespaceTable(max_namespaces)
        self.tallies = Tallies()
        self.settled: list[tuple[TicketId, Grant | TableUpdate | CacheError]] = []
        self.history = History(pool.num_blocks, history_bytes)
        self.hauls: Hauls | None = None
        """What moves between the pool and the tier below it, if there is one."""
        self.generations: Generations | None = None
        """Who counts the resets of namespaces, if anything outlives one elsewhere."""
        if tiers.is_any:
            tier = Tier(tiers.host, tree.block_bytes, tiers.disk, tiers.host_ahead)
            if tiers.below:
                tree.ghosts.set_tier(tier)
            size = tree.block_bytes // TOKEN_BYTES
            self.hauls = self.blocks.hauls = Hauls(tier, pool, tiers, size)
            if self.hauls.remote is not None:
                self.generations = self.hauls.remote.generations
            porter = self.leases.workers[PORTER] = Worker(PORTER, "porter")
            porter.renewed_until = NEVER

    def root(self, namespace: Namespace) -> Root:
        """Give a namespace's root; make it if it is new."""
        root = self.roots.get(namespace)
        if root is None:
            root = self.roots[namespace] = Root(namespace)
            self.blocks.quotas.open(root)
            self.namespaces.open(namespace)
        return root

    def make_way(self, namespace: Namespace) -> None:
        """Let a namespace be attached: let others go that hold nothing, or only what is cached.

        O(1): a few are looked at each time.

        Raises:
            PoolExhausted: there are too many; the message has the arithmetic.
        """
        if namespace in self.roots:
            return
        for one in self.namespaces.next(_LOOKED_AT):
            if not self.roots[one].num_blocks:
                self._let_go(one)
        shares = self.namespaces.shares
        try:
            shares.check(namespace.tenant)
        except PoolExhausted as full:
            for one in self.namespaces.next(_LOOKED_AT_IN_NEED):
                if one.tenant == namespace.tenant and self._let_go(one):
                    return
            if shares.total < shares.limit:
                raise QuotaExceeded(str(full), self.leases.ttl_s) from None
            raise PoolExhausted(
                f"{many(shares.total, 'namespace', 'are')} known, --max-namespaces allows no more: "
                "workers are attached to them, or pins, quotas and leases speak for them",
                self.leases.ttl_s,
            ) from None

    def _let_go(self, namespace: Namespace) -> bool:
        """Forget a namespace, and what is cached in it, unless somebody uses it or speaks for it.

        O(1).  What it counted is added to that of its name without a salt.

        Returns:
            Whether it is gone.
        """
        root, quotas = self.roots[namespace], self.blocks.quotas
        if self.namespaces.is_used(namespace) or root in self.pins or quotas.is_needed(namespace):
            return False
        del self.roots[namespace]
        if root.num_blocks:
            self.tree.drop_namespace(root)
        elif (tier := self.tree.ghosts.tier) is not None and root.ghosts:
            if self.tree.listener is not None:
                self.tree.listener.cleared(namespace)  # of what lies below the pool
            tier.sweep(root)
        root.retired = True  # for who waits for something of it
        quotas.close(namespace)
        self.namespaces.close(namespace)
        if self.tree.listener is not None:
            self.tree.listener.left(namespace)
        if self.tallies.get(namespace) is not None:
            self.tallies.rename(namespace, self.namespaces.depart(namespace))
        return True

    def acquire(
        self, member: Worker, request: Request, wait_s: float, now: float
    ) -> Grant | Waiting:
        """Grant a request; or let it wait, for a prefix in flight or for room."""
        if request.request_id and (earlier := self.earlier(member, request, now)) is not None:
            return earlier  # whatever has become of quotas and of the line since then
        blocks, waiting, tenant = self.blocks, self.waiting, request.namespace.tenant
        request.num_blocks = blocks.blocks_for(len(request.tokens) // TOKEN_BYTES + request.reserve)
        self.prompts.admit(tenant, len(request.tokens))
        if request.num_blocks >= LARGE_TABLE:
            self.tables.admit(tenant, request.num_blocks * OWN_TABLE)
        if blocks.quotas.any_limit:
            blocks.quotas.refuse_hopeless(
                blocks.quotas.account(request.namespace), request.num_blocks
            )
        try:
            if waiting.tickets and waiting.line.is_blocked_by_head(None):
                raise PoolExhausted(
                    f"needs up to {many(request.num_blocks, 'block')}, and "
                    f"{many(len(waiting.line), 'request', 'wait')} for room that no other may pass "
                    "any more",
                    retry_after_s=self.leases.ttl_s,
                )
            outcome = self.attempt(member, request, now, wait=wait_s > 0)
        except PoolExhausted as short:
            if wait_s <= 0 or not request.for_room:
                raise
            waiting.line.refuse_if_full(short, tenant)
            ticket = waiting.enter(request, tenant, now + wait_s)
            ticket.over_quota = isinstance(short, QuotaExceeded)
            waiting.wait_for_room(ticket)
            return Waiting(ticket.id, None, 0)
        if isinstance(outcome, JoinGain):
            ticket = waiting.enter(request, tenant, now + wait_s)
            waiting.wait_for(ticket, outcome.owner.serial, outcome.target, request.waits_until)
            return Waiting(ticket.id, outcome.owner.id, outcome.num_tokens)
        if waiting.tickets and waiting.line:
            waiting.line.note_bypass(waiting.line.heads())
        return outcome

    def attempt(
        self, member: Worker, request: Request, now: float, *, wait: bool
    ) -> Grant | JoinGain:
        """Grant a request, or say which flight to wait for.  A failed one changes nothing.

        Raises:
            PoolExhausted: there is no room; the message says who has it.
        """
        tree, blocks, namespace, tokens = (
            self.tree,
            self.blocks,
            request.namespace,
            request.tokens,
        )
        root = self.roots.get(namespace) or self.root(namespace)
        stored = match = tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
        if not request.reuse:
            match = tree.match(root, tokens, 0)
        if request.waits_until < inf:
            request.end_wait(now)
        pending = 0
        if (
            self.inflight.below
            and request.reuse
            and (gain := self.inflight.find(root, match, tokens)) is not None
        ):
            if wait and (gain.owner.worker != PORTER or request.patience_s > 0):
                self._note_wait(request, match, gain, now)
                return gain
            pending = gain.num_tokens
        if (
            self.hauls is not None
            and wait
            and request.reuse
            and request.patience_s > 0
            and (gain := self._brought_back(request, root, match, now)) is not None
        ):
            self._note_wait(request, match, gain, now)
            return gain
        if request.segments is not None:
            moved = self._attempt_segments(member, request, root, match, pending, now)
            if moved is not None:
                return moved
        account = root.account or blocks.quotas.account(namespace)
        self.leases.admit(namespace.tenant)
        try:
            need, source = blocks.plan(match, request.num_blocks, account, request.min_partial)
        except PoolExhausted as short:
            raise self.refusal(short, namespace.tenant, now) from None
        if self.tick is not None:
            self.tick(now)
        # Nothing fails from here on.  The ledger first: a lock may split the run it looks at.
        partial = 0 if source is None else match.partial_tokens
        joined, restored = (0, 0) if request.first_end < 0 else request.waited_for(match.end)
        ledger = settle(tree, stored, tokens, partial=partial, joined=joined, restored=restored)
        if not request.reuse:
            ledger = unused(ledger)
        begun = member.begun.pop(request.request_id, None) if member.begun else None
        if begun is not None and begun.is_of(namespace, tokens):
            ledger = resume(ledger, begun)
        seen = self.history.look(tree, stored, tokens, ledger) if self.history.is_kept else None
        if tree.asked is not None:
            tree.asked(stored, tokens)
        node = tree.lock(match)
        lease = self.leases.open(member, root, node, now)
        if source is not None:
            lease.copied = tree.touch(match)
            lease.copied_tokens = lease.copied.tokens
            lease.copied_at, lease.num_copied = match.end // TOKEN_BYTES, match.partial_tokens
        copies = blocks.allocate(lease, match, node, need, source)
        lease.rest = tokens[match.end :]
        lease.computed_from = begun.start if begun and ledger.resumed else lease.committed
        lease.num_cached = lease.committed
        self.inflight.add(lease, tokens)
        table, ttl_s = lease.table[:], self.leases.ttl_s
        grant = Grant(lease.id, table, lease.committed, pending, copies, ledger, ttl_s)
        if request.request_id:
            lease.grant, lease.request_id = grant, request.request_id
            lease.asked = request.asks
            member.requests[request.request_id] = lease
        self.tallies.add(namespace, ledger)
        if seen is not None:
            self.history.note(seen, root, node, member.name, request.request_id, tokens, grant, now)
        if self.oplog is not None:
            self.oplog((GRANTED, lease.serial, ledger.reused, tokens, namespace))
        if self.hauls is not None:
            self.hauls.worth.num_requests += 1
            if request.declined:
                self._note_declined(request, root, now)
        return grant

    def _attempt_segments(
        self, member: Worker, request: Request, root: Root, exact: Match, pending: int, now: float
    ) -> Grant | None:
        """Grant a request with segments; None: there are none, or no room: it is served exactly.

        Args:
            member: Who asks.
            request: For what.
            root: Of its own namespace, which is exact.
            exact: Its prefix there.
            pending: What another lease is computing of it.
            now: The time.
        """
        tree, blocks, tokens = self.tree, self.blocks, request.tokens
        finder, again = self.segments, request.segments
        own = root.account or blocks.quotas.account(root.namespace)
        if finder is None or again is None or own.max_held is not None:
            return None  # what is approximate answers to another account, below the same tenant's
        space = beside(root.namespace)
        found = finder.find(exact, self.roots.get(space), tokens, again, request.min_partial)
        if found is None:
            return None
        self.leases.admit(space.tenant)
        need = blocks.plan_segments(found, request.num_blocks, own)
        if need is None or not self._makes_way_beside(root.namespace, space):
            return None
        if self.tick is not None:
            self.tick(now)
        # Nothing fails from here on, as in `attempt`.
        other = self.roots.get(space) or self.root(space)
        match = found.kept if found.is_beside else tree.match(other, tokens, 0)
        partial = 0 if found.is_beside else found.num_source
        joined, restored = (0, 0) if request.first_end < 0 else request.waited_for(exact.end)
        plain = settle(tree, exact, tokens, partial=partial, joined=joined, restored=restored)
        ledger = approximated(plain, found.runs, found.num_approximate)
        begun = member.begun.pop(request.request_id, None) if member.begun else None
        if found.is_beside and begun is not None and begun.is_of(space, tokens):
            ledger = resume(ledger, begun)
        seen = self.history.look(tree, exact, tokens, ledger) if self.history.is_kept else None
        if tree.asked is not None:
            tree.asked(exact, tokens)
        kept = tree.lock(found.kept)
        if found.source is not None:
            tree.touch(found.kept)
        node = kept if found.is_beside else tree.lock(match)
        lease = self.leases.open(member, other, node, now)
        lease.base = None if found.is_beside else kept
        copies = blocks.allocate_segments(lease, found, match, node, need)
        lease.rest = tokens[match.end :]
        lease.computed_from = begun.start if begun and ledger.resumed else found.num_cached
        table, ttl_s = lease.table[:], self.leases.ttl_s
        if found.is_beside:
            pending = 0  # nobody is told of what is computed there
        grant = Grant(
            *(lease.id, table, found.num_cached, pending, copies, ledger, ttl_s),
            segments=found.segments,
            approximate=True,
        )
        if request.request_id:
            lease.grant, lease.request_id = grant, request.request_id
            lease.asked = request.asks
            member.requests[request.request_id] = lease
        self.tallies.add(root.namespace, ledger)
        if seen is not None:
            if found.is_beside:
                seen = (None, 0, b"", seen[3])  # where its exact prefix ends is not locked
            self.history.note(seen, root, kept, member.name, request.request_id, tokens, grant, now)
        return grant

    def _makes_way_beside(self, namespace: Namespace, space: Namespace) -> bool:
        """Whether there may be another namespace beside one, which stays; see `make_way`."""
        self.namespaces.join(namespace)
        try:
            self.make_way(space)
        except PoolExhausted:
            return False
        finally:
            self.namespaces.leave(namespace)
        return True

    # ------------------------------------------------------------------ what moves between tiers

    def _note_wait(self, request: Request, match: Match, gain: JoinGain, now: float) -> None:
        """Note from where on a request waits for others, and whether for a restore."""
        if request.first_end < 0:
            request.first_end = match.end
        request.count_restored(match.end)
        if gain.owner.worker == PORTER and self.hauls is not None:
            request.restored_from = match.end
            restore = self.hauls.restores[gain.owner.serial]
            request.begin_wait((gain.owner.serial, restore.begun), restore.due, now)

    def below(self, match: Match, tokens: bytes) -> BlockTable:
        """Give the places of what follows a match and could be brought back.  Changes nothing."""
        node, width, hauls = match.node, self.tree.block_bytes, self.hauls
        if hauls is None or not hauls.has_porter:
            return array("i")
        places, end = array("i"), (len(tokens) - TOKEN_BYTES) // width * width
        if match.used == len(node.blocks):
            places = self.tree.ghosts.places(node, tokens, match.end, end)
        if hauls.tier.num_found:
            start = match.end + len(places) * width
            places += self._found(hauls.tier, node.root.namespace, tokens, start, end)
        return places

    def _found(
        self, tier: Tier, namespace: Namespace, tokens: bytes, start: int, end: int
    ) -> BlockTable:
        """Give the places of what an earlier life left of `tokens[start:end]`, up to a gap.

        Changes nothing.  O(tokens), in C, and a step for each time that it is four times as long.
        """
        keys, found = self.tree.keys, array("i")
        if keys is None or start >= end:
            return found
        width, step = self.tree.block_bytes, self.tree.block_bytes
        key = keys.end(keys.start(namespace), 0, tokens[:start])
        while start < end:
            part = tokens[start : min(start + step, end)]
            told = keys.go_on(key, start // TOKEN_BYTES, part)
            more = tier.find(told)
            found += more
            if len(more) * width < len(part):
                break
            start, step, key = start + len(part), 4 * step, told[-1:]
        return found

    def _brought_back(
        self, request: Request, root: Root, match: Match, now: float
    ) -> JoinGain | None:
        """Have what is not in the pool brought back: from this machine, then from elsewhere."""
        gain = self.restore(request, root, match, now)
        return self.ask(request, root, match, now) if gain is None else gain

    def restore(self, request: Request, root: Root, match: Match, now: float) -> JoinGain | None:
        """Have what lies below the pool of a prompt brought back; say what waiting for it brings.

        None if nothing lies there on this machine, if computing it is quicker, or if it would keep
        others from room.
        One tier at a time: who has waited for what lies nearer is tried again.  O(nodes + blocks).
        """
        hauls, blocks, tokens = self.hauls, self.blocks, request.tokens
        request.declined = ""
        if hauls is None or not (match.node.ghosts or hauls.tier.num_found):
            return None
        if not (places := self.below(match, tokens)):
            return None
        if self.waiting.tickets and self.waiting.line:
            request.declined = "room"
            return None
        if (room := self._room_to_restore(hauls)) <= 0:
            request.declined = "busy"
            return None
        places = places[: min(max(blocks.pool.num_free, hauls.sizes.piece), room)]
        end = match.end + len(places) * self.tree.block_bytes
        if end <= match.end + match.partial_tokens * TOKEN_BYTES:
            return None  # a copy of a block that is there brings as much
        account = root.account or blocks.quotas.account(root.namespace)
        verdict = hauls.weigh(places, account.rate)[0]
        if not verdict.is_worth:
            request.declined, request.declined_tier = "slow", verdict.tier
            return None
        lease = self._begin_restore(root, match, tokens, places[: verdict.num_blocks], verdict, now)
        if lease is None:
            request.declined = "room"
            return None
        hauls.worth.fetch()
        end = len(lease.flight or b"") // TOKEN_BYTES
        return self.inflight.gain(lease, match, end, len(tokens) // TOKEN_BYTES)

    def _begin_restore(
        self,
        root: Root,
        match: Match,
        tokens: bytes,
        places: BlockTable,
        verdict: Verdict,
        now: float,
        *,
        is_waited_for: bool = True,
    ) -> Lease | None:
        """Lend the porter the blocks behind a match, to be filled from slots; None: no room."""
        hauls, end = self.hauls, match.end + len(places) * self.tree.block_bytes
        lease = self._lend_porter(root, match, tokens[:end], len(places), now)
        if lease is None or hauls is None:
            return None
        if is_waited_for:
            self.inflight.add(lease, tokens[:end])
        hauls.begin_restore(lease, places, lease.rest, verdict, now, is_waited_for=is_waited_for)
        return lease

    def _lend_porter(
        self, root: Root, match: Match, tokens: bytes, num_blocks: int, now: float
    ) -> Lease | None:
        """Lend the porter a prefix, and blocks for what follows it; None: there is no room.

        Args:
            root: Whose.
            match: What is stored of the prefix.
            tokens: It, and what the lease is for behind it.
            num_blocks: Blocks of its own.
            now: The time.
        """
        blocks, tenant, end = self.blocks, root.namespace.tenant, len(tokens)
        width = self.tree.block_bytes
        account = root.account or blocks.quotas.account(root.namespace)
        try:
            self.leases.admit(tenant)
            self.prompts.admit(tenant, end)
            if end // width >= LARGE_TABLE:
                self.tables.admit(tenant, end // width * OWN_TABLE)
            blocks.admit(num_blocks, account, match)
        except PoolExhausted:
            return None
        if self.tick is not None:
            self.tick(now)
        node = self.tree.lock(match)
        lease = self.leases.open(self.leases.workers[PORTER], root, node, now)
        blocks.allocate(lease, match, node, num_blocks, None)
        lease.rest = tokens[match.end :]
        lease.computed_from = lease.committed
        return lease

    def _note_declined(self, request: Request, root: Root, now: float) -> None:
        """Count a request that was granted without what lies below; at times look there again.

        Then a piece at most is brought back, to see whether it still takes too long; of what is
        known to be slow, less, since what lies elsewhere waits behind it.  Nobody waits for it, and
        nothing is evicted for it.  O(1), at most once a second O(nodes + tokens).
        """
        hauls, tokens = self.hauls, request.tokens
        if hauls is None:
            return
        hauls.worth.decline(request.declined)
        speed = hauls.worth.speeds[request.declined_tier]
        if request.declined != "slow" or not speed.decline(now):
            return
        match = self.tree.match(root, tokens, len(tokens) - TOKEN_BYTES)
        if request.declined_tier == REMOTE and hauls.remote is not None:
            end = match.end + hauls.remote.piece * self.tree.block_bytes
            end = min(hauls.remote.reach(match.end, len(tokens)), end)
            is_open = hauls.remote.is_open(now) and hauls.remote.may_ask(root.namespace.tenant)
            if is_open and end > match.end:
                asked = self._begin_question(hauls, root, match, tokens[:end], now, waited=False)
                if asked is not None:
                    speed.explore(now)
            return
        most = min(speed.num_explored(hauls.sizes.piece), self.blocks.pool.num_free)
        if not (places := self.below(match, tokens)[:most]):
            return
        verdict = hauls.weigh(places, None)[0]
        own = places[: verdict.num_blocks]
        if self._begin_restore(root, match, tokens, own, verdict, now, is_waited_for=False):
            hauls.worth.speeds[verdict.tier].explore(now)

    def learn_rate(self, own: Lease, num_tokens: int, now: float) -> None:
        """Learn how long a namespace takes to compute from a lease that has its prompt now.  O(1).

        Args:
            own: The lease.
            num_tokens: Of its prompt.
            now: The time.
        """
        if self.hauls is not None:
            rate = own.account.rate
            if rate is None:
                rate = own.account.rate = Rate()
            computed = (num_tokens - own.num_cached) * self.hauls.worth.tokens_each
            rate.note(computed, now - own.since)

    def sink(self, now: float) -> None:
        """Evict the oldest blocks to the tier, some hundred, if fewer are free than should be."""
        hauls, pool = self.hauls, self.blocks.pool
        if hauls is None:
            return
        self._move_on(hauls, now)
        if (short := hauls.num_short(self.blocks.num_free)) <= 0:
            return
        short = min(short, self.tree.evictable, MOST_EVICTED)
        if short < hauls.least:
            return
        if self.tick is not None:
            self.tick(now)
        places = hauls.tier.take(short, hauls.limit.allowed(now))
        sunk, others = self.tree.sink(len(places), places)
        hauls.tier.give_back(places)
        hauls.sink(sunk)
        pool.release(others)
        self._move_on(hauls, now)

    def _move_on(self, hauls: Hauls, now: float) -> None:
        """Have the oldest blocks of HOST go on to DISK; what was lost there is a ghost like any."""
        hauls.move_on(now)
        self.tree.forget()

    def hauled(self, number: HaulId, num_good: int, seconds: float, now: float) -> None:
        """End a haul; index what has come back, and let who waits for it be tried."""
        if self.hauls is not None:
            if (ended := self.hauls.end(number, num_good, seconds, now)) is not None:
                self._land(*ended, now)
            elif self.hauls.stored(number, num_good) is not None:
                self._end_storing(now)
        self.serve(now)

    def _land(self, restore: Restore, num_blocks: int, now: float) -> None:
        own, blocks = restore.lease, self.blocks
        indexed, news = 0, own.start
        if num_blocks:
            indexed = blocks.commit(own, own.start + num_blocks * blocks.block_size)
            blocks.count_private(own)
        is_over = not restore.pieces
        if restore.is_broken:
            self._note_not_brought(restore, now)
        if own.flight is not None and (is_over or restore.is_given_up):
            self.inflight.remove(own)
        if self.waiting.tickets:
            self.call(own)
            if indexed:
                self.landed(own, news)
            self.serve(now)  # before the end of its lease, so that nobody evicts it in between
        if is_over and self.hauls is not None:
            del self.hauls.restores[own.serial]
            self.end(own, now, writes_on=False)

    def give_up_restores(self, now: float) -> None:
        """Let nobody wait any longer for restores that take too long.  O(these · log)."""
        while self.hauls is not None and (late := self.hauls.overdue(now)) is not None:
            if late.question is not None and self.hauls.remote is not None:
                self.hauls.remote.hold(now)  # before anybody is tried again, who would ask
                self._end_question(late, now)
                continue
            self._note_not_brought(late, now)
            if late.lease.flight is not None:
                self.inflight.remove(late.lease)
            self.call(late.lease)

    def lose_hauls(self, now: float) -> None:
        """End all that was being moved: who moved it has ended.  O(hauls)."""
        if self.hauls is None:
            return
        remote = self.hauls.remote
        if remote is not None:
            for question in list(remote.asking):
                remote.take_back(question)
        for restore in self.hauls.lose_all():
            del self.hauls.restores[restore.lease.serial]
            self.end(restore.lease, now, writes_on=False)
        if remote is not None and remote.storing is not None:
            self._end_storing(now)
        self.serve(now)

    # ------------------------------------------------------------------ what others have, too

    def ask(self, request: Request, root: Root, match: Match, now: float) -> JoinGain | None:
        """Ask for what follows a match in a store elsewhere; say what waiting for it may bring.

        None if nobody is asked: too little is lacking, it was not there a moment ago, computing it
        is quicker than fetching all of it would be, or it would keep others from room.
        O(nodes + tokens), a copy.
        """
        hauls, tokens, start = self.hauls, request.tokens, match.end
        if hauls is None or (remote := hauls.remote) is None or request.declined:
            return None
        if not hauls.has_porter or not remote.is_open(now) or not remote.serves(root.namespace):
            return None
        end = remote.reach(start, len(tokens))
        if end <= start + match.partial_tokens * TOKEN_BYTES:
            return None
        if remote.is_absent(root, tokens, start, now):
            return None
        if self.waiting.tickets and self.waiting.line:
            request.declined = "room"
            return None
        if not remote.may_ask(root.namespace.tenant) or self._room_to_restore(hauls) <= 0:
            request.declined = "busy"
            return None
        account = root.account or self.blocks.quotas.account(root.namespace)
        verdict = hauls.weigh_remote((end - start) // self.tree.block_bytes, account.rate)
        if not verdict.is_worth:
            request.declined, request.declined_tier = "slow", REMOTE
            return None
        lease = self._begin_question(hauls, root, match, tokens[:end], now)
        if lease is None:
            request.declined = "room"
            return None
        return self.inflight.gain(lease, match, end // TOKEN_BYTES, len(tokens) // TOKEN_BYTES)

    def _room_to_restore(self, hauls: Hauls) -> int:
        """Count the blocks that may begin to come back now."""
        most = max(self.blocks.pool.num_blocks // _RESTORED_SHARE, hauls.sizes.piece)
        return most - hauls.num_rising

    def _begin_question(
        self,
        hauls: Hauls,
        root: Root,
        match: Match,
        tokens: bytes,
        now: float,
        *,
        waited: bool = True,
    ) -> Lease | None:
        """Ask for what of `tokens` is behind a match; None: there is no room for a lease.

        `waited`: whether anybody may wait for it.
        """
        lease = self._lend_porter(root, match, tokens, 0, now)
        if lease is None:
            return None
        num_blocks = (len(tokens) - match.end) // self.tree.block_bytes
        verdict = hauls.weigh_remote(
            num_blocks, None if root.account is None else root.account.rate
        )
        hauls.begin_question(lease, tokens, verdict, now, is_waited_for=waited)
        if waited:
            self.inflight.add(lease, tokens)
        return lease

    def _end_question(self, asked: Restore, now: float) -> None:
        """End a question that brings nothing, and let who waits for it be tried again."""
        hauls, lease = self.hauls, asked.lease
        if hauls is None or hauls.remote is None:
            return
        if asked.question is not None:
            hauls.remote.take_back(asked.question)
        del hauls.restores[lease.serial]
        self.end(lease, now, writes_on=False)

    def answered(self, question: QuestionId, is_there: bytes, names: bytes, now: float) -> None:
        """Take an answer: fetch what is there of a prompt, or store what is not of a lease."""
        hauls = self.hauls
        if hauls is None or (remote := hauls.remote) is None:
            return
        if (lease := remote.take_back(question)) is not None:
            self._fetch(hauls, remote, hauls.restores[lease.serial], is_there, names, now)
        elif remote.storing is not None and remote.storing.question == question:
            self._store(hauls, remote, remote.storing, is_there, names, now)
        else:
            remote.note_seen(question, len(is_there) - len(is_there.lstrip(b"\1")), now)
        self.serve(now)

    def _fetch(
        self,
        hauls: Hauls,
        remote: Remote,
        asked: Restore,
        is_there: bytes,
        names: bytes,
        now: float,
    ) -> None:
        """Begin to fetch what is there of what was asked for, as far as there is room for it."""
        lease, size, width = asked.lease, self.blocks.block_size, self.tree.block_bytes
        start = lease.start * TOKEN_BYTES
        prompt = lease.prefix(start + len(lease.rest))
        found = is_there.find(b"\0")
        if found < 0:
            found = len(is_there)
        else:
            remote.note_absent(lease.root, prompt, start + found * width, now)
        room = min(max(self.blocks.pool.num_free, hauls.sizes.piece), self._room_to_restore(hauls))
        count = min(found, room, len(names) // NAME_BYTES)
        verdict = hauls.weigh_remote(count, lease.account.rate)
        brings = count > 0 and hauls.has_porter and not lease.root.retired
        if brings and (verdict.is_worth or not asked.is_waited_for):
            try:
                self.extend(lease, lease.start + count * size, now)
            except PoolExhausted:
                brings = False
        else:
            brings = False
        if not brings:
            remote.note_absent(lease.root, prompt, start, now)
            self._end_question(asked, now)
            return
        lease.rest = lease.rest[: count * width]
        if lease.flight is not None:
            self.inflight.remove(lease)
            self.inflight.add(lease, prompt[: start + count * width])
            hauls.worth.fetch()
        asked.verdict = verdict
        hauls.begin_fetch(asked, names[: count * NAME_BYTES], lease.rest, now)
        self.call(lease, everyone=True)  # what they wait for may be less than they were told

    def store(self, own: Lease, *, is_over: bool = False) -> None:
        """Have stored elsewhere what a lease has computed, if that is enough; O(tokens), a copy.

        Args:
            own: The lease; not one of the porter's.
            is_over: Whether it ends now: then a block is enough.
        """
        hauls, whole = self.hauls, own.start // self.blocks.block_size
        if hauls is None or (remote := hauls.remote) is None or own.worker == PORTER:
            return
        new = whole - max(own.stored, own.num_cached // self.blocks.block_size)
        least = 1 if is_over else remote.least_stored
        if new < least or not hauls.has_porter or own.root.retired:
            return
        if not remote.is_there or not remote.serves(own.namespace):
            return
        remote.line_up(own.root, own.prefix(whole * self.tree.block_bytes), own.stored)
        own.stored = whole

    def _store(
        self,
        hauls: Hauls,
        remote: Remote,
        storing: Storing,
        is_there: bytes,
        names: bytes,
        now: float,
    ) -> None:
        """Begin to store what is not there of a prefix, as far as it is still in the pool."""
        root, tokens, first = storing.waiting
        width = self.tree.block_bytes
        storing.seen, storing.question = first + len(is_there), None
        lacking = np.flatnonzero(np.frombuffer(is_there, np.uint8) == 0) + first
        if root.retired or not hauls.has_porter or not len(lacking):
            if not is_there:  # nobody knows
                remote.num_unstored += len(tokens) // width - first
            self._end_storing(now)
            return
        lacking = lacking[: remote.most_stored]
        if len(lacking) == remote.most_stored:
            storing.seen = int(lacking[-1]) + 1
        tokens = tokens[: (int(lacking[-1]) + 1) * width]
        match = self.tree.match(root, tokens)
        num_lacking, lease = len(lacking), None
        lacking = lacking[lacking < match.end // width]
        remote.num_unstored += num_lacking - len(lacking)  # evicted before it was their turn
        if len(lacking):
            lease = self._lend_porter(root, match, tokens[: match.end], 0, now)
        if lease is None:
            storing.seen = 0  # the rest is not there any more, or there is no room
            self._end_storing(now)
            return
        storing.lease = lease
        blocks = array("i", np.frombuffer(lease.table, np.int32)[lacking].tobytes())
        own = np.frombuffer(tokens, np.uint8)[: match.end].reshape(-1, width)[lacking]
        named = np.frombuffer(names, np.uint8).reshape(-1, NAME_BYTES)[lacking - first]
        hauls.begin_storing(storing, blocks, named.tobytes(), own.tobytes())

    def _end_storing(self, now: float) -> None:
        """Go on behind what was being stored."""
        if self.hauls is None or self.hauls.remote is None:
            return
        lease = self.hauls.remote.end_storing()
        if lease is not None:
            self.end(lease, now, writes_on=False)

    def _note_not_brought(self, restore: Restore, now: float) -> None:
        """See that what has not come from elsewhere is not asked for again at once."""
        if self.hauls is None or self.hauls.remote is None or restore.verdict.tier != REMOTE:
            return
        own = restore.lease
        if own.rest:
            start = own.start * TOKEN_BYTES
            prompt = own.prefix(start + self.tree.block_bytes)
            self.hauls.remote.note_absent(own.root, prompt, start, now)

    def lose_remote(self, now: float) -> None:
        """Take note that nobody answers questions any more: those that are out bring nothing.

        What is being fetched or stored is told of haul by haul.  O(questions + line).
        """
        hauls = self.hauls
        if hauls is None or (remote := hauls.remote) is None:
            return
        remote.drop_all()
        for lease in list(remote.asking.values()):
            self._end_question(hauls.restores[lease.serial], now)
        if remote.storing is not None and remote.storing.question is not None:
            self._end_storing(now)
        self.serve(now)

    # ------------------------------------------------------------------ before, and again

    def clear_way(self, request: Request | Extension, now: float) -> bool:
        """Evict some of the blocks that a request will need, if those are more than a few.

        It may be called again and again before the request is made, with anything else in between:
        then that evicts few, however large it is.  Nothing of what it reuses goes.  A request that
        would be refused, or would wait, evicts nothing.  O(tokens that match + `MOST_EVICTED`).

        Returns:
            Whether to call again.
        """
        blocks, tree, pool = self.blocks, self.tree, self.blocks.pool
        try:
            if isinstance(request, Extension):
                beside = request.lease.node
                need = blocks.blocks_missing(request.lease, request.num_tokens)
                if need - pool.num_free <= MOST_EVICTED:
                    return False
                blocks.admit(need, request.lease.account)
            else:
                need = blocks.blocks_for(len(request.tokens) // TOKEN_BYTES + request.reserve)
                root = self.roots.get(request.namespace)
                if root is None or need - pool.num_free <= MOST_EVICTED:
                    return False
                limit = len(request.tokens) - TOKEN_BYTES if request.reuse else 0
                match = tree.match(root, request.tokens, limit)
                if request.reuse and self.inflight.find(root, match, request.tokens) is not None:
                    return False
                self.leases.admit(request.namespace.tenant)
                self.prompts.admit(request.namespace.tenant, len(request.tokens))
                account = root.account or blocks.quotas.account(request.namespace)
                need, _ = blocks.plan(match, need, account, request.min_partial)
                beside = match.near or match.node
        except CacheError:
            return False  # whoever makes it is told
        if need - pool.num_free <= MOST_EVICTED:
            return False
        if self.tick is not None:
            self.tick(now)
        evicted = tree.evict_beside(beside, MOST_EVICTED)
        pool.release(evicted)
        return bool(evicted)

    def earlier(self, member: Worker, request: Request, now: float) -> Grant | None:
        """Give what a request with an id got that is repeated; None if it is new.  O(1).

        Its lease is renewed: who asks takes it for one that was granted now.

        Raises:
            InvalidRequest: its id is that of a lease that was asked for with something else.
        """
        lease = member.requests.get(request.request_id)
        if lease is None:
            return None
        if lease.asked != request.asks:
            raise InvalidRequest(
                f"request id {request.request_id!r} is that of lease {lease.id}, which was asked "
                "for with another prompt, namespace, reserve or way of reuse: give each request an "
                "id of its own"
            )
        self.leases.get(member.id, lease.id, now)
        return lease.grant

    def admit(self, need: int, account: Account, now: float) -> None:
        """Let `need` blocks through, or say with numbers who holds what, and when to come again."""
        try:
            self.blocks.admit(need, account)
        except PoolExhausted as short:
            raise self.refusal(short, account.tenant, now) from None
        if self.tick is not None:
            self.tick(now)

    def refusal(self, short: PoolExhausted, tenant: str, now: float) -> PoolExhausted:
        """Say with numbers who holds the blocks that are lacking, and when to come again.  O(1).

        Of other tenants' leases only their number is told.
        """
        own = self.blocks.quotas.tenant(tenant)
        leases = self.leases.of_tenant(tenant)
        if over_quota := isinstance(short, QuotaExceeded):  # others are none of its business
            held, count = own.num_held, len(leases)
        else:
            pool, tree = self.blocks.pool, self.blocks.tree
            kept = pool.num_free + tree.evictable + pool.num_quarantined
            held, count = pool.num_blocks - kept, self.leases.count
        message = f"{short}; {many(held, 'block')} held by {many(count, 'lease')}"
        if leases:
            oldest = next(iter(leases.values()))
            worker = self.leases.workers[oldest.worker].name
            message += f" (oldest {worker}#{oldest.id}, {now - oldest.since:.0f} s)"
        next_end = self.leases.next_deadline()
        advice = "or have the quota raised" if over_quota else "or serve with more --memory"
        return type(short)(
            f"{message}. Release leases, ask for less, {advice}.",
            retry_after_s=0.0 if next_end is None else max(0.0, next_end - now),
        )

    def fork(self, member: Worker, own: Lease, table: BlockTable, now: float) -> Grant:
        """Make a lease that shares the committed blocks of `own`.  Allocates nothing.  O(1)."""
        self.tree.lock_node(own.node)
        child = self.leases.open(member, own.root, own.node, now)
        self.blocks.fork(own, child, table)
        if self.oplog is not None:
            self.oplog((FORKED, child.serial, own.serial, b"", None))
        ledger = Ledger(hit=child.start, partial=child.committed - child.start)
        if is_approximate := child.namespace.approximate:
            ledger = Ledger(approximate=child.committed)
        return Grant(
            *(child.id, table, child.committed, 0, (), ledger, self.leases.ttl_s),
            approximate=is_approximate,
        )

    def end(self, lease: Lease, now: float, *, writes_on: bool) -> tuple[int, int]:
        """End a lease for whatever reason, and let what waited for it be tried again.

        Returns:
            How many blocks became free, and how many are quarantined.
        """
        waiting = self.waiting
        if waiting.tickets and (growing := waiting.line.growing(lease.serial)) is not None:
            waiting.leave(growing)
            gone = LeaseExpired(f"lease {lease.id} ended while it waited for room; acquire again")
            self.settled.append((growing.id, gone))
        if lease.request_id and (begun := lease.begun()) is not None:
            self.leases.workers[lease.worker].remember(lease.request_id, begun)
        if lease.flight is not None:
            self.inflight.remove(lease)
        if self.hauls is not None:
            self.store(lease, is_over=True)
        freed, quarantined = self.blocks.free(lease, writes_on=writes_on)
        self.leases.close(lease, now if writes_on else None, quarantined)
        self.history.idle_clock.note(self.tree.clock, now)
        if self.oplog is not None and lease.worker != PORTER:
            self.oplog((ENDED, lease.serial, 0, b"", None))
        if waiting.tickets:
            self.call(lease)
        return freed, quarantined

    def end_leaving(self, now: float, most: float) -> list[Ended]:
        """End up to `most` leases of workers that leave; let go of those that have none left."""
        over: list[Ended] = []
        while self.leases.leaving and most > 0:
            member = next(iter(self.leases.leaving.values()))
            while member.ending and most > 0:
                most -= 1
                lease = member.ending.pop()
                if self.leases.lives(lease):
                    gave = self.end(lease, now, writes_on=not member.is_gone)
                    over.append(Ended((lease.id,), *gave))
            if member.ending:
                break
            most -= 1 + len(member.namespaces) // _TRY
            self.leases.leave(member)
            for namespace in member.namespaces:
                self.namespaces.leave(namespace)
            if member.is_gone:
                over.append(Ended(num_freed=self.blocks.release_quarantine(member.id)))
        return over

    def call(self, owner: Lease, *, everyone: bool = False) -> None:
        """Let those be tried again whose wait for `owner` is over, or all that wait for it."""
        indexed = None
        if owner.flight is not None and not everyone:
            indexed = owner.committed if self.partial is Partial.TAILS else owner.start
        self.waiting.call(owner.serial, indexed)

    def landed(self, lease: Lease, at: int) -> None:
        """Let those be tried again that wait for somebody slower than `lease`, who indexed first.

        O(1) where nobody waits there for another; else O(tokens), a copy.

        Args:
            lease: Who has indexed blocks.
            at: Index of the first token that others see since then.
        """
        if self.waiting.may_share(lease.namespace, lease.serial):
            prefix = lease.prefix((at + 1) * TOKEN_BYTES)
            self.waiting.search(lease.namespace, prefix, lease.serial)

    def retry(self, ticket: Ticket, now: float, *, wait: bool) -> bool:
        """Try a waiting request again; it may have to wait on, for somebody else or for room.

        Returns:
            Whether it was served.
        """
        try:
            outcome = self._serve(ticket, now, wait=wait)
        except PoolExhausted as short:
            ticket.over_quota = isinstance(short, QuotaExceeded)
            self._note_shortage(ticket)
            if wait and ticket.in_line:
                return False
            try:
                if not wait or not ticket.waits_for_room:
                    raise short
                self.waiting.line.refuse_if_full(short, ticket.tenant)
            except PoolExhausted as refused:
                self._settle(ticket, refused)
            else:
                self.waiting.wait_for_room(ticket)
            return False
        except CacheError as error:
            self._settle(ticket, error)
            return False
        if isinstance(outcome, JoinGain):
            request = ticket.request
            until = request.waits_until if isinstance(request, Request) else inf
            self.waiting.wait_for(ticket, outcome.owner.serial, outcome.target, until)
            return False
        self.waiting.line.end_turn(ticket)
        self._settle(ticket, outcome)
        return True

    def _note_shortage(self, ticket: Ticket) -> None:
        """Remember what a request lacked, so that it is not tried again while nothing changed."""
        request = ticket.request
        if isinstance(request, Extension) or (root := self.roots.get(request.namespace)) is None:
            return
        if ticket.root is not root or ticket.num_changes != root.num_changes:
            limit = len(request.tokens) - TOKEN_BYTES if request.reuse else 0
            match = self.tree.match(root, request.tokens, limit)
            ticket.need = request.num_blocks - match.end // self.tree.block_bytes
            ticket.root, ticket.num_changes = root, root.num_changes

    def _is_hopeless(self, ticket: Ticket, now: float) -> bool:
        """Whether a request in line would be refused as before.  Never wrong if it says so.  O(1).

        Nothing that it could reuse, or wait for, has come or gone since it was tried: it needs as
        much as then, at least.
        """
        root = ticket.root
        if root is None or root.retired or root.num_changes != ticket.num_changes:
            return False
        if now >= ticket.deadline:
            return False
        request = ticket.request
        assert isinstance(request, Request)
        member = self.leases.workers.get(request.worker)
        if member is None or request.request_id in member.requests:
            return False
        quotas = self.blocks.quotas
        if quotas.any_limit and root.account and not quotas.allows(root.account, ticket.need):
            ticket.over_quota = True
            return True
        if ticket.over_quota:
            return False
        short = ticket.need - self.blocks.pool.num_free
        return short > 0 and short > self.blocks.num_obtainable()

    def _serve(self, ticket: Ticket, now: float, *, wait: bool) -> Grant | TableUpdate | JoinGain:
        request = ticket.request
        if isinstance(request, Extension):
            return self.extend(request.lease, request.num_tokens, now)
        member = self.leases.worker(request.worker)  # it may have left the namespace meanwhile
        if request.request_id and (earlier := self.earlier(member, request, now)) is not None:
            return earlier
        return self.attempt(member, request, now, wait=wait)

    def _settle(self, ticket: Ticket, outcome: Grant | TableUpdate | CacheError) -> None:
        self.waiting.leave(ticket)
        self.settled.append((ticket.id, outcome))

    def extend(self, own: Lease, num_tokens: int, now: float) -> TableUpdate:
        """Make room for `num_tokens` tokens in all."""
        need = self.blocks.blocks_missing(own, num_tokens)
        if need:
            if len(own.table) + need >= LARGE_TABLE:
                more = (len(own.table) + need) * OWN_TABLE - own.table_bytes
                self.tables.admit(own.namespace.tenant, more)
            self.admit(need, own.account, now)
        update = self.blocks.extend(own, num_tokens)
        self.blocks.count_private(own)
        return update

    def serve(self, now: float, most: float | None = None) -> None:
        """Serve who waits for blocks, as far as there are any.  After every step that gives some.

        O(1) where nobody waits or no block is free; else see `go_on`.
        """
        self.waiting.line.look_again()
        if self.waiting.tickets:
            self.go_on(now, most)

    @property
    def is_behind(self) -> bool:
        """Whether `go_on` would find something to do.  O(1)."""
        line = self.waiting.line
        return self.waiting.is_called or (line.is_due and not self.blocks.is_full)

    def go_on(self, now: float, most: float | None = None) -> None:
        """Try again who was called, and look at who stands in line, as much as fits into a step.

        Args:
            now: The time.
            most: How much: a look counts one, a try several, the more the longer the prompt is.
        """
        room, line = self.waiting, self.waiting.line
        most = _MOST_WORK if most is None else most
        while room.is_called and most > 0:
            if (called := room.take()) is None:
                most -= _TRY  # it searches
                continue
            most -= _price(called)
            self.retry(called, now, wait=now < called.deadline)
        while most > 0 and line.is_due and not self.blocks.is_full:
            if (ticket := line.next()) is None:
                break
            most -= 1
            if line.is_blocked_by_head(ticket):
                continue
            if self._is_hopeless(ticket, now):
                line.refused.append(ticket)
                continue
            most -= _price(ticket)
            if now < ticket.deadline and self.clear_way(ticket.request, now):
                line.look_again()  # it is tried next time, and the time after that
                break
            if self.retry(ticket, now, wait=now < ticket.deadline):
                most -= len(line.refused) // _TRY
                line.note_bypass(line.refused)
                line.look_again()
            elif ticket.in_line:
                line.refused.append(ticket)
            else:
                line.look_again()

    def give_up(self, now: float, most: float | None = None) -> bool:
        """Try those a last time whose deadline has passed, as much as fits into a step.

        Returns:
            Whether there was one.
        """
        any_late = False
        most = _MOST_WORK if most is None else most
        while most > 0 and (late := self.waiting.overdue(now)) is not None:
            most -= _price(late)
            self.retry(late, now, wait=False)
            any_late = True
        return any_late


def _price(ticket: Ticket) -> int:
    """Give how much work it is to try a request."""
    request = ticket.request
    size = 0 if isinstance(request, Extension) else len(request.tokens)
    return _TRY + size // _TRIED_BYTES
