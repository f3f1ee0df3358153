"""vLLM's manager of KV blocks, whose blocks are leased.

```
scheduler                          here                           leases
get_computed_blocks       ──►  what the lease came with       ──►  ready
allocate_slots            ──►  blocks it was not told of yet  ──►  has_room
take_kv_cache_block_copies ─►  copies of the admitted         ──►  copies
update_from_output        ──►  settle                         ──►  commit, extend ahead
free, pop_blocks_for_free ──►  the last commit, and the end   ──►  settle, pop, end
```
vLLM calls `cache_blocks` when it *schedules* a step.  Others may read only what is written, so
nothing happens there; `settle` runs when the step's output is there.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Self

from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
from vllm.v1.core.kv_cache_utils import KVCacheBlockCopy

from prefixcache_vllm.leases import Held, Leases
from prefixcache_vllm.request_key import Adapters, media_of


class EndedBlocks:
    """Stands where the scheduler frees blocks late: what it frees there is what requests held."""

    def __init__(self, leases: Leases, pool: Any) -> None:
        self._leases, self._pool = leases, pool

    def free_blocks(self, held: Iterable[Held]) -> None:
        """Give back what was taken out when its last step was in flight."""
        for one in held:
            self._leases.end(one)

    def change_to(self, leases: Leases) -> None:
        """Take others, where nothing of the former ones is to be freed any more."""
        self._leases = leases

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)


class LeasedKVCacheManager(KVCacheManager):
    """Answers the scheduler from leases.  Make one `of` vLLM's own.

    vLLM's coordinator stays as it is, for what the scheduler reads of it; it owns no block.
    """

    leases: Leases
    _told: dict[str, int]
    _copies: list[KVCacheBlockCopy]
    _objects: list[Any]
    _adapters: Adapters

    @classmethod
    def of(cls, manager: KVCacheManager, leases: Leases) -> Self:
        """Take the place of a manager that has lent no block yet."""
        made = cls.__new__(cls)
        made.__dict__.update(manager.__dict__)
        made.leases = leases
        made._objects = manager.block_pool.blocks
        made.block_pool = EndedBlocks(leases, manager.block_pool)
        made._told = {}
        made._copies = []
        made._adapters = Adapters()
        return made

    # ---------------------------------------------------------------------- before the first step

    def ask(self, request: Any) -> Held:
        """Ask for a request's blocks, unless that was done."""
        most = request.max_tokens or 0
        return self.leases.ask(
            request.request_id,
            request.all_token_ids,
            left=max(0, most - request.num_output_tokens),
            salt=request.cache_salt,
            adapter=self._adapters.key_of(request),
            media=media_of(request),
            reuse=not request.skip_reading_prefix_cache,
        )

    def is_ready(self, request: Any) -> bool:
        """Whether its blocks are there; asks for them if need be.  Waits for nothing."""
        held = self.ask(request)
        if held.refused is not None:
            return False
        found = self.leases.ready(request.request_id)
        if found is not None:
            self._told[request.request_id] = 0
        return found is not None

    def prefix_cache_lookup_enabled(self, request: Any) -> bool:
        """Whether what others computed may be used."""
        return not request.skip_reading_prefix_cache

    def get_computed_blocks(self, request: Any) -> tuple[KVCacheBlocks, int, int]:
        """Give the blocks that need not be computed, and their tokens: exact, not whole blocks."""
        held = self.leases.held[request.request_id]
        cached = held.num_cached
        return self._blocks(held.table[: -(-cached // self.leases.block_size)]), cached, 0

    # ------------------------------------------------------------------------------- step by step

    def allocate_slots(
        self,
        request: Any,
        num_new_tokens: int,
        num_new_computed_tokens: int = 0,
        new_computed_blocks: KVCacheBlocks | None = None,
        num_lookahead_tokens: int = 0,
        num_external_computed_tokens: int = 0,
        **_: Any,
    ) -> KVCacheBlocks | None:
        """Give the blocks of a request that vLLM does not know yet; None if they do not suffice."""
        name = request.request_id
        need = min(
            request.num_computed_tokens
            + num_new_computed_tokens
            + num_external_computed_tokens
            + num_new_tokens
            + num_lookahead_tokens,
            self.max_model_len,
        )
        if not self.leases.has_room(name, need):
            return None
        held = self.leases.start(name)
        copies, held.copies = held.copies, ()
        self._copies += [KVCacheBlockCopy(copy.src, copy.dst) for copy in copies]
        table = held.table
        told, self._told[name] = self._told.get(name, 0), len(table)
        return self._blocks(table[told:])

    def get_blocks(self, request_id: str) -> KVCacheBlocks:
        """Give the blocks of a request that vLLM was told of."""
        held = self.leases.held.get(request_id)
        if held is None:
            return self.empty_kv_cache_blocks
        return self._blocks(held.table[: self._told.get(request_id, 0)])

    def take_kv_cache_block_copies(self) -> tuple[list[KVCacheBlockCopy], list[Any]]:
        """Give the copies of whole blocks that precede this step's writes."""
        copies, self._copies = self._copies, []
        return copies, []

    def settle(self, request: Any, *, is_last: bool = False) -> None:
        """Make what a step has written visible to others, and ask for room ahead."""
        valid = max(0, request.num_computed_tokens - request.num_in_flight_tokens)
        self.leases.settle(request.request_id, valid, request.all_token_ids, is_last=is_last)

    # ------------------------------------------------------------------------------------ the end

    def free(self, request: Any) -> None:
        """Let go of a request's blocks: nothing writes there any more."""
        for held in self.pop_blocks_for_free(request):
            self.leases.end(held)

    def pop_blocks_for_free(self, request: Any) -> list[Any]:
        """Take a request's blocks out; the scheduler frees them when its last step is done."""
        self.settle(request, is_last=True)
        return self._take_out(request.request_id)

    def drop(self, request_id: str) -> None:
        """Let go of a lost lease: what was computed under it is told to nobody."""
        for held in self._take_out(request_id):
            self.leases.end(held)

    def change_to(self, leases: Leases) -> None:
        """Answer from other leases: of a pool of the same shape, and all requests begin again."""
        former = self.leases
        for name in list(former.held):
            self.drop(name)
        self._told.clear()
        self._copies.clear()
        leases.counts = former.counts
        self.leases = leases
        self.block_pool.change_to(leases)

    def _take_out(self, name: str) -> list[Any]:
        self._told.pop(name, None)
        held = self.leases.pop(name)
        return [] if held is None else [held]

    # ------------------------------------------------------------------------- nothing to do here

    def cache_blocks(self, request: Any, num_computed_tokens: int) -> None:
        """Do nothing: this is called when a step is scheduled, see `settle`."""

    def remove_skipped_blocks(self, *_: Any, **__: Any) -> None:
        """Do nothing: all tokens stay."""

    def record_blocks_for_zeroing(self, *_: Any, **__: Any) -> None:
        """Do nothing: the service wipes what it lends to another tenant."""

    def take_new_block_ids(self) -> list[int]:
        """Give none: see `record_blocks_for_zeroing`."""
        return []

    def take_boundary_state_offloads(self) -> dict[str, Any]:
        """Give none: no layer keeps states."""
        return {}

    def take_events(self) -> list[Any]:
        """Give none: `prefixcache watch` tells them, for all engines."""
        return []

    def evict_blocks(self, block_ids: set[int]) -> None:
        """Do nothing: eviction is the service's."""

    @property
    def usage(self) -> float:
        """Share of the pool's blocks that this engine's requests hold; shared ones count each."""
        held = sum(one.num_blocks for one in self.leases.held.values())
        return min(1.0, held / len(self._objects))

    def estimate_cached_tokens(self, request: Any) -> int:
        """Tokens of a request that others may reuse."""
        held = self.leases.held.get(request.request_id)
        return 0 if held is None else held.committed

    def reset_prefix_cache(self) -> bool:
        """Have the service forget this model's prefixes, for all engines."""
        self.leases.session.reset()
        if self.prefix_cache_stats is not None:
            self.prefix_cache_stats.reset = True
        return True

    def _blocks(self, ids: Any) -> KVCacheBlocks:
        if not len(ids):
            return self.empty_kv_cache_blocks
        objects = self._objects
        return KVCacheBlocks(([objects[i] for i in ids],))
