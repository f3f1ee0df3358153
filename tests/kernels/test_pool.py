"""The pool's file and its mapping, with real processes on real shared memory."""

from __future__ import annotations

import fcntl
import json
import mmap
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from prefixcache.errors import (
    EpochMismatch,
    InvalidRequest,
    LayoutMismatch,
    NotFound,
    PoolExhausted,
    Unsupported,
)
from prefixcache.pool import HEADER_BYTES, SHARED_MEMORY, PoolFile, map_pool
from prefixcache.types import Layout, PoolHandle
from prefixcache_kernels.pool import SharedPool, map_pages

LAYOUT = Layout(num_layers=2, num_kv_heads=3, head_dim=8, dtype="float32")
ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}

OWNER = """
import json, sys
from dataclasses import asdict
from pathlib import Path
from prefixcache.pool import PoolFile
from prefixcache.types import Layout
pool = PoolFile.create(Layout(2, 3, 8, "float32"), 4, 16, directory=Path(sys.argv[1]))
print(json.dumps(asdict(pool.handle)), flush=True)
assert "torch" not in sys.modules
sys.stdin.readline()
pool.close()
"""

WORKER = """
import json, sys
from prefixcache.types import Layout, PoolHandle
from prefixcache_kernels.pool import SharedPool, map_pages
handle = json.loads(sys.argv[1])
handle["layout"] = Layout(**handle["layout"])
with SharedPool.map(PoolHandle(**handle)) as pool:
    assert float(pool.keys(1)[2, 3, 1, 5]) == 42.0, pool.keys(1)[2]
    pool.values(0)[3, 15, 2, 7] = 7.0
print("done")
"""


