"""A message, however long and slow, does not keep others waiting: it is answered in slices."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from prefixcache.client import codec
from prefixcache.config import load
from prefixcache.service import sessions
from prefixcache.service.handlers import Handlers
from prefixcache.service.holdings import Holdings
from prefixcache.service.identities import LOCAL
from prefixcache.service.waiting import WaitingLine
from prefixcache.service.workers import Workers
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb

LAYOUT = Layout(1, 1, 2, "float32")


@pytest.fixture
def handlers() -> Handlers:
    """A whole service without a socket."""
    settings = load({"memory": 64 * 4 * LAYOUT.token_bytes, "block_size": 4})
    settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT})
    holdings = Holdings(settings)
    line = WaitingLine(holdings)
    return Handlers(settings, holdings, line, Workers(holdings, line, settings))


def message(num_ops: int) -> pb.OpBatch:
    """That many ops of the same kind."""
    batch = pb.OpBatch()
    for i in range(num_ops):
        op = batch.ops.add()
        op.id = i + 1
        op.renew.SetInParent()
    return batch


async def turns(handlers: Handlers, num_ops: int) -> tuple[int, list[int]]:
    """Count how often another task has its turn while a message is answered; give the answers."""
    stream: Any = sessions.SessionStream(handlers, None, LOCAL)
    task = asyncio.current_task()
    hello = pb.OpBatch()
    attach = hello.ops.add().attach
    codec.write_namespace(Namespace("m"), attach.namespace)
    codec.write_layout(LAYOUT, attach.layout)
    await stream.answer(hello, task)
    had = 0

    async def other() -> None:
        nonlocal had
        while True:
            had += 1
            await asyncio.sleep(0)

    beside = asyncio.create_task(other())
    await asyncio.sleep(0)
    had = 0
    results = await stream.answer(message(num_ops), task)
    beside.cancel()
    return had, [result.id for result in results.results]


def clock(step_ns: int) -> Iterator[int]:
    now = 0
    while True:
        yield now
        now += step_ns


@pytest.mark.parametrize(
    ("op_ns", "num_ops", "slices"),
    [
        (1_000, 64, 1),  # short and quick: in one go
        (1_000, 65, 2),  # 64 ops end a slice
        (1_000, 640, 10),
        (200_000, 9, 3),  # and so does half a millisecond: three of these ops
        (600_000, 5, 5),  # one op that takes longer is a slice of its own
    ],
)
def test_others_have_their_turn_between_slices(
    handlers: Handlers, monkeypatch: pytest.MonkeyPatch, op_ns: int, num_ops: int, slices: int
) -> None:
    """By the number of ops and by the time they take; answers stay in order, and none is lost."""
    ticks = clock(op_ns)
    monkeypatch.setattr(sessions, "clock", lambda: next(ticks))
    had, answered = asyncio.run(turns(handlers, num_ops))
    assert had == slices - 1
    assert answered == list(range(1, num_ops + 1))
