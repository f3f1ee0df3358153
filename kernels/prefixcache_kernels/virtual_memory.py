"""A GPU's blocks side by side: physical memory of its own for each, mapped into one range.

```
owner     create, one handle a page ── export ─► descriptors (files) ──┐
                                                                       │ a socket carries them
worker    reserve addresses │ 0 │ 1 │ 2 │ …     ◄── map ── import ─────┘
                              └── handles of blocks 7, 2, 3
```

CUDA maps whole handles, each a multiple of 2 MiB (`granularity`).  So a page, which is a block in
one plane, is one handle, and has to be such a multiple:

| layout | bytes of a token in a plane | tokens of a block that fits |
|---|---|---|
| ours, 8 heads of 128 at 16 bit: keys or values of a layer | 2 KiB | 1,024 |
| ours, 3 heads of 64 at 16 bit | 384 B | none up to 1,024 |
| one plane, 32 layers of the first: all of a block | 128 KiB | 16 |

**Untested on a device**: none was at hand.  The calls and their order are tested on memory of a
host that stands in for a device's (`tests/kernels/test_virtual_memory.py`), and the names and types
of the calls against `cuda-bindings`.  The service's pools on a GPU are one allocation each
(`prefixcache.device`), which cannot be mapped in pieces: a pool for views is created here.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final, Protocol

import torch
from torch import Tensor

from prefixcache.errors import CacheError, InvalidRequest, PoolExhausted, Unsupported
from prefixcache.texts import many
from prefixcache.types import PoolHandle
from prefixcache_kernels.contiguous import Blocks, ContiguousViews, check_pages
from prefixcache_kernels.one_process import OfOneProcess

_OUT_OF_MEMORY: Final = "CUDA_ERROR_OUT_OF_MEMORY"


class VirtualMemory(Protocol):
    """A device's physical memory and its addresses, apart from each other."""

    @property
    def granularity(self) -> int:
        """Bytes of which all sizes are multiples."""

    def create(self, num_bytes: int) -> int:
        """Take physical memory, zeroed; give its handle.  Raises PoolExhausted."""
        ...

    def export(self, handle: int) -> int:
        """Give a descriptor by which another process has the same memory; the caller closes it."""
        ...

    def import_(self, fd: int) -> int:
        """Give a handle of what another process exported; the descriptor stays the caller's."""
        ...

    def release(self, handle: int) -> None:
        """Let go of a handle.  Its memory stays while it is mapped, or another process has it."""
        ...

    def reserve(self, num_bytes: int) -> int:
        """Take addresses.  Raises PoolExhausted."""
        ...

    def free(self, address: int, num_bytes: int) -> None:
        """Give addresses back, on which nothing is mapped."""
        ...

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Put all of a handle's memory there; nobody may touch it yet."""
        ...

    def allow_reading(self, address: int, num_bytes: int) -> None:
        """Let kernels read what is mapped there."""
        ...

    def unmap(self, address: int, num_bytes: int) -> None:
        """Undo one `map`."""
        ...

    def synchronize(self) -> None:
        """Wait until the device has done all that was queued."""
        ...

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        """Look at addresses as bytes; `owner` lives as long as that or any view of it."""
        ...


