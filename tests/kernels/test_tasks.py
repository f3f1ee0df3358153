"""A batch cut into tasks: every query meets every key that it sees once, and no other."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from prefixcache_kernels.cpu import tasks as module
from prefixcache_kernels.cpu.tasks import Tasks
from prefixcache_kernels.groups import FREE, GroupPlan


def met(tasks: Tasks, block_size: int) -> Counter[tuple[int, int]]:
    """Count the pairs of a query and a slot of the pool that the tasks attend."""
    pairs: Counter[tuple[int, int]] = Counter()
    for first, num, blocks, skip, num_keys in tasks.tasks.tolist():
        assert num > 0
        assert num_keys > 0
        assert skip in range(block_size)
        for place in range(first, first + num):
            low, high = int(tasks.low[place]), int(tasks.high[place])
            assert low >= 0
            assert high <= num_keys
            for key in range(low, high):
                block, slot = divmod(skip + key, block_size)
                pairs[
                    int(tasks.queries[place]), int(tasks.blocks[blocks + block]) * block_size + slot
                ] += 1
    return pairs


def merged(tasks: Tasks) -> list[list[int]]:
    """The places whose answers are merged, per query."""
    ends = tasks.merge_start.tolist()
    return [tasks.merge[a:b].tolist() for a, b in pairwise(ends)]


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[list[int]], list[int], list[int], int, int | None]:
    """Tables, queries, contexts, block size, window; some share whole blocks of earlier ones."""
    size = draw(st.sampled_from([1, 2, 5]))
    tables: list[list[int]] = []
    lens: list[int] = []
    contexts: list[int] = []
    free = iter(range(10_000))
    for i in range(draw(st.integers(0, 5))):
        parent = tables[draw(st.integers(0, i - 1))] if i and draw(st.booleans()) else []
        limit = (contexts[tables.index(parent)] - 1) // size if parent else 0
        shared = parent[: draw(st.integers(0, limit))] if parent else []
        own = draw(st.integers(1, 12))
        tables.append(shared + [next(free) for _ in range(-(-own // size))])
        contexts.append(len(shared) * size + own)
        lens.append(draw(st.integers(0, own)))
    return tables, lens, contexts, size, draw(st.none() | st.integers(1, 15))


@given(steps(), st.booleans(), st.sampled_from([1, 3]))
@settings(max_examples=200, deadline=None)
def test_every_query_meets_what_it_sees_exactly_once(
    step: tuple[list[list[int]], list[int], list[int], int, int | None], share: bool, group: int
) -> None:
    """With runs and without, in pieces of four queries and five keys."""
    rows, lens, contexts, size, window = step
    width = max(map(len, rows), default=1)
    tables = np.array([row + [-9] * (width - len(row)) for row in rows], np.int32)
    tables = tables.reshape(len(rows), width)
    starts = np.cumsum([0, *lens])
    limits = [(c - n) // size if n else 0 for c, n in zip(contexts, lens, strict=True)]
    groups = GroupPlan.build(tables, limits if share else [0] * len(rows), FREE)
    if window is not None:
        groups = groups.restrict([contexts[row] <= window for row in groups.positions])
    own_from = np.zeros(len(rows), np.int64)
    own_from[list(groups.positions)] = groups.own
    bounds = {"MAX_ROWS": 4 * group, "MAX_KEYS": 5, "MAX_SPLIT": 3}
    with mock.patch.multiple(module, **bounds):
        made = Tasks.cut(
            *(tables, starts, np.array(contexts, np.int64), size, group, window),
            *(own_from, groups.runs, groups.positions),
        )
    want: Counter[tuple[int, int]] = Counter()
    for s, (num, context) in enumerate(zip(lens, contexts, strict=True)):
        for j in range(num):
            last = context - num + j
            for key in range(0 if window is None else max(0, last - window + 1), last + 1):
                want[int(starts[s]) + j, rows[s][key // size] * size + key % size] += 1
    assert met(made, size) == want
    assert (made.tasks[:, 1] <= 4).all()
    split = made.tasks[made.tasks[:, 1] <= 3]
    assert (split[:, 4] <= 5).all()
    places = merged(made)
    assert len(places) == sum(lens)
    assert [sorted(one) for one in places] == [
        np.flatnonzero(made.queries == query).tolist() for query in range(sum(lens))
    ]
    assert places == [sorted(one) for one in places]


def test_a_shared_block_is_in_one_task() -> None:
    """Eight sequences behind ten blocks: 10 + 8 * 1 are read; apart, 8 * 11."""
    rows = [[*range(10), 100 + i] for i in range(8)]
    tables = np.array(rows, np.int32)
    groups = GroupPlan.build(tables, [10] * 8)
    step = tables, np.arange(9), np.full(8, 43), 4, 3
    own_from = np.full(8, 10)
    shared = Tasks.cut(*step, None, own_from, groups.runs, groups.positions)
    assert len(shared.ids(4)) == 10 + 8
    assert len(Tasks.cut(*step).ids(4)) == 8 * 11


def test_nothing_of_the_batch_is_copied() -> None:
    """Tables are used where they are; cutting a batch that decodes takes no step per sequence."""
    tables = np.arange(64 * 40, dtype=np.int32).reshape(64, 40)
    made = Tasks.cut(tables, np.arange(65), np.full(64, 600), 16, 3)
    assert np.shares_memory(made.blocks, tables)
    assert made.tasks.shape == (64, 5)
    assert made.queries.tolist() == list(range(64))
