"""The pool's memory: created by the service, mapped by every worker.  No torch here.

Memory must outlive the workers, so the service owns it: a sparse file in shared memory that every
worker maps.  Its first page says what it is, so that a worker refuses a pool of another life:

```
bytes   0 ───── 8 ────── 16 ───── 512 ───── 4096 ──────────────────────────────────── end
        magic   epoch    shape    zero      [plane][block][page]
```
What a page holds, the format of the layout names; `pages_of` is all that is known here.

The owner keeps an exclusive `flock` on the file while it lives.  The kernel drops it however the
owner dies, so the next start can tell a dead owner's file from a living one's and removes it.
The file's mode is 0600: a pool is one trust domain, whoever may map it can read all of it.

A pool that is *kept* outlives its owner, and the next one takes it over under a new epoch:

```
owner    writes the new epoch into the header ──► looks who still maps the old one ──► lends blocks
worker   locks byte number `epoch` of the file, shared ──► reads the header: my epoch?
```
In whatever order these happen, a worker is either refused or seen.  Its lock falls with its
mapping, however it ends.  Whoever goes on in memory whose owner is lost reads the header once more
*after* it has read blocks (`epoch_of`): if the epoch is another, what it read may be anything.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import re
import secrets
import stat
import struct
import weakref
from pathlib import Path
from typing import TYPE_CHECKING, Final, Self

from prefixcache.errors import (
    EpochMismatch,
    InvalidRequest,
    LayoutMismatch,
    NotFound,
    PoolExhausted,
    Unsupported,
)
from prefixcache.private_files import open_private
from prefixcache.types import DTYPE_BYTES, Layout, PoolHandle, shown

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

HEADER_BYTES: Final = 4096
"""One page, so that block 0 is aligned for every device and vector width."""

SHARED_MEMORY: Final = Path("/dev/shm")  # noqa: S108 - memory, not a file system for temporaries

MAX_BLOCK_SIZE: Final = 1024

MAX_BLOCKS: Final = 2**27
"""Of one pool.  A terabyte has fewer of any model; and each takes some ten bytes of accounts."""

_MAGIC: Final = b"prefixc1"
_HEAD: Final = struct.Struct("<8sQ496s")
_EPOCH: Final = struct.Struct("<Q")
_EPOCH_AT: Final = 8

HEAD_BYTES: Final = _HEAD.size
"""What `check_header` wants to see of a header."""

_MADV_POPULATE_WRITE: Final = 23
_POPULATED_AT_ONCE: Final = 64 << 20
"""Bytes; the interpreter's lock is held meanwhile."""

_FLOCK: Final = struct.Struct("hhqqi4x")
"""`struct flock`: type, whence, start, length, pid."""
_LAST_BYTE: Final = 2**63 - 1
_NAME: Final = re.compile(r"prefixcache-(\d+)-[0-9a-f]{16}")


def _shape(layout: Layout, num_blocks: int, block_size: int) -> bytes:
    """What the header says of the pool's shape; readable with `head -c 512 FILE`."""
    return f"{num_blocks} blocks of {block_size} tokens, {layout}".encode()


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def check_sizes(layout: Layout, num_blocks: int, block_size: int) -> None:
    """Refuse sizes that no pool can have.

    Raises:
        InvalidRequest: As said.
    """
    check_layout(layout)
    if num_blocks < 1:
        raise InvalidRequest(f"a pool needs at least 1 block, not {num_blocks}")
    if num_blocks > MAX_BLOCKS:
        raise InvalidRequest(
            f"{num_blocks:,} blocks of {layout.block_bytes(block_size):,} bytes ({layout}) are "
            f"more than the {MAX_BLOCKS:,} of the largest pool: raise --block-size or lower "
            "--memory"
        )
    check_block_size(block_size)


def check_layout(layout: Layout) -> None:
    """Refuse a layout that no pool can have: `Layout` itself refuses pages that are none.

    Raises:
        InvalidRequest: As said.
    """
    if layout.is_ours and layout.dtype not in DTYPE_BYTES:
        raise InvalidRequest(f"dtype {layout.dtype!r} is none of {', '.join(DTYPE_BYTES)}")
    if layout.is_ours and min(layout.num_layers, layout.num_kv_heads, layout.head_dim) < 1:
        raise InvalidRequest(f"{layout} is not a layout: every number must be at least 1")


