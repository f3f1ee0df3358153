"""A sequence's scattered blocks side by side: one range of addresses, mapped onto the pool's file.

```
pool file   │ header │ plane 0: 0 1 2 3 4 5 6 7 8 9 … │ plane 1: 0 1 2 3 4 5 6 7 8 9 … │ …
                                  │ └┐        │    └────┐
table       7 2 3 9         ┌─────│──│────────┘         │        no byte is copied
                            │   ┌─┴──┴┐                 │
view        plane 0       │ 7 │ 2   3 │ 9 │ reserved … │ plane 1 │ 7 │ 2   3 │ 9 │ reserved … │
mappings                    1     2     3                          4     5     6
```

Whoever knows nothing of pages reads it: `keys(layer)` is `[slots, kv_heads, head_dim]`, an ordinary
tensor.  Sequences that share a prefix map the same memory, each in a range of its own.  A growing
table maps what is new, a shorter one unmaps; blocks that are neighbours in the pool are mapped as
one.

**Its price.**  A mapping costs microseconds and the kernel counts them (`vm.max_map_count`).  In
our own layout a block lies in `2 * num_layers` planes, so a scattered block is as many mappings;
where the pages are another's and a block is one page, all of its layers are one.  Pages of the
processor are mapped whole: a block's page in a plane has to be a multiple of them.

**Its end.**  A view dies with its lease, and is told before the service is:

| the lease | reading on is |
|---|---|
| is released, its session closed; the view is closed | a fault of memory, SIGSEGV |
| is truncated, or a block of it replaced | the same, in what was cut off |
| passes its deadline, or its session is lost: somebody may be reading | zeros; not `current` |

The addresses are nobody else's while any tensor looks at them, so an old tensor never shows
another's bytes.  What was read is valid if `current` is true *after* it was read, as it is with the
pool itself: a process that was stopped and wakes reads before it knows.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from prefixcache.errors import InvalidRequest, LeaseExpired, PoolExhausted, Unsupported
from prefixcache.pool import MAX_BLOCK_SIZE, keep_from_children, open_pool
from prefixcache.texts import many
from prefixcache.types import PoolHandle, shown
from prefixcache_kernels.one_process import OfOneProcess
from prefixcache_kernels.pool import TORCH_DTYPES

MAX_MAPS: Final = Path("/proc/sys/vm/max_map_count")
MAPS: Final = Path("/proc/self/maps")

SPARE_MAPS: Final = 4096
"""Mappings left to the rest of the process: memory allocators and libraries ask for some too."""

_PROT_NONE: Final = 0
_FAILED: Final = 2 ** (8 * ctypes.sizeof(ctypes.c_void_p)) - 1
"""`MAP_FAILED`."""
_MAP_FIXED: Final = 0x10
_MAP_NORESERVE: Final = 0x4000
_EMPTY: Final = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_LONGEST_WAIT_S: Final = 60.0

_libc: Final = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = (
    *(ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_long,
)
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.mprotect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)

Blocks = npt.NDArray[np.int64]
"""A block table."""


class Watched(Protocol):
    """A lease, as a view needs it; `prefixcache.client` has them."""

    @property
    def block_table(self) -> Sequence[int]:
        """Its blocks in order; another object when it has changed."""

    @property
    def deadline(self) -> float:
        """Monotonic seconds after which its blocks must not be touched."""

    def check(self) -> None:
        """Raise LeaseExpired if it has ended."""

    def watch(self, watcher: Any) -> None:
        """Have somebody told when blocks are not the lease's any more."""

    def unwatch(self, watcher: Any) -> None:
        """Tell it no more."""


class Place(Protocol):
    """A range of addresses for one sequence, into which blocks are put; it has its own kind of it.

    Attributes:
        capacity: blocks that it has room for.
        planes: pages of a block; each plane has `capacity` pages side by side.
    """

    capacity: int
    planes: int

    def put(self, at: int, blocks: Blocks) -> None:
        """Map blocks from position `at` on, in all planes.  Nothing is mapped there.

        Raises OSError; then anything may be mapped there.
        """
        ...

    def clear(self, at: int, count: int) -> None:
        """Unmap `count` positions from `at` on, in all planes: reading them is a fault."""
        ...

    def blank(self) -> None:
        """Put nothing in the place of all blocks, for readers that are at work."""
        ...

    def count(self, blocks: Blocks) -> int:
        """Mappings that these blocks are at most."""
        ...

    def pages(self) -> Tensor:
        """`[planes, capacity, page_bytes]` uint8.  Keeps the addresses, not the blocks."""
        ...

    def check(self, blocks: Blocks) -> None:
        """Compare what is mapped with a table.  Raises AssertionError."""
        ...


