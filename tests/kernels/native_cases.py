"""What the tests of the C library share: types and their bounds, a batch that shares, comparing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from prefixcache_kernels import GroupPlan, paged_attention
from prefixcache_kernels.cpu import library

TYPES = [torch.float32, torch.bfloat16, torch.float16]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}
LSE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-4, torch.float16: 1e-5}
"""Of bfloat16 weights are rounded where a processor multiplies matrices, and so are their sums."""


needs_library = pytest.mark.skipif(library.library() is None, reason=library.describe())


def gap(got: torch.Tensor, want: torch.Tensor) -> float:
    """The norm of the difference, relative."""
    return float((got.double() - want).norm() / want.norm().clamp(min=1e-9))


def groups_of(b: Any) -> GroupPlan:
    """What the sequences of a batch share."""
    size = b.key_cache.shape[1]
    lens = b.query_start.diff()
    limits = ((b.context_lens - lens) // size).tolist()
    return GroupPlan.build(b.block_tables, limits)


SHARED = {"lens": [(1, 90), (1, 100), (5, 77), (1, 20)], "shared": ((1, 0, 4), (2, 0, 3))}


def check_halves(dtype: torch.dtype) -> None:
    """All 65,536 codes come through one key unchanged; two keys' mean is rounded to the nearest."""
    codes = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype).reshape(-1, 1, 1, 16)
    num = codes.shape[0]
    step = torch.arange(num, dtype=torch.int32)[:, None], torch.arange(num + 1), torch.ones(num)
    query = torch.zeros(num, 1, 16, dtype=dtype)
    got = paged_attention(
        query, torch.zeros_like(codes), codes, step[0], step[1], step[2].int(), scale=1.0
    )
    same = (got == codes.view(num, 1, 16)) | (got.isnan() & codes.view(num, 1, 16).isnan())
    assert same.all()
    pairs = torch.stack([codes, codes.roll(1, 0)], 1).view(num, 2, 1, 16)
    two = torch.full((num,), 2, dtype=torch.int32)
    got = paged_attention(query, torch.zeros_like(pairs), pairs, step[0], step[1], two, scale=1.0)
    want = ((pairs[:, 0].float() + pairs[:, 1].float()) / 2).to(dtype)
    finite = want.isfinite() & pairs.isfinite().all(1)
    assert torch.equal(got[finite], want[finite])
