"""One request on its way through the engine.

```
tokens   0 ─── num_cached ─── num_valid ──── num_prompt ──── len(tokens)
         │ found in the pool │ computed here │ to be computed │ generated
told     what the store knows of the tokens ─────────┤ num_told
```
"""

from __future__ import annotations

import time
from concurrent.futures import Future
from dataclasses import dataclass, field

from prefixcache.errors import InvalidRequest, PoolExhausted, QuotaExceeded
from prefixcache.types import TableUpdate
from prefixcache_worker.constrain import Constraint
from prefixcache_worker.drafts import Drafts
from prefixcache_worker.reads import KvReads
from prefixcache_worker.request import Finished, Request, Started
from prefixcache_worker.sampling import Sampler
from prefixcache_worker.segments.splice import Splice
from prefixcache_worker.store import Claim, Commit, Store
from prefixcache_worker.text import TextStream


@dataclass(eq=False, slots=True)
class Job:
    """The state of a request in an engine."""

    request: Request
    stream: TextStream
    stop_ids: frozenset[int]
    max_new_tokens: int
    constraint: Constraint | None = None
    """What the answer is held to; of this job alone."""
    sampler: Sampler = field(init=False)
    tokens: list[int] = field(init=False)
    store: Store | None = None
    future: Future[Claim] | None = None
    claim: Claim | None = None
    growing: Future[TableUpdate] | None = None
    """Asked for room behind what its claim has."""
    lane: int = 0
    """Which of the answers to its request it is."""
    is_forked: bool = False
    """Whether others go on from what it has computed: all of that is to be committed."""
    tail_is_shared: bool = False
    """Whether its last block is another's as well: it needs one of its own before it writes."""
    reserves_all: bool = False
    """Whether it asks for the whole answer's room with its prompt: it has lost its blocks before,
    since others had what it needed to go on."""
    stands_in_line: bool = True
    """Whether it waits for room in the service's line."""
    refusal: PoolExhausted | None = None
    """Why it got no blocks when it asked last."""
    drafts: Drafts | None = None
    """Where to look up what may come next; None: nowhere."""
    splice: Splice | None = None
    """While segments are put into its prompt: no step takes it until they are."""
    is_approximate: bool = False
    """Whether any of it was computed over segments."""
    num_valid: int = 0
    """Tokens whose keys and values are in the claim's blocks."""
    num_told: int = 0
    num_committed: int = 0
    num_computed: int = 0
    num_restarts: int = 0
    num_scored: int = field(init=False)
    """Tokens of the prompt whose log-probability was told, or is not asked for."""
    kv_reads: KvReads = field(default_factory=KvReads)
    """Of the steps in which it decoded."""
    submitted_s: float = field(default_factory=time.monotonic)
    first_s: float | None = None
    started: bool = False
    retry_at: float = 0.0
    reason: str = ""
    """Why it is finished; empty: it is not."""

    def __post_init__(self) -> None:
        self.sampler = Sampler(
            self.request.sampling, self.request.tokens, self.stop_ids, self.constraint
        )
        self.tokens = list(self.request.tokens)
        self.stands_in_line = self.request.waits_for_quota
        self.num_scored = self.num_prompt if self.request.prompt_logprobs is None else 1
        for number, token in enumerate(self.request.generated, 1):
            self.add(token)
            if self.constraint is not None and not self.constraint.fits:
                raise InvalidRequest(
                    f"token {number} of {len(self.request.generated)} generated ones, {token}, "
                    "does not fit the grammar: it is of another answer"
                )
            if self.reason and number < len(self.request.generated):
                raise InvalidRequest(
                    f"token {number} of {len(self.request.generated)} generated ones, {token}, "
                    f"ends the answer ({self.reason}): what follows it is of another one"
                )

    @property
    def num_prompt(self) -> int:
        """Tokens of the request's prompt."""
        return len(self.request.tokens)

    @property
    def num_generated(self) -> int:
        """Tokens of the answer so far, also what another worker began."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_left(self) -> int:
        """Tokens that may still be generated."""
        return self.max_new_tokens - self.num_generated

    @property
    def num_due(self) -> int:
        """Tokens that must run through the model before the next one can be chosen."""
        return len(self.tokens) - self.num_valid

    @property
    def is_scoring(self) -> bool:
        """Whether log-probabilities of the prompt are still to be told: all of it is computed."""
        return self.num_scored < self.num_prompt

    def num_rows(self, end: int, num_drafts: int) -> int:
        """After how many of a step's tokens, up to `end` and drafts behind it, logits are wanted.

        Counted from the last one; 0: after none.
        """
        if self.is_scoring:
            return max(0, end - max(self.num_valid, self.num_scored - 1))
        return 1 + num_drafts if end == len(self.tokens) else 0

    @property
    def answered(self) -> bool:
        """Whether the blocks that were asked for are here, or refused."""
        return self.future is not None and self.future.done()

    @property
    def is_over_quota(self) -> bool:
        """Whether its tenant's quota is what it waits for: then it is in nobody's way."""
        return isinstance(self.refusal, QuotaExceeded)

    def add(self, token: int) -> str:
        """Take the answer's next token; give the text that can be shown because of it.

        Sets `reason` if it is the last one.
        """
        self.tokens.append(token)
        self.sampler.add(token)
        if self.drafts is not None:
            self.drafts.add(token)
        text = ""
        if token in self.stop_ids:
            self.reason = "stop"
        else:
            text = self.stream.push(token)
            if self.stream.stopped or (self.constraint is not None and self.constraint.is_over):
                self.reason = "stop"
            elif not self.num_left:
                self.reason = "length"
        return text + self.stream.finish() if self.reason else text

    @property
    def num_slots(self) -> int:
        """Tokens that its blocks have room for."""
        if self.claim is None or self.store is None:
            return 0
        return len(self.claim.block_table) * self.store.pool.block_size

    @property
    def sample(self) -> int | None:
        """Which of several answers it is; None: there is one, or they are searched together."""
        return self.lane if self.request.n > 1 and self.request.beams is None else None

    def lacks_room(self, end: int) -> bool:
        """Whether its tokens up to `end` have no slots that it may write to."""
        return end > self.num_slots or self.tail_is_shared

    @property
    def starved(self) -> bool:
        """Whether it cannot go on before there is room, and that is not answered yet."""
        waits = self.growing is not None and not self.growing.done()
        return waits and self.lacks_room(self.num_valid + 1)

    def draft(self, most: int) -> list[int]:
        """Give up to `most` tokens that may come next, with slots, and room in the answer."""
        if self.drafts is None or self.num_due != 1 or self.is_scoring:
            return []
        room = min(self.num_slots - self.num_valid, self.num_left) - 1
        return self.drafts.propose(self.tokens, min(most, room))

    def forced(self, most: int) -> list[int]:
        """Give up to `most` tokens that must come next, whatever the model says.

        None if it is asked what the model says.
        """
        asks = self.request.logprobs is not None or self.request.log_logits
        if self.constraint is None or self.reason or asks:
            return []
        return self.constraint.forced()[: min(most, self.num_left)]

    def grant(self, claim: Claim) -> None:
        """Take the blocks that were asked for."""
        self.claim, self.future, self.refusal = claim, None, None
        self.stands_in_line = self.request.waits_for_quota
        self.num_valid = self.num_committed = claim.num_cached
        self.num_told = len(self.tokens)
        self.is_approximate |= claim.approximate

    def go_on_from(self, parent: Job, claim: Claim, tokens: list[int]) -> None:
        """Take the place of a fork of another lane; what this one has itself is released."""
        self.store, self.claim, self.growing = parent.store, claim, None
        self.tokens = tokens
        self.num_valid = self.num_told = self.num_committed = parent.num_valid
        assert parent.store is not None
        self.tail_is_shared = parent.num_valid % parent.store.pool.block_size > 0

    def begin_again(self) -> None:
        """Forget the blocks; what was generated becomes a part of the prompt."""
        self.claim = self.future = self.store = self.growing = None
        self.num_valid = self.num_told = self.num_committed = 0
        self.is_forked = self.tail_is_shared = False
        self.splice = None

    def due_commit(self, block_size: int) -> Commit | None:
        """Say what the store should be told now: chunks of the prompt, full blocks, the end."""
        if self.claim is None or self.num_valid == self.num_committed:
            return None
        in_prompt = self.num_committed < self.num_told
        whole = self.num_valid // block_size > self.num_committed // block_size
        if not (in_prompt or self.reason or whole or self.is_forked):
            return None
        fresh = self.tokens[self.num_told : self.num_valid]
        self.num_told = max(self.num_told, self.num_valid)
        self.num_committed = self.num_valid
        return Commit(self.claim, self.num_valid, fresh)


def started(job: Job, claim: Claim) -> Started:
    """Tell that a job holds its blocks."""
    assert job.store is not None
    return Started(
        id=job.request.id,
        ledger=claim.ledger,
        num_prompt=job.num_prompt,
        num_cached=claim.num_cached,
        num_to_compute=len(job.tokens) - claim.num_cached,
        shared=job.store.shared,
        waited_s=time.monotonic() - job.submitted_s,
        max_new_tokens=job.max_new_tokens,
        left_out=_left_out(job),
        seed=None if job.sampler.sampling.greedy else job.sampler.seed,
        sample=job.sample,
        approximate=job.is_approximate or None,
    )


def _left_out(job: Job) -> tuple[str, ...] | None:
    more = () if job.constraint is None else job.constraint.left_out
    return (*job.request.left_out, *more) or None


def finished(job: Job) -> Finished:
    """Tell that a job is done."""
    now = time.monotonic()
    return Finished(
        id=job.request.id,
        tokens=tuple(job.tokens[job.num_prompt :]),
        text=job.stream.text,
        reason=job.reason,
        ttft_s=(job.first_s or now) - job.submitted_s,
        total_s=now - job.submitted_s,
        num_prompt=job.num_prompt,
        num_computed=job.num_computed,
        num_restarts=job.num_restarts,
        kv_read_bytes=round(job.kv_reads.read_bytes),
        kv_alone_bytes=job.kv_reads.alone_bytes,
        sample=job.sample,
        approximate=job.is_approximate or None,
    )
