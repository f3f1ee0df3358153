"""Introspection: the trees summed up, the pool as a map, and the drawing of one tree.

**Outline.**  The whole tree is summed up, a bounded part of it is kept.

```
sum   root ─ walk down: own numbers ─ walk up: add to the branch above
keep  a heap of the outermost branches that are kept; over the bound, the least goes into `more`
```

The walk is a generator that pauses after some dozen runs, and so does what makes branches of
them, so that a service can answer others in between.  The tree may change meanwhile: a run that is
no longer where it was found is left out and counted.  A small tree is summed up in one go, exactly.

**Block map.**  What each block is used for, drawn small.

```
pool     ■■■■□□□□▒▒▒▒■■■■□□□□□□□□        one letter a cell; a cell is as many neighbouring blocks as
map      L L F F C C L L F F F F        are needed, and shows what most of them are
```

**Drawing.**  The tree as text, for people and for failed invariants.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator
from heapq import heappop, heappush, merge
from math import log1p

import numpy as np

from prefixcache.core.lessor import Lessor
from prefixcache.core.node import Node, Root
from prefixcache.outline import Branch, Extent, NamespaceOutline, Order, Outline
from prefixcache.texts import many
from prefixcache.types import TOKEN_BYTES, Namespace, unpack

_PAUSE_EVERY = 16
_SORTED_IN_ONE_GO = 256
_SHOWN_BYTES = 32 * TOKEN_BYTES


class _Sum:
    """One run while it is summed up."""

    __slots__ = (
        "above",
        "blocks",
        "depth",
        "done",
        "ghost_tokens",
        "is_ghost",
        "kept",
        "last",
        "leases",
        "more",
        "node",
        "num_blocks",
        "num_more",
        "num_tokens",
        "runs",
        "serial",
        "shown",
        "start",
        "tokens",
    )

    def __init__(self, node: Node, above: _Sum | None) -> None:
        self.node = node
        self.above = above
        self.depth: int = 0 if above is None else above.depth + 1
        self.start: int = 0 if above is None else above.start + above.num_tokens
        self.num_tokens: int = len(node.tokens) // TOKEN_BYTES
        self.num_blocks = len(node.blocks)
        self.is_ghost = above is not None and not node.blocks
        self.leases = 0 if self.is_ghost else node.lock_ref
        self.last = node.last_used
        self.shown = node.tokens[:_SHOWN_BYTES]
        self.runs = int(self.num_blocks > 0)
        self.blocks = self.num_blocks
        self.tokens = 0 if self.is_ghost else self.num_tokens
        self.ghost_tokens = self.num_tokens if self.is_ghost else 0
        self.kept: dict[int, _Sum] = {}
        self.more = [0, 0, 0, 0]
        self.num_more = 0
        self.serial = 0
        self.done = False

    def leave_out(self, below: _Sum) -> None:
        more = self.more
        more[0] += below.runs
        more[1] += below.blocks
        more[2] += below.tokens
        more[3] += below.ghost_tokens
        self.num_more += 1

    def weight(self, order: Order) -> tuple[float, ...]:
        if order is Order.TOKENS:
            return (self.tokens, self.ghost_tokens)
        return (not self.is_ghost, self.leases > 0, self.last, self.tokens)


_Weighed = tuple[tuple[float, ...], int, _Sum]


def _taken(part: list[_Weighed]) -> Iterator[_Weighed]:
    """Take the last of a list until it is empty: what is read is freed, not all in the end."""
    while part:
        yield part.pop()


class Walk:
    """One walk below some roots.

    Args:
        lessor: The cache.
        order: Which branches are kept.
        max_branches: How many, in all.
        max_depth: Runs below the root beyond which all is summed up; None: any depth.
        ghosts: Whether what was evicted is shown.
    """

    def __init__(
        self,
        lessor: Lessor,
        order: Order,
        max_branches: int,
        max_depth: int | None,
        *,
        ghosts: bool,
    ) -> None:
        self._lessor = lessor
        self._order = order
        self._max_branches = max_branches
        self._max_depth = max_depth
        self._ghosts = ghosts
        self._outermost: list[_Weighed] = []
        self._serial = 0
        self._num_kept = 0
        self._steps = 0
        self.num_moved = 0

    def run(
        self,
        spaces: Iterable[Namespace],
        sees: Callable[[Namespace], bool] | None,
        most: int | None,
        now: float,
    ) -> Generator[None, None, Outline]:
        """Walk, pausing after some dozen runs; the generator's value is the outline.

        O(runs + namespaces); memory O(`max_branches` + siblings on the path + namespaces).

        Args:
            spaces: Which namespaces.
            sees: Which of them, asked when its turn comes; None: all.
            most: How many of them are shown, the first by the order; None: all.
            now: The time.
        """
        tops: list[_Weighed] = []
        roots = self._lessor.roots
        for space in spaces:
            if self._is_pause():
                yield
            root = roots.get(space) if sees is None or sees(space) else None
            if root is None or not (root.children or root.ghosts):
                continue
            top = _Sum(root, None)
            yield from self._sum_up(top)
            weight = tuple([-each for each in top.weight(self._order)])
            heappush(tops, (weight, len(tops), top))
        while self._num_kept > self._max_branches:
            self._prune(max(self._max_branches, self._num_kept - _PAUSE_EVERY))
            yield
        while self._outermost:
            del self._outermost[-_PAUSE_EVERY:]
            yield
        namespaces: list[NamespaceOutline] = []
        while tops and len(namespaces) != most:
            top = heappop(tops)[2]
            branches = yield from self._branches(top, now)
            namespaces.append(NamespaceOutline(top.node.root.namespace, branches))
        more = [0, 0, 0, 0]
        for _, _, top in tops:
            sums = (top.runs, top.blocks, top.tokens, top.ghost_tokens)
            more = [one + other for one, other in zip(more, sums, strict=True)]
            if self._is_pause():
                yield
        return Outline(
            block_size=self._lessor.blocks.block_size,
            namespaces=tuple(namespaces),
            num_moved=self.num_moved,
            num_more=len(tops),
            more=Extent(*more),
        )

    def _is_pause(self) -> bool:
        """Count a step; say whether others should have their turn now."""
        self._steps += 1
        return self._steps % _PAUSE_EVERY == 0

    def _sum_up(self, top: _Sum) -> Generator[None, None, None]:
        stack = [(top, iter(self._below(top.node)))]
        while stack:
            one, rest = stack[-1]
            node = next(rest, None)
            if node is None:
                stack.pop()
                self._finish(one)
                continue
            if node.parent is not one.node:
                self.num_moved += 1
                continue
            if self._is_pause():
                yield
            below = _Sum(node, one)
            stack.append((below, iter(self._below(node))))

    def _below(self, node: Node) -> list[Node]:
        found = list(node.children)
        if self._ghosts and node.ghosts:
            found.extend(node.ghosts.values())
        return found

    def _finish(self, one: _Sum) -> None:
        """Add a run, all of whose branches are summed up, to the branch above it."""
        one.done = True
        above = one.above
        if above is None:
            return
        above.runs += one.runs
        above.blocks += one.blocks
        above.tokens += one.tokens
        above.ghost_tokens += one.ghost_tokens
        if self._max_depth is not None and one.depth > self._max_depth:
            above.leave_out(one)
            return
        self._serial = one.serial = self._serial + 1
        above.kept[one.serial] = one
        self._num_kept += 1
        if not one.kept:
            heappush(self._outermost, (one.weight(self._order), one.serial, one))
        self._prune(4 * self._max_branches)

    def _prune(self, most: int) -> None:
        """Sum up the least of the outermost branches until at most `most` are kept."""
        while self._num_kept > most and self._outermost:
            one = heappop(self._outermost)[2]
            above = one.above
            assert above is not None
            del above.kept[one.serial]
            self._num_kept -= 1
            above.leave_out(one)
            if not above.kept and above.done and above.above is not None:
                heappush(self._outermost, (above.weight(self._order), above.serial, above))

    def _branches(self, top: _Sum, now: float) -> Generator[None, None, tuple[Branch, ...]]:
        clock, oldest = self._lessor.tree.clock, 1
        order: list[_Sum] = []
        stack = [top]
        while stack:
            one = stack.pop()
            order.append(one)
            if one.runs and one.above is not None:
                oldest = max(oldest, clock - one.last)
            if self._is_pause():
                yield
            stack.extend((yield from self._sorted(one.kept.values())))
        order.reverse()
        branches = []
        while order:
            one = order.pop()  # and is freed here, not all of them at once in the end
            heat = 1.0 - log1p(max(0, clock - one.last)) / log1p(oldest)
            branches.append(self._branch(one, heat, now))
            one.kept = {}
            if self._is_pause():
                yield
        return tuple(branches)

    def _sorted(self, sums: Iterable[_Sum]) -> Generator[None, None, Iterable[_Sum]]:
        """Sort runs by the order, the least first: many of them in parts, which are merged."""
        parts: list[list[_Weighed]] = [[]]
        for each in sums:
            if len(parts[-1]) == _SORTED_IN_ONE_GO:
                parts[-1].sort(reverse=True)
                parts.append([])
            parts[-1].append((each.weight(self._order), each.serial, each))
            if self._is_pause():
                yield
        parts[-1].sort(reverse=True)
        found = []
        for _, _, each in merge(*[_taken(part) for part in parts]):
            found.append(each)
            if self._is_pause():
                yield
        return found

    def _branch(self, one: _Sum, heat: float, now: float) -> Branch:
        resident = not one.is_ghost and one.above is not None
        leases = one.leases if resident else 0
        parted = (
            self._lessor.history.divergence.most(one.node, now) if one.node.divergence else None
        )
        end = one.start + one.num_tokens
        idle_s = self._lessor.history.idle_clock.idle_s(one.last, now) if resident else None
        return Branch(
            depth=one.depth,
            start=one.start,
            num_tokens=one.num_tokens,
            num_blocks=one.num_blocks,
            tokens=one.shown,
            below=Extent(one.runs, one.blocks, one.tokens, one.ghost_tokens),
            more=Extent(*one.more),
            num_more=one.num_more,
            num_locks=leases,
            is_ghost=one.is_ghost,
            is_pinned=resident and one.node.pinned > 0,
            idle_s=0.0 if leases else idle_s,
            heat=(1.0 if leases else max(0.0, heat)) if resident else 0.0,
            num_uses=self._lessor.tree.policy.uses(one.node) if resident else None,
            parted_at=None if parted is None else end + parted[0],
            num_parted=0 if parted is None else parted[1],
        )


STATES = ("free", "private", "leased", "cached", "quarantined")
"""Private: a lease's own.  Leased: indexed, a lease protects it.  Cached: indexed, evictable."""

