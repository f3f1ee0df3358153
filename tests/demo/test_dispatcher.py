import asyncio

import pytest

from patience import PATIENCE_S
from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.failure import RequestFailed
from prefixcache_worker.demo.record import Request

LEDGER = {"hit": 0, "partial": 0, "joined": 0, "cold": 3, "evicted": 0, "granularity": 0}


class Recipient:
    def __init__(self, name):
        self.name = name
        self.sent = []

    def send(self, request):
        self.sent.append(request)


def request(name):
    return Request(name, name.split("/")[0], 0, "plain", (1, 2, 3), 2)


def answer(dispatcher, worker, name):
    dispatcher.hear(
        worker, {"event": "started", "id": name, "ledger": LEDGER, "waited_ms": 250}, 1.0
    )
    dispatcher.hear(worker, {"event": "token", "id": name, "token": 7, "text": "x"}, 2.0)
    done = {"event": "finished", "id": name, "tokens": [7], "text": "x", "num_computed": 3}
    done |= {"kv_read_bytes": 60, "kv_alone_bytes": 90}
    dispatcher.hear(worker, done, 3.0)


def dispatcher_of(*names):
    recipients = {name: Recipient(name) for name in names}
    return Dispatcher(dict(recipients), lambda: 0.5, 4), recipients


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_go_to_the_least_busy_worker_and_a_chat_moves():
    async def run():
        dispatcher, recipients = dispatcher_of("w1", "w2", "w3")
        tasks = [asyncio.create_task(dispatcher.ask(request(f"{c}/1"))) for c in "abc"]
        await settle()
        assert [len(one.sent) for one in recipients.values()] == [1, 1, 1]
        before = {one.sent[0]["id"]: one.name for one in recipients.values()}
        for name, worker in before.items():
            answer(dispatcher, worker, name)
        await asyncio.gather(*tasks)
        task = asyncio.create_task(dispatcher.ask(request("a/2")))
        await settle()
        (worker,) = [one.name for one in recipients.values() if len(one.sent) == 2]
        assert worker != before["a/1"]
        answer(dispatcher, worker, "a/2")
        await task

    asyncio.run(run())


def test_who_looks_between_an_answer_and_its_end_is_woken_by_the_end():
    """The worker has told, but the request's own task has not run yet: it is still in hand."""

    async def run():
        dispatcher, _ = dispatcher_of("w1")
        ended = []

        async def ask():
            await dispatcher.ask(request("a/1"))
            ended.append("a/1")

        task = asyncio.create_task(ask())
        await settle()
        answer(dispatcher, "w1", "a/1")
        assert dispatcher.load("w1") == 1
        async with asyncio.timeout(PATIENCE_S):  # `until` looks before the request's task runs
            await dispatcher.until(lambda: dispatcher.load("w1") == 0 and bool(ended))
        await task

    asyncio.run(run())


def test_times_and_ledger_are_those_of_the_events():
    async def run():
        dispatcher, _ = dispatcher_of("w1")
        task = asyncio.create_task(dispatcher.ask(request("a/1")))
        await settle()
        answer(dispatcher, "w1", "a/1")
        done = await task
        assert (done.sent_s, done.granted_s, done.first_s, done.done_s) == (0.5, 0.75, 2.0, 3.0)
        assert done.ttft_ms == 1500
        assert done.ledger.cold == 3

    asyncio.run(run())


def test_what_died_with_a_worker_is_sent_again_from_the_start():
    async def run():
        dispatcher, recipients = dispatcher_of("w1", "w2")
        task = asyncio.create_task(dispatcher.ask(request("a/1"), "w1"))
        await settle()
        dispatcher.hear(
            "w1", {"event": "started", "id": "a/1", "ledger": LEDGER, "waited_ms": 1}, 1.0
        )
        dispatcher.hear("w1", {"event": "token", "id": "a/1", "token": 9, "text": "y"}, 2.0)
        dispatcher.worker_died("w1", 2.5)
        (interrupted,) = dispatcher.interrupted
        assert (interrupted.started, interrupted.num_answered, interrupted.worker) == (
            True,
            1,
            "w1",
        )
        await settle()
        assert [sent["id"] for sent in recipients["w2"].sent] == ["a/1"]
        dispatcher.hear("w1", {"event": "token", "id": "a/1", "token": 9, "text": "y"}, 2.0)
        answer(dispatcher, "w2", "a/1")
        done = await task
        assert (done.worker, done.answer) == ("w2", [7])

    asyncio.run(run())


def test_a_refused_request_fails_and_so_does_one_without_any_worker():
    async def run():
        dispatcher, _ = dispatcher_of("w1")
        task = asyncio.create_task(dispatcher.ask(request("a/1")))
        await settle()
        dispatcher.hear("w1", {"event": "failed", "id": "a/1", "error": "too long"}, 1.0)
        with pytest.raises(RequestFailed, match="too long"):
            await task
        dispatcher.worker_died("w1", 2.5)
        with pytest.raises(RequestFailed, match="no worker is left"):
            await dispatcher.ask(request("b/1"))

    asyncio.run(run())
