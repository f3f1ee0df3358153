"""Somebody who changes what lies below a pool, while its service and its porter work.

As a disk that fails may, or memory, or a program that writes where it should not: no byte that is
read afterwards may be one that was changed here.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import numpy.typing as npt

from chaos.universe import BLOCK_SIZE, LAYOUT
from prefixcache.pool import HEADER_BYTES, SHARED_MEMORY
from prefixcache.service.tiers.disk import HEADS_AT
from prefixcache.service.tiers.slab import head_type
from service.valkey_server import ValkeyServer

Bytes = npt.NDArray[np.uint8]

BLOCK_BYTES = LAYOUT.block_bytes(BLOCK_SIZE)
HEAD = head_type(BLOCK_SIZE)
ONE_IN = 32
"""Of so many slots one is changed: of each long chat some, and what comes before them is of use."""


def files_in_memory(porter: int) -> list[Path]:
    """Give the files of a porter that lie in shared memory, the largest first.

    The slab; the slots through which objects go to a store elsewhere, if there is one; heads.
    """
    lines = Path(f"/proc/{porter}/maps").read_text().splitlines()
    paths = {Path(line.split()[-1]) for line in lines if f" {SHARED_MEMORY}/prefixcache-" in line}
    return sorted(paths, key=lambda path: -path.stat().st_size)


@contextlib.contextmanager
def mapped(path: Path, skip: int) -> Iterator[Bytes]:
    """Map a file but for its head, to be written to."""
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as memory:
        raw = np.frombuffer(memory, np.uint8)
        yield raw[skip:]
        del raw


class Slots:
    """Slots of one tier: their pages `[slot, bytes]`, however they lie, and what is beside them.

    Args:
        pages: `[slot, planes, bytes]`.
        heads: `[slot]`.
        random: Chooses.
        one_in: Of how many slots that hold something one is changed.
    """

    def __init__(
        self, pages: Bytes, heads: npt.NDArray[np.void], random: Random, one_in: int
    ) -> None:
        self.pages, self.heads, self.one_in = pages, heads, one_in
        self.random = np.random.default_rng(random.randrange(2**32))
        self.used = np.flatnonzero(heads["stamp"])

    def flip(self) -> None:
        """Change one bit in each of them."""
        _, planes, size = self.pages.shape
        slots = self.random.permutation(self.used)[: len(self.used) // self.one_in + 1]
        at = (
            slots,
            self.random.integers(0, planes, len(slots)),
            self.random.integers(0, size, len(slots)),
        )
        self.pages[at] ^= (1 << self.random.integers(0, 8, len(slots))).astype(np.uint8)

    def swap(self) -> None:
        """Let them change places, each with what is beside it; others without."""
        slots = self.random.permutation(self.used)[: len(self.used) // self.one_in + 2]
        self.pages[slots] = self.pages[np.roll(slots, 1)]
        self.heads[slots[::2]] = self.heads[np.roll(slots, 1)[::2]]


def spoil_memory(porter: int, random: Random, how: str, one_in: int = ONE_IN) -> None:
    """Change what lies in memory: `flip`, `swap` or `cut`.

    Raises:
        OSError: the porter has ended.
    """
    slab, *stage, heads = files_in_memory(porter)
    if stage and how == "flip":
        spoil_on_the_way(stage[0], random)
    if how == "cut":
        size = slab.stat().st_size
        os.truncate(slab, (HEADER_BYTES + size) // 2)
        os.truncate(slab, size)
        return
    with mapped(slab, HEADER_BYTES) as raw, mapped(heads, HEADER_BYTES) as beside:
        planes = LAYOUT.planes
        num_slots = len(raw) // BLOCK_BYTES
        pages = raw[: num_slots * BLOCK_BYTES].reshape(planes, num_slots, -1).transpose(1, 0, 2)
        told = beside[: num_slots * HEAD.itemsize].view(HEAD)
        slots = Slots(pages, told, random, one_in)
        getattr(slots, how)()
        del raw, beside, pages, told, slots


def spoil_on_the_way(stage: Path, random: Random) -> None:
    """Change a byte here and there of what is between a porter and a carrier just now."""
    with mapped(stage, HEADER_BYTES) as raw:
        at = np.random.default_rng(random.randrange(2**32)).integers(0, len(raw), len(raw) // 4096)
        raw[at] ^= 1
        del raw


def spoil_objects(server: ValkeyServer, random: Random) -> None:
    """Change objects in a store: bytes of some, and some are others under their names.

    Raises:
        OSError: It is not there.
    """
    names = server.keys()
    random.shuffle(names)
    few = names[: max(2, len(names) // 16)]
    for one, other in zip(few[::2], few[1::2], strict=False):
        server.call("SETRANGE", one, str(random.randrange(BLOCK_BYTES)), random.randbytes(1))
        if random.random() < 0.5:
            server.call("COPY", one, other, "REPLACE")


def spoil_disk(folder: Path, random: Random, how: str, one_in: int = ONE_IN) -> None:
    """Change what lies on a disk: `flip`, `swap`, `cut`, or what is beside the slots (`heads`).

    Raises:
        OSError: nothing is there, or the disk is full.
    """
    slab, heads = folder / "slab", folder / "heads"
    if how == "cut":
        os.truncate(slab, slab.stat().st_size // 2)
        return
    told = np.fromfile(heads, HEAD, offset=HEADS_AT)
    if how == "heads":
        with heads.open("r+b", buffering=0) as file:
            for slot in np.flatnonzero(told["stamp"])[::one_in].tolist():
                at = HEADS_AT + slot * HEAD.itemsize + random.randrange(HEAD.itemsize)
                os.pwrite(file.fileno(), random.randbytes(1), at)
        return
    with slab.open("r+b", buffering=0) as file:
        used = np.flatnonzero(told["stamp"]).tolist()
        random.shuffle(used)
        used = used[: len(used) // one_in + 2]
        for one, other in zip(used[::2], used[1::2], strict=False):
            at = one * BLOCK_BYTES
            if how == "swap":
                new = os.pread(file.fileno(), BLOCK_BYTES, other * BLOCK_BYTES)
            else:
                at += random.randrange(BLOCK_BYTES)
                old = os.pread(file.fileno(), 1, at)
                new = bytes(byte ^ (1 << random.randrange(8)) for byte in old)
            os.pwrite(file.fileno(), new, at)