def check_block_size(block_size: int) -> int:
    """Give a block size back, and refuse one that no pool can have.

    Raises:
        InvalidRequest: As said.
    """
    if (
        type(block_size) is not int
        or not 1 <= block_size <= MAX_BLOCK_SIZE
        or block_size & (block_size - 1)
    ):
        raise InvalidRequest(
            f"block_size {block_size!r} is not a power of two from 1 to {MAX_BLOCK_SIZE}"
        )
    return block_size


def _owned(directory: Path) -> list[Path]:
    """This user's pool files in `directory`, living or dead."""
    uid = str(os.getuid())
    found = (
        path for path in directory.iterdir() if (m := _NAME.fullmatch(path.name)) and m[1] == uid
    )
    return sorted(found)


def _promised(directory: Path) -> int:
    """Bytes that living pools in `directory` may still touch: sparse files grow when written."""
    promised = 0
    for path in _owned(directory):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        promised += max(0, status.st_size - status.st_blocks * 512)
    return promised


def check_room(num_bytes: int, what: str, directory: Path = SHARED_MEMORY) -> None:
    """Refuse what shared memory has no room for, beside what is promised to living pools.

    Raises:
        PoolExhausted: As said.
        NotFound: There is no such directory.
    """
    try:
        room = os.statvfs(directory)
        free = room.f_bavail * room.f_frsize - _promised(directory)
    except FileNotFoundError:
        raise NotFound(
            f"no directory {directory} to hold the pool; on Linux it is /dev/shm"
        ) from None
    if num_bytes > free:
        raise PoolExhausted(
            f"{what} needs {_gib(num_bytes)} in {directory}; {_gib(max(0, free))} of "
            f"{_gib(room.f_blocks * room.f_frsize)} are free and not promised to other pools. "
            f"Lower --memory, or enlarge {directory}."
        )


