"""Virtual memory of this host in the place of a device's: files for handles, and real mappings.

Strict where CUDA is: sizes are multiples of the granularity, whole handles are mapped, only what is
reserved and empty, only whole mappings are unmapped, nothing is read before it is allowed, and what
is given back is empty.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Any

import torch
from torch import Tensor

from prefixcache.errors import PoolExhausted

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
_EMPTY = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000


class HostVirtualMemory:
    """Stands in for `CudaVirtualMemory`.

    Args:
        granularity: bytes of which sizes are multiples.
        limit: bytes that there are.
    """

    def __init__(self, granularity: int = 8192, limit: int = 1 << 30) -> None:
        self.granularity, self.left = granularity, limit
        self.handles: dict[int, int] = {}
        """Sizes of those that are not released, by handle: a descriptor."""
        self.reserved: dict[int, int] = {}
        self.mapped: dict[int, int] = {}
        self.readable: set[int] = set()
        self.calls: list[str] = []
        self.fail_after: int | None = None

    def _did(self, call: str) -> None:
        self.calls.append(call)
        if self.fail_after is not None:
            self.fail_after -= 1
            if self.fail_after < 0 and call in ("create", "map", "import", "reserve"):
                raise PoolExhausted(f"{call} says CUDA_ERROR_OUT_OF_MEMORY")

    def _check(self, num_bytes: int) -> None:
        assert num_bytes > 0
        assert num_bytes % self.granularity == 0, f"{num_bytes} are no multiple"

    def create(self, num_bytes: int) -> int:
        self._check(num_bytes)
        self._did("create")
        if num_bytes > self.left:
            raise PoolExhausted("cuMemCreate says CUDA_ERROR_OUT_OF_MEMORY")
        self.left -= num_bytes
        fd = os.memfd_create("device")
        os.ftruncate(fd, num_bytes)
        self.handles[fd] = num_bytes
        return fd

    def export(self, handle: int) -> int:
        assert handle in self.handles
        self._did("export")
        return os.dup(handle)

    def import_(self, fd: int) -> int:
        self._did("import")
        handle = os.dup(fd)
        self.handles[handle] = os.fstat(fd).st_size
        return handle

    def release(self, handle: int) -> None:
        self._did("release")
        self.left += self.handles.pop(handle)
        os.close(handle)

    def reserve(self, num_bytes: int) -> int:
        self._check(num_bytes)
        self._did("reserve")
        address: int = _libc.mmap(None, num_bytes, 0, _EMPTY, -1, 0)
        self.reserved[address] = num_bytes
        return address

    def free(self, address: int, num_bytes: int) -> None:
        self._did("free")
        assert self.reserved.pop(address) == num_bytes
        inside = [at for at in self.mapped if address <= at < address + num_bytes]
        assert not inside, "addresses are given back on which something is mapped"
        _libc.munmap(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes))

    def map(self, address: int, num_bytes: int, handle: int) -> None:
        assert self.handles[handle] == num_bytes, "only whole handles are mapped"
        assert any(a <= address and address + num_bytes <= a + n for a, n in self.reserved.items())
        assert all(at + n <= address or at >= address + num_bytes for at, n in self.mapped.items())
        self._did("map")
        self._put(address, num_bytes, 0, mmap.MAP_SHARED, handle)
        self.mapped[address] = num_bytes

    def allow_reading(self, address: int, num_bytes: int) -> None:
        self._did("allow")
        at = address
        while at < address + num_bytes:
            assert at in self.mapped, "access is allowed to what is not mapped"
            assert not _libc.mprotect(
                ctypes.c_void_p(at), ctypes.c_size_t(self.mapped[at]), mmap.PROT_READ
            )
            self.readable.add(at)
            at += self.mapped[at]

    def unmap(self, address: int, num_bytes: int) -> None:
        assert self.calls[-1] in ("synchronize", "unmap"), "kernels may still read"
        self._did("unmap")
        assert self.mapped.pop(address) == num_bytes
        self.readable.discard(address)
        self._put(address, num_bytes, 0, _EMPTY, -1)

    def synchronize(self) -> None:
        self._did("synchronize")

    def tensor(self, address: int, num_bytes: int, owner: object) -> Tensor:
        memory: Any = (ctypes.c_char * num_bytes).from_address(address)
        memory.owner = owner
        return torch.frombuffer(memory, dtype=torch.uint8)

    def write(self, handle: int, byte: int) -> None:
        """Fill a handle's memory, as a kernel would."""
        os.pwrite(handle, bytes([byte]) * self.handles[handle], 0)

    def _put(self, address: int, num_bytes: int, rights: int, flags: int, fd: int) -> None:
        found = _libc.mmap(address, num_bytes, rights, flags | 0x10, fd, 0)
        assert found == address, os.strerror(ctypes.get_errno())
