"""The map of the pool: what each block is used for, drawn small.

```
pool     ■■■■□□□□▒▒▒▒■■■■□□□□□□□□        one letter a cell; a cell is as many neighbouring blocks as
map      L L F F C C L L F F F F        are needed, and shows what most of them are
```
"""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from prefixcache.core.desk import Desk
from prefixcache.core.node import Node

STATES = ("free", "private", "leased", "cached", "quarantined")
"""Private: a lease's own.  Leased: indexed, a lease protects it.  Cached: indexed, evictable."""

_FREE, _PRIVATE, _LEASED, _CACHED, _QUARANTINED = range(len(STATES))
_PAUSE_EVERY = 256


def block_map(desk: Desk, num_cells: int) -> Generator[None, None, tuple[int, ...]]:
    """Draw the pool in at most `num_cells` cells.  Changes nothing.

    O(runs + blocks), in steps of some hundred runs: between them other verbs may be called, so the
    picture is of those moments together.

    Returns:
        For each cell the index in `STATES` of what most of its blocks are.
    """
    pool = desk.holdings.pool
    live, quarantined = pool.states()
    painted = np.full(pool.num_blocks, _FREE, np.uint8)
    painted[live] = _PRIVATE
    painted[quarantined] = _QUARANTINED
    stack: list[Node] = [*desk.roots.values(), *desk.tree.retired]
    steps = 0
    while stack:
        node = stack.pop()
        if node.blocks:
            if node.root.retired:  # nobody finds it: a lease's own, or as good as free
                code = _PRIVATE if node.ref else _FREE
            else:
                code = _LEASED if node.ref else _CACHED
            painted[np.frombuffer(node.blocks, np.int32)] = code
        if node.children:
            stack.extend(node.children.values())
        steps += 1
        if steps % _PAUSE_EVERY == 0:
            yield
    each = -(-pool.num_blocks // num_cells)
    short = -pool.num_blocks % each
    cells = np.concatenate([painted, np.full(short, len(STATES), np.uint8)]).reshape(-1, each)
    counts = np.stack([(cells == code).sum(axis=1) for code in range(len(STATES))])
    return tuple(counts.argmax(axis=0).tolist())
