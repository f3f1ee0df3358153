"""The slab on a disk: slots in one file, and in another what stands beside the bytes of each.

```
slab    [slot][plane][page]                     a slot's pages lie in a row: one call moves them
heads   a page that says of what this is the slab, then [slot]  seal │ stamp │ sum │ key │ tokens
resets  how often each namespace was reset
secret  what keys, sums and seals are drawn from
lock    held by the service, and by a porter of his for as long as that one lives
```
**All of it outlives the service.**  The next one finds the blocks by their keys (`scan.py`), if the
folder is what it says and was left as it should be; if not, it begins with nothing, and says why.
A folder that begins anew has a new secret, so that nothing of before can ever be taken for its own.

Neither file is ever mapped: one that is cut short under who reads it gives him fewer bytes, which
is a miss, where memory would kill him.  The service opens them, and the porter alone, who is given
the open files, writes and reads.  They are this user's, and nobody else may read them.
"""

from __future__ import annotations

import errno
import os
import secrets
import struct
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import structlog

from prefixcache.config import format_size, parse_layout
from prefixcache.core.found import Remains
from prefixcache.errors import InvalidRequest, PoolExhausted, ServiceUnavailable
from prefixcache.private_files import (
    check_path,
    lock_private,
    make_private_folder,
    open_private,
    refuse_strangers,
    remove_foreign,
)
from prefixcache.service.tiers.resets import Resets
from prefixcache.service.tiers.scan import Scan, scan
from prefixcache.service.tiers.seals import Seals
from prefixcache.service.tiers.slab import head_type, slot_bytes
from prefixcache.types import PoolHandle
from prefixcache.user_folders import expand

HEADS_AT: Final = 4096
_MAGIC: Final = b"PCDISK02"
_LAYOUT_BYTES: Final = 240
_TITLE: Final = struct.Struct(f"<8s16sI{_LAYOUT_BYTES}s")
"""Of what version, which folder, tokens of a block, layout."""
KEPT: Final = ("secret", "resets", "heads", "slab")
"""The files that outlive the service."""
_LOCK: Final = "lock"
_SECRET_BYTES: Final = 32
_MOST_TOKENS: Final = 1024
"""Of a block."""
_NOTHING: Final = Remains(np.empty((0, 2), np.uint64), np.empty(0, np.int32), np.empty(0, np.int64))
_MOST_PAGES: Final = 1024
"""Of one call (`IOV_MAX`)."""
_FORMER_S: Final = 5.0
"""How long a porter of a service that was killed may take to be gone."""
_MOST_SLOTS: Final = 2**31 - 1

log = structlog.get_logger(__name__)


class _Former(NamedTuple):
    """What an earlier life has left."""

    block_size: int
    layout: bytes
    slab_bytes: int
    found: Scan


