"""Stamps: one word per block that says at once, whatever dies when, whether a manifest still holds.

```
even   nobody may write to the block      lend   ► odd     settle ► the next even number
odd    a lease may write to it            remove ► the next even number, if it was even
```

So a number names one filling of a block, as a sequence lock does: an entry that was made for stamp
8 says nothing any more once the block was lent (9) or has left the index (10).  The words are
memory that the kernel keeps when the process dies, so nothing has to wait for a disk.

A second row of words counts the resets of each namespace in the same way.
"""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from prefixcache.private_files import open_private
from prefixcache.types import BlockTable

MAX_NAMESPACES: Final = 65_536
"""Namespaces that a state can tell apart; those beyond are not kept."""

_SHORT_RUN: Final = 8
"""Up to this many blocks a loop beats the fixed cost of numpy's calls."""


class Stamps:
    """The words of one pool, in a file.

    Args:
        path: the file, made with zeros if it is not there or of another size.
        num_blocks: blocks of the pool.

    Raises:
        OSError: the file cannot be made.
    """

    def __init__(self, path: Path, num_blocks: int) -> None:
        size = _size(num_blocks)
        fd = open_private(path, os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(fd).st_size != size:
                os.ftruncate(fd, 0)
                os.posix_fallocate(fd, 0, size)  # later a full disk would be a SIGBUS
            self._memory = mmap.mmap(fd, size)
        finally:
            os.close(fd)
        self._cells = memoryview(self._memory).cast("I")
        words = np.frombuffer(self._memory, np.uint32)
        self.blocks: npt.NDArray[np.uint32] = words[:num_blocks]
        self.resets: npt.NDArray[np.uint32] = words[num_blocks:]

    @staticmethod
    def fit(path: Path, num_blocks: int) -> bool:
        """Whether there are stamps of a pool of that size."""
        try:
            return path.lstat().st_size == _size(num_blocks)
        except OSError:
            return False

    def lend(self, blocks: BlockTable) -> None:
        """Note that somebody may write to these blocks from now on."""
        if len(blocks) <= _SHORT_RUN:
            cells = self._cells
            for block in blocks:
                cells[block] |= 1
        else:
            self.blocks[np.frombuffer(blocks, np.int32)] |= 1

    def settle(self, blocks: BlockTable) -> None:
        """Note that nobody may write to these blocks any more.  Idempotent."""
        if len(blocks) <= _SHORT_RUN:
            cells = self._cells
            for block in blocks:
                cells[block] = _even(cells[block])
        else:
            index = np.frombuffer(blocks, np.int32)
            self.blocks[index] += self.blocks[index] & 1

    def remove(self, blocks: BlockTable) -> None:
        """Make what was noted of these blocks invalid, unless somebody may write to them anyhow."""
        index = np.frombuffer(blocks, np.int32)
        words = self.blocks[index]
        self.blocks[index] = words + 2 * (1 - (words & 1))

    def of(self, blocks: BlockTable) -> bytes:
        """Give the stamps of these blocks, packed."""
        if len(blocks) == 1:
            return self._cells[blocks[0] : blocks[0] + 1].tobytes()
        return self.blocks[np.frombuffer(blocks, np.int32)].tobytes()

    def one(self, block: int) -> int:
        """Give the stamp of a block."""
        return self._cells[block]

    def flush(self) -> None:
        """Bring everything to the disk.  Blocks."""
        self._memory.flush()

    def close(self) -> None:
        """Unmap.  The arrays must not be used afterwards."""
        self.blocks = self.resets = np.empty(0, np.uint32)
        self._cells.release()
        self._memory.close()


def _size(num_blocks: int) -> int:
    return 4 * (num_blocks + MAX_NAMESPACES)


def _even(stamp: int) -> int:
    """Give the next even number; numbers wrap after 2**31 lendings of one block."""
    return (stamp + (stamp & 1)) & 0xFFFFFFFF
