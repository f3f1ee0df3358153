"""Protection: leaves that are evicted last, because they are pinned or within a guaranteed share.

```
            pop                        nothing else is left
inner queue ───► neither ─► evicted          │
             └─► within its share ─► shares ─┤ first these, the least recently used first
             └─► pinned ───────────► pins ───┘ then these
                       ▲ comes back when the pin ends, or the share is exceeded
```

Put around the policy's queue when the first pin or share is made; without one, nothing is between
the tree and its queue.  Leaves that are neither come out exactly in the policy's order.  A leaf
that is protected when it becomes evictable is kept here at once; one that is protected
later, when it comes to the top.

**Pins.**  prefixes that are evicted last, for a time, under a cap.

```
pin("SSSS SSSS", 1 h)      root ─[SSSS SSSS] 0 1 ─┬─ [AAAA] 2      blocks 0 and 1 are pinned:
                                pinned 1          └─ [BBBB] 3      2 and 3 go in the policy's order,
                                                                   0 and 1 when nothing else is left
```

A pin is a wish, not a lock: what leases need they get, so no number of pins can wedge the pool.  It
covers whole blocks that are stored now; what of them is evicted all the same is no longer pinned
when it comes back.  A run that a pin ends in is split there.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from heapq import heappop, heappush

from prefixcache.core.account import Account
from prefixcache.core.eviction import LeafQueue
from prefixcache.core.node import Match, Node, Root, Tail
from prefixcache.core.policies.lru import Lru
from prefixcache.core.quota import Quotas
from prefixcache.core.radix_tree import RadixTree
from prefixcache.core.shares import Shares
from prefixcache.errors import PoolExhausted
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, Namespace, PinInfo, Pinned, Unpinned

_MOST_MOVED = 256
"""Blocks of each that go back in one go: always the oldest, and more than go at a time."""

PROTECTED = 2
"""`node.queued` of a leaf that waits within a share, and not in the policy's queue."""
PINNED = 4
"""… of one that is pinned, wherever it waited before."""


