"""Another pool in the place of one, below the views that were made of it."""

from __future__ import annotations

import gc
import mmap
import os
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from prefixcache.errors import EpochMismatch, LayoutMismatch, NotFound
from prefixcache.movable_pool import MovablePool
from prefixcache.pool import SHARED_MEMORY, PoolFile, pages_of
from prefixcache.types import Layout

LAYOUT = Layout(planes=3, page_bytes=64, format="f")


def maps(path: str) -> bool:
    return path in Path("/proc/self/maps").read_text()


def test_views_see_what_is_put_below_them_and_let_go_of_what_was_there(tmp_path: Path) -> None:
    with (
        PoolFile.create(LAYOUT, 5, 4, directory=tmp_path) as one,
        PoolFile.create(LAYOUT, 5, 4, directory=tmp_path) as two,
    ):
        pool = MovablePool(one.handle)
        pages = pages_of(pool.memory, one.handle)
        pages[:, 2] = 7
        pool.move(two.handle)
        assert pool.handle == two.handle
        assert not pages.any()
        pages[:, 3] = 9
        assert not maps(one.handle.name)
        assert pages_of(two.map(), two.handle)[:, 3].all()
        before = pages_of(one.map(), one.handle)
        assert before[:, 2].all()
        assert not before[:, 3].any()
        del pages, pool
        gc.collect()
        assert not maps(two.handle.name)


def entered(name: str) -> int:
    """Count the pages of a file that this process reaches without a fault."""
    _, _, told = Path("/proc/self/smaps").read_text().partition(name)
    (size,) = re.findall(r"^Rss: +(\d+) kB", told, re.MULTILINE)[:1]
    return int(size) * 1024 // mmap.PAGESIZE


def test_all_of_a_pool_in_memory_is_reached_without_a_fault_and_none_of_one_on_a_disk(
    tmp_path: Path,
) -> None:
    layout = Layout(planes=3, page_bytes=mmap.PAGESIZE, format="f")
    with PoolFile.create(layout, 5, 4) as one, PoolFile.create(layout, 5, 4) as two:
        pool = MovablePool(one.handle)
        assert entered(one.handle.name) == 1 + 3 * 5
        pool.move(two.handle)
        assert entered(two.handle.name) == 1 + 3 * 5
        del pool
    if tmp_path.stat().st_dev == SHARED_MEMORY.stat().st_dev:
        return  # nothing but memory here
    with PoolFile.create(layout, 5, 4, directory=tmp_path) as one:
        pool = MovablePool(one.handle)
        assert entered(pool.handle.name) == 0


def test_a_pool_that_does_not_fit_is_refused_and_the_one_that_is_there_stays(
    tmp_path: Path,
) -> None:
    with (
        PoolFile.create(LAYOUT, 5, 4, directory=tmp_path) as one,
        PoolFile.create(LAYOUT, 6, 4, directory=tmp_path) as larger,
    ):
        pool = MovablePool(one.handle)
        pages = pages_of(pool.memory, one.handle)
        pages[:, 2] = 7
        with pytest.raises(LayoutMismatch, match=r"6 blocks of 4 tokens.* was made for 5 blocks"):
            pool.move(larger.handle)
        with pytest.raises(NotFound):
            pool.move(replace(one.handle, name=str(tmp_path / "nowhere"), epoch=3))
        with pytest.raises(EpochMismatch):
            pool.move(replace(one.handle, epoch=one.handle.epoch + 2))
        assert pool.handle == one.handle
        assert np.all(pages[:, 2] == 7)


def test_who_moves_to_the_same_file_under_a_new_epoch_is_seen_there_and_not_in_the_former(
    tmp_path: Path,
) -> None:
    path = tmp_path / "kept"
    one, _ = PoolFile.keep(path, LAYOUT, 5, 4)
    pool = MovablePool(one.handle)
    one.close()
    two, was_there = PoolFile.keep(path, LAYOUT, 5, 4)
    with two:
        assert was_there
        assert two.has_former_workers()
        pool.move(two.handle)
        assert not two.has_former_workers()
        assert two.handle.epoch == pool.handle.epoch


def test_a_forked_child_has_not_what_was_put_there(tmp_path: Path) -> None:
    with (
        PoolFile.create(LAYOUT, 5, 4, directory=tmp_path) as one,
        PoolFile.create(LAYOUT, 5, 4, directory=tmp_path) as two,
    ):
        pool = MovablePool(one.handle)
        pool.move(two.handle)
        child = os.fork()
        if not child:
            os._exit(int(maps(two.handle.name) or maps(one.handle.name)))
        assert os.waitpid(child, 0)[1] == 0
