"""The runner: starts service and engines, plays everything, and takes everything down again.

```
0  first tokens      one request at a time: cold, another engine's, its own
1  one at a time  ┐
2  side by side   │  the scenario of `prefixcache demo`, its dispatcher and its chats, on engines
3  all together   │  of vLLM's
4  the crash      ┘  kill -9 of a whole engine in mid-prefill, while another waits for its prefix
5  the outage        kill -9 of the service while an engine answers; and another service
6  vLLM alone        the same prompts again; every answer must be the same, token for token
```
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.client import Client
from prefixcache.config import parse_layout
from prefixcache.errors import CacheError
from prefixcache.pool import PoolFile
from prefixcache.run_folder import RunFolder
from prefixcache.types import Ledger, Snapshot
from prefixcache_vllm.demo import ladder, outage
from prefixcache_vllm.demo.outage import Outage
from prefixcache_vllm.demo.servers import (
    Model,
    Server,
    Service,
    members,
    spoken_of,
    target_in,
    told_commands,
)
from prefixcache_worker.child import ProcessFailed, beside, stopping
from prefixcache_worker.demo.chats import Assistant, Chat, Workload
from prefixcache_worker.demo.compare import TIE, Verdict
from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.record import Request, Run
from prefixcache_worker.demo.scenario import Scenario, without_cache
from prefixcache_worker.demo.transcript import ChatTokenizer, Transcript
from prefixcache_worker.demo.view import View, heading
from prefixcache_worker.demo.watch import Watch

LADDERS: Final = 7
QUICK_LADDERS: Final = 2
REST_S: Final = 60.0
PATIENCE_S: Final = 60.0
"""How long the service may take to answer: it shares the machine with all that is shown."""
WAIT_S: Final = 600.0
"""How long a request of the demo may wait for room: nothing here is in a hurry."""

TIES: Final = {"bfloat16": 0.25}
"""Logits no further apart are a tie, where it is not float32's: two steps of a bfloat16 from 16 to
32.  vLLM alone decides there one way or the other, by what else is in the batch."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is played, on what, and by whom."""

    workload: Workload
    tokenizer: ChatTokenizer
    stop: frozenset[int]
    model: Model
    engines: tuple[str, ...] = ("vllm-1", "vllm-2", "vllm-3")
    answer_tokens: int = 24
    ladders: int = LADDERS
    may_be_late: bool = False
    """Whether the model is too fast to be killed in mid-prefill for sure."""

    def transcripts(self) -> dict[str, Transcript]:
        """Begin every chat."""
        return {chat.id: self.begin(chat) for chat in self.workload.chats}

    def begin(self, chat: Chat) -> Transcript:
        """Begin a chat."""
        return Transcript(chat, self.tokenizer, self.stop)


@dataclass(frozen=True, slots=True)
class Rest:
    """What the service says when nothing runs.

    Attributes:
        when: for people.
        leases, private, flights, quarantined: what is left, but for what engines keep to spare.
        wrong: what `check` and `prefixcache doctor` find.
    """

    when: str
    leases: int
    private: int
    flights: int
    quarantined: int
    wrong: tuple[str, ...]

    @property
    def is_clean(self) -> bool:
        """Whether nothing is left, and nothing is wrong."""
        return not (self.leases or self.private or self.flights or self.quarantined or self.wrong)


@dataclass(slots=True)
class Outcome:
    """What was seen."""

    shared: Run
    unshared: Run
    verdict: Verdict
    outage_verdict: Verdict
    ladders: list[list[ladder.Rung]]
    outage: Outage
    rests: list[Rest]
    left: list[str] = field(default_factory=list)
    """Processes, shared memory and files that are still there."""


class Clock:
    """Seconds since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Begin again at 0."""
        self._began_s = time.monotonic()

    def __call__(self) -> float:
        """Read it."""
        return time.monotonic() - self._began_s


async def execute(setup: Setup, view: View) -> Outcome:
    """Play everything on engines that share, and then on vLLM alone; compare.

    Leaves no process, no shared memory and no file behind, however it ends.

    Raises:
        ProcessFailed: the service or an engine could not be started, or ended by itself.
        CrashMissed: the engine could not be killed at the right moment.
        RequestFailed: an engine refused a request.
    """
    folder = RunFolder("prefixcache-vllm-")
    play = _Play(setup, view, folder.path)
    try:
        outcome = await play.execute()
    finally:
        folder.close()
        PoolFile.sweep()  # the service was killed
    outcome.left = play.left()
    return outcome


