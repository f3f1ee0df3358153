"""The radix tree: which block holds which prefix.

One chat, drawn three times (`block_size` 4; a letter is a token; blocks 0, 1, 2 ...):

```
stored            SSSS SSAA A           root ── [SSSS|SSAA|A···] 0 1 2
                                        two whole blocks, and a tail: a leaf's last block, filled
                                        with 1 token

diverged inside   SSSS SSBB             root ── [SSSS] 0 ─┬─ [SSAA|A···] 1 2
a block                                                   └─ [SSBB] 3
                                        the run was split where a block ends; block 3 began as a
                                        copy of the first 2 slots of block 1

after eviction    SSAA and A went       root ── [SSSS|SSBB] 0 3
                                        one child is left, of the same age: merged again
                                        (at once without ghosts, else when they are forgotten)
```

**Ages.** `node.last` is the logical time at which the last lock on a node ended; locked nodes need
none.  All nodes that one unlock frees get one time, so the order of eviction is that of a
block-by-block LRU over leaves: a run is trimmed from its end, a parent is at least as young as its
children, and what was used is split from what was not.  A block of which a request copies half or
more counts as used when the request comes.

**Locks** are counted on 0↔1 transitions only: a lease locks its deepest node, and an ancestor is
protected by having a locked child.

**Ghosts** are evicted nodes of which only the tokens are remembered.  They hang beside the resident
children (`node.ghosts`), never above one, and come back to life when their tokens are stored again.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prefixcache.core.children import common_prefix
from prefixcache.core.descent import Descent
from prefixcache.core.eviction import EvictionPolicy, Queue
from prefixcache.core.ghosts import Ghosts
from prefixcache.core.node import Grown, Match, Node, Root, evictable_leaves
from prefixcache.core.policies.lru import Lru
from prefixcache.types import TOKEN_BYTES, BlockId, BlockTable

if TYPE_CHECKING:
    from prefixcache.core.pins import Pins

SWEPT = 3
"""`node.queued` of a leaf of a retired root that waits to be evicted before all others."""


class RadixTree(Descent):
    """All namespaces' trees over one pool of blocks.

    Args:
        block_size: Tokens per block.
        policy: The order of eviction.
        num_ghosts: How many evicted blocks to remember.
    """

    def __init__(
        self, block_size: int, *, policy: EvictionPolicy | None = None, num_ghosts: int = 0
    ) -> None:
        super().__init__(block_size * TOKEN_BYTES, policy or Lru())
        self.clock = 0
        self.last_evicted: int | None = None
        """Stamp of the last use of what was evicted last; None before the first eviction."""
        self.num_evicted = 0
        """Blocks evicted since the start; what was reset before does not count."""
        self.queue: Queue = self.policy.queue()
        self._used: Callable[[Node, int], None] | None = self.policy.used
        self._marks_ends = self.policy.marks_ends
        self._revived: Callable[[Node], None] | None = self.policy.revived
        self.asked: Callable[[Match, bytes], None] | None = self.policy.asked
        self.ghosts = Ghosts(num_ghosts, self.block_bytes)
        self.pins: Pins | None = None
        """Who is told when pinned blocks are lost."""
        self._sweeps: deque[Iterator[Node]] = deque()
        """Leaves of what was reset; they are evicted before all others.  The oldest first, so that
        none of those that have nothing left is kept by younger ones."""
        self._tidy_at = 16
        """Length of `retired` at which the empty ones are dropped."""

    # ------------------------------------------------------------------ locking

    def lock(self, match: Match) -> Node:
        """Protect the matched whole blocks from eviction.  Splits the run they end in, if inside.

        O(nodes on the path that were unprotected), plus one copy of a split run.
        """
        node = self.cut(match)
        self.lock_node(node)
        return node

    def cut(self, match: Match) -> Node:
        """Give the node that ends where the matched whole blocks do.  Splits the run, if inside."""
        node = match.node
        return self._split(node, match.used) if match.used < len(node.blocks) else node

    def touch(self, match: Match) -> None:
        """Count the block that a locked match copies from as used now, if half of it is copied.

        A smaller part says little of the rest: chats that begin alike would keep a block that
        nobody goes on from.  What the policy has noted of it stays.  O(1), plus one copy of the run
        that begins with the block.
        """
        node = match.near or match.node  # `cut` has let it begin with the block
        held = min(len(node.key), self.block_bytes)
        if 2 * match.partial_tokens * TOKEN_BYTES < held:
            return
        if len(node.blocks) > 1:
            node = self._split(node, 1)
        self.clock += 1
        self.lock_node(node)
        self._unlock(node, self.clock)

    def split_leaf(self, node: Node, used: int) -> None:
        """Let a leaf have only the blocks after its first `used` ones."""
        self._split(node, used)

    def rejoin(self, node: Node) -> None:
        """Merge a node with what it was kept apart from, if nothing tells them apart any more."""
        if node.children and len(node.children) == 1:
            child = next(iter(node.children.values()))
            if self._merge(child):
                node = child
        self._merge(node)

    def lock_node(self, node: Node) -> None:
        """Protect the path to the end of `node` once more.  O(nodes that were unprotected)."""
        while True:
            ref = node.ref
            node.ref = ref + 1
            if ref:
                return
            size = len(node.blocks)
            self.evictable -= size
            root = node.root
            root.evictable -= size
            root.sums.evictable -= size
            if root.retired:
                self.forgotten_evictable -= size
            above = node.parent
            if above is None:
                return
            node = above

    def unlock(self, node: Node, *, used: bool = True) -> BlockTable | None:
        """Take one lock back.  `used`: what becomes unprotected counts as used now.

        Merges what can be merged on the way.  O(nodes that become unprotected).

        Returns:
            The block of `node` if it was a tail that a fuller sibling covers: it has left the tree.
        """
        stamp = 0
        if used:
            stamp = self.clock = self.clock + 1
            if self._used is not None:
                size = len(node.blocks)
                if self._marks_ends and size > 1 and not node.children:
                    self._split(node, size - 1)
                self._used(node, stamp)
        if node.ref == 1 and len(node.key) < self.block_bytes and self._is_covered(node):
            return self._absorb(node, stamp)
        self._unlock(node, stamp)
        return None

    def _unlock(self, node: Node, stamp: int) -> None:
        below: Node | None = None
        while True:
            if node.last < stamp:
                node.last = stamp
            else:
                stamp = node.last
            if node.ref < 1:
                raise AssertionError(f"unlocked a node that is not locked: {node.key[:64].hex()}")
            node.ref -= 1
            if node.ref:
                return
            size = len(node.blocks)
            self.evictable += size
            root = node.root
            root.evictable += size
            root.sums.evictable += size
            if root.retired:
                self.forgotten_evictable += size
            if below is not None and self._merge(below):
                node = below
            elif not node.children:
                self._offer(node)
            above = node.parent
            if above is None:
                return
            below, node = node, above

    def _absorb(self, tail: Node, stamp: int) -> BlockTable:
        """Remove a tail, on its last unlock, whose tokens a fuller sibling holds too."""
        if self.journal is not None:
            self._tell_removed(tail, tail.blocks)
        self._leave(tail)
        above = self._detach(tail)
        self._unlock(above, stamp)
        self._leafless(above)
        return tail.blocks

    # ------------------------------------------------------------------ growing

    def grow(self, node: Node, tokens: bytes, blocks: BlockTable) -> Grown:
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
        absorbed = array("i")
        while off < end:
            child = node.children.get(tokens[off : off + width]) if node.children else None
            if child is None:
                break
            size = len(child.key)
            if size % width and tokens.startswith(child.key[: size - size % width], off):
                # A leaf whose tail stands where our next block, if any, will stand.
                node = self._split(child, size // width)
                off += len(node.key)
                continue
            if tokens.startswith(child.key, off):
                off += size
                node = child
                continue
            used = common_prefix(tokens, off, child.key, 0, min(size, end - off)) // width
            node = self._split(child, used)
            off += used * width
            break
        existing = off // width
        if off < end:
            node = self._attach(node, tokens[off:], blocks[existing:], absorbed)
        if node is not start:
            self.lock_node(node)
            self._unlock(start, 0)
            self._merge(node)
        return Grown(node, existing, len(blocks) - existing, absorbed)

    def hang(self, node: Node, tokens: bytes, block: BlockId) -> tuple[Node | None, BlockTable]:
        """Index a partly filled block after `node` as a locked leaf of its own.

        Returns:
            The leaf, or None if a stored block covers these tokens already; and the blocks of
            shorter tails that this one made superfluous.
        """
        absorbed = array("i")
        if node.children:
            _, same = node.children.nearest(tokens)
            if same == len(tokens):
                return None, absorbed
        tail = self._attach(node, tokens, array("i", [block]), absorbed)
        self.lock_node(tail)
        return tail, absorbed

    def unhang(self, tail: Node) -> None:
        """Take a tail that the caller has locked out of the tree.  Its block is not freed."""
        if self.journal is not None:
            self._tell_removed(tail, tail.blocks)
        self._leave(tail)
        above = self._detach(tail)
        self._unlock(above, 0)
        self._leafless(above)

    def _attach(self, node: Node, run: bytes, blocks: BlockTable, absorbed: BlockTable) -> Node:
        """Add a run below `node`: revive the ghosts that it covers, absorb the tail it extends."""
        width = self.block_bytes
        if node.ghosts:
            while run and node.ghosts and (ghost := self.ghosts.revive(node, run)) is not None:
                size = len(ghost.key)
                count = -(-size // width)
                ghost.blocks = blocks[:count]
                ghost.last = ghost.born = self.clock
                if self._revived is None:
                    ghost.mark = None
                else:
                    self._revived(ghost)
                node = self._adopt(node, ghost, absorbed)
                run, blocks = run[size:], blocks[count:]
            if not run:
                return node
        return self._adopt(node, Node(run, blocks, node, self.clock), absorbed)

    # ------------------------------------------------------------------ eviction

    def evict(self, num_blocks: int) -> BlockTable:
        """Take blocks out of the tree, the coldest leaf's last ones first.

        Asked for n, gives n, or all that is unprotected.  What was reset goes first, and is not
        counted as evicted: nobody could find it.  O(leaves touched · log leaves).
        """
        out = array("i")
        while (need := num_blocks - len(out)) > 0:
            node = self._next_retired() if self._sweeps else None
            if node is None:
                node = self.queue.pop()
                if node is None:
                    break
            size = len(node.blocks)
            keep = size - need
            if not node.root.retired:
                self.last_evicted = node.last
                self.num_evicted += min(size, need)
            if keep > 0:
                out.extend(node.blocks[keep:])
                self._trim(node, keep)
                self._offer(node)
            else:
                out.extend(node.blocks)
                self._bury(node)
        return out

    def retire(self, root: Root) -> None:
        """Let nothing below `root` be found any more.  Amortised O(1).

        Its unprotected blocks are the first to be evicted; the others follow once unlocked.
        """
        if self.journal is not None:
            self.journal.cleared(root.namespace)
        root.retired = True
        if root.account is not None:
            root.account.retire(root)
        self.num_forgotten += root.num_blocks
        self.forgotten_evictable += root.evictable
        if root.num_blocks or root.ref > 1:
            if len(self.retired) >= self._tidy_at:
                self.retired = [old for old in self.retired if old.num_blocks or old.ref > 1]
                self._tidy_at = 2 * len(self.retired) + 16
            self.retired.append(root)
        if root.evictable:
            self._sweeps.append(evictable_leaves(root))

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

    def _offer(self, node: Node) -> None:
        """Let a leaf that has just become evictable be evicted: in its turn, or first of all."""
        if node.root.retired:
            if node.queued != SWEPT:
                node.queued = SWEPT
                self._sweeps.append(iter((node,)))
        else:
            self.queue.push(node)

    def _trim(self, node: Node, keep: int) -> None:
        """Cut a leaf's last blocks off; they become a ghost below it."""
        if self.journal is not None:
            self._tell_removed(node, node.blocks[keep:])
        cut = keep * self.block_bytes
        size = len(node.blocks) - keep
        node.root.num_changes += 1
        if node.pinned and self.pins is not None:
            self.pins.trimmed(node, size)
        mark = None if self._lost is None else self._lost(node, size)
        self._count_blocks(node.root, -size)
        if self.ghosts.limit and not node.root.retired:
            ghost = Node(node.key[cut:], array("i"), node, node.born)
            ghost.ghosts, node.ghosts = node.ghosts, None
            ghost.parted, node.parted = node.parted, None
            ghost.mark = mark
            self.ghosts.adopt_children(ghost)
            self.ghosts.bury(node, ghost)
        elif self._forgotten is not None:
            self._forgotten(mark, size)
        node.key = node.key[:cut]
        node.blocks = node.blocks[:keep]
        node.parted = None
        self._forget()

    def _bury(self, node: Node) -> None:
        """Take a whole leaf out; it becomes a ghost."""
        above = node.parent
        if above is None:
            raise AssertionError("a root is never evicted")
        if self.journal is not None:
            self._tell_removed(node, node.blocks)
        size = len(node.blocks)
        mark = None if self._lost is None else self._lost(node, size)
        self._count(node, -1)
        self._detach(node)
        if node.pinned and self.pins is not None:
            self.pins.buried(node, above)
        node.blocks = array("i")
        node.mark = mark
        if self.ghosts.limit and not node.root.retired:
            node.parent = above
            self.ghosts.bury(above, node)
            self._forget()
        elif self._forgotten is not None:
            self._forgotten(mark, size)
        self._leafless(above)

    def _forget(self) -> None:
        """Drop the oldest ghosts over the limit, and merge what only they kept apart."""
        for above in self.ghosts.forget():
            if above.blocks and above.children and len(above.children) == 1:
                self._merge(next(iter(above.children.values())))

    def _leafless(self, above: Node) -> None:
        """Look again at a node that has lost a child: a leaf now, or one child left to merge."""
        children = above.children
        if not children:
            above.children = None
            if above.is_evictable:
                self._offer(above)
        elif len(children) == 1:
            self._merge(next(iter(children.values())))
