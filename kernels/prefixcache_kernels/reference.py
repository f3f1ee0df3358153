"""The pool's operations in plain PyTorch: the oracle of the kernels, and the fast path on a CPU.

`oracle_attention` is the slow obvious version: one sequence after the other, in double precision.
`paged_attention` gives the same within rounding, as fast as a CPU allows.  A decode step does few
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

from prefixcache.errors import InvalidRequest
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
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys and values into their slots.  O(T).

    Args:
        key: `[T, kv_heads, head_dim]`, any strides.
        value: Like `key`.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]`, contiguous, of the same dtype.
        value_cache: Like `key_cache`.
        slot_mapping: `[T]` int64, `block * block_size + offset`; -1 skips the token.

    Raises:
        InvalidRequest: The shapes do not fit together, or a slot lies outside the pool (the
            tokens before it may have been written).
    """
    check_store(key, value, key_cache, value_cache, slot_mapping)
    tail = key.shape[1:]
    try:
        key_cache.view(-1, *tail).index_copy_(0, slot_mapping, key)
        value_cache.view(-1, *tail).index_copy_(0, slot_mapping, value)
    except (IndexError, RuntimeError):  # some slot is -1, or wrong: look, which costs time
        num_slots = key_cache.shape[0] * key_cache.shape[1]
        low, high = (int(end) for end in torch.aminmax(slot_mapping))
        if low < -1 or high >= num_slots:
            raise InvalidRequest(
                f"slots {low} to {high} are outside the pool's {num_slots} slots"
            ) from None
        kept = (slot_mapping >= 0).nonzero().view(-1)
        key_cache.view(-1, *tail).index_copy_(0, slot_mapping[kept], key[kept])
        value_cache.view(-1, *tail).index_copy_(0, slot_mapping[kept], value[kept])


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others, in all layers.  O(copied tokens).

    Args:
        blocks: `[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]`.
        copies: `[n, 3]` int64 rows `(src, dst, num_tokens)`.  No block is both read and written.

    Raises:
        InvalidRequest: A block is outside the pool, too many tokens, or copies that interfere.
    """
    check_copies(blocks, copies)
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
    plan: Plan | None = None,
) -> Tensor:
    """Causal attention of packed queries over paged keys and values.  Changes nothing.

    Query j of sequence s sits at position `context_lens[s] - num_queries[s] + j`; its own key is
    already stored.

    Args:
        query: `[T, heads, head_dim]`, the sequences' queries one after the other.
        key_cache: `[num_blocks, block_size, kv_heads, head_dim]` of the same dtype.
        value_cache: Like `key_cache`.
        block_tables: `[S, max_blocks]` ints; entries beyond a sequence's keys are not read.
        query_start: `[S + 1]` ints, where each sequence's queries begin.
        context_lens: `[S]` ints, keys of each sequence, the new ones included.
        scale: Factor of the scores.
        window: Keys that a query attends at most, itself included.
        softcap: Scores become `softcap * tanh(score / softcap)`.
        sinks: `[heads]`; a score per head that takes part in the softmax and has no value.
        plan: `Plan.build` of the same tables; made here if None.  Pass one for all layers.

    Returns:
        `[T, heads, head_dim]`.

    Raises:
        InvalidRequest: The shapes do not fit together, or a table names a block outside the pool.
    """
    if plan is None:
        plan = Plan.build(block_tables, query_start, context_lens, key_cache.shape[1])
    shapes = (query.shape, key_cache.shape, value_cache.shape)
    layer = (*shapes, query.dtype, key_cache.dtype, value_cache.dtype, window)
    work = plan.work(layer)
    if work is None:  # the first layer of its kind in this step; the others are like it
        check_attention(query, key_cache, value_cache, window)
        work = plan.prepare(layer, query, key_cache, window)
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise InvalidRequest(f"sinks {list(sinks.shape)} for {query.shape[1]} heads")
    heads, dim = query.shape[1:]
    kv_heads = key_cache.shape[2]
    groups = heads // kv_heads
    out = None
    for piece, scratch, mask in work:
        try:
            torch.index_select(key_cache, 0, piece.index, out=scratch.key_blocks)
            torch.index_select(value_cache, 0, piece.index, out=scratch.value_blocks)
        except (IndexError, RuntimeError):
            raise InvalidRequest(
                f"block tables name blocks {int(piece.index.min())} to {int(piece.index.max())}; "
                f"the pool has {key_cache.shape[0]}"
            ) from None
        if scratch.hidden:
            torch._foreach_zero_(scratch.hidden)
        num, each = piece.num_seqs, piece.num_queries
        packed = query if piece.rows is None else query[piece.rows]
        if each == 1:
            packed = packed.view(num, kv_heads, groups, dim)
        else:
            packed = packed.view(num, each, kv_heads, groups, dim).permute(0, 2, 3, 1, 4)
            packed = packed.reshape(num, kv_heads, groups * each, dim)
        if softcap is not None or sinks is not None:
            attended = _plain(packed, scratch.keys, scratch.values, mask, scale, softcap, sinks)
        elif each >= TILED_QUERIES and piece.cached is not None and query.dtype == torch.bfloat16:
            attended = _tiled(packed, scratch.keys, scratch.values, piece.cached, scale)
        elif each >= SPLIT_QUERIES and piece.cached is not None:
            attended = _split(packed, scratch.keys, scratch.values, piece.cached, scale)
        elif each == num == 1 and query.dtype == torch.float32:
            attended = _lone(packed, scratch.keys, scratch.values, scale)
        else:
            attended = _flash(packed, scratch.keys, scratch.values, attn_mask=mask, scale=scale)[0]
        if each > 1:
            attended = attended.reshape(num, kv_heads, groups, each, dim).permute(0, 3, 1, 2, 4)
        attended = attended.reshape(num * each, heads, dim)
        if piece.rows is None:
            return attended
        if out is None:
            out = torch.empty(query.shape, dtype=query.dtype)
        out[piece.rows] = attended
    return torch.empty(query.shape, dtype=query.dtype) if out is None else out


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
    later = torch.full((min(_TILE, each),) * 2, float("-inf")).triu_(1)
    for begin in range(0, each, _TILE):
        end = min(each, begin + _TILE)
        num, context = end - begin, cached + end
        tile = queries[:, :, begin:end].reshape(kv_heads, groups * num, dim)
        scores = torch.bmm(tile, keys[0, :, :context].transpose(1, 2)).float().mul_(scale)
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


def oracle_attention(
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
) -> Tensor:
    """What `paged_attention` means: slow, obvious, float64.  Same arguments, answer in float64."""
    size, kv_heads = key_cache.shape[1:3]
    out = torch.zeros(query.shape, dtype=torch.float64)
    for s, context in enumerate(context_lens.tolist()):
        begin, end = query_start[s : s + 2].tolist()
        slots = torch.arange(context)
        table = block_tables[s].long()
        keys = key_cache[table[slots // size], slots % size].double()
        values = value_cache[table[slots // size], slots % size].double()
        spots = torch.arange(context - (end - begin), context)[:, None]
        visible = slots <= spots
        if window is not None:
            visible &= slots > spots - window
        for head in range(query.shape[1]):
            kv_head = head * kv_heads // query.shape[1]
            scores = query[begin:end, head].double() @ keys[:, kv_head].T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                sink = sinks[head].double().expand(end - begin, 1)
                scores = torch.cat([scores, sink], 1)
            shares = torch.softmax(scores, 1)[:, :context]
            out[begin:end, head] = shares @ values[:, kv_head]
    return out


def check_store(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Refuse what `store_kv` cannot write, without looking at values.

    Raises:
        InvalidRequest: The shapes or types do not fit together.
    """
    if (
        key.shape != value.shape
        or key_cache.dim() != 4
        or key_cache.shape != value_cache.shape
        or key.shape[1:] != key_cache.shape[2:]
        or key.dim() != 3
        or slot_mapping.shape != key.shape[:1]
    ):
        raise InvalidRequest(
            f"key {list(key.shape)}, value {list(value.shape)} and slot_mapping "
            f"{list(slot_mapping.shape)} do not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, kv_heads, head_dim], [T] and "
            "[num_blocks, block_size, kv_heads, head_dim]"
        )
    if not key.dtype == value.dtype == key_cache.dtype == value_cache.dtype:
        raise InvalidRequest(
            f"keys of {key.dtype} and values of {value.dtype} do not fit caches of "
            f"{key_cache.dtype} and {value_cache.dtype}"
        )
    if slot_mapping.dtype != torch.int64:
        raise InvalidRequest(f"slot_mapping is {slot_mapping.dtype}, not torch.int64")


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    window: int | None,
) -> None:
    """Refuse what `paged_attention` cannot compute, without looking at values.

    Raises:
        InvalidRequest: The shapes or types do not fit together.
    """
    if (
        query.dim() != 3
        or key_cache.dim() != 4
        or key_cache.shape != value_cache.shape
        or query.shape[2] != key_cache.shape[3]
        or query.shape[1] % key_cache.shape[2]
    ):
        raise InvalidRequest(
            f"query {list(query.shape)} does not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, heads, head_dim] and "
            "[num_blocks, block_size, kv_heads, head_dim], heads a multiple of kv_heads"
        )
    if not query.dtype == key_cache.dtype == value_cache.dtype:
        raise InvalidRequest(
            f"queries of {query.dtype} do not fit caches of {key_cache.dtype} and "
            f"{value_cache.dtype}"
        )
    if window is not None and window < 1:
        raise InvalidRequest(f"a window of {window} tokens attends nothing; at least 1")


def check_copies(blocks: Tensor, copies: Tensor) -> None:
    """Refuse copies outside the pool or whose outcome would depend on their order.

    Raises:
        InvalidRequest: As said.
    """
    if blocks.dim() != 6 or copies.dim() != 2 or copies.shape[1] != 3:
        raise InvalidRequest(
            f"copies {list(copies.shape)} of blocks {list(blocks.shape)}: not [n, 3] and "
            "[num_layers, 2, num_blocks, block_size, kv_heads, head_dim]"
        )
    if not copies.shape[0]:
        return
    num_blocks, block_size = blocks.shape[2:4]
    if copies.min() < 0 or copies[:, :2].max() >= num_blocks or copies[:, 2].max() > block_size:
        raise InvalidRequest(
            f"copies {copies.tolist()} leave a pool of {num_blocks} blocks of {block_size} tokens"
        )
    written = set(copies[:, 1].tolist())
    if len(written) < copies.shape[0] or written & set(copies[:, 0].tolist()):
        raise InvalidRequest(
            f"copies {copies.tolist()} write a block twice, or one that another copy reads"
        )
