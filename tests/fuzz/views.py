"""Views of a pool's blocks, fuzzed: what is mapped is what a table names, or the call is refused.

After every step each view shows what gathering its blocks gives, the kernel's own list of mappings
is what the views say, and what a view that has ended had is mapped no more.
"""

from __future__ import annotations

import gc
import mmap
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from prefixcache.errors import CacheError, InvalidRequest, LeaseExpired
from prefixcache.pool import SHARED_MEMORY, PoolFile
from prefixcache.types import Layout
from prefixcache_kernels.contiguous import ContiguousView, ContiguousViews

MAPS = Path("/proc/self/maps")
LAYOUTS: tuple[tuple[Layout, int], ...] = (
    (Layout(1, 1, 64, "bfloat16"), 32),
    (Layout(2, 4, 64, "float32"), 4),
    (Layout(3, 2, 128, "float16"), 16),
    (Layout(planes=1, page_bytes=3 * mmap.PAGESIZE, format="whole"), 4),
    (Layout(planes=5, page_bytes=mmap.PAGESIZE, format="parts"), 1),
)
"""With the tokens of a block: its page in a plane is a multiple of the processor's."""


class Views:
    """Views of one pool, and the tables that they should show."""

    def __init__(self, r: Random) -> None:
        self.r = r
        layout, size = r.choice(LAYOUTS)
        self.num_blocks = r.choice([1, 2, 7, 40])
        self.file = PoolFile.create(layout, self.num_blocks, size, directory=SHARED_MEMORY)
        handle = self.file.handle
        self.memory = self.file.map()
        shape = (handle.planes, handle.num_blocks, handle.page_bytes)
        count = shape[0] * shape[1] * shape[2]
        self.pages = np.frombuffer(self.memory, np.uint8, count, handle.offset).reshape(shape)
        self.pages[:] = np.random.default_rng(r.getrandbits(32)).integers(0, 256, shape, np.uint8)
        self.views = ContiguousViews.open(handle)
        self.standing: list[tuple[ContiguousView, list[int], int]] = []
        self.kept: list[torch.Tensor] = []
        self.before = self.num_maps()

    def num_maps(self) -> int:
        return MAPS.read_text().count(self.file.handle.name)

    def table(self, most: int) -> list[int]:
        """Scattered blocks, runs of neighbours, some of them twice."""
        found: list[int] = []
        while len(found) < most and self.r.random() < 0.9:
            start = self.r.randrange(self.num_blocks)
            found += range(start, min(self.num_blocks, start + self.r.choice([1, 1, 2, 9])))
        return found[:most]

    def step(self) -> None:
        acts: list[Callable[[], None]] = [
            *(self.make, self.follow, self.follow, self.refuse, self.write, self.close),
        ]
        self.r.choice(acts)()
        self.check()

    def make(self) -> None:
        capacity = self.r.randrange(1, self.num_blocks + 1)
        table = self.table(capacity)
        if not table:
            return
        view = self.views.view(table, capacity=capacity)
        self.standing.append((view, table, capacity))

    def follow(self) -> None:
        if not self.standing:
            return
        number = self.r.randrange(len(self.standing))
        view, table, capacity = self.standing[number]
        keep = table[: self.r.randrange(len(table) + 1)]
        table = keep + self.table(capacity - len(keep))
        given: Any = table
        if self.r.random() < 0.5:
            given = np.array(table, self.r.choice([np.int32, np.int64, np.uint16]))
        view.follow(given)
        self.standing[number] = view, table, capacity

    def refuse(self) -> None:
        """Ask for what cannot be: it is refused by our own error, and changes nothing."""
        odd = self.r.choice([-1, self.num_blocks, 2**31, 2**63, 2**70, -(2**63), 0.5, None, "3"])
        table: Any = self.table(3)
        table.insert(self.r.randrange(len(table) + 1), odd)
        table = self.r.choice([table, [table], {odd}, odd, np.array(0.5), np.zeros((1, 1)), b"ab"])
        try:
            if self.standing and self.r.random() < 0.7:
                self.r.choice(self.standing)[0].follow(table)
            else:
                capacity: Any = self.r.choice([1, 4, 0, -1, 2**63, 1.0, True, "1"])
                self.views.view(table, capacity=capacity)
        except InvalidRequest:
            return
        raise AssertionError(f"taken: {table!r}")

    def write(self) -> None:
        block = self.r.randrange(self.num_blocks)
        self.pages[:, block, : self.r.randrange(1, 4096)] = self.r.randrange(256)

    def close(self) -> None:
        if not self.standing:
            return
        view, table, _ = self.standing.pop(self.r.randrange(len(self.standing)))
        if self.r.random() < 0.5:
            self.kept.append(view.pages())  # keeps its addresses, and shows nothing
        if self.r.random() < 0.7:
            view.close()
            assert view.ended
            assert not view.current
            for call in (lambda: view.follow(table), view.pages):
                try:
                    call()
                except LeaseExpired:
                    continue
                raise AssertionError("a view that has ended is there")
        else:
            del view
            gc.collect()
        if self.r.random() < 0.2:
            self.kept.clear()

    def check(self) -> None:
        for view, table, _ in self.standing:
            assert view.num_blocks == len(table)
            assert np.array_equal(view.pages().numpy(), self.pages[:, table])
            if self.file.handle.layout.is_ours and table:
                self.check_tokens(view, table)
        self.views.check()
        assert self.num_maps() - self.before <= self.views.num_maps

    def check_tokens(self, view: ContiguousView, table: list[int]) -> None:
        layer = self.r.randrange(self.file.handle.layout.num_layers)
        for kind, found in enumerate((view.keys(layer), view.values(layer))):
            want = self.pages[2 * layer + kind, table]
            assert np.array_equal(
                found.contiguous().view(torch.uint8).numpy().ravel(), want.ravel()
            )

    def end(self) -> None:
        self.standing.clear()
        self.kept.clear()
        self.views.close()
        gc.collect()
        assert self.num_maps() == self.before, "ended views have left mappings"
        del self.pages
        self.memory.close()
        self.file.close()


def view(r: Random) -> None:
    """Lead some views through a life."""
    try:
        views = Views(r)
    except CacheError as error:
        raise AssertionError("a pool that can be viewed is refused") from error
    for _ in range(r.randrange(5, 60)):
        views.step()
    views.end()
