"""vLLM itself, unmodified, several engines on one pool: what they say is what vLLM says alone.

A tiny model with random weights in float32, one process an engine.  Runs where an environment with
vLLM is named: `PREFIXCACHE_VLLM_PYTHON=.venv-vllm/bin/python`.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import prefixcache
from engines.vllm_process import VllmProcess, needs_vllm, write_model
from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.types import Snapshot
from service.service_process import ServiceProcess

pytestmark = needs_vllm

SIZE, SPARE = 32, 16
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
    """A service, an engine without it, and some of each mode that share its pool."""

    def __init__(
        self, folder: Path, modes: tuple[str, ...], *, alone: str = "alone", each: int = 2
    ) -> None:
        self.target = f"unix:{folder}/s"
        self.is_lost = False
        """Whether there is no service just now."""
        self.service = ServiceProcess(self.target, *SERVE)
        self.alone = VllmProcess(folder / "model", alone)
        self.engines = {
            f"{mode} {number}": VllmProcess(folder / "model", mode, self.target)
            for mode in modes
            for number in range(1, each + 1)
        }

    def wait(self) -> None:
        """Wait until all of them are there: that takes most of the time."""
        for engine in (self.alone, *self.engines.values()):
            assert engine.ready.result(600) == {"ready": True}

    def pair(self, mode: str) -> tuple[VllmProcess, VllmProcess]:
        return self.engines[f"{mode} 1"], self.engines[f"{mode} 2"]

    def client(self) -> Client:
        return prefixcache.connect(self.target)

    def told(self) -> Snapshot:
        with self.client() as client:
            return client.snapshot()

    def until(self, true: Callable[[Snapshot], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true(told := self.told()):
            assert time.monotonic() < deadline, told
            time.sleep(0.01)

    def check_idle(self) -> None:
        """Nobody holds anything but what is kept for bad times, and every invariant holds."""
        in_place = [one for name, one in self.engines.items() if name.startswith("in-place")]
        spare = 0 if self.is_lost else sum(one.process.poll() is None for one in in_place)
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
                kept = {
                    "leases": spare,
                    "private": SPARE * spare,
                    "quarantined": 0,
                    "waiting": 0,
                }
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
    assert answer["cached"] == [300]
    stage.check_idle()


@pytest.mark.parametrize("mode", MODES)
def test_of_a_prompt_that_was_computed_only_the_last_token_is_computed_again(
    stage: Stage, mode: str
) -> None:
    """By connector, too: vLLM's own cache would leave a whole block."""
    pair = stage.pair(mode)
    prompt = text((mode, "again"), 8 * SIZE)
    want = stage.alone.generate(prompt)["tokens"]
    assert pair[0].generate(prompt) == {"tokens": want, "cached": [0]}
    for engine in (pair[1], pair[1], pair[0]):  # another's; its own, of which vLLM has 7 blocks
        assert engine.generate(prompt) == {"tokens": want, "cached": [8 * SIZE - 1]}
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


def test_a_stopped_engine_drops_what_it_read_and_computes_it_again(stage: Stage) -> None:
    """Meanwhile its leases end, and another engine uses the blocks that it shared."""
    first, second = stage.pair("in-place")
    prompt = text("stopped", 300)
    answer = second.generate_later(prompt, max_tokens=600)
    stage.until(lambda told: told.num_leases == 3)
    second.signal(signal.SIGSTOP)
    try:
        stage.until(lambda told: told.num_leases == 1 and told.quarantined > SPARE)
        for at in range(4):
            first.generate(text(("meanwhile", at), 900), max_tokens=2)
    finally:
        second.signal(signal.SIGCONT)
    want = stage.alone.generate(prompt, max_tokens=600)
    assert answer.result(600)["tokens"] == want["tokens"]
    assert second.counts()["lost"] >= 1
    stage.check_idle()


def test_who_waits_for_an_engine_that_is_killed_takes_over(stage: Stage) -> None:
    first, second = stage.pair("in-place")
    prompts = [text(("killed", at), 600) for at in range(3)]
    before = stage.told().num_leases
    second.generate_later(*prompts, max_tokens=100)
    stage.until(lambda told: told.num_leases > before)
    second.signal(signal.SIGSTOP)
    answer = first.generate_later([*prompts[2], 9])
    time.sleep(1.0)
    second.signal(signal.SIGKILL)
    want = stage.alone.generate([*prompts[2], 9])
    assert answer.result(600)["tokens"] == want["tokens"]
    second.process.wait()
    stage.check_idle()


def test_an_engine_whose_session_is_lost_attaches_again_and_goes_on(stage: Stage) -> None:
    """The service lives, and lends what the engine computed under to others."""
    first, _ = stage.pair("in-place")
    prompt = text("cut", 300)
    answer = first.generate_later(prompt, max_tokens=400)
    stage.until(lambda told: "engine" in answering(told, len(prompt)))
    first.signal(signal.SIGUSR1)
    want = stage.alone.generate(prompt, max_tokens=400)
    assert answer.result(600)["tokens"] == want["tokens"]
    assert first.counts()["lost"] >= 1
    assert first.generate(prompt)["cached"] == [299]
    stage.check_idle()


def test_without_the_service_all_go_on_and_share_again_when_it_is_back(stage: Stage) -> None:
    first, second = stage.pair("connector")
    in_place, _ = stage.pair("in-place")
    prompt, short = text("lost", 300), text("short", 40)
    answers = [one.generate_later(prompt, max_tokens=400) for one in (first, in_place)]
    stage.until(lambda told: {"connector", "engine"} <= answering(told, len(prompt)))
    stage.is_lost = True
    stage.service.signal(9)
    stage.service.wait()
    want = stage.alone.generate(prompt, max_tokens=400)["tokens"]
    got = [answer.result(600)["tokens"] for answer in answers]
    assert [len(one[0]) for one in got] == [400, 400]
    assert got == [want, want]
    assert second.generate(prompt, max_tokens=400)["tokens"] == want
    assert second.counts()["shares"] is False
    # In spare blocks, and in those that the first request left behind.
    want = stage.alone.generate(short, max_tokens=40)["tokens"]
    assert in_place.generate(short, max_tokens=40)["tokens"] == want
    running = in_place.generate_later(short, max_tokens=400)
    in_place.signal(signal.SIGSTOP)
    stage.service.close()
    stage.service = ServiceProcess(stage.target, *SERVE)
    in_place.signal(signal.SIGCONT)
    stage.is_lost = False
    _until_sharing(first, second)
    other = text("back", 200)
    first.generate(other)
    told: dict[str, Any] = second.generate(other)
    assert told["cached"] == [192]
    want = stage.alone.generate(other)["tokens"]
    assert told["tokens"] == want
    # What ran meanwhile in the dead service's memory was computed again in the new one's.
    assert running.result(600)["tokens"] == stage.alone.generate(short, max_tokens=400)["tokens"]
    _until_sharing(in_place)
    assert in_place.generate(other) == {"tokens": want, "cached": [192]}
    stage.check_idle()


def answering(told: Snapshot, num_prompt: int) -> set[str]:
    """The roles of those that have computed a prompt, and go on with it."""
    leases = [one for one in told.leases if one.num_committed >= num_prompt // SIZE * SIZE > 0]
    return {one.worker.split("-")[1] for one in leases}


def _until_sharing(*engines: VllmProcess) -> None:
    deadline = time.monotonic() + PATIENCE_S
    for at, engine in enumerate(engines):
        while not engine.counts()["shares"]:
            assert time.monotonic() < deadline, "nobody shares again"
            engine.generate(text(("poke", at), 4), max_tokens=1)
            time.sleep(0.2)
