"""What hears of requests may fail: its first error ends it, and nobody's step."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from prefixcache.client import codec
from prefixcache.config import load
from prefixcache.errors import ServiceUnavailable
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc import session
from prefixcache.service.handlers import Handlers
from prefixcache.service.http.dashboard import Dashboard
from prefixcache.service.workers import Workers
from prefixcache.types import Layout, Namespace, pack
from prefixcache.v1 import prefixcache_pb2 as pb

LAYOUT = Layout(1, 1, 2, "float32")


class Broken:
    """Something of which every call fails, and is counted."""

    def __init__(self) -> None:
        self.calls = 0

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *args: Any) -> Any:
        self.calls += 1
        raise ArithmeticError("of all things")


class Service:
    """A whole service without a socket, and a session at it."""

    def __init__(self, **more: Any) -> None:
        settings = load({"memory": 64 * 4 * LAYOUT.token_bytes, "block_size": 4})
        settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT, **more})
        self.backing = Backing(settings)
        deliveries = Deliveries(self.backing)
        self.handlers = Handlers(
            settings, self.backing, deliveries, Workers(self.backing, deliveries, settings)
        )
        self._stream: Any = session.SessionStream(self.handlers, None, LOCAL)

    async def ask(self, fill: Any) -> Any:
        batch = pb.OpBatch()
        op = batch.ops.add()
        op.id = 1
        fill(op)
        (result,) = (await self._stream.answer(batch, asyncio.current_task())).results
        assert result.WhichOneof("result") != "error", result.error
        return result

    async def work(self, *, first: int = 1, reset: bool = True) -> None:
        """Attach, and twice: acquire, commit, release; then forget it all."""

        def attach(op: Any) -> None:
            codec.write_namespace(Namespace("m"), op.attach.namespace)
            codec.write_layout(LAYOUT, op.attach.layout)

        await self.ask(attach)
        for token in (first, first + 1):
            tokens = pack([token, 2, 3, 4, 5, 6, 7, 8])

            def acquire(op: Any, tokens: bytes = tokens) -> None:
                op.acquire.tokens = tokens

            lease = (await self.ask(acquire)).acquire.grant.lease

            def commit(op: Any, lease: int = lease) -> None:
                op.commit.lease = lease
                op.commit.num_tokens = 4  # the other block is never stored

            await self.ask(commit)

            def release(op: Any, lease: int = lease) -> None:
                op.release.lease = lease

            await self.ask(release)
        if reset:
            await self.ask(lambda op: codec.write_namespace(Namespace("m"), op.reset.namespace))

    def told(self) -> dict[str, str]:
        """The failures that a snapshot shows."""
        message = pb.SnapshotResponse()
        steps = self.handlers.snapshot(session.Visitor(LOCAL), pb.SnapshotRequest())
        turns = self.handlers.turns
        answer = asyncio.run(turns.run(steps))
        asyncio.run(turns.run(self.handlers.write_snapshot(answer, message)))
        return dict(message.service.failures)


@pytest.mark.parametrize(
    ("attribute", "part"),
    [("tracer", "tracing"), ("recorder", "recording"), ("shadows", "shadow caches")],
)
def test_a_session_works_on_when_what_hears_of_it_fails(attribute: str, part: str) -> None:
    # Shadow caches begin with the cache: here in the step of the first worker.
    service, broken = Service(layout=None), Broken()
    setattr(service.handlers, attribute, broken)
    asyncio.run(service.work())
    assert broken.calls == 1
    setattr(service.handlers, attribute, None)
    assert "of all things" in service.told()[part]


@pytest.mark.parametrize("step", ["_hear", "_take"], ids=["heard", "hashed"])
def test_events_end_in_order_when_they_cannot_be(
    step: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, broken = Service(), Broken()

    async def watch_and_work() -> None:
        log = service.handlers.events
        with log.watching():
            batches = log.batches(0)
            await anext(batches)
            monkeypatch.setattr(log, step, broken)
            await service.work()
            with pytest.raises(ServiceUnavailable, match="events have ended"):
                await anext(batches)
            with pytest.raises(ServiceUnavailable, match="events have ended"):
                await anext(log.batches(0))
        log.close()

    asyncio.run(watch_and_work())
    assert broken.calls == 1
    assert "of all things" in service.told()["events"]


@pytest.mark.parametrize("verb", ["stored", "cleared", "given", "ended"])
def test_a_state_that_fails_is_given_up_and_nothing_of_it_restored(
    tmp_path: Path, verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    service, broken = Service(pool="shm", state=tmp_path / "state"), Broken()
    try:
        assert service.backing.state is not None
        writer: Any = service.backing.state._writer
        asyncio.run(service.work(reset=False))  # this could be restored
        monkeypatch.setattr(writer, verb, broken)
        asyncio.run(service.work(first=10, reset=verb == "cleared"))
        assert broken.calls == 1
        assert "of all things" in service.backing.state.condition.failure
    finally:
        service.backing.close()
    again = Backing(service.backing.settings)
    try:
        assert again.state is not None
        assert again.state.condition.restored_blocks == 0
    finally:
        again.close()


def test_a_page_that_cannot_be_made_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    service = Service()

    async def look() -> None:
        page = Dashboard(service.handlers)
        monkeypatch.setattr(page, "state", Broken())
        viewer = page.live()
        await anext(viewer)
        await asyncio.sleep(0)  # its data is made by a task
        await service.work()
        page.close()

    asyncio.run(look())
    assert "of all things" in service.told()["the page"]
