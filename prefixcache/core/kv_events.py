"""KV events: who is told when blocks enter and leave the index.

```
                stored                          removed
private block ─────────► indexed, can be found ─────────► evicted, absorbed, withdrawn
                                  │ cleared
                                  └────────► the namespace was reset: none of its blocks is found
```

Splits, merges and ghosts change how the tree is kept, not which block holds which prefix, so a
listener never hears of them.  What happens below a namespace that was reset cannot be found by
anybody, and is not told either.  A tree without a listener pays one comparison per change.

**A replay.**  A listener that comes late hears what is indexed, as if it was stored just now.

It is a walk that pauses after some dozen runs, and others change the trees meanwhile.  What the
listener has been told so far is always the upper part of each tree: a change below it is told, one
elsewhere is not, since the walk will come there.

```
told     [AAAA|BBBB] ─┬─ [CCCC]             what is stored below BBBB now: told at once
                      └─ [DDDD|EEEE]        not yet told: what is stored below waits for the walk
```
A run that is split while it waits for its turn is told from the first block that is not yet told,
upwards.  One that was merged into the run below it is found by walking its tree again; a tree that
changes so each time is walked in one go in the end.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Generator, Mapping
from typing import Protocol

from prefixcache.core.node import Node, Root
from prefixcache.types import BlockId, BlockTable, Namespace


class IndexListener(Protocol):
    """What hears of every change of the index, in order and at once; must be quick.

    Replaying it gives the index: `parent` always names a block that is indexed at that moment, and
    a block is removed only after all that were stored behind it.
    """

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Hear that a run of blocks can be found from now on.

        Args:
            namespace: Where.
            parent: The block, always full, that holds the tokens before; None: they are the first.
            tokens: Packed tokens of the run.  Only the last block may be partly filled: a tail.
            blocks: As many as these tokens fill.  The tree's own: copy what is kept.
        """

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Hear that blocks can be found no more, the last ones of their prefix first or together.

        They may go on being read by who holds them, and are lent anew at some time.
        """

    def cleared(self, namespace: Namespace) -> None:
        """Hear that nothing of a namespace can be found any more."""

    def left(self, namespace: Namespace) -> None:
        """Hear that a namespace of which nothing can be found has gone: forget its name."""


class IndexListeners:
    """Several listeners as one.

    >>> from array import array
    >>> heard = []
    >>> class Ear:
    ...     def cleared(self, namespace): heard.append(namespace.model)
    >>> IndexListeners(Ear(), Ear()).cleared(Namespace("m"))
    >>> heard
    ['m', 'm']
    """

    __slots__ = ("_all",)

    def __init__(self, *listeners: IndexListener) -> None:
        self._all = listeners

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Tell all."""
        for listener in self._all:
            listener.stored(namespace, parent, tokens, blocks)

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Tell all."""
        for listener in self._all:
            listener.removed(namespace, blocks)

    def cleared(self, namespace: Namespace) -> None:
        """Tell all."""
        for listener in self._all:
            listener.cleared(namespace)

    def left(self, namespace: Namespace) -> None:
        """Tell all."""
        for listener in self._all:
            listener.left(namespace)


class ExactOnly:
    """A listener who hears of nothing that is approximate: what he keeps or passes on is exact.

    >>> from array import array
    >>> heard = []
    >>> class Ear:
    ...     def cleared(self, namespace): heard.append(namespace.model)
    >>> ear = ExactOnly(Ear())
    >>> ear.cleared(Namespace("m"))
    >>> ear.cleared(Namespace("m", approximate=True))
    >>> heard
    ['m']
    """

    __slots__ = ("_listener",)

    def __init__(self, listener: IndexListener) -> None:
        self._listener = listener

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Tell him, if it is exact."""
        if not namespace.approximate:
            self._listener.stored(namespace, parent, tokens, blocks)

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Tell him, if they were exact."""
        if not namespace.approximate:
            self._listener.removed(namespace, blocks)

    def cleared(self, namespace: Namespace) -> None:
        """Tell him, if it is exact."""
        if not namespace.approximate:
            self._listener.cleared(namespace)

    def left(self, namespace: Namespace) -> None:
        """Tell him, if it is exact."""
        if not namespace.approximate:
            self._listener.left(namespace)


_PAUSE_EVERY = 16
_BLOCKS_IN_ONE_GO = 512
"""Of one run."""
_MOST_WALKS = 8
"""Of one tree, before it is walked without a pause."""


class Replay:
    """One listener's.  It asks of every change meanwhile whether it should hear of that."""

    def __init__(
        self, roots: Mapping[Namespace, Root], block_bytes: int, listener: IndexListener
    ) -> None:
        self._roots = roots
        self._block_bytes = block_bytes
        self._listener = listener
        self._told: dict[Namespace, set[int]] = {}
        self._steps = 0

    def run(self) -> Generator[None, None, None]:
        """Tell the listener of every run that can be found, parents first.  O(runs), in steps."""
        for root in list(self._roots.values()):
            if root.namespace.approximate:
                continue
            walks = 1
            while (yield from self._walk(root, pauses=walks < _MOST_WALKS)):
                walks += 1

    def is_stored(self, namespace: Namespace, parent: BlockId | None, blocks: BlockTable) -> bool:
        """Say whether the listener should hear of a run that is stored now."""
        told = self._told.setdefault(namespace, set())
        if parent is not None and parent not in told:
            return False
        told.update(blocks)
        return True

    def removed(self, namespace: Namespace, blocks: BlockTable) -> BlockTable:
        """Give those of some blocks, which leave the index now, that the listener knows."""
        told = self._told.setdefault(namespace, set())
        known = array("i", [block for block in blocks if block in told])
        told.difference_update(known)
        return known

    def cleared(self, namespace: Namespace) -> None:
        """Hear that nothing of a namespace can be found any more."""
        self._told.pop(namespace, None)

    def _walk(self, root: Root, *, pauses: bool) -> Generator[None, None, bool]:
        """Tell of one tree; say whether some run was merged away before its turn."""
        moved = False
        told = self._told.setdefault(root.namespace, set())
        stack: list[Node] = [root]
        while stack and not root.retired:
            node = stack.pop()
            if node is not root:
                if not node.tokens:
                    moved = True
                    continue
                while (above := node.parent) and above.blocks and above.blocks[-1] not in told:
                    node = above
                if above is None or not node.blocks:
                    continue  # evicted
            if node is not root and self._tell(root, node, told):
                stack.append(node)  # it may be split or cut before its next part is told
                self._steps = _PAUSE_EVERY
            elif node.children:
                stack.extend(node.children.values())
            self._steps += 1
            if pauses and self._steps >= _PAUSE_EVERY:
                self._steps = 0
                yield
        return moved and not root.retired

    def _tell(self, root: Root, node: Node, told: set[int]) -> bool:
        """Tell the next part of a run; say whether there is more of it.  O(part)."""
        blocks, above = node.blocks, node.parent
        assert above is not None
        if blocks[-1] in told:
            return False
        first = bisect_left(blocks, 1, key=lambda block: block not in told)
        if first:
            parent: BlockId | None = BlockId(blocks[first - 1])
        else:
            parent = BlockId(above.blocks[-1]) if above.blocks else None
        end = first + _BLOCKS_IN_ONE_GO
        part = blocks[first:end]
        tokens = node.tokens[first * self._block_bytes : end * self._block_bytes]
        self._listener.stored(root.namespace, parent, tokens, part)
        told.update(part)
        return end < len(blocks)
