"""What a folder holds when the next service opens it: all that is whole, and nothing else."""

from __future__ import annotations

import os
import shutil
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from prefixcache.core.hauls import Haul
from prefixcache.errors import ServiceUnavailable
from prefixcache.pool import PoolFile, pages_of
from prefixcache.service.tiers import resets, scan
from prefixcache.service.tiers.abandonments import Abandonments
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder, DiskSlab
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.slab import SlabMap, describe, head_type, slot_bytes
from prefixcache.types import HaulId, Layout, Namespace, PoolHandle

LAYOUT, SIZE = Layout(3, 2, 8, "bfloat16"), 4
NUM_BLOCKS, NUM_SLOTS = 12, 10
SPACE = Namespace("model", tenant="acme")
HEAD = head_type(SIZE)


class Life:
    """A pool, a folder and a porter."""

    def __init__(
        self,
        path: Path,
        num_slots: int = NUM_SLOTS,
        layout: Layout = LAYOUT,
        block_size: int = SIZE,
    ) -> None:
        self.file = PoolFile.create(layout, NUM_BLOCKS, block_size)
        handle = self.file.handle
        self.folder = DiskFolder(path, HEADS_AT + num_slots * slot_bytes(handle))
        self.remains = self.folder.open(handle)
        self.abandoned = Abandonments.make(NUM_BLOCKS)
        disk = DiskSlab(self.folder.order(), handle, 0)
        memory = SlabMap({"pool": describe(handle)})
        self.porter = Porter(memory, self.folder.seed, disk, abandoned=self.abandoned)
        self.pages = pages_of(self.file.map(), handle)
        self.pages[:] = np.random.default_rng(1).integers(0, 256, self.pages.shape, np.uint8)

    def haul(self, blocks: list[int], slots: list[int], *, is_up: bool, stamp: int) -> Haul:
        tokens = np.array([[block] * SIZE for block in range(len(blocks))], np.uint32).tobytes()
        stamps = array("q", range(stamp, stamp + len(blocks)))
        keys = np.array([[slot, slot + 1] for slot in slots], np.uint64).tobytes()
        numbers = array("i", blocks), array("i", slots)
        return Haul(HaulId(7), is_up, *numbers, stamps, tokens, keys=b"" if is_up else keys)

    def sink(self, blocks: list[int], slots: list[int], stamp: int = 100) -> int:
        return self.porter.carry(self.haul(blocks, slots, is_up=False, stamp=stamp))

    def rise(self, blocks: list[int], slots: list[int], stamp: int = 100) -> int:
        self.pages[:] = 0
        return self.porter.carry(self.haul(blocks, slots, is_up=True, stamp=stamp))

    @property
    def found(self) -> dict[int, int]:
        """The stamps of the slots that were found."""
        for key, slot in zip(self.remains.keys.tolist(), self.remains.slots.tolist(), strict=True):
            assert key == [slot, slot + 1]
        slots, stamps = self.remains.slots.tolist(), self.remains.stamps.tolist()
        return dict(zip(slots, stamps, strict=True))

    def close(self) -> None:
        """End in order."""
        self.folder.close()
        self.abandoned.close()
        self.file.close()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@pytest.fixture
def begin(path: Path) -> Iterator[Callable[..., Life]]:
    """Give a way to begin the next life, which ends the one before."""
    lives: list[Life] = []

    def begin_next(**options: object) -> Life:
        while lives:
            lives.pop().close()
        lives.append(Life(path, **options))  # type: ignore[arg-type]
        return lives[-1]

    yield begin_next
    for life in lives:
        life.close()


def filled(begin: Callable[..., Life]) -> Life:
    """Begin a life in which three blocks lie on disk, one behind the other."""
    life = begin()
    assert not life.remains.slots.size
    assert life.sink([3, 0, 7], [1, 6, 4]) == 3
    return life


def ended(life: Life) -> None:
    """End the service, so that its files may be altered, and not yet begin the next."""
    life.folder.close()


def alter(path: Path, name: str, at: int, raw: bytes) -> None:
    with (path / name).open("r+b") as file:
        file.seek(at)
        file.write(raw)


def head_at(slot: int) -> int:
    return HEADS_AT + slot * HEAD.itemsize


