"""The tree by example: the drawings at the head of `radix.py`, one test each."""

from array import array
from collections import Counter

import pytest

from prefixcache.core.node import Node, Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import Namespace, pack

S, A, B = 1, 2, 3


class Shelf:
    """A tree, one root, and blocks numbered as they are stored."""

    def __init__(self, block_size: int = 4, num_ghosts: int = 0) -> None:
        self.tree = RadixTree(block_size, num_ghosts=num_ghosts)
        self.root = Root(Namespace("chat"))
        self.next = 0
        self.locks: Counter[Node] = Counter()

    def store(self, tokens: list[int], *, release: bool = True) -> Node:
        """Lock what is stored, index the rest (the tail as a leaf of its own), unlock."""
        key = pack(tokens)
        match = self.tree.match(self.root, key)
        node = self.tree.lock(match)
        whole = len(key) - len(key) % self.tree.block_bytes
        count = (whole - match.end) // self.tree.block_bytes
        blocks = array("i", range(self.next, self.next + count))
        self.next += count
        node = self.tree.insert(node, key[match.end : whole], blocks).node
        tail = None
        if whole < len(key):
            tail, _ = self.tree.insert_tail(node, key[whole:], array("i", [self.next]))
            self.next += tail is not None
        if release:
            self.tree.unlock(node, tail)
        else:
            self.locks[node] += 1
        self.tree.check([self.root], self.locks)
        return node

    def find(self, tokens: list[int]) -> tuple[int, int]:
        match = self.tree.match(self.root, pack(tokens))
        return match.end // 4, match.partial_tokens

    def runs(self) -> list[list[int]]:
        found, stack = [], list(self.root.children)
        while stack:
            node = stack.pop()
            found.append(node.blocks.tolist())
            stack.extend(node.children)
        return sorted(found)


def test_a_stored_chat_is_one_run_and_its_tail():
    shelf = Shelf()
    shelf.store([S] * 6 + [A, A, A])
    assert shelf.runs() == [[0, 1], [2]]
    assert shelf.find([S] * 6 + [A, A, A]) == (8, 1)
    assert shelf.find([S] * 5 + [B]) == (4, 1)


def test_a_prompt_that_parts_inside_a_block_splits_the_run_where_the_block_begins():
    shelf = Shelf()
    shelf.store([S] * 6 + [A, A])
    shelf.store([S] * 6 + [B, B])
    assert shelf.runs() == [[0], [1], [2]]
    assert shelf.find([S] * 6 + [B, A]) == (4, 3)


def test_matching_changes_nothing():
    shelf = Shelf()
    shelf.store([S] * 8)
    before = shelf.runs(), shelf.tree.clock, shelf.tree.num_nodes
    shelf.find([S] * 6 + [A])
    assert (shelf.runs(), shelf.tree.clock, shelf.tree.num_nodes) == before


