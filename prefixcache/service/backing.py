"""What the service owns: the pool's file and the cache that says what is in it.

Both need the layout.  Where nobody gave one at the start, the first worker that attaches decides.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from prefixcache.config import ServeSettings, format_size
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, LayoutMismatch
from prefixcache.pool import PoolFile
from prefixcache.service.persistence.directory import StateDirectory
from prefixcache.service.pool.device_owner import DeviceOwner
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.service.pool.zeroing import BlockZeroer
from prefixcache.types import Layout, PoolHandle


@dataclass(frozen=True, slots=True)
class Sizes:
    """How the memory of a pool divides into blocks."""

    layout: Layout
    memory: int
    block_size: int

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, all layers."""
        return self.layout.token_bytes * self.block_size

    @property
    def num_blocks(self) -> int:
        """Blocks that fit."""
        return self.memory // self.block_bytes

    def __str__(self) -> str:
        """Write the arithmetic out.

        >>> print(Sizes(Layout(30, 3, 64, "bfloat16"), 2**31, 16))
        23.0 KB per token (30 layers × 3 kv heads × 64, bfloat16) · 2 GiB = 5,825 blocks of 16 = 93,200 tokens
        """  # noqa: E501 - one line of output
        layout, num_blocks = self.layout, self.num_blocks
        heads = "kv head" if layout.num_kv_heads == 1 else "kv heads"
        layers = "layer" if layout.num_layers == 1 else "layers"
        token = layout.token_bytes
        size = f"{token / 1000:.1f} KB" if token < 10**6 else f"{token / 10**6:.2f} MB"
        times = "\N{MULTIPLICATION SIGN}"
        return (
            f"{size} per token ({layout.num_layers} {layers} {times} {layout.num_kv_heads} {heads} "
            f"{times} {layout.head_dim}, {layout.dtype}) · {format_size(self.memory)} = "
            f"{num_blocks:,} blocks of {self.block_size} = {num_blocks * self.block_size:,} tokens"
        )


class Backing:
    """The pool and the cache, from the moment the layout is known."""

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings
        self.cache: PrefixCache | None = None
        self.handle: PoolHandle | None = None
        self.sizes: Sizes | None = None
        self.state: StateDirectory | None = None
        self.owner: DeviceOwner | None = None
        """The process that has the pool, if that is on a GPU."""
        self._tenants: tuple[str, ...] = ()
        self._file: PoolFile | None = None
        self._zeroer: BlockZeroer | None = None
        if settings.pool == "shm":
            PoolFile.sweep()
        elif settings.pool == "cuda":
            _check_cuda(settings)
        if settings.state is not None:
            self.state = StateDirectory(settings.state)
        if settings.layout is not None:
            self.settle_layout(settings.layout)
        elif settings.model is not None:
            self.settle_layout(read_layout(settings.model, settings.dtype))
        elif self.state is not None and self.state.layout is not None:
            self.settle_layout(self.state.layout)

    def settle_layout(self, layout: Layout) -> PrefixCache:
        """Create pool and cache for `layout`, or check that they were created for it.

        Raises:
            LayoutMismatch: they were created for another; the message names both.
            InvalidRequest: not one block fits into the memory, or the policy is unknown.
            PoolExhausted: shared memory has no room for the pool.
        """
        if self.cache is not None and self.handle is not None:
            if layout != self.handle.layout:
                raise LayoutMismatch(
                    f"the pool holds {self.handle.layout} (layers x kv heads x head size : type), "
                    f"you sent {layout}; one service serves one layout"
                )
            return self.cache
        settings = self.settings
        if not layout.dtype or min(layout.num_layers, layout.num_kv_heads, layout.head_dim) < 1:
            raise InvalidRequest(f"{layout} is not a layout: every number must be at least 1")
        sizes = Sizes(layout, settings.memory, settings.block_size)
        if sizes.num_blocks < 1:
            raise InvalidRequest(
                f"one block of {settings.block_size} tokens takes {format_size(sizes.block_bytes)} "
                f"({layout}); the pool has {format_size(settings.memory)}. Raise --memory or lower "
                "--block-size."
            )
        cache = PrefixCache(
            sizes.num_blocks,
            settings.block_size,
            policy=settings.policy,
            partial=settings.partial,
            num_ghosts=settings.ghosts,
            ttl_s=settings.ttl,
            max_pinned=int(sizes.num_blocks * settings.pin_cap),
            max_line=settings.max_line,
            max_leases=settings.max_leases,
            max_namespaces=settings.max_namespaces,
            history_bytes=settings.history,
        )
        cache.set_tenants(self._tenants)
        if settings.pool == "shm":
            self._file = self._make_pool(sizes)
            self.handle = self._file.handle
        elif settings.pool == "cuda":
            self.owner = DeviceOwner.start(
                layout, sizes.num_blocks, settings.block_size, device=settings.device
            )
            self.handle = self.owner.handle
        else:
            self.handle = PoolHandle(
                "none", "", sizes.num_blocks, settings.block_size, layout, 0, 0
            )
        if self.state is not None:
            self.state.restore(cache, settings.partial)
        if self.handle.kind == "shm":
            self._zeroer = BlockZeroer(self.handle)
            cache.wipe_with(self._zeroer)
        self.cache, self.sizes = cache, sizes
        return cache

    @property
    def medium(self) -> str:
        """Where the pool's bytes are, as routers know it."""
        return "GPU" if self.handle is not None and self.handle.kind == "cuda-ipc" else "CPU"

    def set_tenants(self, tenants: Collection[str]) -> None:
        """Say for whom a part of each limit of the cache is kept, once there is one."""
        self._tenants = tuple(tenants)
        if self.cache is not None:
            self.cache.set_tenants(self._tenants)

    def _make_pool(self, sizes: Sizes) -> PoolFile:
        file = None
        if self.state is not None:
            file = self.state.open_pool(sizes.layout, sizes.num_blocks, sizes.block_size)
        if file is None:
            file = PoolFile.create(sizes.layout, sizes.num_blocks, sizes.block_size)
        return file

    def close(self) -> None:
        """Unlink the pool's file, unless it is kept; end a GPU pool's owner.  Idempotent."""
        if self.owner is not None:
            self.owner.close()
        if self._zeroer is not None:
            self._zeroer.close()
        if self.state is not None:
            self.state.close()
        if self._file is not None:
            self._file.close()
            self._file = None


def _check_cuda(settings: ServeSettings) -> None:
    """Refuse what a pool on a GPU cannot be combined with.

    Raises:
        InvalidRequest: As said.
    """
    if settings.layout is None and settings.model is None:
        raise InvalidRequest(
            "--pool cuda needs --model or --layout: a GPU's memory is taken at the start, not when "
            "the first worker attaches"
        )
    if settings.state is not None:
        raise InvalidRequest("--state keeps pools in shared memory; --pool cuda has none there")
    if settings.identities is not None:
        raise InvalidRequest(
            "--identities needs a pool in shared memory: blocks on a GPU are not wiped when they "
            "change tenant. Serve each tenant with a service of its own."
        )