class CudaVirtualMemory:
    """One GPU's, through `cuda-bindings`.

    Args:
        ordinal: The GPU's number among those that this process sees.

    Raises:
        Unsupported: No bindings, no driver, no such GPU, or one that cannot export descriptors.
    """

    def __init__(self, ordinal: int = 0) -> None:
        try:
            from cuda.bindings import driver
        except ImportError as error:
            raise Unsupported(
                f"views of a pool on a GPU need cuda-bindings: pip install cuda-bindings ({error})"
            ) from None
        self._cuda = driver
        self.ordinal = ordinal
        try:
            self._call("cuInit", 0)
            device = self._call("cuDeviceGet", ordinal)
            context = self._call("cuDevicePrimaryCtxRetain", device)
            self._call("cuCtxSetCurrent", context)
        except CacheError:
            raise
        except Exception as error:  # noqa: BLE001 - without a driver the bindings raise their own kind
            raise Unsupported(f"views of a pool on a GPU need NVIDIA's driver: {error}") from None
        place = driver.CUmemLocation()
        place.type = driver.CUmemLocationType.CU_MEM_LOCATION_TYPE_DEVICE
        place.id = ordinal
        self._kind = driver.CUmemAllocationHandleType.CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
        self._wanted = driver.CUmemAllocationProp()
        self._wanted.type = driver.CUmemAllocationType.CU_MEM_ALLOCATION_TYPE_PINNED
        self._wanted.location = place
        self._wanted.requestedHandleTypes = self._kind
        self._readers = driver.CUmemAccessDesc()
        self._readers.location = place
        self._readers.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READ
        self._writers = driver.CUmemAccessDesc()
        self._writers.location = place
        self._writers.flags = driver.CUmemAccess_flags.CU_MEM_ACCESS_FLAGS_PROT_READWRITE
        least = driver.CUmemAllocationGranularity_flags.CU_MEM_ALLOC_GRANULARITY_MINIMUM
        self._granularity = int(self._call("cuMemGetAllocationGranularity", self._wanted, least))

    @property
    def granularity(self) -> int:
        """What the driver says: 2 MiB on all GPUs so far."""
        return self._granularity

    def create(self, num_bytes: int) -> int:
        """Take memory of the GPU that can be exported, and zero it."""
        handle = int(self._call("cuMemCreate", num_bytes, self._wanted, 0))
        address = self.reserve(num_bytes)
        self.map(address, num_bytes, handle)
        self._call("cuMemSetAccess", address, num_bytes, [self._writers], 1)
        self._call("cuMemsetD8", address, 0, num_bytes)
        self.synchronize()
        self.unmap(address, num_bytes)
        self.free(address, num_bytes)
        return handle

    def export(self, handle: int) -> int:
        """Export as a file descriptor."""
        return int(self._call("cuMemExportToShareableHandle", handle, self._kind, 0))

    def import_(self, fd: int) -> int:
        """Import from a file descriptor."""
        return int(self._call("cuMemImportFromShareableHandle", fd, self._kind))

    def release(self, handle: int) -> None:
        """Let go of a handle."""
        self._call("cuMemRelease", handle)

    def reserve(self, num_bytes: int) -> int:
        """Take addresses anywhere."""
        return int(self._call("cuMemAddressReserve", num_bytes, 0, 0, 0))

    def free(self, address: int, num_bytes: int) -> None:
        """Give addresses back."""
        self._call("cuMemAddressFree", address, num_bytes)

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        """Map a handle from its beginning: the driver takes no other offset."""
        self._call("cuMemMap", address, num_bytes, 0, handle, 0)

    def allow_reading(self, address: int, num_bytes: int) -> None:
        """Let this GPU read there."""
        self._call("cuMemSetAccess", address, num_bytes, [self._readers], 1)

    def unmap(self, address: int, num_bytes: int) -> None:
        """Unmap what one `map` mapped: the driver takes no part of it."""
        self._call("cuMemUnmap", address, num_bytes)

    def synchronize(self) -> None:
        """Wait for the GPU."""
        self._call("cuCtxSynchronize")

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        """Hand addresses to torch, as any library does."""
        return torch.as_tensor(
            _Bytes(address, num_bytes, owner), device=torch.device("cuda", self.ordinal)
        )

    def _call(self, function: str, *arguments: Any) -> Any:
        status, *found = getattr(self._cuda, function)(*arguments)
        if status != self._cuda.CUresult.CUDA_SUCCESS:
            name = str(getattr(status, "name", status))
            kind = PoolExhausted if name == _OUT_OF_MEMORY else Unsupported
            raise kind(f"{function} says {name}")
        return found[0] if found else None


