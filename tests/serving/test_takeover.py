"""Answers that go on: real engines of a tiny model on a real service, lost at every token."""

from __future__ import annotations

import asyncio
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import prefixcache
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import Meter
from prefixcache_serving.router import Router
from prefixcache_worker.model import Model
from prefixcache_worker.request import to_json
from prefixcache_worker.request_line import read_request
from worker.zoo import Service, build, engine_at, random_tokens

BLOCK = 16
COUNT = 20
PROMPT = random_tokens(3 * BLOCK + 5)
TERMS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 11},
    "another sample": {"temperature": 1.3, "seed": 11, "sample": 3},
}


class EngineWorker:
    """An engine that takes the lines of a worker's input, and is stepped by the test."""

    def __init__(self, name: str, model: Model, target: str, router: Router) -> None:
        self.name = name
        self.pid = os.getpid()
        self.events: list[dict[str, Any]] = []
        self._model = model
        self._router = router
        self._client = prefixcache.connect(target)
        self._engine = engine_at(self._client, model)

    def send(self, line: dict[str, Any]) -> None:
        if "cancel" in line:
            self._engine.cancel(line["cancel"])
        else:
            self._engine.submit(read_request(line, self._model))

    def step(self) -> None:
        for event in self._engine.step():
            self.events.append(told := to_json(event))
            self._router.hear(self.name, told)
        if self._engine.stalled:
            self._engine.wait(0.01)

    def lose(self) -> None:
        """Its session ends, as that of a process that was killed: nothing is given back."""
        self._engine.membership.close()
        self._client.close()

    def close(self) -> None:
        self._engine.close()
        self._client.close()


@pytest.fixture(scope="module")
def model() -> Model:
    torch.set_num_threads(1)
    return Model.of(build("llama"), name="tiny")


@pytest.fixture(scope="module")
def target() -> Iterator[str]:
    os.environ["PYTHONPATH"] = os.pathsep.join(
        str(Path(__file__).parents[2] / root) for root in (".", "kernels", "worker", "tests")
    )
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        service = Service(Path(folder), "8MiB", "--block-size", str(BLOCK))
        service.start()
        yield service.target
        service.stop()


def answer(
    model: Model, target: str, prompt: list[int], terms: dict[str, Any], lost_at: set[int]
) -> tuple[list[int], list[int]]:
    """Let an answer be computed, and its worker be lost after each of some tokens.

    Returns:
        The answer, and how many tokens each worker had to compute when it began.
    """
    router = Router(Meter(), longest_queue=8)
    line = {"tokens": prompt, "max_new_tokens": COUNT, "wait_s": 0, **terms}
    journey = Journey("a", line, frozenset())
    workers = [EngineWorker("w0", model, target, router)]
    router.join(workers[0], 4)
    router.admit([journey])
    left = sorted(lost_at)
    while not journey.is_over:
        worker = workers[-1]
        if left and len(journey.tokens) == left[0]:
            left.pop(0)
            worker.lose()
            workers.append(EngineWorker(f"w{len(workers)}", model, target, router))
            router.part(worker.name, died=False)
            router.join(workers[-1], 4)
        workers[-1].step()
    workers[-1].close()
    tokens, reason = asyncio.run(journey.read())
    assert reason == "length"
    begun = [e for worker in workers for e in worker.events if e["event"] == "started"]
    return tokens, [event["num_to_compute"] for event in begun]


@pytest.mark.parametrize("kind", TERMS)
def test_a_worker_that_is_lost_at_any_token_costs_no_token(
    model: Model, target: str, kind: str
) -> None:
    """And what is computed again is less than a block and the step that was lost with it."""
    whole, _ = answer(model, target, PROMPT, TERMS[kind], set())
    for at in range(COUNT):
        got, computed = answer(model, target, PROMPT, TERMS[kind], {at})
        assert got == whole, at
        if at:  # before the first token, the prompt's chunk was lost with its worker
            assert computed[-1] <= BLOCK + 1, at


@pytest.mark.parametrize("kind", TERMS)
def test_an_answer_of_which_each_token_is_another_worker_s(
    model: Model, target: str, kind: str
) -> None:
    prompt = random_tokens(2 * BLOCK + 3, seed=5)
    whole, _ = answer(model, target, prompt, TERMS[kind], set())
    got, computed = answer(model, target, prompt, TERMS[kind], set(range(1, COUNT)))
    assert got == whole
    assert len(computed) == COUNT
    assert max(computed[1:]) <= BLOCK + 1


def test_prompts_behind_another_salt_share_nothing(model: Model, target: str) -> None:
    prompt = random_tokens(2 * BLOCK + 3, seed=9)
    computed = []
    for salt in ({}, {"salt": "red"}, {"salt": "blue"}, {"salt": "red"}, {}):
        tokens, (begun,) = answer(model, target, prompt, salt, set())
        computed.append(begun)
        assert tokens == answer(model, target, prompt, salt, set())[0]
    assert computed[:3] == [len(prompt)] * 3
    assert max(computed[3:]) == 1