def smallest_block_size(handle: PoolHandle, granularity: int = mmap.PAGESIZE) -> int | None:
    """Give the fewest tokens of a block whose pages can be mapped one by one; None: no number can.

    Args:
        handle: Of a pool; its block size does not matter where the layout is our own.
        granularity: Bytes that are mapped as a whole.

    >>> from prefixcache.types import Layout
    >>> layout = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    >>> smallest_block_size(PoolHandle("shm", "", 8, 16, layout, 0, 4096), 4096)
    32
    """
    if not handle.layout.is_ours:
        return None if handle.page_bytes % granularity else handle.block_size
    size, token = 1, handle.page_bytes // handle.block_size
    while size * token % granularity:
        size *= 2
    return size if size <= MAX_BLOCK_SIZE else None


def runs(blocks: Blocks) -> list[tuple[int, int, int]]:
    """Cut a table where neighbours in it are none in the pool: positions, first blocks, lengths.

    >>> runs(np.array([7, 2, 3, 9]))
    [(0, 7, 1), (1, 2, 2), (3, 9, 1)]
    """
    if not blocks.size:
        return []
    starts = np.concatenate(([0], np.flatnonzero(np.diff(blocks) != 1) + 1))
    counts = np.diff(np.append(starts, blocks.size))
    return list(zip(starts.tolist(), blocks[starts].tolist(), counts.tolist(), strict=True))


class _Mapped:
    """What is in a place, and is a lease's; a lease tells it what is not any more.

    All of it happens under the lock of its views, in whatever thread.  It knows neither its lease
    nor its view, so that nothing goes in a circle.
    """

    def __init__(self, place: Place, lock: threading.RLock) -> None:
        self.place = place
        self.blocks: Blocks = np.empty(0, np.int64)
        self.num_maps = 0
        self.ended = False
        self._lock, self._pid = lock, os.getpid()
        # Whoever drops a lease without a word leaves nothing that can be read.
        self._dropped = weakref.finalize(self, _clear, place, self._pid)
        self._dropped.atexit = False

    def follow(self, blocks: Blocks, make_room: Callable[[int, Place, Blocks], None]) -> None:
        """Map what is not there yet, unmap what is not in the table.  If it fails, nothing more is.

        O(runs of the new blocks * planes), beside a look at the table.
        """
        with self._lock:
            if self.ended:
                raise LeaseExpired("the view has ended, with its lease or before: make another")
            known = self.blocks
            common = min(known.size, blocks.size)
            differ = np.flatnonzero(known[:common] != blocks[:common])
            same = int(differ[0]) if differ.size else common
            num_maps = self.place.count(blocks)
            self.keep(same)
            if same == blocks.size:
                return
            if num_maps > self.num_maps:
                make_room(num_maps - self.num_maps, self.place, blocks)
            try:
                self.place.put(same, blocks[same:])
            except OSError as error:
                self.place.clear(same, blocks.size - same)
                if error.errno != errno.ENOMEM:
                    raise
                raise PoolExhausted(
                    f"the kernel refuses {num_maps:,} mappings for {many(blocks.size, 'block')}: "
                    f"{error.strerror}. Raise vm.max_map_count, or close other views."
                ) from error
            self.blocks, self.num_maps = blocks, num_maps

    def keep(self, num_blocks: int) -> None:
        """Unmap the blocks from this one on: they may be another's soon."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self.ended or num_blocks >= self.blocks.size:
                return
            self.place.clear(num_blocks, self.blocks.size - num_blocks)
            self.blocks = self.blocks[:num_blocks]
            self.num_maps = self.place.count(self.blocks)

    def end(self, *, in_use: bool = False) -> None:
        """Unmap all.  Idempotent.  Where it may be read just now, zeros are in its place."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self.ended:
                return
            if in_use:
                self.place.blank()
            elif self.blocks.size:
                self.place.clear(0, self.place.capacity)
            self.ended = True
            self._dropped.detach()
            self.blocks, self.num_maps = self.blocks[:0], 0


