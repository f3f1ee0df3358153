"""The porter: the process that copies blocks between the pool and the slab below it.

    python -m prefixcache.service.tiers.porter FD          started by `haulage.py`, one at a time

The service moves no bytes: what a disk, a driver or a page that cannot be had does to who touches
it must not happen to its event loop.  So a process of its own maps pool and slab, takes hauls over
a socket (`orders.py`), one after the other, and reports each.  It ends with the service.

**Nothing is believed that was not seen in the pool.**  What comes back is copied first, then
compared where it lies: the stamp that the slot must have, the tokens, and the sum over the pages.
So there is no moment between the check and the use; and what is torn, was meant for another slot,
or was copied while its block was another's already, is a miss.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from prefixcache.core.hauls import Haul
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.tiers.orders import (
    MOST_BYTES,
    READY,
    Report,
    pack_report,
    read_haul,
)
from prefixcache.service.tiers.slab import SlabMap

_NICENESS: Final = 5
_PR_SET_PDEATHSIG: Final = 1


class Porter:
    """Carries out hauls.

    Args:
        memory: Pool, slab and heads.
        seed: Of the sums: the same for as long as the slab is kept.
    """

    def __init__(self, memory: SlabMap, seed: int) -> None:
        self._memory = memory
        self._sums = Checksums(memory.memory, memory.handle, seed)

    def carry(self, haul: Haul) -> int:
        """Copy the blocks of a haul.  O(their bytes).

        Returns:
            How many, from the first on, have arrived as they should be.
        """
        tokens = np.frombuffer(haul.tokens, np.uint32).reshape(len(haul.slots), -1)
        return self._up(haul, tokens) if haul.is_up else self._down(haul, tokens)

    def _down(self, haul: Haul, tokens: np.ndarray) -> int:
        pool, slab, heads = self._memory.pool, self._memory.slab, self._memory.heads
        slots = np.frombuffer(haul.slots, np.int32)
        heads["stamp"][slots] = 0
        for block, slot in zip(haul.blocks, haul.slots, strict=True):
            slab[:, slot] = pool[:, block]
        heads["sum"][slots] = self._sums.of_contents(np.frombuffer(haul.blocks, np.uint32), tokens)
        heads["tokens"][slots] = tokens
        heads["stamp"][slots] = np.frombuffer(haul.stamps, np.int64)
        return len(slots)

    def _up(self, haul: Haul, tokens: np.ndarray) -> int:
        pool, slab, heads = self._memory.pool, self._memory.slab, self._memory.heads
        slots = np.frombuffer(haul.slots, np.int32)
        for block, slot in zip(haul.blocks, haul.slots, strict=True):
            pool[:, block] = slab[:, slot]
        sums = self._sums.of_contents(np.frombuffer(haul.blocks, np.uint32), tokens)
        good = (
            (heads["stamp"][slots] == np.frombuffer(haul.stamps, np.int64))
            & (heads["tokens"][slots] == tokens).all(axis=1)
            & (heads["sum"][slots] == sums)
        )
        return len(slots) if good.all() else int(good.argmin())


def serve(line: socket.socket, porter: Porter) -> None:
    """Take hauls until the other end closes."""
    line.sendall(pack_report(Report(READY, 0, 0.0)))
    while message := line.recv(MOST_BYTES):
        haul = read_haul(message)
        began = time.perf_counter()
        num_good = porter.carry(haul)
        line.sendall(pack_report(Report(haul.id, num_good, time.perf_counter() - began)))


def _die_with(parent: int) -> None:
    """End when the service does, however that ends, and although nothing is read just now."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit(1)  # it has ended before we asked


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a service's porter: the file descriptor of our end of the socket is the argument."""
    number = (sys.argv[1:] if arguments is None else arguments)[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service
    with socket.socket(fileno=int(number)) as line:
        order: dict[str, Any] = json.loads(line.recv(MOST_BYTES))
        _die_with(order["parent"])
        os.nice(_NICENESS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            serve(line, Porter(SlabMap(order), order["seed"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
