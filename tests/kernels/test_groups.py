"""Group plans: every block is read exactly once on each path, and only what pays is shared."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.errors import InvalidRequest
from prefixcache_kernels.groups import FREE, MAX_LEVELS, GroupPlan, Run, SharingCost, Tables

HIGH = SharingCost(block_bytes=10, partial_bytes=3, run_bytes=40)


def table(*rows: list[int]) -> Tables:
    """Pad rows to one width with what a table holds that nobody cleaned up: other rows' ids."""
    width = max(map(len, rows), default=0)
    padded = [row + [7] * (width - len(row)) for row in rows]
    return np.array(padded, dtype=np.int32).reshape(len(rows), width)


def blocks_read(plan: GroupPlan, tables: Tables, limits: list[int]) -> dict[int, list[int]]:
    """Which blocks each row reads through its runs and its own part up to its limit, in order."""
    read: dict[int, list[int]] = {}
    for position, row in enumerate(plan.positions):
        read[row] = []
        for run in plan.runs:
            if run.start <= position < run.end:
                assert run.first == len(read[row])  # begins where the one above it ends
                read[row] += tables[run.row, run.first : run.first + run.blocks].tolist()
        assert plan.own[position] == len(read[row])
        read[row] += tables[row, plan.own[position] : limits[row]].tolist()
    return read


def check(plan: GroupPlan, tables: Tables, limits: list[int]) -> None:
    """What every plan promises."""
    assert sorted(plan.positions) == list(range(len(limits)))
    assert blocks_read(plan, tables, limits) == {
        row: tables[row, :limit].tolist() for row, limit in enumerate(limits)
    }
    assert plan.order.tolist() == list(plan.positions)
    assert plan.own_from.tolist() == list(plan.own)
    columns = (plan.run_row, plan.run_first, plan.run_blocks, plan.run_start, plan.run_end)
    rows = zip(*(c.tolist() for c in (*columns, plan.run_level)), strict=True)
    assert [Run(*row) for row in rows] == list(plan.runs)
    for run in plan.runs:
        assert run.blocks > 0
        assert run.end - run.start > 1
        assert run.level < MAX_LEVELS


def passes(plan: GroupPlan, limits: list[int]) -> int:
    """Block reads of the part that may be shared."""
    own = sum(limits[row] - own for row, own in zip(plan.positions, plan.own, strict=True))
    return own + sum(run.blocks for run in plan.runs)


def price(plan: GroupPlan, limits: list[int], cost: SharingCost) -> int:
    """What a plan costs by a cost model."""
    runs = sum(cost.run_bytes + (r.end - r.start) * cost.partial_bytes for r in plan.runs)
    return runs + passes(plan, limits) * cost.block_bytes


def test_the_drawing() -> None:
    """The module's drawing, with two levels."""
    tables = table([7, 8, 9, 4, 40], [7, 8, 9, 2, 3], [7, 8, 9, 4, 41], [5, 6])
    limits = [5, 5, 5, 2]
    plan = GroupPlan.build(tables, limits)
    check(plan, tables, limits)
    root, inner = plan.runs
    assert (root.first, root.blocks, root.end - root.start, root.level) == (0, 3, 3, 0)
    assert (inner.first, inner.blocks, inner.end - inner.start, inner.level) == (3, 1, 2, 1)
    assert root.start <= inner.start < inner.end <= root.end
    assert plan.num_levels == 2
    assert plan.saved_blocks == 2 * 3 + 1
    assert not plan.limited


def test_nothing_to_share() -> None:
    """One sequence, none, or strangers: no runs, and everything is the sequences' own."""
    for rows in ([], [[1, 2]], [[1, 2], [3, 4]], [[], []]):
        tables = table(*rows)
        limits = [len(row) for row in rows]
        plan = GroupPlan.build(tables, limits)
        check(plan, tables, limits)
        assert plan.runs == ()
        assert plan.num_levels == plan.saved_blocks == 0


