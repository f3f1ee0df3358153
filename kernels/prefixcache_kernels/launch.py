"""What all Triton kernels share: how they are compiled, and what tensors they can reach."""

from __future__ import annotations

from typing import Any, Final

import triton
from torch import Tensor

from prefixcache.errors import InvalidRequest, Unsupported

INTERPRETED: Final = bool(triton.knobs.runtime.interpret)
"""The kernels run in Triton's interpreter: on CPU tensors, for tests."""

OPTIONS: Final[dict[str, Any]] = {"enable_fp_fusion": True}
"""How every kernel is compiled: a multiplication and an addition may round once."""


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
    """Refuse caches whose slots are not one contiguous run of heads.

    Raises:
        InvalidRequest: As said.
    """
    dim = key_cache.shape[3]
    if key_cache.stride() != value_cache.stride() or key_cache.stride()[2:] != (dim, 1):
        raise InvalidRequest(
            f"caches with strides {key_cache.stride()} and {value_cache.stride()}: both alike, "
            "and a slot's heads contiguous"
        )
