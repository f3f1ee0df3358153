"""Answers over HTTP whose worker processes are killed, stopped or hang, at every token."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from patience import PATIENCE_S
from prefixcache_serving.fleet import Fleet
from prefixcache_serving.front import Front
from prefixcache_serving.front_server import FrontServer, read_address
from prefixcache_serving.keys import Keys
from prefixcache_serving.meter import Meter
from prefixcache_serving.notices import Notice
from prefixcache_serving.router import Router
from prefixcache_serving.served_model import ServedModel
from serving.bench import Bench, events
from serving.nursery import SPIN, Fate, ForkedWorker, Nursery
from serving.talking import TEMPLATES
from worker.zoo import Service, random_tokens, save_talker

pytest.importorskip("llguidance", reason="the serving extra's llguidance is missing")
pytestmark = pytest.mark.slow

BLOCK = 16
COUNT = 12
NAMES = {"type": "array", "items": {"type": "string", "maxLength": 4}, "minItems": 9}
FORM = {"type": "json_schema", "json_schema": {"name": "names", "schema": NAMES}}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"temperature": 1.0, "top_p": 0.9, "seed": 11},
    "two samples": {"temperature": 1.2, "seed": 3, "n": 2},
    "JSON": {"temperature": 0, "response_format": FORM},
    "JSON that is drawn": {"temperature": 1.1, "seed": 7, "n": 2, "response_format": FORM},
}
"""What a request has besides; one that is held to JSON is a chat."""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_talker(folder, TEMPLATES["plain"])
    return folder


@pytest.fixture(scope="module")
def place(model: Path) -> Iterator[tuple[Nursery, str]]:
    """Where workers come from, and the service's address."""
    roots = (".", "kernels", "worker", "tests")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        str(Path(__file__).parents[2] / root) for root in roots
    )
    with tempfile.TemporaryDirectory(prefix="pfx") as folder:
        service = Service(Path(folder), "8MiB", "--block-size", str(BLOCK))
        service.start()
        nursery = Nursery(model, Path(folder))
        yield nursery, service.target
        nursery.stop()
        service.stop()


class Lane(Bench):
    """A front over real workers, of which the first ones meet their fates, and the others none."""

    def __init__(self, place: tuple[Nursery, str], folder: Path, fates: list[Fate]) -> None:
        self._place, self._folder, self._fates = place, folder, fates
        self.said: list[str] = []
        self.made: list[ForkedWorker] = []

    def _make(self, name: str, tell: Callable[[dict[str, Any]], None]) -> Any:
        fate = self._fates.pop(0) if self._fates else None
        self.made.append(ForkedWorker(self._place[0], name, tell, self._place[1], fate))
        return self.made[-1]

    @contextlib.asynccontextmanager
    async def serving(self, num_workers: int) -> AsyncIterator[None]:
        self.meter, self.keys = Meter(), Keys(None)
        self.router = Router(self.meter, longest_queue=32)
        self.said = []
        names = [f"w{number}" for number in range(1, num_workers + 1)]
        self.fleet = Fleet(names, self._make, self.router, self.meter, self._say)
        running = asyncio.create_task(self.fleet.run())
        while self.fleet.num_ready < num_workers:
            assert not running.done(), running
            await asyncio.sleep(0.005)
        told = ServedModel("tiny", self._folder, self.fleet.about.result())
        server = FrontServer(read_address("127.0.0.1:0", has_keys=False), has_keys=False)
        server.bind()
        self.address = server.address
        front = Front(told, self.router, self.keys, self.meter)
        await server.start(front.app(), front.board.close)
        try:
            yield
        finally:
            await server.close()
            await self.fleet.stop()
            running.cancel()
            await asyncio.gather(running, return_exceptions=True)

    def _say(self, notice: Notice) -> None:
        self.said.append(notice.message)

    async def answer(self, prompt: list[int], kind: str, count: int) -> list[str]:
        """Let a stream be answered; give each choice's text."""
        asked: dict[str, Any] = {"model": "tiny", "max_tokens": count, "stream": True}
        asked |= {"ignore_eos": "response_format" not in KINDS[kind]}
        path = "/v1/completions"
        if "response_format" in KINDS[kind]:
            path = "/v1/chat/completions"
            asked["messages"] = [{"role": "user", "content": " ".join(map(str, prompt))}]
        else:
            asked["prompt"] = prompt
        raw = json.dumps(asked | KINDS[kind]).encode()
        told = {"content-type": "application/json"}
        status, _, data = await self.exchange("POST", path, raw, told)
        assert status == 200, data
        *chunks, done = events(data)
        assert done == "[DONE]"
        texts: dict[int, str] = {}
        for chunk in chunks:
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text = choice["text"] if "text" in choice else choice["delta"].get("content", "")
                texts[choice["index"]] = texts.get(choice["index"], "") + text
        return [texts[index] for index in sorted(texts)]

    def computed_again(self) -> list[tuple[int, int]]:
        """Give, for each time an answer was begun again: what was computed, and what may be.

        That is less than a block and a step.  A step is one token; before the first one, it is the
        prompt's chunk.
        """
        lines = {line["id"]: line for one in self.made for line in one.lines}
        begun = [e for one in self.made for e in one.events if e["event"] == "started"]
        again = [(one["num_to_compute"], lines[one["id"]]) for one in begun]
        return [
            (computed, BLOCK + 1 if line.get("generated") else len(line["tokens"]))
            for computed, line in again
            if not line["id"].endswith(".0")
        ]

    def metric(self, name: str) -> float:
        lines = self.meter.exposition().decode().splitlines()
        (found,) = (one for one in lines if one.startswith(f"prefixcache_front_{name} "))
        return float(found.split()[1])

    async def until(self, seen: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not seen():
                await asyncio.sleep(0.005)


Meanwhile = Callable[[Lane], Coroutine[Any, Any, None]]


def answered(
    place: tuple[Nursery, str],
    folder: Path,
    prompts: list[list[int]],
    kind: str,
    fates: Sequence[Fate] = (),
    *,
    count: int = COUNT,
    meanwhile: Meanwhile | None = None,
) -> tuple[list[list[str]], Lane]:
    """Let prompts be answered at the same time by two workers; the first ones meet their fates."""
    lane = Lane(place, folder, list(fates))

    async def ask() -> list[list[str]]:
        async with lane.serving(2), asyncio.timeout(PATIENCE_S), asyncio.TaskGroup() as group:
            told = [group.create_task(lane.answer(one, kind, count)) for one in prompts]
            if meanwhile is not None:
                await meanwhile(lane)
            return await asyncio.gather(*told)

    return asyncio.run(ask()), lane


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *(("greedy", "told"), ("seeded", "computed"), ("seeded", "settled")),
        *(("two samples", "told"), ("JSON", "told"), ("JSON that is drawn", "told")),
    ],
)
def test_a_process_that_is_killed_at_any_token_costs_no_token(
    place: tuple[Nursery, str], model: Path, kind: str, where: str
) -> None:
    """Whichever of the two has the answer; n answers are each as they would be alone."""
    fresh = [random_tokens(2 * BLOCK + 5, seed=1000 * len(kind) + at) for at in range(COUNT)]
    got = []
    for at, prompt in enumerate(fresh, 1):
        # Of two, whichever has it dies there, and the other one after as many tokens of its own.
        fate = Fate(at, where, signal.SIGKILL)
        (texts,), lane = answered(place, model, [prompt], kind, [fate, fate])
        got.append(texts)
        assert sum(worker.gone.is_set() for worker in lane.made) > 2, "nobody died"
        assert all(again <= most for again, most in lane.computed_again()), at
    whole, _ = answered(place, model, fresh, kind)
    assert got == whole
    assert len(got[0]) == KINDS[kind].get("n", 1)


