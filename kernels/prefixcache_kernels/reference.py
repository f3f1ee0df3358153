"""The pool's operations in plain PyTorch; attention, where the C library (`cpu`) cannot.

`oracle` has the slow obvious version: one sequence after the other, in double precision.
`paged_attention` gives the same within rounding, as fast as PyTorch allows.  A decode step does few
operations on many bytes, so the bytes decide:

```
                                                    memory traffic per cached token and layer
DynamicCache: concatenate, then attend              read old, write new, read new
this file: gather into a small scratch, attend      read old (the scratch stays in the cache)
```

Grouped queries are packed as rows, `[S, kv_heads, group * queries, head_dim]`, so that keys and
values are never repeated.  A long prefill over a cached prefix is two dense calls, one over the
prefix without a mask and one causal over itself, merged by their log-sum-exp.
"""

from __future__ import annotations

from typing import Final, cast

import torch
from torch import Tensor

from prefixcache_kernels.checks import (
    FP8,
    check_attention,
    check_copies,
    check_scalars,
    check_slots,
    check_store,
    check_values,
    same_memory,
)
from prefixcache_kernels.oracle import oracle_attention, quantise
from prefixcache_kernels.plan import Plan

__all__ = ["Plan", "copy_blocks", "oracle_attention", "paged_attention", "store_kv"]

SPLIT_QUERIES: Final = 128
"""From this many queries on, two calls without a mask beat one with it (measured; 7 % at 256)."""

TILED_QUERIES: Final = 16
"""In bfloat16, from this many queries on plain products beat flash attention (measured without
matrix units: 1.5 times at 16 queries, 2.2 to 2.6 times at 256)."""

_TILE: Final = 64
"""Queries of a tile.  Larger ones have scores of several MiB, which page faults make slower."""