def test_the_limit_leaves_the_last_token_to_be_computed():
    shelf = Shelf()
    shelf.store([S] * 8)
    key = pack([S] * 8)
    match = shelf.tree.match(shelf.root, key, len(key) - 4)
    assert (match.end // 4, match.partial_tokens, match.partial_block) == (4, 3, 1)


def test_a_fuller_sibling_absorbs_a_tail():
    shelf = Shelf()
    shelf.store([S] * 4 + [A])
    shelf.store([S] * 4 + [A, A, A])
    assert shelf.find([S] * 4 + [A, A, A]) == (4, 3)
    assert shelf.tree.num_blocks == 2


def test_a_locked_tail_is_absorbed_when_it_is_unlocked():
    shelf = Shelf()
    node = shelf.store([S] * 4)
    shelf.tree.lock_node(node)
    tail, _ = shelf.tree.insert_tail(node, pack([A]), array("i", [7]))
    assert tail is not None
    match = shelf.tree.match(shelf.root, pack([S] * 4))
    other = shelf.tree.insert(shelf.tree.lock(match), pack([A] * 4), array("i", [8])).node
    assert shelf.tree.num_blocks == 3
    assert shelf.tree.leave_tail(tail) == array("i", [7])
    shelf.tree.unlock(other)
    shelf.tree.unlock(node)
    shelf.tree.check([shelf.root], {})
    assert shelf.find([S] * 4 + [A] * 4) == (8, 0)


def test_eviction_trims_the_coldest_leaf_from_its_end_and_frees_exactly_what_was_asked():
    shelf = Shelf()
    shelf.store([S] * 12)
    shelf.store([A] * 12)
    assert shelf.tree.evict(2).tolist() == [1, 2]
    assert shelf.find([S] * 12) == (4, 0)
    assert shelf.find([A] * 12) == (12, 0)
    assert shelf.tree.evict(100).tolist() == [0, 3, 4, 5]
    shelf.tree.check([shelf.root], {})


def test_what_is_locked_is_never_evicted():
    shelf = Shelf()
    node = shelf.store([S] * 8, release=False)
    shelf.store([A] * 4)
    assert shelf.tree.evict(10).tolist() == [2]
    shelf.tree.unlock(node)
    assert shelf.tree.evict(10).tolist() == [0, 1]


def test_locking_inside_a_run_lets_the_unused_part_keep_its_age():
    shelf = Shelf()
    shelf.store([S] * 8)
    shelf.store([A] * 4)
    shelf.tree.unlock(shelf.tree.lock(shelf.tree.match(shelf.root, pack([S] * 4))))
    # The second half of the first run is oldest now, then the other run, then the half just used.
    assert shelf.tree.evict(1).tolist() == [1]
    assert shelf.tree.evict(1).tolist() == [2]
    assert shelf.tree.evict(1).tolist() == [0]


def test_a_node_left_with_one_child_of_its_age_is_merged_again():
    shelf = Shelf()
    shelf.store([S] * 4 + [A] * 4)
    shelf.store([S] * 4 + [B] * 4)
    assert len(shelf.runs()) == 3
    shelf.tree.evict(1)
    assert shelf.runs() == [[0, 2]]
    shelf.tree.check([shelf.root], {})


def test_a_chat_that_goes_on_is_one_run_with_one_place_in_the_queue():
    shelf = Shelf()
    nodes = {shelf.store([S] * (4 * turn + turn % 4)) for turn in range(1, 9)}
    assert len(nodes) == 1
    assert shelf.tree.num_nodes == 1
    assert len(shelf.tree.queue) == 1
    shelf.store([B] * 4)
    shelf.store([S] * 32)  # the younger one now, whatever stands for it in the queue
    last = shelf.next - 1
    assert shelf.tree.evict(1).tolist() == [last]
    assert len(shelf.tree.evict(9)) == 8


def test_a_chat_that_goes_on_while_others_hold_its_beginning_leaves_them_that():
    shelf = Shelf()
    held = shelf.store([S] * 4, release=False)
    end = shelf.store([S] * 8)
    assert end is not held
    assert shelf.tree.evict(9).tolist() == [1]
    assert held.blocks.tolist() == [0]


def test_a_ghost_remembers_what_was_evicted_until_it_is_stored_again():
    shelf = Shelf(num_ghosts=10)
    shelf.store([S] * 8)
    shelf.tree.evict(2)
    match = shelf.tree.match(shelf.root, pack([S] * 8))
    assert match.end == 0
    assert shelf.tree.remembered(match, pack([S] * 6 + [A])) == 6 * 4
    shelf.store([S] * 8)
    assert shelf.tree.ghosts.num_blocks == 0
    assert shelf.find([S] * 8) == (8, 0)


def test_a_revived_prefix_keeps_the_ghosts_of_its_other_continuations():
    shelf = Shelf(num_ghosts=10)
    shelf.store([S] * 4 + [A] * 4)
    shelf.store([S] * 4 + [B] * 4)
    shelf.tree.evict(3)
    shelf.store([S] * 4 + [A] * 4)
    match = shelf.tree.match(shelf.root, pack([S] * 4 + [B] * 4))
    assert shelf.tree.remembered(match, pack([S] * 4 + [B] * 4)) == 4 * 4


def test_ghosts_are_bounded_and_the_oldest_are_forgotten_first():
    shelf = Shelf(num_ghosts=2)
    for token in range(1, 6):
        shelf.store([token] * 4)
    shelf.tree.evict(5)
    assert shelf.tree.ghosts.num_blocks == 2
    known = [
        bool(shelf.tree.remembered(shelf.tree.match(shelf.root, pack([t] * 4)), pack([t] * 4)))
        for t in range(1, 6)
    ]
    assert known == [False, False, False, True, True]


def test_retired_trees_are_evicted_first():
    shelf = Shelf()
    shelf.store([S] * 8)
    shelf.tree.drop_namespace(shelf.root)
    shelf.root = Root(Namespace("chat"))
    shelf.store([A] * 4)
    assert shelf.find([S] * 8) == (0, 0)
    assert sorted(shelf.tree.evict(2)) == [0, 1]
    assert shelf.find([A] * 4) == (4, 0)


@pytest.mark.parametrize("fan_out", [1, 2, 40, 700])
def test_the_best_partial_block_is_found_among_any_number_of_siblings(fan_out: int):
    shelf = Shelf(block_size=4)
    for index in range(fan_out):
        shelf.store([S, S, S, S, S, index, index, index])
    wanted = fan_out // 2
    assert shelf.find([S] * 5 + [wanted, wanted, 9999]) == (4, 3)


def test_what_is_evicted_beside_a_path_leaves_it_whole_and_as_evictable_as_it_was():
    shelf = Shelf()
    kept = shelf.store([S] * 8)
    shelf.store([A] * 8)
    shelf.store([B] * 8)
    assert shelf.tree.evict_beside(kept, 6).tolist() == [2, 3, 4, 5], "and nothing of what is kept"
    shelf.tree.check([shelf.root], shelf.locks)
    assert shelf.runs() == [[0, 1]]
    assert shelf.tree.evict(2).tolist() == [0, 1]
