"""All ops of one scheduler step: how both clients turn verbs on leases into ops and back.

The two clients differ only in who sends the step, so everything else is here once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, Generic, Protocol, TypeVar

from prefixcache.client.lease import Clocked, LeaseState
from prefixcache.client.ops import Reply, Step
from prefixcache.errors import LeaseExpired
from prefixcache.types import (
    Committed,
    Explanation,
    Grant,
    Lookup,
    Namespace,
    Pinned,
    Released,
    Reset,
    Snapshot,
    TableUpdate,
    TokensLike,
    Unpinned,
)

L = TypeVar("L", bound=LeaseState)
L_co = TypeVar("L_co", bound=LeaseState, covariant=True)


class Lessee(Clocked, Protocol[L_co]):
    """The part of a session that a batch needs."""

    ids: Iterator[int]

    def behind(self, salt: str) -> Namespace:
        """Give the session's namespace with another salt."""
        ...

    def make_lease(self, grant: Grant, sent_at: float) -> L_co:
        """Wrap a grant into this client's kind of lease."""
        ...


class BatchOps(Generic[L]):
    """Adds ops to one step.  Nothing is sent before the step is; each op fails on its own.

    Every method gives a reply: `reply.result()` is the answer or raises the op's own error.
    """

    def __init__(self, lessee: Lessee[L]) -> None:
        self._lessee = lessee
        self.step = Step(lessee.ids)

    def acquire(
        self,
        tokens: TokensLike,
        *,
        reserve: int = 0,
        wait_s: float = 0.0,
        request_id: str = "",
        salt: str | None = None,
    ) -> Reply[L]:
        """Lease blocks for a prompt: match, pin and allocate in one atomic step.

        Args:
            tokens: the prompt; fastest as packed bytes or a numpy int32 array.
            reserve: tokens that may be added after it; their blocks are taken now.
            wait_s: how long to wait if another worker is computing the prefix now.
            request_id: makes a repeated call give the same lease.
            salt: a secret that keeps this prompt apart, in place of the session's own.  A session
                may use as many as it likes: nothing is left of one that nobody uses.

        Raises:
            PoolExhausted: not enough blocks; `retry_after_s` is a hint.
            InvalidRequest: it can never be served as it is.
            ServiceUnavailable: the service is lost.
        """
        space = None if salt is None else self._lessee.behind(salt)
        reply: Reply[L] = self.step.acquire(tokens, reserve, wait_s, request_id, space)
        reply.finish = partial(self._lessee.make_lease, sent_at=time.monotonic())
        return reply

    def commit(self, lease: L, num_tokens: int, new_tokens: TokensLike = b"") -> Reply[Committed]:
        """Say that slots below `num_tokens` hold valid KV: they become visible to all.

        Call it only after the device has finished writing.  `new_tokens` (generated since) are
        appended to the lease's tokens first.
        """
        return self._on(lease, lambda: self.step.commit(lease.id, num_tokens, new_tokens))

    def extend(self, lease: L, num_tokens: int, *, wait_s: float = 0.0) -> Reply[TableUpdate]:
        """Make room for `num_tokens` tokens in all; `block_table` is up to date afterwards.

        It counts from position 0, and waits up to `wait_s` for room.  Leases that all wait for each
        other's blocks get none: `reserve` at `acquire` what will be needed.
        """
        reply = self._on(lease, lambda: self.step.extend(lease.id, num_tokens, wait_s))
        reply.finish = lease.apply
        return reply

    def truncate(self, lease: L, num_tokens: int) -> Reply[TableUpdate]:
        """Roll back to `num_tokens` tokens; `block_table` is up to date afterwards."""
        reply = self._on(lease, lambda: self.step.truncate(lease.id, num_tokens))
        reply.finish = lease.apply
        return reply

    def fork(self, lease: L, n: int) -> Reply[list[L]]:
        """Make `n` children that share every block.  `extend` a child before it writes."""
        reply: Reply[list[L]] = self._on(lease, lambda: self.step.fork(lease.id, n))
        make = partial(self._lessee.make_lease, sent_at=time.monotonic())
        reply.finish = lambda grants: [make(grant) for grant in grants]
        return reply

    def release(self, lease: L) -> Reply[Released]:
        """End a lease.  Idempotent: also one that expired, or that was released before."""
        lease.mark_released()
        return self.step.release(lease.id)

    def lookup(self, tokens: TokensLike) -> Reply[Lookup]:
        """Ask what `acquire` would find, without taking anything."""
        return self.step.lookup(tokens)

    def explain(self, tokens: TokensLike) -> Reply[Explanation]:
        """Ask why each token would or would not be reused."""
        return self.step.explain(tokens)

    def reset(self) -> Reply[Reset]:
        """Make the session's namespace forget what it has stored.  Leases live on."""
        return self.step.reset()

    def pin(self, tokens: TokensLike, *, ttl_s: float) -> Reply[Pinned]:
        """Let what the session's namespace stores of a prefix be evicted last for `ttl_s`."""
        return self.step.pin(tokens, ttl_s)

    def unpin(self, tokens: TokensLike = b"") -> Reply[Unpinned]:
        """End the pin of exactly this prefix, or all pins of the session's namespace."""
        return self.step.unpin(tokens)

    def snapshot(self) -> Reply[Snapshot]:
        """Ask for the state of the whole cache."""
        return self.step.snapshot()

    def _on(self, lease: L, add: Callable[[], Reply[Any]]) -> Reply[Any]:
        try:
            lease.check()
        except LeaseExpired as error:
            refused: Reply[Any] = Reply(0)
            refused.settle(error)
            return refused
        return add()
