"""What goes to a store and comes from it: names, and blocks that are compared where they arrive."""

from __future__ import annotations

from array import array
from collections.abc import Iterator
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache.core.hauls import Haul
from prefixcache.core.remote import NAME_BYTES
from prefixcache.pool import PoolFile, pages_of
from prefixcache.service.tiers.errands import (
    HEAD_BYTES,
    Answer,
    Errand,
    length_of,
    pack_answer,
    pack_errand,
    read_answer,
    read_errand,
)
from prefixcache.service.tiers.objects import (
    Namer,
    Packer,
    Stage,
    head_bytes,
    map_stage,
    object_bytes,
)
from prefixcache.service.tiers.orders import pack_haul, read_haul
from prefixcache.service.tiers.porter import Porter
from prefixcache.service.tiers.slab import SlabMap, describe
from prefixcache.types import HaulId, Layout, Namespace, pack

LAYOUTS = [
    (Layout(2, 1, 4, "float32"), 4),
    (Layout(3, 2, 8, "bfloat16"), 16),
    (Layout(1, 1, 3, "float8_e4m3fn"), 1),
    (Layout(planes=5, page_bytes=4096, format="other/pages"), 16),
]
NAMES = b"".join(bytes([at]) * NAME_BYTES for at in (1, 2, 3))


class Bench:
    """A pool of twelve blocks, slots on the way to a store, and a porter in this process."""

    def __init__(self, layout: Layout, block_size: int, secret: bytes) -> None:
        self.file = PoolFile.create(layout, 12, block_size)
        handle = self.file.handle
        self.stage = Stage(handle)
        self.map = SlabMap({"pool": describe(handle)})
        packer = Packer(self.map.memory, self.map.handle, self.stage.order(), secret)
        self.porter = Porter(self.map, 7, packer=packer)
        self.memory, self.slots = map_stage(self.stage.order())
        self.pages = pages_of(self.file.map(), handle)
        self.random = np.random.default_rng(1)
        self.pages[:] = self.random.integers(0, 256, self.pages.shape, np.uint8)
        self.block_size = block_size

    def haul(self, blocks: list[int], slots: list[int], *, is_up: bool) -> Haul:
        tokens = np.arange(len(blocks) * self.block_size, dtype=np.uint32).tobytes()
        told = (array("i", blocks), array("i", slots), array("q"), tokens)
        haul = Haul(HaulId(1), is_up, *told, names=NAMES[: NAME_BYTES * len(blocks)])
        assert read_haul(pack_haul(haul)) == haul
        return haul

    def close(self) -> None:
        self.stage.close()
        self.file.close()


@pytest.fixture(params=[b"", b"a secret of ours"], ids=["summed", "signed"])
def secret(request: pytest.FixtureRequest) -> bytes:
    told: bytes = request.param
    return told


@pytest.fixture(params=LAYOUTS, ids=lambda one: f"{one[0]}-{one[1]}")
def bench(request: pytest.FixtureRequest, secret: bytes) -> Iterator[Bench]:
    bench = Bench(*request.param, secret)
    yield bench
    bench.close()


def test_what_comes_from_the_store_is_what_went_there(bench: Bench) -> None:
    before = bench.pages.copy()
    assert bench.porter.carry(bench.haul([3, 0, 7], [2, 1, 0], is_up=False)) == 3
    assert (bench.pages == before).all()
    bench.slots[:3] = bench.slots[[1, 2, 0]]  # through other slots of another machine
    bench.pages[:] = 0
    assert bench.porter.carry(bench.haul([9, 4, 3], [1, 0, 2], is_up=True)) == 3
    for new, old in ((9, 3), (4, 0), (3, 7)):
        assert (bench.pages[:, new] == before[:, old]).all()


def test_every_byte_that_is_not_what_it_was_is_a_miss(bench: Bench) -> None:
    size = object_bytes(bench.map.handle)
    assert bench.slots.shape[1] == size
    bench.porter.carry(bench.haul([3], [0], is_up=False))
    told, head = 8 + 64 + 4 * bench.block_size, head_bytes(bench.block_size)  # a gap follows
    places = [*range(0, told, 3), *bench.random.integers(head, size, 16).tolist(), size - 1]
    for at in places:
        bench.slots[0, at] ^= 4
        assert bench.porter.carry(bench.haul([5], [0], is_up=True)) == 0, f"byte {at}"
        bench.slots[0, at] ^= 4
    assert bench.porter.carry(bench.haul([5], [0], is_up=True)) == 1


