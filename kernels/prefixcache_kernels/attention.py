"""Triton: attend to keys and values where they lie, through the block table.

Why.  A GPU that concatenated a cache per sequence, as dense attention wants it, would move every
cached byte three times.  This kernel reads each once, and never repeats the keys that a group of
query heads shares.

Shapes.  A packed batch mixes decoding, prefilling and continuing sequences; one program works on
one tile of queries of one sequence and one key head (`keys` draws the tile):

```
packed queries  │ s0 │ s1 s1 s1 s1 s1 s1 s1 │ s2 │ ...
tiles           │ 0  │ 1 . . . . .   2 . .  │ 3  │       (BLOCK_Q = 4; some tiles may be empty)
```

Sequence s owns the tiles from `query_start[s] // BLOCK_Q + s` on: always room enough, so the grid
needs no count from the device, and a program finds its s by bisection.

Splits.  With few tiles most of the processors would idle, so each tile's keys are divided among
SPLITS programs, and a second kernel merges their partial answers by log-sum-exp, always in the same
order: the result does not depend on which program came first.

```
keys of a tile    0 ────────────┬─────────────┬─────────────┬──── top      SPLITS = 4
program           split 0       │ split 1     │ split 2     │ split 3
merged            2**(lse_i - max lse) weighs each part
```

How many splits there are depends on the batch, and so do a query's last bits.  With `fixed` a split
is always the same `FIXED_KEYS` keys, decoding and prefilling queries are cut alike, and parts are
merged some at a time, as many in any case: a query has the same bits alone and in company, cold and
behind a cached prefix.  That costs tiles with empty rows where it decodes, and a partial answer for
each split where it prefills; what those take is bounded by a launch for some of the queries at a
time, which changes no bit, as they do not depend on each other.

Bytes moved, per layer: a decode step reads `context * kv_heads * (head_dim + value_dim)` elements
per sequence and little else; at 16 bit and 4.8 TB/s, 8 heads of 128 and 8,192 tokens take 7 us.
A split adds `8 * heads * (value_dim + 1)` bytes per query, written and read.

Nothing here waits for the device, and the grid depends on shapes alone: a step can be captured in a
CUDA graph and replayed with other tables and lengths.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixcache_kernels.checks import check_attention, check_scalars
from prefixcache_kernels.keys import attend_keys
from prefixcache_kernels.launch import (
    OPTIONS,
    cache_arguments,
    check_strides,
    check_tables,
    in_reach,
    readable,
    warps,
)
from prefixcache_kernels.plan import Plan
from prefixcache_kernels.shape import Shape, next_power_of_2

FIXED_PARTS: Final = 8
"""Partial answers that are merged at a time where bits are fixed, if so many fit."""

FIXED_BYTES: Final = 1 << 28
"""What partial answers of a launch may take where bits are fixed."""


@triton.jit(
    do_not_specialize=["num_seqs", "window", "stride_table"],
    # Parts of one packed tensor: where they begin must not decide what is compiled.
    do_not_specialize_on_alignment=["order_ptr", "own_ptr"],
)
def attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    start_ptr,
    context_ptr,
    order_ptr,
    own_ptr,
    sink_ptr,
    key_scale_ptr,
    value_scale_ptr,
    out_ptr,
    lse_ptr,
    num_seqs,
    scale,
    softcap,
    window,
    stride_query_token,
    stride_query_head,
    stride_key_block,
    stride_key_slot,
    stride_key_head,
    stride_value_block,
    stride_value_slot,
    stride_value_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_KEYS: tl.constexpr,
    SLOTS: tl.constexpr,
    OWN: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    LSE: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend one tile of queries to one split of its keys.

    Grid: (tiles, kv_heads, SPLITS).  Split i has the keys from `i * SPLIT_KEYS` on, or, if that is
    0, its share of those that the tile attends.  With one slot the answer is written, else a
    partial one into the last SPLITS of the SLOTS of a line: `out [T, HEADS, SLOTS, VALUE_DIM]` and
    `lse [T, HEADS, SLOTS]` in float32, in units of log2 (of the natural logarithm if it is final).

    OWN: part of attention over shared prefixes, whose keys before block `own_ptr[.]` are left to
    others.  1, for decoding: tile t is the only query of the sequence at position t of `order_ptr`,
    and `own_ptr` is by position; 2: tiles are as ever, and `own_ptr` is by sequence.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    if OWN == 1:
        seq = tl.load(order_ptr + tile)
        begin, num_queries, first = seq, 1, 0
        shared = tl.load(own_ptr + tile) * BLOCK_SIZE
        # Every sequence has one query: its own.  Nobody has looked; a batch that lies gets NaN.
        decodes = (tl.load(start_ptr + seq) == seq) & (tl.load(start_ptr + seq + 1) == seq + 1)
    else:
        # Which sequence: the last one whose first tile is not after this one.
        low, high = 0, num_seqs
        while low < high:
            middle = (low + high) // 2
            if tl.load(start_ptr + middle) // BLOCK_Q + middle <= tile:
                low = middle + 1
            else:
                high = middle
        seq = low - 1
        begin = tl.load(start_ptr + seq)
        num_queries = tl.load(start_ptr + seq + 1) - begin
        first = (tile - begin // BLOCK_Q - seq) * BLOCK_Q  # query of this tile, in its sequence
        shared = tl.load(own_ptr + seq) * BLOCK_SIZE if OWN == 2 else 0
    if first < num_queries:
        context = tl.load(context_ptr + seq)
        row = tl.arange(0, ROWS)
        dim, value_dim = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
        query = first + row // GROUPS
        head = kv_head * GROUPS + row % GROUPS
        live = (row < BLOCK_Q * GROUPS) & (query < num_queries)
        spot = context - num_queries + query  # position of each row's query
        token = tl.cast(begin + query, tl.int64)
        where = token[:, None] * stride_query_token + head[:, None] * stride_query_head
        q = tl.load(
            query_ptr + where + dim[None, :], live[:, None] & (dim < HEAD_DIM)[None, :], 0.0
        )
        if UPCAST:
            q = q.to(tl.float32)
        if FP8:
            scale *= tl.load(key_scale_ptr + kv_head)

        # Keys that any row attends: [bottom, top); this split's part of them: [left, right).
        last = tl.minimum(first + BLOCK_Q, num_queries) - 1
        top = context - num_queries + last + 1
        bottom = shared
        if WINDOWED:
            bottom = tl.maximum(bottom, context - num_queries + first - window + 1)
        aligned = bottom // TILE * TILE
        left, right = aligned, top
        if SPLIT_KEYS > 0:
            left = tl.maximum(split * SPLIT_KEYS, aligned)
            right = tl.minimum((split + 1) * SPLIT_KEYS, top)
        elif SPLITS > 1:
            share = tl.cdiv(tl.cdiv(top - aligned, SPLITS), TILE) * TILE
            left = aligned + split * share
            right = tl.minimum(left + share, top)

        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if SINKS:  # a score without a value: it only adds to the sum, once
            sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2E
            peak = tl.where(split == 0, sink, peak)
            total = tl.where(split == 0, total + 1.0, total)
        sums = tl.zeros([ROWS, VALUE_DIMS], tl.float32)
        peak, total, sums = attend_keys(
            q,
            spot,
            peak,
            total,
            sums,
            key_ptr + tl.cast(kv_head, tl.int64) * stride_key_head,
            value_ptr + tl.cast(kv_head, tl.int64) * stride_value_head,
            table_ptr + tl.cast(seq, tl.int64) * stride_table,
            left,
            right,
            bottom,
            window,
            scale,
            softcap,
            stride_key_block,
            stride_key_slot,
            stride_value_block,
            stride_value_slot,
            HEAD_DIM,
            VALUE_DIM,
            DIMS,
            VALUE_DIMS,
            BLOCK_SIZE,
            TILE,
            True,
            WINDOWED,
            CAPPED,
            FP8,
            PRECISION,
        )

        floor = tl.where(total > 0.0, total, 1.0)
        answer = sums / floor[:, None]
        if FP8:
            answer *= tl.load(value_scale_ptr + kv_head)
        if OWN == 1:
            answer = tl.where(decodes, answer, float("nan"))
        line = (token * HEADS + head) * SLOTS + (SLOTS - SPLITS) + split
        tl.store(
            out_ptr + line[:, None] * VALUE_DIM + value_dim[None, :],
            answer.to(out_ptr.dtype.element_ty),
            live[:, None] & (value_dim < VALUE_DIM)[None, :],
        )
        if LSE:
            lse = peak + tl.log2(floor)  # -inf if no key was seen
            if OWN == 1:
                lse = tl.where(decodes, lse, float("inf"))  # NaN, once it is merged
            if SLOTS == 1:
                lse = lse / LOG2E
            tl.store(lse_ptr + line, lse, live)


@triton.jit
def merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    whole_ptr,
    VALUE_DIM: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PARTS: tl.constexpr,
    FIXED: tl.constexpr,
    LSE: tl.constexpr,
):
    """Merge the partial answers of one head of one query, weighted by their sums.

    Grid: (tokens * heads,).  WIDTH is the power of two from SLOTS on; PARTS parts are in registers
    at a time, however many there are.  FIXED: their weights are summed likewise and the quotient is
    rounded as it should be, so that nothing depends on SLOTS: one part, divided by 1, is as it was,
    which is what one split alone gives.  A part whose log-sum-exp is -inf saw no key; it may hold
    anything and is not read.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    line = tl.program_id(0).to(tl.int64)
    slot, dim = tl.arange(0, WIDTH), tl.arange(0, VALUE_DIMS)
    in_dim = dim < VALUE_DIM
    lse = tl.load(lse_ptr + line * SLOTS + slot, slot < SLOTS, float("-inf"))
    peak = tl.max(lse, 0)
    # Infinite: there is no part, or one that is no number and must show.
    level = tl.where(tl.abs(peak) == float("inf"), 0.0, peak)
    total = 0.0 if FIXED else tl.sum(tl.exp2(lse - level), 0)
    sums = tl.zeros([VALUE_DIMS], tl.float32)
    for at in range(0, SLOTS, PARTS):
        part = at + tl.arange(0, PARTS)
        weights = tl.load(lse_ptr + line * SLOTS + part, part < SLOTS, float("-inf"))
        weights = tl.exp2(weights - level)
        if FIXED:
            total += tl.sum(weights, 0)
        where = (line * SLOTS + part)[:, None] * VALUE_DIM + dim[None, :]
        parts = tl.load(part_ptr + where, in_dim[None, :] & (weights > 0.0)[:, None], 0.0)
        sums += tl.sum(parts * weights[:, None], 0)
    floor = tl.where(total > 0.0, total, 1.0)
    answer = tl.div_rn(sums, floor) if FIXED else sums / floor
    tl.store(out_ptr + line * VALUE_DIM + dim, answer.to(out_ptr.dtype.element_ty), in_dim)
    if LSE:
        tl.store(whole_ptr + line, (level + tl.log2(total)) / LOG2E)