class DiskFolder:
    """The service's end: a folder that it has taken, and the files in it.

    Args:
        path: The folder; made, for this user alone, if it is not there and the one above it is.
        num_bytes: What slots and heads may take.

    Raises:
        ServiceUnavailable: Another service has it.
        InvalidRequest: It is somebody else's, others may write to it, or it cannot be made.
    """

    def __init__(self, path: Path, num_bytes: int) -> None:
        self.path = expand(path).absolute()
        self._num_bytes = num_bytes
        self._lock = self._slab = self._heads = -1
        self._secret = b""
        self._resets: Resets | None = None
        self._former: _Former | None = None
        self.num_slots = 0
        """Blocks that fit, once the pool is known."""
        self.found = Scan(_NOTHING, 0, 0.0)
        """What an earlier life has left, in so far as the pool can hold it."""
        self.num_found = 0
        """How many blocks of that can be found: in some slots may lie the same."""
        self.cold = ""
        """Why nothing that lay here is found again, now or by the next start; empty if all is well,
        or if there was nothing."""
        try:
            check_path(self.path.parent, "--disk")
            make_private_folder(self.path, "--disk")
            refuse_strangers(self.path, _LOCK, KEPT, "--disk")
            self._take()
            for name in KEPT:
                remove_foreign(self.path / name)
            self._resume()
        except OSError as error:
            self.close()
            raise self._refusal(error) from None
        except ServiceUnavailable:
            self.close()
            raise

    def _take(self) -> None:
        """Lock the folder; wait a moment for the porter of a service that was killed."""
        until = time.monotonic() + _FORMER_S
        while True:
            try:
                self._lock = lock_private(self.path / _LOCK)
            except BlockingIOError:
                if time.monotonic() > until:
                    raise ServiceUnavailable(
                        f"another service has its blocks in {self.path}; choose another folder "
                        "for --disk"
                    ) from None
                time.sleep(0.05)
            else:
                return

    def _resume(self) -> None:
        """Look at what an earlier life has left; begin anew if it cannot be believed.

        Reads all heads: before anybody is served, and whatever the pool is going to be.
        """
        try:
            found = [name for name in KEPT if (self.path / name).exists()]
            if found:
                self._look_back(found)
                return
        except (ValueError, OSError) as error:
            self._grow_cold(str(error))
        for name in KEPT:
            (self.path / name).unlink(missing_ok=True)
        self._secret = secrets.token_bytes(_SECRET_BYTES)
        fd = open_private(self.path / "secret", os.O_RDWR | os.O_CREAT | os.O_EXCL)
        try:
            os.write(fd, self._secret)
        finally:
            os.close(fd)
        self._resets = self._open_resets(is_new=True)

    def _look_back(self, found: list[str]) -> None:
        """Read what an earlier life has left.

        Raises:
            ValueError, OSError: It cannot be believed, or read; the message says why.
        """
        if "secret" not in found or "resets" not in found:
            raise ValueError(f"of {', '.join(KEPT)} there is only {', '.join(found)}")
        if ("heads" in found) is not ("slab" in found):
            raise ValueError("its heads or its slab are missing")
        self._secret = self._read("secret", _SECRET_BYTES + 1)
        if len(self._secret) != _SECRET_BYTES:
            raise ValueError(f"its secret has {len(self._secret)} bytes, not {_SECRET_BYTES}")
        resets = self._open_resets(is_new=False)
        try:
            if "heads" in found:
                self._former = self._scan()
        except BaseException:
            resets.close()
            raise
        self._resets = resets

    def _scan(self) -> _Former:
        """Read the heads.

        Raises:
            ValueError, OSError: They are not of this folder, or cannot be read.
        """
        title = self._read("heads", _TITLE.size)
        if len(title) != _TITLE.size:
            raise ValueError("its heads are cut short")
        magic, mark, block_size, layout = _TITLE.unpack(title)
        if magic != _MAGIC:
            raise ValueError("its heads are of another version, or damaged")
        if mark != self._mark:
            raise ValueError("its heads were written with another secret")
        if not 1 <= block_size <= _MOST_TOKENS:
            raise ValueError(f"its heads are of blocks of {block_size:,} tokens")
        size, layout = (self.path / "slab").stat().st_size, layout.rstrip(b"\0")
        block_bytes = _block_bytes(layout, block_size)
        slot = block_bytes + head_type(block_size).itemsize
        most = min(num_slots(self._num_bytes, slot), size // block_bytes)
        fd = open_private(self.path / "heads", os.O_RDONLY)
        try:
            found = scan(fd, HEADS_AT, block_size, Seals(self.seed, block_size), most)
        finally:
            os.close(fd)
        return _Former(block_size, layout, size, found)

    def _read(self, name: str, num_bytes: int) -> bytes:
        """Read the beginning of a file."""
        fd = open_private(self.path / name, os.O_RDONLY)
        try:
            return os.read(fd, num_bytes)
        finally:
            os.close(fd)

    def _open_resets(self, *, is_new: bool) -> Resets:
        return Resets(
            self.path / "resets",
            self._derive(b"resets"),
            self._mark,
            self._disown,
            is_new=is_new,
            after_loss=is_new and bool(self.cold),
        )

    def _disown(self, error: OSError) -> None:
        """See that the next life finds nothing here: a reset could not be written down.

        Raises:
            ServiceUnavailable: That cannot be done either.
        """
        why = f"a reset could not be written down: {error.strerror}"
        try:
            (self.path / "heads").unlink(missing_ok=True)
        except OSError as other:
            raise ServiceUnavailable(
                f"--disk {self.path}: {why}, and what lies there could not be removed either "
                f"({other.strerror}), so a restart would find it again. Stop the service, remove "
                "the folder, start it again."
            ) from other
        if not self.cold:
            self._grow_cold(f"{why}; the next start begins with nothing")

    def _grow_cold(self, why: str) -> None:
        self.cold = why
        log.warning("nothing is found again on disk", folder=str(self.path), why=why)

    @property
    def seed(self) -> int:
        """Of sums and seals."""
        return int.from_bytes(self._derive(b"sums")[:8], "little")

    @property
    def key_secret(self) -> bytes:
        """Of the keys of blocks."""
        return self._derive(b"keys")

    @property
    def own_name(self) -> bytes:
        """What names the lives of this folder in this boot, and no copy of it: sixteen bytes."""
        return self.resets.name

    @property
    def resets(self) -> Resets:
        """How often each namespace was reset."""
        assert self._resets is not None
        return self._resets

    @property
    def _mark(self) -> bytes:
        """Say which folder this is, without the secret."""
        return self._derive(b"mark")[:16]

    def _derive(self, use: bytes) -> bytes:
        return blake2b(use, digest_size=32, key=self._secret, person=b"prefixcache disk").digest()

    def open(self, pool: PoolHandle) -> Remains:
        """Make the files for blocks of that pool, or take over those that are there.

        Returns:
            What was found in them.

        Raises:
            PoolExhausted: The disk has no room for them.
            InvalidRequest: They cannot be made.
        """
        self.num_slots = num_slots(self._num_bytes, slot_bytes(pool))
        former, self._former = self._former, None
        shape = (pool.block_size, str(pool.layout).encode()[:_LAYOUT_BYTES])
        if former is not None and (former.block_size, former.layout) != shape:
            layout = former.layout.decode(errors="replace")
            self._grow_cold(f"there were blocks of {former.block_size:,} tokens, {layout}")
            former = None
        there = 0
        if former is not None:
            there = min(self.num_slots, former.slab_bytes // pool.block_bytes)
        try:
            size, head = pool.block_bytes, head_type(pool.block_size).itemsize
            self._slab = self._make("slab", self.num_slots * size, there * size)
            self._heads = self._make(
                "heads", HEADS_AT + self.num_slots * head, HEADS_AT + there * head
            )
            os.pwrite(self._heads, _TITLE.pack(_MAGIC, self._mark, *shape), 0)
        except OSError as error:
            raise self._refusal(error) from None
        if former is not None:
            kept = former.found.remains.before(there)
            self.found = former.found._replace(remains=kept)
            log.info(
                "found again on disk",
                folder=str(self.path),
                blocks=len(kept.slots),
                damaged=self.found.num_damaged,
                seconds=round(self.found.seconds, 2),
            )
        return self.found.remains

    def _refusal(self, error: OSError) -> InvalidRequest | PoolExhausted:
        """Say why the folder cannot be used."""
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return PoolExhausted(
                f"--disk: no room for {format_size(self._num_bytes)} in {self.path}: "
                f"{error.strerror}. Lower it, or name another folder."
            )
        return InvalidRequest(f"--disk {self.path}: {error}")

    def _make(self, name: str, num_bytes: int, keep: int) -> int:
        """Make a file of that size, of holes behind the bytes that are kept."""
        fd = open_private(self.path / name, os.O_RDWR | os.O_CREAT)
        try:
            os.ftruncate(fd, keep)
            os.ftruncate(fd, num_bytes)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def order(self) -> dict[str, Any]:
        """Say where everything is, as `DiskSlab` wants to be told; `files` go along."""
        return {"slab": self._slab, "heads": self._heads, "num_slots": self.num_slots}

    @property
    def files(self) -> list[int]:
        """The open files that a porter is given: with the lock, which he keeps while he lives."""
        return [self._slab, self._heads, self._lock]

    def close(self) -> None:
        """Close the files, for the next life to find.  Idempotent."""
        resets, self._resets = self._resets, None
        if resets is not None:
            try:
                resets.close()
            except OSError as error:
                log.warning("resets may be lost if the machine ends now", why=str(error))
        for fd in (self._slab, self._heads, self._lock):
            if fd >= 0:
                os.close(fd)
        self._slab = self._heads = self._lock = -1


class DiskSlab:
    """The porter's end: writes and reads slots.

    Args:
        order: What `DiskFolder.order` gives; the files are open here under the same numbers.
        pool: Of which pool blocks lie there.
        first_slot: The number of its first slot: those of HOST come before it.
    """

    def __init__(self, order: dict[str, Any], pool: PoolHandle, first_slot: int) -> None:
        self._slab: int = order["slab"]
        self._heads: int = order["heads"]
        self._first = first_slot
        self._stride = pool.block_bytes
        self._type = head_type(pool.block_size)

    def write(self, slot: int, pages: npt.NDArray[np.uint8]) -> None:
        """Write a block's pages; until a head is written, too, nothing lies there.  O(bytes).

        Args:
            slot: Where.
            pages: `[planes, page_bytes]`, each page in a row.

        Raises:
            OSError: The disk is full, or fails.
        """
        self.write_head(slot, np.zeros(1, self._type))
        rows, at = list(pages), (slot - self._first) * self._stride
        for start in range(0, len(rows), _MOST_PAGES):
            part = rows[start : start + _MOST_PAGES]
            size = sum(len(row) for row in part)
            if os.pwritev(self._slab, part, at) != size:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            at += size

    def write_head(self, slot: int, head: npt.NDArray[Any]) -> None:
        """Write what stands beside a slot.

        Raises:
            OSError: As `write`.
        """
        raw = head.tobytes()
        if os.pwrite(self._heads, raw, self._head_at(slot)) != len(raw):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def read(self, slot: int, pages: npt.NDArray[np.uint8]) -> npt.NDArray[Any] | None:
        """Read a block's pages to where they belong, and what stands beside them.  O(bytes).

        Returns:
            Its head, `[1]`; None if the files are shorter than they should be.

        Raises:
            OSError: The disk fails.
        """
        rows, at = list(pages), (slot - self._first) * self._stride
        for start in range(0, len(rows), _MOST_PAGES):
            part = rows[start : start + _MOST_PAGES]
            size = sum(len(row) for row in part)
            if os.preadv(self._slab, part, at) != size:
                return None
            at += size
        raw = os.pread(self._heads, self._type.itemsize, self._head_at(slot))
        return np.frombuffer(raw, self._type) if len(raw) == self._type.itemsize else None

    def _head_at(self, slot: int) -> int:
        return HEADS_AT + (slot - self._first) * self._type.itemsize


def _block_bytes(layout: bytes, block_size: int) -> int:
    """Give what a block takes of a layout that stands in a file.

    Raises:
        ValueError: It is none.
    """
    try:
        return parse_layout(layout.decode()).block_bytes(block_size)
    except (ValueError, InvalidRequest):
        raise ValueError("its heads are of blocks that there cannot be") from None


def num_slots(num_bytes: int, slot: int) -> int:
    """Give how many slots of so many bytes, with their heads, fit into a folder's files."""
    return min(max(0, num_bytes - HEADS_AT) // slot, _MOST_SLOTS)
