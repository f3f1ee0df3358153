"""Tiers: how fast the porter copies blocks, and what a restore takes beside a real service.

    python -m prefixcache_bench.speed.tiers [--layout 30x3x64:bfloat16] [--rounds N] [--quick]
                                            [--folder FOLDER] [--found BLOCKS] [--only PART …]
                                            [--publish]

All with blocks of 16 tokens that are scattered over pool and slab, in pieces of 16 blocks, for
memory of the host and for files in a folder (that of temporary files, if none is given):

```
bytes      the porter alone, in this process: pool to slab; and back, with the comparison; from the
           disk also once the system was asked to keep none of it in memory
restore    a service, its porter and a client: from the question to the grant for 1,000 tokens that
           lie below, and for the same tokens once they are in the pool; and the same tokens
           computed by the demo's model, in one thread
found      a service that is started on a folder with a million blocks, small ones: how long it
           looks through their heads, until it listens, and until it has brought the first chat back
hits       what others feel while chats go down and come back, and when the porter is killed
           (`beside_tiers.py`)
```
Every block that comes back is compared with what it held.  Beside figures stands what was to be
reached, and what part they are of computing.
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
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Final, NamedTuple

import numpy as np

import prefixcache
from prefixcache.cli import status
from prefixcache.client.session import Session
from prefixcache.config import format_size, parse_layout
from prefixcache.core.block_keys import BlockKeys
from prefixcache.core.hauls import Haul
from prefixcache.pool import HEADER_BYTES, PoolFile, map_pool, pages_of
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder, DiskSlab
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.seals import Seals
from prefixcache.service.tiers.slab import Slab, SlabMap, describe, head_type, slot_bytes
from prefixcache.types import HaulId, Layout, Namespace, PoolHandle
from prefixcache_bench.reports.figures import publish
from prefixcache_bench.reports.provenance import provenance
from prefixcache_bench.speed.beside_tiers import hits, killed
from prefixcache_bench.speed.computing import computing_s, part_of
from prefixcache_bench.speed.signals import ending_in_order

DOCUMENT: Final = Path("docs/tiers.md")
SIZE: Final = 16
PIECE: Final = 16
TOKENS: Final = 1008
"""Of one prompt, that are kept: 63 blocks."""
COMPUTING_S: Final = 0.5
"""How long computing them takes, as the service is made to believe."""
MEMORY_GOAL, DISK_GOAL, COLD_GOAL = 0.05, 0.05, 0.10
"""Of computing the same tokens."""
SPEED_GOALS: Final = {"copied back, compared": 1.0e9, "read from it, cached": 0.8e9}
PARTS: Final = ("bytes", "restore", "hits", "found")
HITS_GOAL, KILLED_GOAL_S, OFFERED_GOAL_S, DROPPED_GOAL = 1.2, 0.05, 3.0, 0.01


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


def prompt(number: int) -> np.ndarray:
    """Give a chat's prompt."""
    return np.arange(TOKENS + 1, dtype=np.uint32) + np.uint32(number * 10_000)


