"""Bytes that are no message: told to their sender as bad input, not a failure of the server.

A part (a field of a message, or of one inside it) may be two bytes on the wire, and takes a hundred
once it is read.  So the parts of a message are counted before it is, if so many could be in it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Final

from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError

SMALL_BYTES: Final = 1 << 16
"""Up to here a message is read without counting its parts: whatever they are, they are few."""
_MOST_PARTS: Final = 2048
"""Of a message beside its ops: an attach that speaks for a thousand lost workers has most."""
_PARTS_OF_OP: Final = 16
"""An op, its fields, and those of what they hold: no verb has more."""
_BYTES_OF_PART: Final = 2
"""A part has a tag, and a value or its length."""


class BadRequest(str):
    """Stands in place of a message that could not be read; says why."""

    __slots__ = ()


def reader(message_class: Any, max_ops: int = 0) -> Callable[[bytes], Any]:
    """Give a function that reads messages of a class, or gives `BadRequest`.

    Args:
        message_class: Its messages.
        max_ops: How many ops one of them may have; 0: it is no batch.
    """
    most_parts = _MOST_PARTS + _PARTS_OF_OP * max_ops
    uncounted = max(SMALL_BYTES, most_parts * _BYTES_OF_PART)
    less = "ops at a time (--max-ops)" if max_ops else "of them"
    parse = message_class.FromString
    descriptor = message_class.DESCRIPTOR
    name = descriptor.name

    def read(data: bytes) -> Any:
        try:
            if len(data) > uncounted and count_parts(data, descriptor, most_parts) > most_parts:
                return BadRequest(
                    f"{len(data):,} bytes of {name} with more than {most_parts:,} fields: send "
                    f"fewer {less}"
                )
            return parse(data)
        except DecodeError as error:
            return BadRequest(f"{len(data):,} bytes that are no {name}: {error}")

    return read


def count_parts(data: bytes, descriptor: Descriptor, most: int) -> int:
    """Count the fields of a message and of those inside it, up to one more than `most`.  O(most).

    Raises:
        DecodeError: it is no message that any client of ours sends.
    """
    at, count = 0, 0
    open_messages = [(len(data), _inner(descriptor))]
    try:
        while open_messages and count <= most:
            end, inner = open_messages[-1]
            if at >= end:
                open_messages.pop()
                continue
            count += 1
            if (tag := data[at]) < 128:  # nearly all
                at += 1
            else:
                tag, at = _varint(data, at)
            match tag & 7:
                case 0:
                    _, at = _varint(data, at)
                case 1:  # a double
                    at += 8
                case 5:  # a float
                    at += 4
                case 2:  # bytes, a text or a message
                    if (size := data[at]) < 128:
                        at += 1
                    else:
                        size, at = _varint(data, at)
                    if (message := inner.get(tag >> 3)) is not None:
                        open_messages.append((at + size, _inner(message)))
                    else:
                        at += size
                case _:
                    raise DecodeError("it has groups")
            if at > end or open_messages[-1][0] > end:
                raise DecodeError("a field is longer than its message")
    except IndexError:
        raise DecodeError("it ends in the middle of a field") from None
    return count


@cache
def _inner(descriptor: Descriptor) -> dict[int, Descriptor]:
    return {one.number: one.message_type for one in descriptor.fields if one.message_type}


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read a number of up to 64 bits; give it, and where it ends."""
    number = shift = 0
    while shift < 70:
        byte = data[at]
        at += 1
        number |= (byte & 127) << shift
        if byte < 128:
            return number, at
        shift += 7
    raise DecodeError("a number has more than 64 bits")
