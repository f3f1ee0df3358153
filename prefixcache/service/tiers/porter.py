"""The porter: the process that copies blocks between the pool and the slabs below it.

    python -m prefixcache.service.tiers.porter FD          started by `haulage.py`, one at a time

The service moves no bytes: what a disk, a driver or a page that cannot be had does to who touches
it must not happen to its event loop.  So a process of its own maps pool and slab, has the files of
the one on disk, takes hauls over a socket (`orders.py`), one after the other, and reports each.  It
ends with the service.

**Nothing is believed that was not seen in the pool.**  What comes back is copied first, then
compared where it lies: the stamp that the slot must have, the tokens, and the sum over the pages.
So there is no moment between the check and the use; and what is torn, was meant for another slot,
or was copied while its block was another's already, is a miss.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from prefixcache.core.hauls import Haul
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.tiers.abandonments import Abandonments
from prefixcache.service.tiers.disk import DiskSlab
from prefixcache.service.tiers.objects import Packer
from prefixcache.service.tiers.orders import (
    MOST_BYTES,
    READY,
    Report,
    pack_report,
    read_haul,
)
from prefixcache.service.tiers.seals import Seals
from prefixcache.service.tiers.slab import SlabMap
from prefixcache.types import BlockTable

NICENESS: Final = 5
"""Who computes goes first; but who waits for what comes back waits for this process."""


class Porter:
    """Carries out hauls.

    Args:
        memory: Pool, slab and heads.
        seed: Of the sums: the same for as long as the slabs are kept.
        disk: The slab on disk, if there is one.
        packer: Makes objects of blocks, and blocks of objects, if any go elsewhere.
        abandoned: Which hauls nobody may believe any more, if there is one.
    """

    def __init__(
        self,
        memory: SlabMap,
        seed: int,
        disk: DiskSlab | None = None,
        packer: Packer | None = None,
        abandoned: Abandonments | None = None,
    ) -> None:
        self._memory = memory
        self._disk = disk
        self._packer = packer
        self._abandoned = abandoned
        self._seals = Seals(seed, memory.handle.block_size)
        self._sums = Checksums(memory.memory, memory.handle, seed)
        self._num_host = len(memory.heads)
        self.error = 0
        """What the disk said (`errno`) in the last haul; 0: nothing failed."""

    def carry(self, haul: Haul) -> int:
        """Copy the blocks of a haul.  O(their bytes).

        Returns:
            How many, from the first on, have arrived as they should be.
        """
        self.error = 0
        if haul.names:
            return self._pass(haul)
        if haul.sources:
            return self._on(haul)
        tokens = np.frombuffer(haul.tokens, np.uint32).reshape(len(haul.slots), -1)
        return self._up(haul, tokens) if haul.is_up else self._down(haul, tokens)

    def _pass(self, haul: Haul) -> int:
        """To slots from which they are stored elsewhere, or from slots into which they came."""
        if self._packer is None:
            raise AssertionError("a haul of objects, and nothing is stored elsewhere")
        blocks = np.frombuffer(haul.blocks, np.uint32)
        move = self._packer.unpack if haul.is_up else self._packer.pack
        return move(blocks, haul.slots.tolist(), haul.names, haul.tokens)

    def _on(self, haul: Haul) -> int:
        """From HOST to DISK: the bytes, and what stands beside them, as they are."""
        slab, heads = self._memory.slab, self._memory.heads
        return self._write(
            haul.slots,
            [slab[:, source] for source in haul.sources],
            lambda num_good: heads[np.frombuffer(haul.sources, np.int32)[:num_good]],
        )

    def _down(self, haul: Haul, tokens: np.ndarray) -> int:
        pool, slab, heads = self._memory.pool, self._memory.slab, self._memory.heads
        slots = np.frombuffer(haul.slots, np.int32)
        near = slots < self._num_host
        heads["stamp"][slots[near]] = 0

        def summed(num_good: int) -> np.ndarray:
            """Say what is to stand beside the blocks, once they have all been copied."""
            blocks = np.frombuffer(haul.blocks, np.uint32)[:num_good]
            told = np.zeros(num_good, heads.dtype)
            told["sum"] = self._sums.of_contents(blocks, tokens[:num_good])
            told["tokens"] = tokens[:num_good]
            told["stamp"] = np.frombuffer(haul.stamps, np.int64)[:num_good]
            if haul.keys:
                told["key"] = np.frombuffer(haul.keys, np.uint64).reshape(-1, 2)[:num_good]
            self._seals.put(told)
            if self._abandoned is not None and self._abandoned.have(haul):
                return told[:0]  # what was summed may be somebody else's
            return told

        if not near.all():
            pages = [pool[:, block] for block in haul.blocks]
            return self._write(haul.slots, pages, summed)
        for block, slot in zip(haul.blocks, haul.slots, strict=True):
            slab[:, slot] = pool[:, block]
        told = summed(len(slots))
        for name in ("seal", "sum", "key", "tokens", "stamp"):  # the stamp last
            heads[name][slots[: len(told)]] = told[name]
        return len(told)

    def _write(
        self,
        slots: BlockTable,
        pages: list[np.ndarray],
        heads_of: Callable[[int], np.ndarray],
    ) -> int:
        """Write blocks to slots of which some are on disk; then their heads.

        Returns:
            How many, from the first on, are written.
        """
        disk, slab, heads = self._disk, self._memory.slab, self._memory.heads
        if disk is None:
            raise AssertionError("a haul to a disk, and there is none")
        num_good = 0
        try:
            for slot, block in zip(slots, pages, strict=True):
                if slot < self._num_host:
                    slab[:, slot] = block
                else:
                    disk.write(slot, block)
                num_good += 1
        except OSError as error:
            self.error = error.errno or errno.EIO
        told = heads_of(num_good)
        num_good = len(told)
        try:
            for at in range(num_good):
                if slots[at] < self._num_host:
                    heads[slots[at]] = told[at]
                else:
                    disk.write_head(slots[at], told[at : at + 1])
        except OSError as error:
            self.error = error.errno or errno.EIO
            return at
        return num_good

    def _up(self, haul: Haul, tokens: np.ndarray) -> int:
        pool, slab, heads = self._memory.pool, self._memory.slab, self._memory.heads
        slots = np.frombuffer(haul.slots, np.int32)
        found = np.zeros(len(slots), heads.dtype)
        for at, (block, slot) in enumerate(zip(haul.blocks, haul.slots, strict=True)):
            if slot < self._num_host:
                pool[:, block] = slab[:, slot]
                continue
            head = self._read(slot, pool[:, block])
            if head is None:
                break  # nothing behind it is of use
            found[at : at + 1] = head
        near = slots < self._num_host
        found[near] = heads[slots[near]]
        sums = self._sums.of_contents(np.frombuffer(haul.blocks, np.uint32), tokens)
        good = (
            (found["stamp"] == np.frombuffer(haul.stamps, np.int64))
            & (found["tokens"] == tokens).all(axis=1)
            & (found["sum"] == sums)
        )
        return len(slots) if good.all() else int(good.argmin())

    def _read(self, slot: int, pages: np.ndarray) -> np.ndarray | None:
        """Read a block from the disk; None if that fails."""
        if self._disk is None:
            return None
        try:
            return self._disk.read(slot, pages)
        except OSError as error:
            self.error = error.errno or errno.EIO
            return None


def serve(line: socket.socket, porter: Porter) -> None:
    """Take hauls until the other end closes."""
    line.sendall(pack_report(Report(READY, 0, 0.0)))
    while message := line.recv(MOST_BYTES):
        haul = read_haul(message)
        began = time.perf_counter()
        num_good = porter.carry(haul)
        took = time.perf_counter() - began
        line.sendall(pack_report(Report(haul.id, num_good, took, porter.error)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a service's porter: the file descriptor of our end of the socket is the argument."""
    number = (sys.argv[1:] if arguments is None else arguments)[0]
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service
    with socket.socket(fileno=int(number)) as line:
        order: dict[str, Any] = json.loads(line.recv(MOST_BYTES))
        os.nice(NICENESS)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            memory = SlabMap(order)
            disk = None
            if "disk" in order:
                disk = DiskSlab(order["disk"], memory.handle, len(memory.heads))
            packer = None
            if "stage" in order:
                secret = bytes.fromhex(order["secret"])
                packer = Packer(memory.memory, memory.handle, order["stage"], secret)
            abandoned = None
            if "abandoned" in order:
                abandoned = Abandonments(order["abandoned"], memory.handle.num_blocks)
            serve(line, Porter(memory, order["seed"], disk, packer, abandoned))
    return 0


if __name__ == "__main__":
    sys.exit(main())
