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
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable, Iterator
from typing import TypeAlias

import numpy as np

from prefixcache.core.node import Node, Root
from prefixcache.types import BlockTable

Stamps: TypeAlias = "array[int]"
"""`array('q')`: what stands beside the bytes of each slot."""

_OWNED, _READY, _BUSY = 1, 2, 4
_SWEPT = 64
"""Ghosts of what was reset that are looked at when slots are taken, beside one for each slot."""


class Tier:
    """The slots of one tier, who has them, and which are given up first.

    Args:
        num_slots: Blocks that it can hold.
        block_bytes: Bytes of a block's packed tokens.
    """

    __slots__ = (
        "_block_bytes",
        "_free",
        "_next_stamp",
        "_stamps",
        "_states",
        "_sweeps",
        "bared",
        "num_given_up",
        "num_slots",
        "order",
    )

    def __init__(self, num_slots: int, block_bytes: int) -> None:
        self.num_slots = num_slots
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
        """Take all slots of a ghost back: it is forgotten, or its blocks are in the pool."""
        if ghost.places is not None:
            if self.order.get(ghost.last_used) is ghost:
                del self.order[ghost.last_used]
            self.let_go(ghost.places)
            ghost.places = None

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
            self.let_go(gone)
        return True

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
