"""What the tests read inside the core: which slots are indexed, and whether anything changed."""

from __future__ import annotations

import enum
from array import array
from collections import deque
from collections.abc import Iterator
from functools import cache
from typing import NamedTuple

import numpy as np

from core.oracle import Tokens
from prefixcache.core.cache import PrefixCache
from prefixcache.core.node import Node, Root
from prefixcache.types import LeaseId, Namespace, WorkerId, unpack


class Indexed(NamedTuple):
    """One block that the tree owns."""

    block: int
    prefix: Tokens
    """All tokens from position 0 to the last one that the block holds."""
    num_tokens: int
    """Of these, how many are in this block."""
    is_locked: bool
    """Whether a lease protects it."""


def root_of(cache: PrefixCache, namespace: Namespace) -> Root | None:
    """Give the root under which a namespace is found now."""
    return cache._lessor.roots.get(namespace)


def indexed_below(root: Root, block_size: int) -> Iterator[Indexed]:
    """Walk a tree; give every block with the tokens that it should hold."""
    stack: list[tuple[Node, Tokens]] = [(root, ())]
    while stack:
        node, before = stack.pop()
        run = tuple(unpack(node.tokens))
        for index, block in enumerate(node.blocks):
            end = min((index + 1) * block_size, len(run))
            num_tokens = end - index * block_size
            yield Indexed(block, before + run[:end], num_tokens, node.lock_ref > 0)
        stack.extend((child, before + run) for child in node.children)


_RENEWED = {"deadline", "renewed_until", "_deadlines"}
"""A call that fails is still a sign of life: the only things that it may move."""


_NOTHING = object()
_PLAIN = frozenset({type(None), bool, int, float, str, bytes})


@cache
def slots(kind: type) -> tuple[str, ...]:
    """The attributes that objects of a type may have beside those of their `__dict__`."""
    return tuple(
        name
        for base in kind.__mro__
        for listed in ("__slots__", "__mypyc_attrs__")  # the latter where the core is compiled
        for name in getattr(base, listed, ())
    )


def state(thing: object) -> object:
    """Freeze everything that is reachable from `thing`, to see whether a call changed it.

    Plain values as they are, objects as their attributes, each object once.  Functions, half-run
    iterators and the roots of empty namespaces are left out.
    """
    seen: dict[int, int] = {}
    frozen: list[object] = []

    def visit(value: object) -> object:
        if type(value) in _PLAIN or isinstance(value, int | float | str | bytes | enum.Enum):
            return value
        if isinstance(value, tuple):
            return tuple(visit(one) for one in value)
        if isinstance(value, array):
            return value.tobytes()
        if isinstance(value, bytearray):
            return bytes(value)
        if isinstance(value, np.ndarray):
            return value.tobytes()
        if id(value) in seen:
            return ("seen", seen[id(value)])
        number = seen[id(value)] = len(seen)
        if isinstance(value, set | frozenset):
            frozen.append((number, sorted(map(repr, value))))
            return ("seen", number)
        parts: list[object] = []
        if isinstance(value, dict):
            parts.extend(
                (visit(key), visit(item))
                for key, item in value.items()
                if not (isinstance(item, Root) and not item.children and not item.ghosts)
            )
        elif isinstance(value, list | deque):
            parts.extend(visit(one) for one in value)
        for name in (*slots(type(value)), *getattr(value, "__dict__", ())):
            found = getattr(value, name, _NOTHING)
            if name not in _RENEWED and not callable(found) and found is not _NOTHING:
                parts.append((name, visit(found)))
        frozen.append((number, type(value).__name__, parts))
        return ("seen", number)

    return (visit(thing), frozen)


def table_of(cache: PrefixCache, worker: WorkerId, lease: LeaseId, now: float) -> array[int]:
    """Give the block table of a lease as the cache has it."""
    return cache._lessor.leases.get(worker, lease, now).table
