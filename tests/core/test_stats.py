"""Snapshots: who asks is told of the rows that are his, and of no other; in steps, and in one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Namespace, Snapshot, WorkerId, pack

ME = WorkerId(1)
SPACES = [Namespace(model, tenant=tenant) for model, tenant in product("mn", "ab")]
A_ALONE: Callable[[Namespace], bool] = lambda space: space.model == "m"  # noqa: E731


@pytest.fixture
def cache() -> PrefixCache:
    """Two models of two tenants: of each a lease, something stored, a pin and a quota."""
    cache = PrefixCache(1000, 4)
    for number, space in enumerate(SPACES):
        cache.attach(ME, space, now=0.0)
        for size in (8, 12):
            tokens = pack([number * 100 + size] * size)
            grant = cache.acquire(ME, space, tokens, now=float(number))
            cache.commit(ME, grant.lease, size, now=float(number))
            if size == 8:
                cache.release(ME, grant.lease, now=float(number))
                cache.pin(space, tokens, ttl_s=60.0 + number, now=0.0)
        cache.set_quota(space, max_held=20 + number, guaranteed=0, now=0.0)
    for tenant in "ab":
        cache.set_quota(tenant, max_held=100, guaranteed=0, now=0.0)
    return cache


def shown(found: Snapshot) -> dict[str, list[Any]]:
    return {
        "leases": [one.namespace for one in found.leases],
        "namespaces": list(found.namespaces),
        "pins": [one.namespace for one in found.pins],
        "quotas": [one.namespace for one in found.quotas if one.namespace is not None],
    }


@pytest.mark.parametrize("tenant", [None, "a", "b", "nobody"])
@pytest.mark.parametrize("sees", [None, A_ALONE, lambda _: False])
def test_rows_are_those_of_the_namespaces_that_are_the_tenants_and_are_seen(
    cache: PrefixCache, tenant: str | None, sees: Callable[[Namespace], bool] | None
) -> None:
    mine = [one for one in SPACES if tenant in (None, one.tenant) and (sees is None or sees(one))]
    found = cache.snapshot(now=4.0, tenant=tenant, sees=sees)
    for name, rows in shown(found).items():
        assert sorted(rows) == sorted(mine), name
    assert found.num_leases == found.num_namespaces == len(mine)
    assert found.ledger.total == 20 * len(mine)
    tenants = [one.tenant for one in found.quotas if one.namespace is None]
    assert tenants == [one for one in "ab" if tenant in (None, one)]


def test_a_row_tells_of_its_own_lease_pin_and_quota(cache: PrefixCache) -> None:
    found = cache.snapshot(now=4.0)
    assert [
        (one.namespace, one.num_tokens, one.num_committed, one.num_blocks, one.expires_in_s)
        for one in found.leases
    ] == [(space, 12, 12, 3, 26.0 + number) for number, space in enumerate(SPACES)]
    assert {(one.namespace, one.num_tokens) for one in found.pins} == {(s, 8) for s in SPACES}
    limits = {one.namespace: one.max_held for one in found.quotas if one.namespace}
    assert limits == {space: 20 + number for number, space in enumerate(SPACES)}


def test_in_steps_it_is_the_same_and_what_has_ended_by_then_is_left_out() -> None:
    cache = PrefixCache(1000, 4)
    for number in range(40):
        space = Namespace(f"m{number}")
        cache.attach(ME, space, now=0.0)
        cache.acquire(ME, space, pack([number] * 4), now=0.0)
    whole = cache.snapshot(now=1.0)
    assert len(whole.leases) == 40
    steps, last, num_steps = cache.snapshot_in_steps(now=1.0), whole.leases[-1], 0
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found = end.value
            break
        num_steps += 1
        if num_steps == 1:
            cache.release(ME, last.lease, now=1.0)
    assert num_steps >= 3 + 2 * (40 // 16)
    assert found.leases == whole.leases[:-1]
    assert found.num_leases == 40  # of the first moment
    assert found.namespaces == whole.namespaces
