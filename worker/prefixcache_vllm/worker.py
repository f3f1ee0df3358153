"""vLLM's worker with its KV cache in the pool.

    --worker-cls prefixcache_vllm.worker.CPUWorker

vLLM allocates one buffer for the KV of all layers and makes views of it.  While it does so for the
model (and not when it profiles, with caches of its own), the buffer is the pool's: mapped memory on
a CPU, imported memory on a GPU.  It is not cleared: others read it.

On a CPU another pool can be put in its place later, below vLLM's views: see `moving`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from types import SimpleNamespace
from typing import Any, Final

import torch
from vllm.v1.kv_cache_interface import create_kv_cache_views
from vllm.v1.worker.cpu_worker import CPUWorker as VllmCPUWorker
from vllm.v1.worker.gpu_worker import Worker as VllmGPUWorker

from prefixcache.client import Client, Session
from prefixcache.errors import CacheError, LayoutMismatch, ServiceUnavailable, Unsupported
from prefixcache.movable_pool import MovablePool
from prefixcache.types import PoolHandle
from prefixcache_kernels import map_pages
from prefixcache_vllm import pages
from prefixcache_vllm.joining import attach, join
from prefixcache_vllm.moving import Move, asked_of, with_answer

ALLOCATING: Final = ("vllm.v1.worker.gpu_model_runner", "vllm.v1.worker.gpu.attn_utils")
"""Modules that call `allocate_kv_cache` by that name: of the first and of the second runner."""


@contextmanager
def allocation_by(allocate: Callable[..., dict[str, torch.Tensor]]) -> Iterator[None]:
    """Have vLLM's runners call this where they allocate the KV cache."""
    with ExitStack() as stack:
        for name in ALLOCATING:
            module: Any = import_module(name)
            if not hasattr(module, "allocate_kv_cache"):
                continue
            stack.callback(setattr, module, "allocate_kv_cache", module.allocate_kv_cache)
            module.allocate_kv_cache = allocate
        yield


def views_of_pool(
    handle: PoolHandle, memory: torch.Tensor, kv_cache_config: Any, layout: Any, size: int | None
) -> Any:
    """Give each layer's view of the pool, by the layer's name.

    Raises:
        LayoutMismatch: vLLM's blocks are not the pool's, one for one.
    """
    (whole,) = kv_cache_config.kv_cache_tensors
    if (whole.size, kv_cache_config.num_blocks) != (handle.num_bytes, handle.num_blocks):
        raise LayoutMismatch(
            f"vLLM wants {kv_cache_config.num_blocks:,} blocks in {whole.size:,} bytes, the pool "
            f"has {handle.num_blocks:,} in {handle.num_bytes:,}: leave --num-gpu-blocks-override "
            "and --kv-cache-memory-bytes out, the pool decides"
        )
    views = create_kv_cache_views(
        memory,
        pages.only_spec(kv_cache_config),
        kv_cache_config.num_blocks,
        layout,
        whole,
        kernel_block_size=size,
    )
    return dict(zip(whole.layers, views, strict=True))


class PoolMemory:
    """Mixed into a worker of vLLM's: its blocks are the pool's, in number and in place."""

    vllm_config: Any
    _client: Client
    _session: Session
    _pool: MovablePool | None = None
    """Where its memory can be exchanged."""

    def bytes_of_pool(self) -> int:
        """Attach; give the bytes that make vLLM count as many blocks as the pool has."""
        specs = self.get_kv_cache_spec()  # type: ignore[attr-defined]
        # What vLLM will settle on, as far as it is settled now: all layers are of one kind, or the
        # engine's core refuses them.
        kinds = {type(spec).__name__: spec for spec in specs.values()}
        foreseen = SimpleNamespace(
            kv_cache_groups=[
                SimpleNamespace(kv_cache_spec=spec, layer_names=list(specs))
                for spec in kinds.values()
            ],
            kv_cache_layout=self.vllm_config.cache_config.kv_cache_layout,
        )
        self._configs = self.vllm_config, foreseen, "worker"
        self._client, self._session = join(*self._configs, in_place=True)
        return self._session.pool.num_bytes

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Map the pool, and make vLLM's views of it."""
        layout = pages.layout_of(self.vllm_config, kv_cache_config)
        if layout != self._session.pool.layout:
            raise LayoutMismatch(
                f"vLLM's KV lies as {layout}, not as it looked at first: "
                f"{self._session.pool.layout}"
            )

        def allocate(
            config: Any, device: Any, layout: Any, kernel_block_sizes: list[int] | None = None
        ) -> dict[str, torch.Tensor]:
            del device
            size = kernel_block_sizes[0] if kernel_block_sizes else None
            made: dict[str, torch.Tensor] = views_of_pool(
                self._session.pool, self._map(), config, layout, size
            )
            return made

        with allocation_by(allocate):
            super().initialize_from_config(kv_cache_config)  # type: ignore[misc]

    def _map(self) -> torch.Tensor:
        """Give all of the pool, as bytes."""
        handle = self._session.pool
        if handle.kind != "shm":
            return map_pages(handle).view(-1).view(torch.int8)
        self._pool = MovablePool(handle)
        return torch.frombuffer(
            self._pool.memory, dtype=torch.int8, count=handle.num_bytes, offset=handle.offset
        )

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """Compute a step, or move to another pool in one that has no tokens."""
        asked = asked_of(scheduler_output)
        if asked is None:
            return super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        why = ""
        try:
            self._move(asked)
        except (CacheError, OSError) as error:
            why = str(error)
        output = super().execute_model(scheduler_output, *args, **kwargs)  # type: ignore[misc]
        return with_answer(output, why)

    def _move(self, asked: Move) -> None:
        """Compute in another pool from now on, or in the same one by other leases.

        First this process says that it writes there: what its engine leases is lent to nobody else
        while it may do so.  Then, that it writes to nothing any more that was leased before.

        Raises:
            CacheError: that is not possible; nothing has changed.
        """
        session = attach(self._client, *self._configs, in_place=True, group=asked.group)
        try:
            if session.pool != asked.pool:
                raise ServiceUnavailable("another service has come meanwhile")
            if self._pool is not None:
                self._pool.move(asked.pool)
            elif asked.pool != self._session.pool:
                raise Unsupported("the memory of a GPU cannot be exchanged")
        except BaseException:
            session.close()
            raise
        former, self._session = self._session, session
        former.close()

    def shutdown(self) -> None:
        """Leave; the memory stays mapped until the process ends."""
        if hasattr(self, "_client"):
            self._client.close()
        super().shutdown()  # type: ignore[misc]


class CPUWorker(PoolMemory, VllmCPUWorker):
    """vLLM's worker for CPUs, on a pool in shared memory."""

    def __init__(self, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # A size that is said is not asked of the memory that is free: the pool has its own already.
        if vllm_config.cache_config.kv_cache_memory_bytes is None:
            vllm_config.cache_config.kv_cache_memory_bytes = 1
        super().__init__(vllm_config, *args, **kwargs)

    def determine_available_memory(self) -> int:
        """Give the pool's bytes: they are there, so whether they would fit is no question."""
        if self._should_warm_up_model():
            self.model_runner.warming_up_model()
        return self.bytes_of_pool()


class GPUWorker(PoolMemory, VllmGPUWorker):
    """vLLM's worker for GPUs, on a pool in the memory of its GPU.  Not tested on a device yet."""

    def determine_available_memory(self) -> int:
        """Have vLLM profile itself, and give the pool's bytes."""
        super().determine_available_memory()
        return self.bytes_of_pool()
