"""The last act: a pool that is too small for its prompts, a disk below it, another machine.

```
asked in turn     cold: each prompt pushes an older one out of the pool, onto the disk
asked again       evicted, and back from the disk
stop, start       the service puts what is cached on the disk; another one begins on the same folder
asked again       all of it is found there, by an empty pool
another machine   a second service with a pool of its own: what the first has computed comes from a
                  Valkey server that both reach
```
Every answer is compared with that of a model without a cache.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import prefixcache
from prefixcache.texts import many
from prefixcache_worker.child import ProcessFailed, beside, stopping
from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import ChildWorker
from prefixcache_worker.demo.compare import Difference, first_difference
from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.record import Request, Run, prompt_tokens
from prefixcache_worker.demo.valkey import ChildValkey
from prefixcache_worker.demo.view import View

POOL_SHARE: Final = 0.5
"""Of all prompts together, what the pool has room for."""
ROOM: Final = 2.25
"""How many times the longest of them it has room for at least: as much as one of them takes is kept
free, half of the pool at most."""
PORTER: Final = (b"porter at work",)
CARRIER: Final = (b"carrier at work",)
"""What a service logs when they are there."""
AT_WORK_S: Final = 60.0
REJOIN_S: Final = 60.0
"""How long a worker may take to find the new service."""


@dataclass(frozen=True, slots=True)
class Pass:
    """All prompts, asked once, one after the other."""

    name: str
    num_prompt: int
    num_pool: int
    """Tokens that were read in the pool."""
    num_restored: int
    """Tokens that came back from below it."""
    ttft_ms: float
    """To the first token, median."""

    @property
    def num_computed(self) -> int:
        """Tokens that were computed."""
        return self.num_prompt - self.num_pool - self.num_restored

    def told(self) -> str:
        """Say it in a line."""
        return (
            f"{self.name}: of {self.num_prompt:,} tokens {self.num_pool:,} were in the pool, "
            f"{self.num_restored:,} came back from below it, {self.num_computed:,} were computed; "
            f"first token after {self.ttft_ms:,.0f} ms (median)"
        )


@dataclass(slots=True)
class Below:
    """What became of the prompts."""

    num_blocks: int
    """Of the pool."""
    passes: list[Pass] = field(default_factory=list)
    num_compared: int = 0
    differences: list[Difference] = field(default_factory=list)
    restart_ms: float = 0.0
    """From the order to stop until the worker had joined the new service."""

    @property
    def kept(self) -> bool:
        """Whether evicted tokens came back, also after the restart, and every answer was right.

        A store that other machines have may be late, and then is not waited for: that is no fault.
        """
        came_back = all(one.num_restored for one in self.passes[1:3])
        return came_back and all(difference.tie for difference in self.differences)

    def told(self) -> list[str]:
        """Say it in lines."""
        wrong = sum(not difference.tie for difference in self.differences)
        verdict = (
            f"NOT the answers of a model without a cache: {wrong} of {self.num_compared}"
            if wrong
            else f"all {self.num_compared} answers are those of the model without any cache"
        )
        return [*(one.told() for one in self.passes), verdict]


def chosen(run: Run) -> list[Request]:
    """Choose the first request of each assistant: as many prefixes that have nothing in common."""
    first: dict[str, Request] = {}
    for request in run.requests:
        first.setdefault(request.assistant, request)
    return list(first.values())


def sizes(requests: Sequence[Request], run: Run, answer_tokens: int) -> tuple[int, int]:
    """Give the bytes of the pool and of the disk.

    Args:
        requests: what will be asked.
        run: with the size of a block.
        answer_tokens: how long an answer may become.
    """
    lengths = [len(request.prompt) + answer_tokens for request in requests]
    tokens = max(POOL_SHARE * sum(lengths), ROOM * max(lengths))
    num_blocks = -int(-tokens // run.block_size)
    return num_blocks * run.block_bytes, 4 * sum(lengths) // run.block_size * run.block_bytes


class Machine(Protocol):
    """What a machine runs."""

    def service(self, remote: str) -> ChildService:
        """Give its service, anew for each start; what is there remotely, if anything, is named."""

    def worker(self) -> ChildWorker:
        """Give a worker of it, which tells the dispatcher."""


class Keeper:
    """Plays the act.

    Args:
        machine: the one whose service has a small pool and a disk.
        other: another one, with nothing but the store.
        store: that both reach; None: there is none, and so no other machine.
        dispatcher: hears it; told to log logits.
        requests: what is asked.
        expected: their answers without a cache, by id.
        bits: compare the two best logits of each step bit for bit.
        view: shows it.
    """

    def __init__(
        self,
        machine: Machine,
        other: Machine,
        store: ChildValkey | None,
        dispatcher: Dispatcher,
        requests: Sequence[Request],
        expected: dict[str, Request],
        view: View,
        *,
        bits: bool,
    ) -> None:
        self._machine, self._other, self._store = machine, other, store
        self._dispatcher = dispatcher
        self._requests, self._expected = requests, expected
        self._bits, self._view = bits, view
        self._joined = asyncio.Event()

    async def play(self) -> Below:
        """Ask, ask again, stop, start again, ask again, ask elsewhere.

        Raises:
            ProcessFailed: a process did not start, ended by itself, or did not find the service.
            RequestFailed: the worker refused a request.
        """
        first, worker = self._machine.service(""), self._machine.worker()
        self._dispatcher.overhear = self._hear
        async with stopping([worker, first, *([self._store] if self._store else [])]):
            await _begin(first)
            await worker.ready()
            self._dispatcher.workers[worker.name] = worker
            async with beside(worker.guard()):
                below = Below(await asyncio.to_thread(_num_blocks, first.target))
                await self._ask_all(below, "first")
                await self._ask_all(below, "again")
                self._joined.clear()
                began_s = time.monotonic()
                await first.stop()
                remote = ""
                if self._store is not None:
                    await self._store.ready()
                    remote = self._store.address
                second = self._machine.service(remote)
                async with stopping([second]):
                    await _begin(second, *CARRIER[: bool(remote)])
                    await self._rejoined()
                    below.restart_ms = round(1e3 * (time.monotonic() - began_s), 1)
                    self._view.say(
                        f"the service (pid {first.pid}) was stopped; another one has its folder, "
                        f"and the worker, after {below.restart_ms:,.0f} ms"
                    )
                    await self._ask_all(below, "after the restart")
                    if remote:
                        await self._elsewhere(below, remote)
        return below

    async def _elsewhere(self, below: Below, remote: str) -> None:
        service, worker = self._other.service(remote), self._other.worker()
        async with stopping([worker, service]):
            await _begin(service, *CARRIER)
            await worker.ready()
            self._dispatcher.workers = {worker.name: worker}
            async with beside(worker.guard()):
                await self._ask_all(below, "on another machine")

    async def _ask_all(self, below: Below, name: str) -> None:
        asked: list[Request] = []
        self._view.say(f"{name}: {many(len(self._requests), 'prompt')}, one after the other")
        for request in self._requests:
            again = Request(
                request.id, request.chat, 0, request.assistant, request.prompt, request.num_system
            )
            asked.append(await self._dispatcher.ask(again))
            difference = first_difference(
                again.id,
                again.answer,
                self._expected[again.id].answer,
                self._expected[again.id].logits,
                bits=again.logits if self._bits else None,
            )
            below.num_compared += 1
            below.differences += [difference] if difference else []
        restored = sum(one.ledger.restored for one in asked)
        below.passes.append(
            Pass(
                name,
                prompt_tokens(asked),
                sum(one.ledger.reused for one in asked) - restored,
                restored,
                round(statistics.median(one.ttft_ms for one in asked), 1),
            )
        )
        self._view.say(below.passes[-1].told())

    def _hear(self, worker: str, event: Mapping[str, Any], now: float) -> None:
        if event["event"] == "joined":
            self._joined.set()

    async def _rejoined(self) -> None:
        """Wait until the worker has found the service again."""
        try:
            await asyncio.wait_for(self._joined.wait(), REJOIN_S)
        except TimeoutError:
            raise ProcessFailed(
                f"the worker did not find the new service in {REJOIN_S:.0f} s"
            ) from None


async def _begin(service: ChildService, *more: bytes) -> None:
    """Start a service, and wait until who moves blocks is there, too."""
    await service.ready()
    deadline = time.monotonic() + AT_WORK_S
    awaited = (*PORTER, *more)
    while not all(one in service.errors.read_bytes() for one in awaited):
        if time.monotonic() > deadline:
            raise ProcessFailed(f"nobody moves blocks after {AT_WORK_S:.0f} s")
        await asyncio.sleep(0.02)


def _num_blocks(target: str) -> int:
    with prefixcache.connect(target) as client:
        return client.snapshot().num_blocks


def explained(num_blocks: int) -> str:
    """Say what the act is about."""
    return (
        f"A service with a pool of {many(num_blocks, 'block')}, too small for its prompts, and "
        "a disk below it: what was evicted comes back. Then the service is stopped, and started "
        "again on the same folder. Then another machine asks for the first time."
    )
