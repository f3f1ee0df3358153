"""Tails: which partly filled blocks go before whole ones, and when they earn their place.

A tail takes a whole block for some tokens, so under pressure it goes first, whatever the policy,
which is never told of tails; among tails the one goes first that was used longest ago.

```
tails   ▃ ▂ ▅ ▂ …   not found since they were stored, or little of them: before any whole block
        ▅ ▃ …       found again: once an LRU that holds tails, too, would have let go of them
whole   █ █ █ █ …   in the policy's order, as if there were no tails
```

**While tails pay, all of them are kept like those that were found.**  Two LRUs tell, which only
count, and make room whenever the pool does:

```
uses    1 2 3 4 5 6 7 8 9 … now
whole         ├───────────────┤    one of whole blocks alone
with tails        ├───────────┤    one of whole blocks and tails
```

What a request finds in a tail that the second one holds is gained by keeping tails.  A whole block
that it finds, last used before all that the second one holds, is lost; so is one that is gone and
that the first one holds.  Tails pay while what is gained, of late, is more than twice what is lost.
"""

from __future__ import annotations

from collections import OrderedDict

from prefixcache.core.node import FOUND, FRESH, Node
from prefixcache.types import TOKEN_BYTES

_SURELY = 2
"""How many times what is lost must be gained."""
_PART = 32
"""The part of the pool's tokens that must be gained beyond that before tails are kept."""
_REMEMBERED = 2
"""Capacities of blocks evicted after which half of what was gained and lost is forgotten …"""
_LEAST = 64
"""… of a pool of so many blocks at least."""
_MOST_USES = 64
"""Uses that an LRU lets go of in one go, and as many more as blocks are evicted."""


