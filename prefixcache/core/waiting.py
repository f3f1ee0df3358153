"""The waiting room: requests that wait, for a flight or for blocks, until their deadline.

A waiting request holds nothing new, so waiting cannot deadlock: when the flight lands, its owner
ends, or blocks come back, the request is simply tried again.  The first one to be tried after an
owner died becomes the owner.
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush

from prefixcache.core.flights import Extension, Request, Ticket
from prefixcache.core.line import Line
from prefixcache.types import Namespace, TicketId

_SPARE_DEADLINES = 1024
"""Of tickets that left before, which may be kept beside as many as there are tickets."""


class WaitingRoom:
    """The waiting requests, by ticket, by what they wait for, and by deadline.

    Args:
        max_line: How many may wait for blocks at the same time.
    """

    __slots__ = ("_by_owner", "_deadlines", "_next", "line", "tickets")

    def __init__(self, max_line: int) -> None:
        self.line = Line(max_line)
        self.tickets: dict[TicketId, Ticket] = {}
        self._by_owner: dict[int, list[Ticket]] = {}
        self._deadlines: list[tuple[float, TicketId]] = []
        self._next = 0

    def enter(self, request: Request | Extension, tenant: str, deadline: float) -> Ticket:
        """Give a new ticket, which waits for nobody yet."""
        self._next += 1
        ticket = Ticket(TicketId(self._next), request, tenant, deadline)
        self.tickets[ticket.id] = ticket
        heappush(self._deadlines, (deadline, ticket.id))
        if len(self._deadlines) > 2 * len(self.tickets) + _SPARE_DEADLINES:
            self._deadlines = [entry for entry in self._deadlines if entry[1] in self.tickets]
            heapify(self._deadlines)
        return ticket

    def wait_for(self, ticket: Ticket, owner: int, target: int) -> None:
        """Let a ticket wait until `owner` has indexed `target` tokens, or has ended."""
        self.line.leave(ticket)
        ticket.owner, ticket.target = owner, target
        self._by_owner.setdefault(owner, []).append(ticket)

    def wait_for_room(self, ticket: Ticket) -> None:
        """Let a ticket wait for blocks; where it stands already, it keeps its place."""
        ticket.owner = None
        if not ticket.in_line:
            self.line.join(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket."""
        del self.tickets[ticket.id]
        self.line.leave(ticket)
        self.stop_waiting(ticket)

    def stop_waiting(self, ticket: Ticket) -> None:
        """Let a ticket wait for nobody, to be tried again."""
        owner = ticket.owner
        waiting = None if owner is None else self._by_owner.get(owner)
        if owner is not None and waiting is not None and ticket in waiting:
            waiting.remove(ticket)
            if not waiting:
                del self._by_owner[owner]

    def waiting_for(self, owner: int) -> int:
        """Count the requests that wait for a lease.  O(1)."""
        return len(self._by_owner.get(owner, ()))

    def called(self, owner: int, indexed: int | None) -> list[Ticket]:
        """Take out the tickets whose wait for `owner` is over, in order of arrival.

        Args:
            owner: The lease they wait for.
            indexed: How many tokens it has indexed; None if it will index no more.
        """
        waiting = self._by_owner.pop(owner, None)
        if not waiting:
            return []
        if indexed is None:
            return waiting
        staying = [ticket for ticket in waiting if ticket.target > indexed]
        if staying:
            self._by_owner[owner] = staying
        return [ticket for ticket in waiting if ticket.target <= indexed]

    def sharing(self, namespace: Namespace, at: int, token: bytes, owner: int) -> list[Ticket]:
        """Give the tickets that wait for a flight other than `owner`'s for a token it committed.

        O(waiting).  Needed where several leases computed the same tokens: who waits for the slowest
        must not wait on when the first has landed.

        Args:
            namespace: Where.
            at: Byte at which the token stands in the sequence.
            token: The first one that was committed now, packed.
            owner: Who committed it.
        """
        return [
            ticket
            for ticket in self.tickets.values()
            if not isinstance(ticket.request, Extension)
            and not ticket.in_line
            and ticket.owner != owner
            and ticket.request.tokens.startswith(token, at)
            and ticket.request.namespace == namespace
        ]

    def overdue(self, now: float) -> list[Ticket]:
        """Give the tickets whose deadline has passed."""
        found = []
        heap = self._deadlines
        while heap and heap[0][0] < now:
            ticket = self.tickets.get(heappop(heap)[1])
            if ticket is not None:
                found.append(ticket)
        return found

    def next_deadline(self) -> float | None:
        """Give the earliest deadline; None if nobody waits."""
        heap = self._deadlines
        while heap and heap[0][1] not in self.tickets:
            heappop(heap)
        return heap[0][0] if heap else None
