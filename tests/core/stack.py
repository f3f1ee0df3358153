"""A pool with tiers below it, replayed as if the porter took no time.

What is only being computed takes a block of the pool, and so does what comes back; a request takes
them from the blocks that are kept free.  So the pool has as many more than its share; and so has
the tier of the host, where there is a disk.
"""

from __future__ import annotations

from core.replay import SCRATCH, WORKER
from prefixcache.core.cache import PrefixCache
from prefixcache.core.hauls import TierSizes
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, Waiting

COMPUTING_S = 0.5
"""Of a request, to the next one a second later: so what takes no time is always worth fetching."""


class Stack:
    """One worker, one request at a time, as `Replay`; what it would find below counts as found.

    Args:
        pool_blocks: What stays in the pool between two requests.
        host_blocks: What stays in the tier of the host between two requests.
        disk_blocks: What stays below that.
        longest: Blocks of the longest request.
        block_size: Tokens of a block.
        num_ghosts: See `PrefixCache`.
    """

    def __init__(
        self,
        pool_blocks: int,
        host_blocks: int,
        longest: int,
        block_size: int,
        num_ghosts: int | None = None,
        disk_blocks: int = 0,
    ) -> None:
        ahead = longest + 1
        host_ahead = ahead if host_blocks and disk_blocks else 0
        sizes = TierSizes(host_blocks + host_ahead, ahead, 1, disk_blocks, host_ahead)
        self.cache = PrefixCache(
            pool_blocks + ahead,
            block_size,
            partial=Partial.OFF,
            num_ghosts=num_ghosts,
            ttl_s=1e9,
            tiers=sizes,
        )
        self.cache.set_porter(is_there=True, now=0.0)
        self.block_bytes = block_size * TOKEN_BYTES
        self._now = 0.0
        self._attached: set[Namespace] = set()
        self.hits = [0, 0]
        """Tokens that were found: in the pool, and below."""

    def carry(self) -> None:
        """Have all hauls done at once."""
        while hauls := self.cache.hauls(now=self._now):
            for haul in hauls:
                self.cache.hauled(haul.id, len(haul.slots), 0.0, now=self._now)

    def _land(self) -> None:
        """Have what comes back done alone: a slot that is still being read is one too few."""
        hauls = self.cache._lessor.hauls
        assert hauls is not None
        for haul in hauls.take_new():
            self.cache.hauled(haul.id, len(haul.slots), 0.0, now=self._now)

    def request(self, namespace: Namespace, prompt: bytes, kept: bytes) -> int:
        """Serve one request; give the tokens of its prompt that were found.

        Args:
            namespace: Where.
            prompt: What is asked for.
            kept: What exists afterwards: whole blocks.
        """
        self._now += 1.0
        if namespace not in self._attached:
            self.cache.attach(WORKER, namespace, now=self._now)
            self._attached.add(namespace)
        lessor = self.cache._lessor
        tree, root = lessor.tree, lessor.roots[namespace]
        end = (len(prompt) - TOKEN_BYTES) // self.block_bytes * self.block_bytes
        match = tree.match(root, prompt, len(prompt) - TOKEN_BYTES)
        below = 0
        if match.used == len(match.node.blocks):
            below = len(tree.ghosts.places(match.node, prompt, match.end, end))
        here = match.end // self.block_bytes
        size = self.block_bytes // TOKEN_BYTES
        self.hits[0] += here * size
        self.hits[1] += below * size
        if kept:
            self._store(namespace, kept)
        return (here + below) * size

    def _store(self, namespace: Namespace, kept: bytes) -> None:
        cache, now = self.cache, self._now
        answer = cache.acquire(WORKER, namespace, kept + SCRATCH, wait_s=1e6, now=now)
        while isinstance(answer, Waiting):
            self._land()
            answer = next((one for _, one in cache.take_outcomes()), answer)  # type: ignore[assignment]
        assert isinstance(answer, Grant)
        now += COMPUTING_S
        cache.commit(WORKER, answer.lease, len(kept) // TOKEN_BYTES, now=now)
        cache.release(WORKER, answer.lease, now=now)
        self.carry()
