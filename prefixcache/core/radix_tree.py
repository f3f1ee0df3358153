"""The radix tree: which block holds which prefix.

One chat, drawn three times (`block_size` 4; a letter is a token; blocks 0, 1, 2 ...):

```
stored            SSSS SSAA A           root ── [SSSS|SSAA] 0 1 ── [A···] 2
                                        two whole blocks, and a tail: a node of its own, with one
                                        block, filled with 1 token

diverged inside   SSSS SSBB             root ── [SSSS] 0 ─┬─ [SSAA] 1 ── [A···] 2
a block                                                   └─ [SSBB] 3
                                        the run was split where a block ends; block 3 began as a
                                        copy of the first 2 slots of block 1

after eviction    SSAA and A went       root ── [SSSS|SSBB] 0 3
                                        one child is left, of the same age: merged again
                                        (at once without ghosts, else when they are forgotten)
```

**Ages.** `node.last_used` is the logical time at which the last lock on a node ended; locked nodes
need none.  All nodes that one unlock frees get one time, so the order of eviction is that of a
block-by-block LRU over leaves: a run is trimmed from its end, a parent is at least as young as its
children, and what was used is split from what was not.  A block that a request copies from counts
as used when the request comes, and once more when its lease ends; so does a block that covers the
tail a lease ends with.  Of which less than half was copied, it becomes that much younger only, and
the policy hears of a use once such parts add up to half of it:

```
last uses   evicted ──────────┬──────────────────── now        a quarter of the block was copied:
            last         its age now                           it is as old as half of what stays
```

**Tails** are not the policy's business: it orders the leaves as if there were none, and a leaf that
only tails follow is one.  `tails` says when they go.

**Locks** are counted on 0↔1 transitions only: a lease locks its deepest node, and an ancestor is
protected by having a locked child.

**Ghosts** are evicted nodes of which only the tokens are remembered.  They hang beside the resident
children (`node.ghosts`), never above one, and come back to life when their tokens are stored again.

**Descents.**

```
tokens    ████████ ████████ ███▒▒▒▒▒
           └ dict ──► run  └ dict ──► run, of which the first 3 tokens match: a partial block
```

**Keys** are packed tokens (little-endian uint32 `bytes`).  A descent costs one dict look-up and one
`startswith` (a memcmp) per node; there is no loop over tokens or blocks anywhere.  Byte order does
not matter for the neighbour property used below: among byte strings in sorted order, the one with
the longest common prefix with X stands directly before or after X.

**Splits and merges.**

```
split after 2        [AAAA|BBBB|CCCC]  ──►  [AAAA|BBBB] ── [CCCC]    the lower part is the old node
merge                [AAAA|BBBB] ── [CCCC]  ──►  [AAAA|BBBB|CCCC]    the lower node survives
a run grows          [AAAA|BBBB] ── [CCCC]  ──►  [AAAA|BBBB|CCCC]    the upper node survives
```

In splits and merges, the object whose run *ends* where it ended before stays the same, so that
locks, which mean "the path up to the end of this node", stay right whatever happens above it.  What
was added just now only its own lease can hold, which moves its lock.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import NamedTuple, Protocol

from prefixcache.core.block_keys import BlockKeys
from prefixcache.core.eviction import LOOKED_AT, EvictionPolicy, Mark, Queue
from prefixcache.core.ghosts import Ghosts
from prefixcache.core.kv_events import IndexListener
from prefixcache.core.node import (
    FRESH,
    Inserted,
    Match,
    Node,
    Root,
    Run,
    Tail,
    common_prefix,
    evictable_leaves,
)
from prefixcache.core.policies.lru import Lru
from prefixcache.core.tails import Tails, TailWorth
from prefixcache.types import BLOCK_ID_BYTES, TOKEN_BYTES, BlockId, BlockTable

_NO_BLOCKS: BlockTable = array("i")
"""Those of a ghost, and of a node that is no longer part of the tree; never changed."""
SWEPT = 3
"""`node.queued` of a leaf of a retired root that waits to be evicted before all others."""
_NODE_BYTES = 370
"""What a node takes beside its tokens and ids: itself, its place among its siblings, in a queue."""
_ALWAYS_MERGED = 32_768
"""Bytes of a merged run up to which copying it is cheaper than one more node on every descent."""


class PinListener(Protocol):
    """What hears when pinned blocks are evicted, since nothing else was left."""

    def trimmed(self, node: Node, num_blocks: int) -> None:
        """Hear that a pinned leaf is losing its last blocks."""

    def buried(self, node: Node, above: Node) -> None:
        """Hear that a whole pinned leaf leaves the tree, from below `above`."""


class Sunk(NamedTuple):
    """Blocks in a row that were evicted, and go to places below the pool."""

    tokens: bytes
    blocks: BlockTable
    places: BlockTable
    keys: bytes
    """Of each of them; empty if nobody needs any."""


class RadixTree:
    """All namespaces' trees over one pool of blocks.

    Args:
        block_size: Tokens per block.
        policy: The order of eviction.
        num_ghosts: How many evicted blocks to remember.
    """

    def __init__(
        self, block_size: int, *, policy: EvictionPolicy | None = None, num_ghosts: int = 0
    ) -> None:
        policy = policy or Lru()
        self.block_bytes = block_size * TOKEN_BYTES
        self.evictable = 0
        """Blocks in unprotected nodes: what eviction can give at most."""
        self.num_blocks = 0
        self.num_nodes = 0
        self.num_forgotten = 0
        """Of the blocks, those of namespaces that were reset: nobody finds them any more."""
        self.forgotten_evictable = 0
        """Of these, the unprotected ones: as good as free."""
        self.retired: list[Root] = []
        """Roots of namespaces that were reset, while blocks or leases are below them."""
        self.policy = policy
        self.listener: IndexListener | None = None
        """Who is told what enters and leaves the index."""
        # Bound once: a hook that the policy does not define costs one comparison.
        self._lost: Callable[[Node, int], Mark] | None = policy.lost
        self._forgotten: Callable[[Mark, int], None] | None = policy.forgotten
        policy.block_bytes = self.block_bytes
        self.clock = 0
        self.last_evicted: int | None = None
        """Stamp of the last use of what was evicted last; None before the first eviction."""
        self.num_evicted = 0
        """Blocks evicted since the start; what was reset before does not count."""
        self.queue: Queue = self.policy.queue()
        self._locked: Callable[[Node], None] | None = getattr(self.queue, "locked", None)
        self._used: Callable[[Node, int, Node], None] | None = self.policy.used
        self._copied: Callable[[Node, int], None] | None = self.policy.copied
        self._marks_ends = self.policy.marks_ends
        self._revived: Callable[[Node], None] | None = self.policy.revived
        self.asked: Callable[[Match, bytes], None] | None = self.policy.asked
        self.ghosts = Ghosts(num_ghosts, self.block_bytes)
        self.walks = self.ghosts.walks
        """For each walk through the tree that is on its way: what was split or merged meanwhile."""
        self.tails = Tails()
        """The unprotected tails."""
        self.worth: TailWorth | None = None
        """What is known of whether they are worth their blocks; None until half of the pool is
        used."""
        self._pool_size = 0
        """Blocks of the pool, if that is to be found out."""
        self.shelter: Callable[[Node], bool] | None = None
        """Keeps a tail for a guaranteed share that covers it; says whether one does."""
        self.pins: PinListener | None = None
        """Who is told when pinned blocks are lost."""
        self._sweeps: deque[Iterator[Node]] = deque()
        """Leaves of what was reset; they are evicted before all others.  The oldest first, so that
        none of those that have nothing left is kept by younger ones."""
        self._places: BlockTable | None = None
        """While `sink` evicts: where the blocks go that are evicted."""
        self._sunk: list[Sunk] = []
        self.keys: BlockKeys | None = None
        """By what they are known below the pool after a restart; None: by nothing."""
        self._tidy_at = 16
        """Length of `retired` at which the empty ones are dropped."""

    @property
    def num_bytes(self) -> int:
        """About what the index takes: counted for tokens and ids, so much a node.  O(1).

        Tails count as full, and what Python allocates ahead does not count.
        """
        block = self.block_bytes + BLOCK_ID_BYTES
        return self.num_blocks * block + self.num_nodes * _NODE_BYTES

    # ------------------------------------------------------------------ finding

    def match(self, root: Root, tokens: bytes, limit: int | None = None) -> Match:
        """Find the longest stored prefix of `tokens[:limit]`.  Changes nothing.

        O(nodes on the path + log siblings), plus one memcmp over the matched bytes.

        >>> from array import array
        >>> from prefixcache.core.radix_tree import RadixTree
        >>> from prefixcache.types import Namespace, pack
        >>> tree, root = RadixTree(4), Root(Namespace("m"))
        >>> start = tree.lock(tree.match(root, b""))
        >>> stored = tree.insert(start, pack([7] * 8), array("i", [0, 1]))
        >>> found = tree.match(root, pack([7, 7, 7, 7, 7, 9]))
        >>> found.end // 4, found.partial_block, found.partial_tokens
        (4, 1, 1)
        """
        width = self.block_bytes
        end = len(tokens) if limit is None else limit
        node: Node = root
        off = same = 0
        near: Node | None = None
        while off < end:
            child = node.only
            if child is None:
                if (several := node.several) is None:
                    break
                first = off + width
                key = tokens[off : first if first <= end else end]
                child = several.get(key) if first <= end else None
                if child is None:
                    near, same = several.nearest(key)
                    break
            run = child.tokens
            size = len(run)
            if tokens.startswith(run, off, end):
                if size < width:  # a tail
                    near, same = child, size
                    break
                off += size
                node = child
                continue
            same = common_prefix(tokens, off, run, 0, size if size <= end - off else end - off)
            if same < width:  # of an only child, less than a block
                near = child
                break
            used = same // width
            partial = (same - used * width) // TOKEN_BYTES
            source = BlockId(child.blocks[used]) if partial else None
            return Match(child, used, off + used * width, source, partial)
        partial = same // TOKEN_BYTES
        if not partial or near is None:
            return Match(node, len(node.blocks), off)
        return Match(node, len(node.blocks), off, BlockId(near.blocks[0]), partial, near)

    def child(self, node: Node, first: bytes) -> Node | None:
        """Give what begins with this block below `node`: a whole one, or all of a tail.

        Changes nothing.  None if there is none.  O(1).
        """
        only = node.only
        if only is None:
            return None if node.several is None else node.several.get(first)
        run = only.tokens
        if run.startswith(first) and len(first) in (len(run), self.block_bytes):
            return only
        return None

    def place(self, node: Node, end: int, at: int) -> tuple[Match, bytes]:
        """Find byte `at`, a block's start, on the path that ends with `node` at byte `end`.

        Changes nothing.  O(nodes passed).

        Returns:
            The place, to lock; and the tokens of the block that follows on the path, if any.
        """
        after = b""
        while node.parent is not None and at <= end - len(node.tokens):
            after = node.tokens[: self.block_bytes]
            end -= len(node.tokens)
            node = node.parent
        used = len(node.blocks) - (end - at) // self.block_bytes
        if at < end:
            start = used * self.block_bytes
            after = node.tokens[start : start + self.block_bytes]
        return Match(node, used, at), after

    def remembered(self, match: Match, tokens: bytes) -> int:
        """Count the bytes after the resident match that ghosts remember.  Changes nothing."""
        node = match.node
        if match.used != len(node.blocks) or not node.ghosts:
            return 0
        return self.ghosts.match(node, tokens, match.end)

    def trail(self, match: Match, tokens: bytes) -> list[tuple[int, int]]:
        """Give (tokens, burial) of each ghost that continues the match.  Changes nothing."""
        node = match.node
        if match.used != len(node.blocks) or not node.ghosts:
            return []
        found = self.ghosts.trail(node, tokens, match.end)
        return [(size // TOKEN_BYTES, burial) for size, burial in found]

    def parting(self, match: Match, tokens: bytes, limit: int) -> bytes | None:
        """Give the stored run that continues where `tokens` leave it; None if none differs there.

        Changes nothing.  The first `match.partial_tokens` tokens of the run are those that match;
        of what follows, up to `limit` bytes are given.  O(log siblings + nodes passed).
        """
        into = match.partial_tokens * TOKEN_BYTES
        if len(tokens) - match.end <= into:
            return None
        node, at = match.node, match.used * self.block_bytes
        if match.used == len(node.blocks):
            near = match.near
            if near is None and len(tokens) - match.end <= TOKEN_BYTES:  # not looked for yet
                near, _ = node.nearest(tokens[match.end : match.end + self.block_bytes])
            below = near or node.only or node.any_child()
            if below is None:
                return None
            node, at = below, 0
        run = node.tokens[at : at + into + limit]
        while len(run) < into + limit and (below := node.only or node.any_child()) is not None:
            node = below
            run += node.tokens[: into + limit - len(run)]
        return run if len(run) > into else None

    def continuation(self, root: Root, tokens: bytes, limit: int) -> bytes:
        """Give up to `limit` bytes of one stored prompt that begins with `tokens`.

        Changes nothing.  Empty if none does.  O(nodes passed).
        """
        match = self.match(root, tokens)
        rest = tokens[match.end :]
        if len(rest) != match.partial_tokens * TOKEN_BYTES:
            return b""
        node: Node | None = match.node
        at = match.used * self.block_bytes + len(rest)
        if match.used == len(match.node.blocks):
            node = match.node.nearest(rest)[0] if rest else match.node.any_child()
            at = len(rest)
        found = b""
        while node is not None and len(found) < limit:
            found += node.tokens[at : at + limit - len(found)]
            at = 0
            node = node.any_child()
        return found

    def set_queue(self, queue: Queue, shelter: Callable[[Node], bool]) -> None:
        """Have another queue around the one that there is.  O(1).

        Args:
            queue: Takes what becomes evictable from now on.
            shelter: Keeps a leaf that must not go yet; says whether it does.
        """
        self.queue, self.shelter = queue, shelter
        self._locked = getattr(queue, "locked", None)

    # ------------------------------------------------------------------ locking

    def lock(self, match: Match) -> Node:
        """Protect the matched whole blocks from eviction.  Splits the run they end in, if inside.

        O(nodes on the path that were unprotected), plus one copy of a split run.
        """
        node = match.node
        if match.used < len(node.blocks):
            node = self._split(node, match.used)
        self.lock_node(node, finds=True)
        return node

    def split_at(self, match: Match) -> Node:
        """Give the node that ends where the matched whole blocks do.  Splits the run, if inside."""
        node = match.node
        return self._split(node, match.used) if match.used < len(node.blocks) else node

    def touch(self, match: Match) -> Node:
        """Count the block that a locked match copies from as used now.

        What the policy has noted of it stays, until `use`.  O(1), plus one copy of the run that
        begins with the block.

        Returns:
            What holds the block and no other.
        """
        node = match.near or match.node  # `split_at` has let it begin with the block
        if node.tail and self.worth is not None and not node.lock_ref:
            self.worth.found_tail(node.last_used, match.partial_tokens)
        if len(node.blocks) > 1:
            node = self._split(node, 1)
        self.clock += 1
        self._renew(node, match.partial_tokens)
        return node

    def use(self, node: Node, num_copied: int = 0) -> None:
        """Count the first block of a run below a locked one as used, for the policy too.

        A policy without a hook for copies counts whole uses: it hears of one when half of the block
        was copied since the last, be it by one request or by many.  O(log leaves), plus what the
        policy needs, plus one copy of the run.

        Args:
            node: The run.
            num_copied: Tokens of the block that were copied; 0: all of it was of use.
        """
        if len(node.blocks) > 1:
            node = self._split(node, 1)
        self.clock += 1
        self._renew(node, num_copied)
        if self._used is None or node.tail:
            return
        above, root = node.parent, node.in_root
        assert above is not None
        if self._copied is not None:
            self._copied(node, num_copied or self.block_bytes // TOKEN_BYTES)
        else:
            node.copied += num_copied
            if num_copied and 2 * node.copied * TOKEN_BYTES < self.block_bytes:
                return  # all that was copied is no use to count yet
            node.copied = 0
            self._used(node, self.clock, above)
        if node.lock_ref or root is None or root.retired or node.is_inner:
            return
        if node.queued and self._locked is not None:
            self._locked(node)  # what stands for it there may be of no more use
        self._offer(node, root)

    def _renew(self, node: Node, num_copied: int) -> None:
        """Make a block, below a locked one, the youngest of all; or as young as it has earned.

        Half a block that is copied in the time that blocks stay is worth as much as a whole one
        that is found each second time.  A smaller part earns a place for a part of that time.
        Where it waits in a queue it stays: there keys may be older than their leaves.
        """
        if isinstance(node, Tail):
            is_small = 0 < 2 * num_copied * TOKEN_BYTES < len(node.tokens)
            self.tails.found(node, self.clock, is_enough=not is_small)
        if node.lock_ref or node.parent is None:
            return
        stamp, whole = self.clock, self.block_bytes
        lacking = whole - 2 * num_copied * TOKEN_BYTES
        if num_copied and lacking > 0 and not node.tail and self.last_evicted is not None:
            stamp -= (stamp - self.last_evicted) * lacking // whole
            stamp = max(stamp, node.last_used)
        if self.worth is not None and not node.tail:
            self.worth.leave(node.last_used, 1)
            self.worth.enter(stamp, 1)
        node.last_used = stamp
        node.parent.last_used = self.clock

    def after(self, node: Node, end: int, at: int, tokens: bytes) -> Node | None:
        """Give what begins with a block of these tokens at byte `at`, beside the path to `node`.

        Changes nothing.  None if there is none, or if it is on that path, which ends at byte `end`.
        O(nodes passed).
        """
        below: Node | None = None
        while node.parent is not None and end - len(node.tokens) >= at:
            below = node
            end -= len(node.tokens)
            node = node.parent
        found = self.child(node, tokens) if end == at else None
        return None if found is below else found

    def cover(self, node: Node, tokens: bytes) -> Node | None:
        """Give what begins with a block, after `node`, that begins with these tokens.

        Changes nothing.  None if there is none.  O(log siblings).
        """
        near, same = node.nearest(tokens)
        return near if same == len(tokens) else None

    def split_leaf(self, node: Node, used: int) -> None:
        """Let a leaf have only the blocks after its first `used` ones."""
        self._split(node, used)

    def rejoin(self, node: Node) -> None:
        """Merge a node with what it was kept apart from, if nothing tells them apart any more."""
        child = node.only
        if child is not None and self._merge(child):
            node = child
        self._merge(node)

    def lock_node(self, node: Node, *, finds: bool = False) -> None:
        """Protect the path to the end of `node` once more.  O(nodes that were unprotected).

        Args:
            node: Where it ends.
            finds: Whether a request has found this path.
        """
        size = 0
        worth = self.worth
        at: Node | None = node
        while at is not None:
            ref = at.lock_ref
            at.lock_ref = ref + 1
            if ref:
                break
            size += len(at.blocks)
            if worth is not None:
                if finds:
                    worth.found(at.last_used, len(at.blocks))
                elif at.tail:
                    worth.leave_tail(at.last_used)
                else:
                    worth.leave(at.last_used, len(at.blocks))
            at = at.parent
        if size:
            self._count_evictable(node.in_root or node.root, -size)
            if node.queued and node.queued != SWEPT:
                only, several = node.only, node.several
                is_leaf = (
                    only.tail
                    if only is not None
                    else several is None or several.num_tails == len(several)
                )
                if is_leaf and self._locked is not None:  # else it heard of it when it was a leaf
                    self._locked(node)
            elif isinstance(node, Tail):
                self.tails.drop(node)

    def unlock(self, node: Node, tail: Node | None = None) -> BlockTable | None:
        """Take one lock back, and that on its tail; what becomes unprotected counts as used now.

        Merges what can be merged on the way.  O(nodes that become unprotected).

        Returns:
            The block of a tail that a fuller sibling covers: it has left the tree.
        """
        absorbed: BlockTable | None = None
        if (
            tail is not None
            and tail.lock_ref == 1
            and node.several is not None
            and (absorbed := self._absorb(tail)) is not None
        ):
            tail = None
        stamp = self.clock = self.clock + 1
        if self._used is not None:
            size = len(node.blocks)
            if self._marks_ends and size > 1 and not node.is_inner:
                self._split(node, size - 1)
            self._used(node, stamp, node.in_root or node.root)
        if tail is not None:
            node.lock_ref -= 1  # the tail keeps it locked: both become unprotected in one step
            node = tail
        self._unlock(node, stamp)
        if self.worth is None and 0 < self._pool_size < 2 * self.num_blocks:
            self.worth = TailWorth(stamp + 1, self._pool_size, self.block_bytes)
            self.tails.worth = self.ghosts.worth = self.worth
        return absorbed

    def weigh_tails(self, num_blocks: int) -> None:
        """Find out from now on whether tails are worth their blocks, of a pool of so many."""
        self._pool_size = num_blocks

    def _unlock(self, node: Node, stamp: int) -> None:
        root, size, worth = node.in_root or node.root, 0, self.worth
        at: Node | None = node
        below: Node | None = None
        while at is not None:
            if at.last_used < stamp:
                at.last_used = stamp
            else:
                stamp = at.last_used
            at.lock_ref = ref = at.lock_ref - 1
            if ref:
                if ref < 0:
                    raise AssertionError(
                        f"unlocked a node that is not locked: {at.tokens[:64].hex()}"
                    )
                break
            size += len(at.blocks)
            if worth is not None:
                if at.tail:
                    worth.enter_tail(stamp)
                else:
                    worth.enter(stamp, len(at.blocks))
            only, several = at.only, at.several
            if (
                only.tail
                if only is not None
                else several is None or several.num_tails == len(several)
            ):
                if at.tail or root.retired:
                    self._offer(at, root)
                else:
                    self.queue.push(at)
            elif only is not None and below is not None and self._merge(below):
                at = below
            below, at = at, at.parent
        if size:
            self._count_evictable(root, size)

    def _count_evictable(self, root: Root, more: int) -> None:
        """Count blocks that have become unprotected; below 0: that are protected now."""
        self.evictable += more
        root.evictable += more
        root.sums.evictable += more
        if root.retired:
            self.forgotten_evictable += more

    def leave_tail(self, tail: Node) -> BlockTable | None:
        """Take the lock on a tail back: its lease goes on, and writes elsewhere.  O(log siblings).

        Returns:
            Its block, if a fuller sibling covers it: it has left the tree.
        """
        absorbed = self._absorb(tail)
        if absorbed is None:
            self.clock += 1
            self._unlock(tail, self.clock)
        return absorbed

    def _absorb(self, tail: Node) -> BlockTable | None:
        """Remove a tail, before its last unlock, if a fuller sibling holds its tokens too."""
        cover = self._covering(tail) if tail.lock_ref == 1 else None
        if cover is None:
            return None
        self.remove_tail(tail)
        self.use(cover)
        return tail.blocks

    # ------------------------------------------------------------------ growing

    def insert(self, node: Node, tokens: bytes, blocks: BlockTable) -> Inserted:
        """Index whole blocks that follow `node`; move the caller's lock to where they end.

        What somebody else indexed in the meantime stays as it is; only the rest is added.
        O(new tokens + nodes passed).

        Args:
            node: Locked by the caller; the tokens follow its end.
            tokens: A whole number of blocks.
            blocks: As many ids.
        """
        width = self.block_bytes
        start = node
        off, end = 0, len(tokens)
        absorbed: list[int] = []
        while off < end:
            if node.only is None and node.several is None:
                break
            child = self.child(node, tokens[off : off + width])
            if child is None:
                break
            size = len(child.tokens)
            if tokens.startswith(child.tokens, off):
                off += size
                node = child
                continue
            used = common_prefix(tokens, off, child.tokens, 0, min(size, end - off)) // width
            node = self._split(child, used)
            off += used * width
            break
        existing = off // width
        if node is not start:
            self.lock_node(node)
            self._unlock(start, 0)
        if off < end:
            if off:
                tokens, blocks = tokens[off:], blocks[existing:]
            node = self._attach(node, tokens, blocks, absorbed)
            node = self._merge(node, is_new=True) or node
        elif node is not start:
            self._merge(node)
        return Inserted(node, existing, end // width - existing, absorbed)

    def insert_tail(
        self, node: Node, tokens: bytes, block: BlockTable
    ) -> tuple[Node | None, list[int]]:
        """Index a partly filled block after `node`, locked, as a locked leaf of its own.

        Returns:
            The leaf, or None if a stored block covers these tokens already; and the blocks of
            shorter tails that this one made superfluous.
        """
        absorbed: list[int] = []
        _, same = node.nearest(tokens)
        if same == len(tokens):
            return None, absorbed
        node.lock_ref += 1  # the caller's; the first one goes down to the tail
        return self._attach(node, tokens, block, absorbed), absorbed

    def remove_tail(self, tail: Node) -> None:
        """Take a tail that the caller has locked out of the tree.  Its block is not freed."""
        if self.listener is not None:
            self._tell_removed(tail, tail.blocks)
        above = self._detach(tail)
        self._unlock(above, 0)
        self._tailless(above)

    def _attach(self, node: Node, run: bytes, blocks: BlockTable, absorbed: list[int]) -> Node:
        """Add a run below `node`: revive the ghosts that it covers, absorb the tail it extends.

        The caller's lock on `node` becomes one on what is added: the run is never unprotected.
        """
        width = self.block_bytes
        while run:
            ghost = self.ghosts.revive(node, run) if node.ghosts else None
            if ghost is None:
                if len(run) < width:
                    return self._adopt(node, Tail(run, blocks, node, self.clock), absorbed)
                return self._adopt(node, Run(run, blocks, node, self.clock), absorbed)
            size = len(ghost.tokens)
            count = -(-size // width)
            ghost.blocks = blocks[:count]
            ghost.last_used = self.clock
            if not ghost.tail:
                ghost.copied = 0
                if self._revived is None:
                    ghost.mark = None
                else:
                    self._revived(ghost)
            tier = None if ghost.places is None else self.ghosts.tier
            if tier is not None:
                tier.rise(ghost, ghost.blocks)
            node = self._adopt(node, ghost, absorbed)
            if tier is not None:
                tier.clear(ghost)  # lost below after it was stored above
            run, blocks = run[size:], blocks[count:]
        return node

    # ------------------------------------------------------------------ eviction

    def evict(self, num_blocks: int) -> BlockTable:
        """Take blocks out of the tree, the coldest leaf's last ones first.

        Asked for n, gives n, or all that is unprotected.  What was reset goes first, and is not
        counted as evicted: nobody could find it.  O(leaves touched · log leaves).
        """
        out, tails = array("i"), self.tails
        if self.worth is not None:
            self.worth.make_room(self.evictable - num_blocks, num_blocks)
        need = num_blocks
        while need > 0:
            node = self._next_retired() if self._sweeps else None
            if node is None and (tails.fresh.first or tails.again.first) is not None:
                node = tails.due() if self.shelter is None else self._due_tail()
            if node is None:
                node = self.queue.pop() or tails.first()
                if node is None:
                    break
                if self._places is not None and self._is_kept(node):
                    if node not in tails:  # there it still is
                        self.queue.push(node)
                    break
            if node.only is not None or node.several is not None:  # tails: they go before it
                self._offer(node, node.root)
                node = node.only or self._last_tail(node)
            root, size = node.root, len(node.blocks)
            keep = size - need
            if not root.retired:
                if not node.tail:
                    self.last_evicted = node.last_used
                self.num_evicted += need if keep > 0 else size
            need -= size
            if keep > 0:
                out += node.blocks[keep:]
                self._evict_tail(root, node, keep)
                self._offer(node, root)
            else:
                out += node.blocks
                self._evict_leaf(root, node)
        return out

    def _due_tail(self) -> Node | None:
        """Give a tail that goes before the policy's next leaf; None if none does.  O(log leaves).

        Of those within a guaranteed share, which go with what they follow, some are set aside.
        """
        for _ in range(LOOKED_AT):
            tail = self.tails.due()
            if tail is None or self.shelter is None or not self.shelter(tail):
                return tail
            self.tails.drop(tail)
        return None

    @staticmethod
    def _last_tail(node: Node) -> Node:
        """Give a tail below a leaf that has several: the last in the order of tokens.  O(1)."""
        if node.several is None:
            raise AssertionError("a leaf has lost its tails")
        return node.several.last()

    def sink(self, num_blocks: int, places: BlockTable) -> tuple[list[Sunk], BlockTable]:
        """Evict blocks before anybody needs them, in the usual order; let them keep what they held.

        Fewer if nothing else is left but what is pinned or within a guaranteed share.  Partly
        filled blocks, and what was reset, get none.  O(leaves touched · log leaves).

        Args:
            num_blocks: How many.
            places: Below the pool, taken; those that are left over stay in here.

        Returns:
            What goes to a place, and the other blocks, which have left the tree all the same.
        """
        self.forget()  # those that have just lost their places are ghosts like any other
        self._places = places
        evicted = self.evict(num_blocks)
        self._places = None
        if self.keys is not None:
            self.keys.forget()
        sunk, self._sunk = self._sunk, []
        going = {block for one in sunk for block in one.blocks}
        if len(going) == len(evicted):
            return sunk, array("i")
        return sunk, array("i", [block for block in evicted if block not in going])

    def _is_kept(self, node: Node) -> bool:
        """Whether a leaf is evicted for need only."""
        keeps = getattr(self.queue, "keeps", None)
        return keeps is not None and bool(keeps(node))

    def _give_places(
        self, ghost: Node, blocks: BlockTable, above: Node | None, between: bytes
    ) -> None:
        """Give what is being buried its places, as far as there are any.

        Args:
            ghost: What is being buried.
            blocks: It had so far.
            above: A node above it, which has children.
            between: The tokens of what stays between the two.
        """
        tier = self.ghosts.tier
        if not self._places or tier is None:
            return
        count = min(len(ghost.tokens) // self.block_bytes, len(self._places))
        if count:
            places, going = self._places[:count], blocks[:count]
            del self._places[:count]
            tokens, keys = ghost.tokens[: count * self.block_bytes], b""
            if self.keys is not None and above is not None:
                told = self.keys.behind(above, between + tokens)[-count:]
                tier.supersede(told)
                keys = told.tobytes()
            tier.copy(ghost, going, places)
            self._sunk.append(Sunk(tokens, going, places[:], keys))

    def evict_beside(self, node: Node, num_blocks: int) -> BlockTable:
        """Evict as `evict` does, but nothing on the path to the end of `node`.

        O(nodes on the path + leaves touched · log leaves).
        """
        self.lock_node(node)
        out = self.evict(num_blocks)
        self._unlock(node, 0)
        return out

    def drop_namespace(self, root: Root) -> None:
        """Let nothing below `root` be found any more.  Amortised O(1).

        Its unprotected blocks are the first to be evicted; the others follow once unlocked.
        """
        if self.listener is not None:
            self.listener.cleared(root.namespace)
        root.retired = True
        if root.account is not None:
            root.account.retire(root)
        self.num_forgotten += root.num_blocks
        self.forgotten_evictable += root.evictable
        if root.num_blocks or root.lock_ref > 1:
            if len(self.retired) >= self._tidy_at:
                self.retired = [old for old in self.retired if old.num_blocks or old.lock_ref > 1]
                self._tidy_at = 2 * len(self.retired) + 16
            self.retired.append(root)
        if root.evictable:
            self._sweeps.append(evictable_leaves(root))
        if self.ghosts.tier is not None:
            self.ghosts.tier.sweep(root)

    def _next_retired(self) -> Node | None:
        while self._sweeps:
            node = next(self._sweeps[0], None)
            if node is None:
                self._sweeps.popleft()
                continue
            node.queued = 0
            if node.is_evictable:
                return node
        return None

    def _offer(self, node: Node, root: Root) -> None:
        """Let a leaf that has just become evictable be evicted: in its turn, or first of all."""
        if root.retired:
            if node.queued != SWEPT:
                node.queued = SWEPT
                self._sweeps.append(iter((node,)))
        elif isinstance(node, Tail):
            self.tails.offer(node)
        else:
            self.queue.push(node)

    def _evict_tail(self, root: Root, node: Node, keep: int) -> None:
        """Cut a leaf's last blocks off; they become a ghost below it."""
        cut = keep * self.block_bytes
        size = len(node.blocks) - keep
        root.num_changes += 1
        if node.pinned and self.pins is not None:
            self.pins.trimmed(node, size)
        mark = None if self._lost is None else self._lost(node, size)
        self._uncount(root, size)
        if self.ghosts.limit and not root.retired:
            ghost = Run(node.tokens[cut:], _NO_BLOCKS, node, node.last_used)
            ghost.divergence = node.divergence
            ghost.mark = mark
            if self._places:
                # Told before they are removed above.
                self._give_places(ghost, node.blocks[keep:], node.parent, node.tokens[:cut])
            if node.ghosts:
                ghost.ghosts, node.ghosts = node.ghosts, None
                self.ghosts.adopt_children(ghost)
            self.ghosts.bury(node, ghost)
        else:
            if self._forgotten is not None:
                self._forgotten(mark, size)
            if self.worth is not None:
                self.worth.leave(node.last_used, size)
        if self.listener is not None:
            self._tell_removed(node, node.blocks[keep:])
        node.tokens = node.tokens[:cut]
        node.blocks = node.blocks[:keep]
        node.divergence = None
        self.forget()

    def _evict_leaf(self, root: Root, node: Node) -> None:
        """Take a whole leaf out; it becomes a ghost."""
        above = node.parent
        if above is None:
            raise AssertionError("a root is never evicted")
        size = len(node.blocks)
        mark = None if self._lost is None or node.tail else self._lost(node, size)
        self._uncount(root, size)
        self._detach(node)
        if node.pinned and self.pins is not None:
            self.pins.buried(node, above)
        blocks, node.blocks = node.blocks, _NO_BLOCKS
        if not node.tail:
            node.mark = mark
        if self.ghosts.limit and not root.retired:
            node.parent = above
            if self._places:
                self._give_places(node, blocks, above, b"")
            self.ghosts.bury(above, node)
            self.forget()
        else:
            if self._forgotten is not None and not node.tail:
                self._forgotten(mark, size)
            if self.worth is not None:
                self.worth.forget(node)
        if self.listener is not None:
            self._tell_removed(node, blocks)
        if node.tail:
            self._tailless(above)
        else:
            self._leafless(above)

    def forget(self) -> None:
        """Drop the oldest ghosts over the limit, and merge what only they kept apart."""
        ghosts = self.ghosts
        if ghosts.num_blocks <= ghosts.limit and ghosts.num_tails <= ghosts.limit:
            return
        for above in ghosts.forget():
            if above.blocks and above.only is not None:
                self._merge(above.only)

    def _leafless(self, above: Node) -> None:
        """Look again at a node that has lost a child: a leaf now, or one child left to merge."""
        if above.is_evictable:
            self._offer(above, above.root)
        elif above.only is not None:
            self._merge(above.only)

    def _tailless(self, above: Node) -> None:
        """Look again at a node that has lost a tail: one child may be left to merge."""
        if above.only is not None:
            self._merge(above.only)

    # ------------------------------------------------------------------ how nodes are joined

    def _adopt(self, node: Node, child: Node, absorbed: list[int]) -> Node:
        """Make a node with blocks a child, locked instead of `node`; drop the tail it covers."""
        child.lock_ref = 1
        width = self.block_bytes
        if child.tail:  # it may have been found before it was evicted
            child.tail = FRESH
        tail = node.only  # most often that of the same chat: it goes first, so no dict is made
        if tail is not None and tail.tail and self._covers(child, tail):
            self._swallow(tail, absorbed)
            node.only = child
        else:
            tail = node.put(child, width)
            if tail is not None and tail.tail and self._covers(child, tail):
                self._swallow(tail, absorbed)
        self.num_nodes += 1
        root, size = child.in_root or node.root, len(child.blocks)
        self.num_blocks += size
        root.num_blocks += size
        root.sums.num_blocks += size
        if root.retired:
            self.num_forgotten += size
        root.num_changes += 1
        if self.listener is not None and not root.retired:
            parent = BlockId(node.blocks[-1]) if node.blocks else None
            self.listener.stored(root.namespace, parent, child.tokens, child.blocks)
        return child

    @staticmethod
    def _covers(child: Node, tail: Node) -> bool:
        """Whether a run makes a tail superfluous that nobody protects."""
        return not tail.lock_ref and child.tokens.startswith(tail.tokens)

    def _swallow(self, tail: Node, absorbed: list[int]) -> None:
        """Take an unprotected tail out: what follows the same node holds its tokens, too."""
        absorbed.extend(tail.blocks)
        if self.listener is not None:
            self._tell_removed(tail, tail.blocks)
        self._uncount(tail.root, len(tail.blocks))
        if self.worth is not None:
            self.worth.leave_tail(tail.last_used)
        self._detach(tail)

    def _tell_removed(self, node: Node, blocks: BlockTable) -> None:
        """Tell the listener that `blocks`, of `node`, leave the index."""
        if self.listener is not None and not node.root.retired:
            self.listener.removed(node.root.namespace, blocks)

    def _uncount(self, root: Root, size: int) -> None:
        """Count fewer unprotected blocks."""
        self.num_blocks -= size
        self.evictable -= size
        root.num_blocks -= size
        root.sums.num_blocks -= size
        root.evictable -= size
        root.sums.evictable -= size
        if root.retired:
            self.num_forgotten -= size
            self.forgotten_evictable -= size

    def _detach(self, node: Node) -> Node:
        """Unlink a leaf from its parent, which is given.  A locked leaf's blocks are uncounted."""
        root, above = node.in_root, node.parent
        if root is None or above is None:
            raise AssertionError("only a child can be detached")
        above.drop(node, self.block_bytes)
        if isinstance(node, Tail):
            self.tails.drop(node)
        root.num_changes += 1
        node.parent = None
        self.num_nodes -= 1
        if node.lock_ref:
            size = len(node.blocks)
            self.num_blocks -= size
            root.num_blocks -= size
            root.sums.num_blocks -= size
            if root.retired:
                self.num_forgotten -= size
        return above

    def _covering(self, tail: Node) -> Node | None:
        """Give a sibling that holds a tail's tokens, too, and more; None if there is none."""
        above = tail.parent
        if above is None or above.several is None:
            return None
        after = above.several.after(tail.tokens)
        return after if after is not None and after.tokens.startswith(tail.tokens) else None

    def _split(self, node: Node, used: int) -> Node:
        """Split a run after `used` blocks; `node` stays the lower part, the upper one is given."""
        above = node.parent
        if above is None or not 0 < used < len(node.blocks):
            raise AssertionError(f"cannot split {len(node.blocks)} blocks after {used}")
        width = self.block_bytes
        cut = used * width
        key = node.tokens
        upper = Run(key[:cut], node.blocks[:used], above, node.last_used)
        upper.lock_ref = 1 if node.lock_ref else 0
        upper.mark = node.mark
        upper.pinned = node.pinned
        upper.copied, node.copied = node.copied, 0
        node.tokens = key[cut:]
        node.blocks = node.blocks[used:]
        node.parent = upper
        upper.only = node
        above.replace(node, upper, width)
        self.num_nodes += 1
        for moved in self.walks:
            moved.append(upper)
        return upper

    def _merge(self, node: Node, *, is_new: bool = False) -> Node | None:
        """Join a node with its parent if nothing but age or size told them apart.

        `node` survives, so that locks on it stay valid; nobody can hold the parent itself, since
        its only reference is that of its only child.  What `is_new` nobody can hold either: then
        the parent survives, with its place in the queue, where each turn of a chat would leave a
        dead entry.  A small run is not merged into one that is far larger: copying it again for
        each new block would make a growing chat quadratic.

        Returns:
            What has survived; None if they stay two.
        """
        above = node.parent
        if above is None or above.parent is None or above.ghosts or node.parent is None:
            return None
        if above.only is not node or node.tail:
            return None
        if above.lock_ref != (1 if node.lock_ref else 0) or (
            not node.lock_ref and above.last_used != node.last_used
        ):
            return None
        if above.mark is not node.mark and above.mark != node.mark:
            return None  # the policy tells them apart
        if above.pinned != node.pinned:
            return None  # a pin ends between them
        large, small = len(above.tokens), len(node.tokens)
        if large + small > _ALWAYS_MERGED and large > 8 * small:
            return None
        self.num_nodes -= 1
        if is_new and not node.ghosts:
            for moved in self.walks:
                moved.append(above)
            above.tokens += node.tokens
            above.blocks = above.blocks + node.blocks
            above.last_used = max(above.last_used, node.last_used)
            above.only = above.divergence = node.parent = None
            node.tokens, node.blocks = b"", _NO_BLOCKS
            return above
        top = above.parent
        for moved in self.walks:
            moved.append(node)
        node.tokens = above.tokens + node.tokens
        node.blocks = above.blocks + node.blocks
        node.copied = above.copied
        node.parent = top
        if above.last_used > node.last_used:
            node.last_used = above.last_used
        top.replace(above, node, self.block_bytes)
        above.parent = above.only = above.mark = None
        above.tokens, above.blocks = b"", _NO_BLOCKS
        return node

    # ------------------------------------------------------------------ invariants

    def check(self, roots: Iterable[Root], locks: Mapping[Node, int]) -> BlockTable:
        """Assert every invariant of the trees below `roots`.  O(everything).

        Args:
            roots: Those of all namespaces; the retired ones are known here.
            locks: How often each node is locked from outside.

        Returns:
            The indexed blocks, in any order.
        """
        indexed: BlockTable = array("i")
        evictable = nodes = forgotten = as_free = 0
        for root in [*roots, *self.retired]:
            free, others = 0, len(indexed)
            stack: list[Node] = [root]
            while stack:
                node = stack.pop()
                self._check_node(node, locks)
                indexed.extend(node.blocks)
                nodes += node is not root
                free += 0 if node.lock_ref else len(node.blocks)
                stack.extend(node.children)
            assert root.num_blocks == len(indexed) - others, "blocks of a root"
            assert root.evictable == free, f"{free} blocks evictable, not {root.evictable}"
            evictable += free
            if root.retired:
                forgotten += root.num_blocks
                as_free += free
        assert self.num_blocks == len(indexed), "blocks of all trees"
        assert self.evictable == evictable, f"{evictable} evictable, not {self.evictable}"
        assert self.num_forgotten == forgotten, f"{forgotten} forgotten, not {self.num_forgotten}"
        assert self.forgotten_evictable == as_free, f"{as_free}, not {self.forgotten_evictable}"
        assert self.num_nodes == nodes, f"{nodes} nodes, not {self.num_nodes}"
        return indexed

    def check_run(self, node: Node) -> int:
        """Assert what holds of one run alone.  O(children), in few calls.

        Returns:
            How often it is locked from outside.
        """
        name = _name(node)
        children, several = node.children, node.several
        assert node.ghosts is None or node.ghosts, f"{name}: a list of no ghosts"
        if several is not None:
            assert node.only is None, f"{name}: an only child, and others"
            assert len(several) > 1, f"{name}: several children, which are not"
        below = sum([1 for child in children if child.lock_ref])
        if node.parent is not None:
            width = self.block_bytes
            assert len(node.blocks) == -(-len(node.tokens) // width), f"{name}: blocks and tokens"
            assert node.blocks, f"{name}: a node without blocks"
            if node.tail:
                assert len(node.tokens) < width, f"{name}: a tail that is full"
                assert not children, f"{name}: a tail that goes on"
                assert not node.ghosts, f"{name}: a ghost below a tail"
            else:
                assert not len(node.tokens) % width, f"{name}: a tail in a run"
            if node.is_evictable and not node.root.retired:
                waits = node.queued or (node.tail and node in self.tails)
                assert waits, f"{name}: an evictable leaf is not queued"
        if several is not None:
            tails = sum([1 for child in children if child.tail])
            assert several.num_tails == tails, f"{name}: {several.num_tails} tails, not {tails}"
        return node.lock_ref - below - (1 if node.parent is None else 0)

    def check_child(self, node: Node, first: bytes, child: Node) -> None:
        """Assert what holds between a run and one below it.  O(log siblings)."""
        name = _name(node)
        assert child.parent is node, f"{name}: a child with another parent"
        assert child.root is node.root, f"{name}: a child with another root"
        assert child.tokens.startswith(first), f"{name}: a child under another key"
        short = min(self.block_bytes, len(child.tokens))
        assert len(first) == short, f"{name}: a short key"
        assert node.lock_ref or child.last_used <= node.last_used, (
            f"{name}: younger than its parent"
        )
        if child.tail and not child.lock_ref:
            assert self._covering(child) is None, f"{name}: a covered tail"

    @staticmethod
    def check_ghost(node: Node, ghost: Node) -> None:
        """Assert what holds between a run and a ghost beside its children.  O(1)."""
        name = _name(node)
        assert not ghost.blocks, f"{name}: a ghost with blocks"
        assert ghost.parent is node, f"{name}: a ghost with another parent"

    def _check_node(self, node: Node, locks: Mapping[Node, int]) -> None:
        outside = self.check_run(node)
        assert outside == locks.get(node, 0), f"{_name(node)}: ref {node.lock_ref}"
        if node.only is not None:
            self.check_child(node, node.only.tokens[: self.block_bytes], node.only)
        elif node.several is not None:
            node.several.check()
            for first, child in node.several.items():
                self.check_child(node, first, child)
        for ghost in (node.ghosts or {}).values():
            self.check_ghost(node, ghost)


def _name(node: Node) -> str:
    """Name a run in a failure."""
    return node.tokens[:16].hex() or "root"
