"""Who computes what: load, the queue, takeover; workers are played."""

from __future__ import annotations

import asyncio
import random
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from patience import PATIENCE_S
from prefixcache_serving import router as router_module
from prefixcache_serving.journey import BEHIND, Journey
from prefixcache_serving.meter import Meter
from prefixcache_serving.refusals import Refused
from prefixcache_serving.router import MOST_DEATHS, Router
from serving.bench import Played, continuation

PROMPT = [5, 9, 2, 14]


def a_router(*names: str, queue: int = 8, tenants: tuple[str, ...] = (), seats: int = 4) -> Any:
    router = Router(Meter(), longest_queue=queue, tenants=tenants)
    workers = {name: Played(name, router.hear) for name in names}
    for worker in workers.values():
        router.join(worker, seats)
    return router, workers


def a_journey(number: int = 1, count: int = 6, tenant: str = "", prompt: list[int] = PROMPT) -> Any:
    line = {"tokens": prompt, "max_new_tokens": count}
    return Journey(f"r{number}", line, frozenset(), tenant)


def holder(workers: dict[str, Played], journey: Journey) -> Played:
    return workers[journey.worker]


async def all_of(journey: Journey) -> tuple[list[int], str]:
    tokens: list[int] = []
    while True:
        fresh, reason = await journey.read()
        tokens += fresh
        if reason:
            return tokens, reason


def read(journey: Journey) -> tuple[list[int], str]:
    return asyncio.run(all_of(journey))


def test_the_least_loaded_worker_gets_the_next_one() -> None:
    router, workers = a_router("w1", "w2")
    long, short = a_journey(1, prompt=[3] * 400), a_journey(2)
    router.admit([long])
    router.admit([short])
    assert long.worker != short.worker
    third = a_journey(3)
    router.admit([third])  # a prompt of 400 tokens weighs more than a request
    assert third.worker == short.worker
    workers[long.worker].step()  # nearly all of it was cached, as it turns out
    fourth = a_journey(4)
    router.admit([fourth])
    assert fourth.worker == long.worker


def test_a_worker_that_dies_hands_its_answers_on_with_what_was_generated() -> None:
    router, workers = a_router("w1", "w2")
    journey = a_journey()
    router.admit([journey])
    first = holder(workers, journey)
    first.step()
    first.step()
    first.is_gone = True
    router.part(first.name, died=True)
    second = holder(workers, journey)
    assert second is not first
    assert second.lines[-1]["generated"] == continuation(PROMPT, 2)
    for _ in range(4):
        second.step()
    assert read(journey) == (continuation(PROMPT, 6), "length")


def test_what_an_old_worker_still_says_is_dropped() -> None:
    router, workers = a_router("w1", "w2")
    journey = a_journey()
    router.admit([journey])
    first = holder(workers, journey)
    first.step()
    name = first.lines[0]["id"]
    router.open(router.stations[first.name], False)
    router.hand_over(router.stations[first.name])  # it was stopped, say
    assert first.cancelled == [name]
    second = holder(workers, journey)
    second.step()
    first.tell({"event": "token", "id": name, "token": 77})
    first.tell({"event": "finished", "id": name, "reason": "stop"})
    for _ in range(4):
        second.step()
    assert read(journey) == (continuation(PROMPT, 6), "length")


def test_nor_is_it_taken_from_the_same_worker_when_it_has_the_answer_again() -> None:
    router, workers = a_router("w1")
    journey = a_journey()
    router.admit([journey])
    worker = workers["w1"]
    worker.step()
    (old,) = [line["id"] for line in worker.lines]
    router.open(router.stations["w1"], False)  # it is stopped, and has said more than was read
    router.hand_over(router.stations["w1"])
    router.open(router.stations["w1"], True)
    assert worker.lines[-1]["generated"] == continuation(PROMPT, 1)
    worker.tell({"event": "token", "id": old, "token": 77})
    for _ in range(5):
        worker.step()
    assert read(journey) == (continuation(PROMPT, 6), "length")


