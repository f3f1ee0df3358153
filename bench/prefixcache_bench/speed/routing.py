"""Chats that move between workers: one pool and the least loaded, beside a cache for each worker.

    python -m prefixcache_bench.speed.routing [--quick | --half] [--chats 72] [--rate 0.25]
                                              [--only NAME] [--publish]

Three worker processes of one thread with the demo's model (bfloat16).  Chats arrive at random
(`--rate` of them a second), each behind one of twelve system prompts of 800 to 3,000 tokens, and
have two to six turns with a pause between them.  All is drawn beforehand: prompts, answers (what is
generated is not read, so that all read the same), arrivals, pauses.  Every way gets the same load:

```
one pool      a service, three workers; prefixcache's router: who has least to compute
round robin   a service per worker, with a third of the memory each; one worker after the other
affinity      likewise; a chat stays where it began, which is where least was to do
cache-aware   likewise; the router remembers what it sent where: to the worker that has most of the
              prompt, if that is more than half; else, or out of balance, to who has least to do
```
The first third of the chats warms up and is not counted.  First tokens are measured from a turn's
arrival, so waiting for a busy worker is in them.  Tokens computed are those of prompts that the
worker's ledger does not call cached.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import hashlib
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.errors import NotFound
from prefixcache.types import Ledger
from prefixcache_bench.speed.endpoint import random_prompt
from prefixcache_bench.speed.signals import ending_in_order
from prefixcache_bench.speed.vllm import publish
from prefixcache_bench.speed.vllm_figures import Say, percentile
from prefixcache_serving.journey import Journey
from prefixcache_serving.meter import Meter, cached_of
from prefixcache_serving.router import Router, Station
from prefixcache_worker.child import stopping
from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import ChildWorker

DOCUMENT: Final = Path("docs/benchmarks.md")
TITLE: Final = "Chats that move between workers"
WORKERS: Final = 3
SEATS: Final = 16
GOAL: Final = 0.25
WARM_UP: Final = 1 / 3
"""Part of the chats that are not counted."""
BLOCK: Final = 16
MATCH: Final = 0.5
"""Part of a prompt that a cache-aware router must know of a worker to send it there."""
APART, TIMES = 4, 1.5
"""Requests, and times as many, by which workers may be out of balance before it does not."""


@dataclass(frozen=True, slots=True)
class Load:
    """How much there is to do."""

    prompts: int = 12
    shortest: int = 800
    longest: int = 3000
    chats: int = 72
    rate: float = 0.25
    most_turns: int = 6
    answer: int = 16
    pause_s: float = 4.0
    memory_mib: int = 1024
    """Of all workers together."""


QUICK: Final = Load(
    prompts=3, shortest=200, longest=400, chats=9, rate=1.0, most_turns=3, answer=4, pause_s=0.5,
    memory_mib=96,
)  # fmt: skip
HALF: Final = Load(
    shortest=400, longest=1500, chats=48, rate=0.5, answer=8, pause_s=2.0, memory_mib=512
)
"""All that takes time or memory half as long or large, and twice as often: workers are as busy."""


@dataclass(frozen=True, slots=True)
class Turn:
    """One question of a chat."""

    prompt: list[int]
    pause_s: float
    """Before it is asked."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat, written beforehand."""

    number: int
    at_s: float
    turns: list[Turn]


def written(load: Load, seed: int) -> list[Chat]:
    """Draw all chats.

    >>> one, two = written(QUICK, 1), written(QUICK, 1)
    >>> one == two, len(one), one[0].turns[1].prompt[:200] == one[0].turns[0].prompt[:200]
    (True, 9, True)
    """
    draw = random.Random(seed)
    systems = [
        list(random_prompt(draw, draw.randint(load.shortest, load.longest)))
        for _ in range(load.prompts)
    ]
    chats, at_s = [], 0.0
    for number in range(load.chats):
        at_s += draw.expovariate(load.rate)
        history = list(draw.choice(systems))
        turns = []
        for turn in range(draw.randint(2, load.most_turns)):
            history += random_prompt(draw, draw.randint(20, 60))
            pause_s = draw.expovariate(1 / load.pause_s) if turn else 0.0
            turns.append(Turn(list(history), pause_s))
            history += random_prompt(draw, load.answer)
        chats.append(Chat(number, at_s, turns))
    return chats


@dataclass(slots=True)
class Seen:
    """What a way made of the turns that count."""

    first_ms: list[float] = field(default_factory=list)
    computed: int = 0
    prompt: int = 0