class _Bytes:
    """Addresses on a GPU, as other libraries ask for them (version 3 of the interface)."""

    def __init__(self, address: int, num_bytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (address, True),
            "strides": None,
            "version": 3,
        }


class DeviceBlocks(OfOneProcess):
    """The physical memory of a pool's blocks on a device: a handle for each page.

    A context manager; make one with `create` or `of_descriptors`.

    Attributes:
        handles: of each block, one for each plane.
    """

    def __init__(self, memory: VirtualMemory, handle: PoolHandle, handles: list[list[int]]) -> None:
        super().__init__()
        self.memory, self.handle, self.handles = memory, handle, handles
        self._let_go = weakref.finalize(self, _release, memory, handles, os.getpid())
        self._let_go.atexit = False

    @classmethod
    def create(cls, memory: VirtualMemory, handle: PoolHandle) -> DeviceBlocks:
        """Take memory for all blocks of a pool, zeroed.  O(blocks * planes) calls.

        Raises:
            Unsupported: A page is no multiple of what the device maps as a whole.
            PoolExhausted: There is not enough; nothing is taken.
        """
        check_pages(_headless(handle), memory.granularity, "this device's memory is mapped in")
        handles: list[list[int]] = []
        try:
            for _ in range(handle.num_blocks):
                handles.append([])
                for _ in range(handle.planes):
                    handles[-1].append(memory.create(handle.page_bytes))
        except BaseException:
            _release(memory, handles, os.getpid())
            raise
        return cls(memory, handle, handles)

    @classmethod
    def of_descriptors(
        cls, memory: VirtualMemory, handle: PoolHandle, descriptors: Sequence[Sequence[int]]
    ) -> DeviceBlocks:
        """Take over what another process exported, block by block; the descriptors are closed.

        Raises:
            Unsupported: As `create`, or the device cannot take one of them.
            InvalidRequest: They are not one for each plane of each block.
        """
        handles: list[list[int]] = []
        try:
            check_pages(_headless(handle), memory.granularity, "this device's memory is mapped in")
            if len(descriptors) != handle.num_blocks or any(
                len(of_block) != handle.planes for of_block in descriptors
            ):
                raise InvalidRequest(
                    f"a pool of {many(handle.num_blocks, 'block')} in "
                    f"{many(handle.planes, 'plane')} has a descriptor for each page; "
                    f"{sum(map(len, descriptors))} came"
                )
            for of_block in descriptors:
                handles.append([])
                for fd in of_block:
                    handles[-1].append(memory.import_(fd))
        except BaseException:
            _release(memory, handles, os.getpid())
            raise
        finally:
            for of_block in descriptors:
                for fd in of_block:
                    os.close(fd)
        return cls(memory, handle, handles)

    def export(self, block: int) -> list[int]:
        """Give descriptors of a block's pages, to be sent by `socket.send_fds`; the caller's.

        Raises:
            InvalidRequest: There is no such block.
            Unsupported: The device does not export them.
        """
        if not 0 <= block < len(self.handles):
            raise InvalidRequest(f"block {block} is none of 0 to {len(self.handles) - 1}")
        exported: list[int] = []
        try:
            # One by one: what was exported before one that fails is in the list.
            exported.extend(map(self.memory.export, self.handles[block]))
        except BaseException:
            for fd in exported:
                os.close(fd)
            raise
        return exported

    def views(self) -> ContiguousViews:
        """Give what makes views of sequences in these blocks; they stay until it is closed."""
        return ContiguousViews(
            self.handle,
            lambda capacity: DevicePlace(self, capacity),
            lambda: True,  # an allocation is of one life
            lambda: None,
        )

    def close(self) -> None:
        """Let go of the handles.  Idempotent.  What is mapped stays until it is unmapped."""
        self._let_go()


