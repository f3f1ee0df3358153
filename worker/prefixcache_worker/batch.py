"""One step's worth of tokens of several sequences, packed side by side.

```
tokens       a a a a a | b | c c c      T = 9 tokens of S = 3 sequences
query_start  0         5   6      9
context_lens 21        7   3        tokens in the cache after this step, own ones included
positions    16 ... 20 | 6 | 0 1 2      so `a` continues a cached prefix, `b` decodes, `c` starts
rows         4           5   8          where logits are wanted
```
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prefixcache_kernels import GroupPlan


@dataclass(frozen=True, slots=True)
class Piece:
    """The tokens that one sequence runs through the model in a step."""

    tokens: Sequence[int]
    start: int
    """Position of the first of them: everything before is in the cache."""
    block_table: Sequence[int]
    """The sequence's blocks in order; `array('i')` and lists will do."""
    logits: bool = True
    """Whether the logits after the last of them are wanted."""
    num_rows: int = 1
    """After how many of them, counted from the last one, if they are."""
    num_drafts: int = 0
    """How many of them, at the end, are only what may come."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Index tensors of one step, shared by all layers; see the drawing above."""

    tokens: Tensor
    """int64 `[T]`."""
    positions: Tensor
    """int64 `[T]`."""
    slot_mapping: Tensor
    """int64 `[T]`: where each token's keys and values go."""
    block_tables: Tensor
    """int32 `[S, blocks of the longest]`."""
    query_start: Tensor
    """int32 `[S + 1]`."""
    context_lens: Tensor
    """int32 `[S]`."""
    rows: Tensor
    """int64 `[R]`: the tokens after which logits are wanted."""
    groups: GroupPlan
    """What the tables share, and may be read once for all."""

    @property
    def num_tokens(self) -> int:
        """Tokens that run through the model."""
        return self.tokens.shape[0]

    @classmethod
    def pack(cls, pieces: Sequence[Piece], block_size: int, *, all_rows: bool = False) -> Batch:
        """Pack the pieces of a step, without sharing.  O(tokens + table entries).

        Args:
            pieces: at least one, each with at least one token and blocks enough for its tokens.
            block_size: tokens of a block.
            all_rows: logits after every token, not only where a piece asks for them.
        """
        lengths = [piece.start + len(piece.tokens) for piece in pieces]
        widths = [-(-length // block_size) for length in lengths]
        tables = torch.zeros(len(pieces), max(widths), dtype=torch.int32)
        for row, piece, width in zip(tables, pieces, widths, strict=True):
            row[:width] = torch.as_tensor(piece.block_table[:width], dtype=torch.int32)
        contexts = torch.tensor(lengths, dtype=torch.int32)
        groups = GroupPlan.alone(len(pieces))
        return cls.of(pieces, tables, contexts, groups, block_size, all_rows=all_rows)

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        block_tables: Tensor,
        context_lens: Tensor,
        groups: GroupPlan,
        block_size: int,
        *,
        all_rows: bool = False,
    ) -> Batch:
        """Pack the pieces whose tables and lengths are where the kernels are.  O(tokens)."""
        device = block_tables.device
        tokens: list[int] = []
        starts = [0]
        rows: list[int] = []
        for piece in pieces:
            tokens.extend(piece.tokens)
            starts.append(len(tokens))
            if piece.logits:
                rows.extend(range(len(tokens) - piece.num_rows, len(tokens)))
        num = len(tokens)
        query_start = torch.tensor(starts, dtype=torch.int32).to(device, non_blocking=True)
        counts = (query_start[1:] - query_start[:-1]).long()
        owner = torch.repeat_interleave(
            torch.arange(len(pieces), device=device), counts, output_size=num
        )
        every = torch.arange(num, device=device)
        positions = every + (context_lens - query_start[1:]).long()[owner]
        blocks = block_tables[owner, positions // block_size].long()
        return cls(
            tokens=torch.tensor(tokens).to(device, non_blocking=True),
            positions=positions,
            slot_mapping=blocks * block_size + positions % block_size,
            block_tables=block_tables,
            query_start=query_start,
            context_lens=context_lens,
            rows=every if all_rows else torch.tensor(rows, dtype=torch.int64).to(device),
            groups=groups,
        )
