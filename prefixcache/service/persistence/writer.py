"""The writer hears what enters and leaves the index, and has a thread write it down.

```
event loop   stamp at once ──► queue, at most 64 MiB ──► thread: checksums, one transaction
                                └─ no room: left out, and counted
```

Nothing here makes a request wait.  What is left out, or lost when the service dies, is a miss after
the next start: the stamps, not the manifest, say what may be believed.  A tail is written down when
the lease that fills it ends; until then it changes with every token, and its block is its lease's.
"""

from __future__ import annotations

import sqlite3
import threading
from collections import deque
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from prefixcache.service.persistence.checksums import NUM_FACTS, Checksums
from prefixcache.service.persistence.manifest import MAX_RUN, Manifest, ManifestRow
from prefixcache.service.persistence.stamps import MAX_NAMESPACES, Stamps
from prefixcache.types import TOKEN_BYTES, BlockId, BlockTable, Namespace

_MAX_PENDING: Final = 64 * 2**20
"""Bytes that may wait for the thread."""

_EVENT_BYTES: Final = 512
"""What an event takes in the queue beside its tokens."""

_PAUSE_S: Final = 0.05
"""Between two batches: what comes and goes within it costs no disk."""

_RETRY_S: Final = 1.0
"""Between two tries when the disk refuses."""

_BATCH: Final = 4096
"""Events of one transaction."""

_LONGEST: Final = 64
"""Blocks up to which a run grows: a chat is a few rows, not one per block, and none is long."""

_LAST_WORDS_S: Final = 30.0
"""What the thread gets at the end to write what is queued: a disk may hang for ever."""

log = structlog.get_logger(__name__)


class Stored(NamedTuple):
    """A run that can be found."""

    namespace: int
    resets: int
    parent: int
    parent_stamp: int
    tokens: bytes
    blocks: bytes
    stamps: bytes


class Removed(NamedTuple):
    """Blocks that can be found no more."""

    blocks: bytes


class Cleared(NamedTuple):
    """A namespace that has now been reset `resets` times."""

    namespace: int
    resets: int


class Named(NamedTuple):
    """A number that is a namespace's from now on; nothing is left of whose it was before."""

    number: int
    namespace: Namespace


Event = Stored | Removed | Cleared | Named


class Transaction(NamedTuple):
    """What one transaction does."""

    named: list[Named]
    added: list[ManifestRow]
    grown: list[ManifestRow]
    """Blocks that are added to the end of the run of that id."""
    gone: list[int]
    cleared: list[tuple[int, int]]


