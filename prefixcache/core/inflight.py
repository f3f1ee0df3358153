"""Inflight: prefixes that some lease is computing now.

A lease with prompt tokens still to compute is in flight; others may wait for it (`wait_queue.py`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from prefixcache.core.lease import KeptBytes, Lease
from prefixcache.core.node import Match, Root, common_prefix
from prefixcache.types import TOKEN_BYTES, Partial, TicketId


class JoinGain(NamedTuple):
    """What waiting for a flight brings."""

    owner: Lease
    num_tokens: int
    """Tokens that need not be computed then."""
    target: int
    """Tokens that the owner must have indexed."""


@dataclass(slots=True, eq=False)
class Waiters:
    """Who waits for one owner, by what must be indexed; who has left is dropped at the top."""

    heap: list[tuple[int, TicketId]] = field(default_factory=list)
    count: int = 0


class Inflight:
    """The prompts that leases are computing, in sorted order below each root.

    Among byte strings in sorted order, the one with the longest common prefix with a prompt stands
    directly before or after it: `find` is a bisection and two comparisons, however many are in
    flight.  A lease is entered once, when it is granted, and taken out once, when its prompt is
    committed or the lease ends.  In between nothing is kept up to date: what it has indexed so far
    is locked in the tree, so there is nothing left to gain from waiting for it.

    Args:
        block_size: Tokens of a block.
        partial: How much of a partly matching block is reused.
        prompts: Counts the bytes that they take.
    """

    __slots__ = ("_block_size", "_partial", "_prompts", "below")

    def __init__(self, block_size: int, partial: Partial, prompts: KeptBytes) -> None:
        self._block_size = block_size
        self._partial = partial
        self._prompts = prompts
        self.below: dict[Root, list[tuple[bytes, int, Lease]]] = {}

    def __len__(self) -> int:
        return sum(map(len, self.below.values()))

    def add(self, lease: Lease, prompt: bytes) -> None:
        """Let others find what `lease` computes, if it can be shared.  O(log flights)."""
        if (
            self._partial is not Partial.TAILS
        ):  # a last block that stays partly filled is not shared
            prompt = prompt[: len(prompt) - len(prompt) % (self._block_size * TOKEN_BYTES)]
        if len(prompt) <= lease.committed * TOKEN_BYTES:
            return
        lease.flight = prompt
        self._prompts.add(lease.namespace.tenant, len(prompt))
        root = lease.root
        below = self.below.get(root)
        if below is None:
            below = self.below[root] = []
        insort(below, (prompt, lease.serial, lease))
        root.num_changes += 1

    def remove(self, lease: Lease) -> None:
        """Take a lease out again, if it is in.  O(log flights)."""
        if lease.flight is None:
            return
        root = lease.root
        below = self.below[root]
        del below[bisect_left(below, (lease.flight, lease.serial))]
        self._prompts.remove(lease.namespace.tenant, len(lease.flight))
        lease.flight = None
        if not below:
            del self.below[root]

    def find(self, root: Root, match: Match, tokens: bytes) -> JoinGain | None:
        """Find the flight worth waiting for; None if none is.  Changes nothing.  O(log flights)."""
        below = self.below.get(root)
        if below is None:
            return None
        at = bisect_left(below, (tokens,))
        stored = match.end
        if self._partial is not Partial.OFF:
            stored += match.partial_tokens * TOKEN_BYTES
        lacking = tokens[stored : stored + TOKEN_BYTES]
        best: JoinGain | None = None
        for prompt, _, lease in below[at - 1 if at else 0 : at + 1]:
            if not prompt.startswith(lacking, stored):
                continue  # as a rule: what it shares is there already
            common = common_prefix(prompt, 0, tokens, 0, min(len(prompt), len(tokens)))
            gain = self.gain(lease, match, common // TOKEN_BYTES, len(tokens) // TOKEN_BYTES)
            if gain is not None and (best is None or gain.num_tokens > best.num_tokens):
                best = gain
        return best

    def gain(self, lease: Lease, match: Match, common: int, num_tokens: int) -> JoinGain | None:
        """Say what waiting for one flight brings; None if nothing.  Changes nothing.  O(1).

        Args:
            lease: Whose.
            match: What is stored of a prompt.
            common: Tokens that the prompt shares with the flight's.
            num_tokens: Tokens of the prompt.
        """
        size = self._block_size
        usable = min(common, num_tokens - 1)
        cached = match.end // TOKEN_BYTES
        if self._partial is Partial.OFF:
            usable -= usable % size
            target = usable
        else:
            cached += match.partial_tokens
            target = usable if self._partial is Partial.TAILS else -(-usable // size) * size
        return JoinGain(lease, usable - cached, target) if usable > cached else None

    def all(self) -> Iterator[Lease]:
        """Give the leases that are in flight, prompts in order."""
        for below in self.below.values():
            for _, _, lease in below:
                yield lease

    def check(self) -> None:
        """Assert that the flights are in order, and that each lease is where it can be found."""
        for root, below in self.below.items():
            assert below, "an empty list of flights"
            assert below == sorted(below), "flights out of order"
            for prompt, serial, lease in below:
                assert lease.serial == serial, f"lease {lease.serial} flies as {serial}"
                assert lease.root is root, f"lease {lease.id} flies below another root"
                assert lease.flight is prompt, f"lease {lease.id}: another prompt"
                assert lease.committed < len(prompt) // TOKEN_BYTES, f"lease {lease.id} has landed"
