"""A simulated machine around one cache: workers, the pool that they read and write, the oracle.

`World` keeps, beside the cache, what each worker believes (`LeaseView`: only what the answers told
it) and what the pool really holds (`Memory`).  `verify` compares the three after every step.  The
rules that drive it are in `rules.py`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TypeAlias

from core.innards import Indexed, indexed_below, root_of, state
from core.oracle import Holding, Library, Memory, Tokens, common_prefix
from core.transcript import Transcript
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import PORTER, TierSizes
from prefixcache.core.node import Root
from prefixcache.core.policies import POLICIES
from prefixcache.errors import CacheError, LeaseExpired, PoolExhausted, QuotaExceeded
from prefixcache.types import (
    Again,
    Copy,
    Grant,
    LeaseId,
    Ledger,
    Namespace,
    Partial,
    Segment,
    Snapshot,
    TableUpdate,
    TicketId,
    WorkerId,
    pack,
)

PLENTY = 1000
"""More blocks than any sequence of steps fills."""


@dataclass(frozen=True)
class Shape:
    """What one sequence of steps runs on."""

    num_blocks: int
    block_size: int
    partial: Partial
    policy: str
    vocabulary: int = 2
    num_ghosts: int | None = None
    ttl_s: float = 10.0
    max_line: int = 3
    first_block: int = 0
    segments: bool = False
    """Whether requests may ask for segments."""
    host: int = 0
    """Slots of a tier below the pool."""
    ahead: int = 0
    disk: int = 0
    """Slots on disk, below that or alone."""
    host_ahead: int = 0


Key: TypeAlias = tuple[WorkerId, LeaseId]
"""A lease: its number says which only beside its worker's."""

Asked: TypeAlias = tuple[Namespace, Tokens, int, bool, int, Again | None]
"""What a request asks for: where, its prompt, its reserve, whether it reuses, from what on, and
what of segments is computed again."""


@dataclass
class LeaseView:
    """A worker's own view of its lease."""

    id: LeaseId
    worker: WorkerId
    namespace: Namespace
    root: Root | None
    """The namespace's root when the lease began: another one stands there after a reset."""
    tokens: Tokens
    table: list[int]
    valid: int
    """Tokens from position 0 that the worker may read."""
    prompt_len: int
    due: float
    """Deadline after the last call that succeeded."""
    due_at_latest: float
    """A failed call may count as a sign of life, too."""
    copies: list[Copy] = field(default_factory=list)
    """Granted, and not executed yet."""
    segments: list[Segment] = field(default_factory=list)
    """Granted, and not moved yet."""
    sources: set[int] = field(default_factory=set)
    """Blocks that must stay as they are until the next commit."""
    base: set[int] = field(default_factory=set)
    """Of these, the blocks of its exact beginning, which are protected as long."""
    is_untold: bool = False
    """Whether the cache hears with the first commit only that what was found is there."""
    must_extend: bool = False
    """Forked: may write only after `extend`."""
    request_id: str = ""
    asked: Asked | tuple[()] = ()
    grant: Grant | None = None
    computed_from: int = 0
    """Tokens that its request found when it came first; the others are its own."""

    @property
    def key(self) -> Key:
        return self.worker, self.id

    @property
    def committed(self) -> int:
        return 0 if self.is_untold else self.valid

    @property
    def label(self) -> str:
        return f"lease {self.id} of {self.worker} ({self.tokens[: self.valid]} valid)"


@dataclass
class TicketView:
    """A request that waits."""

    id: TicketId
    worker: WorkerId
    namespace: Namespace
    tokens: Tokens
    asked: Asked | tuple[()]
    deadline: float
    request_id: str
    first_hit: int | None
    """Tokens in whole blocks that were there when it began to wait for a flight; None if it has
    not yet."""
    lease: LeaseId | None = None
    """An `extend` of this lease to `num_tokens`, and no acquire."""
    num_tokens: int = 0


@dataclass
class PinView:
    """What the world knows of a pin."""

    namespace: Namespace
    tokens: Tokens
    until: float


