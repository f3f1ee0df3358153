"""Tiers: slots below the pool, in which evicted blocks lie until they are asked for again.

```
              take               written                      begin_reading       end_reading
   FREE ────────────► BUSY ─────────────────► READY ───────────────────► BUSY ───────────────► READY
     ▲                  │ not good: nobody may read it    ▲  │           └ not good: the same
     │                  │                           moved │  ▼ begin_moving
     │                  │                                MOVING: copied from HOST to DISK
     └──────────────────┴─ let_go: its ghost is forgotten, revived, or the oldest; at once, or when
                           the hauls that are busy with the place have ended
```

A **place** is what a ghost has for each of its first blocks (`node.places`), and keeps for as long
as the block lies below the pool.  In which **slot** the bytes lie is known here alone: those of
HOST come first, then those of DISK; a block that goes on from the one to the other keeps its place.
Tiers are exclusive: what comes back to the pool gives its places up, so pool and tiers hold as much
as one pool of their summed size.

**The order** is that of burial, and within a run from its end, whichever slots they have: so blocks
are given up exactly as they would have left a larger pool under LRU.  Where several tenants have
some, those go first who have more than is kept for them (`holdings.py`), of all places, and of the
slots of HOST by themselves, which others of theirs leave for DISK.  Some slots of HOST are kept
free, since its oldest blocks go on to DISK ahead of need.  Ghosts of one chain are joined only if
they were buried one after the other.

```
buried       1  [CCCC]        2  [AAAA|BBBB]         taken back   CCCC, BBBB, AAAA
places          5                7    2                           5     2     7
slots           DISK             HOST HOST
```

**A stamp** is a number that each writing of a block has for itself.  Who writes a slot writes the
stamp beside the bytes, who reads it compares: a slot that holds what was there before, or another
slot's bytes, is found out, whatever its checksum says.

**What was found** (`found.py`) is what an earlier life left on DISK.  Its places belong to no
ghost: they are looked up by the keys of blocks, given up before anything that was buried in this
life, and let go when what lies there has come back to the pool, or goes down from it anew.  No
listener hears of them: until somebody asks for a prefix nobody knows whose it is.

**Who listens** hears where blocks lie: that one has been given a slot, before it leaves the pool,
that it has another one, before it leaves that, and that a slot holds it no more, after it has come
back.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import IntEnum
from typing import Final, NamedTuple, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from prefixcache.core.block_keys import Keys
from prefixcache.core.found import Found, Remains
from prefixcache.core.holdings import Holding, Holdings
from prefixcache.core.node import Node, Root
from prefixcache.types import BlockTable, HoldingInfo, Namespace

Stamps: TypeAlias = "array[int]"
"""`array('q')`: what stands beside the bytes of each slot."""

Places: TypeAlias = "array[int]"
"""`array('q')`: where blocks lie, as listeners are told: a `Level` times 2^32, and the number of a
slot there; in the pool the block's id.  `NOWHERE` is none."""

NOWHERE: Final = -1
LEVEL_BITS: Final = 32


class Level(IntEnum):
    """What blocks lie in, from the top."""

    POOL = 0
    HOST = 1
    DISK = 2

    def places(self, numbers: BlockTable) -> Places:
        """Give the places of blocks or slots of this level.  O(numbers), in C.

        >>> Level.HOST.places(array("i", [0, 5])).tolist()
        [4294967296, 4294967301]
        """
        if self is Level.POOL:
            return array("q", numbers)
        return array("q", (_index(numbers) + (int(self) << LEVEL_BITS)).tobytes())


class PlaceListener(Protocol):
    """What hears where blocks lie below the pool, in order and at once; must be quick.

    It is told beside an `IndexListener`, which hears of the pool: what is copied is at a place that
    one of the two has heard of.
    """

    def copied(self, namespace: Namespace, sources: Places, places: Places) -> None:
        """Hear that blocks lie, or are about to, at other places, too.

        Of blocks that come back to the pool it is told just before they are stored there.

        Args:
            namespace: Whose blocks.
            sources: Where each of them lies.
            places: As many, of one level; each held nothing.
        """

    def lost(self, places: Places) -> None:
        """Hear that some places hold nothing any more that could be found.

        Those of a namespace that was cleared may be among them: nothing was found there.
        """

    def found(
        self, namespace: Namespace, parent: int | None, tokens: bytes, places: Places
    ) -> None:
        """Hear, in a replay, where a run of blocks lies.

        Args:
            namespace: Whose blocks.
            parent: A place, told before, of the block that holds the tokens before; None: they are
                the first.
            tokens: Packed tokens of the run, all blocks full.
            places: Of each block; `NOWHERE` of one that is named for what follows it.
        """


