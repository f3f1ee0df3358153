"""What the requests of one engine hold: asked for, granted, grown, committed, given back.

```
ask ──► the service ──► ready ──► settle … settle ──► end
          │ waits for room,         │ commits what the step has computed, asks for room ahead
          │ or for a prefix         └ lost: the lease is over, what the step gave is dropped
          └ several may ask before one is looked at
```
Nothing here waits for the service: what a step has to say travels in one message (`flush`), and its
answers come while the next step is computed.  Of the engine nothing is known but the names of its
requests, their tokens, and how many of them hold valid keys and values: no engine is imported.

**When the service is dead** nobody lends the pool's blocks any more.  Then all that is held stays
held, past any deadline, and blocks that were leased ahead for that time, the *spare* ones, go to
requests that grow or begin.  Once they have ended, what only they could see is spare again.  While
the service lives, they are lent to who waits for room, and leased again when nobody does.

**When only the session is lost**, and somebody owns the pool (the same service, or another that has
taken the dead one's memory over), everything is lost at once: what the leases protected may be lent
to others by now.

In both cases these leases are over when the engine has others, of a service that it has joined.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from array import array
from collections.abc import Iterable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any, Final

from prefixcache.client import Lease, MediaItem, Reply, Session, media_keys
from prefixcache.errors import (
    CacheError,
    InvalidRequest,
    LeaseExpired,
    PoolExhausted,
    ServiceUnavailable,
)
from prefixcache.texts import many
from prefixcache.types import BlockTable, Copy, pack

log = logging.getLogger(__name__)

PATIENCE_STEPS: Final = 8
"""So many steps a request sits out before another one gives way: its answer may be under way."""
OWNER_ENDS_S: Final = 0.1
"""How much later than its sockets the locks of a killed service may go."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """How far ahead an engine asks.

    Attributes:
        max_tokens: most tokens of a request, its prompt and its answer.
        reserve: tokens of room that are asked for beyond the prompt, and whenever it runs short.
        ahead: with less room than this left, more is asked for.
        window: requests that may have a lease, or wait for one, without being computed: each holds
            blocks that others could use.
        wait_s: how long the service lets one wait for a prefix or for room before it says no.
        spare_blocks: leased at the start, for the time after the service's death.
        min_partial: tokens of a partly matching block that are worth its copy.
    """

    max_tokens: int
    reserve: int = 64
    ahead: int = 32
    window: int = 8
    wait_s: float = 60.0
    spare_blocks: int = 0
    min_partial: int = 0


@dataclass(slots=True)
class Counts:
    """What has happened since the start."""

    asked: int = 0
    granted: int = 0
    prompt_tokens: int = 0
    """Of what was granted."""
    reused_tokens: int = 0
    lost: int = 0
    """Leases that ended while somebody computed under them."""
    sat_out: int = 0
    """Times a request sat a step out, since the room it needs had not come yet."""
    messages: int = 0
    ops: int = 0


class Room(Enum):
    """Whether a request has the blocks for its next tokens."""

    THERE = "there"
    COMING = "coming"
    """Asked for: it sits this step out."""
    MISSING = "missing"
    """It has not come in time: another request must give way."""


class Held:
    """What one request holds: a lease, or a question for one.

    Attributes:
        name: the request's.
        num_cached: tokens that need not be computed, once `copies` are made.
        copies: to be made before the first write, in whole blocks.
        refused: why it can never be served; None if it may.
        is_started: whether the engine computes it.
    """

    __slots__ = (
        "_extra",
        "asked",
        "committed",
        "copies",
        "future",
        "growing",
        "is_broken",
        "is_started",
        "known",
        "lease",
        "most",
        "name",
        "num_cached",
        "prompt",
        "refused",
        "sat_out",
        "stands_in_line",
    )

    def __init__(self, name: str) -> None:
        self.name = name
        self.future: Future[Lease] | None = None
        self.lease: Lease | None = None
        self.num_cached = 0
        self.copies: tuple[Copy, ...] = ()
        self.refused: InvalidRequest | None = None
        self.is_started = False
        self.stands_in_line = True
        """Whether it waits for room, too."""
        self.is_broken = False
        """Whether the service refused what was said of the lease."""
        self.prompt = self.known = 0
        """Tokens that it was asked with; and that the service knows."""
        self.committed = 0
        """Tokens that others may see."""
        self.asked = self.most = 0
        """Tokens that room was asked for; and that it will ever need."""
        self.growing: Reply[Any] | None = None
        self.sat_out = 0
        """Steps in a row that it sat out."""
        self._extra: BlockTable = array("i")
        """Spare blocks, after those of the lease."""

    @property
    def table(self) -> BlockTable:
        """Its blocks in order.  O(blocks) if it has spare ones, else O(1)."""
        own = array("i") if self.lease is None else self.lease.block_table
        return own + self._extra if self._extra else own

    @property
    def num_blocks(self) -> int:
        """Blocks of its table.  O(1)."""
        own = 0 if self.lease is None else len(self.lease.block_table)
        return own + len(self._extra)

    @property
    def is_idle(self) -> bool:
        """Whether it was granted, looked at or not, and is not computed yet."""
        was_granted = self.lease is not None or (self.future is not None and self.future.done())
        return was_granted and not self.is_started

    def take(self, blocks: Iterable[int]) -> None:
        """Add spare blocks."""
        self._extra.extend(blocks)


class Leases:
    """The leases of all requests of one engine.  For the thread of its scheduler.

    Args:
        session: attached; ended by whoever made it.
        bounds: how far ahead is asked.

    Raises:
        PoolExhausted: there is no room for the spare blocks.
    """

    def __init__(self, session: Session, bounds: Bounds) -> None:
        self.session = session
        self.bounds = bounds
        self.counts = Counts()
        self.block_size = session.pool.block_size
        self.held: dict[str, Held] = {}
        self._batch = session.batch()
        self._answered = threading.Condition()
        self._unended: set[str] = set()
        """Requests that let go of their blocks, which are not given back yet."""
        self._tries = 0
        self._is_alone = False
        self._has_looked = False
        """Whether it was given time to become known that the service is dead."""
        self.never_joins = ""
        """Why the engine will not join another service, as far as that is known."""
        self._spare: list[int] = []
        self._spare_lease: Lease | None = None
        self._sparing = threading.Lock()
        """For the spare ones: signs of life are answered in another thread."""
        self._asked_spare: Future[Lease] | None = None
        self._num_in_line = 0
        """That was told last."""
        if bounds.spare_blocks:
            self._spare_lease = session.acquire(pack([0]), **self._spare_terms())
            self._spare = list(self._spare_lease.block_table)
            session.watch_line(self._hear_of_line)

    # ------------------------------------------------------------------------ before the first step

    def ask(
        self,
        name: str,
        tokens: Sequence[int],
        *,
        left: int,
        salt: str | None = None,
        adapter: str | None = None,
        media: Iterable[MediaItem] = (),
        reuse: bool = True,
        for_room: bool = True,
    ) -> Held:
        """Ask for a request's lease with the next `flush`, unless that was done.

        Args:
            name: the request's.
            tokens: all that it has so far.
            left: how many may follow.
            salt: a secret that keeps it apart.
            adapter: that computes it.
            media: which image, recording or file stands where in its prompt.
            reuse: whether what others computed may be used.
            for_room: whether it waits for room, too, and not only for what another computes.
        """
        held = self.held.get(name)
        if held is None:
            held = self.held[name] = Held(name)
        if held.future is not None or held.lease is not None or held.refused is not None:
            return held
        num_tokens = len(tokens)
        held.prompt = held.known = num_tokens
        held.most = min(num_tokens + left, self.bounds.max_tokens)
        held.asked = min(num_tokens + self.bounds.reserve, held.most)
        if self.is_alone or not self.session.alive:
            return held
        try:
            key = media_keys(array("I", tokens), media)
        except InvalidRequest as error:
            held.refused = error
            return held
        held.stands_in_line = for_room
        self._tries += 1
        # The same id while the former lease is out would mean that one.
        is_first = name not in self._unended
        held.future = self._batch.acquire_later(
            key,
            reserve=max(0, held.asked - num_tokens),
            wait_s=self.bounds.wait_s,
            request_id=name if is_first else f"{name}/{self._tries}",
            salt=salt,
            adapter=adapter,
            reuse=reuse,
            min_partial=self.bounds.min_partial,
            for_room=for_room,
        )
        self.counts.asked += 1
        return held

    @property
    def has_window(self) -> bool:
        """Whether one more request may ask before it can be computed.  O(requests)."""
        waiting = sum(not held.is_started for held in self.held.values())
        return waiting < self.bounds.window

    def ready(self, name: str) -> Held | None:
        """Give what a request that was asked for holds, once it can be computed; else None.

        What was refused for now (no room, no service) is as if it had not been asked for.
        """
        held = self.held.get(name)
        if held is None or held.refused is not None:
            return None
        if held.lease is None and held.future is None:
            if self.is_alone:
                if self._take_spare(held, held.prompt + 1):
                    return held
                if (refused := self._never_fits(held)) is not None:
                    held.refused = refused
                    return None
            elif self.never_joins and not self.session.alive:
                held.refused = InvalidRequest(f"the service is lost: {self.never_joins}")
                return None
            del self.held[name]
            return None
        if held.future is not None:
            if not held.future.done():
                return None
            self._take_answer(held)
        if held.lease is None:
            if held.refused is None:
                del self.held[name]
            return None
        if self._is_over(held):
            self.end(self.pop(name))
            return None
        return held

    def _take_answer(self, held: Held) -> None:
        future, held.future = held.future, None
        assert future is not None
        try:
            lease = future.result()
        except InvalidRequest as error:
            held.refused = error
        except CacheError as error:
            is_told = held.stands_in_line and isinstance(error, PoolExhausted)
            level = logging.WARNING if is_told else logging.DEBUG
            log.log(level, "%s has no lease yet, and asks again: %s", held.name, error)
        else:
            held.lease = lease
            held.num_cached = held.committed = lease.num_cached
            held.copies = lease.copies
            self.counts.granted += 1
            self.counts.prompt_tokens += held.prompt
            self.counts.reused_tokens += lease.num_cached

    def pause(self, names: Iterable[str], seconds: float) -> None:
        """With nothing to compute, wait until one of these requests has its answer.

        An engine that asks again at once, all the time, takes the processor from whoever computes
        what it waits for.  Without a service there is nothing to wait for but time.
        """
        if not self.session.alive:
            time.sleep(seconds)
            return
        futures = []
        for name in names:
            held = self.held.get(name)
            if held is None or held.future is None or held.future.done():
                return
            futures.append(held.future)
        if futures:
            wait(futures, seconds, FIRST_COMPLETED)

    # --------------------------------------------------------------------------------- step by step

    def start(self, name: str) -> Held:
        """Note that a request which was ready is computed from now on."""
        held = self.held[name]
        held.is_started = True
        return held

    def has_room(self, name: str, num_tokens: int) -> bool:
        """Whether a request's blocks hold so many tokens in all; takes spare ones if it must."""
        held = self.held.get(name)
        if held is None:
            return False
        if held.num_blocks * self.block_size >= num_tokens:
            return True
        return self.is_alone and self._take_spare(held, num_tokens)

    def room(self, name: str, num_tokens: int) -> Room:
        """Tell whether a request's blocks hold so many tokens in all, or will; waits for nothing.

        Where they do not yet, it asks for more with the next `flush`, unless that was done, and
        gives back, for that, what was granted and is not computed yet.  O(1), but then.
        """
        held = self.held.get(name)
        if held is None:
            return Room.MISSING
        if self.has_room(name, min(num_tokens, held.most)):
            held.sat_out = 0
            return Room.THERE
        if held.lease is None or self.is_alone or self._is_over(held):
            return Room.MISSING
        if not held.sat_out:
            if held.growing is None:
                held.asked = max(held.asked, min(num_tokens + self.bounds.reserve, held.most))
                self._extend(held, held.lease, max(held.asked, num_tokens))
            self.give_back_unused()
        elif held.sat_out >= PATIENCE_STEPS or held.growing is None:
            held.sat_out = 0
            return Room.MISSING
        held.sat_out += 1
        self.counts.sat_out += 1
        return Room.COMING

    def pause_for_room(self, seconds: float) -> None:
        """With nothing to compute, wait until a request that sits out has its answer."""
        with self._answered:
            if any(held.sat_out and held.growing is not None for held in self.held.values()):
                self._answered.wait(seconds)

    def settle(
        self, name: str, num_valid: int, tokens: Sequence[int], *, is_last: bool = False
    ) -> None:
        """Say with the next `flush` what a request has computed, and ask for room ahead.

        Args:
            name: the request's.
            num_valid: how many of its tokens hold keys and values that the device has written.
            tokens: all of its tokens.
            is_last: whether nothing follows.
        """
        held = self.held.get(name)
        if held is None or held.lease is None or held.is_broken or self.is_alone:
            return
        lease, size, num_tokens = held.lease, self.block_size, len(tokens)
        valid = min(num_valid, num_tokens, len(lease.block_table) * size)
        if valid // size > held.committed // size or (
            valid > held.committed and (is_last or held.committed < held.prompt <= valid)
        ):
            new = pack(array("I", tokens[held.known : valid]))
            committed = self._batch.commit(lease, valid, new)
            held.known, held.committed = max(held.known, valid), valid
            committed.tell_error(partial(self._refused, held))
        short = held.asked - num_tokens < self.bounds.ahead and held.asked < held.most
        if short and not is_last and held.growing is None:
            held.asked = min(num_tokens + self.bounds.ahead + self.bounds.reserve, held.most)
            self._extend(held, lease, held.asked)

    def _extend(self, held: Held, lease: Lease, num_tokens: int) -> None:
        """Ask for room with the next `flush`."""
        reply = self._batch.extend(lease, num_tokens, wait_s=self.bounds.wait_s)
        held.growing = reply
        reply.listener = partial(self._grown, held)
        if reply.done:
            self._grown(held, reply)

    def _refused(self, held: Held, error: CacheError) -> None:
        """Hear, in the thread that reads the answers, that a commit was refused."""
        if not isinstance(error, ServiceUnavailable):
            held.is_broken = True
            log.info("%s: %s", held.name, error)

    def _grown(self, held: Held, reply: Reply[Any]) -> None:
        """Hear, in the thread that reads the answers, whether there is more room."""
        with self._answered:
            held.growing = None
            self._answered.notify_all()
        if reply.error is None:
            return
        held.asked = 0 if held.lease is None else len(held.lease.block_table) * self.block_size
        if isinstance(reply.error, LeaseExpired):
            held.is_broken = True
        elif not isinstance(reply.error, PoolExhausted | ServiceUnavailable):
            log.warning("%s gets no room: %s", held.name, reply.error)

    def lost(self) -> list[str]:
        """Give the requests whose lease is over: what is computed under it counts no more.

        O(requests); looks at the service's file where the session is lost.
        """
        self._look_round()
        over = [name for name, held in self.held.items() if held.is_started and self._is_over(held)]
        self.counts.lost += len(over)
        return over

    def _is_over(self, held: Held) -> bool:
        if held.is_broken:
            return True
        if self.is_alone:
            return False
        if held.lease is None or not self.session.alive:
            return True
        try:
            held.lease.check()
        except LeaseExpired:
            return True
        return False

    # -------------------------------------------------------------------------------------- the end

    def pop(self, name: str) -> Held | None:
        """Take a request out; its blocks stay its own until `end`."""
        held = self.held.pop(name, None)
        if held is not None:
            self._unended.add(name)
        return held

    def end(self, held: Held | None) -> None:
        """Give back, with the next `flush`, what was taken out: nothing writes there any more."""
        if held is None:
            return
        self._unended.discard(held.name)
        if held.future is not None:
            future, held.future = held.future, None
            if future.cancel() or future.exception() is not None:
                return
            held.lease = future.result()
        if self._is_alone:
            # What others could see, they may still read.
            first = -(-held.committed // self.block_size)
            self._spare.extend(held.table[first:])
            held.lease = None
        elif held.lease is not None and not held.lease.released:
            self._batch.release(held.lease)

    def give_back_unused(self) -> bool:
        """Give back what was granted and is not computed yet; it will be asked for again.

        For an engine that runs out of room: these are blocks that cost nobody anything.
        """
        idle = [name for name, held in self.held.items() if held.is_idle]
        for name in idle:
            self.end(self.pop(name))
        return bool(idle)

    def let_go(self) -> None:
        """End what requests hold that are not computed, and the spare blocks: the session is lost.

        Attaching again tells the service that nothing is written to their blocks any more, once
        those are ended as well that are computed.
        """
        for name in [name for name, held in self.held.items() if not held.is_started]:
            self.end(self.pop(name))
        with self._sparing:
            lease, self._spare_lease, self._spare = self._spare_lease, None, []
        if lease is not None:
            self._batch.release(lease)

    def flush(self) -> None:
        """Send what was said since the last time, in one message.  Waits for nothing."""
        replies = self._batch.step.replies
        if not replies:
            return
        self.counts.messages += 1
        self.counts.ops += len(replies)
        batch, self._batch = self._batch, self.session.batch()
        self.session.post(batch)

    # --------------------------------------------------------------------------------- spare blocks

    def _spare_terms(self) -> dict[str, Any]:
        # A namespace that nobody else has: nothing is ever found in it.
        reserve = self.bounds.spare_blocks * self.block_size - 1
        return {"reserve": reserve, "salt": secrets.token_hex(16)}

    def _hear_of_line(self, num_in_line: int) -> None:
        """Hear, in the thread that reads the answers, how many wait for blocks.

        While somebody has to wait, spare blocks are of more use to him: they are given back, and
        leased again when nobody waits any more.  So are those whose lease has ended meanwhile,
        since this process was stopped.
        """
        before, self._num_in_line = self._num_in_line, num_in_line
        lease = self._spare_lease
        is_over = lease is not None and lease.deadline < time.monotonic()
        if is_over or (num_in_line and before):
            self._lend_spare()
        elif not num_in_line and not before:
            self._ask_for_spare()

    def _lend_spare(self) -> None:
        with self._sparing:
            lease, self._spare_lease, self._spare = self._spare_lease, None, []
        if lease is not None:
            log.info("giving %s back that were to spare", many(len(lease.block_table), "block"))
            batch = self.session.batch()
            batch.release(lease)
            self.session.post(batch)

    def _ask_for_spare(self) -> None:
        if self._spare_lease is not None or self._asked_spare is not None:
            return
        batch = self.session.batch()
        self._asked_spare = batch.acquire_later(pack([0]), wait_s=0, **self._spare_terms())
        self.session.post(batch)
        self._asked_spare.add_done_callback(self._take_spare_lease)

    def _take_spare_lease(self, future: Future[Lease]) -> None:
        self._asked_spare = None
        if future.cancelled() or future.exception() is not None:
            return  # there is no room yet: with the next sign of life
        with self._sparing:
            self._spare_lease = future.result()
            self._spare = list(self._spare_lease.block_table)

    # ------------------------------------------------------------------------- without the service

    @property
    def is_alone(self) -> bool:
        """Whether the service is dead, and not only out of reach."""
        if not self._is_alone and not self.session.alive:
            self._look_round()
        return self._is_alone

    def _look_round(self) -> None:
        if self.session.alive:
            return
        was, self._is_alone = self._is_alone, self._is_abandoned()
        if self._is_alone and not was:
            log.warning(
                "the service is dead: going on with what is held and %s",
                many(len(self._spare), "spare block"),
            )
        elif was and not self._is_alone:
            log.warning("another service has taken the pool over: all that was held is lost")
        if not self._is_alone:
            with self._sparing:
                self._spare = []

    def _is_abandoned(self) -> bool:
        """Whether the pool's owner is dead.  Once, this may take a moment."""
        deadline = time.monotonic() + (0.0 if self._has_looked else OWNER_ENDS_S)
        self._has_looked = True
        while not (is_abandoned := self.session.memory_is_abandoned):
            if time.monotonic() > deadline:
                break
            time.sleep(OWNER_ENDS_S / 10)
        return is_abandoned

    def _never_fits(self, held: Held) -> InvalidRequest | None:
        """Refuse what waits for blocks that will never be there, however many requests end."""
        needed = -(-(held.prompt + 1) // self.block_size)
        left = len(self._spare) + sum(one.num_blocks for one in self.held.values())
        if needed <= left:
            return None
        return InvalidRequest(
            f"the service is gone, and {held.name} needs {many(needed, 'block')} of "
            f"{many(left, 'block')} that are left: ask again once there is a service"
            + (f"; {self.never_joins}" if self.never_joins else "")
        )

    def _take_spare(self, held: Held, num_tokens: int) -> bool:
        missing = -(-num_tokens // self.block_size) - held.num_blocks
        with self._sparing:
            if missing > len(self._spare):
                return False
            cut = len(self._spare) - max(0, missing)
            held.take(self._spare[cut:])
            del self._spare[cut:]
        return True
