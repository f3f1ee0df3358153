"""Sequential replay through the verbs: exactly the cache of the reference simulators.

The references store whole blocks of what a request leaves behind, and never hold a block that is
only being computed.  A lease does: the token that is always computed needs a place.  So the pool
gets one block more than the capacity, and every request asks for its whole blocks and one token:
that last block is scratch, is never committed, and is free again after the release.  The tree
then never holds more than the capacity, and evicts when, and only when, the references do.  (With
`Partial.TAILS` the partly filled last block is stored too.)
"""

from __future__ import annotations

from prefixcache.core.cache import PrefixCache
from prefixcache.types import TOKEN_BYTES, Grant, Namespace, Partial, WorkerId

SCRATCH = b"\xff" * TOKEN_BYTES
WORKER = WorkerId(1)


class Replay:
    """One worker, one request at a time: look up the prompt, then store what exists after it."""

    def __init__(
        self,
        capacity_blocks: int,
        block_size: int,
        *,
        partial: Partial = Partial.OFF,
        num_ghosts: int | None = None,
    ) -> None:
        self.cache = PrefixCache(
            capacity_blocks + 1,
            block_size,
            policy="lru",
            partial=partial,
            num_ghosts=num_ghosts,
            ttl_s=1e9,
        )
        self.capacity_blocks = capacity_blocks
        self.partial = partial
        self.block_bytes = block_size * TOKEN_BYTES
        self._now = 0.0
        self._attached: set[Namespace] = set()

    def request(self, namespace: Namespace, prompt: bytes, cached: bytes) -> tuple[int, int]:
        """Serve one request; give the tokens of its prompt that were (hit, partly hit)."""
        self._now += 1.0
        if namespace not in self._attached:
            self.cache.attach(WORKER, namespace, now=self._now)
            self._attached.add(namespace)
        found = self.cache.lookup(namespace, prompt)
        whole = len(cached) // self.block_bytes * self.block_bytes
        room = self.capacity_blocks * self.block_bytes
        kept = cached[: min(room, len(cached) if self.partial is Partial.TAILS else whole)]
        if kept:
            grant = self.cache.acquire(WORKER, namespace, kept + SCRATCH, now=self._now)
            assert isinstance(grant, Grant)
            self.cache.commit(WORKER, grant.lease, len(kept) // TOKEN_BYTES, now=self._now)
            self.cache.release(WORKER, grant.lease, now=self._now)
        return found.num_hit, found.num_partial
