"""Tails: which partly filled blocks go before whole ones, and when they earn their place.

A tail takes a whole block for some tokens, so under pressure it goes first, whatever the policy,
which is never told of tails; among tails the one goes first that was used longest ago.

```
tails   ▃ ▂ ▅ ▂ …   not found since they were stored: before any whole block
        ▅ ▃ …       found again: before a whole block that was used later
whole   █ █ █ █ …   in the policy's order, as if there were no tails
```

**While tails pay, all of them are kept like those that were found.**  Two windows over the last
uses tell; each has as many blocks as the pool, resident or remembered by ghosts:

```
uses    1 2 3 4 5 6 7 8 9 … now
whole         ├───────────────┤    whole blocks alone
with tails        ├───────────┤    whole blocks and tails
```

What a request finds in a tail of the second window is gained by keeping tails.  A whole block that
it finds there no more, since its last use is older, or is gone although it is in the first window,
is lost.  Tails pay while what is gained, of late, is more than twice what is lost.
"""

from __future__ import annotations

from collections import deque

from prefixcache.core.node import Match, Node, common_prefix
from prefixcache.types import TOKEN_BYTES

QUEUED = 5
"""`node.queued` of a tail that waits here, and not in the policy's queue."""
FOUND = "found"
"""`node.mark` of a tail that was found since it was stored."""

_SPARE = 64
"""Entries of tails that are gone or were used since, which may be kept beside as many others."""
_SURELY = 2
"""How many times what is lost must be gained."""
_PART = 32
"""The part of the pool's tokens that must be gained beyond that before tails are kept."""
_REMEMBERED = 8
"""Capacities of blocks asked for after which half of what was gained and lost is forgotten …"""
_LEAST = 64
"""… of a pool of so many blocks at least."""
_MOST_USES = 64
"""Uses by which a window is shortened in one go."""


class TailQueue:
    """The unprotected tails, the one that was used longest ago first.  Amortised O(1) a step."""

    __slots__ = ("_at", "_fifo", "size")

    def __init__(self) -> None:
        self._fifo: deque[tuple[int, Node]] = deque()
        self._at = _SPARE
        self.size = 0
        """Entries, living or not."""

    def push(self, tail: Node) -> None:
        """Add a tail that has just been used.  Stamps never go back."""
        fifo = self._fifo
        tail.queued = QUEUED
        fifo.append((tail.last_used, tail))
        if len(fifo) > self._at:
            self._fifo = fifo = deque(entry for entry in fifo if self._lives(entry))
            self._at = 2 * len(fifo) + _SPARE
        self.size = len(fifo)

    def first(self) -> Node | None:
        """Give the tail that was used longest ago; None if there is none.  Drops what is dead."""
        fifo = self._fifo
        while fifo:
            if self._lives(fifo[0]):
                return fifo[0][1]
            fifo.popleft()
        self.size = 0
        return None

    def pop(self) -> None:
        """Remove what `first` gave."""
        self._fifo.popleft()[1].queued = 0
        self.size = len(self._fifo)

    @staticmethod
    def _lives(entry: tuple[int, Node]) -> bool:
        stamp, tail = entry
        return tail.last_used == stamp and tail.queued == QUEUED and tail.is_evictable


