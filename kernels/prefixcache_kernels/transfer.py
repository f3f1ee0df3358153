"""Triton: move keys and values: new ones into their slots, and some blocks' tokens to other blocks.

Store.  Every layer of every step writes its new tokens wherever the tables say: `slot_mapping`
names a slot for each token, -1 for none.  A slot is `kv_heads * head_dim` elements, and one program
writes one chunk of it, keys and values.  Bytes moved: each new token is read once and written once.

An eight-bit cache halves what attention reads: `new / scale`, one scale per head, rounded to the
nearest e4m3 number, ties to even.  The rounding is done on the bits of a float32, so that it is the
same on every GPU, and in the interpreter; the caches' type has three ranges:

```
|x| >= 448          448, the largest: a number never becomes infinite or NaN
|x| >= 2**-6        keep 3 bits of the mantissa, carry into the exponent
|x| <  2**-6        multiples of 2**-9: adding 2**14 leaves exactly them in a float32's last bits
```

Copy.  A lease that reuses part of a block, or a fork that writes on, needs that block for itself
first.  Dozens of such copies may fall due in one step, in 2 x num_layers places each: one launch
for all of them costs microseconds, one per copy and place would cost a step.

`blocks [num_layers, 2, num_blocks, block_size, kv_heads, head_dim]` is, seen from one
copy, `2 * num_layers` planes; in each, a block's first tokens are one contiguous run:

```
plane p   │ block 0 ...... │ ... │ block src ====.... │ ... │ block dst ====.... │ ...
                                             num_tokens * kv_heads * head_dim elements
```

Bytes moved: each copied token is read once and written once, `2 * token_bytes`.  A copy of fewer
tokens than a block ends early: programs beyond its end do nothing.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.checks import FP8, VALUES_CHECKED, check_copies, check_slots, check_store
from prefixcache_kernels.launch import (
    OPTIONS,
    cache_arguments,
    carry,
    check_device,
    check_strides,
    looks,
    warps,
)

CHUNK: Final = 2048
"""Elements that one program moves at most: 16 bytes for each of 128 threads, twice at 16 bit."""


@triton.jit
def narrow(x):
    """Give float32 numbers as the bits of the nearest e4m3 numbers, in uint8."""
    size = tl.abs(x)
    size = tl.where(size > 448.0, 448.0, size)
    bits = size.to(tl.int32, bitcast=True)
    normal = (
        bits + 0x7FFFF + ((bits >> 20) & 1)
    ) >> 20  # round off 20 of the 23 bits, ties to even
    normal -= (127 - 7) << 3
    # 2**14 has the bits 0x46800000, and its last bit is worth 2**-9.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    code = tl.where(x == x, code, 0x7F)
    sign = (x.to(tl.int32, bitcast=True) >> 24) & 0x80
    return (code | sign).to(tl.uint8)


@triton.jit
def store_rows(
    new_ptr,
    cache_ptr,
    scale_ptr,
    token,
    slot,
    at,
    stride_token,
    stride_head,
    stride_block,
    stride_slot,
    stride_cache_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write the elements `at` of one token to its slot."""
    inside = at < HEADS * DIM
    head, dim = (at // DIM).to(tl.int64), at % DIM
    new = tl.load(new_ptr + token * stride_token + head * stride_head + dim, inside)
    if FP8:
        new = narrow(tl.div_rn(new.to(tl.float32), tl.load(scale_ptr + head, inside, 1.0)))
    target = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_slot
    tl.store(cache_ptr + target + head * stride_cache_head + dim, new, inside)


@triton.jit
def store_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    key_scale_ptr,
    value_scale_ptr,
    num_slots,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_key_block,
    stride_key_slot,
    stride_key_cache_head,
    stride_value_block,
    stride_value_slot,
    stride_value_cache_head,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    FP8: tl.constexpr,
):
    """Write one token's keys and values, CHUNK elements of each.  Grid: (tokens, chunks)."""
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if (slot >= 0) & (slot < num_slots):
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        store_rows(
            key_ptr,
            key_cache_ptr,
            key_scale_ptr,
            token,
            slot,
            at,
            stride_key_token,
            stride_key_head,
            stride_key_block,
            stride_key_slot,
            stride_key_cache_head,
            HEADS,
            HEAD_DIM,
            BLOCK_SIZE,
            FP8,
        )
        store_rows(
            value_ptr,
            value_cache_ptr,
            value_scale_ptr,
            token,
            slot,
            at,
            stride_value_token,
            stride_value_head,
            stride_value_block,
            stride_value_slot,
            stride_value_cache_head,
            HEADS,
            VALUE_DIM,
            BLOCK_SIZE,
            FP8,
        )


