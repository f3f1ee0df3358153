"""A slab on disk: what the porter reads there is what he wrote, and nothing else."""

from __future__ import annotations

import errno
import os
import resource
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from prefixcache.core.hauls import Haul
from prefixcache.errors import InvalidRequest, PoolExhausted, ServiceUnavailable
from prefixcache.pool import PoolFile, pages_of
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder, DiskSlab
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.slab import Slab, SlabMap, describe, head_type, slot_bytes
from prefixcache.types import HaulId, Layout

LAYOUTS = [
    (Layout(2, 1, 4, "float32"), 4),
    (Layout(3, 2, 8, "bfloat16"), 16),
    (Layout(planes=1500, page_bytes=8, format="other/pages"), 2),  # more than one call takes
]
NUM_HOST = 4


class Bench:
    """A pool of twelve blocks, four slots in memory, eight on disk, and a porter."""

    def __init__(self, folder: Path, layout: Layout, block_size: int) -> None:
        self.file = PoolFile.create(layout, 12, block_size)
        handle = self.file.handle
        self.handle = handle
        self.slab = Slab(handle, NUM_HOST * slot_bytes(handle))
        self.folder = DiskFolder(folder, HEADS_AT + 8 * slot_bytes(handle))
        self.folder.open(handle)
        self.path = folder
        order = {"pool": describe(handle)} | self.slab.order()
        disk = DiskSlab(self.folder.order(), handle, NUM_HOST)
        self.map = SlabMap(order)
        self.porter = Porter(self.map, 7, disk)
        self.pages = pages_of(self.file.map(), handle)
        self.pages[:] = np.random.default_rng(1).integers(0, 256, self.pages.shape, np.uint8)
        self.before = self.pages.copy()
        self.block_size = block_size

    def haul(self, blocks: list[int], slots: list[int], *, is_up: bool, stamp: int = 100) -> Haul:
        tokens = np.arange(len(blocks) * self.block_size, dtype=np.uint32).tobytes()
        stamps = array("q", range(stamp, stamp + len(blocks)))
        return Haul(HaulId(1), is_up, array("i", blocks), array("i", slots), stamps, tokens)

    def move(self, sources: list[int], slots: list[int]) -> Haul:
        stamps = array("q", range(len(slots)))
        none, there = array("i"), array("i", slots)
        return Haul(HaulId(1), False, none, there, stamps, b"", array("i", sources))

    def sink(self, blocks: list[int], slots: list[int], stamp: int = 100) -> int:
        return self.porter.carry(self.haul(blocks, slots, is_up=False, stamp=stamp))

    def raise_up(self, blocks: list[int], slots: list[int], stamp: int = 100) -> int:
        self.pages[:] = 0
        return self.porter.carry(self.haul(blocks, slots, is_up=True, stamp=stamp))

    def alter(self, name: str, at: int, raw: bytes) -> None:
        with (self.path / name).open("r+b") as file:
            file.seek(at)
            file.write(raw)

    def close(self) -> None:
        self.folder.close()
        self.slab.close()
        self.file.close()


