"""Stored blocks by a rolling hash: the same tokens found at any offset of a prompt.

```
stored   |a b c d|e f g h|i j k l|         whole blocks of one namespace, wherever they were
prompt    x y e f g h i j k l z            every window of a block's length is hashed and looked up
              └─ block ─┘└ block ┘         start 2, source 4: keys would have to turn by -2
```
Any run of `2 * block_size - 1` stored tokens holds a whole block, wherever it begins: so each one
is found.  Windows at all offsets against blocks at fixed ones is rsync's way (Tridgell 1996); the
hash is Karp's and Rabin's (1987), modulo a prime, to a base that is drawn anew for each namespace
from a secret: who does not know it cannot make tokens that collide.  A hash only says where to
look.  Tokens decide.

**Windows of a power of two** are hashed by doubling, in a few numpy calls for all offsets:

```
hash[2w](i) = hash[w](i) * base**w + hash[w](i + w)
```

**The table** is of chains of blocks, one chain a bucket, in arrays by block id.  Of blocks with
equal tokens only the first one is in it; the others hang on it in a list of their own, and one of
them takes its place when it goes: a block stored a thousand times makes no chain longer.

```
bucket ──► block 7 ──► block 31 ──► -            different tokens
             │ same      │ same
           block 12      -                       equal ones
             │
           block 90
```
Nothing is ever looked at block by block in Python but what a look-up has found, and nothing grows:
arrays are as long as the pool, and take memory where they are written.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b
from itertools import pairwise
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, BlockId, BlockTable, Namespace

_PRIME: Final = (1 << 31) - 1
"""Products of two remainders fit 64 bits."""
_NONE: Final = -1

Ids: TypeAlias = NDArray[np.int32]
Words: TypeAlias = NDArray[np.uint32]
Hashes: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Donor:
    """Stored blocks, one behind the other, that hold a run of a prompt's tokens."""

    start: int
    """Position of the run's first token in the prompt."""
    source: int
    """Position at which it is stored."""
    blocks: tuple[BlockId, ...]

    @property
    def delta(self) -> int:
        """How far its keys have to turn."""
        return self.start - self.source


@dataclass(frozen=True, slots=True)
class _Space:
    """One life of a namespace."""

    number: int
    base: int
    shift: int
    """Added to each token: else blocks of zeros would be equal under every base."""


