"""Events: what enters and leaves the index, as routers know it, for whoever watches.

```
event loop ── journal: a tuple in a queue ──► soon: hash the blocks ──► ring of events ──► watchers
                                                          │              65,536 or 64 MiB, numbered
                                                          └─► what is stored now, by block
```
The schema is the field's: BlockStored (hashes, the hash of the block before, block size, medium),
BlockRemoved (hashes, medium), AllBlocksCleared.  Whole blocks only: a router has no use for a tail.

**A medium** is what a router knows of a level: that of the pool, `CPU` for memory below it and
`STORAGE` for a disk.  A block that goes down is stored below before it is removed above, and one
that comes back is stored above first: it is never nowhere.  Where two levels are of one medium,
going from one to the other is not told.

**Hashes** are a chain, so that one names a whole prefix: BLAKE2b over the hash before and the
block's packed tokens, with the namespace's fields (each with its length) at its start.

**Nobody watches: nothing is hashed**, and a change of the index costs a comparison.  The first who
watches makes the index be read once, O(runs), in parts; after the last has left it is kept for a
minute, so that who lost the connection can go on where it was.

**Slow watchers** have a place in the ring and nothing else: who falls behind by more than the ring
is told of the gap, and gets what is stored now in place of what it missed.  Numbers never go back,
also not when the service is started again: they begin at the time, in microseconds.
"""

from __future__ import annotations

import asyncio
import contextlib
from array import array
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain, islice
from time import time, time_ns
from typing import Any, TypeAlias

from prefixcache.core.cache import PrefixCache
from prefixcache.core.kv_events import Replay
from prefixcache.core.shares import Shares
from prefixcache.core.tiers import LEVEL_BITS, NOWHERE, Level, Places
from prefixcache.errors import ServiceUnavailable
from prefixcache.service.backing import Backing
from prefixcache.service.failures import Failures
from prefixcache.service.isolated_listener import IsolatedListener
from prefixcache.service.turns import Slice, give_way
from prefixcache.types import TOKEN_BYTES, BlockId, BlockTable, Namespace

HASH_BYTES = 32
_RING = 65_536
_RING_BYTES = 64 << 20
"""What the events in the ring may take; over it, the oldest go first."""
_EVENT_BYTES = 512
"""What an event takes beside its hashes and tokens."""
_CHUNK = 64
"""Blocks of an event, and events of a message, at most: what is made in one go."""
MOST_EVENTS = MOST_BLOCKS = _CHUNK
_MESSAGE_BYTES = 1 << 20
"""Of events in one message, about."""
_DROPPED = 512
"""Blocks, and events with each of their hashes, that are freed in one go once nobody watches."""
_DROP_EVERY_S = 0.001
_DELAY_S = 0.01
_LINGER_S = 60.0
_MOST_RAW = 262_144
"""Changes that may wait to be hashed; with more, all watchers start anew."""


@dataclass(frozen=True, slots=True)
class Stored:
    """A run of whole blocks can be found."""

    at: float
    namespace: Namespace
    hashes: tuple[bytes, ...]
    parent: bytes | None
    """Hash of the block before; None: these are the first."""
    tokens: bytes
    medium: str = ""
    """Where."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Blocks can be found no more."""

    at: float
    namespace: Namespace
    hashes: tuple[bytes, ...]
    medium: str = ""
    """Where."""


@dataclass(frozen=True, slots=True)
class Cleared:
    """Nothing of a namespace can be found any more."""

    at: float
    namespace: Namespace
    hashes: tuple[bytes, ...]
    """What was left of it in the pool: of a large one, most is removed just before, in parts, and
    so is all that lies below."""
    medium: str = ""
    """Where these were."""


Event: TypeAlias = "Stored | Removed | Cleared"


@dataclass(frozen=True, slots=True)
class Batch:
    """What a watcher gets next."""

    first: int
    """Number of the first event."""
    events: list[Event]
    next: int
    """Number from which to go on."""
    lost: tuple[int, int] | None = None
    """Events from and up to (exclusive) which are no longer kept: forget what you know."""
    is_snapshot: bool = False
    """These say what is stored, not what has changed."""