class _Play:
    """One run of the demo."""

    def __init__(self, setup: Setup, view: View, folder: Path) -> None:
        self.setup, self.view, self.folder = setup, view, folder
        self.clock = Clock()
        self.run = Run(shared=True, workers=list(setup.engines))
        self.outage = Outage()
        self.ladders: list[list[ladder.Rung]] = []
        self.rests: list[Rest] = []
        self._started: list[Server | Service] = []

    def left(self) -> list[str]:
        """Give what is still there of all that was started."""
        found = [f"process {pid}" for one in self._started for pid in members(one.pid)]
        paths = {self.folder}.union(*(one.traces for one in self._started))
        return found + sorted(str(path) for path in paths if path.exists())

    async def execute(self) -> Outcome:
        setup, view = self.setup, self.view
        async with spoken_of("asking prefixcache vllm which pool the model needs", view.say):
            self.command = await told_commands(setup.model, self.folder)
        view.say(" ".join(self.command))
        service = self._service("service")
        dispatcher = self._dispatcher(setup.answer_tokens)
        engines = self._engines(setup.engines, dispatcher)
        async with stopping([*engines, service]):
            await service.ready()
            await self._all_ready(engines, dispatcher)
            with prefixcache.connect(service.target, timeout_s=PATIENCE_S) as client:
                await self._share(client, engines, dispatcher)
            await self._outage(service, [one for one in engines if one.alive])
        verdicts = await self._alone()
        return Outcome(
            self.run,
            self.unshared,
            *verdicts,
            ladders=self.ladders,
            outage=self.outage,
            rests=self.rests,
        )

    # ------------------------------------------------------------------------------ phases 0 to 4

    async def _share(
        self, client: Client, engines: Sequence[Server], dispatcher: Dispatcher
    ) -> None:
        setup, view, run = self.setup, self.view, self.run

        def tell(snapshot: Snapshot) -> None:
            view.pool(snapshot)
            for engine in engines:
                engine.seen(snapshot, self.clock())

        watch = Watch(client, self.clock, tell)
        async with beside(watch.run(), *(engine.guard() for engine in engines)):
            snapshot = await watch.look()
            layout = parse_layout(self.command[self.command.index("--layout") + 1])
            run.block_size, run.num_blocks = snapshot.block_size, snapshot.num_blocks
            run.block_bytes = layout.block_bytes(snapshot.block_size)
            self.clock.restart()
            await self._ladders(dispatcher)
            transcripts = setup.transcripts()
            scenario = Scenario(setup.workload, transcripts, dispatcher, watch, view, run)
            victim = engines[-1]
            await scenario.execute(
                victim,
                victim_name=victim.name,
                worker_id=victim.lease_name,
                chunk=setup.model.chunk,
            )
            run.seconds = self.clock()
            rest = await self._rest(client, "after the crash", spare_of=len(engines) - 1)
            self.rests.append(rest)
            run.blocks_used = (await watch.look()).indexed
            run.blocks_leaked = rest.private + rest.quarantined

    async def _ladders(self, dispatcher: Dispatcher) -> None:
        setup, view = self.setup, self.view
        view.phase(
            0,
            "First tokens",
            "One request at a time: a system prompt that nobody has computed, the same on the "
            "other engines, and once more on the first.",
        )
        view.say(heading())
        longest = sorted(
            setup.workload.assistants.values(), key=lambda one: len(one.system), reverse=True
        )
        for number in range(setup.ladders):
            base = longest[number % min(2, len(longest))]
            system = f"This is session {number + 1} of the day.\n{base.system}"
            assistant = Assistant(base.name, base.title, system)
            engines = setup.engines[number % len(setup.engines) :] + setup.engines
            rungs = await ladder.climb(
                engines[: len(setup.engines)],
                [self._prompt(assistant, question) for question in ladder.QUESTIONS],
                lambda i, prompt, number=number, assistant=assistant: self._request(  # type: ignore[misc]
                    f"session-{number + 1}/{i + 1}", assistant, prompt
                ),
                lambda request, engine: self._ask(dispatcher, request, engine),
            )
            self.ladders.append(rungs)

    def _prompt(self, assistant: Assistant, question: str) -> list[int]:
        return self.setup.begin(Chat("", assistant, (question,))).ask(0)

    def _request(self, name: str, assistant: Assistant, prompt: Sequence[int]) -> Request:
        system = self.setup.begin(Chat("", assistant, ("",))).num_system_tokens()
        chat = name.partition("/")[0]
        return Request(name, chat, 0, assistant.name, tuple(prompt), system)

    async def _ask(self, dispatcher: Dispatcher, request: Request, engine: str) -> Request:
        if dispatcher.answer_tokens == self.setup.answer_tokens:
            self.run.requests.append(request)
        await dispatcher.ask(request, engine)
        request.text = self._text(request)
        self.view.finished(request)
        return request

    def _text(self, request: Request) -> str:
        return self.setup.tokenizer.decode(request.answer, skip_special_tokens=True)

    # ------------------------------------------------------------------------------------ phase 5

    async def _outage(self, service: Service, engines: Sequence[Server]) -> None:
        view, seen = self.view, self.outage
        view.phase(
            5,
            "The outage",
            "The service is killed with SIGKILL while an engine answers; another engine gets a new "
            "request then.",
        )
        dispatcher = self._dispatcher(outage.ANSWER_TOKENS)
        for engine in engines:
            engine.listener = dispatcher
            dispatcher.workers[engine.name] = engine
        one, two = engines[0].name, engines[1].name

        async def kill() -> None:
            service.kill()
            assert service.process is not None
            await service.process.wait()
            view.say(
                f"the service (pid {service.pid}) was killed when {one} had answered "
                f"{seen.answered_before} of up to {outage.ANSWER_TOKENS} tokens"
            )

        async with beside(*(engine.guard() for engine in engines)):
            await outage.kill_while_answering(
                seen,
                dispatcher,
                kill,
                (self._short("outage/1", "Tell me about the sea and the moon."), one),
                (self._short("outage/2", "What is a good name for a boat?"), two),
            )
            for request in (seen.running, seen.meanwhile):
                if request is not None:
                    request.text = self._text(request)
                    view.finished(request)
            service = self._service("service-2")
            async with stopping([service]):
                await service.ready()
                view.say("another service answers at the same address; its pool is empty")
                await self._again(engines, dispatcher)

    def _short(self, name: str, question: str) -> Request:
        assistant = Assistant("plain", "", "You are a helpful assistant.")
        return self._request(name, assistant, self._prompt(assistant, question))

    async def _again(self, engines: Sequence[Server], dispatcher: Dispatcher) -> None:
        """Have one engine read what another computed in the new pool; end them all."""
        seen = self.outage
        with prefixcache.connect(target_in(self.folder), timeout_s=PATIENCE_S) as client:
            await self._joined(client, len(engines))
            self.view.say("the engines have joined it by themselves")
            assistant = max(
                self.setup.workload.assistants.values(), key=lambda one: len(one.system)
            )
            for number, engine in enumerate(engines[:2]):
                prompt = self._prompt(assistant, ladder.QUESTIONS[number])
                request = self._request(f"outage/{number + 3}", assistant, prompt)
                seen.again.append(await self._ask(dispatcher, request, engine.name))
            when = "when engines have joined another service"
            self.rests.append(await self._rest(client, when, spare_of=len(engines)))
            for engine in engines:
                await engine.stop()
            self.rests.append(await self._rest(client, "when all engines have ended", spare_of=0))

    async def _joined(self, client: Client, num_engines: int) -> None:
        """Wait until so many engines have their spare blocks of a service."""
        deadline_s = time.monotonic() + REST_S
        while (await asyncio.to_thread(client.snapshot)).num_leases < num_engines:
            if time.monotonic() > deadline_s:
                raise ProcessFailed("the engines do not join the service that has come")
            await asyncio.sleep(0.1)

    # ------------------------------------------------------------------------------------ phase 6

    async def _alone(self) -> tuple[Verdict, Verdict]:
        setup, view = self.setup, self.view
        view.phase(
            6,
            "vLLM alone",
            "A plain `vllm serve`, without us and without any cache, gets the same prompts; every "
            "answer is compared.",
        )
        tie = TIES.get(setup.model.dtype, TIE)
        self.unshared = Run(shared=False, workers=["alone"])
        dispatcher = self._dispatcher(setup.answer_tokens, log_logits=True)
        longer = self._dispatcher(outage.ANSWER_TOKENS, log_logits=True)
        (alone,) = self._servers({"alone": setup.model.alone()}, dispatcher)
        async with stopping([alone]):
            await self._all_ready([alone], dispatcher)
            longer.workers["alone"] = alone
            async with beside(alone.guard()):
                self.clock.restart()
                first = await without_cache(
                    self.run.requests, dispatcher, self.unshared, view.compared, tie=tie
                )
                self.unshared.seconds = self.clock()
                alone.listener = longer
                other = Run(shared=False, workers=["alone"])
                second = await without_cache(
                    self.outage.requests, longer, other, view.compared, tie=tie
                )
        return first, second

    # ------------------------------------------------------------------------------------ helpers

    def _dispatcher(self, answer_tokens: int, *, log_logits: bool = False) -> Dispatcher:
        return Dispatcher(
            {},
            self.clock,
            answer_tokens,
            log_logits=log_logits,
            wait_s=WAIT_S,
            on_sent=self.view.sent,
        )

    def _service(self, name: str) -> Service:
        service = Service(name, self.folder, self.command)
        self._started.append(service)
        return service

    def _engines(self, names: Sequence[str], dispatcher: Dispatcher) -> list[Server]:
        command = self.setup.model.on_pool(target_in(self.folder))
        return self._servers(dict.fromkeys(names, command), dispatcher)

    def _servers(self, commands: dict[str, list[str]], dispatcher: Dispatcher) -> list[Server]:
        def tell(server: Server, event: dict[str, Any], now: float) -> None:
            server.listener.hear(server.name, event, now)

        made = []
        for name, command in commands.items():
            ledger = _no_ledger if name == "alone" else self._ledger
            server = Server(name, command, self.folder, clock=self.clock, tell=tell, ledger=ledger)
            server.listener = dispatcher
            made.append(server)
        self._started += made
        return made

    def _ledger(self, request_id: str) -> Ledger | None:
        """Ask the service what became of a request's tokens; None if it does not know."""
        try:
            with prefixcache.connect(target_in(self.folder), timeout_s=5) as client:
                return client.recount(request_id).ledger
        except CacheError:
            return None

    async def _all_ready(self, servers: Sequence[Server], dispatcher: Dispatcher) -> None:
        names = ", ".join(server.name for server in servers)
        self.view.say(f"{names}: starting; vLLM takes half a minute to minutes, one thread each")
        async with asyncio.TaskGroup() as group:
            for server in servers:
                group.create_task(server.ready(self.view.say))
        for server in servers:
            dispatcher.workers[server.name] = server

    async def _rest(self, client: Client, when: str, *, spare_of: int) -> Rest:
        """Wait until nothing runs, and have the service looked over."""
        spare = spare_of * self.setup.model.spare_blocks
        target = target_in(self.folder)
        deadline_s = time.monotonic() + REST_S
        while True:
            seen = await asyncio.to_thread(client.snapshot)
            # A lease for spare blocks is private, and counts as one that computes a prompt.
            left = (
                seen.num_leases - spare_of,
                seen.private - spare,
                seen.num_flights - spare_of,
                seen.quarantined,
            )
            # A process that has just ended may not have been found dead yet.
            wrong = [] if any(left) else await _look_over(client, target)
            if not any((*left, wrong)) or time.monotonic() > deadline_s:
                break
            await asyncio.sleep(0.1)
        rest = Rest(when, *left, tuple(wrong))
        self.view.say(told_rest(rest))
        return rest


