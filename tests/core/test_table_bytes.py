"""What the block tables of leases take: so much, and no more, however few blocks they own."""

from __future__ import annotations

import pytest

from prefixcache.core.block_manager import LARGE_TABLE, OWN_TABLE, SHARED_TABLE
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import PoolExhausted
from prefixcache.types import Grant, Namespace, WorkerId, pack

RED, BLUE = WorkerId(1), WorkerId(2)
OF_RED, OF_BLUE = Namespace("m", tenant="red"), Namespace("m", tenant="blue")
PROMPT = pack(range(LARGE_TABLE))
TABLE = LARGE_TABLE * OWN_TABLE


def pool(num_tables: int) -> PrefixCache:
    """A pool with room for so many tables of `PROMPT`, which is stored for both tenants."""
    cache = PrefixCache(8 * LARGE_TABLE, 1, max_table_bytes=num_tables * TABLE)
    for worker, space in ((RED, OF_RED), (BLUE, OF_BLUE)):
        cache.attach(worker, space, now=0.0)
        first = granted(cache, worker)
        cache.release(worker, first.lease, now=0.0)
    return cache


def granted(cache: PrefixCache, worker: WorkerId, tokens: bytes = PROMPT) -> Grant:
    """Acquire a prompt, and commit all of it."""
    space = OF_RED if worker is RED else OF_BLUE
    grant = cache.acquire(worker, space, tokens, now=0.0)
    assert isinstance(grant, Grant)
    cache.commit(worker, grant.lease, len(tokens) // 4, now=0.0)
    return grant


def test_leases_of_what_is_stored_keep_only_so_many_bytes_of_tables() -> None:
    cache = pool(3)
    leases = [granted(cache, RED) for _ in range(3)]
    with pytest.raises(PoolExhausted, match=r"24,576 bytes of block tables.* 8,192 more .* 24,576"):
        granted(cache, RED)
    granted(cache, RED, PROMPT[:40])  # a short one is no matter
    cache.check()
    cache.release(RED, leases[0].lease, now=0.0)
    granted(cache, RED)
    cache.check()


def test_forks_count_each_until_they_end() -> None:
    cache = pool(3)
    parent = granted(cache, RED)
    children = cache.fork(RED, parent.lease, 4, now=0.0)
    assert 4 * LARGE_TABLE * SHARED_TABLE == 2 * TABLE
    for ask in (lambda: cache.fork(RED, parent.lease, 1, now=0.0), lambda: granted(cache, RED)):
        with pytest.raises(PoolExhausted, match="bytes of block tables"):
            ask()
    with pytest.raises(PoolExhausted, match="bytes of block tables"):  # its own from now on
        cache.extend(RED, children[0].lease, LARGE_TABLE + 1, now=0.0)
    cache.check()
    cache.release(RED, children[1].lease, now=0.0)
    cache.release(RED, children[2].lease, now=0.0)
    cache.extend(RED, children[0].lease, LARGE_TABLE + 1, now=0.0)
    cache.check()
    cache.truncate(RED, children[0].lease, 10, now=0.0)
    cache.check()
    cache.fork(RED, parent.lease, 2, now=0.0)
    cache.detach(RED, now=0.0, gone=False)
    cache.check()
    cache.attach(WorkerId(3), OF_RED, now=0.0)
    cache.check()


def test_one_tenant_leaves_the_others_their_part() -> None:
    cache = pool(4)
    granted(cache, RED)
    cache.set_tenants(["red", "blue"])
    granted(cache, RED)
    granted(cache, RED)
    with pytest.raises(PoolExhausted, match=r"'red' has 24,576 bytes of block tables"):
        granted(cache, RED)
    granted(cache, BLUE)
    cache.check()


def test_a_lease_that_grows_counts_from_when_it_is_large() -> None:
    cache = pool(1)
    lease = granted(cache, RED, PROMPT[:-40])
    cache.extend(RED, lease.lease, LARGE_TABLE, now=0.0)
    cache.check()
    with pytest.raises(PoolExhausted, match="bytes of block tables"):
        cache.extend(RED, lease.lease, LARGE_TABLE + 1, now=0.0)
    with pytest.raises(PoolExhausted, match="bytes of block tables"):
        granted(cache, RED)
    cache.release(RED, lease.lease, now=0.0)
    granted(cache, RED)
    cache.check()
