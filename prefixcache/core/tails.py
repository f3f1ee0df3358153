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

from prefixcache.core.node import FOUND, FRESH, Node, Tail
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
        stamp, size = ghost.last_used, len(ghost.tokens)
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
            self.leave_tail(ghost.last_used)
        else:
            self.leave(ghost.last_used, len(ghost.tokens) // self._block_bytes)

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


class Line:
    """Tails, the one that came first ahead.  Each knows its neighbours, so no table is kept."""

    __slots__ = ("first", "last", "size")

    def __init__(self) -> None:
        self.first: Tail | None = None
        self.last: Tail | None = None
        self.size = 0

    def append(self, tail: Tail) -> None:
        """Put a tail last that is in no line."""
        tail.older = last = self.last
        if last is None:
            self.first = tail
        else:
            last.younger = tail
        self.last = tail
        self.size += 1

    def remove(self, tail: Tail) -> None:
        """Take a tail out that is in this line."""
        older, younger = tail.older, tail.younger
        if older is None:
            self.first = younger
        else:
            older.younger = younger
        if younger is None:
            self.last = older
        else:
            younger.older = older
        tail.older = tail.younger = None
        self.size -= 1


class Tails:
    """The unprotected tails, each in its place until it is used, protected or gone.  O(1) a step.

    What is used is put last, so the first is the one that was used longest ago.
    """

    __slots__ = ("again", "fresh", "worth")

    def __init__(self) -> None:
        self.fresh = Line()
        """Those of which no request has found half or more since they were stored …"""
        self.again = Line()
        """… and the others."""
        self.worth: TailWorth | None = None
        """Whether they pay; None until half of the pool is used."""

    def __len__(self) -> int:
        return self.fresh.size + self.again.size

    def __contains__(self, node: Node) -> bool:
        return isinstance(node, Tail) and (
            node.older is not None or node in (self.fresh.first, self.again.first)
        )

    def offer(self, tail: Tail) -> None:
        """Put a tail last that is unprotected now; if it is here, it stays where it is."""
        line = self.fresh if tail.tail == FRESH else self.again
        if tail.older is None and line.first is not tail:
            line.append(tail)

    def drop(self, tail: Tail) -> None:
        """Take a tail out, if it is here."""
        line = self.fresh if tail.tail == FRESH else self.again
        if tail.older is not None or line.first is tail:
            line.remove(tail)

    def found(self, tail: Tail, stamp: int, *, is_enough: bool = True) -> None:
        """Take note that a request has found a tail; if it is unprotected, it is used now.

        Args:
            tail: Which.
            stamp: When.
            is_enough: Whether that was half of it, or more; else it earns no place by that.
        """
        line = self.fresh if tail.tail == FRESH else self.again
        is_here = tail.older is not None or line.first is tail
        if is_here:
            line.remove(tail)
        if is_enough:
            tail.tail, line = FOUND, self.again
        if is_here:
            line.append(tail)
        worth = self.worth
        if worth is not None and not tail.lock_ref:
            worth.leave_tail(tail.last_used)
            worth.enter_tail(stamp)

    def due(self) -> Tail | None:
        """Give the tail that goes before the policy's next leaf; None if none does."""
        worth, tail = self.worth, self.fresh.first
        if tail is not None and (worth is None or not worth.pays or tail.last_used < worth.first):
            return tail
        tail = self.again.first
        if worth is None or tail is None:
            return None
        return tail if tail.last_used < worth.first else None

    def first(self) -> Tail | None:
        """Give the tail that was used longest ago: nothing else is left.  None if there is none."""
        fresh, again = self.fresh.first, self.again.first
        if fresh is None or (again is not None and again.last_used < fresh.last_used):
            return again
        return fresh
