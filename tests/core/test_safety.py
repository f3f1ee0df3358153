"""The safety rules, one story each: what is still written to is not read, and pins never dangle."""

from __future__ import annotations

import pytest

from prefixcache.core.cache import PrefixCache
from prefixcache.types import Grant, Namespace, Partial, PinInfo, WorkerId, pack

ALICE, BOB = WorkerId(1), WorkerId(2)
CHAT = Namespace("m")


def made(num_blocks: int, block_size: int, *spaces: Namespace) -> PrefixCache:
    cache = PrefixCache(num_blocks, block_size, ttl_s=10.0, max_pinned=num_blocks)
    for worker in (ALICE, BOB):
        for space in spaces or (CHAT,):
            cache.attach(worker, space, now=0.0)
    return cache


def acquire(
    cache: PrefixCache, worker: WorkerId, tokens: list[int], space: Namespace = CHAT, now: float = 0
) -> Grant:
    grant = cache.acquire(worker, space, pack(tokens), now=now)
    assert isinstance(grant, Grant)
    return grant


def serve(cache: PrefixCache, tokens: list[int], space: Namespace = CHAT) -> Grant:
    """Acquire, compute and commit everything, release."""
    grant = acquire(cache, ALICE, tokens, space)
    cache.commit(ALICE, grant.lease, len(tokens), now=0.0)
    cache.release(ALICE, grant.lease, now=0.0)
    return grant


# --------------------------------------------------------------------- the tail of who fell silent


def test_the_tail_of_a_silent_worker_is_not_read_any_more() -> None:
    """It may still append to its last block, so nobody is told to copy from that."""
    cache = made(8, 4)
    silent = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6])
    cache.commit(ALICE, silent.lease, 6, now=0.0)
    whole, tail = silent.block_table
    before = cache.lookup(CHAT, pack([1, 2, 3, 4, 5, 6, 7]))
    assert (before.num_hit, before.num_partial) == (4, 2)

    assert cache.expire(now=10.5).num_quarantined == 1

    after = cache.lookup(CHAT, pack([1, 2, 3, 4, 5, 6, 7]))
    assert (after.num_hit, after.num_partial) == (4, 0)
    grant = acquire(cache, BOB, [1, 2, 3, 4, 5, 6, 7], now=11.0)
    assert grant.copies == ()
    assert grant.block_table[0] == whole
    assert tail not in grant.block_table
    cache.check()


def test_the_block_of_that_tail_is_lent_to_nobody_until_its_process_is_gone() -> None:
    cache = made(4, 4)
    silent = acquire(cache, ALICE, [1, 2, 3, 4, 5, 6])
    cache.commit(ALICE, silent.lease, 6, now=0.0)
    tail = silent.block_table[1]
    cache.expire(now=10.5)
    lent = acquire(cache, BOB, [9] * 12, now=11.0)  # all that there is, but for that block
    assert tail not in lent.block_table
    cache.release(BOB, lent.lease, now=11.0)

    assert cache.worker_gone(ALICE, now=12.0) == 1

    assert tail in acquire(cache, BOB, [8] * 16, now=13.0).block_table
    cache.check()


def test_the_tail_of_who_gives_its_lease_back_is_read_on() -> None:
    cache = made(8, 4)
    serve(cache, [1, 2, 3, 4, 5, 6])
    assert cache.lookup(CHAT, pack([1, 2, 3, 4, 5, 6, 7])).num_partial == 2


# ----------------------------------------------------------------------------- pins that move up


def test_a_pin_whose_run_is_evicted_whole_moves_up_and_goes_on_protecting_the_rest() -> None:
    """root ─[1 2]─┬─[3]   pinned to its end; when [3] must go, the pin ends at [1 2]."""
    cache = made(4, 1)
    serve(cache, [1, 2, 3])
    serve(cache, [1, 2, 4])
    cache.pin(CHAT, pack([1, 2, 3]), ttl_s=50.0, now=0.0)

    short = acquire(cache, BOB, [9, 9])  # evicts [4], then the last one that is pinned
    cache.check()

    assert cache.snapshot(now=0.0).pins == (PinInfo(CHAT, 2, 2, 50.0),)
    assert cache.snapshot(now=0.0).pinned == 2
    cache.release(BOB, short.lease, now=0.0)
    for other in range(10, 20):
        serve(cache, [other])
    assert cache.lookup(CHAT, pack([1, 2, 0])).num_hit == 2
    assert cache.unpin(CHAT, pack([1, 2])).num_blocks == 2
    cache.check()