@contextmanager
def owner(directory: Path) -> Iterator[tuple[subprocess.Popen[str], PoolHandle]]:
    process = subprocess.Popen(
        [sys.executable, "-c", OWNER, str(directory)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENV,
    )
    with process:
        try:
            assert process.stdout is not None
            fields = json.loads(process.stdout.readline())
            yield process, PoolHandle(**{**fields, "layout": Layout(**fields["layout"])})
        finally:
            process.kill()


@pytest.fixture
def pool(tmp_path: Path) -> Iterator[PoolFile]:
    with PoolFile.create(LAYOUT, 4, 16, directory=tmp_path) as made:
        yield made


def test_the_file_is_private_sparse_and_says_what_it_is(pool: PoolFile) -> None:
    path = Path(pool.handle.name)
    status = path.stat()
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_size == HEADER_BYTES + 4 * 16 * LAYOUT.token_bytes
    assert status.st_blocks * 512 <= 2 * HEADER_BYTES
    assert path.name == f"prefixcache-{os.getuid()}-{pool.handle.epoch:016x}"
    assert b"4 blocks of 16 tokens, 2x3x8:float32" in path.read_bytes()[:512]
    assert 0 < pool.handle.epoch < 2**63


def test_every_life_of_a_pool_has_its_own_epoch(tmp_path: Path) -> None:
    with (
        PoolFile.create(LAYOUT, 1, 1, directory=tmp_path) as one,
        PoolFile.create(LAYOUT, 1, 1, directory=tmp_path) as two,
    ):
        assert one.handle.epoch != two.handle.epoch
        assert len(list(tmp_path.iterdir())) == 2


def test_close_unlinks_and_may_be_repeated(tmp_path: Path) -> None:
    pool = PoolFile.create(LAYOUT, 4, 16, directory=tmp_path)
    pool.close()
    pool.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(NotFound, match="its service has ended"):
        map_pool(pool.handle)


def test_two_mappings_share_their_bytes_and_start_at_zero(pool: PoolFile) -> None:
    with map_pool(pool.handle) as one, map_pool(pool.handle) as two:
        assert one[HEADER_BYTES:] == bytes(pool.handle.num_bytes)
        one[pool.handle.offset] = 9
        assert two[pool.handle.offset] == 9
        two[len(two) - 1] = 8
        assert one[len(one) - 1] == 8


def test_a_mapping_outlives_the_owner_that_closed(tmp_path: Path) -> None:
    pool = PoolFile.create(LAYOUT, 4, 16, directory=tmp_path)
    with map_pool(pool.handle) as memory:
        pool.close()
        memory[HEADER_BYTES] = 5
        assert memory[HEADER_BYTES] == 5


def test_independent_processes_read_what_the_other_wrote() -> None:
    with owner(SHARED_MEMORY) as (process, handle), SharedPool.map(handle) as pool:
        pool.keys(1)[2, 3, 1, 5] = 42.0
        ran = subprocess.run(
            [sys.executable, "-c", WORKER, json.dumps(asdict(handle))],
            capture_output=True,
            text=True,
            env=ENV,
            check=False,
        )
        assert ran.stdout == "done\n", ran.stderr
        assert float(pool.values(0)[3, 15, 2, 7]) == 7.0
        process.communicate("\n")
        assert process.returncode == 0
        assert not Path(handle.name).exists()
        assert float(pool.values(0)[3, 15, 2, 7]) == 7.0


def test_the_next_start_removes_the_file_of_an_owner_killed_with_sigkill(tmp_path: Path) -> None:
    with owner(tmp_path) as (process, handle):
        assert PoolFile.sweep(tmp_path) == []
        assert Path(handle.name).exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert Path(handle.name).exists()
        memory = map_pool(handle)
        with PoolFile.create(LAYOUT, 4, 16, directory=tmp_path) as pool:
            assert [path.name for path in tmp_path.iterdir()] == [Path(pool.handle.name).name]
            with pytest.raises(NotFound):
                map_pool(handle)
        assert memory[HEADER_BYTES:] == bytes(handle.num_bytes)
        memory.close()


def test_sweep_gives_what_it_removed_and_leaves_what_is_not_its_own(tmp_path: Path) -> None:
    dead = tmp_path / f"prefixcache-{os.getuid()}-{5:016x}"
    other_user = tmp_path / f"prefixcache-{os.getuid() + 1}-{5:016x}"
    other_name = tmp_path / f"prefixcache-{os.getuid()}-notes"
    link = tmp_path / f"prefixcache-{os.getuid()}-{6:016x}"
    for path in (dead, other_user, other_name):
        path.touch()
    link.symlink_to(other_name)
    assert PoolFile.sweep(tmp_path) == [dead]
    assert {path.name for path in tmp_path.iterdir()} == {
        other_user.name,
        other_name.name,
        link.name,
    }


def test_the_lock_is_not_inherited_by_programs_that_the_owner_starts(pool: PoolFile) -> None:
    path = pool.handle.name
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        fd = os.open(path, os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        pool.close()
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(fd)
        child.communicate(b"\n")


def test_a_handle_of_another_epoch_is_refused(pool: PoolFile) -> None:
    with pytest.raises(EpochMismatch, match="is of epoch"):
        map_pool(replace(pool.handle, epoch=pool.handle.epoch + 1))


def test_a_file_of_another_size_is_refused_before_it_is_mapped(pool: PoolFile) -> None:
    with pytest.raises(EpochMismatch, match="the handle speaks of"):
        map_pool(replace(pool.handle, num_blocks=5))
    os.truncate(pool.handle.name, HEADER_BYTES)
    with pytest.raises(EpochMismatch, match=f"has {HEADER_BYTES} bytes"):
        map_pool(pool.handle)


def test_a_handle_of_another_shape_of_the_same_size_is_refused(pool: PoolFile) -> None:
    swapped = replace(LAYOUT, num_layers=3, num_kv_heads=2)
    assert swapped.token_bytes == LAYOUT.token_bytes
    with pytest.raises(LayoutMismatch, match="4 blocks of 16 tokens, 2x3x8:float32"):
        map_pool(replace(pool.handle, layout=swapped))


def test_a_file_that_is_no_pool_is_refused(pool: PoolFile) -> None:
    with Path(pool.handle.name).open("r+b") as file:
        file.write(b"something")
    with pytest.raises(EpochMismatch, match="no pool of this version"):
        map_pool(pool.handle)


def test_a_symbolic_link_is_not_followed(pool: PoolFile, tmp_path: Path) -> None:
    link = tmp_path / "link"
    link.symlink_to(pool.handle.name)
    with pytest.raises(NotFound, match="cannot be opened"):
        map_pool(replace(pool.handle, name=str(link)))


def test_a_gpu_pool_is_not_mapped_without_torch_nor_this_one_on_a_gpu(pool: PoolFile) -> None:
    with pytest.raises(Unsupported, match=r"SharedPool\.map opens it"):
        map_pool(replace(pool.handle, kind="cuda-ipc"))
    with pytest.raises(Unsupported, match="in shared memory, not on cuda"):
        SharedPool.map(pool.handle, device="cuda")


def test_a_pool_that_is_only_accounts_cannot_be_mapped(pool: PoolFile) -> None:
    with pytest.raises(Unsupported, match="only keeps accounts"):
        map_pool(replace(pool.handle, kind="none", name=""))


@pytest.mark.parametrize("odd", [None, 5, "pool", {}, LAYOUT])
def test_what_is_no_handle_is_refused(odd: Any) -> None:
    for way in (SharedPool.map, map_pages, map_pool):
        with pytest.raises(InvalidRequest, match="is no handle of a pool"):
            way(odd)


@pytest.mark.parametrize("name", [None, 5, b"x", "/x/\0", "/x/\ud800", ""])
def test_what_names_no_path_is_no_pool(pool: PoolFile, name: Any) -> None:
    with pytest.raises((InvalidRequest, NotFound)):
        map_pool(replace(pool.handle, name=name))


@pytest.mark.parametrize("odd", [True, 2**70, "nowhere", [], 1.5])
def test_what_is_no_device_is_refused_by_name(pool: PoolFile, odd: Any) -> None:
    with pytest.raises(InvalidRequest, match=r"device is .*, which is none"):
        SharedPool.map(pool.handle, odd)


@pytest.mark.parametrize("num_blocks", [2**45, 2**62, 2**70])
def test_a_pool_of_this_process_for_which_there_is_no_memory_is_refused(num_blocks: int) -> None:
    with pytest.raises(PoolExhausted, match="no memory for"):
        SharedPool.private(LAYOUT, num_blocks, 16)


def test_more_memory_than_there_is_is_refused_with_the_arithmetic(tmp_path: Path) -> None:
    huge = Layout(64, 64, 1024, "float32")
    with pytest.raises(PoolExhausted, match=r"needs .* GiB in .*are free") as refused:
        PoolFile.create(huge, 2**24, 1024, directory=tmp_path)
    assert "Lower --memory" in str(refused.value)
    assert list(tmp_path.iterdir()) == []


def test_memory_promised_to_a_living_sparse_pool_is_not_promised_twice() -> None:
    room = os.statvfs(SHARED_MEMORY)
    free = room.f_bavail * room.f_frsize
    block = LAYOUT.token_bytes * 1024
    most = int(free / block * 0.6)
    with PoolFile.create(LAYOUT, most, 1024), pytest.raises(PoolExhausted, match="not promised"):
        PoolFile.create(LAYOUT, most, 1024)


def test_a_limit_on_file_sizes_is_an_error_with_a_name(tmp_path: Path) -> None:
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        + OWNER.replace("sys.stdin.readline()", "")
    )
    ran = subprocess.run(
        [sys.executable, "-c", code.replace("4, 16,", "4096, 16,"), str(tmp_path)],
        capture_output=True,
        text=True,
        env=ENV,
        check=False,
    )
    assert "PoolExhausted" in ran.stderr
    assert "refuses a file" in ran.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("block_size", [0, 3, 2048, -16])
def test_a_block_size_that_is_no_power_of_two_is_refused(tmp_path: Path, block_size: int) -> None:
    with pytest.raises(InvalidRequest, match="power of two"):
        PoolFile.create(LAYOUT, 4, block_size, directory=tmp_path)


def test_shapes_that_no_pool_can_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="at least 1 block"):
        PoolFile.create(LAYOUT, 0, 16, directory=tmp_path)
    with pytest.raises(InvalidRequest, match="at least 1"):
        PoolFile.create(replace(LAYOUT, head_dim=0), 1, 16, directory=tmp_path)
    with pytest.raises(InvalidRequest, match="float8"):
        PoolFile.create(replace(LAYOUT, dtype="float8"), 1, 16, directory=tmp_path)
    with pytest.raises(NotFound, match="no directory"):
        PoolFile.create(LAYOUT, 1, 16, directory=tmp_path / "absent")
    with pytest.raises(InvalidRequest, match="int8"):
        SharedPool.private(replace(LAYOUT, dtype="int8"), 1, 16)
    with pytest.raises(InvalidRequest, match="no pool has 0 blocks"):
        SharedPool.private(LAYOUT, 0, 16)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_element_type_maps_as_a_tensor_without_a_copy(tmp_path: Path, dtype: str) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    with PoolFile.create(layout, 4, 16, directory=tmp_path) as file:
        one, two = SharedPool.map(file.handle), SharedPool.map(file.handle)
        assert one.blocks.shape == (2, 2, 4, 16, 3, 8)
        assert one.blocks.dtype == getattr(torch, dtype)
        assert one.keys(1).is_contiguous()
        assert (one.num_blocks, one.block_size, one.layout) == (4, 16, layout)
        one.values(1)[3, 15] = 2.5
        assert torch.equal(two.blocks[1, 1, 3, 15], torch.full((3, 8), 2.5, dtype=one.blocks.dtype))
        assert torch.count_nonzero(two.blocks) == 24
        one.close()
        two.close()


