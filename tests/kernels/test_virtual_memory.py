"""Views on a device, with memory of this host in its place; no GPU was at hand."""

from __future__ import annotations

import gc
import importlib.util
import inspect
import os
import re
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kernels.host_virtual_memory import HostVirtualMemory
from prefixcache.errors import InvalidRequest, LeaseExpired, PoolExhausted, Unsupported
from prefixcache.types import Layout, PoolHandle
from prefixcache_kernels import virtual_memory
from prefixcache_kernels.contiguous import smallest_block_size
from prefixcache_kernels.virtual_memory import CudaVirtualMemory, DeviceBlocks

LAYOUT = Layout(num_layers=2, num_kv_heads=8, head_dim=64, dtype="float32")
"""A page of 4 tokens is one of the host's memory that stands for a device's: 8 KiB."""
HANDLE = PoolHandle("cuda-ipc", "", 6, 4, LAYOUT, 1, 0)
MIB = 1 << 20


def filled(memory: HostVirtualMemory) -> DeviceBlocks:
    blocks = DeviceBlocks.create(memory, HANDLE)
    for block, of_block in enumerate(blocks.handles):
        for plane, handle in enumerate(of_block):
            memory.write(handle, 10 * block + plane)
    return blocks


def is_empty(memory: HostVirtualMemory) -> bool:
    gc.collect()
    return not (memory.handles or memory.reserved or memory.mapped)


def test_scattered_blocks_are_read_side_by_side_and_nothing_is_left() -> None:
    memory = HostVirtualMemory()
    with filled(memory) as blocks, blocks.views() as views:
        view = views.view([5, 0, 3], capacity=5)
        assert view.pages()[:, :, 0].tolist() == [
            [50 + plane, plane, 30 + plane] for plane in range(4)
        ]
        assert view.keys(1).shape == (12, 8, 64)
        shared = views.view([5, 0])
        for table in ([5, 0, 3, 4, 1], [5, 2], [], [1], [1, 1]):
            view.follow(table)
            views.check()
            assert view.pages()[3, :, 0].tolist() == [10 * block + 3 for block in table]
            assert memory.mapped.keys() == memory.readable
        assert shared.pages()[0, :, 0].tolist() == [50, 0]
        del view, shared
    assert is_empty(memory)


def test_another_process_imports_what_the_owner_exports() -> None:
    """Through a socket, as descriptors travel; each side then has handles of its own."""
    owner, worker = HostVirtualMemory(), HostVirtualMemory()
    here, there = socket.socketpair()
    with here, there, filled(owner) as blocks:
        before = len(list(Path("/proc/self/fd").iterdir()))
        received = []
        for block in range(HANDLE.num_blocks):
            exported = blocks.export(block)
            socket.send_fds(here, [bytes([block])], exported)
            for fd in exported:
                os.close(fd)
            _, fds, _, _ = socket.recv_fds(there, 1, HANDLE.planes)
            received.append(fds)
        with DeviceBlocks.of_descriptors(worker, HANDLE, received) as taken:
            with taken.views() as views:
                view = views.view([4, 1])
                owner.write(blocks.handles[1][2], 77)
                assert view.pages()[2, :, 0].tolist() == [42, 77]
                del view
            held = len(list(Path("/proc/self/fd").iterdir()))
            assert held == before + len(worker.handles), "descriptors that came are closed"
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert is_empty(owner)
    assert is_empty(worker)


def test_descriptors_that_are_not_one_for_each_page_are_refused_and_closed() -> None:
    memory = HostVirtualMemory()
    with filled(memory) as blocks:
        before = len(list(Path("/proc/self/fd").iterdir()))
        with pytest.raises(InvalidRequest, match="a descriptor for each page; 4 came"):
            DeviceBlocks.of_descriptors(HostVirtualMemory(), HANDLE, [blocks.export(0)])
        with pytest.raises(InvalidRequest, match="block 6 is none of 0 to 5"):
            blocks.export(6)
        assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert is_empty(memory)


def test_an_ended_view_has_nothing_mapped_and_its_addresses_are_kept_for_its_tensors() -> None:
    memory = HostVirtualMemory()
    with filled(memory) as blocks, blocks.views() as views:
        view = views.view([5, 0, 3])
        pages = view.pages()
        view.close()
        assert not memory.mapped
        with pytest.raises(LeaseExpired):
            view.pages()
        del view
        gc.collect()
        assert len(memory.reserved) == 1
        del pages
        gc.collect()
        assert not memory.reserved
        assert "synchronize" in memory.calls
    assert is_empty(memory)