_ZERO: Final = torch.zeros(1, 1, 1)

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into their slots.  O(T).

    Args:
        key: `[T, kv_heads, head_dim]`, any strides.
        value: `[T, kv_heads, value_dim]`, any strides.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, any strides, of the same dtype,
            or float8_e4m3fn: then `key / key_scale` is stored, rounded to the nearest.
        value_cache: `[num_blocks, block_size, kv_heads, value_dim]`, of the type of `key_cache`.
        slot_mapping: `[T]` int64, `block * block_size + offset`; -1 skips the token.
        key_scale: `[kv_heads]` float32, of float8_e4m3fn caches only; so is `value_scale`.
        value_scale: Like `key_scale`.

    Raises:
        InvalidRequest: The shapes or types do not fit together, or a slot lies outside the pool;
            nothing has been written.
    """
    written = check_store(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
    block_size = key_cache.shape[1]
    some = check_slots(slot_mapping, key_cache.shape[0] * block_size)
    if some:
        kept = (slot_mapping >= 0).nonzero().view(-1)
        slot_mapping, key, value = slot_mapping[kept], key[kept], value[kept]
    if key_cache.dtype == FP8:  # copying by index is not written for eight-bit types
        key = quantise(key, key_scale, FP8).view(torch.uint8)
        value = quantise(value, value_scale, FP8).view(torch.uint8)
    if key.requires_grad or value.requires_grad:  # a pool has no part in anybody's gradients
        key, value = key.detach(), value.detach()
    if written.rows is not None:
        written.rows[0].index_copy_(0, slot_mapping, key)
        written.rows[1].index_copy_(0, slot_mapping, value)
    else:
        where = (slot_mapping // block_size, slot_mapping % block_size)
        written.places[0].index_put_(where, key)
        written.places[1].index_put_(where, value)


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others, in all layers.  O(copied tokens).

    Args:
        blocks: `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`.
        copies: `[n, 3]` int64 rows `(src, dst, num_tokens)`.  No block is both read and written.

    Raises:
        InvalidRequest: A block is outside the pool, too many tokens, or copies that interfere.
    """
    check_copies(blocks, copies)
    blocks, copies = same_memory(blocks), copies.cpu()
    for num in sorted(set(copies[:, 2].tolist())):  # as a rule one copy, or many of whole blocks
        src, dst, _ = copies[copies[:, 2] == num].unbind(1)
        if len(src) == 1:
            blocks[:, :, int(dst), :num] = blocks[:, :, int(src), :num]
        else:
            blocks[:, :, dst, :num] = blocks[:, :, src, :num]


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
) -> Tensor:
    """Causal attention of packed queries over paged keys and values.  Changes nothing.

    Query j of sequence s sits at position `context_lens[s] - num_queries[s] + j`; its own key is
    already stored.

    Args:
        query: `[T, heads, head_dim]`, the sequences' queries one after the other.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]` of the same dtype, or
            float8_e4m3fn.
        value_cache: `[num_blocks, block_size, kv_heads, value_dim]`, of the type of `key_cache`.
        block_tables: `[S, max_blocks]` ints; entries beyond a sequence's keys are not read.
        query_start: `[S + 1]` ints, where each sequence's queries begin.
        context_lens: `[S]` ints, keys of each sequence, the new ones included.
        scale: Factor of the scores.
        window: Keys that a query attends at most, itself included.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        sinks: `[heads]`; a score per head that takes part in the softmax and has no value.
        key_scale: `[kv_heads]` float32, what the keys of a float8_e4m3fn cache are multiplied by;
            None for other types.
        value_scale: Like `key_scale`.
        lse: `[T, heads]` float32, is written if given: the natural logarithm of each softmax's sum,
            the sink included.
        plan: `Plan.build` of the same tables; made here if None.  Pass one for all layers.

    Eight-bit caches, values of another size than keys, and `lse` take a slow path here; the C
    library has none.

    Sums are in float32, of weights up to 2**8: values that times the keys of a sequence come to
    more than 1.3e36 (2**128 / 2**8) may give answers that are infinite or NaN.

    Returns:
        `[T, heads, value_dim]`.

    Raises:
        InvalidRequest: The shapes do not fit together, or a table names a block outside the pool.
    """
    scale, window, softcap = check_scalars(scale, window, softcap)
    rare = lse is not None or key_scale is not None or value_scale is not None
    rare = rare or key_cache.shape != value_cache.shape or query.dtype == torch.float64
    if plan is None or rare or sinks is not None or key_cache.dtype == FP8:
        check_attention(
            query,
            key_cache,
            value_cache,
            sinks=sinks,
            key_scale=key_scale,
            value_scale=value_scale,
            lse=lse,
        )
    if plan is None:
        plan = Plan.build(block_tables, query_start, context_lens, key_cache.shape[1])
    query, key_cache, value_cache = detached(query, key_cache, value_cache)
    if rare:
        plan.check(query, key_cache)
        num_blocks, block_size = key_cache.shape[:2]
        check_values(
            block_tables,
            query_start,
            context_lens,
            num_queries=query.shape[0],
            num_blocks=num_blocks,
            block_size=block_size,
        )
        lse = None if lse is None else same_memory(lse)
        return oracle_attention(
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
            dtype=torch.float64 if query.dtype == torch.float64 else torch.float32,
        ).to(query.dtype)
    shapes = (query.shape, key_cache.shape, value_cache.shape)
    layer = (*shapes, query.dtype, key_cache.dtype, value_cache.dtype, window)
    work = plan.work(layer)
    if work is None:  # the first layer of its kind in this step; the others are like it
        check_attention(query, key_cache, value_cache)
        work = plan.prepare(layer, query, key_cache, window)
    query = whole_heads(query)
    heads, dim = query.shape[1:]
    kv_heads = key_cache.shape[2]
    groups = heads // kv_heads
    out = None
    for piece, scratch, mask in work:
        keys, values = piece.dense(scratch, key_cache, value_cache)
        num, each = piece.num_seqs, piece.num_queries
        packed = query if piece.rows is None else query[piece.rows]
        if each == 1:
            packed = packed.view(num, kv_heads, groups, dim)
        else:
            packed = packed.view(num, each, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
            packed = packed.reshape(num, kv_heads, groups * each, dim)
        if softcap is not None or sinks is not None:
            attended = _plain(packed, keys, values, mask, scale, softcap, sinks)
        elif each >= TILED_QUERIES and piece.cached is not None and query.dtype == torch.bfloat16:
            attended = _tiled(packed, keys, values, piece.cached, scale)
        elif each >= SPLIT_QUERIES and piece.cached is not None and scale > 0:
            attended = _split(packed, keys, values, piece.cached, scale)
        elif each == num == 1 and query.dtype == torch.float32:
            attended = _lone(packed, keys, values, scale)
        else:
            attended = _flash(packed, keys, values, attn_mask=mask, scale=scale)[0]
        if each > 1:
            attended = attended.reshape(num, kv_heads, groups, each, dim).permute(0, 3, 1, 2, 4)
        attended = attended.reshape(num * each, heads, dim)
        if piece.rows is None:
            return attended
        if out is None:
            out = query.new_empty(query.shape)
        out[piece.rows] = attended
    return query.new_empty(query.shape) if out is None else out


def whole_heads(query: Tensor) -> Tensor:
    """Give queries whose heads lie apart, each with its elements side by side; copied if not.

    PyTorch's products of other operands round scores to 16 bits before they are scaled, and its
    attention gives the answer the strides of the queries: into heads that overlap, it would write
    one over another.
    """
    reach = 1
    for stride, size in sorted(zip(query.stride(), query.shape, strict=True)):
        if size > 1 and stride < reach:
            return query.contiguous()
        reach += stride * (size - 1)
    return query if query.stride(2) == 1 else query.contiguous()


def detached(*tensors: Tensor) -> list[Tensor]:
    """Leave gradients aside: a cache keeps no graph of what was written into it."""
    return [tensor.detach() if tensor.requires_grad else tensor for tensor in tensors]


def _lone(packed: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """One query of one sequence, in float32: three products on views, a sixth faster than flash."""
    scores = torch.baddbmm(_ZERO, packed[0], keys[0].transpose(1, 2), beta=0, alpha=scale)
    return torch.bmm(torch.softmax(scores, -1), values[0])


def _split(packed: Tensor, keys: Tensor, values: Tensor, cached: int, scale: float) -> Tensor:
    """One sequence's attention over what is cached and, causally, over itself; merged."""
    _, kv_heads, rows, dim = packed.shape
    each = keys.shape[2] - cached
    groups = rows // each
    queries = packed.view(kv_heads, groups, each, dim)
    # Heads of a group read the same keys: a stride of 0 where repeating would copy.
    own = (kv_heads, groups, each, dim)
    own_keys = keys[0, :, None, cached:].expand(own)
    own_values = values[0, :, None, cached:].expand(own)
    late, late_lse = _flash(queries, own_keys, own_values, is_causal=True, scale=scale)
    if not cached:
        return cast(Tensor, late.reshape(packed.shape))
    early, early_lse = _flash(packed, keys[:, :, :cached], values[:, :, :cached], scale=scale)
    share = torch.sigmoid(early_lse.view(late_lse.shape) - late_lse).unsqueeze(-1)
    return torch.lerp(late.float(), early.reshape(own).float(), share).to(packed.dtype)


def _tiled(packed: Tensor, keys: Tensor, values: Tensor, cached: int, scale: float) -> Tensor:
    """One sequence's causal attention, a tile of queries at a time; none reads later keys."""
    _, kv_heads, rows, dim = packed.shape
    each = keys.shape[2] - cached
    groups = rows // each
    queries = packed.view(kv_heads, groups, each, dim)
    out = torch.empty_like(queries)
    wide = keys[0].float()
    later = torch.full((min(_TILE, each),) * 2, float("-inf")).triu_(1)
    for begin in range(0, each, _TILE):
        end = min(each, begin + _TILE)
        num, context = end - begin, cached + end
        tile = queries[:, :, begin:end].reshape(kv_heads, groups * num, dim)
        # In float32: rounded to bfloat16, scores of tens would be off by tenths.
        scores = torch.bmm(tile.float(), wide[:, :context].transpose(1, 2)).mul_(scale)
        own = scores.view(kv_heads, groups, num, context)[..., cached + begin :]
        own += later[:num, :num]
        shares = torch.softmax(scores, -1).to(packed.dtype)
        attended = torch.bmm(shares, values[0, :, :context])
        out[:, :, begin:end] = attended.view(kv_heads, groups, num, dim)
    return out.view(packed.shape)


def _plain(
    packed: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with all scores written out, in float32: for soft-capped scores and sinks."""
    num, kv_heads, rows, _ = packed.shape
    scores = torch.matmul(packed.float(), keys.float().transpose(2, 3)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores += mask
    if sinks is not None:
        sink = sinks.float().view(1, kv_heads, -1, 1)  # of each head, for each of its queries
        sink = sink.repeat_interleave(rows // sink.shape[2], 2).expand(num, -1, -1, -1)
        scores = torch.cat([scores, sink], -1)
    shares = torch.softmax(scores, -1)[..., : keys.shape[2]]
    return torch.matmul(shares, values.float()).to(packed.dtype)