class PoolFile:
    """The owner's side of a pool in shared memory: a 0600 file that lives as long as its owner.

    A context manager.  `handle` is what workers need to map the same memory.
    """

    def __init__(self, handle: PoolHandle, fd: int, *, kept: bool = False) -> None:
        self.handle = handle
        self._fd: int | None = fd
        self._kept = kept

    @classmethod
    def create(
        cls,
        layout: Layout,
        num_blocks: int,
        block_size: int,
        *,
        directory: Path = SHARED_MEMORY,
    ) -> PoolFile:
        """Create a pool of zeroed blocks and take its lock.

        Removes the files of dead owners first (`sweep`), for they hold the memory that this one
        needs.  O(1): the file is sparse, a page costs memory when it is first written.

        Args:
            layout: How the bytes of a block lie.
            num_blocks: Blocks of the pool, at least 1.
            block_size: Tokens of a block, a power of two from 1 to 1024.
            directory: A directory in memory that only the kernel's accounting limits.

        Raises:
            InvalidRequest: A size that no pool can have.
            PoolExhausted: The directory has not enough room for the whole pool.
            NotFound: There is no such directory.
        """
        check_sizes(layout, num_blocks, block_size)
        if not directory.is_dir():
            raise NotFound(f"no directory {directory} to hold the pool; on Linux it is /dev/shm")
        cls.sweep(directory)
        num_bytes = HEADER_BYTES + num_blocks * layout.block_bytes(block_size)
        check_room(num_bytes, f"a pool of {num_blocks} blocks", directory)
        while True:
            epoch = secrets.randbits(63) | 1  # never 0, and fits a signed word on every wire
            path = directory / f"prefixcache-{os.getuid()}-{epoch:016x}"
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            fcntl.flock(fd, fcntl.LOCK_EX)
            if os.fstat(fd).st_nlink:
                break
            os.close(fd)  # another start swept it between the two calls above: once more
        try:
            os.fchmod(fd, 0o600)  # whatever the umask took away
            os.ftruncate(fd, num_bytes)
            os.pwrite(fd, _HEAD.pack(_MAGIC, epoch, _shape(layout, num_blocks, block_size)), 0)
        except OSError as error:
            path.unlink()
            os.close(fd)
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise PoolExhausted(
                    f"{directory} refuses a file of {_gib(num_bytes)}: {error.strerror}. "
                    "Lower --memory, or raise the limit (ulimit -f, quota)."
                ) from error
            raise
        handle = PoolHandle("shm", str(path), num_blocks, block_size, layout, epoch, HEADER_BYTES)
        return cls(handle, fd)

    @classmethod
    def keep(
        cls, path: Path, layout: Layout, num_blocks: int, block_size: int, *, reuse: bool = True
    ) -> tuple[PoolFile, bool]:
        """Take over the pool at `path`, or create it there; it stays when its owner ends.

        Its memory is all reserved at once: a page that cannot be had later kills who writes to it.
        A pool of another shape is replaced; who maps it keeps that one.

        Args:
            path: Its file.
            layout: How the bytes of a block lie.
            num_blocks: Blocks of the pool.
            block_size: Tokens of a block.
            reuse: Whether a pool of this shape is taken over; else it is replaced, too.

        Returns:
            The pool, and whether it is one that was there.

        Raises:
            InvalidRequest: A size that no pool can have.
            PoolExhausted: There is not enough room, or another owner has the pool.
            OSError: The file cannot be made.
        """
        check_sizes(layout, num_blocks, block_size)
        num_bytes = HEADER_BYTES + num_blocks * layout.block_bytes(block_size)
        shape = _shape(layout, num_blocks, block_size)
        epoch = secrets.randbits(63) | 1
        handle = PoolHandle("shm", str(path), num_blocks, block_size, layout, epoch, HEADER_BYTES)
        fd = open_private(path, os.O_RDWR | os.O_CREAT)
        try:
            _own(fd, path)
            head = os.pread(fd, _HEAD.size, 0).ljust(_HEAD.size, b"\0")
            magic, _, found = _HEAD.unpack(head)
            fits = os.fstat(fd).st_size == num_bytes and found.rstrip(b"\0") == shape
            if reuse and magic == _MAGIC and fits:
                os.pwrite(fd, _EPOCH.pack(epoch), _EPOCH_AT)
                return cls(handle, fd, kept=True), True
            if os.fstat(fd).st_size:
                path.unlink()
                os.close(fd)
                fd = open_private(path, os.O_RDWR | os.O_CREAT | os.O_EXCL)
                _own(fd, path)
            os.posix_fallocate(fd, 0, num_bytes)
            os.pwrite(fd, _HEAD.pack(_MAGIC, epoch, shape), 0)
        except OSError as error:
            os.close(fd)
            path.unlink(missing_ok=True)
            if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
                raise PoolExhausted(
                    f"no room for a pool of {_gib(num_bytes)} at {path}: {error.strerror}. "
                    "Lower --memory, or choose another --state."
                ) from error
            raise
        except PoolExhausted:
            os.close(fd)
            raise
        return cls(handle, fd, kept=True), False

    @staticmethod
    def is_of(path: Path, layout: Layout, num_blocks: int, block_size: int) -> bool:
        """Whether the file there says of itself that it is a pool of this shape."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                magic, _, shape = _HEAD.unpack(os.read(fd, _HEAD.size))
            finally:
                os.close(fd)
        except (OSError, struct.error):
            return False
        return bool(
            magic == _MAGIC and shape.rstrip(b"\0") == _shape(layout, num_blocks, block_size)
        )

    def has_former_workers(self) -> bool:
        """Whether any process still maps this pool under an earlier epoch.  One or two syscalls."""
        if self._fd is None:
            return False
        epoch = self.handle.epoch
        return _is_locked(self._fd, 1, epoch - 1) or _is_locked(self._fd, epoch + 1, 0)

    def map(self) -> mmap.mmap:
        """Map all of it, header and blocks, for the owner itself."""
        if self._fd is None:
            raise NotFound(f"the pool at {self.handle.name} is closed")
        return mmap.mmap(self._fd, HEADER_BYTES + self.handle.num_bytes)

    @staticmethod
    def sweep(directory: Path = SHARED_MEMORY) -> list[Path]:
        """Remove this user's pool files whose owner is dead; give their paths.  O(files).

        Workers that still map such a file keep their memory until they unmap it.
        """
        removed = []
        for path in _owned(directory):
            try:
                fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:  # gone meanwhile, or no regular file: not a pool of ours
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if os.fstat(fd).st_nlink:  # else another sweep was faster
                    path.unlink()
                    removed.append(path)
            except BlockingIOError:
                continue  # its owner lives
            finally:
                os.close(fd)
        return removed

    @staticmethod
    def stale(directory: Path = SHARED_MEMORY) -> list[Path]:
        """Give this user's pool files whose owner is dead.  Changes nothing.  O(files)."""
        found = []
        for path in _owned(directory):
            try:
                fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
            except OSError:
                continue
            try:
                fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
                found.append(path)
            except BlockingIOError:
                continue
            finally:
                os.close(fd)
        return found

    def close(self) -> None:
        """Unlink the file, unless it is kept, and drop the lock.  Idempotent.

        Workers that map it keep their memory until they unmap it; nobody can map it anew.
        """
        if self._fd is None:
            return
        fd, self._fd = self._fd, None
        try:
            if os.fstat(fd).st_nlink and not self._kept:
                Path(self.handle.name).unlink(missing_ok=True)
        finally:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def pack_header(handle: PoolHandle) -> bytes:
    """Give the beginning of a pool's first page; the rest of it is zero."""
    shape = _shape(handle.layout, handle.num_blocks, handle.block_size)
    return _HEAD.pack(_MAGIC, handle.epoch, shape)