def _clear(place: Place, pid: int) -> None:
    if os.getpid() == pid:
        place.clear(0, place.capacity)


class ContiguousView(OfOneProcess):
    """One sequence's blocks in one range of addresses; `ContiguousViews` makes them.

    Only for reading: a write is a fault.  What `store_kv` writes to a block is seen here at once.
    """

    def __init__(self, views: ContiguousViews, mapped: _Mapped, lease: Watched | None) -> None:
        super().__init__()
        self._views = views
        self._mapped = mapped
        self._lease = lease
        self._table: Sequence[int] | None = None
        handle = views.handle
        self._pages = mapped.place.pages()
        self._tokens: Tensor | None = None
        if handle.layout.is_ours:
            layout = handle.layout
            self._tokens = self._pages.view(TORCH_DTYPES[layout.dtype]).view(
                layout.num_layers,
                2,
                mapped.place.capacity * handle.block_size,
                layout.num_kv_heads,
                layout.head_dim,
            )

    @property
    def num_blocks(self) -> int:
        """Blocks that are mapped now."""
        return int(self._mapped.blocks.size)

    @property
    def num_slots(self) -> int:
        """Tokens that they hold at most."""
        return self.num_blocks * self._views.handle.block_size

    @property
    def num_maps(self) -> int:
        """Mappings of the kernel that they are at most."""
        return self._mapped.num_maps

    @property
    def ended(self) -> bool:
        """Whether nothing is mapped any more, for good."""
        return self._mapped.ended

    @property
    def current(self) -> bool:
        """Whether all that was read through it was its own.  Ask *after* each use.

        False once its lease has ended or passed its deadline, or another has taken the pool over.

        Raises:
            InvalidRequest: This process has the view through a fork.
        """
        self.check_process()
        if self.ended or not self._views.current:
            return False
        return self._lease is None or time.monotonic() <= self._lease.deadline

    def keys(self, layer: int) -> Tensor:
        """Keys of a layer, `[num_slots, num_kv_heads, head_dim]`, of the lease's present table.

        O(1) if the table has not changed; else as `follow`.  Slots that nobody has written hold
        anything.

        Raises:
            LeaseExpired: The lease, or this view, has ended.
            InvalidRequest: There is no such layer, this process has the view through a fork, or the
                table has outgrown the view.
            PoolExhausted: As `follow`.
            Unsupported: The pages are another's: `pages` gives them.
        """
        return self._layer(layer, 0)

    def values(self, layer: int) -> Tensor:
        """Values of a layer, shaped like its keys.

        Raises:
            LeaseExpired, InvalidRequest, PoolExhausted, Unsupported: As `keys`.
        """
        return self._layer(layer, 1)

    def pages(self) -> Tensor:
        """All of it as bytes, `[planes, num_blocks, page_bytes]`, of the lease's present table.

        Raises:
            LeaseExpired, InvalidRequest, PoolExhausted: As `keys`.
        """
        self._up_to_date()
        return self._pages[:, : self.num_blocks]

    def follow(self, blocks: Sequence[int] | None = None) -> None:
        """Bring what is mapped up to a table: what is new is mapped, what is not in it unmapped.

        Of a view of a lease the table is the lease's; reading does this by itself.
        O(runs of new blocks * planes).

        Raises:
            LeaseExpired: The lease, or this view, has ended.
            InvalidRequest: A block that the pool has not, or more than the view has room for.
            PoolExhausted: More mappings than the kernel allows; nothing new is mapped.
        """
        self.check_process()
        if (self._lease is None) != (blocks is not None):
            raise InvalidRequest(
                "a view without a lease is given its blocks; one of a lease has the lease's"
            )
        if blocks is None:
            self._up_to_date()
        else:
            self._follow(blocks)

    def close(self) -> None:
        """End the view: reading its tensors is a fault from now on.  Idempotent."""
        if os.getpid() != self._views.pid:
            return
        if self._lease is not None:
            self._lease.unwatch(self._mapped)
        self._mapped.end()

    def check(self) -> None:
        """Compare what the kernel has mapped with the table.  Changes nothing.  O(mappings).

        Raises:
            AssertionError: They differ.
        """
        self._mapped.place.check(self._mapped.blocks)

    def _layer(self, layer: int, kind: int) -> Tensor:
        self._up_to_date()
        if self._tokens is None:
            raise Unsupported(
                f"the pool holds {self._views.handle.layout}: where keys lie in it is not known "
                "here; `pages` gives it as bytes"
            )
        if type(layer) is not int or not 0 <= layer < self._tokens.shape[0]:
            raise InvalidRequest(f"layer {shown(layer)} is none of 0 to {len(self._tokens) - 1}")
        return self._tokens[layer, kind, : self.num_slots]

    def _up_to_date(self) -> None:
        self.check_process()
        if self._lease is None:
            if self.ended:
                raise LeaseExpired("the view has ended: make another")
            return
        self._lease.check()
        table = self._lease.block_table
        # Once more if another came meanwhile: the thread that brought it has cut off what is not
        # in it before this one mapped that.
        while table is not self._table or self.ended or len(table) != self.num_blocks:
            self._follow(table)
            self._table, table = table, self._lease.block_table

    def _follow(self, table: Sequence[int]) -> None:
        views, mapped = self._views, self._mapped
        mapped.follow(views.known(table, mapped.place.capacity), views.make_room)

    def __repr__(self) -> str:
        state = "ended" if self.ended else f"{self.num_blocks} of {self._mapped.place.capacity}"
        return f"<{type(self).__name__}: {state} blocks, {self.num_maps} mappings>"


