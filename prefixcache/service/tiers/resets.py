"""Resets: how often namespaces were reset, for longer than the service lives.

```
a page    of which folder │ in which boot it was opened │ closed in order?  after a loss?
          a name │ the number of this file: who has copied it has another
words     [row of the tenant][column of the namespace]       counts; one more with each reset
```
The count goes into the keys of blocks (`core/block_keys.py`), so what was reset is found by nobody
in another life either.  Nothing says which namespaces there are: where two share a word, resetting
one costs the other what it has on disk, and no more.  Tenants have rows of their own, as far as
there are: whoever resets much does it to himself.

A word is written before the reset is answered.  The kernel keeps it when the service is killed; not
so when the machine ends, for nothing waits for the disk here.  So after another boot the words are
believed only if the last service has closed them, which does wait.

**The name** goes, with the count, into the names of what is stored for other machines after a
reset: so it must be no other service's.  Who has copied the folder, or the disk on which it lies,
would have the same one, and find what the other has stored since a reset of its own.  So there is
another name where the file has another number, or the machine is in another boot: what this service
had stored elsewhere since a reset it does not find again then, either.

**Counts that were lost** may not begin with 0 again: what others keep under that number (a store of
several machines) would be found although it was reset.  They begin with 1, for all namespaces, and
say so for as long as the folder is there.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt

from prefixcache.private_files import open_private
from prefixcache.types import Namespace

ROWS: Final = 512
COLUMNS: Final = 512
_WORD_BYTES: Final = 4
_WORDS_AT: Final = 4096
_BYTES: Final = _WORDS_AT + ROWS * COLUMNS * _WORD_BYTES
_PAGE: Final = struct.Struct("<8s16s64sB16sQ")
_MAGIC: Final = b"PCRESET1"
_CLOSED, _AFTER_LOSS = 1, 2
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Resets:
    """The counts of one folder.

    Args:
        path: The file.
        secret: Of the folder: at least 16 bytes.
        mark: Sixteen bytes that say which folder it is.
        is_new: Whether to begin with zeros.
        give_up: Is told when a reset cannot be written down.

    Raises:
        ValueError: What is there cannot be believed; the message says why.
        OSError: The file cannot be made or read.
    """

    def __init__(
        self,
        path: Path,
        secret: bytes,
        mark: bytes,
        give_up: Callable[[OSError], None],
        *,
        is_new: bool,
        after_loss: bool = False,
    ) -> None:
        self._secret, self._mark, self._give_up = secret[:64], mark, give_up
        self.after_loss = after_loss
        """Whether counts that were here before are lost: each namespace counts as reset."""
        self.name = secrets.token_bytes(16)
        """No other service's, nor that of a copy of this folder."""
        self._fd = open_private(path, os.O_RDWR | (os.O_CREAT if is_new else 0))
        try:
            if is_new:
                os.ftruncate(self._fd, 0)
                os.posix_fallocate(self._fd, 0, _BYTES)
                if after_loss:
                    ones = np.ones(ROWS * COLUMNS, "<u4")
                    os.pwrite(self._fd, ones.tobytes(), _WORDS_AT)
            else:
                self._look()
            raw = os.pread(self._fd, _BYTES - _WORDS_AT, _WORDS_AT)
            self._words: npt.NDArray[np.uint32] = np.frombuffer(raw, "<u4").astype(np.uint32)
            self._say(is_closed=False)
        except BaseException:
            os.close(self._fd)
            raise

    def _look(self) -> None:
        """See whether the words may be believed."""
        if os.fstat(self._fd).st_size != _BYTES:
            raise ValueError("the count of resets is cut short")
        page = os.pread(self._fd, _PAGE.size, 0)
        magic, mark, boot, flags, name, number = _PAGE.unpack(page)
        if magic != _MAGIC or mark != self._mark:
            raise ValueError("the count of resets is of another folder")
        is_this_boot = bool(_boot_id()) and boot.rstrip(b"\0") == _boot_id()
        if is_this_boot and number == os.fstat(self._fd).st_ino:
            self.name = name
        if not flags & _CLOSED and not is_this_boot:
            raise ValueError(
                "the machine has ended before the service did, and resets of its last moments may "
                "be lost"
            )
        self.after_loss = bool(flags & _AFTER_LOSS)

    def _say(self, *, is_closed: bool) -> None:
        """Write the page, and see it on the disk."""
        flags = _CLOSED * is_closed | _AFTER_LOSS * self.after_loss
        number = os.fstat(self._fd).st_ino
        page = _PAGE.pack(_MAGIC, self._mark, _boot_id(), flags, self.name, number)
        os.pwrite(self._fd, page, 0)
        os.fdatasync(self._fd)

    def of(self, namespace: Namespace) -> int:
        """Give how often a namespace was reset, or one that shares its word.  O(1)."""
        return int(self._words[self._at(namespace)])

    def advance(self, namespace: Namespace) -> None:
        """Count a reset.  O(1); a write to the page cache.

        Raises:
            ServiceUnavailable: As `give_up` does: what lies on the disk could not be given up
                either.
        """
        at = self._at(namespace)
        word = (int(self._words[at]) + 1) & 0xFFFFFFFF
        try:
            os.pwrite(self._fd, word.to_bytes(_WORD_BYTES, "little"), _WORDS_AT + _WORD_BYTES * at)
        except OSError as error:
            self._give_up(error)
        self._words[at] = word

    def advance_all(self, tenant: str | None) -> None:
        """Count a reset of every namespace of a tenant; None: of all tenants.  O(words), in C.

        Raises:
            ServiceUnavailable: As `advance`.
        """
        rows = slice(0, ROWS * COLUMNS)
        if tenant is not None:
            start = self._row(tenant) * COLUMNS
            rows = slice(start, start + COLUMNS)
        words = self._words[rows] + np.uint32(1)
        try:
            raw = words.astype("<u4").tobytes()
            if os.pwrite(self._fd, raw, _WORDS_AT + _WORD_BYTES * rows.start) != len(raw):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            self._give_up(error)
        self._words[rows] = words

    def _row(self, tenant: str) -> int:
        return self._digest(tenant) % ROWS

    def _at(self, namespace: Namespace) -> int:
        """Give the word of a namespace: the same for what is approximate beside it."""
        row = self._row(namespace.tenant)
        return row * COLUMNS + self._digest(*namespace[:4]) % COLUMNS

    def _digest(self, *fields: str) -> int:
        digest = blake2b(digest_size=8, key=self._secret, person=b"prefixcache word")
        for field in fields:
            raw = field.encode("utf-8", "surrogatepass")
            digest.update(len(raw).to_bytes(8, "little") + raw)
        return int.from_bytes(digest.digest(), "little")

    def close(self) -> None:
        """See all of it on the disk, say that it is, and close.

        Raises:
            OSError: It is not; another boot will not believe it.
        """
        try:
            os.fdatasync(self._fd)
            self._say(is_closed=True)
        finally:
            os.close(self._fd)


def _boot_id() -> bytes:
    """Give what names this run of the kernel; empty where nobody knows."""
    try:
        return _BOOT_ID.read_bytes().strip()[:64]
    except OSError:
        return b""
