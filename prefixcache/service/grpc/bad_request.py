"""Bytes that are no message: told to their sender as bad input, not a failure of the server."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from google.protobuf.message import DecodeError


class BadRequest(str):
    """Stands in place of a message that could not be read; says why."""

    __slots__ = ()


def reader(message_class: Any) -> Callable[[bytes], Any]:
    """Give a function that reads messages of a class, or gives `BadRequest`."""
    parse = message_class.FromString
    name = message_class.DESCRIPTOR.name

    def read(data: bytes) -> Any:
        try:
            return parse(data)
        except DecodeError as error:
            return BadRequest(f"{len(data):,} bytes that are no {name}: {error}")

    return read
