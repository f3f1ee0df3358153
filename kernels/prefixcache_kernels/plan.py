"""What a step of the model needs to know of its batch, worked out once instead of once per layer.

A packed batch mixes sequences: some decode one token, some prefill hundreds.  The C library takes
it in *tasks* (`cpu.tasks`), PyTorch in *pieces*.  A piece is a few sequences with the same number
of queries and nearly the same number of keys: their blocks are gathered into one scratch buffer,
side by side, and one call of dense attention reads it while it is still in the processor's cache.

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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache.types import shown
from prefixcache_kernels.checks import LONGEST, check_step, check_tensors
from prefixcache_kernels.cpu.tasks import Tasks
from prefixcache_kernels.groups import Run

SCRATCH_BYTES: Final = 4 << 20
"""Gathered keys and values of a piece of several sequences; about what stays in a core's cache."""

PIECE_BYTES: Final = 192 << 10
"""Gathering this much takes about as long as starting a piece: so much padding saves one."""

FEW_QUERIES: Final = 8
"""Sequences with more queries than this fill a piece alone."""


@dataclass(slots=True)
class Piece:
    """Sequences that are attended in one call: same queries each, nearly the same keys."""

    rows: slice | Tensor | None
    """Which rows of the packed queries, a sequence after the other; None: all, in order."""
    num_seqs: int
    num_queries: int
    """Of each sequence."""
    cached: int | None
    """Of one sequence whose queries attend all earlier keys: keys before them; else None."""
    width: int
    """Gathered blocks per sequence."""
    index: Tensor
    """`[num_seqs * width]` int64: the blocks to gather."""
    begin: int | None
    """Of one long sequence whose blocks lie side by side in the pool: the first; else None."""
    keys: slice
    """Which of a sequence's gathered slots are read."""
    hidden: list[slice]
    """Gathered slots that are read but hold no key of their sequence: they are zeroed."""
    visible: Tensor | None
    """`[num_seqs or 1, num_queries, keys]` bool: what may be attended; None: all of it."""

    def dense(
        self, place: Scratch, key_cache: Tensor, value_cache: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Give keys and values, `[num_seqs, kv_heads, keys, head_dim]`.

        One sequence's blocks that lie side by side are read where they are, others are gathered.

        Raises:
            InvalidRequest: A block is outside the pool.
        """
        in_place = key_cache.stride(3) == value_cache.stride(3) == 1
        if (
            in_place
            and self.begin is not None
            and self.begin in range(key_cache.shape[0] - self.width + 1)
        ):
            end = self.begin + self.width
            return tuple(  # type: ignore[return-value]
                cache[self.begin : end].flatten(0, 1)[self.keys].transpose(0, 1).unsqueeze(0)
                for cache in (key_cache, value_cache)
            )
        gather(key_cache, self.index, place.key_blocks)
        gather(value_cache, self.index, place.value_blocks)
        if place.hidden:
            torch._foreach_zero_(place.hidden)
        return place.keys, place.values

    def mask(self, groups: int, dtype: torch.dtype) -> Tensor | None:
        """`visible` as an additive mask for queries packed `[seqs, kv_heads, groups * queries]`."""
        if self.visible is None:
            return None
        mask = torch.zeros(self.visible.shape, dtype=dtype)
        mask.masked_fill_(~self.visible, float("-inf"))
        if self.num_queries > 1:  # a mask of one row is broadcast
            mask = mask.repeat(1, groups, 1)
        return mask.unsqueeze(1)


@dataclass(slots=True)
class Scratch:
    """A piece's part of the scratch: where its keys and values are gathered and read."""

    key_blocks: Tensor
    value_blocks: Tensor
    """`[num_seqs * width, block_size, kv_heads, head_dim]`."""
    keys: Tensor
    values: Tensor
    """`[num_seqs, kv_heads, keys, head_dim]` views of the blocks."""
    hidden: list[Tensor]
    """Views of the blocks that are zeroed after gathering."""


Work: TypeAlias = "list[tuple[Piece, Scratch, Tensor | None]]"
"""What one layer does: for each piece, where to gather it and the mask of its scores."""


Batch: TypeAlias = tuple[Tensor, Tensor, Tensor]
"""Block tables, where queries begin, lengths."""


class Plan:
    """A packed batch, prepared for attention on a CPU.  Make one per step with `build`.

    Use a plan from one thread at a time.  Plans share one scratch buffer per thread, which grows to
    the largest piece, or partial answers of a step, and is kept: fresh memory costs a page fault
    every 4 KiB.
    """

    def __init__(
        self,
        batch: Batch,
        query_lens: list[int],
        context_lens: list[int],
        starts: list[int],
        block_size: int,
        own_from: list[int],
        *,
        fixed: bool = False,
    ) -> None:
        self.block_size = block_size
        self.fixed = fixed
        """Whether a query's answer depends on nothing but itself and its keys."""
        self.num_queries = starts[-1]
        self.num_seqs = len(query_lens)
        self.calls: dict[tuple[object, ...], Any] = {}
        """What the C library's calls have prepared for kinds of layers: `cpu.attend`."""
        self.batch = batch
        """Block tables, where queries begin, and lengths, as they were given."""
        self._block_tables = batch[0]
        self._query_lens = query_lens
        self._context_lens = context_lens
        self._starts = starts
        self._own_from = own_from
        self._pieces: dict[tuple[int | None, int], list[Piece]] = {}
        self._work: dict[tuple[object, ...], Work] = {}

    @classmethod
    def build(
        cls,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        block_size: int,
        own_from: list[int] | None = None,
        *,
        fixed: bool = False,
    ) -> Plan:
        """Prepare a packed batch.  Changes nothing.  O(blocks of the batch), once per step.

        Args:
            block_tables: `[S, max_blocks]` ints; each row's blocks in order, the rest is not read.
                Kept, not copied: they stay as they are while the plan is used.
            query_start: `[S + 1]` ints; sequence s has the packed queries `query_start[s]` up to
                `query_start[s + 1]`.
            context_lens: `[S]` ints; keys of each sequence, its new tokens included.
            block_size: Tokens of a block.
            own_from: For each sequence, how many of its first blocks are left out, because they
                are attended elsewhere; all of them before its queries.  None: none.
            fixed: Whether a query's answer is to have the same bits whatever else is in the batch,
                and however many of the queries before it are.  Only the C library does that.

        Raises:
            InvalidRequest: The shapes do not fit together, a table is too short for its context, or
                blocks are left out that are not before the queries.
        """
        check_tensors(block_tables=block_tables, query_start=query_start, context_lens=context_lens)
        check_step(block_tables, query_start, context_lens)
        if not isinstance(block_size, int) or not 1 <= block_size <= LONGEST:
            raise InvalidRequest(f"block_size is {shown(block_size)}, not a number of tokens")
        for given in (block_tables, query_start, context_lens):
            if not given.is_cpu:
                raise InvalidRequest(f"a plan for a CPU of tables or lengths on {given.device}")
        starts, contexts = query_start.tolist(), context_lens.tolist()
        lens = [b - a for a, b in pairwise(starts)]
        room = block_tables.shape[1] * block_size
        for s, (num, context) in enumerate(zip(lens, contexts, strict=True)):
            if starts[0] != 0 or num < 0 or num > context or context > room:
                raise InvalidRequest(
                    f"sequence {s} has {num} queries and {context} keys (its own queries included) "
                    f"in a table of {room} slots; query_start begins with {starts[0]}"
                )
        own_from = [0] * len(lens) if own_from is None else own_from
        for s, (num, context, own) in enumerate(zip(lens, contexts, own_from, strict=True)):
            if num and not 0 <= own * block_size <= context - num:
                raise InvalidRequest(
                    f"{own} blocks of {block_size} tokens are shared by sequence {s}, whose "
                    f"queries begin at token {context - num}"
                )
        return cls(
            (block_tables, query_start, context_lens),
            lens,
            contexts,
            starts,
            block_size,
            own_from,
            fixed=fixed,
        )

    def verify(self, block_tables: Tensor, query_start: Tensor, context_lens: Tensor) -> None:
        """Refuse a call with another batch than the plan's.  O(1) for the same tensors.

        Raises:
            InvalidRequest: As said.
        """
        if not same_batch(self.batch, (block_tables, query_start, context_lens)):
            raise InvalidRequest(
                f"the plan is of another batch than block_tables {list(block_tables.shape)}, "
                f"query_start {list(query_start.shape)} and context_lens "
                f"{list(context_lens.shape)}: build one for each step"
            )

    @cached_property
    def _tables(self) -> Tensor:
        return self._block_tables.to(device="cpu", dtype=torch.int64, copy=True)

    def check(self, query: Tensor, cache: Tensor) -> None:
        """Refuse a layer of another batch.

        Raises:
            InvalidRequest: The plan is of another number of queries, or block size.
        """
        if self.num_queries != query.shape[0] or self.block_size != cache.shape[1]:
            raise InvalidRequest(
                f"the plan is of {self.num_queries} queries over blocks of {self.block_size} "
                f"tokens, the call has {query.shape[0]} and {cache.shape[1]}"
            )

    def tasks(
        self,
        window: int | None,
        group: int,
        runs: Sequence[Run] = (),
        positions: Sequence[int] = (),
    ) -> Tasks:
        """The batch as the C library takes it.

        Args:
            window: Keys that a query attends at most, itself included; None: all before it.
            group: Query heads that share a key head.
            runs: What attends the blocks that were left out.
            positions: Rows of the batch in the order of the runs.
        """
        return Tasks.cut(
            narrow(self._block_tables),
            np.array(self._starts),
            np.array(self._context_lens),
            self.block_size,
            group,
            window,
            np.array(self._own_from),
            runs,
            positions,
            fixed=self.fixed,
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

    def work(self, layer: tuple[object, ...]) -> Work | None:
        """What `prepare` made for layers of this kind in this thread; None: nothing yet."""
        return self._work.get((threading.get_ident(), *layer))

    def prepare(
        self, layer: tuple[object, ...], query: Tensor, cache: Tensor, window: int | None
    ) -> Work:
        """Make the pieces, their scratch and their masks for one kind of layer; remembered.

        Args:
            layer: Names the kind: shapes, dtypes and window.
            query: Of such a layer, `[T, heads, head_dim]`.
            cache: Its keys, `[num_blocks, block_size, kv_heads, head_dim]`.
            window: As of `pieces`.

        Raises:
            InvalidRequest: The plan is of another batch or block size.
        """
        self.check(query, cache)
        tail = cache.shape[1:]
        pieces = self.pieces(window, 2 * tail[1:].numel() * cache.element_size())
        size = max((piece.index.numel() for piece in pieces), default=0) * tail.numel()
        keys, values = scratch(2 * size, cache.dtype).view(2, size)
        groups = query.shape[1] // tail[1]
        work: Work = [
            (piece, _view(piece, keys, values, tail), piece.mask(groups, query.dtype))
            for piece in pieces
        ]
        self._work[threading.get_ident(), *layer] = work
        return work

    def _split(self, window: int | None, token_bytes: int) -> list[Piece]:
        """Group the sequences by number of queries, then by number of keys, while it pays."""
        size = self.block_size
        begins = [  # the first key that some query attends
            max(own * size, 0 if window is None else context - num - window + 1)
            for num, context, own in zip(
                self._query_lens, self._context_lens, self._own_from, strict=True
            )
        ]
        first = [begin // size for begin in begins]
        blocks = [-(-c // size) - f for c, f in zip(self._context_lens, first, strict=True)]
        order = sorted(
            (s for s, num in enumerate(self._query_lens) if num),
            key=lambda s: (self._query_lens[s], blocks[s], self._context_lens[s], s),
        )
        groups: list[list[int]] = []
        for s in order:
            num, width = self._query_lens[s], blocks[s]
            group = groups[-1] if groups else []
            if (
                group
                and num == self._query_lens[group[0]]
                and num <= FEW_QUERIES
                and (len(group) + 1) * width * size * token_bytes <= SCRATCH_BYTES
                and (width - blocks[group[-1]]) * len(group) * size * token_bytes <= PIECE_BYTES
            ):
                group.append(s)
            else:
                groups.append([s])
        return [
            self._piece(group, begins, blocks[group[-1]], window, token_bytes) for group in groups
        ]

    def _piece(
        self,
        group: list[int],
        begins: list[int],
        width: int,
        window: int | None,
        token_bytes: int,
    ) -> Piece:
        size = self.block_size
        num = self._query_lens[group[0]]
        context = self._context_lens[group[0]]
        first = {s: begins[s] // size for s in group}
        skips = [begins[s] % size for s in group]
        spans = [self._context_lens[s] - first[s] * size for s in group]
        if len(group) == 1:
            index = self._tables[group[0], first[group[0]] : first[group[0]] + width]
        else:
            # Padding repeats a sequence's last block: it is in the cache, and no other tenant's.
            columns = torch.arange(width) + torch.tensor([first[s] for s in group])[:, None]
            lasts = torch.tensor([(self._context_lens[s] - 1) // size for s in group])
            columns = torch.minimum(columns, lasts[:, None])
            index = self._tables[torch.tensor(group)[:, None], columns].view(-1)
        uniform = len(set(skips)) == len(set(spans)) == 1
        keys = slice(skips[0], spans[0]) if uniform else slice(0, max(spans))
        hidden = []
        visible = None
        if not uniform:
            for i, (skip, span) in enumerate(zip(skips, spans, strict=True)):
                base = i * width * size
                edges = ((base, base + skip), (base + span, base + keys.stop))
                hidden += [slice(low, high) for low, high in edges if low < high]
        if num > 1 or not uniform:
            spot = torch.arange(keys.start, keys.stop)  # of the key, from the first gathered slot
            last = torch.tensor(spans[:1] if uniform else spans)[:, None, None] - num
            last = last + torch.arange(num)[:, None]  # of the query itself
            visible = spot <= last
            if window is not None:
                visible &= spot > last - window
        whole = len(group) == 1 and not begins[group[0]] and (window is None or window >= context)
        return Piece(
            rows=self._rows(group, num),
            num_seqs=len(group),
            num_queries=num,
            cached=context - num if whole else None,
            width=width,
            index=index,
            # What would not stay in the cache between gathering and reading is better left there.
            begin=side_by_side(index) if width * size * token_bytes > SCRATCH_BYTES else None,
            keys=keys,
            hidden=hidden,
            visible=visible,
        )

    def _rows(self, group: list[int], num: int) -> slice | Tensor | None:
        rows = [self._starts[s] for s in group]
        if rows == list(range(rows[0], rows[0] + num * len(group), num)):
            whole = len(group) * num == self.num_queries
            return None if whole else slice(rows[0], rows[0] + num * len(group))
        return (torch.tensor(rows)[:, None] + torch.arange(num)).view(-1)


def same_batch(known: Batch, given: Batch) -> bool:
    """Tell whether two batches are the same: the same tensors, or equal ones."""
    if known[0] is given[0] and known[1] is given[1] and known[2] is given[2]:
        return True
    tables, starts, contexts = given
    check_tensors(block_tables=tables, query_start=starts, context_lens=contexts)
    check_step(tables, starts, contexts)
    return all(
        a is b or (b.is_cpu and a.shape == b.shape and bool((a == b).all()))
        for a, b in zip(known, given, strict=True)
    )


def narrow(tables: Tensor) -> npt.NDArray[np.int32]:
    """Give block tables as 32-bit numbers; too large ones stay too large."""
    if tables.dtype != torch.int32:
        tables = tables.long().clamp(-1, 2**31 - 1).int()
    return np.ascontiguousarray(tables.cpu().numpy())


def side_by_side(index: Tensor) -> int | None:
    """Give the first of some blocks if they lie side by side in the pool, in order; else None."""
    begin = int(index[0])
    consecutive = torch.equal(index, torch.arange(begin, begin + index.shape[0]))
    return begin if consecutive else None


def gather(cache: Tensor, index: Tensor, place: Tensor) -> None:
    """Copy blocks to their place.

    Raises:
        InvalidRequest: One is outside the pool.
    """
    try:
        torch.index_select(cache, 0, index, out=place)
    except (IndexError, RuntimeError):
        raise InvalidRequest(
            f"block tables name blocks {int(index.min())} to {int(index.max())}; the pool has "
            f"{cache.shape[0]}"
        ) from None


_LOCAL = threading.local()


def scratch(numel: int, dtype: torch.dtype) -> Tensor:
    """Give the first `numel` elements of the calling thread's scratch, which grows and is kept."""
    num_bytes = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_LOCAL, "buffer", None)
    if buffer is None or buffer.numel() < num_bytes:
        buffer = torch.empty(num_bytes, dtype=torch.uint8, device="cpu")
        check_tensors(scratch=buffer)  # not so in a mode of PyTorch that only traces
        _LOCAL.buffer = buffer
    return buffer[:num_bytes].view(dtype)


def _view(piece: Piece, keys: Tensor, values: Tensor, tail: torch.Size) -> Scratch:
    count = piece.index.numel()
    split = (piece.num_seqs, piece.width * tail[0], *tail[1:])

    def blocks(flat: Tensor) -> tuple[Tensor, Tensor, list[Tensor]]:
        used = flat[: count * tail.numel()]
        dense = used.view(split)[:, piece.keys].transpose(1, 2)
        slots = used.view(-1, *tail[1:])
        return used.view(count, *tail), dense, [slots[where] for where in piece.hidden]

    key_blocks, key_dense, key_hidden = blocks(keys)
    value_blocks, value_dense, value_hidden = blocks(values)
    return Scratch(key_blocks, value_blocks, key_dense, value_dense, key_hidden + value_hidden)