def check_header(head: bytes, handle: PoolHandle) -> None:
    """Refuse a pool whose first bytes (`pack_header`'s many) do not say what the handle says.

    Raises:
        EpochMismatch: It is no pool, or a pool of another life.
        LayoutMismatch: The pool has another shape.
    """
    # A device's name is long, and tells a reader nothing.
    name = "the pool on the GPU" if handle.kind == "cuda-ipc" else handle.name
    if len(head) < _HEAD.size or not head.startswith(_MAGIC):
        raise EpochMismatch(f"{name} is no pool of this version of prefixcache")
    _, epoch, shape = _HEAD.unpack(head[: _HEAD.size])
    if epoch != handle.epoch:
        raise EpochMismatch(
            f"{name} is of epoch {epoch:016x}, the handle of {handle.epoch:016x}. Attach again."
        )
    shape = shape.rstrip(b"\0")
    if shape != _shape(handle.layout, handle.num_blocks, handle.block_size):
        raise LayoutMismatch(
            f"the pool holds {shape.decode()}; the handle speaks of {handle.num_blocks} blocks "
            f"of {handle.block_size} tokens, {handle.layout}"
        )


def map_pool(handle: PoolHandle) -> mmap.mmap:
    """Map a pool that another process owns, shared and writable; block 0 is at `handle.offset`.

    Only this process has the memory: a forked child that touches it dies of SIGSEGV; it must
    connect, attach and map for itself.

    O(1).  Every check is made before a byte is mapped, for a shorter file would kill the process
    at its first access instead of raising.

    Raises:
        Unsupported: The pool is not in shared memory.
        NotFound: There is no such pool (any more), or it is another user's.
        EpochMismatch: The file is no pool, or a pool of another life or size.
        LayoutMismatch: The pool has another shape than the handle says.
        InvalidRequest: This is no handle of a pool.
    """
    fd = open_pool(handle)
    try:
        # It keeps this very file open, and with it the lock.
        memory = mmap.mmap(
            fd, handle.offset + handle.num_bytes, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE
        )
    finally:
        os.close(fd)
    keep_from_children(memory)
    return memory


def keep_from_children(memory: mmap.mmap) -> None:
    """Let no child have a pool's memory by a fork.

    The service takes the death of a process for the end of its writes: a child would go on writing
    into blocks that are another's by then.
    """
    memory.madvise(mmap.MADV_DONTFORK)
    _mapped.add(memory)


def populate(memory: mmap.mmap, handle: PoolHandle) -> None:
    """Have all pages of a pool's memory entered in this process's page table now.

    Else the first access to each costs a fault, which for whoever computes in ever new blocks comes
    in every step: 3.3 µs a page as measured on a virtual machine, three to seven times as much as
    here.  O(pages), a quarter to half a second per GiB; other threads run meanwhile.

    A pool in a file system with a disk below it is left alone: its pages would be read, and be
    written again.  So is any where the kernel is older than Linux 5.14.
    """
    try:
        if Path(handle.name).stat().st_dev != SHARED_MEMORY.stat().st_dev:
            return
        for start in range(0, len(memory), _POPULATED_AT_ONCE):
            size = min(_POPULATED_AT_ONCE, len(memory) - start)
            memory.madvise(_MADV_POPULATE_WRITE, start, size)
    except OSError:
        pass  # each page comes when it is needed


