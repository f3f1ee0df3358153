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
from prefixcache.types import (
    Again,
    BlockId,
    Copy,
    Layout,
    Ledger,
    PoolHandle,
    Segment,
    TableUpdate,
    pack,
)
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
    def segments(self) -> tuple[Segment, ...]:
        """What is to be put in place after the copies."""

    @property
    def approximate(self) -> bool:
        """Whether what it reads is not what a full prefill gives."""

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


@dataclass(frozen=True, slots=True)
class Fork:
    """A claim is to have `count` others beside it, on the blocks of what it has committed.

    Each is extended before it is written to, and gets a last block of its own with that.
    """

    claim: Claim
    count: int


@dataclass(frozen=True, slots=True)
class Settled:
    """What came of a step's message."""

    lost: list[Claim] = field(default_factory=list)
    """Claims that have ended meanwhile."""
    forked: list[list[Claim]] = field(default_factory=list)
    """Of each fork, its claims; none, if it was refused."""


class Store(Protocol):
    """Gives claims and takes them back."""

    pool: SharedPool

    @property
    def shared(self) -> bool:
        """Whether other workers use the same pool."""

    @property
    def again(self) -> Again | None:
        """What is computed again of segments, where they may be asked for; None: they may not."""

    def claim(
        self,
        tokens: Sequence[int],
        *,
        reserve: int,
        wait_s: float,
        request_id: str,
        salt: str | None = None,
        reuse: bool = True,
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Future[Claim]:
        """Ask for the blocks of a prompt and of `reserve` more tokens.  Does not block.

        Without `reuse`, nothing that is stored is in them: all tokens are to be computed.  Without
        `for_room`, `wait_s` is for a prefix alone: without room it is refused at once.  With
        `segments`, what is stored elsewhere may be used, and this of it is computed again.
        """
        ...

    def settle(
        self, commits: Sequence[Commit], releases: Sequence[Claim], forks: Sequence[Fork] = ()
    ) -> Settled:
        """Pass on what a step wrote, who is forked, and what is done with, in this order."""
        ...

    def extend(
        self, claims: Sequence[tuple[Claim, int]], *, wait_s: float
    ) -> list[Future[TableUpdate]]:
        """Ask for room for so many tokens of each claim, in all.  Does not block.

        Waits in line for `wait_s`, before those that have no blocks yet; then PoolExhausted.  The
        copies of an answer are to be made before the claim is written to.
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
    num_committed: int = 0
    segments: tuple[Segment, ...] = ()
    approximate: bool = False
    tail_is_shared: bool = False
    """Whether its last block is another's as well, and copied before it is written to."""


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
    _others: dict[int, int] = field(default_factory=dict, init=False)
    """Of blocks that forks share: how many have it beside the first."""

    @property
    def again(self) -> None:
        """Nothing is stored that could be moved."""
        return

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
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Future[Claim]:
        """Take blocks from the free list; the future is done at once."""
        answer: Future[Claim] = Future()
        try:
            table = self._take(-(-(len(tokens) + reserve) // self.block_size))
            answer.set_result(PrivateClaim(table, Ledger(cold=len(tokens))))
        except CacheError as error:
            answer.set_exception(error)
        return answer

    def settle(
        self, commits: Sequence[Commit], releases: Sequence[Claim], forks: Sequence[Fork] = ()
    ) -> Settled:
        """Fork claims, and take blocks back.  There is nobody else to tell of commits."""
        for commit in commits:
            assert isinstance(commit.claim, PrivateClaim)
            commit.claim.num_committed = commit.num_tokens
        forked = [self._fork(fork.claim, fork.count) for fork in forks]
        for claim in releases:
            self._give_back(claim.block_table)
        return Settled(forked=forked)

    def extend(
        self, claims: Sequence[tuple[Claim, int]], *, wait_s: float
    ) -> list[Future[TableUpdate]]:
        """Add blocks to claims; the futures are done at once."""
        answers = []
        for claim, num_tokens in claims:
            answer: Future[TableUpdate] = Future()
            try:
                answer.set_result(self._extend(claim, num_tokens))
            except CacheError as error:
                answer.set_exception(error)
            answers.append(answer)
        return answers

    def _extend(self, claim: Claim, num_tokens: int) -> TableUpdate:
        assert isinstance(claim, PrivateClaim)
        table = claim.block_table
        keep = len(table) - claim.tail_is_shared
        fresh = self._take(max(0, -(-num_tokens // self.block_size) - keep))
        copies: tuple[Copy, ...] = ()
        if claim.tail_is_shared and fresh:
            source = table.pop()
            copies = (
                Copy(BlockId(source), BlockId(fresh[0]), claim.num_committed % self.block_size),
            )
            claim.tail_is_shared = False
            # Lent again it may be at once: whoever gets it writes after the copy is made.
            self._give_back(array("i", [source]))
        table.extend(fresh)
        return TableUpdate(keep, fresh, copies)

    def _fork(self, claim: Claim, count: int) -> list[Claim]:
        assert isinstance(claim, PrivateClaim)
        committed = claim.num_committed
        shared = claim.block_table[: -(-committed // self.block_size)]
        for block in shared:
            self._others[block] = self._others.get(block, 0) + count
        return [
            PrivateClaim(
                shared[:],
                claim.ledger,
                num_cached=committed,
                num_committed=committed,
                tail_is_shared=committed % self.block_size > 0,
            )
            for _ in range(count)
        ]

    def _give_back(self, blocks: array[int]) -> None:
        """Put blocks on the free list, but for those that somebody else has."""
        others = self._others
        if not others:
            self._free.extend(blocks)
            return
        for block in blocks:
            if block not in others:
                self._free.append(block)
            elif others[block] == 1:
                del others[block]
            else:
                others[block] -= 1

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

    @property
    def again(self) -> Again | None:
        """What the service says at least is to be computed again, if it gives segments."""
        return self.session.segments

    def claim(
        self,
        tokens: Sequence[int],
        *,
        reserve: int,
        wait_s: float,
        request_id: str,
        salt: str | None = None,
        reuse: bool = True,
        for_room: bool = True,
        segments: Again | None = None,
    ) -> Future[Claim]:
        """Ask the service for a lease; done when its answer arrives."""
        future: Future[Claim] = self.session.acquire_later(  # type: ignore[assignment]
            pack(tokens),
            reserve=reserve,
            wait_s=wait_s,
            request_id=request_id,
            salt=salt,
            reuse=reuse,
            for_room=for_room,
            segments=segments,
        )
        return future

    def settle(
        self, commits: Sequence[Commit], releases: Sequence[Claim], forks: Sequence[Fork] = ()
    ) -> Settled:
        """Send a step's commits, forks and releases in one message; tell what came of them.

        Once the session is lost there is nobody to tell, no lease is known to have ended, and no
        fork is granted.
        """
        if not (commits or releases or forks) or not self.session.alive:
            return Settled(forked=[[] for _ in forks])
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
            forked = [batch.fork(fork.claim, fork.count) for fork in forks]  # type: ignore[arg-type]
            for claim in releases:
                batch.release(claim)  # type: ignore[arg-type]
        if not self.session.alive:
            return Settled(forked=[[] for _ in forks])
        return Settled(
            [claim for claim, reply in replies if reply.error is not None],
            [[] if reply.error is not None else list(reply.result()) for reply in forked],
        )

    def extend(
        self, claims: Sequence[tuple[Claim, int]], *, wait_s: float
    ) -> list[Future[TableUpdate]]:
        """Ask the service for room, in one message; done when its answers arrive.

        The tables have grown then.
        """
        batch = self.session.batch()
        answers = []
        for claim, num_tokens in claims:
            reply: Any = batch.extend(claim, num_tokens, wait_s=wait_s)  # type: ignore[arg-type]
            answer: Future[TableUpdate] = Future()
            self.session.promise(reply, answer, answer.set_running_or_notify_cancel)
            answers.append(answer)
        self.session.post(batch)
        return answers

    @property
    def alive(self) -> bool:
        """Whether the session stands."""
        return self.session.alive