def test_the_order_in_memory_is_layer_kind_block_slot_head_dim(pool: PoolFile) -> None:
    with SharedPool.map(pool.handle) as shared, map_pool(pool.handle) as raw:
        shared.values(1)[2, 3, 1, 5] = 1.0
        index = ((((1 * 2 + 1) * 4 + 2) * 16 + 3) * 3 + 1) * 8 + 5
        assert raw[HEADER_BYTES + 4 * index :][:4] == b"\x00\x00\x80\x3f"


def test_a_tensor_that_outlives_the_pool_object_does_not_dangle(pool: PoolFile) -> None:
    shared = SharedPool.map(pool.handle)
    keys = shared.keys(0)
    keys[0] = 3.0
    shared.close()
    shared.close()
    assert float(keys.sum()) == 3.0 * 16 * 3 * 8
    maps = Path("/proc/self/maps")
    assert pool.handle.name in maps.read_text()
    del keys
    assert pool.handle.name not in maps.read_text()


@pytest.mark.parametrize("layer", [2, -1, True, 1.0, None, "0"])
def test_a_layer_that_is_none_is_refused(layer: Any) -> None:
    with SharedPool.private(LAYOUT, 4, 16) as pool:
        for view in (pool.keys, pool.values):
            with pytest.raises(InvalidRequest, match="is none of 0 to 1"):
                view(layer)
    with pytest.raises(InvalidRequest, match="closed"):
        pool.keys(0)


