"""Triton: attend to keys and values where they lie, through the block table.

Why.  A GPU that concatenated a cache per sequence, as dense attention wants it, would move every
cached byte three times.  This kernel reads each once, and never repeats the keys that a group of
query heads shares.

Shapes.  A packed batch mixes decoding, prefilling and continuing sequences; one program works on
one tile of queries of one sequence and one key head:

```
query tile     BLOCK_Q queries x GROUPS heads of the group = the rows of the product, padded to ROWS
               row   0      1      2      3      4      5   ...      (GROUPS = 3)
               query 0      0      0      1      1      1
               head  0      1      2      0      1      2

key tile       TILE positions, wherever their blocks are; TILE and the block size are independent
               position  0 ......... 63 │ 64 ........ 127 │ ...
               block     table[0..3]    │ table[4..7]     │          (block_size = 16, TILE = 64)

tiles          sequence s owns the tiles from query_start[s] // BLOCK_Q + s on: always room enough,
               so the grid needs no count from the device, and a program finds its s by bisection
```

Bytes moved, per layer: a decode step reads `2 * context * kv_heads * head_dim` elements per
sequence and little else; at 16-bit and 4.8 TB/s, 8 heads of 128 and 8,192 tokens take 7 us.  With
few sequences that would keep few processors busy, so the keys are split among SPLITS programs
whose partial sums a second kernel merges by their log-sum-exp.

The softmax is online: a running maximum `peak`, a running sum `total`, both in units of log2.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.launch import INTERPRETED, OPTIONS, check_device, check_strides
from prefixcache_kernels.plan import Plan
from prefixcache_kernels.reference import check_attention

PROCESSORS: Final = 132
"""Programs that keep a large GPU busy; decides how often a lone sequence's keys are split."""


