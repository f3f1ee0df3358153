"""The wait queue: requests that wait, for a prefix in flight or for blocks, until their deadline.

```
             wait_for                        called: landed, ended            taken
request ─┬──────────► waits for a flight ─────────────────────────► ready ──────────► tried again
         │ wait_for_room                                                    ▲
         └──────────► stands in line (`FairQueue`) ─────────────────────────┘ when there is room
```
A waiting request holds nothing new, so waiting cannot deadlock: when the flight lands, its owner
ends, or blocks come back, the request is simply tried again.  The first one to be tried after an
owner died becomes the owner.  However many wait for one owner, they are tried some dozens in one
step.

**The fair queue** is for those that wait for blocks, since the pool or a quota is full.

```
leases that grow     w1#7 ─ w3#2 ─ …              first: they hold blocks, and give them back sooner
namespace a          ticket ─ ticket ─ …      ┐
namespace b          ticket ─ …               ├   in turn, one grant each
namespace c          ticket                   ┘
```

Within a namespace it is first come, first served.  A request that does not fit may be passed by
smaller ones, but only `MAX_BYPASSES` times: then nobody passes it any more, so that no stream of
small requests starves a large one.

When room comes back, everybody who may be next is looked at, some hundred in one step.  The round
goes on where it was, whatever comes and goes meanwhile, and is followed by another one if more room
has come back since it began.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from itertools import pairwise
from math import inf

from prefixcache.core.inflight import Waiters
from prefixcache.core.lease import KeptBytes, Lease
from prefixcache.core.node import Root
from prefixcache.core.shares import Shares
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, Again, Namespace, TicketId, WorkerId

MAX_BYPASSES = 16

SLACK_S = 0.05
"""A request waits so much longer for what lies below the pool than twice what that is expected to
take: once, however many tiers it waits for."""


@dataclass(slots=True)
class Request:
    """An `acquire`, kept while it waits."""

    worker: WorkerId
    namespace: Namespace
    tokens: bytes
    reserve: int
    request_id: str
    reuse: bool = True
    """Whether what is stored of the prompt may be used; if not, all of it is computed."""
    min_partial: int = 0
    """Fewer tokens than these in a partly matching block are not worth its copy."""
    for_room: bool = True
    """Whether it waits for room, too, and not only for a prefix in flight."""
    segments: Again | None = None
    """Which tokens of segments are computed again; None: it takes none."""
    num_blocks: int = 0
    """Those that the prompt and what is reserved fill."""
    first_end: int = -1
    """Bytes that matched in whole blocks when it was first tried; what comes later is joined …"""
    restored_from: int = -1
    """… or restored: where it waits for a restore, or did last, the bytes that matched before."""
    restored: int = 0
    """Bytes that restores have brought so far."""
    declined: str = ""
    """Why it does not wait for what lies below; empty if it does, or if nothing lies there."""
    declined_tier: int = 0
    """Where that lies."""
    patience_s: float = SLACK_S
    """How long it still waits for what lies below, however many tiers that is on, one after the
    other: what each may take is added when the wait for it begins."""
    awaited: tuple[int, float] | None = None
    """What was added last, so that it is added once."""
    waits_until: float = inf
    """When the present wait for what lies below is over."""

    def begin_wait(self, awaited: tuple[int, float], due: float, now: float) -> None:
        """Take note of a wait for what lies below.

        Args:
            awaited: What for.
            due: When it should be there, and has long been; `SLACK_S` included.
            now: The time.
        """
        if awaited != self.awaited:
            self.awaited = awaited
            self.patience_s += max(0.0, due - now - SLACK_S)
        self.waits_until = now + self.patience_s

    def end_wait(self, now: float) -> None:
        """Take note that it waits for what lies below no more, or not for the same.  O(1)."""
        self.patience_s = max(0.0, self.waits_until - now)
        self.waits_until = inf

    def waited_for(self, end: int) -> tuple[int, int]:
        """Give how many tokens others have computed, and a tier has given back, since it waits.

        Args:
            end: Bytes that match in whole blocks now.
        """
        if self.first_end < 0:
            return 0, 0
        since = max(0, end - self.first_end) // TOKEN_BYTES
        restored = 0
        if self.restored_from >= 0 or self.restored:
            restored = min(since, self.count_restored(end) // TOKEN_BYTES)
        return since - restored, restored

    def count_restored(self, end: int) -> int:
        """Take note of what matches now, after a wait; give the bytes that restores brought."""
        if self.restored_from >= 0:
            self.restored += max(0, end - self.restored_from)
            self.restored_from = -1
        return self.restored

    @property
    def asks(self) -> int:
        """A digest of what it asks for: what is repeated has the same.  O(tokens), once."""
        return hash(
            (
                *(self.namespace, self.tokens, self.reserve, self.reuse, self.min_partial),
                self.segments,
            )
        )


@dataclass(slots=True)
class Extension:
    """An `extend`, kept while it waits for room."""

    worker: WorkerId
    lease: Lease
    num_tokens: int


@dataclass(slots=True, eq=False)
class Ticket:
    """A request that waits: for a flight, or in the line for blocks."""

    id: TicketId
    request: Request | Extension
    tenant: str
    deadline: float
    owner: int | None = None
    """Whose flight it waits for: the serial of a lease."""
    beside: Waiters | None = None
    """With whom."""
    target: int = 0
    """Tokens that the owner must have indexed."""
    until: float = inf
    """When it waits for that owner no longer."""
    in_line: bool = False
    num_bypassed: int = 0
    """How often somebody behind it in the line was served."""
    over_quota: bool = False
    """Whether its own quota is what it waits for: then it is in nobody's way."""
    root: Root | None = None
    """Below which it was tried last, when there was no room."""
    num_changes: int = 0
    """Of that root at that time."""
    need: int = 0
    """Blocks that it needed at that time: until the root changes, not fewer."""

    @property
    def waits_for_room(self) -> bool:
        """Whether it may stand in line.  Who grows waits for nothing else."""
        return isinstance(self.request, Extension) or self.request.for_room


