"""Where a worker's sequences keep their keys and values: in the shared pool, or in one of its own.

```
                   claim                  per step                         end
SharedStore    Future[Lease] ──► commits: one message; room, ahead   ──► release: same message
PrivateStore   Future[Claim] ──► room                                ──► blocks to the free list
```
"""

from __future__ import annotations

import math
import mmap
from array import array
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from prefixcache.client import Session
from prefixcache.errors import CacheError, InvalidRequest, PoolExhausted
from prefixcache.types import Copy, Layout, Ledger, PoolHandle, pack
from prefixcache_kernels import TORCH_DTYPES, SharedPool
from prefixcache_kernels.fence import Fence

RETRY_S: Final = 0.05
"""When to ask again for blocks that were not there."""


class Claim(Protocol):
    """A sequence's right to blocks; a lease is one."""

    @property
    def block_table(self) -> array[int]:
        """Its blocks in order."""

    @property
    def num_cached(self) -> int:
        """Tokens that need not be computed, once `copies` are made."""

    @property
    def copies(self) -> tuple[Copy, ...]:
        """Copies to make before the first use."""

    @property
    def ledger(self) -> Ledger:
        """The fate of each prompt token."""

    @property
    def deadline(self) -> float:
        """Monotonic seconds after which its blocks must not be touched."""


@dataclass(frozen=True, slots=True)
class Commit:
    """Slots below `num_tokens` of a claim hold valid keys and values."""

    claim: Claim
    num_tokens: int
    new_tokens: Sequence[int]


class Store(Protocol):
    """Gives claims and takes them back."""

    pool: SharedPool

    @property
    def shared(self) -> bool:
        """Whether other workers use the same pool."""

    def claim(
        self,
        tokens: Sequence[int],
        *,
        reserve: int,
        wait_s: float,
        request_id: str,
        salt: str | None = None,
        reuse: bool = True,
    ) -> Future[Claim]:
        """Ask for the blocks of a prompt and of `reserve` more tokens.  Does not block.

        Without `reuse`, nothing that is stored is in them: all tokens are to be computed.
        """
        ...

    def settle(self, commits: Sequence[Commit], releases: Sequence[Claim]) -> list[Claim]:
        """Pass on what a step wrote and what is done with; give the claims that are lost."""
        ...

    def extend(self, claim: Claim, num_tokens: int, *, wait_s: float) -> Future[None]:
        """Ask for room for `num_tokens` tokens in all.  Does not block.

        Waits in line for `wait_s`, before those that have no blocks yet; then PoolExhausted.
        """
        ...

    @property
    def alive(self) -> bool:
        """Whether new claims can be had."""


@dataclass(eq=False, slots=True)
class PrivateClaim:
    """Blocks of a private store."""

    block_table: array[int]
    ledger: Ledger
    num_cached: int = 0
    copies: tuple[Copy, ...] = ()
    deadline: float = math.inf