def ask(session: Session, pages: np.ndarray, number: int) -> tuple[float, int]:
    """Ask for a prompt, store it; give the seconds to the grant, and how many came back."""
    tokens = prompt(number)
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
    layout: Layout, rounds: int, below_in: Path | None = None, *, is_cold: bool = False
) -> tuple[list[float], list[float]]:
    """Give the seconds from question to grant: of what lies below, and of what is in the pool.

    Args:
        layout: Of the blocks.
        rounds: How often each chat comes back.
        below_in: The folder of a tier on disk; None: it is in memory.
        is_cold: Whether the system is asked before each question to keep none of it in memory.
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
        with (
            serving(target, *flags, "--layout", str(layout)),
            prefixcache.connect(target) as client,
            client.attach("m", layout) as session,
        ):
            memory = map_pool(session.pool)
            pages = pages_of(memory, session.pool)
            for number in range((rounds + 1) * num_chats):
                if is_cold and below_in is not None:
                    _forget(below_in / "slab")
                took, restored = ask(session, pages, number % num_chats)
                if restored > TOKENS // 2:
                    below.append(took)
                    here.append(ask(session, pages, number % num_chats)[0])
                while client.snapshot().leaving:
                    time.sleep(0.005)
    return below, here


class Start(NamedTuple):
    """What a start with blocks on disk took, in seconds."""

    num_blocks: int
    scan_s: float
    listening_s: float
    """From its first instruction on."""
    offered_s: float
    """Until somebody who asked would have got them: the porter was at work."""
    empty_s: float
    """Until it listened with an empty folder."""
    first_s: float
    """From the question for a chat of an earlier life to the grant."""


@contextlib.contextmanager
def serving(target: str, *flags: str) -> Iterator[float]:
    """Have a service; give the seconds until it listened."""
    command = [sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target, *flags]
    command += ["--grace", "0", "--log-level", "error"]
    began = time.perf_counter()
    service = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert service.stdout is not None
        for line in service.stdout:
            if line.startswith("listening"):
                break
        yield time.perf_counter() - began
    finally:
        service.terminate()
        service.communicate()


def leave(folder: Path, num_bytes: int, handle: PoolHandle) -> int:
    """Leave chats in a folder, as a service would that has ended; give how many blocks.

    Their pages are zeros, which take no room on the disk.
    """
    below = DiskFolder(folder, num_bytes)
    below.open(handle)
    each = TOKENS // SIZE
    num_chats = below.num_slots // each
    keys = BlockKeys(below.key_secret, SIZE, below.resets)
    start = keys.start(Namespace("m"))
    zeros = PoolHandle("none", "", 1, SIZE, handle.layout, 0, 0)
    sums = Checksums(bytearray(HEADER_BYTES + zeros.block_bytes), zeros, below.seed)
    heads = np.zeros(num_chats * each, head_type(SIZE))
    for number in range(num_chats):
        tokens = prompt(number)[:TOKENS].reshape(each, SIZE)
        own = heads[number * each : (number + 1) * each]
        own["key"] = keys.go_on(start, 0, tokens.tobytes())
        own["tokens"] = tokens
        own["sum"] = sums.of_contents(np.zeros(each, np.uint32), tokens)
    heads["stamp"] = np.arange(len(heads), 0, -1)
    Seals(below.seed, SIZE).put(heads)
    below.close()
    with (folder / "heads").open("r+b") as file:
        file.seek(HEADS_AT)
        heads.tofile(file)
    return len(heads)


def start(num_blocks: int, folder: Path) -> Start:
    """Start a service on an empty folder, and on one with so many blocks, killed before.

    Args:
        num_blocks: About how many.
        folder: Where the folders are made.
    """
    layout = parse_layout("1x1x4:float32")
    handle = PoolHandle("none", "", 1, SIZE, layout, 0, 0)
    num_bytes = num_blocks * slot_bytes(handle) + HEADS_AT
    flags = ("--memory", str(512 * handle.block_bytes), "--layout", str(layout))
    with tempfile.TemporaryDirectory() as sockets:
        target = f"unix:{sockets}/cache.sock"
        with serving(target, *flags, "--disk", f"{num_bytes}:{folder / 'empty'}") as empty_s:
            pass
        count = leave(folder / "full", num_bytes, handle)
        own = (*flags, "--disk", f"{num_bytes}:{folder / 'full'}")
        started = time.perf_counter()
        with serving(target, *own) as listening_s, prefixcache.connect(target) as client:
            while not client.explain(Namespace("m"), prompt(1)).below:
                time.sleep(0.005)  # the porter is not at work yet
            offered_s = time.perf_counter() - started
            told = status.read(client).info.disk
            assert told.found_blocks == count, f"{told.found_blocks} of {count} blocks found"
            with client.attach("m", layout) as session:
                began = time.perf_counter()
                with session.acquire(prompt(1), wait_s=30.0) as lease:
                    first_s = time.perf_counter() - began
                    assert lease.ledger.restored == TOKENS, f"restored: {lease.ledger}"
    return Start(count, told.scan_s, listening_s, offered_s, empty_s, first_s)


def told_of_bytes(layout: Layout, num_blocks: int, rounds: int, folder: Path) -> list[str]:
    """Measure the porter alone, and write it for people."""
    size = layout.block_bytes(SIZE)
    speeds = move(layout, num_blocks, rounds) | move(layout, num_blocks, rounds, folder / "slab")
    lines = []
    for way, speed in speeds.items():
        told = f"{way.name:<26}{speed / 1e9:6.2f} GB/s  {speed / size:,.0f} blocks a second"
        goal = SPEED_GOALS.get(way.name)
        lines.append(told + (f"; goal {goal / 1e9:.1f} GB/s" if goal else ""))
    return lines


def told_of_restores(layout: Layout, rounds: int, folder: Path) -> list[str]:
    """Measure what comes back, beside computing it, and write it for people."""
    below, here = restore(layout, rounds)
    on_disk, _ = restore(layout, rounds, folder / "restored")
    cold, _ = restore(layout, rounds, folder / "cold", is_cold=True)
    computed_s = computing_s(layout, TOKENS, SIZE, rounds)
    lines = []
    for what, seen, part in (
        ("in memory below", below, MEMORY_GOAL),
        ("on disk, cached", on_disk, DISK_GOAL),
        ("on disk, cold", cold, COLD_GOAL),
        ("in the pool", here, None),
    ):
        if seen:
            told = part_of(median(seen), computed_s, part) if part is not None else ""
            lines.append(
                f"{TOKENS:,} tokens {what:<16}{1e3 * median(seen):6.1f} ms  to the grant, median "
                f"of {len(seen)}; longest {1e3 * max(seen):.1f} ms{told}"
            )
    if computed_s is not None:
        lines.append(f"{TOKENS:,} tokens computed {1e3 * computed_s:14.1f} ms  in one thread")
    return lines


def told_of_hits(layout: Layout, count: int) -> list[str]:
    """Measure what others feel, and write it for people."""
    own, ended = hits(layout, count), killed(layout, 3)
    lines = [
        f"hits alone {1e3 * own.alone_s:25.2f} ms  99 % of {count:,} acquires",
        f"hits beside working tiers {1e3 * own.beside_s:10.2f} ms  {own.blocks_per_s:,.0f} "
        f"blocks a second moved; {own.beside_s / own.alone_s:.2f} times, goal {HITS_GOAL}",
        f"the same without tiers {1e3 * own.without_s:13.2f} ms  as many requests of others, and "
        f"who copies memory for {own.share:.0%} of a processor, as the porter did; "
        f"{own.without_s / own.alone_s:.2f} times",
        f"evicted, not copied {100 * own.dropped:16.2f} %  where half as many come back; goal "
        f"{DROPPED_GOAL:.0%}",
    ]
    if ended:
        lines.append(
            f"the porter killed {1e3 * max(ended):18.1f} ms  until who waited was served, "
            f"longest of {len(ended)}; goal {1e3 * KILLED_GOAL_S:.0f} ms"
        )
    return lines


def told_of_start(num_blocks: int, folder: Path) -> list[str]:
    """Measure a start with blocks on disk, and write it for people."""
    again = start(num_blocks, folder)
    return [
        f"{again.num_blocks:,} blocks of before{again.scan_s:7.2f} s  to look through their heads",
        f"a start with them {again.listening_s:14.2f} s  to listening; without {again.empty_s:.2f}",
        f"offered again {again.offered_s:20.2f} s  after its first instruction; goal "
        f"{OFFERED_GOAL_S:g} s",
        f"{TOKENS:,} tokens of them{1e3 * again.first_s:11.1f} ms  to the grant",
    ]


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        prog="python -m prefixcache_bench.speed.tiers", description=__doc__
    )
    parser.add_argument("--layout", type=parse_layout, default=parse_layout("30x3x64:bfloat16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where the tier on disk lies")
    parser.add_argument("--quick", action="store_true", help="few blocks, one round")
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART")
    parser.add_argument("--found", type=int, default=1_000_000, help="blocks before a start")
    parser.add_argument("--hits", type=int, help="acquires beside working tiers; 0: none")
    parser.add_argument("--publish", action="store_true", help=f"put the figures into {DOCUMENT}")
    options = parser.parse_args(argv)
    layout, rounds = options.layout, 1 if options.quick else options.rounds
    num_blocks = 64 if options.quick else 512
    num_hits = options.hits if options.hits is not None else 300 if options.quick else 2_000
    size = format_size(layout.block_bytes(SIZE))
    lines = [f"{layout}, {size} a block of {SIZE} tokens"]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        measured: dict[str, Callable[[], list[str]]] = {
            "bytes": lambda: told_of_bytes(layout, num_blocks, rounds, folder),
            "restore": lambda: told_of_restores(layout, rounds, folder),
            "hits": lambda: told_of_hits(layout, num_hits) if num_hits else [],
            "found": lambda: told_of_start(options.found, folder),
        }
        for part in PARTS:
            if part in options.only:
                lines += measured[part]()
    made = provenance()
    print("\n".join((*lines, f"{made['time']} · commit {made['commit']} · {made['machine']}")))
    if options.publish:
        words = [
            "$ python -m prefixcache_bench.speed.tiers",
            *(["--quick"] if options.quick else []),
        ]
        publish(DOCUMENT, "tiers", "\n".join([" ".join(words), *lines]))
    return 0


if __name__ == "__main__":
    with ending_in_order():
        sys.exit(main())
