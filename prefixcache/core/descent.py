"""Descents: how far a prompt is stored, and what stands where it leaves the tree.  Nothing changes.

```
tokens    ████████ ████████ ███▒▒▒▒▒
           └ dict ──► run  └ dict ──► run, of which the first 3 tokens match: a partial block
```

**Keys** are packed tokens (little-endian uint32 `bytes`).  A descent costs one dict look-up and one
`startswith` (a memcmp) per node; there is no loop over tokens or blocks anywhere.  Byte order does
not matter for the neighbour property used below: among byte strings in sorted order, the one with
the longest common prefix with X stands directly before or after X.
"""

from __future__ import annotations

from prefixcache.core.children import Children, common_prefix
from prefixcache.core.ghosts import Ghosts
from prefixcache.core.node import Match, Node, Root
from prefixcache.core.structure import Structure
from prefixcache.types import TOKEN_BYTES, BlockId


class Descent(Structure):
    """A tree that can be read."""

    ghosts: Ghosts

    def match(self, root: Root, tokens: bytes, limit: int | None = None) -> Match:
        """Find the longest stored prefix of `tokens[:limit]`.  Changes nothing.

        O(nodes on the path + log siblings), plus one memcmp over the matched bytes.

        >>> from array import array
        >>> from prefixcache.core.radix import RadixTree
        >>> from prefixcache.types import Namespace, pack
        >>> tree, root = RadixTree(4), Root(Namespace("m"))
        >>> locked = tree.grow(tree.lock(tree.match(root, b"")), pack([7] * 8), array("i", [0, 1]))
        >>> found = tree.match(root, pack([7, 7, 7, 7, 7, 9]))
        >>> found.end // 4, found.partial_block, found.partial_tokens
        (4, 1, 1)
        """
        width = self.block_bytes
        end = len(tokens) if limit is None else limit
        node: Node = root
        off = 0
        while True:
            children = node.children
            if not children or off >= end:
                return Match(node, len(node.blocks), off, None, 0)
            child = children.get(tokens[off : off + width]) if off + width <= end else None
            if child is None:
                break
            run = child.key
            size = len(run)
            if tokens.startswith(run, off, end):
                blocks = child.blocks
                if size != len(blocks) * width:  # a leaf with a tail
                    whole = size - size % width
                    used = whole // width
                    partial = (size - whole) // TOKEN_BYTES
                    return Match(child, used, off + whole, BlockId(blocks[used]), partial)
                off += size
                node = child
                continue
            same = common_prefix(tokens, off, run, 0, min(size, end - off))
            used = same // width
            partial = (same - used * width) // TOKEN_BYTES
            block = BlockId(child.blocks[used]) if partial else None
            return Match(child, used, off + used * width, block, partial)
        rest = tokens[off : min(off + width, end)]
        near, same = children.nearest(rest)
        partial = same // TOKEN_BYTES
        if not partial or near is None:
            return Match(node, len(node.blocks), off, None, 0)
        return Match(node, len(node.blocks), off, BlockId(near.blocks[0]), partial, near)

    def place(self, node: Node, end: int, at: int) -> tuple[Match, bytes]:
        """Find byte `at`, a block's start, on the path that ends with `node` at byte `end`.

        Changes nothing.  O(nodes passed).

        Returns:
            The place, to lock; and the tokens of the block that follows on the path, if any.
        """
        after = b""
        while node.parent is not None and at <= end - len(node.key):
            after = node.key[: self.block_bytes]
            end -= len(node.key)
            node = node.parent
        used = len(node.blocks) - (end - at) // self.block_bytes
        if at < end:
            start = used * self.block_bytes
            after = node.key[start : start + self.block_bytes]
        return Match(node, used, at, None, 0), after

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
        of what follows, up to `limit` bytes are given.  O(log siblings).
        """
        into = match.partial_tokens * TOKEN_BYTES
        if len(tokens) - match.end <= into:
            return None
        node, at = match.node, match.used * self.block_bytes
        if match.used == len(node.blocks):
            if not node.children:
                return None
            near = match.near
            if near is None:
                near, _ = node.children.nearest(tokens[match.end : match.end + self.block_bytes])
            node, at = near or next(iter(node.children.values())), 0
        run = node.key[at : at + into + limit]
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
            children = match.node.children or Children()
            node = children.nearest(rest)[0] if rest else next(iter(children.values()), None)
            at = len(rest)
        found = b""
        while node is not None and len(found) < limit:
            found += node.key[at : at + limit - len(found)]
            at = 0
            node = next(iter(node.children.values())) if node.children else None
        return found
