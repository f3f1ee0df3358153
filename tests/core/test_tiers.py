"""What leaves the pool goes down, and comes back: by examples, and beside one larger pool."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from core.replay import Replay
from core.stack import Stack
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.core.tiers import Tier
from prefixcache.errors import InvalidRequest
from prefixcache.types import (
    TOKEN_BYTES,
    Grant,
    HaulId,
    Namespace,
    Partial,
    Waiting,
    WorkerId,
    pack,
)

SPACE, ME = Namespace("m"), WorkerId(1)


class Shelf:
    """A small pool of blocks of two tokens with a tier below, and one worker."""

    def __init__(
        self,
        num_blocks: int = 8,
        host: int = 8,
        ahead: int = 2,
        piece: int = 4,
        partial: Partial = Partial.OFF,
        disk: int = 0,
        host_ahead: int = 0,
        disk_per_s: float = math.inf,
        most_ahead: int = 0,
    ) -> None:
        tiers = TierSizes(host, ahead, piece, disk, host_ahead, disk_per_s, most_ahead)
        self.cache = PrefixCache(num_blocks, 2, partial=partial, tiers=tiers)
        self.cache.set_porter(is_there=True, now=0.0)
        self.cache.attach(ME, SPACE, now=0.0)
        self.now = 0.0

    def store(self, *tokens: int) -> None:
        """Have whole blocks of a prompt cached."""
        grant = self.acquire(*tokens)
        assert isinstance(grant, Grant)
        self.cache.commit(ME, grant.lease, len(tokens), now=self.now)
        self.cache.release(ME, grant.lease, now=self.now)

    def acquire(self, *tokens: int, wait_s: float = 0.0) -> Grant | Waiting:
        self.now += 1.0
        return self.cache.acquire(ME, SPACE, pack(tokens), wait_s=wait_s, now=self.now)

    def hauls(self) -> list[Haul]:
        return self.cache.hauls(now=self.now)

    def restores(self) -> list[Haul]:
        """Take the hauls that are begun now; give those of restores."""
        return [haul for haul in self.hauls() if haul.is_up]

    def carry(self, *, good: int = 1000) -> None:
        """Have all hauls done, each of them up to `good` blocks."""
        while hauls := self.hauls():
            for haul in hauls:
                good_ones = min(good, len(haul.slots))
                self.cache.hauled(haul.id, good_ones, 0.01, now=self.now)
        self.cache.check()

    def below(self, *tokens: int) -> tuple[int, int]:
        """Give how many tokens of a prompt lie below, and how many of them on disk."""
        told = self.cache.explain(SPACE, pack([*tokens, 99]), now=self.now)
        on_disk = sum(part.end - part.start for part in told.below if part.tier == "disk")
        return told.num_below, on_disk

    def outcome(self) -> Grant:
        ((_, grant),) = self.cache.take_outcomes()
        assert isinstance(grant, Grant)
        return grant


@pytest.fixture
def shelf() -> Shelf:
    """Of eight blocks, of which [1 1 2 2 3 3] has three, and [4 4 5 5 6 6] the next; two free."""
    shelf = Shelf()
    shelf.store(1, 1, 2, 2, 3, 3)
    shelf.store(4, 4, 5, 5, 6, 6)
    return shelf


def test_as_much_is_kept_free_as_the_largest_of_the_latest_requests_took_at_once() -> None:
    shelf = Shelf(num_blocks=16, host=64, ahead=2, piece=16, most_ahead=8)
    first, second = [n for n in range(6) for _ in "ab"], [n for n in range(10, 16) for _ in "ab"]
    third = [n for n in range(20, 26) for _ in "ab"]
    shelf.store(*first)  # six blocks at once
    shelf.carry()
    assert shelf.cache.counts(now=shelf.now).free == 10
    shelf.store(*second)
    shelf.carry()
    assert shelf.cache.counts(now=shelf.now).free == 6  # two more went down, ahead of need
    shelf.store(*third)
    shelf.carry()
    assert shelf.below(*first) == (12, 0)  # with two kept free, what was evicted at once is lost


def test_what_is_kept_free_for_large_requests_has_an_end_and_is_forgotten() -> None:
    shelf = Shelf(num_blocks=64, host=640, ahead=2, piece=16, most_ahead=24)
    shelf.store(*(n for n in range(1000, 1030) for _ in "ab"))  # thirty at once
    for number in range(1_000):
        shelf.store(number, number)
        shelf.carry()
        if number == 64:
            assert shelf.cache.counts(now=shelf.now).free >= 23  # half of a piece may be lacking
    assert shelf.cache.counts(now=shelf.now).free <= 3


def test_many_who_take_a_block_each_do_not_make_it_forget_who_takes_many() -> None:
    shelf = Shelf(num_blocks=512, host=640, ahead=2, piece=16, most_ahead=256)
    hauls = shelf.cache._lessor.hauls
    assert hauls is not None
    shelf.store(*(n for n in range(200) for _ in "ab"))
    for number in range(500):
        shelf.store(1, 1, number)  # its last block is not kept
    assert hauls.ahead >= 150


@pytest.mark.parametrize(("at_once", "is_free", "is_kept"), [(2, 12, True), (4, 6, False)])
def test_as_much_is_kept_free_as_requests_take_together_before_the_porter_is_done(
    at_once: int, is_free: int, is_kept: bool
) -> None:
    shelf = Shelf(num_blocks=32, host=640, ahead=2, piece=16, most_ahead=16)
    prompts = [[n for n in range(10 * one, 10 * one + 6) for _ in "ab"] for one in range(24)]
    for first in range(0, 20, at_once):
        for prompt in prompts[first : first + at_once]:
            shelf.store(*prompt)
        shelf.carry()
    assert shelf.cache.counts(now=shelf.now).free == is_free  # more than may be teaches nothing
    before = shelf.cache.counts(now=shelf.now)
    for prompt in prompts[20 : 20 + at_once]:
        shelf.store(*prompt)
    shelf.carry()
    after = shelf.cache.counts(now=shelf.now)
    assert (after.sunk - before.sunk == after.evicted - before.evicted == 12) is is_kept


def test_the_oldest_blocks_go_down_before_anybody_needs_their_room(shelf: Shelf) -> None:
    assert not shelf.hauls()
    shelf.store(7, 7, 8, 8)
    (haul,) = shelf.hauls()
    assert not haul.is_up
    assert haul.tokens == pack([2, 2, 3, 3])
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.leaving, told.indexed, told.host_used) == (0, 2, 6, 2)
    shelf.cache.check()
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.leaving, told.sunk) == (2, 0, 2)
    assert shelf.cache.lookup(SPACE, pack([1, 1, 2, 2, 3, 3, 9])).num_hit == 2


def test_what_is_below_comes_back_for_who_waits(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    waiting = shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=5.0)
    assert isinstance(waiting, Waiting)
    assert waiting.num_pending == 4
    shelf.cache.check()
    (haul,) = shelf.restores()
    assert haul.is_up
    assert haul.tokens == pack([2, 2, 3, 3])
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    grant = shelf.outcome()
    assert (grant.num_cached, grant.ledger.hit, grant.ledger.restored) == (6, 2, 4)
    assert not grant.ledger.joined
    told = shelf.cache.counts(now=shelf.now)
    assert (told.restored, told.host_used) == (2, 2), "others went down for them"
    shelf.cache.check()


def test_several_wait_for_one_restore(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    for last in (9, 10, 11):
        assert isinstance(shelf.acquire(1, 1, 2, 2, 3, 3, last, wait_s=5.0), Waiting)
    hauls = shelf.hauls()
    assert [haul.is_up for haul in hauls].count(True) == 1
    for haul in hauls:
        shelf.cache.hauled(haul.id, len(haul.slots), 0.01, now=shelf.now)
    outcomes = [one for _, one in shelf.cache.take_outcomes()]
    assert [one.ledger.restored for one in outcomes if isinstance(one, Grant)] == [4, 4, 4]


def test_who_does_not_wait_gets_what_is_in_the_pool(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    grant = shelf.acquire(1, 1, 2, 2, 3, 3, 9)
    assert isinstance(grant, Grant)
    assert (grant.num_cached, grant.ledger.evicted, grant.ledger.restored) == (2, 4, 0)
    assert not [haul for haul in shelf.hauls() if haul.is_up]


def test_a_slot_that_is_not_good_is_a_miss_from_there_on(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=5.0)
    (haul,) = shelf.restores()
    shelf.cache.hauled(haul.id, 1, 0.01, now=shelf.now)
    grant = shelf.outcome()
    assert (grant.num_cached, grant.ledger.restored) == (4, 2)
    assert shelf.cache.counts(now=shelf.now).spoilt == 1
    shelf.cache.check()


def test_a_copy_that_failed_is_asked_for_by_nobody(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry(good=0)
    assert isinstance(shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=5.0), Grant)


def test_nobody_waits_for_a_copy_that_is_being_made() -> None:
    shelf = Shelf(num_blocks=8, ahead=4, piece=2)
    shelf.store(1, 1, 2, 2, 3, 3)
    shelf.store(4, 4, 5, 5, 6, 6)
    (haul,) = shelf.hauls()
    assert shelf.cache.counts(now=shelf.now).leaving == 2
    grant = shelf.acquire(*range(20, 25))
    assert isinstance(grant, Grant), "blocks that are leaving are there for who needs them"
    shelf.cache.check()
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()
    assert shelf.cache.counts(now=shelf.now).sunk == 0
    told = shelf.cache.explain(SPACE, pack([1, 1, 2, 2, 3, 3, 9]), now=shelf.now)
    assert told.num_below == 0, "what was copied is not what it should be"


def test_a_copy_that_nobody_may_read_is_not_begun() -> None:
    shelf = Shelf(num_blocks=8, ahead=4, piece=2)
    shelf.store(1, 1, 2, 2, 3, 3)
    shelf.store(4, 4, 5, 5, 6, 6)
    (haul,) = shelf.hauls()
    assert not shelf.cache.spare(haul.id), "it can still be saved"
    assert isinstance(shelf.acquire(*range(20, 25)), Grant)
    assert not shelf.cache.spare(HaulId(haul.id + 1)), "nobody knows it"
    hauls = shelf.cache._lessor.hauls
    assert hauls is not None
    assert hauls.busy() == haul.places
    assert shelf.cache.spare(haul.id)
    assert not hauls.busy(), "others may be written there next"
    shelf.cache.check()
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()
    assert shelf.cache.counts(now=shelf.now).sunk == 0


def test_what_is_not_begun_leaves_what_may_be_written_to_others() -> None:
    shelf = Shelf(num_blocks=8, host=0, ahead=4, piece=2, disk=16, disk_per_s=0.1)
    shelf.store(1, 1, 2, 2, 3, 3)
    shelf.store(4, 4, 5, 5, 6, 6)
    (haul,) = shelf.hauls()
    hauls = shelf.cache._lessor.hauls
    assert hauls is not None
    assert isinstance(shelf.acquire(*range(20, 25)), Grant)
    before = hauls.limit.allowed(shelf.now)
    assert shelf.cache.spare(haul.id)
    assert hauls.limit.allowed(shelf.now) == before + len(haul.slots)


def test_what_comes_back_is_begun_in_any_case(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8, 9, 9)
    shelf.carry()
    assert isinstance(shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=9.0), Waiting)
    haul, *_ = shelf.restores()
    shelf.now += 100.0
    shelf.cache.expire(now=shelf.now)
    assert not shelf.cache.spare(haul.id), "its blocks are the porter's until he has ended"


def test_a_slot_is_lent_to_nobody_while_a_haul_is_busy_with_it() -> None:
    tier = Tier(2, 8)
    slots = tier.take(2)
    tier.let_go(slots)
    assert not tier.take(1), "who writes there has not ended"
    tier.written(slots, 2)
    assert len(tier.take(2)) == 2


def test_what_was_buried_first_is_given_up_first_although_its_parent_came_later() -> None:
    shelf = Shelf(num_blocks=8, host=8, ahead=2, piece=1)
    shelf.store(1, 1, 2, 2, 3, 3)
    shelf.store(4, 4, 5, 5, 6, 6)
    shelf.store(7, 7)
    shelf.carry()  # [3 3] goes down
    shelf.store(1, 1, 2, 2)
    hauls = shelf.cache._lessor.hauls
    assert hauls is not None
    for token in range(10, 40):
        shelf.store(token, token)
        shelf.carry()
        if hauls.tier.num_given_up:
            break
    told = shelf.cache.explain(SPACE, pack([1, 1, 2, 2, 3, 3, 9]), now=shelf.now)
    assert told.ledger.hit + told.num_below == 4, "only [3 3] is gone"


def test_a_restore_that_takes_too_long_is_waited_for_no_longer(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=500.0)
    (haul,) = shelf.restores()
    due = shelf.cache.next_deadline()
    assert due is not None
    assert due < shelf.now + 1.0
    shelf.now = due + 0.001
    shelf.cache.expire(now=shelf.now)
    assert shelf.outcome().num_cached == 2
    shelf.cache.hauled(haul.id, 2, 9.0, now=shelf.now)
    shelf.cache.check()
    assert shelf.cache.lookup(SPACE, pack([1, 1, 2, 2, 3, 3, 9])).num_hit == 6


def test_the_death_of_the_porter_gives_back_all_that_he_had(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=500.0)
    late = shelf.hauls()
    shelf.cache.set_porter(is_there=False, now=shelf.now)
    shelf.cache.check()
    grant = shelf.outcome()
    assert (grant.num_cached, grant.ledger.restored) == (2, 0)
    shelf.cache.release(ME, grant.lease, now=shelf.now)
    assert shelf.cache.num_leases == 0
    for haul in late:
        shelf.cache.hauled(haul.id, len(haul.slots), 0.01, now=shelf.now)
    shelf.cache.check()
    assert not shelf.hauls(), "nobody is there who could move anything"
    shelf.cache.set_porter(is_there=True, now=shelf.now)
    assert isinstance(shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=5.0), Waiting), "the slots are kept"


def test_pinned_blocks_do_not_go_down_ahead_of_need() -> None:
    shelf = Shelf(num_blocks=8, ahead=4, piece=1)
    shelf.store(1, 1, 2, 2)
    shelf.store(3, 3)
    shelf.cache.pin(SPACE, pack([1, 1, 2, 2]), ttl_s=100.0, now=shelf.now)
    shelf.store(4, 4, 5, 5, 6, 6)
    shelf.carry()
    assert shelf.cache.lookup(SPACE, pack([1, 1, 2, 2, 9])).num_hit == 4
    grant = shelf.acquire(*range(20, 27))
    assert isinstance(grant, Grant)
    shelf.carry()
    assert shelf.cache.lookup(SPACE, pack([1, 1, 2, 2, 9])).num_hit == 4


def test_what_was_reset_makes_room_before_what_is_older() -> None:
    shelf, other = Shelf(num_blocks=4, host=4, ahead=2, piece=1), Namespace("other")
    shelf.cache.attach(ME, other, now=0.0)
    shelf.store(1, 1, 2, 2)
    for first in (3, 5):
        grant = shelf.cache.acquire(ME, other, pack([first, first]), now=shelf.now)
        assert isinstance(grant, Grant)
        shelf.cache.commit(ME, grant.lease, 2, now=shelf.now)
        shelf.cache.release(ME, grant.lease, now=shelf.now)
        shelf.carry()
    shelf.store(7, 7)
    shelf.carry()
    shelf.store(8, 8)
    shelf.carry()
    assert shelf.cache.counts(now=shelf.now).host_used == 4
    shelf.cache.reset(other)
    for first in (20, 21):
        shelf.store(first, first)
        shelf.carry()
    told = shelf.cache.explain(SPACE, pack([1, 1, 2, 2, 9]), now=shelf.now)
    assert told.num_below == 4


def test_what_was_reset_is_found_below_by_nobody(shelf: Shelf) -> None:
    shelf.store(7, 7, 8, 8)
    shelf.carry()
    shelf.acquire(1, 1, 2, 2, 3, 3, 9, wait_s=5.0)
    (haul,) = shelf.restores()
    shelf.cache.reset(SPACE)
    shelf.cache.check()
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()
    for _, grant in shelf.cache.take_outcomes():
        assert isinstance(grant, Grant)
        assert grant.num_cached == 0
        shelf.cache.release(ME, grant.lease, now=shelf.now)
    for first in range(20, 60, 2):  # its slots are the first to be used for others
        shelf.store(first, first)
        shelf.carry()
    assert shelf.cache.counts(now=shelf.now).host_used == 8


@pytest.mark.parametrize(
    "sizes", [TierSizes(8, 0), TierSizes(8, 8), TierSizes(8, 9), TierSizes(8, 2, 0)]
)
def test_a_pool_keeps_some_blocks_free_and_not_all(sizes: TierSizes) -> None:
    with pytest.raises(InvalidRequest, match="kept free"):
        PrefixCache(8, 2, tiers=sizes)


# ---------------------------------------------------------------------- on to the disk


def three_tiers(**sizes: float) -> Shelf:
    """Six blocks of which two are kept free, four slots in memory of which two, eight on disk."""
    return Shelf(num_blocks=6, host=4, ahead=2, piece=2, disk=8, host_ahead=2, **sizes)


def test_at_the_end_of_a_service_all_that_is_cached_goes_to_disk() -> None:
    shelf = Shelf(num_blocks=6, host=4, ahead=2, piece=2, disk=20, host_ahead=2)
    for first in (10, 20, 30, 40):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    held = shelf.acquire(50, 50)
    shelf.cache.put_down()
    assert shelf.cache.num_above_disk > 0
    shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.indexed, told.host_used, told.disk_used) == (0, 0, 8)
    assert shelf.cache.num_above_disk == 0, "but for what a lease holds"
    assert isinstance(held, Grant)
    for first in (10, 20, 30, 40):
        assert shelf.below(first, first, first + 1, first + 1) == (4, 4)


def test_what_a_full_disk_has_no_room_for_at_the_end_is_the_oldest() -> None:
    shelf = Shelf(num_blocks=6, host=4, ahead=2, piece=2, disk=4, host_ahead=2)
    for first in (10, 20, 30, 40):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    shelf.cache.put_down()
    shelf.carry()
    assert shelf.cache.num_above_disk == 0
    assert shelf.below(40, 40, 41, 41) == (4, 4)
    assert shelf.below(30, 30, 31, 31) == (4, 4)
    assert shelf.below(10, 10, 11, 11) == (0, 0)


def test_a_porter_who_ends_while_all_goes_to_disk_takes_little_with_him() -> None:
    shelf = Shelf(num_blocks=40, host=0, ahead=2, piece=2, disk=60)
    for first in range(10, 25):
        shelf.store(first, first, first + 100, first + 100)
    shelf.cache.put_down()
    assert 0 < sum(len(haul.blocks) for haul in shelf.hauls()) <= 8
    shelf.cache.set_porter(is_there=False, now=shelf.now)
    shelf.cache.set_porter(is_there=True, now=shelf.now)
    shelf.carry()
    assert shelf.cache.num_above_disk == 0
    assert shelf.cache.counts(now=shelf.now).disk_used >= 30 - 8


def test_what_waits_for_the_limit_of_a_disk_is_told_from_what_stays_where_it_is() -> None:
    shelf = Shelf(num_blocks=40, host=0, ahead=2, piece=2, disk=60, disk_per_s=4.0)
    for first in range(10, 25):
        shelf.store(first, first, first + 100, first + 100)
    shelf.cache.pin(SPACE, pack([10, 10, 110, 110]), ttl_s=1000.0, now=shelf.now)
    shelf.cache.put_down()
    shelf.carry()
    assert shelf.cache.waits_to_write(shelf.now)
    for _ in range(20):
        shelf.now += 1.0
        shelf.carry()
    assert shelf.cache.num_above_disk == 2, "what is pinned"
    assert not shelf.cache.waits_to_write(shelf.now)


def test_the_oldest_blocks_go_on_to_disk_before_their_room_is_needed() -> None:
    shelf = three_tiers()
    for first in (10, 20, 30, 40):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.host_used, told.disk_used) == (2, 2, 2)
    assert (told.sunk, told.disk_written, told.disk_moved) == (4, 2, 2)
    assert shelf.below(10, 10, 11, 11) == (4, 4)
    assert shelf.below(20, 20, 21, 21) == (4, 0)


def test_what_lies_on_disk_comes_back_at_once_and_not_by_way_of_memory() -> None:
    shelf = three_tiers()
    for first in (10, 20, 30, 40):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    waiting = shelf.acquire(10, 10, 11, 11, 12, wait_s=5.0)
    assert isinstance(waiting, Waiting)
    (haul,) = shelf.restores()
    assert min(haul.slots) >= 4, "slots of memory come first"
    shelf.cache.hauled(haul.id, 2, 0.01, now=shelf.now)
    grant = shelf.outcome()
    assert (grant.num_cached, grant.ledger.restored) == (4, 4)
    told = shelf.cache.counts(now=shelf.now)
    assert (told.restored, told.disk_restored) == (2, 2)
    assert told.disk_used == 2, "others went on for them"


def moving() -> tuple[Shelf, Haul]:
    """Blocks [10 10 11 11] are on their way from memory to the disk."""
    shelf = three_tiers()
    for first in (10, 20, 30):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    shelf.store(40, 40, 41, 41)
    down, move = shelf.hauls()
    assert down.tokens
    assert (list(move.blocks), move.tokens, len(move.sources)) == ([], b"", 2)
    assert max(move.sources) < 4 <= min(move.slots)
    shelf.cache.check()
    return shelf, move


def test_what_could_not_be_written_to_disk_stays_in_memory() -> None:
    shelf, move = moving()
    shelf.cache.hauled(move.id, 1, 0.01, now=shelf.now)
    shelf.cache.check()
    assert shelf.below(10, 10, 11, 11) == (4, 2)


def test_what_is_read_on_its_way_to_disk_is_read_in_memory_and_stays_there() -> None:
    shelf, move = moving()
    assert isinstance(shelf.acquire(10, 10, 11, 11, 12, wait_s=5.0), Waiting)
    (up,) = shelf.restores()
    assert sorted(up.slots) == sorted(move.sources)
    shelf.cache.hauled(move.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()
    assert shelf.below(10, 10, 11, 11) == (0, 0), "it is being read"
    shelf.cache.hauled(up.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()
    assert shelf.outcome().num_cached == 4


def test_the_death_of_the_porter_leaves_what_was_moving_where_it_was() -> None:
    shelf, move = moving()
    shelf.cache.set_porter(is_there=False, now=shelf.now)
    shelf.cache.set_porter(is_there=True, now=shelf.now)
    shelf.cache.check()
    assert shelf.below(10, 10, 11, 11) == (4, 0)
    shelf.cache.hauled(move.id, 2, 0.01, now=shelf.now)
    assert shelf.below(10, 10, 11, 11) == (4, 0), "too late"


def test_what_was_reset_while_it_was_moving_leaves_no_slot_behind() -> None:
    shelf, move = moving()
    shelf.cache.reset(SPACE)
    for first in range(50, 80):
        shelf.store(first, first)
        shelf.cache.hauls(now=shelf.now)
        shelf.cache.check()
    shelf.cache.hauled(move.id, 2, 0.01, now=shelf.now)
    shelf.cache.check()


def test_nothing_goes_to_a_disk_that_fails_and_memory_keeps_the_youngest() -> None:
    shelf = three_tiers()
    shelf.cache.hold_disk(until=50.0)
    for first in (10, 20, 30, 40, 50):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.host_used, told.disk_used) == (2, 4, 0)
    assert shelf.below(10, 10, 11, 11) == (0, 0)
    assert shelf.below(20, 20, 21, 21) == (4, 0)
    assert shelf.below(30, 30, 31, 31) == (4, 0)
    shelf.now = 50.0
    shelf.carry()
    assert shelf.cache.counts(now=shelf.now).disk_used == 2


def test_a_disk_alone_that_fails_takes_nothing_and_nobody_waits_for_it() -> None:
    shelf = Shelf(num_blocks=6, host=0, ahead=2, piece=2, disk=8)
    shelf.cache.hold_disk(until=50.0)
    for first in (10, 20, 30, 40, 50):
        shelf.store(first, first, first + 1, first + 1)
        assert not shelf.hauls()
    shelf.cache.check()


def test_no_more_goes_to_disk_than_is_allowed() -> None:
    shelf = Shelf(num_blocks=6, host=0, ahead=2, piece=2, disk=100, disk_per_s=0.5)
    for first in range(10, 50, 2):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert told.evicted >= 30
    assert 5 <= told.disk_written <= 2 + 0.5 * shelf.now


def test_a_copy_that_failed_gives_its_slot_of_memory_up_before_it_is_the_oldest() -> None:
    shelf = three_tiers()
    for first in (10, 15, 20):
        shelf.store(first, first, first + 1, first + 1)
    shelf.carry(good=0)
    assert shelf.cache.counts(now=shelf.now).host_used == 2
    for first in (30, 40, 50):
        shelf.store(first, first, first + 1, first + 1)
        shelf.carry()
    assert shelf.below(20, 20, 21, 21) == (4, 4)
    told = shelf.cache.counts(now=shelf.now)
    assert (told.host_used, told.disk_used) == (2, 4)


# ---------------------------------------------------------------------- one larger pool

CHAT = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@settings(max_examples=200)
@given(
    pool=st.integers(1, 6),
    host=st.integers(0, 8),
    disk=st.integers(0, 8),
    ghosts=st.sampled_from([None, 0, 3]),
    chats=st.lists(st.tuples(CHAT, st.integers(0, 14)), min_size=1, max_size=40),
)
def test_a_pool_and_its_tiers_hold_what_one_pool_of_their_size_does(
    pool: int, host: int, disk: int, ghosts: int | None, chats: list[tuple[list[int], int]]
) -> None:
    assume(host + disk)
    longest = pool
    stack, flat = Stack(pool, host, longest, 2, ghosts, disk), Replay(pool + host + disk, 2)
    for tokens, asked in chats:
        kept = pack(tokens)[: longest * 8]
        kept = kept[: len(kept) // 8 * 8]
        prompt = pack(tokens)[: max(1, asked) * TOKEN_BYTES]
        found, _ = flat.request(SPACE, prompt, kept)
        assert stack.request(SPACE, prompt, kept) == found
        stack.cache.check()


def test_tails_go_before_whole_blocks_and_never_below() -> None:
    shelf = Shelf(num_blocks=8, ahead=4, piece=1, partial=Partial.TAILS)
    shelf.store(1, 1, 2, 2, 3)
    shelf.carry()
    shelf.store(4, 4, 5, 5, 6)
    shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.indexed, told.host_used) == (4, 4, 0), "the tails have gone"
    assert shelf.cache.lookup(SPACE, pack([1, 1, 2, 2, 3, 9])).num_hit == 4
    shelf.store(7, 7, 8)
    shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.indexed, told.host_used) == (4, 4, 1), "a tail, and the oldest block"
    assert shelf.cache.explain(SPACE, pack([1, 1, 2, 2, 3, 9]), now=shelf.now).num_below == 2


def test_tails_within_a_guaranteed_share_do_not_go_ahead_of_need() -> None:
    shelf = Shelf(num_blocks=8, ahead=4, piece=1, partial=Partial.TAILS)
    shelf.cache.set_quota(SPACE, max_held=None, guaranteed=8, now=0.0)
    shelf.store(1, 1, 2, 2, 3)
    shelf.store(4, 4, 5, 5, 6)
    for _ in range(3):
        shelf.carry()
    told = shelf.cache.counts(now=shelf.now)
    assert (told.free, told.indexed, told.host_used) == (2, 6, 0)
    assert isinstance(shelf.acquire(*range(20, 28)), Grant), "who needs blocks gets them"
    shelf.cache.check()