class ContiguousViews(OfOneProcess):
    """Makes views of one pool's sequences.  A context manager; closing it ends all of them.

    Args:
        handle: Of the pool.
        place: Makes the range of a view, for so many blocks.
        current: Whether nobody has taken the pool over.
        close: Lets go of what the ranges are mapped from.
    """

    def __init__(
        self,
        handle: PoolHandle,
        place: Callable[[int], Place],
        current: Callable[[], bool],
        close: Callable[[], object],
    ) -> None:
        super().__init__()
        self.handle = handle
        self.lock = threading.RLock()
        self._place, self._current, self._closed = place, current, False
        self._mapped: weakref.WeakSet[_Mapped] = weakref.WeakSet()
        self._others = _count_maps()
        self._reaper: _Reaper | None = None
        self._let_go = weakref.finalize(self, close)
        self._let_go.atexit = False

    @classmethod
    def open(cls, handle: PoolHandle) -> ContiguousViews:
        """Open a pool in shared memory, of any format.  O(mappings of this process), once.

        Raises:
            Unsupported: The pages of its blocks are no multiples of the processor's, or the pool is
                elsewhere: the message says which block size would do.
            NotFound, EpochMismatch, LayoutMismatch: As `prefixcache.pool.map_pool`.
        """
        if handle.kind == "shm":
            check_pages(handle, mmap.PAGESIZE, "this processor's memory is mapped in")
        fd = open_pool(handle)
        ballast = _Ballast()

        def epoch_stands() -> bool:
            return int.from_bytes(os.pread(fd, 8, 8), "little") == handle.epoch

        def let_go() -> None:
            os.close(fd)
            ballast.throw_off()

        return cls(
            handle,
            lambda capacity: FilePlace(fd, handle, capacity, ballast),
            epoch_stands,
            let_go,
        )

    @property
    def num_maps(self) -> int:
        """Mappings of all views, at most.  O(views)."""
        return sum(mapped.num_maps for mapped in list(self._mapped))

    @property
    def current(self) -> bool:
        """Whether nobody has taken the pool over.  Ask after each use; `ContiguousView` does."""
        return not self._closed and self._current()

    def of(self, lease: Watched, *, capacity: int | None = None) -> ContiguousView:
        """Map a lease's blocks; the view follows its table, and ends with it.

        Args:
            lease: Of this pool.
            capacity: Blocks that it may grow to; None: those that it has now.  Addresses only: no
                memory is taken for them.

        Raises:
            LeaseExpired: It has ended.
            InvalidRequest: Less room than it has blocks, or a block that the pool has not.
            PoolExhausted: More mappings than the kernel allows, or no addresses.
        """
        lease.check()
        view = self._make(len(lease.block_table) if capacity is None else capacity, lease)
        lease.watch(view._mapped)
        try:
            view._up_to_date()
        except BaseException:
            view.close()
            raise
        if self._reaper is None:
            self._reaper = _Reaper()
            weakref.finalize(self, self._reaper.stop).atexit = False
        self._reaper.mind(lease, view._mapped)
        return view

    def view(self, blocks: Sequence[int], *, capacity: int | None = None) -> ContiguousView:
        """Map blocks that no lease speaks for: the caller sees to it that they stay.

        Raises:
            InvalidRequest, PoolExhausted: As `of`.
        """
        view = self._make(len(blocks) if capacity is None else capacity, None)
        view.follow(blocks)
        return view

    def _make(self, capacity: int, lease: Watched | None) -> ContiguousView:
        self.check_process()
        if self._closed:
            raise InvalidRequest("these views are closed: open the pool again")
        if type(capacity) is not int or not 1 <= capacity <= self.handle.num_blocks:
            raise InvalidRequest(
                f"capacity is {shown(capacity)}: a view has room for 1 to "
                f"{self.handle.num_blocks} blocks, as the pool has"
            )
        mapped = _Mapped(self._place(capacity), self.lock)
        self._mapped.add(mapped)
        return ContiguousView(self, mapped, lease)

    def known(self, blocks: Sequence[int], capacity: int) -> Blocks:
        """Give a table as numbers, all of them blocks of the pool.

        Raises:
            InvalidRequest: One is not, or they are more than `capacity`.
        """
        try:
            found = np.array(blocks)
        except (TypeError, ValueError):
            raise InvalidRequest(f"blocks are no table of numbers: {shown(blocks)}") from None
        if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
            raise InvalidRequest(f"blocks are no table of numbers: {shown(blocks)}")
        found = found.astype(np.int64)
        if found.size > capacity:
            raise InvalidRequest(
                f"{found.size} blocks in a view with room for {capacity}: make it with the "
                "`capacity` that its sequence may grow to"
            )
        if found.size and not 0 <= found.min() <= found.max() < self.handle.num_blocks:
            raise InvalidRequest(
                f"block tables name blocks {found.min()} to {found.max()}; the pool has "
                f"{self.handle.num_blocks}"
            )
        return found

    def make_room(self, more: int, place: Place, blocks: Blocks) -> None:
        """Refuse mappings that the kernel would refuse, or that others of this process need.

        Raises:
            PoolExhausted: As said, with the numbers.
        """
        limit = _max_maps()
        if self._others + self.num_maps + more <= limit - SPARE_MAPS:
            return
        self._others = max(0, _count_maps() - self.num_maps)  # it may have been long ago
        if self._others + self.num_maps + more <= limit - SPARE_MAPS:
            return
        raise PoolExhausted(
            f"{blocks.size} blocks in {len(runs(blocks))} pieces of {place.planes} planes each "
            f"need {place.count(blocks):,} mappings; all views have {self.num_maps:,} now, the "
            f"process beside them {self._others:,}, and {SPARE_MAPS:,} of {limit:,} are kept free. "
            "Raise vm.max_map_count, take larger blocks, or close views."
        )

    def check(self) -> None:
        """Check every view.  Changes nothing.  O(mappings of all of them).

        Raises:
            AssertionError: Something else is mapped than should be, or is counted wrongly.
        """
        with self.lock:
            for mapped in list(self._mapped):
                mapped.place.check(mapped.blocks)
                expected = mapped.place.count(mapped.blocks)
                assert mapped.num_maps == expected, f"{mapped.num_maps} counted, not {expected}"

    def close(self) -> None:
        """End all views, and let go of the pool.  Idempotent."""
        if os.getpid() != self.pid or self._closed:
            return
        self._closed = True
        if self._reaper is not None:
            self._reaper.stop()
        for mapped in list(self._mapped):
            mapped.end()
        self._let_go()


