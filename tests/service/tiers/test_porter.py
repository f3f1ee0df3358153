"""What the porter copies is what was there; what is not is found out where it has arrived."""

from __future__ import annotations

import contextlib
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.core.hauls import Haul
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.pool import PoolFile, pages_of
from prefixcache.service.tiers.orders import (
    Report,
    pack_haul,
    pack_report,
    read_haul,
    read_report,
)
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.slab import Slab, SlabMap, describe, slot_bytes
from prefixcache.types import HaulId, Layout

LAYOUTS = [
    (Layout(2, 1, 4, "float32"), 4),
    (Layout(3, 2, 8, "bfloat16"), 16),
    (Layout(1, 1, 3, "float8_e4m3fn"), 1),
    (Layout(planes=5, page_bytes=4096, format="other/pages"), 16),
]


class Bench:
    """A pool of twelve blocks, a slab of eight slots, and a porter in this process."""

    def __init__(self, layout: Layout, block_size: int) -> None:
        self.file = PoolFile.create(layout, 12, block_size)
        handle = self.file.handle
        self.slab = Slab(handle, 8 * slot_bytes(handle))
        self.map = SlabMap({"pool": describe(handle)} | self.slab.order())
        self.porter = Porter(self.map, 7)
        self.pages = pages_of(self.file.map(), handle)
        self.random = np.random.default_rng(1)
        self.pages[:] = self.random.integers(0, 256, self.pages.shape, np.uint8)
        self.block_size = block_size

    def haul(self, blocks: list[int], slots: list[int], *, is_up: bool, stamp: int = 100) -> Haul:
        tokens = np.arange(len(blocks) * self.block_size, dtype=np.uint32).tobytes()
        stamps = array("q", range(stamp, stamp + len(blocks)))
        return Haul(HaulId(1), is_up, array("i", blocks), array("i", slots), stamps, tokens)

    def close(self) -> None:
        self.slab.close()
        self.file.close()


@pytest.fixture(params=LAYOUTS, ids=lambda one: f"{one[0]}-{one[1]}")
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    bench = Bench(*request.param)
    yield bench
    bench.close()


def test_what_comes_back_is_what_went_down_wherever_it_lies_then(bench: Bench) -> None:
    before = bench.pages.copy()
    assert bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=False)) == 3
    assert (bench.pages == before).all()
    bench.pages[:] = 0
    assert bench.porter.carry(bench.haul([9, 4, 3], [5, 1, 2], is_up=True)) == 3
    for new, old in ((9, 3), (4, 0), (3, 7)):
        assert (bench.pages[:, new] == before[:, old]).all()
    others = [block for block in range(12) if block not in (9, 4, 3)]
    assert not bench.pages[:, others].any()


@pytest.mark.parametrize("at", [0, 1, 2])
def test_one_bit_that_is_not_what_it_was_is_a_miss_from_there_on(bench: Bench, at: int) -> None:
    bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=False))
    bench.map.slab[-1, (5, 1, 2)[at], -1] ^= 64
    assert bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=True)) == at


def test_slots_that_were_swapped_are_found_out_although_each_is_whole(bench: Bench) -> None:
    bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=False))
    bench.map.slab[:, [1, 2]] = bench.map.slab[:, [2, 1]]
    bench.map.heads[[1, 2]] = bench.map.heads[[2, 1]]
    assert bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=True)) == 1


def test_what_lay_there_before_is_not_what_is_asked_for(bench: Bench) -> None:
    bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=False, stamp=100))
    assert bench.porter.carry(bench.haul([3, 0, 7], [5, 1, 2], is_up=True, stamp=200)) == 0


def test_other_tokens_are_not_taken_for_these(bench: Bench) -> None:
    haul = bench.haul([3, 0], [5, 1], is_up=False)
    bench.porter.carry(haul)
    other = haul._replace(is_up=True, tokens=b"\xff" * len(haul.tokens))
    assert bench.porter.carry(other) == 0


def test_tokens_are_compared_and_not_only_summed(bench: Bench) -> None:
    haul = bench.haul([3], [5], is_up=False)
    bench.porter.carry(haul)
    other = haul._replace(is_up=True, tokens=b"\xff" * len(haul.tokens))
    summed = np.frombuffer(other.tokens, np.uint32).reshape(1, -1)
    bench.pages[:, 3] = bench.map.slab[:, 5]
    bench.map.heads["sum"][5:6] = bench.porter._sums.of_contents(np.array([3], np.uint32), summed)
    assert bench.porter.carry(other) == 0


def test_a_block_that_changes_while_it_is_copied_is_a_miss(bench: Bench) -> None:
    """As one that was needed for somebody else meanwhile."""
    bench.porter.carry(bench.haul([3], [5], is_up=False))
    bench.map.slab[:, 5] = bench.pages[:, 4]
    assert bench.porter.carry(bench.haul([3], [5], is_up=True)) == 0


def test_nobody_else_may_open_a_slab(bench: Bench) -> None:
    order = bench.slab.order()
    for part in ("slab", "heads"):
        assert Path(order[part]["name"]).stat().st_mode & 0o777 == 0o600
        assert Path(order[part]["name"]).exists()
    bench.slab.close()
    for part in ("slab", "heads"):
        assert not Path(order[part]["name"]).exists()


def test_a_slab_that_does_not_fit_is_refused_by_its_option(bench: Bench) -> None:
    with pytest.raises((InvalidRequest, PoolExhausted), match="--host"):
        Slab(bench.file.handle, 1 << 50)


def test_nothing_is_left_of_a_slab_whose_heads_find_no_room(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PoolFile] = []
    create = PoolFile.create

    def create_one(layout: Layout, num_blocks: int, block_size: int) -> PoolFile:
        if made:
            raise PoolExhausted("no room")
        made.append(create(layout, num_blocks, block_size))
        return made[0]

    monkeypatch.setattr(PoolFile, "create", create_one)
    with pytest.raises(PoolExhausted, match="--host"):
        Slab(bench.file.handle, 8 * slot_bytes(bench.file.handle))
    assert not Path(made[0].handle.name).exists()


@given(
    st.integers(1, 2**40),
    st.sampled_from(["down", "up", "on"]),
    st.lists(st.tuples(st.integers(0, 2**31 - 1), st.integers(0, 2**31 - 1)), min_size=1),
    st.integers(1, 3),
)
def test_an_order_is_read_as_it_was_written(
    number: int, way: str, pairs: list[tuple[int, int]], block_size: int
) -> None:
    blocks = array("i", [block for block, _ in pairs])
    slots = array("i", [slot for _, slot in pairs])
    stamps = array("q", range(len(pairs)))
    tokens = b"abcd" * block_size * len(pairs)
    haul = Haul(HaulId(number), way == "up", blocks, slots, stamps, tokens)
    if way == "on":
        haul = haul._replace(blocks=array("i"), tokens=b"", sources=blocks)
    assert read_haul(pack_haul(haul)) == haul
    report = Report(HaulId(number), len(pairs), 0.25, error=28)
    assert read_report(pack_report(report)) == report


@given(st.binary(max_size=200))
def test_what_is_no_order_is_refused(message: bytes) -> None:
    for read in (read_haul, read_report):
        with contextlib.suppress(ValueError):  # nothing else comes of it
            read(message)
