"""The line: requests that wait for blocks, since the pool or a quota is full.

```
leases that grow     w1#7 ─ w3#2 ─ …              first: they hold blocks, and give them back sooner
namespace a          ticket ─ ticket ─ …      ┐
namespace b          ticket ─ …               ├   in turn, one grant each
namespace c          ticket                   ┘
```

Within a namespace it is first come, first served.  A request that does not fit may be passed by
smaller ones, but only `MOST_PASSES` times: then nobody passes it any more, so that no stream of
small requests starves a large one.

When room comes back, everybody who may be next is looked at, some hundred in one step.  The round
goes on where it was, whatever comes and goes meanwhile, and is followed by another one if more room
has come back since it began.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator

from prefixcache.core.flights import Extension, Ticket
from prefixcache.core.leases import Lease
from prefixcache.core.shares import Shares
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.texts import many
from prefixcache.types import Namespace, TicketId

MOST_PASSES = 16


class Line:
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

    def pass_by(self, tickets: Iterable[Ticket]) -> None:
        """Count that somebody was served before these.  O(tickets)."""
        for ticket in tickets:
            if ticket.in_line and not ticket.over_quota:
                ticket.num_passed += 1
                if ticket.num_passed >= MOST_PASSES:
                    self._passed_enough = ticket

    def is_closed_for(self, ticket: Ticket | None) -> bool:
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
