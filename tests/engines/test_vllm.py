"""vLLM itself, unmodified, several engines on one pool: what they say is what vLLM says alone.

A tiny model with random weights in float32, one process an engine.  Runs where an environment with
vLLM is named: `PREFIXCACHE_VLLM_PYTHON=.venv-vllm/bin/python`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from engines.vllm_process import VllmProcess, needs_vllm, write_model
from patience import PATIENCE_S
from prefixcache.client import Client
from service.service_process import ServiceProcess

pytestmark = needs_vllm

SIZE, SPARE = 32, 4
SERVE = (
    "--memory",
    "6MiB",
    "--block-size",
    str(SIZE),
    "--ttl",
    "4",
    "--first-block",
    "1",
    "--log-level",
    "warning",
)
"""95 blocks, 3,040 tokens, of which engines in place keep some for bad times."""


def text(seed: object, length: int) -> list[int]:
    draw = random.Random(repr(seed))
    return [draw.randrange(3, 512) for _ in range(length)]


class Stage:
    """A service, an engine without it, and two of each mode that share its pool."""

    def __init__(self, folder: Path, modes: tuple[str, ...]) -> None:
        self.target = f"unix:{folder}/s"
        self.is_lost = False
        """Whether the service has died since: engines in place do not join another one."""
        self.service = ServiceProcess(self.target, *SERVE)
        self.alone = VllmProcess(folder / "model", "alone")
        self.engines = {
            f"{mode} {number}": VllmProcess(folder / "model", mode, self.target)
            for mode in modes
            for number in (1, 2)
        }

    def wait(self) -> None:
        for engine in (self.alone, *self.engines.values()):
            assert engine.ready.result(600) == {"ready": True}

    def pair(self, mode: str) -> tuple[VllmProcess, VllmProcess]:
        return self.engines[f"{mode} 1"], self.engines[f"{mode} 2"]

    def client(self) -> Client:
        return prefixcache.connect(self.target)

    def check_idle(self) -> None:
        """Nobody holds anything but what is kept for bad times, and every invariant holds."""
        spare = 0 if self.is_lost else sum(name.startswith("in-place") for name in self.engines)
        with self.client() as client:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                told = client.snapshot()
                held = {
                    "leases": told.num_leases,
                    "private": told.private,
                    "quarantined": told.quarantined,
                    "waiting": told.waiting,
                }
                kept = {"leases": spare, "private": SPARE * spare, "quarantined": 0, "waiting": 0}
                if held == kept or time.monotonic() > deadline:
                    break
                time.sleep(0.05)
            assert held == kept
            client.check()

    def close(self) -> None:
        for engine in (self.alone, *self.engines.values()):
            engine.close()
        self.service.close()


MODES = ("connector", "in-place")


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    folder = tmp_path_factory.mktemp("v")
    write_model(folder / "model")
    made = Stage(folder, MODES)
    try:
        made.wait()
        yield made
    finally:
        made.close()


@pytest.mark.parametrize("mode", MODES)
def test_what_one_engine_computed_the_other_reads(stage: Stage, mode: str) -> None:
    first, second = stage.pair(mode)
    system = text((mode, "share"), 300)
    prompts = [system + text((mode, at), 20 + at) for at in range(2)]
    assert first.generate(prompts[0])["tokens"] == stage.alone.generate(prompts[0])["tokens"]
    answer = second.generate(prompts[1])
    assert answer["tokens"] == stage.alone.generate(prompts[1])["tokens"]
    assert answer["cached"] == [300 // SIZE * SIZE if mode == "connector" else 300]
    stage.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_a_prefix_that_both_want_at_once_is_computed_once(stage: Stage, mode: str) -> None:
    pair = stage.pair(mode)
    system = text((mode, "together"), 900)
    prompts = [system + text((mode, "tail", at), 30) for at in range(2)]
    with stage.client() as client:
        before = client.snapshot().ledger
        answers = [one.generate_later(prompt) for one, prompt in zip(pair, prompts, strict=True)]
        got = [answer.result(600) for answer in answers]
        ledger = client.snapshot().ledger
    for prompt, answer in zip(prompts, got, strict=True):
        assert answer["tokens"] == stage.alone.generate(prompt)["tokens"]
    assert ledger.cold - before.cold < 1100, "computed twice"
    stage.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_more_than_the_pool_holds_is_answered_all_the_same(stage: Stage, mode: str) -> None:
    pair = stage.pair(mode)
    batches = [[text((mode, number, at), 300) for at in range(6)] for number in range(2)]
    answers = [
        one.generate_later(*batch, max_tokens=100) for one, batch in zip(pair, batches, strict=True)
    ]
    for batch, answer in zip(batches, answers, strict=True):
        want = stage.alone.generate(*batch, max_tokens=100)
        assert answer.result(600)["tokens"] == want["tokens"]
    stage.check_idle()


def test_without_the_service_a_connector_goes_on_and_shares_again_when_it_is_back(
    stage: Stage,
) -> None:
    first, second = stage.pair("connector")
    prompt = text("lost", 500)
    answer = first.generate_later(prompt, max_tokens=60)
    time.sleep(0.3)
    stage.is_lost = True
    stage.service.signal(9)
    stage.service.wait()
    want = stage.alone.generate(prompt, max_tokens=60)["tokens"]
    assert answer.result(600)["tokens"] == want
    assert second.generate(prompt, max_tokens=60)["tokens"] == want
    assert second.counts()["shares"] is False
    stage.service.close()
    stage.service = ServiceProcess(stage.target, *SERVE)
    _until_sharing(first, second)
    other = text("back", 200)
    first.generate(other)
    told: dict[str, Any] = second.generate(other)
    assert told["cached"] == [192]
    assert told["tokens"] == stage.alone.generate(other)["tokens"]
    stage.check_idle()


def _until_sharing(*engines: VllmProcess) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for at, engine in enumerate(engines):
        while not engine.counts()["shares"]:
            assert time.monotonic() < deadline, "nobody shares again"
            engine.generate(text(("poke", at), 4), max_tokens=1)
            time.sleep(0.2)
