"""Triton: move cached keys to other positions, in all layers, in one launch.

`rotary` says why, and draws a head.  One program turns one slot of one layer: all heads, both
halves of each pair, `kv_heads * 2 * half` elements, read once and written once in place.
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from prefixcache_kernels.checks import VALUES_CHECKED, check_slots
from prefixcache_kernels.launch import OPTIONS, carry, check_device, looks, warps
from prefixcache_kernels.rotary import Rotary, check_rotation


@triton.jit
def rotate_kernel(
    blocks_ptr,
    slot_ptr,
    turn_ptr,
    num_slots,
    stride_layer,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    PAIRS: tl.constexpr,
):
    """Turn the keys of one slot of one layer.  Grid: (slots, layers).

    WIDTH and PAIRS are the powers of two from HEADS and HALF on.
    """
    slot = tl.load(slot_ptr + tl.program_id(0))
    if (slot >= 0) & (slot < num_slots):
        head, pair = tl.arange(0, WIDTH), tl.arange(0, PAIRS)
        in_pair = pair < HALF
        inside = (head < HEADS)[:, None] & in_pair[None, :]
        base = blocks_ptr + tl.program_id(1).to(tl.int64) * stride_layer + slot * HEADS * HEAD_DIM
        first = base + head[:, None] * HEAD_DIM + pair[None, :]
        cosine = tl.load(turn_ptr + pair, in_pair, 0.0)[None, :]
        sine = tl.load(turn_ptr + HALF + pair, in_pair, 0.0)[None, :]
        x = tl.load(first, inside, 0.0).to(tl.float32)
        y = tl.load(first + HALF, inside, 0.0).to(tl.float32)
        element = blocks_ptr.dtype.element_ty
        tl.store(first, (x * cosine - y * sine).to(element), inside)
        tl.store(first + HALF, (y * cosine + x * sine).to(element), inside)


def rotate_keys(blocks: Tensor, slots: Tensor, delta: int, angles: Rotary) -> None:
    """Turn the keys of some slots to positions `delta` later; arguments as `rotary.rotate_keys`.

    One launch for all layers, no synchronisation: slots outside the pool are skipped, not reported.

    Raises:
        InvalidRequest: The shapes do not fit together.
        Unsupported: The tensors are not on a GPU.
    """
    check_rotation(blocks, slots, delta, angles)
    check_device(blocks, slots)
    slots = slots.contiguous()
    if VALUES_CHECKED and looks(blocks):
        check_slots(slots, blocks.shape[2] * blocks.shape[3])
    if not slots.numel():
        return
    layers, _, num_blocks, block_size, heads, head_dim = blocks.shape
    half = len(angles.frequencies)
    width, pairs = triton.next_power_of_2(heads), triton.next_power_of_2(half)
    rotate_kernel[slots.numel(), layers](
        blocks,
        slots,
        carry(angles.turn(delta), blocks.device),
        num_blocks * block_size,
        blocks.stride(0),
        HEADS=heads,
        WIDTH=width,
        HEAD_DIM=head_dim,
        HALF=half,
        PAIRS=pairs,
        num_warps=warps(width * pairs * blocks.element_size()),
        **OPTIONS,
    )