class DevicePlace:
    """Addresses of a device, onto which blocks are mapped for reading; see `contiguous.Place`.

    What unmaps waits for the device first: kernels that were queued may still read.

    Raises:
        PoolExhausted: There are no addresses.
    """

    def __init__(self, blocks: DeviceBlocks, capacity: int) -> None:
        self._blocks, self._memory = blocks, blocks.memory
        self.capacity, self.planes = capacity, blocks.handle.planes
        self._page = blocks.handle.page_bytes
        size = self.planes * capacity * self._page
        self._range = _Range(self._memory, size, self._page)
        self._at: dict[int, int] = {}
        """Handles that are mapped, by their address."""

    def put(self, at: int, blocks: Blocks) -> None:
        """Map each block's page in each plane, and let kernels read them."""
        try:
            for plane in range(self.planes):
                begin = self._address(plane, at)
                for position, block in enumerate(blocks.tolist()):
                    self._map(begin + position * self._page, self._blocks.handles[block][plane])
                self._memory.allow_reading(begin, blocks.size * self._page)
        except CacheError:
            self.clear(at, self.capacity - at)
            raise

    def clear(self, at: int, count: int) -> None:
        """Unmap positions, when the device has done what was queued."""
        self._memory.synchronize()
        for plane in range(self.planes):
            begin = self._address(plane, at)
            for address in range(begin, begin + count * self._page, self._page):
                if self._at.pop(address, None) is not None:
                    self._memory.unmap(address, self._page)

    def blank(self) -> None:
        """Map one page of zeros at every position."""
        self.clear(0, self.capacity)
        zeros = self._memory.create(self._page)
        try:
            for plane in range(self.planes):
                for position in range(self.capacity):
                    self._map(self._address(plane, position), zeros)
            self._memory.allow_reading(self._range.address, self._range.num_bytes)
        finally:
            self._memory.release(zeros)
        # They go with the addresses, when the last tensor that looks there has gone.
        self._range.mapped.extend(self._at)
        self._at = {}

    def count(self, blocks: Blocks) -> int:
        """None of the host's kernel: the device's driver has no limit on them."""
        return 0

    def pages(self) -> Tensor:
        """All of its addresses as bytes."""
        flat = self._memory.tensor(self._range.address, self._range.num_bytes, self._range)
        return flat.view(self.planes, self.capacity, self._page)

    def check(self, blocks: Blocks) -> None:
        """Compare what was mapped with what should be."""
        want = {
            self._address(plane, position): self._blocks.handles[block][plane]
            for plane in range(self.planes)
            for position, block in enumerate(blocks.tolist())
        }
        assert self._at == want, f"{self._at} is mapped, not {want}"

    def _address(self, plane: int, position: int) -> int:
        return self._range.address + (plane * self.capacity + position) * self._page

    def _map(self, address: int, handle: int) -> None:
        self._memory.map(address, self._page, handle)
        self._at[address] = handle


class _Range:
    """Addresses that stay taken while anybody looks at them.

    Attributes:
        mapped: where pages are mapped that are unmapped with them.
    """

    def __init__(self, memory: VirtualMemory, num_bytes: int, page: int) -> None:
        self.num_bytes = num_bytes
        self.address = memory.reserve(num_bytes)
        self.mapped: list[int] = []
        given = (memory, self.address, num_bytes, page, self.mapped, os.getpid())
        # At the end of the process the driver takes all back, and may be gone before Python is.
        weakref.finalize(self, _give_back, *given).atexit = False


def _give_back(
    memory: VirtualMemory, address: int, num_bytes: int, page: int, mapped: list[int], pid: int
) -> None:
    if os.getpid() != pid:  # a forked child has neither the memory nor a driver that works
        return
    if mapped:
        memory.synchronize()
    for at in mapped:
        memory.unmap(at, page)
    memory.free(address, num_bytes)


def _release(memory: VirtualMemory, handles: list[list[int]], pid: int) -> None:
    if os.getpid() == pid:
        for of_block in handles:
            for handle in of_block:
                memory.release(handle)


def _headless(handle: PoolHandle) -> PoolHandle:
    """Such a pool has no header: every page is memory of its own."""
    return replace(handle, offset=0)
