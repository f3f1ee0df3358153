"""Which unprotected leaf goes first: what a policy is, their registry, and the leaves in order.

A policy is one class in one file of `prefixcache/core/policies/`.  Registering it (`@register`)
puts it in `--policy`, in the sweeps and in every test that is parametrised over policies; there is
nothing else to edit.  The smallest one has a name and a `key`: the leaf with the smallest key loses
its last blocks first.

```
              used                 lost                      revived
new ─► leaf ───────► marked leaf ───────► ghost, marked ───────────► leaf ─► used ─► …
       mark None     a use is the end     remembers what             its mark is what
                     of a lease           `lost` said                the ghost knew
```

**Marks.**  What a policy knows about blocks stands in `node.mark`, one immutable value for a whole
run.  A split copies it; two nodes are merged only if theirs are equal; so blocks of one run that
the policy tells apart are always in different nodes, and a run costs as little as one block.

**Safety is not the policy's business.**  The tree evicts only unprotected leaves, from their end,
and exactly as many blocks as it was asked for; whatever a policy answers decides the order alone.

**No call looks at all leaves.**  The queues below keep them in heaps whose keys may be stale, and
correct a key only when it comes to the top.  That is right for every key that can only grow while a
node lives (a time of use, a count, an insertion order).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from heapq import heapify, heappop, heappush
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefixcache.core.node import Node

Mark = Any
"""What a policy knows about the blocks of a run; immutable, compared by `==`."""


_MOST_DEAD = 256
"""Entries that are dropped one by one: of more, all are dropped at once, which costs a tenth."""


class Queue(Protocol):
    """The unprotected leaves.  `node.queued` says that a leaf need not be pushed again."""

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable, or that was given and has blocks left."""

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none."""


class EvictionPolicy:
    """The order of eviction among unprotected leaves.  The base: by the last use.

    The tree calls only what a subclass defines; hooks that are None cost nothing.

    Args:
        num_blocks: The pool's capacity.
    """

    name: ClassVar[str]
    ghosts: ClassVar[float] = 1.0
    """How many evicted blocks the policy wants remembered, in capacities."""
    marks_ends: ClassVar[bool] = False
    """Whether the last block of a used path gets a mark of its own."""
    block_bytes = 4
    """Bytes of a block's packed tokens; the tree says it."""

    asked: Any = None
    """`asked(match, tokens)`: a request was admitted; nothing is locked yet."""
    used: Any = None
    """`used(node, stamp)`: a lease on the path to the end of `node` ends now; all of it is still
    protected.  Sets the marks of the whole path.  Stamps grow by one."""
    lost: Any = None
    """`lost(node, num_blocks) -> Mark`: a node is about to lose its last blocks, or to leave.  The
    answer is the mark of the ghost."""
    forgotten: Any = None
    """`forgotten(mark, num_blocks)`: what `lost` gave this mark to is not even a ghost."""
    revived: Any = None
    """`revived(ghost)`: its blocks are back.  Without this hook the mark is forgotten."""
    tick: Any = None
    """`tick(now)`: the time; called before blocks are needed."""

    def __init__(self, num_blocks: int = 1) -> None:
        self.num_blocks = num_blocks

    def key(self, node: Node) -> float:
        """Give the leaf's place in the order, smallest first.  Must not shrink while it lives."""
        return node.last_used

    def queue(self) -> Queue:
        """Make the queue that orders the leaves: one heap, if not overridden."""
        return LeafQueue(self)

    def uses(self, node: Node) -> int | None:
        """Give how many leases used a node, for people; None if the policy does not count them."""
        return None


POLICIES: dict[str, type[EvictionPolicy]] = {}
"""Every registered policy by name."""

PolicyClass = TypeVar("PolicyClass", bound="type[EvictionPolicy]")


def register(policy: PolicyClass) -> PolicyClass:
    """Make a policy known under its name.  Class decorator."""
    POLICIES[policy.name] = policy
    return policy


def policy_named(name: str, num_blocks: int = 1) -> EvictionPolicy:
    """Make the policy of that name for a pool of `num_blocks`.

    Raises:
        InvalidRequest: there is none; the message lists those there are.
    """
    if name not in POLICIES:
        raise InvalidRequest(f"no eviction policy {name!r}; there are: {', '.join(POLICIES)}")
    return POLICIES[name](num_blocks)


