"""Pages of any format: whose bytes lie where, who may share them, and what is refused by name."""

from __future__ import annotations

import asyncio
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import prefixcache
from prefixcache.client import Session, codec
from prefixcache.client.session_core import SessionCore
from prefixcache.config import load, parse_layout
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import InvalidRequest, LayoutMismatch
from prefixcache.pool import HEADER_BYTES, PoolFile, map_pool, pages_of
from prefixcache.service.backing import Backing
from prefixcache.service.persistence.checksums import NUM_FACTS, Checksums
from prefixcache.service.persistence.directory import FORMER
from prefixcache.service.pool.zeroing import BlockZeroer
from prefixcache.types import MAX_FORMAT, Grant, Layout, Namespace, WorkerId, pack
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import ServiceProcess, running

OURS = Layout(3, 2, 4, "float32")
"""6 planes: keys and values of 3 layers; 128 bytes a page of 4 tokens."""
THEIRS = Layout(planes=3, page_bytes=256, format="vllm-0.32/LBHNC/amx/float32")
"""The same 768 bytes of a block in an order of which nothing is known but this."""
SIZE = 4
NUM_BLOCKS = 96
ME, MINE = WorkerId(1), Namespace("m")

formats = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
opaque = st.builds(
    Layout,
    planes=st.integers(1, 7),
    page_bytes=st.integers(1, 130),
    format=formats.filter(lambda text: text != "prefixcache"),
)
ours = st.builds(
    Layout,
    st.integers(1, 4),
    st.integers(1, 3),
    st.integers(1, 5),
    st.sampled_from(("bfloat16", "float32")),
)
layouts = st.one_of(opaque, ours)


# ------------------------------------------------------------------------------ written and read


@given(layouts)
def test_a_layout_is_read_as_it_is_written_as_a_text_and_on_the_wire(layout: Layout) -> None:
    assert parse_layout(str(layout)) == layout
    message = pb.Layout()
    codec.write_layout(layout, message)
    assert codec.read_layout(pb.Layout.FromString(message.SerializeToString())) == layout
    assert replace(layout) == layout


def test_our_own_form_is_the_same_bytes_on_the_wire_as_ever() -> None:
    """A client that knows four fields writes this, and reads it."""
    message = pb.Layout()
    codec.write_layout(Layout(30, 3, 64, "bfloat16"), message)
    assert message.SerializeToString() == bytes([0x08, 30, 0x10, 3, 0x18, 64, 0x20, 1])


