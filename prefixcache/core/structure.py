"""How nodes are joined: adopt, detach, split, merge, with the counts; and the walk that checks.

```
split after 2        [AAAA|BBBB|CCCC]  ──►  [AAAA|BBBB] ── [CCCC]    the lower part is the old node
merge                [AAAA|BBBB] ── [CCCC]  ──►  [AAAA|BBBB|CCCC]    the lower node survives
```

In both, the object whose run *ends* where it ended before stays the same, so that locks, which mean
"the path up to the end of this node", stay right whatever happens above it.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from prefixcache.core.children import Children
from prefixcache.core.eviction import EvictionPolicy, Mark
from prefixcache.core.journal import Journal
from prefixcache.core.node import Node, Root
from prefixcache.types import BlockId, BlockTable


class Structure:
    """The nodes below all roots, and how many blocks they hold."""

    def __init__(self, block_bytes: int, policy: EvictionPolicy) -> None:
        self.block_bytes = block_bytes
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
        self.journal: Journal | None = None
        """Who is told what enters and leaves the index."""
        # Bound once: a hook that the policy does not define costs one comparison.
        self._lost: Callable[[Node, int], Mark] | None = policy.lost
        self._forgotten: Callable[[Mark, int], None] | None = policy.forgotten
        policy.block_bytes = block_bytes

    def _adopt(self, node: Node, child: Node, absorbed: BlockTable) -> Node:
        """Make an unprotected node with blocks a child; drop the tail that it covers."""
        children = node.children
        first = child.key[: self.block_bytes]
        if children is None:
            children = node.children = Children()
        elif children:
            tail = children.before(first)
            if tail is not None and not tail.ref and first.startswith(tail.key):
                absorbed.extend(tail.blocks)
                if self.journal is not None:
                    self._tell_removed(tail, tail.blocks)
                self._leave(tail)
                self._count(tail, -1)
                self._detach(tail)
        children.put(first, child)
        self.num_nodes += 1
        self._count(child, 1)
        child.root.num_changes += 1
        if self.journal is not None and not child.root.retired:
            parent = BlockId(node.blocks[-1]) if node.blocks else None
            self.journal.stored(child.root.namespace, parent, child.key, child.blocks)
        return child

    def _tell_removed(self, node: Node, blocks: BlockTable) -> None:
        """Tell the journal that `blocks`, of `node`, leave the index."""
        if self.journal is not None and not node.root.retired:
            self.journal.removed(node.root.namespace, blocks)

    def _count(self, node: Node, sign: int) -> None:
        """Add or subtract an unprotected node's blocks."""
        self._count_blocks(node.root, sign * len(node.blocks))

    def _count_blocks(self, root: Root, size: int) -> None:
        """Add unprotected blocks, or subtract them."""
        self.num_blocks += size
        self.evictable += size
        root.num_blocks += size
        root.sums.num_blocks += size
        root.evictable += size
        root.sums.evictable += size
        if root.retired:
            self.num_forgotten += size
            self.forgotten_evictable += size

    def _leave(self, node: Node) -> None:
        """Tell the policy that a node leaves the tree and is not remembered."""
        mark = None if self._lost is None else self._lost(node, len(node.blocks))
        if self._forgotten is not None:
            self._forgotten(mark, len(node.blocks))

    def _detach(self, node: Node) -> Node:
        """Unlink a leaf from its parent, which is given.  A locked leaf's blocks are uncounted."""
        above = node.parent
        if above is None or above.children is None:
            raise AssertionError("only a child can be detached")
        above.children.drop(node.key[: self.block_bytes])
        node.root.num_changes += 1
        node.parent = None
        self.num_nodes -= 1
        if node.ref:
            size = len(node.blocks)
            self.num_blocks -= size
            node.root.num_blocks -= size
            node.root.sums.num_blocks -= size
            if node.root.retired:
                self.num_forgotten -= size
        return above

    def _is_covered(self, tail: Node) -> bool:
        above = tail.parent
        if above is None or above.children is None or len(above.children) < 2:
            return False
        after = above.children.after(tail.key)
        return after is not None and after.key.startswith(tail.key)

    def _split(self, node: Node, used: int) -> Node:
        """Split a run after `used` blocks; `node` stays the lower part, the upper one is given."""
        above = node.parent
        if above is None or above.children is None or not 0 < used < len(node.blocks):
            raise AssertionError(f"cannot split {len(node.blocks)} blocks after {used}")
        width = self.block_bytes
        cut = used * width
        key = node.key
        upper = Node(key[:cut], node.blocks[:used], above, node.born)
        upper.ref = 1 if node.ref else 0
        upper.last = node.last
        upper.mark = node.mark
        upper.pinned = node.pinned
        node.key = key[cut:]
        node.blocks = node.blocks[used:]
        node.parent = upper
        upper.children = Children()
        upper.children.put(node.key[:width], node)
        above.children[key[:width]] = upper
        self.num_nodes += 1
        return upper

    def _merge(self, node: Node) -> bool:
        """Join a node with its parent if nothing but age or size told them apart.

        `node` survives, so that locks on it stay valid; nobody can hold the parent itself, since
        its only reference is that of its only child.  A small run is not merged into one that is
        far larger: copying it again for each new block would make a growing chat quadratic.
        """
        above = node.parent
        if above is None or above.parent is None or above.ghosts or node.parent is None:
            return False
        if above.children is None or len(above.children) != 1:
            return False
        if above.ref != (1 if node.ref else 0) or (not node.ref and above.last != node.last):
            return False
        if above.mark is not node.mark and above.mark != node.mark:
            return False  # the policy tells them apart
        if above.pinned != node.pinned:
            return False  # a pin ends between them
        large, small = len(above.key), len(node.key)
        if large + small > _ALWAYS_MERGED and large > 8 * small:
            return False
        top = above.parent
        if top.children is None:
            raise AssertionError("a parent has children")
        width = self.block_bytes
        node.key = above.key + node.key
        node.blocks = above.blocks + node.blocks
        node.parent = top
        if above.last > node.last:
            node.last = above.last
        top.children[node.key[:width]] = node
        above.parent = above.children = above.mark = None
        above.key = b""
        above.blocks = array("i")
        self.num_nodes -= 1
        return True

    # ------------------------------------------------------------------ invariants

    def check(self, roots: Iterable[Root], locks: Mapping[Node, int]) -> Counter[int]:
        """Assert every invariant of the trees below `roots`.  O(everything).

        Args:
            roots: Those of all namespaces; the retired ones are known here.
            locks: How often each node is locked from outside.

        Returns:
            The indexed blocks, counted.
        """
        indexed: Counter[int] = Counter()
        evictable = nodes = forgotten = as_free = 0
        for root in [*roots, *self.retired]:
            in_root = Counter[int]()
            free = 0
            stack: list[Node] = [root]
            while stack:
                node = stack.pop()
                self._check_node(node, locks)
                in_root.update(node.blocks)
                nodes += node is not root
                free += 0 if node.ref else len(node.blocks)
                stack.extend((node.children or {}).values())
            assert root.num_blocks == sum(in_root.values()), "blocks of a root"
            assert root.evictable == free, f"{free} blocks evictable, not {root.evictable}"
            indexed += in_root
            evictable += free
            if root.retired:
                forgotten += root.num_blocks
                as_free += free
        assert self.num_blocks == sum(indexed.values()), "blocks of all trees"
        assert self.evictable == evictable, f"{evictable} evictable, not {self.evictable}"
        assert self.num_forgotten == forgotten, f"{forgotten} forgotten, not {self.num_forgotten}"
        assert self.forgotten_evictable == as_free, f"{as_free}, not {self.forgotten_evictable}"
        assert self.num_nodes == nodes, f"{nodes} nodes, not {self.num_nodes}"
        return indexed

    def _check_node(self, node: Node, locks: Mapping[Node, int]) -> None:
        width = self.block_bytes
        name = node.key[:16].hex() or "root"
        children = node.children or Children()
        children.check()
        below = sum(1 for child in children.values() if child.ref)
        outside = 1 if node.parent is None else 0
        assert node.ref == below + outside + locks.get(node, 0), f"{name}: ref {node.ref}"
        if node.parent is not None:
            assert len(node.blocks) == -(-len(node.key) // width), f"{name}: blocks and tokens"
            assert node.blocks, f"{name}: a node without blocks"
            assert not (len(node.key) % width and (children or node.ghosts)), f"{name}: not a leaf"
            if node.is_evictable:
                assert node.queued or node.root.retired, f"{name}: an evictable leaf is not queued"
        for first, child in children.items():
            assert child.parent is node, f"{name}: a child with another parent"
            assert child.root is node.root, f"{name}: a child with another root"
            assert child.key.startswith(first), f"{name}: a child under another key"
            assert len(first) == min(width, len(child.key)), f"{name}: a short key"
            assert node.ref or child.last <= node.last, f"{name}: younger than its parent"
            if len(child.key) < width and not child.ref:
                assert not self._is_covered(child), f"{name}: a covered tail"
        for ghost in (node.ghosts or {}).values():
            assert not ghost.blocks, f"{name}: a ghost with blocks"
            assert ghost.parent is node, f"{name}: a ghost with another parent"


_ALWAYS_MERGED = 32_768
"""Bytes of a merged run up to which copying it is cheaper than one more node on every descent."""
