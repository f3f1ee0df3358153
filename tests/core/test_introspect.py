"""The outline: sums that add up, bounds that hold, and a walk that others can interrupt."""

from __future__ import annotations

from collections.abc import Generator
from math import log1p

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.innards import indexed_below, root_of, state
from prefixcache.core.cache import PrefixCache
from prefixcache.core.introspect import draw
from prefixcache.errors import InvalidRequest
from prefixcache.outline import Branch, NamespaceOutline, Order, Outline
from prefixcache.types import Namespace, WorkerId, pack

ME, CHAT, CODE = WorkerId(1), Namespace("chat"), Namespace("code")


def finish(walk: Generator[None, None, Outline]) -> Outline:
    while True:
        try:
            next(walk)
        except StopIteration as end:
            outline: Outline = end.value
            return outline


def store(cache: PrefixCache, tokens: list[int], namespace: Namespace = CHAT, now: float = 0.0):
    grant = cache.acquire(ME, namespace, pack(tokens), now=now)
    cache.commit(ME, grant.lease, len(tokens), now=now)
    return grant.lease


def filled(num_blocks: int = 256) -> PrefixCache:
    cache = PrefixCache(num_blocks, 4)
    for namespace in (CHAT, CODE):
        cache.attach(ME, namespace, now=0.0)
    return cache


def add_up(part: NamespaceOutline) -> None:
    """Each branch's sum is its own run, the sums of those shown below it, and what is left out."""
    for index, branch in enumerate(part.branches):
        shown: list[Branch] = []
        for below in part.branches[index + 1 :]:
            if below.depth <= branch.depth:
                break
            if below.depth == branch.depth + 1:
                shown.append(below)
        resident = not branch.is_ghost
        assert branch.below.blocks == (
            branch.num_blocks + sum(one.below.blocks for one in shown) + branch.more.blocks
        )
        assert branch.below.tokens == (
            branch.num_tokens * resident
            + sum(one.below.tokens for one in shown)
            + branch.more.tokens
        )
        assert branch.below.ghost_tokens == (
            branch.num_tokens * branch.is_ghost
            + sum(one.below.ghost_tokens for one in shown)
            + branch.more.ghost_tokens
        )


def test_an_outline_draws_runs_below_what_they_share() -> None:
    cache = filled()
    for rest in ([1, 1, 1, 1], [2, 2]):
        cache.release(ME, store(cache, [7] * 8 + rest), now=1.0)
    lease = store(cache, [7] * 8 + [1, 1, 1, 1], now=5.0)
    (part,) = finish(cache.outline(now=5.0)).namespaces
    root, shared, long, short = part.branches
    assert (part.namespace, root.depth, root.below.tokens, root.below.runs) == (CHAT, 0, 14, 3)
    assert (shared.start, shared.num_tokens, shared.num_blocks) == (0, 8, 2)
    assert (long.depth, long.start, long.num_tokens) == (2, 8, 4)
    assert (short.num_tokens, short.num_locks, short.tokens) == (2, 0, pack([2, 2]))
    assert (shared.num_locks, long.num_locks, long.heat, long.idle_s) == (1, 1, 1.0, 0.0)
    assert root.heat == 0.0
    assert short.idle_s == 4.0
    cache.release(ME, lease, now=6.0)


def test_the_last_used_is_the_hottest_and_the_one_used_longest_ago_is_cold() -> None:
    cache = filled()
    for number in range(5):
        cache.release(ME, store(cache, [number] * 8), now=float(number))
    (part,) = finish(cache.outline(order=Order.HEAT, now=9.0)).namespaces
    heats = [one.heat for one in part.branches[1:]]
    assert heats == sorted(heats, reverse=True)
    assert (heats[0], heats[-1]) == (1.0, 0.0)
    ages = range(5)  # in uses of the cache since
    assert heats == pytest.approx([1.0 - log1p(age) / log1p(4) for age in ages])


def test_by_heat_the_last_used_comes_first_and_by_tokens_the_largest() -> None:
    cache = filled()
    cache.release(ME, store(cache, [1] * 40), now=1.0)
    cache.release(ME, store(cache, [2] * 8), now=2.0)
    for order, first in ((Order.TOKENS, 1), (Order.HEAT, 2)):
        (part,) = finish(cache.outline(order=order, now=3.0)).namespaces
        assert part.branches[1].tokens == pack([first] * min(32, 40 if first == 1 else 8))


def test_ghosts_are_shown_unless_they_are_not_wanted() -> None:
    cache = filled(4)
    cache.release(ME, store(cache, [1] * 16), now=1.0)
    cache.release(ME, store(cache, [2] * 8), now=2.0)
    (part,) = finish(cache.outline(now=3.0)).namespaces
    assert [one.is_ghost for one in part.branches if one.below.ghost_tokens == 8][-1]
    assert part.branches[0].below.ghost_tokens == 8
    (part,) = finish(cache.outline(ghosts=False, now=3.0)).namespaces
    assert not any(one.is_ghost for one in part.branches)


