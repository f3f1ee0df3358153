"""The journal: who is told when blocks enter and leave the index.

```
                stored                          removed
private block ─────────► indexed, can be found ─────────► evicted, absorbed, withdrawn
                                  │ cleared
                                  └────────► the namespace was reset: none of its blocks is found
```

Splits, merges and ghosts change how the tree is kept, not which block holds which prefix, so a
journal never hears of them.  What happens below a namespace that was reset cannot be found by
anybody, and is not told either.  A tree without a journal pays one comparison per change.
"""

from __future__ import annotations

from typing import Protocol

from prefixcache.types import BlockId, BlockTable, Namespace


class Journal(Protocol):
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


class Journals:
    """Several journals as one.

    >>> from array import array
    >>> heard = []
    >>> class Ear:
    ...     def cleared(self, namespace): heard.append(namespace.model)
    >>> Journals(Ear(), Ear()).cleared(Namespace("m"))
    >>> heard
    ['m', 'm']
    """

    __slots__ = ("_all",)

    def __init__(self, *journals: Journal) -> None:
        self._all = journals

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        """Tell all."""
        for journal in self._all:
            journal.stored(namespace, parent, tokens, blocks)

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        """Tell all."""
        for journal in self._all:
            journal.removed(namespace, blocks)

    def cleared(self, namespace: Namespace) -> None:
        """Tell all."""
        for journal in self._all:
            journal.cleared(namespace)

    def left(self, namespace: Namespace) -> None:
        """Tell all."""
        for journal in self._all:
            journal.left(namespace)
