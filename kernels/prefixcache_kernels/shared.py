"""Triton: attend to prefixes that sequences of a batch share, reading each of them once.

Why.  With 256 sequences behind one system prompt of 32k tokens, `paged_attention` reads the same
128 MiB of a layer 256 times.  The plan (`groups`) names the blocks that neighbours share, as runs
that form a forest; here every run is a batch of queries over one stretch of keys:

```
batch          s0 ┬ run A ─ run B ─ own       positions (plan.order)   0    1    2    3
               s1 ┤       └ run B ─ own       run A (level 0)          ██████████████
               s2 ┴ run A ───────── own       run B (level 1)          █████████
               s3 ───────────────── own       own parts                █    █    █    █

a line of partial answers      │ level 0 ........ │ level 1 ........ │ own ........... │
(one query, one head)          │ split 0, 1, ...  │ split 0, 1, ...  │ split 0, 1, ... │
```

1. `shared_kernel`: a program takes one tile of a run, all queries x heads of a group packed into
   its rows, and one split of the run's keys.  Tiles of one run are neighbours in the grid, so that
   a second tile finds the keys in the L2 cache.
2. `attend_kernel` reads what is left to each sequence alone.
3. `merge_kernel` weighs the parts of each line by their log-sum-exp.

Sequences that prefill share as those that decode do: a run then has all queries of its sequences as
rows, in the plan's order (`_Queries`).  They lie behind all shared keys, so no run needs a mask.

The idea is that of Hydragen (Juravsky et al. 2024) and cascade attention (Ye et al. 2024), here on
a forest of any depth that the cache's own tree gives.

Bytes moved, per layer: `run_blocks * block_size * kv_heads * (head_dim + value_dim)` elements once
per run instead of once per sequence, plus `8 * heads * (value_dim + 1)` for each query and slot.

Nothing here waits for the device, and the grid depends on the plan's shapes alone.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

from typing import Final, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.attention import attend_kernel, merge, paged_attention
from prefixcache_kernels.checks import check_attention, check_scalars
from prefixcache_kernels.groups import GroupPlan
from prefixcache_kernels.keys import FP8_BITS, attend_keys
from prefixcache_kernels.launch import (
    OPTIONS,
    cache_arguments,
    check_device,
    check_strides,
    check_tables,
    in_reach,
    looks,
    readable,
)
from prefixcache_kernels.shape import Shape, next_power_of_2

PLAN: Final = (
    "order_ptr",
    "run_row_ptr",
    "run_first_ptr",
    "run_blocks_ptr",
    "run_start_ptr",
    "run_end_ptr",
    "run_level_ptr",
)
"""Parts of one packed tensor: where they begin must not decide what is compiled."""


@triton.jit(
    do_not_specialize=["num_runs", "window", "stride_table"],
    do_not_specialize_on_alignment=list(PLAN),
)
def shared_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    table_ptr,
    context_ptr,
    first_ptr,
    order_ptr,
    run_row_ptr,
    run_first_ptr,
    run_blocks_ptr,
    run_start_ptr,
    run_end_ptr,
    run_level_ptr,
    key_scale_ptr,
    value_scale_ptr,
    out_ptr,
    lse_ptr,
    num_runs,
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
    SLOTS: tl.constexpr,
    RUNS: tl.constexpr,
    DECODE: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attend one tile of a run's queries to one split of its keys.

    Grid: (tiles, kv_heads, SPLITS).  RUNS is the power of two from `num_runs` on.  A run without
    blocks or positions is none: plans may be padded to a fixed number of runs.

    DECODE: each sequence has one query, at the end of its context; `order_ptr` and `context_ptr`
    are the plan's order and the batch's lengths.  If not, `first_ptr` says where a position's
    queries begin in the plan's order, and in that order `order_ptr` names each query's token,
    `context_ptr` its position plus 1.
    """
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)

    # Which run: tiles are dealt out run after run; count the runs that end before this tile.
    run = tl.arange(0, RUNS)
    real = run < num_runs
    starts, ends = tl.load(run_start_ptr + run, real, 0), tl.load(run_end_ptr + run, real, 0)
    if not DECODE:
        starts, ends = tl.load(first_ptr + starts), tl.load(first_ptr + ends)
    sizes = ends - starts
    needs = (sizes + BLOCK_Q - 1) // BLOCK_Q
    before = tl.cumsum(needs, 0) <= tile
    first = (tile - tl.sum(tl.where(before, needs, 0))) * BLOCK_Q
    mine = tl.sum(tl.where(before, 1, 0))
    if mine < num_runs:
        start, end = tl.load(run_start_ptr + mine), tl.load(run_end_ptr + mine)
        if not DECODE:
            start, end = tl.load(first_ptr + start), tl.load(first_ptr + end)
        row = tl.arange(0, ROWS)
        dim, value_dim = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
        query = start + first + row // GROUPS  # in the plan's order
        head = kv_head * GROUPS + row % GROUPS
        live = (row < BLOCK_Q * GROUPS) & (query < end)
        token = tl.load(order_ptr + query, live, 0)
        # Its position; a padding row sees nothing.
        spot = tl.load(context_ptr + (token if DECODE else query), live, 0) - 1
        token = token.to(tl.int64)
        where = token[:, None] * stride_query_token + head[:, None] * stride_query_head
        q = tl.load(
            query_ptr + where + dim[None, :], live[:, None] & (dim < HEAD_DIM)[None, :], 0.0
        )
        if UPCAST:
            q = q.to(tl.float32)
        if FP8:
            scale *= tl.load(key_scale_ptr + kv_head)

        bottom = tl.load(run_first_ptr + mine) * BLOCK_SIZE
        top = bottom + tl.load(run_blocks_ptr + mine) * BLOCK_SIZE
        if WINDOWED:  # what even the shortest sequence no longer attends
            bottom = tl.maximum(bottom, tl.min(tl.where(live, spot, top)) - window + 1)
        aligned = bottom // TILE * TILE
        left, right = aligned, top
        if SPLITS > 1:
            share = tl.cdiv(tl.cdiv(top - aligned, SPLITS), TILE) * TILE
            left = aligned + split * share
            right = tl.minimum(left + share, top)

        table = table_ptr + tl.load(run_row_ptr + mine).to(tl.int64) * stride_table
        peak, total, sums = attend_keys(
            q,
            spot,
            tl.full([ROWS], float("-inf"), tl.float32),
            tl.zeros([ROWS], tl.float32),
            tl.zeros([ROWS, VALUE_DIMS], tl.float32),
            key_ptr + tl.cast(kv_head, tl.int64) * stride_key_head,
            value_ptr + tl.cast(kv_head, tl.int64) * stride_value_head,
            table,
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
            False,  # all shared keys lie before all queries
            WINDOWED,
            CAPPED,
            FP8,
            PRECISION,
        )

        floor = tl.where(total > 0.0, total, 1.0)
        answer = sums / floor[:, None]
        if FP8:
            answer *= tl.load(value_scale_ptr + kv_head)
        slot = tl.load(run_level_ptr + mine) * SPLITS + split
        line = (token * HEADS + head) * SLOTS + slot
        tl.store(
            out_ptr + line[:, None] * VALUE_DIM + value_dim[None, :],
            answer,
            live[:, None] & (value_dim < VALUE_DIM)[None, :],
        )
        tl.store(lse_ptr + line, peak + tl.log2(floor), live)


