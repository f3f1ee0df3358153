"""The engine: continuous batching over claims on blocks.

```
submit ──► queue ──► asked ──► granted ──► prefill, chunk by chunk ──► decode ──► finished
             ▲         │ waits for another worker's prefix,    │ asks for room ahead, and waits
             │         │ or for blocks, without blocking       │ if it must
             └─────────┴───────────────────────────────────────┘ blocks lost: begins again
one step:  decode tokens of all ── then prefill tokens, up to `chunk` in all ── one forward pass ──
           tokens chosen ── one message: what is now valid, what is done with
```
A prompt of which little is left (its prefix was cached) does not wait behind the chunk of a long
one: its step leaves the long ones out, every other step at most.
Room for the answer comes in steps of `RESERVE` tokens.  Who cannot go on waits in line, before
those that have not begun; if nothing comes, the youngest gives its blocks back, and begins again
when there is room for all of its answer.
What is not cached is computed, nothing else.  Slots are committed after the forward pass that wrote
them has returned.  A lost service ends sharing, not answers: see `membership`.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import suppress
from copy import copy
from typing import Final

import torch
from torch import Tensor

from prefixcache.client import Session
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    PoolExhausted,
    QuotaExceeded,
    ServiceUnavailable,
    Unsupported,
)
from prefixcache.types import Again, Copy, TableUpdate
from prefixcache_kernels import SharedPool, copy_blocks
from prefixcache_worker.batch import Piece
from prefixcache_worker.beams import Beams
from prefixcache_worker.drafts import Drafts
from prefixcache_worker.forward import Forward
from prefixcache_worker.inbox import Inbox
from prefixcache_worker.job import Job, finished, started
from prefixcache_worker.membership import Join, Membership
from prefixcache_worker.model import Model
from prefixcache_worker.request import (
    Event,
    Failed,
    Finished,
    Request,
    Scored,
    Searched,
    Token,
)
from prefixcache_worker.samples import lanes_of
from prefixcache_worker.sampling import choose, logprobs, top_two
from prefixcache_worker.scores import score
from prefixcache_worker.segments.splice import Splice, Splicer
from prefixcache_worker.store import RETRY_S, Claim, SharedStore, Store
from prefixcache_worker.text import TextStream

PRIVATE_TOKENS: Final = 32768
"""Tokens in the pool of a worker without a service; memory is touched only when used."""

QUICK_TOKENS: Final = 64
"""A prompt with no more than these to compute does not wait behind a long one's chunk."""

RESERVE: Final = 256
"""Tokens of an answer for which room is asked at a time."""

AHEAD: Final = 32
"""With less room than this, more is asked for, so that it is there when it is needed."""

GROW_S: Final = 1.0
"""How long to wait for it, until somebody gives way."""

SOON_S: Final = 0.02
"""How long to wait for the room of a search's next step: as a rule it is there at once."""

MOST_RESTARTS: Final = 8
DRAFT_ROWS: Final = 16
"""Tokens of a step, drafts included, that cost hardly more than one for each sequence."""

SCORED_ROWS: Final = 256
"""Tokens of prompts in a step after which logits are wanted: each is as wide as the vocabulary."""

LONGEST_RETRY_S: Final = 1.0


