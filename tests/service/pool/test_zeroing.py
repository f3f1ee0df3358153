"""Nobody is lent what another tenant wrote: bytes read through a real pool."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import prefixcache
from prefixcache.client import Client, Session
from prefixcache.core.block_pool import LastTenant
from prefixcache.pool import map_pool
from prefixcache.types import BlockTable, Layout, PoolHandle
from service.service_process import ServiceProcess, running, sizes

LAYOUT = Layout(3, 2, 4, "float32")
NUM_BLOCKS = 48
SIZE = 4


@pytest.fixture
def client(tmp_path: Path) -> Iterator[Client]:
    with running(f"unix:{tmp_path}/z.sock", *sizes(NUM_BLOCKS, SIZE, LAYOUT)) as service:
        assert isinstance(service, ServiceProcess)
        with prefixcache.connect(service.target) as client:
            yield client


class Memory:
    """The pool as a worker maps it: `[layer · key or value, block, bytes]`."""

    def __init__(self, handle: PoolHandle) -> None:
        self.map: mmap.mmap = map_pool(handle)
        self.blocks = np.frombuffer(self.map, np.uint8, offset=handle.offset).reshape(
            2 * LAYOUT.num_layers, NUM_BLOCKS, -1
        )

    def close(self) -> None:
        del self.blocks
        self.map.close()


def fill(session: Session, memory: Memory, tokens: list[int], value: int) -> BlockTable:
    """Write every byte of the blocks of a prompt, commit and release."""
    with session.acquire(tokens) as lease:
        memory.blocks[:, list(lease.block_table)] = value
        lease.commit(len(tokens))
        return lease.block_table


def test_blocks_are_zeroed_in_every_layer_when_they_change_tenant(client: Client) -> None:
    one = client.attach("m", LAYOUT, tenant="one")
    two = client.attach("m", LAYOUT, tenant="two")
    memory = Memory(one.pool)
    try:
        whole = fill(one, memory, list(range(NUM_BLOCKS * SIZE)), 0xAB)
        assert len(whole) == NUM_BLOCKS
        lease = two.acquire(list(range(1000, 1000 + 40 * SIZE)))
        assert not memory.blocks[:, list(lease.block_table)].any()
        untouched = sorted(set(range(NUM_BLOCKS)) - set(lease.block_table))
        assert (memory.blocks[:, untouched] == 0xAB).all()  # nobody else's blocks were written
        memory.blocks[:, list(lease.block_table)] = 0xCD
        lease.extend(42 * SIZE)  # room for decode changes tenant, too
        assert not memory.blocks[:, list(lease.block_table[40:])].any()
        lease.release()
        back = one.acquire(list(range(5000, 5000 + 44 * SIZE)))
        assert not (memory.blocks[:, list(back.block_table)] == 0xCD).any()
        back.release()
    finally:
        memory.close()


def test_a_tenant_s_own_blocks_are_lent_again_as_they_are(client: Client) -> None:
    one = client.attach("m", LAYOUT, tenant="one")
    client.attach("m", LAYOUT, tenant="two").acquire([1]).release()
    memory = Memory(one.pool)
    try:
        fill(one, memory, list(range((NUM_BLOCKS - 1) * SIZE)), 0xAB)
        lease = one.acquire(list(range(900, 900 + 20 * SIZE)))
        written = (memory.blocks[:, list(lease.block_table)] == 0xAB).all(axis=(0, 2))
        assert written.sum() >= 19
        lease.release()
    finally:
        memory.close()


def test_the_smallest_tenant_gets_nothing_of_a_pool_that_was_used_by_one_alone() -> None:
    from array import array

    wiped: list[int] = []
    tenure = LastTenant(100)
    tenure.wipe = wiped.extend
    tenure.assign(array("i", range(60)), "one", 0)
    tenure.assign(array("i", range(60)), "one", 60)
    assert not wiped  # one tenant alone: nothing is looked at
    tenure.assign(array("i", [5, 70]), "two", 60)
    assert wiped == [5]  # 70 was never lent
    tenure.assign(array("i", range(100)), "one", 71)
    assert sorted(wiped) == [5, 5, 70]


def test_after_a_restart_what_nobody_vouches_for_is_wiped() -> None:
    from array import array

    wiped: list[int] = []
    tenure = LastTenant(10)
    tenure.restore([("one", array("i", [0, 1])), ("two", array("i", [2]))])
    tenure.wipe = wiped.extend
    tenure.assign(array("i", [0, 2, 7]), "one", 3)
    assert wiped == [2, 7]
