"""Hauls: blocks on their way between the pool and the tiers below it.

```
            sink                         ended
pool  ────────────► leaving ───────────────────────► slot can be read, block is free
                       └ abandoned: somebody needs the block now; the slot is not good

            move_on                      ended
HOST  ────────────► moving ────────────────────────► it lies on DISK, its slot of HOST is free
                       └ not good, or read meanwhile: it stays where it is

            begin_restore                pieces end
slots ────────────► in flight ─────────────────────► indexed, piece by piece
                       └ late or not good: who waits computes the rest
```

**Down.**  Victims leave the tree before anybody needs their blocks, and are free once they have
been copied, so nobody ever waits for a copy.  Who needs blocks that are still leaving gets them at
once: the copy is read by nobody then, and `abandoned` is told before anybody else may write to
them, so that no copy of what he writes is taken for theirs after a restart.

**From HOST to DISK** the oldest blocks go ahead of need, too, from slot to slot: no block of the
pool takes part.  Who waits for one of them reads it from where it still lies.  What may be written
to a disk has a limit (`write_limit.py`); what is over it is given up.

**Up.**  A restore is a lease on the prefix, of a worker that nobody else is: the porter.  So it is
in flight like any other, and others wait for it.  Its blocks are the porter's until each haul into
them has ended, or his process has: only then has nobody a right to write there.

**From and to REMOTE** (`remote.py`) the names of objects stand in the place of slots.  What is
stored there stays in the tree: a lease of the porter's keeps it from being evicted meanwhile.

Who moves the bytes is not known here.  It is given hauls, in order, and tells of each one when it
has ended, and how many of its blocks, from the first on, were found to be what they should be.
"""

from __future__ import annotations

import math
from array import array
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, NamedTuple

from prefixcache.core.block_keys import KEY_BYTES
from prefixcache.core.block_pool import BlockPool
from prefixcache.core.lease import Lease
from prefixcache.core.radix_tree import Sunk
from prefixcache.core.remote import NAME_BYTES, REMOTE, QuestionId, Remote, Storing
from prefixcache.core.tiers import Move, Stamps, Tier
from prefixcache.core.wait_queue import SLACK_S
from prefixcache.core.worth import Rate, Verdict, Worth
from prefixcache.core.write_limit import WriteLimit
from prefixcache.types import BlockTable, HaulId, WorkerId

PORTER: Final = WorkerId(-(2**31))
"""Under which number the leases of restores are: no worker has it."""

NEVER: Final = 1e12
"""The time at which the leases of restores end by themselves."""

_LESS: Final = 16
"""What part of the blocks is kept free while no tier pays that are while one does."""
_FORGET: Final = 16
"""What is kept free for many blocks at once is forgotten while so many times as much is taken."""
_AS_LONG_AGAIN: Final = 2.0
"""Who waits for a restore waits so many times as long as it is expected to take, and the slack."""


class TierSizes(NamedTuple):
    """What there is below the pool.

    >>> sizes = TierSizes.of(5_825, host=10_000, disk=100_000)
    >>> sizes.ahead, sizes.most_ahead, sizes.host_ahead
    (364, 2912, 625)
    """

    host: int = 0
    """Blocks that fit; 0: there is nothing below the pool."""
    ahead: int = 0
    """Blocks of the pool that are kept free, since the oldest ones go down ahead of need."""
    piece: int = 16
    """Blocks of one haul at most: who waits for one waits no longer than this takes."""
    disk: int = 0
    """Blocks that fit below that; 0: there is no disk."""
    host_ahead: int = 0
    """Slots of HOST that are kept free, since its oldest blocks go on to DISK ahead of need."""
    disk_per_s: float = math.inf
    """Blocks that are written to DISK in a second at most."""
    most_ahead: int = 0
    """Blocks of the pool that are kept free at most, where requests take that many at once."""
    remote: int = 0
    """Blocks of a haul from or to a store that others have, too; 0: there is none."""

    @property
    def below(self) -> int:
        """Blocks that fit below the pool of this machine, wherever."""
        return self.host + self.disk

    @property
    def is_any(self) -> bool:
        """Whether there is anything below the pool, on this machine or elsewhere."""
        return bool(self.below or self.remote)

    @classmethod
    def of(
        cls,
        num_blocks: int,
        *,
        host: int = 0,
        disk: int = 0,
        disk_per_s: float = math.inf,
        remote: int = 0,
    ) -> TierSizes:
        """Give what suits a pool: a sixteenth of it is kept free, 64 to 2,048 blocks.

        Of a small one it is an eighth; and the same of HOST, if there is a disk below it.  Where
        requests take more than that at once, as much as they take, half of the pool at most.
        Nothing is kept free for a store elsewhere: what is stored there need not be evicted.
        """
        ahead = _part_of(num_blocks) if host or disk else 0
        host_ahead = _part_of(host) if disk else 0
        most = num_blocks // 2 if ahead else 0
        return cls(host, ahead, 16, disk, host_ahead, disk_per_s, most, remote)


