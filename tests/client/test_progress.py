"""What workers tell of their steps and of their inbox, and what becomes of it."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

import prefixcache
from prefixcache.cli import checks
from prefixcache.cli.status import read
from prefixcache.client import Client, Inbox, Session, connect_async
from prefixcache.client.ops import Step
from prefixcache.client.progress import Told
from prefixcache.errors import InvalidRequest
from prefixcache.types import Namespace
from prefixcache.v1 import prefixcache_pb2 as pb
from service.service_process import LAYOUT, running, sizes


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("p")
    with running(f"unix:{path}/s", *sizes(64, 4), "--http", "127.0.0.1:0") as service:
        yield service.target


@pytest.fixture
def client(target: str) -> Iterator[Client]:
    with prefixcache.connect(target) as client:
        yield client


@pytest.fixture
def session(client: Client) -> Iterator[Session]:
    with client.attach("tiny", LAYOUT, name="ann") as session:
        yield session


def info(client: Client) -> Any:
    """What the service says of the worker that is attached."""
    (found,) = [one for one in read(client).workers if one.state == "attached"]
    return found


def wrong(client: Client, after_s: float = 0.0) -> list[str]:
    found = checks.progress(read(client), after_s)
    return [one.text for one in found if one.level == "wrong"]


def renew(session: Session, told: Told) -> None:
    step = Step(session.ids)
    reply = step.renew(told)
    session.send(step)
    session.snapshot()  # answered after it
    reply.result()


@pytest.mark.parametrize("seconds", [-1.0, -1e-9, math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("field", ["stalled_s", "oldest_untaken_s"])
def test_a_time_that_is_none_is_refused_and_changes_nothing(
    client: Client, session: Session, field: str, seconds: float
) -> None:
    session.report(3)
    session.renew()
    told = Told(5, seconds) if field == "stalled_s" else Told(5, 0.0, Inbox(1, seconds))
    with pytest.raises(InvalidRequest, match=f"{field} must be 0 or more seconds"):
        renew(session, told)
    assert info(client).in_hand == 3
    assert session.alive


@pytest.mark.parametrize("seconds", [1e9, 1e300])
def test_nobody_has_been_stuck_for_longer_than_he_is_attached(
    client: Client, session: Session, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    most = Told(2**32 - 1, seconds, Inbox(2**32 - 1, seconds))
    monkeypatch.setattr(session._progress, "told", lambda: most)
    session.renew()
    found = info(client)
    assert (found.in_hand, found.untaken) == (2**32 - 1, 2**32 - 1)
    assert 0 < found.stalled_s <= found.since_s
    assert 0 < found.oldest_untaken_s <= found.since_s


@pytest.mark.parametrize("count", [-1, 2**32, True, 1.0, 0.5, math.nan, None, "3", [2], np.ones(2)])
def test_a_number_of_requests_that_nobody_has_is_refused_where_it_is_told(
    session: Session, count: Any
) -> None:
    with pytest.raises(ValueError, match="requests in hand"):
        session.report(count)
    session.report(np.int64(3))
    session.renew()
    assert session.alive


@pytest.mark.parametrize(
    "look",
    [
        lambda: 1 / 0,
        lambda: None,
        lambda: Inbox(-1),
        lambda: Inbox(True),
        lambda: Inbox("x"),
        lambda: Inbox(1, math.nan),
        lambda: Inbox(1, -1.0),
        lambda: Inbox(1, None),
    ],
)
def test_a_sign_of_life_is_sent_whatever_becomes_of_the_look_into_the_inbox(
    client: Client, session: Session, look: Any, caplog: pytest.LogCaptureFixture
) -> None:
    session.report(2)
    session.watch_inbox(look)
    before = session.signs.last
    session.renew()
    assert session.signs.last > before
    assert (info(client).in_hand, info(client).untaken) == (2, 0)
    assert "who tells of a worker's inbox raised" in caplog.text


def test_who_raises_when_told_of_the_line_keeps_no_answer_from_others(
    session: Session, caplog: pytest.LogCaptureFixture
) -> None:
    session.watch_line(lambda num_in_line: 1 // num_in_line)
    session.renew()
    session.acquire([1, 2, 3]).release()
    assert session.alive
    assert "who is told how many wait in line has raised" in caplog.text


@pytest.mark.parametrize("odd", [None, 3, "print"])
def test_who_cannot_be_called_is_refused_where_he_is_named(session: Session, odd: Any) -> None:
    for name, tell in {
        "look": lambda: session.watch_inbox(odd),
        "told": lambda: session.watch_line(odd),
        "on_error": lambda: session.post(session.batch(), on_error=odd or 1),
    }.items():
        with pytest.raises(InvalidRequest, match=f"{name} is .*, which cannot be called"):
            tell()
    session.renew()
    assert session.alive


def test_a_worker_that_takes_nothing_is_named(client: Client, session: Session) -> None:
    session.report(0)
    session.watch_inbox(lambda: Inbox(2, 40.0))
    session.renew()
    (text,) = wrong(client)
    assert "has 2 requests before it and took the oldest of them not for" in text
    assert wrong(client, 3600) == []
    session.watch_inbox(Inbox)
    session.renew()
    assert wrong(client) == []


@pytest.mark.slow
def test_heartbeats_tell_what_lies_in_the_inbox(client: Client, session: Session) -> None:
    session.watch_inbox(lambda: Inbox(7, 1.0))
    while info(client).untaken != 7:  # the next one tells
        session.acquire([1, 2, 3]).release()


def test_a_worker_that_computes_but_never_commits_is_hinted_at(
    client: Client, session: Session
) -> None:
    def hints() -> list[str]:
        return [one.text for one in checks.progress(read(client), 0.0) if one.level == "note"]

    assert hints() == []
    with session.acquire(list(range(50, 60))) as lease:
        (text,) = hints()
        assert "holds 1 lease with tokens to compute, and has committed nothing for" in text
        while info(client).uncommitted_s < 0.5:
            pass
        began = time.monotonic()
        lease.commit(5)
        assert info(client).uncommitted_s <= time.monotonic() - began  # counted anew
        lease.commit(10)
        assert hints() == []  # all is computed: it only holds it
    assert info(client).uncommitted_s == 0


def test_the_asynchronous_session_tells_the_same(client: Client, target: str) -> None:
    async def work() -> None:
        async with (
            await connect_async(target) as twin,
            await twin.attach("tiny", LAYOUT, name="asynchronous") as session,
        ):
            session.report(3)
            session.watch_inbox(lambda: Inbox(2, 9.0))
            await session.renew()
            found = await asyncio.to_thread(info, client)
            assert (found.in_hand, found.untaken) == (3, 2)
            assert found.stalled_s > 0
            assert len(await asyncio.to_thread(wrong, client)) == 1
            session.report(0)
            session.watch_inbox(Inbox)
            await session.renew()
            assert await asyncio.to_thread(wrong, client) == []

    asyncio.run(work())


def test_who_has_gone_is_stuck_no_more(client: Client, target: str) -> None:
    with client.attach("tiny", LAYOUT, name="gone") as session:
        session.report(4)
        session.watch_inbox(lambda: Inbox(4, 4.0))
        session.renew()
    gone = next(one for one in read(client).workers if one.worker == "gone")
    assert (gone.state, gone.stalled_s, gone.oldest_untaken_s) == ("left", 0, 0)
    assert wrong(client) == []


@pytest.mark.slow
def test_old_clients_that_tell_nothing_are_well(client: Client, session: Session) -> None:
    assert pb.RenewRequest.FromString(b"").untaken == 0
    renew(session, Told())
    assert wrong(client) == []


def test_a_sign_of_life_tells_how_many_wait_in_line_but_for_full_quotas(
    client: Client, session: Session
) -> None:
    heard: list[int] = []
    session.watch_line(heard.append)
    with client.attach("full", LAYOUT) as full:
        client.set_quota(Namespace("full"), max_held=30)
        with full.acquire(list(range(40))):
            waits = full.acquire_later(list(range(100, 200)))
            full.snapshot()
            session.renew()
            assert waits.cancel()
    with session.acquire(list(range(200))), client.attach("other", LAYOUT) as other:
        futures = [other.acquire_later([at] * 100) for at in (1, 2)]
        other.snapshot()
        session.renew()
        for future in futures:
            assert future.cancel()
        other.snapshot()
        session.renew()
    assert heard == [0, 1, 0]
