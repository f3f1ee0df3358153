"""What one life leaves on disk the next one finds, by its keys, and as nothing but what it is."""

from __future__ import annotations

import random
from array import array
from collections import Counter

import numpy as np
import pytest

from core.lives import SIZE, SPACES, Counted, Lives
from prefixcache.core.block_keys import BlockKeys
from prefixcache.core.cache import PrefixCache
from prefixcache.core.found import Found, Remains
from prefixcache.core.node import Root, Run
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.tiers import Tier
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace, pack

SPACE = SPACES[0]
SECRET = b"0123456789abcdef"


def remains(*slots: tuple[int, int, int]) -> Remains:
    """Write down what is in slots: key, slot, stamp."""
    keys = np.array([(key, key + 1) for key, _, _ in slots], np.uint64).reshape(-1, 2)
    numbers = np.array([slot for _, slot, _ in slots], np.int32)
    return Remains(keys, numbers, np.array([stamp for _, _, stamp in slots], np.int64))


def keys(*numbers: int) -> np.ndarray:
    return np.array([(key, key + 1) for key in numbers], np.uint64)


def alone(num_disk: int = 40) -> Lives:
    """Lives with a disk alone, to be led step by step."""
    return Lives(random.Random(1), num_disk, is_plain=True)


def chat(number: int) -> list[int]:
    """A prompt of four blocks and a token."""
    return [100 * number + at for at in range(4 * SIZE + 1)]


def restored(lives: Lives, number: int, space: Namespace = SPACE) -> int:
    """Ask for a chat; give how many of its blocks come back from below."""
    before = lives.seen["restored"]
    lives.ask_for(space, chat(number), wait_s=9.0)
    lives.settle()
    lives.cache.check()
    return lives.seen["restored"] - before


def filled(lives: Lives, count: int = 8) -> None:
    """Have the porter carry the blocks of so many chats down, as far as they do not fit."""
    for number in range(count):
        lives.ask_for(SPACE, chat(number))
        lives.settle()


def test_what_a_life_left_on_disk_the_next_one_finds_and_reads() -> None:
    lives = alone()
    filled(lives)
    used = lives.cache.counts(now=0.0).disk_used
    assert used > 8
    assert lives.begin() == used
    told = lives.cache.counts(now=0.0)
    assert (told.disk_used, told.disk_found) == (used, used)
    assert restored(lives, 0) == 4
    assert lives.seen["read"] >= 4
    assert lives.cache.counts(now=0.0).disk_found == used - 4


def test_explain_says_what_an_earlier_life_left() -> None:
    lives = alone()
    filled(lives)
    lives.begin()
    told = lives.cache.explain(SPACE, pack(chat(0)), now=0.0)
    assert [(one.tier, one.start, one.end) for one in told.below] == [("disk", 0, 8)]
    assert not lives.cache.explain(Namespace("another"), pack(chat(0)), now=0.0).below


def test_nobody_finds_what_was_reset_before_the_restart_or_after_it() -> None:
    lives = alone()
    filled(lives)
    lives.reset(SPACE)
    assert lives.begin() > 8
    assert restored(lives, 0) == 0
    lives = alone()
    filled(lives)
    lives.begin()
    fresh = PrefixCache(8, SIZE)
    fresh.reset(SPACE)  # without a disk nothing is counted
    lives.reset(SPACE)
    assert restored(lives, 0) == 0
    assert lives.resets.of(SPACE) == 1


def test_after_a_reset_of_all_nothing_counts_as_found_and_its_slots_are_free() -> None:
    lives = alone()
    filled(lives)
    lives.begin()
    lives.ask_for(SPACE, chat(0), wait_s=9.0)  # and some of it is on its way back
    lives.cache.forget_found()
    lives.settle()
    lives.cache.check()
    assert lives.cache.counts(now=0.0).disk_found == 0
    assert restored(lives, 1) == 0
    filled(lives)
    assert restored(lives, 0) == 4
    assert not lives.cache.counts(now=0.0).spoilt


def test_a_reset_of_a_namespace_that_nobody_has_attached_since_counts() -> None:
    lives = alone()
    filled(lives)
    lives.begin()
    lives.cache.reset(Namespace("nobody's"))
    assert lives.resets.of(Namespace("nobody's")) == 1


def test_another_namespace_finds_nothing_under_the_same_tokens() -> None:
    lives = alone()
    filled(lives)
    lives.begin()
    assert restored(lives, 0, SPACES[1]) == 0
    assert restored(lives, 0, SPACES[2]) == 0
    assert restored(lives, 0) == 4


def test_what_is_behind_a_gap_is_found_once_the_gap_is_computed() -> None:
    lives = alone()
    filled(lives)
    first = [slot for slot, held in lives.disk.items() if held.tokens == pack(chat(0)[:SIZE])]
    for slot in first:
        del lives.disk[slot]
    lives.begin()
    assert restored(lives, 0) == 0
    lives.begin()
    lives.ask_for(SPACE, chat(0)[: SIZE + 1])
    lives.settle()
    assert restored(lives, 0) == 3