class TailWorth:
    """Whether keeping tails would find more, of late, than it displaces.  Each step is O(1).

    Blocks that are neither protected nor forgotten are counted, by the stamp of their last use.
    Uses before `start` are not known: what was last used then is in no LRU.

    Args:
        start: The first stamp that is counted.
        num_blocks: Blocks of the pool.
        block_bytes: Bytes of a block's packed tokens.
    """

    __slots__ = (
        "_block_bytes",
        "_block_size",
        "_first_whole",
        "_gained",
        "_is_scarce",
        "_lost",
        "_num_evicted",
        "_period",
        "_size",
        "_size_whole",
        "_tails",
        "_threshold",
        "_whole",
        "first",
        "pays",
    )

    def __init__(self, start: int, num_blocks: int, block_bytes: int) -> None:
        self.first = start
        """The oldest use that the LRU with tails holds …"""
        self._first_whole = start
        """… and that of whole blocks alone, never the younger one."""
        self.pays = False
        """Whether tails are kept like whole blocks."""
        self._size = self._size_whole = 0
        """Blocks in each of them."""
        self._whole: dict[int, int] = {}
        """Whole blocks by the stamp of their last use …"""
        self._tails: dict[int, int] = {}
        """… and tails."""
        self._gained = self._lost = 0
        """Tokens, of late."""
        self._num_evicted = 0
        self._is_scarce = False
        """Whether anything was evicted: until then nothing is lost."""
        self._block_bytes = block_bytes
        self._block_size = block_size = block_bytes // TOKEN_BYTES
        self._period = _REMEMBERED * max(num_blocks, _LEAST)
        self._threshold = num_blocks * block_size // _PART

    def enter(self, stamp: int, num_blocks: int) -> None:
        """Count whole blocks that have become unprotected, by their last use.  O(1)."""
        if stamp >= self._first_whole:
            self._whole[stamp] = self._whole.get(stamp, 0) + num_blocks
            self._size_whole += num_blocks
            if stamp >= self.first:
                self._size += num_blocks

    def leave(self, stamp: int, num_blocks: int) -> None:
        """Count whole blocks of that last use no more: protected now, or forgotten.  O(1)."""
        if stamp >= self._first_whole:
            if left := self._whole[stamp] - num_blocks:
                self._whole[stamp] = left
            else:
                del self._whole[stamp]
            self._size_whole -= num_blocks
            if stamp >= self.first:
                self._size -= num_blocks

    def enter_tail(self, stamp: int) -> None:
        """Count a tail that has become unprotected, by its last use.  O(1)."""
        if stamp >= self.first:
            self._tails[stamp] = self._tails.get(stamp, 0) + 1
            self._size += 1

    def leave_tail(self, stamp: int) -> None:
        """Count a tail of that last use no more.  O(1)."""
        if stamp >= self.first:
            if left := self._tails[stamp] - 1:
                self._tails[stamp] = left
            else:
                del self._tails[stamp]
            self._size -= 1

    def found(self, stamp: int, num_blocks: int) -> None:
        """Count whole blocks that a request has found here, and that are protected now.  O(1)."""
        if stamp < self.first and self._is_scarce:
            self._lost += num_blocks * self._block_size
        self.leave(stamp, num_blocks)

    def found_tail(self, stamp: int, num_tokens: int) -> None:
        """Count tokens of a tail that a request has found, here or as a ghost.  O(1)."""
        if stamp >= self.first:
            self._gained += num_tokens

    def revived(self, ghost: Node) -> None:
        """Count what had been evicted and is stored again: it would have been found.  O(1)."""
        stamp, size = ghost.used_until, len(ghost.tokens)
        if ghost.tail:
            if stamp >= self.first:
                self._gained += size // TOKEN_BYTES
                self.leave_tail(stamp)
        elif stamp >= self._first_whole:
            self._lost += size // TOKEN_BYTES
            self.leave(stamp, size // self._block_bytes)

    def forget(self, ghost: Node) -> None:
        """Count a ghost no more.  O(1)."""
        if ghost.tail:
            self.leave_tail(ghost.used_until)
        else:
            self.leave(ghost.used_until, len(ghost.tokens) // self._block_bytes)

    def make_room(self, num_left: int, num_blocks: int) -> None:
        """Say whether tails pay, before blocks are evicted.  O(`num_blocks`).

        Args:
            num_left: Unprotected blocks that are left then: neither LRU holds more.
            num_blocks: How many will be evicted.
        """
        whole, tails = self._whole, self._tails
        most = self.first + _MOST_USES + num_blocks
        while self._size > num_left and self.first < most:
            self._size -= whole.get(self.first, 0) + tails.pop(self.first, 0)
            self.first += 1
        most = min(self.first, self._first_whole + _MOST_USES + num_blocks)
        while self._size_whole > num_left and self._first_whole < most:
            self._size_whole -= whole.pop(self._first_whole, 0)
            self._first_whole += 1
        self._is_scarce = True
        self._num_evicted += num_blocks
        if self._num_evicted > self._period:
            self._num_evicted = 0
            self._gained //= 2
            self._lost //= 2
        more = self._gained - _SURELY * self._lost
        self.pays = more > (0 if self.pays else self._threshold)


class Tails:
    """The unprotected tails, each in its place until it is used, protected or gone.  O(1) a step.

    What is used is put last, so the first is the one that was used longest ago.
    """

    __slots__ = ("again", "fresh", "worth")

    def __init__(self) -> None:
        self.fresh: OrderedDict[Node, None] = OrderedDict()
        """Those of which no request has found half or more since they were stored …"""
        self.again: OrderedDict[Node, None] = OrderedDict()
        """… and the others."""
        self.worth: TailWorth | None = None
        """Whether they pay; None until half of the pool is used."""

    def __len__(self) -> int:
        return len(self.fresh) + len(self.again)

    def __contains__(self, tail: Node) -> bool:
        return tail in self.fresh or tail in self.again

    def offer(self, tail: Node) -> None:
        """Put a tail last that is unprotected now, and was not here."""
        (self.fresh if tail.tail == FRESH else self.again)[tail] = None

    def drop(self, tail: Node) -> None:
        """Take a tail out, if it is here."""
        (self.fresh if tail.tail == FRESH else self.again).pop(tail, None)

    def found(self, tail: Node, stamp: int, *, is_enough: bool = True) -> None:
        """Take note that a request has found a tail; if it is unprotected, it is used now.

        Args:
            tail: Which.
            stamp: When.
            is_enough: Whether that was half of it, or more; else it earns no place by that.
        """
        if tail.tail == FRESH and is_enough:
            tail.tail = FOUND
            if tail in self.fresh:
                del self.fresh[tail]
                self.again[tail] = None
        elif tail in self.fresh:
            self.fresh.move_to_end(tail)
        elif tail in self.again:
            self.again.move_to_end(tail)
        worth = self.worth
        if worth is not None and not tail.lock_ref:
            worth.leave_tail(tail.last_used)
            worth.enter_tail(stamp)

    def due(self) -> Node | None:
        """Give the tail that goes before the policy's next leaf; None if none does."""
        worth = self.worth
        tail = next(iter(self.fresh), None)
        if tail is not None and (worth is None or not worth.pays or tail.last_used < worth.first):
            return tail
        if worth is None or not self.again:
            return None
        tail = next(iter(self.again))
        return tail if tail.last_used < worth.first else None

    def first(self) -> Node | None:
        """Give the tail that was used longest ago: nothing else is left.  None if there is none."""
        fresh, again = next(iter(self.fresh), None), next(iter(self.again), None)
        if fresh is None or (again is not None and again.last_used < fresh.last_used):
            return again
        return fresh
