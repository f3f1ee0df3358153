"""The log of operations has each one that changes who holds what, and in the order they came."""

from __future__ import annotations

from prefixcache.core.cache import PrefixCache
from prefixcache.core.oplog import COMMITTED, ENDED, FORKED, GRANTED, RESET, TRUNCATED, Entry
from prefixcache.types import Grant, Namespace, WorkerId, pack

ME, HERE = WorkerId(1), Namespace("m")


def test_each_kind_has_a_number_of_its_own() -> None:
    """The numbers are written down: a recorder of another version reads them."""
    assert (GRANTED, COMMITTED, ENDED, FORKED, TRUNCATED, RESET) == (0, 1, 2, 3, 4, 5)


def test_every_verb_that_changes_a_lease_is_there_with_its_numbers() -> None:
    cache = PrefixCache(64, 4)
    log: list[Entry] = []
    cache._lessor.oplog = log.append
    cache.attach(ME, HERE, now=0.0)
    tokens = pack([1, 2, 3, 4, 5, 6])
    first = cache.acquire(ME, HERE, tokens, now=0.0)
    assert isinstance(first, Grant)
    cache.commit(ME, first.lease, 6, now=0.0)
    cache.fork(ME, first.lease, 1, now=0.0)
    cache.truncate(ME, first.lease, 5, now=0.0)
    cache.release(ME, first.lease, now=0.0)
    again = cache.acquire(ME, HERE, tokens, now=0.0)
    assert isinstance(again, Grant)
    cache.reset(HERE)
    kinds = [entry[0] for entry in log]
    assert kinds == [GRANTED, COMMITTED, FORKED, TRUNCATED, ENDED, GRANTED, RESET]
    granted = [entry for entry in log if entry[0] == GRANTED]
    assert [(reused, data, space) for _, _, reused, data, space in granted] == [
        (0, tokens, HERE),
        (again.ledger.reused, tokens, HERE),
    ]
    assert again.ledger.reused > 0
    assert log[-1] == (RESET, 0, 0, b"", HERE)
