"""What a client knows of one lease, and when it must stop using it.

```
service   ...........granted ─────────────────── ttl ───────────────────┤ ends
client    sent ─────────────────── ttl - margin ──────────┤ stops
```
The client counts from when it *sent* the request, so its own deadline always comes first, and the
margin leaves time for writes that the device has already begun.
"""

from __future__ import annotations

import time
from array import array
from typing import Protocol

from prefixcache.errors import LeaseExpired
from prefixcache.types import BlockTable, Grant, TableUpdate


class Clocked(Protocol):
    """The part of a session that a lease needs to know its deadline."""

    renewed_at: float
    """Monotonic seconds when the last answered sign of life was sent."""


class LeaseState:
    """A lease on blocks, as the service granted it.

    Attributes:
        id: number of the lease.
        num_cached: tokens from position 0 that hold valid KV once `copies` are made.
        num_pending: of the tokens after these, how many another lease was computing.
        copies: block copies to make before the first write.
        ledger: the fate of each prompt token.
        ttl_s: how long the lease lives after a sign of life.
    """

    def __init__(self, grant: Grant, clock: Clocked, sent_at: float) -> None:
        self.id = grant.lease
        self.num_cached = grant.num_cached
        self.num_pending = grant.num_pending
        self.copies = grant.copies
        self.ledger = grant.ledger
        self.ttl_s = grant.ttl_s
        self._table = grant.block_table
        self._clock = clock
        self._sent_at = sent_at
        self._lifetime_s = grant.ttl_s - min(1.0, 0.1 * grant.ttl_s)
        self._released = False

    @property
    def block_table(self) -> BlockTable:
        """The blocks of the sequence in order.

        `extend` and `truncate` put a new array in place of the old one, so a view of the old one
        stays valid, and stays old.
        """
        return self._table

    @property
    def deadline(self) -> float:
        """Monotonic seconds after which this lease must not be used any more."""
        return max(self._sent_at, self._clock.renewed_at) + self._lifetime_s

    @property
    def released(self) -> bool:
        """Whether `release` was called."""
        return self._released

    def mark_released(self) -> None:
        """Remember that the lease was given back: from now on only `release` is accepted."""
        self._released = True

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
        return update

    def __repr__(self) -> str:
        return (
            f"<{type(self).__name__} {self.id}: {len(self._table)} blocks, "
            f"{self.num_cached} tokens cached>"
        )
