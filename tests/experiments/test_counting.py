"""The replay counts what docs/experiments.md says, to the last token.

`PREFIXCACHE_CONFIGURATIONS=100000` draws more than the thousand of every run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from random import Random
from typing import Any

import pytest

from experiments.naive_pool import NaivePool
from prefixcache.types import Namespace, Partial, pack
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace

COUNT = int(os.environ.get("PREFIXCACHE_CONFIGURATIONS", "1000"))
MOST_OUTCOMES = 1000


def drawn(random: Random) -> tuple[list[tuple[list[int], int]], int, int | None]:
    """Draw sequences with their prompts, a block size and a capacity in blocks."""
    size = random.choice([1, 2, 4, 8, 16, 32])
    words = random.choice([2, 3, 50])
    sequences: list[list[int]] = []
    for _ in range(random.randint(2, 25)):
        old = random.choice(sequences) if sequences and random.random() < 0.7 else []
        kept = old[: random.randint(0, len(old))]
        fresh = [
            random.randrange(words) for _ in range(random.randint(0 if kept else 1, 2 * size + 9))
        ]
        sequences.append(kept + fresh)
    capacity = random.choice([1, 2, 3, 4, 5, 8, 13, 40, None])
    return [(one, random.randint(1, len(one))) for one in sequences], size, capacity


def counted(
    sequences: list[tuple[list[int], int]], size: int, capacity: int | None, mode: Partial
) -> tuple[int, int]:
    space = Namespace("m")
    trace = Trace("t", [Request(0.0, space, pack(one), n, n) for one, n in sequences])
    found = replay(trace, Configuration(size, capacity, partial=mode))
    return found.hit_tokens, found.partial_tokens


def expected(
    sequences: list[tuple[list[int], int]], size: int, capacity: int | None, mode: Partial
) -> Iterator[tuple[tuple[int, int], NaivePool]]:
    """Give all that may come of it, for which of equally old blocks goes: most often one thing."""
    left: list[list[int]] = [[]]
    for _ in range(MOST_OUTCOMES):
        if not left:
            return
        known = left.pop()
        pool = NaivePool(size, capacity, mode.value, known)
        each = [pool.serve(one, prompt) for one, prompt in sequences]
        yield (sum(hit for hit, _ in each), sum(part for _, part in each)), pool
        for at in range(len(known), len(pool.equals)):
            left += [[*pool.chosen[:at], other] for other in range(1, pool.equals[at])]


def chats(random: Random) -> tuple[list[tuple[list[int], int]], int, int]:
    """Draw chats that go on, some soon and some late, with prompts asked again among them."""
    size = random.choice([2, 4, 8, 16])
    words, reach = random.choice([3, 50, 1000]), random.choice([3, 8, 30])
    living: list[list[int]] = []
    asked: list[list[int]] = []
    for _ in range(random.randint(30, 150)):
        kind = random.random()
        if living and kind < 0.6:
            at = random.randrange(max(0, len(living) - reach), len(living))
            living[at] = living[at] + [
                random.randrange(words) for _ in range(random.randint(1, size))
            ]
            asked.append(living[at])
        elif living and kind < 0.7:
            asked.append(random.choice(living))
        else:
            asked.append([random.randrange(words) for _ in range(random.randint(1, 3 * size))])
            living.append(asked[-1])
    prompts = [(one, random.randint(1, len(one))) for one in asked]
    return prompts, size, random.choice([5, 8, 13, 20, 40, 80])


@pytest.mark.walk
@pytest.mark.parametrize("part", range(4))
def test_tails_are_kept_exactly_while_the_written_rule_says_that_they_pay(part: int) -> None:
    num_paid = 0
    for seed in range(part, COUNT // 10, 4):
        asked = (*chats(Random(seed)), Partial.TAILS)
        found = counted(*asked)
        pool = next((pool for sums, pool in expected(*asked) if sums == found), None)
        assert pool is not None, f"seed {seed}: {found}"
        num_paid += pool.ever_paid
    assert num_paid  # the rule is reached


@pytest.mark.walk
@pytest.mark.parametrize("part", range(10))
def test_hits_and_parts_are_those_of_the_written_rule(part: int) -> None:
    for seed in range(part, COUNT, 10):
        random = Random(seed)
        sequences, size, capacity = drawn(random)
        mode = list(Partial)[seed // 10 % 3]
        asked = (sequences, size, capacity, mode)
        found, told = counted(*asked), f"seed {seed}: {size}, {capacity}, {mode}"
        assert any(found == sums for sums, _ in expected(*asked)), told


def test_a_sequence_that_fills_the_pool_copies_nothing() -> None:
    first = [2, 33, 38, 27, 7, 5, 39, 1, 35, 25, 27, 36, 37, 18, 26, 45, 21, 49, 44, 48, 4, 15]
    second = [*first[:9], 8, 15, 46, 34, 16, 14, 23, 15, 28, 15, 20, 37, 27, 28, 1, 49, 31, 23, 37]
    second += [48, 2, 47, 16]
    asked = [(first, len(first)), (second, len(second))]
    assert counted(asked, 16, 2, Partial.BLOCKS) == (0, 0)
    assert counted(asked, 16, 3, Partial.BLOCKS) == (0, 9)


def agreed(*asked: Any) -> tuple[int, int]:
    """Give what is counted, where that is the one thing that may come of it."""
    (only,) = {sums for sums, _ in expected(*asked)}
    assert counted(*asked) == only
    return only


def test_a_tail_that_was_copied_whole_is_not_stored_again() -> None:
    asked = [(one, len(one)) for one in ([2, 0, 0], [0, 1], [2], [2, 2])]
    assert agreed(asked, 4, 2, Partial.TAILS) == (0, 1)
    assert agreed(asked, 4, 1, Partial.TAILS) == (0, 1)


def test_a_block_of_which_a_part_is_copied_counts_as_used() -> None:
    first, other, last = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]
    for copies in ([1, 1, 1], [1]):  # of the first, and too short to be stored
        asked = [(one, len(one)) for one in (first, other, copies, last, first)]
        assert agreed(asked, 4, 2, Partial.BLOCKS) == (0, len(copies) + 2)


@pytest.mark.parametrize(("num_copied", "found"), [(1, 0), (3, 7), (4, 7)])
def test_once_something_has_gone_a_small_part_makes_a_block_only_so_much_younger(
    num_copied: int, found: int
) -> None:
    others = [[one] * 8 for one in range(2, 9)]
    first, copies = [1] * 8, [1] * num_copied
    asked = [(one, len(one)) for one in (others[0], first, *others[1:3], copies, *others[3:5])]
    asked.append((first, 8))
    assert agreed(asked, 8, 3, Partial.BLOCKS) == (0, num_copied - 1 + found)
