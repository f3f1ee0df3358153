"""The sequences in hand, where the kernels are: tables, lengths and plan stay, only changes travel.

```
host                                     device, allocated once
owners   w   c   a   b                   tables   [max_seqs, max_blocks]   a sequence's blocks
rows     0   1   2   3                   lengths  [max_seqs]               its keys
             └── a, b, c share ──┘       plan     order, own parts, runs   padded to its capacity

step                        travels
all decode                  one token each: lengths grow by one where they are, slots follow
a sequence joins            its table, all lengths, the plan
it needs a block            4 bytes
one leaves                  nothing: rows close up on the device; the plan, if it changes
```

Rows lie in the order of the group plan, so that whoever shares a run is a slice of the batch.  The
host keeps a copy of what it has sent, and so never asks the device: a step has no synchronisation,
the tensors keep their addresses, and a captured graph of a decode step can be replayed.

On a CPU the device is the same memory's neighbour and all of this is the same.
"""

from __future__ import annotations

from array import array
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from itertools import count
from operator import eq, ge
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels import GroupPlan, SharingCost
from prefixcache_kernels.plan import FEW_QUERIES
from prefixcache_worker.batch import Batch, Piece


class DeviceBatch:
    """Packs the pieces of each step; see the drawing above.  For one thread.

    Args:
        max_seqs: sequences in hand at a time.
        max_blocks: blocks of the longest.
        block_size: tokens of a block.
        cost: when sharing pays.
        device: where the kernels run.
    """

    def __init__(
        self,
        max_seqs: int,
        max_blocks: int,
        block_size: int,
        cost: SharingCost,
        device: str | torch.device = "cpu",
    ) -> None:
        self.block_size = block_size
        self.cost = cost
        self.tables = torch.zeros(max_seqs, max_blocks, dtype=torch.int32, device=device)
        """`[max_seqs, max_blocks]` int32; rows of no sequence are not cleaned."""
        self.lengths = torch.zeros(max_seqs, dtype=torch.int32, device=device)
        """`[max_seqs]` int32: keys of each row after the step; 0 for no sequence."""
        self.query_start = torch.arange(max_seqs + 1, dtype=torch.int32, device=device)
        """`[max_seqs + 1]`: of a step in which every row decodes."""
        empty = GroupPlan.alone(max_seqs)
        self.plan = empty.padded(max_seqs, max_seqs).to(device)
        """The plan of the rows, padded with runs of no blocks; updated in place."""
        self.num_bytes = 0
        """What has travelled to the device since the start."""
        self.num_plans = 0
        """Plans made since the start; a plan that still holds is used again."""
        self._rows = torch.arange(max_seqs, device=device)
        self._sent = np.zeros((max_seqs, max_blocks), dtype=np.int32)
        self._seats: list[_Seat] = []
        """By row."""
        self._by_owner: dict[Hashable, _Seat] = {}
        self._made: _Made | None = None

    def keep(self, owners: Sequence[Hashable]) -> None:
        """Drop all sequences but those of `owners`.  Rows close up on the device."""
        wanted = set(owners)
        if wanted.issuperset(self._by_owner):
            return
        self._by_owner = {k: seat for k, seat in self._by_owner.items() if k in wanted}
        kept = [seat.row for seat in self._seats if seat.owner in wanted]
        self._reorder(kept)
        self.lengths[len(kept) :] = 0
        self._made = None

    def pack(
        self, owners: Sequence[Hashable], pieces: Sequence[Piece]
    ) -> tuple[Batch, Sequence[int]]:
        """Pack a step, and find what its sequences share.

        Args:
            owners: whose pieces they are: anything that names a sequence from step to step.
            pieces: at least one, with blocks enough for their tokens.

        Returns:
            The batch, and the order of the pieces in it.

        Raises:
            InvalidRequest: More sequences or blocks than there is room for.
        """
        seats = [self._seat(o, p.block_table) for o, p in zip(owners, pieces, strict=True)]
        order = sorted(range(len(pieces)), key=lambda at: seats[at].row)
        made = self._plan(
            [seats[at].row for at in order], [_limit(pieces[at], self.block_size) for at in order]
        )
        order = [order[position] for position in made.positions]
        chosen = [pieces[at] for at in order]
        return self._assemble(made, [seats[at] for at in order], chosen), order

    @property
    def num_seqs(self) -> int:
        """Sequences that have a row."""
        return len(self._seats)

    # --------------------------------------------------------------------------------- the rows

    def _seat(self, owner: Hashable, table: Sequence[int]) -> _Seat:
        """Give a sequence its row, and bring the row up to date."""
        seat = self._by_owner.get(owner)
        if seat is None:
            if len(self._seats) == len(self._sent):
                raise InvalidRequest(f"more than {len(self._sent)} sequences in hand")
            seat = self._by_owner[owner] = _Seat(owner, len(self._seats))
            self._seats.append(seat)
        if seat.table is not table or seat.width != len(table):
            self._send(seat, table)
        return seat

    def _send(self, seat: _Seat, table: Sequence[int]) -> None:
        """Send the entries of a table that the device does not have."""
        width = len(table)
        if width > self._sent.shape[1]:
            raise InvalidRequest(
                f"a table of {width} blocks; there is room for {self._sent.shape[1]}"
            )
        row = self._sent[seat.row]
        fresh = np.asarray(memoryview(table) if isinstance(table, array) else table, np.int32)
        both = min(width, seat.width)
        differs = (row[:both] != fresh[:both]).nonzero()[0]
        first = int(differs[0]) if len(differs) else both
        if len(differs):
            self._made = None  # else the table only grew, or shrank: what is shared stays shared
        row[first:width] = fresh[first:]
        self._copy(self.tables[seat.row, first:width], row[first:width])
        seat.table, seat.width = table, width

    def _reorder(self, rows: Sequence[int]) -> None:
        """Put these rows first, in this order, and forget the others."""
        num = len(rows)
        index = self._travel(np.array(rows, dtype=np.int64))
        self.tables[:num] = self.tables[index]
        self.lengths[:num] = self.lengths[index]
        self._sent[:num] = self._sent[list(rows)]
        self._seats = [self._seats[row] for row in rows]
        for row, seat in enumerate(self._seats):
            seat.row = row

    # --------------------------------------------------------------------------------- the plan

    def _plan(self, rows: list[int], limits: list[int]) -> _Made:
        """Give the plan of these rows (in ascending order): the last one, if it still holds."""
        made = self._made
        if made is not None and made.rows == rows:
            if made.limits == limits:
                return made
            # Own blocks become whole all the time; nobody shares them unless limits were the bound.
            if not made.groups.limited and all(map(ge, limits, made.limits)):
                made.limits = limits
                return made
        width = max(self._seats[row].width for row in rows)
        tables = self._sent[:, :width]
        found = GroupPlan.build(
            tables[: len(rows)] if _dense(rows) else tables[rows], limits, self.cost
        )
        self.num_plans += 1
        positions = found.positions
        groups = found.straight()
        picked: slice | Tensor = slice(0, len(rows))
        if len(rows) == len(self._seats):
            if not _dense(positions):
                self._reorder(positions)
            limits = [limits[position] for position in positions]
            self._copy(self.plan.packed, groups.padded(*self._capacity).packed.numpy())
            self._made = _Made(rows, limits, range(len(rows)), groups, picked)
            return _Made(rows, limits, positions, groups, picked)
        picked = self._travel(np.array([rows[position] for position in positions]))
        self._made = _Made(rows, limits, positions, groups, picked)
        return self._made

    @property
    def _capacity(self) -> tuple[int, int]:
        return len(self._sent), len(self._sent)

    # -------------------------------------------------------------------------------- the tensors

    def _assemble(self, made: _Made, seats: Sequence[_Seat], pieces: Sequence[Piece]) -> Batch:
        lengths = [piece.start + len(piece.tokens) for piece in pieces]
        if all(seat.length + 1 == length for seat, length in zip(seats, lengths, strict=True)):
            self.lengths[made.picked] += 1
        else:
            self.lengths[made.picked] = self._travel(np.array(lengths, dtype=np.int32))
        for seat, length in zip(seats, lengths, strict=True):
            seat.length = length
        num, size = len(pieces), self.block_size
        tables = self.tables[made.picked, : -(-max(lengths) // size)]
        contexts = self.lengths[made.picked]
        groups = (
            made.groups if self.tables.device.type == "cpu" else made.groups.to(self.tables.device)
        )
        if not all(len(piece.tokens) == 1 and piece.logits for piece in pieces):
            return Batch.of(pieces, tables, contexts, groups, size)
        tokens = self._travel(np.array([piece.tokens[0] for piece in pieces]))
        positions = contexts.long() - 1
        blocks = tables.gather(1, (positions // size)[:, None])[:, 0].long()
        return Batch(
            tokens=tokens,
            positions=positions,
            slot_mapping=blocks * size + positions % size,
            block_tables=tables,
            query_start=self.query_start[: num + 1],
            context_lens=contexts,
            rows=self._rows[:num],
            groups=groups,
        )

    def _travel(self, values: npt.NDArray[Any]) -> Tensor:
        """Bring numbers to the device, and count them."""
        self.num_bytes += values.nbytes
        return torch.from_numpy(values).to(self.tables.device, non_blocking=True)

    def _copy(self, place: Tensor, values: npt.NDArray[Any]) -> None:
        """Bring numbers to their place on the device, and count them."""
        self.num_bytes += values.nbytes
        place.copy_(torch.from_numpy(values), non_blocking=True)


@dataclass(eq=False, slots=True)
class _Seat:
    """A sequence's row, and what the device knows of it."""

    owner: Hashable
    row: int
    table: Sequence[int] | None = None
    """The very table that was sent, so that an unchanged one is known by its identity."""
    width: int = 0
    length: int = -1


@dataclass(eq=False, slots=True)
class _Made:
    """A plan, and for which rows it was made."""

    rows: list[int]
    limits: list[int]
    positions: Sequence[int]
    """The order of the batch, of the rows in ascending order."""
    groups: GroupPlan
    """For the batch in that order."""
    picked: slice | Tensor
    """The rows in that order."""


def _limit(piece: Piece, block_size: int) -> int:
    """Count the blocks that a piece may share: whole, and before all its queries.

    Sequences in prefill compute much on every byte that they read, and share nothing.
    """
    return piece.start // block_size if len(piece.tokens) <= FEW_QUERIES else 0


def _dense(rows: Sequence[int]) -> bool:
    return all(map(eq, rows, count()))