def test_the_next_life_finds_what_lies_there_and_reads_it(begin: Callable[..., Life]) -> None:
    before = filled(begin).pages.copy()
    life = begin()
    assert life.found == {1: 100, 6: 101, 4: 102}
    assert life.folder.cold == ""
    assert life.rise([9, 4, 3], [1, 6, 4]) == 3
    for new, old in ((9, 3), (4, 0), (3, 7)):
        assert (life.pages[:, new] == before[:, old]).all()
    assert begin().found == {1: 100, 6: 101, 4: 102}, "and the one after that"


def test_a_folder_that_is_not_opened_for_a_pool_stays_as_it_is(
    begin: Callable[..., Life], path: Path
) -> None:
    ended(filled(begin))
    DiskFolder(path, 1 << 20).close()  # no worker has ever come
    assert len(begin().found) == 3


def test_a_folder_may_grow_and_shrink(begin: Callable[..., Life]) -> None:
    filled(begin)
    assert len(begin(num_slots=50).found) == 3
    assert begin(num_slots=5).found == {1: 100, 4: 102}
    assert begin().found == {1: 100, 4: 102}


@pytest.mark.parametrize("at", range(0, HEAD.itemsize, 4))
def test_a_head_of_which_one_bit_has_changed_is_a_slot_that_holds_nothing(
    begin: Callable[..., Life], path: Path, at: int
) -> None:
    ended(filled(begin))
    where = head_at(6) + at
    alter(path, "heads", where, bytes([(path / "heads").read_bytes()[where] ^ 4]))
    life = begin()
    assert life.found == {1: 100, 4: 102}
    assert life.folder.found.num_damaged == 1


def test_a_head_of_which_only_the_beginning_was_written_holds_nothing(
    begin: Callable[..., Life], path: Path
) -> None:
    life = filled(begin)
    half = HEAD.itemsize // 2
    old = (path / "heads").read_bytes()[head_at(6) : head_at(6) + half]
    life.sink([8], [6], stamp=500)
    ended(life)
    alter(path, "heads", head_at(6), old)
    assert begin().found == {1: 100, 4: 102}


def test_heads_that_were_swapped_are_found_and_never_believed(
    begin: Callable[..., Life], path: Path
) -> None:
    ended(filled(begin))
    raw, size = (path / "heads").read_bytes(), HEAD.itemsize
    alter(path, "heads", head_at(1), raw[head_at(6) : head_at(6) + size])
    alter(path, "heads", head_at(6), raw[head_at(1) : head_at(1) + size])
    life = begin()
    slots = dict(zip(life.remains.keys[:, 0].tolist(), life.remains.slots.tolist(), strict=True))
    assert slots == {1: 6, 6: 1, 4: 4}
    assert life.rise([9, 5], [slots[1], slots[6]]) == 0


def test_slots_that_were_swapped_with_their_heads_are_what_they_were(
    begin: Callable[..., Life], path: Path
) -> None:
    life = filled(begin)
    before, bytes_each = life.pages.copy(), life.file.handle.block_bytes
    ended(life)
    for name, start, size in (("heads", HEADS_AT, HEAD.itemsize), ("slab", 0, bytes_each)):
        raw = (path / name).read_bytes()
        one, other = (raw[start + slot * size :][:size] for slot in (1, 6))
        alter(path, name, start + size, other)
        alter(path, name, start + 6 * size, one)
    life = begin()
    assert life.rise([9, 5], [6, 1]) == 2
    assert (life.pages[:, 9] == before[:, 3]).all()
    assert (life.pages[:, 5] == before[:, 0]).all()


def test_a_slab_that_was_cut_short_is_found_as_far_as_it_goes(
    begin: Callable[..., Life], path: Path
) -> None:
    life = filled(begin)
    ended(life)
    os.truncate(path / "slab", 5 * life.file.handle.block_bytes)
    assert begin().found == {1: 100, 4: 102}


def test_heads_that_were_cut_short_are_found_as_far_as_they_go(
    begin: Callable[..., Life], path: Path
) -> None:
    ended(filled(begin))
    os.truncate(path / "heads", head_at(6) + 5)
    assert begin().found == {1: 100, 4: 102}


def _remove(name: str) -> Callable[[Path], None]:
    return lambda path: (path / name).unlink()


