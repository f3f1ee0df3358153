"""Lines of a file or of stdin, plain or gzip, with what could not be read."""

from __future__ import annotations

import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, cast

from prefixcache.errors import InvalidRequest
from prefixcache_bench.traces import BrokenLine

_GZIP_MAGIC = b"\x1f\x8b"
_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 1 << 18

Item = TypeVar("Item")


class Source:
    """A named stream of text lines.  A context manager; stdin stays open.

    Args:
        path: A file, or `-` for stdin.

    Raises:
        InvalidRequest: it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else _stem(path)
        self.broken: list[BrokenLine] = []
        if path == "-":
            raw = cast("io.BufferedReader", sys.stdin.buffer)
            self._owned: io.BufferedReader | None = None
        else:
            try:
                raw = self._owned = Path(path).open("rb")  # noqa: SIM115 - closed by __exit__
            except OSError as error:
                raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
        zipped = raw.peek(2)[:2] == _GZIP_MAGIC
        self._pieces = _unzipped(raw) if zipped else iter(lambda: raw.read(_PIECE), b"")
        self._head = self._read_head()

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *ending: object) -> None:
        if self._owned is not None:
            self._owned.close()

    def head(self) -> bytes:
        """Give the first bytes, without consuming them."""
        return self._head

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Give (number, line), from 1; blank ones are left out.

        A stream that breaks off is one broken line.
        """
        number = 0
        rest = self._head
        while True:
            *whole, rest = rest.split(b"\n")
            for line in whole:
                number += 1
                if line.strip():
                    yield number, line
            more = self._more(number)
            if not more:
                break
            rest += more
        if rest.strip():
            yield number + 1, rest

    def text(self) -> str:
        """Give everything as one text; bytes that are not UTF-8 are replaced."""
        parts = [self._head]
        while more := self._more(0):
            parts.append(more)
        return b"".join(parts).decode("utf-8", "replace")

    def parse(self, make: Callable[[dict[str, Any]], Item]) -> Iterator[Item]:
        """Give what `make` makes of each line's JSON object; note the lines it cannot use."""
        for number, line in self.lines():
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise ValueError(f"a JSON object is expected, not {type(fields).__name__}")
                item = make(fields)
            except KeyError as error:
                self.broken.append(BrokenLine(number, f"no field {error}"))
            except (ValueError, TypeError, OverflowError, AttributeError, IndexError) as error:
                self.broken.append(BrokenLine(number, str(error) or type(error).__name__))
            else:
                yield item

    def _read_head(self) -> bytes:
        head = b""
        while len(head) < 1 << 16 and (more := self._more(0)):
            head += more
        return head

    def _more(self, number: int) -> bytes:
        try:
            return next(self._pieces, b"")
        except (EOFError, OSError, zlib.error) as error:
            self.broken.append(BrokenLine(number + 1, f"the file breaks off: {error}"))
            self._pieces = iter(())
            return b""


def _unzipped(raw: io.BufferedReader) -> Iterator[bytes]:
    """Give a gzip stream's pieces; of one that breaks off, all that can be read.

    Raises:
        EOFError: it breaks off.
        zlib.error: it is damaged.
    """
    member = zlib.decompressobj(_GZIP)
    while packed := raw.read(_PIECE):
        while packed:
            if member.eof:
                member = zlib.decompressobj(_GZIP)
            if piece := member.decompress(packed):
                yield piece
            packed = member.unused_data
    if not member.eof:
        raise EOFError("the end of the gzip stream is missing")


def _stem(path: str) -> str:
    name = Path(path).name
    for ending in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name