def test_a_chat_that_parts_inside_a_run_finds_its_own_end() -> None:
    lives = alone()
    other = [*chat(0)[: 2 * SIZE], *range(900, 905)]
    for prompt in (chat(0), other):
        lives.ask_for(SPACE, prompt)
        lives.settle()
    filled(lives)
    lives.begin()
    lives.ask_for(SPACE, [*chat(0)[: 2 * SIZE], 7, 7, 7, 7, 7])
    lives.settle()
    before = lives.seen["restored"]
    lives.ask_for(SPACE, other, wait_s=9.0)
    lives.settle()
    assert lives.seen["restored"] - before == 2


def test_the_oldest_of_what_was_found_goes_before_anything_of_this_life() -> None:
    tier = Tier(0, 8, num_disk=6)
    assert tier.adopt(remains((10, 3, 7), (20, 0, 9), (30, 5, 8))) == 3
    assert len(tier.take(3, num_disk=9)) == 3
    assert tier.find(keys(20)).tolist() != []
    assert len(tier.take(1, num_disk=9)) == 1
    assert not tier.find(keys(10))
    assert tier.find(keys(30))
    assert len(tier.take(1, num_disk=9)) == 1
    assert not tier.find(keys(30))
    assert tier.find(keys(20))
    assert (tier.num_found, tier.num_given_up) == (1, 2)
    assert len(tier.take(9, num_disk=9)) == 1
    assert tier.num_found == 0
    assert not tier.find(keys(20))


def test_of_two_slots_with_the_same_block_the_newer_one_counts() -> None:
    tier = Tier(0, 8, num_disk=6)
    assert tier.adopt(remains((10, 3, 7), (10, 4, 9), (10, 5, 8))) == 1
    (place,) = tier.find(keys(10))
    assert tier.slots(array("i", [place])).tolist() == [4]
    assert tier.stamps(array("i", [place])).tolist() == [9]
    tier.check([], array("i"), array("i"))


def test_stamps_go_on_where_the_last_life_ended() -> None:
    lives = alone()
    filled(lives)
    before = dict(lives.disk)
    lives.begin()
    filled(lives, 4)
    new = [held.stamp for slot, held in lives.disk.items() if before.get(slot) is not held]
    assert new
    assert min(new) > max(held.stamp for held in before.values())


def test_of_blocks_in_a_row_the_last_ones_are_given_up_first() -> None:
    lives = alone()
    filled(lives)
    stamps = {held.tokens: held.stamp for held in lives.disk.values()}
    whole = pack(chat(0))
    width = SIZE * 4
    own = [stamps[whole[at : at + width]] for at in range(0, 4 * width, width)]
    assert own == sorted(own, reverse=True)


def test_what_is_found_up_to_a_gap() -> None:
    tier = Tier(0, 8, num_disk=6)
    tier.adopt(remains((10, 3, 7), (20, 0, 9), (30, 5, 8)))
    assert len(tier.find(keys(10, 20, 30))) == 3
    assert len(tier.find(keys(10, 40, 30))) == 1
    assert not tier.find(keys(40, 10))
    both = np.array([(10, 12)], np.uint64)
    assert not tier.find(both), "half of a key is none"
    places = tier.find(keys(10, 20))
    tier.begin_reading(places)
    assert not tier.find(keys(10)), "somebody is fetching it"
    tier.end_reading(places, 1)
    assert len(tier.find(keys(10, 20))) == 1, "the other one was not what it should be"


def test_what_cannot_be_taken_over_is_refused() -> None:
    tier = Tier(2, 8, num_disk=4, host_ahead=1)
    for slot in (-1, 4):
        with pytest.raises(ValueError, match="of 4"):
            tier.adopt(remains((10, slot, 7)))
    assert tier.adopt(remains()) == 0
    tier.take(1)
    with pytest.raises(ValueError, match="in use"):
        tier.adopt(remains((10, 0, 7)))
    nothing = Remains(*remains())
    with pytest.raises(InvalidRequest, match="no tier on a disk"):
        PrefixCache(8, SIZE).keep_below(SECRET, Counted(), nothing, print)
    with pytest.raises(InvalidRequest, match="at least 16"):
        BlockKeys(b"short", SIZE, Counted())


def test_what_goes_down_anew_takes_the_place_of_what_was_found_of_it() -> None:
    lives = alone(num_disk=80)
    filled(lives)
    found = lives.begin()
    lives.ask_for(SPACE, chat(0))  # who does not wait computes it
    for number in range(20, 24):
        lives.ask_for(SPACE, chat(number))
        lives.settle()
    assert lives.cache.counts(now=0.0).disk_found == found - 4
    lives.cache.check()
    assert restored(lives, 0) == 4


def test_a_full_disk_is_found_whole_and_makes_room_for_what_comes() -> None:
    lives = alone(num_disk=12)
    filled(lives, 20)
    assert lives.cache.counts(now=0.0).disk_used == 12
    assert lives.begin() == len(lives.disk)
    filled(lives, 20)
    lives.cache.check()
    told = lives.cache.counts(now=0.0)
    assert told.disk_used == 12
    assert told.disk_found < 12


