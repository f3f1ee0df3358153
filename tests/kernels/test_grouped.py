"""Grouped attention on a CPU against the slow obvious oracle, by the norm of the difference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from prefixcache.errors import InvalidRequest
from prefixcache_kernels import (
    GroupedPlan,
    GroupPlan,
    SharingCost,
    paged_attention,
    reference,
    shared_prefix_attention,
)
from prefixcache_kernels import grouped as in_torch
from prefixcache_kernels import plan as plan_module
from prefixcache_kernels.groups import FREE
from prefixcache_kernels.reference import oracle_attention

pytestmark = pytest.mark.usefixtures("path")

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@dataclass
class Forest:
    """Sequences over a pool, some continuing others; garbage wherever nobody may look."""

    query: Tensor
    key_cache: Tensor
    value_cache: Tensor
    block_tables: Tensor
    query_start: Tensor
    context_lens: Tensor
    limits: list[int]

    @property
    def args(self) -> tuple[Tensor, ...]:
        """What every attention takes."""
        caches = (self.query, self.key_cache, self.value_cache)
        return (*caches, self.block_tables, self.query_start, self.context_lens)

    def groups(self, cost: SharingCost = FREE) -> GroupPlan:
        """What they share."""
        return GroupPlan.build(self.block_tables, self.limits, cost)


def forest(
    seqs: Sequence[tuple[int | None, int, int, int]],
    *,
    size: int = 4,
    heads: int = 4,
    kv_heads: int = 2,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    consecutive: bool = False,
) -> Forest:
    """Make sequences `(parent, blocks taken from it, own tokens, queries)`.

    A parent is an earlier sequence; only its whole blocks before its own queries can be taken.
    """
    rng = torch.Generator().manual_seed(seed)
    num_blocks = 3 + sum(2 + -(-own // size) for _, _, own, _ in seqs)
    free = list(range(num_blocks))
    if not consecutive:
        free = torch.randperm(num_blocks, generator=rng).tolist()
    caches = [
        torch.full((num_blocks, size, kv_heads, dim), float("nan"), dtype=dtype) for _ in range(2)
    ]
    tables: list[list[int]] = []
    limits: list[int] = []
    contexts: list[int] = []
    for parent, taken, own, queries in seqs:
        shared = [] if parent is None else tables[parent][: min(taken, limits[parent])]
        fresh = [free.pop(0) for _ in range(-(-own // size))]
        context = len(shared) * size + own
        for j, block in enumerate(fresh):
            fill = min(size, own - j * size)
            for cache in caches:
                cache[block, :fill] = torch.randn(fill, kv_heads, dim, generator=rng).to(dtype)
        tables.append(shared + fresh)
        contexts.append(context)
        limits.append((context - min(queries, own)) // size)
    width = max(map(len, tables))
    padded = [row + [-7] * (width - len(row)) for row in tables]
    counts = [min(queries, own) for _, _, own, queries in seqs]
    starts = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    return Forest(
        torch.randn(int(starts[-1]), heads, dim, generator=rng).to(dtype),
        *caches,
        torch.tensor(padded, dtype=torch.int32),
        starts,
        torch.tensor(contexts, dtype=torch.int32),
        limits,
    )


def check(f: Forest, groups: GroupPlan | None = None, **options: Any) -> Tensor:
    """Compare with the oracle, by relative norm."""
    if options.get("sinks"):
        options["sinks"] = torch.linspace(-1, 2, f.query.shape[1])
    scale = f.query.shape[2] ** -0.5
    groups = f.groups() if groups is None else groups
    got = shared_prefix_attention(*f.args, groups, scale=scale, **options)
    want = oracle_attention(*f.args, scale=scale, **options)
    assert got.dtype == f.query.dtype
    assert got.shape == want.shape
    gap = float((got.double() - want).norm() / want.norm().clamp(min=1e-9))
    assert gap <= TOLERANCE[f.query.dtype], f"{gap:.1e}"
    return got


CHAT = [
    (None, 0, 37, 1),
    (0, 9, 5, 1),
    (0, 9, 21, 1),
    (2, 13, 3, 1),
    (None, 0, 11, 1),
    (2, 14, 1, 1),
]
"""A system prompt, one chat continued by two more, and a stranger: three levels."""
OPTIONS: list[dict[str, Any]] = [
    {},
    {"softcap": 3.0},
    {"sinks": True},
    {"softcap": 3.0, "sinks": True},
    {"window": 1000},
    {"window": 45},
    {"window": 3},
    {"window": 45, "sinks": True},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_several_levels_equal_the_oracle(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """With every option, among garbage."""
    f = forest(CHAT, dtype=dtype)
    assert f.groups().num_levels == 3
    check(f, **options)


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 4), (9, 3), (8, 1)])
@pytest.mark.parametrize("size", [1, 3, 16])
def test_every_grouping_of_heads_and_block_size(size: int, heads: int, kv_heads: int) -> None:
    """MHA, GQA, MQA, with blocks in order (read in place) and permuted (gathered)."""
    for consecutive in (False, True):
        check(forest(CHAT, size=size, heads=heads, kv_heads=kv_heads, consecutive=consecutive))


def test_prefills_share_too() -> None:
    """Sequences with several queries each: a run lies before all of them, so it needs no mask."""
    f = forest([(None, 0, 50, 2), (0, 11, 7, 7), (0, 11, 40, 40), (1, 9, 1, 1), (0, 5, 150, 150)])
    assert f.groups().num_runs > 1
    check(f)
    check(f, softcap=2.0, sinks=True)


def test_nothing_shared_is_paged_attention_to_the_bit() -> None:
    """Without runs the plain path answers."""
    f = forest([(None, 0, 9, 1), (None, 0, 30, 4)])
    plain = paged_attention(*f.args, scale=0.25)
    assert torch.equal(check(f) * 0 + plain, plain)
    assert torch.equal(shared_prefix_attention(*f.args, f.groups(), scale=0.25), plain)


def test_an_empty_batch() -> None:
    """No sequences at all."""
    f = forest([(None, 0, 4, 1)])
    empty = f.query[:0], f.key_cache, f.value_cache, f.block_tables[:0], f.query_start[:1]
    groups = GroupPlan.build(f.block_tables[:0], [])
    got = shared_prefix_attention(*empty, f.context_lens[:0], groups, scale=1.0)
    assert got.shape == f.query[:0].shape


def test_a_window_shorter_than_a_prefix_takes_the_plain_path_for_its_group_only() -> None:
    """One group fits into the window and shares; the other does not."""
    short, long = [(None, 0, 13, 1), (0, 3, 2, 1)], [(None, 0, 81, 1), (2, 20, 5, 1)]
    f = forest([*short, *long])
    plan = GroupedPlan.build(f.block_tables, f.query_start, f.context_lens, 4, f.groups())
    assert [len(plan._within(window)[0]) for window in (None, 85, 80, 15, 13)] == [2, 2, 1, 1, 0]
    for window in (85, 80, 15, 13, 1):
        check(f, window=window)


def count_blocks(f: Forest, groups: GroupPlan) -> int:
    """Blocks of keys that one call really gathers, or reads in place."""
    seen: list[int] = []
    plan = GroupedPlan.build(f.block_tables, f.query_start, f.context_lens, 4, groups)
    real = torch.index_select

    def spy(cache: Tensor, dim: int, index: Tensor, **options: Any) -> Tensor:
        seen.append(index.numel() if cache is f.key_cache else 0)
        return real(cache, dim, index, **options)

    with mock.patch.object(torch, "index_select", spy):
        in_torch.shared_prefix_attention(*f.args, groups, scale=0.25, plan=plan)
    in_place = [run for run, *_ in (next(iter(plan._work.values()))[0] if plan._work else [])]
    return sum(seen) + sum(run.index.numel() for run in in_place if run.begin is not None)


def test_each_shared_block_is_read_once() -> None:
    """Counted at the operator that gathers them, not promised."""
    f = forest([(None, 0, 41, 1), *[(0, 10, 3, 1)] * 7])
    assert count_blocks(f, f.groups()) == 10 + 8
    alone = GroupPlan.build(f.block_tables, [0] * 8)
    assert count_blocks(f, alone) >= 8 * 11  # padded to one length


@pytest.mark.parametrize(
    ("num", "shared", "own", "pays"),
    [(8, 768, 256, True), (32, 4096, 128, True), (8, 32, 256, False), (2, 64, 64, False)],
)
@pytest.mark.parametrize(
    ("native", "start", "passes"), [(True, 768 << 10, 2), (False, 1 << 20, 16)]
)
def test_the_cost_model_chooses_what_moves_fewer_bytes(
    num: int, shared: int, own: int, *, pays: bool, native: bool, start: int, passes: int
) -> None:
    """Counted in bytes: keys and values read, and partial answers written, read and merged."""
    shape: dict[str, Any] = {"block_size": 16, "heads": 9, "kv_heads": 3, "head_dim": 64}
    cost = SharingCost.cpu(**shape, itemsize=4, native=native)
    blocks = shared // 16
    rows = [
        list(range(blocks)) + [10_000 * (i + 1) + j for j in range(own // 16)] for i in range(num)
    ]
    tables = torch.tensor(rows, dtype=torch.int32)
    plan = GroupPlan.build(tables, [len(rows[0])] * num, cost)
    assert bool(plan.runs) is pays
    token = 2 * 3 * 64 * 4
    answer = 9 * 65 * 4
    alone = num * (shared + own) * token
    together = (shared + num * own) * token + num * passes * answer + start
    assert (together < alone) is pays


def test_refusals() -> None:
    """Groups of another batch, or that share what a query has still to be masked from."""
    f = forest(CHAT)
    with pytest.raises(InvalidRequest, match="groups of 2 sequences for 6 tables"):
        check(f, GroupPlan.build(f.block_tables[:2], f.limits[:2]))
    g = forest([(None, 0, 8, 1), (0, 1, 4, 4)])
    tables = g.block_tables[[1, 1]].contiguous()
    twice = GroupPlan.build(tables, [2, 2])
    starts, contexts = torch.tensor([0, 4, 8]), torch.tensor([8, 8])
    args = torch.zeros(8, 4, 16), g.key_cache, g.value_cache, tables, starts, contexts
    with pytest.raises(InvalidRequest, match="2 blocks of 4 tokens are shared by sequence 0"):
        shared_prefix_attention(*args, twice, scale=1.0)
    with pytest.raises(InvalidRequest, match="sinks"):
        shared_prefix_attention(*f.args, f.groups(), scale=1.0, sinks=torch.zeros(3))
    f.block_tables[f.groups().runs[0].row, 0] = 10_000
    with pytest.raises(InvalidRequest, match="the pool has"):
        shared_prefix_attention(*f.args, f.groups(), scale=1.0)


@st.composite
def forests(draw: st.DrawFn) -> tuple[Forest, dict[str, Any], SharingCost]:
    """Any forest, any options."""
    count = draw(st.integers(1, 6))
    seqs = []
    for i in range(count):
        parent = draw(st.none() | st.integers(0, i - 1)) if i else None
        own = draw(st.integers(1, 24))
        seqs.append((parent, draw(st.integers(0, 8)), own, draw(st.sampled_from([1, 1, 1, 3, 20]))))
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    made = forest(
        seqs,
        size=draw(st.sampled_from([1, 2, 5, 16])),
        kv_heads=kv_heads,
        heads=kv_heads * draw(st.sampled_from([1, 3, 4])),
        dim=draw(st.sampled_from([8, 32, 40])),
        dtype=draw(st.sampled_from([torch.float32, torch.bfloat16])),
        seed=draw(st.integers(0, 99)),
        consecutive=draw(st.booleans()),
    )
    options: dict[str, Any] = {
        "window": draw(st.none() | st.integers(1, 40)),
        "softcap": draw(st.none() | st.just(4.0)),
        "sinks": draw(st.booleans()) or None,
    }
    return made, options, draw(st.sampled_from([FREE, SharingCost(10, 3, 25)]))


@given(forests())
@settings(max_examples=30)
def test_any_forest_equals_the_oracle(
    drawn: tuple[Forest, dict[str, Any], SharingCost],
) -> None:
    """Levels, options, garbage and in-place runs, in any combination."""
    made, options, cost = drawn
    check(made, made.groups(cost), **options)


def test_small_pieces_of_own_parts_equal_the_oracle() -> None:
    """Own parts that do not fit into one piece of scratch are answered piece by piece."""
    f = forest(CHAT)
    with mock.patch.object(plan_module, "SCRATCH_BYTES", 1):
        check(f)


def test_a_plan_serves_many_layers() -> None:
    """Prepared once; nothing of one layer is left for the next."""
    f = forest(CHAT)
    plan = GroupedPlan.build(f.block_tables, f.query_start, f.context_lens, 4, f.groups())
    first = shared_prefix_attention(*f.args, f.groups(), scale=0.25, plan=plan)
    other = (f.query, f.value_cache, f.key_cache, *f.args[3:])
    second = shared_prefix_attention(*other, f.groups(), scale=0.25, plan=plan)
    again = shared_prefix_attention(*f.args, f.groups(), scale=0.25, plan=plan)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)
    assert len(plan._work) + len(plan.calls) == 1


@pytest.mark.parametrize("consecutive", [True, False])
def test_long_sequences_that_lie_in_order_are_read_in_place(
    monkeypatch: pytest.MonkeyPatch, *, consecutive: bool
) -> None:
    """Longer than the scratch stays in a cache: not gathered, and the same answer."""
    monkeypatch.setattr(plan_module, "SCRATCH_BYTES", 0)
    seqs = [(None, 0, 37, 1), (None, 0, 50, 3), (None, 0, 150, 140), (0, 9, 21, 1)]
    for dtype in TOLERANCE:
        f = forest(seqs, consecutive=consecutive, dtype=dtype)
        alone = GroupPlan.alone(len(seqs))
        for options in ({}, {"window": 45}, {"softcap": 3.0, "sinks": True}):
            check(f, alone, **options)
            check(f, **options)
    gathered = mock.Mock(side_effect=torch.index_select)
    monkeypatch.setattr(torch, "index_select", gathered)
    apart = forest(seqs[:3], consecutive=consecutive)
    reference.paged_attention(*apart.args, scale=0.25)  # type: ignore[arg-type]
    assert gathered.called is not consecutive


def test_a_table_that_leaves_the_pool_in_order_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place or gathered, no block outside the pool is read."""
    monkeypatch.setattr(plan_module, "SCRATCH_BYTES", 0)
    f = forest([(None, 0, 12, 1)])
    for first in (-2, f.key_cache.shape[0] - 1):
        f.block_tables[0] = torch.arange(first, first + f.block_tables.shape[1])
        with pytest.raises(InvalidRequest, match="the pool has"):
            shared_prefix_attention(*f.args, f.groups(), scale=1.0)  # type: ignore[arg-type]
