"""Memory on a GPU that several processes share, through CUDA's driver.  No torch here.

```
owner      alloc ── export ─► name (device, 64 bytes) ──────────────┐
service                        hands the name to whoever attaches   │ PoolHandle.name
worker                                          open(name) ◄────────┘  same memory, own address
```

Which flavour of CUDA IPC, and why.  The driver's legacy handles (`cuIpcGetMemHandle`), called
through its C interface.  A handle is 64 bytes that any number of processes may open at any time,
and nothing counts them, so a worker that is killed leaves nothing behind.  Torch's own sharing
keeps a counter per receiver that a killed one never gives back, and needs the sender's allocator.
File descriptors of CUDA's virtual memory would have to travel beside gRPC.  The Python bindings
have dropped the fields of a handle between releases; the driver's C interface is what all of them
call, and does not change.

What the driver asks for: memory that another process opened must not be freed while it is open.
So the owner never frees: it holds the memory until it ends, and whoever kills a worker, in the
midst of a kernel too, kills that worker's view only.  A process's files are closed before its pidfd
fires, the driver's among them, and with these the driver stops its kernels: what the service learns
by the pidfd, that a dead worker writes no more, holds for a GPU too.
"""

from __future__ import annotations

import ctypes
from typing import Any, Final, Protocol

from prefixcache.errors import CacheError, NotFound, PoolExhausted, Unsupported

HANDLE_BYTES: Final = 64
"""An exported handle, on every platform."""

_OUT_OF_MEMORY: Final = 2
_LAZY_PEER_ACCESS: Final = 1


class Driver(Protocol):
    """What owner and workers need of a device."""

    def alloc(self, num_bytes: int) -> int:
        """Take memory; give its address.  Raises PoolExhausted."""
        ...

    def zero(self, address: int, num_bytes: int) -> None:
        """Set bytes to zero, and wait until they are."""
        ...

    def write(self, address: int, content: bytes) -> None:
        """Copy bytes to the device, and wait until they are there."""
        ...

    def read(self, address: int, num_bytes: int) -> bytes:
        """Copy bytes from the device."""
        ...

    def export(self, address: int) -> str:
        """Give the name under which other processes open this memory."""
        ...

    def open(self, name: str) -> int:
        """Map memory that another process exported; give its address here.  Raises NotFound."""
        ...

    def close(self, address: int) -> None:
        """Undo `open`."""
        ...