@pytest.mark.parametrize(
    ("message", "told"),
    [
        (pb.Layout(planes=3), "3 planes of 0 bytes.* need the name of their format"),
        (pb.Layout(page_bytes=3), "0 planes of 3 bytes.* need the name of their format"),
        (pb.Layout(format="f"), "planes is 0"),
        (pb.Layout(format="f", planes=3), "page_bytes is 0"),
        (pb.Layout(format="f", planes=3, page_bytes=8, head_dim=4), "no layers"),
        (pb.Layout(format="f", planes=3, page_bytes=8, dtype=1), "an element type beside"),
        (pb.Layout(format="f", planes=3, page_bytes=8, dtype=3), "no layers.* type"),
        (pb.Layout(format="a\x1b[2J", planes=3, page_bytes=8), r"U\+001B at 1"),
    ],
)
def test_half_a_layout_on_the_wire_is_refused_and_nothing_of_it_ignored(
    message: pb.Layout, told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        codec.read_layout(message)


def test_our_own_format_may_be_named_on_the_wire() -> None:
    message = pb.Layout(num_layers=2, num_kv_heads=3, head_dim=4, dtype=3)
    want = Layout(2, 3, 4, "float32")
    for planes in (0, 4):
        message.format, message.planes = "prefixcache", planes
        assert codec.read_layout(message) == want


def test_the_short_form_is_a_plane_of_keys_and_one_of_values_in_each_layer() -> None:
    layout = Layout(30, 3, 64, "bfloat16")
    assert (layout.planes, layout.format) == (60, "prefixcache")
    assert layout.block_bytes(16) == 60 * 16 * 3 * 64 * 2
    assert THEIRS.block_bytes(SIZE) == OURS.block_bytes(SIZE) == 768
    with pytest.raises(InvalidRequest, match="bytes of one token"):
        _ = THEIRS.token_bytes


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"planes": 3, "page_bytes": 256}, "need the name of their format"),
        ({"planes": 3, "page_bytes": 256, "format": "prefixcache"}, "need the name of their"),
        ({"planes": 0, "page_bytes": 256, "format": "f"}, "planes is 0.*1 to 65,536"),
        ({"planes": 3, "page_bytes": -1, "format": "f"}, "page_bytes is -1.*1 to"),
        ({"planes": 3, "page_bytes": 2.5, "format": "f"}, "page_bytes .* 2.5"),
        ({"planes": True, "page_bytes": 2, "format": "f"}, "planes .* True"),
        ({"planes": 3, "page_bytes": 256, "format": "a\nb"}, r"U\+000A at 1"),
        ({"planes": 3, "page_bytes": 256, "format": "a b"}, r"U\+0020 at 1"),
        ({"planes": 3, "page_bytes": 256, "format": "a\u202e"}, r"U\+202E at 1"),
        ({"planes": 3, "page_bytes": 256, "format": "f" * (MAX_FORMAT + 1)}, "201 characters"),
        ({"planes": 3, "page_bytes": 256, "format": 7}, "is a text, not 7"),
        ({"num_layers": 3, "planes": 3, "page_bytes": 256, "format": "f"}, "no layers"),
        ({"dtype": "float32", "planes": 3, "page_bytes": 256, "format": "f"}, "no layers.* type"),
        ({"num_layers": 60, "num_kv_heads": 12288, "head_dim": "vllm"}, "pages are given by name"),
    ],
)
def test_what_describes_no_pages_is_refused_with_its_number(
    fields: dict[str, Any], told: str
) -> None:
    with pytest.raises(InvalidRequest, match=told):
        Layout(**fields)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("pages:3x256", "pages:PLANESxPAGE_BYTES:FORMAT"),
        ("pages:3x256:", "pages:PLANESxPAGE_BYTES:FORMAT"),
        ("pages:0x256:f", "planes is 0"),
        ("pages:3x9999999999:f", "page_bytes is 9999999999"),
        ("pages:3x256:a b", r"U\+0020 at 1"),
        ("pages:3x256:f\n", r"U\+000A at 1"),
        ("pages:3x256:prefixcache", "need the name of their format"),
        ("30x0x64", "30x3x64:bfloat16"),
        ("x" * 5000, "cannot read the layout 'x{57}[.]{3}'; write"),
    ],
)
def test_a_text_that_is_no_layout_is_refused(text: str, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        parse_layout(text)


# --------------------------------------------------------------------------- whose bytes lie where


class Pool:
    """A pool of some layout, filled with random bytes, that knows by itself where a page lies."""

    def __init__(self, layout: Layout, num_blocks: int, size: int, folder: Path) -> None:
        self.file = PoolFile.create(layout, num_blocks, size, directory=folder)
        self.handle = self.file.handle
        self.map = self.file.map()
        self.map[HEADER_BYTES:] = Random(num_blocks).randbytes(self.handle.num_bytes)
        self.page_bytes = layout.block_bytes(size) // layout.planes

    def places(self, block: int) -> list[range]:
        """Where in the file the pages of a block lie."""
        starts = [
            HEADER_BYTES + (plane * self.handle.num_blocks + block) * self.page_bytes
            for plane in range(self.handle.layout.planes)
        ]
        return [range(start, start + self.page_bytes) for start in starts]

    def close(self) -> None:
        self.map.close()
        self.file.close()


@given(layouts, st.integers(1, 9), st.sampled_from((1, 4, 16)), st.data())
@settings(max_examples=150, deadline=None)
def test_zeroing_blocks_writes_each_of_their_pages_and_nothing_else(
    layout: Layout, num_blocks: int, size: int, data: st.DataObject
) -> None:
    chosen = data.draw(st.sets(st.integers(0, num_blocks - 1)))
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(layout, num_blocks, size, Path(folder))
        want = bytearray(pool.map[:])
        for block in chosen:
            for place in pool.places(block):
                want[place.start : place.stop] = bytes(len(place))
        zeroer = BlockZeroer(pool.handle)
        zeroer(array("i", sorted(chosen)))
        zeroer.close()
        assert pool.map[:] == bytes(want)
        pool.close()


@given(layouts, st.integers(2, 6), st.sampled_from((1, 4, 16)), st.data())
@settings(max_examples=150, deadline=None)
def test_the_sum_of_a_block_sees_every_byte_of_its_pages_and_none_of_others(
    layout: Layout, num_blocks: int, size: int, data: st.DataObject
) -> None:
    block = data.draw(st.integers(0, num_blocks - 1))
    fill = data.draw(st.integers(1, size))  # a partly filled block is summed as a whole, too
    facts = np.zeros((1, NUM_FACTS), np.uint32)
    facts[0, 0] = block
    tokens = np.arange(fill, dtype=np.uint32).reshape(1, fill)
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(layout, num_blocks, size, Path(folder))
        sums = Checksums(pool.map, pool.handle, seed=7)
        before = sums.of(facts, tokens)
        at = data.draw(st.integers(HEADER_BYTES, len(pool.map) - 1))
        pool.map[at] ^= data.draw(st.integers(1, 255))
        is_its_own = any(at in place for place in pool.places(block))
        assert (sums.of(facts, tokens) != before).all() == is_its_own
        sums.close()
        pool.close()


# ----------------------------------------------------------------------- through a living service


def serve(folder: Path, layout: Layout | None, *flags: str) -> Any:
    given = [] if layout is None else ["--layout", str(layout)]
    memory = NUM_BLOCKS * OURS.block_bytes(SIZE)
    return running(
        f"unix:{folder}/l.sock", "--memory", str(memory), "--block-size", str(SIZE), *given, *flags
    )


@pytest.fixture
def theirs(tmp_path: Path) -> Iterator[ServiceProcess]:
    with serve(tmp_path, THEIRS) as service:
        yield service


def test_a_pool_of_another_s_pages_says_how_it_divides_them(theirs: ServiceProcess) -> None:
    told = "\n".join(theirs.lines)
    assert "256 bytes per block, format vllm-0.32/LBHNC/amx/float32" in told
    with prefixcache.connect(theirs.target) as client:
        pool = client.attach("m", THEIRS, block_size=SIZE).pool
    assert (pool.layout, pool.num_blocks, pool.block_size) == (THEIRS, NUM_BLOCKS, SIZE)
    assert (pool.planes, pool.page_bytes, pool.block_bytes) == (3, 256, 768)


def test_no_block_of_another_tenant_is_written_when_pages_are_wiped(
    theirs: ServiceProcess,
) -> None:
    """In the short form of the same size, parts of other blocks were: see below what it does."""
    with prefixcache.connect(theirs.target) as client:
        one = client.attach("m", THEIRS, tenant="one")
        two = client.attach("m", THEIRS, tenant="two")
        memory = map_pool(one.pool)
        pages = pages_of(memory, one.pool)
        with one.acquire(list(range(NUM_BLOCKS * SIZE))) as lease:
            pages[:] = 0xAB
            lease.commit(NUM_BLOCKS * SIZE)
        lease = two.acquire(list(range(1000, 1000 + 10 * SIZE)))
        mine = list(lease.block_table)
        assert not pages[:, mine].any()
        assert (np.delete(pages, mine, axis=1) == 0xAB).all()


def test_an_engine_of_another_order_shares_what_it_stores_down_to_the_token(
    theirs: ServiceProcess,
) -> None:
    """Heads outermost in a page, keys beside values: copies on write are whole pages."""
    prompts = list(range(100, 110)), [*range(100, 109), 7, 8, 9]
    with prefixcache.connect(theirs.target) as client:
        for prompt, cached in zip(prompts, (0, 9), strict=True):
            session = client.attach("m", THEIRS, block_size=SIZE)
            pages = pages_of(map_pool(session.pool), session.pool)
            numbers = pages.view(np.float32).reshape(3, NUM_BLOCKS, 2, SIZE, 8)
            with session.acquire(prompt) as lease:
                assert lease.num_cached == cached
                for copy in lease.copies:
                    pages[:, copy.dst] = pages[:, copy.src]
                for at in range(cached, len(prompt)):
                    block = lease.block_table[at // SIZE]
                    numbers[:, block, :, at % SIZE] = prompt[at]
                lease.commit(len(prompt))
                every = np.arange(len(prompt))
                table = np.array(lease.block_table)[every // SIZE]
                read = numbers[:, table, :, every % SIZE]
                assert (read == np.array(prompt)[:, None, None, None]).all()


def test_who_reads_pages_in_another_order_than_they_lie_in_would_lose_them() -> None:
    """Why formats are compared: the same bytes, wiped as if they lay in our order."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(OURS, NUM_BLOCKS, SIZE, Path(folder))
        pages_of(pool.map, pool.handle)[:] = 0xAB
        zeroer = BlockZeroer(pool.handle)
        zeroer(array("i", [20]))
        zeroer.close()
        as_theirs = pages_of(pool.map, replace(pool.handle, layout=THEIRS))
        harmed = np.flatnonzero((as_theirs == 0).any(axis=(0, 2))).tolist()
        assert harmed == [10, 58]  # of other tenants, and of block 20 nothing
        del as_theirs
        pool.close()


@pytest.mark.parametrize(
    ("layout", "block_size", "told"),
    [
        (OURS, None, "pages:3x256:vllm.* you sent 3x2x4:float32 .*yours in prefixcache.*--layout"),
        (
            replace(THEIRS, format="vllm-0.32/LBHNC/vec/float32"),
            None,
            "format vllm-0.32/LBHNC/amx/float32, yours in vllm-0.32/LBHNC/vec/float32",
        ),
        (replace(THEIRS, page_bytes=512), None, "3x256.*you sent pages:3x512.*planes x bytes"),
        (replace(THEIRS, planes=6), None, "3x256.*you sent pages:6x256"),
        (THEIRS, 8, "blocks of 4 tokens, you need 8: serve with --block-size 8"),
    ],
)
def test_another_layout_than_the_pool_s_is_refused_by_name(
    theirs: ServiceProcess, layout: Layout, block_size: int | None, told: str
) -> None:
    with prefixcache.connect(theirs.target) as client:
        with pytest.raises(LayoutMismatch, match=told):
            client.attach("m", layout, block_size=block_size)
        assert client.attach("m", THEIRS, block_size=SIZE).pool.layout == THEIRS


def test_pages_of_another_format_are_refused_by_a_pool_of_our_own(tmp_path: Path) -> None:
    with serve(tmp_path, OURS) as service, prefixcache.connect(service.target) as client:
        with pytest.raises(LayoutMismatch, match="format prefixcache, yours in vllm"):
            client.attach("m", THEIRS)
        assert client.attach("m", OURS).pool.layout == OURS


def test_the_first_worker_decides_the_pages_and_not_the_block_size(tmp_path: Path) -> None:
    with serve(tmp_path, None) as service, prefixcache.connect(service.target) as client:
        with pytest.raises(LayoutMismatch, match="--block-size 32"):
            client.attach("m", THEIRS, block_size=32)
        assert not client.snapshot().num_blocks  # nothing was decided
        client.attach("m", THEIRS, block_size=SIZE)
        assert client.snapshot().num_blocks == NUM_BLOCKS
        with pytest.raises(LayoutMismatch):
            client.attach("m", OURS)


def test_pages_so_small_that_their_accounts_fill_the_memory_are_refused() -> None:
    """Where nobody gave a layout, whoever attaches first chooses it."""
    backing = Backing(load({"memory": 2**31, "pool": "none"}))
    with pytest.raises(InvalidRequest, match=r"2,147,483,648 blocks of 1 bytes .* 134,217,728"):
        backing.settle_layout(Layout(planes=1, page_bytes=1, format="f"))
    assert backing.cache is None
    backing.settle_layout(THEIRS)
    backing.close()


def test_the_asynchronous_client_is_refused_alike(theirs: ServiceProcess) -> None:
    async def attach() -> None:
        async with await prefixcache.connect_async(theirs.target) as client:
            with pytest.raises(LayoutMismatch, match="yours in prefixcache"):
                await client.attach("m", OURS)
            with pytest.raises(LayoutMismatch, match="serve with --block-size 8"):
                await client.attach("m", THEIRS, block_size=8)
            session = await client.attach("m", THEIRS, block_size=SIZE)
            assert session.pool.layout == THEIRS
            await session.close()

    asyncio.run(attach())


def test_a_service_that_never_compared_block_sizes_is_refused_by_the_client() -> None:
    """An older one ignores the field: the client looks at what it answers."""
    session = SessionCore.__new__(Session)
    request = pb.AttachRequest(block_size=32)
    answer = pb.AttachResponse(pool=pb.PoolHandle(block_size=16))
    with pytest.raises(LayoutMismatch, match="blocks of 16 tokens, this worker needs 32"):
        session.attached(answer, request)
    request.block_size = 0
    session.attached(answer, request)


def test_a_block_size_that_no_pool_has_is_refused_before_it_is_sent(
    theirs: ServiceProcess,
) -> None:
    with prefixcache.connect(theirs.target) as client:
        for size in (0, 12, -4, 2**40):
            with pytest.raises(InvalidRequest, match="power of two"):
                client.attach("m", THEIRS, block_size=size)


def test_a_state_of_other_pages_is_a_cold_start(tmp_path: Path) -> None:
    state = ("--state", str(tmp_path / "state"))
    for layout, cached in ((THEIRS, 0), (THEIRS, 8), (replace(THEIRS, format="vllm-0.33"), 0)):
        with (
            serve(tmp_path, layout, *state) as service,
            prefixcache.connect(service.target) as client,
        ):
            session = client.attach("m", layout)
            with session.acquire(list(range(10))) as lease:
                assert lease.num_cached // SIZE * SIZE == cached
                lease.commit(10)
            session.close()
            client.close()
            assert service.stop() == 0


def revived(
    state: Path, first_block: int = 0, layout: Layout = OURS
) -> tuple[Backing, PrefixCache]:
    given = {"memory": NUM_BLOCKS * layout.block_bytes(SIZE), "block_size": SIZE, "layout": layout}
    backing = Backing(load({**given, "state": state, "first_block": first_block}))
    assert backing.cache is not None
    backing.cache.attach(ME, MINE, now=0.0)
    return backing, backing.cache


def granted(cache: PrefixCache, tokens: range) -> Grant:
    grant = cache.acquire(ME, MINE, pack(tokens), now=0.0)
    assert isinstance(grant, Grant)
    return grant


def test_kept_pages_of_another_order_are_believed_byte_for_byte(tmp_path: Path) -> None:
    """A changed byte is noticed wherever in a page it is: also behind a tail's last token."""
    backing, cache = revived(tmp_path / "state", layout=THEIRS)
    assert backing.handle is not None
    memory = map_pool(backing.handle)
    pages = pages_of(memory, backing.handle)
    pages[:] = np.random.default_rng(1).integers(0, 256, pages.shape, np.uint8)
    tables = []
    for start in range(0, 500, 100):
        stored = granted(cache, range(start, start + 10))  # two whole blocks, and two tokens
        cache.commit(ME, stored.lease, 10, now=0.0)
        cache.release(ME, stored.lease, now=0.0)
        tables.append(stored.block_table)
    backing.close()
    pages[2, tables[1][1], -1] ^= 1
    pages[1, tables[2][2], -1] ^= 1
    pages[0, tables[3][0], 0] ^= 128
    del pages
    memory.close()
    backing, cache = revived(tmp_path / "state", layout=THEIRS)
    found = [cache.lookup(MINE, pack(range(start, start + 11))) for start in range(0, 500, 100)]
    assert [one.num_hit for one in found] == [8, 4, 8, 0, 8]
    assert [one.num_partial for one in found] == [2, 0, 0, 0, 2]
    backing.close()


# ----------------------------------------------------------------------- blocks that are never lent


def test_blocks_before_the_first_are_never_lent_and_counted_nowhere(tmp_path: Path) -> None:
    with (
        serve(tmp_path, OURS, "--first-block", "1", "--partial", "tails") as service,
        prefixcache.connect(service.target) as client,
    ):
        assert "96 blocks of 4, 1 block is never lent = 380 tokens" in "\n".join(service.lines)
        session = client.attach("m", OURS)
        pool = session.pool
        assert (pool.num_blocks, pool.first_block) == (NUM_BLOCKS, 1)  # pages in memory
        assert client.snapshot().num_blocks == client.snapshot().free == NUM_BLOCKS - 1
        with pytest.raises(InvalidRequest, match="the whole pool has 95"):
            session.acquire(list(range(NUM_BLOCKS * SIZE)))
        for start in (0, 5000):  # once fresh, once by eviction
            tokens = list(range(start, start + (NUM_BLOCKS - 1) * SIZE))
            with session.acquire(tokens) as lease:
                assert sorted(lease.block_table) == list(range(1, NUM_BLOCKS))
                lease.commit(len(tokens))
        assert not client.check().failure


@pytest.mark.parametrize("was_written", [False, True])
def test_what_was_kept_in_a_block_that_is_now_never_lent_is_a_miss(
    tmp_path: Path, was_written: bool
) -> None:
    """The manifest's rows name block 0; or its stamp says that somebody may still write to it."""
    state = tmp_path / "state"
    backing, cache = revived(state, 0)
    assert backing.handle is not None
    memory = map_pool(backing.handle)  # of a worker of that life
    for start in (0, 100):
        stored = granted(cache, range(start, start + 10))
        assert (0 in stored.block_table) == (start == 0)
        cache.commit(ME, stored.lease, 10, now=0.0)
        cache.release(ME, stored.lease, now=0.0)
    granted(cache, range(500, 510))
    backing.close()
    if was_written:
        with (state / "stamps").open("r+b") as file:
            file.write((7).to_bytes(4, "little"))
    backing, cache = revived(state, 1)
    cache.check()
    assert cache.lookup(MINE, pack(range(11))).num_hit == 0
    assert cache.lookup(MINE, pack(range(100, 111))).num_hit == 8
    assert cache.snapshot(now=0.0).quarantined == 3
    cache.worker_gone(FORMER, now=0.0)
    everything = granted(cache, range(9000, 9000 + (NUM_BLOCKS - 1) * SIZE))
    assert sorted(everything.block_table) == list(range(1, NUM_BLOCKS))
    backing.close()
    memory.close()


def test_a_pool_of_nothing_but_reserved_blocks_is_refused(tmp_path: Path) -> None:
    told = "its first 200 are never lent.*or lower --first-block"
    with (
        pytest.raises(AssertionError, match=told),
        serve(tmp_path, OURS, "--first-block", "200"),
    ):
        pass