@pytest.fixture(params=LAYOUTS, ids=lambda layout: str(layout[0]))
def bench(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(tmp_path / "disk", *request.param)
    yield bench
    bench.close()


def test_blocks_come_back_from_both_tiers_to_where_they_are_wanted(bench: Bench) -> None:
    assert bench.sink([3, 0, 7], [1, 6, 4]) == 3
    assert bench.raise_up([9, 4, 3], [1, 6, 4]) == 3
    for new, old in ((9, 3), (4, 0), (3, 7)):
        assert (bench.pages[:, new] == bench.before[:, old]).all()
    others = [block for block in range(12) if block not in (9, 4, 3)]
    assert not bench.pages[:, others].any()
    assert bench.porter.error == 0


def test_what_lies_in_memory_goes_on_to_disk_without_the_pool(bench: Bench) -> None:
    assert bench.sink([3, 0, 7], [1, 2, 3]) == 3
    bench.pages[:] = 0
    assert bench.porter.carry(bench.move([1, 2, 3], [8, 4, 11])) == 3
    bench.map.slab[:] = 0
    bench.map.heads[:] = 0
    assert bench.raise_up([5, 6, 7], [8, 4, 11]) == 3
    for new, old in ((5, 3), (6, 0), (7, 7)):
        assert (bench.pages[:, new] == bench.before[:, old]).all()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_bit_on_disk_that_is_not_what_it_was_is_a_miss_from_there_on(
    bench: Bench, at: int
) -> None:
    bench.sink([3, 0, 7], [5, 6, 7])
    size = bench.handle.block_bytes
    last = (5 - NUM_HOST + at + 1) * size - 1
    old = (bench.path / "slab").read_bytes()[last]
    bench.alter("slab", last, bytes([old ^ 64]))
    assert bench.raise_up([3, 0, 7], [5, 6, 7]) == at


def test_slots_on_disk_that_were_swapped_are_found_out_although_each_is_whole(
    bench: Bench,
) -> None:
    bench.sink([3, 0, 7], [4, 5, 6])
    for name, at, size in (
        ("slab", 0, bench.handle.block_bytes),
        ("heads", HEADS_AT, head_type(bench.block_size).itemsize),
    ):
        raw = (bench.path / name).read_bytes()
        one, two = raw[at + size : at + 2 * size], raw[at + 2 * size : at + 3 * size]
        bench.alter(name, at + size, two + one)
    assert bench.raise_up([3, 0, 7], [4, 5, 6]) == 1


def test_what_lay_on_disk_before_is_not_what_is_asked_for(bench: Bench) -> None:
    bench.sink([3, 0, 7], [4, 5, 6], stamp=100)
    assert bench.raise_up([3, 0, 7], [4, 5, 6], stamp=200) == 0


def test_a_file_that_is_cut_short_under_the_porter_is_a_miss(bench: Bench) -> None:
    bench.sink([3, 0, 7], [4, 5, 6])
    os.truncate(bench.path / "slab", 2 * bench.handle.block_bytes - 1)
    assert bench.raise_up([3, 0, 7], [4, 5, 6]) == 1
    os.truncate(bench.path / "heads", 10)
    assert bench.raise_up([3, 0, 7], [4, 5, 6]) == 0
    assert bench.porter.error == 0


def test_a_disk_that_takes_no_more_costs_what_does_not_fit_and_says_why(bench: Bench) -> None:
    """As a full disk, one with a quota, or one that fails: the call does not write it all."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    size = 2 * bench.handle.block_bytes + 1
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, HEADS_AT + 4096), hard))
    try:
        num_good = bench.sink([3, 0, 7, 8], [4, 5, 10, 11])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    if size > HEADS_AT + 4096:
        assert num_good == 2
        assert bench.porter.error in (errno.EFBIG, errno.ENOSPC)
        assert bench.raise_up([3, 0, 7, 8], [4, 5, 10, 11]) == 2
    assert bench.sink([3, 0, 7, 8], [4, 5, 10, 11]) == 4
    assert bench.porter.error == 0


def test_a_slot_whose_writing_was_broken_off_holds_nothing(bench: Bench) -> None:
    bench.sink([3], [4])
    disk = bench.porter._disk
    assert disk is not None
    disk.write(4, bench.pages[:, 8])  # killed before the head
    assert bench.raise_up([3], [4]) == 0


def test_nobody_else_may_open_what_is_on_disk(bench: Bench) -> None:
    assert bench.path.stat().st_mode & 0o777 == 0o700
    for name in ("slab", "heads", "lock"):
        assert (bench.path / name).stat().st_mode & 0o777 == 0o600


def test_a_folder_is_one_services_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("prefixcache.service.tiers.disk._FORMER_S", 0.1)
    first = DiskFolder(tmp_path / "disk", 1 << 20)
    with pytest.raises(ServiceUnavailable, match="another service"):
        DiskFolder(tmp_path / "disk", 1 << 20)
    first.close()
    DiskFolder(tmp_path / "disk", 1 << 20).close()


def test_a_copy_made_with_hard_links_does_not_open_a_folder_that_a_service_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache.service.tiers.disk._FORMER_S", 0.1)
    folder, copy = tmp_path / "disk", tmp_path / "copy"
    first = DiskFolder(folder, 1 << 20)
    copy.mkdir()
    for file in folder.iterdir():
        os.link(file, copy / file.name)
    before = {file: file.stat().st_ino for file in folder.iterdir()}
    with pytest.raises(ServiceUnavailable, match="another service"):
        DiskFolder(folder, 1 << 20)
    assert {file: file.stat().st_ino for file in folder.iterdir()} == before
    first.close()
    DiskFolder(folder, 1 << 20).close()
    assert {file.stat().st_nlink for file in folder.iterdir()} == {1}


def test_a_porter_of_a_service_that_was_killed_keeps_the_folder_until_he_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prefixcache.service.tiers.disk._FORMER_S", 0.1)
    first = DiskFolder(tmp_path / "disk", 1 << 20)
    his = os.dup(first.files[-1])
    first.close()
    with pytest.raises(ServiceUnavailable, match="another service"):
        DiskFolder(tmp_path / "disk", 1 << 20)
    os.close(his)
    DiskFolder(tmp_path / "disk", 1 << 20).close()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "disk"
    folder.mkdir(0o777)
    folder.chmod(0o777)
    with pytest.raises(InvalidRequest, match="chmod 700"):
        DiskFolder(folder, 1 << 20)


def test_a_file_that_leads_elsewhere_is_not_followed(tmp_path: Path) -> None:
    layout, size = LAYOUTS[0]
    folder, other = tmp_path / "disk", tmp_path / "other"
    folder.mkdir(0o700)
    other.write_bytes(b"precious")
    (folder / "lock").touch()
    (folder / "slab").symlink_to(other)
    with PoolFile.create(layout, 4, size) as file:
        disk = DiskFolder(folder, 1 << 20)
        disk.open(file.handle)
        disk.close()
    assert other.read_bytes() == b"precious"


@pytest.mark.parametrize("name", ["secret", "heads", "slab", "resets"])
def test_somebodys_notes_are_not_taken_for_what_is_damaged(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "home"
    folder.mkdir(0o700)
    (folder / name).write_text("of mine")
    (folder / "other").touch()
    with pytest.raises(InvalidRequest, match=f"holds {name}, and no lock.*another folder"):
        DiskFolder(folder, 1 << 20)
    assert (folder / name).read_text() == "of mine"
    assert sorted(one.name for one in folder.iterdir()) == sorted([name, "other"])
    (folder / name).unlink()
    DiskFolder(folder, 1 << 20).close()


def test_a_size_that_the_file_system_refuses_is_refused_by_its_option(tmp_path: Path) -> None:
    layout, size = LAYOUTS[0]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with PoolFile.create(layout, 4, size) as file:
        disk = DiskFolder(tmp_path / "disk", 1 << 20)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(PoolExhausted, match="--disk"):
                disk.open(file.handle)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
            disk.close()
