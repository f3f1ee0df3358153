"""The C library: every type, width of vectors and number of threads; and where there is none."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kernels.native_cases import (
    LSE_TOLERANCE,
    SHARED,
    TOLERANCE,
    TYPES,
    check_halves,
    gap,
    groups_of,
    needs_library,
)
from prefixcache.errors import InvalidRequest
from prefixcache_kernels import GroupPlan, paged_attention, shared_prefix_attention
from prefixcache_kernels.checks import FP8
from prefixcache_kernels.cpu import attend, library
from prefixcache_kernels.oracle import oracle_attention

Make = Callable[..., Any]


@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize(("dim", "value_dim"), [(32, 32), (64, 128), (40, 24), (256, 512), (20, 7)])
def test_keys_and_values_of_any_size(
    batch: Make, dtype: torch.dtype, dim: int, value_dim: int
) -> None:
    """Also such that do not fill a vector, with log-sum-exps."""
    b = batch(**SHARED, dim=dim, value_dim=value_dim, dtype=dtype)
    lse, want_lse = torch.full((2, *b.query.shape[:2]), float("nan"))
    options: dict[str, Any] = {"scale": dim**-0.5, "sinks": torch.linspace(-1, 2, 4)}
    got = shared_prefix_attention(*b.args, groups_of(b), **options, lse=lse)
    want = oracle_attention(*b.args, **options, lse=want_lse)
    assert got.shape == (8, 4, value_dim)
    assert gap(got, want) <= TOLERANCE[dtype]
    assert gap(lse, want_lse.double()) <= LSE_TOLERANCE[dtype]


@needs_library
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_eight_bit_caches_with_a_scale_per_head(batch: Make, dtype: torch.dtype) -> None:
    """Every code of e4m3 is read as PyTorch reads it; the scales are per key head."""
    b = batch(**SHARED, dtype=dtype, poison=0.0)
    b.key_cache, b.value_cache = b.key_cache.to(FP8), b.value_cache.to(FP8)
    scales = {"key_scale": torch.tensor([0.5, 2.0]), "value_scale": torch.tensor([3.0, 0.25])}
    got = shared_prefix_attention(*b.args, groups_of(b), scale=0.25, **scales)
    assert gap(got, oracle_attention(*b.args, scale=0.25, **scales)) <= TOLERANCE[dtype]


@needs_library
def test_every_eight_bit_code(batch: Make) -> None:
    """One key: its values are the answer."""
    codes = torch.arange(256, dtype=torch.uint8).view(FP8).reshape(1, 1, 1, 256)
    query = torch.zeros(1, 1, 256)
    one = torch.ones(1)
    step = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, 1]), torch.tensor([1])
    caches = torch.zeros(1, 1, 1, 256).to(FP8), codes
    got = paged_attention(query, *caches, *step, scale=1.0, key_scale=one, value_scale=one)
    torch.testing.assert_close(got.view(-1), codes.float().view(-1), rtol=0, atol=0, equal_nan=True)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_halves_are_read_and_rounded_as_pytorch_does(dtype: torch.dtype) -> None:
    """All 65,536 codes; `test_library` has them for other widths of vectors."""
    check_halves(dtype)


@needs_library
def test_long_and_wide_batches_are_cut_into_many_tasks(batch: Make) -> None:
    """More keys and more rows than one task has: 3,000 keys, 300 queries, 80 sequences in a run."""
    b = batch([(1, 3000), (300, 900), (1, 2500)], heads=6, kv_heads=2)
    assert gap(paged_attention(*b.args, scale=0.25), oracle_attention(*b.args, scale=0.25)) <= 1e-5
    lens = [(1, 2200), *[(1, 2150 + i) for i in range(79)]]
    wide = batch(lens, heads=9, kv_heads=3, shared=tuple((s, 0, 130) for s in range(1, 80)))
    groups = groups_of(wide)
    assert groups.num_runs >= 1
    got = shared_prefix_attention(*wide.args, groups, scale=0.25)
    assert gap(got, oracle_attention(*wide.args, scale=0.25)) <= 1e-5


@needs_library
def test_the_number_of_threads_changes_no_bit(batch: Make) -> None:
    """Tasks and the order of merging are of the batch alone."""
    b = batch(**SHARED)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(shared_prefix_attention(*b.args, groups_of(b), scale=0.25))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@needs_library
def test_queries_and_caches_may_be_views(batch: Make) -> None:
    """Of a fused projection, and of a pool with heads before slots."""
    b = batch(**SHARED)
    want = paged_attention(*b.args, scale=0.25)
    fused = torch.cat([b.query, b.query, b.query], 1)[:, 4:8]
    caches = [c.transpose(1, 2).contiguous().transpose(1, 2) for c in (b.key_cache, b.value_cache)]
    got = paged_attention(fused, *caches, *b.args[3:], scale=0.25)
    assert not caches[0].is_contiguous()
    assert torch.equal(got, want)
    last = b.query.transpose(1, 2).contiguous().transpose(1, 2)
    assert torch.equal(paged_attention(last, *b.args[1:], scale=0.25), want)


@needs_library
def test_a_number_that_is_none_is_not_hidden(batch: Make) -> None:
    """A NaN that must be read shows, in a key as in a value."""
    for which in ("key_cache", "value_cache"):
        b = batch(**SHARED)
        getattr(b, which)[b.block_tables[0, 0], 3] = float("nan")
        got = shared_prefix_attention(*b.args, groups_of(b), scale=0.25)
        rows = [0, 1, *range(2, 7)]  # those that share this block
        assert got[rows].isnan().any(-1).all()
        assert not got[7].isnan().any()


@needs_library
def test_scores_far_apart_neither_overflow_nor_vanish() -> None:
    """Scores of hundreds, rising and falling along the keys."""
    generator = torch.Generator().manual_seed(1)
    num = 300
    ramp = torch.linspace(-400, 400, num)
    for order in (ramp, ramp.flip(0), ramp[torch.randperm(num, generator=generator)]):
        keys = torch.zeros(num, 1, 1, 16)
        keys[:, 0, 0, 0] = order
        values = torch.randn(num, 1, 1, 16, generator=generator)
        query = torch.zeros(40, 1, 16)
        query[:, 0, 0] = torch.linspace(-1, 1, 40)
        table = torch.arange(num, dtype=torch.int32).repeat(40, 1)
        step = table, torch.arange(41), torch.full((40,), num)
        plan = GroupPlan.build(table, [num - 1] * 40)
        want = oracle_attention(query, keys, values, *step, scale=1.0)
        for groups in (plan, GroupPlan.alone(40)):
            got = shared_prefix_attention(query, keys, values, *step, groups, scale=1.0)
            assert gap(got, want) <= 1e-5


@needs_library
def test_many_heads_of_few_rows_do_not_crowd_the_stack(batch: Make) -> None:
    """300 key heads of 512: attended one at a time, in a thread with a stack of 2 MiB."""
    lens = [(8, 40), *[(1, 9 + i) for i in range(4 * torch.get_num_threads())]]
    b = batch(lens, heads=300, kv_heads=300, dim=512, size=4)
    want = oracle_attention(*b.args, scale=0.05)
    got: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: got.append(paged_attention(*b.args, scale=0.05)))
    before = threading.stack_size(2 << 20)
    try:
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    assert gap(got[0], want) <= 1e-5


@needs_library
def test_tensors_of_another_place_or_type_never_reach_the_library(batch: Make) -> None:
    """C gets addresses: only those of a CPU's memory, and of numbers that it can write."""
    b = batch([(1, 20)])
    for moved in (0, 1, 2):
        tensors = [t.to("meta") if i == moved else t for i, t in enumerate(b.args[:3])]
        assert not attend.takes(*tensors, 1)
    with pytest.raises(InvalidRequest, match=r"lse .* on meta"):
        paged_attention(*b.args, scale=1.0, lse=torch.zeros(1, 4, device="meta"))
    eight = [t.to(FP8) for t in b.args[:3]]
    assert not attend.takes(*eight, 1)
    assert attend.takes(b.query, *eight[1:], 1)