@dataclass(eq=False)
class PrivateStore:
    """A pool of this process alone, without any sharing: what is left when there is no service.

    Args:
        layout: of the model.
        num_blocks: blocks of the pool; memory is touched only as it is used.
        block_size: tokens of a block.
    """

    layout: Layout
    num_blocks: int
    block_size: int = 16
    shared: bool = field(default=False, init=False)
    alive: bool = field(default=True, init=False)
    pool: SharedPool = field(init=False)
    _free: list[int] = field(init=False)

    def __post_init__(self) -> None:
        handle = PoolHandle("none", "", self.num_blocks, self.block_size, self.layout, 0, 0)
        # Anonymous pages are zero and cost nothing until they are written; a zeroed tensor costs
        # a second per 1.5 GB at once, just when the service has gone and requests are waiting.
        memory = torch.frombuffer(
            mmap.mmap(-1, handle.num_bytes), dtype=TORCH_DTYPES[self.layout.dtype]
        )
        self.pool = SharedPool(
            handle,
            memory.view(
                self.layout.num_layers,
                2,
                self.num_blocks,
                self.block_size,
                self.layout.num_kv_heads,
                self.layout.head_dim,
            ),
        )
        self._free = list(range(self.num_blocks - 1, -1, -1))

    def claim(
        self,
        tokens: Sequence[int],
        *,
        reserve: int,
        wait_s: float,
        request_id: str,
        salt: str | None = None,
        reuse: bool = True,
    ) -> Future[Claim]:
        """Take blocks from the free list; the future is done at once."""
        answer: Future[Claim] = Future()
        try:
            table = self._take(-(-(len(tokens) + reserve) // self.block_size))
            answer.set_result(PrivateClaim(table, Ledger(cold=len(tokens))))
        except CacheError as error:
            answer.set_exception(error)
        return answer

    def settle(self, commits: Sequence[Commit], releases: Sequence[Claim]) -> list[Claim]:
        """Take blocks back.  There is nobody to tell of commits."""
        for claim in releases:
            self._free.extend(claim.block_table)
        return []

    def extend(self, claim: Claim, num_tokens: int, *, wait_s: float) -> Future[None]:
        """Add blocks to a claim; the future is done at once."""
        answer: Future[None] = Future()
        missing = -(-num_tokens // self.block_size) - len(claim.block_table)
        try:
            claim.block_table.extend(self._take(max(0, missing)))
            answer.set_result(None)
        except CacheError as error:
            answer.set_exception(error)
        return answer

    @property
    def num_free(self) -> int:
        """Blocks on the free list."""
        return len(self._free)

    def _take(self, count: int) -> array[int]:
        if count > self.num_blocks:
            raise InvalidRequest(
                f"needs {count} blocks of {self.block_size} tokens; the pool has {self.num_blocks}"
            )
        if count > len(self._free):
            raise PoolExhausted(f"needs {count} blocks; {len(self._free)} are free", RETRY_S)
        taken = array("i", self._free[len(self._free) - count :])
        del self._free[len(self._free) - count :]
        return taken


class SharedStore:
    """The service's pool, through one session.

    Args:
        session: attached.
        pool: the pool that it named, mapped.
    """

    shared: Final = True

    def __init__(self, session: Session, pool: SharedPool) -> None:
        self.session = session
        self.pool = pool
        self._fence: Fence[None] = Fence.of(pool.blocks)

    def claim(
        self,
        tokens: Sequence[int],
        *,
        reserve: int,
        wait_s: float,
        request_id: str,
        salt: str | None = None,
        reuse: bool = True,
    ) -> Future[Claim]:
        """Ask the service for a lease; done when its answer arrives."""
        future: Future[Claim] = self.session.acquire_later(  # type: ignore[assignment]
            pack(tokens),
            reserve=reserve,
            wait_s=wait_s,
            request_id=request_id,
            salt=salt,
            reuse=reuse,
        )
        return future

    def settle(self, commits: Sequence[Commit], releases: Sequence[Claim]) -> list[Claim]:
        """Send a step's commits and releases in one message; give the leases that had ended.

        Once the session is lost there is nobody to tell, and no lease is known to have ended.
        """
        if not (commits or releases) or not self.session.alive:
            return []
        # What the step wrote is there, and what it read is read, before anybody hears of it.
        self._fence.push(None)
        self._fence.drain()
        with self.session.batch() as batch:
            replies = [
                (
                    commit.claim,
                    batch.commit(commit.claim, commit.num_tokens, pack(commit.new_tokens)),  # type: ignore[arg-type]
                )
                for commit in commits
            ]
            for claim in releases:
                batch.release(claim)  # type: ignore[arg-type]
        if not self.session.alive:
            return []
        return [claim for claim, reply in replies if reply.error is not None]

    def extend(self, claim: Claim, num_tokens: int, *, wait_s: float) -> Future[None]:
        """Ask the service for room; done when its answer arrives, and the table has grown."""
        batch = self.session.batch()
        reply: Any = batch.extend(claim, num_tokens, wait_s=wait_s)  # type: ignore[arg-type]
        answer: Future[None] = Future()
        self.session.promise(reply, answer, answer.set_running_or_notify_cancel)
        self.session.post(batch)
        return answer

    @property
    def alive(self) -> bool:
        """Whether the session stands."""
        return self.session.alive
