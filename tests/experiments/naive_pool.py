"""The rule of "What is counted, exactly" in docs/experiments.md, as naively as it is written there.

Shares no code with the cache: lists of tokens, one object per block, every leaf looked at.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(eq=False)
class Held:
    """A stored block below the one before it; fewer tokens than a block has: a tail."""

    tokens: tuple[int, ...] = ()
    parent: Held | None = None
    below: list[Held] = field(default_factory=list)
    used: int = 0
    found: bool = False
    """Of a tail: whether a request found it since it was stored."""

    def prefix(self) -> tuple[int, ...]:
        return () if self.parent is None else self.parent.prefix() + self.tokens


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading tokens that are equal."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


class NaivePool:
    """A pool of `capacity` blocks (None: any number) that requests use one after the other.

    Of whole blocks that are as old as each other any one may go: `chosen` says which, as far as it
    goes, and then it is the first.
    """

    def __init__(
        self, size: int, capacity: int | None, mode: str, chosen: Sequence[int] = ()
    ) -> None:
        self.size, self.capacity, self.mode = size, capacity, mode
        self.chosen = list(chosen)
        self.equals: list[int] = []
        """Each time that there were several: how many."""
        self.root = Held()
        self.stored: list[Held] = []
        self.clock = 0
        self.last_evicted: int | None = None
        """The last use of the whole block that was evicted last."""
        self.remembered: dict[tuple[int, ...], int] = {}
        """Last uses of evicted blocks, by all tokens up to their end."""
        self.start = 0
        """The first use that is counted; 0: none."""
        self.first = {"whole": 0, "with tails": 0}
        self.gained = self.lost = self.evicted = 0
        self.tails_pay = self.ever_paid = self.is_scarce = False

    def serve(self, tokens: list[int], prompt: int) -> tuple[int, int]:
        """Serve a request; give its tokens in whole blocks that hit, and in a copied part."""
        size, tails = self.size, self.mode == "tails"
        path: list[Held] = []
        at = self.root
        while found := self._child(at, tokens[len(path) * size : (len(path) + 1) * size]):
            at = found
            path.append(at)
        hit = len(path)
        source, part = self._nearest(at, tokens[hit * size : (hit + 1) * size])
        counted = self._count(hit * size, part, prompt)
        blocks, fits = len(tokens) // size, True
        if self.capacity is not None and blocks >= self.capacity:
            if blocks > self.capacity:
                fits, tokens = False, tokens[: self.capacity * size]
                blocks = self.capacity
            if self.mode != "off":
                source, part = None, 0
                counted = self._count(hit * size, part, prompt)
        if self.mode == "off":
            source = None
        if self.is_scarce:
            self.lost += size * sum(one.used < self.first["with tails"] for one in path)
        if source is not None and len(source.tokens) < size:
            self._gain(source.used, part)
        if source is not None:
            self._use(source, part)
        self._make_room(blocks + 1 - hit, path, source)
        there = hit * size + part if source is not None else 0
        for number in range(hit, -(-len(tokens) // size) if tails and fits else blocks):
            one = tuple(tokens[number * size : (number + 1) * size])
            if number == hit and there == len(tokens):
                break  # all of it was there: nothing is stored
            if len(one) < size and any(common(one, other.tokens) == len(one) for other in at.below):
                break  # a stored block holds the tail already
            for other in [other for other in at.below if other.tokens == one[: len(other.tokens)]]:
                self._drop(other)  # a tail that this one goes on from
            at = Held(one, at)
            assert at.parent is not None
            at.parent.below.append(at)
            self.stored.append(at)
            path.append(at)
            self._recall(at)
        self._end(path, tokens if len(tokens) > there else [], source, part)
        return counted

    def _end(self, path: list[Held], tokens: list[int], copied: Held | None, part: int) -> None:
        """Count as used what was copied, what covers the tail, and the path."""
        if copied is not None and (copied not in self.stored or copied in path):
            copied = None
        cover: Held | None = None
        whole = [one for one in path if len(one.tokens) == self.size]
        left = tokens[len(whole) * self.size :]
        if self.mode == "tails" and left and len(whole) == len(path):
            cover, same = self._nearest(path[-1] if path else self.root, left)
            cover = cover if same == len(left) else None
        if copied is not None and copied is not cover:
            self._use(copied, part)
        if cover is not None:
            self._use(cover, self.size)
        self.clock += 1
        for one in path:
            one.used = self.clock
        is_weighed = self.capacity is not None and self.mode == "tails" and self.size > 1
        if is_weighed and not self.start and 2 * len(self.stored) > (self.capacity or 0) + 1:
            self.start = self.clock + 1
            self.first = dict.fromkeys(self.first, self.start)

    def _use(self, one: Held, part: int) -> None:
        """Count a use now; of less than half of a whole block, one so long ago as that is less."""
        self.clock += 1
        one.found |= 2 * part >= len(one.tokens)
        lacking = max(0, self.size - 2 * part)
        if self.last_evicted is None or len(one.tokens) < self.size:
            lacking = 0
        ago = 0 if not lacking else (self.clock - self.last_evicted) * lacking // self.size
        one.used = max(one.used, self.clock - ago)

    def _gain(self, used: int, num_tokens: int) -> None:
        if self.start and used >= self.first["with tails"]:
            self.gained += num_tokens

    def _held(self, which: str, path: list[Held]) -> int:
        """Count the blocks that an LRU holds: stored or remembered, but for the path."""
        uses = [(len(one.tokens), one.used) for one in self.stored if one not in path]
        uses += [(len(one) % self.size, used) for one, used in self.remembered.items()]
        return sum(
            used >= self.first[which] and (which == "with tails" or size in {0, self.size})
            for size, used in uses
        )

    def _weigh(self, short: int, path: list[Held]) -> None:
        """Let both LRUs make room, and say whether tails pay, before blocks are evicted."""
        if not self.start:
            return
        assert self.capacity is not None
        left, first = len(self.stored) - len(path) - short, self.first
        most = first["with tails"] + 64 + short
        while self._held("with tails", path) > left and first["with tails"] < most:
            first["with tails"] += 1
        most = min(first["with tails"], first["whole"] + 64 + short)
        while self._held("whole", path) > left and first["whole"] < most:
            first["whole"] += 1
        self.is_scarce = True
        self.evicted += short
        if self.evicted > 2 * max(self.capacity + 1, 64):
            self.evicted, self.gained, self.lost = 0, self.gained // 2, self.lost // 2
        more = self.gained - 2 * self.lost
        enough = 0 if self.tails_pay else (self.capacity + 1) * self.size // 32
        self.tails_pay = more > enough
        self.ever_paid |= self.tails_pay

    def _recall(self, one: Held) -> None:
        """Forget what was remembered of a stored block, or of a tail that it goes on from."""
        assert one.parent is not None
        prefix, above = one.prefix(), one.parent.prefix()
        if prefix in self.remembered:
            used = self.remembered.pop(prefix)
            if len(one.tokens) < self.size:
                self._gain(used, len(one.tokens))
            elif self.start and used >= self.first["whole"]:
                self.lost += self.size
            return
        beside = [
            other
            for other in self.remembered
            if other[: len(above)] == above
            and len(above) < len(other) <= len(above) + self.size
            and packed(other[len(above) :]) < packed(one.tokens)
        ]
        if beside:
            last = max(beside, key=lambda other: packed(other[len(above) :]))
            if one.tokens[: len(last) - len(above)] == last[len(above) :]:
                self._gain(self.remembered.pop(last), len(last) - len(above))

    def _count(self, whole: int, part: int, prompt: int) -> tuple[int, int]:
        limit = prompt - 1
        hit = min(whole, limit // self.size * self.size)
        return hit, min(whole + part, limit) - hit

    def _child(self, at: Held, block: list[int]) -> Held | None:
        full = len(block) == self.size
        return next((one for one in at.below if full and one.tokens == tuple(block)), None)

    def _nearest(self, at: Held, rest: list[int]) -> tuple[Held | None, int]:
        ordered = sorted(at.below, key=lambda one: packed(one.tokens))
        smaller = [one for one in ordered if packed(one.tokens) < packed(rest)][-1:]
        larger = [one for one in ordered if packed(one.tokens) >= packed(rest)][:1]
        best, most = None, 0
        for one in smaller + larger:
            if (same := common(one.tokens, rest)) > most:
                best, most = one, same
        return best, most

    def _make_room(self, new: int, path: list[Held], source: Held | None) -> None:
        if self.capacity is None:
            return
        read = 0
        while (short := len(self.stored) + read + new - self.capacity - 1) > 0:
            self._weigh(short, path)
            for _ in range(short):
                gone = self._first_to_go(path)
                read += gone is source  # it leaves, and its memory is read for a while yet
                self.remembered[gone.prefix()] = gone.used
                if len(gone.tokens) == self.size:
                    self.last_evicted = gone.used
                self._drop(gone)

    def _first_to_go(self, path: list[Held]) -> Held:
        """Give the oldest tail that is not kept; else the oldest of the whole blocks."""
        tails = [one for one in self.stored if len(one.tokens) < self.size]
        for kept in (False, True):
            some = [one for one in tails if one.found == kept]
            first = min(some, key=lambda one: one.used, default=None)
            if first is not None and not (kept or self.tails_pay):
                return first
            if first is not None and self.start and first.used < self.first["with tails"]:
                return first
        leaves = [
            one
            for one in self.stored
            if len(one.tokens) == self.size
            and one not in path
            and all(len(below.tokens) < self.size for below in one.below)
        ]
        if not leaves:
            return min(tails, key=lambda one: one.used)
        oldest = self._any([one for one in leaves if one.used == min(leaf.used for leaf in leaves)])
        return max(oldest.below, key=lambda one: packed(one.tokens), default=oldest)

    def _any(self, equals: list[Held]) -> Held:
        """Give one of some that are as old as each other."""
        if len(equals) == 1:
            return equals[0]
        self.equals.append(len(equals))
        if len(self.chosen) < len(self.equals):
            self.chosen.append(0)
        return equals[self.chosen[len(self.equals) - 1]]

    def _drop(self, one: Held) -> None:
        assert one.parent is not None
        one.parent.below.remove(one)
        self.stored.remove(one)