class _Queries(NamedTuple):
    """The packed queries of a batch in the plan's order, on its device."""

    first: Tensor
    """`[S + 1]` int32: where the queries of each position begin."""
    tokens: Tensor
    """`[T]` int32: which packed query."""
    behind: Tensor
    """`[T]` int32: keys up to its own, that one included."""
    own_from: Tensor
    """`[S]` int32: as `GroupPlan.own_from`, but by sequence."""

    @classmethod
    def of(cls, groups: GroupPlan, query_start: Tensor, context_lens: Tensor, num: int) -> _Queries:
        """Put them in order: a dozen small launches, and no waiting for any of them."""
        order = groups.order.long()
        starts = query_start[:-1][order]
        lens = query_start[1:][order] - starts
        ends = lens.cumsum(0)
        # Where the batch is padded, the queries behind the last sequence's count as its own.
        every = torch.arange(num, device=order.device, dtype=ends.dtype)
        position = torch.searchsorted(ends, every, right=True).clamp_(max=len(order) - 1)
        tokens = (starts - ends + lens)[position] + every
        behind = tokens + 1 + (context_lens - query_start[1:])[order][position]
        own_from = torch.empty_like(groups.own_from)
        own_from[order] = groups.own_from
        first = torch.nn.functional.pad(ends, (1, 0))
        return cls(first.int(), tokens.int(), behind.int(), own_from)


