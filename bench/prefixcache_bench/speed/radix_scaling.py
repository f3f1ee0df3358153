"""How finding and evicting grow with the number of blocks, at a steady state.

`num_blocks / 32` chats of 512 tokens stand under 64 system prompts of 496 tokens.  In turns: find
a chat and 37 new tokens, protect it and let it go (which makes it young), evict 512 tokens, store
a new chat.
"""

from __future__ import annotations

import statistics
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import numpy as np

from prefixcache.core.node import Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import BlockTable
from prefixcache_bench.speed.baseline_radix import BaselineTree
from prefixcache_bench.speed.radix_subjects import BLOCK_SIZE, SPACE, WIDTH
from prefixcache_bench.speed.radix_workload import FRESH_TOKENS, VOCABULARY

NUM_SYSTEM_PROMPTS = 64
SYSTEM_BLOCKS = 31
CHAT_BLOCKS = 32
TURNS_PER_ROUND = 100
EVICT_GOAL_US = 20.0
GROWTH_GOAL = 10.0


@dataclass(slots=True)
class Figures:
    """One subject at one size: microseconds per call, one number per round."""

    hit: list[float] = field(default_factory=list)
    evict: list[float] = field(default_factory=list)


@dataclass(slots=True)
class Row:
    """One size."""

    num_blocks: int
    leaves: int
    core: Figures = field(default_factory=Figures)
    baseline: Figures = field(default_factory=Figures)


class CoreTree:
    """The core's tree alone, with as many ghosts as blocks."""

    def __init__(self, num_blocks: int) -> None:
        self.tree = RadixTree(BLOCK_SIZE, num_ghosts=num_blocks)
        self.root = Root(SPACE)

    def store(self, tokens: bytes, blocks: BlockTable) -> BlockTable:
        """Store a chat; give the blocks that were not needed."""
        tree = self.tree
        match = tree.match(self.root, tokens)
        need = (len(tokens) - match.end) // WIDTH
        grown = tree.insert(tree.lock(match), tokens[match.end :], blocks[:need])
        tree.unlock(grown.node)
        return blocks[need:]

    def find(self, tokens: bytes) -> object:
        """Find; changes nothing."""
        return self.tree.match(self.root, tokens, len(tokens) - 4)

    def touch(self, tokens: bytes) -> None:
        """Make a chat the youngest."""
        self.tree.unlock(self.tree.lock(self.tree.match(self.root, tokens)))

    def evict(self, num_blocks: int) -> BlockTable:
        """Evict."""
        return self.tree.evict(num_blocks)


class BaselineAlone:
    """The baseline behind the same face."""

    def __init__(self, num_blocks: int) -> None:
        self.tree = BaselineTree(BLOCK_SIZE)

    def store(self, tokens: bytes, blocks: BlockTable) -> BlockTable:
        """Store a chat; give the blocks that were not needed."""
        found = self.tree.match(tokens)
        need = (len(tokens) - found.end) // WIDTH
        self.tree.insert(tokens, blocks[:need], found)
        return blocks[need:]

    def find(self, tokens: bytes) -> object:
        """Find."""
        return self.tree.match(tokens)

    def touch(self, tokens: bytes) -> None:
        """Make a chat the youngest."""
        node = self.tree.match(tokens).node
        self.tree.lock(node)
        self.tree.unlock(node)

    def evict(self, num_blocks: int) -> BlockTable:
        """Evict."""
        return self.tree.evict(num_blocks)


def measure(
    sizes: Sequence[int], rounds: int, still: Callable[[], AbstractContextManager[None]]
) -> Iterator[Row]:
    """Build and measure one size after the other."""
    for num_blocks in sizes:
        yield _measure_one(num_blocks, rounds, still)


