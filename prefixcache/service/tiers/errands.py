"""Errands: what the service and a carrier say to each other, over three sockets of theirs.

```
service   one line of JSON: where slots and store are, on the first socket ─────────► carrier
          ◄──────────────────────────── an answer: number 0, it is ready
ask       number │ first │ what the names begin with │ tokens of the whole prefix ────►
          ◄──────── a byte for each block, 0: not there │ the names of all of them
get       number │ slots │ names ────►            ◄──── a byte for each block, 0: failed, 2: wrong
put       number │ slots │ names ────►            ◄──────── a byte for each block, 0: failed
remove    number │ names ────►                    ◄──────── nothing
          ◄──────── instead: what failed, as text
```
Each socket is for one kind of errand, and somebody of his own at the other end: what is asked waits
for nothing that is fetched, and neither for what is stored.
"""

from __future__ import annotations

import struct
from array import array
from enum import IntEnum
from typing import Final, NamedTuple

from prefixcache.core.remote import NAME_BYTES
from prefixcache.types import BlockTable

_ERRAND: Final = struct.Struct("<QqII")
_ANSWER: Final = struct.Struct("<QqIdB")
_LENGTH_BYTES: Final = 8
MOST_BYTES: Final = 1 << 30
"""Of an errand or an answer; no prompt is so long."""


class Kind(IntEnum):
    """Which socket an errand takes."""

    ASK = 0
    GET = 1
    PUT = 2


READY: Final = 0
"""The number of the answer that a carrier begins with."""


class Errand(NamedTuple):
    """What a carrier is to do."""

    number: int
    first: int
    """Of the blocks of a prefix, how many are not asked for."""
    slots: BlockTable
    """None, if it is asked, or removes."""
    text: bytes
    """The base and the tokens of what is asked; else names of objects."""


class Answer(NamedTuple):
    """What has become of an errand."""

    number: int
    seconds: float
    each: bytes = b""
    """A byte for each block: 0 is not there, or failed; 2: what is there cannot be it."""
    names: bytes = b""
    error: str = ""
    """What failed, if all did."""


def pack_errand(errand: Errand) -> bytes:
    """Write an errand.  O(its bytes)."""
    count, slots = len(errand.slots), errand.slots.tobytes()
    size = _ERRAND.size + len(slots) + len(errand.text)
    head = _ERRAND.pack(size - _LENGTH_BYTES, errand.number, errand.first, count)
    return b"".join((head, slots, errand.text))


def read_errand(frame: bytes) -> Errand:
    """Read what `pack_errand` wrote, behind its length.

    Raises:
        ValueError: it did not.
    """
    try:
        number, first, count = struct.unpack_from("<qII", frame)
    except struct.error as error:
        raise ValueError(f"an errand of {len(frame)} bytes: {error}") from None
    at = _ERRAND.size - _LENGTH_BYTES
    slots, text = array("i", frame[at : at + 4 * count]), frame[at + 4 * count :]
    if len(slots) != count or (count and len(text) != count * NAME_BYTES):
        raise ValueError(f"an errand for {count:,} slots with {len(text):,} bytes of names")
    return Errand(number, first, slots, text)


def pack_answer(answer: Answer) -> bytes:
    """Write an answer.  O(its bytes)."""
    body = answer.error.encode() if answer.error else answer.each + answer.names
    size = _ANSWER.size + len(body)
    return (
        _ANSWER.pack(
            size - _LENGTH_BYTES,
            answer.number,
            len(answer.each),
            answer.seconds,
            bool(answer.error),
        )
        + body
    )


def read_answer(frame: bytes) -> Answer:
    """Read what `pack_answer` wrote, behind its length.

    Raises:
        ValueError: it did not.
    """
    try:
        number, count, seconds, has_failed = struct.unpack_from("<qIdB", frame)
    except struct.error as error:
        raise ValueError(f"an answer of {len(frame)} bytes: {error}") from None
    body = frame[_ANSWER.size - _LENGTH_BYTES :]
    if has_failed:
        return Answer(number, seconds, error=body.decode(errors="replace") or "it says not why")
    each, names = body[:count], body[count:]
    if len(each) != count or len(names) not in (0, count * NAME_BYTES):
        raise ValueError(f"an answer for {count:,} blocks in {len(frame):,} bytes")
    return Answer(number, seconds, each, names)


def length_of(head: bytes) -> int:
    """Read how long the frame is that follows.

    Raises:
        ValueError: longer than any may be.
    """
    size = int.from_bytes(head, "little")
    if size > MOST_BYTES:
        raise ValueError(f"a frame of {size:,} bytes")
    return size


HEAD_BYTES: Final = _LENGTH_BYTES