def paged_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
    plan: Plan | None = None,
    fixed: bool = False,
) -> Tensor:
    """Attend packed queries to paged keys and values; arguments as `reference.paged_attention`.

    Strides: any, but the last dimension of queries and caches is contiguous (queries are copied
    otherwise).  One launch, or two when keys are split; no synchronisation, so what tables and
    lengths say is trusted, unless `PREFIXCACHE_CHECK=1`.  `plan` is for the CPU path and not looked
    at.  With `fixed` a query's bits depend on nothing but itself and its keys: on the device, the
    types and the sizes of the heads beside them, never on the batch; more launches, if partial
    answers would take more than `FIXED_BYTES`.

    Raises:
        InvalidRequest: The shapes do not fit together.
        Unsupported: The tensors are not on a GPU.
    """
    scale, window, softcap = check_scalars(scale, window, softcap)
    check_attention(
        query,
        key_cache,
        value_cache,
        sinks=sinks,
        key_scale=key_scale,
        value_scale=value_scale,
        lse=lse,
    )
    check_strides(key_cache, value_cache)
    block_tables, query_start, context_lens = check_tables(
        block_tables, query_start, context_lens, query.shape[0], key_cache
    )
    if sinks is not None:
        sinks = sinks.contiguous()
    num_queries, heads, head_dim = query.shape
    num_seqs = block_tables.shape[0]
    _, block_size, kv_heads, value_dim = value_cache.shape
    out = query.new_empty((num_queries, heads, value_dim))
    if not num_queries or not num_seqs:
        return out
    shape = Shape.choose(
        heads,
        kv_heads,
        head_dim,
        value_dim,
        query.element_size(),
        num_queries=num_queries,
        num_seqs=num_seqs,
        max_context=block_tables.shape[1] * block_size,
        fixed=fixed,
    )
    each = heads * shape.splits * (value_dim + 1) * 4  # bytes of a query's partial answers
    at_once = max(1, FIXED_BYTES // each)
    if fixed and shape.splits > 1 and num_queries > at_once:
        ends = query_start[1:]
        for first in range(0, num_queries, at_once):
            last = min(first + at_once, num_queries)
            # Of each sequence the queries from `first` to `last`; later ones and their keys go.
            later = ends.clamp(min=last) - query_start[:-1].clamp(min=last)
            out[first:last] = paged_attention(
                query[first:last],
                key_cache,
                value_cache,
                block_tables,
                query_start.clamp(first, last) - first,
                context_lens - later,
                scale=scale,
                window=window,
                softcap=softcap,
                sinks=sinks,
                key_scale=key_scale,
                value_scale=value_scale,
                lse=None if lse is None else lse[first:last],
                fixed=True,
            )
        return out
    query = in_reach(query)
    part, part_lse = out, lse
    if shape.splits > 1:
        size = (num_queries, heads, shape.splits, value_dim)
        part = torch.empty(size, dtype=torch.float32, device=query.device)
        part_lse = torch.empty(size[:3], dtype=torch.float32, device=query.device)
    keys, values, fp8 = readable(key_cache, value_cache)
    attend_kernel[shape.tiles(num_queries, num_seqs), kv_heads, shape.splits](
        query,
        keys,
        values,
        block_tables,
        query_start,
        context_lens,
        query_start,
        query_start,
        query if sinks is None else sinks,
        query if key_scale is None else key_scale,
        query if value_scale is None else value_scale,
        part,
        part if part_lse is None else part_lse,
        num_seqs,
        scale,
        1.0 if softcap is None else softcap,
        0 if window is None else window,
        query.stride(0),
        query.stride(1),
        *cache_arguments(key_cache, value_cache),
        block_tables.stride(0),
        **shape.constants(heads, head_dim, value_dim, block_size, query.dtype),
        BLOCK_Q=shape.block_q,
        SPLITS=shape.splits,
        SPLIT_KEYS=shape.split_keys,
        SLOTS=shape.splits,
        OWN=0,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        LSE=part_lse is not None,
        FP8=fp8,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **OPTIONS,
    )
    if part_lse is not None and shape.splits > 1:
        merge(part, part_lse, out, lse, fixed=fixed)
    return out


def merge(
    part: Tensor, part_lse: Tensor, out: Tensor, lse: Tensor | None, *, fixed: bool = False
) -> None:
    """Merge `[T, heads, slots, value_dim]` partial answers into `out`; their sums into `lse`.

    Reads every part whose log-sum-exp (`part_lse`, in units of log2) is not -inf, once.  With
    `fixed` parts that saw no key, behind the others, change no bit.
    """
    tokens, heads, slots, value_dim = part.shape
    dims, width = next_power_of_2(value_dim), next_power_of_2(slots)
    parts = parts_at_once(dims, FIXED_PARTS if fixed else width)
    merge_kernel[(tokens * heads,)](
        part,
        part_lse,
        out,
        part_lse if lse is None else lse,
        VALUE_DIM=value_dim,
        VALUE_DIMS=dims,
        SLOTS=slots,
        WIDTH=width,
        PARTS=parts,
        FIXED=fixed,
        LSE=lse is not None,
        num_warps=warps(4 * dims * parts),
        # Which of two products goes into the addition is the compiler's choice, for each SLOTS.
        **(OPTIONS | {"enable_fp_fusion": not fixed}),
    )


def parts_at_once(dims: int, width: int) -> int:
    """Give how many partial answers of `dims` numbers are merged at a time: 16 KiB of them.

    >>> parts_at_once(128, 8), parts_at_once(512, 256), parts_at_once(8192, 4)
    (8, 8, 1)
    """
    return max(1, min(width, 4096 // dims))
