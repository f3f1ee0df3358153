"""Flights: prefixes that some lease is computing now, and the requests that wait for them.

A lease with prompt tokens still to compute is in flight.  It is found at the node where its indexed
blocks end, by the tokens that come next, so a second request for the same prefix meets it exactly
where its own descent ends.

A waiting request holds nothing, so waiting cannot deadlock: when the flight lands, or its owner
ends, the request is simply tried again, first come first served.  The first one to be tried after
an owner died becomes the owner.
"""

from __future__ import annotations

from dataclasses import dataclass
from heapq import heappop, heappush

from prefixcache.core.children import Children, common_prefix
from prefixcache.core.leases import Lease
from prefixcache.core.node import Match, Node
from prefixcache.types import TOKEN_BYTES, LeaseId, Namespace, TicketId, WorkerId


@dataclass(slots=True)
class Request:
    """An `acquire`, kept while it waits."""

    worker: WorkerId
    namespace: Namespace
    tokens: bytes
    reserve: int
    request_id: str
    first_end: int = -1
    """Bytes that matched in whole blocks when it was first tried; what comes later is joined."""


@dataclass(slots=True)
class Ticket:
    """A request that waits."""

    id: TicketId
    request: Request
    deadline: float
    owner: LeaseId | None = None
    target: int = 0
    """Tokens that the owner must have indexed."""


class Flights:
    """The leases in flight, by the node they start from and their next tokens."""

    __slots__ = ("_at", "_width")

    def __init__(self, block_bytes: int) -> None:
        self._width = block_bytes
        self._at: dict[Node, Children[Lease]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._at.values()))

    def start(self, lease: Lease) -> None:
        """Let others find what `lease` is computing.  O(log siblings)."""
        first = lease.rest[: self._width]
        at = self._at.get(lease.node)
        if at is None:
            at = self._at[lease.node] = Children()
        if first not in at:  # of two that compute the same, the first is the one to wait for
            at.put(first, lease)

    def land(self, lease: Lease) -> None:
        """Take a lease out again, if it is in.  Call before its node or tokens change."""
        at = self._at.get(lease.node)
        if at is None:
            return
        first = lease.rest[: self._width]
        if at.get(first) is lease:
            at.drop(first)
            if not at:
                del self._at[lease.node]

    def find(self, match: Match, tokens: bytes, limit: int) -> tuple[Lease, int] | None:
        """Find who computes what comes after a match.  Changes nothing.  O(log siblings).

        Returns:
            The lease, and how many tokens after `match.end` it has in common with `tokens[:limit]`.
        """
        at = self._at.get(match.node)
        if at is None or match.used != len(match.node.blocks):
            return None
        lease, same = at.nearest(tokens[match.end : min(match.end + self._width, limit)])
        if lease is None:
            return None
        if same == self._width:
            size = min(len(lease.rest), limit - match.end)
            same = common_prefix(tokens, match.end, lease.rest, 0, size)
        return lease, same // TOKEN_BYTES

    def check(self) -> None:
        """Assert that every flight is where it can be found."""
        for node, at in self._at.items():
            at.check()
            assert at, "an empty place in the flights"
            for first, lease in at.items():
                assert lease.node is node, f"lease {lease.id} flies from another node"
                assert lease.rest[: self._width] == first, f"lease {lease.id}: other tokens"


class WaitingRoom:
    """The waiting requests, by ticket, by the lease they wait for, and by deadline."""

    __slots__ = ("_by_owner", "_deadlines", "_next", "tickets")

    def __init__(self) -> None:
        self.tickets: dict[TicketId, Ticket] = {}
        self._by_owner: dict[LeaseId, list[Ticket]] = {}
        self._deadlines: list[tuple[float, TicketId]] = []
        self._next = 0

    def enter(self, request: Request, deadline: float) -> Ticket:
        """Give a new ticket, which waits for nobody yet."""
        self._next += 1
        ticket = Ticket(TicketId(self._next), request, deadline)
        self.tickets[ticket.id] = ticket
        heappush(self._deadlines, (deadline, ticket.id))
        return ticket

    def wait_for(self, ticket: Ticket, owner: LeaseId, target: int) -> None:
        """Let a ticket wait until `owner` has indexed `target` tokens, or has ended."""
        ticket.owner, ticket.target = owner, target
        self._by_owner.setdefault(owner, []).append(ticket)

    def leave(self, ticket: Ticket) -> None:
        """Remove a ticket."""
        del self.tickets[ticket.id]
        self.stop_waiting(ticket)

    def stop_waiting(self, ticket: Ticket) -> None:
        """Let a ticket wait for nobody, to be tried again."""
        owner = ticket.owner
        waiting = None if owner is None else self._by_owner.get(owner)
        if owner is not None and waiting is not None and ticket in waiting:
            waiting.remove(ticket)
            if not waiting:
                del self._by_owner[owner]

    def called(self, owner: LeaseId, indexed: int | None) -> list[Ticket]:
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

    def sharing(self, namespace: Namespace, at: int, block: bytes, owner: LeaseId) -> list[Ticket]:
        """Give the tickets that wait for another lease than `owner`, for the block it has indexed.

        O(waiting).  Needed where several leases computed the same block: who waits for the slowest
        must not wait on when the first has landed.

        Args:
            namespace: Where.
            at: Byte in the tokens at which the block begins.
            block: Its packed tokens.
            owner: Who indexed it.
        """
        return [
            ticket
            for ticket in self.tickets.values()
            if ticket.owner != owner
            and ticket.request.tokens.startswith(block, at)
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
