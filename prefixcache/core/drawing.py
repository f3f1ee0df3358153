"""The tree as text, for people and for failed invariants."""

from __future__ import annotations

from prefixcache.core.node import Node, Root
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, unpack

_SHOWN = 6


def draw(root: Root) -> str:
    """Draw the tree below a root, one node a line.  Changes nothing.  O(nodes).

    ```
    tiny-model
    └─ 7 7 7 7 … (8 tokens) blocks 0 1  ref 1
       └─ 9  (1 token) blocks 2
    ```
    """
    lines = [str(root.namespace) + (" (reset)" if root.retired else "")]
    stack = [(node, "") for node in _below(root)]
    while stack:
        node, indent = stack.pop()
        lines.append(f"{indent}└─ {_describe(node)}")
        stack.extend((below, indent + "   ") for below in _below(node))
    return "\n".join(lines)


def _below(node: Node) -> list[Node]:
    found = list((node.children or {}).values()) + list((node.ghosts or {}).values())
    return sorted(found, key=lambda below: below.key, reverse=True)


def _describe(node: Node) -> str:
    count = len(node.key) // TOKEN_BYTES
    tokens = " ".join(map(str, unpack(node.key[: _SHOWN * TOKEN_BYTES])))
    more = " …" if count > _SHOWN else ""
    text = f"{tokens}{more} ({many(count, 'token')})"
    if not node.blocks:
        return f"{text} ghost"
    blocks = " ".join(map(str, node.blocks[:_SHOWN])) + (" …" if len(node.blocks) > _SHOWN else "")
    lock = f"  ref {node.ref}" if node.ref else f"  last {node.last}"
    return f"{text} blocks {blocks}{lock}"