def test_uses_are_told_of_what_is_stored_if_the_policy_counts_them() -> None:
    cache = PrefixCache(4, 4, policy="lfu")
    cache.attach(ME, CHAT, now=0.0)
    for _ in range(2):
        cache.release(ME, store(cache, [1] * 8), now=1.0)
    cache.release(ME, store(cache, [3] * 12), now=1.0)  # evicts the second block of the first
    lease = store(cache, [2] * 4, now=2.0)
    (part,) = finish(cache.outline(now=3.0)).namespaces
    told = {(one.tokens[:1], one.is_ghost): one.num_uses for one in part.branches}
    assert told[b"\2", False] == 0
    assert {told[key] for key in told if key[1]} == {None}
    assert part.branches[0].num_uses is None
    cache.release(ME, lease, now=3.0)
    (part,) = finish(cache.outline(now=3.0)).namespaces
    assert [one.num_uses for one in part.branches if one.tokens == pack([2] * 4)] == [1]


def test_what_is_over_the_bounds_is_summed_up() -> None:
    cache = filled()
    for i in range(40):
        cache.release(ME, store(cache, [9] * 4 + [100 + i] * 4), now=1.0)
    (part,) = finish(cache.outline(max_branches=5, now=2.0)).namespaces
    assert len(part.branches) == 1 + 5
    assert (part.branches[1].num_more, part.branches[1].more.runs) == (36, 36)
    add_up(part)
    (part,) = finish(cache.outline(max_depth=1, now=2.0)).namespaces
    assert [one.depth for one in part.branches] == [0, 1]
    assert part.branches[1].num_more == 40
    add_up(part)


@given(
    prompts=st.lists(
        st.tuples(st.sampled_from([CHAT, CODE]), st.lists(st.integers(0, 2), min_size=1)),
        max_size=40,
    ),
    num_blocks=st.integers(16, 64),
    most=st.integers(1, 12),
    order=st.sampled_from(Order),
    depth=st.none() | st.integers(1, 3),
)
def test_an_outline_adds_up_to_what_is_stored_and_changes_nothing(
    prompts: list[tuple[Namespace, list[int]]],
    num_blocks: int,
    most: int,
    order: Order,
    depth: int | None,
) -> None:
    cache = filled(num_blocks)
    for now, (namespace, tokens) in enumerate(prompts):
        lease = store(cache, tokens[: num_blocks * 4], namespace, now=float(now))
        cache.release(ME, lease, now=float(now))
    before = state(cache)
    outline = finish(cache.outline(order=order, max_branches=most, max_depth=depth, now=99.0))
    assert state(cache) == before
    assert outline.num_moved == 0
    assert sum(len(part.branches) - 1 for part in outline.namespaces) <= most
    for part in outline.namespaces:
        add_up(part)
        root = root_of(cache, part.namespace)
        assert root is not None
        stored = list(indexed_below(root, 4))
        assert part.branches[0].below.blocks == len(stored)
        assert part.branches[0].below.tokens == sum(one.num_tokens for one in stored)
    assert sum(part.branches[0].below.runs for part in outline.namespaces) == (
        cache.snapshot(now=99.0).nodes
    )


def test_the_tree_may_change_while_it_is_walked() -> None:
    cache = filled(4096)
    for i in range(600):
        cache.release(ME, store(cache, [i % 7] * 4 + [100 + i] * 4), now=1.0)
    walk = cache.outline(now=2.0)
    next(walk)
    cache.reset(CHAT)
    for i in range(4096):
        cache.release(ME, store(cache, [5000 + i] * 4), now=3.0)  # evicts all that was walked
    outline = finish(walk)
    assert outline.num_moved
    assert outline.namespaces[0].branches[0].below.runs < 607
    add_up(outline.namespaces[0])
    cache.check()


@pytest.mark.parametrize("bounds", [{"max_branches": 0}, {"max_depth": 0}])
def test_bounds_below_one_are_refused(bounds: dict[str, int]) -> None:
    with pytest.raises(InvalidRequest, match="at least 1"):
        filled().outline(now=0.0, **bounds)


def count_pauses(walk: Generator[None, None, object]) -> int:
    return sum(1 for _ in walk)


@pytest.mark.parametrize("kept", [100, 1000])
def test_others_have_their_turn_after_some_dozen_runs_and_not_after_each(kept: int) -> None:
    cache = filled(1024)
    for i in range(640):
        cache.release(ME, store(cache, [i] * 4), now=1.0)
    pauses = count_pauses(cache.outline(max_branches=kept, now=2.0))
    shown = min(kept, 640)
    assert (640 + 4 * shown) // 16 <= pauses <= (640 + 4 * shown) // 16 + 640 // 8
    assert count_pauses(cache.block_map(64)) in (640 // 16, 640 // 16 + 1)


def test_a_drawing_tells_what_is_stored_what_is_a_ghost_and_what_is_held() -> None:
    cache = PrefixCache(4, 4)
    cache.attach(ME, CHAT, now=0.0)
    cache.release(ME, store(cache, [7] * 16, now=1.0), now=1.0)
    held = store(cache, [9] * 8, now=2.0)
    assert draw(root_of(cache, CHAT)).splitlines() == [
        "chat",
        "└─ 7 7 7 7 7 7 … (8 tokens) blocks 0 1  last 1",
        "   └─ 7 7 7 7 7 7 … (8 tokens) ghost",
        "└─ 9 9 9 9 9 9 … (8 tokens) blocks 2 3  ref 1",
    ]
    cache.release(ME, held, now=3.0)
