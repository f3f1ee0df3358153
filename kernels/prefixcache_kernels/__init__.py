"""Reading and writing the pool: the same three operations on a CPU and on a GPU.

`store_kv`, `paged_attention` and `copy_blocks` look at where the tensors are: on a GPU they launch
the Triton kernels (`attention`, `transfer`), elsewhere they run plain PyTorch (`reference`).
Arguments and errors are the same, and described there.  Triton is imported when a GPU asks for it.
"""

from __future__ import annotations

from torch import Tensor

from prefixcache_kernels import grouped, reference
from prefixcache_kernels.grouped import GroupedPlan
from prefixcache_kernels.groups import GroupPlan, SharingCost
from prefixcache_kernels.plan import Plan
from prefixcache_kernels.pool import TORCH_DTYPES, SharedPool

__all__ = [
    "TORCH_DTYPES",
    "GroupPlan",
    "GroupedPlan",
    "Plan",
    "SharedPool",
    "SharingCost",
    "copy_blocks",
    "paged_attention",
    "shared_prefix_attention",
    "store_kv",
]


def store_kv(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys and values into their slots; see `reference.store_kv`."""
    if key_cache.is_cuda:
        from prefixcache_kernels.transfer import store_kv as launch

        launch(key, value, key_cache, value_cache, slot_mapping)
    else:
        reference.store_kv(key, value, key_cache, value_cache, slot_mapping)


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
    """Attend packed queries to paged keys and values; see `reference.paged_attention`."""
    if key_cache.is_cuda:
        from prefixcache_kernels.attention import paged_attention as attend
    else:
        attend = reference.paged_attention
    return attend(
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
        plan=plan,
    )


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
    plan: GroupedPlan | None = None,
) -> Tensor:
    """Attend, reading what sequences share once; see `grouped.shared_prefix_attention`."""
    return grouped.shared_prefix_attention(
        query,
        key_cache,
        value_cache,
        block_tables,
        query_start,
        context_lens,
        groups,
        scale=scale,
        window=window,
        softcap=softcap,
        sinks=sinks,
        plan=plan,
    )


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others; see `reference.copy_blocks`."""
    if blocks.is_cuda:
        from prefixcache_kernels.transfer import copy_blocks as launch

        launch(blocks, copies)
    else:
        reference.copy_blocks(blocks, copies)
