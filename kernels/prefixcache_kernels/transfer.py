"""Triton: move keys and values: new ones into their slots, and some blocks' tokens to other blocks.

Store.  Every layer of every step writes its new tokens wherever the tables say: `slot_mapping`
names a slot for each token, -1 for none.  A slot is `kv_heads * head_dim` contiguous elements, and
one program writes one chunk of it, keys and values.  Bytes moved: each new token is read once and
written once.

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

import triton
import triton.language as tl
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.launch import OPTIONS, check_device, check_strides
from prefixcache_kernels.reference import check_copies, check_store

CHUNK: Final = 2048
"""Elements that one program moves at most: 16 bytes for each of 128 threads, twice at 16 bit."""


@triton.jit
def store_kernel(
    key_ptr,
    value_ptr,
    key_cache_ptr,
    value_cache_ptr,
    slot_ptr,
    num_slots,
    stride_key_token,
    stride_key_head,
    stride_value_token,
    stride_value_head,
    stride_block,
    stride_slot,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Write one token's keys and values, CHUNK elements of the WIDTH that a slot has.

    Grid: (tokens, chunks of a slot).
    """
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_ptr + token)
    if (slot >= 0) & (slot < num_slots):
        at = tl.program_id(1) * CHUNK + tl.arange(0, CHUNK)
        inside = at < WIDTH
        head, dim = at // HEAD_DIM, at % HEAD_DIM
        target = (slot // BLOCK_SIZE) * stride_block + (slot % BLOCK_SIZE) * stride_slot + at
        source = token * stride_key_token + head * stride_key_head + dim
        tl.store(key_cache_ptr + target, tl.load(key_ptr + source, inside), inside)
        source = token * stride_value_token + head * stride_value_head + dim
        tl.store(value_cache_ptr + target, tl.load(value_ptr + source, inside), inside)


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
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Write new keys and values into their slots; arguments as `reference.store_kv`.

    One launch, no synchronisation: slots outside the pool are skipped, not reported.

    Raises:
        InvalidRequest: The shapes do not fit together.
        Unsupported: The tensors are not on a GPU.
    """
    check_store(key, value, key_cache, value_cache, slot_mapping)
    check_strides(key_cache, value_cache)
    check_device(key_cache, key, value, slot_mapping)
    if key.stride(2) != 1 or value.stride(2) != 1:
        key, value = key.contiguous(), value.contiguous()
    width = key.shape[1] * key.shape[2]
    chunk = min(CHUNK, triton.next_power_of_2(width))
    num_blocks, block_size = key_cache.shape[:2]
    if key.shape[0]:
        store_kernel[key.shape[0], triton.cdiv(width, chunk)](
            key,
            value,
            key_cache,
            value_cache,
            slot_mapping,
            num_blocks * block_size,
            key.stride(0),
            key.stride(1),
            value.stride(0),
            value.stride(1),
            key_cache.stride(0),
            key_cache.stride(1),
            BLOCK_SIZE=block_size,
            HEAD_DIM=key.shape[2],
            WIDTH=width,
            CHUNK=chunk,
            num_warps=4,
            **OPTIONS,
        )


def copy_blocks(blocks: Tensor, copies: Tensor) -> None:
    """Copy the first tokens of some blocks to others; arguments as `reference.copy_blocks`.

    One launch.  `copies` is best on the CPU: it is checked there, and a few words travel.

    Raises:
        InvalidRequest: As `reference.copy_blocks`, or blocks that are not contiguous.
        Unsupported: The blocks are not on a GPU.
    """
    copies = copies.cpu()
    check_copies(blocks, copies)
    check_device(blocks)
    if not blocks.is_contiguous():
        raise InvalidRequest(f"blocks with strides {blocks.stride()} are not contiguous")
    if not copies.shape[0]:
        return
    slot = blocks.shape[4] * blocks.shape[5]
    planes = blocks.shape[0] * 2
    chunks = triton.cdiv(int(copies[:, 2].max()) * slot, CHUNK)
    if chunks:
        copy_kernel[copies.shape[0], planes, chunks](
            blocks,
            copies.contiguous().to(blocks.device),
            blocks.stride(1),
            blocks.stride(2),
            SLOT=slot,
            CHUNK=CHUNK,
            num_warps=4,
            **OPTIONS,
        )