def test_a_lease_that_is_lost_while_kernels_read_leaves_zeros() -> None:
    memory = HostVirtualMemory()
    with filled(memory) as blocks, blocks.views() as views:
        view = views.view([5, 0, 3], capacity=4)
        pages = view.pages()
        view._mapped.end(in_use=True)
        assert not pages.any()
        assert not view.current
        views.check()
        del view, pages
        gc.collect()
        assert not memory.mapped
    assert is_empty(memory)


@pytest.mark.parametrize("calls", [0, 3, 23, 24])
def test_memory_that_is_not_there_leaves_nothing_behind(calls: int) -> None:
    memory = HostVirtualMemory()
    memory.fail_after = calls
    if calls < 24:
        with pytest.raises(PoolExhausted):
            DeviceBlocks.create(memory, HANDLE)
        memory.fail_after = None
        assert is_empty(memory)
        return
    with DeviceBlocks.create(memory, HANDLE) as blocks, blocks.views() as views:
        with pytest.raises(PoolExhausted, match="reserve says"):
            views.view([1])
        memory.fail_after = None
        view = views.view([1], capacity=3)
        memory.fail_after = 5
        with pytest.raises(PoolExhausted, match="map says"):
            view.follow([1, 2, 3])
        memory.fail_after = None
        views.check()
        assert view.num_blocks == 1
        view.follow([1, 2, 3])
        del view
    assert is_empty(memory)


def test_layouts_that_fit_what_a_gpu_maps_as_a_whole() -> None:
    """The table at the head of `virtual_memory.py`."""
    large = Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    small = Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16")
    whole = Layout(planes=1, page_bytes=16 * large.token_bytes, format="tokens")
    sizes = [
        smallest_block_size(replace(HANDLE, layout=layout, block_size=16), 2 * MIB)
        for layout in (large, small, whole)
    ]
    assert sizes == [1024, None, 16]
    memory = HostVirtualMemory(granularity=2 * MIB)
    with pytest.raises(Unsupported, match=r"pieces of 2,097,152: serve with --block-size 1024"):
        DeviceBlocks.create(memory, replace(HANDLE, layout=large, block_size=16))
    handle = replace(HANDLE, layout=whole, block_size=16)
    with DeviceBlocks.create(memory, handle) as blocks, blocks.views() as views:
        assert views.view([5, 2]).pages().shape == (1, 2, 2 * MIB)
    assert is_empty(memory)


def test_without_the_bindings_or_a_driver_it_says_what_is_missing() -> None:
    with pytest.raises(Unsupported, match=r"cuda-bindings|NVIDIA's driver"):
        CudaVirtualMemory()


@pytest.mark.skipif(importlib.util.find_spec("cuda") is None, reason="cuda-bindings is not there")
def test_every_call_is_one_of_the_bindings_with_as_many_arguments() -> None:
    from cuda.bindings import driver

    source = inspect.getsource(virtual_memory)
    called = re.findall(r'_call\(\s*"(cu\w+)"((?:, (?:\[[^\]]*\]|[\w.]+))*)\s*\)', source)
    assert len(called) >= 16
    for name, arguments in called:
        head = getattr(driver, name).__doc__.splitlines()[0]
        inside = re.sub(r"\[[^\]]*\]", "", head.partition("(")[2].rpartition(")")[0])
        given = len(re.findall(r", (?:\[[^\]]*\]|[\w.]+)", arguments))
        assert given == len([one for one in inside.split(",") if one.strip()]), head
    for name in re.findall(r"driver\.(CU\w+(?:\.CU\w+)?)", source):
        thing: Any = driver
        for part in name.split("."):
            thing = getattr(thing, part)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU is at hand")
def test_a_gpu_reads_scattered_blocks_side_by_side() -> None:
    memory = CudaVirtualMemory()
    layout = Layout(planes=2, page_bytes=memory.granularity, format="f")
    handle = PoolHandle("cuda-ipc", "", 4, 16, layout, 1, 0)
    with DeviceBlocks.create(memory, handle) as blocks, blocks.views() as views:
        exported = [blocks.export(block) for block in range(4)]
        with DeviceBlocks.of_descriptors(memory, handle, exported) as taken, taken.views() as more:
            assert not more.view([3, 1]).pages().any()
        assert not views.view([3, 1, 0]).pages().any()