@pytest.mark.parametrize("at", [1, 6, COUNT])
@pytest.mark.parametrize("where", ["computed", "told"])
def test_what_a_stopped_process_says_when_it_wakes_up_is_dropped(
    place: tuple[Nursery, str], model: Path, where: str, at: int
) -> None:
    prompts = [random_tokens(2 * BLOCK + 5, seed=70 * at + number) for number in range(2)]

    async def wake(lane: Lane) -> None:
        await lane.until(lambda: any("is stopped" in line for line in lane.said))
        await lane.until(lambda: not lane.router.num_running)
        lane.made[0].signal(signal.SIGCONT)
        await lane.until(lambda: any("is back" in line for line in lane.said))
        await lane.until(lambda: any(e["event"] == "finished" for e in lane.made[0].events))

    fates = [Fate(at, where, signal.SIGSTOP)]
    got, lane = answered(place, model, prompts, "seeded", fates, meanwhile=wake)
    assert lane.metric("moved_total") == 1
    assert lane.metric("late_tokens_total") >= (where == "computed")
    assert got == answered(place, model, prompts, "seeded")[0]


def test_a_process_that_makes_no_step_loses_its_answer_although_it_reads_and_lives(
    place: tuple[Nursery, str], model: Path
) -> None:
    prompts = [random_tokens(2 * BLOCK + 5, seed=number) for number in range(2)]
    fates = [Fate(30, "computed", SPIN)]
    got, lane = answered(place, model, prompts, "seeded", fates, count=60)
    assert any("makes no step" in line for line in lane.said)
    assert lane.metric("moved_total") == 1
    assert all(again <= most for again, most in lane.computed_again())
    assert got == answered(place, model, prompts, "seeded", count=60)[0]


@pytest.mark.parametrize("at", [0, 1, 5, COUNT - 1])
def test_a_process_that_is_drained_hands_its_answers_over_at_once(
    place: tuple[Nursery, str], model: Path, at: int
) -> None:
    prompts = [random_tokens(2 * BLOCK + 5, seed=500 + 10 * at + number) for number in range(2)]

    async def renew(lane: Lane) -> None:
        await lane.until(lambda: lane.router.num_generated >= 2 * at)
        for name in lane.fleet.names:
            await lane.fleet.renew(name)

    got, lane = answered(place, model, prompts, "seeded", meanwhile=renew)
    assert len(lane.made) == 4
    assert got == answered(place, model, prompts, "seeded")[0]