class LeafQueue:
    """The unprotected leaves in order of eviction: a heap with lazily corrected keys.

    A node is in the queue at most once: `node.queued` is the queue's mark.  Entries of nodes that
    were merged away, got children, were locked again or went to another queue stay until they come
    to the top, or until they are the majority, or too many of them come to the top at once: then
    the heap is rebuilt from the living ones, which keeps it O(leaves).

    Args:
        policy: Says the order.
        mark: What `node.queued` is of the leaves in this queue.
    """

    __slots__ = ("_heap", "_key", "_mark", "_rebuild_at", "_serial")

    def __init__(self, policy: EvictionPolicy, mark: int = 1) -> None:
        self._key = policy.key
        self._mark = mark
        self._heap: list[tuple[float, int, Node]] = []
        self._serial = 0
        self._rebuild_at = 1024

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable.  O(log leaves), amortised."""
        if node.queued:
            return
        node.queued = self._mark
        self._serial += 1
        heappush(self._heap, (self._key(node), self._serial, node))
        if len(self._heap) > self._rebuild_at:
            self._rebuild()

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.  O(log leaves)."""
        heap, key_of, mark, num_dead = self._heap, self._key, self._mark, 0
        while heap:
            key, _, node = heappop(heap)
            if node.queued != mark or not node.is_evictable:
                if node.queued == mark:
                    node.queued = 0
                num_dead += 1
                if num_dead % _MOST_DEAD == 0:
                    self._rebuild()
                    heap = self._heap
                continue
            node.queued = 0
            if key_of(node) <= key:
                return node
            self.push(node)
            heap = self._heap
        return None

    def _rebuild(self) -> None:
        """Drop the entries that can no longer be evicted.  O(heap), once per doubling."""
        mark = self._mark
        mine = {entry[2]: entry for entry in self._heap if entry[2].queued == mark}
        living = []
        for node, entry in mine.items():
            if node.is_evictable:
                living.append(entry)
            else:
                node.queued = 0
        heapify(living)
        self._heap = living
        self._rebuild_at = max(1024, 2 * len(living))


class LanePolicy(EvictionPolicy, ABC):
    """A policy that keeps its leaves in several lanes, each in an order of its own."""

    num_lanes: ClassVar[int] = 2

    @abstractmethod
    def lane(self, node: Node) -> int:
        """Give the lane of a leaf.  A use may change it."""

    @abstractmethod
    def choose(self, heads: Sequence[Node | None]) -> int:
        """Give a lane whose head goes next.  At least one lane has a head."""

    def spares(self, node: Node) -> bool:
        """Whether a chosen leaf gets another chance; its mark says so afterwards.

        The number of chances must be bounded by the number of uses.
        """
        return False

    def queue(self) -> Queue:
        """Make the lanes."""
        return Lanes(self)


class Lanes:
    """The unprotected leaves of a `LanePolicy`: a heap with lazily corrected keys per lane.

    A leaf may have several entries; when one comes to the top it is moved to where the leaf belongs
    by now.
    """

    __slots__ = ("_heaps", "_policy", "_rebuild_at", "_serial", "_size")

    def __init__(self, policy: LanePolicy) -> None:
        self._policy = policy
        self._heaps: list[list[tuple[float, int, Node]]] = [[] for _ in range(policy.num_lanes)]
        self._serial = 0
        self._size = 0
        self._rebuild_at = 1024

    def __len__(self) -> int:
        return self._size

    def push(self, node: Node) -> None:
        """Add a leaf to its lane.  O(log leaves), amortised."""
        node.queued = 1
        self._serial += 1
        self._size += 1
        policy = self._policy
        heappush(self._heaps[policy.lane(node)], (policy.key(node), self._serial, node))
        if self._size > self._rebuild_at:
            self._rebuild()

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.  O(log leaves)."""
        policy, heaps = self._policy, self._heaps
        while True:
            heads = [self.head(lane) for lane in range(len(heaps))]
            if not any(heads):
                return None
            node = self._take(policy.choose(heads))
            if policy.spares(node):
                self.push(node)
                continue
            node.queued = 0
            return node

    def _take(self, lane: int) -> Node:
        """Remove the head of a lane that has one."""
        self._size -= 1
        return heappop(self._heaps[lane])[2]

    def respite(self, lane: int) -> bool:
        """Let the policy spare the head of a lane before anything is evicted; False if it does not.

        For policies that move leaves between lanes in small steps.  O(log leaves).
        """
        head = self.head(lane)
        if head is None or not self._policy.spares(head):
            return False
        self.push(self._take(lane))
        return True

    def head(self, lane: int) -> Node | None:
        """Give the first living leaf of a lane; drop what is dead above it."""
        heap, policy = self._heaps[lane], self._policy
        while heap:
            key, _, node = heap[0]
            evictable = node.is_evictable
            if evictable and policy.lane(node) == lane and policy.key(node) <= key:
                return node
            heappop(heap)
            self._size -= 1
            if evictable:
                self.push(node)
        return None

    def _rebuild(self) -> None:
        """Keep one entry per living leaf.  O(entries), once per doubling."""
        leaves = {node: None for heap in self._heaps for _, _, node in heap if node.is_evictable}
        for heap in self._heaps:
            heap.clear()
        self._size = len(leaves)
        for node in leaves:
            self._serial += 1
            lane = self._policy.lane(node)
            self._heaps[lane].append((self._policy.key(node), self._serial, node))
        for heap in self._heaps:
            heapify(heap)
        self._rebuild_at = max(1024, 2 * len(leaves))
