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

What lies below the pool (`tiers.py`) is told to who listens for that:

```
pool   ── copied to a slot ── removed above        so that no block is nowhere in between
slot   ── stored above ── lost below               it came back
slot   ── lost                                     given up, not good, or its ghost was forgotten
```
A slot that is being written counts as one that holds the block: it is lost if the copy fails.

**A replay.**  A listener that comes late hears what is indexed, as if it was stored just now.

It is a walk that pauses after some dozen runs, and others change the trees meanwhile.  What the
listener has been told so far is always the upper part of each tree: a change below it is told, one
elsewhere is not, since the walk will come there.

```
told     [AAAA|BBBB] ─┬─ [CCCC]             what is stored below BBBB now: told at once
                      └─ [DDDD|EEEE]        not yet told: what is stored below waits for the walk
```
A run that waits for its turn may be split, merged into the one below it, or evicted: what a split
or a merge has made is looked at too, so that what is not told yet is below something that waits.
Ghosts that lie below the pool are told in the same walk, each behind what it follows.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left
from collections.abc import Generator, Mapping
from typing import Protocol

from prefixcache.core.node import Node, Root
from prefixcache.core.tiers import LEVEL_BITS, NOWHERE, PlaceListener, Places, Tier
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
_LONGEST_GAP = 512
"""Blocks that lie nowhere, before one below the pool: what is behind more of them is not told."""


class Replay:
    """One listener's.  It asks of every change meanwhile whether it should hear of that.

    Args:
        roots: What is indexed.
        block_bytes: Bytes of a block's packed tokens.
        listener: Who is told.
        walks: Of the tree: for each walk, what was split and merged meanwhile.
        below: Who is told what lies below the pool; None: nobody is.
        tier: What lies there, if there is any.
    """

    def __init__(
        self,
        roots: Mapping[Namespace, Root],
        block_bytes: int,
        listener: IndexListener,
        walks: list[list[Node]],
        below: PlaceListener | None = None,
        tier: Tier | None = None,
    ) -> None:
        self._roots = roots
        self._block_bytes = block_bytes
        self._listener = listener
        self._walks = walks
        self._below = below
        self._tier = tier if below is not None else None
        self._told: dict[Namespace, set[int]] = {}
        self._told_below: set[int] = set()
        self._steps = 0

    def run(self) -> Generator[None, None, None]:
        """Tell the listener of every run that can be found, parents first.  O(runs), in steps.

        With ghosts below the pool it is O(runs + ghosts + blocks that lie nowhere between them).
        """
        moved: list[Node] = []
        self._walks.append(moved)
        try:
            for root in list(self._roots.values()):
                if not root.namespace.approximate:
                    yield from self._walk(root, moved)
        finally:
            self._walks[:] = [one for one in self._walks if one is not moved]

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

    def copied(
        self, namespace: Namespace, sources: Places, places: Places
    ) -> tuple[Places, Places]:
        """Give those sources and places, of some that are copied now, that the listener knows."""
        told, below = self._told.setdefault(namespace, set()), self._told_below
        pairs = zip(sources, places, strict=True)
        known = [pair for pair in pairs if pair[0] in told or pair[0] in below]
        for _, place in known:
            (below if place >> LEVEL_BITS else told).add(place)
        return array("q", [one for one, _ in known]), array("q", [place for _, place in known])

    def lost(self, places: Places) -> Places:
        """Give those of some places, which hold nothing from now on, that the listener knows."""
        known = array("q", [place for place in places if place in self._told_below])
        self._told_below.difference_update(known)
        return known

    def cleared(self, namespace: Namespace) -> None:
        """Hear that nothing of a namespace can be found any more."""
        self._told.pop(namespace, None)

    def _walk(self, root: Root, moved: list[Node]) -> Generator[None, None, None]:
        """Tell of one tree."""
        told = self._told.setdefault(root.namespace, set())
        stack: list[Node] = [root]
        while (stack or moved) and not root.retired:
            while moved:
                one = moved.pop()
                if one.in_root is root and not (one.blocks and one.blocks[-1] in told):
                    stack.append(one)
            if not stack:
                break
            node: Node | None = stack.pop()
            if node is not None and node is not root:
                node = _topmost_untold(node, told)
            if node is None:
                pass  # merged into another, or evicted and forgotten
            elif node is not root and self._tell(root, node, told):
                stack.append(node)  # it may be split or cut before its next part is told
                self._steps = _PAUSE_EVERY
            else:
                stack.extend(node.children)
                if self._tier is not None:
                    stack.extend((node.ghosts or {}).values())
            self._steps += 1
            if self._steps >= _PAUSE_EVERY:
                self._steps = 0
                yield

    def _tell(self, root: Root, node: Node, told: set[int]) -> bool:
        """Tell the next part of a run; say whether there is more of it.  O(part)."""
        blocks, above = node.blocks, node.parent
        assert above is not None
        if not blocks:
            return self._tell_below(root, node)
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

    def _tell_below(self, root: Root, ghost: Node) -> bool:
        """Tell where the next part of a ghost lies; say whether there is more of it.

        O(part + ghosts and blocks that lie nowhere before it).
        """
        tier, told = self._tier, self._told_below
        if tier is None or self._below is None or ghost.places is None:
            return False
        places = tier.told(ghost.places)
        news = (at for at, one in enumerate(places) if one != NOWHERE and one not in told)
        first = next(news, None)
        if first is None:
            return False
        chain = self._behind(ghost, places, first)
        if chain is None:
            return False
        parent, before = chain
        width, gap = self._block_bytes, len(before) // self._block_bytes
        end = first + 1
        while end < min(len(places), first + _BLOCKS_IN_ONE_GO) and places[end] not in told:
            end += 1
        part = places[first:end]
        told.update(part)
        told.discard(NOWHERE)
        tokens = before + ghost.tokens[first * width : end * width]
        self._below.found(root.namespace, parent, tokens, array("q", [NOWHERE]) * gap + part)
        return end < len(places)

    def _behind(self, ghost: Node, places: Places, first: int) -> tuple[int | None, bytes] | None:
        """Say behind what block `first` of a ghost lies.  None if it is too far away.

        Returns:
            The place that was told, None for the root; and the tokens from there on.
        """
        parts: list[bytes] = []
        room = _LONGEST_GAP * self._block_bytes
        node, end = ghost, first
        while True:
            at = end
            while at and places[at - 1] not in self._told_below:
                at -= 1
            cut = node.tokens[at * self._block_bytes : end * self._block_bytes]
            parts.append(cut)
            room -= len(cut)
            if room < 0:
                return None
            if at:
                return places[at - 1], b"".join(reversed(parts))
            above = node.parent
            if above is None:
                return None
            if above.blocks or above.parent is None:
                parent = above.blocks[-1] if above.blocks else None
                return parent, b"".join(reversed(parts))
            node, end = above, len(above.tokens) // self._block_bytes
            places = array("q", [NOWHERE]) * end
            if self._tier is not None and above.places is not None:
                own = self._tier.told(above.places)
                places[: len(own)] = own


def _topmost_untold(node: Node, told: set[int]) -> Node | None:
    """Give the node to tell of in the turn of another: the topmost on its path that was not told.

    Itself, if all before it were.  None if it is part of no tree any more.  O(nodes passed).
    """
    topmost, above = node, node.parent
    while above is not None and above.parent is not None:
        if above.blocks and above.blocks[-1] not in told:
            topmost = above
        elif above.blocks:
            return topmost
        above = above.parent
    return None if above is None else topmost