class FairQueue:
    """Who waits for blocks, in the order in which they are tried.

    Args:
        limit: How many may wait at the same time.
    """

    __slots__ = ("_growing", "_is_due", "_passed_enough", "_round", "_turns", "refused", "shares")

    def __init__(self, limit: int) -> None:
        self.shares = Shares(limit, "--max-line", "requests that wait for room")
        """Whose they are that wait."""
        self._passed_enough: Ticket | None = None
        self._growing: OrderedDict[int, Ticket] = OrderedDict()
        self._turns: dict[Namespace, OrderedDict[TicketId, Ticket]] = {}
        self._round: Iterator[Ticket] | None = None
        self._is_due = False
        self.refused: list[Ticket] = []
        """Who was looked at in this round and stays where he was."""

    def __len__(self) -> int:
        return self.shares.total

    def refuse_if_full(self, short: PoolExhausted, tenant: str) -> None:
        """Check that one more request of a tenant may wait.

        Raises:
            PoolExhausted: it may not; the message adds that to `short`.
        """
        try:
            self.shares.check(tenant)
        except PoolExhausted as full:
            why = str(full)
            if len(self) >= self.shares.limit:
                why = f"{many(len(self), 'request', 'wait')} for room already, "
                why += "--max-line allows no more."
            raise type(short)(f"{short} {why}", short.retry_after_s) from None

    def refuse_second(self, lease: Lease) -> None:
        """Check that a lease does not wait already.

        Raises:
            InvalidRequest: it does.
        """
        if lease.serial in self._growing:
            raise InvalidRequest(f"lease {lease.id} waits for room already; cancel that first")

    def join(self, ticket: Ticket) -> None:
        """Let a ticket wait behind those of its kind."""
        request = ticket.request
        if isinstance(request, Extension):
            self._growing[request.lease.serial] = ticket
        else:
            self._turns.setdefault(request.namespace, OrderedDict())[ticket.id] = ticket
        self.shares.force(ticket.tenant)
        ticket.in_line = True

    def leave(self, ticket: Ticket) -> None:
        """Take a ticket out, if it is in.  Its namespace keeps its turn."""
        if not ticket.in_line:
            return
        ticket.in_line = False
        self.shares.give(ticket.tenant)
        if self._passed_enough is ticket:
            self._passed_enough = None
        request = ticket.request
        if isinstance(request, Extension):
            del self._growing[request.lease.serial]
            return
        mine = self._turns[request.namespace]
        del mine[ticket.id]
        if not mine:
            del self._turns[request.namespace]

    def end_turn(self, ticket: Ticket) -> None:
        """Let a namespace whose ticket was served wait until all others had theirs."""
        request = ticket.request
        if not isinstance(request, Extension) and request.namespace in self._turns:
            self._turns[request.namespace] = self._turns.pop(request.namespace)

    def growing(self, serial: int) -> Ticket | None:
        """Give the ticket of a lease that waits for room; None if it does not."""
        return self._growing.get(serial)

    @property
    def is_due(self) -> bool:
        """Whether somebody has still to be looked at."""
        return bool(self._turns or self._growing) and (self._is_due or self._round is not None)

    def look_again(self) -> None:
        """Let everybody be looked at, once more those whose turn in this round has been.  O(1)."""
        self._is_due = True

    def next(self) -> Ticket | None:
        """Give who is to be looked at next; None if nobody is.  O(line) where a round begins."""
        while self._round is not None or self._is_due:
            if self._round is None:
                self._is_due, self.refused = False, []
                self._round = self._candidates()
            if (ticket := next(self._round, None)) is not None:
                return ticket
            self._round = None
        self.refused = []
        return None

    def _candidates(self) -> Iterator[Ticket]:
        """Give who may be next, in order, as it is when his turn comes."""
        for ticket in tuple(self._growing.values()):
            if ticket.in_line:
                yield ticket
        for namespace in tuple(self._turns):
            if (mine := self._turns.get(namespace)) is not None:
                yield next(iter(mine.values()))

    def heads(self) -> list[Ticket]:
        """Give who is first of its kind.  O(namespaces)."""
        heads = [next(iter(mine.values())) for mine in self._turns.values()]
        if self._growing:
            heads.append(next(iter(self._growing.values())))
        return heads

    def note_bypass(self, tickets: Iterable[Ticket]) -> None:
        """Count that somebody was served before these.  O(tickets)."""
        for ticket in tickets:
            if ticket.in_line and not ticket.over_quota:
                ticket.num_bypassed += 1
                if ticket.num_bypassed >= MAX_BYPASSES:
                    self._passed_enough = ticket

    def is_blocked_by_head(self, ticket: Ticket | None) -> bool:
        """Whether somebody else was passed so often that nobody may pass any more."""
        first = self._passed_enough
        return first is not None and first is not ticket and not first.over_quota

    def check(self) -> None:
        """Assert that the count is right, and that each ticket is where it can be found."""
        tickets = [*self._growing.values()]
        for namespace, mine in self._turns.items():
            assert mine, "a turn without tickets"
            for ticket in mine.values():
                assert not isinstance(ticket.request, Extension), "growth in a turn"
                assert ticket.request.namespace == namespace, "in another namespace's turn"
            tickets.extend(mine.values())
        assert len(tickets) == len(self), f"{len(self)} in line, not {len(tickets)}"
        self.shares.check_counts()
        assert all(ticket.in_line for ticket in tickets), "a ticket that does not know its place"


