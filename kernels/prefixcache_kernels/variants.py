"""Every kernel as the wrappers launch it, for the heads of common models: what `ahead` compiles.

A variant is cut by the same `Shape` as a launch, so that what is compiled is what runs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from triton.backends.compiler import GPUTarget

from prefixcache_kernels import attention, keys, launch, rotate, shared, transfer
from prefixcache_kernels.checks import FP8
from prefixcache_kernels.groups import MAX_LEVELS
from prefixcache_kernels.shape import MAX_SPLITS, Shape, next_power_of_2

MOST_SLOTS: Final = (MAX_LEVELS + 1) * MAX_SPLITS
"""Partial answers of a query and a head, at most."""

TARGETS: Final = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90a": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
"""A100, H100/H200 and MI300."""

UNALIGNED: Final = {*shared.PLAN, "own_ptr"}
"""Pointers that may begin anywhere."""


_NAMES: Final = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


@dataclass(frozen=True, slots=True)
class Variant:
    """One kernel with everything it is compiled for."""

    name: str
    kernel: Any
    signature: dict[str, str]
    """Argument to type, for what is not a constant."""
    constants: dict[str, Any]
    num_warps: int = 4
    num_stages: int = 2
    fused: bool = True
    """Whether a multiplication and an addition may round once."""


def variants(target: str) -> Iterator[Variant]:
    """Every kernel as the wrappers launch it on a target, for the head shapes of common models."""
    gpu = TARGETS[target]
    cut = _Cut(gpu.backend == "hip", _fp8(gpu))
    for dtype in (torch.bfloat16, torch.float16, torch.float32, FP8):
        yield _store(dtype, cut.amd)
        yield _copy(dtype, cut.amd)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128), (16, 16, 80), (8, 1, 256)):
        for decode in (True, False):
            yield cut.attend(heads, kv_heads, dim, torch.bfloat16, decode)
    for decode in (True, False):
        yield cut.attend(32, 8, 128, torch.float16, decode)
        yield cut.attend(9, 3, 64, torch.float32, decode)
        yield cut.attend(32, 8, 128, torch.float32, decode)
        yield cut.attend(32, 8, 128, torch.bfloat16, decode, block_size=128)
        yield cut.attend(64, 8, 128, torch.bfloat16, decode, eight_bit=True)
        yield cut.attend(16, 16, 192, torch.bfloat16, decode, value_dim=128)
        yield cut.attend(64, 8, 64, torch.bfloat16, decode, windowed=True, sinks=True)
        yield cut.attend(8, 4, 256, torch.bfloat16, decode, windowed=True, capped=True)
    for decode in (True, False):
        yield cut.attend(32, 8, 128, torch.bfloat16, decode, own=True)
    for heads, kv_heads, dim in ((9, 3, 64), (32, 8, 128), (8, 1, 256)):
        yield cut.attend(heads, kv_heads, dim, torch.bfloat16, False, fixed=True)
    yield cut.attend(9, 3, 64, torch.float32, False, fixed=True)
    yield cut.attend(64, 8, 64, torch.bfloat16, False, windowed=True, sinks=True, fixed=True)
    for heads, kv_heads, dim, num_queries in ((9, 3, 64, 8), (32, 8, 128, 4), (32, 8, 128, 256)):
        yield cut.shared(heads, kv_heads, dim, torch.bfloat16, num_queries)
    yield cut.shared(32, 8, 128, torch.bfloat16, 256, prefill=True)
    yield cut.shared(64, 8, 128, torch.bfloat16, 64, eight_bit=True)
    yield cut.shared(8, 1, 256, torch.bfloat16, 64)
    yield cut.shared(9, 3, 64, torch.float32, 8)
    yield _merge(64, torch.bfloat16, cut.amd)
    yield _merge(128, torch.bfloat16, cut.amd, slots=12)
    yield _merge(256, torch.float32, cut.amd)
    for slots in (2, 128):
        yield _merge(128, torch.bfloat16, cut.amd, slots=slots, fixed=True)
    for slots in (MAX_SPLITS, MOST_SLOTS):  # few queries and long tables: all levels, all splits
        for dim in (64, 128, 256, 512):
            yield _merge(dim, torch.bfloat16, cut.amd, slots=slots)
    yield _rotate(8, 128, torch.bfloat16, cut.amd)
    yield _rotate(8, 64, torch.float32, cut.amd)


def _fp8(gpu: GPUTarget) -> int:
    if gpu.backend == "hip":
        return keys.FP8_BITS  # gfx942 knows another eight-bit type
    return keys.NATIVE_FP8 if gpu.arch >= 89 else keys.FP8_BITS


def _pointers(dtype: torch.dtype, *names: str) -> dict[str, str]:
    return dict.fromkeys(names, f"*{_NAMES[dtype]}")


def _words(kernel: Any, given: dict[str, str], constants: dict[str, Any]) -> dict[str, str]:
    """The given types, and 32-bit integers for all other arguments that are no constants."""
    rest = (name for name in kernel.arg_names if name not in constants)
    tables = ("table_ptr", "start_ptr", "context_ptr", "own_ptr", "order_ptr", "first_ptr")
    types = {"scale": "fp32", "softcap": "fp32", "lse_ptr": "*fp32"}
    types |= dict.fromkeys(("key_scale_ptr", "value_scale_ptr"), "*fp32")
    types |= dict.fromkeys((*tables, *shared.PLAN), "*i32")
    types |= given
    return {name: types.get(name, "i32") for name in rest}


def _store(dtype: torch.dtype, amd: bool) -> Variant:
    eight_bit = dtype == FP8
    constants = {"HEADS": 8, "HEAD_DIM": 128, "VALUE_DIM": 128, "BLOCK_SIZE": 16, "CHUNK": 1024}
    constants["FP8"] = eight_bit
    kernel = transfer.store_kernel
    new = torch.bfloat16 if eight_bit else dtype
    types = _pointers(new, "key_ptr", "value_ptr", "key_cache_ptr", "value_cache_ptr")
    if eight_bit:
        types |= {"key_cache_ptr": "*u8", "value_cache_ptr": "*u8"}
    types["slot_ptr"] = "*i64"
    name = f"store {'bf16 as fp8' if eight_bit else _NAMES[dtype]} 8x128"
    signature = _words(kernel, types, constants)
    moved = constants["CHUNK"] * new.itemsize
    return Variant(name, kernel, signature, constants, launch.warps(moved, amd=amd))


def _copy(dtype: torch.dtype, amd: bool) -> Variant:
    constants = {"SLOT": 1024, "CHUNK": transfer.CHUNK}
    kernel = transfer.copy_kernel
    element = "u8" if dtype == FP8 else _NAMES[dtype]
    types = {"blocks_ptr": f"*{element}", "copies_ptr": "*i64"}
    name = f"copy {'fp8' if dtype == FP8 else element} 8x128"
    signature = _words(kernel, types, constants)
    moved = constants["CHUNK"] * dtype.itemsize
    return Variant(name, kernel, signature, constants, launch.warps(moved, amd=amd))


def _rotate(heads: int, dim: int, dtype: torch.dtype, amd: bool) -> Variant:
    width, pairs = next_power_of_2(heads), next_power_of_2(dim // 2)
    constants = {"HEADS": heads, "WIDTH": width, "HEAD_DIM": dim, "HALF": dim // 2, "PAIRS": pairs}
    kernel = rotate.rotate_kernel
    types = _pointers(dtype, "blocks_ptr") | {"slot_ptr": "*i64", "turn_ptr": "*fp32"}
    signature = _words(kernel, types, constants)
    warps = launch.warps(width * pairs * dtype.itemsize, amd=amd)
    return Variant(f"rotate {_NAMES[dtype]} {heads}x{dim}", kernel, signature, constants, warps)


def _merge(
    dim: int, dtype: torch.dtype, amd: bool, slots: int = 8, *, fixed: bool = False
) -> Variant:
    width = next_power_of_2(slots)
    constants = {
        "VALUE_DIM": dim,
        "VALUE_DIMS": dim,
        "SLOTS": slots,
        "WIDTH": width,
        "PARTS": attention.parts_at_once(dim, attention.FIXED_PARTS if fixed else width),
        "FIXED": fixed,
        "LSE": False,
    }
    kernel = attention.merge_kernel
    types = {"part_ptr": "*fp32", "whole_ptr": "*fp32", "out_ptr": f"*{_NAMES[dtype]}"}
    name = f"merge {_NAMES[dtype]} {dim} of {slots}" + " fixed" * fixed
    warps = launch.warps(4 * dim * constants["PARTS"], amd=amd)
    signature = _words(kernel, types, constants)
    return Variant(name, kernel, signature, constants, warps, fused=not fixed)


@dataclass(frozen=True, slots=True)
class _Cut:
    """Attention as it is launched on one target."""

    amd: bool
    fp8: int

    def attend(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        decode: bool,
        *,
        value_dim: int | None = None,
        block_size: int = 16,
        own: bool = False,
        eight_bit: bool = False,
        windowed: bool = False,
        capped: bool = False,
        sinks: bool = False,
        fixed: bool = False,
    ) -> Variant:
        values = value_dim or dim
        shape = Shape.choose(
            heads,
            kv_heads,
            dim,
            values,
            dtype.itemsize,
            num_queries=4 if decode else 8192,
            num_seqs=4,
            max_context=8192,
            fixed=fixed,
            amd=self.amd,
        )
        slots = 2 * shape.splits if own else shape.splits
        constants = shape.constants(heads, dim, values, block_size, dtype)
        constants |= {"BLOCK_Q": shape.block_q, "SPLITS": shape.splits, "SLOTS": slots}
        constants["SPLIT_KEYS"] = shape.split_keys
        constants["OWN"] = 0 if not own else 1 if decode else 2
        constants |= {"WINDOWED": windowed, "CAPPED": capped, "SINKS": sinks, "LSE": slots > 1}
        constants["FP8"] = self.fp8 if eight_bit else keys.WIDE
        kernel = attention.attend_kernel
        types = self._types(dtype, eight_bit) | _pointers(dtype, "sink_ptr", "out_ptr")
        if slots > 1:
            types["out_ptr"] = "*fp32"
        options = [("window", windowed), ("softcap", capped), ("sinks", sinks), ("own", own)]
        name = " ".join(
            [
                "fixed" if fixed else "decode" if decode else "prefill",
                f"{_NAMES[dtype]} on fp8" if eight_bit else _NAMES[dtype],
                f"{heads}/{kv_heads}x{dim}" + ("" if values == dim else f"/{values}"),
                f"block {block_size}",
                *(option for option, chosen in options if chosen),
            ]
        )
        signature = _words(kernel, types, constants)
        return Variant(name, kernel, signature, constants, shape.num_warps, shape.num_stages)

    def shared(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        dtype: torch.dtype,
        num_queries: int,
        *,
        eight_bit: bool = False,
        prefill: bool = False,
    ) -> Variant:
        shape = Shape.choose_shared(
            heads,
            kv_heads,
            dim,
            dim,
            dtype.itemsize,
            num_queries=num_queries,
            num_runs=8,
            max_context=8192,
            bits=eight_bit and self.fp8 == keys.FP8_BITS,
            amd=self.amd,
        )
        constants = shape.constants(heads, dim, dim, 16, dtype)
        constants |= {"BLOCK_Q": shape.block_q, "SPLITS": shape.splits, "SLOTS": 2 * shape.splits}
        constants |= {"RUNS": 8, "DECODE": not prefill, "WINDOWED": False, "CAPPED": False}
        constants["FP8"] = self.fp8 if eight_bit else keys.WIDE
        kernel = shared.shared_kernel
        types = self._types(dtype, eight_bit) | {"out_ptr": "*fp32"}
        element = f"{_NAMES[dtype]} on fp8" if eight_bit else _NAMES[dtype]
        name = f"shared {element} {heads}/{kv_heads}x{dim} for {num_queries}"
        name += " prefilling" if prefill else ""
        signature = _words(kernel, types, constants)
        return Variant(name, kernel, signature, constants, shape.num_warps, shape.num_stages)

    def _types(self, dtype: torch.dtype, eight_bit: bool) -> dict[str, str]:
        types = _pointers(dtype, "query_ptr", "key_ptr", "value_ptr")
        if eight_bit:
            held = "*fp8e4nv" if self.fp8 == keys.NATIVE_FP8 else "*u8"
            types |= {"key_ptr": held, "value_ptr": held}
        return types
