"""What the operations mean: slow, obvious, in double precision.  The kernels are held to this.

One sequence after the other and one head after the other, with all scores written out.  Only a
test, or a call too rare to deserve a fast path, comes here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from prefixcache_kernels.checks import FP8


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
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """What `reference.paged_attention` means.  O(queries * keys), one head at a time.

    Arguments are those of `reference.paged_attention`; everything is computed in `dtype`.

    Returns:
        `[T, heads, value_dim]` of `dtype`.
    """
    size, kv_heads = key_cache.shape[1:3]
    heads = query.shape[1]
    out = torch.zeros((query.shape[0], heads, value_cache.shape[3]), dtype=dtype)
    for s, context in enumerate(context_lens.tolist()):
        begin, end = query_start[s : s + 2].tolist()
        if begin == end:  # nobody asks: what its table names is not read, and may be anything
            continue
        slots = torch.arange(context)
        table = block_tables[s].long()
        keys = _widen(key_cache, table[slots // size], slots % size, key_scale, dtype)
        values = _widen(value_cache, table[slots // size], slots % size, value_scale, dtype)
        spots = torch.arange(context - (end - begin), context)[:, None]
        visible = slots <= spots
        if window is not None:
            visible &= slots > spots - window
        for head in range(heads):
            kv_head = head * kv_heads // heads
            scores = query[begin:end, head].to(dtype) @ keys[:, kv_head].T * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            scores = scores.masked_fill(~visible, float("-inf"))
            if sinks is not None:
                sink = sinks[head].to(dtype).expand(end - begin, 1)
                scores = torch.cat([scores, sink], 1)
            shares = torch.softmax(scores, 1)[:, :context]
            out[begin:end, head] = shares @ values[:, kv_head]
            if lse is not None:
                lse[begin:end, head] = torch.logsumexp(scores, 1)
    return out


def _widen(
    cache: Tensor, blocks: Tensor, offsets: Tensor, scale: Tensor | None, dtype: torch.dtype
) -> Tensor:
    if cache.dtype == FP8:  # indexing is not written for eight-bit types
        cells = cache.view(torch.uint8)[blocks, offsets].view(FP8).to(dtype)
    else:
        cells = cache[blocks, offsets].to(dtype)
    return cells if scale is None else cells * scale.to(dtype)[:, None]


def oracle_store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """What `reference.store_kv` means: one token after the other; slot -1 is none."""
    for new, cache, scale in ((key, key_cache, key_scale), (value, value_cache, value_scale)):
        for token, slot in enumerate(slot_mapping.tolist()):
            if slot >= 0:
                block, offset = divmod(slot, cache.shape[1])
                cache[block, offset] = quantise(new[token], scale, cache.dtype)


def quantise(new: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Give `[..., kv_heads, dim]` in a cache's type: `new / scale`, clamped to what fits.

    Rounds to the nearest, ties to even, once: the quotient is exact to float32.
    """
    if scale is None:
        return new
    largest = torch.finfo(dtype).max
    return (new.float() / scale[:, None]).clamp(-largest, largest).to(dtype)