def test_block_tables_of_any_integers(batch: Make) -> None:
    """Narrow ones, and such as fit only 64 bits."""
    b = batch([(1, 20), (3, 40)])
    want = oracle_attention(*b.args, scale=0.25)
    for dtype in (torch.int16, torch.int8, torch.int64):
        args = (*b.args[:3], b.block_tables.to(dtype), *b.args[4:])
        assert gap(paged_attention(*args, scale=0.25), want) <= 1e-5


def test_values_of_another_size_than_keys_without_the_library(
    batch: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyTorch's grouped path cannot share them: it attends them apart."""
    monkeypatch.setattr(attend, "library", lambda: None)
    b = batch(**SHARED, dim=64, value_dim=128)
    got = shared_prefix_attention(*b.args, groups_of(b), scale=0.125)
    assert gap(got, oracle_attention(*b.args, scale=0.125)) <= 1e-5


@needs_library
def test_what_the_library_does_not_take_is_answered_by_pytorch(batch: Make) -> None:
    """Double precision, dimensions that are no memory order, and prefills for matrix units."""
    b = batch([(1, 20)])
    assert attend.takes(b.query, b.key_cache, b.value_cache, 1)
    assert not attend.takes(b.query.double(), b.key_cache, b.value_cache, 1)
    turned = b.key_cache.transpose(2, 3).contiguous().transpose(2, 3)
    assert not attend.takes(b.query, turned, b.value_cache, 1)
    want = oracle_attention(*b.args, scale=0.25)
    got = paged_attention(b.query, turned, *b.args[2:], scale=0.25)
    assert gap(got, want) <= 1e-5


@needs_library
@pytest.mark.parametrize("processor", [True, False])
@pytest.mark.parametrize("ours", [True, False])
def test_long_prefills_in_bfloat16_go_to_matrix_units(
    batch: Make, monkeypatch: pytest.MonkeyPatch, *, processor: bool, ours: bool
) -> None:
    """The library's, else PyTorch's, where there are any; few queries are the library's anyway."""
    loaded = library.library()
    assert loaded is not None
    monkeypatch.setattr(attend, "multiplies_matrices", lambda: processor)
    monkeypatch.setattr(attend, "library", lambda: replace(loaded, matrices=ours))
    many = batch([(40, 60), (1, 20)], dtype=torch.bfloat16)
    few = batch([(4, 60), (1, 20)], dtype=torch.bfloat16)
    assert attend.takes(*many.args[:3], 2) is (ours or not processor)
    eight_bits = (many.query, *(c.to(FP8) for c in many.args[1:3]))
    assert attend.takes(*eight_bits, 2) is not processor
    assert attend.takes(*few.args[:3], 2)
    assert attend.takes(many.query.float(), *(c.float() for c in many.args[1:3]), 2)


STEPS: list[dict[str, Any]] = [
    {"lens": [(150, 150)], "heads": 9, "kv_heads": 3},
    {"lens": [(70, 400), (1, 90), (5, 77), (17, 17)], "heads": 9, "kv_heads": 3},
    {"lens": [(9, 300), (33, 129)], "heads": 4, "kv_heads": 4, "size": 3},
    {"lens": [(300, 1300)], "heads": 8, "kv_heads": 1},
]


@needs_library
@pytest.mark.parametrize("step", STEPS, ids=lambda step: str(step["lens"]))
@pytest.mark.parametrize(
    ("dim", "value_dim"), [(64, 64), (20, 7), (33, 16), (128, 15), (96, 160), (512, 512)]
)
def test_many_queries_on_bfloat16(
    units: str, batch: Make, step: dict[str, Any], dim: int, value_dim: int
) -> None:
    """Rows that fill no matrix, sizes that are odd, windows that end within a span, caps, sinks."""
    b = batch(**step, dim=dim, value_dim=value_dim, dtype=torch.bfloat16)
    sinks = torch.linspace(-1, 2, step["heads"])
    for options in ({}, {"window": 45}, {"softcap": 3.0, "sinks": sinks}):
        lse, want_lse = torch.full((2, *b.query.shape[:2]), float("nan"))
        got = paged_attention(*b.args, scale=dim**-0.5, **options, lse=lse)
        want = oracle_attention(*b.args, scale=dim**-0.5, **options, lse=want_lse)
        assert gap(got, want) <= TOLERANCE[torch.bfloat16]
        loaded = library.library()
        assert loaded is not None
        by_twos = loaded.pairs and dim % 32 == 0 and value_dim % 32 == 0
        rounds = units == "matrices" or by_twos  # weights, whose sum this is
        assert gap(lse, want_lse.double()) <= (LSE_TOLERANCE[torch.bfloat16] if rounds else 1e-5)


@needs_library
@pytest.mark.parametrize("heads", [(9, 3), (5, 5), (8, 1), (10, 2)], ids=str)
@pytest.mark.parametrize("sizes", [(32, 32), (64, 64), (96, 160), (64, 40), (48, 64), (512, 512)])
def test_few_queries_on_bfloat16(
    batch: Make, heads: tuple[int, int], sizes: tuple[int, int]
) -> None:
    """One row to eight; ends of sequences within a tile; sizes that are whole pairs, or not."""
    dim, value_dim = sizes
    lens = [(1, 1), (1, 15), (1, 16), (1, 17), (1, 200), (1, 1500)]
    b = batch(
        lens,
        heads=heads[0],
        kv_heads=heads[1],
        dim=dim,
        value_dim=value_dim,
        dtype=torch.bfloat16,
        size=5,
    )
    for options in ({}, {"window": 20}, {"softcap": 3.0}):
        lse, want_lse = torch.full((2, *b.query.shape[:2]), float("nan"))
        got = paged_attention(*b.args, scale=dim**-0.5, **options, lse=lse)
        want = oracle_attention(*b.args, scale=dim**-0.5, **options, lse=want_lse)
        assert gap(got, want) <= gap(want.bfloat16(), want) + 1e-4  # nothing but the answer's own
        assert gap(lse, want_lse.double()) <= 1e-5


@needs_library
def test_a_run_of_many_sequences_on_bfloat16(units: str, batch: Make) -> None:
    """Rows of a group go through the units together, and what is each one's own beside them."""
    lens = [(1, 200 + i) for i in range(23)]
    b = batch(
        lens,
        heads=6,
        kv_heads=2,
        dim=64,
        value_dim=64,
        dtype=torch.bfloat16,
        shared=tuple((s, 0, 12) for s in range(1, 23)),
    )
    groups = groups_of(b)
    assert groups.num_runs >= 1
    got = shared_prefix_attention(*b.args, groups, scale=0.125)
    assert gap(got, oracle_attention(*b.args, scale=0.125)) <= TOLERANCE[torch.bfloat16]


@needs_library
def test_the_number_of_threads_changes_no_bit_of_many_queries(units: str, batch: Make) -> None:
    b = batch([(130, 300), (1, 90)], heads=6, kv_heads=2, dtype=torch.bfloat16)
    before = torch.get_num_threads()
    answers = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            answers.append(paged_attention(*b.args, scale=0.25))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(answers[0], answers[1])
    assert torch.equal(answers[0], answers[2])


@needs_library
def test_many_queries_neither_hide_nor_spread_what_is_no_number(units: str, batch: Make) -> None:
    """Who must read a NaN shows it; who has other keys, or reads on from a page's end, does not."""
    for which in ("key_cache", "value_cache"):
        b = batch([(40, 200), (40, 190)], dtype=torch.bfloat16)
        getattr(b, which)[b.block_tables[0, 0], 3] = float("nan")
        got = paged_attention(*b.args, scale=0.25)
        assert got[:40].isnan().any(-1).all()
        assert not got[40:].isnan().any()


@needs_library
def test_many_queries_with_scores_far_apart(units: str) -> None:
    """Scores of hundreds, rising and falling along the keys, and below what a power can be."""
    num = 300
    ramp = torch.linspace(-400, 400, num).bfloat16()
    for order in (ramp, ramp.flip(0)):
        keys = torch.zeros(num, 1, 1, 16, dtype=torch.bfloat16)
        keys[:, 0, 0, 0] = order
        values = torch.randn(num, 1, 1, 16).bfloat16()
        query = torch.zeros(40, 1, 16, dtype=torch.bfloat16)
        query[:, 0, 0] = torch.linspace(-1, 1, 40).bfloat16()
        step = torch.arange(num, dtype=torch.int32)[None], torch.tensor([0, 40])
        for scale in (1.0, -1.0):
            args = (query, keys, values, *step, torch.tensor([num]))
            got = paged_attention(*args, scale=scale)
            assert gap(got, oracle_attention(*args, scale=scale)) <= TOLERANCE[torch.bfloat16]


@needs_library
def test_the_mean_of_equal_values_is_that_value(units: str, batch: Make) -> None:
    """Weights are rounded, but divided by the sum of what they are rounded to."""
    b = batch([(90, 200), (20, 20)], dim=64, value_dim=64, dtype=torch.bfloat16)
    b.value_cache[:] = torch.linspace(-2, 3, 64).bfloat16()
    got = paged_attention(*b.args, scale=0.125)
    assert torch.equal(got, b.value_cache[0, 0, 0].expand_as(got))


@needs_library
def test_with_fixed_bits_all_queries_go_one_way(batch: Make) -> None:
    """The units of matrices would have other bits; one query alone does not go through them."""
    loaded = library.library()
    assert loaded is not None
    if not loaded.matrices:
        pytest.skip("no AMX, or not compiled in")
    allowed = ctypes.c_int64.in_dll(loaded.handle, "prefixcache_amx")
    b = batch([(90, 200), (3, 70)], dim=64, value_dim=64, dtype=torch.bfloat16)
    answers = {}
    try:
        for fixed in (True, False):
            for value in (1, 0):
                allowed.value = value
                answers[fixed, value] = paged_attention(*b.args, scale=0.125, fixed=fixed)
    finally:
        allowed.value = 1
    assert torch.equal(answers[True, 1], answers[True, 0])
    assert not torch.equal(answers[False, 1], answers[False, 0])
