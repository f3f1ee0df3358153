"""What the operations refuse, on a CPU and on a GPU alike.  Nothing here looks at a value.

The one exception are copies, which come from the host: they are checked in full.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest

FP8: Final = torch.float8_e4m3fn
"""The one eight-bit type that caches may have: 4 bits of exponent, 3 of mantissa, at most 448."""


def check_store(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Refuse what `store_kv` cannot write.

    Raises:
        InvalidRequest: The shapes or types do not fit together.
    """
    if (
        key.dim() != 3
        or value.dim() != 3
        or key_cache.dim() != 4
        or value_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
        or key.shape[:2] != value.shape[:2]
        or key.shape[1:] != key_cache.shape[2:]
        or value.shape[1:] != value_cache.shape[2:]
        or slot_mapping.shape != key.shape[:1]
    ):
        raise InvalidRequest(
            f"key {list(key.shape)}, value {list(value.shape)} and slot_mapping "
            f"{list(slot_mapping.shape)} do not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, kv_heads, head_dim], [T] and "
            "[num_blocks, block_size, kv_heads, head_dim]"
        )
    same = key.dtype == value.dtype and key_cache.dtype == value_cache.dtype
    if not same or key_cache.dtype not in (key.dtype, FP8) or key.dtype == FP8:
        raise InvalidRequest(
            f"keys of {key.dtype} and values of {value.dtype} do not fit caches of "
            f"{key_cache.dtype} and {value_cache.dtype}"
        )
    check_scales(key_cache, key_scale, value_scale)
    if slot_mapping.dtype != torch.int64:
        raise InvalidRequest(f"slot_mapping is {slot_mapping.dtype}, not torch.int64")


def check_attention(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    window: int | None,
    *,
    sinks: Tensor | None = None,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
    lse: Tensor | None = None,
) -> None:
    """Refuse what `paged_attention` cannot compute.

    Raises:
        InvalidRequest: The shapes or types do not fit together.
    """
    if (
        query.dim() != 3
        or key_cache.dim() != 4
        or value_cache.dim() != 4
        or key_cache.shape[:3] != value_cache.shape[:3]
        or query.shape[2] != key_cache.shape[3]
        or query.shape[1] % key_cache.shape[2]
    ):
        raise InvalidRequest(
            f"query {list(query.shape)} does not fit caches {list(key_cache.shape)} and "
            f"{list(value_cache.shape)}: [T, heads, head_dim] and "
            "[num_blocks, block_size, kv_heads, head_dim], heads a multiple of kv_heads"
        )
    if key_cache.dtype != value_cache.dtype or key_cache.dtype not in (query.dtype, FP8):
        raise InvalidRequest(
            f"queries of {query.dtype} do not fit caches of {key_cache.dtype} and "
            f"{value_cache.dtype}"
        )
    if window is not None and window < 1:
        raise InvalidRequest(f"a window of {window} tokens attends nothing; at least 1")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise InvalidRequest(f"sinks {list(sinks.shape)} for {query.shape[1]} heads")
    check_scales(key_cache, key_scale, value_scale)
    if lse is not None and (
        lse.shape != query.shape[:2] or lse.dtype != torch.float32 or not lse.is_contiguous()
    ):
        raise InvalidRequest(
            f"lse {list(lse.shape)} of {lse.dtype}: not {list(query.shape[:2])} of torch.float32, "
            "contiguous"
        )


def check_scales(cache: Tensor, key_scale: Tensor | None, value_scale: Tensor | None) -> None:
    """Refuse scales for a cache that has none, and an eight-bit cache without them.

    Raises:
        InvalidRequest: As said, or scales that are not one float32 per head.
    """
    given = [scale for scale in (key_scale, value_scale) if scale is not None]
    if len(given) != (2 if cache.dtype == FP8 else 0):
        raise InvalidRequest(
            f"a cache of {cache.dtype} with {len(given)} scales: {FP8} caches take key_scale and "
            "value_scale, others none"
        )
    heads = cache.shape[2]
    for scale in given:
        if scale.shape != (heads,) or scale.dtype != torch.float32 or not scale.is_contiguous():
            raise InvalidRequest(
                f"a scale {list(scale.shape)} of {scale.dtype}: not [{heads}] of torch.float32, "
                "contiguous, one factor per key head"
            )


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
