"""Lines of a file or of stdin, plain or gzip, with what could not be read.

A trace is somebody else's file: every line has a bound (`LONGEST_LINE`), so has what a small file
may grow to in memory (`MOST_LINES`, `MOST_TOKENS`, `MOST_UNZIPPED`), and a line that cannot be used
costs that line alone.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import TwiceNamed, once_each
from prefixcache.prompts.logged_request import plain_name
from prefixcache.types import TOKEN_BYTES, pack
from prefixcache_bench.experiments.traces import BrokenLine, Request

LONGEST_LINE = 32 * 2**20
"""Bytes.  A longer line is left out; a prompt of a million token ids has a quarter of that."""
ENDLESS = 2**30
"""Bytes without the end of a line after which nothing more is read."""
MOST_UNZIPPED = 16 * 2**30
"""Bytes that a gzip file may unpack to; what comes after them is not read."""
MOST_TEXT = 2**30
"""Bytes of a file that is one JSON array, which is held as a whole."""
MOST_LINES = 10_000_000
MOST_TOKENS = 2**30
"""Of all requests together: 4 GiB of token ids."""

_BOM = b"\xef\xbb\xbf"
_NO_TEXT = re.compile("[\udc80-\udcff]")
"""What `surrogateescape` makes of a byte that is no part of a character."""
_OTHER_ENCODINGS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
_GZIP_MAGIC = b"\x1f\x8b"
_PACKED = {
    _GZIP_MAGIC: "gzip within gzip: unpack it once, gunzip",
    b"\x28\xb5\x2f\xfd": "packed with zstd: unpack it, zstd -d",
    b"\xfd7zXZ\x00": "packed with xz: unpack it, unxz",
    b"BZh": "packed with bzip2: unpack it, bunzip2",
    b"PK\x03\x04": "a zip archive: unpack it, unzip",
    b"PAR1": "Parquet: write its rows as a JSON object a line, with to_json(lines=True)",
    b"ARROW1": "Arrow: write its rows as a JSON object a line, with to_json(lines=True)",
    b"SQLite format 3\x00": "a SQLite database: write its rows as a JSON object a line",
}
_GZIP = 16 + zlib.MAX_WBITS
_PIECE = 1 << 18
_LONGEST_REASON = 200
_LATEST = 1e12
"""Seconds, before or after zero: 30,000 years."""
_OUR_DAYS = (6e8, 4.1e9)
"""Seconds: from 1989 to 2099."""
_LARGEST = 2**40
_MOST_NAMES = 8
OTHER_TIMES = frozenset(["ts", "time", "date", "created_at", "start_time"])
"""What may say when a request came, in units that nobody tells; not read."""

Item = TypeVar("Item")


class Source:
    """A named stream of text lines.  A context manager; stdin stays open.

    A byte order mark is stripped.

    Args:
        path: A file, or `-` for stdin.

    Raises:
        InvalidRequest: it cannot be opened or read, or it is UTF-16 or UTF-32, or packed otherwise.
    """

    def __init__(self, path: str) -> None:
        self.name = "stdin" if path == "-" else _stem(path)
        self.broken: list[BrokenLine] = []
        self.num_lines = 0
        """Lines, or records, so far; blank ones do not count."""
        self.number = 0
        """Of the line, or record, that is being read."""
        self._is_last = False
        """Whether what is read is the last line, and has no end."""
        self._unread: dict[str, None] = {}
        self._with_unread = 0
        self._tokens = 0
        if path == "-":
            raw = cast("io.BufferedReader", sys.stdin.buffer)
            self._owned: io.BufferedReader | None = None
        else:
            try:
                raw = self._owned = Path(path).open("rb")  # noqa: SIM115 - closed by __exit__
            except OSError as error:
                raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
        try:
            zipped = raw.peek(2)[:2] == _GZIP_MAGIC
            self._pieces = _unzipped(raw) if zipped else iter(lambda: raw.read(_PIECE), b"")
            self._head = self._read_head().removeprefix(_BOM)
            _refuse_other_encodings(path, self._head)
            _refuse_other_packing(path, self._head)
        except OSError as error:
            self.__exit__()
            raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *ending: object) -> None:
        if self._owned is not None:
            self._owned.close()

    def head(self) -> bytes:
        """Give the first bytes, without consuming them and without a byte order mark."""
        return self._head

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Give (number, line), from 1; blank ones are left out, and so are too long ones.

        A stream that breaks off is one broken line.

        Raises:
            InvalidRequest: there are more than `MOST_LINES`.
        """
        number, size = 0, 0
        parts: list[bytes] = []
        piece = self._head
        while piece:
            *ends, rest = piece.split(b"\n")
            for end in ends:
                number += 1
                if size + len(end) > LONGEST_LINE:
                    self._leave_out(number, size + len(end))
                elif (line := b"".join([*parts, end])).strip():
                    self._count()
                    yield number, line
                size = 0
                parts.clear()
            size += len(rest)
            parts.append(rest)
            if size > LONGEST_LINE:
                parts.clear()
            if size > ENDLESS:
                reason = f"it does not end within {ENDLESS:,} bytes; the rest is not read"
                self.note(number + 1, reason, is_end=True)
                self.num_lines += 1
                return
            piece = self._more(number)
        if size > LONGEST_LINE:
            self._leave_out(number + 1, size)
        elif (line := b"".join(parts)).strip():
            self._count()
            self._is_last = True
            yield number + 1, line

    def text(self) -> str:
        """Give everything as one text; bytes that are not UTF-8 become halves of characters.

        Raises:
            InvalidRequest: it has more than `MOST_TEXT` bytes.
        """
        parts, size = [self._head], len(self._head)
        while more := self._more(0):
            size += len(more)
            if size > MOST_TEXT:
                raise InvalidRequest(
                    f"{self.name} is one JSON array of more than {MOST_TEXT:,} bytes; write one "
                    "object a line instead"
                )
            parts.append(more)
        return b"".join(parts).decode("utf-8", "surrogateescape")

    def parse(self, make: Callable[[Any], Item], *, lists: bool = False) -> Iterator[Item]:
        """Give what `make` makes of each line's JSON object; note the lines it cannot use.

        Args:
            make: Makes it.
            lists: Whether it also takes a line that is a JSON list.

        Raises:
            InvalidRequest: the requests have more than `MOST_TOKENS` tokens in all.
        """
        for number, line in self.lines():
            self.number = number
            try:
                item = make(_record(json.loads(line, object_pairs_hook=once_each), lists))
            except UNREADABLE as error:
                is_cut = self._is_last and _breaks_off(line, error)
                reason = f"the file breaks off in it: {error}" if is_cut else reason_of(error)
                self.note(number, reason, is_end=is_cut)
            else:
                for one in item if isinstance(item, list) else (item,):
                    if isinstance(one, Request):
                        self.spend(len(one.tokens) // TOKEN_BYTES)
                yield item

    def parse_array(self, make: Callable[[Any], Item], *, lists: bool = False) -> Iterator[Item]:
        """Do the same with the objects of one JSON array, also of one that breaks off.

        What follows the array is one broken record.

        Raises:
            InvalidRequest: as for `parse` and `text`.
        """
        text = self.text()
        decoder = json.JSONDecoder(object_pairs_hook=once_each)
        at, number, size = text.index("[") + 1, 0, len(text)
        while True:
            while at < size and text[at] in " \n\r\t,":
                at += 1
            number += 1
            if at < size and text[at] == "]":
                if text[at + 1 :].strip():
                    self._count()
                    reason = "the array has ended before it, and what follows is not read"
                    self.note(number, reason, "record", is_end=True)
                return
            self.number = number
            self._count()
            began = at
            try:
                record, at = decoder.raw_decode(text, at)
            except TwiceNamed as error:
                self.note(number, str(error), "record")
                _, at = json.JSONDecoder().raw_decode(text, at)
                continue
            except (ValueError, RecursionError) as error:
                reason = f"the file breaks off in it: {reason_of(error)}"
                self.note(number, reason, "record", is_end=True)
                return
            try:
                if _NO_TEXT.search(text, began, at):
                    raise ValueError("it holds bytes that are not UTF-8")
                item = make(_record(record, lists))
            except UNREADABLE as error:
                self.note(number, reason_of(error), "record")
            else:
                yield item

    def spend(self, num_tokens: int) -> None:
        """Count tokens that will stay in memory.

        Raises:
            InvalidRequest: they are more than `MOST_TOKENS` in all.
        """
        self._tokens += num_tokens
        if self._tokens > MOST_TOKENS:
            raise InvalidRequest(
                f"{self.name} has more than {MOST_TOKENS:,} tokens in its requests, which do not "
                "fit into memory; take a part of it"
            )

    def _count(self) -> None:
        self.num_lines += 1
        if self.num_lines > MOST_LINES:
            raise InvalidRequest(
                f"{self.name} has more than {MOST_LINES:,} lines; take a part of it with head"
            )

    def _leave_out(self, number: int, size: int) -> None:
        self._count()
        self.note(number, f"it has {size:,} bytes; a line has at most {LONGEST_LINE:,}")

    def note(self, number: int, reason: str, unit: str = "line", *, is_end: bool = False) -> None:
        """Note a line that is left out; `is_end`: with whatever is behind it."""
        if len(reason) > _LONGEST_REASON:
            reason = reason[:_LONGEST_REASON] + " ..."
        self.broken.append(BrokenLine(number, reason, unit, is_end))

    def leave_unread(self, names: Iterable[str]) -> None:
        """Count a line that has fields of these names, which nobody reads, if there are any."""
        found = sorted(map(plain_name, names))
        self._with_unread += bool(found)
        if len(self._unread) <= _MOST_NAMES:
            self._unread |= dict.fromkeys(found)

    def unread(self) -> list[str]:
        """Say which fields nobody has read, as notes of the trace."""
        if not self._unread:
            return []
        names = list(self._unread)[:_MOST_NAMES] + ["..."] * (len(self._unread) > _MOST_NAMES)
        return [
            f"{self._with_unread:,} of {self.num_lines:,} lines have fields that are not read, and "
            f"may decide what is shared: {', '.join(names)}"
        ]

    def _read_head(self) -> bytes:
        head = b""
        while len(head) < 1 << 16 and (more := self._more(0)):
            head += more
        return head

    def _more(self, number: int) -> bytes:
        try:
            return next(self._pieces, b"")
        except (EOFError, OSError, zlib.error) as error:
            self.note(number + 1, f"the file breaks off: {error}", is_end=True)
            self.num_lines += 1
            self._pieces = iter(())
            return b""


UNREADABLE = (
    *(ValueError, TypeError, OverflowError, AttributeError, LookupError),
    *(RecursionError, MemoryError),
)
"""What a line that is not as it should be may raise."""


def _breaks_off(line: bytes, error: BaseException) -> bool:
    """Whether a line is the beginning of what would have been JSON."""
    if isinstance(error, UnicodeDecodeError):
        return error.end >= len(line)
    if not isinstance(error, json.JSONDecodeError) or not line.lstrip().startswith((b"{", b"[")):
        return False
    return error.pos >= len(error.doc.rstrip()) or error.msg.startswith("Unterminated string")


def packed_ids(value: Any) -> bytes:
    """Pack the token ids of a line.

    Raises:
        ValueError: they are none.
    """
    try:
        return pack(value)
    except InvalidRequest as error:
        raise ValueError(str(error)) from None


def reason_of(error: BaseException) -> str:
    """Say why a line could not be read."""
    if isinstance(error, RecursionError):
        return "it is nested too deeply"
    if isinstance(error, KeyError):
        return f"no field {error}"
    return str(error) or type(error).__name__


def given(fields: dict[str, Any], *names: str) -> Any:
    """Give the first of these fields that is there; null and an empty text are as good as absent.

    >>> given({"id": None, "key": 7}, "id", "key")
    7
    """
    for name in names:
        value = fields.get(name)
        if value is not None and value != "":
            return value
    return None


def seconds(fields: dict[str, Any], *names: str, scale: float = 1.0) -> float | None:
    """Give a time of a line in seconds; None if it has none.

    A text is a date as ISO 8601 has it, in UTC if it names no zone; else a number.

    Raises:
        ValueError: it is neither that nor a finite number.

    >>> seconds({"timestamp": 1500}, "t", "timestamp", scale=1e-3)
    1.5
    """
    for name in names:
        value = given(fields, name)
        if value is None:
            continue
        if isinstance(value, str):
            try:
                date = datetime.fromisoformat(value.strip().removesuffix("UTC").rstrip())
                return (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()
            except ValueError:
                value = _number(name, value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name} is {value!r}, not a number")
        if not math.isfinite(value) or abs(value) * scale > _LATEST:
            raise ValueError(f"{name} is {value}, which is no time{_meant(value)}")
        return value * scale
    return None


def _number(name: str, text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{name} is {text[:60]!a}, neither a date nor a number") from None


def _meant(value: float) -> str:
    """Say which unit makes a date of our days of a number that is none in seconds."""
    for unit, scale in (("ms", 1e-3), ("µs", 1e-6), ("ns", 1e-9)):
        if _OUR_DAYS[0] < value * scale < _OUR_DAYS[1]:
            day = datetime.fromtimestamp(value * scale, UTC).date()
            return f"; in {unit} it were of {day}: write seconds"
    return ""


def count(fields: dict[str, Any], name: str) -> int:
    """Give a whole number of a line, from 0 on.

    Raises:
        KeyError: it has none.
        ValueError: it is not one.
    """
    value = given(fields, name)
    if value is None:
        raise KeyError(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value // 1:
        raise ValueError(f"{name} is {value!r}, not a whole number")
    if not 0 <= value <= _LARGEST:
        raise ValueError(f"{name} is {value}; it is 0 to {_LARGEST}")
    return int(value)


def _record(value: Any, lists: bool) -> Any:
    if not isinstance(value, dict) and not (lists and isinstance(value, list)):
        what = "object or list" if lists else "object"
        raise ValueError(f"a JSON {what} is expected, not {type(value).__name__}")
    return value


_RECORDS = re.compile(rb"\[\s*(\]|\[?\s*\{|$)|\[\s*\n\s*\[")
_BARE_CHAT = re.compile(rb'\[\s*\{\s*"(role|from|content|value)"')


def is_array(head: bytes) -> bool:
    r"""Whether a file is one JSON array of records, and not a list in each line.

    >>> is_array(b'[{"messages": []}]'), is_array(b'[{"role": "user", "content": "hi"}]\n')
    (True, False)
    >>> is_array(b"[1, 2]\n[3]\n")
    False
    """
    text = head.lstrip()
    if not text.startswith(b"["):
        return False
    try:
        value = json.loads(text.split(b"\n", 1)[0])
    except (ValueError, RecursionError):  # it goes on in later lines, or beyond the head
        return bool(_RECORDS.match(text)) and not _BARE_CHAT.match(text)
    return not value or (
        any(isinstance(one, dict) for one in _spread(value)) and not _is_chat(value)
    )


def _spread(value: list[Any]) -> list[Any]:
    return value[0] if isinstance(value[0], list) else value


def _is_chat(value: list[Any]) -> bool:
    return all(isinstance(one, dict) and ("role" in one or "from" in one) for one in value)


def _refuse_other_encodings(path: str, head: bytes) -> None:
    found = next((name for mark, name in _OTHER_ENCODINGS.items() if head.startswith(mark)), None)
    if found is None and len(head) > 3 and head[:4].count(0) in {2, 3} and head[:4].strip(b"\0"):
        found = "UTF-16" if head[:4].count(0) == 2 else "UTF-32"  # without a mark
    if found is not None:
        raise InvalidRequest(
            f"{path} is {found}; a trace is UTF-8. Convert it: iconv -f {found} -t UTF-8"
        )


def _refuse_other_packing(path: str, head: bytes) -> None:
    if head[257:262] == b"ustar":
        raise InvalidRequest(f"{path} is a tar archive: unpack it, tar -xf")
    for magic, told in _PACKED.items():
        if head.startswith(magic):
            raise InvalidRequest(f"{path} is {told}")


def _unzipped(raw: io.BufferedReader) -> Iterator[bytes]:
    """Give a gzip stream's pieces, each bounded; of one that breaks off, all that can be read.

    Zeros behind it, with which tapes and archives fill up, are none of it.

    Raises:
        EOFError: it breaks off, or unpacks to more than `MOST_UNZIPPED`.
        zlib.error: it is damaged.
    """
    member = zlib.decompressobj(_GZIP)
    size = 0
    while packed := raw.read(_PIECE):
        while packed:
            if member.eof:
                packed = packed.lstrip(b"\0")
                if not packed:
                    break
                member = zlib.decompressobj(_GZIP)
            if piece := member.decompress(packed, _PIECE):
                size += len(piece)
                if size > MOST_UNZIPPED:
                    raise EOFError(f"it unpacks to more than {MOST_UNZIPPED:,} bytes")
                yield piece
            packed = member.unused_data if member.eof else member.unconsumed_tail
    while not member.eof and (piece := member.decompress(b"", _PIECE)):
        yield piece
    if not member.eof:
        raise EOFError("the end of the gzip stream is missing")


def _stem(path: str) -> str:
    name = Path(path).name
    for ending in (".gz", ".jsonl", ".json"):
        name = name.removesuffix(ending)
    return name
