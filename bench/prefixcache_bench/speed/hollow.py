"""A cache that stores nothing: what the service costs without one."""

from __future__ import annotations

from array import array
from collections.abc import Collection, Generator

import numpy as np

from prefixcache.types import (
    Again,
    Committed,
    Counts,
    Ended,
    Grant,
    LeaseId,
    Ledger,
    Namespace,
    Released,
    Snapshot,
    TableUpdate,
    WorkerId,
)

_NO_BLOCKS = array("i")


class HollowCache:
    """Answers like `PrefixCache`, with a table of the right size; reads every token."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._count = 0

    def attach(
        self,
        worker: WorkerId,
        namespace: Namespace,
        *,
        now: float,
        name: str = "",
        first_lease: int = 1,
    ) -> None:
        """Accept everybody."""

    def make_way(self, namespace: Namespace) -> None:
        """Have room for everything."""

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Keep nothing for anybody."""

    def count_leases(self, worker: WorkerId) -> int:
        """Nothing is held."""
        return 0

    def count_quarantined(self, worker: WorkerId) -> int:
        """Nothing is set aside."""
        return 0

    num_leases = num_blocks = 0
    """Nothing is held."""

    def namespaces(self) -> list[Namespace]:
        """Nothing is known."""
        return []

    def renew(self, worker: WorkerId, *, now: float) -> None:
        """Accept everything."""

    def detach(self, worker: WorkerId, *, now: float, gone: bool, most: int | None = None) -> Ended:
        """Nothing was held."""
        return Ended()

    def is_leaving(self, worker: WorkerId | None = None) -> bool:
        """Nothing is left to end."""
        return False

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """Nothing was quarantined."""
        return 0

    def snapshot_in_steps(
        self, *, now: float, tenant: str | None, sees: object
    ) -> Generator[None, None, Snapshot]:
        """Tell that nothing is held."""
        yield from ()
        return Snapshot(block_size=self.block_size)

    def counts(self, *, now: float) -> Counts:
        """Tell that there is nothing."""
        return Counts(block_size=self.block_size)

    def take_outcomes(self) -> list[object]:
        """Nobody waits."""
        return []

    def next_deadline(self) -> float | None:
        """Nothing expires."""
        return None

    def clear_way(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        now: float,
        reserve: int = 0,
        request_id: str = "",
        reuse: bool = True,
        min_partial: int = 0,
    ) -> bool:
        """Nothing has to go."""
        return False

    def acquire(
        self,
        worker: WorkerId,
        namespace: Namespace,
        tokens: bytes,
        *,
        now: float,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        attached: bool = True,
        reuse: bool = True,
        min_partial: int = 0,
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Grant:
        """Read all tokens and give a table for them."""
        np.frombuffer(tokens, np.uint32).sum()
        self._count += 1
        num_tokens = len(tokens) // 4
        table = array("i", range(-(-num_tokens // self.block_size)))
        ledger = Ledger(hit=num_tokens - 37, cold=37)
        return Grant(LeaseId(self._count), table, num_tokens - 37, 0, (), ledger, 30.0)

    def commit(
        self,
        worker: WorkerId,
        lease: LeaseId,
        num_tokens: int,
        new_tokens: bytes = b"",
        *,
        now: float,
    ) -> Committed:
        """Accept everything."""
        return Committed(num_tokens, num_tokens // self.block_size)

    def extend(
        self,
        worker: WorkerId,
        lease: LeaseId,
        num_tokens: int,
        *,
        now: float,
        wait_s: float = 0.0,
    ) -> TableUpdate:
        """Give a new block with every 16th token."""
        keep, rest = divmod(num_tokens - 1, self.block_size)
        return TableUpdate(keep, _NO_BLOCKS if rest else array("i", (keep,)))

    def release(self, worker: WorkerId, lease: LeaseId, *, now: float) -> Released:
        """Nothing was held."""
        return Released(3)
