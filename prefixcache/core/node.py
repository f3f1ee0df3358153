"""A node of the radix tree, a root, and where a descent ended."""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from prefixcache.core.children import Children
from prefixcache.types import BlockId, BlockTable, Namespace

if TYPE_CHECKING:
    from prefixcache.core.leases import Lease
    from prefixcache.core.partings import Place
    from prefixcache.core.quotas import Account


class Node:
    """A run of blocks below its parent.  Only a leaf's last block may be partly filled."""

    __slots__ = (
        "blocks",
        "born",
        "children",
        "ghosts",
        "key",
        "last",
        "mark",
        "parent",
        "parted",
        "pinned",
        "queued",
        "ref",
        "root",
    )

    key: bytes
    """Packed tokens of the run."""
    blocks: BlockTable
    """Its physical blocks; empty for a ghost and for a root."""
    children: Children[Node] | None
    ghosts: Children[Node] | None
    parent: Node | None
    """None for a root, and for a node that is no longer part of the tree."""
    root: Root
    ref: int
    """Locks on this very node, plus the number of locked children."""
    last: int
    born: int
    queued: int
    """Whether a queue has this leaf: 0 no, 1 the policy's, 2 the shelter, 3 what was reset."""
    pinned: int
    """How many pins cover these blocks."""
    mark: Any
    """What the eviction policy knows about these blocks; equal for all of them."""
    parted: dict[int, Place] | None
    """Where requests left the stored tokens after this node, by tokens into the next block."""

    def __init__(self, key: bytes, blocks: BlockTable, parent: Node | None, born: int) -> None:
        self.key = key
        self.blocks = blocks
        self.parent = parent
        self.children = self.ghosts = self.parted = self.mark = None
        self.ref = 0
        self.last = self.born = born
        self.queued = self.pinned = 0
        if parent is not None:
            self.root = parent.root

    @property
    def is_evictable(self) -> bool:
        """Whether this is an unprotected leaf of the tree that holds blocks."""
        return not (self.ref or self.children or self.parent is None or not self.blocks)

    def table(self) -> BlockTable:
        """Give the blocks from the root to the end of this node.  Changes nothing.  O(blocks)."""
        above = self.parent
        if above is None or above.parent is None:
            return self.blocks[:]
        parts = [self.blocks]
        while above.parent is not None:
            parts.append(above.blocks)
            above = above.parent
        table = array("i")
        for part in reversed(parts):
            table.extend(part)
        return table


class Sums:
    """Blocks of many roots, counted as they come and go, so that nobody adds them up."""

    __slots__ = ("evictable", "num_blocks")

    def __init__(self) -> None:
        self.num_blocks = 0
        self.evictable = 0


class Root(Node):
    """The empty prefix of one namespace.  Always protected, never evicted."""

    __slots__ = (
        "account",
        "evictable",
        "leases",
        "namespace",
        "num_blocks",
        "num_changes",
        "num_leases",
        "retired",
        "sums",
    )

    def __init__(self, namespace: Namespace) -> None:
        super().__init__(b"", array("i"), None, 0)
        self.ref = 1
        self.namespace = namespace
        self.num_blocks = 0
        self.evictable = 0
        self.sums = Sums()
        """Those of its tenant, which are kept with its own."""
        self.leases: OrderedDict[int, Lease] = OrderedDict()
        """Those of its tenant, oldest first, which are kept where its own are counted."""
        self.num_leases = 0
        self.num_changes = 0
        """How often something came or went: a match, or what waiting brings, may differ since."""
        self.account: Account | None = None
        """Who answers for what is stored here."""
        self.retired = False
        """Whether the namespace was reset: nothing below can be found any more."""

    @property
    def root(self) -> Root:  # type: ignore[override]
        """Give itself.  Not stored: who refers to himself waits for the garbage collector."""
        return self


class Match(NamedTuple):
    """Where a descent ended.  `lock` continues from here; valid until the tree changes."""

    node: Node
    used: int
    """Blocks of the node's run that matched."""
    end: int
    """Bytes of the tokens that matched in whole blocks."""
    partial_block: BlockId | None
    """The block whose first tokens match best what follows."""
    partial_tokens: int
    near: Node | None = None
    """The child that holds that block, where the node's whole run matched."""

    def num_unprotected(self) -> int:
        """Count the matched blocks that no lease protects now.  Changes nothing.  O(nodes)."""
        node = self.node
        count = 0
        if not node.ref:
            count = self.used
            above = node.parent
            while above is not None and not above.ref:
                count += len(above.blocks)
                above = above.parent
        return count


class Grown(NamedTuple):
    """Answer of `grow`."""

    node: Node
    """The node that the caller's lock is on now."""
    num_existing: int
    """Leading blocks that somebody else had indexed already."""
    num_indexed: int
    absorbed: BlockTable
    """Blocks of tails that the new run made superfluous.  They have left the tree."""


def blocks_below(root: Root) -> BlockTable:
    """Give all blocks that a tree holds, in no order.  Changes nothing.  O(blocks)."""
    parts = []
    stack: list[Node] = [root]
    while stack:
        node = stack.pop()
        parts.append(node.blocks.tobytes())
        if node.children:
            stack.extend(node.children.values())
    return array("i", b"".join(parts))


def evictable_leaves(root: Root) -> Iterator[Node]:
    """Give the unprotected leaves below a retired root, children before parents.

    Lazily, while the tree changes: a node that is gone is skipped, and so is a protected one, which
    is offered again when it is unlocked.
    """
    stack: list[tuple[Node, bool]] = [(root, False)]
    while stack:
        node, seen = stack.pop()
        if node.children and not seen:
            stack.append((node, True))
            stack.extend((child, False) for child in node.children.values())
            continue
        while node.is_evictable:
            yield node
