"""What all Triton kernels share: how they are compiled, and what tensors they can reach."""

from __future__ import annotations

from typing import Any, Final

import torch
import triton
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache_kernels.checks import FP8
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


def check_tables(block_tables: Tensor, query_start: Tensor, context_lens: Tensor) -> None:
    """Refuse tables and lengths of other shapes or types than the kernels read.

    Raises:
        InvalidRequest: As said.
    """
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
