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


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading tokens that are equal."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )


def packed(tokens: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}I", *tokens)


class NaivePool:
    """A pool of `capacity` blocks (None: any number) that requests use one after the other."""

    def __init__(self, size: int, capacity: int | None, mode: str) -> None:
        self.size, self.capacity, self.mode = size, capacity, mode
        self.root = Held()
        self.stored: list[Held] = []
        self.clock = 0

    def serve(self, tokens: list[int], prompt: int) -> tuple[int, int]:
        """Serve a request; give its tokens in whole blocks that hit, and in a copied part."""
        size, tails = self.size, self.mode == "tails"
        path: list[Held] = []
        at = self.root
        while found := self._child(at, tokens[len(path) * size : (len(path) + 1) * size]):
            at = found
            path.append(at)
        rest = tokens[len(path) * size : (len(path) + 1) * size]
        source, part = self._nearest(at, rest)
        blocks = -(-len(tokens) // size) if tails else len(tokens) // size
        if self.capacity is not None and blocks >= self.capacity:
            blocks = self.capacity
            if self.mode != "off":
                source, part = None, 0
        counted = self._count(len(path) * size, part, prompt)
        if self.mode == "off":
            source = None
        if source is not None and 2 * part >= len(source.tokens):
            self.clock += 1
            source.used = self.clock
        self._make_room(blocks - len(path), path, source)
        if source is not None and len(path) * size + part == len(tokens):
            blocks = len(path)  # all of it was there: nothing is stored
        for number in range(len(path), blocks):
            one = tuple(tokens[number * size : (number + 1) * size])
            if len(one) < size and any(common(one, other.tokens) == len(one) for other in at.below):
                break  # a stored block holds the tail already
            for other in [other for other in at.below if other.tokens == one[: len(other.tokens)]]:
                self._drop(other)  # a tail that this one goes on from
            at = Held(one, at)
            assert at.parent is not None
            at.parent.below.append(at)
            self.stored.append(at)
            path.append(at)
        for held in reversed(path):
            self.clock += 1
            held.used = self.clock
        return counted

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
        while len(self.stored) + read + new > self.capacity:
            leaves = [one for one in self.stored if not one.below and one not in path]
            oldest = min(leaves, key=lambda one: one.used)
            read += oldest is source  # it leaves, and its memory is read for a while yet
            self._drop(oldest)

    def _drop(self, one: Held) -> None:
        assert one.parent is not None
        one.parent.below.remove(one)
        self.stored.remove(one)