@pytest.mark.parametrize("at", [0, 1, 2])
def test_another_object_in_its_place_is_a_miss_from_there_on(bench: Bench, at: int) -> None:
    bench.porter.carry(bench.haul([3, 0, 7], [0, 1, 2], is_up=False))
    bench.slots[at] = bench.slots[(at + 1) % 3]
    assert bench.porter.carry(bench.haul([3, 0, 7], [0, 1, 2], is_up=True)) == at


def test_what_others_have_signed_is_a_miss() -> None:
    layout, size = LAYOUTS[0]
    ours, theirs = Bench(layout, size, b"our secret"), Bench(layout, size, b"their secret")
    try:
        theirs.porter.carry(theirs.haul([3], [0], is_up=False))
        ours.slots[0] = theirs.slots[0]
        assert ours.porter.carry(ours.haul([3], [0], is_up=True)) == 0
    finally:
        ours.close()
        theirs.close()


SPACES = [
    Namespace("m@1"),
    Namespace("m@2"),
    Namespace("m@1", "a"),
    Namespace("m@1", "", "a"),
    Namespace("m@1", "", "", "a"),
    Namespace("m@1a"),
]


def test_whatever_differs_has_another_name() -> None:
    namers = [
        Namer("2x1x4:float32", 4),
        Namer("2x1x4:bfloat16", 4),
        Namer("2x1x4:float32", 8),
        Namer("2x1x4:float32", 4, b"secret"),
        Namer("2x1x4:float32", 4, b"another"),
    ]
    tokens = [pack(range(8)), pack([9, *range(1, 8)])]
    found = [
        namer.names(namer.base(space, resets), prompt, 0)[-NAME_BYTES:]
        for namer in namers
        for space in SPACES
        for resets in (b"", b"1", b"2")
        for prompt in tokens
    ]
    assert len(set(found)) == len(found)


def test_a_block_is_named_by_all_that_is_before_it() -> None:
    namer = Namer("2x1x4:float32", 4)
    base = namer.base(SPACES[0], b"")
    tokens = pack(range(40))
    names = namer.names(base, tokens, 0)
    assert len(names) == 10 * NAME_BYTES
    assert namer.names(base, tokens, 7) == names[7 * NAME_BYTES :]
    assert namer.names(base, tokens[: 20 * 4 + 3], 0) == names[: 5 * NAME_BYTES]
    parts = [names[at : at + NAME_BYTES] for at in range(0, len(names), NAME_BYTES)]
    assert all(one != other for one, other in combinations(parts, 2))


numbers = st.integers(-(2**63), 2**63 - 1)


@given(
    numbers,
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(0, 2**31 - 1), max_size=20),
    st.binary(max_size=100),
)
def test_errands_are_read_as_they_were_written(
    number: int, first: int, slots: list[int], text: bytes
) -> None:
    text = text if not slots else bytes(len(slots) * NAME_BYTES)
    errand = Errand(number, first, array("i", slots), text)
    frame = pack_errand(errand)
    assert length_of(frame[:HEAD_BYTES]) == len(frame) - HEAD_BYTES
    assert read_errand(frame[HEAD_BYTES:]) == errand


@given(numbers, st.floats(0, 1e9), st.binary(max_size=50), st.booleans(), st.text(max_size=30))
def test_answers_are_read_as_they_were_written(
    number: int, seconds: float, each: bytes, has_names: bool, error: str
) -> None:
    names = bytes(len(each) * NAME_BYTES) if has_names else b""
    for answer in (Answer(number, seconds, each, names), Answer(number, seconds, error=error)):
        frame = pack_answer(answer)
        assert length_of(frame[:HEAD_BYTES]) == len(frame) - HEAD_BYTES
        assert read_answer(frame[HEAD_BYTES:]) == answer


@given(st.binary(max_size=200))
def test_what_is_no_frame_is_refused(frame: bytes) -> None:
    for read in (read_errand, read_answer, read_haul):
        try:
            read(frame)
        except ValueError:
            continue
    with pytest.raises(ValueError, match="a frame of"):
        length_of(b"\xff" * HEAD_BYTES)
