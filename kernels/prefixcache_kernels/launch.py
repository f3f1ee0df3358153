"""What all Triton kernels share: how they are compiled, and what tensors they can reach."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.checks import (
    FP8,
    LONGEST,
    VALUES_CHECKED,
    check_step,
    check_tensors,
    check_values,
)
from prefixcache_kernels.keys import FP8_BITS, NATIVE_FP8, WIDE

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""The kernels run in Triton's interpreter: on CPU tensors, for tests."""

OPTIONS: Final[dict[str, Any]] = {"enable_fp_fusion": True}
"""How every kernel is compiled: a multiplication and an addition may round once."""


def warps(num_bytes: int, *, amd: bool = torch.version.hip is not None) -> int:
    """Give as many warps as have 16 bytes for each thread, at most 128 threads.

    A warp has 32 threads, AMD's have 64.

    >>> [warps(n, amd=False) for n in (16, 1024, 1 << 20)], warps(2048, amd=True)
    ([1, 2, 4], 2)
    """
    lanes = 64 if amd else 32
    return max(1, min(128, num_bytes // 16) // lanes)


def check_device(where: Tensor, *others: Tensor) -> None:
    """Refuse tensors that the kernels cannot reach.

    Raises:
        Unsupported: They are not on a GPU (and this is not the interpreter).
        InvalidRequest: They are on several devices.
    """
    if not where.is_cuda and not INTERPRETED:
        raise Unsupported(
            f"Triton kernels need tensors on a GPU, these are on {where.device}; "
            "prefixcache_kernels.reference runs there"
        )
    for other in others:
        if other.device != where.device:
            raise InvalidRequest(f"tensors on {where.device} and {other.device} in one call")


def check_strides(key_cache: Tensor, value_cache: Tensor) -> None:
    """Refuse caches whose elements of one head are not side by side.

    Raises:
        InvalidRequest: As said.
    """
    if key_cache.stride(3) != 1 or value_cache.stride(3) != 1:
        raise InvalidRequest(
            f"caches with strides {key_cache.stride()} and {value_cache.stride()}: the elements of "
            "a slot's head lie side by side"
        )
    for cache in (key_cache, value_cache):
        if cache.shape[1] * cache.stride(1) > LONGEST:  # one register less per key than 64 bits
            raise InvalidRequest(
                f"caches with strides {cache.stride()}: the {cache.shape[1]} slots of a block lie "
                f"more than {LONGEST} elements apart"
            )


def in_reach(query: Tensor) -> Tensor:
    """Give queries whose heads have their elements side by side, and a token's lie near each other.

    Copied if they do not: a kernel counts the elements of one token in 32 bits.
    """
    if query.stride(2) != 1 or query.shape[1] * query.stride(1) > LONGEST:
        return query.contiguous()
    return query


def check_tables(
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    num_queries: int,
    key_cache: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Refuse tables and lengths of other shapes or types than the kernels read; give them in rows.

    Values are looked at in the interpreter, and on a GPU if `PREFIXCACHE_CHECK` says so (but not
    while a graph is captured).

    Raises:
        InvalidRequest: As said.
    """
    check_tensors(block_tables=block_tables, query_start=query_start, context_lens=context_lens)
    check_step(block_tables, query_start, context_lens)
    for tensor in (block_tables, query_start, context_lens):
        if tensor.dtype != torch.int32:
            raise InvalidRequest(f"tables and lengths are int32 on a GPU, not {tensor.dtype}")
    check_device(key_cache, block_tables, query_start, context_lens)
    if looks(key_cache):
        check_values(
            block_tables,
            query_start,
            context_lens,
            num_queries=num_queries,
            num_blocks=key_cache.shape[0],
            block_size=key_cache.shape[1],
        )
    if block_tables.stride(1) != 1:
        block_tables = block_tables.contiguous()
    return block_tables, query_start.contiguous(), context_lens.contiguous()


def looks(tensor: Tensor) -> bool:
    """Tell whether values are looked at before a launch, which waits for the device."""
    if not tensor.is_cuda:
        return True
    return VALUES_CHECKED and not torch.cuda.is_current_stream_capturing()


def carry(tensor: Tensor, device: torch.device) -> Tensor:
    """Bring a few numbers of the host to a device, without waiting for it."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def cache_arguments(key_cache: Tensor, value_cache: Tensor) -> tuple[int, ...]:
    """Give the six strides of a pair of caches, in the order in which the kernels take them."""
    return (*key_cache.stride()[:3], *value_cache.stride()[:3])


def readable(key_cache: Tensor, value_cache: Tensor) -> tuple[Tensor, Tensor, int]:
    """Give caches as the kernels of this GPU read them, and how (`keys.WIDE` and its like)."""
    if key_cache.dtype != FP8:
        return key_cache, value_cache, WIDE
    if not INTERPRETED and converts_fp8(torch.cuda.get_device_capability(key_cache.device)):
        return key_cache, value_cache, NATIVE_FP8
    return key_cache.view(torch.uint8), value_cache.view(torch.uint8), FP8_BITS


def converts_fp8(capability: tuple[int, int], *, amd: bool = torch.version.hip is not None) -> bool:
    """Tell whether a GPU has an instruction that widens e4m3: NVIDIA from 8.9, AMD from 9.5 on."""
    return capability >= ((9, 5) if amd else (8, 9))