def test_a_short_limit_does_not_part_two_others() -> None:
    """The middle one of three may share only a little: the outer ones still share all."""
    tables = table([1, 2, 3, 4, 10], [1, 2, 3, 4, 11], [1, 2, 3, 4, 12])
    limits = [4, 1, 4]
    plan = GroupPlan.build(tables, limits)
    check(plan, tables, limits)
    assert [(r.blocks, r.end - r.start) for r in plan.runs] == [(1, 3), (3, 2)]
    assert plan.limited


def test_a_run_that_does_not_pay_is_left_to_those_below() -> None:
    """A root of one block is not worth a pass; the runs below then begin at the root."""
    tables = table(*([1, *[side * 10 + i for i in range(5)], 90 + n] for n, side in
                     enumerate([2, 2, 2, 5, 5, 5])))  # fmt: skip
    limits = [6] * 6
    plan = GroupPlan.build(tables, limits, HIGH)
    check(plan, tables, limits)
    assert [(r.first, r.blocks, r.end - r.start) for r in plan.runs] == [(0, 6, 3), (0, 6, 3)]
    assert GroupPlan.build(tables, limits, FREE).num_runs == 3


def test_sharing_pays_as_the_model_says() -> None:
    """The stated sum, on both sides of equality."""
    assert not HIGH.pays(2, 2, 4)  # 1 * 4 * 10 = 40 against 40 + 2 * 3
    assert HIGH.pays(2, 2, 5)
    assert not HIGH.pays(1, 9, 1000)


def test_a_plan_goes_to_a_device_in_one_piece() -> None:
    """All tensors are views of one."""
    plan = GroupPlan.build(table([1, 2], [1, 3]), [2, 2])
    assert plan.to("cpu").packed is plan.packed
    away = plan.to("meta")
    assert away.packed.is_meta
    assert away.order.is_meta
    assert away.run_level.is_meta
    assert away.runs == plan.runs
    for part in (plan.order, plan.run_level):
        assert part.dtype == torch.int32
        assert part.untyped_storage().data_ptr() == plan.packed.untyped_storage().data_ptr()


def test_refusals() -> None:
    """What does not fit together is refused."""
    tables = table([1, 2], [1, 3])
    for limits in ([1], [1, 3], [-1, 1]):
        with pytest.raises(InvalidRequest):
            GroupPlan.build(tables, limits)
    with pytest.raises(InvalidRequest, match="int32"):
        GroupPlan.build(tables.astype(np.int64), [1, 1])  # type: ignore[arg-type]


@st.composite
def batches(draw: st.DrawFn) -> tuple[Tables, list[int]]:
    """Tables of a forest: each sequence continues a prefix of an earlier one, or begins anew."""
    rows: list[list[int]] = []
    fresh = iter(range(10_000, 20_000))
    for _ in range(draw(st.integers(1, 9))):
        row: list[int] = []
        if rows and draw(st.booleans()):
            parent = draw(st.sampled_from(rows))
            row = parent[: draw(st.integers(0, len(parent)))]
        rows.append(row + [next(fresh) for _ in range(draw(st.integers(0, 3)))])
    limits = [draw(st.integers(0, len(row))) if draw(st.booleans()) else len(row) for row in rows]
    return table(*rows), limits


@given(batches(), st.sampled_from([FREE, HIGH, SharingCost(7, 9, 1), SharingCost(30, 2, 100)]))
def test_any_batch(batch: tuple[Tables, list[int]], cost: SharingCost) -> None:
    """Every plan reads each path's blocks exactly once, and never costs more than not sharing."""
    tables, limits = batch
    plan = GroupPlan.build(tables, limits, cost)
    check(plan, tables, limits)
    assert price(plan, limits, cost) <= sum(limits) * cost.block_bytes
    if cost is FREE and plan.num_levels < MAX_LEVELS:
        paths = {tuple(tables[row, : i + 1]) for row, n in enumerate(limits) for i in range(n)}
        assert passes(plan, limits) == len(paths)  # nothing is read twice
