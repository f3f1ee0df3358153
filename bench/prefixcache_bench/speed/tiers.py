"""Tiers: how fast the porter copies blocks, and what a restore takes beside a real service.

    python -m prefixcache_bench.speed.tiers [--layout 30x3x64:bfloat16] [--rounds N] [--quick]
                                            [--folder FOLDER]

All with blocks of 16 tokens that are scattered over pool and slab, in pieces of 16 blocks, for
memory of the host and for files in a folder (that of temporary files, if none is given):

```
bytes      the porter alone, in this process: pool to slab; and back, with the comparison; from the
           disk also once the system was asked to keep none of it in memory
restore    a service, its porter and a client: from the question to the grant for 1,000 tokens that
           lie below, and for the same tokens once they are in the pool
```
Every block that comes back is compared with what it held.  What it would take to compute these
tokens is the model's business.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from array import array
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import numpy as np

import prefixcache
from prefixcache.client.session import Session
from prefixcache.config import format_size, parse_layout
from prefixcache.core.hauls import Haul
from prefixcache.pool import PoolFile, map_pool, pages_of
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder, DiskSlab
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.slab import Slab, SlabMap, describe, slot_bytes
from prefixcache.types import HaulId, Layout, PoolHandle
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.signals import ending_in_order

SIZE: Final = 16
PIECE: Final = 16
TOKENS: Final = 1008
"""Of one prompt, that are kept: 63 blocks."""
COMPUTING_S: Final = 0.5
"""How long computing them takes, as the service is made to believe."""


class Way(NamedTuple):
    """One way of the porter's."""

    name: str
    is_up: bool
    is_cold: bool = False


MEMORY: Final = (Way("copied down", False), Way("copied back, compared", True))
DISK: Final = (
    Way("written to disk", False),
    Way("read from it, cached", True),
    Way("read from it, cold", True, is_cold=True),
)


def move(
    layout: Layout, num_blocks: int, rounds: int, folder: Path | None = None
) -> dict[Way, float]:
    """Give the bytes a second of the porter alone, each way, the sum included.

    Args:
        layout: Of the blocks.
        num_blocks: How many.
        rounds: How often; the median counts.
        folder: Of the slab; None: it is in memory.
    """
    random = np.random.default_rng(3)
    with PoolFile.create(layout, num_blocks, SIZE) as file, contextlib.ExitStack() as stack:
        size, order = num_blocks * slot_bytes(file.handle), {"pool": describe(file.handle)}
        disk = None
        if folder is None:
            slab = Slab(file.handle, size)
            stack.callback(slab.close)
            order |= slab.order()
        else:
            below = DiskFolder(folder, size + HEADS_AT)
            stack.callback(below.close)
            below.open(file.handle)
            disk = DiskSlab(below.order(), file.handle, 0)
        porter = Porter(SlabMap(order), 1, disk)
        pages = pages_of(file.map(), file.handle)
        for plane in pages:
            plane[:] = random.integers(0, 256, plane.shape, np.uint8)
        ways = MEMORY if folder is None else DISK
        took: dict[Way, list[float]] = {way: [] for way in ways}
        for number in range(rounds + 1):
            blocks = random.permutation(num_blocks).astype(np.int32)
            slots = random.permutation(num_blocks).astype(np.int32)
            before = pages[:, blocks[:PIECE]].copy()
            for way in ways:
                if way.is_cold and folder is not None:
                    _forget(folder / "slab")
                began = time.perf_counter()
                for at in range(0, num_blocks, PIECE):
                    part = slice(at, at + PIECE)
                    own, there = array("i", blocks[part]), array("i", slots[part])
                    stamps = array("q", range(at, at + len(own)))
                    tokens = bytes(len(own) * SIZE * 4)
                    haul = Haul(HaulId(1), way.is_up, own, there, stamps, tokens)
                    assert porter.carry(haul) == len(own), "a block is not what it was"
                if number:  # the first round touches the memory
                    took[way].append(time.perf_counter() - began)
            assert (pages[:, blocks[:PIECE]] == before).all()
        total = num_blocks * file.handle.block_bytes
        return {way: total / median(times) for way, times in took.items()}


