"""The replay counts what docs/experiments.md says, to the last token.

`PREFIXCACHE_CONFIGURATIONS=100000` draws more than the thousand of every run.
"""

from __future__ import annotations

import os
from random import Random

import pytest

from experiments.naive_pool import NaivePool
from prefixcache.types import Namespace, Partial, pack
from prefixcache_bench.experiments.replay import Configuration, replay
from prefixcache_bench.experiments.traces import Request, Trace

COUNT = int(os.environ.get("PREFIXCACHE_CONFIGURATIONS", "1000"))


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
) -> tuple[int, int]:
    pool = NaivePool(size, capacity, mode.value)
    each = [pool.serve(one, prompt) for one, prompt in sequences]
    return sum(hit for hit, _ in each), sum(part for _, part in each)


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
        sequences, size, capacity = chats(Random(seed))
        pool = NaivePool(size, capacity, "tails")
        hits = parts = 0
        ever_paid = False
        for one, prompt in sequences:
            hit, more = pool.serve(one, prompt)
            hits, parts = hits + hit, parts + more
            ever_paid |= pool.tails_pay
        num_paid += ever_paid
        assert counted(sequences, size, capacity, Partial.TAILS) == (hits, parts), f"seed {seed}"
    assert num_paid  # the rule is reached


@pytest.mark.walk
@pytest.mark.parametrize("part", range(10))
def test_hits_and_parts_are_those_of_the_written_rule(part: int) -> None:
    for seed in range(part, COUNT, 10):
        random = Random(seed)
        sequences, size, capacity = drawn(random)
        mode = list(Partial)[seed // 10 % 3]
        asked = (sequences, size, capacity, mode)
        assert counted(*asked) == expected(*asked), f"seed {seed}: {size}, {capacity}, {mode}"


def test_a_sequence_that_fills_the_pool_copies_nothing() -> None:
    first = [2, 33, 38, 27, 7, 5, 39, 1, 35, 25, 27, 36, 37, 18, 26, 45, 21, 49, 44, 48, 4, 15]
    second = [*first[:9], 8, 15, 46, 34, 16, 14, 23, 15, 28, 15, 20, 37, 27, 28, 1, 49, 31, 23, 37]
    second += [48, 2, 47, 16]
    asked = [(first, len(first)), (second, len(second))]
    assert counted(asked, 16, 2, Partial.BLOCKS) == (0, 0)
    assert counted(asked, 16, 3, Partial.BLOCKS) == (0, 9)


def test_a_tail_that_was_copied_whole_is_not_stored_again() -> None:
    asked = [(one, len(one)) for one in ([2, 0, 0], [0, 1], [2], [2, 2])]
    assert counted(asked, 4, 2, Partial.TAILS) == expected(asked, 4, 2, Partial.TAILS) == (0, 1)
    assert counted(asked, 4, 1, Partial.TAILS) == expected(asked, 4, 1, Partial.TAILS) == (0, 0)


def test_a_block_of_which_half_is_copied_counts_as_used() -> None:
    first, other, last = [1, 1, 1, 1], [2, 2, 2, 2], [3, 3, 3, 3]
    copies = [1, 1, 1]  # of the first, and too short to be stored
    asked = [(one, len(one)) for one in (first, other, copies, last, first)]
    assert counted(asked, 4, 2, Partial.BLOCKS) == expected(asked, 4, 2, Partial.BLOCKS) == (0, 5)