class World:
    """The cache, the workers around it, and everything that must be true of them."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape
        self.cache = PrefixCache(
            shape.num_blocks,
            shape.block_size,
            policy=shape.policy,
            partial=shape.partial,
            num_ghosts=shape.num_ghosts,
            ttl_s=shape.ttl_s,
            max_line=shape.max_line,
            first_block=shape.first_block,
            segments_secret=bytes(range(16)) if shape.segments else None,
            tiers=TierSizes(
                shape.host,
                shape.ahead,
                2,
                shape.disk,
                shape.host_ahead,
                most_ahead=shape.num_blocks // 2,
            ),
        )
        self.transcript = Transcript(shape.block_size)
        self.cache.observe(self.transcript)
        self.now = 100.0
        self.namespaces = [Namespace("m"), Namespace("m", tenant="t")]
        self.workers: dict[WorkerId, set[Namespace]] = {}
        self.num_workers = 0
        self.leases: dict[Key, LeaseView] = {}
        self.ended: list[LeaseView] = []
        """Some leases that have ended, to be used once more by mistake."""
        self.zombies: dict[WorkerId, list[LeaseView]] = {}
        """Ended leases of workers that may still write."""
        self.tickets: dict[TicketId, TicketView] = {}
        self.pins: list[PinView] = []
        self.quotas: dict[Namespace | str, tuple[int | None, int]] = {}
        self.memory = Memory(shape.block_size)
        self.library = Library()
        self.retired: list[Root] = []
        self.begun: dict[tuple[WorkerId, str], LeaseView] = {}
        """Requests whose leases have ended: they may come again."""
        self.forgotten: dict[int, bool] = {}
        """Blocks of what was reset, and whether a lease still protects them."""
        self.tails_withdrawn = False
        """Whether a tail has left the index for another reason than eviction or a fuller one."""
        self.prompts: list[Tokens] = []
        self.mixed: list[Tokens] = []
        """What approximate leases have committed lately."""
        self.ledgers: dict[Namespace, list[Ledger]] = {}
        self.log: list[str] = []
        """The calls so far, as lines of Python."""
        self.counts: dict[str, int] = {}
        """How often interesting things happened, to know that the rules reach them."""

    # ------------------------------------------------------------------ small words

    def blocks_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.shape.block_size)

    def count(self, what: str) -> None:
        self.counts[what] = self.counts.get(what, 0) + 1

    def snapshot(self) -> Snapshot:
        return self.cache.snapshot(now=self.now)

    def frozen(self) -> object:
        return state(self.cache)

    def worker_named(self, name: str) -> WorkerId:
        return PORTER if name == "porter" else WorkerId(int(name))

    def root(self, namespace: Namespace) -> Root | None:
        return root_of(self.cache, namespace)

    def writable(self, view: LeaseView) -> Iterator[tuple[int, int]]:
        """Slots that the worker may write to at any time: beyond what is valid, up to its room."""
        if view.must_extend:
            return
        size = self.shape.block_size
        for position in range(view.valid, len(view.table) * size):
            yield view.table[position // size], position % size
        for copy in view.copies:
            for offset in range(copy.num_tokens):
                yield copy.dst, offset
        yield from (slot for slot, _, _ in self.moves(view))

    def moves(
        self, view: LeaseView
    ) -> Iterator[tuple[tuple[int, int], tuple[int, int], tuple[Segment, int]]]:
        """What is still to be moved: where to, where from, and the segment and which of its tokens.

        Nothing of it that is computed in any case, but for what is to be known beforehand.
        """
        size = self.shape.block_size
        for one in view.segments:
            for at in range(len(one.blocks) * size):
                position = one.start + at
                to = (view.table[position // size], position % size)
                yield to, (one.blocks[at // size], at % size), (one, at)

    def readable(self, view: LeaseView) -> Iterator[tuple[int, int]]:
        """Slots that the worker may read at any time: what is valid, and what it will copy."""
        size = self.shape.block_size
        to_be_copied = {
            (copy.dst, offset) for copy in view.copies for offset in range(copy.num_tokens)
        }
        to_be_copied |= {to for to, _, _ in self.moves(view)}
        for position in range(view.valid):
            slot = (view.table[position // size], position % size)
            if slot not in to_be_copied:
                yield slot
        for copy in view.copies:
            for offset in range(copy.num_tokens):
                yield copy.src, offset
        yield from (source for _, source, _ in self.moves(view))

    # ------------------------------------------------------------------ what workers do to the pool

    def run_copies(self, view: LeaseView) -> None:
        for copy in view.copies:
            for offset in range(copy.num_tokens):
                found = self.memory.read(copy.src, offset)
                self.memory.write(copy.dst, offset, tainted(view, found))
        view.copies = []
        for (block, offset), _, (one, at) in list(self.moves(view)):
            self.memory.write(block, offset, (view.namespace, view.tokens[: one.start + at + 1]))
        view.segments = []

    def compute(self, view: LeaseView, tokens: Tokens, upto: int) -> None:
        """Write the KV of `tokens[view.valid:upto]` through the block table."""
        self.run_copies(view)
        size = self.shape.block_size
        for position in range(view.valid, upto):
            block = view.table[position // size]
            self.memory.write(block, position % size, (view.namespace, tokens[: position + 1]))

    # ------------------------------------------------------------------ answers

    def admit(
        self,
        grant: Grant,
        worker: WorkerId,
        tokens: Tokens,
        asked: Asked,
        request_id: str,
    ) -> LeaseView:
        """Take in a grant, and check all that one answer can be checked for."""
        size, num_tokens = self.shape.block_size, len(tokens)
        namespace, _, reserve, _, _, again = asked
        assert (worker, grant.lease) not in self.leases, "a lease id was given twice"
        assert len(grant.block_table) == self.blocks_for(num_tokens + reserve), "the table's length"
        assert 0 <= grant.num_cached < num_tokens, "one token is always left to compute"
        assert 0 <= grant.num_pending <= num_tokens - grant.num_cached
        assert grant.ttl_s == self.shape.ttl_s
        ledger = grant.ledger
        assert ledger.total == num_tokens, f"{ledger} does not sum to {num_tokens}"
        assert min(ledger.hit, ledger.partial, ledger.joined, ledger.cold) >= 0
        assert min(ledger.evicted, ledger.granularity) >= 0
        assert min(ledger.resumed, ledger.approximate) >= 0
        where, used = namespace, 0
        if grant.approximate:
            assert again is not None, "approximate, and nobody asked for that"
            where = namespace._replace(approximate=True)
            used = self.verify_segments(grant, again, num_tokens)
        assert grant.approximate or not (grant.segments or ledger.approximate)
        assert ledger.reused == grant.num_cached + used, f"{ledger}, {grant.num_cached} cached"
        computed_from = self.verify_resumed(grant, worker, where, tokens, request_id)
        part = grant.copies[0].num_tokens if grant.copies else 0
        assert (grant.num_cached - part) % size == 0, "hits are whole blocks"
        is_beside = grant.approximate and ledger.approximate + ledger.resumed > used
        if not is_beside:
            assert ledger.partial <= part < size
            if not ledger.resumed:
                assert ledger.partial == part
        else:
            self.count("found beside")
        whole = (grant.num_cached - part) // size
        for copy in grant.copies:
            assert copy.dst == grant.block_table[whole], "copied to another block than the next"
        self.ledgers.setdefault(namespace, []).append(ledger)
        view = LeaseView(
            id=grant.lease,
            worker=worker,
            namespace=where,
            root=self.root(where),
            tokens=tokens,
            table=list(grant.block_table),
            valid=grant.num_cached,
            prompt_len=num_tokens,
            due=self.now + self.shape.ttl_s,
            due_at_latest=self.now + self.shape.ttl_s,
            copies=list(grant.copies),
            segments=list(grant.segments),
            sources={copy.src for copy in grant.copies}
            | {block for one in grant.segments for block in one.blocks},
            base={block for one in grant.segments if one.is_exact for block in one.blocks},
            is_untold=grant.approximate and not is_beside,
            request_id=request_id,
            asked=asked,
            grant=grant,
            computed_from=computed_from,
        )
        self.leases[view.key] = view
        self.count("grants")
        if grant.approximate:
            self.count("approximate")
        if any(one.start % size for one in grant.segments):
            self.count("moved inside blocks")
        if ledger.partial:
            self.count("partial")
        if ledger.evicted:
            self.count("evicted tokens")
        if ledger.joined:
            self.count("joined")
        return view

    def verify_segments(self, grant: Grant, again: Again, num_tokens: int) -> int:
        """See that segments are in order, and say what of them is not computed again."""
        size, at = self.shape.block_size, grant.num_cached
        moved = list(grant.segments)
        if moved and moved[0].is_exact:
            own = moved.pop(0)
            assert not own.num_again
            assert len(own.blocks) == grant.num_cached // size
        for one in moved:
            assert at <= one.start, f"{one} begins before {at}"
            at = one.start + len(one.blocks) * size
            assert at < num_tokens, "one token is always left to compute"
            assert one.num_again == again.first < len(one.blocks) * size
        total = sum(len(one.blocks) for one in moved) * size
        return total - len(moved) * again.first - again.count(total)

    def in_flight(self, namespace: Namespace, tokens: Tokens, *, ever: bool = False) -> int:
        """Count the tokens of a prompt that are cached once all flights landed, by brute force.

        Args:
            namespace: Where.
            tokens: The prompt.
            ever: Also count what was in flight when the namespace was reset.
        """
        size, partial = self.shape.block_size, self.shape.partial
        best = 0
        for view in self.leases.values():
            in_reach = ever or view.root is self.root(namespace)
            if view.namespace == namespace and in_reach and view.valid < view.prompt_len:
                known = view.tokens[: view.prompt_len]
                if partial is not Partial.TAILS:
                    known = known[: len(known) // size * size]
                common = min(common_prefix(known, tokens), len(tokens) - 1)
                best = max(best, common // size * size if partial is Partial.OFF else common)
        return best

    def resident(self, namespace: Namespace, tokens: Tokens) -> int:
        """Count the tokens of a prompt that are stored now: compare it with every indexed block."""
        root = self.root(namespace)
        entries = [] if root is None else indexed_below(root, self.shape.block_size)
        return max((common_prefix(one.prefix, tokens) for one in entries), default=0)

    def found(self, namespace: Namespace, tokens: Tokens) -> int:
        """Count the tokens that a request would reuse: what is stored, but the last token."""
        stored = min(self.resident(namespace, tokens), len(tokens) - 1)
        size = self.shape.block_size
        return stored // size * size if self.shape.partial is Partial.OFF else stored

    def bounds(self, namespace: Namespace, tokens: Tokens) -> tuple[int, int]:
        """Give the fewest and the most tokens of a prompt that may be found now."""
        size, partial = self.shape.block_size, self.shape.partial
        unit = 1 if partial is Partial.TAILS else size
        most = min(self.library.longest(namespace, tokens, multiple_of=unit), len(tokens) - 1)
        least = most
        if partial is Partial.TAILS and self.tails_withdrawn:
            least = min(self.library.longest(namespace, tokens, multiple_of=size), len(tokens) - 1)
        if partial is Partial.OFF:
            least = most = most // size * size
        if self.snapshot().evicted:
            least = 0
        return least, most

    def shared_blocks(self) -> int:
        """Count the blocks that may have an owner beside the tree."""
        shared = set().union(*(view.sources for view in self.leases.values()), set())
        for view in self.leases.values():
            if view.must_extend and view.valid % self.shape.block_size:
                shared.add(view.table[view.valid // self.shape.block_size])
        return len(shared)

    def remembers_everything(self) -> bool:
        """Whether ghosts remember all that was ever stored, token by token."""
        return self.shape.partial is not Partial.TAILS and self.shape.num_ghosts == PLENTY

    def verify_evictions(self, needed: int, before: Snapshot) -> None:
        """See that no more was evicted than was needed."""
        evicted = self.snapshot().evicted - before.evicted
        least = max(0, needed - before.free - before.leaving)
        most = least + self.shared_blocks() if least else 0
        assert least <= evicted <= most, f"evicted {evicted} for {needed}; {before}"

    def is_justified(
        self,
        needed: int,
        hit_blocks: int,
        before: Snapshot,
        namespace: Namespace,
        error: CacheError | None = None,
    ) -> bool:
        """Whether the arithmetic allows `PoolExhausted`; with a reason, whether it allows this one.

        Args:
            needed: Blocks.
            hit_blocks: Blocks that were found in the tree.
            before: What there was.
            namespace: For which.
            error: What was raised.
        """
        as_free = sum(not is_locked for is_locked in self.forgotten.values())
        obtainable = as_free + before.evictable - hit_blocks - self.shared_blocks()
        obtainable += before.leaving
        sure = before.free - as_free + max(0, obtainable)
        short = needed > sure
        over = any(
            most is not None and self.held(scope)[1] + needed + hit_blocks > most
            for scope, (most, _) in self.quotas.items()
            if scope in (namespace, namespace.tenant)
        )
        if isinstance(error, QuotaExceeded):
            return over
        return short or (over and error is None) or "may pass any more" in str(error)

    def held(self, scope: Namespace | str) -> tuple[int, int]:
        """Give the fewest and the most blocks that leases of a tenant or namespace may hold."""
        blocks: set[int] = set()
        for view in self.leases.values():
            if scope in (view.namespace._replace(approximate=False), view.namespace.tenant):
                blocks |= view.base
        twice = sum(
            len(view.table)
            for gone in self.zombies.values()
            for view in gone
            if scope in (view.namespace, view.namespace.tenant)
        )  # what was its own of these is quarantined, and counts
        for view in self.leases.values():
            if scope in (view.namespace, view.namespace.tenant):
                # The last block that forks share is counted once they have a copy of their own.
                shared = view.must_extend and view.valid % self.shape.block_size > 0
                blocks |= set(view.table[: len(view.table) - shared])
                twice += len(view.table)
        # Where two leases computed the same tokens, both the tree's block and the copy count.
        return len(blocks), 2 * max(len(blocks), twice)

    # ------------------------------------------------------------------ after each step

    def settle(self) -> None:
        """Take in the outcomes of waiting requests."""
        for ticket_id, outcome in self.cache.take_outcomes():
            ticket = self.tickets.pop(ticket_id, None)
            assert ticket is not None, f"ticket {ticket_id} was settled, but nobody waits with it"
            if isinstance(outcome, TableUpdate):
                self.count("grown")
                assert ticket.lease is not None
                self.log.append(f"#   ticket {ticket_id} -> room for lease {ticket.lease}")
                self.grow(self.leases[ticket.worker, ticket.lease], ticket.num_tokens, outcome)
            elif isinstance(outcome, Grant):
                self.count("settled")
                assert ticket.lease is None
                whole = outcome.ledger.hit + outcome.ledger.joined + outcome.ledger.restored
                if outcome.approximate:
                    whole = outcome.num_cached  # it found more beside, or stopped where it does
                elif ticket.first_hit is not None:
                    waited_for = outcome.ledger.joined + outcome.ledger.restored
                    if not outcome.ledger.resumed:  # else some of them are its own
                        assert waited_for == max(0, whole - ticket.first_hit)
                elif whole == outcome.ledger.hit:
                    self.count("found room")
                size = self.shape.block_size
                flying = self.in_flight(ticket.namespace, ticket.tokens) // size * size
                if self.now < ticket.deadline:
                    assert flying <= whole + outcome.ledger.resumed, (
                        "settled while somebody was still computing the next block"
                    )
                self.log.append(f"#   ticket {ticket_id} -> lease {outcome.lease}")
                assert ticket.asked
                self.admit(outcome, ticket.worker, ticket.tokens, ticket.asked, ticket.request_id)
            else:
                self.count("settled by an error")
                if ticket.lease and (ticket.worker, ticket.lease) not in self.leases:
                    assert isinstance(outcome, LeaseExpired), f"settled by {outcome!r}"
                else:
                    assert isinstance(outcome, PoolExhausted), f"settled by {outcome!r}"

    def grow(self, view: LeaseView, upto: int, answer: TableUpdate) -> None:
        """Take in that a lease got room."""
        unshare = view.must_extend and view.valid % self.shape.block_size > 0 and upto > view.valid
        self.update(view, answer)
        if unshare:
            size = self.shape.block_size
            assert [copy.num_tokens for copy in answer.copies] == [view.valid % size]
            self.count("unshared")
        else:
            assert not answer.copies
        if upto > view.valid:
            view.must_extend = False

    def update(self, view: LeaseView, answer: TableUpdate) -> None:
        """Apply a new table; what was to be copied before is copied now."""
        self.run_copies(view)
        view.table = view.table[: answer.keep] + list(answer.blocks)
        view.copies = list(answer.copies)
        if answer.copies:
            view.sources = {copy.src for copy in answer.copies}

    def end(self, view: LeaseView, *, writes_on: bool) -> None:
        """Take in that a lease has ended."""
        del self.leases[view.key]
        if view.request_id and view.valid > view.computed_from:
            self.begun[view.worker, view.request_id] = view
        self.ended = [*self.ended[-5:], view]
        if writes_on:
            self.zombies.setdefault(view.worker, []).append(view)
            if view.valid % self.shape.block_size:
                self.tails_withdrawn = True

    def verify_resumed(
        self,
        grant: Grant,
        worker: WorkerId,
        namespace: Namespace,
        tokens: Tokens,
        request_id: str,
    ) -> int:
        """See that what a request had computed itself is no hit.  Gives where its own begins."""
        ledger, begun = grant.ledger, self.begun.pop((worker, request_id), None)
        own = 0
        if begun is not None and begun.namespace == namespace:
            own = max(0, min(ledger.reused, begun.valid) - begun.computed_from)
            same = begun.tokens[: begun.valid] == tokens[: begun.valid]
            # Another prompt under the same id is told apart by some of its tokens only.
            assert ledger.resumed in ((own,) if same else (0, own)), f"{ledger}: {own} are its own"
        else:
            assert not ledger.resumed
        if ledger.resumed:
            self.count("resumed")
        return begun.computed_from if begun and ledger.resumed else grant.num_cached

    def verify(self) -> None:
        """Compare the cache, the workers' views and the pool's memory."""
        self.settle()
        self.cache.check()
        snapshot = self.snapshot()
        indexed = self.verify_index(snapshot)
        self.verify_journal()
        self.verify_memory(indexed)
        self.verify_blocks(snapshot, indexed)
        self.verify_waiting(snapshot)
        self.verify_steering(snapshot)
        for namespace, ledgers in self.ledgers.items():
            assert snapshot.namespaces[namespace] == _sum(ledgers), f"the sums of {namespace}"
        everything = [ledger for ledgers in self.ledgers.values() for ledger in ledgers]
        fresh = sum(not ledger.resumed for ledger in everything)
        assert (snapshot.requests, snapshot.ledger) == (fresh, _sum(everything))
        assert sum(tokens for _, tokens in snapshot.shortage) == snapshot.ledger.evicted
        self.verify_counts(fresh, _sum(everything))

    def verify_counts(self, fresh: int, everything: Ledger) -> None:
        """Compare what is counted as it happens with a walk over all answers."""
        told, series = self.cache.counts(now=self.now), self.cache.series()
        assert told.num_namespaces == len(self.ledgers)
        assert (told.requests, told.ledger) == (fresh, everything)
        assert {name: one.ledger for name, one in series.items()} == {
            name: _sum(ledgers) for name, ledgers in self.ledgers.items()
        }
        joins = [sum(ledger.joined > 0 for ledger in ledgers) for ledgers in self.ledgers.values()]
        assert told.flights_saved == sum(joins)
        assert sorted(one.joins for one in series.values()) == sorted(joins)
        assert told.num_leases == len(self.leases)

    def verify_index(self, snapshot: Snapshot) -> dict[int, int]:
        """Every indexed slot holds what its place in the tree says.  Gives fill by block."""
        fill: dict[int, int] = {}
        roots = [(one, self.root(one)) for one in self.namespaces]
        beside = [one._replace(approximate=True) for one in self.namespaces]
        roots += [(one, self.root(one)) for one in beside]
        roots += [(root.namespace, root) for root in self.retired]
        num_found = 0
        self.forgotten = {}
        for namespace, root in roots:
            if root is not None:
                for entry in indexed_below(root, self.shape.block_size):
                    self.verify_entry(namespace, entry)
                    assert entry.block not in fill, f"block {entry.block} is indexed twice"
                    fill[entry.block] = entry.num_tokens
                    if root.retired:
                        self.forgotten[entry.block] = entry.is_locked
                    else:
                        num_found += 1
        assert num_found == snapshot.indexed, "what was reset is not indexed any more"
        return fill

    def verify_journal(self) -> None:
        """Who only listens to the journal knows exactly what can be found."""
        found = {
            entry.block: (namespace, entry.prefix)
            for namespace in self.namespaces
            if (root := self.root(namespace)) is not None
            for entry in indexed_below(root, self.shape.block_size)
        }
        assert self.transcript.prefixes == found, "the journal and the tree differ"

    def verify_entry(self, namespace: Namespace, entry: Indexed) -> None:
        start = len(entry.prefix) - entry.num_tokens
        for offset in range(entry.num_tokens):
            found = self.memory.read(entry.block, offset)
            expected = (namespace, entry.prefix[: start + offset + 1])
            assert found == expected, (
                f"block {entry.block} is indexed as {expected} at slot {offset}, and holds {found}"
            )

    def verify_memory(self, fill: dict[int, int]) -> None:
        """Every lease reads its own prefix; nobody can write what another can read or write."""
        size = self.shape.block_size
        reader: dict[tuple[int, int], str] = {}
        writer: dict[tuple[int, int], str] = {}
        for view in self.leases.values():
            assert len(set(view.table)) == len(view.table), f"{view.label}: a block twice"
            overlay = {}
            for copy in view.copies:
                for offset in range(copy.num_tokens):
                    found = self.memory.read(copy.src, offset)
                    overlay[copy.dst, offset] = tainted(view, found)
            exact = view.namespace._replace(approximate=False)
            for to, source, (one, at) in self.moves(view):
                found = self.memory.read(*source)
                assert found is not None, f"{view.label}: a donor was lost"
                assert found[0] == exact, f"{view.label} moves {found}, which is not exact"
                assert len(found[1]) == one.source + at + 1, f"{view.label}: the donor's position"
                assert found[1][-1] == view.tokens[one.start + at], f"{view.label}: other tokens"
                if one.is_exact:
                    overlay[to] = tainted(view, found)
            for position in range(view.valid):
                slot = (view.table[position // size], position % size)
                found = overlay[slot] if slot in overlay else self.memory.read(*slot)
                assert found == (view.namespace, view.tokens[: position + 1]), (
                    f"{view.label} reads {found} at position {position}, slot {slot}"
                )
            for slot in self.readable(view):
                reader[slot] = view.label
        for view in [*self.leases.values(), *(z for gone in self.zombies.values() for z in gone)]:
            for slot in set(self.writable(view)):
                assert slot not in writer, f"{view.label} and {writer[slot]} both write {slot}"
                assert slot[1] >= fill.get(slot[0], 0), f"{view.label} can write indexed {slot}"
                assert slot not in reader, f"{view.label} can write {slot}, {reader[slot]} reads it"
                writer[slot] = view.label

    def verify_blocks(self, snapshot: Snapshot, fill: dict[int, int]) -> None:
        """Every block is somewhere, and only there."""
        lent = {block for view in self.leases.values() for block in view.table}
        first, count = self.shape.first_block, self.shape.num_blocks
        assert lent | fill.keys() <= set(range(first, first + count)), "a block that is none"
        counted = snapshot.free + snapshot.private + snapshot.indexed + snapshot.quarantined
        counted += snapshot.leaving
        assert counted == snapshot.num_blocks == self.shape.num_blocks, f"{snapshot}"
        assert 0 <= snapshot.evictable <= snapshot.indexed
        limit = self.shape.num_ghosts
        if limit is None:  # as many as the policy wants
            limit = math.ceil(self.shape.num_blocks * POLICIES[self.shape.policy].ghosts)
        limit = max(limit, self.shape.host + self.shape.disk > 0)
        if self.shape.partial is Partial.TAILS:
            limit *= 2  # as many tails beside them
        assert snapshot.ghosts <= limit
        aside: set[int] = set()
        for gone in self.zombies.values():
            for view in gone:
                aside |= {block for block, _ in self.writable(view)}
        assert not aside & fill.keys(), "a block that a dead writer can write to is indexed"
        assert snapshot.quarantined >= len(aside), "a dead writer's block is not safe"
        held: set[int] = set()
        state = self.cache._lessor.blocks.pool._state
        for view in self.leases.values():
            # A truncation lets go of a source, which may have left the tree since.
            held |= set(view.table) | {block for block in view.sources if state[block]}
        held -= aside | fill.keys()
        if self.cache._lessor.hauls is not None:  # the source of a copy may be leaving
            held -= set(self.cache._lessor.hauls.leaving())
        held |= {block for block, is_locked in self.forgotten.items() if is_locked}
        assert snapshot.private == len(held), f"{snapshot.private} private; held are {sorted(held)}"
        if not self.zombies:
            assert not snapshot.quarantined
        assert len(snapshot.leases) == len(self.leases)
        for info in snapshot.leases:
            view = self.leases[self.worker_named(info.worker), info.lease]
            assert info.namespace == view.namespace
            assert (info.num_tokens, info.num_committed) == (len(view.tokens), view.committed)
            assert info.num_blocks == len(view.table)

    def verify_waiting(self, snapshot: Snapshot) -> None:
        """Whoever waits, waits for something that is still being computed, or for room."""
        assert snapshot.waiting == len(self.tickets)
        in_line = self.cache._lessor.waiting.line
        assert len(in_line) <= self.shape.max_line
        firsts = in_line.heads()
        for first in firsts:
            assert self.is_short(self.tickets[first.id], snapshot) or any(
                in_line.is_blocked_by_head(one) for one in firsts
            ), f"ticket {first.id} waits for room that is there"
        for ticket in self.tickets.values():
            if self.cache._lessor.waiting.tickets[ticket.id].in_line:
                continue
            # Part of a block that appears meanwhile by other ways does not end a wait for the rest.
            whole = self.cache.lookup(ticket.namespace, pack(ticket.tokens)).num_hit
            assert self.in_flight(ticket.namespace, ticket.tokens, ever=True) > whole, (
                f"ticket {ticket.id} for {ticket.tokens} waits for nobody"
            )
        deadline = self.cache.next_deadline()
        latest = [view.due_at_latest for view in self.leases.values()]
        latest += [ticket.deadline for ticket in self.tickets.values()]
        latest += [self.now + pin.expires_in_s + 1e-9 for pin in snapshot.pins]
        latest = [at for at in latest if at < math.inf]  # that of a restore has no end of its own
        if latest:
            assert deadline is not None, "leases or tickets without a next deadline"
            assert deadline <= min(latest)

    def is_short(self, ticket: TicketView, snapshot: Snapshot) -> bool:
        """Whether a request that waits for room cannot be served now."""
        if ticket.lease is not None:
            view = self.leases[ticket.worker, ticket.lease]
            unshare = view.must_extend and view.valid % self.shape.block_size > 0
            unshare = unshare and ticket.num_tokens > view.valid
            needed = max(0, self.blocks_for(ticket.num_tokens) - len(view.table)) + unshare
            return self.is_justified(needed, 0, snapshot, view.namespace)
        found = self.cache.lookup(ticket.namespace, pack(ticket.tokens))
        hit = found.num_hit // self.shape.block_size
        reserve = ticket.asked[2] if ticket.asked else 0
        needed = self.blocks_for(len(ticket.tokens) + reserve) - hit
        return self.is_justified(needed, hit, snapshot, ticket.namespace)

    def verify_steering(self, snapshot: Snapshot) -> None:
        """Pins are under their cap, and nobody holds more than its quota but by a lower quota."""
        assert snapshot.pinned <= snapshot.max_pinned
        assert sum(pin.num_blocks for pin in snapshot.pins) >= snapshot.pinned
        for info in snapshot.quotas:
            scope = info.tenant if info.namespace is None else info.namespace
            least, most = self.held(scope)
            assert least <= info.num_held <= most, f"{scope} holds {info}, not {least} to {most}"
            assert self.quotas[scope] == (info.max_held, info.guaranteed)


def _sum(ledgers: list[Ledger]) -> Ledger:
    return Ledger(
        hit=sum(one.hit for one in ledgers),
        partial=sum(one.partial for one in ledgers),
        joined=sum(one.joined for one in ledgers),
        cold=sum(one.cold for one in ledgers),
        evicted=sum(one.evicted for one in ledgers),
        granularity=sum(one.granularity for one in ledgers),
        resumed=sum(one.resumed for one in ledgers),
        approximate=sum(one.approximate for one in ledgers),
        restored=sum(one.restored for one in ledgers),
    )


def tainted(view: LeaseView, found: Holding | None) -> Holding | None:
    """What a copy holds: nothing that an approximate lease writes is exact any more."""
    if found is None or found[0] != view.namespace._replace(approximate=False):
        return found
    return view.namespace, found[1]


__all__ = ["CacheError", "LeaseView", "PinView", "Shape", "TicketView", "World"]