def open_pool(handle: PoolHandle) -> int:
    """Open a pool's file, and lock its epoch until the file is closed; give its descriptor.

    Raises:
        Unsupported, NotFound, EpochMismatch, LayoutMismatch, InvalidRequest: As `map_pool`.
    """
    if not isinstance(handle, PoolHandle) or not isinstance(handle.name, str):
        raise InvalidRequest(f"{shown(handle)} is no handle of a pool: session.pool gives one")
    if handle.kind == "cuda-ipc":
        raise Unsupported(
            "this pool lives on a GPU (cuda-ipc): prefixcache_kernels.SharedPool.map opens it"
        )
    if handle.kind != "shm":
        raise Unsupported(
            f"a pool of kind {handle.kind!r} has no memory to map: the service only keeps accounts"
        )
    try:
        fd = os.open(handle.name, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        raise NotFound(
            f"no pool at {handle.name}: its service has ended. Attach again for the present one."
        ) from None
    except OSError as error:
        raise NotFound(f"the pool at {handle.name} cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a NUL, or half of a sign
        raise InvalidRequest(f"{handle.name!a} is no path of a pool: {error}") from None
    try:
        status = os.fstat(fd)
        size = status.st_size
        expected = handle.offset + handle.num_bytes
        if not stat.S_ISREG(status.st_mode) or size != expected:
            raise EpochMismatch(
                f"{handle.name} has {size} bytes, the handle speaks of {expected}. Attach again."
            )
        # Before the header is read.
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, _FLOCK.pack(fcntl.F_RDLCK, 0, handle.epoch, 1, 0))
        check_header(os.pread(fd, _HEAD.size, 0), handle)
    except BaseException:
        os.close(fd)
        raise
    return fd


def shape_of(handle: PoolHandle) -> tuple[Layout, int, int]:
    """Give what two pools have in common whose blocks lie in the same places."""
    return handle.layout, handle.num_blocks, handle.block_size


def pages_of(memory: mmap.mmap | bytearray, handle: PoolHandle) -> npt.NDArray[np.uint8]:
    """Look at a mapped pool as pages: `[planes, num_blocks, page_bytes]`.  A view; O(1).

    `pages_of(memory, handle)[:, block]` is all of a block, whatever the layout: so it is copied,

    >>> handle = PoolHandle("none", "", 4, 16, Layout(planes=3, page_bytes=8, format="f"), 0, 0)
    >>> pages = pages_of(bytearray(handle.num_bytes), handle)
    >>> pages[:, 1] = 7
    >>> pages[:, [2]] = pages[:, [1]]
    >>> pages.sum(axis=(0, 2)).tolist()
    [0, 168, 168, 0]
    """
    # Loaded where pages are looked at: a client that only leases, or lends, does without.
    import numpy as np

    flat = np.frombuffer(memory, np.uint8, handle.num_bytes, handle.offset)
    return flat.reshape(handle.planes, handle.num_blocks, handle.page_bytes)


_mapped: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
_inherited: list[mmap.mmap] = []


def _keep_inherited() -> None:
    # In a forked child nothing is mapped there any more, or something else is: an object that is
    # freed would unmap that.
    _inherited.extend(_mapped)


os.register_at_fork(after_in_child=_keep_inherited)


def epoch_of(memory: mmap.mmap) -> int:
    """Read the epoch of a mapped pool: another one than the handle's if it was taken over since."""
    epoch: int = _EPOCH.unpack_from(memory, _EPOCH_AT)[0]
    return epoch


def memory_is_abandoned(handle: PoolHandle) -> bool:
    """Tell whether a pool's owner is dead, so that nobody will ever give its blocks to others.

    The owner locks the file as long as it lives, and removes it when it ends.  A GPU's memory
    goes with its owner, so nobody may go on in it.
    """
    if handle.kind != "shm":
        return False
    try:
        fd = os.open(handle.name, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return True
    except OSError:
        return False
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def _own(fd: int, path: Path) -> None:
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise PoolExhausted(f"another service has the pool at {path}; stop it first") from None


def _is_locked(fd: int, start: int, length: int) -> bool:
    """Whether others hold a lock on a byte from `start` on; 0: to the end."""
    if length < 0 or start >= _LAST_BYTE:
        return False
    asked = _FLOCK.pack(fcntl.F_WRLCK, 0, start, length, 0)
    found = fcntl.fcntl(fd, fcntl.F_OFD_GETLK, asked)
    return bool(_FLOCK.unpack(found)[0] != fcntl.F_UNLCK)
