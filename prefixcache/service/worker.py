"""One attached worker: who it is, what it has asked, and what people are shown of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from prefixcache.service.attachments import Attachments
from prefixcache.service.auth.identity import LOCAL, Identity, Proof
from prefixcache.service.processes import Process
from prefixcache.types import LeaseId, TicketId, WorkerId


@dataclass(slots=True)
class Handed:
    """Leases on their way to unary calls: several may have asked for them with one id."""

    num_calls: int = 0
    """Those whose callers have not been told yet, nor hung up."""
    leases: tuple[LeaseId, ...] = ()
    is_taken: bool = False
    """Whether somebody has been told of them."""

    def note(self, leases: tuple[LeaseId, ...]) -> None:
        """Note what is granted: others than before, if those have ended meanwhile."""
        if leases != self.leases:
            self.leases, self.is_taken = leases, False


@dataclass(slots=True, eq=False)
class Worker:
    """One attached worker."""

    id: WorkerId
    """Its number, which the service handed out: the key of all that it holds."""
    name: str
    """What people are shown; it decides nothing."""
    key: str
    """The right to act for it."""
    hang_up: Callable[[], object] | None
    """Ends its stream; None for a worker that uses unary calls."""
    identity: Identity = LOCAL
    """Who it is: what it may see and use."""
    proof: Proof | None = None
    """What a worker without a stream showed last; None where nobody has to prove anything."""
    pid: int = 0
    group: str = ""
    """Of workers that write to each other's blocks; "" if it writes alone."""
    process: Process | None = None
    """Where it lives, if that is watched."""
    seen_at: float = 0.0
    """When a worker without a stream gave its last sign of life."""
    namespaces: Attachments = field(default_factory=Attachments)
    tickets: dict[int, TicketId] = field(default_factory=dict)
    """Its acquires that wait, by op id."""
    handed: dict[tuple[str, str], Handed] = field(default_factory=dict)
    """What is on its way to unary calls, by their verb and request id."""
    forget: asyncio.TimerHandle | None = None
    """Once lost, if its process cannot be watched: ends the quarantine at last."""
    state: str = "attached"
    """Then `left` (it said so), `died` (its process ended) or `lost` (it may still be writing)."""
    since: float = 0.0
    """When it came into that state."""
    in_hand: int = 0
    """Requests it has in hand, as it told last."""
    stepped_at: float = 0.0
    """When it made its last step, as it told last."""
    untaken: int = 0
    """Requests that were handed to it and it has not taken, as it told last."""
    untaken_since: float = 0.0
    """When the oldest of them came, as it told last."""
    committed_at: float = 0.0
    """When it last committed anything."""
    is_outlived: bool = False
    """Whether its process has ended, and others of its group may write on."""

    def stalled_s(self, now: float) -> float:
        """Give how long it has made no step with requests in hand; 0 if it tells of none.  O(1)."""
        return now - max(self.stepped_at, self.since) if self._tells and self.in_hand else 0.0

    def oldest_untaken_s(self, now: float) -> float:
        """Give how long the oldest request has lain before it; 0 if it tells of none.  O(1)."""
        return now - max(self.untaken_since, self.since) if self._tells and self.untaken else 0.0

    def take(self, request_id: str, lease: LeaseId) -> None:
        """Note that somebody is told of the lease that he acquired by an id.  O(1).

        No call that asked with the same id, and was hung up, gives it back.
        """
        if (handed := self.handed.get(("acquire", request_id))) is not None:
            handed.note((lease,))
            handed.is_taken = True

    @property
    def _tells(self) -> bool:
        """Whether what it told still holds: it is attached."""
        return self.state == "attached"

    @property
    def tenant(self) -> str:
        """Whose it is."""
        return self.identity.tenant or ""

    def name_for(self, identity: Identity) -> str:
        """Give its name as somebody is shown it: with the tenant, if he sees several."""
        if not self.tenant or identity.tenant == self.tenant:
            return self.name
        return f"{self.tenant}/{self.name}"


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who only asks, without being a worker."""

    identity: Identity


Asker: TypeAlias = "Worker | Visitor"


class WorkerStatus(NamedTuple):
    """What is shown of one worker, under the names that `WorkerInfo` has for it."""

    worker: str
    """Its name, as the asker is shown it."""
    pid: int
    state: str
    since_s: float
    """For how long it has been in that state."""
    leases: int
    has_session: bool
    in_hand: int
    stalled_s: float
    untaken: int
    oldest_untaken_s: float
    uncommitted_s: float