class ProtectedQueue:
    """A queue around a queue.

    Args:
        tree: Whose queue it takes the place of.
        quotas: Who has a guaranteed share.
    """

    __slots__ = ("_inner", "_inner_locked", "_pins", "_quotas", "_returning", "_shares", "_tree")

    def __init__(self, tree: RadixTree, quotas: Quotas) -> None:
        self._tree = tree
        self._inner = tree.queue
        self._inner_locked: Callable[[Node], None] | None = getattr(tree.queue, "locked", None)
        self._quotas = quotas
        self._pins = LeafQueue(Lru(), PINNED)
        self._shares: dict[Account, LeafQueue] = {}
        self._returning: list[LeafQueue] = []
        """What waited here under other shares: it goes back, the oldest of each first, in parts."""

    def push(self, node: Node) -> None:
        """Add a leaf that has just become evictable, where it belongs.  O(log leaves)."""
        if node.queued or not self.shelter(node):
            self._inner.push(node)

    def shelter(self, node: Node) -> bool:
        """Keep a leaf that is protected; say whether it is.  O(log leaves)."""
        if node.pinned:
            self._pins.push(node)
        elif (account := self._sharer(node)) is not None:
            self._shares.setdefault(account, LeafQueue(Lru(), PROTECTED)).push(node)
        else:
            return False
        return True

    def keeps(self, node: Node) -> bool:
        """Whether a leaf that was given goes only because nothing else is left.  O(1)."""
        return node.pinned > 0 or self._sharer(node) is not None

    def pop(self) -> Node | None:
        """Remove and give the leaf that goes first.  O(log leaves) amortised, plus O(shares)."""
        if self._shares:
            self._let_go_of_excess()
        while True:
            if self._returning:
                self._go_on_returning()
            if (node := self._pop_unprotected()) is not None:
                return node
            if not self._returning:
                break
        for kept in [*self._shares.values(), self._pins]:
            if (node := kept.pop()) is not None:
                return node
        return None

    def locked(self, node: Node) -> None:
        """Pass on that a leaf is protected now.  O(log leaves)."""
        if node.queued == PINNED:
            self._pins.locked(node)
        elif node.queued != PROTECTED:
            if self._inner_locked is not None:
                self._inner_locked(node)
        elif (kept := self._share_of(node)) is not None:
            kept.locked(node)

    def _share_of(self, node: Node) -> LeafQueue | None:
        """Give the share in which a leaf waits, or may."""
        at = node.root.account
        while at is not None:
            if (kept := self._shares.get(at)) is not None:
                return kept
            at = at.above
        return None

    def _pop_unprotected(self) -> Node | None:
        while (node := self._inner.pop()) is not None:
            if self.shelter(node):
                continue
            if self._quotas.shares:
                self._cut_to_excess(node)
            return node
        return None

    def protect(self, node: Node) -> None:
        """Keep a leaf that is pinned from now on, if it waited in the policy's order or a share.

        Else it is looked at when it comes to the top there, and thousands of them one after the
        other by the first eviction; and a share would count it among what may go.  O(log leaves).
        In queues of other policies it waits until then.
        """
        is_ours = node.queued == PROTECTED or (
            node.queued == 1 and isinstance(self._inner, LeafQueue)
        )
        if is_ours and node.is_evictable:
            self.locked(node)  # what stands for it there is dead
            node.queued = 0
            self._pins.push(node)

    def unprotect(self, node: Node) -> None:
        """Give a leaf whose pin has ended back to the policy's order, if it waited here."""
        if node.queued == PINNED:
            node.queued = 0
            if node.is_evictable:
                self._inner.push(node)

    def unprotect_all(self) -> None:
        """Give every leaf back, with the next ones that are evicted: the shares have changed.

        O(shares).
        """
        self._returning += [*self._shares.values(), self._pins]
        self._shares, self._pins = {}, LeafQueue(Lru(), PINNED)

    def _go_on_returning(self) -> None:
        """Give back more leaves than are evicted, the oldest first: none is evicted too early."""
        for kept in self._returning:
            self._move(kept, _MOST_MOVED)
        self._returning = [kept for kept in self._returning if len(kept)]

    def _sharer(self, node: Node) -> Account | None:
        """Give the account whose share covers a leaf; None if none does."""
        if not self._quotas.shares:
            return None
        at = node.root.account
        while at is not None:
            if at.guaranteed and not node.root.retired and at.num_stored <= at.guaranteed:
                return at
            at = at.above
        return None

    def _cut_to_excess(self, node: Node) -> None:
        """Leave in a leaf only as many blocks as its accounts have above their shares."""
        at, size = node.root.account, len(node.blocks)
        while at is not None:
            if at.guaranteed and not node.root.retired:
                size = min(size, at.num_stored - at.guaranteed)
            at = at.above
        if size < len(node.blocks):
            self._tree.split_leaf(node, len(node.blocks) - size)

    def _let_go_of_excess(self) -> None:
        """Return as many blocks, the oldest first, as accounts have above their shares."""
        for account, kept in self._shares.items():
            excess = account.num_stored - account.guaranteed
            if excess > 0:
                self._move(kept, min(excess, _MOST_MOVED))

    def _move(self, kept: LeafQueue, num_blocks: int) -> None:
        while num_blocks > 0 and (node := kept.pop()) is not None:
            num_blocks -= len(node.blocks)
            if isinstance(node, Tail):
                self._tree.tails.offer(node)
            else:
                self._inner.push(node)


MAX_PINS = 65_536
_NODES = 64
"""On the paths of pins that end, which are as much work as to look at one of them."""
_MOST_ENDED = 16_384
"""Nodes on the paths of pins that are ended in one go."""
_DROPPED = 512
"""Deadlines of pins that have ended, which are dropped in one go."""

_PAUSE_EVERY = 16