def test_a_pin_that_moves_up_to_another_pin_leaves_that_one_with_the_later_end() -> None:
    cache = made(4, 1)
    serve(cache, [1, 2, 3])
    serve(cache, [1, 2, 4])
    cache.pin(CHAT, pack([1, 2]), ttl_s=20.0, now=0.0)
    cache.pin(CHAT, pack([1, 2, 3]), ttl_s=50.0, now=0.0)
    acquire(cache, BOB, [9, 9])
    assert cache.snapshot(now=0.0).pins == (PinInfo(CHAT, 2, 2, 50.0),)
    cache.renew(BOB, now=21.0)
    cache.expire(now=21.0)
    assert cache.snapshot(now=21.0).pinned == 2
    cache.expire(now=51.0)
    assert cache.snapshot(now=51.0).pinned == 0
    cache.check()


def test_a_pin_of_which_nothing_is_left_ends() -> None:
    cache = made(2, 1)
    serve(cache, [1])
    cache.pin(CHAT, pack([1]), ttl_s=50.0, now=0.0)
    acquire(cache, BOB, [9, 9])
    assert cache.snapshot(now=0.0).pins == ()
    assert cache.snapshot(now=0.0).pinned == 0
    cache.check()


# ------------------------------------------------------------------------------- the last tenant

RED, BLUE = Namespace("m", tenant="red"), Namespace("m", tenant="blue")


@pytest.mark.parametrize("num_blocks", [3, 40])
def test_a_block_is_wiped_each_time_that_it_changes_its_tenant(num_blocks: int) -> None:
    """Few blocks and many take different ways."""
    cache = made(num_blocks, 1, RED, BLUE)
    wiped: list[list[int]] = []
    cache.wipe_with(lambda blocks: wiped.append(sorted(blocks)))
    everything = list(range(num_blocks))
    serve(cache, [1] * num_blocks, RED)
    serve(cache, [2] * num_blocks, RED)
    assert wiped == []  # its own
    serve(cache, [3] * num_blocks, BLUE)
    assert wiped == [everything]
    serve(cache, [4] * num_blocks, BLUE)
    assert wiped == [everything]  # they are BLUE's by now
    serve(cache, [5] * num_blocks, RED)
    assert wiped == [everything, everything]


def test_room_to_decode_changes_hands_like_a_prompt() -> None:
    cache = made(4, 2, RED, BLUE)
    wiped: list[int] = []
    cache.wipe_with(wiped.extend)
    used = serve(cache, [1] * 4, RED).block_table
    cache.reset(RED)
    lease = acquire(cache, BOB, [2], BLUE).lease
    cache.extend(BOB, lease, 8, now=0.0)
    assert sorted(wiped) == sorted(used)
    cache.release(BOB, lease, now=0.0)
    serve(cache, [3] * 8, BLUE)
    assert sorted(wiped) == sorted(used)  # they are BLUE's by now


def test_blocks_that_nobody_has_used_are_not_wiped() -> None:
    cache = PrefixCache(8, 1, partial=Partial.OFF)
    wiped: list[int] = []
    cache.wipe_with(wiped.extend)
    for space in (RED, BLUE):
        cache.attach(ALICE, space, now=0.0)
        serve(cache, [1, 2], space)
    assert wiped == []


def test_so_many_pins_end_in_one_go_and_the_others_with_the_next() -> None:
    cache = made(100, 4)
    for number in range(3):
        serve(cache, [number] * 8)
        cache.pin(CHAT, pack([number] * 8), ttl_s=5.0 + number, now=0.0)
    pins = cache._lessor.pins
    pins.expire(5.0, most=10)
    assert len(pins) == 3  # at its time a pin is still there
    pins.expire(20.0, most=0)
    assert (len(pins), pins.num_pinned) == (3, 6)
    for left in (2, 1, 0):
        pins.expire(20.0, most=1)
        assert (len(pins), pins.num_pinned) == (left, 2 * left)
