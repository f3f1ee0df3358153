"""Abandonments: which hauls' blocks became somebody else's, in memory that the porter shares.

```
service   the block is needed: note the haul ─► lend the block ─► its new owner writes to it
porter    copy the pages ─► sum them up ─► was the haul noted by now? ─► else write the head
```
A copy of what the new owner wrote is whole in itself, and would be taken by the next life for what
lay there before.  In this life nobody reads it: the core knows.  Since the note is made before the
block is lent, who finds none after the last page was read has read nothing of anybody else.
"""

from __future__ import annotations

import mmap
import os
from typing import Final

import numpy as np
import numpy.typing as npt

from prefixcache.core.hauls import Haul
from prefixcache.errors import PoolExhausted

_WORD_BYTES: Final = 8


class Abandonments:
    """A word for each block of a pool: the last haul that was abandoned and began with it.

    Args:
        fd: The memory, open here; it stays open.
        num_blocks: Of the pool.
    """

    def __init__(self, fd: int, num_blocks: int) -> None:
        self.fd = fd
        self._memory = mmap.mmap(fd, num_blocks * _WORD_BYTES)
        self._words: npt.NDArray[np.int64] = np.frombuffer(self._memory, np.int64)

    @classmethod
    def make(cls, num_blocks: int) -> Abandonments:
        """Take the memory: a porter is given its descriptor.

        Raises:
            PoolExhausted: There is none.
        """
        fd = os.memfd_create("prefixcache-abandoned", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, num_blocks * _WORD_BYTES)  # later it would be a SIGBUS
            return cls(fd, num_blocks)
        except OSError as error:
            os.close(fd)
            raise PoolExhausted(
                f"--disk: no memory for {num_blocks * _WORD_BYTES:,} bytes beside the pool: "
                f"{error.strerror}. Lower --memory."
            ) from error

    def note(self, haul: Haul) -> None:
        """Note that a haul's blocks are about to be somebody else's.  O(1)."""
        self._words[haul.blocks[0]] = haul.id

    def have(self, haul: Haul) -> bool:
        """Whether that was noted of a haul, or of a later one that begins with the same block.

        Its own note is gone then; but the block must have been lent in between.  O(1).
        """
        return bool(self._words[haul.blocks[0]] >= haul.id)

    def close(self) -> None:
        """Let go of the memory.  It must not be used afterwards."""
        self._words = np.empty(0, np.int64)
        self._memory.close()
        os.close(self.fd)
