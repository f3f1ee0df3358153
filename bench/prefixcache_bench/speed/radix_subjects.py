"""The trees under test, behind one small face: the core's, as the verbs leave it, and the baseline.

Each gives calls without arguments, prepared beforehand, so that the clock sees the tree's own
work and the same small overhead on both sides.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable
from functools import partial
from gc import get_referents
from types import FunctionType, MethodType, ModuleType
from typing import Protocol

from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import Node, Root
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, WorkerId
from prefixcache_bench.speed.baseline_radix import BaselineTree

BLOCK_SIZE = 16
WIDTH = BLOCK_SIZE * TOKEN_BYTES
SPACE = Namespace("benchmark")
WORKER = WorkerId(1)

Call = Callable[[], object]


class Subject(Protocol):
    """A tree under test."""

    name: str

    def store(self, tokens: bytes) -> None:
        """Keep a sequence, as a request that has ended leaves it."""

    def find(self, tokens: bytes) -> Call:
        """Prepare a search."""

    def pin(self, tokens: bytes) -> Call:
        """Prepare to protect a stored prefix, and to let it go."""

    def insert(self, tokens: bytes, more: bytes) -> tuple[Call, Call]:
        """Prepare to store `more` after what is found of `tokens`; and to let it go, unmeasured."""

    def evict(self, num_blocks: int) -> Call:
        """Prepare an eviction."""

    def num_bytes(self) -> int:
        """Count the memory of everything."""


class Core:
    """The core's tree, filled through the verbs: tails, ghosts, locks, ages as in service."""

    name = "core"

    def __init__(self, num_blocks: int, *, partial: Partial = Partial.TAILS) -> None:
        self.cache = PrefixCache(num_blocks, BLOCK_SIZE, partial=partial, ttl_s=1e9)
        self.cache.attach(WORKER, SPACE, now=0.0)
        self.now = 0.0
        self._next = 0

    @property
    def tree(self) -> RadixTree:
        """The tree inside."""
        return self.cache._lessor.tree

    @property
    def root(self) -> Root:
        """The namespace's root."""
        return self.cache._lessor.roots[SPACE]

    def store(self, tokens: bytes) -> None:
        """Acquire, commit, release."""
        self.now += 1.0
        grant = self.cache.acquire(WORKER, SPACE, tokens, now=self.now)
        if not isinstance(grant, Grant):
            raise TypeError("nobody else computes anything here")
        self.cache.commit(WORKER, grant.lease, len(tokens) // TOKEN_BYTES, now=self.now)
        self.cache.release(WORKER, grant.lease, now=self.now)

    def find(self, tokens: bytes) -> Call:
        """`match`, all but the last token."""
        return partial(self.tree.match, self.root, tokens, len(tokens) - TOKEN_BYTES)

    def pin(self, tokens: bytes) -> Call:
        """`lock` and `unlock`; the run is split where the prefix ends before the clock runs."""
        tree = self.tree
        tree.unlock(tree.lock(tree.match(self.root, tokens)))
        match = tree.match(self.root, tokens)

        def pair() -> None:
            tree.unlock(tree.lock(match))

        return pair

    def insert(self, tokens: bytes, more: bytes) -> tuple[Call, Call]:
        """`grow` from the lock of a request, as `commit` does."""
        tree = self.tree
        match = tree.match(self.root, tokens)
        node = tree.lock(match)
        run = (tokens + more)[match.end :]
        run = run[: len(run) // WIDTH * WIDTH]
        blocks = self.cache._lessor.blocks.obtain(len(run) // WIDTH)
        grown = []

        def call() -> None:
            grown.append(tree.insert(node, run, blocks))

        return call, lambda: tree.unlock(grown[0].node)

    def evict(self, num_blocks: int) -> Call:
        """`evict`; what was evicted becomes a ghost."""
        return partial(self.tree.evict, num_blocks)

    def num_bytes(self) -> int:
        """Count the memory of the whole cache: tree, blocks, leases, flights, tallies, history."""
        return deep_size(self.cache)

    def index_bytes(self) -> int:
        """Count the memory of the index: nodes, tokens, block ids, the order of eviction.

        Where requests parted stands at nodes, too, but history answers for it, within its bytes.
        """
        nodes: list[Node] = [self.root]
        size = deep_size(self.tree)
        while nodes:
            node = nodes.pop()
            nodes.extend(node.children)
            if node.divergence is not None:
                size -= deep_size(node.divergence)
        return size


class Baseline:
    """The baseline tree."""

    name = "baseline"

    def __init__(self) -> None:
        self.tree = BaselineTree(BLOCK_SIZE)
        self._next = 0

    def _take(self, count: int) -> array[int]:
        start = self._next
        self._next += count
        return array("i", range(start, start + count))

    def store(self, tokens: bytes) -> None:
        """Match, insert the rest."""
        found = self.tree.match(tokens)
        self.tree.insert(tokens, self._take((len(tokens) - found.end) // WIDTH), found)

    def find(self, tokens: bytes) -> Call:
        """`match`."""
        return partial(self.tree.match, tokens)

    def pin(self, tokens: bytes) -> Call:
        """`lock` and `unlock`."""
        tree, node = self.tree, self.tree.match(tokens).node

        def pair() -> None:
            tree.lock(node)
            tree.unlock(node)

        return pair

    def insert(self, tokens: bytes, more: bytes) -> tuple[Call, Call]:
        """`insert` from the match of a request."""
        found = self.tree.match(tokens)
        key = tokens + more
        blocks = self._take((len(key) - found.end) // WIDTH)
        return partial(self.tree.insert, key, blocks, found), lambda: None

    def evict(self, num_blocks: int) -> Call:
        """`evict`."""
        return partial(self.tree.evict, num_blocks)

    def num_bytes(self) -> int:
        """Count the memory of the tree."""
        return deep_size(self.tree)


def deep_size(thing: object) -> int:
    """Add up the bytes of everything reachable from `thing`, each object once."""
    skipped = (type, ModuleType, FunctionType, MethodType)
    seen = {id(thing)}
    stack = [thing]
    total = 0
    while stack:
        one = stack.pop()
        total += sys.getsizeof(one)
        for other in get_referents(one):
            if id(other) not in seen and not isinstance(other, skipped):
                seen.add(id(other))
                stack.append(other)
    return total
