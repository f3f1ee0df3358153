"""One message of a session: what an op settles is answered before the ops behind it.

256 blocks of 4 tokens: one lease has nearly all of them, another one waits to grow.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from prefixcache.client import Batch, Lease, Reply, Session
from prefixcache.errors import InvalidRequest
from prefixcache.types import TableUpdate
from service.service_process import LAYOUT, ServiceProcess, running, sizes


@pytest.fixture(scope="module")
def service(sockets: Path) -> Iterator[ServiceProcess]:
    flags = ("--ttl", "60", "--max-waiting", "3")
    with running(f"unix:{sockets}/order.sock", *sizes(256, 4), *flags) as process:
        yield process


@pytest.fixture
def session(service: ServiceProcess) -> Iterator[Session]:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("model", LAYOUT) as session,
    ):
        yield session


def growing(session: Session, lease: Lease) -> Reply[TableUpdate]:
    """A reply of an `extend` to 50 blocks that waits for room."""
    with session.batch() as batch:
        reply = batch.extend(lease, 200, wait_s=30.0)
    assert not reply.done
    return reply


def num_blocks(session: Session, lease: Lease) -> int:
    return {info.lease: info.num_blocks for info in session.snapshot().leases}[lease.id]


BEHIND: dict[str, Callable[[Batch, Lease], Reply[Any]]] = {
    "extend": lambda batch, lease: batch.extend(lease, 240),
    "truncate": lambda batch, lease: batch.truncate(lease, 5),
    "commit": lambda batch, lease: batch.commit(lease, 10),
    "fork": lambda batch, lease: batch.fork(lease, 1),
}


@pytest.mark.parametrize("verb", BEHIND)
def test_a_table_that_waited_to_grow_is_what_the_service_has(session: Session, verb: str) -> None:
    """The release gives it room in the middle of a message that goes on with the same lease."""
    large, small = session.acquire(range(1, 900)), session.acquire(range(10))
    reply = growing(session, small)
    with session.batch() as batch:
        batch.release(large)
        behind = BEHIND[verb](batch, small)
    assert reply.result().keep == 3
    assert behind.error is None
    assert len(small.block_table) == num_blocks(session, small)
    assert len(set(small.block_table)) == len(small.block_table)


def test_who_cancels_what_has_its_room_already_gets_it_before(session: Session) -> None:
    large, small = session.acquire(range(1, 900)), session.acquire(range(10))
    reply = growing(session, small)
    order: list[str] = []
    reply.listener = lambda _: order.append("extend")
    with session.batch() as batch:
        batch.release(large)
        batch.step.ask("cancel", op=reply.op_id).listener = lambda _: order.append("cancel")
    assert order == ["extend", "cancel"]
    assert len(small.block_table) == num_blocks(session, small) == 50


def test_the_number_of_an_op_that_waits_is_taken(session: Session) -> None:
    """Else one number would stand for any count of waiting requests, beside --max-waiting."""
    owner = session.acquire(range(50))
    with session.batch() as batch:
        waits = [batch.acquire(range(50), wait_s=30.0) for _ in range(5)]
        for op in batch.step.message.ops:
            op.id = waits[0].op_id
    session.renew()  # answered behind them
    with pytest.raises(InvalidRequest, match=f"op {waits[0].op_id} still waits"):
        waits[0].result()
    owner.release()
