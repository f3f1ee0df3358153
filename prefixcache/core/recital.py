"""The recital: a journal that comes late hears what is indexed, as if it was stored just now."""

from __future__ import annotations

from prefixcache.core.desk import Desk
from prefixcache.core.journal import Journal
from prefixcache.core.node import Node
from prefixcache.types import BlockId


def recite(desk: Desk, journal: Journal) -> None:
    """Tell `journal` of every run that can be found, parents first.  Changes nothing.  O(runs)."""
    for root in desk.roots.values():
        stack: list[tuple[Node, BlockId | None]] = [(root, None)]
        while stack:
            node, parent = stack.pop()
            if node.blocks:
                journal.stored(root.namespace, parent, node.key, node.blocks)
                parent = BlockId(node.blocks[-1])
            stack.extend((child, parent) for child in (node.children or {}).values())
