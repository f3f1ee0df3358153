"""The operations on a CPU, both ways, against the slow obvious oracle."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

import prefixcache_kernels
from prefixcache.errors import InvalidRequest
from prefixcache_kernels import paged_attention, reference
from prefixcache_kernels import plan as plan_module
from prefixcache_kernels.plan import Plan
from prefixcache_kernels.reference import copy_blocks, oracle_attention, store_kv

pytestmark = pytest.mark.usefixtures("path")

Make = Callable[..., Any]

MIXED = [
    (1, 1),
    (1, 17),
    (5, 5),
    (1, 130),
    (3, 40),
    (1, 16),
    (140, 300),
    (1, 128),
    (2, 2),
    (129, 129),
]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"window": 1},
    {"window": 20},
    {"window": 129},
    {"softcap": 5.0},
    {"sinks": True},
    {"window": 33, "softcap": 5.0, "sinks": True},
]


def attend(b: Any, check: float = 2e-5, **options: Any) -> torch.Tensor:
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, b.query.shape[1])
    scale = b.query.shape[2] ** -0.5
    got = paged_attention(*b.args, scale=scale, **options)
    options.pop("plan", None)
    want = oracle_attention(*b.args, scale=scale, **options)
    assert got.dtype == b.query.dtype
    assert got.shape == b.query.shape
    torch.testing.assert_close(got.double(), want, atol=check, rtol=check)
    return got


def test_the_oracle_is_softmax_of_scaled_products() -> None:
    query = torch.tensor([[[1.0, 0.0]]])
    keys = torch.tensor([[[[2.0, 0.0]], [[0.0, 5.0]]]])
    values = torch.tensor([[[[1.0, 0.0]], [[0.0, 1.0]]]])
    one = torch.tensor([[0]]), torch.tensor([0, 1]), torch.tensor([2])
    got = oracle_attention(query, keys, values, *one, scale=0.5)
    e = torch.e
    torch.testing.assert_close(got[0, 0], torch.tensor([e / (e + 1), 1 / (e + 1)]).double())


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("size", [1, 3, 16, 128])
def test_mixed_batches_equal_the_oracle_with_garbage_everywhere_else(
    batch: Make, size: int, options: dict[str, Any]
) -> None:
    attend(batch(MIXED, size=size), **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 2), (8, 1)])
@pytest.mark.parametrize("dim", [16, 64, 80])
def test_every_grouping_of_heads_equals_the_oracle(
    batch: Make, heads: int, kv_heads: int, dim: int
) -> None:
    lens = [(1, 33), (1, 34), (7, 20), (130, 150)]
    attend(batch(lens, heads=heads, kv_heads=kv_heads, dim=dim))
    attend(batch(lens, heads=heads, kv_heads=kv_heads, dim=dim), sinks=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{}, {"window": 20}, {"softcap": 5.0, "sinks": True}], ids=str)
def test_half_precision_stays_within_its_rounding(
    batch: Make, dtype: torch.dtype, options: dict[str, Any]
) -> None:
    attend(batch(MIXED, dtype=dtype), check=2e-2, **options)


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 1e30])
def test_no_kind_of_garbage_leaks(batch: Make, poison: float) -> None:
    for window in (None, 20):
        clean = attend(batch(MIXED, poison=0.0), window=window)
        assert torch.equal(attend(batch(MIXED, poison=poison), window=window), clean)


def test_random_batches_equal_the_oracle(batch: Make) -> None:
    rng = random.Random(7)
    for seed in range(40):
        lens = []
        for _ in range(rng.randint(1, 12)):
            keys = rng.choice([1, 2, 15, 16, 17, 31, 32, 60, 200])
            lens.append((rng.choice([1, 1, 1, min(3, keys), keys, rng.randint(1, keys)]), keys))
        window = rng.choice([None, None, 1, 5, 16, 40, 1000])
        attend(batch(lens, size=rng.choice([1, 2, 8, 16]), seed=seed), window=window)


def test_long_windows_over_many_masked_keys(batch: Make) -> None:
    # Whole tiles of the dense kernel are masked for the last queries.
    attend(batch([(1500, 1700)], heads=2, kv_heads=1), window=40)


def test_an_empty_batch_and_sequences_without_queries(batch: Make) -> None:
    assert attend(batch([])).shape == (0, 4, 16)
    attend(batch([(0, 5), (1, 9), (0, 3), (4, 4), (0, 0)]))


def test_a_plan_serves_all_layers_windows_and_types(batch: Make) -> None:
    b = batch(MIXED)
    plan = Plan.build(b.block_tables, b.query_start, b.context_lens, 16)
    for window in (None, 20, None, 50):
        attend(b, window=window, plan=plan)
    b.query, b.key_cache, b.value_cache = (
        t.to(torch.bfloat16) for t in (b.query, b.key_cache, b.value_cache)
    )
    attend(b, check=2e-2, plan=plan)


def test_two_plans_that_are_used_in_turn_do_not_disturb_each_other(batch: Make) -> None:
    one, two = batch(MIXED, seed=1), batch([(1, 700), (1, 3)], seed=2)
    plans = [Plan.build(b.block_tables, b.query_start, b.context_lens, 16) for b in (one, two)]
    for _ in range(2):
        attend(one, plan=plans[0])
        attend(two, plan=plans[1])


def test_threads_do_not_share_scratch(batch: Make) -> None:
    faults: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            b = batch([(1, 300), (1, 301), (1, 310)], seed=seed)
            plan = Plan.build(b.block_tables, b.query_start, b.context_lens, 16)
            for _ in range(10):
                attend(b, plan=plan)
        except BaseException as fault:
            faults.append(fault)
            raise

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_decode_sequences_are_grouped_by_length_and_prefills_stay_alone(batch: Make) -> None:
    b = batch([(1, 100), (40, 40), (1, 100), (1, 1600), (1, 99), (40, 40)])
    plan = Plan.build(b.block_tables, b.query_start, b.context_lens, 16)
    pieces = plan.pieces(None, 128)
    assert [(p.num_seqs, p.num_queries, p.width) for p in pieces] == [
        (3, 1, 7),
        (1, 1, 100),
        (1, 40, 3),
        (1, 40, 3),
    ]
    assert plan.pieces(None, 128) is pieces


def test_equal_lengths_need_no_mask_and_neighbours_no_index(batch: Make) -> None:
    b = batch([(1, 40), (1, 40), (1, 40)])
    (piece,) = Plan.build(b.block_tables, b.query_start, b.context_lens, 16).pieces(None, 128)
    assert piece.visible is None
    assert not piece.hidden
    assert piece.rows is None


def test_pieces_stay_within_the_scratch_budget(batch: Make, monkeypatch: Any) -> None:
    monkeypatch.setattr(plan_module, "SCRATCH_BYTES", 3 * 48 * 128)
    b = batch([(1, 40)] * 7)
    plan = Plan.build(b.block_tables, b.query_start, b.context_lens, 16)
    assert [p.num_seqs for p in plan.pieces(None, 128)] == [3, 3, 1]
    attend(b)


def test_a_window_gathers_only_its_blocks(batch: Make) -> None:
    b = batch([(1, 1000)])
    (piece,) = Plan.build(b.block_tables, b.query_start, b.context_lens, 16).pieces(40, 128)
    assert piece.width == 3
    assert piece.visible is None
    attend(b, window=40)


def test_blocks_outside_the_window_may_be_gone_from_the_table(batch: Make) -> None:
    b = batch([(1, 1000), (3, 200)])
    want = attend(b, window=40)
    b.block_tables[0, :50] = b.block_tables[0, 62]
    torch.testing.assert_close(paged_attention(*b.args, scale=0.25, window=40), want)


def test_store_writes_exactly_the_named_slots() -> None:
    caches = torch.zeros(2, 5, 4, 2, 8)
    key, value = torch.randn(2, 3, 2, 8)
    store_kv(key, value, caches[0], caches[1], torch.tensor([7, -1, 0]))
    flat = caches.view(2, 20, 2, 8)
    assert torch.equal(flat[0, 7], key[0])
    assert torch.equal(flat[1, 7], value[0])
    assert torch.equal(flat[0, 0], key[2])
    assert torch.count_nonzero(flat) == 4 * 16
    store_kv(key[:0], value[:0], caches[0], caches[1], torch.zeros(0, dtype=torch.int64))


def test_store_takes_views_of_a_fused_projection() -> None:
    caches = torch.zeros(2, 5, 4, 2, 8)
    fused = torch.randn(3, 8, 8)
    store_kv(fused[:, 4:6], fused[:, 6:], caches[0], caches[1], torch.tensor([1, 2, 3]))
    assert torch.equal(caches[0, 0, 1:], fused[:, 4:6])
    assert torch.equal(caches[1, 0, 1:], fused[:, 6:])


def test_stored_then_attended_equals_dense_attention() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(3, 21, 4, 16)
    caches = torch.full((2, 9, 4, 4, 16), float("nan"))
    table = torch.tensor([[8, 0, 3, 5, 1, 7]])
    slots = table[0, torch.arange(21) // 4] * 4 + torch.arange(21) % 4
    store_kv(key, value, caches[0], caches[1], slots)
    got = prefixcache_kernels.paged_attention(
        query, *caches, table, torch.tensor([0, 21]), torch.tensor([21]), scale=0.25
    )
    want = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1), is_causal=True
    )
    torch.testing.assert_close(got, want.transpose(0, 1))


def test_copies_move_the_first_tokens_in_every_layer() -> None:
    blocks = torch.randn(3, 2, 8, 4, 2, 8)
    before = blocks.clone()
    copies = torch.tensor([[0, 5, 3], [1, 6, 4], [2, 7, 4], [1, 4, 0]])
    prefixcache_kernels.copy_blocks(blocks, copies)
    assert torch.equal(blocks[:, :, 5, :3], before[:, :, 0, :3])
    assert torch.equal(blocks[:, :, 5, 3:], before[:, :, 5, 3:])
    assert torch.equal(blocks[:, :, 6:8], before[:, :, 1:3])
    assert torch.equal(blocks[:, :, :5], before[:, :, :5])
    copy_blocks(blocks, torch.zeros(0, 3, dtype=torch.int64))


@pytest.mark.parametrize(
    "copies",
    [[[0, 8, 1]], [[-1, 2, 1]], [[0, 1, 5]], [[0, 1, 1], [2, 1, 1]], [[0, 1, 1], [1, 2, 1]]],
    ids=str,
)
def test_copies_that_leave_the_pool_or_interfere_change_nothing(copies: list[list[int]]) -> None:
    blocks = torch.randn(3, 2, 8, 4, 2, 8)
    before = blocks.clone()
    with pytest.raises(InvalidRequest, match="copies"):
        copy_blocks(blocks, torch.tensor(copies))
    assert torch.equal(blocks, before)


def test_wrong_arguments_are_refused_with_their_shapes(batch: Make) -> None:
    b = batch([(1, 20)])
    q, k, v, tables, starts, contexts = b.args

    def call(*args: Any, **options: Any) -> None:
        paged_attention(*args, scale=1.0, **options)

    with pytest.raises(InvalidRequest, match="heads a multiple of kv_heads"):
        call(q[:, :3], k, v, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="does not fit caches"):
        call(q[..., :8], k, v, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="bfloat16"):
        call(q.bfloat16(), k, v, tables, starts, contexts)
    with pytest.raises(InvalidRequest, match="window of 0"):
        call(*b.args, window=0)
    with pytest.raises(InvalidRequest, match=r"sinks \[3\]"):
        call(*b.args, sinks=torch.zeros(3))
    plan = Plan.build(tables, starts, contexts, 16)
    with pytest.raises(InvalidRequest, match="plan is of 1 queries"):
        call(q.repeat(2, 1, 1), k, v, tables, starts, contexts, plan=plan)
    with pytest.raises(InvalidRequest, match="in a table of"):
        call(q, k, v, tables[:, :1], starts, contexts)
    with pytest.raises(InvalidRequest, match="1 queries and 0 keys"):
        call(q, k, v, tables, starts, contexts * 0)
    with pytest.raises(InvalidRequest, match=r"are not \[S, max_blocks\]"):
        call(q, k, v, tables[0], starts, contexts)
    with pytest.raises(InvalidRequest, match=r"block_tables \[2, "):
        call(q, k, v, tables.repeat(2, 1), starts, contexts)
    with pytest.raises(InvalidRequest, match="the pool has 7"):
        call(q, k, v, tables * 0 + 7, starts, contexts)
    with pytest.raises(InvalidRequest, match="slots 0 to 112"):
        store_kv(q[:, :2].repeat(2, 1, 1), q[:, :2].repeat(2, 1, 1), k, v, torch.tensor([0, 112]))
    with pytest.raises(InvalidRequest, match="do not fit caches"):
        store_kv(q, q, k, v, torch.tensor([0]))
    with pytest.raises(InvalidRequest, match="float16"):
        store_kv(q[:, :2].half(), q[:, :2].half(), k, v, torch.tensor([0]))
    with pytest.raises(InvalidRequest, match="int32"):
        store_kv(q[:, :2], q[:, :2], k, v, torch.tensor([0], dtype=torch.int32))
    with pytest.raises(InvalidRequest, match=r"blocks .* are not"):
        copy_blocks(k, torch.zeros(1, 3, dtype=torch.int64))


def test_the_split_of_long_prefills_equals_the_masked_call(batch: Make, monkeypatch: Any) -> None:
    b = batch([(200, 1000), (130, 130)], heads=9, kv_heads=3)
    split = attend(b)
    monkeypatch.setattr(reference, "SPLIT_QUERIES", 10**9)
    torch.testing.assert_close(attend(b), split, atol=2e-6, rtol=2e-6)