_FREE, _PRIVATE, _LEASED, _CACHED, _QUARANTINED = range(len(STATES))


def block_map(lessor: Lessor, num_cells: int) -> Generator[None, None, tuple[int, ...]]:
    """Draw the pool in at most `num_cells` cells.  Changes nothing.

    O(runs + blocks), in steps of some dozen runs: between them other verbs may be called, so the
    picture is of those moments together.

    Returns:
        For each cell the index in `STATES` of what most of its blocks are.
    """
    pool = lessor.blocks.pool
    live, quarantined = pool.states()
    painted = np.full(pool.end, _FREE, np.uint8)
    painted[live] = _PRIVATE
    painted[quarantined] = _QUARANTINED
    stack: list[Node] = [*lessor.roots.values(), *lessor.tree.retired]
    steps = 0
    while stack:
        node = stack.pop()
        if node.blocks:
            if node.root.retired:  # nobody finds it: a lease's own, or as good as free
                code = _PRIVATE if node.lock_ref else _FREE
            else:
                code = _LEASED if node.lock_ref else _CACHED
            painted[np.frombuffer(node.blocks, np.int32)] = code
        stack.extend(node.children)
        steps += 1
        if steps % _PAUSE_EVERY == 0:
            yield
    each = -(-pool.num_blocks // num_cells)
    short = -pool.num_blocks % each
    painted = painted[pool.first :]
    cells = np.concatenate([painted, np.full(short, len(STATES), np.uint8)]).reshape(-1, each)
    counts = np.stack([(cells == code).sum(axis=1) for code in range(len(STATES))])
    return tuple(counts.argmax(axis=0).tolist())


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
    found = [*node.children, *(node.ghosts or {}).values()]
    return sorted(found, key=lambda below: below.tokens, reverse=True)


def _describe(node: Node) -> str:
    count = len(node.tokens) // TOKEN_BYTES
    tokens = " ".join(map(str, unpack(node.tokens[: _SHOWN * TOKEN_BYTES])))
    more = " …" if count > _SHOWN else ""
    text = f"{tokens}{more} ({many(count, 'token')})"
    if not node.blocks:
        return f"{text} ghost"
    blocks = " ".join(map(str, node.blocks[:_SHOWN])) + (" …" if len(node.blocks) > _SHOWN else "")
    lock = f"  ref {node.lock_ref}" if node.lock_ref else f"  last {node.last_used}"
    return f"{text} blocks {blocks}{lock}"
