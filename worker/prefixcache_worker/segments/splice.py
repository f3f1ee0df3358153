"""Splices: prompts of which segments are in place, on their way through the engine.

```
granted   [ exact | x x | moved moved moved | y | moved moved | z z z z ]
place       copied        copied, keys turned                              at once, before anything
look                ├──── layer 0, keys and values of layer 1 ────┤        only for a share
compute           x x   m       m           y  m                           pieces, chunk by chunk
                                                              └─ then as any other prompt
```
The pieces of a step are sequences of one batch with the same table, as in `blend`.  Tokens of
segments that are computed again take the place of what was moved; which, the policy says: the
first ones of each run, or the share of all that is furthest from what layer 1 gives now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from prefixcache.errors import Unsupported
from prefixcache.types import Again, Segment
from prefixcache_kernels import SharedPool
from prefixcache_kernels.rotary import Rotary
from prefixcache_worker.batch import Batch, Piece
from prefixcache_worker.model import Model
from prefixcache_worker.probe import Network
from prefixcache_worker.segments.blend import angles_of, turn
from prefixcache_worker.segments.moved import DEVIATION_LAYER, deviation
from prefixcache_worker.store import Claim

_LOOK_LAYERS: Final = DEVIATION_LAYER + 1


class Splicer:
    """Puts segments in place for one model, by one policy.

    Args:
        model: what computes.
        angles: of each layer; see `angles_of`.
        again: what of segments is computed again.

    Raises:
        Unsupported: by this policy it is looked at a layer, and no network here stops there.
    """

    def __init__(self, model: Model, angles: Sequence[Rotary], again: Again) -> None:
        self.model = model
        self.again = again
        self.shallow: Network | None = None
        """The first layers alone, to look at their keys and values."""
        self._angles = angles
        if again.share:
            self.shallow = model.first_layers(_LOOK_LAYERS)

    @classmethod
    def of(cls, model: Model, again: Again) -> Splicer:
        """Read the angles of a model from its folder, and hold it to them.  Takes a second or two.

        Raises:
            Unsupported: its keys cannot be moved, or not by this policy; the message says why.
        """
        from transformers import AutoConfig

        if not model.source:
            raise Unsupported(
                f"model {model.name!r} was not loaded from a folder or id: nothing says how its "
                "keys are turned"
            )
        return cls(model, angles_of(AutoConfig.from_pretrained(model.source), model), again)

    def place(self, pool: SharedPool, claim: Claim) -> None:
        """Copy the segments of a claim to their places, and turn their keys.  O(their tokens).

        After the copies of blocks, and before anything is computed.
        """
        if not claim.segments:
            return
        table = torch.tensor(claim.block_table, dtype=torch.int64)
        size = pool.block_size
        there = [
            _slots(torch.tensor(one.blocks, dtype=torch.int64), size) for one in claim.segments
        ]
        here = [self.slots(table, size, positions_of(one, size)) for one in claim.segments]
        slots = pool.blocks.flatten(2, 3)
        slots[:, :, torch.cat(here)] = slots[:, :, torch.cat(there)]
        deltas: dict[int, list[Tensor]] = {}
        for one, where in zip(claim.segments, here, strict=True):
            if one.delta:
                deltas.setdefault(one.delta, []).append(where)
        for delta, parts in deltas.items():
            turn(pool, torch.cat(parts), delta, self._angles)

    @staticmethod
    def slots(table: Tensor, block_size: int, positions: range) -> Tensor:
        """Give the slots of positions, by a block table: int64, as long."""
        at = torch.arange(positions.start, positions.stop)
        return table[at // block_size] * block_size + at % block_size


class Splice:
    """One prompt that was granted segments.

    Args:
        splicer: has put them in place.
        pool: where.
        claim: the grant.
        tokens: all that the claim is for, in order; kept, not changed.
    """

    def __init__(
        self, splicer: Splicer, pool: SharedPool, claim: Claim, tokens: Sequence[int]
    ) -> None:
        self._splicer, self._pool, self._claim, self._tokens = splicer, pool, claim, tokens
        size = pool.block_size
        moved = [one for one in claim.segments if not one.is_exact]
        self.end = positions_of(moved[-1], size).stop if moved else claim.num_cached
        """Behind the last segment: from there on it is a prompt as any other."""
        self._at = claim.num_cached
        self._looked = claim.num_cached
        """Up to where the first layers have computed anew, for a share."""
        self._moved = torch.zeros(self.end, dtype=torch.bool)
        self._kept = torch.zeros(self.end, dtype=torch.bool)
        for one in moved:
            run = positions_of(one, size)
            self._moved[run.start : run.stop] = True
            self._kept[run.start + one.num_again : run.stop] = True
        self._stored: Tensor | None = None
        if splicer.again.share and moved:
            self._stored = self._of_layer()
        self._skip()

    @property
    def num_valid(self) -> int:
        """Tokens from position 0 that are there."""
        return self._claim.num_cached if self._stored is not None else self._at

    @property
    def is_over(self) -> bool:
        """Whether all is there up to the end of the last segment."""
        return self._stored is None and self._at >= self.end

    def step(self, most: int) -> int:
        """Compute up to `most` tokens.  Their slots are filled when it returns.

        Returns:
            How many ran through all layers.
        """
        if self._stored is not None:
            self._look(most)
            return 0
        pieces, left = [], most
        while left and self._at < self.end:
            stop = self._next(self._at, kept=True)
            stop = min(stop, self._at + left)
            pieces.append(self._piece(self._at, stop))
            left -= stop - self._at
            self._at = stop
            self._skip()
        self._splicer.model.forward(Batch.pack(pieces, self._pool.block_size), self._pool)
        return most - left

    @property
    def is_finite(self) -> bool:
        """Whether what was computed last is made of numbers: those of the last layer tell."""
        if not self.num_valid:
            return True
        block, slot = divmod(self.num_valid - 1, self._pool.block_size)
        made = self._pool.blocks[-1, :, self._claim.block_table[block], slot]
        return bool(made.isfinite().all())

    def _piece(self, start: int, stop: int) -> Piece:
        return Piece(self._tokens[start:stop], start, self._claim.block_table, logits=False)

    def _skip(self) -> None:
        """Go on behind what is kept as it was moved."""
        if self._at < self.end and self._kept[self._at]:
            self._at = self._next(self._at, kept=False)

    def _next(self, at: int, *, kept: bool) -> int:
        """Give the next position that is kept, or is not; the end, if there is none."""
        found = torch.nonzero(self._kept[at:] == kept)
        return at + int(found[0]) if len(found) else self.end

    def _look(self, most: int) -> None:
        """Compute the first layers anew; once all of it is done, choose what goes on."""
        shallow, stop = self._splicer.shallow, min(self.end, self._looked + most)
        assert shallow is not None
        assert self._stored is not None
        batch = Batch.pack([self._piece(self._looked, stop)], self._pool.block_size)
        shallow(batch, self._pool, None)
        self._looked = stop
        if stop < self.end:
            return
        apart = deviation(self._stored, self._of_layer())
        self._of_layer(self._stored)  # what is not computed again stays as it was moved
        count = self._splicer.again.count(len(apart))
        moved = torch.nonzero(self._moved)[:, 0]
        self._kept[moved[apart.topk(count).indices]] = False
        self._stored = None
        self._skip()

    def _of_layer(self, given: Tensor | None = None) -> Tensor:
        """Give, or set, the keys and values of the moved tokens at `DEVIATION_LAYER`."""
        size = self._pool.block_size
        table = torch.tensor(self._claim.block_table, dtype=torch.int64)
        at = torch.nonzero(self._moved)[:, 0]
        where = table[at // size] * size + at % size
        layer = self._pool.blocks[DEVIATION_LAYER].flatten(1, 2)
        if given is not None:
            layer[:, where] = given
        return layer[:, where]


def positions_of(segment: Segment, block_size: int) -> range:
    """Give the positions at which a segment's tokens are in the prompt."""
    return range(segment.start, segment.start + len(segment.blocks) * block_size)


def _slots(blocks: Tensor, block_size: int) -> Tensor:
    return (blocks[:, None] * block_size + torch.arange(block_size)).flatten()
