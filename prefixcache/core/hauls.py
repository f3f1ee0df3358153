"""Hauls: blocks on their way between the pool and the tier below it.

```
            sink                         ended
pool  ────────────► leaving ───────────────────────► slot can be read, block is free
                       └ abandoned: somebody needs the block now; the slot is not good

            begin_restore                pieces end
slots ────────────► in flight ─────────────────────► indexed, piece by piece
                       └ late or not good: who waits computes the rest
```

**Down.**  Victims leave the tree before anybody needs their blocks, and are free once they have
been copied, so nobody ever waits for a copy.  Who needs blocks that are still leaving gets them at
once: the copy is read by nobody then.

**Up.**  A restore is a lease on the prefix, of a worker that nobody else is: the porter.  So it is
in flight like any other, and others wait for it.  Its blocks are the porter's until each haul into
them has ended, or his process has: only then has nobody a right to write there.

Who moves the bytes is not known here.  It is given hauls, in order, and tells of each one when it
has ended, and how many of its blocks, from the first on, were found to be what they should be.
"""

from __future__ import annotations

from array import array
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Final, NamedTuple

from prefixcache.core.block_pool import BlockPool
from prefixcache.core.lease import Lease
from prefixcache.core.radix_tree import Sunk
from prefixcache.core.tiers import Stamps, Tier
from prefixcache.core.worth import Rate, Verdict, Worth
from prefixcache.types import BlockTable, HaulId, WorkerId

PORTER: Final = WorkerId(-(2**31))
"""Under which number the leases of restores are: no worker has it."""

NEVER: Final = 1e12
"""The time at which the leases of restores end by themselves."""

_SLACK_S: Final = 0.05
_AS_LONG_AGAIN: Final = 2.0
"""Who waits for a restore waits so many times as long as it is expected to take, and the slack."""


