"""The Triton kernels against the oracle.  `test_triton.py` runs this file, in a process of its own:

in the interpreter on CPU tensors (shapes are tiny), and as it is on a GPU where there is one.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from prefixcache.errors import InvalidRequest
from prefixcache_kernels import attention, reference, transfer
from prefixcache_kernels.attention import Shape
from prefixcache_kernels.launch import INTERPRETED
from prefixcache_kernels.reference import oracle_attention

DEVICE = "cpu" if INTERPRETED else "cuda"

Make = Callable[..., Any]

MIXED = [(1, 1), (1, 17), (5, 5), (1, 33), (3, 40), (1, 16), (20, 37), (1, 32)]


def attend(b: Any, check: float = 3e-5, **options: Any) -> torch.Tensor:
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, b.query.shape[1])
    scale = b.query.shape[2] ** -0.5
    want = oracle_attention(*b.args, scale=scale, **options)
    if "sinks" in options:
        options["sinks"] = options["sinks"].to(DEVICE)
    moved = [tensor.to(DEVICE) for tensor in b.args]
    got = attention.paged_attention(*moved, scale=scale, **options).cpu()
    assert got.dtype == b.query.dtype
    torch.testing.assert_close(got.double(), want, atol=check, rtol=check)
    return got


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 1},
        {"window": 9},
        {"softcap": 3.0},
        {"sinks": True},
        {"window": 20, "softcap": 3.0, "sinks": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("size", [1, 3, 16, 128])
def test_mixed_batches_of_any_block_size_with_garbage_everywhere_else(
    batch: Make, size: int, options: dict[str, Any]
) -> None:
    attend(batch(MIXED, size=size), **options)


@pytest.mark.parametrize("options", [{}, {"window": 30}, {"sinks": True}], ids=str)
def test_decode_alone_splits_its_keys(batch: Make, options: dict[str, Any]) -> None:
    b = batch([(1, 300), (1, 5), (1, 64)], kv_heads=1)
    shape = Shape.choose(4, 1, 16, 4, num_queries=3, num_seqs=3, max_context=320, amd=False)
    assert shape.splits > 1
    attend(b, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(2, 2), (9, 3), (8, 2), (8, 1), (20, 1)])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_every_grouping_of_heads(batch: Make, heads: int, kv_heads: int, dim: int) -> None:
    lens = [(1, 18), (7, 20), (1, 1)]
    attend(batch(lens, heads=heads, kv_heads=kv_heads, dim=dim))
    attend(batch(lens[:1], heads=heads, kv_heads=kv_heads, dim=dim), sinks=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 9, "sinks": True}], ids=str)
def test_half_precision(batch: Make, dtype: torch.dtype, options: dict[str, Any]) -> None:
    attend(batch(MIXED, dtype=dtype), check=2e-2, **options)
    attend(batch([(1, 150), (1, 3)], dtype=dtype), check=2e-2, **options)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_no_kind_of_garbage_leaks(batch: Make, poison: float) -> None:
    clean = attend(batch(MIXED, poison=0.0), window=20)
    assert torch.equal(attend(batch(MIXED, poison=poison), window=20), clean)


def test_one_token_prompts_and_last_blocks_of_one_token(batch: Make) -> None:
    attend(batch([(1, 1)]))
    attend(batch([(1, 1)] * 5))
    attend(batch([(17, 17), (1, 17), (1, 33), (2, 33)]))


def test_empty_batches_and_sequences_without_queries(batch: Make) -> None:
    assert attend(batch([])).shape == (0, 4, 16)
    attend(batch([(0, 5), (1, 9), (0, 3), (4, 4)]))


def test_random_batches(batch: Make) -> None:
    rng = random.Random(3)
    for seed in range(10 if INTERPRETED else 200):
        lens = []
        for _ in range(rng.randint(1, 6)):
            keys = rng.choice([1, 2, 15, 16, 17, 40])
            lens.append((rng.choice([1, 1, keys, rng.randint(1, keys)]), keys))
        attend(
            batch(lens, size=rng.choice([1, 4, 16, 64]), seed=seed),
            window=rng.choice([None, None, 1, 6, 100]),
        )


def test_queries_may_be_a_view_of_a_fused_projection(batch: Make) -> None:
    b = batch(MIXED)
    want = attend(b)
    fused = torch.zeros(b.query.shape[0], 8, 16)
    fused[:, 2:6] = b.query
    b.query = fused[:, 2:6]
    assert torch.equal(attend(b), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "heads", "dim"), [(1, 2, 8), (3, 3, 80), (16, 5, 16)])
def test_store_equals_the_reference(dtype: torch.dtype, size: int, heads: int, dim: int) -> None:
    torch.manual_seed(0)
    caches = torch.randn(2, 40, size, heads, dim).to(dtype)
    fused = torch.randn(11, 3 * heads, dim).to(dtype)
    key, value = fused[:, heads : 2 * heads], fused[:, 2 * heads :]
    slots = torch.randperm(40 * size)[:11]
    slots[4] = -1
    want = caches.clone()
    reference.store_kv(key, value, want[0], want[1], slots)
    got = caches.to(DEVICE)
    moved = fused.to(DEVICE)
    key, value = moved[:, heads : 2 * heads], moved[:, 2 * heads :]
    transfer.store_kv(key, value, got[0], got[1], slots.to(DEVICE))
    assert torch.equal(got.cpu(), want)
    transfer.store_kv(key[:0], value[:0], got[0], got[1], slots[:0].to(DEVICE))


def test_store_never_writes_outside_the_pool() -> None:
    caches = torch.zeros(2, 6, 4, 2, 8, device=DEVICE)
    inner = caches[:, 1:5]
    new = torch.ones(3, 2, 8, device=DEVICE)
    transfer.store_kv(new, new, inner[0], inner[1], torch.tensor([16, 0, -5], device=DEVICE))
    assert int(caches.sum()) == 2 * 16
    assert int(caches[:, 1, 0].sum()) == 2 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_many_copies_in_one_launch_equal_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(3, 2, 12, 16, 3, 64).to(dtype)
    blocks[:, :, 2, 5:] = float("nan")
    copies = torch.tensor([[0, 11, 1], [1, 7, 16], [2, 3, 5], [0, 8, 15], [4, 9, 0]])
    want, got = blocks.clone(), blocks.to(DEVICE)
    reference.copy_blocks(want, copies)
    transfer.copy_blocks(got, copies)
    assert torch.equal(got.cpu().view(torch.int16), want.view(torch.int16))
    transfer.copy_blocks(got, copies[:0])
    transfer.copy_blocks(got, copies[4:])


def test_wrong_arguments_are_refused_with_their_shapes(batch: Make) -> None:
    b = batch([(1, 20)])
    q, k, v, tables, starts, contexts = (tensor.to(DEVICE) for tensor in b.args)

    def call(*args: Any, **options: Any) -> None:
        attention.paged_attention(*args, scale=1.0, **options)

    with pytest.raises(InvalidRequest, match="heads a multiple of kv_heads"):
        call(q[:, :3], k, v, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="int32 on a GPU"):
        call(q, k, v, tables.long(), starts, contexts)
    with pytest.raises(InvalidRequest, match=r"are not \[S, max_blocks\]"):
        call(q, k, v, tables, starts, contexts.repeat(2))
    head_first = k.transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(InvalidRequest, match="a slot's heads contiguous"):
        call(q, head_first, head_first, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="window of 0"):
        call(q, k, v, tables, starts, contexts, window=0)
    with pytest.raises(InvalidRequest, match="not contiguous"):
        transfer.copy_blocks(
            torch.zeros(1, 2, 3, 4, 5, 6, device=DEVICE).transpose(4, 5), torch.tensor([[0, 1, 1]])
        )
    with pytest.raises(InvalidRequest, match="write a block twice"):
        transfer.copy_blocks(
            torch.zeros(1, 2, 3, 4, 5, 6, device=DEVICE), torch.tensor([[0, 1, 1], [2, 1, 1]])
        )
