"""The Triton kernels against the oracle.  `test_triton.py` runs this file, in a process of its own:

in the interpreter on CPU tensors (shapes are tiny), and as it is on a GPU where there is one.

"Equal" is a relative norm against float64: 1e-5 in float32, 1e-2 in 16 bit.  Eight-bit caches are
read exactly (the same bounds against the numbers they hold); holding numbers in eight bits costs
5e-2.  Outputs are not initialised and unused slots hold NaN: neither may show.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels import attention, launch, reference, rotary, shape, transfer
from prefixcache_kernels import rotate as rotation
from prefixcache_kernels import shared as sharing
from prefixcache_kernels.checks import FP8
from prefixcache_kernels.groups import MAX_LEVELS, GroupPlan
from prefixcache_kernels.keys import FP8_BITS, NATIVE_FP8
from prefixcache_kernels.launch import INTERPRETED
from prefixcache_kernels.oracle import oracle_attention, oracle_store
from prefixcache_kernels.shape import Shape

DEVICE = "cpu" if INTERPRETED else "cuda"
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
SMALL = INTERPRETED or "PREFIXCACHE_SMALL" in os.environ
EXAMPLES = 5 if SMALL else 100

Make = Callable[..., Any]

MIXED = [(1, 1), (1, 17), (5, 5), (3, 33)]
ALL: dict[str, Any] = {"window": 20, "softcap": 3.0, "sinks": True}

drawn = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture(autouse=True)
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter runs programs one after the other; a few show as much as many."""
    if INTERPRETED:
        monkeypatch.setattr(shape, "PROGRAMS", 8)


def relative(got: Tensor, want: Tensor) -> float:
    norm = want.double().norm()
    return float((got.cpu().double() - want.double()).norm() / norm) if norm else float(got.norm())


def attend(
    b: Any,
    groups: GroupPlan | None = None,
    *,
    again: bool = False,
    levels: int | None = None,
    **options: Any,
) -> Tensor:
    """Run the kernel and compare answer and log-sum-exp with the oracle; give the answer."""
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, b.query.shape[1])
    scale = b.query.shape[2] ** -0.5
    want_lse = torch.full(b.query.shape[:2], float("nan"), dtype=torch.float64)
    want = oracle_attention(*b.args, scale=scale, lse=want_lse, **options)
    lse = torch.full(b.query.shape[:2], float("nan"), device=DEVICE)
    options = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in options.items()}
    moved = [tensor.to(DEVICE) for tensor in b.args]
    if groups is None:
        run = attention.paged_attention
    else:
        moved.append(groups.to(DEVICE))
        run = sharing.shared_prefix_attention
    if levels is not None:
        options["levels"] = levels
    got = run(*moved, scale=scale, lse=lse, **options)
    if again or not INTERPRETED:
        assert torch.equal(got, run(*moved, scale=scale, **options)), "the order of merging varies"
    assert got.dtype == b.query.dtype
    assert relative(got, want) <= BOUNDS[b.query.dtype]
    assert relative(lse, want_lse) <= BOUNDS[b.query.dtype]
    return got.cpu()


def eight_bit(b: Any) -> dict[str, Tensor]:
    """Put a batch's caches into eight bits, with a scale per head that uses their range."""
    scales = {}
    for name, cache in (("key_scale", b.key_cache), ("value_scale", b.value_cache)):
        scale = torch.linspace(0.5, 2, cache.shape[2]) / 64
        scales[name] = scale
        held = (cache.float() / scale[:, None]).to(FP8)
        b.key_cache, b.value_cache = (
            (held, b.value_cache) if name == "key_scale" else (b.key_cache, held)
        )
    return scales


@pytest.mark.parametrize(
    ("size", "options"),
    [(1, {"window": 9}), (3, {"softcap": 3.0}), (16, {}), (16, ALL), (1024, {"window": 6})],
    ids=str,
)
def test_mixed_batches_of_any_block_size_with_garbage_everywhere_else(
    batch: Make, size: int, options: dict[str, Any]
) -> None:
    attend(batch(MIXED, size=size), **options)


