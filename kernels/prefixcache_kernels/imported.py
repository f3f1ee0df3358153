"""A pool on a GPU, seen from a worker: memory that another process owns, as a tensor.

```
owner process    one allocation │ header │ [layer][key|value][block][slot][head][dim] │
                        │ name (64 bytes), through the service
worker           open ──┴─► the header says: this epoch, this shape? ──► one tensor, no copy
```

The memory stays open as long as any tensor looks into it; with the last it is closed, never freed.
"""

from __future__ import annotations

import os
import struct
import weakref
from typing import Any, Final

import torch
from torch import Tensor

from prefixcache.device import CudaDriver, Driver
from prefixcache.errors import InvalidRequest, Unsupported
from prefixcache.pool import HEAD_BYTES, check_header
from prefixcache.types import PoolHandle

_EPOCH: Final = struct.Struct("<8xQ")


class DeviceMemory:
    """Memory of another process, open in this one.

    Args:
        driver: That opened it.
        address: In this process.
        num_bytes: Of all of it.
    """

    def __init__(self, driver: Driver, address: int, num_bytes: int) -> None:
        self._driver = driver
        self.address = address
        self.num_bytes = num_bytes
        self._pid = os.getpid()

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """What torch asks a foreign array for (version 3 of the interface: one row of bytes)."""
        return {
            "shape": (self.num_bytes,),
            "typestr": "|u1",
            "data": (self.address, False),
            "strides": None,
            "version": 3,
        }

    def view(self) -> Tensor:
        """Give the bytes as a tensor; it keeps this object, and so the memory, open."""
        return torch.as_tensor(
            self, device=torch.device("cuda", getattr(self._driver, "ordinal", 0))
        )

    def read(self, num_bytes: int) -> bytes:
        """Copy the first bytes to the host.

        Raises:
            InvalidRequest: This process has the memory by a fork, and no GPU works in it.
        """
        if os.getpid() != self._pid:
            raise InvalidRequest(
                f"this pool belongs to process {self._pid} and came through fork: connect, attach "
                "and map in this process"
            )
        return self._driver.read(self.address, num_bytes)

    def epoch(self) -> int:
        """Give the epoch that the header names now.  Waits for the device."""
        epoch: int = _EPOCH.unpack(self.read(_EPOCH.size))[0]
        return epoch


def open_device(handle: PoolHandle, driver: Driver | None = None) -> DeviceMemory:
    """Open the pool on a GPU that `handle` names, and make sure that it is the one.

    Raises:
        Unsupported: This process cannot reach a GPU; the message says what is missing.
        NotFound: Its owner has ended.
        EpochMismatch, LayoutMismatch: It is another pool than the handle says.
    """
    if driver is None:
        if torch.version.cuda is None:
            raise Unsupported(
                f"the pool is on a GPU, and this torch ({torch.__version__}) is built without CUDA"
            )
        driver = CudaDriver()
        if not torch.cuda.is_available():
            raise Unsupported("the pool is on a GPU, and torch finds none in this process")
        torch.cuda.init()  # type: ignore[no-untyped-call]  # the memory is opened in its context
    address = driver.open(handle.name)
    try:
        check_header(driver.read(address, HEAD_BYTES), handle)
    except BaseException:
        driver.close(address)
        raise
    memory = DeviceMemory(driver, address, handle.offset + handle.num_bytes)
    # At the end of the process the driver closes it, and may be gone before Python is.
    weakref.finalize(memory, _close, driver, address, os.getpid()).atexit = False
    return memory


def _close(driver: Driver, address: int, pid: int) -> None:
    """Close memory when all that was queued on the device is done: kernels may still read it.

    A forked child has neither the memory nor a driver that works: nothing is called there.
    """
    if os.getpid() != pid:
        return
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize(getattr(driver, "ordinal", 0))
    driver.close(address)
