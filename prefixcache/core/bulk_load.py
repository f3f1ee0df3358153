"""Bulk load: a whole index put into an empty tree at once, as after a restart.

```
runs, parents first      1 ── SSSS SSAA ── 0 1        root ── [SSSS] 0 ─┬─ [SSAA|AAAA] 1 2
                         2 ── behind 1: AAAA ── 2  ─►                   └─ [SSBB] 3
                         3 ── behind 0: SSBB ── 3
```

A run is cut where another one begins inside it, and joined to the one it alone continues.  A step
per run, none per block or token.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np

from prefixcache.core.node import Node, Root, Run, Tail
from prefixcache.core.radix_tree import RadixTree
from prefixcache.types import BlockTable, Namespace


class StoredRun(NamedTuple):
    """Blocks in a row."""

    namespace: Namespace
    parent: int
    """The block, always full, before them; -1 if they are the first of their namespace."""
    tokens: bytes
    """Only the last block may be partly filled; then nothing stands behind it."""
    blocks: BlockTable


def load(tree: RadixTree, roots: Mapping[Namespace, Root], runs: Iterable[StoredRun]) -> int:
    """Index runs in an empty tree.  O(runs · log siblings), plus one pass over the block ids.

    All are unprotected; their order of eviction is that of the runs.  A run whose parent is not
    there, or whose tokens are there already, is left out; so is a tail that another block covers.

    Args:
        tree: Empty.
        roots: Of all namespaces that the runs name.
        runs: Each block in one of them; a parent's run before those behind it.

    Returns:
        How many blocks are indexed.
    """
    ordered = [run for run in runs if run.blocks]
    if not ordered:
        return 0
    width = tree.block_bytes
    followers = _count_followers(ordered)
    ends: dict[int, Node] = {}  # by the last block of each piece: where others go on
    parts: dict[Node, list[tuple[bytes, BlockTable]]] = {}
    nodes: list[Node] = []
    for age, (run, cuts) in enumerate(zip(ordered, _cuts(ordered, followers), strict=True), 1):
        root = roots[run.namespace]
        above = root if run.parent < 0 else ends.get(run.parent)
        if above is None or above.root is not root:
            continue
        tree.clock = age
        tail = len(run.tokens) % width
        if tail and len(run.blocks) > 1 and cuts[-1:] != [len(run.blocks) - 1]:
            cuts.append(len(run.blocks) - 1)
        pieces = [(run.tokens, run.blocks)] if not cuts else _pieces(run, cuts, width)
        for key, blocks in pieces:
            is_tail = len(key) < width
            if not is_tail and above is not root and int(followers[above.blocks[-1]]) == 1:
                parts.setdefault(above, [(above.tokens, above.blocks)]).append((key, blocks))
                above.blocks = blocks  # whose last one says where it ends; joined below
                above.last_used = age
                ends[blocks[-1]] = above
                continue
            first = key[:width]
            if tree.child(above, first) is not None:
                break
            node: Node = (Tail if is_tail else Run)(key, blocks, above, age)
            if (several := above.several) is None:
                above.put(node, width)
            else:
                several[first] = node  # brought into order with all others, at the end
                several.num_tails += is_tail
            nodes.append(node)
            if is_tail:
                break
            above = node
            ends[blocks[-1]] = node
    for node, joined in parts.items():
        node.tokens = b"".join([key for key, _ in joined])
        node.blocks = array("i", b"".join([blocks.tobytes() for _, blocks in joined]))
    return _enter(tree, nodes)


def _pieces(run: StoredRun, cuts: list[int], width: int) -> list[tuple[bytes, BlockTable]]:
    ends = [*cuts, len(run.blocks)]
    return [
        (run.tokens[start * width : end * width], run.blocks[start:end])
        for start, end in zip([0, *cuts], ends, strict=True)
    ]


def _count_followers(runs: list[StoredRun]) -> np.ndarray:
    """Count, per block, the runs that begin behind it, and whether its own run goes on."""
    parents = np.array([run.parent for run in runs], np.int64)
    blocks = np.frombuffer(b"".join([run.blocks.tobytes() for run in runs]), np.int32)
    followers = np.zeros(int(max(blocks.max(), parents.max())) + 1, np.int32)
    np.add.at(followers, parents[parents >= 0], 1)
    ends = np.cumsum([len(run.blocks) for run in runs]) - 1
    goes_on = np.ones(len(blocks), bool)
    goes_on[ends] = False
    followers[blocks[goes_on & (followers[blocks] > 0)]] += 1
    return followers


def _cuts(runs: list[StoredRun], followers: np.ndarray) -> list[list[int]]:
    """Give, per run, after how many blocks another run begins."""
    blocks = np.frombuffer(b"".join([run.blocks.tobytes() for run in runs]), np.int32)
    ends = np.cumsum([len(run.blocks) for run in runs])
    hits = np.flatnonzero(followers[blocks] > 1)
    cuts: list[list[int]] = [[] for _ in runs]
    for number, hit in zip(
        np.searchsorted(ends, hits, "right").tolist(), hits.tolist(), strict=True
    ):
        after = hit + 1 - int(ends[number]) + len(runs[number].blocks)
        if after < len(runs[number].blocks):
            cuts[number].append(after)
    return cuts


def _enter(tree: RadixTree, nodes: list[Node]) -> int:
    """Count and queue new nodes, parents first; a parent is as young as its youngest child."""
    for parent in {id(node.parent): node.parent for node in nodes}.values():
        if parent is not None and parent.several is not None:
            parent.several.sort()
    nodes = [node for node in nodes if not _is_superfluous(tree, node)]
    total = 0
    for node in reversed(nodes):
        size = len(node.blocks)
        total += size
        node.root.num_blocks += size
        node.root.sums.num_blocks += size
        node.root.evictable += size
        node.root.sums.evictable += size
        above = node.parent
        if above is not None:
            above.last_used = max(above.last_used, node.last_used)
    tree.num_nodes += len(nodes)
    tree.num_blocks += total
    tree.evictable += total
    for node in nodes:
        if isinstance(node, Tail):
            tree.tails.offer(node)
        elif not node.is_inner:
            tree.queue.push(node)
    return total


def _is_superfluous(tree: RadixTree, node: Node) -> bool:
    """Drop a tail whose tokens a fuller sibling holds, too."""
    above = node.parent
    if not node.tail or above is None or above.several is None:
        return False
    after = above.several.after(node.tokens)
    if after is None or not after.tokens.startswith(node.tokens):
        return False
    above.drop(node, tree.block_bytes)
    node.parent = None
    return True
