import asyncio

import pytest

from prefixcache_worker.demo.desk import Desk
from prefixcache_worker.demo.failure import RequestFailed
from prefixcache_worker.demo.record import Request

LEDGER = {"hit": 0, "partial": 0, "joined": 0, "cold": 3, "evicted": 0, "granularity": 0}


class Hand:
    def __init__(self, name):
        self.name = name
        self.sent = []

    def send(self, request):
        self.sent.append(request)


def request(name):
    return Request(name, name.split("/")[0], 0, "plain", (1, 2, 3), 2)


def answer(desk, worker, name):
    desk.hear(worker, {"event": "started", "id": name, "ledger": LEDGER, "waited_ms": 250}, 1.0)
    desk.hear(worker, {"event": "token", "id": name, "token": 7, "text": "x"}, 2.0)
    done = {"event": "finished", "id": name, "tokens": [7], "text": "x", "num_computed": 3}
    done |= {"kv_read_bytes": 60, "kv_alone_bytes": 90}
    desk.hear(worker, done, 3.0)


def desk_of(*names):
    hands = {name: Hand(name) for name in names}
    return Desk(dict(hands), lambda: 0.5, 4), hands


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


def test_requests_go_to_the_least_busy_worker_and_a_chat_moves():
    async def play():
        desk, hands = desk_of("w1", "w2", "w3")
        tasks = [asyncio.create_task(desk.ask(request(f"{c}/1"))) for c in "abc"]
        await settle()
        assert [len(hand.sent) for hand in hands.values()] == [1, 1, 1]
        before = {hand.sent[0]["id"]: hand.name for hand in hands.values()}
        for name, worker in before.items():
            answer(desk, worker, name)
        await asyncio.gather(*tasks)
        task = asyncio.create_task(desk.ask(request("a/2")))
        await settle()
        (worker,) = [hand.name for hand in hands.values() if len(hand.sent) == 2]
        assert worker != before["a/1"]
        answer(desk, worker, "a/2")
        await task

    asyncio.run(play())


def test_who_looks_between_an_answer_and_its_end_is_woken_by_the_end():
    """The worker has told, but the request's own task has not run yet: it is still in hand."""

    async def play():
        desk, _ = desk_of("w1")
        ended = []

        async def ask():
            await desk.ask(request("a/1"))
            ended.append("a/1")

        task = asyncio.create_task(ask())
        await settle()
        answer(desk, "w1", "a/1")
        assert desk.load("w1") == 1
        async with asyncio.timeout(5):  # `until` looks at once, before the request's task runs
            await desk.until(lambda: desk.load("w1") == 0 and bool(ended))
        await task

    asyncio.run(play())


def test_times_and_ledger_are_those_of_the_events():
    async def play():
        desk, _ = desk_of("w1")
        task = asyncio.create_task(desk.ask(request("a/1")))
        await settle()
        answer(desk, "w1", "a/1")
        done = await task
        assert (done.sent_s, done.granted_s, done.first_s, done.done_s) == (0.5, 0.75, 2.0, 3.0)
        assert done.ttft_ms == 1500
        assert done.ledger.cold == 3

    asyncio.run(play())


def test_what_died_with_a_worker_is_sent_again_from_the_start():
    async def play():
        desk, hands = desk_of("w1", "w2")
        task = asyncio.create_task(desk.ask(request("a/1"), "w1"))
        await settle()
        desk.hear("w1", {"event": "started", "id": "a/1", "ledger": LEDGER, "waited_ms": 1}, 1.0)
        desk.hear("w1", {"event": "token", "id": "a/1", "token": 9, "text": "y"}, 2.0)
        desk.bury("w1", 2.5)
        (torn,) = desk.torn
        assert (torn.started, torn.num_answered, torn.worker) == (True, 1, "w1")
        await settle()
        assert [sent["id"] for sent in hands["w2"].sent] == ["a/1"]
        desk.hear("w1", {"event": "token", "id": "a/1", "token": 9, "text": "y"}, 2.0)
        answer(desk, "w2", "a/1")
        done = await task
        assert (done.worker, done.answer) == ("w2", [7])

    asyncio.run(play())


def test_a_refused_request_fails_and_so_does_one_without_any_worker():
    async def play():
        desk, _ = desk_of("w1")
        task = asyncio.create_task(desk.ask(request("a/1")))
        await settle()
        desk.hear("w1", {"event": "failed", "id": "a/1", "error": "too long"}, 1.0)
        with pytest.raises(RequestFailed, match="too long"):
            await task
        desk.bury("w1", 2.5)
        with pytest.raises(RequestFailed, match="no worker is left"):
            await desk.ask(request("b/1"))

    asyncio.run(play())
