"""Views of scattered blocks: what the kernel has mapped, by its own list, after every step."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import time
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 - the name that everybody knows

from prefixcache.errors import InvalidRequest, LeaseExpired, PoolExhausted, Unsupported
from prefixcache.pool import SHARED_MEMORY, PoolFile
from prefixcache.types import Layout
from prefixcache_kernels import SharedPool, contiguous, paged_attention
from prefixcache_kernels.contiguous import ContiguousViews, runs, smallest_block_size
from service.service_process import environment

LAYOUT = Layout(num_layers=2, num_kv_heads=4, head_dim=64, dtype="float32")
"""A page of 4 tokens is one of the processor."""
NUM_BLOCKS = 32
MAPS = Path("/proc/self/maps")


def num_maps(path: str) -> int:
    return MAPS.read_text().count(path)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[PoolFile]:
    with PoolFile.create(LAYOUT, NUM_BLOCKS, 4, directory=SHARED_MEMORY) as made:
        yield made


@pytest.fixture
def pool(file: PoolFile) -> Iterator[SharedPool]:
    with SharedPool.map(file.handle) as mapped:
        mapped.blocks.normal_()
        yield mapped


@pytest.fixture
def views(file: PoolFile) -> Iterator[ContiguousViews]:
    with ContiguousViews.open(file.handle) as opened:
        yield opened
        opened.check()


def gathered(pool: SharedPool, layer: int, table: list[int]) -> torch.Tensor:
    return pool.keys(layer)[table].flatten(0, 1)


def test_scattered_blocks_are_read_side_by_side_without_a_copy(
    pool: SharedPool, views: ContiguousViews
) -> None:
    table = [7, 2, 3, 9]
    view = views.view(table)
    for layer in range(2):
        assert torch.equal(view.keys(layer), gathered(pool, layer, table))
        assert torch.equal(view.values(layer), pool.values(layer)[table].flatten(0, 1))
    pool.keys(1)[3, 2] = 42.0
    assert (view.keys(1)[2 * 4 + 2] == 42.0).all()
    assert view.pages().shape == (4, 4, 4096)


def test_neighbours_are_one_mapping_and_the_kernel_agrees(
    file: PoolFile, pool: SharedPool, views: ContiguousViews
) -> None:
    assert runs(torch.tensor([7, 2, 3, 4, 9, 8]).numpy()) == [
        (0, 7, 1),
        (1, 2, 3),
        (4, 9, 1),
        (5, 8, 1),
    ]
    before = num_maps(file.handle.name)
    view = views.view([7, 2, 3, 4, 9, 8])
    assert num_maps(file.handle.name) - before == view.num_maps == 4 * 4
    whole = views.view(range(NUM_BLOCKS))
    assert whole.num_maps == 4
    assert num_maps(file.handle.name) - before <= 4 * 4 + 4
    assert torch.equal(whole.keys(0), pool.keys(0).flatten(0, 1))


def test_all_layers_of_a_block_are_one_mapping_where_the_layout_allows() -> None:
    layout = Layout(planes=1, page_bytes=3 * 4096, format="tokens")
    with PoolFile.create(layout, 8, 4) as file, ContiguousViews.open(file.handle) as views:
        with file.map() as memory:
            memory[file.handle.offset + 5 * 3 * 4096] = 9
            view = views.view([5, 1, 2], capacity=4)
            assert view.num_maps == 3  # two runs, and the room that is left
            assert view.pages().shape == (1, 3, 3 * 4096)
            assert view.pages()[0, 0, 0] == 9
            with pytest.raises(Unsupported, match="`pages` gives it as bytes"):
                view.keys(0)
        views.check()


def test_a_shared_prefix_is_the_same_memory_in_both_views(
    pool: SharedPool, views: ContiguousViews
) -> None:
    one, two = views.view([7, 2, 3]), views.view([7, 2, 9])
    pool.keys(0)[2] = 5.0
    assert (one.keys(0)[4:8] == 5.0).all()
    assert (two.keys(0)[4:8] == 5.0).all()
    one.close()
    assert (two.keys(0)[4:8] == 5.0).all()


def test_a_table_that_grows_is_mapped_and_one_that_shrinks_unmapped(
    pool: SharedPool, views: ContiguousViews
) -> None:
    view = views.view([7, 2], capacity=8)
    for table in ([7, 2, 3], [7, 2, 3, 4, 5, 6, 0, 1], [7, 2, 3, 11], [7], [8, 7], [], [1, 2]):
        view.follow(array("i", table))
        views.check()
        assert view.num_blocks == len(table)
        assert torch.equal(view.keys(1), gathered(pool, 1, table))


def test_what_goes_away_leaves_no_mapping_and_no_descriptor(file: PoolFile) -> None:
    gc.collect()
    maps, files = MAPS.read_text().count("\n"), len(list(Path("/proc/self/fd").iterdir()))
    with ContiguousViews.open(file.handle) as views:
        kept = [views.view([b, 0, b + 1], capacity=20) for b in range(5, 25)]
        views.view([1, 2, 3])  # dropped at once
        keys = kept[3].keys(0)
        kept[0].close()
        del kept
        gc.collect()
        assert num_maps(file.handle.name) == 0, "dropped views are still mapped"
        assert views.num_maps == 0
    assert keys.shape == (12, 4, 64)
    del keys
    gc.collect()
    assert len(list(Path("/proc/self/fd").iterdir())) == files
    assert MAPS.read_text().count("\n") <= maps + 2  # what the memory allocator has taken


def test_addresses_are_nobody_elses_while_a_tensor_looks_at_them(views: ContiguousViews) -> None:
    view = views.view([1, 2])
    keys = view.keys(0)
    view.close()
    others = [views.view([b]) for b in range(NUM_BLOCKS)]
    spans = [(other.keys(0).data_ptr(), 4 * 4096) for other in others]
    assert all(not begin <= keys.data_ptr() < begin + size for begin, size in spans)


def test_a_view_that_has_ended_is_refused_by_name(views: ContiguousViews) -> None:
    view = views.view([1, 2])
    assert view.current
    view.close()
    view.close()
    assert view.ended
    assert not view.current
    for ask in (lambda: view.keys(0), view.pages, lambda: view.follow([1])):
        with pytest.raises(LeaseExpired, match="ended"):
            ask()


@pytest.mark.parametrize(
    ("table", "told"),
    [
        ([0, NUM_BLOCKS], "the pool has 32"),
        ([-1], "the pool has 32"),
        ([1, 2, 3, 4], "room for 3"),
        ([1.5], "no table of numbers"),
        ([[1], [2]], "no table of numbers"),
        ("12", "no table of numbers"),
        ([True], "no table of numbers"),
        (None, "is given its blocks"),
    ],
)
def test_a_table_that_is_none_changes_nothing(
    pool: SharedPool, views: ContiguousViews, table: Any, told: str
) -> None:
    view = views.view([7, 2], capacity=3)
    with pytest.raises(InvalidRequest, match=told):
        view.follow(table)
    views.check()
    assert torch.equal(view.keys(0), gathered(pool, 0, [7, 2]))


@pytest.mark.parametrize("capacity", [0, -1, NUM_BLOCKS + 1, 1.0, True, "3"])
def test_room_that_no_view_can_have_is_refused(views: ContiguousViews, capacity: Any) -> None:
    with pytest.raises(InvalidRequest, match="capacity is"):
        views.view([1], capacity=capacity)


@pytest.mark.parametrize("layer", [2, -1, True, 1.0, None])
def test_a_layer_that_is_none_is_refused(views: ContiguousViews, layer: Any) -> None:
    with pytest.raises(InvalidRequest, match="is none of 0 to 1"):
        views.view([1]).keys(layer)


def test_pages_that_are_no_whole_ones_of_the_processor_are_refused_with_the_size_that_is() -> None:
    layout = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    with (
        PoolFile.create(layout, 4, 16) as file,
        pytest.raises(Unsupported, match=r"6,144 bytes in each of its 60 planes.*--block-size 32"),
    ):
        ContiguousViews.open(file.handle)
    with PoolFile.create(layout, 4, 32) as file, ContiguousViews.open(file.handle) as views:
        assert views.view([3, 1]).keys(29).shape == (64, 3, 64)
    odd = Layout(num_layers=1, num_kv_heads=1, head_dim=1, dtype="bfloat16")
    with PoolFile.create(odd, 4, 16) as file:
        assert smallest_block_size(file.handle) is None
        with pytest.raises(Unsupported, match="no block size of this layout fits"):
            ContiguousViews.open(file.handle)
    with pytest.raises(Unsupported, match="only keeps accounts"):
        ContiguousViews.open(SharedPool.private(LAYOUT, 4, 4).handle)


def test_more_mappings_than_the_process_may_have_are_refused_with_the_numbers(
    pool: SharedPool, views: ContiguousViews, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit = tmp_path / "max_map_count"
    monkeypatch.setattr(contiguous, "MAX_MAPS", limit)
    others = MAPS.read_text().count("\n")
    limit.write_text(str(others + contiguous.SPARE_MAPS + 40))
    view = views.view([1, 3, 5], capacity=16)
    assert view.num_maps == 16
    with pytest.raises(PoolExhausted, match=r"13 blocks in 13 pieces of 4 planes each need 56"):
        view.follow([*range(1, 26, 2)])
    views.check()
    assert torch.equal(view.keys(0), gathered(pool, 0, [1, 3, 5]))
    limit.write_text("65530")
    view.follow([*range(1, 26, 2)])


KERNEL_REFUSES = """
from prefixcache.errors import PoolExhausted
from prefixcache.pool import PoolFile
from prefixcache.types import Layout
from prefixcache_kernels import contiguous
from prefixcache_kernels.contiguous import MAX_MAPS, ContiguousViews
limit = int(MAX_MAPS.read_text())
layout = Layout(planes=limit // 100, page_bytes=4096, format="f")
contiguous.SPARE_MAPS = -10 * limit  # as if nobody had counted
with PoolFile.create(layout, 512, 4) as file, ContiguousViews.open(file.handle) as views:
    view = views.view([5], capacity=256)
    try:
        view.follow([5, *range(0, 400, 2)])
    except PoolExhausted as error:
        assert "the kernel refuses" in str(error), error
        assert view.num_blocks == 1
        views.check()
        view.follow([5, 7])
        views.check()
        print("told")
"""


@pytest.mark.skipif(int(contiguous.MAX_MAPS.read_text()) > 100_000, reason="the limit is too high")
def test_what_the_kernel_refuses_leaves_the_view_as_it_was() -> None:
    assert run(KERNEL_REFUSES) == (0, "told\n")


def run(code: str, *arguments: str) -> tuple[int, str]:
    """Run it in a process of its own; its exit status, and what it said or why it died."""
    ran = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
    )
    return ran.returncode, ran.stdout if not ran.stderr else ran.stderr


FAULTS = {
    "an ended view": "keys = view.keys(1); view.close(); read(keys)",
    "what was cut off": "keys = view.keys(1); view.follow([7, 2]); read(keys[:8]); read(keys[8:])",
    "closed views": "keys = view.keys(1); views.close(); read(keys)",
    "room that holds nothing yet": "read(view._tokens[0, 0, 12:])",
    "a write": "view.keys(0)[0] = 1",
    "a view that nobody holds": "keys = view.keys(1); del view; read(keys)",
}

CHILDREN = """
import os, sys
from prefixcache.pool import PoolFile
from prefixcache.types import Layout
from prefixcache_kernels import SharedPool
from prefixcache_kernels.contiguous import ContiguousViews
layout = Layout(num_layers=2, num_kv_heads=4, head_dim=64, dtype="float32")
def read(tensor):
    assert float(tensor.sum()) == 3.0 * tensor.numel()
    os.write(told, b"r")
for code in sys.argv[1:]:
    heard, told = os.pipe()
    child = os.fork()
    if not child:
        file = PoolFile.create(layout, 8, 4)
        pool = SharedPool.map(file.handle)
        pool.blocks.fill_(3)
        views = ContiguousViews.open(file.handle)
        view = views.view([7, 2, 3], capacity=4)
        file.close()  # the file is gone, and what is mapped stays
        read(view.keys(0))
        exec(code)
        os._exit(0)
    os.close(told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(status, len(os.read(heard, 9)), flush=True)
"""


def test_reading_on_is_a_fault_and_never_anothers_bytes() -> None:
    code, said = run(CHILDREN, *FAULTS.values())
    assert code == 0, said
    want = dict.fromkeys(FAULTS, f"{-signal.SIGSEGV} 1")
    want["what was cut off"] = f"{-signal.SIGSEGV} 2"
    assert dict(zip(FAULTS, said.splitlines(), strict=True)) == want


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_has_no_view_of_its_parent(
    file: PoolFile, pool: SharedPool, views: ContiguousViews
) -> None:
    """It is told so, and has nothing mapped; what it frees takes nothing from anybody."""
    view = views.view([7, 2, 3], capacity=8)
    want = view.keys(0).clone()
    asked = (
        lambda: view.keys(0),
        lambda: view.follow([1]),
        lambda: view.current,
        lambda: views.view([1]),
    )
    child = os.fork()
    if not child:
        told = 0
        for ask in asked:
            try:
                ask()
            except InvalidRequest as error:
                told += f"process {os.getppid()} and came through fork" in str(error)
        mapped = file.handle.name in MAPS.read_text()
        view.close()
        views.close()
        del view
        gc.collect()
        os._exit(told if not mapped else 100)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == len(asked)
    views.check()
    assert torch.equal(view.keys(0), want)


def test_a_new_mapping_is_kept_from_children_as_well(
    file: PoolFile, pool: SharedPool, views: ContiguousViews
) -> None:
    view = views.view([7], capacity=8)
    view.follow([7, 1, 3])
    flags = [
        line
        for line in Path("/proc/self/smaps").read_text().split("VmFlags:")[1:]
        if " dc" in line.partition("\n")[0]
    ]
    assert len(flags) >= view.num_maps


def test_a_pool_that_another_service_took_over_is_not_current(tmp_path: Path) -> None:
    path = SHARED_MEMORY / f"prefixcache-views-test-{os.getpid()}"
    try:
        first, _ = PoolFile.keep(path, LAYOUT, 8, 4)
        with ContiguousViews.open(first.handle) as views:
            view = views.view([1, 2])
            assert view.current
            first.close()
            second, was_there = PoolFile.keep(path, LAYOUT, 8, 4)
            assert was_there
            assert second.has_former_workers()
            assert not view.current
            del view
            gc.collect()
        assert not second.has_former_workers(), "a closed view still counts as a worker"
        second.close()
    finally:
        path.unlink(missing_ok=True)


def test_views_are_of_one_process(views: ContiguousViews) -> None:
    import copy
    import pickle

    for thing in (views, views.view([1])):
        for way in (copy.copy, pickle.dumps):
            with pytest.raises(InvalidRequest, match="pickled or copied"):
                way(thing)


@pytest.mark.parametrize(("dtype", "block_size"), [("float32", 16), ("bfloat16", 32)])
@pytest.mark.parametrize("num_queries", [1, 40])
def test_unpaged_attention_reads_the_pool_and_gives_what_paged_attention_gives(
    dtype: str, block_size: int, num_queries: int
) -> None:
    layout = Layout(num_layers=2, num_kv_heads=3, head_dim=64, dtype=dtype)
    heads, context, scale = 9, 150, 64**-0.5
    width = -(-context // block_size)
    with (
        PoolFile.create(layout, 3 * width, block_size) as file,
        SharedPool.map(file.handle) as pool,
        ContiguousViews.open(file.handle) as views,
    ):
        torch.manual_seed(0)
        pool.blocks.normal_()
        table = torch.randperm(3 * width)[:width]
        # What nobody wrote may be anything: an unpaged kernel is given the tokens, not the room.
        pool.blocks[:, :, table[-1], context % block_size :] = float("nan")
        view = views.view(table.tolist())
        query = torch.randn(num_queries, heads, 64).to(pool.blocks.dtype)
        mask = torch.ones(num_queries, context, dtype=torch.bool).tril(context - num_queries)
        for layer in range(2):
            want = paged_attention(
                query,
                pool.keys(layer),
                pool.values(layer),
                table[None].int(),
                torch.tensor([0, num_queries]),
                torch.tensor([context]),
                scale=scale,
            )
            keys, values = view.keys(layer)[:context], view.values(layer)[:context]
            got = F.scaled_dot_product_attention(
                query.transpose(0, 1)[None],
                keys.transpose(0, 1)[None],
                values.transpose(0, 1)[None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )[0].transpose(0, 1)
            gap = float((got.double() - want.double()).norm() / want.double().norm())
            assert gap < (1e-5 if dtype == "float32" else 1e-2)


class Held:
    """A lease whose deadline the test sets."""

    def __init__(self, blocks: list[int]) -> None:
        self.block_table: array[int] = array("i", blocks)
        self.deadline = time.monotonic() + 1e6
        self.watchers: list[Any] = []

    def check(self) -> None:
        if time.monotonic() > self.deadline:
            raise LeaseExpired("it passed its deadline")

    def watch(self, watcher: Any) -> None:
        self.watchers.append(watcher)

    def unwatch(self, watcher: Any) -> None:
        self.watchers.remove(watcher)


def test_a_deadline_that_passes_while_somebody_reads_leaves_zeros(
    pool: SharedPool, views: ContiguousViews
) -> None:
    lease = Held([7, 2, 3])
    view = views.of(lease)
    keys = view.keys(1)
    assert torch.equal(keys, gathered(pool, 1, [7, 2, 3]))
    lease.deadline = time.monotonic() + 0.05
    views.of(Held([1]))  # a new one has the clock looked at
    while not view.ended:
        time.sleep(0.01)
    assert not keys.any()
    assert not view.current
    with pytest.raises(LeaseExpired):
        view.keys(1)
    views.check()


def test_a_view_that_is_closed_is_told_nothing_more(views: ContiguousViews) -> None:
    lease = Held([7, 2, 3])
    with views.of(lease) as view:
        assert len(lease.watchers) == 1
    assert lease.watchers == []
    assert view.ended
    lease.block_table = array("i", [1] * 40)
    with pytest.raises(InvalidRequest, match="40 blocks in a view with room for 3"):
        views.of(lease, capacity=3)
    assert lease.watchers == []