_STALE = 512
"""Entries of what has ended that are dropped in one go."""
_CALLED = 64
"""Requests whose wait for one owner is over, that are found in one go."""
_SEARCHED = 256
"""Requests that are looked at in one go, whether what has landed is theirs."""


@dataclass(slots=True)
class _Search:
    """For requests that wait for somebody slower than who has landed, in the order of prompts."""

    namespace: Namespace
    prefix: bytes
    after: tuple[bytes, int]
    again: bytes | None = None
    """What the same owner has landed meanwhile."""


_SPARE_DEADLINES = 1024
"""Of tickets that left before, which may be kept beside as many as there are tickets."""


class WaitQueue:
    """The waiting requests, by ticket, by what they wait for, and by deadline.

    Args:
        max_line: How many may wait for blocks at the same time.
        prompts: Counts the bytes that the prompts of those who wait take.
    """

    __slots__ = (
        "_below",
        "_by_owner",
        "_by_worker",
        "_calls",
        "_deadlines",
        "_lates",
        "_next",
        "_prompts",
        "_ready",
        "_searches",
        "line",
        "tickets",
    )

    def __init__(self, max_line: int, prompts: KeptBytes) -> None:
        self.line = FairQueue(max_line)
        self._prompts = prompts
        self.tickets: dict[TicketId, Ticket] = {}
        self._by_worker: dict[WorkerId, dict[TicketId, Ticket]] = {}
        self._by_owner: dict[int, Waiters] = {}
        self._below: dict[Namespace, list[tuple[bytes, int, Ticket]]] = {}
        """Who waits for a flight, prompts in order."""
        self._ready: deque[Ticket] = deque()
        self._calls: dict[Waiters, int | None] = {}
        """Whose wait may be over, and how much their owner has indexed: they have to be found."""
        self._searches: dict[int, _Search] = {}
        self._deadlines: list[tuple[float, TicketId]] = []
        self._lates: list[tuple[float, TicketId]] = []
        """When who waits for a flight does so no longer, if that is before its deadline."""
        self._next = 0

    def enter(self, request: Request | Extension, tenant: str, deadline: float) -> Ticket:
        """Give a new ticket, which waits for nobody yet."""
        self._next += 1
        ticket = Ticket(TicketId(self._next), request, tenant, deadline)
        self.tickets[ticket.id] = ticket
        self._by_worker.setdefault(request.worker, {})[ticket.id] = ticket
        if isinstance(request, Request):
            self._prompts.add(tenant, len(request.tokens))
        heappush(self._deadlines, (deadline, ticket.id))
        if len(self._deadlines) > 2 * len(self.tickets) + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.tickets]
            heapify(self._deadlines)
        return ticket

    def of(self, worker: WorkerId) -> list[Ticket]:
        """Give the tickets of a worker.  O(its own)."""
        return list(self._by_worker.get(worker, {}).values())

    def wait_for(self, ticket: Ticket, owner: int, target: int, until: float = inf) -> None:
        """Let a ticket wait until `owner` has indexed `target` tokens, or has ended, or so long."""
        self.line.leave(ticket)
        waiters = self._by_owner.setdefault(owner, Waiters())
        ticket.owner, ticket.target, ticket.beside = owner, target, waiters
        ticket.until = until
        if until < ticket.deadline:
            if len(self._lates) > 2 * len(self.tickets) + _SPARE_DEADLINES:
                self._lates = [entry for entry in self._lates if self._is_patient(entry)]
                heapify(self._lates)
            heappush(self._lates, (until, ticket.id))
        if len(waiters.heap) > 2 * waiters.count + _STALE:
            waiters.heap = [one for one in waiters.heap if self._waits(one, waiters)]
            heapify(waiters.heap)
        waiters.count += 1
        heappush(waiters.heap, (target, ticket.id))
        request = ticket.request
        assert isinstance(request, Request)
        insort(self._below.setdefault(request.namespace, []), (request.tokens, ticket.id, ticket))

    def wait_for_room(self, ticket: Ticket) -> None:
        """Let a ticket wait for blocks; where it stands already, it keeps its place."""
        self.stop_waiting(ticket)
        if not ticket.in_line:
            self.line.join(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket."""
        del self.tickets[ticket.id]
        mine = self._by_worker[ticket.request.worker]
        del mine[ticket.id]
        if not mine:
            del self._by_worker[ticket.request.worker]
        self.line.leave(ticket)
        self.stop_waiting(ticket)
        if isinstance(ticket.request, Request):
            self._prompts.remove(ticket.tenant, len(ticket.request.tokens))

    def stop_waiting(self, ticket: Ticket) -> None:
        """Let a ticket wait for no flight.  O(log waiting)."""
        owner, waiters = ticket.owner, ticket.beside
        if owner is None or waiters is None:
            return
        ticket.owner = ticket.beside = None
        waiters.count -= 1
        if not waiters.count and self._by_owner.get(owner) is waiters:
            del self._by_owner[owner]
        request = ticket.request
        assert isinstance(request, Request)
        below = self._below[request.namespace]
        del below[bisect_left(below, (request.tokens, ticket.id))]
        if not below:
            del self._below[request.namespace]

    def waiting_for(self, owner: int) -> int:
        """Count the requests that wait for a lease.  O(1)."""
        waiters = self._by_owner.get(owner)
        return 0 if waiters is None else waiters.count

    # ------------------------------------------------------------------ called

    @property
    def is_called(self) -> bool:
        """Whether somebody whose wait is over has still to be tried, or to be looked for."""
        return bool(self._ready or self._calls or self._searches)

    def call(self, owner: int, indexed: int | None) -> None:
        """Let the tickets whose wait for `owner` is over be tried: `take` finds them.  O(1).

        Args:
            owner: The lease they wait for.
            indexed: How many tokens it has indexed; None if it will index no more.
        """
        if (waiters := self._by_owner.get(owner)) is None:
            return
        if indexed is None:
            del self._by_owner[owner]  # who is tried and waits for it again is not called again
        if indexed is None or waiters.heap[0][0] <= indexed:
            self._calls[waiters] = indexed

    def may_share(self, namespace: Namespace, owner: int) -> bool:
        """Whether anybody there waits for another flight than `owner`'s.  O(1)."""
        return len(self._below.get(namespace, ())) > self.waiting_for(owner)

    def search(self, namespace: Namespace, prefix: bytes, owner: int) -> None:
        """Let the tickets be tried that wait for a flight other than `owner`'s for a prefix of it.

        Needed where several leases computed the same tokens: who waits for the slowest must not
        wait on when the first has landed.  The search is made by `take`, in parts.

        Args:
            namespace: Where.
            prefix: All tokens up to the first one that was committed now, packed.
            owner: Who committed it.
        """
        search = self._searches.get(owner)
        if search is None:
            self._searches[owner] = _Search(namespace, prefix, (prefix, -1))
        elif search.again is None:
            search.again = prefix

    def take(self) -> Ticket | None:
        """Give the next ticket to be tried; None if there is none, or it has yet to be found.

        Those of one owner come in order of arrival, as far as they are found together.
        O((`_CALLED` + `_SEARCHED`) · log waiting).
        """
        if not self._ready and self._calls:
            self._go_on_calling(next(iter(self._calls)))
        elif not self._ready and self._searches:
            self._go_on_searching(next(iter(self._searches)))
        while self._ready:
            ticket = self._ready.popleft()
            if ticket.id in self.tickets:
                return ticket
        return None

    def _go_on_calling(self, waiters: Waiters) -> None:
        indexed, heap = self._calls.pop(waiters), waiters.heap
        called: list[Ticket] = []
        for _ in range(_CALLED):
            if not heap or (indexed is not None and heap[0][0] > indexed):
                break
            if (ticket := self._waits(heappop(heap), waiters)) is not None:
                self.stop_waiting(ticket)
                called.append(ticket)
        else:
            self._calls[waiters] = indexed
        called.sort(key=lambda ticket: ticket.id)
        self._ready.extend(called)

    def _go_on_searching(self, owner: int) -> None:
        search = self._searches.pop(owner)
        below = self._below.get(search.namespace, [])
        at = bisect_left(below, search.after)
        looked_at = below[at : at + _SEARCHED]
        for tokens, number, ticket in looked_at:
            if not tokens.startswith(search.prefix):
                looked_at = []
                break
            search.after = (tokens, number + 1)
            if ticket.owner != owner:
                self.stop_waiting(ticket)
                self._ready.append(ticket)
        if len(looked_at) == _SEARCHED:
            self._searches[owner] = search
        elif search.again is not None:
            self.search(search.namespace, search.again, owner)

    # ------------------------------------------------------------------ time

    def overdue(self, now: float) -> Ticket | None:
        """Give a ticket whose deadline has passed; None if there is none.  Amortised O(log)."""
        heap = self._deadlines
        while heap and heap[0][0] < now:
            if (ticket := self.tickets.get(heappop(heap)[1])) is not None:
                return ticket
        return None

    def call_late(self, now: float) -> None:
        """Let those be tried who wait for their flight no longer, some hundred at most.

        O(these · log waiting).
        """
        heap = self._lates
        for _ in range(_STALE):
            if not heap or heap[0][0] >= now:
                return
            entry = heappop(heap)
            if self._is_patient(entry):
                ticket = self.tickets[entry[1]]
                self.stop_waiting(ticket)
                self._ready.append(ticket)

    def _is_patient(self, entry: tuple[float, TicketId]) -> bool:
        """Whether somebody waits for a flight, and until that time."""
        ticket = self.tickets.get(entry[1])
        return ticket is not None and ticket.owner is not None and ticket.until == entry[0]

    def next_deadline(self) -> float | None:
        """Give a time before which no wait is over by itself; None if nobody waits.

        Of those who have left, few are dropped in one go: then the time is too early.
        """
        heap, lates = self._deadlines, self._lates
        for _ in range(_STALE):
            if not heap or heap[0][1] in self.tickets:
                break
            heappop(heap)
        for _ in range(_STALE):
            if not lates or self._is_patient(lates[0]):
                break
            heappop(lates)
        times = [one[0][0] for one in (heap, lates) if one]
        return min(times, default=None)

    def check(self) -> None:
        """Assert that each ticket is in one place, where it can be found.  O(waiting)."""
        self.line.check()
        waits: Counter[Waiters] = Counter()
        late = set(self._lates)
        ready = Counter(ticket.id for ticket in self._ready)
        assert not ready or max(ready.values()) == 1, "ready twice"
        for number, ticket in self.tickets.items():
            assert self._by_worker[ticket.request.worker][number] is ticket, "a worker's ticket"
            places = (ticket.owner is not None) + ticket.in_line + ready[number]
            assert places == 1, f"ticket {number} is in {places} places"
            if ticket.owner is not None and ticket.beside is not None:
                waits[ticket.beside] += 1
                is_told = (ticket.until, number) in late
                assert is_told or ticket.until >= ticket.deadline, f"{number} waits without an end"
                assert (ticket.target, number) in ticket.beside.heap, f"{number} is not called"
                if self._calls.get(ticket.beside, 0) is not None:
                    assert self._by_owner[ticket.owner] is ticket.beside, f"{number} waits alone"
        assert sum(map(len, self._by_worker.values())) == len(self.tickets), "tickets of workers"
        assert all(one.count == number for one, number in waits.items()), "who waits"
        assert all(one.count for one in self._by_owner.values()), "an owner for whom nobody waits"
        assert sum(map(len, self._below.values())) == waits.total(), "prompts that wait"
        for below in self._below.values():
            assert below, "an empty list of prompts"
            assert all(one < two for one, two in pairwise(below)), "prompts out of order"

    def _waits(self, entry: tuple[int, TicketId], waiters: Waiters) -> Ticket | None:
        """Give the ticket of an entry that is still true."""
        target, number = entry
        ticket = self.tickets.get(number)
        if ticket is None or ticket.beside is not waiters or ticket.target != target:
            return None
        return ticket