def shared_prefix_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    groups: GroupPlan,
    *,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
    levels: int | None = None,
) -> Tensor:
    """Attend as `paged_attention` does, reading each shared run of keys once.  Changes nothing.

    Three launches and one fill, or those of `paged_attention` if the plan shares nothing (which a
    plan does wherever its cost model says that sharing does not pay).  A batch of as many queries
    as sequences is taken to decode, one each: lengths on the device are not looked at, and where
    one has another number of them, the answers are NaN.  For any other batch the queries are first
    put in the plan's order, which takes a dozen small launches more.

    Arguments are those of `reference.paged_attention`, and `groups`: `GroupPlan.build` of these
    tables, on the same device.  `levels` is how many runs a path may have; None: as many as this
    plan's have.  Whoever captures the call in a graph, to be replayed with other plans, pads the
    plan (`GroupPlan.padded`) and says `groups.MAX_LEVELS`.

    Returns:
        `[T, heads, value_dim]`, within rounding what `paged_attention` gives.

    Raises:
        InvalidRequest: The shapes do not fit together, or the plan is of another batch.
        Unsupported: The tensors are not on a GPU.
    """
    scale, window, softcap = check_scalars(scale, window, softcap)
    if not isinstance(groups, GroupPlan):
        raise InvalidRequest(f"groups is a {type(groups).__name__}, not a GroupPlan")
    groups.check_kinds()
    if not groups.num_runs:
        return paged_attention(
            query,
            key_cache,
            value_cache,
            block_tables,
            query_start,
            context_lens,
            scale=scale,
            window=window,
            softcap=softcap,
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
            lse=lse,
        )
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
    if groups.num_seqs != num_seqs:
        raise InvalidRequest(f"groups of {groups.num_seqs} sequences for {num_seqs} tables")
    check_device(
        key_cache,
        groups.packed,
    )
    looked = looks(key_cache)
    _, block_size, kv_heads, value_dim = value_cache.shape
    if looked:
        lens = query_start.diff()
        before = (context_lens - lens) // block_size
        before[lens == 0] = block_tables.shape[1]  # nobody asks
        groups.check(block_tables.cpu().numpy(), before.tolist())
    else:
        groups.check()
    max_context = block_tables.shape[1] * block_size
    sizes = (heads, kv_heads, head_dim, value_dim, query.element_size())
    own = Shape.choose(*sizes, num_queries=num_queries, num_seqs=num_seqs, max_context=max_context)
    keys, values, fp8 = readable(key_cache, value_cache)
    runs = Shape.choose_shared(
        *sizes,
        num_queries=num_queries,
        num_runs=groups.num_runs,
        max_context=max_context,
        bits=fp8 == FP8_BITS,
    )
    query = in_reach(query)
    levels = groups.num_levels if levels is None else levels
    if levels < groups.num_levels:
        raise InvalidRequest(f"a plan of {groups.num_levels} levels in room for {levels}")
    slots = levels * runs.splits + own.splits
    decode = num_queries == num_seqs
    if decode and looked and bool((query_start.diff() != 1).any()):
        decode = False  # some have several queries, others none
    own_from, order, ends, first = groups.own_from, groups.order, context_lens, groups.order
    if not decode:
        first, order, ends, own_from = _Queries.of(groups, query_start, context_lens, num_queries)
    out = query.new_empty((num_queries, heads, value_dim))
    part = query.new_empty((num_queries, heads, slots, value_dim), dtype=torch.float32)
    # A sequence that no run of some level covers has no answer there.
    part_lse = query.new_full((num_queries, heads, slots), float("-inf"), dtype=torch.float32)
    scales = (
        query if key_scale is None else key_scale,
        query if value_scale is None else value_scale,
    )
    numbers = (scale, 1.0 if softcap is None else softcap, 0 if window is None else window)
    strides = (
        query.stride(0),
        query.stride(1),
        *cache_arguments(key_cache, value_cache),
        block_tables.stride(0),
    )
    shared_kernel[runs.tiles(num_queries * levels, groups.num_runs), kv_heads, runs.splits](
        query,
        keys,
        values,
        block_tables,
        ends,
        first,
        order,
        groups.run_row,
        groups.run_first,
        groups.run_blocks,
        groups.run_start,
        groups.run_end,
        groups.run_level,
        *scales,
        part,
        part_lse,
        groups.num_runs,
        *numbers,
        *strides,
        **runs.constants(heads, head_dim, value_dim, block_size, query.dtype),
        BLOCK_Q=runs.block_q,
        SPLITS=runs.splits,
        SLOTS=slots,
        RUNS=next_power_of_2(groups.num_runs),
        DECODE=decode,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        FP8=fp8,
        num_warps=runs.num_warps,
        num_stages=runs.num_stages,
        **OPTIONS,
    )
    tiles = num_seqs if decode else own.tiles(num_queries, num_seqs)
    attend_kernel[tiles, kv_heads, own.splits](
        query,
        keys,
        values,
        block_tables,
        query_start,
        context_lens,
        groups.order,
        own_from,
        query if sinks is None else sinks,
        *scales,
        part,
        part_lse,
        num_seqs,
        *numbers,
        *strides,
        **own.constants(heads, head_dim, value_dim, block_size, query.dtype),
        BLOCK_Q=own.block_q,
        SPLITS=own.splits,
        SPLIT_KEYS=own.split_keys,
        SLOTS=slots,
        OWN=1 if decode else 2,
        WINDOWED=window is not None,
        CAPPED=softcap is not None,
        SINKS=sinks is not None,
        LSE=True,
        FP8=fp8,
        num_warps=own.num_warps,
        num_stages=own.num_stages,
        **OPTIONS,
    )
    merge(part, part_lse, out, lse)
    return out