def test_an_answer_whose_last_token_came_needs_nobody_to_say_so() -> None:
    router, workers = a_router("w1", "w2")
    journey = a_journey(count=1)
    router.admit([journey])
    first = holder(workers, journey)
    first.tell({"event": "token", "id": journey.name, "token": 8})
    router.part(first.name, died=True)
    assert read(journey) == ([8], "length")
    assert not any(worker.lines for worker in workers.values() if worker is not first)


def test_a_request_that_every_worker_dies_of_is_given_up() -> None:
    router, _workers = a_router(*(f"w{number}" for number in range(MOST_DEATHS + 1)))
    journey = a_journey()
    router.admit([journey])
    for _ in range(MOST_DEATHS):
        router.part(journey.worker, died=True)
    with pytest.raises(Refused, match="given up") as told:
        read(journey)
    assert told.value.status == 500
    assert len(router.stations) == 1


def test_a_request_that_every_worker_hangs_at_is_given_up() -> None:
    router, workers = a_router(*(f"w{number}" for number in range(MOST_DEATHS + 1)))
    journey, other = a_journey(), a_journey(2)
    router.admit([journey])
    for _ in range(MOST_DEATHS):
        assert not journey.is_over
        router.hand_over(router.stations[journey.worker], is_lost=True, hangs=True)
    with pytest.raises(Refused, match="made no step any more") as told:
        read(journey)
    assert told.value.status == 500
    router.admit([other])  # one that gets on between is not what they hang at
    for _ in range(MOST_DEATHS):
        holder(workers, other).step()
        router.hand_over(router.stations[other.worker], is_lost=True, hangs=True)
    while not other.is_over:
        holder(workers, other).step()
    assert read(other) == (continuation(PROMPT, 6), "length")


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    router, workers = a_router("w1", queue=2, seats=1)
    for number in range(3):
        router.admit([a_journey(number, count=1)])
    with pytest.raises(Refused, match="2 answers wait and 1 are being computed") as told:
        router.admit([a_journey(9)])
    assert told.value.status == 429
    assert int(told.value.headers["retry-after"]) >= 1
    workers["w1"].step()  # one is done: another one begins, and there is a place again
    router.admit([a_journey(9)])