class ManifestWriter:
    """A journal, and what hears of the rights to write; both only on the event loop.

    Args:
        manifest: where to.
        stamps: of all blocks.
        sums: computes checksums.
        block_size: tokens of a block.
        namespaces: those of which something is indexed, by number.  Numbers of others are free.
    """

    def __init__(
        self,
        manifest: Manifest,
        stamps: Stamps,
        sums: Checksums,
        block_size: int,
        namespaces: dict[int, Namespace],
    ) -> None:
        self._manifest = manifest
        self._stamps = stamps
        self._sums = sums
        self._width = block_size * TOKEN_BYTES
        self._numbers = {namespace: number for number, namespace in namespaces.items()}
        self._free = deque(sorted(set(range(MAX_NAMESPACES)) - set(namespaces)))
        self._is_told = False
        """Whether it was said that there are too many namespaces."""
        self._tails: dict[int, Stored] = {}
        self._queue: deque[Event] = deque()
        # Two counters with one writer each need no lock.
        self._bytes_in = 0  # the event loop's
        self._bytes_out = 0  # the thread's
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="writer", daemon=True)
        self.num_dropped = 0
        """Runs that the thread had no room for."""
        self.num_written = 0
        """Blocks that are in the manifest, counted since the start."""
        self.failure = ""
        """Why the last batch could not be written; empty if it could."""
        self.given_up = ""
        """Why nothing is kept any more, for good; empty if it is."""
        self._has_ended = False
        """Whether the thread has come to an end that nobody foresaw: what comes is left out."""
        # The thread's: which run a block is in; how many of a run's blocks still are; and, by the
        # last block of a run that may grow, the run and its length.
        self._run_of = np.zeros(len(stamps.blocks), np.int64)
        self._alive: dict[int, int] = {}
        self._growing: dict[int, tuple[int, int]] = {}
        self._next = 1
        self._unwritten = Transaction([], [], [], [], [])

    def start(self, runs: list[tuple[int, npt.NDArray[np.int32]]], lost: list[int]) -> None:
        """Begin to write.

        Args:
            runs: those that the manifest has, by id, with the blocks in them that still hold.
            lost: ids of runs of which nothing holds, to be removed.
        """
        self._next = 1 + max((number for number in lost if number < MAX_RUN), default=0)
        self._unwritten = Transaction([], [], [], lost, [])
        for number, blocks in runs:
            self._run_of[blocks] = number
            self._alive[number] = len(blocks)
            self._next = max(self._next, number + 1)
        self._thread.start()

    @property
    def num_pending(self) -> int:
        """Bytes that wait to be written."""
        return self._bytes_in - self._bytes_out

    # ------------------------------------------------------------------ on the event loop

    def given(self, blocks: BlockTable) -> None:
        """Hear that a lease may write to blocks."""
        self._stamps.lend(blocks)

    def ended(self, blocks: BlockTable) -> None:
        """Hear that nobody may write to blocks any more."""
        self._stamps.settle(blocks)
        if len(blocks) == 1 and self._tails:  # a tail's right ends alone
            tail = self._tails.pop(blocks[0], None)
            if tail is not None:
                self._put(tail._replace(stamps=self._stamps.of(blocks)))

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Hear that a run can be found."""
        number = self._numbers.get(namespace)
        if number is None:
            number = self._name(namespace)
        whole = len(tokens) // self._width
        full = blocks if whole == len(blocks) else blocks[:whole]
        self._stamps.settle(full)
        if number < 0:
            return
        resets = int(self._stamps.resets[number])
        above, stamp = (-1, 0) if parent is None else (int(parent), self._stamps.one(parent))
        if whole:
            cut = whole * self._width
            event = Stored(
                number,
                resets,
                above,
                stamp,
                tokens[:cut],
                full.tobytes(),
                self._stamps.of(full),
            )
            self._put(event)
            above, stamp = full[-1], self._stamps.one(full[-1])
            tokens = tokens[cut:]
        if tokens:
            tail = blocks[whole:]
            self._tails[tail[0]] = Stored(number, resets, above, stamp, tokens, tail.tobytes(), b"")

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Hear that blocks can be found no more."""
        if len(blocks) == 1 and self._tails.pop(blocks[0], None) is not None:
            return
        self._stamps.remove(blocks)
        self._put(Removed(blocks.tobytes()))

    def cleared(self, namespace: Namespace) -> None:
        """Hear that a namespace was reset."""
        number = self._numbers.get(namespace, -1)
        if number < 0:
            return
        self._stamps.resets[number] += 1
        for block in [b for b, tail in self._tails.items() if tail.namespace == number]:
            del self._tails[block]
        self._put(Cleared(number, int(self._stamps.resets[number])))

    def left(self, namespace: Namespace) -> None:
        """Hear that a namespace has gone: another may have its number.

        What was stored of it has been taken out before, in the order of the queue; if something
        had no room there, its rows may still be in the manifest, and must get no other name.
        """
        number = self._numbers.pop(namespace, -1)
        if number >= 0 and not self.num_dropped:
            self._free.append(number)

    def _name(self, namespace: Namespace) -> int:
        number = self._free.popleft() if self._free else -1
        if number < 0:
            if not self._is_told and not self._has_ended:
                self._is_told = True
                log.warning("some namespaces are not kept: too many", limit=MAX_NAMESPACES)
        elif self._put(Named(number, namespace)):
            self._stamps.resets[number] += 1  # whatever was ever written under it counts no more
        else:
            self._free.appendleft(number)
            number = -1
        self._numbers[namespace] = number
        return number

    def _put(self, event: Event) -> bool:
        """Queue an event; say whether there was room."""
        size = _size(event)
        if self._has_ended or self.num_pending + size > _MAX_PENDING:
            if not self.num_dropped and not self._has_ended:
                log.warning("the state cannot keep up: some of it will be missing after a restart")
            self.num_dropped += 1
            return False
        self._bytes_in += size
        self._queue.append(event)
        return True

    def give_up(self, error: Exception) -> None:
        """Keep nothing more: an error came while a change was heard, so what is kept lacks it.

        Nothing of it may be restored: a block could hold what was written since.
        """
        self._has_ended = True
        self.given_up = f"it heard a change that it could not keep: {error!r}"
        log.error("the state is kept no more, the service goes on", exc_info=error)
        self._stamps.resets[:] += 1

    def close(self) -> bool:
        """Write what is queued, and end the thread.  Blocks for that long.

        Returns:
            Whether the thread has ended: if not, it must be left what it works on.
        """
        self._stop.set()
        if self._thread.ident is not None:
            self._thread.join(_LAST_WORDS_S)
        return not self._thread.is_alive()

    # ------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._write_all()
        except Exception as error:
            # Whatever it is, requests go on and nobody waits for this thread: so it must be told.
            self.failure = f"the thread that writes it down has ended: {error!r}"
            self._has_ended = True
            log.exception("the state is kept no more, the service goes on", cause=repr(error))
            self._queue.clear()
            self._unwritten = Transaction([], [], [], [], [])
            self._bytes_out = self._bytes_in

    def _write_all(self) -> None:
        while True:
            stopping = self._stop.is_set()
            while self._queue or any(self._unwritten):
                self._write_batch()
                if self.failure and (self._stop.is_set() or self._stop.wait(_RETRY_S)):
                    if stopping:
                        return  # one more try was made, after it was told to stop
                    break
            if stopping:
                return
            self._stop.wait(_PAUSE_S)

    def _write_batch(self) -> None:
        """Write some of what is queued.  What the disk refuses is tried again later."""
        if not any(self._unwritten):
            self._unwritten = self._prepare()
        batch = self._unwritten
        try:
            self._manifest.write(*batch)
        except sqlite3.Error as error:
            if not self.failure:
                log.error("the state cannot be written, the service goes on", cause=str(error))
            self.failure = str(error) or type(error).__name__
            return
        self._unwritten = Transaction([], [], [], [], [])
        self.num_written += sum(len(run.blocks) // 4 for run in (*batch.added, *batch.grown))
        if self.failure:
            log.info("the state can be written again")
            self.failure = ""

    def _prepare(self) -> Transaction:
        """Take events, leave out what has gone already, and compute the checksums of the rest."""
        events: list[tuple[int, bool, Stored]] = []
        gone: set[int] = set()
        cleared: list[tuple[int, int]] = []
        named: list[Named] = []
        new: set[int] = set()
        for _ in range(min(len(self._queue), _BATCH)):
            event = self._queue.popleft()
            self._bytes_out += _size(event)
            if isinstance(event, Stored):
                self._leave(np.frombuffer(event.blocks, np.int32), gone)  # left out, or reset
                number, grows = self._enter(event)
                events.append((number, grows, event))
                if not grows:
                    new.add(number)
            elif isinstance(event, Removed):
                self._leave(np.frombuffer(event.blocks, np.int32), gone)
            elif isinstance(event, Cleared):
                cleared.append((event.namespace, event.resets))
            else:
                named.append(event)
        fresh = [(number, grows, event) for number, grows, event in events if number not in gone]
        runs = self._with_sums([(number, event) for number, _, event in fresh])
        added = [run for run, (_, grows, _) in zip(runs, fresh, strict=True) if not grows]
        grown = [run for run, (_, grows, _) in zip(runs, fresh, strict=True) if grows]
        return Transaction(named, added, grown, sorted(gone - new), cleared)

    def _enter(self, event: Stored) -> tuple[int, bool]:
        """Choose the run of new blocks: the one that they alone continue, or one of their own.

        Returns:
            The run, and whether it was there.
        """
        blocks = np.frombuffer(event.blocks, np.int32)
        size, last = len(blocks), int(blocks[-1])
        number, length = self._growing.pop(event.parent, (0, 0))
        grows = number in self._alive and length + size <= _LONGEST
        grows = grows and len(event.tokens) == size * self._width
        if not grows:
            number, length = self._next, 0
            self._next += 1
        self._run_of[blocks] = number
        self._alive[number] = self._alive.get(number, 0) + size
        if len(event.tokens) == size * self._width:
            self._growing[last] = (number, length + size)
        return number, grows

    def _leave(self, blocks: npt.NDArray[np.int32], gone: set[int]) -> None:
        """Take blocks out of their runs; add the runs of which nothing is left to `gone`."""
        before = self._run_of[blocks]
        if not before.any():
            return
        self._run_of[blocks] = 0
        for block in blocks.tolist():
            self._growing.pop(block, None)
        numbers, counts = np.unique(before, return_counts=True)
        for number, count in zip(numbers.tolist(), counts.tolist(), strict=True):
            if number in self._alive:  # else it was left out for want of room, or is none
                self._alive[number] -= count
                if self._alive[number] <= 0:
                    del self._alive[number]
                    gone.add(number)

    def _with_sums(self, events: list[tuple[int, Stored]]) -> list[ManifestRow]:
        """Compute the checksums: one call for all blocks that are filled alike."""
        by_fill: dict[int, list[int]] = {}
        for place, (_, event) in enumerate(events):
            fill = min(len(event.tokens), self._width) // TOKEN_BYTES
            by_fill.setdefault(fill, []).append(place)
        runs: dict[int, ManifestRow] = {}
        for fill, places in by_fill.items():
            group = [events[place][1] for place in places]
            facts, tokens = describe(
                np.array([event[:4] for event in group], np.int64),
                np.array([len(event.blocks) // 4 for event in group], np.int64),
                np.frombuffer(b"".join([event.blocks for event in group]), np.uint32),
                np.frombuffer(b"".join([event.stamps for event in group]), np.uint32),
                b"".join([event.tokens for event in group]),
                fill,
            )
            sums = self._sums.of(facts, tokens).tobytes()
            at = 0
            for place, event in zip(places, group, strict=True):
                end = at + 2 * len(event.blocks)
                runs[place] = ManifestRow(events[place][0], *event, sums=sums[at:end])
                at = end
        return [runs[place] for place in range(len(events))]


def describe(
    heads: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    blocks: npt.NDArray[np.uint32],
    stamps: npt.NDArray[np.uint32],
    tokens: bytes,
    fill: int,
) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.uint32]]:
    """Lay out, for the checksums, what is said of blocks: facts and tokens, a row per block.

    Args:
        heads: `[runs, 4]`: namespace, its resets, the block before, and that block's stamp.
        counts: blocks of each run, at least 1.
        blocks: of all runs, one after the other.
        stamps: theirs.
        tokens: theirs, packed.
        fill: tokens in every block.
    """
    starts = np.cumsum(counts) - counts
    facts = np.empty((len(blocks), NUM_FACTS), np.uint32)
    facts[:, 0] = blocks
    facts[:, 1] = stamps
    facts[1:, 2], facts[1:, 3] = blocks[:-1], stamps[:-1]
    facts[starts, 2:4] = heads[:, 2:4].astype(np.uint32)
    facts[:, 4:6] = np.repeat(heads[:, 0:2].astype(np.uint32), counts, axis=0)
    facts[:, 6] = fill
    return facts, np.frombuffer(tokens, np.uint32).reshape(len(blocks), fill)


def _size(event: Event) -> int:
    if isinstance(event, Stored):
        return len(event.tokens) + len(event.blocks) + _EVENT_BYTES
    if isinstance(event, Named):
        one = event.namespace
        fields = (one.model, one.adapter, one.tenant, one.salt)
        return 4 * sum(map(len, fields)) + _EVENT_BYTES
    return _EVENT_BYTES
