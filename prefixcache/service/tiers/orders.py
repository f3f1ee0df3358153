"""Orders: what the service and the porter say to each other, over a socket of theirs.

```
service   one line of JSON: where pool, slabs and heads are ────────────────────► porter
          ◄───────────────────────────────────────────────────── a report: number 0, it is ready
          haul: number | way | count | blocks | slots | stamps | keys | tokens ─►
             or number | way | count | blocks | slots | stamps | tokens ────────►
             or number | way | count | sources | slots | stamps ────────────────►
             or number | way | count | blocks | slots | names | tokens ─────────►
          ◄───────────────────── report: number | blocks that are good | what failed | seconds
```
A message is a packet (`SOCK_SEQPACKET`), so it is whole or not there.  One side's end is the
other's: no porter outlives its service.
"""

from __future__ import annotations

import struct
from array import array
from typing import Final, NamedTuple

from prefixcache.core.block_keys import KEY_BYTES
from prefixcache.core.hauls import Haul
from prefixcache.core.remote import NAME_BYTES
from prefixcache.types import BlockTable, HaulId

_HAUL: Final = struct.Struct("<qBxxxI")
_REPORT: Final = struct.Struct("<qIid")
_DOWN, _UP, _ON, _PACK, _UNPACK, _KEYED = 0, 1, 2, 3, 4, 5
"""From the pool to slots, from slots to the pool, and from slots of HOST to those of DISK; from
the pool to slots of objects, and back; and from the pool to slots with the keys of the blocks."""

READY: Final = HaulId(0)
"""The number of the report that a porter begins with."""

MOST_BYTES: Final = 1 << 20
"""Of a message: more than sixteen blocks of the largest size take."""


class Report(NamedTuple):
    """What the porter says of a haul that has ended."""

    haul: HaulId
    num_good: int
    seconds: float
    error: int = 0
    """What the disk said (`errno`), if it failed."""


def pack_haul(haul: Haul) -> bytes:
    """Write a haul.  O(its bytes)."""
    way = _ON if haul.sources else _UP if haul.is_up else _KEYED if haul.keys else _DOWN
    if haul.names:
        way = _UNPACK if haul.is_up else _PACK
    head = _HAUL.pack(haul.id, way, len(haul.slots))
    here, beside = haul.sources or haul.blocks, haul.names or haul.stamps.tobytes()
    return b"".join((head, here.tobytes(), haul.slots.tobytes(), beside, haul.keys, haul.tokens))


def read_haul(message: bytes) -> Haul:
    """Read what `pack_haul` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        number, way, count = _HAUL.unpack_from(message)
    except struct.error as error:
        raise ValueError(f"a haul of {len(message)} bytes: {error}") from None
    at = _HAUL.size
    here = array("i", message[at : at + 4 * count])
    slots = array("i", message[at + 4 * count : at + 8 * count])
    if way in (_PACK, _UNPACK):
        return _read_named(number, way == _UNPACK, here, slots, message[at + 8 * count :])
    stamps = array("q", message[at + 8 * count : at + 16 * count])
    end = at + (16 + (KEY_BYTES if way == _KEYED else 0)) * count
    keys, tokens = message[at + 16 * count : end], message[end:]
    if not len(here) == len(slots) == len(stamps) == count or not count or len(tokens) % count:
        raise ValueError(f"a haul of {count:,} blocks in {len(message)} bytes")
    if way not in (_DOWN, _UP, _ON, _KEYED) or (way == _ON) is bool(tokens):
        raise ValueError(f"a haul of {count:,} blocks the way {way}, of {len(tokens)} bytes")
    if way == _ON:
        return Haul(HaulId(number), False, array("i"), slots, stamps, b"", here)
    return Haul(HaulId(number), way == _UP, here, slots, stamps, tokens, keys=keys)


def _read_named(number: int, is_up: bool, here: BlockTable, slots: BlockTable, rest: bytes) -> Haul:
    count = len(here)
    names, tokens = rest[: NAME_BYTES * count], rest[NAME_BYTES * count :]
    if not len(slots) == count or not count or not tokens or len(tokens) % count:
        raise ValueError(f"a haul of {count:,} objects and {len(tokens)} bytes of tokens")
    return Haul(HaulId(number), is_up, here, slots, array("q"), tokens, names=names)


def pack_report(report: Report) -> bytes:
    """Write a report."""
    return _REPORT.pack(report.haul, report.num_good, report.error, report.seconds)


def read_report(message: bytes) -> Report:
    """Read what `pack_report` wrote.

    Raises:
        ValueError: it did not.
    """
    try:
        number, num_good, error, seconds = _REPORT.unpack(message)
    except struct.error as wrong:
        raise ValueError(f"a report of {len(message)} bytes: {wrong}") from None
    return Report(HaulId(number), num_good, seconds, error)