class RollingIndex:
    """Whole blocks that are stored, by their tokens; an `IndexListener`.

    Args:
        end: above every block id.
        block_size: tokens of a block, a power of two.
        secret: at least 16 bytes that nobody else knows.
    """

    def __init__(self, end: int, block_size: int, secret: bytes) -> None:
        if end < 1 or block_size < 1 or block_size & (block_size - 1):
            raise InvalidRequest(
                f"an index of blocks below {end}, of {block_size} tokens: at least one, of a power "
                "of two"
            )
        if len(secret) < 16:
            raise InvalidRequest(f"a secret of {len(secret)} bytes: at least 16")
        self.block_size = block_size
        self._secret = secret
        self._spaces: dict[Namespace, _Space] = {}
        self._num_spaces = 0
        self._tokens: Words = np.zeros((end, block_size), np.uint32)
        self._hash: Ids = np.zeros(end, np.int32)
        self._source: Ids = np.zeros(end, np.int32)
        self._space: Ids = np.zeros(end, np.int32)
        """The life of a namespace that a block is indexed for; 0: for none."""
        self._next: Ids = np.zeros(end, np.int32)
        self._same: Ids = np.zeros(end, np.int32)
        self._back: Ids = np.zeros(end, np.int32)
        """Of the list of equal ones; `_NONE` for the first, which is in the table."""
        self._mask = (1 << (end - 1).bit_length()) - 1
        self._first: Ids = np.full(self._mask + 1, _NONE, np.int32)

    @property
    def num_blocks(self) -> int:
        """Blocks that are indexed, those of cleared namespaces included.  O(blocks)."""
        return int(np.count_nonzero(self._space))

    @property
    def block_bytes(self) -> int:
        """Bytes for each block, its tokens among them."""
        return self.block_size * TOKEN_BYTES + 7 * 4

    def blocks_of(self, namespace: Namespace) -> list[int]:
        """Give the blocks that are indexed of a namespace, in order.  O(blocks), for checks."""
        space = self._spaces.get(namespace)
        return [] if space is None else np.flatnonzero(self._space == space.number).tolist()

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Index the whole blocks of a run.  O(tokens), no Python per block.

        Args:
            namespace: where.
            parent: the block before, which is indexed; None: the run is a prompt's beginning.
            tokens: packed.
            blocks: as many as the tokens fill; a partly filled last one is left out.
        """
        size = self.block_size
        num = len(tokens) // (size * TOKEN_BYTES)
        if not num:
            return
        space = self._spaces.get(namespace) or self._open(namespace)
        rows = np.frombuffer(tokens, "<u4", num * size).reshape(num, size)
        ids = np.array(blocks[:num], np.int32)
        self._forget(ids)
        hashes = self._hashes(rows.reshape(-1), space)[::size]
        first = self._look_up(hashes, rows, space.number)
        start = 0 if parent is None else int(self._source[parent]) + size
        self._tokens[ids] = rows
        self._hash[ids] = hashes
        self._source[ids] = np.arange(start, start + num * size, size)
        self._space[ids] = space.number
        self._hang(ids, hashes, first)

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Forget blocks.  O(blocks), no Python per block."""
        self._forget(np.array(blocks, np.int32))

    def cleared(self, namespace: Namespace) -> None:
        """Forget all of a namespace.  O(1): what is left of it goes when its blocks are used."""
        self._spaces.pop(namespace, None)

    def left(self, namespace: Namespace) -> None:
        """Forget a namespace's name."""
        self._spaces.pop(namespace, None)

    def search(self, namespace: Namespace, tokens: bytes, start: int = 0) -> list[Donor]:
        """Find stored blocks of a prompt's tokens, from a position on.  Changes nothing.

        From the front, each as soon as it fits behind the one before; what is stored side by side
        and found side by side is one donor.  O(tokens), and a step in Python per block found.

        Args:
            namespace: only what is stored in it is found.
            tokens: packed.
            start: position from which on they are looked for.
        """
        space = self._spaces.get(namespace)
        size = self.block_size
        words = np.frombuffer(tokens, "<u4")[start:]
        if space is None or len(words) < size:
            return []
        windows = np.lib.stride_tricks.sliding_window_view(words, size)
        found = self._look_up(self._hashes(words, space), windows, space.number)
        at = np.flatnonzero(found >= 0)
        if not len(at):
            return []
        behind = np.searchsorted(at, at + size).tolist()
        chosen = []
        here = 0
        while here < len(behind):
            chosen.append(here)
            here = behind[here]
        at = at[chosen]
        ids = found[at]
        sources = self._source[ids]
        apart = (np.diff(at) != size) | (np.diff(sources) != size)
        cuts = [0, *(np.flatnonzero(apart) + 1).tolist(), len(at)]
        table = [BlockId(block) for block in ids.tolist()]
        return [
            Donor(start + int(at[low]), int(sources[low]), tuple(table[low:high]))
            for low, high in pairwise(cuts)
        ]

    def _open(self, namespace: Namespace) -> _Space:
        self._num_spaces += 1
        number = self._num_spaces
        drawn = blake2b(number.to_bytes(8, "big"), key=self._secret[:64], digest_size=16).digest()
        base = int.from_bytes(drawn[:8], "big") % (_PRIME - 2) + 2
        space = _Space(number, base, int.from_bytes(drawn[8:], "big") % _PRIME)
        self._spaces[namespace] = space
        return space

    def _hashes(self, words: Words, space: _Space) -> Hashes:
        """Hash every window of a block's length."""
        found: Hashes = (words.astype(np.int64) + space.shift) % _PRIME
        width, power = 1, space.base
        while width < self.block_size:
            found = (found[:-width] * power + found[width:]) % _PRIME
            width, power = 2 * width, power * power % _PRIME
        return found

    def _look_up(self, hashes: Hashes, rows: Words, space: int) -> Ids:
        """Give for each row of tokens the first block in the table that holds them, or `_NONE`."""
        found: Ids = np.full(len(hashes), _NONE, np.int32)
        blocks = self._first[hashes & self._mask]
        which = np.flatnonzero(blocks >= 0)
        blocks = blocks[which]
        while len(which):
            fits = (self._hash[blocks] == hashes[which]) & (self._space[blocks] == space)
            maybe = np.flatnonzero(fits)
            if len(maybe):
                equal = (self._tokens[blocks[maybe]] == rows[which[maybe]]).all(axis=1)
                maybe = maybe[equal]
                found[which[maybe]] = blocks[maybe]
            blocks = self._next[blocks]
            goes_on = (blocks >= 0) & (found[which] < 0)
            which, blocks = which[goes_on], blocks[goes_on]
        return found

    def _hang(self, ids: Ids, hashes: Hashes, first: Ids) -> None:
        """Put blocks, in no list yet, behind their equals; those that have none, into the table.

        Equal ones among themselves are made lists first.  Should hashes of unequal ones be equal,
        equal ones may be in several lists, each with a first one in the table: none is lost.
        """
        order = np.argsort(hashes, kind="stable")
        ids, first = ids[order], first[order]
        rows = self._tokens[ids]
        is_new = np.ones(len(ids), np.bool_)
        is_new[1:] = (rows[1:] != rows[:-1]).any(axis=1)
        self._same[ids] = _NONE
        self._back[ids] = _NONE
        inner = np.flatnonzero(~is_new)
        self._same[ids[inner - 1]] = ids[inner]
        self._back[ids[inner]] = ids[inner - 1]
        starts = np.flatnonzero(is_new)
        lasts = ids[np.append(starts[1:] - 1, len(ids) - 1)]
        heads, hooks = ids[starts], first[starts]
        _, once = np.unique(hooks, return_index=True)
        is_hung = np.zeros(len(heads), np.bool_)
        is_hung[once] = True
        is_hung &= hooks >= 0
        hooks, hung, ends = hooks[is_hung], heads[is_hung], lasts[is_hung]
        behind = self._same[hooks]
        self._same[hooks], self._back[hung], self._same[ends] = hung, hooks, behind
        has_more = behind >= 0
        self._back[behind[has_more]] = ends[has_more]
        self._relink(heads[:0], heads[~is_hung])

    def _forget(self, ids: Ids) -> None:
        """Take blocks out of their lists, and out of the table; those that are in none are let be.

        Neighbours may go together: each one's ends are moved past those that go, in doubling steps.
        """
        ids = ids[self._space[ids] != 0]
        if not len(ids):
            return
        was_first = self._back[ids] < 0
        self._space[ids] = 0
        for links in (self._same, self._back):
            ends = links[ids]
            while True:
                goes = (ends >= 0) & (self._space[ends] == 0)
                if not goes.any():
                    break
                ends[goes] = links[ends[goes]]
                links[ids] = ends
        before, after = self._back[ids], self._same[ids]
        self._same[before[before >= 0]] = after[before >= 0]
        self._back[after[after >= 0]] = before[after >= 0]
        heirs = after[was_first]
        self._relink(ids[was_first], heirs[heirs >= 0])

    def _relink(self, gone: Ids, come: Ids) -> None:
        """Make the chains anew in which blocks come and go.  O(these chains)."""
        buckets = np.unique(self._hash[np.concatenate([gone, come])] & self._mask)
        if not len(buckets):
            return
        members = [come]
        blocks = self._first[buckets]
        while len(blocks := blocks[blocks >= 0]):
            members.append(blocks)
            blocks = self._next[blocks]
        linked = np.concatenate(members)
        linked = linked[~np.isin(linked, gone)]
        places = self._hash[linked] & self._mask
        order = np.argsort(places, kind="stable")
        linked, places = linked[order], places[order]
        self._first[buckets] = _NONE
        if not len(linked):
            return
        is_first = np.ones(len(linked), np.bool_)
        is_first[1:] = places[1:] != places[:-1]
        self._next[linked[:-1]] = np.where(is_first[1:], _NONE, linked[1:])
        self._next[linked[-1]] = _NONE
        self._first[places[is_first]] = linked[is_first]