class _Ballast:
    """Mappings that are thrown off where a process has as many as it may.

    The kernel then refuses every `mmap`, also one that would leave fewer: so nothing could be
    unmapped and its addresses kept.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def take(self) -> None:
        """Have them, if they are not there.  Raises OSError."""
        if self._memory is None:
            memory = mmap.mmap(-1, 16 * mmap.PAGESIZE, _EMPTY, mmap.PROT_READ | mmap.PROT_WRITE)
            base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
            for page in range(0, 16, 2):  # each second one alone, so that all are apart
                if _libc.mprotect(base + page * mmap.PAGESIZE, mmap.PAGESIZE, _PROT_NONE):
                    _fail()
            self._memory = memory

    def throw_off(self) -> bool:
        """Have them no more; tell whether they were there."""
        had, self._memory = self._memory is not None, None
        return had


class FilePlace:
    """Addresses of this process, mapped onto a pool's file for reading.

    Args:
        fd: Of the file.
        handle: Of the pool, whose pages are whole ones of the processor.
        capacity: Blocks that it has room for.
        ballast: Of all places in this pool; they are used by one thread at a time.

    Raises:
        PoolExhausted: There are no addresses for them.
    """

    def __init__(self, fd: int, handle: PoolHandle, capacity: int, ballast: _Ballast) -> None:
        self._fd, self._handle, self._ballast = fd, handle, ballast
        self.capacity, self.planes = capacity, handle.planes
        self._page, self._width = handle.page_bytes, capacity * handle.page_bytes
        size = self.planes * self._width
        try:
            # Nothing but addresses: what is mapped onto them goes when they do, with the last
            # tensor that looks at them.
            self._memory = mmap.mmap(-1, size, _EMPTY, mmap.PROT_READ | mmap.PROT_WRITE)
        except OSError as error:
            raise PoolExhausted(
                f"no {size:,} bytes of addresses for {capacity} blocks: {error.strerror}"
            ) from error
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self._empty(self._base, size, _PROT_NONE)
        keep_from_children(self._memory)

    def put(self, at: int, blocks: Blocks) -> None:
        """Map blocks: a system call for each run of neighbours in each plane."""
        self._ballast.take()
        page, fd, call = self._page, self._fd, _libc.mmap
        flags = mmap.MAP_SHARED | _MAP_FIXED
        pieces = [
            (begin * page, first * page, count * page) for begin, first, count in runs(blocks)
        ]
        for plane in range(self.planes):
            here = self._base + plane * self._width + at * page
            there = self._handle.offset + plane * self._handle.num_blocks * page
            for begin, first, size in pieces:
                if call(here + begin, size, mmap.PROT_READ, flags, fd, there + first) == _FAILED:
                    _fail()
            # A child would read what is another's by then.
            if _libc.madvise(here, blocks.size * page, mmap.MADV_DONTFORK):
                _fail()

    def clear(self, at: int, count: int) -> None:
        """Unmap positions; the addresses stay taken."""
        page = self._page
        if count == self.capacity:
            self._empty(self._base, self.planes * self._width, _PROT_NONE)
            return
        for plane in range(self.planes):
            self._empty(self._base + plane * self._width + at * page, count * page, _PROT_NONE)

    def blank(self) -> None:
        """Map zeros that nobody can write to."""
        self._empty(self._base, self.planes * self._width, mmap.PROT_READ)

    def count(self, blocks: Blocks) -> int:
        """Runs of neighbours in all planes, and in each what is left of its room."""
        if not blocks.size:
            return 0
        return self.planes * (len(runs(blocks)) + (blocks.size < self.capacity))

    def pages(self) -> Tensor:
        """All of its addresses as bytes."""
        flat = torch.frombuffer(self._memory, dtype=torch.uint8)
        return flat.view(self.planes, self.capacity, self._page)

    def check(self, blocks: Blocks) -> None:
        """Compare every byte's mapping, by the kernel's own list, with what should be there."""
        page, end = self._page, self._base + self.planes * self._width
        found = [one for one in _read_maps() if one.begin < end and one.end > self._base]
        inode = os.fstat(self._fd).st_ino
        at = self._base
        for one in found:
            assert one.begin <= at, f"nothing is mapped from {at:x} to {one.begin:x}"
            while at < min(end, one.end):
                plane, position = divmod((at - self._base) // page, self.capacity)
                if position < blocks.size:
                    block = plane * self._handle.num_blocks + int(blocks[position])
                    want = self._handle.offset + block * page
                    got = one.offset + at - one.begin
                    assert (one.inode, one.rights) == (inode, "r--s"), f"position {position}: {one}"
                    assert got == want, f"position {position} of plane {plane}: {got}, not {want}"
                else:
                    assert one.inode == 0, f"position {position} of plane {plane} has a file: {one}"
                    assert one.rights in ("---p", "r--p"), f"position {position}: {one}"
                at += page
        assert at >= end, f"nothing is mapped from {at:x} to {end:x}"
        assert len(found) <= max(1, self.count(blocks)), f"{len(found)} mappings"

    def _empty(self, address: int, size: int, rights: int) -> None:
        flags = _EMPTY | _MAP_FIXED
        while _libc.mmap(address, size, rights, flags, -1, 0) == _FAILED:
            if ctypes.get_errno() != errno.ENOMEM or not self._ballast.throw_off():
                _fail()
        if _libc.madvise(address, size, mmap.MADV_DONTFORK):
            _fail()


class _Reaper:
    """Ends views whose leases have passed their deadlines: one thread, while there are views."""

    def __init__(self) -> None:
        self._minded: list[tuple[weakref.ref[Watched], weakref.ref[_Mapped]]] = []
        self._changed = threading.Event()
        self._stopped = False
        threading.Thread(target=self._run, name="prefixcache-views", daemon=True).start()

    def mind(self, lease: Watched, mapped: _Mapped) -> None:
        """Look after one more.  Keeps neither alive."""
        self._minded.append((weakref.ref(lease), weakref.ref(mapped)))
        self._changed.set()

    def stop(self) -> None:
        """Look after nothing any more."""
        self._stopped = True
        self._changed.set()

    def _run(self) -> None:
        while not self._stopped:
            self._changed.wait(self._look())
            self._changed.clear()

    def _look(self) -> float:
        """End what is over; give how long the others have at least."""
        wait_s = _LONGEST_WAIT_S
        for entry in list(self._minded):
            lease, mapped = entry[0](), entry[1]()
            if lease is None or mapped is None or mapped.ended:
                self._minded.remove(entry)
                continue
            left_s = lease.deadline - time.monotonic()
            if left_s < 0:
                mapped.end(in_use=True)
            else:
                wait_s = min(wait_s, left_s + 0.001)
        return wait_s


class _Map(NamedTuple):
    """A line of the kernel's list of what is mapped."""

    begin: int
    end: int
    rights: str
    offset: int
    inode: int


