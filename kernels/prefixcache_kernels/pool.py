"""The pool as tensors: every worker sees the same memory, without a copy.

```
blocks        [num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]   keys, then values
keys(layer)                  [num_blocks, block_size, num_kv_heads, head_dim]   contiguous
```

Layer-first: a step of the model reads one layer after the other, and within a layer the tokens of a
block lie side by side.  A run of neighbouring blocks is then one contiguous piece of memory, which
attention can read in place.
"""

from __future__ import annotations

import mmap
from typing import Final

import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, PoolExhausted, Unsupported
from prefixcache.pool import epoch_of, map_pool
from prefixcache.types import Layout, PoolHandle, shown, shown_number
from prefixcache_kernels.imported import DeviceMemory, open_device
from prefixcache_kernels.one_process import OfOneProcess

TORCH_DTYPES: Final = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    "float8_e4m3fn": torch.float8_e4m3fn,
}
"""The torch type of each element type that a pool can hold."""


class SharedPool(OfOneProcess):
    """All blocks of a pool as one tensor, and each layer's keys and values as views of it.

    A context manager; make one with `map` or `private`.
    """

    def __init__(
        self, handle: PoolHandle, blocks: Tensor, memory: mmap.mmap | DeviceMemory | None = None
    ) -> None:
        super().__init__()
        self.handle = handle
        self._memory = memory
        self._blocks = blocks
        # Made once: a view costs microseconds, and a step asks for two in each layer.
        self._keys: list[Tensor] = [layer[0] for layer in blocks]
        self._values: list[Tensor] = [layer[1] for layer in blocks]

    @classmethod
    def map(cls, handle: PoolHandle, device: str | torch.device | None = None) -> SharedPool:
        """Map the pool that `handle` names.  Zero copy; O(1).

        Args:
            handle: Of a pool in shared memory, or on a GPU.
            device: What the caller expects, "cpu" or "cuda"; None takes the pool where it is.

        Raises:
            Unsupported: The pool is elsewhere, or this process cannot reach it; the message says
                what is missing.  Or its pages are in another's format: `map_pages` takes those.
            NotFound, EpochMismatch, LayoutMismatch: As `prefixcache.pool.map_pool`.
            InvalidRequest: It is no handle of a pool, or no device.
        """
        check_handle(handle)
        if not handle.layout.is_ours:
            raise Unsupported(
                f"the pool holds {handle.layout}: its pages are not in the order that these "
                "kernels read; prefixcache_kernels.map_pages gives them as bytes"
            )
        on_gpu = handle.kind == "cuda-ipc"
        if device is not None and (_kind_of(device) == "cuda") != on_gpu:
            raise Unsupported(
                f"the pool is {'on a GPU' if on_gpu else 'in shared memory'}, not on {device!s}; "
                f"the service decides: prefixcache serve --pool {'shm' if on_gpu else 'cuda'}"
            )
        memory: mmap.mmap | DeviceMemory
        if on_gpu:
            memory = open_device(handle)
            flat = memory.view()[handle.offset :].view(TORCH_DTYPES[handle.layout.dtype])
            return cls(handle, flat.view(_shape(handle)), memory)
        memory = map_pool(handle)
        dtype = TORCH_DTYPES[handle.layout.dtype]
        count = handle.num_bytes // dtype.itemsize
        flat = torch.frombuffer(memory, dtype=dtype, count=count, offset=handle.offset)
        return cls(handle, flat.view(_shape(handle)), memory)

    @classmethod
    def private(cls, layout: Layout, num_blocks: int, block_size: int) -> SharedPool:
        """Make a pool of this process alone, for a worker without a service.  Blocks are zero.

        Raises:
            InvalidRequest: A size below 1, or an element type that no pool holds.
            PoolExhausted: This process has no memory for it.
        """
        if not isinstance(layout, Layout):
            raise InvalidRequest(f"layout is a {type(layout).__name__}, not a Layout")
        if not layout.is_ours or layout.dtype not in TORCH_DTYPES:
            raise InvalidRequest(
                f"dtype {layout.dtype!r} of {layout} is none of {', '.join(TORCH_DTYPES)}"
            )
        sizes = (num_blocks, block_size, layout.num_layers, layout.num_kv_heads, layout.head_dim)
        if not all(type(size) is int and size >= 1 for size in sizes):
            raise InvalidRequest(
                f"no pool has {shown(num_blocks)} blocks of {shown(block_size)} tokens of "
                f"{layout}: sizes are integers, at least 1"
            )
        handle = PoolHandle("none", "", num_blocks, block_size, layout, 0, 0)
        try:
            blocks = torch.zeros(_shape(handle), dtype=TORCH_DTYPES[layout.dtype])
        except (RuntimeError, TypeError, OverflowError):  # of sizes that no memory has
            raise PoolExhausted(
                f"this process has no memory for {shown_number(num_blocks)} blocks of "
                f"{shown_number(block_size)} tokens of {layout}"
            ) from None
        return cls(handle, blocks)

    @property
    def layout(self) -> Layout:
        """Shape of one token's keys and values."""
        return self.handle.layout

    @property
    def num_blocks(self) -> int:
        """Blocks of the pool."""
        return self.handle.num_blocks

    @property
    def block_size(self) -> int:
        """Tokens of a block."""
        return self.handle.block_size

    @property
    def blocks(self) -> Tensor:
        """`[num_layers, 2, num_blocks, block_size, num_kv_heads, head_dim]`; empty once closed.

        Raises:
            InvalidRequest: This process has the pool through a fork.
        """
        self.check_process()
        return self._blocks

    def check_process(self) -> None:
        """Refuse a forked child what only its parent has mapped.

        A private pool is copied by a fork as all memory is: the child has one of its own.
        """
        if self._memory is not None:
            super().check_process()

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, `[num_blocks, block_size, num_kv_heads, head_dim]`.  A view; O(1).

        Raises:
            InvalidRequest: There is no such layer, the pool is closed, or this process has it
                through a fork.
        """
        return self._keys[self._known(layer)]

    def values(self, layer: int) -> Tensor:
        """Values of a layer, shaped like its keys.  A view; O(1).

        Raises:
            InvalidRequest: As `keys`.
        """
        return self._values[self._known(layer)]

    def _known(self, layer: int) -> int:
        self.check_process()
        if type(layer) is int and 0 <= layer < len(self._keys):
            return layer
        if not self._keys:
            raise InvalidRequest("the pool is closed: its memory was let go of")
        raise InvalidRequest(f"layer {shown(layer)} is none of 0 to {len(self._keys) - 1}")

    @property
    def current(self) -> bool:
        """Whether nobody has taken the pool over under another epoch.  Reads one word.

        Only a service that keeps its state is followed by one that does.  Whoever goes on in the
        pool of a lost service asks this *after* each use: what was read before may be anything.

        Raises:
            InvalidRequest: This process has the pool through a fork.
        """
        self.check_process()
        if isinstance(self._memory, DeviceMemory):
            return self._memory.epoch() == self.handle.epoch
        return self._memory is None or epoch_of(self._memory) == self.handle.epoch

    def close(self) -> None:
        """Let go of the memory.  Idempotent.

        It is unmapped at once if no other tensor looks into it, and with the last such tensor if
        one does: a view never dangles.
        """
        # Never `mmap.close()`: torch keeps a reference to the mapping but no buffer export, so that
        # closing would pull the memory from under the caller's tensors.  The last reference unmaps.
        self._keys, self._values = [], []
        self._memory = None
        self._blocks = self._blocks.new_empty(0)


def map_pages(handle: PoolHandle) -> Tensor:
    """Map any pool, in whatever format, as bytes.  Zero copy; O(1).

    `pages[:, block]` is all of a block.  A copy-on-write of pages whose inside nobody knows is
    `pages[:, dst] = pages[:, src]`, for all copies of a step at once.

    Returns:
        `[planes, num_blocks, page_bytes]`, uint8, where the pool is; its memory is mapped for as
        long as any view of it lives.

    Raises:
        Unsupported, NotFound, EpochMismatch, LayoutMismatch, InvalidRequest: As `SharedPool.map`.
    """
    check_handle(handle)
    shape = (handle.planes, handle.num_blocks, handle.page_bytes)
    if handle.kind == "cuda-ipc":
        return open_device(handle).view()[handle.offset :].view(shape)
    memory = map_pool(handle)
    flat = torch.frombuffer(memory, dtype=torch.uint8, count=handle.num_bytes, offset=handle.offset)
    return flat.view(shape)


def check_handle(handle: object) -> None:
    """Refuse what is no handle of a pool.

    Raises:
        InvalidRequest: It is none.
    """
    if not isinstance(handle, PoolHandle):
        raise InvalidRequest(f"{shown(handle)} is no handle of a pool: session.pool gives one")


def _kind_of(device: str | torch.device) -> str:
    """Give the kind of a device by whatever name.

    Raises:
        InvalidRequest: There is none of that name.
    """
    try:
        return torch.device(device).type
    except (RuntimeError, TypeError, ValueError, OverflowError):
        raise InvalidRequest(f"device is {shown(device)}, which is none") from None


def _shape(handle: PoolHandle) -> tuple[int, ...]:
    layout = handle.layout
    return (
        layout.num_layers,
        2,
        handle.num_blocks,
        handle.block_size,
        layout.num_kv_heads,
        layout.head_dim,
    )