class Engine:
    """Serves requests with one model.  All but `submit`, `cancel` and `wait` belong to one thread.

    Args:
        model: what computes.
        pool: the session's pool, mapped; None without a session.
        session: attached to the model's namespace; None: alone, without any sharing.
        chunk: tokens per step; more prefill faster, fewer keep the others' tokens coming.
        max_batch: requests in hand at a time; more wait in the queue.
        join: how to find the service again when it is lost; None: never.
        private_tokens: size of the pool for the time without a service.
        drafts: most tokens a step that are looked up and run with an answer's last one; 0: none.
        grouped: decode by the group plan; False: every sequence reads all of its keys, to compare.
    """

    def __init__(
        self,
        model: Model,
        pool: SharedPool | None,
        session: Session | None,
        *,
        chunk: int = 256,
        max_batch: int = 16,
        join: Join | None = None,
        private_tokens: int = PRIVATE_TOKENS,
        drafts: int = 0,
        grouped: bool = True,
    ) -> None:
        if chunk < max_batch or max_batch < 1:
            raise InvalidRequest(
                f"chunk {chunk} must be at least max_batch {max_batch}, and that 1"
            )
        if (pool is None) != (session is None):
            raise InvalidRequest("a session and its pool come together")
        self.model = model
        self.chunk = chunk
        self.max_batch = max_batch
        self.drafts = drafts
        shared = SharedStore(session, pool) if session is not None and pool is not None else None
        self.membership = Membership(model.layout, shared, join, private_tokens, self.wake)
        self.inbox: Inbox[list[Job] | str] = Inbox()
        """What was submitted, or cancelled, and no step has taken yet."""
        self._open: dict[str, int] = {}
        """Answers to come of each request in hand, by its id: what they hold is theirs by it, and
        who cancels names it."""
        self._queue: deque[Job] = deque()
        self._held: dict[str, list[Job]] = {}
        """Further answers, which wait until the first one's lane has computed their prompt."""
        self._searches: dict[str, Beams] = {}
        self._asked: list[Job] = []
        self._running: list[Job] = []
        self._releases: list[tuple[Store, Claim]] = []
        self._forward = Forward(model, max_batch, grouped=grouped)
        self._splicers: dict[Again, Splicer | Unsupported] = {}
        """What puts segments in place, by policy; or why it cannot be had."""
        self._passed_over = False
        """Whether the last step left long prompts out."""
        self._wake = threading.Event()
        self.num_computed = 0
        """Tokens that ran through the model since the start."""
        self._report()

    # ---------------------------------------------------------------------------- from outside

    def submit(self, request: Request) -> None:
        """Hand over a request.  From any thread; returns at once.

        Raises:
            InvalidRequest: a request of this id is in hand, what it has generated is no answer's
                beginning, or its grammar cannot be compiled.
            Unsupported: grammars are not to be had here.
        """
        if request.id in self._open:
            raise InvalidRequest(
                f"a request {request.id!a} is in hand: give each one an id of its own"
            )
        given = self.model.stop_ids if request.stop_ids is None else request.stop_ids
        stop_ids = frozenset(token for token in given if token < self.model.vocab_size)
        limit = self.model.max_tokens
        room = limit - len(request.tokens) if limit else request.max_new_tokens
        how = request.sampling
        if any(not 0 <= token < self.model.vocab_size for token, _ in how.logit_bias):
            raise InvalidRequest(
                f"token ids of logit_bias must lie between 0 and {self.model.vocab_size - 1}"
            )
        if how.min_tokens and len(stop_ids) >= self.model.vocab_size:
            raise InvalidRequest("every token ends the answer, and min_tokens lets none of them")
        if request.stop_strings and self.model.tokenizer is None:
            raise InvalidRequest(
                f"stop: model {self.model.name!r} has no tokenizer, and so no text; send stop_ids"
            )
        stream = TextStream(self.model.tokenizer, request.stop_strings, how.min_tokens)
        if any(not 0 <= token < self.model.vocab_size for token in request.generated):
            raise InvalidRequest(
                f"generated token ids must lie between 0 and {self.model.vocab_size - 1}"
            )
        if request.beams is not None and request.beams.width > self.max_batch:
            raise InvalidRequest(
                f"beams is {request.beams.width}; this worker computes {self.max_batch} "
                "sequences at a time (--max-batch)"
            )
        jobs = []
        for lane, each in enumerate(lanes_of(request)):
            if lane:
                stream = TextStream(self.model.tokenizer, request.stop_strings, how.min_tokens)
            constraint = None
            if request.grammar is not None:
                constraint = self.model.grammars.constraint(request.grammar)
            most = min(request.max_new_tokens, room)
            job = Job(each, stream, stop_ids, most, constraint, lane=lane)
            # Penalties, and what a grammar allows, are known when the token before is; beams are
            # not drafted.
            is_free = not how.penalised and constraint is None and request.beams is None
            if self.drafts and is_free:
                job.drafts = Drafts(job.tokens)
            jobs.append(job)
        self._open[request.id] = len(jobs)
        self.inbox.put(jobs)
        self.wake()

    def cancel(self, request_id: str) -> None:
        """Give up a request.  From any thread; it is told as finished, reason `cancelled`."""
        self.inbox.put(request_id)
        self.wake()

    def wake(self) -> None:
        """End a `wait` early.  From any thread, or a signal handler."""
        self._wake.set()

    @property
    def idle(self) -> bool:
        """Whether no request is in hand."""
        return not (self.inbox or self._queue or self._asked or self._running or self._held)

    @property
    def stalled(self) -> bool:
        """Whether a step can compute nothing before `wait` returns."""
        if self.inbox or any(job.answered for job in self._asked):
            return False
        starved = [job for job in self._running if job.starved]
        # Lanes of a search wait for one another.
        waiting = {job.request.id for job in starved if job.request.beams is not None}
        return all(job.starved or job.request.id in waiting for job in self._running)

    @property
    def sharing(self) -> bool:
        """Whether new requests go to the shared pool."""
        return self.membership.sharing

    def wait(self, timeout_s: float) -> None:
        """Sleep until there may be something to do, at most `timeout_s`."""
        for job in self._queue:
            if not self._has_seat(job):
                break
            timeout_s = min(timeout_s, job.retry_at - time.monotonic())
            if not job.is_over_quota:
                break
        self._wake.wait(max(0.0, timeout_s))
        self._wake.clear()

    def run(self) -> Iterator[Event]:
        """Step until idle; give the events as they come."""
        while not self.idle:
            yield from self.step()
            if self.stalled and not self.idle:
                self.wait(1.0)

    def close(self) -> None:
        """Give all blocks back.  Requests in hand are dropped.  Idempotent."""
        self.membership.close()
        for job in [*self._asked, *self._running]:
            self._drop(job)
        self._asked, self._running = [], []
        self._queue.clear()
        self._held.clear()
        self._searches.clear()
        self._open.clear()
        self._settle([])
        self._close_old()

    def step(self) -> list[Event]:
        """Compute one batch.  Gives what happened, in order; nothing if there was nothing to do."""
        events: list[Event] = []
        self._read_inbox(events)
        self._watch(events)
        self._report()
        self._ask(events)
        self._take(events)
        jobs = self._compute(events)
        self._settle(jobs)
        self._running = [job for job in self._running if not job.reason]
        self._close_old()
        self._report()
        for event in events:
            if isinstance(event, Finished | Failed):
                self._count_off(event.id)
        return events

    def _count_off(self, request_id: str) -> None:
        """Note that an answer was told."""
        self._open[request_id] -= 1
        if not self._open[request_id]:
            del self._open[request_id]
            self._searches.pop(request_id, None)

    def _report(self) -> None:
        """Let the service know that a step is made, and what is in hand."""
        if (shared := self.membership.shared) is not None:
            held = sum(map(len, self._held.values()))
            in_hand = len(self._queue) + len(self._asked) + len(self._running) + held
            shared.session.report(in_hand)
            shared.session.watch_inbox(self.inbox.untaken)

    # ------------------------------------------------------------------------------- admission

    def _read_inbox(self, events: list[Event]) -> None:
        while self.inbox:
            item = self.inbox.take()
            if isinstance(item, list):
                first, *others = item
                self._queue.append(first)
                if others:
                    self._held[first.request.id] = others
                if first.request.beams is not None:
                    search = Beams(first.request.beams, first, first.request.n)
                    self._searches[first.request.id] = search
                continue
            self._let_go(item)
            jobs = [*self._queue, *self._asked, *self._running]
            found = [job for job in jobs if job.request.id == item]
            for job in found:
                self._abandon(job)
                job.reason = "cancelled"
            told = found[:1] if item in self._searches else found  # lanes of a search: once
            events.extend(finished(job) for job in told)

    def _let_go(self, request_id: str) -> None:
        """Queue the answers that waited for the first one's lane, before whoever came later."""
        if others := self._held.pop(request_id, None):
            self._queue.extendleft(reversed(others))

    def _abandon(self, job: Job) -> None:
        """Take a job out of every list and give its blocks back."""
        if job in self._queue:
            self._queue.remove(job)
        self._asked = [other for other in self._asked if other is not job]
        self._running = [other for other in self._running if other is not job]
        self._drop(job)

    def _drop(self, job: Job) -> None:
        """Give its blocks back, those included that were granted and not taken yet."""
        claim = job.claim
        if job.future is not None and not job.future.cancel() and not job.future.exception():
            claim = job.future.result()
        if job.store is not None and claim is not None:
            self._releases.append((job.store, claim))
        job.begin_again()

    def _has_seat(self, job: Job) -> bool:
        """Whether one of the queue finds a place; a search's lanes come one by one."""
        to_come = sum(search.num_missing for search in self._searches_in_hand())
        beams = job.request.beams
        wanted = 1 if beams is None else beams.width
        return len(self._asked) + len(self._running) + to_come + wanted <= self.max_batch

    def _searches_in_hand(self) -> list[Beams]:
        if not self._searches:
            return []
        firsts = {job.request.id for job in [*self._asked, *self._running]}
        return [search for name, search in self._searches.items() if name in firsts]

    def _ask(self, events: list[Event]) -> None:
        """Ask for blocks, first come, first served."""
        while (job := self._next_of_queue()) is not None:
            self._queue.remove(job)
            if job.reason:  # who began it was lost between its last token and saying so
                events.append(finished(job))
                continue
            home = self.membership.home()
            if failed := self._hopeless(job, home):
                events.append(failed)
                continue
            try:
                job.future = home.claim(
                    job.tokens,
                    reserve=job.num_left if job.reserves_all else min(job.num_left, RESERVE),
                    wait_s=job.request.wait_s,
                    request_id=f"{job.request.id}/{job.lane}/{job.num_restarts}",
                    salt=job.request.salt,
                    reuse=not job.is_scoring,
                    for_room=job.stands_in_line,
                    segments=self._again(job, home),
                )
            except CacheError as error:  # a service of an earlier version hears of no salt
                events.append(self._failed(job, type(error).__name__, str(error)))
                continue
            job.store = home
            job.future.add_done_callback(lambda _: self.wake())
            self._asked.append(job)

    def prepare_segments(self) -> None:
        """Get ready for requests that ask for segments, if the service gives any.  Seconds.

        Else the first of them waits for this.  Whether they can be had is told to who asks.
        """
        shared = self.membership.shared
        if shared is not None and shared.again is not None:
            with suppress(Unsupported):
                self._splicer_of(shared.again)

    def _again(self, job: Job, home: Store) -> Again | None:
        """Say what is computed again of a request's segments; None: it is served without them.

        A worker that is alone has nothing stored anywhere.

        Raises:
            Unsupported: it asks for segments, and the service gives none to this model, or its keys
                cannot be moved.
        """
        if not job.request.segments or not home.shared:
            return None
        if home.again is None:
            raise Unsupported(
                f"segments of {self.model.name!r}: the service was started without --segments, or "
                "no certificate there allows them (prefixcache verify-segments makes one); leave "
                "segments out"
            )
        return self._splicer_of(home.again).again

    def _splicer_of(self, again: Again) -> Splicer:
        """Give what puts segments in place.  Made once, or refused once."""
        if again not in self._splicers:
            try:
                self._splicers[again] = Splicer.of(self.model, again)
            except Unsupported as error:
                self._splicers[again] = error
        found = self._splicers[again]
        if isinstance(found, Unsupported):
            raise copy(found)
        return found

    def _next_of_queue(self) -> Job | None:
        """Give who asks next; None: nobody can yet."""
        now = time.monotonic()
        for job in self._queue:
            if not self._has_seat(job):
                return None
            if job.retry_at <= now:
                return job
            if not job.is_over_quota:
                return None  # later requests must not starve it
        return None

    def _hopeless(self, job: Job, home: Store) -> Failed | None:
        size = home.pool.block_size
        needed = -(-(len(job.tokens) + job.num_left) // size)
        message = ""
        if job.num_left < min(1, job.request.max_new_tokens):
            message = (
                f"a prompt of {job.num_prompt} tokens leaves no room for an answer: "
                f"{self.model.name} takes {self.model.max_tokens} tokens"
            )
        elif needed > home.pool.num_blocks:
            message = (
                f"{job.num_prompt} prompt tokens and up to {job.max_new_tokens} new ones need "
                f"{needed} blocks of {size} tokens; the pool has {home.pool.num_blocks}. "
                f"Raise --memory, or lower max_new_tokens"
            )
        elif max(job.tokens) >= self.model.vocab_size or min(job.tokens) < 0:
            message = f"token ids must lie between 0 and {self.model.vocab_size - 1}"
        elif job.num_restarts > MOST_RESTARTS:
            message = f"lost its blocks {job.num_restarts} times; given up"
        return self._failed(job, "InvalidRequest", message) if message else None

    def _failed(
        self, job: Job, error: str, message: str, retry_after_s: float | None = None
    ) -> Failed:
        """Tell that an answer cannot be given; others to the same prompt try for themselves."""
        self._let_go(job.request.id)
        return Failed(job.request.id, error, message, job.sample, retry_after_s)

    def _over_quota(self, job: Job, error: QuotaExceeded) -> Failed | None:
        """Ask again for blocks that a quota refuses; or tell that they are not to be had.

        If its tenant holds anything that ends, there is a time for that.  Asked twice: a lease may
        have been over and not gone yet; and the whole answer's room is not needed to begin.
        """
        may_come = error.retry_after_s > 0
        if may_come and not job.request.waits_for_quota:
            return self._failed(job, "QuotaExceeded", str(error), error.retry_after_s)
        before = job.refusal if job.is_over_quota and not job.reserves_all else None
        if not may_come and before is not None and before.retry_after_s <= 0:
            return self._failed(job, "QuotaExceeded", str(error))
        job.reserves_all = False
        self._ask_again(job, min(max(error.retry_after_s, RETRY_S), LONGEST_RETRY_S))
        job.refusal = error
        return None

    def _take(self, events: list[Event]) -> None:
        """Take the blocks that were granted, and make the copies that belong to them."""
        copies: dict[int, tuple[SharedPool, list[tuple[int, int, int]]]] = {}
        spliced: list[Job] = []
        for job in [job for job in self._asked if job.answered]:
            self._asked.remove(job)
            assert job.future is not None
            assert job.store is not None
            try:
                claim = job.future.result()
            except QuotaExceeded as error:
                if failed := self._over_quota(job, error):
                    events.append(failed)
                continue
            except PoolExhausted as error:
                delay_s = min(max(error.retry_after_s, RETRY_S), LONGEST_RETRY_S)
                self._ask_again(job, delay_s if job.stands_in_line else 0.0)
                job.refusal, job.stands_in_line = error, True
                continue
            except ServiceUnavailable:
                self._ask_again(job, 0.0)
                continue
            except CacheError as error:
                events.append(self._failed(job, type(error).__name__, str(error)))
                continue
            job.grant(claim)
            if claim.copies:
                _, rows = copies.setdefault(id(job.store), (job.store.pool, []))
                rows.extend((copy.src, copy.dst, copy.num_tokens) for copy in claim.copies)
            if claim.segments:
                spliced.append(job)
            if not job.started:
                job.started = True
                events.append(started(job, claim))
            self._running.append(job)
        for pool, rows in copies.values():
            copy_blocks(pool.blocks, torch.tensor(rows, dtype=torch.int64))
        for job in spliced:
            self._splice(job)

    def _splice(self, job: Job) -> None:
        """Put the segments of what a job was granted in place."""
        assert job.store is not None
        assert job.claim is not None
        again = job.store.again
        assert again is not None
        splicer = self._splicer_of(again)
        splicer.place(job.store.pool, job.claim)
        job.splice = Splice(splicer, job.store.pool, job.claim, job.tokens[:])
        job.num_valid = job.splice.num_valid

    def _ask_again(self, job: Job, delay_s: float) -> None:
        job.begin_again()
        job.retry_at = time.monotonic() + delay_s
        self._queue.appendleft(job)

    def _restart(self, job: Job) -> None:
        """Its blocks are lost: queue it again, with what it has generated as part of its prompt.

        A search begins anew as a whole.
        """
        if not any(job is other for other in self._running):
            return  # with another lane of its search, already
        search = self._searches.get(job.request.id)
        lanes = [job] if search is None else search.lanes
        self._running = [other for other in self._running if other not in lanes]
        for lane in lanes:
            self._drop(lane)
        if search is not None:
            job = search.begin_again()
        job.num_restarts += 1
        self._queue.appendleft(job)

    # ----------------------------------------------------------------------------- computation

    def _compute(self, events: list[Event]) -> list[Job]:
        """Run one batch per pool in use (two only while a lost service's sequences finish)."""
        done: list[Job] = []
        for store in {id(job.store): job.store for job in self._running}.values():
            assert store is not None
            jobs = [job for job in self._running if job.store is store]
            jobs = self._that_can_go_on(jobs, events)
            done += self._go_on_splicing(jobs, store, events)
            jobs = [job for job in jobs if job.splice is None and job.claim is not None]
            pieces = self._pieces(jobs, store)
            if not pieces:
                continue
            pieces, logits = self._forward.run(store, jobs, pieces)
            self._restart_lost([job for job, _ in pieces], store)
            self._end_without_numbers(pieces, logits, store, events)
            pieces, logits = self._still_running(pieces, logits)
            for job, piece in pieces:
                self.num_computed += len(piece.tokens)
                job.num_valid += len(piece.tokens) - piece.num_drafts
                job.num_computed += len(piece.tokens)
            wanted = [one for one in pieces if one[1].logits]
            events.extend(self._score(wanted, logits))
            events.extend(self._choose(wanted, logits))
            done.extend(job for job, _ in pieces)
        for job in done:
            if job.reason and (search := self._searches.get(job.request.id)) is None:
                events.append(finished(job))
            elif job.reason and search is not None and job is search.lanes[0]:
                events.append(search.finished(self.model.tokenizer))
        return done

    def _go_on_splicing(self, jobs: Sequence[Job], store: Store, events: list[Event]) -> list[Job]:
        """Compute a step's tokens of the first prompt with segments; give whom to tell of it."""
        job = next((job for job in jobs if job.splice is not None), None)
        if job is None or (splice := job.splice) is None:
            return []
        count = 0 if splice.is_over else splice.step(self.chunk)
        self._restart_lost([job], store)
        if job.splice is not splice:
            return []
        if not splice.is_finite:
            self._end_ill(job, events)
            return []
        self.num_computed += count
        job.num_computed += count
        job.num_valid = splice.num_valid
        if not splice.is_over:
            return [job]
        job.splice = None  # it goes on in this very step, as any other
        return []

    def _that_can_go_on(self, jobs: Sequence[Job], events: list[Event]) -> list[Job]:
        """Work out what may come next where a grammar says so; end those that it leads nowhere."""
        able = []
        for job in jobs:
            try:
                if job.constraint is not None:
                    job.constraint.prepare()
                able.append(job)
            except CacheError as error:
                self._abandon(job)
                events.append(self._failed(job, type(error).__name__, str(error)))
        return able

    def _restart_lost(self, jobs: Sequence[Job], store: Store) -> None:
        """Begin anew whatever lost its blocks while it was computed: what it read may be another's.

        A lease can end while this process is stopped; and a new service can take a lost one's pool
        over.
        """
        now = time.monotonic()
        shared = store is self.membership.shared
        current = store.pool.current
        for job in reversed(jobs):  # so that the first is the first again
            if not current or (shared and job.claim is not None and now > job.claim.deadline):
                self._restart(job)

    def _end_without_numbers(
        self,
        pieces: Sequence[tuple[Job, Piece]],
        logits: Tensor,
        store: Store,
        events: list[Event],
    ) -> None:
        """End answers for which the model gave NaN or infinity, before others find what was made.

        With a lane, its whole search.  Where no logits are wanted, the last token's keys and values
        tell it: those of the last layer come from all tokens before.
        """
        ill: list[Job] = []
        is_number = logits.amax(-1).isfinite()
        if not bool(is_number.all()):
            numbers = zip(_owners(pieces), is_number.tolist(), strict=True)
            ill = [job for job, is_one in numbers if not is_one]
        for job, piece in pieces:
            if not piece.logits:
                block, slot = divmod(piece.start + len(piece.tokens) - 1, store.pool.block_size)
                made = store.pool.blocks[-1, :, piece.block_table[block], slot]
                ill += [] if bool(made.isfinite().all()) else [job]
        for job in ill:
            self._end_ill(job, events)

    def _end_ill(self, job: Job, events: list[Event]) -> None:
        """End an answer, with its whole search, that nothing can follow."""
        message = "the model gave NaN or infinity in the place of a number; nothing can follow that"
        if any(job is other for other in self._running):
            search = self._searches.get(job.request.id)
            for lane in [job] if search is None else search.lanes:
                self._abandon(lane)
            events.append(self._failed(job, "CacheError", message))

    def _still_running(
        self, pieces: list[tuple[Job, Piece]], logits: Tensor
    ) -> tuple[list[tuple[Job, Piece]], Tensor]:
        """Leave out whoever has begun anew or ended since its piece was made, and its rows."""
        kept = {id(job) for job in self._running}
        if all(id(job) in kept for job, _ in pieces):
            return pieces, logits
        rows = [row for row, job in enumerate(_owners(pieces)) if id(job) in kept]
        return [(job, piece) for job, piece in pieces if id(job) in kept], logits[rows]

    def _pieces(self, jobs: Sequence[Job], store: Store) -> list[tuple[Job, Piece]]:
        """Choose the tokens of a step: everybody's next one, then prompts in their order."""
        pieces: list[tuple[Job, Piece]] = []
        budget, rows_left = self.chunk, SCORED_ROWS
        quick = [job for job in jobs if job.num_due <= QUICK_TOKENS]
        has_quick_prompt = any(job.num_due > 1 for job in quick)
        self._passed_over = has_quick_prompt and len(quick) < len(jobs) and not self._passed_over
        if self._passed_over:
            jobs = quick
        decoding = sum(job.num_due == 1 for job in jobs)
        guesses = min(self.drafts, min(DRAFT_ROWS, self.chunk) // max(1, decoding) - 1)
        halted = self._halted(store)
        for job in sorted(jobs, key=lambda job: job.num_due > 1):  # stable: decoding ones first
            if job.request.id in halted:
                continue
            count = min(job.num_due, budget, rows_left if job.is_scoring else budget)
            if not count or not self._has_room(job, count, store):
                continue
            assert job.claim is not None
            end = job.num_valid + count
            draft = job.draft(guesses)
            num_rows = job.num_rows(end, len(draft))
            budget -= count + len(draft)
            rows_left -= num_rows if job.is_scoring else 0
            piece = Piece(
                job.tokens[job.num_valid : end] + draft,
                job.num_valid,
                job.claim.block_table,
                logits=num_rows > 0,
                num_rows=num_rows,
                num_drafts=len(draft),
            )
            pieces.append((job, piece))
        return pieces

    def _halted(self, store: Store) -> set[str]:
        """Name the searches of which a lane has no room: the others wait for it."""
        halted = set()
        for search in self._searches_in_hand():
            lanes = search.lanes
            if lanes[0].store is not store or lanes[0].num_due > 1:
                continue
            rooms = [self._has_room(lane, 1, store) for lane in lanes]  # all of them are asked for
            if not all(rooms):
                halted.add(search.first.request.id)
        return halted

    def _has_room(self, job: Job, count: int, store: Store) -> bool:
        """See that the next tokens have slots, and that more are asked for in time."""
        end = job.num_valid + count
        if (told := job.growing) is not None and told.done():
            job.growing = None
            error = told.exception()
            gives_way = not isinstance(error, PoolExhausted) or self._is_youngest(
                job, of_its_salt=isinstance(error, QuotaExceeded)
            )
            if error is None:
                self._copy(store, told.result().copies)
                job.tail_is_shared = False
            elif job.lacks_room(end) and gives_way:
                job.reserves_all = True
                self._restart(job)
                return False
        if job.claim is None:  # its search has just begun anew
            return False
        whole = len(job.tokens) + job.num_left
        if job.request.beams is not None:  # what most of them reserve they would never use
            self._grow([job], end, store)
        elif job.growing is None and job.num_slots < min(whole, end + AHEAD):
            wanted = min(whole, end + AHEAD + RESERVE)
            [job.growing] = store.extend([(job.claim, wanted)], wait_s=GROW_S)
            job.growing.add_done_callback(lambda _: self.wake())
        return not job.lacks_room(end)

    def _is_youngest(self, job: Job, *, of_its_salt: bool) -> bool:
        """Whether none of the others began after it, but for lanes of the same search."""
        rivals = self._running
        if of_its_salt:  # who is behind another one may have a quota of its own
            rivals = [other for other in rivals if other.request.salt == job.request.salt]
        last = rivals[-1]
        return last is job or (job.request.beams is not None and last.request is job.request)

    def _grow(self, lanes: Sequence[Job], end: int, store: Store) -> list[Future[TableUpdate]]:
        """Ask for room up to `end` for those that have none, in one message."""
        asking = [job for job in lanes if job.growing is None and job.lacks_room(end)]
        if not asking:
            return []
        claims = [(job.claim, end) for job in asking if job.claim is not None]
        answers = store.extend(claims, wait_s=GROW_S)
        for job, answer in zip(asking, answers, strict=True):
            job.growing = answer
            answer.add_done_callback(lambda _: self.wake())
        return answers

    def _copy(self, store: Store, copies: Sequence[Copy]) -> None:
        """Make the copies that belong to a claim, before it is written to."""
        if copies:
            rows = [(copy.src, copy.dst, copy.num_tokens) for copy in copies]
            copy_blocks(store.pool.blocks, torch.tensor(rows, dtype=torch.int64))

    def _score(self, pieces: Sequence[tuple[Job, Piece]], logits: Tensor) -> Iterator[Event]:
        """Tell the log-probabilities of prompts that ask for them."""
        row = 0
        for job, piece in pieces:
            row += piece.num_rows
            if not job.is_scoring:
                continue
            assert job.request.prompt_logprobs is not None
            start = piece.start + len(piece.tokens) - piece.num_rows + 1
            tokens = job.tokens[start : min(start + piece.num_rows, job.num_prompt)]
            rows = logits[row - piece.num_rows :][: len(tokens)]
            job.num_scored = start + len(tokens)
            told = score(rows, tokens, job.request.prompt_logprobs)
            yield Scored(job.request.id, start, told)

    def _choose(self, pieces: Sequence[tuple[Job, Piece]], logits: Tensor) -> Iterator[Event]:
        """Choose each piece's next token, and those behind it as far as its draft was right."""
        now = time.monotonic()
        rows: list[tuple[Job, int, int]] = []
        end, choosing = 0, []
        searching: dict[str, dict[int, int]] = {}
        for job, piece in pieces:
            end += piece.num_rows
            if job.num_due:  # only its prompt was scored so far
                continue
            if not job.num_left:
                job.reason = "length"  # it wants no more than that
                continue
            if job.request.beams is not None:
                searching.setdefault(job.request.id, {})[id(job)] = end - 1
                continue
            count = 1 + piece.num_drafts
            choosing.append((job, piece, len(rows)))
            rows.extend((job, at, end - count + at) for at in range(count))
        for name, found in searching.items():
            search = self._searches[name]
            search.first.first_s = search.first.first_s or now
            yield from self._search(search, logits[[found[id(lane)] for lane in search.lanes]])
        if len(rows) < len(logits):
            logits = logits[[row for _, _, row in rows]]
        samplers = [job.sampler for job, _, _ in rows]
        chosen = choose(samplers, logits, [job.num_generated + at for job, at, _ in rows])
        for job, piece, row in choosing:
            job.first_s = job.first_s or now
            count = 1 + piece.num_drafts
            drafted = piece.tokens[len(piece.tokens) - piece.num_drafts :]
            for at, token in enumerate(chosen[row : row + count]):
                if at:
                    job.num_valid += 1  # what was drafted is what was chosen: it is in its slot
                yield self._told(job, logits[row + at], token)
                if job.reason or at == len(drafted) or token != drafted[at]:
                    break
            # What must follow is not asked of the model: it runs along with the next step.
            for token in job.forced(QUICK_TOKENS - 1):
                if not job.reason:
                    text = job.add(token)
                    yield Token(job.request.id, token, text, sample=job.sample)

    def _search(self, search: Beams, logits: Tensor) -> Iterator[Event]:
        """Take a search a token further: who goes on, who is forked, who is released."""
        first = search.first
        yield Searched(first.request.id, search.lanes[0].num_generated + 1)
        moves = search.step(logits)
        if not moves:
            for lane in search.lanes:
                lane.reason = "stop"
            return
        before = search.lanes
        for lane in search.go_on(moves):
            self._drop(lane)
        others = [job for job in self._running if job not in before]
        self._running = others + search.lanes

    def _told(self, job: Job, logits: Tensor, token: int) -> Token:
        """Take a token for a job's answer, and tell it."""
        top = top_two(logits) if job.request.log_logits else None
        wanted = job.request.logprobs
        told = None if wanted is None else logprobs(logits, token, wanted)
        return Token(job.request.id, token, job.add(token), top, told, job.sample)

    def _settle(self, jobs: Sequence[Job]) -> None:
        """Tell each store what is valid and what is done with, in one message per store."""
        stores: dict[int, Store] = {}
        releases: dict[int, list[Claim]] = {}
        for store, claim in self._releases:
            stores[id(store)] = store
            releases.setdefault(id(store), []).append(claim)
        self._releases = []
        for job in jobs:
            if job.store is not None:  # else its text has ended, and its search goes on
                stores[id(job.store)] = job.store
        for key, store in stores.items():
            mine = [job for job in jobs if job.store is store]
            due = [job.due_commit(store.pool.block_size) for job in mine]
            done = [job.claim for job in mine if job.reason and job.claim is not None]
            searches = [one for one in self._searches_in_hand() if one.store is store]
            forks = [(one, fork) for one in searches for fork in one.due_forks()]
            settled = store.settle(
                [commit for commit in due if commit is not None],
                releases.get(key, []) + done,
                [fork for _, fork in forks],
            )
            for job in mine:
                if not job.reason and any(claim is job.claim for claim in settled.lost):
                    self._restart(job)
            for (search, fork), claims in zip(forks, settled.forked, strict=True):
                if not search.take(fork, claims):
                    self._releases.extend((store, claim) for claim in claims)
                    self._restart(search.lanes[0])
            for search in searches:
                first = search.lanes[0]
                if first.claim is not None and first.store is store and not first.reason:
                    futures.wait(self._grow(search.lanes, first.num_valid + 1, store), SOON_S)
        for job in jobs:
            if not job.lane and (job.reason or job.num_committed >= job.num_prompt):
                self._let_go(job.request.id)

    # --------------------------------------------------------------------- the service's absence

    def _watch(self, events: list[Event]) -> None:
        """See whether the service went or came back, and whether leases passed their deadline."""
        told, unsafe = self.membership.watch()
        events += told
        now = time.monotonic()
        shared = self.membership.shared
        for job in reversed(self._running[:]):  # so that the first is the first again
            if job.claim is None:
                continue  # a search's lane: it was begun anew with another one
            late = job.store is shared and now > job.claim.deadline
            assert job.store is not None
            unsafe_now = job.store is unsafe or not job.store.pool.current
            if late or unsafe_now:
                self._restart(job)

    def _close_old(self) -> None:
        """Let go of a lost service's memory once nobody uses it."""
        used = [job.store for job in [*self._asked, *self._running]]
        self.membership.forget({id(store) for store in used})
        self._forward.keep([*used, self.membership.shared, self.membership.private])


def _owners(pieces: Sequence[tuple[Job, Piece]]) -> list[Job]:
    """Give the job of each row of a step's logits."""
    return [job for job, piece in pieces if piece.logits for _ in range(piece.num_rows)]