@pytest.mark.parametrize("size", [0, -1, 1.5, True, None, "4"])
def test_a_private_pool_of_no_size_is_refused(size: Any) -> None:
    for sizes in ((size, 16), (4, size)):
        with pytest.raises(InvalidRequest, match="no pool has"):
            SharedPool.private(LAYOUT, *sizes)
    with pytest.raises(InvalidRequest, match="not a Layout"):
        SharedPool.private(size, 4, 16)


def test_a_private_pool_has_the_same_face_and_no_file() -> None:
    with SharedPool.private(LAYOUT, 4, 16) as pool:
        assert pool.handle.kind == "none"
        assert pool.blocks.shape == (2, 2, 4, 16, 3, 8)
        assert torch.count_nonzero(pool.blocks) == 0
        assert pool.keys(1).data_ptr() == pool.blocks[1, 0].data_ptr()
        assert pool.layout == LAYOUT


def test_mappings_are_shared_not_private(pool: PoolFile) -> None:
    with map_pool(pool.handle) as memory:
        assert isinstance(memory, mmap.mmap)
        memory[HEADER_BYTES] = 1
        assert Path(pool.handle.name).read_bytes()[HEADER_BYTES] == 1


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_is_told_that_it_has_not_the_pool_of_its_parent(pool: PoolFile) -> None:
    """Touching it would be SIGSEGV.  A private pool it has as any memory: a copy of its own."""
    shared = SharedPool.map(pool.handle)
    private = SharedPool.private(LAYOUT, 2, 16)
    asked = (
        lambda: shared.keys(0),
        lambda: shared.values(0),
        lambda: shared.blocks,
        lambda: shared.current,
    )
    child = os.fork()
    if not child:
        told = 0
        for ask in asked:
            try:
                ask()
            except InvalidRequest as error:
                told += f"process {os.getppid()} and came through fork" in str(error)
        private.keys(0).fill_(1)
        shared.close()
        os._exit(told)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == len(asked)
    assert shared.current
    assert not private.keys(0).any()
    shared.close()


def test_pages_of_any_format_map_as_bytes_and_no_others_as_keys_and_values(
    tmp_path: Path,
) -> None:
    theirs = Layout(planes=3, page_bytes=40, format="engine/LBHNC")
    with PoolFile.create(theirs, 4, 16, directory=tmp_path) as file:
        pages, again = map_pages(file.handle), map_pages(file.handle)
        assert (pages.shape, pages.dtype) == ((3, 4, 40), torch.uint8)
        pages[:, 1] = 7
        pages[:, [2, 3]] = pages[:, [1, 0]]
        assert again.sum(dim=(0, 2)).tolist() == [0, 840, 840, 0]
        with pytest.raises(Unsupported, match=r"pages:3x40:engine/LBHNC.*map_pages"):
            SharedPool.map(file.handle)
    with pytest.raises(InvalidRequest, match="none of bfloat16"):
        SharedPool.private(theirs, 4, 16)


def test_pages_of_our_own_format_are_keys_and_values_of_each_layer(pool: PoolFile) -> None:
    with SharedPool.map(pool.handle) as shared:
        pages = map_pages(pool.handle)
        shared.values(1)[2] = 1.0
        assert pages.shape == (4, 4, 16 * 3 * 8 * 4)
        assert pages[3, 2].any()
        pages[3, 2] = 0
        assert not pages.any()
        assert not shared.blocks.any()