def _overwrite(name: str, at: int, raw: bytes) -> Callable[[Path], None]:
    return lambda path: alter(path, name, at, raw)


def _cut(name: str, size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path / name, size)


@pytest.mark.parametrize(
    ("what", "told"),
    [
        (_remove("heads"), "heads or its slab are missing"),
        (_remove("slab"), "heads or its slab are missing"),
        (_remove("secret"), "there is only resets, heads, slab"),
        (_remove("resets"), "there is only secret, heads, slab"),
        (_cut("heads", 10), "cut short"),
        (_cut("resets", 10_000), "cut short"),
        (_cut("secret", 5), "5 bytes"),
        (_overwrite("heads", 0, b"PCDISK01"), "another version"),
        (_overwrite("heads", 24, bytes(4)), "blocks of 0 tokens"),
        (_overwrite("secret", 0, bytes(32)), "of another folder"),
        (_overwrite("resets", 0, b"PCRESET9"), "of another folder"),
        (_overwrite("heads", 10, bytes(8)), "another secret"),
        (_overwrite("heads", 28, b"3y2"), "blocks that there cannot be"),
        (_overwrite("heads", 28, b"0x0x0:float32\0"), "blocks that there cannot be"),
        (_overwrite("heads", 28, b"\xff"), "blocks that there cannot be"),
    ],
)
def test_a_folder_that_is_not_whole_is_begun_anew_and_says_why(
    begin: Callable[..., Life], path: Path, what: Callable[[Path], None], told: str
) -> None:
    life = filled(begin)
    secret = life.folder.key_secret
    ended(life)
    what(path)
    life = begin()
    assert not life.found
    assert told in life.folder.cold
    assert life.folder.key_secret != secret, "nothing of before can be taken for its own"
    assert life.sink([3], [2]) == 1
    assert begin().found == {2: 100}
    assert begin().folder.cold == ""


def test_heads_and_slab_of_another_folder_are_not_believed(
    begin: Callable[..., Life], path: Path, tmp_path: Path
) -> None:
    ended(filled(begin))
    other = Life(tmp_path / "other")
    other.sink([3, 0, 7], [2, 3, 5])
    other.close()
    for name in ("heads", "slab"):
        (tmp_path / "other" / name).replace(path / name)
    life = begin()
    assert not life.found
    assert "another secret" in life.folder.cold
    ended(life)
    raw = head_at(2), HEAD.itemsize
    life = begin()
    life.sink([3], [4])
    ended(life)
    third = Life(tmp_path / "third")
    third.sink([3], [2])
    third.close()
    head = (tmp_path / "third" / "heads").read_bytes()[raw[0] :][: raw[1]]
    alter(path, "heads", raw[0], head)  # a single one of them
    life = begin()
    assert life.found == {4: 100}
    assert life.folder.found.num_damaged == 1


@pytest.mark.parametrize(
    "other", [{"layout": Layout(3, 2, 8, "float32")}, {"block_size": 8}], ids=str
)
def test_blocks_of_another_form_are_given_up(
    begin: Callable[..., Life], other: dict[str, object]
) -> None:
    filled(begin)
    life = begin(**other)
    assert not life.found
    assert "there were blocks of 4 tokens" in life.folder.cold
    assert not begin().found


# ---------------------------------------------------------------------- resets


def test_resets_outlive_the_service(begin: Callable[..., Life]) -> None:
    life = filled(begin)
    before = life.folder.resets.of(SPACE)
    life.folder.resets.advance(SPACE)
    assert life.folder.resets.of(SPACE) == before + 1
    others = [Namespace("model", tenant=f"t{number}") for number in range(50)]
    assert sum(life.folder.resets.of(one) != before for one in others) < 5
    assert begin().folder.resets.of(SPACE) == before + 1
    approximate = SPACE._replace(approximate=True)
    assert begin().folder.resets.of(approximate) == before + 1


def test_a_copy_of_a_folder_has_another_name_and_finds_what_lies_in_it(
    begin: Callable[..., Life], path: Path, tmp_path: Path
) -> None:
    life = filled(begin)
    name = life.folder.own_name
    ended(life)
    copy = tmp_path / "copy"
    shutil.copytree(path, copy)
    assert begin().folder.own_name == name
    names = []
    for _ in range(2):
        other = Life(copy)
        assert other.remains.slots.tolist()
        names.append(other.folder.own_name)
        other.close()
    assert names[0] == names[1] != name


