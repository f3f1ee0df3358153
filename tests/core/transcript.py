"""A journal that writes down what it hears, and works out from that alone what is indexed."""

from __future__ import annotations

from core.oracle import Tokens
from prefixcache.types import BlockId, BlockTable, Namespace, unpack


class Transcript:
    """The index as a listener must believe it to be: plain dicts, block by block."""

    def __init__(self, block_size: int) -> None:
        self.block_size = block_size
        self.prefixes: dict[int, tuple[Namespace, Tokens]] = {}
        """Of every block that can be found: all tokens from position 0 to its last one."""
        self.parents: dict[int, int | None] = {}

    def stored(
        self, namespace: Namespace, parent: BlockId | None, tokens: bytes, blocks: BlockTable
    ) -> None:
        before: Tokens = ()
        if parent is not None:
            where, before = self.prefixes[parent]
            assert where == namespace
            assert len(before) % self.block_size == 0, "something is stored behind a tail"
        run = tuple(unpack(tokens))
        assert len(blocks) == -(-len(run) // self.block_size)
        above: int | None = parent
        for index, block in enumerate(blocks):
            assert block not in self.prefixes, f"block {block} was stored twice"
            end = (index + 1) * self.block_size
            self.prefixes[block] = (namespace, before + run[:end])
            self.parents[block] = above
            above = block

    def removed(self, namespace: Namespace, blocks: BlockTable) -> None:
        for block in blocks:
            assert self.prefixes.pop(block)[0] == namespace
            del self.parents[block]
        orphans = set(self.parents.values()) & set(blocks)
        assert not orphans, f"{orphans} were removed, what is stored behind them was not"

    def cleared(self, namespace: Namespace) -> None:
        for block in [b for b, (where, _) in self.prefixes.items() if where == namespace]:
            del self.prefixes[block], self.parents[block]

    def left(self, namespace: Namespace) -> None:
        found = [where for where, _ in self.prefixes.values() if where == namespace]
        assert not found, f"{namespace} has gone, {len(found)} blocks of it are stored"