class CudaDriver:
    """One GPU, by its number among those that this process sees.

    Args:
        ordinal: The GPU; None chooses nothing yet, `open` takes the one that the name speaks of.

    Raises:
        Unsupported: There is no driver, or no such GPU; the message says what is missing.
    """

    def __init__(self, ordinal: int | None = None) -> None:
        try:
            self._cuda = ctypes.CDLL("libcuda.so.1")
        except OSError as error:
            raise Unsupported(
                f"a pool on a GPU needs NVIDIA's driver on this host: {error}. --pool shm keeps "
                "the pool in shared memory."
            ) from None
        self.ordinal: int | None = None
        self._context = ctypes.c_void_p()
        try:
            self._call("cuInit", ctypes.c_uint(0))
        except CacheError as error:
            raise Unsupported(f"a pool on a GPU needs a GPU: {error}") from None
        if ordinal is not None:
            self.use(ordinal)

    def use(self, ordinal: int) -> None:
        """Make a GPU the one that calls mean, in the context that torch uses too."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        if not 0 <= ordinal < count.value:
            raise Unsupported(f"there is no GPU {ordinal}: this process sees {count.value}")
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), device)
        self.ordinal = ordinal
        self._enter()

    def alloc(self, num_bytes: int) -> int:
        """Take device memory; give its address.

        Raises:
            PoolExhausted: There is not enough; the message has the numbers.
        """
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._call("cuMemGetInfo_v2", ctypes.byref(free), ctypes.byref(total))
        address = ctypes.c_uint64()
        status = self._cuda.cuMemAlloc_v2(ctypes.byref(address), ctypes.c_size_t(num_bytes))
        if status == _OUT_OF_MEMORY:
            raise PoolExhausted(
                f"a pool of {num_bytes / 2**30:.2f} GiB does not fit on GPU {self.ordinal}: "
                f"{free.value / 2**30:.2f} of {total.value / 2**30:.2f} GiB are free. Lower "
                "--memory; models and their workspaces need room beside the pool."
            )
        self._check("cuMemAlloc", status)
        return address.value

    def zero(self, address: int, num_bytes: int) -> None:
        """Set bytes to zero, and wait until they are."""
        size = ctypes.c_size_t(num_bytes)
        self._call("cuMemsetD8_v2", ctypes.c_uint64(address), ctypes.c_ubyte(0), size)
        self._call("cuCtxSynchronize")

    def write(self, address: int, content: bytes) -> None:
        """Copy bytes to the device."""
        size = ctypes.c_size_t(len(content))
        self._call("cuMemcpyHtoD_v2", ctypes.c_uint64(address), ctypes.c_char_p(content), size)

    def read(self, address: int, num_bytes: int) -> bytes:
        """Copy bytes from the device."""
        self._enter()
        buffer = ctypes.create_string_buffer(num_bytes)
        size = ctypes.c_size_t(num_bytes)
        self._call("cuMemcpyDtoH_v2", buffer, ctypes.c_uint64(address), size)
        return buffer.raw

    def export(self, address: int) -> str:
        """Give the name under which other processes open this memory: device and handle, in hex."""
        handle = (ctypes.c_char * HANDLE_BYTES)()
        self._call("cuIpcGetMemHandle", handle, ctypes.c_uint64(address))
        assert self.ordinal is not None
        return f"{self._uuid(self.ordinal).hex()}:{handle.raw.hex()}"

    def open(self, name: str) -> int:
        """Map memory that another process exported, on the GPU where it is; give its address here.

        Raises:
            NotFound: Its owner has ended, or the name is none.
            Unsupported: This process does not see that GPU.
        """
        uuid, _, code = name.partition(":")
        if len(code) != 2 * HANDLE_BYTES:
            raise NotFound(f"{name!r} names no memory on a GPU. Attach again.")
        self.use(self._find(uuid))
        handle = _Handle.from_buffer_copy(bytes.fromhex(code))
        address = ctypes.c_uint64()
        status = self._cuda.cuIpcOpenMemHandle_v2(
            ctypes.byref(address), handle, ctypes.c_uint(_LAZY_PEER_ACCESS)
        )
        if status:
            raise NotFound(
                f"the pool on GPU {self.ordinal} cannot be opened: {self._name(status)}. Its owner "
                "has ended, or is this very process. Attach again for the present one."
            )
        return address.value

    def close(self, address: int) -> None:
        """Undo `open`; kernels of this process that read it must be done."""
        self._enter()
        self._call("cuIpcCloseMemHandle", ctypes.c_uint64(address))

    def _enter(self) -> None:
        """Make the GPU's context that of the calling thread: each thread has its own."""
        self._call("cuCtxSetCurrent", self._context)

    def _find(self, uuid: str) -> int:
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        seen = [self._uuid(ordinal).hex() for ordinal in range(count.value)]
        if uuid not in seen:
            raise Unsupported(
                f"the pool is on GPU {uuid}; this process sees {', '.join(seen) or 'none'}. Look "
                "at CUDA_VISIBLE_DEVICES, and at the devices that its container has."
            )
        return seen.index(uuid)

    def _uuid(self, ordinal: int) -> bytes:
        uuid, device = (ctypes.c_char * 16)(), ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ctypes.c_int(ordinal))
        self._call("cuDeviceGetUuid_v2", uuid, device)
        return uuid.raw

    def _call(self, function: str, *arguments: Any) -> None:
        self._check(function, getattr(self._cuda, function)(*arguments))

    def _check(self, function: str, status: int) -> None:
        if status:
            raise Unsupported(f"{function} says {self._name(status)}")

    def _name(self, status: int) -> str:
        name = ctypes.c_char_p()
        self._cuda.cuGetErrorName(ctypes.c_int(status), ctypes.byref(name))
        return name.value.decode() if name.value else f"error {status}"


class _Handle(ctypes.Structure):
    """`CUipcMemHandle`, which travels by value."""

    _fields_ = (("reserved", ctypes.c_char * HANDLE_BYTES),)