def _measure_one(
    num_blocks: int, rounds: int, still: Callable[[], AbstractContextManager[None]]
) -> Row:
    rng = np.random.default_rng(num_blocks)

    def draw(blocks: int) -> bytes:
        return rng.integers(0, VOCABULARY, size=blocks * BLOCK_SIZE, dtype=np.int32).tobytes()

    systems = [draw(SYSTEM_BLOCKS) for _ in range(NUM_SYSTEM_PROMPTS)]
    leaves = (num_blocks - NUM_SYSTEM_PROMPTS * SYSTEM_BLOCKS) // CHAT_BLOCKS
    row = Row(num_blocks, leaves)
    subjects: list[tuple[CoreTree | BaselineAlone, Figures]] = [
        (CoreTree(num_blocks), row.core),
        (BaselineAlone(num_blocks), row.baseline),
    ]
    spare = [array("i"), array("i")]
    recent: list[bytes] = []
    next_block = 0
    for number in range(leaves):
        chat = systems[number % NUM_SYSTEM_PROMPTS] + draw(CHAT_BLOCKS)
        fresh = array("i", range(next_block, next_block + SYSTEM_BLOCKS + CHAT_BLOCKS))
        next_block += len(fresh)
        for subject, _ in subjects:
            subject.store(chat, fresh)
        if number % max(1, leaves // 4096) == 0:
            recent.append(chat)
    tail = draw(1)[: FRESH_TOKENS * 4]
    clock = time.perf_counter_ns
    with still():
        for number in range(rounds):
            order = (0, 1) if number % 2 else (1, 0)
            picks = [recent[int(i)] for i in rng.integers(0, len(recent), TURNS_PER_ROUND)]
            fresh_chats = [
                systems[i % NUM_SYSTEM_PROMPTS] + draw(CHAT_BLOCKS) for i in range(len(picks))
            ]
            for which in order:
                subject, figures = subjects[which]
                hit = evict = 0
                for pick, chat in zip(picks, fresh_chats, strict=True):
                    prompt = pick + tail
                    started = clock()
                    subject.find(prompt)
                    found = clock()
                    hit += found - started
                    subject.touch(pick)
                    started = clock()
                    blocks = subject.evict(CHAT_BLOCKS)
                    evict += clock() - started
                    spare[which].extend(blocks)
                    spare[which] = subject.store(chat, spare[which])
                figures.hit.append(hit / 1e3 / len(picks))
                figures.evict.append(evict / 1e3 / len(picks))
    return row


def line(row: Row, *, first: bool) -> str:
    """Draw one row; the first with a heading."""
    head = (
        f"{'blocks':>11}{'leaves':>9}   {'hit 1k: core':>13}{'baseline':>9}{'ratio':>7}"
        f"   {'evict 512: core':>16}{'(max)':>8}{'baseline':>9}{'ratio':>7}\n"
    )
    hit, evict = statistics.median(row.core.hit), statistics.median(row.core.evict)
    base_hit = statistics.median(row.baseline.hit)
    base_evict = statistics.median(row.baseline.evict)
    return (head if first else "") + (
        f"{row.num_blocks:>11,}{row.leaves:>9,}"
        f"   {hit:>13.2f}{base_hit:>9.2f}{hit / base_hit:>6.2f}x"
        f"   {evict:>16.2f}{max(row.core.evict):>8.2f}{base_evict:>9.2f}{evict / base_evict:>6.2f}x"
    )


def verdict(rows: Sequence[Row]) -> Iterator[str]:
    """Compare with the goals."""
    first, last = statistics.median(rows[0].core.evict), statistics.median(rows[-1].core.evict)
    growth = last / first
    size = f"{rows[-1].num_blocks:,}"
    yield (
        f"evict at {size} blocks: {last:.1f} µs, goal <= {EVICT_GOAL_US:g} "
        f"{'met' if last <= EVICT_GOAL_US else 'MISSED'}; grown {growth:.1f}x since "
        f"{rows[0].num_blocks:,} blocks, goal <= {GROWTH_GOAL:g}x "
        f"{'met' if growth <= GROWTH_GOAL else 'MISSED'}"
    )
