"""What leaves the pool goes down, and comes back: by examples, and beside one larger pool."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from core.replay import Replay
from core.stack import Stack
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import Haul, TierSizes
from prefixcache.core.tiers import Tier
from prefixcache.errors import InvalidRequest
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, Waiting, WorkerId, pack

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
    ) -> None:
        self.cache = PrefixCache(
            num_blocks, 2, partial=partial, tiers=TierSizes(host, ahead, piece)
        )
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


# ---------------------------------------------------------------------- one larger pool

CHAT = st.lists(st.integers(0, 2), min_size=1, max_size=14)


@settings(max_examples=200)
@given(
    pool=st.integers(1, 6),
    host=st.integers(1, 8),
    ghosts=st.sampled_from([None, 0, 3]),
    chats=st.lists(st.tuples(CHAT, st.integers(0, 14)), min_size=1, max_size=40),
)
def test_a_pool_and_a_tier_hold_what_one_pool_of_their_size_does(
    pool: int, host: int, ghosts: int | None, chats: list[tuple[list[int], int]]
) -> None:
    longest = pool
    stack, flat = Stack(pool, host, longest, 2, ghosts), Replay(pool + host, 2)
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
