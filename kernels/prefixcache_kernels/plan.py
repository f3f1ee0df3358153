"""What a step of the model needs to know of its batch, worked out once instead of once per layer.

A packed batch mixes sequences: some decode one token, some prefill hundreds.  The CPU path handles
it in *pieces*.  A piece is a few sequences with the same number of queries and nearly the same
number of keys: their blocks are gathered into one scratch buffer, side by side, and one call of
dense attention reads it while it is still in the processor's cache.

```
packed queries      s0 s1 s1 s1 s1 s2 s3          s0, s2, s3 decode; s1 prefills 4 tokens
pieces              [s0 s2]  [s3]  [s1 s1 s1 s1]  s3 is much longer: padding s0, s2 would waste

one sequence's keys, seen through a window
blocks              │ first ........ │ .............. │ .... last      │
tokens              skip ───── keys that some query attends ────── span
                    │ not attended   │                              │ unwritten: may be garbage
```

Where the sequences of a piece differ, a mask hides the difference and the hidden slots of the
scratch are zeroed: a masked slot would still carry a NaN through `0 * NaN`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest

SCRATCH_BYTES: Final = 4 << 20
"""Gathered keys and values of a piece of several sequences; about what stays in a core's cache."""

MAX_WASTE: Final = 1 / 8
"""Of the gathered blocks of a piece, how many may be padding."""

FEW_QUERIES: Final = 8
"""Sequences with more queries than this fill a piece alone."""


@dataclass(slots=True)
class Piece:
    """Sequences that are attended in one call: same queries each, nearly the same keys."""

    rows: slice | Tensor
    """Which rows of the packed queries, a sequence after the other."""
    num_seqs: int
    num_queries: int
    """Of each sequence."""
    cached: int | None
    """Of one sequence whose queries attend all earlier keys: keys before them; else None."""
    width: int
    """Gathered blocks per sequence."""
    index: Tensor
    """`[num_seqs * width]` int64: the blocks to gather."""
    keys: slice
    """Which of a sequence's gathered slots are read."""
    hidden: Tensor | None
    """int64: gathered slots that hold no key of their sequence and are zeroed; None: none."""
    visible: Tensor | None
    """`[num_seqs or 1, num_queries, keys]` bool: what may be attended; None: all of it."""
    masks: dict[tuple[int, torch.dtype], Tensor] = field(default_factory=dict)

    def mask(self, groups: int, dtype: torch.dtype) -> Tensor | None:
        """`visible` as an additive mask for queries packed `[seqs, kv_heads, groups * queries]`."""
        if self.visible is None:
            return None
        mask = self.masks.get((groups, dtype))
        if mask is None:
            mask = torch.zeros(self.visible.shape, dtype=dtype)
            mask.masked_fill_(~self.visible, float("-inf"))
            if self.num_queries > 1:  # a mask of one row is broadcast
                mask = mask.repeat(1, groups, 1)
            mask = self.masks[groups, dtype] = mask.unsqueeze(1)
        return mask


@dataclass(slots=True)
class Scratch:
    """A piece's part of the scratch: where its keys and values are gathered and read."""

    key_blocks: Tensor
    value_blocks: Tensor
    """`[num_seqs * width, block_size, kv_heads, head_dim]`."""
    keys: Tensor
    values: Tensor
    """`[num_seqs, kv_heads, keys, head_dim]` views of the blocks."""


