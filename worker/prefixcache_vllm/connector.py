"""Connector mode: pages are copied between vLLM's own cache and the pool.

```
vllm serve MODEL --kv-transfer-config '{"kv_connector": "PrefixcacheConnector",
    "kv_connector_module_path": "prefixcache_vllm.connector",
    "kv_role": "kv_both", "kv_load_failure_policy": "recompute"}'
```
```
scheduler   get_num_new_matched_tokens ─► ask; nothing until it is granted
            build_connector_meta       ─► which pages to copy in before the step, and out after it
worker      start_load_kv, wait_for_save: copies runs of pages; then it says what it has saved
scheduler   update_connector_output    ─► commit what is saved, give back what is finished
```
A cache, and nothing that anybody depends on: whatever goes wrong (no room, no service, a lease that
is over), the request is computed as if there were no pool.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorWorkerMetadata,
    SupportsHMA,
)

from prefixcache.client import Client
from prefixcache.errors import CacheError, InvalidRequest, LayoutMismatch, Unsupported
from prefixcache.types import PoolHandle
from prefixcache_kernels import map_pages
from prefixcache_vllm import pages
from prefixcache_vllm.joining import join
from prefixcache_vllm.leases import Bounds, Held, Leases
from prefixcache_vllm.link import Link
from prefixcache_vllm.options import Options
from prefixcache_vllm.request_key import Adapters, can_share, media_of

log = logging.getLogger("vllm.prefixcache")

PAUSE_S: Final = 0.005
"""How long a step with nothing to compute waits for a lease."""
FEWEST: Final = 4
"""Tokens of a partly matching page that are worth its copy."""

Pairs = list[tuple[int, int]]


@dataclass
class Copies(KVConnectorMetadata):
    """What the worker copies in one step.

    Attributes:
        step: the step's number.
        pool: where the pages are.
        loads: page of the pool, block of vLLM.
        saves: block of vLLM, page of the pool.
        group: of the engine's processes that write there.
        until: monotonic seconds after which the leases may be over, and nothing is copied.
    """

    step: int = 0
    pool: PoolHandle | None = None
    loads: Pairs = field(default_factory=list)
    saves: Pairs = field(default_factory=list)
    until: float = 0.0
    group: str = ""


@dataclass
class Copied(KVConnectorWorkerMetadata):
    """What the worker has copied.

    Attributes:
        step: the last step whose saves are in the pool.
        unsaved: steps whose saves are not.
    """

    step: int
    unsaved: frozenset[int] = frozenset()

    def aggregate(self, other: Copied) -> Copied:
        """Give what all ranks have copied."""
        return Copied(min(self.step, other.step), self.unsaved | other.unsaved)


@dataclass(eq=False)
class Shared:
    """One request, as far as it is shared."""

    request: Any
    held: Held | None = None
    """Once it is granted."""
    is_unshared: bool = False
    """Whether it goes on as if there were no pool."""
    saved: int = 0
    """Whole blocks that the pool holds, or will after a step that is under way."""
    due: list[tuple[int, int]] = field(default_factory=list)
    """Steps under way, and how many tokens can be read once they are saved."""
    valid: int = 0
    """Tokens that the pool holds."""
    matched: int = 0
    """Tokens that vLLM was told of last, its own among them."""
    last_step: int = 0
    """In which something was copied for it."""
    is_finished: bool = False


class PrefixcacheConnector(KVConnectorBase_V1, SupportsHMA):
    """The pool of prefixcache behind vLLM's own cache."""

    def __init__(self, vllm_config: Any, role: Any, kv_cache_config: Any) -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        pages.check(vllm_config, in_place=False)
        if vllm_config.kv_transfer_config.kv_load_failure_policy != "recompute":
            raise InvalidRequest(
                "a page that cannot be loaded would end its request: say "
                '"kv_load_failure_policy": "recompute" in --kv-transfer-config'
            )
        if role == KVConnectorRole.SCHEDULER:
            self._scheduler = SchedulerSide(vllm_config, kv_cache_config)
        else:
            self._worker = WorkerSide(vllm_config, kv_cache_config)

    @property
    def requires_kv_delivery(self) -> bool:
        """Whether a preempted request must be computed again to be handed over: this is a cache."""
        return False

    # ---------------------------------------------------------------------------------- worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Learn where vLLM's own pages are."""
        self._worker.register(kv_caches)

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        """Copy pages in."""
        self._worker.load(self._get_connector_metadata())

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Do nothing: all is there."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        """Do nothing: pages are copied when the step is over."""

    def wait_for_save(self) -> None:
        """Copy pages out."""
        self._worker.save(self._get_connector_metadata())

    def get_block_ids_with_load_errors(self) -> set[int]:
        """Give the blocks whose pages may be another's: vLLM computes them again."""
        return self._worker.take_failed()

    def build_connector_worker_meta(self) -> Copied | None:
        """Say what is saved."""
        return self._worker.take_copied()

    # ------------------------------------------------------------------------------- scheduler

    def get_num_new_matched_tokens(
        self, request: Any, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Say how many tokens can be copied in; None while the lease is not there."""
        return self._scheduler.match(request, num_computed_tokens), False

    def update_state_after_alloc(self, request: Any, blocks: Any, num_external_tokens: int) -> None:
        """Note which pages go into which blocks."""
        self._scheduler.admit(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: Any) -> Copies:
        """Say what the worker copies in this step."""
        return self._scheduler.plan(scheduler_output)

    def update_connector_output(self, connector_output: Any) -> None:
        """Take what the worker has copied."""
        self._scheduler.copied(connector_output.kv_connector_worker_meta)

    def request_finished(self, request: Any, block_ids: Sequence[int]) -> tuple[bool, None]:
        """Give back what a request held, as soon as its last step is saved."""
        self._scheduler.finish(request.request_id)
        return False, None

    def request_finished_all_groups(
        self, request: Any, block_ids: tuple[Sequence[int], ...]
    ) -> tuple[bool, None]:
        """Do the same, for models with one group of layers."""
        return self.request_finished(request, block_ids[0])

    def reset_cache(self) -> bool:
        """Forget what this model's engines have stored, as vLLM does when weights change."""
        return self._scheduler.reset()

    def shutdown(self) -> None:
        """End the session."""
        if self._role == KVConnectorRole.SCHEDULER:
            self._scheduler.close()
        else:
            self._worker.close()


# ------------------------------------------------------------------------------------- scheduler


class SchedulerSide:
    """What the scheduler's process knows: who holds which pages, and what is copied when."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        options = Options.of(vllm_config)
        self._size = int(pages.only_spec(kv_cache_config).block_size)
        self._bounds = Bounds(
            max_tokens=vllm_config.model_config.max_model_len,
            reserve=options.reserve,
            ahead=options.ahead,
            window=options.window,
            wait_s=options.wait_s,
            min_partial=FEWEST,
        )
        self._link = Link(
            vllm_config,
            kv_cache_config,
            "connector",
            in_place=False,
            make=lambda session: Leases(session, self._bounds),
        )
        self._leases: Leases | None = None
        self._requests: dict[str, Shared] = {}
        self._popped: list[tuple[int, Leases, Held]] = []
        """What is given back once a step is saved."""
        self._loads: Pairs = []
        self._step = self._acknowledged = 0
        self._is_idle = False
        self._adapters = Adapters()
        self.num_loaded = self.num_saved = 0
        try:
            self._leases = self._link.join()
        except LayoutMismatch:
            raise
        except CacheError as error:
            log.warning("prefixcache: going on without sharing until there is a service: %s", error)
            self._link.look()

    @property
    def leases(self) -> Leases | None:
        """What the requests hold; None while there is no service."""
        return self._leases

    # ----------------------------------------------------------------------- before the first step

    def match(self, request: Any, num_computed: int) -> int | None:
        """Say how many tokens beyond `num_computed` can be copied in; None: not known yet."""
        shared = self._requests.get(request.request_id)
        if shared is None:
            shared = self._requests[request.request_id] = Shared(request)
            shared.is_unshared = self._leases is None or not can_share(request)
        if shared.is_unshared or self._leases is None:
            return 0
        if shared.held is None and not self._granted(shared, self._leases):
            return 0 if shared.is_unshared else None
        # One token is left to compute, for its logits: also of one that was preempted.  It is
        # written once more into the copy of its block, which is vLLM's own.
        shared.matched = min(shared.valid, int(request.num_tokens) - 1)
        return max(0, shared.matched - num_computed)

    def _granted(self, shared: Shared, leases: Leases) -> bool:
        """Take the lease if it is there; ask for it if that was not done."""
        name = shared.request.request_id
        if name not in leases.held:
            # Nobody waits for room here; but for what another computes just now.
            request = shared.request
            leases.ask(
                name,
                request.all_token_ids,
                left=request.max_tokens,
                salt=request.cache_salt,
                adapter=self._adapters.key_of(request),
                media=media_of(request),
                for_room=False,
            )
            leases.flush()
            if len(self._requests) > 1:
                return False
        # With nothing else to compute, a step that has no tokens would only come in between.
        if self._is_idle or len(self._requests) == 1:
            leases.pause([name], PAUSE_S)
        held = leases.ready(name)
        if held is None:
            shared.is_unshared = name not in leases.held or leases.held[name].refused is not None
            if shared.is_unshared:
                leases.end(leases.pop(name))
            return False
        shared.held = leases.start(name)
        shared.saved = shared.held.num_cached // self._size
        shared.valid = shared.held.num_cached
        return True

    def admit(self, request: Any, blocks: Sequence[int], num_external: int) -> None:
        """Note which pages go into which blocks of vLLM."""
        shared = self._requests.get(request.request_id)
        if not num_external or shared is None or shared.held is None:
            return
        first = (shared.matched - num_external) // self._size
        there = self._pages(shared, shared.held)
        self._loads += [
            (there[at], blocks[at]) for at in range(first, -(-shared.matched // self._size))
        ]
        shared.last_step = self._step + 1

    def _pages(self, shared: Shared, held: Held) -> Sequence[int]:
        """Give the pages to read from: the lease's, but for a block that it was to copy.

        Into that one's page it may write, and does so when vLLM's block is full.  Until then the
        tokens are where they were, which the lease holds as well.
        """
        table: Sequence[int] = held.table
        if shared.valid == held.num_cached:
            for copy in held.copies:
                table = [copy.src if page == copy.dst else page for page in table]
        return table

    # ------------------------------------------------------------------------------- step by step

    def plan(self, scheduler_output: Any) -> Copies:
        """Say what the worker copies in the step that begins."""
        self._step += 1
        self._is_idle = not scheduler_output.total_num_scheduled_tokens
        loads, self._loads = self._loads, []
        self._rejoin()
        leases = self._leases
        if leases is None:  # what was to be loaded is told as not loaded
            return Copies(self._step, None, loads)
        until = [time.monotonic() + 3600.0]
        for name in leases.lost():
            lost = self._requests[name]
            if lost.last_step == self._step:
                until.append(0.0)  # its pages were told to vLLM in this step: they may be another's
            self._leave(lost)
        plan = Copies(self._step, leases.session.pool, loads, group=self._link.group)
        resolve = scheduler_output.kv_connector_block_state.resolve_block_ids
        for name, count in scheduler_output.num_scheduled_tokens.items():
            shared = self._requests.get(name)
            if shared is None or shared.held is None:
                continue
            request, table = shared.request, shared.held.table
            whole = min(request.num_computed_tokens + count, request.num_tokens) // self._size
            whole = min(whole, len(table))
            if whole > shared.saved:
                blocks = resolve(name)[0]
                plan.saves += [(blocks[at], table[at]) for at in range(shared.saved, whole)]
                shared.saved = whole
                shared.due.append((self._step, whole * self._size))
                shared.last_step = self._step
            if shared.last_step == self._step and shared.held.lease is not None:
                until.append(shared.held.lease.deadline)
        plan.until = min(until)
        self.num_loaded += len(plan.loads)
        self.num_saved += len(plan.saves)
        leases.flush()
        return plan

    def copied(self, done: Copied | None) -> None:
        """Commit what the worker has saved."""
        if done is None:
            return
        self._acknowledged = max(self._acknowledged, done.step)
        for name, shared in list(self._requests.items()):
            while shared.due and shared.due[0][0] <= self._acknowledged:
                step, tokens = shared.due.pop(0)
                if step in done.unsaved:
                    self._leave(shared)
                elif self._leases is not None and shared.held is not None:
                    shared.valid = tokens
                    self._leases.settle(name, tokens, shared.request.all_token_ids)
            if shared.is_finished:
                self._end(shared)
        self._give_back()

    def finish(self, name: str) -> None:
        """Note that a request has finished, or was aborted."""
        shared = self._requests.get(name)
        if shared is None:
            return
        shared.is_finished = True
        self._end(shared)
        self._give_back()

    def _end(self, shared: Shared) -> None:
        if shared.due:
            return
        del self._requests[shared.request.request_id]
        self._leave(shared)

    def _leave(self, shared: Shared) -> None:
        """Let a request hold nothing any more; it may go on without."""
        shared.is_unshared, shared.held = True, None
        shared.due.clear()
        if self._leases is None:
            return
        held = self._leases.pop(shared.request.request_id)
        if held is not None:
            self._popped.append((shared.last_step, self._leases, held))

    def _give_back(self) -> None:
        """Give back pages that no step under way copies."""
        still = []
        for step, leases, held in self._popped:
            if step > self._acknowledged:
                still.append((step, leases, held))
            else:
                leases.end(held)
        self._popped = still
        if self._leases is not None:
            self._leases.flush()

    # --------------------------------------------------------------------------------- membership

    def _rejoin(self) -> None:
        leases = self._leases
        if leases is not None and not leases.session.alive:
            log.warning(
                "prefixcache: the service is gone; going on without sharing until it is back"
            )
            for shared in list(self._requests.values()):
                self._leave(shared)
            self._leases, self._popped = None, []
            self._link.look()
        found = self._link.take()
        if found is not None:
            log.warning("prefixcache: the service is back; sharing again")
            self._leases = found

    def reset(self) -> bool:
        """Forget what is stored."""
        if self._leases is not None:
            self._leases.session.reset()
        return True

    def close(self) -> None:
        """End the session."""
        self._link.close()


# ----------------------------------------------------------------------------------------- worker


class WorkerSide:
    """What a worker's process knows: vLLM's pages and the pool's."""

    def __init__(self, vllm_config: Any, kv_cache_config: Any) -> None:
        self._configs = vllm_config, kv_cache_config
        self._client: Client | None = None
        order = str(kv_cache_config.kv_cache_layout)
        if not order.startswith("LB"):
            raise Unsupported(
                f"vLLM's order of KV is {order}, where a layer's page of a block is not in one "
                "piece: set VLLM_KV_CACHE_LAYOUT=LBHNC"
            )
        self._names = [
            name for tensor in kv_cache_config.kv_cache_tensors for name in tensor.layers
        ]
        self._page_bytes = pages.only_spec(kv_cache_config).page_size_bytes
        self._own = torch.empty((0, 0, 0), dtype=torch.uint8)
        """vLLM's pages, as the pool's: layer, block, byte."""
        self._mapped: tuple[PoolHandle | None, str] = None, ""
        self._pool: torch.Tensor | None = None
        self._copied: Copied | None = None
        self._failed: set[int] = set()

    def register(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Take vLLM's tensors as pages of bytes."""
        self._own = pages_of([kv_caches[name] for name in self._names], self._page_bytes)

    def load(self, plan: Copies) -> None:
        """Copy pages in; what came too late is told by `take_failed`."""
        if not plan.loads:
            return
        pool = self._map(plan)
        if pool is not None:
            copy_pages(pool, self._own, plan.loads)
        # Looked at afterwards: what is read of a lease that is over may be another's.
        if pool is None or time.monotonic() > plan.until:
            self._failed.update(block for _, block in plan.loads)

    def save(self, plan: Copies) -> None:
        """Copy pages out, unless the leases may be over."""
        self._copied = Copied(plan.step)
        if not plan.saves:
            return
        pool = self._map(plan)
        if pool is None or time.monotonic() > plan.until:
            self._copied = Copied(plan.step, frozenset([plan.step]))
            return
        copy_pages(self._own, pool, plan.saves)

    def _map(self, plan: Copies) -> torch.Tensor | None:
        if (plan.pool, plan.group) != self._mapped:
            self.close()
            self._mapped = plan.pool, plan.group
            if plan.pool is not None:
                try:
                    # What its engine leased is lent to nobody while this process may write there.
                    self._client, session = join(
                        *self._configs, "worker", in_place=False, group=plan.group
                    )
                    if session.pool == plan.pool:
                        self._pool = map_pages(plan.pool)
                except CacheError as error:
                    log.warning("prefixcache: the pool cannot be mapped: %s", error)
        return self._pool

    def take_failed(self) -> set[int]:
        """Give the blocks that were not loaded, once."""
        failed, self._failed = self._failed, set()
        return failed

    def take_copied(self) -> Copied | None:
        """Give what the last step saved, once."""
        copied, self._copied = self._copied, None
        return copied

    def close(self) -> None:
        """Let go of the pool."""
        self._pool = None
        if self._client is not None:
            self._client.close()
            self._client = None


def pages_of(layers: Sequence[torch.Tensor], page_bytes: int) -> torch.Tensor:
    """Give a view of layers that lie in one piece of memory, block after block in each.

    Returns:
        `[layers, blocks, page_bytes]`, uint8.

    Raises:
        Unsupported: They do not lie at equal distances.
    """
    storage = layers[0].untyped_storage()
    starts = [layer.data_ptr() - storage.data_ptr() for layer in layers]
    step = starts[1] - starts[0] if len(starts) > 1 else 0
    if starts != [starts[0] + step * at for at in range(len(starts))]:
        raise Unsupported(
            "vLLM's layers of KV lie at distances of which this version does not know"
        )
    num_blocks = layers[0].nbytes // page_bytes
    whole = torch.empty(0, dtype=torch.uint8, device=layers[0].device)
    return whole.set_(
        storage, starts[0], (len(layers), num_blocks, page_bytes), (step, page_bytes, 1)
    )


def copy_pages(source: torch.Tensor, target: torch.Tensor, pairs: Pairs) -> None:
    """Copy pages of all layers, each run of neighbours at once: an index would go byte by byte.

    Args:
        source: `[layers, blocks, page_bytes]`.
        target: of the same layers and pages.
        pairs: block of the source, block of the target.
    """
    for first, there, count in runs_of(pairs):
        target[:, there : there + count].copy_(source[:, first : first + count])


def runs_of(pairs: Pairs) -> list[tuple[int, int, int]]:
    """Join pairs of which both are neighbours: the first of each, and how many.

    >>> runs_of([(4, 1), (5, 2), (6, 9)])
    [(4, 1, 2), (6, 9, 1)]
    """
    found: list[tuple[int, int, int]] = []
    for one, other in pairs:
        if found and (one, other) == (found[-1][0] + found[-1][2], found[-1][1] + found[-1][2]):
            found[-1] = (*found[-1][:2], found[-1][2] + 1)
        else:
            found.append((one, other, 1))
    return found
