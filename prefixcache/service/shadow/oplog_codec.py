"""A piece of the log of operations as bytes: columns, so that neither side loops over fields.

```
t f64 · records u32 · payload u64 · names u32 │ names, JSON │ kinds u8 │ leases i64 │ numbers i64 │
lengths u32 │ namespaces i32 │ payload: all data, one after the other
```
It goes from one process to its own child through a pipe, nowhere else.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Sequence
from typing import IO, Final, NamedTuple

from prefixcache.core.oplog import Entry
from prefixcache.plain_json import json_text
from prefixcache.types import Namespace

CUT: Final = 255
"""A kind beside those of `core.oplog`: something was left out here; all leases end."""

_HEADER = struct.Struct("<dIQI")


class Chunk(NamedTuple):
    """Some entries of the log, by column."""

    now: float
    namespaces: list[Namespace]
    """Those that are meant in it, by number."""
    kinds: bytes
    leases: Sequence[int]
    numbers: Sequence[int]
    lengths: Sequence[int]
    spaces: Sequence[int]
    """Numbers of namespaces; -1: none."""
    payload: bytes


def write_chunk(now: float, entries: list[Entry]) -> list[bytes]:
    """Make a chunk, as pieces that follow each other: prompts are not copied.  O(entries).

    Each names its namespaces anew: with a salt for each user, what was named once is not kept.
    """
    spaces: dict[Namespace | None, int] = {None: -1}
    names: list[list[str]] = []
    for space in {entry[4] for entry in entries}:
        if space is not None:
            spaces[space] = len(names)
            names.append([space.model, space.adapter, space.tenant, space.salt])
    named = json_text(names).encode()
    payload = [entry[3] for entry in entries if entry[3]]
    head = b"".join(
        (
            _HEADER.pack(now, len(entries), sum(map(len, payload)), len(named)),
            named,
            bytes([entry[0] for entry in entries]),
            array("q", [entry[1] for entry in entries]).tobytes(),
            array("q", [entry[2] for entry in entries]).tobytes(),
            array("I", [len(entry[3]) for entry in entries]).tobytes(),
            array("i", [spaces[entry[4]] for entry in entries]).tobytes(),
        )
    )
    return [head, *payload]


def read_chunk(stream: IO[bytes]) -> Chunk | None:
    """Read the next chunk; None at the end, also if that is in the middle of one."""
    head = stream.read(_HEADER.size)
    if len(head) < _HEADER.size:
        return None
    now, count, size, named = _HEADER.unpack(head)
    body = stream.read(named + count * 25 + size)
    if len(body) < named + count * 25 + size:
        return None
    at = named
    columns = []
    for code, width in (("B", 1), ("q", 8), ("q", 8), ("I", 4), ("i", 4)):
        columns.append(array(code, body[at : at + width * count]))
        at += width * count
    kinds, leases, numbers, lengths, spaces = columns
    return Chunk(
        now,
        [Namespace(*fields) for fields in json.loads(body[:named])],
        kinds.tobytes(),
        leases,
        numbers,
        lengths,
        spaces,
        body[at:],
    )
