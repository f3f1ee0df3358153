"""Scan: what the heads of a slab on disk say that lies there.

Read from front to back, once, at the start; a million heads are a hundred megabytes.  No slot is
read: whether one holds what its head says is found out when somebody asks for it.
"""

from __future__ import annotations

import os
import time
from typing import Final, NamedTuple

import numpy as np
import structlog

from prefixcache.core.found import Remains
from prefixcache.service.tiers.seals import Seals
from prefixcache.service.tiers.slab import head_type

_AT_ONCE_BYTES: Final = 8 << 20
"""Of heads that are looked at together."""
_TOLD_EVERY_S: Final = 1.0
_LAST_STAMP: Final = 1 << 62

log = structlog.get_logger(__name__)


class Scan(NamedTuple):
    """What was found."""

    remains: Remains
    """By ascending keys, so that they are taken over quickly."""
    num_damaged: int
    """Heads that are not whole: their slots hold nothing."""
    seconds: float


def scan(fd: int, at: int, block_size: int, seals: Seals, most: int) -> Scan:
    """Read the heads of a file.  O(their bytes); says how far it is once a second.

    Args:
        fd: The file.
        at: Where the first head begins.
        block_size: Tokens of a block.
        seals: Of that folder.
        most: Slots there can be: a file may say that it has any size.

    Raises:
        OSError: It cannot be read.
    """
    kind = head_type(block_size)
    began = told = time.perf_counter()
    total = min(max(0, os.fstat(fd).st_size - at) // kind.itemsize, most)
    at_once = max(1, _AT_ONCE_BYTES // kind.itemsize)
    keys, slots, stamps = [], [], []
    num_damaged = num_seen = 0
    while num_seen < total:
        raw = _read(fd, min(at_once, total - num_seen) * kind.itemsize, at)
        heads = np.frombuffer(raw[: len(raw) // kind.itemsize * kind.itemsize], kind)
        if not len(heads):
            break  # it is being cut short
        holds = seals.hold(heads)
        holds &= (heads["stamp"] >= 0) & (heads["stamp"] < _LAST_STAMP)
        num_damaged += len(heads) - int(holds.sum())
        used = np.flatnonzero(holds & (heads["stamp"] > 0))
        keys.append(heads["key"][used])
        slots.append((used + num_seen).astype(np.int32))
        stamps.append(heads["stamp"][used].astype(np.int64))
        at += heads.nbytes
        num_seen += len(heads)
        if (now := time.perf_counter()) - told > _TOLD_EVERY_S:
            told = now
            log.info("looking for blocks on disk", share=f"{num_seen / total:.0%}", slots=total)
    remains = Remains(
        np.concatenate([np.empty((0, 2), np.uint64), *keys]),
        np.concatenate([np.empty(0, np.int32), *slots]),
        np.concatenate([np.empty(0, np.int64), *stamps]),
    )
    return Scan(remains.newest(), num_damaged, time.perf_counter() - began)


def _read(fd: int, num_bytes: int, at: int) -> bytes:
    """Read so many bytes; fewer only where the file ends."""
    parts = []
    while num_bytes and (part := os.pread(fd, num_bytes, at)):
        parts.append(part)
        at += len(part)
        num_bytes -= len(part)
    return b"".join(parts)
