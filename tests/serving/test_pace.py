"""When a worker must be stuck: by its own steps, however slow the machine."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import Meter
from prefixcache_serving.pace import FEW, LEAST_S, MANY, Pace
from prefixcache_serving.router import Router, Station
from serving.bench import Played

STEPS = st.lists(st.tuples(st.floats(0.001, 5.0), st.integers(1, 512)), min_size=FEW, max_size=60)


def of(steps: list[tuple[float, int]], slower: float = 1.0) -> Pace:
    pace = Pace()
    for seconds, count in steps:
        pace.take(slower * seconds, count)
    return pace


@given(STEPS, st.floats(1.0, 100.0))
def test_a_slower_machine_is_waited_for_as_much_longer(
    steps: list[tuple[float, int]], slower: float
) -> None:
    once, more = of(steps).patience_s(64) - LEAST_S, of(steps, slower).patience_s(64) - LEAST_S
    assert more == pytest.approx(slower * once)


@given(STEPS)
def test_no_step_like_those_before_is_taken_for_stuck_though_it_takes_many_times_as_long(
    steps: list[tuple[float, int]],
) -> None:
    pace = of(steps)
    for seconds, count in steps:
        assert pace.patience_s(count) > MANY * seconds


def a_busy_station() -> tuple[Router, Station, Played]:
    router = Router(Meter(), longest_queue=4)
    worker = Played("w1", router.hear)
    station = router.join(worker, 4)
    router.admit([Journey("a", {"tokens": [1, 2], "max_new_tokens": 99}, frozenset())])
    return router, station, worker


def test_who_only_reads_is_stuck_and_who_says_that_there_is_nothing_to_do_is_not() -> None:
    _, station, worker = a_busy_station()
    for _ in range(20):
        station.hear(station.heard_s + 0.01, 1)
    heard_s = station.heard_s
    assert not station.is_stuck(heard_s + LEAST_S)
    assert station.is_stuck(heard_s + LEAST_S + 1)
    station.heard_s = 0.0
    worker.tell({"event": "failed", "id": "another"})
    assert station.heard_s == 0.0
    worker.tell({"event": "step", "num_tokens": 0})
    assert station.heard_s > 0.0
    assert not station.is_stuck(station.heard_s + LEAST_S)


def test_nobody_is_blamed_for_a_time_in_which_nobody_listened() -> None:
    router, station, _ = a_busy_station()
    late = station.heard_s + 1000
    assert station.is_stuck(late)
    router.pardon(999)
    assert not station.is_stuck(late)


def test_a_worker_with_nothing_in_hand_is_never_stuck() -> None:
    station = Router(Meter(), longest_queue=4).join(Played("w1", lambda name, event: None), 4)
    assert not station.is_stuck(station.heard_s + 1e6)