class Pool:
    """One pool; prefixcache's own router."""

    def __init__(self, workers: Sequence[ChildWorker]) -> None:
        self._router = Router(Meter(), longest_queue=10_000)
        for worker in workers:
            self._router.join(worker, SEATS, int(worker.about["chunk"]))

    def hear(self, worker: str, event: dict[str, Any]) -> None:
        """Take an event."""
        self._router.hear(worker, event)

    async def ask(self, chat: Chat, turn: Turn, name: str, answer: int) -> tuple[float, int]:
        """Have a turn answered."""
        journey = Journey(name, line_of(turn, answer), frozenset())
        self._router.admit([journey])
        _, reason = await journey.read()
        first_s = time.monotonic()
        while not reason:
            _, reason = await journey.read()
        assert journey.ledger is not None
        return first_s, journey.ledger.total - cached_of(journey.ledger)


class Private:
    """A cache for each worker, and one of the usual ways to choose one."""

    def __init__(self, workers: Sequence[ChildWorker], way: str) -> None:
        self._stations = [Station(worker, SEATS) for worker in workers]
        self._journeys: dict[str, tuple[Station, Journey]] = {}
        self._way = way
        self._next = 0
        self._homes: dict[int, Station] = {}
        self._known: list[set[bytes]] = [set() for _ in workers]
        """Digests of the prompts' beginnings that each one was sent."""

    def hear(self, worker: str, event: dict[str, Any]) -> None:
        """Take an event."""
        found = self._journeys.get(str(event.get("id", "")))
        if found is None:
            return
        station, journey = found
        match event["event"]:
            case "started":
                journey.due = int(event["num_to_compute"])
                journey.ledger = Ledger(**event["ledger"])
            case "token":
                journey.add(event)
            case "finished":
                del station.journeys[journey.name]
                journey.finish(str(event["reason"]))
            case "failed":
                raise SystemExit(f"a worker refused a turn: {event}")

    async def ask(self, chat: Chat, turn: Turn, name: str, answer: int) -> tuple[float, int]:
        """Have a turn answered."""
        journey = Journey(name, line_of(turn, answer), frozenset())
        station = self._choose(chat, turn)
        self._journeys[journey.name] = station, journey
        station.journeys[journey.name] = journey
        station.recipient.send(journey.next_line())
        _, reason = await journey.read()
        first_s = time.monotonic()
        while not reason:
            _, reason = await journey.read()
        assert journey.ledger is not None
        return first_s, journey.ledger.total - cached_of(journey.ledger)

    def _choose(self, chat: Chat, turn: Turn) -> Station:
        idlest = min(self._stations, key=lambda one: one.load)
        if self._way == "round robin":
            self._next += 1
            return self._stations[self._next % len(self._stations)]
        if self._way == "affinity":
            return self._homes.setdefault(chat.number, idlest)
        digests = beginnings(turn.prompt)
        found = [sum(one in known for one in digests) for known in self._known]
        best = max(range(len(found)), key=lambda at: found[at])
        counts = [len(one.journeys) for one in self._stations]
        is_apart = max(counts) - min(counts) > APART and max(counts) > TIMES * min(counts)
        fits = found[best] > MATCH * len(digests)
        chosen = best if fits and not is_apart else self._stations.index(idlest)
        self._known[chosen].update(digests)
        return self._stations[chosen]


def beginnings(prompt: Sequence[int]) -> list[bytes]:
    """Name each beginning of a prompt that is whole blocks long.

    >>> beginnings(range(40))[0] == beginnings(range(16))[0], len(beginnings(range(40)))
    (True, 2)
    """
    found, last = [], b""
    for at in range(0, len(prompt) - BLOCK + 1, BLOCK):
        block = ",".join(map(str, prompt[at : at + BLOCK])).encode()
        last = hashlib.blake2b(last + block, digest_size=16).digest()
        found.append(last)
    return found


def line_of(turn: Turn, answer: int) -> dict[str, Any]:
    """Give what a worker is sent."""
    return {
        "tokens": turn.prompt,
        "max_new_tokens": answer,
        "temperature": 0.0,
        "ignore_eos": True,
        "wait_s": 30.0,
    }


async def play(way: Pool | Private, chats: Sequence[Chat], load: Load) -> Seen:
    """Let all chats happen."""
    seen = Seen()
    began_s = time.monotonic()

    async def happen(chat: Chat) -> None:
        await asyncio.sleep(max(0.0, began_s + chat.at_s - time.monotonic()))
        for number, turn in enumerate(chat.turns):
            await asyncio.sleep(turn.pause_s)
            asked_s = time.monotonic()
            name = f"c{chat.number}-{number}"
            first_s, computed = await way.ask(chat, turn, name, load.answer)
            if chat.number >= WARM_UP * len(chats):
                seen.first_ms.append(1e3 * (first_s - asked_s))
                seen.computed += computed
                seen.prompt += len(turn.prompt)

    await asyncio.gather(*map(happen, chats))
    return seen


