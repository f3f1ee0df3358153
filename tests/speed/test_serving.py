"""The arithmetic of the serving benchmark; its figures come from running it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, cast

import pytest

from prefixcache_bench.speed import chatload, serving
from prefixcache_bench.speed.chatload import NEW_TOKENS, TURNS, Load, Worker, play
from prefixcache_kernels.groups import FREE
from prefixcache_worker.model import Model


class Recorder:
    """Stands in for a worker: remembers what it was asked and answers at once."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[int]]] = []
        self.restarts = 0

    def ask(self, request_id: str, tokens: Sequence[int]) -> Future[dict[str, Any]]:
        self.asked.append((request_id, list(tokens)))
        answer: Future[dict[str, Any]] = Future()
        answer.set_result(
            {"ttft_s": 0.5, "reused": 1, "num_computed": 2, "tokens": [9] * NEW_TOKENS}
        )
        return answer

    def restart(self) -> None:
        self.restarts += 1


def run(load: Load, count: int) -> tuple[list[Recorder], chatload.Played]:
    team = [Recorder() for _ in range(count)]
    played = play(load, cast("list[Worker]", team), shared=True, seed=1)
    return team, played


def chats_of(recorder: Recorder) -> set[str]:
    return {request_id.split(".")[0] for request_id, _ in recorder.asked}


def test_pinned_chats_stay_and_moving_chats_move() -> None:
    pinned, _ = run(Load("p", 6, 2, 50, moving=False, restart=False), 3)
    assert [chats_of(w) for w in pinned] == [{"0", "3"}, {"1", "4"}, {"2", "5"}]
    moving, played = run(Load("m", 6, 6, 50, moving=True, restart=True), 3)
    assert [chats_of(w) for w in moving] == [set("012345")] * 3
    assert [w.restarts for w in moving] == [1, 0, 0]
    assert len(played.turns) == 6 * TURNS


def test_a_turn_goes_on_from_the_answer_before_it_and_the_seed_repeats_it() -> None:
    load = Load("m", 3, 1, 50, moving=True, restart=False)
    [only], _ = run(load, 1)
    asked = dict(only.asked)
    assert asked["1.1"][: len(asked["1.0"]) + NEW_TOKENS] == asked["1.0"] + [9] * NEW_TOKENS
    assert asked["0.0"][:50] == asked["1.0"][:50]
    [again], _ = run(load, 1)
    assert dict(again.asked) == asked


def test_goals_are_ratios_of_what_was_measured() -> None:
    result = {
        "decode": [{"batch": 1, "engine_to_generate": 1.5}, {"batch": 4, "engine_to_generate": 1}],
        "shared": [{"batch": 8, "together_to_apart": 1.3}],
        "ttft": [
            {"length": 256, "generate_to_cold": 1.1, "cold_to_warm": 2},
            {"length": 1000, "generate_to_cold": 0.9, "cold_to_warm": 8},
        ],
        "chats": [
            {"load": "moving chats", "workers": 3, "shared": s, "later_ttft_ms_median": t}
            for s, t in ((True, 50.0), (False, 400.0))
        ],
    }
    found = {goal["name"]: (goal["ratio"], goal["met"]) for goal in serving.goals(result)}
    assert found == {
        "decode at batch 1": (1.5, True),
        "shared decode at batch 8": (1.3, True),
        "cold first token": (0.9, False),
        "warm first token at 1,000": (8, True),
        "moving chats, 3 workers": (8.0, True),
    }


def test_shared_decoding_is_measured_with_and_without_the_plan(
    tiny: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(serving, "SHARED_TOKENS", 96)
    monkeypatch.setattr(serving, "SHARED_TAIL", 3)
    monkeypatch.setattr(serving, "BATCHES", (1, 2))
    monkeypatch.setattr(serving, "tokens", lambda draw, n: [draw.randrange(97) for _ in range(n)])
    monkeypatch.setattr(Model, "sharing_cost", lambda model, block_size: FREE)
    [row] = serving.measure_shared(tiny, 1, 8, random.Random(0))
    assert row["batch"] == 2
    assert row["apart_tokens_per_s"]["median"] > 0
    assert row["together_tokens_per_s"]["median"] > 0