class TierSizes(NamedTuple):
    """What there is below the pool.

    >>> TierSizes.of(host=100_000, num_blocks=5_825)
    TierSizes(host=100000, ahead=364, piece=16)
    """

    host: int = 0
    """Blocks that fit; 0: there is nothing below the pool."""
    ahead: int = 0
    """Blocks of the pool that are kept free, since the oldest ones go down ahead of need."""
    piece: int = 16
    """Blocks of one haul at most: who waits for one waits no longer than this takes."""

    @property
    def least(self) -> int:
        """Blocks that go down together at least: not one by one, and not too late."""
        return min(self.piece, max(1, self.ahead // 4))

    @classmethod
    def of(cls, host: int, num_blocks: int) -> TierSizes:
        """Give what suits a pool: a sixteenth of it is kept free, 64 to 2,048 blocks.

        Of a small one it is an eighth.
        """
        return cls(host, min(max(num_blocks // 16, 64), num_blocks // 8, 2048), 16)


class Haul(NamedTuple):
    """An order to copy some blocks."""

    id: HaulId
    is_up: bool
    """Whether from slots into the pool."""
    blocks: BlockTable
    slots: BlockTable
    """As many."""
    stamps: Stamps
    """What is to be written beside the bytes of each slot, or must stand there."""
    tokens: bytes
    """Of the blocks, all full: as well."""


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
    pieces: deque[HaulId] = field(default_factory=deque)
    """Hauls that have not ended, in order."""
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
        "_new",
        "_next",
        "_up",
        "_worked_s",
        "has_porter",
        "num_bad",
        "num_leaving",
        "num_restored",
        "num_rising",
        "num_sunk",
        "pool",
        "restores",
        "sizes",
        "tier",
        "worth",
    )

    def __init__(self, tier: Tier, pool: BlockPool, sizes: TierSizes, block_size: int) -> None:
        self.tier = tier
        self.pool = pool
        self.sizes = sizes
        self.worth = Worth(1, block_size)
        """What it costs to bring blocks back, and whether it is worth it."""
        self.has_porter = False
        """Whether there is anybody to move blocks."""
        self.num_leaving = 0
        """Blocks that have left the tree, and are free once they are copied."""
        self.num_rising = 0
        """Blocks that are to be copied back."""
        self.num_sunk = self.num_restored = self.num_bad = 0
        """Since the start: blocks that were copied down, and back; and that were not good."""
        self.restores: dict[int, Restore] = {}
        """By the serial number of their leases."""
        self._new: list[Haul] = []
        self._down: dict[HaulId, Haul] = {}
        self._up: dict[HaulId, tuple[Haul, Restore]] = {}
        self._dues: list[tuple[float, int]] = []
        self._next = 0
        self._worked_s = 0.0

    def take_new(self) -> list[Haul]:
        """Take the hauls to begin now, in order.  O(hauls)."""
        new, self._new = self._new, []
        return new

    def _haul(
        self, blocks: BlockTable, slots: BlockTable, tokens: bytes, at: int, *, is_up: bool
    ) -> Haul:
        """Make the haul of the next piece, from `at` on."""
        end, width = at + self.sizes.piece, len(tokens) // len(blocks)
        self._next += 1
        part = slots[at:end]
        stamps = self.tier.stamps(part)
        cut = tokens[at * width : end * width]
        haul = Haul(HaulId(self._next), is_up, blocks[at:end], part, stamps, cut)
        self._new.append(haul)
        return haul

    # ------------------------------------------------------------------ down

    def num_short(self, num_free: int) -> int:
        """Count the blocks that should go down now, so that as many are free as there should be."""
        return self.sizes.ahead - num_free - self.num_leaving if self.has_porter else 0

    def sink(self, sunk: list[Sunk]) -> None:
        """Have blocks copied that have left the tree.  O(blocks), in C."""
        if not sunk:
            return
        blocks = array("i", b"".join([one.blocks.tobytes() for one in sunk]))
        slots = array("i", b"".join([one.slots.tobytes() for one in sunk]))
        tokens = b"".join([one.tokens for one in sunk])
        self.num_leaving += len(blocks)
        for at in range(0, len(blocks), self.sizes.piece):
            haul = self._haul(blocks, slots, tokens, at, is_up=False)
            self._down[haul.id] = haul

    def abandon(self, num_blocks: int) -> None:
        """Free blocks that are leaving, the last ones first, since somebody needs them now.

        At least as many, or all.  O(blocks).
        """
        freed = 0
        for number in reversed(list(self._down)):
            if freed >= num_blocks:
                return
            haul = self._down[number]
            freed += self._free(haul)
            self._down[number] = haul._replace(blocks=array("i"))

    def _free(self, haul: Haul) -> int:
        """Let go of blocks that were leaving; give how many are free now.

        One that somebody copies from is his until he has.
        """
        self.num_leaving -= len(haul.blocks)
        return self.pool.release(haul.blocks)

    # ------------------------------------------------------------------ up

    def weigh(self, slots: BlockTable, rate: Rate | None) -> list[Verdict]:
        """Say of each run of slots on one tier, in order, whether it is worth to be brought back.

        Each as if those before it were being brought back.  Changes nothing.

        Args:
            slots: What lies below of one prompt.
            rate: How long its namespace takes to compute; None: nobody knows.
        """
        return [self.worth.weigh(0, len(slots), [self.num_rising], rate)] if slots else []

    def begin_restore(
        self,
        lease: Lease,
        slots: BlockTable,
        tokens: bytes,
        verdict: Verdict,
        now: float,
        *,
        is_waited_for: bool = True,
    ) -> None:
        """Have the blocks behind the prefix of a lease copied back, piece by piece.

        Args:
            lease: The porter's; its own blocks are as many as the slots.
            slots: Can be read; on one tier.
            tokens: Of these blocks.
            verdict: What was thought of it.
            now: The time.
            is_waited_for: Whether others may wait for it.
        """
        self.tier.begin_reading(slots)
        self.num_rising += len(slots)
        due = now + _AS_LONG_AGAIN * verdict.fetch_s + _SLACK_S
        restore = Restore(lease, verdict, due, now, self._worked_s, is_given_up=not is_waited_for)
        self.restores[lease.serial] = restore
        if is_waited_for:
            heappush(self._dues, (due, lease.serial))
        blocks = lease.table[lease.private_from :]
        for at in range(0, len(slots), self.sizes.piece):
            haul = self._haul(blocks, slots, tokens, at, is_up=True)
            self._up[haul.id] = (haul, restore)
            restore.pieces.append(haul.id)

    def overdue(self, now: float) -> Restore | None:
        """Give a restore for which nobody waits any longer from now on; None: there is none."""
        while self._dues and self._dues[0][0] < now:
            restore = self.restores.get(heappop(self._dues)[1])
            if restore is not None and not restore.is_given_up:
                restore.is_given_up = True
                self._learn_late(restore, now)
                return restore
        return None

    def _learn_late(self, late: Restore, now: float) -> None:
        """Learn from a restore that has not come back in time: of the haul that is in hand."""
        in_hand, own = next(iter(self._up.values()))
        idle_s = now - late.begun - (self._worked_s - late.worked_s)
        self.worth.speeds[own.verdict.tier].note_late(len(in_hand.slots), idle_s)

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
            self.tier.written(down.slots, num_good if down.blocks else 0)
            self.num_sunk += min(num_good, len(down.blocks))
            self._free(down)
            return None
        if number not in self._up:
            return None
        haul, restore = self._up.pop(number)
        self.tier.end_reading(haul.slots, num_good)
        self.num_rising -= len(haul.slots)
        restore.pieces.remove(number)
        self._worked_s += seconds
        self.worth.speeds[restore.verdict.tier].note(len(haul.slots), seconds)
        if not restore.pieces:
            self._learn(restore, now)
        num_usable = 0 if restore.is_broken else num_good
        if num_good < len(haul.slots):
            self.num_bad += len(haul.slots) - num_good
            restore.is_broken = restore.is_given_up = True
        self.num_restored += num_usable
        return restore, num_usable

    def _learn(self, over: Restore, now: float) -> None:
        """Learn from a restore that is over."""
        speed, compute_s = self.worth.speeds[over.verdict.tier], over.verdict.compute_s
        took_s = now - over.begun
        speed.note_restore(took_s - (self._worked_s - over.worked_s))
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
            self.tier.written(down.slots, 0)
            self._free(down)
        self._down = {}
        for haul, _ in self._up.values():
            self.tier.end_reading(haul.slots, len(haul.slots))
        self._up, self.num_rising = {}, 0
        lost = list(self.restores.values())
        for restore in lost:
            restore.pieces.clear()
            restore.is_given_up = True
        self._dues = []
        return lost

    # ------------------------------------------------------------------ invariants

    def leaving(self) -> BlockTable:
        """Give the blocks that have left the tree, and are not free yet.  O(these)."""
        return array("i", b"".join([one.blocks.tobytes() for one in self._down.values()]))

    def busy(self) -> BlockTable:
        """Give the slots that are written to or read.  O(these)."""
        hauls = [*self._down.values(), *(haul for haul, _ in self._up.values())]
        return array("i", b"".join([one.slots.tobytes() for one in hauls]))

    def check(self) -> None:
        """Assert that the counts are those of the hauls.  O(hauls)."""
        leaving = sum(len(one.blocks) for one in self._down.values())
        assert self.num_leaving == leaving, f"{leaving} blocks leave, not {self.num_leaving}"
        rising = sum(len(one.slots) for one, _ in self._up.values())
        assert self.num_rising == rising, f"{rising} blocks rise, not {self.num_rising}"
        pieces: dict[HaulId, int] = {}
        for serial, restore in self.restores.items():
            assert restore.lease.serial == serial, "a restore under another number"
            assert restore.pieces, f"restore {serial} is over"
            pieces.update(dict.fromkeys(restore.pieces, serial))
        assert pieces.keys() == self._up.keys(), "pieces of no restore"