@dataclass(slots=True)
class _Block:
    namespace: Namespace
    hash: bytes
    parent: bytes | None
    tokens: bytes
    levels: int = 0
    """Where it lies: a bit for each level."""


@dataclass(slots=True)
class _Space:
    """What is stored of a namespace, by place, for each level.

    In the pool a block comes after the one before it.  What goes below is put in front: so that
    there, too, a block comes after the one before it, which goes down later.
    """

    levels: tuple[dict[int, _Block], OrderedDict[int, _Block], OrderedDict[int, _Block]] = field(
        default_factory=lambda: ({}, OrderedDict(), OrderedDict())
    )

    def __bool__(self) -> bool:
        return any(self.levels)


_Entry: TypeAlias = "tuple[str, Namespace | None, int | None, bytes, array[int], array[int]]"
"""What happened; where; behind which place; tokens; places; and those to which was copied."""
_NO_PLACES: Places = array("q")


class EventLog:
    """A journal that hashes, while somebody watches.

    Args:
        backing: whose cache is watched.
        max_watchers: how many may watch at a time.
        ring: how many events are kept.
        ring_bytes: how much they may take.
        failures: is told when events end by an error.
    """

    def __init__(
        self,
        backing: Backing,
        max_watchers: int = 64,
        ring: int = _RING,
        ring_bytes: int = _RING_BYTES,
        failures: Failures | None = None,
    ) -> None:
        self._backing = backing
        self._failures = Failures() if failures is None else failures
        self._has_failed = False
        self.shares = Shares(max_watchers, "--max-watchers", "watchers")
        """Who has how many of them."""
        self._observed: PrefixCache | None = None
        self._active = False
        self._raw: deque[_Entry] = deque()
        self._digest: asyncio.Task[None] | None = None
        self._spaces: dict[Namespace, _Space] = {}
        self._below: dict[int, Namespace] = {}
        """Of each place below the pool that holds something: whose it is."""
        self._media: tuple[str, ...] = ("", "", "")
        """Of each level."""
        self._alike: tuple[int, ...] = (0, 0, 0)
        """Of each level: those of the same medium, a bit for each."""
        self._between: set[bytes] = set()
        """Hashes of what lies on two levels of one medium: it goes from one to the other."""
        self._roots: dict[Namespace, bytes] = {}
        self._ring: deque[Event] = deque()
        self._ring_bytes = 0
        self._most, self._most_bytes = ring, ring_bytes
        self._next = time_ns() // 1000
        self._fresh = asyncio.Event()
        self._num_replaying = 0
        self._replay: Replay | None = None
        self._replaying: Generator[None, None, None] | None = None
        self._width = self._piece = 1
        self._linger: asyncio.TimerHandle | None = None
        self._dropped: list[dict[Any, Any] | deque[Any]] = []
        self._dropping: asyncio.TimerHandle | None = None
        self.watchers = 0
        self.num_events = 0
        self.num_gaps = 0

    # ------------------------------------------------------------------------ the journal

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Hear of a run.  O(blocks), a copy, in pieces."""
        if not self._active:
            return
        if self._replay is not None and not self._replay.is_stored(namespace, parent, blocks):
            return
        piece, width = self._piece, self._width
        for at in range(0, len(blocks), piece):
            part = blocks[at : at + piece]
            cut = tokens[at * width : (at + piece) * width]
            self._hear(("stored", namespace, parent, cut, part, _NO_PLACES))
            parent = BlockId(part[-1])

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Hear of blocks that leave."""
        if not self._active:
            return
        if self._replay is not None:
            blocks = self._replay.removed(namespace, blocks)
        for end in range(len(blocks), 0, -_CHUNK):  # the last of a prefix first
            part = blocks[max(0, end - _CHUNK) : end]
            self._hear(("removed", namespace, None, b"", part, _NO_PLACES))

    def cleared(self, namespace: Namespace) -> None:
        """Hear of a reset."""
        if not self._active:
            return
        if self._replay is not None:
            self._replay.cleared(namespace)
        self._hear(("cleared", namespace, None, b"", _NO_PLACES, _NO_PLACES))

    def left(self, namespace: Namespace) -> None:
        """Hear that a namespace has gone.  What is still to be told of it is told."""
        self._roots.pop(namespace, None)

    def copied(self, namespace: Namespace, sources: Places, places: Places) -> None:
        """Hear of blocks that lie at other places, too.  O(blocks)."""
        if not self._active:
            return
        if self._replay is not None:
            sources, places = self._replay.copied(namespace, sources, places)
        # What goes down is in one piece, so that it stands in order: it is some hundred blocks.
        is_down = bool(places) and places[0] >> LEVEL_BITS
        piece = len(places) if is_down else _CHUNK
        for at in range(0, len(places), piece or 1):
            part = sources[at : at + piece], places[at : at + piece]
            self._hear(("copied", namespace, None, b"", *part))

    def lost(self, places: Places) -> None:
        """Hear of places that hold nothing any more."""
        if not self._active:
            return
        if self._replay is not None:
            places = self._replay.lost(places)
        for end in range(len(places), 0, -_CHUNK):
            part = places[max(0, end - _CHUNK) : end]
            self._hear(("lost", None, None, b"", part, _NO_PLACES))

    def found(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: Places
    ) -> None:
        """Hear of a run below the pool, while it is told what was there before anybody watched."""
        if self._active:
            self._hear(("found", namespace, parent, tokens, places, _NO_PLACES))

    def _hear(self, entry: _Entry) -> None:
        self._raw.append(entry)
        if self._digest is None:
            self._digest = asyncio.get_running_loop().create_task(self._work())
        elif len(self._raw) > _MOST_RAW:
            self._forget()

    # ------------------------------------------------------------------------ watching

    @contextmanager
    def watching(self, tenant: str = "") -> Iterator[None]:
        """Be a watcher: events are made for as long as there is one.

        Args:
            tenant: Of whose share it is.

        Raises:
            PoolExhausted: there are too many, or its tenant has as many as it may.
        """
        self.shares.take(tenant)
        self.watchers += 1
        if self._linger is not None:
            self._linger.cancel()
            self._linger = None
        self._observe()
        try:
            yield
        finally:
            self.watchers -= 1
            self.shares.give(tenant)
            if not self.watchers:
                self._linger = asyncio.get_running_loop().call_later(_LINGER_S, self._stop)

    async def batches(self, start: int) -> AsyncIterator[Batch]:
        """Give what happens from event `start` on; 0: what is stored now, and then what happens.

        To be used within `watching`.  Never ends by itself.

        Raises:
            ServiceUnavailable: events have ended, by an error.
        """
        place: int | None = start or None
        while True:
            self._observe()
            await self._settle()
            if self._has_failed:
                raise ServiceUnavailable(
                    "events have ended by an error, which the service's log tells: start it again"
                )
            first = self._next - len(self._ring)
            if place is None or not first <= place <= self._next:
                lost = None if place is None else (place, self._next)
                self.num_gaps += place is not None
                place = self._next
                for batch in self._snapshot(lost):
                    yield batch
                    await asyncio.sleep(0)
                continue
            if place == self._next:
                await self._news()
                continue
            at = place - first
            events = _one_message(islice(self._ring, at, at + _CHUNK))
            place += len(events)
            yield Batch(place - len(events), events, place)
            await asyncio.sleep(0)

    def close(self) -> None:
        """Stop.  Idempotent."""
        self._active = False
        if self._digest is not None:
            self._digest.cancel()
        for timer in (self._linger, self._dropping):
            if timer is not None:
                timer.cancel()

    def _observe(self) -> None:
        """Begin to hash, with what is indexed now, as soon as there is a cache."""
        cache = self._backing.cache
        if self._active or cache is None or self._has_failed:
            return
        self._active = True
        self._empty_ring()
        self._next += 1  # who watched before there was anything to hear starts anew
        self._num_replaying = 1 << 62  # all of it, however much it is
        if self._observed is None:
            ear = IsolatedListener(self, self._fail)
            cache.observe(ear, below=ear)
            self._observed = cache
        self._media = (self._backing.medium, "CPU", "STORAGE")
        self._alike = tuple(
            sum(1 << level for level, one in enumerate(self._media) if one == medium)
            for medium in self._media
        )
        self._width = cache.block_size * TOKEN_BYTES
        self._piece = max(1, min(_CHUNK, _MESSAGE_BYTES // (2 * self._width)))
        self._replay = cache.replay(self, self)
        self._replaying = self._replay.run()
        if self._digest is None:
            self._digest = asyncio.get_running_loop().create_task(self._work())

    async def _settle(self) -> None:
        """Wait until what was indexed when the first came is hashed."""
        while self._num_replaying:
            await self._news()

    async def _news(self) -> None:
        """Wait for events; look again now and then while there is no cache to hear of."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._fresh.wait(), None if self._active else 0.2)

    def _snapshot(self, lost: tuple[int, int] | None) -> Iterator[Batch]:
        place, now = self._next, time()
        chosen = [[list(own.levels[at].values()) for own in self._spaces.values()] for at in Level]
        between = frozenset(self._between)
        yield Batch(place, [], place, lost, is_snapshot=True)
        for level in Level:
            is_second = self._alike[level] & ((1 << level) - 1)
            twice = between if is_second else frozenset()
            blocks = chain.from_iterable(chosen[level])
            while part := list(islice(blocks, self._piece)):
                runs = _runs([one for one in part if one.hash not in twice])
                events = [_stored(run, self._media[level], now) for run in runs]
                if events:
                    yield Batch(place, list[Event](events), place, is_snapshot=True)

    def _fail(self, error: Exception) -> None:
        """End in order: who watches is told so, and nobody hears half of what happens."""
        self._has_failed = True
        self._failures.tell("events", error)
        self._forget()
        self._wake()

    def _wake(self) -> None:
        fresh, self._fresh = self._fresh, asyncio.Event()
        fresh.set()

    def _stop(self) -> None:
        self._linger = None
        self._forget()

    def _forget(self) -> None:
        self._active = False
        self._num_replaying = 0
        self._replay = self._replaying = None
        self._dropped += [self._raw, self._spaces, self._ring, self._below]
        self._raw, self._spaces, self._ring, self._below = deque(), {}, deque(), {}
        self._between = set()
        self._ring_bytes = 0
        if self._dropping is None:
            self._go_on_dropping()
        self._next += 1  # who comes back has missed something

    def _go_on_dropping(self) -> None:
        """Free the next part of what was forgotten."""
        self._dropping, left = None, _DROPPED
        while self._dropped and left > 0:
            left -= 1
            some = self._dropped[-1]
            if not some:
                self._dropped.pop()
            elif isinstance(some, dict):
                one = some.popitem()[1]
                if isinstance(one, _Space):
                    self._dropped += one.levels
            else:
                one = some.popleft()
                left -= len(one[4] if isinstance(one, tuple) else one.hashes)
        if self._dropped:
            loop = asyncio.get_running_loop()
            self._dropping = loop.call_later(_DROP_EVERY_S, self._go_on_dropping)

    # ------------------------------------------------------------------------ hashing

    async def _work(self) -> None:
        """Make events of what was heard, a bounded part at a time."""
        try:
            await asyncio.sleep(_DELAY_S)
            while self._raw or self._replaying is not None:
                mine = Slice()
                while not mine.is_over and (self._raw or self._replaying is not None):
                    if self._raw:
                        self._take(self._raw.popleft())
                    else:
                        self._go_on_replaying()
                self._wake()
                await give_way()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody waits for this task
            self._fail(error)
        finally:
            self._digest = None

    def _go_on_replaying(self) -> None:
        """Hear of the next runs that were indexed when the first came."""
        assert self._replaying is not None
        for _ in self._replaying:
            return
        self._replay = self._replaying = None
        self._num_replaying = len(self._raw)

    def _take(self, entry: _Entry) -> None:
        """Make events of an entry; of a large reset, of its next part."""
        kind, namespace, parent, tokens, places, others = entry
        events: list[Event]
        if namespace is None:
            events = self._lose(places)
        elif kind == "removed":
            events = self._remove(namespace, places)
        elif kind == "copied":
            events = self._copy(namespace, places, others)
        elif kind == "cleared":
            events = self._clear(entry, namespace)
        else:
            events = self._hash(namespace, parent, tokens, places)
        if self._num_replaying:
            self._num_replaying -= 1
            return
        for event in events:
            self._keep(event)
        self._next += len(events)
        self.num_events += len(events)

    def _remove(self, namespace: Namespace, places: Iterable[int]) -> list[Event]:
        """Take blocks from their places."""
        own = self._spaces.get(namespace)
        if own is None:
            return []
        gone: tuple[list[bytes], ...] = ([], [], [])
        for place in places:
            level = place >> LEVEL_BITS
            block = own.levels[level].pop(place, None)
            if block is not None:
                block.levels &= ~(1 << level)
                if block.levels & self._alike[level]:
                    self._between.discard(block.hash)
                else:
                    gone[level].append(block.hash)
        if not own:
            self._spaces.pop(namespace, None)
        now = time()
        return [
            Removed(now, namespace, tuple(hashes), self._media[level])
            for level, hashes in enumerate(gone)
            if hashes
        ]

    def _lose(self, places: Places) -> list[Event]:
        """Take blocks from places below the pool, whoever's they are."""
        whose: dict[Namespace, list[int]] = {}
        for place in places:
            namespace = self._below.pop(place, None)
            if namespace is not None:
                whose.setdefault(namespace, []).append(place)
        return [event for one, own in whose.items() for event in self._remove(one, own)]

    def _copy(self, namespace: Namespace, sources: Places, places: Places) -> list[Event]:
        """Put blocks to other places, too."""
        own = self._spaces.get(namespace)
        if own is None:
            return []
        level = places[0] >> LEVEL_BITS
        there = own.levels[level]
        fresh: list[_Block] = []
        placed: list[int] = []
        for source, place in zip(sources, places, strict=True):
            block = own.levels[source >> LEVEL_BITS].get(source)
            if block is None:
                continue
            if block.levels & self._alike[level]:
                self._between.add(block.hash)
            else:
                fresh.append(block)
            block.levels |= 1 << level
            there[place] = block
            placed.append(place)
        if isinstance(there, OrderedDict):
            for place in reversed(placed):
                there.move_to_end(place, last=False)
                self._below[place] = namespace
        return [_stored(run, self._media[level], time()) for run in _runs(fresh)]

    def _clear(self, entry: _Entry, namespace: Namespace) -> list[Event]:
        """Take the next blocks of a namespace that was reset, those below the pool first."""
        own = self._spaces.get(namespace, _Space())
        level = next((level for level in reversed(Level) if own.levels[level]), Level.POOL)
        there = own.levels[level]
        taken = list(islice(reversed(there), _CHUNK))[::-1]
        events = self._remove(namespace, taken)
        for place in taken if level else ():
            del self._below[place]
        if own:
            self._raw.appendleft(entry)
            self._num_replaying += self._num_replaying > 0
            return events
        left = events[-1].hashes if events and not level else ()
        last = Cleared(time(), namespace, left, self._media[0])
        return [last] if left else [*events, last]

    def _keep(self, event: Event) -> None:
        """Put an event into the ring.  Amortised O(1).  The newest stays however large it is."""
        ring = self._ring
        ring.append(event)
        self._ring_bytes += _size(event)
        while len(ring) > 1 and (len(ring) > self._most or self._ring_bytes > self._most_bytes):
            self._ring_bytes -= _size(ring.popleft())

    def _empty_ring(self) -> None:
        self._ring.clear()
        self._ring_bytes = 0

    def _hash(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: array[int]
    ) -> list[Event]:
        """Put blocks to their places; those that came back there are there already."""
        cache = self._backing.cache
        assert cache is not None
        width = cache.block_size * TOKEN_BYTES
        before: bytes | None = None
        own = self._spaces.get(namespace) or _Space()
        if parent is not None:
            above = own.levels[parent >> LEVEL_BITS].get(parent)
            if above is None:
                return []
            before = above.hash
        link = self._root(namespace) if before is None else before
        whole = len(tokens) // width
        if whole:
            self._spaces[namespace] = own
        fresh: tuple[list[_Block], ...] = ([], [], [])
        for at in range(whole):
            place = places[at]
            level = max(0, place >> LEVEL_BITS)
            block = own.levels[level].get(place)
            if block is None:
                part = tokens[at * width : (at + 1) * width]
                block = _Block(namespace, block_hash(link, part), before, part)
                if place != NOWHERE:
                    block.levels = 1 << level
                    own.levels[level][place] = block
                    if level:
                        self._below[place] = namespace
                    fresh[level].append(block)
            before = link = block.hash
        now = time()
        return [
            _stored(run, self._media[level], now)
            for level, blocks in enumerate(fresh)
            for run in _runs(blocks)
        ]

    def _root(self, namespace: Namespace) -> bytes:
        root = self._roots.get(namespace)
        if root is None:
            if len(self._roots) > 4096:
                self._roots.clear()
            root = self._roots[namespace] = namespace_hash(namespace)
        return root


def _size(event: Event) -> int:
    size = _EVENT_BYTES + 2 * HASH_BYTES * len(event.hashes)
    return size + len(event.tokens) if isinstance(event, Stored) else size


def _one_message(events: Iterable[Event]) -> list[Event]:
    """Give the first of some events, about as much as one message should carry."""
    taken: list[Event] = []
    size = 0
    for event in events:
        size += _size(event)
        if taken and size > _MESSAGE_BYTES:
            break
        taken.append(event)
    return taken


def _runs(blocks: list[_Block]) -> Iterator[list[_Block]]:
    """Cut blocks where one does not follow the one before it, or there are many."""
    run: list[_Block] = []
    for block in blocks:
        if run and (
            len(run) == _CHUNK
            or block.parent != run[-1].hash
            or block.namespace is not run[-1].namespace
        ):
            yield run
            run = []
        run.append(block)
    if run:
        yield run


def _stored(run: list[_Block], medium: str, at: float) -> Stored:
    return Stored(
        at,
        run[0].namespace,
        tuple([block.hash for block in run]),
        run[0].parent,
        b"".join([block.tokens for block in run]),
        medium,
    )


def namespace_hash(namespace: Namespace) -> bytes:
    """Hash what prompts of a namespace begin with: its fields, each with its length."""
    fields = (namespace.model, namespace.adapter, namespace.tenant, namespace.salt)
    text = b"".join(
        len(part).to_bytes(8, "little") + part for part in (field.encode() for field in fields)
    )
    return blake2b(text, digest_size=HASH_BYTES, person=b"prefixcache/ns").digest()


def block_hash(before: bytes, tokens: bytes) -> bytes:
    """Hash a block: the hash before (of a block, or the namespace's) and its packed tokens.

    >>> from prefixcache.types import pack
    >>> start = namespace_hash(Namespace("tiny"))
    >>> len(block_hash(start, pack([1, 2])))
    32
    >>> block_hash(start, pack([1, 2])) == block_hash(start, pack([2, 1]))
    False
    """
    return blake2b(before + tokens, digest_size=HASH_BYTES, person=b"prefixcache/kv").digest()
