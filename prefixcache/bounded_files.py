"""Files that are read whole, up to a bound: a name may be that of a device that never ends."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

from prefixcache.errors import InvalidRequest


def read_file(path: str | Path, most: int) -> bytes:
    """Read a file of at most `most` bytes.

    Raises:
        InvalidRequest: it cannot be opened or read, or has more.

    >>> read_file("/dev/zero", 1 << 20)
    Traceback (most recent call last):
    prefixcache.errors.InvalidRequest: /dev/zero has more than 1,048,576 bytes
    """
    try:
        with Path(path).open("rb") as file:
            return read_stream(file, most, str(path))
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        raise InvalidRequest(f"cannot read {str(path)!a}: no file can have that name") from None


def read_stream(file: BinaryIO, most: int, name: str) -> bytes:
    """Read all that is left of a stream, at most `most` bytes; `name` is for the message.

    Raises:
        InvalidRequest: it has more.
        OSError: it cannot be read.
    """
    read = file.read(most + 1)
    if len(read) > most:
        raise InvalidRequest(f"{name} has more than {most:,} bytes")
    return read
