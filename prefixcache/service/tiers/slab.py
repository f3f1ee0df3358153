"""The slab: memory of the host below a pool, and what stands beside the bytes of each slot.

```
slab    like the pool: [plane][slot][page]          a block and its slot have the same pages
heads   [slot]  seal │ stamp │ sum │ key │ tokens of the block   say what the slot holds
```
Both are files in shared memory, as the pool is: this user's alone, and gone with the service.  They
outlive the porter, who is the only one that maps them.  The sum is over the pages and the tokens; a
head is written after the pages, and what is read is summed where it has arrived.  Key and seal are
for another life, which finds on disk what went on there from here.
"""

from __future__ import annotations

import mmap
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from prefixcache.config import format_size, parse_layout
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.pool import PoolFile, map_pool, pages_of
from prefixcache.types import Layout, PoolHandle

_FORMAT: Final = "prefixcache-heads"


def head_type(block_size: int) -> np.dtype[Any]:
    """Give the form of a slot's head, for blocks of so many tokens."""
    own = [("seal", "<u8"), ("stamp", "<i8"), ("sum", "<u8"), ("key", "<u8", (2,))]
    return np.dtype([*own, ("tokens", "<u4", (block_size,))])


def slot_bytes(handle: PoolHandle) -> int:
    """Give what a slot takes for a block of that pool: its pages and its head."""
    return handle.block_bytes + head_type(handle.block_size).itemsize


class Slab:
    """The service's end of a slab: the files, and the locks that say that their owner lives.

    Args:
        pool: Of which pool blocks go there.
        num_bytes: What it may take.

    Raises:
        PoolExhausted: shared memory has no room for it.
        InvalidRequest: no slab is so large.
    """

    def __init__(self, pool: PoolHandle, num_bytes: int) -> None:
        self.num_slots = num_bytes // slot_bytes(pool)
        size = pool.block_size
        heads = Layout(planes=1, page_bytes=head_type(size).itemsize, format=_FORMAT)
        try:
            self._slab = PoolFile.create(pool.layout, self.num_slots, size)
            try:
                self._heads = PoolFile.create(heads, self.num_slots, size)
            except BaseException:
                self._slab.close()
                raise
        except (InvalidRequest, PoolExhausted) as error:
            raise type(error)(f"--host {format_size(num_bytes)}: {error}") from None

    def order(self) -> dict[str, Any]:
        """Say where everything is, as `SlabMap` wants to be told."""
        return {"slab": describe(self._slab.handle), "heads": describe(self._heads.handle)}

    def close(self) -> None:
        """Remove the files.  Idempotent.  A porter that maps them keeps them until it ends."""
        self._slab.close()
        self._heads.close()


class SlabMap:
    """The porter's end: pool, slab and heads as arrays; of no slots, where there is no slab.

    Args:
        order: What `Slab.order` gives, if there is one, and the pool's handle (`describe`).

    Raises:
        NotFound, EpochMismatch, LayoutMismatch: as `map_pool` says.
    """

    def __init__(self, order: dict[str, Any]) -> None:
        self.handle = read_handle(order["pool"])
        self._maps: list[mmap.mmap] = []
        self.memory, self.pool = self._map(self.handle)
        self.slab = self.pool[:, :0]
        self.heads: npt.NDArray[Any] = np.empty(0, head_type(self.handle.block_size))
        if "slab" in order:
            _, self.slab = self._map(read_handle(order["slab"]))
            _, pages = self._map(read_handle(order["heads"]))
            self.heads = pages[0].view(self.heads.dtype)[:, 0]

    def _map(self, handle: PoolHandle) -> tuple[mmap.mmap, npt.NDArray[np.uint8]]:
        memory = map_pool(handle)
        self._maps.append(memory)
        return memory, pages_of(memory, handle)


def describe(handle: PoolHandle) -> dict[str, Any]:
    """Write a handle as what JSON can hold."""
    return {
        "name": handle.name,
        "num_blocks": handle.num_blocks,
        "block_size": handle.block_size,
        "layout": str(handle.layout),
        "epoch": handle.epoch,
        "offset": handle.offset,
    }


def read_handle(told: dict[str, Any]) -> PoolHandle:
    """Read what `describe` wrote."""
    return PoolHandle(
        "shm",
        told["name"],
        told["num_blocks"],
        told["block_size"],
        parse_layout(told["layout"]),
        told["epoch"],
        told["offset"],
    )