def told_rest(rest: Rest) -> str:
    """Say what is left, in a line.

    >>> told_rest(Rest("at the end", 0, 0, 0, 0, ()))
    'at the end: 0 leases, 0 flights, 0 blocks in quarantine; check and doctor find nothing wrong'
    """
    found = "; ".join(rest.wrong) or "check and doctor find nothing wrong"
    private = f", {rest.private:,} private blocks" if rest.private else ""
    return (
        f"{rest.when}: {rest.leases:,} leases, {rest.flights:,} flights, {rest.quarantined:,} "
        f"blocks in quarantine{private}; {found}"
    )


def _no_ledger(request_id: str) -> Ledger | None:
    del request_id
    return None


async def _look_over(client: Client, target: str) -> list[str]:
    """Have the service check its invariants, and the doctor look; give what is wrong."""
    checked = await asyncio.to_thread(client.check)
    wrong = [f"check: {checked.failure}"] if checked.failure else []
    return wrong + await _doctor(target)


async def _doctor(target: str) -> list[str]:
    """Run `prefixcache doctor`; give what it finds wrong."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "prefixcache.cli", "doctor", "--deep", "--json"),
        *("--connect", target),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    try:
        findings = json.loads(out)["findings"]
    except (ValueError, KeyError):
        return [f"doctor says {err.decode(errors='replace').strip()[-500:]}"]
    return [f"doctor: {one['text']}" for one in findings if one["level"] == "wrong"]
