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

**Tails are not, either.**  A partly filled block is never a leaf that a policy is told of, has no
mark of its, and does not make a node an inner one: see `tails`.

**No call looks at all leaves.**  The queues below keep them in heaps whose keys may be stale, and
correct a key only when it comes to the top.  That is right for every key that can only grow while a
node lives (a time of use, a count, an insertion order).  What is dead in a heap is dropped when it
comes to the top, or some dozen entries at a time once there is much of it: never all in one go.

```
old    ▓░▓▓░░▓░▓  ── the last entry: living? ──►  fresh   ▓▓▓▓     the first of both goes first
                            └ dead: dropped
```
A heap without its last entry is a heap still, and so both lists are heaps all the way.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from heapq import heappop, heappush
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeAlias, TypeVar

from prefixcache.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from prefixcache.core.node import Node

Mark = Any
"""What a policy knows about the blocks of a run; immutable, compared by `==`."""


_MOST_DEAD = 512
"""Entries of leaves that were locked since, which nobody looks for …"""
_DEAD_SHARE = 16
"""… or the part of all of them that may be, if that is more."""
_LEAST = 1024
"""Entries from which on it is looked whether most are dead."""
LOOKED_AT = 24
"""Entries that are looked at in one go."""


class Queue(Protocol):
    """The unprotected leaves.  `node.queued` says that a leaf need not be pushed again.

    It may have `locked(node)`: a leaf in here is protected now, and what stands for it is dead.  It
    is not told again of one that has become an inner node, however often that is protected.
    """

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
    """`used(node, stamp, top)`: a lease on the path to the end of `node` ends now; all of it is
    still protected.  Sets the marks of the path below `top`: the root; or what stands before a
    single block that leases copied from, half of it or more since the last use.  Stamps grow."""
    copied: Any = None
    """`copied(node, num_tokens)`: a lease that copied so many tokens of a block ends now.  With
    this hook `used` is told of no copies."""
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


Entry: TypeAlias = "tuple[float, int, Node]"
"""A leaf's place in a heap: its key when it came, a number of its own, and the leaf."""


class Heap:
    """A heap that is looked through in parts, while it is used.  Entries are told apart by number.

    >>> heap = Heap()
    >>> for number in range(3):
    ...     heappush(heap.fresh, (float(number), number, None))
    >>> heap.begin()
    >>> heap.last()[1], len(heap)
    (2, 2)
    >>> heap.pop()[1]
    0
    """

    __slots__ = ("fresh", "old")

    def __init__(self) -> None:
        self.fresh: list[Entry] = []
        self.old: list[Entry] = []
        """What has not been looked at since `begin`."""

    def __len__(self) -> int:
        return len(self.fresh) + len(self.old)

    def begin(self) -> None:
        """Look through all of it from now on.  Nothing may be left of the last time."""
        self.old, self.fresh = self.fresh, []

    def last(self) -> Entry:
        """Remove and give some entry that has not been looked at: there must be one.  O(1)."""
        return self.old.pop()

    def first(self) -> Entry | None:
        """Give the first of all; None if there is none.  O(1)."""
        if self.old and (not self.fresh or self.old[0] < self.fresh[0]):
            return self.old[0]
        return self.fresh[0] if self.fresh else None

    def pop(self) -> Entry:
        """Remove and give the first of all: there must be one.  O(log entries)."""
        if self.old and (not self.fresh or self.old[0] < self.fresh[0]):
            return heappop(self.old)
        return heappop(self.fresh)