@dataclass(slots=True, eq=False)
class Pin:
    """One pinned prefix."""

    node: Node
    """Where it ends; the node's run ends there, too."""
    until: float
    is_ending: bool = False
    """Whether it ends as soon as its turn comes, unless its prefix is pinned again before."""


class Pins:
    """The pins of one tree.  `node.pinned` counts those that cover a node's blocks.

    Args:
        tree: The tree.
        max_pinned: Blocks that may be pinned at the same time.
    """

    __slots__ = (
        "_blocks",
        "_deadlines",
        "_ending",
        "_ends",
        "_prefixes",
        "_roots",
        "_serial",
        "_tree",
        "shares",
    )

    def __init__(self, tree: RadixTree, max_pinned: int) -> None:
        self._tree = tree
        self._ends: dict[Node, Pin] = {}
        self._deadlines: list[tuple[float, int, Pin]] = []
        self._serial = 0
        self._roots: dict[Root, dict[Pin, None]] = {}
        """The pins below each root; only roots that have any."""
        self._ending: deque[Pin] = deque()
        """Those that were ended with so many others that each waits for its turn."""
        self._blocks = Shares(max_pinned, "--pin-cap", "pinned blocks")
        self._prefixes = Shares(MAX_PINS, "the longest list of pins", "pinned prefixes")
        self.shares = (self._blocks, self._prefixes)
        """Whose the distinct blocks are that are pinned, and whose the pins."""

    def __len__(self) -> int:
        return len(self._ends)

    def __contains__(self, root: Root) -> bool:
        return root in self._roots

    @property
    def num_pinned(self) -> int:
        """Distinct blocks that are pinned."""
        return self._blocks.total

    @property
    def max_pinned(self) -> int:
        """How many may be."""
        return self._blocks.limit

    def num_pinned_of(self, tenant: str) -> int:
        """Of these, a tenant's."""
        return self._blocks.used(tenant)

    def pin(self, match: Match, ttl_s: float, now: float) -> Pinned:
        """Pin the matched whole blocks until `now + ttl_s`; prolong the pin if there is one.

        O(nodes on the path).

        Raises:
            PoolExhausted: more than `max_pinned` blocks would be pinned, or too many prefixes.
        """
        fresh = 0 if match.node.pinned else match.used
        leased = match.used if match.node.lock_ref else 0
        above = match.node.parent
        while above is not None:
            fresh += 0 if above.pinned else len(above.blocks)
            leased += len(above.blocks) if above.lock_ref else 0
            above = above.parent
        num_blocks = match.end // self._tree.block_bytes
        tenant = match.node.root.namespace.tenant
        try:
            self._blocks.check(tenant, fresh)
            self._prefixes.check(tenant)
        except PoolExhausted as full:
            raise self._refusal(full, tenant, num_blocks, fresh, now) from None
        if num_blocks:
            node = self._tree.split_at(match)
            found = self._ends.get(node)
            if found is None:
                found = self._begin(node, now + ttl_s)
            elif found.is_ending:
                found.is_ending, found.until = False, now + ttl_s
            found.until = max(found.until, now + ttl_s)
            self._set_deadline(found)
            ttl_s = found.until - now
        return Pinned(
            num_tokens=match.end // TOKEN_BYTES,
            num_blocks=num_blocks,
            num_new=fresh,
            num_leased=leased,
            ttl_s=ttl_s,
            pinned=self.num_pinned_of(tenant),
            max_pinned=self.max_pinned,
        )

    def unpin(self, tenant: str, root: Root | None, match: Match | None) -> Unpinned:
        """End the pin that ends where `match` does; without a match, all below `root`.

        O(nodes on the path), or O(pins below `root`): of many, the last ones end with the next
        calls of `expire`, and their blocks are not in the answer.

        Args:
            tenant: Whose pinned blocks are counted in the answer.
            root: Where; None: nowhere.
            match: What was pinned; None: all.
        """
        if root is None:
            ending = []
        elif match is None:
            ending = [pin for pin in self._roots.get(root, ()) if not pin.is_ending]
        else:
            whole = match.used == len(match.node.blocks)
            found = self._ends.get(match.node) if whole else None
            ending = [] if found is None or found.is_ending else [found]
        before, leased, left = self.num_pinned, 0, _MOST_ENDED
        for pin in ending:
            if left > 0:
                spent, more = self._end(pin)
                left, leased = left - spent - _NODES, leased + more
            else:
                pin.is_ending = True
                self._ending.append(pin)
        return Unpinned(
            num_pins=len(ending),
            num_blocks=before - self.num_pinned,
            num_leased=leased,
            pinned=self.num_pinned_of(tenant),
            max_pinned=self.max_pinned,
        )

    @property
    def is_behind(self) -> bool:
        """Whether `expire` has something to do, whatever the time.  O(1)."""
        return bool(self._ending)

    def expire(self, now: float, most: float) -> None:
        """End pins whose time is over.  `next_deadline` says that there are others.

        O(log pins) for each of up to `most` pins that are looked at, and nodes on their paths.
        """
        heap, left = self._deadlines, most * _NODES
        while self._ending and left > 0:
            pin = self._ending.popleft()
            left -= _NODES
            if pin.is_ending and self._lives(pin):
                left -= self._end(pin)[0]
        while heap and heap[0][0] < now and left > 0:
            left -= _NODES
            pin = heappop(heap)[2]
            if self._lives(pin) and pin.until < now:
                left -= self._end(pin)[0]

    def next_deadline(self) -> float | None:
        """Give a time before which no pin ends; None if there are none.

        Of those that have ended, few are dropped in one go: then the time is too early.
        """
        heap = self._deadlines
        for _ in range(_DROPPED):
            if not heap or (self._lives(heap[0][2]) and heap[0][2].until == heap[0][0]):
                break
            heappop(heap)
        return heap[0][0] if heap else None

    def infos(
        self, now: float, sees: Callable[[Namespace], bool]
    ) -> Generator[None, None, tuple[PinInfo, ...]]:
        """Describe the pins of such namespaces, each as it is when its turn comes.

        O(pins + nodes on their paths), in steps of some dozen: between them other verbs may be
        called.
        """
        found, steps = [], 0
        for pin in list(self._ends.values()):
            steps += 1
            if self._lives(pin) and not pin.is_ending and sees(space := pin.node.root.namespace):
                size, at = 0, pin.node
                while at.parent is not None:
                    size, steps = size + len(at.blocks), steps + 1
                    at = at.parent
                num_tokens = size * self._tree.block_bytes // TOKEN_BYTES
                found.append(PinInfo(space, num_tokens, size, pin.until - now))
            if steps >= _PAUSE_EVERY:
                steps = 0
                yield
        return tuple(found)

    # ------------------------------------------------------------------ what the tree tells

    def trimmed(self, node: Node, num_blocks: int) -> None:
        """Take note that a pinned leaf is losing its last blocks, since nothing else was left."""
        self._blocks.give(node.root.namespace.tenant, num_blocks)

    def buried(self, node: Node, above: Node) -> None:
        """Take note that a whole pinned leaf leaves the tree: its pin ends further up now."""
        self._blocks.give(node.root.namespace.tenant, len(node.blocks))
        node.pinned = 0
        pin = self._ends.pop(node)
        if above.parent is None:
            self._leave(pin)
            return
        other = self._ends.get(above)
        if other is None:
            pin.node = above
            self._ends[above] = pin
            return
        if not pin.is_ending and (other.is_ending or pin.until > other.until):
            other.is_ending, other.until = False, pin.until
            self._set_deadline(other)
        self._leave(pin)
        self._uncover(above)

    def check(self) -> None:
        """Assert that every count is right.  O(everything that is pinned)."""
        counts: dict[Node, int] = {}
        for node, pin in self._ends.items():
            assert pin.node is node, "a pin that ends elsewhere"
            assert node.blocks, "a pin that ends at nothing"
            at = node
            while at.parent is not None:
                counts[at] = counts.get(at, 0) + 1
                at = at.parent
            assert pin.is_ending or not at.root.retired, "a pin in a namespace that was reset"
        for node, count in counts.items():
            assert node.pinned == count, f"{node.pinned} pins on a node, not {count}"
        pinned = sum(len(node.blocks) for node in counts)
        assert self.num_pinned == pinned, f"{self.num_pinned} blocks pinned, not {pinned}"
        assert pinned <= self.max_pinned, f"{pinned} blocks pinned; the cap is {self.max_pinned}"
        for root, pins in self._roots.items():
            assert pins, "a root without pins"
            assert all(pin.node.root is root and self._lives(pin) for pin in pins), "a root's pins"
        assert sum(map(len, self._roots.values())) == len(self._ends), "pins of roots"
        ending = {pin for pin in self._ends.values() if pin.is_ending}
        assert ending <= set(self._ending), "a pin that does not end"
        assert self._prefixes.total == len(self._ends), "pins counted"
        for shares in self.shares:
            shares.check_counts()

    # ------------------------------------------------------------------ covering

    def _lives(self, pin: Pin) -> bool:
        return self._ends.get(pin.node) is pin

    def _set_deadline(self, pin: Pin) -> None:
        self._serial += 1
        heappush(self._deadlines, (pin.until, self._serial, pin))
        if len(self._deadlines) > 2 * len(self._ends) + 64:
            living = [(one.until, number, one) for number, one in enumerate(self._ends.values())]
            self._deadlines, self._serial = sorted(living), len(living)

    def _cover(self, node: Node) -> None:
        at = node
        while at.parent is not None:
            if not at.pinned:
                self._blocks.force(at.root.namespace.tenant, len(at.blocks))
            at.pinned += 1
            at = at.parent
        if isinstance(queue := self._tree.queue, ProtectedQueue):
            queue.protect(node)

    def _uncover(self, node: Node) -> tuple[int, int]:
        """Take one pin from a path.

        Returns:
            The nodes on it, and the blocks that are leased, of those not pinned now.
        """
        queue = self._tree.queue
        nodes = leased = 0
        at = node
        while at.parent is not None:
            above = at.parent
            nodes += 1
            at.pinned -= 1
            if not at.pinned:
                self._blocks.give(at.root.namespace.tenant, len(at.blocks))
                leased += len(at.blocks) if at.lock_ref else 0
                if isinstance(queue, ProtectedQueue):
                    queue.unprotect(at)
            at = above
        return nodes, leased

    def _begin(self, node: Node, until: float) -> Pin:
        pin = self._ends[node] = Pin(node, until)
        self._roots.setdefault(node.root, {})[pin] = None
        self._prefixes.force(node.root.namespace.tenant)
        self._cover(node)
        return pin

    def _leave(self, pin: Pin) -> None:
        """Count one pin fewer below its root."""
        root = pin.node.root
        below = self._roots[root]
        del below[pin]
        if not below:
            del self._roots[root]
        self._prefixes.give(root.namespace.tenant)

    def _end(self, pin: Pin) -> tuple[int, int]:
        """End a pin; give the nodes on its path, and the leased blocks that are free of pins."""
        del self._ends[pin.node]
        self._leave(pin)
        spent = self._uncover(pin.node)
        self._tree.rejoin(pin.node)
        return spent

    def _refusal(
        self, full: PoolExhausted, tenant: str, num_blocks: int, fresh: int, now: float
    ) -> PoolExhausted:
        due = self.next_deadline()
        why = str(full).rstrip(".")
        return PoolExhausted(
            f"pinning {many(num_blocks, 'block')}, {fresh:,} of them new, would make "
            f"{self.num_pinned_of(tenant) + fresh}; the cap is {self.max_pinned}: {why}. "
            "Unpin something, or pin less.",
            retry_after_s=0.0 if due is None else max(0.0, due - now),
        )