def _forget(path: Path) -> None:
    """Ask the system to have nothing of a file in memory."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def ask(session: Session, pages: np.ndarray, number: int) -> tuple[float, int]:
    """Ask for a prompt, store it; give the seconds to the grant, and how many came back."""
    tokens = np.arange(TOKENS + 1, dtype=np.uint32) + number * 10_000
    began = time.perf_counter()
    with session.acquire(tokens, wait_s=30.0) as lease:
        took = time.perf_counter() - began
        held = np.uint8(number % 251)
        table, cached = lease.block_table, lease.num_cached // SIZE
        assert all((pages[:, block] == held).all() for block in table[:cached]), "a wrong byte"
        pages[:, list(table[cached : TOKENS // SIZE])] = held
        if cached < TOKENS // SIZE:
            time.sleep(COMPUTING_S)  # else computing would be the quicker way
        lease.commit(TOKENS)
        return took, lease.ledger.restored


def restore(
    layout: Layout, rounds: int, below_in: Path | None = None
) -> tuple[list[float], list[float]]:
    """Give the seconds from question to grant: of what lies below, and of what is in the pool.

    Args:
        layout: Of the blocks.
        rounds: How often each chat comes back.
        below_in: The folder of a tier on disk; None: it is in memory.
    """
    block = layout.block_bytes(SIZE)
    num_chats = 16
    below, here = [], []
    with tempfile.TemporaryDirectory() as folder:
        target = f"unix:{folder}/cache.sock"
        slots = num_chats * 2 * (TOKENS // SIZE)
        handle = PoolHandle("none", "", 1, SIZE, layout, 0, 0)
        size = slots * slot_bytes(handle)
        flags = ["--memory", str(512 * block), "--host", str(size)]
        if below_in is not None:
            flags[2:] = ["--disk", f"{size + HEADS_AT}:{below_in}"]
        command = [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target, *flags]
        command += ["--layout", str(layout), "--grace", "0", "--log-level", "error"]
        service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert service.stdout is not None
            for line in service.stdout:
                if line.startswith("listening"):
                    break
            with prefixcache.connect(target) as client, client.attach("m", layout) as session:
                memory = map_pool(session.pool)
                pages = pages_of(memory, session.pool)
                for number in range((rounds + 1) * num_chats):
                    took, restored = ask(session, pages, number % num_chats)
                    if restored > TOKENS // 2:
                        below.append(took)
                        here.append(ask(session, pages, number % num_chats)[0])
                    while client.snapshot().leaving:
                        time.sleep(0.005)
        finally:
            service.terminate()
            service.communicate()
    return below, here


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.tiers", description=__doc__
    )
    parser.add_argument("--layout", type=parse_layout, default=parse_layout("30x3x64:bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the tier on disk lies")
    parser.add_argument("--quick", action="store_true", help="few blocks, one round")
    options = parser.parse_args(argv)
    layout, rounds = options.layout, 1 if options.quick else options.rounds
    num_blocks, size = 64 if options.quick else 512, layout.block_bytes(SIZE)
    lines = [f"{layout}, {format_size(size)} a block of {SIZE} tokens"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name) / "slab"
        speeds = move(layout, num_blocks, rounds) | move(layout, num_blocks, rounds, folder)
        below, here = restore(layout, rounds)
        on_disk, _ = restore(layout, rounds, folder)
    for way, speed in speeds.items():
        lines.append(f"{way.name:<26}{speed / 1e9:6.2f} GB/s  {speed / size:,.0f} blocks a second")
    seen_at = {"in memory below": below, "on disk": on_disk, "in the pool": here}
    for name, seen in seen_at.items():
        if seen:
            lines.append(
                f"{TOKENS:,} tokens {name:<16}{1e3 * median(seen):6.1f} ms  to the grant, median "
                f"of {len(seen)}; longest {1e3 * max(seen):.1f} ms"
            )
    made = provenance()
    print("\n".join((*lines, f"{made['time']} · commit {made['commit']} · {made['machine']}")))
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