def test_when_to_come_again_is_told_by_the_time_in_which_there_was_something_to_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [1000.0]
    monkeypatch.setattr(router_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    router, workers = a_router("w1", queue=20, seats=1)
    router.admit([a_journey(0, count=1)])
    now[0] += 0.5
    workers["w1"].step()
    now[0] += 3600  # nobody comes for an hour
    for number in range(1, 32):
        if number > 21:
            now[0] += 0.5
            workers["w1"].step()
        router.admit([a_journey(number, count=1)])
    with pytest.raises(Refused, match="20 answers wait") as told:
        router.admit([a_journey(99)])
    assert told.value.headers["retry-after"] == "10"  # two a second, and 20 wait
    now[0] += 50_000  # a long answer: it is not taken for a standstill that ends in a second
    with pytest.raises(Refused) as told:
        router.admit([a_journey(99)])
    assert told.value.headers["retry-after"] == "60"


def test_the_answers_of_one_request_are_taken_all_or_none() -> None:
    router, _ = a_router("w1", queue=4, seats=2)
    router.admit([a_journey(1), a_journey(2)])
    with pytest.raises(Refused):
        router.admit([a_journey(number) for number in range(3, 8)])
    assert (router.num_running, router.num_waiting) == (2, 0)


def test_a_tenant_cannot_take_the_others_places_in_the_queue_nor_their_turns() -> None:
    router, workers = a_router("w1", queue=8, tenants=("greedy", "modest"), seats=1)
    router.admit([a_journey(0, count=1, tenant="greedy")])
    for number in range(1, 7):
        router.admit([a_journey(number, count=1, tenant="greedy")])
    with pytest.raises(Refused):
        router.admit([a_journey(7, count=1, tenant="greedy")])
    late = a_journey(20, count=1, tenant="modest")
    router.admit([late])
    workers["w1"].step()
    workers["w1"].step()
    assert late.tokens or late.worker  # two turns later, although six of the other came before


def test_answers_of_slow_readers_take_turns_with_those_of_other_tenants() -> None:
    """They wait as ones that were begun, which go before others of their own tenant only."""
    router, workers = a_router("w1", queue=32, tenants=("slow", "modest"), seats=1)
    slow = [a_journey(number, count=4 * BEHIND, tenant="slow") for number in range(3)]

    async def play() -> None:
        for journey in slow:
            router.admit([journey])
            while not journey.is_set_down:
                workers["w1"].step()
        for journey in slow:  # each reads enough to be taken up again
            await journey.read()
            router.has_read(journey)
        late = a_journey(20, count=1, tenant="modest")
        router.admit([late])
        assert router.num_waiting == 3
        for _ in range(2):  # one turn of the other tenant, which came before, and its own
            router.leave(next(journey for journey in slow if journey.worker))
        assert late.worker

    asyncio.run(play())


def over_quota(worker: Played, retry_ms: float | None = 7000.0) -> None:
    """Let it refuse what it was given last, as a quota makes it do."""
    line = worker.lines[-1]
    assert not line["waits_for_quota"]
    del worker.jobs[line["id"]]
    told = {"event": "failed", "error": "QuotaExceeded", "message": "holds 5 of at most 6"}
    worker.tell(
        told | {"id": line["id"]} | ({} if retry_ms is None else {"retry_after_ms": retry_ms})
    )


def test_who_waits_for_a_quota_is_in_nobody_s_way_and_tried_again() -> None:
    async def main() -> None:
        router, workers = a_router("w1", tenants=("a", "b"), seats=1)
        full, other = a_journey(1, tenant="a"), a_journey(2, tenant="b")
        router.admit([full])
        over_quota(workers["w1"])
        assert (full.worker, router.num_waiting, router.num_running) == ("", 1, 0)
        router.admit([other])
        assert other.worker == "w1"  # at once
        while not other.is_over:
            workers["w1"].step()
        while not full.worker:
            await asyncio.sleep(0.001)
        over_quota(workers["w1"])
        while not full.worker:
            await asyncio.sleep(0.001)
        while not full.is_over:
            workers["w1"].step()
        assert await all_of(full) == (continuation(PROMPT, 6), "length")

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_who_has_waited_long_enough_for_a_quota_is_told_when_to_come_again() -> None:
    async def main() -> None:
        router, workers = a_router("w1")
        router._longest_wait_s = 0.0
        late, begun, never, left = (a_journey(number) for number in range(1, 5))
        router.admit([late])
        over_quota(workers["w1"])
        with pytest.raises(Refused, match="5 of at most 6") as refused:
            await all_of(late)
        assert (refused.value.status, refused.value.headers["retry-after"]) == (429, "7")

        router.admit([begun])
        workers["w1"].step()
        router.hand_over(router.stations["w1"])  # to itself
        over_quota(workers["w1"])
        while not begun.is_over:  # what was begun is not given up
            workers["w1"].step()
            await asyncio.sleep(0.001)
        assert await all_of(begun) == (continuation(PROMPT, 6), "length")

        router.admit([never])
        over_quota(workers["w1"], None)
        with pytest.raises(Refused, match="5 of at most 6") as refused:
            await all_of(never)
        assert (refused.value.status, refused.value.word) == (400, "quota_exceeded")

        router._longest_wait_s = PATIENCE_S
        router.admit([left])
        over_quota(workers["w1"])
        router.leave(left)
        assert router.num_waiting == 0

    asyncio.run(asyncio.wait_for(main(), PATIENCE_S))


def test_a_reader_that_is_behind_sets_its_answer_down_and_nobody_else_s() -> None:
    router, workers = a_router("w1")
    slow, swift = a_journey(1, count=400), a_journey(2, count=400)
    router.admit([slow])
    router.admit([swift])

    async def play() -> tuple[list[int], list[int]]:
        got: list[int] = []
        for _ in range(400):
            workers["w1"].step()
            got += (await swift.read())[0]
        assert slow.is_set_down
        assert len(slow.tokens) == BEHIND + 1
        assert not workers["w1"].jobs
        late: list[int] = []
        while not slow.is_over or slow.num_unread:
            fresh, _ = await slow.read()
            late += fresh
            router.has_read(slow)
            workers["w1"].step()
        return got, late

    assert asyncio.run(play()) == (continuation(PROMPT, 400),) * 2


def test_when_nobody_computes_any_more_every_answer_is_told_so() -> None:
    router, workers = a_router("w1", seats=2)
    slow, running, waiting = a_journey(1, count=400), a_journey(2, count=400), a_journey(3)
    for journey in (slow, running):
        router.admit([journey])

    async def play() -> list[int]:
        for _ in range(BEHIND + 1):
            workers["w1"].step()
            await running.read()
        assert slow.is_set_down
        router.admit([a_journey(4, count=400)])
        router.admit([waiting])
        assert router.num_waiting == 1
        workers["w1"].step()
        router.give_up()
        told = [await slow.read(), await running.read()]
        assert [reason for _, reason in told] == ["", ""]
        router.has_read(slow)
        for journey in (slow, running, waiting):
            with pytest.raises(Refused, match="ended before") as refused:
                await journey.read()
            assert refused.value.status == 503
        return [len(tokens) for tokens, _ in told]

    assert asyncio.run(play()) == [BEHIND + 1, 1]
    assert not workers["w1"].jobs
    assert (router.num_running, router.num_waiting) == (0, 0)


def test_who_leaves_is_cancelled_wherever_the_answer_is() -> None:
    router, workers = a_router("w1", seats=1)
    running, waiting = a_journey(1), a_journey(2)
    router.admit([running])
    router.admit([waiting])
    router.leave(waiting)
    assert router.num_waiting == 0
    router.leave(running)
    assert workers["w1"].cancelled == ["r1.0"]
    assert router.num_running == 0


def test_of_a_request_that_is_left_no_answer_is_begun_meanwhile() -> None:
    router, workers = a_router("w1", queue=16, seats=2)
    answers, other = [a_journey(number) for number in range(10)], a_journey(20)
    router.admit(answers)
    router.admit([other])
    router.leave(*answers)
    assert [line["id"] for line in workers["w1"].lines] == ["r0.0", "r1.0", "r20.0"]
    assert workers["w1"].cancelled == ["r0.0", "r1.0"]
    assert (router.num_running, router.num_waiting) == (1, 0)


@settings(max_examples=150)
@given(st.integers(0, 2**32), st.integers(1, 4), st.integers(1, 12))
def test_whatever_dies_stops_or_comes_back_every_answer_is_whole(
    seed: int, num_workers: int, num_requests: int
) -> None:
    """Against the model alone: no token is lost, doubled, or another's."""
    rng = random.Random(seed)
    router, workers = a_router(*(f"w{n}" for n in range(num_workers)), queue=64, seats=2)
    journeys = {
        number: a_journey(number, rng.randint(1, 9), prompt=[rng.randint(2, 95)] * 3)
        for number in range(num_requests)
    }
    for journey in journeys.values():
        router.admit([journey])
    names = iter(range(num_workers, 10**6))
    for _ in range(200):
        alive = list(router.stations)
        what = rng.random()
        if what < 0.70 and alive:
            workers[rng.choice(alive)].step()
        elif what < 0.80 and alive:  # stopped, or back
            station = router.stations[rng.choice(alive)]
            router.open(station, not station.is_open)
            if not station.is_open:
                router.hand_over(station)
        elif what < 0.90 and alive:  # drained
            name = rng.choice(alive)
            router.hand_over(router.stations[name])
            router.part(name, died=False)
        else:
            name = f"w{next(names)}"
            workers[name] = Played(name, router.hear)
            router.join(workers[name], 2)
    for name in list(router.stations):
        router.open(router.stations[name], True)
    last = Played("last", router.hear)
    router.join(last, 2)
    workers["last"] = last
    for _ in range(200):
        for name in list(router.stations):
            workers[name].step()
    for journey in journeys.values():
        count = journey.line["max_new_tokens"]
        assert read(journey) == (continuation(journey.line["tokens"], count), "length")
    assert (router.num_running, router.num_waiting) == (0, 0)