def _part_of(num_blocks: int) -> int:
    return min(max(num_blocks // 16, 64), num_blocks // 8, 2048)


_NONE: Final[BlockTable] = array("i")
_NO_STAMPS: Final[Stamps] = array("q")
_MOST_MOVING: Final = 4
"""Pieces that are on their way from HOST to DISK at the same time, and at the end from the pool."""


class Haul(NamedTuple):
    """An order to copy some blocks."""

    id: HaulId
    is_up: bool
    """Whether from slots into the pool."""
    blocks: BlockTable
    """None, if it is from slot to slot."""
    slots: BlockTable
    """As many.  First those of HOST, then those of DISK."""
    stamps: Stamps
    """What is to be written beside the bytes of each slot, or must stand there."""
    tokens: bytes
    """Of the blocks, all full: as well.  None, if it is from slot to slot."""
    sources: BlockTable = _NONE
    """The slots of HOST that are to be copied to `slots`, and what stands beside them."""
    places: BlockTable = _NONE
    """Whose slots these are; who moves the bytes need not know."""
    names: bytes = b""
    """Of the objects that are to be fetched or stored, `NAME_BYTES` each; then there are no slots
    but those through which the bytes go."""
    keys: bytes = b""
    """To be written beside them, too, for another life; empty if none needs them."""


@dataclass(slots=True, eq=False)
class Restore:
    """A prefix that comes back."""

    lease: Lease
    verdict: Verdict
    due: float
    """When who waits for it does so no longer."""
    begun: float
    worked_s: float
    """What all that had come back had taken by then."""
    is_waited_for: bool
    """Whether it was begun for somebody; if not, to see how quick it is."""
    pieces: deque[HaulId] = field(default_factory=deque)
    """Hauls that have not ended, in order."""
    question: QuestionId | None = None
    """The question whose answer says what there is to be fetched, while it is out."""
    is_given_up: bool = False
    """Whether nobody waits for it any more: it is late, or a piece of it was not good."""
    is_broken: bool = False
    """Whether a piece was not good: nothing behind it can be indexed."""


class Hauls:
    """What is being moved, for whom.

    Args:
        tier: Where to and from.
        pool: Of the blocks.
        sizes: How much is kept free, and goes in one haul.
        block_size: Tokens of a block.
    """

    __slots__ = (
        "_down",
        "_dues",
        "_moves",
        "_need",
        "_new",
        "_next",
        "_out",
        "_taken",
        "_up",
        "_worked_s",
        "abandoned",
        "has_porter",
        "is_ending",
        "limit",
        "num_bad",
        "num_leaving",
        "num_moved",
        "num_restored",
        "num_restored_from_disk",
        "num_restored_from_remote",
        "num_rising",
        "num_sunk",
        "num_sunk_to_disk",
        "pool",
        "remote",
        "restores",
        "rising",
        "sizes",
        "tier",
        "worth",
    )

    def __init__(self, tier: Tier, pool: BlockPool, sizes: TierSizes, block_size: int) -> None:
        self.tier = tier
        self.pool = pool
        self.sizes = sizes
        self.worth = Worth(1 + REMOTE if sizes.remote else 2 if sizes.disk else 1, block_size)
        """What it costs to bring blocks back, and whether it is worth it."""
        self.abandoned: Callable[[Haul], None] | None = None
        """Is told of a haul whose blocks are about to be somebody else's."""
        self.has_porter = False
        """Whether there is anybody to move blocks."""
        self.is_ending = False
        """Whether the pool is about to be lost: then all of it goes down."""
        self.num_leaving = 0
        """Blocks that have left the tree, and are free once they are copied."""
        self.num_rising = 0
        """Blocks that are to be copied back."""
        self.rising = [0] * len(self.worth.speeds)
        """Of each tier, how many of them lie there."""
        self.num_sunk = self.num_restored = self.num_bad = 0
        """Since the start: blocks that were copied down, and back; and that were not good."""
        self.num_sunk_to_disk = self.num_moved = 0
        """Of those copied down, those that went to DISK at once; and those that went on there."""
        self.num_restored_from_disk = self.num_restored_from_remote = 0
        self.limit = WriteLimit(sizes.disk_per_s, sizes.piece)
        """How much may be written to DISK."""
        self.remote: Remote | None = None
        """What a store is asked that others have, too, if there is one."""
        if sizes.remote:
            self.remote = Remote(pool.num_blocks, block_size, sizes.remote)
        self.restores: dict[int, Restore] = {}
        """By the serial number of their leases."""
        self._new: list[Haul] = []
        self._down: dict[HaulId, Haul] = {}
        self._moves: dict[HaulId, Move] = {}
        self._up: dict[HaulId, tuple[Haul, Restore]] = {}
        self._dues: list[tuple[float, int]] = []
        self._need = 0.0
        self._taken = 0
        """Blocks that requests have taken since as many were free as there should be."""
        self._out: dict[HaulId, tuple[Storing, int]] = {}
        self._next = 0
        self._worked_s = [0.0, 0.0]
        """What all has taken that has come back: from this machine, and from elsewhere."""

    def take_new(self) -> list[Haul]:
        """Take the hauls to begin now, in order.  O(hauls)."""
        new, self._new = self._new, []
        return new

    def _haul(
        self,
        blocks: BlockTable,
        places: BlockTable,
        tokens: bytes,
        at: int,
        keys: bytes = b"",
        *,
        is_up: bool,
    ) -> Haul:
        """Make the haul of the next piece, from `at` on."""
        end, width = at + self.sizes.piece, len(tokens) // len(blocks)
        self._next += 1
        part = places[at:end]
        haul = Haul(
            HaulId(self._next),
            is_up,
            blocks[at:end],
            self.tier.slots(part),
            self.tier.stamps(part),
            tokens[at * width : end * width],
            places=part,
            keys=keys[at * KEY_BYTES : end * KEY_BYTES],
        )
        self._new.append(haul)
        return haul

    # ------------------------------------------------------------------ down

    def num_short(self, num_free: int) -> int:
        """Count the blocks that should go down now, so that as many are free as there should be.

        At the end of a service some at a time: what is on its way is lost if the porter ends.
        """
        if not self.has_porter:
            return 0
        short = self.ahead - num_free - self.num_leaving
        if self.is_ending:
            short = min(short, _MOST_MOVING * self.sizes.piece - self.num_leaving)
        return short

    def note_need(self, num_blocks: int) -> None:
        """Learn how many blocks requests take, before they do, the most of late.  O(1).

        It is what they take together before as many are free again as there should be: requests
        that come at the same time, or while the porter copies.  Where that is more than may be kept
        free he is too slow for them, and nothing is learnt but what one request takes.  It is
        forgotten by what is taken since, and not by how often: beside chats that come back together
        many others may ask for a block each.
        """
        taken = 0
        if self.pool.num_free > self.ahead - self.least:
            taken, self._taken = self._taken, 0
        self._taken += num_blocks
        most = max(num_blocks, taken if taken <= self.sizes.most_ahead else 0)
        if most > self._need:
            self._need = float(most)
        elif num_blocks:
            self._need -= (self._need - num_blocks) * num_blocks / (_FORGET * self._need)

    @property
    def ahead(self) -> int:
        """Blocks of the pool that are kept free now: few of them while no tier pays.  O(1).

        As many as the latest requests have taken at once, within bounds: what they must evict
        themselves is lost.
        """
        sizes = self.sizes
        if self.is_ending:
            return self.pool.num_blocks
        if not self.worth.pays:
            return max(min(1, sizes.ahead), sizes.ahead // _LESS)
        return max(sizes.ahead, min(math.ceil(self._need), sizes.most_ahead))

    @property
    def least(self) -> int:
        """Blocks that go down together at least: not one by one, and not too late."""
        if self.is_ending:
            return 1
        return min(self.sizes.piece, max(1, self.ahead // 4))

    def sink(self, sunk: list[Sunk]) -> None:
        """Have blocks copied that have left the tree.  O(blocks), in C."""
        if not sunk:
            return
        blocks = array("i", b"".join([one.blocks.tobytes() for one in sunk]))
        places = array("i", b"".join([one.places.tobytes() for one in sunk]))
        tokens = b"".join([one.tokens for one in sunk])
        keys = b"".join([one.keys for one in sunk])
        self.num_leaving += len(blocks)
        self.limit.spend(self.tier.count_disk(places))
        for at in range(0, len(blocks), self.sizes.piece):
            haul = self._haul(blocks, places, tokens, at, keys, is_up=False)
            self._down[haul.id] = haul

    def move_on(self, now: float) -> None:
        """Have the oldest blocks of HOST go on to DISK, as far as too few slots of it are free.

        O(blocks that move), in C.
        """
        tier, piece = self.tier, self.sizes.piece
        if not self.has_porter or not tier.num_disk or not tier.num_host:
            return
        while (room := _MOST_MOVING * piece - tier.num_moving) > 0:
            most = min(piece, room, self.limit.allowed(now))
            move = tier.begin_moving(most) if most > 0 else None
            if move is None:
                return
            self.limit.spend(len(move.places))
            self._next += 1
            haul = Haul(
                HaulId(self._next),
                is_up=False,
                blocks=_NONE,
                slots=move.slots,
                stamps=tier.stamps(move.places),
                tokens=b"",
                sources=move.sources,
                places=move.places,
            )
            self._moves[haul.id] = move
            self._new.append(haul)

    def abandon(self, num_blocks: int) -> None:
        """Free blocks that are leaving, the last ones first, since somebody needs them now.

        At least as many, or all.  O(blocks).
        """
        freed = 0
        for number, haul in reversed(self._down.items()):
            if freed >= num_blocks:
                return
            if not haul.blocks:
                continue
            if self.abandoned is not None:
                self.abandoned(haul)
            freed += self._free(haul)
            self._down[number] = haul._replace(blocks=_NONE)

    def spare(self, number: HaulId) -> bool:
        """Have a haul that has not begun never begin, if its blocks are somebody else's by now.

        Else the porter would copy what nobody may read, and come too late to what he still could
        save.  O(blocks).

        Returns:
            Whether it is over.
        """
        haul = self._down.get(number)
        if haul is None or haul.blocks:
            return False
        del self._down[number]
        self.limit.give_back(self.tier.count_disk(haul.places))
        self.tier.written(haul.places, 0)
        return True

    def _free(self, haul: Haul) -> int:
        """Let go of blocks that were leaving; give how many are free now.

        One that somebody copies from is his until he has.
        """
        self.num_leaving -= len(haul.blocks)
        return self.pool.release(haul.blocks)

    # ------------------------------------------------------------------ up

    def weigh(self, places: BlockTable, rate: Rate | None) -> list[Verdict]:
        """Say of each run of places on one tier, in order, whether it is worth to be brought back.

        Each as if those before it were being brought back.  Changes nothing.

        Args:
            places: What lies below of one prompt.
            rate: How long its namespace takes to compute; None: nobody knows.
        """
        queued, verdicts = self.rising[:REMOTE] + [0] * len(self.rising[REMOTE:]), []
        for tier, num_blocks in self.tier.runs(places):
            verdicts.append(self.worth.weigh(tier, num_blocks, queued, rate))
            queued[tier] += num_blocks
        return verdicts

    def weigh_remote(self, num_blocks: int, rate: Rate | None) -> Verdict:
        """Say whether so many blocks are worth to be fetched from elsewhere.  Changes nothing."""
        queued = [0] * REMOTE + self.rising[REMOTE:]  # what lies on this machine does not go there
        return self.worth.weigh(REMOTE, num_blocks, queued, rate)

    def begin_question(
        self, lease: Lease, tokens: bytes, verdict: Verdict, now: float, *, is_waited_for: bool
    ) -> None:
        """Ask which of the blocks behind the prefix of a lease can be fetched from elsewhere.

        Args:
            lease: The porter's; it has no blocks of its own yet.
            tokens: Up to the end of what is asked for.
            verdict: What was thought of it, if it is all there.
            now: The time.
            is_waited_for: Whether others may wait for it.
        """
        if self.remote is None:
            raise AssertionError("a question, and nobody to ask")
        due = now + self.remote.patience_s(tokens)
        restore = self._begin(lease, verdict, now, due, is_waited_for=is_waited_for)
        restore.question = self.remote.ask(lease, tokens)

    def begin_fetch(self, restore: Restore, names: bytes, tokens: bytes, now: float) -> None:
        """Have the blocks fetched that a question was asked for.

        Args:
            restore: Its lease has as many blocks of its own as there are names.
            names: Of the objects.
            tokens: Of these blocks.
            now: The time.
        """
        blocks = restore.lease.table[restore.lease.private_from :]
        restore.question = None
        restore.begun = now
        restore.worked_s = self._worked_s[True]
        restore.due = now + _AS_LONG_AGAIN * restore.verdict.fetch_s + SLACK_S
        if restore.is_waited_for:
            heappush(self._dues, (restore.due, restore.lease.serial))
        self.num_rising += len(blocks)
        self.rising[REMOTE] += len(blocks)
        for haul in self._named(blocks, names, tokens, is_up=True):
            self._up[haul.id] = (haul, restore)
            restore.pieces.append(haul.id)

    def begin_storing(
        self, storing: Storing, blocks: BlockTable, names: bytes, tokens: bytes
    ) -> None:
        """Have blocks stored elsewhere that a lease keeps.  O(blocks), in C."""
        for haul in self._named(blocks, names, tokens, is_up=False):
            self._out[haul.id] = (storing, len(haul.blocks))
            storing.num_left += 1

    def _named(self, blocks: BlockTable, names: bytes, tokens: bytes, *, is_up: bool) -> list[Haul]:
        """Make the hauls of blocks whose objects have these names."""
        piece, width, hauls = self.sizes.remote, len(tokens) // len(blocks), []
        for at in range(0, len(blocks), piece):
            end = at + piece
            self._next += 1
            hauls.append(
                Haul(
                    HaulId(self._next),
                    is_up,
                    blocks[at:end],
                    slots=_NONE,
                    stamps=_NO_STAMPS,
                    tokens=tokens[at * width : end * width],
                    names=names[at * NAME_BYTES : end * NAME_BYTES],
                )
            )
        self._new += hauls
        return hauls

    def begin_restore(
        self,
        lease: Lease,
        places: BlockTable,
        tokens: bytes,
        verdict: Verdict,
        now: float,
        *,
        is_waited_for: bool = True,
    ) -> None:
        """Have the blocks behind the prefix of a lease copied back, piece by piece.

        Args:
            lease: The porter's; its own blocks are as many as the places.
            places: Can be read; on one tier.
            tokens: Of these blocks.
            verdict: What was thought of it.
            now: The time.
            is_waited_for: Whether others may wait for it.
        """
        self.tier.begin_reading(places)
        self.num_rising += len(places)
        self.rising[verdict.tier] += len(places)
        due = now + _AS_LONG_AGAIN * verdict.fetch_s + SLACK_S
        restore = self._begin(lease, verdict, now, due, is_waited_for=is_waited_for)
        blocks = lease.table[lease.private_from :]
        for at in range(0, len(places), self.sizes.piece):
            haul = self._haul(blocks, places, tokens, at, is_up=True)
            self._up[haul.id] = (haul, restore)
            restore.pieces.append(haul.id)

    def _begin(
        self, lease: Lease, verdict: Verdict, now: float, due: float, *, is_waited_for: bool
    ) -> Restore:
        worked_s = self._worked_s[verdict.tier == REMOTE]
        restore = Restore(lease, verdict, due, now, worked_s, is_waited_for)
        restore.is_given_up = not is_waited_for
        self.restores[lease.serial] = restore
        if is_waited_for:
            heappush(self._dues, (due, lease.serial))
        return restore

    def overdue(self, now: float) -> Restore | None:
        """Give a restore for which nobody waits any longer from now on; None: there is none."""
        while self._dues and self._dues[0][0] < now:
            due, serial = heappop(self._dues)
            restore = self.restores.get(serial)
            if restore is None or restore.is_given_up or restore.due > due:
                continue
            restore.is_given_up = True
            if restore.question is None:
                self._learn_late(restore, now)
            return restore
        return None

    def _learn_late(self, late: Restore, now: float) -> None:
        """Learn from a restore that has not come back in time: of the haul that is in hand.

        From elsewhere blocks are fetched by somebody else.
        """
        far = late.verdict.tier == REMOTE
        all_up = self._up.values()
        in_hand, own = next(one for one in all_up if (one[1].verdict.tier == REMOTE) is far)
        idle_s = now - late.begun - (self._worked_s[far] - late.worked_s)
        self.worth.speeds[own.verdict.tier].note_late(len(in_hand.blocks), idle_s)

    def next_due(self) -> float | None:
        """Give a time before which none is overdue; None if there is none.  Amortised O(log)."""
        dues = self._dues
        while dues and ((restore := self.restores.get(dues[0][1])) is None or restore.is_given_up):
            heappop(dues)
        return dues[0][0] if dues else None

    # ------------------------------------------------------------------ ended

    def end(
        self, number: HaulId, num_good: int, seconds: float, now: float
    ) -> tuple[Restore, int] | None:
        """Take note that a haul has ended.  One that is not known changes nothing.

        Args:
            number: Which.
            num_good: Its blocks, from the first on, that are what they should be.
            seconds: What it took.
            now: The time.

        Returns:
            The restore of which it was a piece, and how many of its blocks may be indexed.
        """
        if (down := self._down.pop(number, None)) is not None:
            num_good = num_good if down.blocks else 0
            self.num_sunk += num_good
            self.num_sunk_to_disk += self.tier.count_disk(down.places[:num_good])
            self.tier.written(down.places, num_good)
            self._free(down)
            return None
        if (move := self._moves.pop(number, None)) is not None:
            self.num_moved += num_good
            self.tier.moved(move, num_good)
            return None
        if number not in self._up:
            return None
        haul, restore = self._up.pop(number)
        tier = restore.verdict.tier
        num_usable = 0 if restore.is_broken else num_good
        if haul.names:
            self.num_restored_from_remote += num_usable
        else:
            self.num_restored_from_disk += self.tier.count_disk(haul.places[:num_usable])
            self.tier.end_reading(haul.places, num_good)
            self.tier.consume(haul.places[:num_usable] + haul.places[num_good:])
        self.num_rising -= len(haul.blocks)
        self.rising[tier] -= len(haul.blocks)
        restore.pieces.remove(number)
        self._worked_s[tier == REMOTE] += seconds
        speed = self.worth.speeds[tier]
        note = speed.note_explored if restore.is_given_up else speed.note
        note(len(haul.blocks), seconds)
        if not restore.pieces:
            self._learn(restore, now)
        if num_good < len(haul.blocks):
            if not haul.names:
                self.num_bad += len(haul.blocks) - num_good
            restore.is_broken = restore.is_given_up = True
        self.num_restored += num_usable
        return restore, num_usable

    def stored(self, number: HaulId, num_good: int) -> Storing | None:
        """Take note that a haul to elsewhere has ended.

        Returns:
            What is stored with that; None if it is not known, or others of it have not ended.
        """
        if number not in self._out or self.remote is None:
            return None
        storing, num_blocks = self._out.pop(number)
        storing.num_left -= 1
        self.remote.num_stored += num_good
        self.remote.num_unstored += num_blocks - num_good
        return None if storing.num_left else storing

    def _learn(self, over: Restore, now: float) -> None:
        """Learn from a restore that is over."""
        speed, compute_s = self.worth.speeds[over.verdict.tier], over.verdict.compute_s
        took_s = now - over.begun
        worked_s = self._worked_s[over.verdict.tier == REMOTE] - over.worked_s
        speed.note_restore(took_s - worked_s)
        if not over.is_given_up:
            speed.trust()
        if compute_s is not None and not over.is_given_up:
            speed.note_gain(took_s, compute_s)

    def lose_all(self) -> list[Restore]:
        """Take note that who moves blocks has ended: nothing that he had in hand goes on.

        What was being written is not good; what was being read is as it was.

        Returns:
            The restores that were not over.
        """
        self._new = []
        for down in self._down.values():
            self.tier.written(down.places, 0)
            self._free(down)
        self._down = {}
        for move in self._moves.values():
            self.tier.moved(move, 0)
        self._moves = {}
        for haul, _ in self._up.values():
            self.tier.end_reading(haul.places, len(haul.places))
        self._up, self._out, self.num_rising = {}, {}, 0
        self.rising = [0] * len(self.rising)
        lost = list(self.restores.values())
        for restore in lost:
            restore.pieces.clear()
            restore.question = None
            restore.is_given_up = True
        self._dues = []
        return lost

    # ------------------------------------------------------------------ invariants

    def leaving(self) -> BlockTable:
        """Give the blocks that have left the tree, and are not free yet.  O(these)."""
        return array("i", b"".join([one.blocks.tobytes() for one in self._down.values()]))

    def busy(self) -> BlockTable:
        """Give the places that are written to or read.  O(these)."""
        hauls = [*self._down.values(), *(haul for haul, _ in self._up.values())]
        return array("i", b"".join([one.places.tobytes() for one in hauls]))

    def moving(self) -> BlockTable:
        """Give the places that are on their way from HOST to DISK.  O(these)."""
        return array("i", b"".join([one.places.tobytes() for one in self._moves.values()]))

    def check(self) -> None:
        """Assert that the counts are those of the hauls.  O(hauls)."""
        leaving = sum(len(one.blocks) for one in self._down.values())
        assert self.num_leaving == leaving, f"{leaving} blocks leave, not {self.num_leaving}"
        rising = sum(len(one.blocks) for one, _ in self._up.values())
        assert self.num_rising == rising, f"{rising} blocks rise, not {self.num_rising}"
        assert sum(self.rising) == rising, f"{rising} blocks rise, by tier {self.rising}"
        pieces: dict[HaulId, int] = {}
        for serial, restore in self.restores.items():
            assert restore.lease.serial == serial, "a restore under another number"
            is_asked = restore.question is not None
            assert bool(restore.pieces) is not is_asked, f"restore {serial} is over"
            if is_asked and self.remote is not None:
                known = (restore.question, restore.lease) in self.remote.asking.items()
                assert known, f"{serial} asks nothing"
            pieces.update(dict.fromkeys(restore.pieces, serial))
        assert pieces.keys() == self._up.keys(), "pieces of no restore"
        if self.remote is not None:
            self._check_remote(self.remote)

    def _check_remote(self, remote: Remote) -> None:
        remote.check()
        asking = {lease.serial for lease in remote.asking.values()}
        assert asking <= self.restores.keys(), "a question of nobody's"
        storing = {id(one): one for one, _ in self._out.values()}
        assert len(storing) <= 1, "more than one prefix is being stored"
        for one in storing.values():
            assert one is remote.storing, "a prefix is stored that nobody waits for"
            assert one.num_left == len(self._out), "hauls of what is being stored"
