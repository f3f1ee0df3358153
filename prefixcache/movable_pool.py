"""A mapped pool in whose place another may be put, below the views that were made of it.

```
addresses   base ────────────────────────────── base + size     of this process, for good
mapped      a dead service's pool                               views of it, made once:
                  │ move                                        they are views of whatever
            another service's pool, of the same shape           is there
```
For who computes in the pool through views that cannot be made anew.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from typing import Final

from prefixcache.errors import LayoutMismatch
from prefixcache.pool import keep_from_children, open_pool, populate, shape_of
from prefixcache.texts import many
from prefixcache.types import PoolHandle

_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)


class MovablePool:
    """A pool that another process owns, mapped shared and writable, for this process alone.

    Attributes:
        handle: the pool that is there now.
        memory: where it is; block 0 is at `handle.offset`.
    """

    def __init__(self, handle: PoolHandle) -> None:
        """Map a pool, and enter its pages: `populate`'s cost.

        Raises:
            Unsupported, NotFound, EpochMismatch, LayoutMismatch: As `prefixcache.pool.map_pool`.
        """
        fd = open_pool(handle)
        try:
            # Nothing but addresses: what is mapped onto them goes when they do.
            self.memory = mmap.mmap(
                -1,
                handle.offset + handle.num_bytes,
                mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE,
                mmap.PROT_READ | mmap.PROT_WRITE,
            )
            self._put(fd)
        except BaseException:
            os.close(fd)
            raise
        self.handle = handle
        self._close = weakref.finalize(self.memory, os.close, fd)
        populate(self.memory, handle)

    def move(self, handle: PoolHandle) -> None:
        """Put another pool of the same shape in the place of this one, which is let go of.

        Nothing may read or write there meanwhile.  If it fails, this one stays.  `populate`'s cost.

        Raises:
            LayoutMismatch: It has another shape.
            Unsupported, NotFound, EpochMismatch: As `prefixcache.pool.map_pool`.
        """
        if handle == self.handle:
            return
        check_shape(handle, self.handle)
        fd = open_pool(handle)
        try:
            self._put(fd)
        except BaseException:
            os.close(fd)
            raise
        self._close()  # and with it goes the lock of the former epoch
        self.handle = handle
        self._close = weakref.finalize(self.memory, os.close, fd)
        populate(self.memory, handle)

    def _put(self, fd: int) -> None:
        base = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        rights, flags = mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | _MAP_FIXED
        if _libc.mmap(base, len(self.memory), rights, flags, fd, 0) != base:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        keep_from_children(self.memory)


def check_shape(handle: PoolHandle, former: PoolHandle) -> None:
    """Refuse a pool whose blocks do not lie where a former one's lay.

    Raises:
        LayoutMismatch: As said, with the shapes of both.
    """
    shapes = [(one.kind, one.offset, *shape_of(one)) for one in (handle, former)]
    if shapes[0] != shapes[1]:
        raise LayoutMismatch(
            f"the pool has {_told(handle)}, and what is mapped was made for {_told(former)}"
        )


def _told(handle: PoolHandle) -> str:
    size = many(handle.num_blocks, "block")
    where = f"from byte {handle.offset} on, in memory of kind {handle.kind}"
    return f"{size} of {handle.block_size} tokens, {handle.layout}, {where}"