class Plan:
    """A packed batch, prepared for attention on a CPU.  Make one per step with `build`.

    Use a plan from one thread at a time.  Plans share one scratch buffer per thread, which grows to
    the largest piece seen and is kept, for fresh memory costs a page fault every 4 KiB.
    """

    def __init__(
        self,
        block_tables: Tensor,
        query_lens: list[int],
        context_lens: list[int],
        starts: list[int],
        block_size: int,
    ) -> None:
        self.block_size = block_size
        self.num_queries = starts[-1]
        self.num_seqs = len(query_lens)
        self._tables = block_tables
        self._query_lens = query_lens
        self._context_lens = context_lens
        self._starts = starts
        used = torch.tensor([-(-n // block_size) for n in context_lens], dtype=torch.int64)
        ids = block_tables[torch.arange(block_tables.shape[1]) < used[:, None]]
        self._lowest, self._highest = (int(ids.min()), int(ids.max())) if ids.numel() else (0, 0)
        self._pieces: dict[tuple[int | None, int], list[Piece]] = {}
        self._scratches: dict[tuple[object, ...], list[Scratch]] = {}

    @classmethod
    def build(
        cls,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_size: int,
    ) -> Plan:
        """Prepare a packed batch.  Changes nothing.  O(blocks of the batch), once per step.

        Args:
            block_tables: `[S, max_blocks]` ints; each row's blocks in order, the rest is not read.
            query_start: `[S + 1]` ints; sequence s has the packed queries `query_start[s]` up to
                `query_start[s + 1]`.
            context_lens: `[S]` ints; keys of each sequence, its new tokens included.
            block_size: Tokens of a block.

        Raises:
            InvalidRequest: The shapes do not fit together, or a table is too short for its context.
        """
        starts, contexts = query_start.tolist(), context_lens.tolist()
        if block_size < 1 or block_tables.dim() != 2 or len(starts) != len(contexts) + 1:
            raise InvalidRequest(
                f"block_tables {list(block_tables.shape)}, query_start "
                f"{list(query_start.shape)} and context_lens {list(context_lens.shape)} are not "
                "[S, max_blocks], [S + 1] and [S] with blocks of at least 1 token "
                f"(block_size {block_size})"
            )
        if block_tables.shape[0] != len(contexts):
            raise InvalidRequest(f"{block_tables.shape[0]} tables for {len(contexts)} sequences")
        lens = [b - a for a, b in pairwise(starts)]
        room = block_tables.shape[1] * block_size
        for s, (num, context) in enumerate(zip(lens, contexts, strict=True)):
            if starts[0] != 0 or num < 0 or num > context or context > room:
                raise InvalidRequest(
                    f"sequence {s} has {num} queries and {context} keys (its own queries included) "
                    f"in a table of {room} slots; query_start begins with {starts[0]}"
                )
        tables = block_tables.to(device="cpu", dtype=torch.int64)
        return cls(tables, lens, contexts, starts, block_size)

    def check_blocks(self, num_blocks: int) -> None:
        """Refuse tables that name blocks outside the pool, before memory is touched.

        Raises:
            InvalidRequest: A block id is negative or not below `num_blocks`.
        """
        if self._lowest < 0 or self._highest >= num_blocks:
            raise InvalidRequest(
                f"block tables name blocks {self._lowest} to {self._highest}; "
                f"the pool has {num_blocks}"
            )

    def pieces(self, window: int | None, token_bytes: int) -> list[Piece]:
        """The batch in pieces; made at the first call for a window, remembered for other layers.

        Args:
            window: Keys that a query attends at most, itself included; None: all before it.
            token_bytes: Keys and values of a token in one layer.
        """
        key = (window, token_bytes)
        if key not in self._pieces:
            self._pieces[key] = self._split(window, token_bytes)
        return self._pieces[key]

    def scratches(self, pieces: list[Piece], cache: Tensor) -> list[Scratch]:
        """Scratch for each piece, shaped like the blocks of `cache`.  This thread's; remembered."""
        tail = cache.shape[1:]
        key = (id(pieces), threading.get_ident(), tail, cache.dtype)
        scratches = self._scratches.get(key)
        if scratches is None:
            size = max((p.index.numel() for p in pieces), default=0) * tail.numel()
            keys, values = _scratch(2 * size, cache.dtype).view(2, size)
            scratches = self._scratches[key] = [_view(p, keys, values, tail) for p in pieces]
        return scratches

    def _split(self, window: int | None, token_bytes: int) -> list[Piece]:
        """Group the sequences by number of queries, then by number of keys, while it pays."""
        size = self.block_size
        first = [  # the first block that some query attends
            0 if window is None else max(0, context - num - window + 1) // size
            for num, context in zip(self._query_lens, self._context_lens, strict=True)
        ]
        blocks = [-(-c // size) - f for c, f in zip(self._context_lens, first, strict=True)]
        order = sorted(
            (s for s, num in enumerate(self._query_lens) if num),
            key=lambda s: (self._query_lens[s], blocks[s], self._context_lens[s], s),
        )
        groups: list[list[int]] = []
        total = 0
        for s in order:
            num, width = self._query_lens[s], blocks[s]
            group = groups[-1] if groups else []
            padded = width * (len(group) + 1)
            if (
                group
                and num == self._query_lens[group[0]]
                and num <= FEW_QUERIES
                and padded * size * token_bytes <= SCRATCH_BYTES
                and padded - (total + width) <= MAX_WASTE * padded
            ):
                group.append(s)
                total += width
            else:
                groups.append([s])
                total = width
        return [self._piece(group, first, blocks[group[-1]], window) for group in groups]

    def _piece(self, group: list[int], first: list[int], width: int, window: int | None) -> Piece:
        size = self.block_size
        num = self._query_lens[group[0]]
        starts = torch.tensor([first[s] for s in group])[:, None]
        ends = torch.tensor([self._context_lens[s] for s in group])[:, None]
        # Padding repeats a sequence's last block: it is in the cache, and no other tenant's.
        columns = torch.minimum(starts + torch.arange(width), (ends - 1) // size)
        index = self._tables[torch.tensor(group)[:, None], columns].reshape(-1)

        begins = (
            torch.zeros_like(ends) if window is None else (ends - num - window + 1).clamp(min=0)
        )
        skips, spans = begins - starts * size, ends - starts * size
        uniform = bool((skips == skips[0]).all() and (spans == spans[0]).all())
        slots = torch.arange(width * size)
        hidden = None
        if uniform:
            keys = slice(int(skips[0]), int(spans[0]))
        else:
            keys = slice(0, int(spans.max()))
            hidden = ((slots < skips) | (slots >= spans)).view(-1).nonzero().view(-1)
        visible = None
        if num > 1 or not uniform:
            one = slice(0, 1) if uniform else slice(None)
            spot = slots[keys]  # of the key, seen from the first gathered slot
            last = spans[one, :, None] - num + torch.arange(num)[:, None]  # of the query itself
            visible = spot <= last
            if window is not None:
                visible &= spot > last - window
        context = self._context_lens[group[0]]
        whole = len(group) == 1 and (window is None or window >= context)
        return Piece(
            rows=self._rows(group, num),
            num_seqs=len(group),
            num_queries=num,
            cached=context - num if whole else None,
            width=width,
            index=index,
            keys=keys,
            hidden=hidden,
            visible=visible,
        )

    def _rows(self, group: list[int], num: int) -> slice | Tensor:
        rows = [self._starts[s] for s in group]
        if rows == list(range(rows[0], rows[0] + num * len(group), num)):
            return slice(rows[0], rows[0] + num * len(group))
        return (torch.tensor(rows)[:, None] + torch.arange(num)).view(-1)


_LOCAL = threading.local()


def _scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """The calling thread's scratch, at least `numel` elements long, as a tensor of that length."""
    num_bytes = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
    if buffer is None or buffer.numel() < num_bytes:
        buffer = _LOCAL.buffer = torch.empty(num_bytes, dtype=torch.uint8)
    return buffer[:num_bytes].view(dtype)


def _view(piece: Piece, keys: Tensor, values: Tensor, tail: torch.Size) -> Scratch:
    count = piece.index.numel()
    split = (piece.num_seqs, piece.width * tail[0], *tail[1:])

    def blocks(flat: Tensor) -> Tensor:
        return flat[: count * tail.numel()].view(count, *tail)

    def dense(flat: Tensor) -> Tensor:
        return blocks(flat).view(split)[:, piece.keys].transpose(1, 2)

    return Scratch(blocks(keys), blocks(values), dense(keys), dense(values))
