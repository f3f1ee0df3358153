"""Orders: what the service and the porter say to each other, over a socket of theirs.

```
service   one line of JSON: where pool, slab and heads are ─────────────────────► porter
          ◄───────────────────────────────────────────────────── a report: number 0, it is ready
          haul: number | way | count | blocks | slots | stamps | tokens ────────►
          ◄────────────────────────────────── report: number | blocks that are good | seconds
```
A message is a packet (`SOCK_SEQPACKET`), so it is whole or not there.  One side's end is the
other's: no porter outlives its service.
"""

from __future__ import annotations

import struct
from array import array
from typing import Final, NamedTuple

from prefixcache.core.hauls import Haul
from prefixcache.types import HaulId

_HAUL: Final = struct.Struct("<q?xxxI")
_REPORT: Final = struct.Struct("<qId")

READY: Final = HaulId(0)
"""The number of the report that a porter begins with."""

MOST_BYTES: Final = 1 << 20
"""Of a message: more than sixteen blocks of the largest size take."""


class Report(NamedTuple):
    """What the porter says of a haul that has ended."""

    haul: HaulId
    num_good: int
    seconds: float


def pack_haul(haul: Haul) -> bytes:
    """Write a haul.  O(its bytes)."""
    head = _HAUL.pack(haul.id, haul.is_up, len(haul.slots))
    return b"".join(
        (head, haul.blocks.tobytes(), haul.slots.tobytes(), haul.stamps.tobytes(), haul.tokens)
    )


def read_haul(message: bytes) -> Haul:
    """Read what `pack_haul` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        number, is_up, count = _HAUL.unpack_from(message)
    except struct.error as error:
        raise ValueError(f"a haul of {len(message)} bytes: {error}") from None
    at = _HAUL.size
    blocks = array("i", message[at : at + 4 * count])
    slots = array("i", message[at + 4 * count : at + 8 * count])
    stamps = array("q", message[at + 8 * count : at + 16 * count])
    tokens = message[at + 16 * count :]
    if not len(blocks) == len(slots) == len(stamps) == count or not count or len(tokens) % count:
        raise ValueError(f"a haul of {count:,} blocks in {len(message)} bytes")
    return Haul(HaulId(number), is_up, blocks, slots, stamps, tokens)


def pack_report(report: Report) -> bytes:
    """Write a report."""
    return _REPORT.pack(*report)


def read_report(message: bytes) -> Report:
    """Read what `pack_report` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        number, num_good, seconds = _REPORT.unpack(message)
    except struct.error as error:
        raise ValueError(f"a report of {len(message)} bytes: {error}") from None
    return Report(HaulId(number), num_good, seconds)
