"""Views of leases of a real service: they follow the table, and are gone before blocks are."""

from __future__ import annotations

import gc
import random
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

import prefixcache
from prefixcache.errors import CacheError, LeaseExpired, PoolExhausted
from prefixcache.types import Layout, pack
from prefixcache_kernels import SharedPool, copy_blocks
from prefixcache_kernels.contiguous import ContiguousView, ContiguousViews
from service.service_process import ServiceProcess, eventually, sizes

LAYOUT = Layout(num_layers=2, num_kv_heads=4, head_dim=64, dtype="float32")
NUM_BLOCKS, BLOCK_SIZE = 24, 4


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    target = f"unix:{tmp_path_factory.mktemp('s')}/s.sock"
    made = ServiceProcess(target, *sizes(NUM_BLOCKS, BLOCK_SIZE, LAYOUT), "--ttl", "600")
    yield made
    made.close()


class Worker:
    """A worker with the pool as tensors, and as views."""

    def __init__(self, target: str, **attach: Any) -> None:
        self.client = prefixcache.connect(target)
        self.session = self.client.attach("model", LAYOUT, **attach)
        self.pool = SharedPool.map(self.session.pool)
        self.views = ContiguousViews.open(self.session.pool)

    def close(self) -> None:
        self.views.close()
        self.session.close()
        self.client.close()


@pytest.fixture
def worker(service: ServiceProcess) -> Iterator[Worker]:
    made = Worker(service.target)
    yield made
    made.views.check()
    made.close()


def gathered(pool: SharedPool, layer: int, table: Any) -> torch.Tensor:
    return pool.keys(layer)[list(table)].flatten(0, 1)


def nothing_is_mapped(view: ContiguousView) -> bool:
    view.check()
    return view.num_blocks == 0


def test_a_view_follows_its_lease_from_the_first_block_to_the_end(worker: Worker) -> None:
    lease = worker.session.acquire(range(10))
    view = worker.views.of(lease, capacity=8)
    worker.pool.blocks.normal_()
    assert view.num_slots == 12
    assert torch.equal(view.keys(1), gathered(worker.pool, 1, lease.block_table))
    lease.extend(25)
    assert view.num_blocks == 3, "mapped when it is read, not before"
    assert torch.equal(view.keys(1), gathered(worker.pool, 1, lease.block_table))
    assert view.num_slots == 28
    lease.truncate(9)
    assert view.num_blocks == 3, "what is given up is unmapped at once; room that stays, when read"
    assert torch.equal(view.values(0), worker.pool.values(0)[list(lease.block_table)].flatten(0, 1))
    lease.release()
    assert nothing_is_mapped(view)
    assert view.ended
    assert not view.current
    with pytest.raises(LeaseExpired, match="was released"):
        view.keys(0)


def test_blocks_are_unmapped_before_the_service_hears_that_they_are_given_up(
    worker: Worker,
) -> None:
    lease = worker.session.acquire(range(20))
    lease.commit(20)
    view = worker.views.of(lease)
    before = list(lease.block_table)
    batch = worker.session.batch()
    reply = batch.truncate(lease, 9)
    assert view.num_blocks == 3
    assert not reply.done
    worker.session.post(batch)
    eventually(lambda: reply.done)
    assert list(lease.block_table[:2]) == before[:2]
    assert lease.block_table[2] != before[2], "cut inside: the lease gets one of its own"
    assert view.num_blocks == 2
    assert view.num_slots == 8
    batch = worker.session.batch()
    batch.release(lease)
    assert nothing_is_mapped(view)
    worker.session.post(batch)


def test_a_truncate_that_is_refused_costs_the_view_nothing(worker: Worker) -> None:
    with worker.session.acquire(range(20)) as lease:
        view = worker.views.of(lease)
        worker.pool.blocks.normal_()
        for tokens in (30, -1, 2.0, "3"):
            with pytest.raises(CacheError):
                lease.truncate(tokens)  # type: ignore[arg-type]
            assert torch.equal(view.keys(0), gathered(worker.pool, 0, lease.block_table))


