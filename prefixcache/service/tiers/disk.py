"""The slab on a disk: slots in one file, and in another what stands beside the bytes of each.

```
slab    [slot][plane][page]                     a slot's pages lie in a row: one call moves them
heads   a page that says of what this is the slab, then [slot]  stamp │ sum │ tokens
lock    held by the service, and by a porter of his for as long as that one lives
```
Neither file is ever mapped: one that is cut short under who reads it gives him fewer bytes, which
is a miss, where memory would kill him.  The service opens them, and the porter alone, who is given
the open files, writes and reads.  They are this user's, and nobody else may read them.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from prefixcache.config import format_size
from prefixcache.errors import InvalidRequest, PoolExhausted, ServiceUnavailable
from prefixcache.private_files import check_path, make_private_folder, open_private, remove_foreign
from prefixcache.service.tiers.slab import head_type, slot_bytes
from prefixcache.types import PoolHandle
from prefixcache.user_folders import expand

HEADS_AT: Final = 4096
_MAGIC: Final = b"PCDISK01"
_TITLE: Final = struct.Struct("<8s240s")
_MOST_PAGES: Final = 1024
"""Of one call (`IOV_MAX`)."""
_FORMER_S: Final = 5.0
"""How long a porter of a service that was killed may take to be gone."""
_MOST_SLOTS: Final = 2**31 - 1


class DiskFolder:
    """The service's end: a folder that it has taken, and the files in it.

    Args:
        path: The folder; made, for this user alone, if it is not there and the one above it is.
        num_bytes: What slots and heads may take.

    Raises:
        ServiceUnavailable: Another service has it.
        InvalidRequest: It is somebody else's, others may write to it, or it cannot be made.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = expand(path).absolute()
        self._num_bytes = num_bytes
        self._lock = self._slab = self._heads = -1
        self.num_slots = 0
        """Blocks that fit, once the pool is known."""
        try:
            check_path(self.path.parent, "--disk")
            make_private_folder(self.path, "--disk")
            for name in ("lock", "slab", "heads"):
                remove_foreign(self.path / name)
            self._lock = open_private(self.path / "lock", os.O_RDWR | os.O_CREAT)
            self._take()
        except OSError as error:
            self.close()
            raise InvalidRequest(f"--disk {self.path}: {error}") from None
        except ServiceUnavailable:
            self.close()
            raise

    def _take(self) -> None:
        """Lock the folder; wait a moment for the porter of a service that was killed."""
        until = time.monotonic() + _FORMER_S
        while True:
            try:
                fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ServiceUnavailable(
                        f"another service has its blocks in {self.path}; choose another folder "
                        "for --disk"
                    ) from None
                time.sleep(0.05)
            else:
                return

    def open(self, pool: PoolHandle) -> None:
        """Make the files for blocks of that pool.

        Raises:
            PoolExhausted: The disk has no room for them.
            InvalidRequest: They cannot be made.
        """
        self.num_slots = num_slots(self._num_bytes, slot_bytes(pool))
        try:
            self._slab = self._make("slab", self.num_slots * pool.block_bytes)
            itemsize = head_type(pool.block_size).itemsize
            self._heads = self._make("heads", HEADS_AT + self.num_slots * itemsize)
            os.pwrite(self._heads, _title(pool, self.num_slots), 0)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise PoolExhausted(
                    f"--disk: no room for {format_size(self._num_bytes)} in {self.path}: "
                    f"{error.strerror}. Lower it, or name another folder."
                ) from error
            raise InvalidRequest(f"--disk {self.path}: {error}") from None

    def _make(self, name: str, num_bytes: int) -> int:
        """Make a file of that size, of holes: what was there is gone."""
        fd = open_private(self.path / name, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, 0)
            os.ftruncate(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def order(self) -> dict[str, Any]:
        """Say where everything is, as `DiskSlab` wants to be told; `files` go along."""
        return {"slab": self._slab, "heads": self._heads, "num_slots": self.num_slots}

    @property
    def files(self) -> list[int]:
        """The open files that a porter is given: with the lock, which he keeps while he lives."""
        return [self._slab, self._heads, self._lock]

    def close(self) -> None:
        """Close the files.  Idempotent.  What is in them is nobody's any more."""
        for fd in (self._slab, self._heads, self._lock):
            if fd >= 0:
                os.close(fd)
        if self._slab >= 0:
            for name in ("slab", "heads"):
                with contextlib.suppress(OSError):
                    (self.path / name).unlink()
        self._slab = self._heads = self._lock = -1


class DiskSlab:
    """The porter's end: writes and reads slots.

    Args:
        order: What `DiskFolder.order` gives; the files are open here under the same numbers.
        pool: Of which pool blocks lie there.
        first_slot: The number of its first slot: those of HOST come before it.
    """

    def __init__(self, order: dict[str, Any], pool: PoolHandle, first_slot: int) -> None:
        self._slab: int = order["slab"]
        self._heads: int = order["heads"]
        self._first = first_slot
        self._stride = pool.block_bytes
        self._type = head_type(pool.block_size)

    def write(self, slot: int, pages: npt.NDArray[np.uint8]) -> None:
        """Write a block's pages; until a head is written, too, nothing lies there.  O(bytes).

        Args:
            slot: Where.
            pages: `[planes, page_bytes]`, each page in a row.

        Raises:
            OSError: The disk is full, or fails.
        """
        self.write_head(slot, np.zeros(1, self._type))
        rows, at = list(pages), (slot - self._first) * self._stride
        for start in range(0, len(rows), _MOST_PAGES):
            part = rows[start : start + _MOST_PAGES]
            size = sum(len(row) for row in part)
            if os.pwritev(self._slab, part, at) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += size

    def write_head(self, slot: int, head: npt.NDArray[Any]) -> None:
        """Write what stands beside a slot.

        Raises:
            OSError: As `write`.
        """
        raw = head.tobytes()
        if os.pwrite(self._heads, raw, self._head_at(slot)) != len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, slot: int, pages: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | None:
        """Read a block's pages to where they belong, and what stands beside them.  O(bytes).

        Returns:
            Its head, `[1]`; None if the files are shorter than they should be.

        Raises:
            OSError: The disk fails.
        """
        rows, at = list(pages), (slot - self._first) * self._stride
        for start in range(0, len(rows), _MOST_PAGES):
            part = rows[start : start + _MOST_PAGES]
            size = sum(len(row) for row in part)
            if os.preadv(self._slab, part, at) != size:
                return None
            at += size
        raw = os.pread(self._heads, self._type.itemsize, self._head_at(slot))
        return np.frombuffer(raw, self._type) if len(raw) == self._type.itemsize else None

    def _head_at(self, slot: int) -> int:
        return HEADS_AT + (slot - self._first) * self._type.itemsize


def num_slots(num_bytes: int, slot: int) -> int:
    """Give how many slots of so many bytes, with their heads, fit into a folder's files."""
    return min(max(0, num_bytes - HEADS_AT) // slot, _MOST_SLOTS)


def _title(pool: PoolHandle, num_slots: int) -> bytes:
    """Say of what this is the slab."""
    shape = f"{num_slots} slots of {pool.block_size} tokens, {pool.layout}"
    return _TITLE.pack(_MAGIC, shape.encode()[:240])