# ---------------------------------------------------------------------- keys


def test_keys_are_the_same_however_a_run_is_cut() -> None:
    whole = BlockKeys(SECRET, 4, Counted())
    tokens = pack(range(40_000))
    start = whole.start(SPACE)
    told = whole.go_on(start, 0, tokens)
    assert told.shape == (10_000, 2)
    assert len({tuple(one) for one in told.tolist()}) == 10_000
    again = BlockKeys(SECRET, 4, Counted())
    cut = 4 * 4 * 1000
    first = again.go_on(again.start(SPACE), 0, tokens[:cut])
    assert (told[:1000] == first).all()
    assert (told[1000:] == again.go_on(first[-1:], 4000, tokens[cut:])).all()
    assert (again.end(again.start(SPACE), 0, tokens[:cut]) == first[-1]).all()


def test_no_more_slots_are_taken_than_places_while_the_disk_is_full_and_fails() -> None:
    tier = Tier(8, 4, num_disk=8, host_ahead=2)  # a place for each but two of their slots
    tier.adopt(remains(*((slot, slot, slot + 1) for slot in range(8))))
    root = Root(SPACE)
    for number in range(1, 6):
        ghost = Run(pack([number]), array("i"), root, 0)
        ghost.burial = number
        ghost.places = tier.take(1, 0)
        tier.written(ghost.places, 1)
        tier.enter(ghost)
    assert tier.num_free == 1
    taken = tier.take(4, 0)
    assert len(set(tier.slots(taken))) == len(taken) == 4
    assert tier.num_free == 0
    tier.give_back(taken)
    assert tier.num_free == 4


def test_keys_differ_by_place_namespace_secret_and_reset() -> None:
    counted = Counted()
    own = BlockKeys(SECRET, 4, counted)

    def of(keys: BlockKeys, space: Namespace, tokens: list[int]) -> list[list[int]]:
        return keys.go_on(keys.start(space), 0, pack(tokens)).tolist()

    told = of(own, SPACE, [5] * 8)
    assert told[0] != told[1]
    assert of(own, SPACE, [0] * 8)[0] != of(own, SPACE, [0] * 4 + [1] * 4)[1]
    named = ("ab", "c"), ("a", "bc"), ("a", "b", "c"), ("a", "", "b", "c")
    spaces = [*(Namespace(*one) for one in named), Namespace("ab", "c", approximate=True)]
    assert len({repr(of(own, space, [1] * 4)) for space in spaces}) == len(spaces)
    assert of(BlockKeys(SECRET + b"x", 4, counted), SPACE, [5] * 8) != told
    assert of(BlockKeys(SECRET, 4, counted), SPACE, [5] * 8) == told
    counted.advance(SPACE)
    assert of(own, SPACE, [5] * 8) != told


def test_zero_is_a_token_like_any_other() -> None:
    own = BlockKeys(SECRET, 1, Counted())
    start = own.start(SPACE)
    told = own.go_on(start, 0, pack([0, 0, 0, 2**32 - 1])).tolist()
    assert len({tuple(one) for one in [*told, *start.tolist()]}) == 5


def test_the_key_of_what_follows_a_node_is_that_of_its_path() -> None:
    tree, root, own = RadixTree(2), Root(SPACE), BlockKeys(SECRET, 2, Counted())
    at = tree.lock(tree.match(root, b""))
    node = tree.insert(at, pack([1, 2, 3, 4]), array("i", [0, 1])).node
    tree.insert(tree.lock(tree.match(root, pack([1, 2, 9]))), pack([7, 7]), array("i", [2]))
    path = pack([1, 2, 3, 4, 5, 6, 7, 8])
    due = own.go_on(own.start(SPACE), 0, path)
    for _ in range(2):
        assert (own.behind(node, pack([5, 6, 7, 8])) == due[2:]).all()
    own.forget()
    assert (own.behind(root, path) == due).all()


def test_what_found_gives_is_the_oldest_first_and_once() -> None:
    stamps = np.array([5, 1, 9])
    found = Found(keys(1, 2, 3), np.array([7, 8, 9], np.int32), stamps)
    assert found.next_oldest(2).tolist() == [8, 7]
    assert found.next_oldest(2).tolist() == [9]
    assert found.next_oldest(2).tolist() == []


# ---------------------------------------------------------------------- lives


@pytest.mark.walk
@pytest.mark.parametrize("seed", range(12))
def test_however_lives_end_nobody_reads_what_is_not_his(seed: int) -> None:
    """Every block that is read is the one that was computed from these tokens, and after the last
    reset; whatever became of those who wrote it, or of the disk."""
    draw, seen = random.Random(seed), Counter[str]()
    for _ in range(6):
        lives = Lives(draw, draw.randrange(1, 40))
        for _ in range(8):
            for step in range(150):
                lives.step()
                if step % 25 == 0:
                    lives.cache.check()
            lives.cache.check()
            while draw.random() < 0.5:
                lives.spoil()
            lives.kill()
        seen += lives.seen
    assert all(seen[name] for name in ("from before", "restored", "read", "abandoned")), seen