def test_a_block_that_a_fork_copies_is_let_go_of(worker: Worker) -> None:
    with worker.session.acquire(range(6)) as lease:
        lease.commit(6)
        (child,) = lease.fork(1)
        view = worker.views.of(child, capacity=4)
        shared = child.block_table[1]
        (copy,) = child.extend(7).copies
        assert copy.src == shared
        assert view.num_blocks == 1
        copy_blocks(worker.pool.blocks, torch.tensor([[copy.src, copy.dst, copy.num_tokens]]))
        assert torch.equal(view.keys(0), gathered(worker.pool, 0, child.block_table))
        child.release()
        assert view.ended


def test_all_views_of_a_lease_that_was_asked_for_twice_end_with_it(worker: Worker) -> None:
    one = worker.session.acquire(range(5), request_id="same")
    two = worker.session.acquire(range(5), request_id="same")
    assert one.id == two.id
    views = [worker.views.of(lease) for lease in (one, two)]
    one.release()
    assert all(nothing_is_mapped(view) for view in views)


def test_who_leaves_takes_its_views_along(service: ServiceProcess) -> None:
    worker = Worker(service.target)
    lease = worker.session.acquire(range(5))
    view = worker.views.of(lease)
    worker.session.close()
    assert nothing_is_mapped(view)
    assert not view.current
    worker.close()


def test_a_lease_that_nobody_renews_leaves_zeros(tmp_path: Path) -> None:
    flags = (*sizes(NUM_BLOCKS, BLOCK_SIZE, LAYOUT), "--ttl", "1")
    service = ServiceProcess(f"unix:{tmp_path}/s.sock", *flags)
    worker = Worker(service.target, keep_alive=False)
    worker.pool.blocks.fill_(3)
    lease = worker.session.acquire(range(5))
    view = worker.views.of(lease)
    keys = view.keys(1)
    eventually(lambda: view.ended)
    assert not keys.any()
    assert not view.current
    with pytest.raises(LeaseExpired, match="passed its deadline"):
        view.keys(1)
    view.check()
    worker.close()
    service.close()


def test_a_service_that_is_killed_leaves_zeros_and_no_fault(tmp_path: Path) -> None:
    flags = (*sizes(NUM_BLOCKS, BLOCK_SIZE, LAYOUT), "--ttl", "600")
    service = ServiceProcess(f"unix:{tmp_path}/s.sock", *flags)
    worker = Worker(service.target)
    worker.pool.blocks.fill_(3)
    lease = worker.session.acquire(range(5))
    view = worker.views.of(lease)
    keys = view.keys(0)
    service.signal(signal.SIGKILL)
    service.wait()
    eventually(lambda: view.ended)
    lease.check()  # it has not waited for the deadline
    assert not keys.any()
    assert not view.current
    worker.close()
    service.close()


def test_a_lease_that_is_dropped_takes_its_view_along(worker: Worker) -> None:
    lease = worker.session.acquire(range(5))
    view = worker.views.of(lease)
    keys = view.keys(0)
    del view
    gc.collect()
    assert worker.views.num_maps > 0, "the lease still stands, and so does what was made of it"
    assert keys.shape == (8, 4, 64)
    del lease
    gc.collect()
    assert worker.views.num_maps == 0


