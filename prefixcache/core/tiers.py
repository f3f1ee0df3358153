"""A tier: slots below the pool, in which evicted blocks lie until they are asked for again.

```
              take               written                      begin_reading       end_reading
   FREE ────────────► BUSY ─────────────────► READY ───────────────────► BUSY ───────────────► READY
     ▲                  │ not good: nobody may read it                     └ not good: the same
     └──────────────────┴─ let_go: its ghost is forgotten, revived, or the oldest; at once, or when
                           the haul that is busy with the slot has ended
```

Who has a slot is a ghost: `node.places` names those of its first blocks.  A tier is exclusive: what
comes back to the pool gives its slots up, so tiers hold as much as one pool of their summed size.

**The order** is that of burial, and within a run from its end: so blocks leave the tier exactly as
they would have left a larger pool under LRU.  Ghosts of one chain are therefore joined only if they
were buried one after the other.

```
buried       1  [CCCC]        2  [AAAA|BBBB]         taken back   CCCC, BBBB, AAAA
slots           5                7    2                           5     2     7
```

**A stamp** is a number that each writing of a slot has for itself.  Who writes a slot writes the
stamp beside the bytes, who reads it compares: a slot that holds what was there before, or another
slot's bytes, is found out, whatever its checksum says.

**Who listens** hears where blocks lie: that one has been given a slot, before it leaves the pool,
and that a slot holds it no more, after it has come back.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from enum import IntEnum
from typing import Final, Protocol, TypeAlias

import numpy as np

from prefixcache.core.node import Node, Root
from prefixcache.types import BlockTable, Namespace

Stamps: TypeAlias = "array[int]"
"""`array('q')`: what stands beside the bytes of each slot."""

Places: TypeAlias = "array[int]"
"""`array('q')`: where blocks lie.  A place is a `Level` times 2^32, and the number of a slot there;
in the pool it is the block's id.  `NOWHERE` is none."""

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
            places: As many; each held nothing.
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


_OWNED, _READY, _BUSY = 1, 2, 4
_SWEPT = 64
"""Ghosts of what was reset that are looked at when slots are taken, beside one for each slot."""


