"""What a client knows of one lease, and when it must stop using it.

```
service   ...........granted ─────────────────── ttl ───────────────────┤ ends
client    sent ─────────────────── ttl - margin ──────────┤ stops
```
The client counts from when it *sent* the request, so its own deadline always comes first, and the
margin leaves time for writes that the device has already begun.  A sign of life that was sent later
and answered before the grant was taken before the grant: then it counts from that one's sending.

A sign of life prolongs a lease only if its answer came *before* the lease's deadline.  One that is
answered later says that the worker lives, but not that its leases still do: a process that was
stopped sends its next heartbeat when it wakes, and the service has ended its leases meanwhile.
"""

from __future__ import annotations

import time
from array import array
from typing import Final, Protocol
from weakref import WeakSet

from prefixcache.client.connection import refuse_pickle
from prefixcache.errors import LeaseExpired, NotFound, ServiceUnavailable
from prefixcache.texts import many
from prefixcache.types import BlockTable, Grant, TableUpdate


def lifetime_of(ttl_s: float) -> float:
    """Give how long after a sign of life a client may use a lease."""
    return ttl_s - min(1.0, 0.1 * ttl_s)


class SignsOfLife:
    """The signs of life of one worker that the service answered: the last ones without a gap.

    Attributes:
        last: monotonic seconds when the last one was sent; 0 if none was answered yet.
        first: when the first one since the last gap was sent.
        first_answered: when it was answered.
    """

    __slots__ = ("first", "first_answered", "last")

    def __init__(self) -> None:
        self.last = self.first = self.first_answered = 0.0

    def note(self, sent_at: float, answered_at: float, lifetime_s: float) -> None:
        """Note an answer.  A gap is where it came too late to prolong what went before."""
        if answered_at > self.last + lifetime_s:
            self.first, self.first_answered = sent_at, answered_at
        self.last = max(self.last, sent_at)

    def deadline(self, granted_at: float, lifetime_s: float) -> float:
        """Give until when a lease stands that the service counts from `granted_at` or later."""
        own = granted_at + lifetime_s
        if self.last and (self.first <= granted_at or self.first_answered <= own):
            return max(own, self.last + lifetime_s)
        return own


class Clocked(Protocol):
    """The part of a session that a lease needs: for its deadline, and who watches it."""

    signs: SignsOfLife
    watched: WeakSet[LeaseState]
    """Leases that somebody watches."""


class Watcher(Protocol):
    """What is made of a lease's blocks and must not outlive them: a view of them, say."""

    def keep(self, num_blocks: int) -> None:
        """Let go of the blocks from this one on: they are not the lease's any more, or not soon."""
        ...

    def end(self, *, in_use: bool = False) -> None:
        """Let go of all.  `in_use`: another thread may be reading them, and did not end it."""
        ...


GONE: Final = (LeaseExpired, NotFound, ServiceUnavailable)
"""Errors of a release at the end of a `with` block: the lease is gone already, with its worker or
its service, and what the block itself raised is not to be masked."""


class LeaseState:
    """A lease on blocks, as the service granted it.

    Attributes:
        id: number of the lease.
        num_cached: tokens from position 0 that hold valid KV once `copies` are made.
        num_pending: of the tokens after these, how many another lease was computing.
        copies: block copies to make before the first write.
        segments: to be put in place after `copies`, and before anything is computed.
        approximate: whether what it reads, or computes, is not what a full prefill gives.
        ledger: the fate of each prompt token.
        ttl_s: how long the lease lives after a sign of life.
    """

    def __init__(self, grant: Grant, session: Clocked, sent_at: float) -> None:
        """Take a grant of which the service counts from `sent_at` or later."""
        self.id = grant.lease
        self.num_cached = grant.num_cached
        self.num_pending = grant.num_pending
        self.copies = grant.copies
        self.segments = grant.segments
        self.approximate = grant.approximate
        self.ledger = grant.ledger
        self.ttl_s = grant.ttl_s
        self._table = grant.block_table
        self._session = session
        self._sent_at = sent_at
        self._lifetime_s = lifetime_of(grant.ttl_s)
        self._released = False
        self._watchers: tuple[Watcher, ...] = ()

    @property
    def block_table(self) -> BlockTable:
        """The blocks of the sequence in order.

        `extend` and `truncate` put a new array in place of the old one, so a view of the old one
        stays valid, and stays old.
        """
        return self._table

    def is_of(self, session: object) -> bool:
        """Whether it is a lease of this very session."""
        return self._session is session

    @property
    def deadline(self) -> float:
        """Monotonic seconds after which this lease must not be used any more."""
        return self._session.signs.deadline(self._sent_at, self._lifetime_s)

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    def mark_released(self) -> None:
        """Remember that the lease was given back: from now on only `release` is accepted."""
        self._released = True
        self.let_go()

    def watch(self, watcher: Watcher) -> None:
        """Have somebody told before blocks of this lease may become another's.

        Told is in whatever thread learns of it: before a release, a truncate or a session's end is
        sent, when a table comes whose blocks are others, and when the session is lost.  Never of a
        deadline that passes.

        Raises:
            LeaseExpired: it has ended.
        """
        self.check()
        self._watchers = (*self._watchers, watcher)
        self._session.watched.add(self)

    def unwatch(self, watcher: Watcher) -> None:
        """Tell it no more.  Idempotent."""
        self._watchers = tuple(one for one in self._watchers if one is not watcher)

    def let_go(self, *, in_use: bool = False) -> None:
        """Have all let go that is made of its blocks, and is watching."""
        watchers, self._watchers = self._watchers, ()
        for watcher in watchers:
            watcher.end(in_use=in_use)

    def cut_off(self, num_blocks: int) -> None:
        """Have those who watch let go of the blocks from this one on."""
        for watcher in self._watchers:
            watcher.keep(num_blocks)

    def check(self) -> None:
        """Refuse to go on with a lease that is released or past its deadline.

        Raises:
            LeaseExpired: it is.
        """
        if self._released:
            raise LeaseExpired(f"lease {self.id} was released; acquire again")
        late_s = time.monotonic() - self.deadline
        if late_s > 0:
            raise LeaseExpired(
                f"lease {self.id} passed its deadline {late_s:.1f} s ago without a sign of life "
                f"that the service confirmed (ttl {self.ttl_s:g} s); acquire again"
            )

    def apply(self, update: TableUpdate) -> TableUpdate:
        """Bring the block table up to date and give `update` back.  O(table) when it changed."""
        table = self._table
        if update.blocks or update.keep != len(table):
            fresh = array("i", table[: update.keep])
            fresh.extend(update.blocks)
            self._table = fresh
            self.cut_off(update.keep)
        return update

    def __repr__(self) -> str:
        state = ", released" if self._released else ""
        return (
            f"<{type(self).__name__} {self.id}: {many(len(self._table), 'block')}, "
            f"{many(self.num_cached, 'token')} cached{state}>"
        )

    __reduce_ex__ = refuse_pickle
