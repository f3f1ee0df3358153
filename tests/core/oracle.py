"""The naive oracle: plain lists, brute force, nothing of the core.

Three models, each the most obvious thing that can be right:

`Memory`     what a pool really holds: one prefix per slot, written only by simulated workers.
`Library`    every prefix that was ever published in a namespace, and longest common prefixes by
loop. `LeafLru`    a block-by-block cache that evicts the least recently used leaf, one block at a
time.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence

Tokens = tuple[int, ...]
Slot = tuple[int, int]
"""(block, offset in the block)."""
Holding = tuple[Hashable, Tokens]
"""What a slot holds: the namespace and all tokens up to the slot's own position."""


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Count the leading tokens that `a` and `b` share, one by one."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count


class Memory:
    """The pool's bytes.  KV of a token depends on all before it, so a slot holds a prefix."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self._slots: dict[Slot, Holding | None] = {}

    def write(self, block: int, offset: int, holding: Holding | None) -> None:
        """Overwrite one slot; None is rubbish."""
        self._slots[block, offset] = holding

    def read(self, block: int, offset: int) -> Holding | None:
        """Give what a slot holds; None is rubbish or never written."""
        return self._slots.get((block, offset))

    def copy(self, src: int, dst: int, num_tokens: int) -> None:
        """Copy leading slots, as a worker does when a grant asks for it."""
        for offset in range(num_tokens):
            self._slots[dst, offset] = self._slots.get((src, offset))

    def wrong(self, table: Sequence[int], namespace: Hashable, tokens: Tokens) -> str:
        """Read `tokens` through a block table; say where something else is stored, or nothing."""
        for position in range(len(tokens)):
            slot = (table[position // self.block_size], position % self.block_size)
            found = self._slots.get(slot)
            if found != (namespace, tokens[: position + 1]):
                return f"position {position} (slot {slot}) holds {found}"
        return ""


class Library:
    """Every prefix that was published since the start, or since the namespace was reset."""

    def __init__(self) -> None:
        self._published: dict[Hashable, set[Tokens]] = {}
        self._forgotten: dict[Hashable, set[Tokens]] = {}

    def publish(self, namespace: Hashable, tokens: Tokens) -> None:
        """Store one prefix.  Those that it extends are in it."""
        known = self._published.setdefault(namespace, set())
        if tokens and tokens not in known:
            known.difference_update([one for one in known if tokens[: len(one)] == one])
            known.add(tokens)

    def reset(self, namespace: Hashable) -> None:
        """Forget a namespace, but not that it was once seen."""
        lost = self._published.pop(namespace, set())
        self._forgotten.setdefault(namespace, set()).update(lost)

    def longest(self, namespace: Hashable, tokens: Tokens, *, multiple_of: int = 1) -> int:
        """Tokens that `tokens` shares with anything published, each cut down to whole blocks."""
        return _longest(self._published.get(namespace, ()), tokens, multiple_of)

    def longest_ever(self, namespace: Hashable, tokens: Tokens, *, multiple_of: int = 1) -> int:
        """The same, with all that was published before a reset."""
        before = _longest(self._forgotten.get(namespace, ()), tokens, multiple_of)
        return max(before, self.longest(namespace, tokens, multiple_of=multiple_of))


def _longest(stored: Iterable[Tokens], tokens: Tokens, multiple_of: int) -> int:
    best = 0
    for one in stored:
        whole = len(one) // multiple_of * multiple_of
        best = max(best, common_prefix(one[:whole], tokens))
    return best


class LeafLru:
    """Whole blocks, each named by all tokens up to its end; the oldest leaf is evicted first.

    A request touches its whole path.  A block with a cached child is never evicted.  A sequence
    that is longer than the cache keeps its head.
    """

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.last_used: dict[tuple[Hashable, Tokens], int] = {}
        self.num_evicted = 0
        self._requests = 0

    def lookup(self, namespace: Hashable, prompt: Tokens) -> int:
        """Count the prompt's leading cached blocks; at least one token is left to compute."""
        size = self.block_size
        count = 0
        while (count + 1) * size < len(prompt):
            if (namespace, prompt[: (count + 1) * size]) not in self.last_used:
                break
            count += 1
        return count

    def insert(self, namespace: Hashable, tokens: Tokens) -> None:
        """Store the whole blocks of `tokens` and touch their path."""
        size = self.block_size
        self._requests += 1
        path = [(namespace, tokens[:end]) for end in range(size, len(tokens) + 1, size)]
        for block in path:
            if block in self.last_used:
                self.last_used[block] = self._requests
        for block in path:
            if block not in self.last_used:
                if len(self.last_used) >= self.num_blocks and not self._evict_one():
                    return
                self.last_used[block] = self._requests

    def _evict_one(self) -> bool:
        parents = {(namespace, tokens[: -self.block_size]) for namespace, tokens in self.last_used}
        leaves = [
            (when, block)
            for block, when in self.last_used.items()
            if block not in parents and when != self._requests
        ]
        if not leaves:
            return False
        oldest = min(leaves, key=lambda leaf: leaf[0])[1]
        del self.last_used[oldest]
        self.num_evicted += 1
        return True