class Tier:
    """The slots of one tier, who has them, and which are given up first.

    Args:
        num_slots: Blocks that it can hold.
        block_bytes: Bytes of a block's packed tokens.
        level: Where it lies.
    """

    __slots__ = (
        "_block_bytes",
        "_free",
        "_next_stamp",
        "_stamps",
        "_states",
        "_sweeps",
        "bared",
        "level",
        "listener",
        "num_given_up",
        "num_slots",
        "order",
    )

    def __init__(self, num_slots: int, block_bytes: int, level: Level = Level.HOST) -> None:
        self.num_slots = num_slots
        self.level = level
        self._block_bytes = block_bytes
        self._free: BlockTable = array("i", range(num_slots - 1, -1, -1))
        self._states = np.zeros(num_slots, np.uint8)
        self._stamps = np.zeros(num_slots, np.int64)
        self._next_stamp = 1
        self._sweeps: list[Iterator[Node]] = []
        self.order: OrderedDict[int, Node] = OrderedDict()
        """Ghosts that have slots, by the number of their burial, oldest first."""
        self.bared: Callable[[Node], None] | None = None
        """Is told of a ghost that has lost its last slot."""
        self.num_given_up = 0
        """Blocks that were given up for younger ones, since the start."""
        self.listener: PlaceListener | None = None
        """Who is told what is copied to its slots, and lost there."""

    @property
    def num_free(self) -> int:
        """Slots that hold nothing.  O(1)."""
        return len(self._free)

    @property
    def num_used(self) -> int:
        """Slots that hold something, or are being written or read.  O(1)."""
        return self.num_slots - len(self._free)

    # ------------------------------------------------------------------ slots

    def take(self, count: int) -> BlockTable:
        """Take up to `count` slots, to be written to: free ones, then those of the oldest blocks.

        Fewer if others are being written to.  O(count + ghosts that lose slots).
        """
        free = self._free
        if self._sweeps and len(free) < count:
            self._sweep(_SWEPT + count)
        while (short := count - len(free)) > 0 and self._give_up(short):
            pass
        cut = max(0, len(free) - count)
        slots = free[cut:]
        del free[cut:]
        index = _index(slots)
        self._states[index] = _OWNED | _BUSY
        self._stamps[index] = np.arange(self._next_stamp, self._next_stamp + len(slots))
        self._next_stamp += len(slots)
        return slots

    def give_back(self, slots: BlockTable) -> None:
        """Give slots back that were taken, and not written to."""
        self._states[_index(slots)] = 0
        self._free.extend(slots)

    def stamps(self, slots: BlockTable) -> Stamps:
        """Give what stands, or is to stand, beside the bytes of slots.  O(slots)."""
        return array("q", self._stamps[_index(slots)].tobytes())

    def written(self, slots: BlockTable, num_good: int) -> None:
        """Note that a haul into slots has ended; the first `num_good` may be read.  O(slots)."""
        self._end(slots, num_good, _READY)

    def begin_reading(self, slots: BlockTable) -> None:
        """Keep slots from being lent to others until `end_reading`.  O(slots)."""
        self._states[_index(slots)] |= _BUSY

    def end_reading(self, slots: BlockTable, num_good: int) -> None:
        """Note that a haul from slots has ended; what lies in the others is not what it should."""
        self._end(slots, num_good, 0)

    def _end(self, slots: BlockTable, num_good: int, more: int) -> None:
        index = _index(slots)
        states = self._states[index] & (_OWNED | _READY)
        if num_good < len(slots) and self.listener is not None:
            self._tell_lost(index[num_good:][(states[num_good:] & _OWNED) != 0])
        states[:num_good] |= more
        states[num_good:] &= _OWNED
        free = (states & _OWNED) == 0
        states[free] = 0
        self._states[index] = states
        if free.any():
            self._free.frombytes(index[free].astype(np.int32).tobytes())

    def let_go(self, slots: BlockTable) -> None:
        """Let a ghost's slots go: free now, or when a haul that is busy with them ends."""
        index = _index(slots)
        states = self._states[index] & _BUSY
        self._states[index] = states
        idle = states == 0
        if idle.all():
            self._free.extend(slots)
        else:
            self._free.frombytes(index[idle].astype(np.int32).tobytes())

    def count_readable(self, slots: BlockTable) -> int:
        """Count the leading slots that can be read now.  Changes nothing.  O(slots), in C."""
        bad = self._states[_index(slots)] != _OWNED | _READY
        return int(bad.argmax()) if bad.any() else len(slots)

    # ------------------------------------------------------------------ ghosts

    def enter(self, ghost: Node) -> None:
        """Note a ghost that has slots and was buried last.  O(1)."""
        self.order[ghost.last_used] = ghost

    def leave(self, ghost: Node) -> None:
        """Take all slots of a ghost back: it is forgotten."""
        self.step_out(ghost)
        self.clear(ghost)

    def step_out(self, ghost: Node) -> None:
        """Let a ghost stand in the order no more: its blocks are about to be in the pool."""
        if ghost.places is not None and self.order.get(ghost.last_used) is ghost:
            del self.order[ghost.last_used]

    def clear(self, node: Node) -> None:
        """Take all slots back of a node that does not stand in the order."""
        if node.places is not None:
            self._lose(node.places)
            self.let_go(node.places)
            node.places = None

    def split(self, upper: Node, lower: Node, num_blocks: int) -> None:
        """Give `lower` the slots of all but the first `num_blocks` blocks of `upper`.

        It stands in the order then, at the same place; `upper` is about to leave.
        """
        if upper.places is not None and len(upper.places) > num_blocks:
            lower.places = upper.places[num_blocks:]
            upper.places = upper.places[:num_blocks]
            self.order[lower.last_used] = lower

    def may_join(self, upper: Node, lower: Node, last_burial: int) -> bool:
        """Whether a ghost that is about to be buried may swallow the one below it.

        Either both lie here, wholly, and nothing was buried in between; or neither does.
        """
        if upper.places is None or lower.places is None:
            return upper.places is lower.places
        is_whole = len(upper.places) * self._block_bytes == len(upper.tokens)
        return is_whole and lower.last_used == last_burial

    def join(self, upper: Node, lower: Node) -> None:
        """Give a ghost the slots of the one that it swallows."""
        if upper.places is not None and lower.places is not None:
            del self.order[lower.last_used]
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

        What is being written is the youngest: then nothing older is left.
        """
        if not self.order:
            return False
        ghost = next(iter(self.order.values()))
        places = ghost.places
        if places is None:
            raise AssertionError("a ghost without slots stands in the order of those that have any")
        keep = max(0, len(places) - count)
        gone = places[keep:]
        if (self._states[_index(gone)] == _OWNED | _BUSY).any():
            return False
        self.num_given_up += len(gone)
        if not keep:
            self._bare(ghost)
        else:
            ghost.places = places[:keep]
            self._lose(gone)
            self.let_go(gone)
        return True

    # ------------------------------------------------------------------ who listens

    def copy(self, ghost: Node, blocks: BlockTable, slots: BlockTable) -> None:
        """Give what is being buried the slots to which its first blocks are to be copied."""
        ghost.places = slots
        if self.listener is not None:
            sources, places = Level.POOL.places(blocks), self.level.places(slots)
            self.listener.copied(ghost.root.namespace, sources, places)

    def rise(self, node: Node, blocks: BlockTable) -> None:
        """Tell in which blocks lies what a node has in slots, and is about to give up."""
        if self.listener is not None and node.places is not None and not node.root.retired:
            sources = self.told(node.places)
            places = Level.POOL.places(blocks[: len(sources)])
            if NOWHERE in sources:
                known = [pair for pair in zip(sources, places, strict=True) if pair[0] != NOWHERE]
                sources = array("q", [one for one, _ in known])
                places = array("q", [place for _, place in known])
            if sources:
                self.listener.copied(node.root.namespace, sources, places)

    def told(self, slots: BlockTable) -> Places:
        """Give the places of a ghost's slots as listeners know them.  O(slots), in C.

        That of a slot which does not hold what it should is `NOWHERE`.
        """
        index = _index(slots)
        places = index + (int(self.level) << LEVEL_BITS)
        places[self._states[index] == _OWNED] = NOWHERE
        return array("q", places.tobytes())

    def _lose(self, slots: BlockTable) -> None:
        """Tell the listener that slots are about to be let go."""
        if self.listener is not None:
            index = _index(slots)
            self._tell_lost(index[self._states[index] != _OWNED])

    def _tell_lost(self, index: np.ndarray) -> None:
        if self.listener is not None and len(index):
            places = index + (int(self.level) << LEVEL_BITS)
            self.listener.lost(array("q", places.tobytes()))

    def check(self, owners: list[Node], busy: BlockTable) -> None:
        """Assert that each slot has the owner it should have.  O(slots).

        Args:
            owners: The ghosts that have slots, but for those of what was reset.
            busy: The slots that hauls are busy with.
        """
        living = [one for one in self.order.values() if not one.root.retired]
        assert {id(one) for one in owners} == {id(one) for one in living}, "the order"
        for serial, ghost in self.order.items():
            assert ghost.last_used == serial, f"ghost {ghost.last_used} stands as {serial}"
            assert ghost.places, "an empty list of slots"
        assert list(self.order) == sorted(self.order), "ghosts out of order"
        held: BlockTable = array("i")
        for ghost in self.order.values():
            held.extend(ghost.places or ())
        assert len(set(held)) == len(held), "a slot with two ghosts"
        owned = np.flatnonzero(self._states & _OWNED)
        assert owned.tolist() == sorted(held), "slots that a ghost has"
        assert np.flatnonzero(self._states & _BUSY).tolist() == sorted(set(busy)), "busy slots"
        assert len(set(busy)) == len(busy), "a slot with two hauls"
        free = np.flatnonzero(self._states == 0)
        assert free.tolist() == sorted(self._free), "free slots"


def _index(slots: BlockTable) -> np.ndarray:
    return np.array(slots, np.intp)


def _ghosts_below(root: Root) -> Iterator[Node]:
    """Give the ghosts below a retired root, lazily."""
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        if node.children:
            stack.extend(node.children.values())
        if node.ghosts:
            stack.extend(node.ghosts.values())
        if not node.blocks and node.parent is not None:
            yield node
