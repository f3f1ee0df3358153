"""Which unprotected leaf goes first.

A policy is one class with one small method, `key`: the leaf with the smallest key loses its last
blocks first.  Registering the class (`@register`) puts it in `--policy` and in every test that is
parametrised over policies.

A policy never looks at all leaves: `LeafQueue` keeps them in a heap whose keys may be stale, and
corrects a key only when it comes to the top.  That is right for every key that can only grow while
a node lives (a time of use, a count, an insertion order).
"""

from __future__ import annotations

from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, ClassVar, Protocol, TypeVar

from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from prefixcache.core.node import Node


class EvictionPolicy(Protocol):
    """The order of eviction among unprotected leaves."""

    name: ClassVar[str]

    def key(self, node: Node) -> float:
        """Give the leaf's place in the order, smallest first.  Must not shrink while it lives."""


POLICIES: dict[str, type[EvictionPolicy]] = {}
"""Every registered policy by name."""

PolicyClass = TypeVar("PolicyClass", bound="type[EvictionPolicy]")


def register(policy: PolicyClass) -> PolicyClass:
    """Make a policy known under its name.  Class decorator."""
    POLICIES[policy.name] = policy
    return policy


def policy_named(name: str) -> EvictionPolicy:
    """Make the policy of that name.

    Raises:
        InvalidRequest: there is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise InvalidRequest(f"no eviction policy {name!r}; there are: {', '.join(POLICIES)}")
    return POLICIES[name]()


@register
class Lru:
    """Least recently used: by the moment when the last lease on it ended."""

    name: ClassVar[str] = "lru"

    def key(self, node: Node) -> float:
        """Give the logical time of the last use."""
        return node.last


@register
class Fifo:
    """First in, first out: by the moment when it was indexed, however often it was used since."""

    name: ClassVar[str] = "fifo"

    def key(self, node: Node) -> float:
        """Give the logical time of indexing."""
        return node.born


class LeafQueue:
    """The unprotected leaves in order of eviction: a heap with lazily corrected keys.

    A node is in the heap at most once (`node.queued`).  Entries of nodes that were merged away,
    got children or were locked again stay until they come to the top, or until they are the
    majority: then the heap is rebuilt from the living ones, which keeps it O(leaves).
    """

    __slots__ = ("_heap", "_key", "_rebuild_at", "_serial")

    def __init__(self, policy: EvictionPolicy) -> None:
        self._key = policy.key
        self._heap: list[tuple[float, int, Node]] = []
        self._serial = 0
        self._rebuild_at = 1024

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable.  O(log leaves), amortised."""
        if node.queued:
            return
        node.queued = True
        self._serial += 1
        heappush(self._heap, (self._key(node), self._serial, node))
        if len(self._heap) > self._rebuild_at:
            self._rebuild()

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.  O(log leaves)."""
        heap = self._heap
        while heap:
            key, _, node = heappop(heap)
            node.queued = False
            if not node.is_evictable:
                continue
            if self._key(node) > key:
                self.push(node)
                continue
            return node
        return None

    def _rebuild(self) -> None:
        """Drop the entries that can no longer be evicted.  O(heap), once per doubling."""
        living = []
        for entry in self._heap:
            if entry[2].is_evictable:
                living.append(entry)
            else:
                entry[2].queued = False
        heapify(living)
        self._heap = living
        self._rebuild_at = max(1024, 2 * len(living))