class Tidying:
    """When a queue is looked through for what is dead, and how far: some entries with each push.

    Entries die when their leaves are locked; what is in hand of a queue is never more than a
    fraction dead, or few, however many leaves are locked one after the other.
    """

    __slots__ = ("_at", "_num_dead", "_num_since", "is_on", "seen")

    def __init__(self) -> None:
        self.is_on = False
        self.seen: set[Node] = set()
        """Leaves that have an entry among what was looked at already."""
        self._at = _LEAST
        self._num_dead = 0
        """Entries that may be dead …"""
        self._num_since = 0
        """… of these, such as may have died since it was begun."""

    def note_dead(self) -> bool:
        """Count an entry whose leaf was locked; say whether there are many."""
        self._num_dead += 1
        self._num_since += 1
        return self._num_dead > _MOST_DEAD

    def note_living(self) -> None:
        """Count one whose leaf came back."""
        if self._num_dead:
            self._num_dead -= 1
        if self._num_since:
            self._num_since -= 1

    def is_due(self, num_entries: int) -> bool:
        """Whether some of so many entries should be looked at now.  O(1)."""
        return (
            num_entries > self._at or self._num_dead > max(_MOST_DEAD, num_entries // _DEAD_SHARE)
        ) and num_entries > _LEAST

    def begin(self) -> None:
        """Begin with all that there is."""
        self.is_on, self._num_since = True, 0

    def end(self, num_entries: int) -> None:
        """All of it was looked at, and so many entries are left."""
        self.is_on, self.seen = False, set()
        self._at = max(_LEAST, 2 * num_entries)
        self._num_dead = self._num_since


class LeafQueue:
    """The unprotected leaves in order of eviction: a heap with lazily corrected keys.

    A node is in the queue at most once: `node.queued` is the queue's mark.  Entries of nodes that
    were merged away, got children, were locked again or went to another queue stay until they come
    to the top, or are found when the queue is looked through: it has O(leaves) of them.

    Args:
        policy: Says the order.
        mark: What `node.queued` is of the leaves in this queue.
    """

    __slots__ = ("_heap", "_key", "_mark", "_most", "_serial", "_tidying")

    def __init__(self, policy: EvictionPolicy, mark: int = 1) -> None:
        self._key = policy.key
        self._mark = mark
        self._heap = Heap()
        self._most: Any = None
        """The largest key so far: what comes with a larger one needs no number to itself."""
        self._serial = 0
        self._tidying = Tidying()

    def __len__(self) -> int:
        return len(self._heap)

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable.  O(log leaves)."""
        if node.queued:
            if node.queued == self._mark:
                self._tidying.note_living()
            return
        node.queued = self._mark
        key, number = self._key(node), 0
        if self._most is None or key > self._most:
            self._most = key
        else:
            self._serial = number = self._serial + 1
        heappush(self._heap.fresh, (key, number, node))
        if self._tidying.is_on:
            self._tidying.seen.add(node)
        if self._tidying.is_due(len(self._heap)):
            self._tidy()

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.

        O(log leaves) for each entry that it finds dead: a fraction of them at most.
        """
        heap, key_of, mark = self._heap, self._key, self._mark
        while heap.old or heap.fresh:
            key, _, node = heap.pop()
            if node.queued != mark:
                continue
            node.queued = 0
            if not node.is_evictable:
                self._tidying.note_living()  # it is dead, and gone
            elif key_of(node) <= key:
                return node
            else:
                self.push(node)
        return None

    def locked(self, node: Node) -> None:
        """Take note that a leaf in here is protected now; look at some entries if many are.

        O(log leaves).
        """
        if node.queued == self._mark:
            tidying = self._tidying
            if tidying.note_dead() and tidying.is_due(len(self._heap)):
                self._tidy()

    def _tidy(self) -> None:
        """Look at some entries, and drop those that are dead.  O(log leaves)."""
        heap, tidying, mark = self._heap, self._tidying, self._mark
        if not tidying.is_on:
            heap.begin()
            tidying.begin()
        for _ in range(LOOKED_AT):
            if not heap.old:
                tidying.end(len(heap))
                return
            entry = heap.last()
            node = entry[2]
            if node.queued != mark or node in tidying.seen:
                continue
            if node.is_evictable:
                tidying.seen.add(node)
                heappush(heap.fresh, entry)
            else:
                node.queued = 0
                tidying.note_living()


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

    __slots__ = ("_heaps", "_policy", "_serial", "_size", "_tidying")

    def __init__(self, policy: LanePolicy) -> None:
        self._policy = policy
        self._heaps = [Heap() for _ in range(policy.num_lanes)]
        self._serial = 0
        self._size = 0
        self._tidying = Tidying()

    def __len__(self) -> int:
        return self._size

    def push(self, node: Node) -> None:
        """Add a leaf to its lane.  O(log leaves)."""
        node.queued = 1
        self._serial += 1
        self._size += 1
        policy = self._policy
        heappush(self._heaps[policy.lane(node)].fresh, (policy.key(node), self._serial, node))
        if self._tidying.is_on:
            self._tidying.seen.add(node)
        self._tidy_if_due()

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first; None if there is none.

        O(log leaves) for each entry that it finds dead: a fraction of them at most.
        """
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
        return self._heaps[lane].pop()[2]

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
        while (first := heap.first()) is not None:
            key, _, node = first
            evictable = node.is_evictable
            if evictable and policy.lane(node) == lane and policy.key(node) <= key:
                return node
            heap.pop()
            self._size -= 1
            if evictable:
                self.push(node)
            else:
                self._tidying.note_living()  # it is dead, and gone
        return None

    def locked(self, node: Node) -> None:
        """Take note that a leaf in here is protected now; look at some entries if many are.

        What stands for it is dead: once it comes back it is pushed again.  O(log leaves).
        """
        if node.queued == 1:
            self._tidying.note_dead()
            self._tidy_if_due()

    def _tidy_if_due(self) -> None:
        """Look at some entries, if many may be dead.  O(log leaves).

        What was begun goes on to its end: a leaf may have several entries, and else as many would
        come meanwhile as are dropped.
        """
        if self._tidying.is_on or self._tidying.is_due(self._size):
            self._tidy()

    def _tidy(self) -> None:
        """Look at some entries; keep one for each living leaf, where it belongs.  O(log leaves)."""
        heaps, policy, tidying = self._heaps, self._policy, self._tidying
        if not tidying.is_on:
            for heap in heaps:
                heap.begin()
            tidying.begin()
        for _ in range(LOOKED_AT):
            heap = next((one for one in heaps if one.old), heaps[0])
            if not heap.old:
                tidying.end(self._size)
                return
            _, serial, node = heap.last()
            if node.is_evictable and node not in tidying.seen:
                tidying.seen.add(node)
                heappush(heaps[policy.lane(node)].fresh, (policy.key(node), serial, node))
            else:
                self._size -= 1
                tidying.note_living()
