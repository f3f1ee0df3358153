"""Triton: one tile of queries over a stretch of cached keys; what all attention kernels share.

```
query tile     rows: queries x heads of one group, so that a key is read once for the whole group
               row   0      1      2      3      4      5   ...      (GROUPS = 3)
               query 0      0      0      1      1      1
               head  0      1      2      0      1      2

key tile       TILE positions, wherever their blocks are; TILE and the block size are independent
               position  0 ......... 63 │ 64 ........ 127 │ ...
               block     table[0..3]    │ table[4..7]     │          (block_size = 16, TILE = 64)
```

The softmax is online (Milakov and Gimelshein 2018; Dao et al. 2022): a running maximum `peak` and a
running sum `total`, both in units of log2, and `sums`, the weighted sum of values so far.

An eight-bit cache (e4m3: sign, 4 bits of exponent, 3 of mantissa) is widened as it is read.  Newer
GPUs do it in one instruction.  For the others the bits are moved to where float16 has them; that
makes every number, the subnormal ones too, too small by 2**8, which one exact product mends:

```
e4m3      s eeee mmm
float16   s 0eeee mmm0000000        exponent bias 15 instead of 7
```
"""

# mypy: disable-error-code="no-untyped-def,untyped-decorator"
# mypy: check-untyped-defs=False
# (Triton's language is not Python's: the kernels have no types.  The wrappers have.)

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

WIDE: Final = 0
NATIVE_FP8: Final = 1
FP8_BITS: Final = 2
"""How a kernel reads its caches: as they are, by the GPU's own conversion, or bit by bit."""


@triton.jit
def widen(cells, TYPE: tl.constexpr, FP8: tl.constexpr):
    """Give cells of a cache in the type of the queries.  Exact."""
    if FP8 == 2:
        bits = cells.to(tl.uint16)
        half = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
        number = half.to(tl.float16, bitcast=True) * 256.0
        number = tl.where((bits & 0x7F) == 0x7F, float("nan"), number)
        return number.to(tl.float16).to(TYPE)
    return cells.to(TYPE)


@triton.jit
def capped(scores, softcap):
    """Give `softcap * tanh(scores / softcap)`, as exact near 0 as anywhere.

    Small quotients go through a polynomial (Cephes' tanhf), others through an exponential.
    """
    quotient = scores / softcap
    square = quotient * quotient
    y = -5.70498872745e-3 * square + 2.06390887954e-2
    y = y * square - 5.37397155531e-2
    y = y * square + 1.33314422036e-1
    y = y * square - 3.33332819422e-1
    power = tl.exp2(tl.minimum(quotient, 20.0) * 2.8853900817779268)  # 2 log2(e)
    large = softcap - 2 * softcap / (power + 1)
    return tl.where(square < 0.390625, scores + scores * (y * square), large)  # 0.625 squared


@triton.jit
def attend_keys(
    q,
    spot,
    peak,
    total,
    sums,
    key_ptr,
    value_ptr,
    blocks,
    left,
    right,
    bottom,
    window,
    scale,
    softcap,
    stride_key_block,
    stride_key_slot,
    stride_value_block,
    stride_value_slot,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    TILE: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    CAPPED: tl.constexpr,
    FP8: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attend the positions from `left` to `right` of one block table; give peak, total, sums.

    Reads `(right - max(left, bottom)) * (HEAD_DIM + VALUE_DIM)` elements, and 4 bytes of the table
    for each key.

    ```
    q                  [ROWS, DIMS]
    spot               [ROWS]               position of each row's query
    peak, total        [ROWS]               float32, so far
    sums               [ROWS, VALUE_DIMS]   float32, so far
    key_ptr, value_ptr the caches, at the head that is read
    blocks             the table's row
    left, right        a stretch of positions; left is a multiple of TILE
    bottom             positions before it are not attended by any row, and not read
    CAUSAL             rows do not attend positions after their own; if not, there are none
    ```
    """
    LOG2E: tl.constexpr = 1.4426950408889634
    dim, value_dim = tl.arange(0, DIMS), tl.arange(0, VALUE_DIMS)
    in_dim, in_value = dim < HEAD_DIM, value_dim < VALUE_DIM
    for at in range(left, right, TILE):
        position = at + tl.arange(0, TILE)
        # A slot that nobody attends may hold anything, NaN too: it is not even loaded.
        known = (position >= bottom) & (position < right)
        block = tl.load(blocks + position // BLOCK_SIZE, known, 0).to(tl.int64)
        offset = position % BLOCK_SIZE
        base = block * stride_key_block + offset * stride_key_slot
        k = tl.load(key_ptr + base[None, :] + dim[:, None], known[None, :] & in_dim[:, None], 0.0)
        base = block * stride_value_block + offset * stride_value_slot
        v = tl.load(
            value_ptr + base[:, None] + value_dim[None, :], known[:, None] & in_value[None, :], 0.0
        )
        k = widen(k, q.dtype, FP8)
        v = widen(v, q.dtype, FP8)
        scores = tl.dot(q, k, input_precision=PRECISION) * scale
        if CAPPED:
            scores = capped(scores, softcap)
        visible = known[None, :] & (spot[:, None] >= 0)
        if CAUSAL:
            visible &= position[None, :] <= spot[:, None]
        if WINDOWED:
            visible &= position[None, :] > spot[:, None] - window
        scores = tl.where(visible, scores * LOG2E, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, 1))
        # A row that has seen no key yet has no peak: any finite one gives it weights of 0.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp2(scores - level[:, None])
        fade = tl.exp2(peak - level)
        total = total * fade + tl.sum(weights, 1)
        sums = sums * fade[:, None]
        sums += tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        peak = higher
    return peak, total, sums