@pytest.mark.parametrize("options", [{}, {"window": 30, "sinks": True}], ids=str)
def test_decode_alone_splits_its_keys(batch: Make, options: dict[str, Any]) -> None:
    sizes = {"num_queries": 3, "num_seqs": 3, "max_context": 192, "amd": False}
    assert Shape.choose(4, 1, 16, 16, 4, **sizes).splits > 1
    attend(batch([(1, 170), (1, 5), (1, 64)], kv_heads=1), again=True, **options)


@pytest.mark.parametrize(
    ("dtype", "options"),
    [(torch.float32, {}), (torch.bfloat16, {"window": 90, "sinks": True})],
    ids=str,
)
def test_with_fixed_splits_a_query_has_its_bits_in_any_company(
    batch: Make, dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Alone, in a table of its own width, as decoding does; beside others; in a prefill."""
    monkeypatch.setattr(shape, "FIXED_KEYS", 64)
    if INTERPRETED:  # numpy's rounds a row by where it lies; a GPU computes all rows alike
        monkeypatch.setattr(
            np, "matmul", lambda a, b, dtype: (a[:, :, None] * b[None]).sum(1, dtype=dtype)
        )
    b = batch([(3, 140), (1, 70)], kv_heads=1, dtype=dtype)
    query, keys, values, tables, starts, contexts = (tensor.to(DEVICE) for tensor in b.args)
    if options.get("sinks"):
        options = options | {"sinks": torch.linspace(-1, 2, query.shape[1], device=DEVICE)}
    on_cpu = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    want = oracle_attention(*b.args, scale=0.3, **on_cpu)
    size, ints = keys.shape[1], {"dtype": torch.int32, "device": DEVICE}

    def run(rows: slice, tables: Tensor, starts: Tensor, lens: Tensor, fixed: bool) -> Any:
        lse = torch.empty(query[rows].shape[:2], device=DEVICE)
        step = (query[rows], keys, values, tables, starts, lens)
        out = attention.paged_attention(*step, scale=0.3, lse=lse, fixed=fixed, **options)
        return out, lse

    def same(ones: Any, others: Any) -> bool:
        return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))

    everything = (slice(None), tables, starts, contexts)
    whole, loose = (run(*everything, fixed=fixed) for fixed in (True, False))
    assert relative(whole[0], want) <= BOUNDS[dtype]
    differing = 0
    for row, seq, length in [(0, 0, 138), (2, 0, 140), (3, 1, 70)]:
        table = tables[seq : seq + 1, : -(-length // size)]
        alone = (slice(row, row + 1), table, torch.tensor([0, 1], **ints))
        alone += (torch.tensor([length], **ints),)
        assert same(run(*alone, fixed=True), [part[row : row + 1] for part in whole])
        differing += not same(run(*alone, fixed=False), [part[row : row + 1] for part in loose])
    assert differing or options, "splits that are not fixed give these bits, too"
    # Where partial answers would take too much, some queries at a time: the same.
    launched = []
    choose = shape.Shape.choose
    each = query.shape[1] * 4 * (values.shape[3] + 1) * 4
    monkeypatch.setattr(attention, "FIXED_BYTES", 2 * each)
    monkeypatch.setattr(
        shape.Shape, "choose", lambda *a, **kw: launched.append(kw) or choose(*a, **kw)
    )
    assert same(run(*everything, fixed=True), whole)
    assert [kw["num_queries"] for kw in launched] == [4, 2, 2]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "value_dim"),
    [(2, 2, 32, 32), (9, 3, 80, 80), (8, 1, 96, 64), (20, 1, 48, 16), (4, 2, 192, 256)],
)
def test_every_grouping_of_heads_and_every_size_of_them(
    batch: Make, heads: int, kv_heads: int, dim: int, value_dim: int
) -> None:
    attend(batch([(1, 18), (3, 20)], heads=heads, kv_heads=kv_heads, dim=dim, value_dim=value_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(batch: Make, dtype: torch.dtype) -> None:
    attend(batch(MIXED, dtype=dtype), **ALL)


@pytest.mark.parametrize("reading", [FP8_BITS, NATIVE_FP8])
def test_eight_bit_caches_are_read_exactly(
    batch: Make, reading: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reading == NATIVE_FP8:
        if not INTERPRETED and not launch.converts_fp8(torch.cuda.get_device_capability()):
            pytest.skip("this GPU has no instruction that widens e4m3")
        monkeypatch.setattr(attention, "readable", lambda keys, values: (keys, values, NATIVE_FP8))
    b = batch([(1, 17), (3, 40)], value_dim=32)
    wide = oracle_attention(*b.args, scale=0.25)
    got = attend(b, **eight_bit(b))
    assert relative(got, wide) <= 5e-2


@pytest.mark.parametrize("poison", [float("inf"), 1e30])
def test_no_kind_of_garbage_leaks(batch: Make, poison: float) -> None:
    lens = [(1, 17), (3, 20)]
    clean = attend(batch(lens, poison=0.0), window=20)
    assert torch.equal(attend(batch(lens, poison=poison), window=20), clean)


def test_one_token_prompts_and_last_blocks_of_one_token(batch: Make) -> None:
    attend(batch([(1, 1)]))
    attend(batch([(1, 1)] * 3))
    attend(batch([(17, 17), (1, 17)]))


def test_empty_batches_and_sequences_without_queries(batch: Make) -> None:
    assert attend(batch([])).shape == (0, 4, 16)
    attend(batch([(0, 5), (1, 9), (0, 3), (4, 4)]))


@st.composite
def lengths(draw: st.DrawFn) -> tuple[int, int]:
    keys = draw(st.sampled_from([1, 2, 15, 16, 17, 40]))
    return draw(st.sampled_from([1, 1, keys, (keys + 1) // 2])), keys


@given(
    lens=st.lists(lengths(), min_size=1, max_size=5),
    size=st.sampled_from([1, 4, 16, 64]),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 2)]),
    dim=st.sampled_from([16, 40]),
    window=st.sampled_from([None, 1, 6, 17, 100]),
    seed=st.integers(0, 99),
)
@drawn
def test_drawn_batches(
    batch: Make,
    lens: list[tuple[int, int]],
    size: int,
    heads: tuple[int, int],
    dim: int,
    window: int | None,
    seed: int,
) -> None:
    b = batch(lens, size=size, heads=heads[0], kv_heads=heads[1], dim=dim, seed=seed)
    attend(b, window=window)


def test_queries_and_caches_may_be_views(batch: Make) -> None:
    b = batch([(1, 17), (3, 20)])
    want = attend(b)
    fused = torch.zeros(b.query.shape[0], 8, 16)
    fused[:, 2:6] = b.query
    b.query = fused[:, 2:6]
    both = torch.stack([b.key_cache.transpose(1, 2), b.value_cache.transpose(1, 2)], 1)
    b.key_cache, b.value_cache = both[:, 0].transpose(1, 2), both[:, 1].transpose(1, 2)
    assert torch.equal(attend(b), want)


# Two system prompts; below the first a document, and below that a question asked twice.
FOREST = ((1, 0, 3), (2, 0, 6), (4, 0, 9), (5, 3, 2))
LONG = [(1, 41), (1, 33), (1, 50), (1, 9), (1, 44), (1, 14)]


PREFILLING = [(3, 41), (1, 33), (9, 50), (1, 9), (2, 44), (6, 14)]
"""The same, where some have several queries."""


def forest(b: Any, size: int) -> GroupPlan:
    limits = (b.context_lens - b.query_start.diff()) // size
    return GroupPlan.build(b.block_tables, limits.tolist())


@pytest.mark.parametrize("options", [{}, ALL], ids=str)
def test_a_forest_of_shared_prefixes_is_read_once_per_run(
    batch: Make, options: dict[str, Any]
) -> None:
    b = batch(LONG, size=4, shared=FOREST, kv_heads=1)
    plan = forest(b, 4)
    assert (plan.num_runs, plan.num_levels) == (4, 3)
    attend(b, plan, again=True, **options)


@pytest.mark.parametrize("options", [{}, ALL, {"window": 30}], ids=str)
def test_prefills_share_as_decoding_sequences_do(batch: Make, options: dict[str, Any]) -> None:
    b = batch(PREFILLING, size=4, shared=FOREST, kv_heads=1)
    plan = forest(b, 4)
    assert plan.num_levels > 1
    attend(b, plan, again=True, **options)
    attend(b, plan.padded(len(LONG), plan.num_runs + 2), levels=MAX_LEVELS, **options)


def test_a_run_of_more_queries_than_a_tile_has_room_for(batch: Make) -> None:
    b = batch([(1, 30), (20, 48), (13, 41)], size=4, shared=((1, 0, 7), (2, 0, 7)))
    plan = forest(b, 4)
    assert plan.num_runs == 1
    attend(b, plan)


def test_shared_prefixes_in_eight_bits_and_in_half_precision(batch: Make) -> None:
    b = batch(LONG, size=4, shared=FOREST, kv_heads=1, dtype=torch.bfloat16, value_dim=32)
    attend(b, forest(b, 4))
    attend(b, forest(b, 4), **eight_bit(b))


def test_a_plan_that_shares_nothing_is_paged_attention(batch: Make) -> None:
    b = batch([(1, 9), (1, 20)], size=4)
    plan = forest(b, 4)
    assert not plan.num_runs
    assert torch.equal(attend(b, plan), attend(b))


@given(
    keys=st.lists(st.integers(9, 40), min_size=2, max_size=5),
    blocks=st.lists(st.integers(0, 8), min_size=5, max_size=5),
    queries=st.sampled_from([[1] * 5, [1, 1, 1, 4, 1], [7, 1, 3, 1, 2]]),
    size=st.sampled_from([1, 4]),
    window=st.sampled_from([None, 7]),
)
@drawn
def test_drawn_forests(
    batch: Make,
    keys: list[int],
    blocks: list[int],
    queries: list[int],
    size: int,
    window: int | None,
) -> None:
    # Each sequence shares with the one before as many blocks as both have before their queries.
    lens = list(zip(queries, keys, strict=False))
    most = [(n - num) // size for num, n in lens]
    shared = tuple((s, s - 1, min(blocks[s], most[s], most[s - 1])) for s in range(1, len(keys)))
    b = batch(lens, size=size, shared=shared, kv_heads=1)
    attend(b, forest(b, size), window=window)


def test_a_plan_padded_for_a_captured_graph_gives_the_same(batch: Make) -> None:
    b = batch(LONG, size=4, shared=FOREST, kv_heads=1)
    plan = forest(b, 4)
    attend(b, plan.padded(len(LONG), plan.num_runs + 2), levels=MAX_LEVELS)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="the interpreter captures no graph")
def test_a_captured_decode_step_is_replayed_with_other_tables_lengths_and_plans(
    batch: Make,
) -> None:
    b = batch(LONG, size=4, shared=FOREST, kv_heads=1)
    plan = forest(b, 4).padded(len(LONG), 8).to(DEVICE)
    moved = [tensor.to(DEVICE) for tensor in b.args]

    def step() -> tuple[Tensor, Tensor]:
        plain = attention.paged_attention(*moved, scale=0.25)
        shared = sharing.shared_prefix_attention(*moved, plan, scale=0.25, levels=MAX_LEVELS)
        return plain, shared

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        answers = step()
    for lens, shared in ((LONG, FOREST), ([(1, 30)] * 6, ((3, 0, 7), (5, 3, 7)))):
        other = batch(lens, size=4, shared=shared, kv_heads=1, seed=7)
        want = oracle_attention(*other.args, scale=0.25)
        for mine, new in zip(moved, other.args, strict=True):
            mine[tuple(slice(n) for n in new.shape)].copy_(new)
        plan.packed.copy_(forest(other, 4).padded(len(LONG), 8).packed)
        graph.replay()
        for answer in answers:
            assert relative(answer, want) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("size", "heads", "dim", "value_dim"), [(1, 2, 8, 8), (16, 3, 80, 48)])
def test_store_equals_the_oracle(
    dtype: torch.dtype, size: int, heads: int, dim: int, value_dim: int
) -> None:
    torch.manual_seed(0)
    fused = torch.randn(11, heads, 3, 80).to(dtype)
    slots = torch.randperm(40 * size)[:11]
    slots[4] = -1
    scales = torch.linspace(0.01, 1, heads)
    for held, extra in ((dtype, ()), (FP8, (scales, scales + 1))):
        want = [torch.randn(40, size, heads, d).to(held) for d in (dim, value_dim)]
        got = [cache.to(DEVICE) for cache in want]
        got = [cache.clone() for cache in got]
        plain = [cache.clone() for cache in want]
        new = (fused[:, :, 1, :dim], fused[:, :, 2, :value_dim])
        oracle_store(*new, *want, slots, *extra)
        reference.store_kv(*new, *plain, slots, *extra)
        moved = fused.to(DEVICE)
        new = (moved[:, :, 1, :dim], moved[:, :, 2, :value_dim])
        scaled = [scale.to(DEVICE) for scale in extra]
        transfer.store_kv(*new, *got, slots.to(DEVICE), *scaled)
        transfer.store_kv(new[0][:0], new[1][:0], *got, slots[:0].to(DEVICE), *scaled)
        for mine, simple, right in zip(got, plain, want, strict=True):
            assert torch.equal(mine.cpu().view(torch.uint8), right.view(torch.uint8))
            assert torch.equal(simple.view(torch.uint8), right.view(torch.uint8))


def test_eight_bits_round_as_torch_does_at_every_size_and_never_overflow() -> None:
    torch.manual_seed(0)
    every = torch.arange(256, dtype=torch.uint8).view(FP8).float()
    middles = (every[:-1] + every[1:]) / 2
    odd = torch.tensor([float("nan"), float("inf"), -float("inf"), -0.0, 463.9, 464.1, -1e30])
    numbers = torch.cat([every, middles, odd, *(torch.randn(500) * 10.0**p for p in range(-4, 4))])
    numbers = torch.nn.functional.pad(numbers, (0, -len(numbers) % 64)).view(1, 1, -1).to(DEVICE)
    caches = torch.zeros(2, 1, 1, 1, numbers.shape[2], device=DEVICE).to(FP8)
    one = torch.ones(1, device=DEVICE)
    slot = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    transfer.store_kv(numbers, numbers, caches[0], caches[1], slot, one, one)
    want = numbers.clamp(-448, 448).to(FP8).view(torch.uint8)
    got = caches[0].view(torch.uint8).view(numbers.shape)
    assert torch.equal(got[~numbers.isnan()], want[~numbers.isnan()])
    assert caches[0].float().view(numbers.shape).isnan().equal(numbers.isnan())


def test_store_never_writes_outside_the_pool() -> None:
    caches = torch.zeros(2, 6, 4, 2, 8, device=DEVICE)
    inner = caches[:, 1:5]
    new = torch.ones(3, 2, 8, device=DEVICE)
    transfer.store_kv(new, new, inner[0], inner[1], torch.tensor([16, 0, -5], device=DEVICE))
    assert int(caches.sum()) == 2 * 16
    assert int(caches[:, 1, 0].sum()) == 2 * 16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, FP8])
def test_many_copies_in_one_launch_equal_the_reference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    blocks = torch.randn(2, 2, 12, 16, 3, 64)
    blocks[:, :, 2, 5:] = float("nan")
    blocks = blocks.to(dtype)
    copies = torch.tensor([[0, 11, 1], [1, 7, 16], [2, 3, 5], [0, 8, 15], [4, 9, 0]])
    want, got = blocks.clone(), blocks.to(DEVICE).clone()
    reference.copy_blocks(want.view(torch.uint8), copies)
    transfer.copy_blocks(got, copies)
    assert torch.equal(got.cpu().view(torch.uint8), want.view(torch.uint8))
    transfer.copy_blocks(got, copies[:0])
    transfer.copy_blocks(got, copies[4:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("dim", "factor", "delta"), [(64, 1.0, -1000), (80, 0.4, 123_456)])
def test_rotated_keys_equal_the_oracle(
    dtype: torch.dtype, dim: int, factor: float, delta: int
) -> None:
    torch.manual_seed(0)
    angles = rotary.Rotary.from_config({"partial_rotary_factor": factor}, dim)
    blocks = torch.randn(2, 2, 3, 4, 3, dim).to(dtype)
    blocks[:, :, 1, 2:] = float("nan")
    slots = torch.tensor([3, 0, -1, 11, 5])
    got = blocks.to(DEVICE).clone()
    rotation.rotate_keys(got, slots.to(DEVICE), delta, angles)
    want = rotary.oracle_rotate(blocks, slots, delta, angles)
    assert relative(got.cpu().nan_to_num(), want.nan_to_num()) <= BOUNDS[dtype]
    assert torch.equal(got.cpu().isnan(), blocks.isnan())
    assert torch.equal(got[:, 1].cpu().nan_to_num(), blocks[:, 1].nan_to_num())
    rotation.rotate_keys(got, slots[:0].to(DEVICE), delta, angles)


def test_small_tensors_may_lie_in_any_stride(batch: Make) -> None:
    """Lengths, sinks, slots and turns as columns: read as rows they named other tenants' slots."""

    def column(row: Tensor) -> Tensor:
        return torch.stack([row, row + 13, row - 7], 1)[:, 0]

    b = batch([(1, 17), (3, 20)])
    sinks = torch.linspace(-1, 2, 4)
    want = oracle_attention(*b.args, scale=0.25, sinks=sinks)
    for name in ("query_start", "context_lens"):
        setattr(b, name, column(getattr(b, name)))
    b.block_tables = b.block_tables.repeat_interleave(2, 1)[:, ::2]
    moved = [tensor.to(DEVICE) for tensor in b.args]
    got = attention.paged_attention(*moved, scale=0.25, sinks=column(sinks).to(DEVICE))
    assert relative(got, want) <= 1e-5
    b = batch(LONG, size=4, shared=FOREST, kv_heads=1)
    sinks = torch.linspace(-1, 2, b.query.shape[1])
    want = oracle_attention(*b.args, scale=0.25, sinks=sinks)
    moved = [tensor.to(DEVICE) for tensor in (*b.args, column(sinks))]
    plan = forest(b, 4).to(DEVICE)
    got = sharing.shared_prefix_attention(*moved[:-1], plan, scale=0.25, sinks=moved[-1])
    assert relative(got, want) <= 1e-5
    slots = torch.tensor([[1, 20], [5, 21], [9, 22]], device=DEVICE)[:, 0]
    caches = torch.zeros(2, 8, 4, 2, 16, device=DEVICE)
    new = torch.ones(3, 2, 16, device=DEVICE)
    transfer.store_kv(new, new, caches[0], caches[1], slots)
    named = caches.view(2, 32, -1)[0].any(1).nonzero().flatten().tolist()
    assert named == [1, 5, 9]
    blocks = torch.ones(1, 2, 8, 4, 2, 16, device=DEVICE)
    rotation.rotate_keys(blocks, slots, 3, rotary.Rotary((1.0,)))
    turned = (blocks[0, 0].view(32, -1) != 1).any(1).nonzero().flatten().tolist()
    assert turned == [1, 5, 9]


@pytest.mark.parametrize("cap", [1e-3, 30.0, 1e5, 1e30])
def test_a_cap_is_as_exact_far_above_the_scores_as_near_them(batch: Make, cap: float) -> None:
    attend(batch([(1, 17), (3, 20)]), softcap=cap)


@pytest.mark.skipif(not INTERPRETED, reason="on a GPU lengths are not looked at")
def test_groups_that_share_what_is_not_before_all_queries_are_refused(batch: Make) -> None:
    """A run would be read without a mask: keys behind a query, or that nobody has written."""
    b = batch([(1, 17), (1, 20)], size=4, shared=((1, 0, 3),))
    plan = forest(b, 4)
    assert plan.num_runs
    b.context_lens[1] = 9
    with pytest.raises(InvalidRequest, match="not before all queries"):
        attend(b, plan)


def test_as_many_queries_as_sequences_but_not_one_each(batch: Make) -> None:
    """Where lengths are looked at it is answered; where not, it shows as NaN."""
    b = batch([(2, 41), (0, 33), (1, 44)], size=4, shared=((1, 0, 3), (2, 0, 6)))
    plan = forest(b, 4)
    assert plan.num_runs
    if INTERPRETED:
        attend(b, plan)
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(sharing, "looks", lambda tensor: False)
        moved = [tensor.to(DEVICE) for tensor in b.args]
        got = sharing.shared_prefix_attention(*moved, plan.to(DEVICE), scale=0.25)
        assert got[:2].isnan().all()


def test_values_are_looked_at_where_that_costs_nothing(batch: Make) -> None:
    if not INTERPRETED:
        pytest.skip("on a GPU only if PREFIXCACHE_CHECK says so")
    b = batch([(1, 20), (1, 9)])
    for name, index, wrong in (
        ("block_tables", (0, 0), 10**6),
        ("block_tables", (0, 0), -1),
        ("context_lens", 0, 10**6),
        ("context_lens", 0, 0),
        ("query_start", 1, 7),
    ):
        held = getattr(b, name).clone()
        getattr(b, name)[index] = wrong
        with pytest.raises(InvalidRequest):
            attention.paged_attention(*b.args, scale=0.25)
        setattr(b, name, held)


def test_heads_may_lie_further_apart_than_32_bits_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pool with heads first: address arithmetic alone, the memory in between is never touched."""
    if not INTERPRETED and torch.cuda.mem_get_info()[0] < 4 << 30:
        pytest.skip("takes 2 GiB of the GPU's memory")
    stride = 2**30 + 64  # one fits into 32 bits, two do not
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    flat = torch.empty(2 * stride + 4096, dtype=torch.uint8, device=DEVICE)
    for head in range(3):  # what the tile reads
        flat[head * stride : head * stride + 256] = 0
    where = ((2, 4, 3, 16), (64, 16, stride, 1))
    keys, values = (flat.view(FP8).as_strided(*where, begin) for begin in (0, 128))
    one, step = torch.ones(3, device=DEVICE), torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    new = torch.arange(48.0, device=DEVICE).view(1, 3, 16) % 16
    transfer.store_kv(new, new, keys, values, torch.tensor([1], device=DEVICE), one, one)
    for cache in (keys, values):
        wide = cache.view(torch.uint8)[0].view(FP8).float()
        assert torch.equal(wide[1], new[0])
    starts = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    two = torch.tensor([2], dtype=torch.int32, device=DEVICE)
    args = (torch.zeros(1, 3, 16, device=DEVICE), keys, values, step, starts, two)
    got = attention.paged_attention(*args, scale=1.0, key_scale=one, value_scale=one)
    assert torch.equal(got[0], new[0] / 2)


def test_many_levels_of_many_splits_are_merged(batch: Make) -> None:
    """160 partial answers of a head: more than registers hold at a time."""
    torch.manual_seed(0)
    part = torch.randn(2, 3, 160, 48, device=DEVICE)
    sums = torch.randn(2, 3, 160, device=DEVICE) * 4
    sums[0, 0, 5:] = float("-inf")
    part[0, 0, 5:] = float("nan")
    out, lse = torch.empty(2, 3, 48, device=DEVICE), torch.empty(2, 3, device=DEVICE)
    attention.merge(part, sums, out, lse)
    shares = torch.softmax(sums.double() * math.log(2), -1)[..., None]
    want = torch.where(shares > 0, part.double() * shares, 0.0).sum(2)
    assert relative(out, want) <= 1e-5
    assert relative(lse, torch.logsumexp(sums.double() * math.log(2), -1)) <= 1e-5


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
    turned = k.transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(InvalidRequest, match="lie side by side"):
        call(q, turned, turned, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="window of 0"):
        call(q, k, v, tables, starts, contexts, window=0)
    with pytest.raises(InvalidRequest, match="with 1 scales"):
        call(q, k, v, tables, starts, contexts, key_scale=torch.ones(2, device=DEVICE))
    with pytest.raises(InvalidRequest, match=r"lse \[1, 4\] of torch.float64"):
        call(q, k, v, tables, starts, contexts, lse=torch.zeros(1, 4, dtype=torch.float64))
    two = batch([(1, 20), (1, 20)], size=4, shared=((1, 0, 4),))
    with pytest.raises(InvalidRequest, match="groups of 2 sequences for 1 tables"):
        sharing.shared_prefix_attention(
            q, k, v, tables, starts, contexts, forest(two, 4).to(DEVICE), scale=1.0
        )
    cube = torch.zeros(1, 2, 3, 4, 5, 6, device=DEVICE)
    with pytest.raises(InvalidRequest, match="not contiguous"):
        transfer.copy_blocks(cube.transpose(4, 5), torch.tensor([[0, 1, 1]]))
    with pytest.raises(InvalidRequest, match="write a block twice"):
        transfer.copy_blocks(cube, torch.tensor([[0, 1, 1], [2, 1, 1]]))
    one = torch.tensor([0], device=DEVICE)
    with pytest.raises(InvalidRequest, match="4 pairs to turn in heads of 6"):
        rotation.rotate_keys(cube, one, 1, rotary.Rotary((1.0,) * 4))