@triton.jit(do_not_specialize=["num_seqs", "window"])
def attend_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    start_ptr,
    context_ptr,
    sink_ptr,
    out_ptr,
    lse_ptr,
    num_seqs,
    scale,
    softcap,
    window,
    stride_query_token,
    stride_query_head,
    stride_block,
    stride_slot,
    stride_head,
    stride_table,
    HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    SPLITS: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    SINKS: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend one tile of queries to one split of its keys.

    Grid: (tiles, kv_heads, SPLITS).  With one split the answer is written, else a partial one:
    `out [T, HEADS, SPLITS, HEAD_DIM]` and `lse [T, HEADS, SPLITS]` in float32.
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

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
    first = (tile - begin // BLOCK_Q - seq) * BLOCK_Q  # query of this tile, within its sequence
    if first < num_queries:
        context = tl.load(context_ptr + seq)
        row = tl.arange(0, ROWS)
        dim = tl.arange(0, DIMS)
        query = first + row // GROUPS
        head = kv_head * GROUPS + row % GROUPS
        live = (row < BLOCK_Q * GROUPS) & (query < num_queries)
        spot = context - num_queries + query  # position of each row's query
        in_dim = dim < HEAD_DIM
        token = tl.cast(begin + query, tl.int64)
        where = token[:, None] * stride_query_token + head[:, None] * stride_query_head
        q = tl.load(query_ptr + where + dim[None, :], live[:, None] & in_dim[None, :], 0.0)
        if UPCAST:
            q = q.to(tl.float32)

        # Keys that any row attends: [bottom, top); this split's part of them: [left, right).
        last = tl.minimum(first + BLOCK_Q, num_queries) - 1
        top = context - num_queries + last + 1
        bottom = 0
        if WINDOWED:
            bottom = tl.maximum(0, context - num_queries + first - window + 1)
        aligned = bottom // TILE * TILE
        left, right = aligned, top
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(top - aligned, SPLITS), TILE) * TILE
            left = aligned + split * share
            right = tl.minimum(left + share, top)

        peak = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        if SINKS:  # a score without a value: it only adds to the sum, once
            sink = tl.load(sink_ptr + head).to(tl.float32) * LOG2E
            peak = tl.where(split == 0, sink, peak)
            total = tl.where(split == 0, total + 1.0, total)
        sums = tl.zeros([ROWS, DIMS], tl.float32)
        blocks = table_ptr + tl.cast(seq, tl.int64) * stride_table

        for at in range(left, right, TILE):
            position = at + tl.arange(0, TILE)
            # A slot that nobody attends may hold anything, NaN too: it is not even loaded.
            known = (position >= bottom) & (position < right)
            block = tl.load(blocks + position // BLOCK_SIZE, known, 0).to(tl.int64)
            base = block * stride_block + (position % BLOCK_SIZE) * stride_slot
            base += kv_head * stride_head
            k = tl.load(
                key_ptr + base[None, :] + dim[:, None], known[None, :] & in_dim[:, None], 0.0
            )
            v = tl.load(
                value_ptr + base[:, None] + dim[None, :], known[:, None] & in_dim[None, :], 0.0
            )
            if UPCAST:
                k = k.to(tl.float32)
                v = v.to(tl.float32)
            scores = tl.dot(q, k, input_precision=PRECISION) * scale
            if CAPPED:  # softcap * tanh(scores / softcap), by exponentials
                scores = softcap - 2 * softcap / (tl.exp2(scores * (2 * LOG2E / softcap)) + 1)
            visible = known[None, :] & (position[None, :] <= spot[:, None])
            if WINDOWED:
                visible &= position[None, :] > spot[:, None] - window
            scores = tl.where(visible, scores * LOG2E, float("-inf"))
            higher = tl.maximum(peak, tl.max(scores, 1))
            # A row that has seen no key yet has no peak: any finite one gives it weights of 0.
            level = tl.where(higher == float("-inf"), 0.0, higher)
            weights = tl.exp2(scores - level[:, None])
            fade = tl.exp2(peak - level)
            total = total * fade + tl.sum(weights, 1)
            sums = sums * fade[:, None]
            sums += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
            peak = higher

        answer = sums / tl.where(total > 0.0, total, 1.0)[:, None]
        keep = live[:, None] & in_dim[None, :]
        line = (token * HEADS + head) * SPLITS + split
        tl.store(
            out_ptr + line[:, None] * HEAD_DIM + dim[None, :],
            answer.to(out_ptr.dtype.element_ty),
            keep,
        )
        if SPLITS > 1:
            lse = peak + tl.log2(tl.where(total > 0.0, total, 1.0))  # -inf if no key was seen
            tl.store(lse_ptr + line, lse, live)


@triton.jit
def merge_kernel(
    part_ptr,
    lse_ptr,
    out_ptr,
    HEAD_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Merge the partial answers of one head of one query, weighted by their sums.

    Grid: (tokens * heads,).
    """
    line = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    in_dim = dim < HEAD_DIM
    lse = tl.load(lse_ptr + line * SPLITS + split)
    weights = tl.exp2(lse - tl.max(lse, 0))
    where = (line * SPLITS + split)[:, None] * HEAD_DIM + dim[None, :]
    parts = tl.load(part_ptr + where, in_dim[None, :] & (weights > 0.0)[:, None], 0.0)
    answer = tl.sum(parts * weights[:, None], 0) / tl.sum(weights, 0)
    tl.store(out_ptr + line * HEAD_DIM + dim, answer.to(out_ptr.dtype.element_ty), in_dim)


@dataclass(frozen=True, slots=True)
class Shape:
    """How one launch of `attend_kernel` is cut; the same for a GPU and for compiling ahead."""

    groups: int
    rows: int
    block_q: int
    dims: int
    tile: int
    splits: int
    num_warps: int
    num_stages: int

    @classmethod
    def choose(
        cls,
        heads: int,
        kv_heads: int,
        head_dim: int,
        element_bytes: int,
        *,
        num_queries: int,
        num_seqs: int,
        max_context: int,
        amd: bool = torch.version.hip is not None,
    ) -> Shape:
        """Cut so that the tensor cores are fed, nothing spills, and all processors have work.

        What spills was found by compiling (`ahead`): long tiles hold more in registers.
        """
        groups = heads // kv_heads
        dims = max(16, triton.next_power_of_2(head_dim))
        decode = num_queries <= num_seqs
        exact = element_bytes == 4  # no tensor core multiplies in full float32
        rows = max(16 if decode or exact or dims > 128 else 64, triton.next_power_of_2(groups))
        tile = 32 if amd or dims > (128 if decode else 64) else 64
        if exact or (decode and dims > 128):
            tile = 16
        num_stages = 1 if amd and not decode else 2
        splits = 1
        if decode:
            per_split = 4 * tile  # fewer keys than this are not worth a program of their own
            busy = triton.cdiv(PROCESSORS, max(1, num_seqs * kv_heads))
            splits = max(1, min(busy, triton.cdiv(max_context, per_split), 32))
            splits = triton.next_power_of_2(splits)
        return cls(groups, rows, rows // groups, dims, tile, splits, 4, num_stages)


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
    plan: Plan | None = None,
) -> Tensor:
    """Attend packed queries to paged keys and values; arguments as `reference.paged_attention`.

    One launch, or two when keys are split; no synchronisation, so tables and lengths are trusted.
    `plan` is for the CPU path and not looked at.

    Raises:
        InvalidRequest: The shapes do not fit together.
        Unsupported: The tensors are not on a GPU.
    """
    check_attention(query, key_cache, value_cache, window)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise InvalidRequest(f"sinks {list(sinks.shape)} for {query.shape[1]} heads")
    check_strides(key_cache, value_cache)
    _check_tables(block_tables, query_start, context_lens)
    extra = [] if sinks is None else [sinks]
    check_device(key_cache, query, block_tables, query_start, context_lens, *extra)
    num_queries, heads, head_dim = query.shape
    num_seqs = block_tables.shape[0]
    block_size, kv_heads = key_cache.shape[1:3]
    shape = Shape.choose(
        heads,
        kv_heads,
        head_dim,
        query.element_size(),
        num_queries=num_queries,
        num_seqs=num_seqs,
        max_context=block_tables.shape[1] * block_size,
    )
    if query.stride(2) != 1:
        query = query.contiguous()
    out = torch.empty((num_queries, heads, head_dim), dtype=query.dtype, device=query.device)
    if not num_queries or not num_seqs:
        return out
    part, lse = out, out
    if shape.splits > 1:
        size = (num_queries, heads, shape.splits, head_dim)
        part = torch.empty(size, dtype=torch.float32, device=query.device)
        lse = torch.empty(size[:3], dtype=torch.float32, device=query.device)
    tiles = num_queries // shape.block_q + num_seqs
    attend_kernel[tiles, kv_heads, shape.splits](
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        context_lens,
        query if sinks is None else sinks,
        part,
        lse,
        num_seqs,
        scale,
        1.0 if softcap is None else softcap,
        0 if window is None else window,
        query.stride(0),
        query.stride(1),
        key_cache.stride(0),
        key_cache.stride(1),
        key_cache.stride(2),
        block_tables.stride(0),
        **constants(shape, heads, head_dim, block_size, query.dtype),
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        num_warps=shape.num_warps,
        num_stages=shape.num_stages,
        **OPTIONS,
    )
    if shape.splits > 1:
        merge_kernel[(num_queries * heads,)](
            part,
            lse,
            out,
            HEAD_DIM=head_dim,
            DIMS=shape.dims,
            SPLITS=shape.splits,
            num_warps=4,
            **OPTIONS,
        )
    return out


def constants(
    shape: Shape, heads: int, head_dim: int, block_size: int, dtype: torch.dtype
) -> dict[str, Any]:
    """What `attend_kernel` is compiled for, besides its options."""
    return {
        "HEADS": heads,
        "GROUPS": shape.groups,
        "BLOCK_Q": shape.block_q,
        "ROWS": shape.rows,
        "HEAD_DIM": head_dim,
        "DIMS": shape.dims,
        "BLOCK_SIZE": block_size,
        "TILE": shape.tile,
        "SPLITS": shape.splits,
        "PRECISION": "ieee" if dtype == torch.float32 else "tf32",
        # The interpreter multiplies bf16 as if it were integers; a GPU wants it as it is.
        "UPCAST": INTERPRETED,
    }


def _check_tables(block_tables: Tensor, query_start: Tensor, context_lens: Tensor) -> None:
    num = block_tables.shape[0]
    if (
        block_tables.dim() != 2
        or query_start.shape != (num + 1,)
        or context_lens.shape != (num,)
        or block_tables.stride(1) != 1
    ):
        raise InvalidRequest(
            f"block_tables {list(block_tables.shape)}, query_start {list(query_start.shape)} and "
            f"context_lens {list(context_lens.shape)} are not [S, max_blocks], [S + 1] and [S]"
        )
    for tensor in (block_tables, query_start, context_lens):
        if tensor.dtype != torch.int32:
            raise InvalidRequest(f"tables and lengths are int32 on a GPU, not {tensor.dtype}")