class Machine(RuleBasedStateMachine):
    """Leases of two workers on one small pool, against gathering their blocks."""

    target = ""

    @initialize(seed=st.integers(0, 2**32))
    def start(self, seed: int) -> None:
        self.draw = random.Random(seed)
        self.workers = [Worker(self.target) for _ in range(2)]
        self.held: list[tuple[Worker, Any, ContiguousView]] = []
        self.ended: list[tuple[ContiguousView, torch.Tensor]] = []
        self.before = self.maps()

    def maps(self) -> int:
        gc.collect()
        return Path("/proc/self/maps").read_text().count(self.workers[0].session.pool.name)

    def pick(self, number: int) -> tuple[Worker, Any, ContiguousView] | None:
        return self.held[number % len(self.held)] if self.held else None

    @rule(who=st.integers(0, 1), shared=st.integers(0, 14), own=st.integers(1, 9))
    def acquire(self, who: int, shared: int, own: int) -> None:
        worker = self.workers[who]
        tokens = [*range(shared), *(self.draw.randrange(100, 104) for _ in range(own))]
        try:
            lease = worker.session.acquire(pack(tokens), reserve=self.draw.randrange(6))
        except PoolExhausted:
            return
        self.copy(worker, lease.copies)
        view = worker.views.of(lease, capacity=NUM_BLOCKS)
        self.held.append((worker, lease, view))
        self.write(worker, lease, lease.num_cached, len(tokens))
        lease.commit(len(tokens))
        self.check()

    @rule(number=st.integers(0, 99), more=st.integers(1, 20))
    def extend(self, number: int, more: int) -> None:
        if (found := self.pick(number)) is None:
            return
        worker, lease, _ = found
        try:
            update = lease.extend(max(0, len(lease.block_table) * BLOCK_SIZE - 3) + more)
        except PoolExhausted:
            return
        self.copy(worker, update.copies)
        self.check()

    @rule(number=st.integers(0, 99), tokens=st.integers(0, 40))
    def truncate(self, number: int, tokens: int) -> None:
        if (found := self.pick(number)) is None:
            return
        worker, lease, _ = found
        with suppress(CacheError):
            self.copy(worker, lease.truncate(tokens).copies)
        self.check()

    @rule(number=st.integers(0, 99))
    def fork(self, number: int) -> None:
        if (found := self.pick(number)) is None:
            return
        worker, lease, _ = found
        (child,) = lease.fork(1)
        self.held.append((worker, child, worker.views.of(child, capacity=NUM_BLOCKS)))
        self.check()

    @rule(number=st.integers(0, 99), by_view=st.booleans())
    def end(self, number: int, by_view: bool) -> None:
        if (found := self.pick(number)) is None:
            return
        _, lease, view = found
        self.held.remove(found)
        self.ended.append((view, view.keys(0)))
        if by_view:
            view.close()
        lease.release()
        self.check()

    @rule()
    def forget_tensors(self) -> None:
        self.ended.clear()
        self.check()

    def copy(self, worker: Worker, copies: Any) -> None:
        if copies:
            rows = [(copy.src, copy.dst, copy.num_tokens) for copy in copies]
            copy_blocks(worker.pool.blocks, torch.tensor(rows))

    def write(self, worker: Worker, lease: Any, begin: int, end: int) -> None:
        for at in range(begin, end):
            block, slot = lease.block_table[at // BLOCK_SIZE], at % BLOCK_SIZE
            worker.pool.blocks[:, :, block, slot] = self.draw.random()

    def check(self) -> None:
        for worker, lease, view in self.held:
            for layer in range(LAYOUT.num_layers):
                want = worker.pool.blocks[layer, :, list(lease.block_table)].flatten(1, 2)
                assert torch.equal(view.keys(layer), want[0])
                assert torch.equal(view.values(layer), want[1])
        for view, _ in self.ended:
            assert nothing_is_mapped(view)
        for worker in self.workers:
            worker.views.check()

    def teardown(self) -> None:
        if not hasattr(self, "held"):
            return
        for _, lease, _ in self.held:
            lease.release()
        self.held.clear()
        assert self.maps() == self.before, "ended leases have left mappings"
        self.workers[0].session.reset()
        for worker in self.workers:
            worker.close()


@pytest.mark.slow
def test_views_are_what_gathering_gives_through_any_life_of_leases(service: ServiceProcess) -> None:
    Machine.target = service.target
    limits = settings(max_examples=10, stateful_step_count=25, deadline=None, database=None)
    run_state_machine_as_test(Machine, settings=limits)