@triton.jit
def copy_kernel(
    blocks_ptr,
    copies_ptr,
    stride_plane,
    stride_block,
    SLOT: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Copy one chunk of one copy in one plane.  Grid: (copies, planes, chunks of a block)."""
    copy = tl.program_id(0)
    source = tl.load(copies_ptr + 3 * copy)
    target = tl.load(copies_ptr + 3 * copy + 1)
    end = tl.load(copies_ptr + 3 * copy + 2) * SLOT
    at = tl.program_id(2) * CHUNK + tl.arange(0, CHUNK)
    plane = blocks_ptr + tl.program_id(1).to(tl.int64) * stride_plane
    inside = at < end
    tl.store(
        plane + target * stride_block + at,
        tl.load(plane + source * stride_block + at, inside),
        inside,
    )


def store_kv(
    key: Tensor,
    value: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    slot_mapping: Tensor,
    key_scale: Tensor | None = None,
    value_scale: Tensor | None = None,
) -> None:
    """Write new keys and values into their slots; arguments as `reference.store_kv`.

    Strides: any, but a head's elements lie side by side (new ones are copied otherwise).  One
    launch, no synchronisation: slots outside the pool are skipped, not reported.

    Raises:
        InvalidRequest: The shapes do not fit together.
        Unsupported: The tensors are not on a GPU.
    """
    check_store(key, value, key_cache, value_cache, slot_mapping, key_scale, value_scale)
    check_strides(key_cache, value_cache)
    scales = [scale for scale in (key_scale, value_scale) if scale is not None]
    check_device(key_cache, key, value, value_cache, slot_mapping, *scales)
    slot_mapping = slot_mapping.contiguous()
    if VALUES_CHECKED and looks(key_cache):
        check_slots(slot_mapping, key_cache.shape[0] * key_cache.shape[1])
    if key.stride(2) != 1 or value.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    fp8 = key_cache.dtype == FP8
    strides = cache_arguments(key_cache, value_cache)
    if fp8:
        key_cache, value_cache = key_cache.view(torch.uint8), value_cache.view(torch.uint8)
    tokens, heads, head_dim = key.shape
    width = heads * max(head_dim, value.shape[2])
    chunk = min(CHUNK, triton.next_power_of_2(width))
    num_blocks, block_size = key_cache.shape[:2]
    if tokens:
        store_kernel[tokens, triton.cdiv(width, chunk)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            key if key_scale is None else key_scale,
            key if value_scale is None else value_scale,
            num_blocks * block_size,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            *strides,
            HEADS=heads,
            HEAD_DIM=head_dim,
            VALUE_DIM=value.shape[2],
            BLOCK_SIZE=block_size,
            CHUNK=chunk,
            FP8=fp8,
            num_warps=warps(chunk * key.element_size()),
            **OPTIONS,
        )


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others; arguments as `reference.copy_blocks`.

    One launch.  `copies` is best on the CPU: it is checked there, and a few words travel.

    Raises:
        InvalidRequest: As `reference.copy_blocks`, or blocks that are not contiguous.
        Unsupported: The blocks are not on a GPU.
    """
    check_copies(blocks, copies)
    copies = copies.cpu()
    check_device(blocks)
    if not blocks.is_contiguous():
        raise InvalidRequest(f"blocks with strides {blocks.stride()} are not contiguous")
    if not copies.shape[0]:
        return
    if blocks.dtype == FP8:
        blocks = blocks.view(torch.uint8)
    slot = blocks.shape[4] * blocks.shape[5]
    planes = blocks.shape[0] * 2
    chunks = triton.cdiv(int(copies[:, 2].max()) * slot, CHUNK)
    if chunks:
        copy_kernel[copies.shape[0], planes, chunks](
            blocks,
            carry(copies.contiguous(), blocks.device),
            blocks.stride(1),
            blocks.stride(2),
            SLOT=slot,
            CHUNK=CHUNK,
            num_warps=warps(CHUNK * blocks.element_size()),
            **OPTIONS,
        )