_OWNED, _READY, _BUSY, _MOVING, _FOUND = 1, 2, 4, 8, 16
_SWEPT = 64
"""Ghosts of what was reset that are looked at when places are taken, beside one for each."""


_MOVED = 16
"""Blocks that go on to DISK together at least, or a quarter of what is kept free there."""


class Move(NamedTuple):
    """Blocks that are to go on from HOST to DISK."""

    places: BlockTable
    sources: BlockTable
    """The slots in which they lie."""
    slots: BlockTable
    """Those in which they are to lie."""
    roots: list[tuple[Root, int]]
    """Whose they are, and how many in a row."""


class Tier:
    """The places below a pool, who has them, and which are given up first.

    Args:
        num_host: Blocks that fit into memory of the host.
        block_bytes: Bytes of a block's packed tokens.
        num_disk: Blocks that fit on the disk, below that.
        host_ahead: Slots of HOST that are kept free, if there is a disk.
    """

    __slots__ = (
        "_block_bytes",
        "_found",
        "_free",
        "_free_disk",
        "_free_host",
        "_guaranteed",
        "_next_stamp",
        "_slots",
        "_stamps",
        "_states",
        "_sweeps",
        "_targets",
        "_tenants",
        "_upper",
        "bared",
        "holdings",
        "host_ahead",
        "is_ending",
        "listener",
        "num_disk",
        "num_found",
        "num_given_up",
        "num_host",
        "num_moving",
        "num_slots",
    )

    def __init__(
        self, num_host: int, block_bytes: int, num_disk: int = 0, host_ahead: int = 0
    ) -> None:
        self.num_host = num_host
        self.num_disk = num_disk
        self.host_ahead = host_ahead if num_disk else 0
        self.is_ending = False
        """Whether memory is about to be lost: then everything goes to DISK."""
        self.num_slots = num_host + num_disk - self.host_ahead
        """Places: as many blocks lie here at most."""
        self._block_bytes = block_bytes
        self._free: BlockTable = array("i", range(self.num_slots - 1, -1, -1))
        self._free_host: BlockTable = array("i", range(num_host - 1, -1, -1))
        self._free_disk: BlockTable = array("i", range(num_host + num_disk - 1, num_host - 1, -1))
        self._states = np.zeros(self.num_slots, np.uint8)
        self._slots = np.full(self.num_slots, -1, np.int32)
        self._targets = np.full(self.num_slots, -1, np.int32)
        """Of what is moving: where to."""
        self._stamps = np.zeros(self.num_slots, np.int64)
        self._next_stamp = 1
        self._found: Found | None = None
        self.num_found = 0
        """Blocks that an earlier life left on DISK, and nobody has asked for since."""
        self._sweeps: list[Iterator[Node]] = []
        self.holdings = Holdings()
        """Ghosts that have places, and how many places each tenant has."""
        self._upper = Holdings()
        """Those of them that may have slots of HOST, if there is a disk; and how many blocks of
        each tenant lie there that are not on their way to DISK."""
        self._tenants: frozenset[str] = frozenset()
        self._guaranteed: tuple[Mapping[str, int], int] = ({}, 1)
        self.bared: Callable[[Node], None] | None = None
        """Is told of a ghost that has lost its last place."""
        self.num_given_up = 0
        """Blocks that were given up for younger ones, since the start."""
        self.num_moving = 0
        """Blocks that are on their way from HOST to DISK."""
        self.listener: PlaceListener | None = None
        """Who is told what is copied to its slots, and lost there."""

    @property
    def num_free(self) -> int:
        """Places that hold nothing.  O(1)."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Places that hold something, or are being written or read.  O(1)."""
        return self.num_slots - len(self._free)

    @property
    def num_host_used(self) -> int:
        """Slots of HOST that hold something, or are being written or read.  O(1)."""
        return self.num_host - len(self._free_host)

    @property
    def num_disk_used(self) -> int:
        """Slots of DISK that hold something, or are being written or read.  O(1)."""
        return self.num_disk - len(self._free_disk)

    # ------------------------------------------------------------------ tenants

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part is kept: nobody, if there is only one.  O(tenants)."""
        self._tenants = frozenset(tenants) if len(tenants) > 1 else frozenset()
        self._share_out()

    def set_guaranteed(self, guaranteed: Mapping[str, int], pool_blocks: int) -> None:
        """Say how many of the pool's blocks are guaranteed to whom: as large a part of this is.

        O(tenants).
        """
        self._guaranteed = guaranteed, pool_blocks
        self._share_out()

    def _share_out(self) -> None:
        """Keep for each what is guaranteed to it, and its part of half of what is to nobody."""
        ahead = 0 if self.is_ending else self.host_ahead
        guaranteed, of = self._guaranteed
        shared = ((self.holdings, self.num_slots), (self._upper, self.num_host - ahead))
        for holdings, num_blocks in shared:
            kept = {name: count * num_blocks // of for name, count in guaranteed.items()}
            if self._tenants:
                each = (num_blocks - sum(kept.values())) // (2 * len(self._tenants))
                for name in self._tenants:
                    kept[name] = kept.get(name, 0) + each
            holdings.keep(kept)

    @property
    def _has_both(self) -> bool:
        return self.num_host > 0 and self.num_disk > 0

    def holding(self, tenant: str) -> HoldingInfo:
        """Tell what a tenant has, and what is kept for it.  O(1)."""
        host = self.num_host_of(tenant)
        held, kept = self.holdings.num_blocks(tenant), self.holdings.kept(tenant)
        return HoldingInfo(tenant, host, self.num_host_kept(tenant), held - host, kept)

    def num_host_of(self, tenant: str) -> int:
        """Give how many blocks of a tenant lie in HOST, but for those on their way on.  O(1)."""
        if self._has_both:
            return self._upper.num_blocks(tenant)
        return self.holdings.num_blocks(tenant) if self.num_host else 0

    def num_host_kept(self, tenant: str) -> int:
        """Give how many blocks of HOST are kept for a tenant.  O(1)."""
        holdings = self._upper if self._has_both else self.holdings
        return holdings.kept(tenant) if self.num_host else 0

    def _count(self, ghost: Node, places: BlockTable, sign: int) -> None:
        """Count places as a tenant's, or no longer.  O(places), in C."""
        tenant = ghost.root.namespace.tenant
        self.holdings.add(tenant, sign * len(places))
        if self._has_both:
            index = _index(places)
            in_host = self._slots[index] < self.num_host
            if self.num_moving and sign < 0:  # what is being buried does not move
                in_host &= (self._states[index] & _MOVING) == 0
            if count := int(np.count_nonzero(in_host)):
                self._upper.add(tenant, sign * count)

    # ------------------------------------------------------------------ places

    def take(self, count: int, num_disk: int = 0) -> BlockTable:
        """Take up to `count` places, to be written to: free ones, then those of the oldest blocks.

        Their slots are of HOST, as far as any is free, then of DISK.  Where nothing may be written
        to DISK, the oldest blocks in HOST are given up.  Fewer if others are being written to.
        O(count + ghosts that lose places).

        Args:
            count: How many.
            num_disk: How many blocks may be written to DISK now.
        """
        free = self._free
        if self._sweeps and len(free) < count:
            self._sweep(_SWEPT + count)
        if num_disk or not self.num_disk:
            while (short := count - self._num_room) > 0 and self._give_up(short):
                pass
        slots = self._pop_slots(min(count, len(free)), num_disk)
        while self.num_disk and self.num_host and (short := count - len(slots)) > 0:
            if self.is_ending or not self._give_up_host(short):
                break
            more = self._pop_slots(min(short, len(free) - len(slots)), 0)
            if not more:
                break  # what was given up is still being read
            slots += more
        cut = len(free) - len(slots)
        places = free[cut:]
        del free[cut:]
        index = _index(places)
        self._slots[index] = slots
        self._states[index] = _OWNED | _BUSY
        return places

    @property
    def _num_room(self) -> int:
        """Blocks that could be written to places now."""
        num_free = len(self._free)
        return min(num_free, len(self._free_disk)) if self.is_ending else num_free

    def _pop_slots(self, count: int, num_disk: int) -> BlockTable:
        """Take free slots: of HOST, then up to `num_disk` of DISK."""
        slots = _pop(self._free_host, 0 if self.is_ending else count)
        if count > len(slots):
            slots += _pop(self._free_disk, min(count - len(slots), num_disk))
        return slots

    def give_back(self, places: BlockTable) -> None:
        """Give places back that were taken, and not written to."""
        self._vacate(_index(places))

    def stamps(self, places: BlockTable) -> Stamps:
        """Give what stands, or is to stand, beside the bytes of blocks.  O(places)."""
        return array("q", self._stamps[_index(places)].tobytes())

    def slots(self, places: BlockTable) -> BlockTable:
        """Give where the bytes of blocks lie, or are to lie.  O(places)."""
        return array("i", self._slots[_index(places)].tobytes())

    def count_disk(self, places: BlockTable) -> int:
        """Count the blocks that lie on DISK.  O(places)."""
        return int((self._slots[_index(places)] >= self.num_host).sum())

    def runs(self, places: BlockTable) -> list[tuple[int, int]]:
        """Give the tiers of blocks in a row, 0 for HOST and 1 for DISK, and how many lie there.

        O(places), in C, and a step for each run.
        """
        if not places:
            return []
        on_disk = self._slots[_index(places)] >= self.num_host
        starts = [0, *(np.flatnonzero(on_disk[1:] != on_disk[:-1]) + 1).tolist()]
        ends = [*starts[1:], len(places)]
        return [(int(on_disk[start]), end - start) for start, end in zip(starts, ends, strict=True)]

    def written(self, places: BlockTable, num_good: int) -> None:
        """Note that a haul into places has ended; the first `num_good` may be read.  O(places)."""
        self._end(places, num_good, _READY)

    def begin_reading(self, places: BlockTable) -> None:
        """Keep places from being lent to others until `end_reading`.  O(places)."""
        self._states[_index(places)] |= _BUSY

    def end_reading(self, places: BlockTable, num_good: int) -> None:
        """Note that a haul from places has ended; what lies in the others is not what it should."""
        self._end(places, num_good, 0)

    def _end(self, places: BlockTable, num_good: int, more: int) -> None:
        index = _index(places)
        states = self._states[index] & ~np.uint8(_BUSY)
        if num_good < len(places) and self.listener is not None:
            self._tell_lost(index[num_good:][(states[num_good:] & (_OWNED | _FOUND)) == _OWNED])
        states[num_good:] &= ~np.uint8(_READY)
        states[:num_good] |= more
        self._states[index] = states
        self._vacate(index[(states & (_OWNED | _MOVING)) == 0])

    def let_go(self, places: BlockTable) -> None:
        """Let a ghost's places go: free now, or when a haul that is busy with them ends."""
        index = _index(places)
        states = self._states[index] & (_BUSY | _MOVING)
        self._states[index] = states
        self._vacate(index if not states.any() else index[states == 0])

    def _vacate(self, index: npt.NDArray[np.intp]) -> None:
        """Make places free that nobody has and no haul is busy with, and their slots."""
        self._states[index] = 0
        slots = self._slots[index]
        self._slots[index] = -1
        self._free.frombytes(index.astype(np.int32).tobytes())
        self._free_slots(slots)

    def _free_slots(self, slots: npt.NDArray[np.int32]) -> None:
        if not self.num_disk:
            self._free_host.frombytes(slots.tobytes())
            return
        is_host = slots < self.num_host
        self._free_host.frombytes(slots[is_host].tobytes())
        self._free_disk.frombytes(slots[~is_host].tobytes())

    def count_readable(self, places: BlockTable) -> int:
        """Count the leading places that can be read now.  Changes nothing.  O(places), in C."""
        bad = (self._states[_index(places)] & ~np.uint8(_MOVING | _FOUND)) != _OWNED | _READY
        return int(bad.argmax()) if bad.any() else len(places)

    # ------------------------------------------------------------------ what was found

    def adopt(self, remains: Remains) -> int:
        """Take over what an earlier life left on DISK.  Only while nothing lies here.

        O(slots log slots), in C; less if they are sorted (`Remains.newest`).

        Args:
            remains: Slots from before; of those that hold the same block, the newest counts.

        Returns:
            How many blocks can be found now.

        Raises:
            ValueError: A slot is named that there is not.
        """
        if len(remains.slots) == 0:
            return 0
        low, high = int(remains.slots.min()), int(remains.slots.max())
        if low < 0 or high >= self.num_disk:
            raise ValueError(f"slots {low} to {high} of {self.num_disk}")
        if self.num_used:
            raise ValueError(f"{self.num_used} places are in use")
        self._next_stamp = int(remains.stamps.max()) + 1
        remains = remains.newest()
        slots = remains.slots + np.int32(self.num_host)
        is_free = np.ones(self.num_disk, bool)
        is_free[remains.slots] = False
        free = np.flatnonzero(is_free)[::-1].astype(np.int32) + np.int32(self.num_host)
        self._free_disk = array("i", free.tobytes())
        places = np.array(_pop(self._free, len(slots)), np.int32)
        self._states[places] = _OWNED | _READY | _FOUND
        self._slots[places] = slots
        self._stamps[places] = remains.stamps
        self._found = Found(remains.keys, places, remains.stamps)
        self.num_found = len(places)
        return self.num_found

    def find(self, keys: Keys) -> BlockTable:
        """Give the places in which blocks were found that can be read now, up to a gap.

        Changes nothing.  O(keys · log of those found), in C.
        """
        if self._found is None:
            return array("i")
        places = self._found.look(keys)
        readable = (self._states[places] == _OWNED | _READY | _FOUND) & (places >= 0)
        end = len(places) if readable.all() else int(readable.argmin())
        return array("i", places[:end].tobytes())

    def supersede(self, keys: Keys) -> None:
        """Let go what was found of blocks that are about to lie here anew.  O(keys · log), in C."""
        if self._found is not None:
            places = self._found.look(keys)
            self._let_found_go(places[places >= 0])

    def consume(self, places: BlockTable) -> None:
        """Let go what was found in some places: it is in the pool, or not what it should be."""
        if self._found is not None:
            self._let_found_go(np.array(places, np.int32))

    def forget_found(self) -> None:
        """Let all go that was found: all of it was reset.  O(places), in C."""
        if self._found is not None:
            self._let_found_go(np.flatnonzero(self._states & _FOUND).astype(np.int32))

    def _let_found_go(self, places: npt.NDArray[np.int32]) -> None:
        gone = places[(self._states[places] & _FOUND) != 0]
        self.num_found -= len(gone)
        if not self.num_found:
            self._found = None
        self.let_go(array("i", gone.tobytes()))

    def _give_up_found(self, count: int) -> bool:
        """Let up to `count` of the oldest go that were found; False if there are none."""
        found, before = self._found, self.num_found
        if found is None:
            return False
        while self.num_found and (short := count - (before - self.num_found)) > 0:
            self._let_found_go(found.next_oldest(short))
        self.num_given_up += before - self.num_found
        return True

    # ------------------------------------------------------------------ from HOST to DISK

    def begin_ending(self) -> None:
        """From now on have everything go to DISK: what is in memory is about to be lost.  O(1)."""
        self.is_ending = True
        self.host_ahead = self.num_host

    def begin_moving(self, most: int) -> Move | None:
        """Choose the oldest blocks of HOST to go on to DISK, as far as too few slots are free.

        None if about enough are: they do not go one by one.  What is read meanwhile stays where it
        is.  O(ghosts passed + blocks).

        Args:
            most: Blocks at most; at least one.
        """
        short = self.host_ahead - len(self._free_host) - self.num_moving
        while self.is_ending and len(self._free_disk) < min(most, short):
            if not self._give_up(min(most, short) - len(self._free_disk)):
                break
        count = min(most, short, len(self._free_disk))
        if count <= 0 or (short < min(_MOVED, self.host_ahead // 4) and not self.is_ending):
            return None
        places: BlockTable = array("i")
        roots: list[tuple[Root, int]] = []
        while len(places) < count and (holding := self._upper.next()) is not None:
            before, excess = len(places), holding.excess
            most = min(count - before, excess or count)
            self._choose(holding, most, places, roots)
            if len(places) - before < most:
                self._upper.pass_over(holding)
        self._upper.recall()
        if not places:
            return None
        slots = _pop(self._free_disk, len(places))
        self._targets[_index(places)] = slots
        self.num_moving += len(places)
        return Move(places, self.slots(places), slots, roots)

    def _choose(
        self, holding: Holding, most: int, places: BlockTable, roots: list[tuple[Root, int]]
    ) -> None:
        """Choose up to `most` of a tenant's oldest blocks in HOST to go on.

        O(ghosts passed + blocks).

        Args:
            holding: Whose.
            most: At least one.
            places: Takes those chosen.
            roots: Takes whose they are.
        """
        stale, dead, left = [], [], most
        for serial, ghost in holding.ghosts.items():
            held = ghost.places or array("i")
            index = _index(held)
            in_host, states = self._slots[index] < self.num_host, self._states[index]
            if not in_host.any():
                stale.append(serial)
                continue
            if (lost := states == _OWNED).any():  # a copy has failed: what follows it is lost
                dead.append((ghost, held, int(lost.argmax())))
                continue
            movable = index[in_host & (states == _OWNED | _READY)]
            chosen = movable[-left:].astype(np.int32)  # in order: told so, too
            self._states[chosen] |= _MOVING
            places.frombytes(chosen.tobytes())
            roots.append((ghost.root, len(chosen)))
            left -= len(chosen)
            if not left:
                break
        if left < most:
            self._upper.add(holding.tenant, left - most)
        for serial in stale:
            self._upper.remove(holding.tenant, serial)
        for ghost, held, keep in dead:
            self._cut(ghost, held, keep)

    def moved(self, move: Move, num_good: int) -> None:
        """Note that a haul to DISK has ended; the first `num_good` lie there now.  O(places).

        The others, and those that are being read, stay where they are.
        """
        index = _index(move.places)
        states = self._states[index] & ~np.uint8(_MOVING)
        self._states[index] = states
        self.num_moving -= len(index)
        good = (states == _OWNED | _READY) & (np.arange(len(index)) < num_good)
        targets = self._targets[index]
        self._targets[index] = -1
        here = self._slots[index]
        self._slots[index[good]] = targets[good]
        if self.listener is not None:
            self._tell_moved(move.roots, here, targets, good)
        self._free_slots(np.where(good, here, targets))
        if not good.all():
            self._stay(move.roots, ~good & ((states & _OWNED) != 0))
        self._vacate(index[states == 0])

    def _stay(self, roots: list[tuple[Root, int]], stays: npt.NDArray[np.bool_]) -> None:
        """Count what has not gone on from HOST."""
        at = 0
        for root, count in roots:
            if num_blocks := int(stays[at : at + count].sum()):
                self._upper.add(root.namespace.tenant, num_blocks)
            at += count

    # ------------------------------------------------------------------ ghosts

    def enter(self, ghost: Node) -> None:
        """Note a ghost that has places and was buried last.  O(log tenants), amortised."""
        self.holdings.put(ghost)
        if self._has_both:
            self._upper.put(ghost)

    def leave(self, ghost: Node) -> None:
        """Take all places of a ghost back: it is forgotten."""
        self.step_out(ghost)
        self.clear(ghost)

    def step_out(self, ghost: Node) -> None:
        """Let a ghost stand in the order no more: its blocks are about to be in the pool."""
        if ghost.places is not None:
            tenant, serial = ghost.root.namespace.tenant, ghost.burial
            if self.holdings.ghost(tenant, serial) is ghost:
                self._take_out(tenant, serial)

    def _take_out(self, tenant: str, serial: int) -> None:
        self.holdings.remove(tenant, serial)
        if self._has_both:
            self._upper.remove(tenant, serial)

    def clear(self, node: Node) -> None:
        """Take all places back of a node that does not stand in the order."""
        if node.places is not None:
            self._lose(node.places)
            self._count(node, node.places, -1)
            self.let_go(node.places)
            node.places = None

    def split(self, upper: Node, lower: Node, num_blocks: int) -> None:
        """Give `lower` the places of all but the first `num_blocks` blocks of `upper`.

        It stands in the order then, at the same point; `upper` is about to leave.
        """
        if upper.places is not None and len(upper.places) > num_blocks:
            lower.places = upper.places[num_blocks:]
            upper.places = upper.places[:num_blocks]
            self.holdings.put(lower)
            if self._upper.ghost(lower.root.namespace.tenant, lower.burial) is not None:
                self._upper.put(lower)

    def may_join(self, upper: Node, lower: Node, last_burial: int) -> bool:
        """Whether a ghost that is about to be buried may swallow the one below it.

        Either both lie here, wholly, and nothing was buried in between; or neither does.
        """
        if upper.places is None or lower.places is None:
            return upper.places is lower.places
        is_whole = len(upper.places) * self._block_bytes == len(upper.tokens)
        return is_whole and lower.burial == last_burial

    def join(self, upper: Node, lower: Node) -> None:
        """Give a ghost the places of the one that it swallows."""
        if upper.places is not None and lower.places is not None:
            self._take_out(lower.root.namespace.tenant, lower.burial)
            upper.places += lower.places
            lower.places = None

    def sweep(self, root: Root) -> None:
        """Give up, in time, what lies here of a namespace that was reset.  O(1)."""
        self._sweeps.append(_ghosts_below(root))

    def _sweep(self, most: int) -> None:
        """Give up what up to `most` ghosts have of what was reset."""
        for _ in range(most):
            if not self._sweeps:
                return
            ghost = next(self._sweeps[-1], None)
            if ghost is None:
                self._sweeps.pop()
            else:
                self._bare(ghost)

    def _bare(self, ghost: Node) -> None:
        if ghost.places is not None:
            self.leave(ghost)
            if self.bared is not None:
                self.bared(ghost)

    def _give_up(self, count: int) -> bool:
        """Let up to `count` blocks of the oldest ghost go; False if there is none that may.

        What was found is older than any.  What is being written is the youngest: then nothing older
        is left.
        """
        if self._give_up_found(count):
            return True
        holding = self.holdings.next()
        if holding is None:
            return False
        ghost = next(iter(holding.ghosts.values()))
        places = ghost.places
        if places is None:
            raise AssertionError("a ghost without places stands in the order of those that have")
        count = min(count, holding.excess or count)
        return self._cut(ghost, places, max(0, len(places) - count))

    def _give_up_host(self, count: int) -> bool:
        """Let the oldest ghost that has slots of HOST go, up to `count` of them, from its end on.

        What lies on DISK behind them goes, too: nobody could read it without what is before it.
        """
        while (holding := self._upper.next()) is not None:
            serial, ghost = next(iter(holding.ghosts.items()))
            places = ghost.places or array("i")
            in_host = np.flatnonzero(self._slots[_index(places)] < self.num_host)
            if not len(in_host):
                self._upper.remove(holding.tenant, serial)
                continue
            count = min(count, holding.excess or count)
            return self._cut(ghost, places, int(in_host[-count:][0]))
        return False

    def _cut(self, ghost: Node, places: BlockTable, keep: int) -> bool:
        """Let the places of a ghost go behind the first `keep`; False if one is being written."""
        gone = places[keep:]
        if (self._states[_index(gone)] == _OWNED | _BUSY).any():
            return False
        self.num_given_up += len(gone)
        if not keep:
            self._bare(ghost)
        else:
            ghost.places = places[:keep]
            self._lose(gone)
            self._count(ghost, gone, -1)
            self.let_go(gone)
        return True

    # ------------------------------------------------------------------ who listens

    def copy(self, ghost: Node, blocks: BlockTable, places: BlockTable) -> None:
        """Give what is being buried the places to which its first blocks are to be copied.

        Of blocks in a row the last one is the oldest, as in `order`: another life, which knows
        their stamps alone, gives them up from the end on, too.
        """
        ghost.places = places
        self._count(ghost, places, 1)
        start, self._next_stamp = self._next_stamp, self._next_stamp + len(places)
        self._stamps[_index(places)] = np.arange(self._next_stamp - 1, start - 1, -1)
        if self.listener is None:
            return
        there = array("q", self._where(_index(places)).tobytes())
        sources, at = Level.POOL.places(blocks), 0
        for _, count in self.runs(places):
            part = slice(at, at + count)
            self.listener.copied(ghost.root.namespace, sources[part], there[part])
            at += count

    def rise(self, node: Node, blocks: BlockTable) -> None:
        """Tell in which blocks lies what a node has below, and is about to give up."""
        if self.listener is not None and node.places is not None and not node.root.retired:
            sources = self.told(node.places)
            places = Level.POOL.places(blocks[: len(sources)])
            if NOWHERE in sources:
                known = [pair for pair in zip(sources, places, strict=True) if pair[0] != NOWHERE]
                sources = array("q", [one for one, _ in known])
                places = array("q", [place for _, place in known])
            if sources:
                self.listener.copied(node.root.namespace, sources, places)

    def told(self, places: BlockTable) -> Places:
        """Give where a ghost's blocks lie, as listeners know it.  O(places), in C.

        What does not lie where it should is `NOWHERE`.
        """
        index = _index(places)
        there = self._where(index)
        there[self._states[index] == _OWNED] = NOWHERE
        return array("q", there.tobytes())

    def _where(self, index: npt.NDArray[np.intp]) -> npt.NDArray[np.int64]:
        """Give the level and slot of places."""
        return self._named(self._slots[index])

    def _named(self, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Give slots as listeners know them."""
        named = slots.astype(np.int64)
        on_disk = named >= self.num_host
        named += int(Level.HOST) << LEVEL_BITS
        named[on_disk] += ((Level.DISK - Level.HOST) << LEVEL_BITS) - self.num_host
        return named

    def _lose(self, places: BlockTable) -> None:
        """Tell the listener that places are about to be let go."""
        if self.listener is not None:
            index = _index(places)
            self._tell_lost(index[self._states[index] != _OWNED])

    def _tell_lost(self, index: npt.NDArray[np.intp]) -> None:
        if self.listener is not None and len(index):
            self.listener.lost(array("q", self._where(index).tobytes()))

    def _tell_moved(
        self,
        roots: list[tuple[Root, int]],
        sources: npt.NDArray[np.int32],
        slots: npt.NDArray[np.int32],
        good: npt.NDArray[np.bool_],
    ) -> None:
        """Tell the listener of blocks that lie on DISK now, and in HOST no more."""
        at, gone, there = 0, self._named(sources), self._named(slots)
        for root, count in roots:
            part = slice(at, at + count)
            at += count
            moved = good[part]
            if self.listener is None or not moved.any():
                continue
            before = array("q", gone[part][moved].tobytes())
            if not root.retired:
                after = array("q", there[part][moved].tobytes())
                self.listener.copied(root.namespace, before, after)
            self.listener.lost(before)

    def check(self, owners: list[Node], busy: BlockTable, moving: BlockTable) -> None:
        """Assert that each place has the owner it should have, and each slot one.  O(places).

        Args:
            owners: The ghosts that have places, but for those of what was reset.
            busy: The places that hauls are busy with.
            moving: Those that are on their way to DISK.
        """
        ghosts = self.holdings.all_ghosts()
        living = [one for one in ghosts if not one.root.retired]
        assert {id(one) for one in owners} == {id(one) for one in living}, "the order"
        self.holdings.check()
        self._upper.check()
        held: BlockTable = array("i")
        of, in_host_of = Counter[str](), Counter[str]()
        for ghost in ghosts:
            assert ghost.places, "an empty list of places"
            held.extend(ghost.places)
            index, tenant = _index(ghost.places), ghost.root.namespace.tenant
            of[tenant] += len(index)
            in_host = self._slots[index] < self.num_host
            in_host_of[tenant] += int((in_host & ((self._states[index] & _MOVING) == 0)).sum())
            if self.num_disk and in_host.any():
                found_at = self._upper.ghost(tenant, ghost.burial)
                assert found_at is ghost, "a ghost in HOST that nobody would move"
        assert self.holdings.counts() == {name: count for name, count in of.items() if count}
        told = {name: self.num_host_of(name) for name in of}
        assert told == in_host_of, f"in HOST: {in_host_of}, not {told}"
        assert len(set(held)) == len(held), "a place with two ghosts"
        found = np.flatnonzero(self._states & _FOUND)
        assert len(found) == self.num_found, f"{len(found)} found, not {self.num_found}"
        assert (self._states[found] & _OWNED).all(), "found, and nobody's"
        assert (self._slots[found] >= self.num_host).all(), "found in HOST"
        owned = np.flatnonzero((self._states & (_OWNED | _FOUND)) == _OWNED)
        assert owned.tolist() == sorted(held), "places that a ghost has"
        assert np.flatnonzero(self._states & _BUSY).tolist() == sorted(set(busy)), "busy places"
        assert len(set(busy)) == len(busy), "a place with two hauls"
        assert np.flatnonzero(self._states & _MOVING).tolist() == sorted(moving), "moving places"
        assert self.num_moving == len(moving), "the number of those that are moving"
        free = np.flatnonzero(self._states == 0)
        assert free.tolist() == sorted(self._free), "free places"
        self._check_slots()

    def _check_slots(self) -> None:
        """Assert that each slot is free, or some place's alone."""
        used = self._slots[self._states != 0].tolist()
        used += self._targets[(self._states & _MOVING) != 0].tolist()
        slots = [*used, *self._free_host, *self._free_disk]
        assert sorted(slots) == list(range(self.num_host + self.num_disk)), "slots"
        assert all(slot < self.num_host for slot in self._free_host), "free slots of HOST"
        assert all(slot >= self.num_host for slot in self._free_disk), "free slots of DISK"


def _index(places: BlockTable) -> npt.NDArray[np.intp]:
    return np.array(places, np.intp)


def _pop(free: BlockTable, count: int) -> BlockTable:
    """Take up to `count` from the end of a list."""
    cut = max(0, len(free) - count)
    taken = free[cut:]
    del free[cut:]
    return taken


def _ghosts_below(root: Root) -> Iterator[Node]:
    """Give the ghosts below a retired root, lazily."""
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        stack.extend(node.children)
        if node.ghosts:
            stack.extend(node.ghosts.values())
        if not node.blocks and node.parent is not None:
            yield node
