"""Reading and writing the pool: the same operations on a CPU and on a GPU.

Each looks at where the tensors are: on a GPU it launches Triton kernels (`attention`, `shared`,
`transfer`, `rotate`), elsewhere attention is done in C (`cpu`), and all else, or without a compiler
everything, by plain PyTorch (`reference`, `grouped`, `rotary`).  Arguments and errors are the same,
and described there.  Triton is imported when a GPU asks for it.
"""

from __future__ import annotations

from typing import Any

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.extras import how_to_install

try:
    from torch import Tensor
except ModuleNotFoundError as error:
    if error.name != "torch":
        raise
    raise ModuleNotFoundError(
        f"prefixcache_kernels needs torch, which is not installed: {how_to_install('worker')}",
        name="torch",
    ) from None

from prefixcache_kernels import grouped, reference, rotary
from prefixcache_kernels.checks import (
    check_attention,
    check_scalars,
    check_tensors,
    is_plain,
)
from prefixcache_kernels.cpu import attend as native
from prefixcache_kernels.grouped import GroupedPlan
from prefixcache_kernels.groups import GroupPlan, SharingCost
from prefixcache_kernels.plan import Plan
from prefixcache_kernels.pool import TORCH_DTYPES, SharedPool, map_pages
from prefixcache_kernels.rotary import Rotary

__all__ = [
    "TORCH_DTYPES",
    "GroupPlan",
    "GroupedPlan",
    "Plan",
    "Rotary",
    "SharedPool",
    "SharingCost",
    "copy_blocks",
    "map_pages",
    "paged_attention",
    "rotate_keys",
    "shared_prefix_attention",
    "store_kv",
]


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into their slots; see `reference.store_kv`."""
    store = reference.store_kv
    if isinstance(key_cache, Tensor) and key_cache.is_cuda:
        from prefixcache_kernels.transfer import store_kv as store
    store(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)


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
    """Attend packed queries to paged keys and values; see `reference.paged_attention`.

    With `fixed`, or a plan that is so, a query's answer has the same bits whatever else is in the
    batch, and whether the tokens before it are computed with it or were cached: in Triton and in C.
    """
    if not (is_plain(query) and is_plain(key_cache) and is_plain(value_cache)):
        check_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    scale, window, softcap = check_scalars(scale, window, softcap)
    args = (query, key_cache, value_cache, block_tables, query_start, context_lens)
    options: dict[str, Any] = {
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "sinks": sinks,
        "key_scale": key_scale,
        "value_scale": value_scale,
        "lse": lse,
    }
    if key_cache.is_cuda:
        from prefixcache_kernels.attention import paged_attention as launch

        fixed = fixed or (isinstance(plan, Plan) and plan.fixed)
        return launch(*args, **options, plan=plan, fixed=fixed)
    if plan is None:
        check_attention(query, key_cache, value_cache, key_scale=key_scale, value_scale=value_scale)
        size = key_cache.shape[1]
        plan = Plan.build(block_tables, query_start, context_lens, size, fixed=fixed)
    elif not isinstance(plan, Plan):
        raise InvalidRequest(f"plan is a {type(plan).__name__}, not a Plan")
    elif fixed and not plan.fixed:
        raise InvalidRequest("bits are to be fixed, and the plan is of another kind: build it so")
    else:
        plan.verify(block_tables, query_start, context_lens)
    if native.takes(query, key_cache, value_cache, plan.num_seqs):
        return native.attend(plan, query, key_cache, value_cache, **options)
    if plan.fixed:
        raise Unsupported(
            "without the C library no bits of a CPU are fixed: they depend on the batch"
        )
    return reference.paged_attention(*args, **options, plan=plan)


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
    plan: GroupedPlan | None = None,
) -> Tensor:
    """Attend, reading what sequences share once; see `grouped.shared_prefix_attention`.

    On a GPU a batch of as many queries as sequences is taken to decode, one query each: where a
    sequence has another number of them the answers are NaN, for lengths are not looked at.  On a
    CPU without a C compiler eight-bit caches, values of another size than keys, and `lse` are
    attended without sharing.
    """
    if not (is_plain(query) and is_plain(key_cache) and is_plain(value_cache)):
        check_tensors(query=query, key_cache=key_cache, value_cache=value_cache)
    scale, window, softcap = check_scalars(scale, window, softcap)
    args = (query, key_cache, value_cache, block_tables, query_start, context_lens)
    options: dict[str, Any] = {"scale": scale, "window": window, "softcap": softcap, "sinks": sinks}
    rare: dict[str, Any] = {"key_scale": key_scale, "value_scale": value_scale, "lse": lse}
    if key_cache.is_cuda:
        from prefixcache_kernels.shared import shared_prefix_attention as launch

        return launch(*args, groups, **(options | rare))
    if plan is None:
        check_attention(query, key_cache, value_cache, key_scale=key_scale, value_scale=value_scale)
        size = key_cache.shape[1]
        plan = GroupedPlan.build(block_tables, query_start, context_lens, size, groups)
    elif not isinstance(plan, GroupedPlan):
        raise InvalidRequest(f"plan is a {type(plan).__name__}, not a GroupedPlan")
    else:
        plan.verify(block_tables, query_start, context_lens, groups)
    if native.takes(query, key_cache, value_cache, plan.groups.num_seqs):
        return native.attend(plan, query, key_cache, value_cache, **(options | rare))
    if any(option is not None for option in rare.values()) or key_cache.shape != value_cache.shape:
        return reference.paged_attention(*args, **(options | rare), plan=plan.whole)
    return grouped.shared_prefix_attention(*args, groups, **options, plan=plan)


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others; see `reference.copy_blocks`."""
    check_tensors(blocks=blocks)
    if blocks.is_cuda:
        from prefixcache_kernels.transfer import copy_blocks as launch

        launch(blocks, copies)
    else:
        reference.copy_blocks(blocks, copies)


def rotate_keys(blocks: Tensor, slots: Tensor, delta: int, angles: Rotary) -> None:
    """Move cached keys to positions `delta` later; see `rotary.rotate_keys`."""
    check_tensors(blocks=blocks)
    if blocks.is_cuda:
        from prefixcache_kernels.rotate import rotate_keys as launch

        launch(blocks, slots, delta, angles)
    else:
        rotary.rotate_keys(blocks, slots, delta, angles)