class TailWorth:
    """Whether keeping tails would find more, of late, than it displaces.

    Uses before `start` are not known: what was last used then is in no window.

    Args:
        start: The first stamp that is counted.
        block_bytes: Bytes of a block's packed tokens.
    """

    __slots__ = (
        "_block_bytes",
        "_first_whole",
        "_first_with",
        "_gained",
        "_lost",
        "_room",
        "_seen",
        "_size_whole",
        "_size_with",
        "_tails",
        "_whole",
        "is_scarce",
        "pays",
    )

    def __init__(self, start: int, block_bytes: int) -> None:
        self._block_bytes = block_bytes
        self._first_whole = self._first_with = start
        """The oldest uses in the windows; that of whole blocks alone is never the younger one."""
        self._size_whole = self._size_with = 0
        """Blocks in the windows."""
        self._whole: dict[int, int] = {}
        """Unprotected or remembered whole blocks, by the stamp of their last use …"""
        self._tails: dict[int, int] = {}
        """… and tails."""
        self._gained = self._lost = 0
        """Tokens, of late."""
        self._seen = self._room = 0
        self.is_scarce = False
        """Whether anything was evicted: until then nothing is lost."""
        self.pays = False
        """Whether tails are kept like whole blocks."""

    def count(self, node: Node, stamp: int, sign: int) -> None:
        """Count the blocks of a run, resident or remembered, with a use; or no more.  O(1)."""
        if stamp < self._first_whole:
            return
        size, width = len(node.tokens), self._block_bytes
        if size >= width:
            self.count_whole(stamp, sign * (size // width))
        elif size:
            tails = self._tails
            tails[stamp] = tails.get(stamp, 0) + sign
            if not tails[stamp]:
                del tails[stamp]
            if stamp >= self._first_with:
                self._size_with += sign

    def count_whole(self, stamp: int, num_blocks: int) -> None:
        """Count whole blocks with a use; below 0: no more.  O(1)."""
        if stamp < self._first_whole:
            return
        whole = self._whole
        left = whole.get(stamp, 0) + num_blocks
        if left:
            whole[stamp] = left
        else:
            del whole[stamp]
        self._size_whole += num_blocks
        if stamp >= self._first_with:
            self._size_with += num_blocks

    def settle(self, room: int) -> None:
        """Let the windows have `room` blocks, at the end of a use.  Amortised O(1)."""
        self._room = room
        whole, tails = self._whole, self._tails
        for _ in range(_MOST_USES):
            if self._size_with <= room:
                break
            first = self._first_with
            self._size_with -= whole.get(first, 0) + tails.get(first, 0)
            self._first_with = first + 1
        for _ in range(_MOST_USES):
            if self._size_whole <= room:
                break
            first = self._first_whole
            self._size_whole -= whole.pop(first, 0)
            tails.pop(first, None)
            self._first_whole = first + 1

    def asked(self, match: Match, tokens: bytes) -> None:
        """Count what a request would find of tails, and lose of whole blocks.  O(nodes passed)."""
        first, width = self._first_with, self._block_bytes
        node, lost, gained = match.node, 0, 0
        at, count = node, match.used
        while at.parent is not None and not at.lock_ref and at.last_used < first:
            lost += count
            at = at.parent
            count = len(at.blocks)
        if not self.is_scarce:
            lost = 0
        near = match.near
        is_kept = near is not None and (near.lock_ref > 0 or near.last_used >= first)
        if near is not None and is_kept and len(near.tokens) < width:
            gained = match.partial_tokens
        if node.ghosts and match.used == len(node.blocks):
            more, found = self._asked_ghosts(node, tokens, match.end)
            lost += more
            gained = max(gained, found)
        self._gained += gained
        self._lost += lost * (width // TOKEN_BYTES)
        self._seen += -(-len(tokens) // width)
        if self._seen > _REMEMBERED * max(self._room, _LEAST):
            self._seen = 0
            self._gained //= 2
            self._lost //= 2
        more = self._gained - _SURELY * self._lost
        if self.pays:
            self.pays = more > 0
        else:
            self.pays = more * _PART > self._room * (width // TOKEN_BYTES)

    def _asked_ghosts(self, node: Node, tokens: bytes, start: int) -> tuple[int, int]:
        """Count the blocks lost, and the tokens of a tail found, among the ghosts below a node."""
        first, longest, width = self._first_with, self._first_whole, self._block_bytes
        at, end, lost = start, len(tokens) - TOKEN_BYTES, 0
        while node.ghosts and at < end:
            upto = min(end, at + width)
            ghost = node.ghosts.get(tokens[at:upto])
            if ghost is None:
                ghost, _ = node.ghosts.nearest(tokens[at:upto])
            if ghost is None:
                break
            size = len(ghost.tokens)
            same = common_prefix(tokens, at, ghost.tokens, 0, min(size, end - at))
            if size < width:
                return lost, same // TOKEN_BYTES if ghost.used_until >= first else 0
            if ghost.used_until >= longest:
                lost += same // width
            at += same
            if same < size:
                break
            node = ghost
        return lost, 0
