"""Ghosts: what was evicted, remembered by its tokens alone, so that a miss has a cause.

A ghost is a node without blocks.  Ghosts hang in `node.ghosts`, beside the resident children, and
below one another; never does anything resident hang below a ghost.  Their number is bounded, in
blocks, and the oldest are forgotten first; since leaves go before their parents, the oldest are the
deepest.  Tails are counted apart, as many as there may be of other blocks, so that they push none
of those out that a policy learns from.

A ghost whose blocks lie in a tier (`tiers.py`) is bounded by the slots there, and not counted here
until it has lost the last of them.  A tail never lies in one.
"""

from __future__ import annotations

from array import array
from collections import deque

from prefixcache.core.node import Children, Node, Run, common_prefix
from prefixcache.core.tails import TailWorth
from prefixcache.core.tiers import Tier
from prefixcache.types import BlockTable


class Ghosts:
    """The memory of what was evicted.

    Args:
        limit: Whole blocks to remember at most, and as many tails; 0 remembers nothing.
        block_bytes: Bytes of a block's packed tokens.
    """

    __slots__ = (
        "_fifo",
        "_living",
        "_serial",
        "_step",
        "_tails",
        "block_bytes",
        "limit",
        "num_blocks",
        "num_tails",
        "tier",
        "walks",
        "worth",
    )

    def __init__(self, limit: int, block_bytes: int) -> None:
        self.limit = limit
        self.block_bytes = block_bytes
        self.num_blocks = 0
        """Whole blocks that are remembered."""
        self.num_tails = 0
        self._fifo: deque[tuple[int, Node]] = deque()
        self._tails: deque[tuple[int, Node]] = deque()
        self._serial = 0
        self._step = max(1, limit // _STEPS)
        self.worth: TailWorth | None = None
        """Who counts what is remembered, too."""
        self._living: dict[int, int] = {}
        """Blocks that are remembered, by when they were buried, in steps of `_step` burials."""
        self.tier: Tier | None = None
        """Where the blocks of some ghosts lie."""
        self.walks: list[list[Node]] = []
        """For each walk through the tree that is on its way: what has swallowed another."""

    def set_tier(self, tier: Tier) -> None:
        """Let ghosts keep what they are given of a tier."""
        self.tier = tier
        tier.bared = self._has_bared
        self.limit = max(1, self.limit)  # above a ghost with slots there is one in any case

    def _has_bared(self, ghost: Node) -> None:
        """Count a ghost that has lost its last slot: from now on its tokens alone are known."""
        self.num_blocks += len(ghost.tokens) // self.block_bytes
        self._line_up(ghost)

    def bury(self, above: Node, ghost: Node) -> None:
        """Remember an evicted leaf below `above`.  O(log siblings), amortised."""
        first = ghost.tokens[: self.block_bytes]
        if above.ghosts and first in above.ghosts:
            self._drop(above, above.ghosts[first])
        if above.ghosts is None:
            above.ghosts = Children()
        above.ghosts.put(first, ghost)
        self._serial += 1
        ghost.burial = self._serial
        if ghost.tail:
            self.num_tails += 1
            self._tails.append((self._serial, ghost))
            if len(self._tails) > 1024 and len(self._tails) > 4 * self.num_tails:
                self._tails = self._tidied(self._tails)
            return
        self._count(ghost, 1)
        if ghost.places is not None and self.tier is not None:
            self.tier.enter(ghost)
        else:
            self._line_up(ghost)

    def _line_up(self, ghost: Node) -> None:
        """Let a ghost of whole blocks be forgotten when it is the oldest.  O(1), amortised."""
        self._fifo.append((ghost.burial, ghost))
        if len(self._fifo) > 1024 and len(self._fifo) > 4 * self.num_blocks:
            self._fifo = self._tidied(self._fifo)

    def adopt_children(self, ghost: Node) -> None:
        """Tell a new ghost's ghosts their parent; swallow an only one, so chains stay short."""
        ghosts = ghost.ghosts
        if not ghosts:
            ghost.ghosts = None
            return
        only = next(iter(ghosts.values()))
        if (
            not only.tail
            and ghost.last_used == only.last_used
            and len(ghosts) == 1
            and len(ghost.tokens) + len(only.tokens) <= _MERGED_UNTIL
            and ghost.mark == only.mark
            and (self.tier is None or self.tier.may_join(ghost, only, self._serial))
        ):
            self._count(only, -1)
            if self.tier is not None:
                self.tier.join(ghost, only)
            for moved in self.walks:
                moved.append(ghost)
            ghost.tokens += only.tokens
            ghost.ghosts = only.ghosts
            ghost.divergence = only.divergence
            only.parent = None
            ghosts = ghost.ghosts or Children()
        for below in ghosts.values():
            below.parent = ghost

    def match(self, node: Node, tokens: bytes, start: int) -> int:
        """Count the bytes of `tokens[start:]` that ghosts below `node` know.  Changes nothing."""
        width = self.block_bytes
        off, end = start, len(tokens)
        while node.ghosts and off < end:
            child = node.ghosts.get(tokens[off : off + width])
            if child is None:
                _, same = node.ghosts.nearest(tokens[off : off + width])
                return off + same - start
            size = len(child.tokens)
            same = common_prefix(tokens, off, child.tokens, 0, min(size, end - off)) & ~3
            off += same
            if same < size:
                break
            node = child
        return off - start

    def places(self, node: Node, tokens: bytes, start: int, end: int) -> BlockTable:
        """Give the slots of the blocks of `tokens[start:end]` that can be read now, up to a gap.

        Changes nothing.  O(ghosts passed + blocks), in C.

        Args:
            node: Below which; its run ends where `start` is.
            tokens: A prompt.
            start: A whole number of blocks.
            end: What follows is not looked at; a whole number of blocks.
        """
        found: BlockTable = array("i")
        width, off = self.block_bytes, start
        while self.tier is not None and node.ghosts and off < end:
            child = node.ghosts.get(tokens[off : off + width])
            if child is None or child.places is None:
                break
            size = len(child.tokens)
            same = common_prefix(tokens, off, child.tokens, 0, min(size, end - off)) // width
            usable = child.places[:same]
            count = self.tier.count_readable(usable)
            found += usable[:count]
            if count * width < size:
                break
            off += size
            node = child
        return found

    def trail(self, node: Node, tokens: bytes, start: int) -> list[tuple[int, int]]:
        """Give (bytes, burial) of each ghost below `node` that `tokens[start:]` pass.

        Changes nothing.  As `match`, which sums the bytes up.
        """
        width = self.block_bytes
        found = []
        off, end = start, len(tokens)
        while node.ghosts and off < end:
            child = node.ghosts.get(tokens[off : off + width])
            if child is None:
                near, same = node.ghosts.nearest(tokens[off : off + width])
                if near is not None:
                    found.append((same, near.burial))
                break
            size = len(child.tokens)
            same = common_prefix(tokens, off, child.tokens, 0, min(size, end - off)) & ~3
            found.append((same, child.burial))
            off += same
            if same < size:
                break
            node = child
        return found

    def depth(self, burial: int) -> int:
        """Count the blocks buried since, that one included, and still remembered.

        So many blocks more, and an LRU would have it still.  Changes nothing.  O(steps of burials),
        exact to a 512th of the limit.
        """
        first = burial // self._step
        return sum(count for step, count in self._living.items() if step >= first)

    def revive(self, node: Node, run: bytes) -> Node | None:
        """Take the ghost below `node` that `run` begins with, cut where they part.

        The ghost is unlinked and its own ghosts stay below it; the caller gives it blocks, and then
        takes its slots back.  None if
        no ghost begins with the run's first block, or if only a shorter tail does (it is dropped).
        """
        ghosts = node.ghosts
        width = self.block_bytes
        if ghosts is None:
            return None
        first = run[:width]
        ghost = ghosts.get(first)
        if ghost is None:
            tail = ghosts.before(first)
            if tail is not None and first.startswith(tail.tokens):
                ghosts.drop(tail.tokens)
                if not ghosts:
                    node.ghosts = None
                tail.parent = None
                self.num_tails -= 1
                if self.worth is not None:
                    self.worth.revived(tail)
            return None
        same = common_prefix(run, 0, ghost.tokens, 0, min(len(run), len(ghost.tokens)))
        keep = same if same == len(run) else same - same % width
        if keep < len(ghost.tokens):
            self._split(ghost, keep)
        ghosts.drop(first)
        if not ghosts:
            node.ghosts = None
        self._count(ghost, -1)
        if self.worth is not None:
            self.worth.revived(ghost)
        if self.tier is not None:
            self.tier.step_out(ghost)
        return ghost

    def forget(self) -> list[Node]:
        """Drop the oldest ghosts over the limit; give the nodes that lost one.  Amortised O(1)."""
        bereft: list[Node] = []
        limit, fifo, tails = self.limit, self._fifo, self._tails
        while self.num_blocks > limit and fifo:
            self._forget_oldest(fifo, bereft)
        while self.num_tails > limit and tails:
            self._forget_oldest(tails, bereft)
        return bereft

    def _forget_oldest(self, fifo: deque[tuple[int, Node]], bereft: list[Node]) -> None:
        serial, ghost = fifo.popleft()
        above = ghost.parent
        if above is None or ghost.blocks or ghost.burial != serial:
            return  # revived, swallowed or buried anew since
        self._drop(above, ghost)
        bereft.append(above)

    @staticmethod
    def _tidied(fifo: deque[tuple[int, Node]]) -> deque[tuple[int, Node]]:
        return deque(
            (serial, ghost)
            for serial, ghost in fifo
            if ghost.parent is not None and not ghost.blocks and ghost.burial == serial
        )

    def _split(self, ghost: Node, keep: int) -> None:
        """Cut a ghost's run after `keep` bytes; the rest becomes a ghost below it."""
        lower = Run(ghost.tokens[keep:], array("i"), ghost, ghost.last_used)
        lower.burial = ghost.burial
        lower.mark = ghost.mark
        lower.divergence, ghost.divergence = ghost.divergence, None
        lower.ghosts = ghost.ghosts
        for below in (lower.ghosts or Children()).values():
            below.parent = lower
        ghost.tokens = ghost.tokens[:keep]
        ghost.ghosts = Children()
        ghost.ghosts.put(lower.tokens[: self.block_bytes], lower)
        if self.tier is not None and ghost.places is not None:
            self.tier.split(ghost, lower, keep // self.block_bytes)
            if lower.places is None:
                self.num_blocks += -(-len(lower.tokens) // self.block_bytes)
        if lower.places is None:
            self._fifo.appendleft((lower.burial, lower))
            if self.num_blocks > self.limit:  # it was not counted before
                self._drop(ghost, lower)

    def _drop(self, above: Node, ghost: Node) -> None:
        """Forget a ghost and all below it."""
        if above.ghosts is not None:
            above.ghosts.drop(ghost.tokens[: self.block_bytes])
            if not above.ghosts:
                above.ghosts = None
        stack = [ghost]
        while stack:
            node = stack.pop()
            self._count(node, -1)
            if self.worth is not None:
                self.worth.forget(node)
            if self.tier is not None:
                self.tier.leave(node)
            node.parent = None
            if node.ghosts:
                stack.extend(node.ghosts.values())
                node.ghosts = None

    def _count(self, ghost: Node, sign: int) -> None:
        """Add or subtract a ghost's blocks."""
        if ghost.tail:
            self.num_tails += sign
            return
        size = sign * -(-len(ghost.tokens) // self.block_bytes)
        if ghost.places is None:
            self.num_blocks += size
        step = ghost.burial // self._step
        if left := self._living.get(step, 0) + size:
            self._living[step] = left
        else:
            del self._living[step]


_STEPS = 512
_MERGED_UNTIL = 4096
"""Bytes of a ghost's run up to which ghosts of one chain are joined."""
