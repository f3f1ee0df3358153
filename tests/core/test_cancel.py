"""Whoever stops waiting gets nothing afterwards, unless its table has changed already."""

from __future__ import annotations

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, LeaseId, Namespace, TableUpdate, Waiting, WorkerId, pack

ME, OTHER, HERE = WorkerId(1), WorkerId(2), Namespace("m")


def full(num_held: int) -> tuple[PrefixCache, LeaseId]:
    """Give a pool of four blocks, so many of them held by one lease."""
    cache = PrefixCache(4, 4)
    for worker in (ME, OTHER):
        cache.attach(worker, HERE, now=0.0)
    grant = cache.acquire(OTHER, HERE, pack([9] * (4 * num_held)), now=0.0)
    assert isinstance(grant, Grant)
    return cache, grant.lease


def test_a_grant_that_is_there_and_not_taken_is_given_back_and_never_told() -> None:
    cache, held = full(4)
    waiting = cache.acquire(ME, HERE, pack([1] * 8), wait_s=9.0, now=0.0)
    other = cache.acquire(ME, HERE, pack([2] * 4), wait_s=9.0, now=0.0)
    assert isinstance(waiting, Waiting)
    assert not isinstance(other, Grant)
    cache.release(OTHER, held, now=1.0)
    assert cache.cancel(ME, waiting.ticket, now=1.0)
    told = cache.take_outcomes()
    assert [ticket for ticket, _ in told] == [other.ticket]
    assert cache.counts(now=1.0).num_leases == 1
    assert cache.cancel(ME, waiting.ticket, now=1.0)
    cache.check()


def test_room_to_decode_that_is_there_is_told_all_the_same() -> None:
    cache, held = full(3)
    mine = cache.acquire(ME, HERE, pack([1] * 4), now=0.0)
    assert isinstance(mine, Grant)
    cache.commit(ME, mine.lease, 4, now=0.0)
    waiting = cache.extend(ME, mine.lease, 8, wait_s=9.0, now=0.0)
    assert isinstance(waiting, Waiting)
    cache.release(OTHER, held, now=1.0)
    assert not cache.cancel(ME, waiting.ticket, now=1.0)
    [(ticket, update)] = cache.take_outcomes()
    assert ticket == waiting.ticket
    assert isinstance(update, TableUpdate)
    cache.check()


def test_a_ticket_of_another_worker_is_left_alone() -> None:
    cache, held = full(4)
    waiting = cache.acquire(ME, HERE, pack([1] * 8), wait_s=9.0, now=0.0)
    assert isinstance(waiting, Waiting)
    cache.cancel(OTHER, waiting.ticket, now=0.0)
    cache.release(OTHER, held, now=1.0)
    assert [ticket for ticket, _ in cache.take_outcomes()] == [waiting.ticket]