def check_pages(handle: PoolHandle, granularity: int, what: str) -> None:
    """Refuse a pool whose blocks' pages cannot be mapped one by one.

    Raises:
        Unsupported: As said, with the block size that would do.
    """
    if handle.page_bytes % granularity:
        fits = smallest_block_size(handle, granularity)
        raise Unsupported(
            f"a block has {handle.page_bytes:,} bytes in each of its {many(handle.planes, 'plane')}"
            f", and {what} pieces of {granularity:,}: "
            + (f"serve with --block-size {fits}" if fits else "no block size of this layout fits")
        )
    if handle.offset % granularity:
        raise Unsupported(
            f"block 0 begins at byte {handle.offset:,} of the pool, and {what} pieces of "
            f"{granularity:,}"
        )


def _max_maps() -> int:
    return int(MAX_MAPS.read_text())


def _count_maps() -> int:
    return MAPS.read_bytes().count(b"\n")


def _read_maps() -> Iterator[_Map]:
    for line in MAPS.read_text().splitlines():
        span, rights, offset, _, inode, *_ = line.split(None, 5)
        begin, end = span.split("-")
        yield _Map(int(begin, 16), int(end, 16), rights, int(offset, 16), int(inode))


def _fail() -> NoReturn:
    number = ctypes.get_errno()
    raise OSError(number, os.strerror(number))