class Arrangement:
    """Workers on their services.

    Args:
        num_services: one for all workers, or one for each.
        load: says how much memory they have together.
        folder: for sockets and errors.
        model: the model's folder.
    """

    def __init__(self, num_services: int, load: Load, folder: Path, model: str) -> None:
        self.way: Pool | Private | None = None
        options = ["--model", model, "--dtype", "bfloat16"]
        self.services = []
        for number in range(num_services):
            place = folder / f"s{number}"
            place.mkdir()
            memory = f"{load.memory_mib // num_services}MiB"
            target = f"unix:{place}/s.sock"
            self.services.append(ChildService(place, target, [*options, "--memory", memory]))
        self.workers = [
            ChildWorker(
                f"w{number}",
                folder,
                lambda event, name=f"w{number}": self._hear(name, event),  # type: ignore[misc]
                target=self.services[number % num_services].target,
                options=options,
            )
            for number in range(WORKERS)
        ]

    def _hear(self, name: str, event: dict[str, Any]) -> None:
        if self.way is not None:
            self.way.hear(name, event)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Start all of it, and end it."""
        async with stopping([*self.workers, *self.services]):
            await asyncio.gather(*(service.ready() for service in self.services))
            await asyncio.gather(*(worker.ready(600) for worker in self.workers))
            yield

    def forget(self) -> None:
        """Empty the caches."""
        for service in self.services:
            with prefixcache.connect(service.target) as client, contextlib.suppress(NotFound):
                for namespace in client.snapshot().namespaces:
                    client.reset(namespace)


WAYS: Final = ("round robin", "affinity", "cache-aware", "one pool")


async def measure(load: Load, seed: int, only: Sequence[str], say: Say) -> None:
    """Play the chats in each way, and print what was seen."""
    from prefixcache_worker import smollm2

    chats = written(load, seed)
    num_turns = sum(len(chat.turns) for chat in chats)
    say(
        f"{len(chats)} chats of {num_turns} turns, {load.rate:g} a second; {load.prompts} system "
        f"prompts of {load.shortest:,} to {load.longest:,} tokens; {WORKERS} workers, "
        f"{load.memory_mib} MiB; seed {seed}"
    )
    say(f"{'':<14}{'first token ms, p50':>20}{'p95':>8}{'p99':>8}{'computed':>12}")
    found: dict[str, Seen] = {}
    model = str(smollm2.folder())
    for num_services in (WORKERS, 1):
        ways = [one for one in WAYS if one in only and (one == "one pool") == (num_services == 1)]
        if not ways:
            continue
        with tempfile.TemporaryDirectory(prefix="pfx-") as folder:
            arrangement = Arrangement(num_services, load, Path(folder), model)
            async with arrangement.running():
                for way in ways:
                    say.progress(f"{way}: {num_turns} turns")
                    workers = arrangement.workers
                    arrangement.way = Pool(workers) if num_services == 1 else Private(workers, way)
                    seen = found[way] = await play(arrangement.way, chats, load)
                    arrangement.forget()
                    at = [percentile(seen.first_ms, one) for one in (50, 95, 99)]
                    say(
                        f"{way:<14}{at[0]:>20,.0f}{at[1]:>8,.0f}{at[2]:>8,.0f}"
                        f"{seen.computed / seen.prompt:>12.1%}"
                    )
    if "one pool" in found and len(found) > 1:
        best = min(
            percentile(seen.first_ms, 99) for way, seen in found.items() if way != "one pool"
        )
        say()
        ours = percentile(found["one pool"].first_ms, 99)
        say.goal("p99 in one pool, of the best with private caches", ours / best, GOAL)


def main(argv: list[str] | None = None) -> int:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="prefixcache_bench.speed.routing", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="nine short chats")
    parser.add_argument("--half", action="store_true", help="half as large, in a third of the time")
    parser.add_argument("--chats", type=int, help=f"default: {Load().chats}")
    parser.add_argument("--rate", type=float, help=f"new chats a second; default: {Load().rate}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    parser.add_argument("--publish", action="store_true", help=f"write into {DOCUMENT}")
    options = parser.parse_args(argv)
    load = QUICK if options.quick else HALF if options.half else Load()
    given = {name: value for name in ("chats", "rate") if (value := vars(options)[name])}
    load = replace(load, **given)
    say = Say()
    asyncio.run(measure(load, options.seed, options.only, say))
    if options.publish:
        typed = sys.argv[1:] if argv is None else argv
        words = " ".join(["python -m prefixcache_bench.speed.routing", *typed])
        publish(TITLE, say.lines, words, DOCUMENT)
    return 0


if __name__ == "__main__":
    with ending_in_order():
        raise SystemExit(main())