def test_after_another_boot_a_folder_has_another_name(
    begin: Callable[..., Life], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As has one that was copied with the disk on which it lies, numbers of files and all."""
    life = filled(begin)
    name = life.folder.own_name
    ended(life)
    boot = tmp_path / "boot"
    boot.write_text("another\n")
    monkeypatch.setattr(resets, "_BOOT_ID", boot)
    life = begin()
    assert life.found
    assert life.folder.own_name != name
    other = life.folder.own_name
    assert begin().folder.own_name == other


def test_who_resets_much_costs_tenants_in_other_rows_nothing(
    begin: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resets, "COLUMNS", 8)
    counts = begin().folder.resets
    for number in range(200):
        counts.advance(Namespace("model", tenant="red", salt=str(number)))
    assert counts.of(Namespace("another", tenant="red"))
    mine = [Namespace("model", tenant=f"t{number}") for number in range(100)]
    assert sum(bool(counts.of(one)) for one in mine) < 10


def test_everything_of_a_tenant_or_of_all_is_reset_for_good(begin: Callable[..., Life]) -> None:
    counts = begin().folder.resets
    mine = [Namespace(f"model-{number}", tenant="acme", salt=str(number)) for number in range(50)]
    others = [Namespace("model", tenant=f"t{number}") for number in range(50)]
    counts.advance(mine[0])
    before = [counts.of(one) for one in [*mine, *others]]
    counts.advance_all("acme")
    assert [counts.of(one) for one in mine] == [one + 1 for one in before[:50]]
    assert sum(bool(counts.of(one)) for one in others) < 5
    counts = begin().folder.resets
    assert counts.of(mine[0]) == before[0] + 1
    counts.advance_all(None)
    assert all(counts.of(one) for one in others)
    assert counts.of(mine[0]) == before[0] + 2
    assert begin().folder.resets.of(others[0]) == counts.of(others[0])


def test_after_another_boot_only_what_was_closed_in_order_is_believed(
    begin: Callable[..., Life], path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = filled(begin)
    killed = {one.name: one.read_bytes() for one in path.iterdir()}  # as the disk has it
    boot = tmp_path / "boot"
    boot.write_text("another\n")
    ended(life)
    monkeypatch.setattr(resets, "_BOOT_ID", boot)
    life = begin()
    assert len(life.found) == 3, "it was closed in order"
    ended(life)
    for name, raw in killed.items():
        (path / name).write_bytes(raw)
    life = begin()
    assert not life.found
    assert "machine has ended before the service" in life.folder.cold


def test_in_the_same_boot_nothing_need_be_closed(begin: Callable[..., Life], path: Path) -> None:
    life = filled(begin)
    life.folder.resets.advance(SPACE)
    killed = {one.name: one.read_bytes() for one in path.iterdir()}
    ended(life)
    for name, raw in killed.items():
        (path / name).write_bytes(raw)
    life = begin()
    assert len(life.found) == 3
    assert life.folder.resets.of(SPACE) == 1


def test_a_reset_that_cannot_be_written_down_leaves_nothing_to_be_found(
    begin: Callable[..., Life], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    life = filled(begin)

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(resets.os, "pwrite", full)
        life.folder.resets.advance(SPACE)
    assert life.folder.resets.of(SPACE) == 1, "in this life it holds"
    assert "No space left" in life.folder.cold
    assert not begin().found


def test_a_reset_is_refused_if_what_lies_there_cannot_even_be_removed(
    begin: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    life = filled(begin)

    def fails(*_: object, **__: object) -> int:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(resets.os, "pwrite", fails)
        patch.setattr(Path, "unlink", fails)
        with pytest.raises(ServiceUnavailable, match="remove the folder"):
            life.folder.resets.advance(SPACE)
    assert life.folder.resets.of(SPACE) == 0


def test_counts_that_were_lost_do_not_begin_with_what_was_reset(
    begin: Callable[..., Life], path: Path
) -> None:
    life = filled(begin)
    assert life.folder.resets.of(SPACE) == 0
    name = life.folder.own_name
    life.folder.resets.advance(SPACE)
    ended(life)
    alter(path, "resets", 0, b"damaged")
    for _ in range(2):
        counts = begin().folder.resets
        assert counts.after_loss
        others = [Namespace("model", tenant=f"t{number}") for number in range(9)]
        assert {counts.of(one) for one in (SPACE, *others)} == {1}
    folder = begin().folder
    other = folder.own_name
    assert other != name
    folder.resets.advance(SPACE)
    assert begin().folder.own_name == other
    assert begin().folder.resets.of(SPACE) == 2


# ---------------------------------------------------------------------- what was abandoned


def test_a_copy_of_what_became_somebody_elses_meanwhile_is_found_by_nobody(
    begin: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The block is lent, and its new owner writes, before the porter has read the first page: what
    he writes beside the slot would be right, but for whose it is."""
    life = filled(begin)
    haul = life.haul([8, 9], [2, 3], is_up=False, stamp=300)
    sums = life.porter._sums
    summed = sums.of_contents

    def late(*args: object) -> np.ndarray:
        life.abandoned.note(haul)
        return summed(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(sums, "of_contents", late)
    life.pages[:, [8, 9]] = 77
    assert life.porter.carry(haul) == 0
    assert begin().found == {1: 100, 6: 101, 4: 102}


def test_another_haul_of_the_same_blocks_is_believed() -> None:
    abandoned = Abandonments.make(4)
    try:
        haul = Haul(HaulId(5), False, array("i", [2, 3]), array("i"), array("q"), b"")
        abandoned.note(haul)
        assert abandoned.have(haul)
        assert not abandoned.have(haul._replace(id=HaulId(6)))
        assert not abandoned.have(haul._replace(blocks=array("i", [3])))
    finally:
        abandoned.close()


def test_a_haul_stays_abandoned_when_its_block_is_lent_and_abandoned_again() -> None:
    """The porter stands still meanwhile, and has the first haul still before him."""
    abandoned = Abandonments.make(4)
    try:
        first = Haul(HaulId(5), False, array("i", [2, 3]), array("i"), array("q"), b"")
        later = first._replace(id=HaulId(9), blocks=array("i", [2, 1]))
        abandoned.note(first)
        abandoned.note(later)
        assert abandoned.have(later)
        assert abandoned.have(first)
    finally:
        abandoned.close()


# ---------------------------------------------------------------------- how much there may be


def test_many_heads_are_read_in_parts_and_tell_how_far_they_are(
    begin: Callable[..., Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan, "_AT_ONCE_BYTES", 2 * HEAD.itemsize)
    monkeypatch.setattr(scan, "_TOLD_EVERY_S", -1.0)
    told: list[str] = []
    monkeypatch.setattr(scan.log, "info", lambda _, share, slots: told.append(f"{share} {slots}"))
    filled(begin)
    assert begin().found == {1: 100, 6: 101, 4: 102}
    assert told == ["20% 10", "40% 10", "60% 10", "80% 10", "100% 10"]


@pytest.mark.parametrize("names", [("heads",), ("heads", "slab")])
def test_files_of_a_size_that_there_cannot_be_do_not_keep_a_start_waiting(
    begin: Callable[..., Life], path: Path, monkeypatch: pytest.MonkeyPatch, names: tuple[str, ...]
) -> None:
    """Of holes: on some machines the disk is smaller than that."""
    read: list[int] = []
    whole = scan._read
    monkeypatch.setattr(
        scan, "_read", lambda fd, count, at: read.append(count) or whole(fd, count, at)
    )
    ended(filled(begin))
    for name in names:
        os.truncate(path / name, 1 << 34)
    read.clear()
    assert begin().found == {1: 100, 6: 101, 4: 102}
    assert sum(read) <= NUM_SLOTS * HEAD.itemsize


def test_nobody_else_may_read_what_keys_are_drawn_from(
    begin: Callable[..., Life], path: Path
) -> None:
    filled(begin)
    for name in ("secret", "resets", "heads", "slab", "lock"):
        assert (path / name).stat().st_mode & 0o777 == 0o600
    handle = PoolHandle("none", "", 1, SIZE, LAYOUT, 0, 0)
    raw = (path / "heads").read_bytes()
    assert (path / "secret").read_bytes() not in raw
    assert len(raw) == HEADS_AT + NUM_SLOTS * (slot_bytes(handle) - handle.block_bytes)
