"""One run of `prefixcache up`: service, front and workers, from the first to the last of them.

```
keys, address, model  ──►  service, if none answers  ──►  workers  ──►  front
        checked first         ended last                                 SIGTERM: 503, what runs
                                                                         finishes, then all end
```
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.client.address import Address, default_target
from prefixcache.errors import CacheError, InvalidRequest, LayoutMismatch, ServiceUnavailable
from prefixcache.run_folder import RunFolder
from prefixcache.service.pool.model_layout import read_layout
from prefixcache.texts import check_text, many
from prefixcache_serving.fleet import Fleet
from prefixcache_serving.front import Front
from prefixcache_serving.front_server import FrontServer, read_address
from prefixcache_serving.keys import Keys
from prefixcache_serving.meter import Meter
from prefixcache_serving.notices import Notice, Say, say_to_people
from prefixcache_serving.router import Router
from prefixcache_serving.served_model import ServedModel, folder_of
from prefixcache_worker.child import ProcessFailed
from prefixcache_worker.child_service import ChildService
from prefixcache_worker.child_worker import WORKER, ChildWorker

EXIT_FAILED: Final = 1
DTYPES: Final = ("float32", "bfloat16")
WEIGHTS: Final = ("packed", "int8", "private")
_TELL_S: Final = 5.0
"""How often it is said that workers are still loading."""
_LONGEST_PAUSE_S: Final = 30.0
"""Between two starts of a service that ends again and again."""


@dataclass(frozen=True, slots=True)
class Setup:
    """What is served, where, and by how many; see the options of `prefixcache up`."""

    model: str
    name: str
    num_workers: int
    http: str
    api_keys: Path | None
    longest_queue: int
    longest_wait_s: float
    grace_s: float
    target: str | None
    memory: str | None
    block_size: int | None
    segments: Path | None
    dtype: str
    threads: int
    weights: str
    chunk: int
    max_batch: int
    drafts: int
    invariant: bool
    command: tuple[str, ...] = WORKER
    """The command line of a worker."""

    def check(self) -> None:
        """Look at what workers would refuse, but only once they have loaded.

        Raises:
            InvalidRequest: with what is wrong.
        """
        if not self.model:
            raise InvalidRequest("--model is empty; it takes a folder, an id, or smollm2")
        if self.target is not None:
            Address.parse(self.target)
        check_text(self.served_name, "--name")
        if self.dtype not in DTYPES:
            raise InvalidRequest(f"--dtype {self.dtype!a}: it takes {' or '.join(DTYPES)}")
        if self.weights not in WEIGHTS:
            raise InvalidRequest(f"--weights {self.weights!a}: it takes {', '.join(WEIGHTS)}")
        if self.invariant and self.weights == "private":
            raise InvalidRequest(
                "--invariant and --weights private: only the network in C fixes bits, and PyTorch "
                "multiplies private weights"
            )
        if self.chunk < self.max_batch:
            raise InvalidRequest(
                f"--chunk {self.chunk} is less than --max-batch {self.max_batch}: in a step each "
                "request has a token at least"
            )

    @property
    def served_name(self) -> str:
        """What requests call the model: by default as its folder, or its id, is called."""
        if self.name:
            return self.name
        folder = Path(self.model)
        if folder.is_dir():
            return folder.absolute().name
        return self.model.rstrip("/").rpartition("/")[2]

    def worker_options(self, folder: Path) -> list[str]:
        """Give the options of `prefixcache worker`."""
        return [
            *("--model", str(folder), "--dtype", self.dtype, "--weights", self.weights),
            *("--chunk", str(self.chunk), "--max-batch", str(self.max_batch), "--tell-steps"),
            *("--drafts", str(self.drafts), *(("--invariant",) if self.invariant else ())),
        ]

    def service_options(self, folder: Path) -> list[str]:
        """Give the options of `prefixcache serve`."""
        options = ["--model", str(folder), "--dtype", self.dtype]
        if self.memory is not None:
            options += ["--memory", self.memory]
        if self.block_size is not None:
            options += ["--block-size", str(self.block_size)]
        if self.segments is not None:
            options += ["--segments", str(self.segments.absolute())]
        return options


def run(setup: Setup, say: Say = say_to_people) -> int:
    """Serve until told to end; give the exit code.

    Args:
        setup: what, where, by how many.
        say: is told what happens; also why it cannot go on, unless that is raised.

    Raises:
        CacheError: what was asked for cannot be had.
    """
    try:
        setup.check()
        keys = Keys(setup.api_keys)
        address = read_address(setup.http, has_keys=not keys.is_open)
        server = FrontServer(address, has_keys=not keys.is_open)
        folder = folder_of(setup.model)
        asyncio.run(_Run(setup, keys, server, folder, say).main())
    except BaseExceptionGroup as group:
        failures = group.subgroup((ProcessFailed, CacheError))
        if failures is None:
            raise
        failure = first_error(failures)
    except ProcessFailed as error:
        failure = error
    else:
        return 0
    finally:
        # All has ended: a Ctrl-C that comes now has nothing to end.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    if isinstance(failure, CacheError):
        raise failure
    say(Notice("failed", f"prefixcache: {failure}"))
    return EXIT_FAILED


def first_error(group: BaseException) -> BaseException:
    """Give the first error of a group of groups."""
    while isinstance(group, BaseExceptionGroup):
        group = group.exceptions[0]
    return group


class _Run:
    def __init__(
        self, setup: Setup, keys: Keys, server: FrontServer, folder: Path, say: Say
    ) -> None:
        self._setup = setup
        self._say = say
        self._keys = keys
        self._server = server
        self._folder = folder
        self._service_child: ChildService | None = None
        """The service, if it was started here."""
        self._fleet: Fleet | None = None
        self._told = asyncio.Event()
        self._renewing: set[asyncio.Task[None]] = set()

    async def main(self) -> None:
        setup = self._setup
        url = self._server.bind()
        loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None
        is_serving = is_ending = False

        def end() -> None:
            nonlocal is_ending
            if is_serving and not self._told.is_set():
                self._told.set()
            elif not is_ending:  # while loading, or the second time
                is_ending = True
                task.cancel()
            else:  # what is still there was told to end, and has a few seconds for it
                self._kill()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, end)
        try:
            async with AsyncExitStack() as stack:
                stack.push_async_callback(self._server.close)
                work = stack.enter_context(RunFolder("pfx-up-"))
                self._tell(
                    "starting", f"starting {setup.served_name}", url=url, model=setup.served_name
                )
                target = await self._service(stack, work)
                meter = Meter()
                router = Router(
                    meter,
                    longest_queue=setup.longest_queue,
                    tenants=self._keys.tenants,
                    longest_wait_s=setup.longest_wait_s,
                )
                fleet = self._fleet = self._make_fleet(work, target, router, meter)
                stack.push_async_callback(fleet.stop)
                async with asyncio.TaskGroup() as group:
                    running = group.create_task(self._keep(fleet))
                    front = await self._front(fleet, router, meter)
                    _watch(meter, router, fleet, front)
                    loop.add_signal_handler(signal.SIGHUP, self._renew, group, fleet)
                    is_serving = True
                    self._welcome(url, front.model.name)
                    try:
                        await self._told.wait()
                        await self._drain(router, front)
                    finally:
                        router.give_up()  # so that who still waits is told
                    running.cancel()
                    for one in self._renewing:
                        one.cancel()
        except asyncio.CancelledError:
            pass
        self._tell("ended", "ended; no process was left behind")

    def _tell(self, event: str, message: str, **fields: Any) -> None:
        self._say(Notice(event, message, **fields))

    def _welcome(self, url: str, name: str) -> None:
        setup = self._setup
        lines = [f"{url}  model {name}, {many(setup.num_workers, 'worker')}"]
        if not self._server.address.path:
            lines.append(_example(url, name, has_keys=not self._keys.is_open))
        self._tell("ready", "\n".join(lines), url=url, model=name, workers=setup.num_workers)

    def _kill(self) -> None:
        """End all processes at once, whatever they are doing."""
        workers = [] if self._fleet is None else self._fleet.workers.values()
        for child in (*workers, self._service_child):
            if child is not None:
                child.kill()

    async def _keep(self, fleet: Fleet) -> None:
        """Keep the workers running, and the service, if it is ours."""
        async with asyncio.TaskGroup() as group:
            group.create_task(fleet.run())
            if self._service_child is not None:
                group.create_task(_keep_service(self._service_child, self._say))

    async def _service(self, stack: AsyncExitStack, work: Path) -> str:
        """Find the service, or start one; give its address."""
        setup = self._setup
        target = default_target() if setup.target is None else setup.target
        service = None
        if not await _answers(target):
            service = ChildService(work, target, setup.service_options(self._folder))
            stack.push_async_callback(service.stop)
            self._service_child = service
            try:
                await service.ready()
            except ProcessFailed:
                if not await _answers(target):
                    raise
                service = self._service_child = None  # somebody else was faster
        if service is None:
            for option, value in (
                ("--memory", setup.memory),
                ("--block-size", setup.block_size),
                ("--segments", setup.segments),
            ):
                if value is not None:
                    raise InvalidRequest(
                        f"{option} is for a service that is started here; one answers at {target} "
                        "already: leave it out, or give another address with --connect"
                    )
            self._tell("service", f"service: the one at {target}", target=target, is_ours=False)
            await asyncio.to_thread(_check_layout, target, self._folder, setup)
            return target
        lines = service.output.read_text(errors="replace").splitlines()
        told = "\n".join(f"service: {line}" for line in lines)
        self._tell("service", told, target=target, is_ours=True, pid=service.pid)
        return target

    def _make_fleet(self, work: Path, target: str, router: Router, meter: Meter) -> Fleet:
        setup = self._setup

        def make(name: str, tell: Callable[[dict[str, Any]], None]) -> ChildWorker:
            return ChildWorker(
                name,
                work,
                tell,
                target=target,
                options=setup.worker_options(self._folder),
                command=setup.command,
                threads=setup.threads,
            )

        names = [f"w{number}" for number in range(1, setup.num_workers + 1)]
        return Fleet(names, make, router, meter, self._say)

    async def _front(self, fleet: Fleet, router: Router, meter: Meter) -> Front:
        """Wait for the first worker, then answer."""
        setup = self._setup
        began_s = time.monotonic()
        loading = f"{many(setup.num_workers, 'worker', 'load')} {setup.model} ({setup.dtype})"
        self._tell("loading", loading, seconds=0)
        packs = (
            "" if setup.weights == "private" else ": a first start packs weights, others map them"
        )
        while not fleet.about.done():
            await asyncio.wait([fleet.about], timeout=_TELL_S)
            if not fleet.about.done():
                seconds = round(time.monotonic() - began_s)
                self._tell("loading", f"still loading after {seconds} s{packs}", seconds=seconds)
        model = ServedModel(setup.served_name, self._folder, fleet.about.result())
        front = Front(model, router, self._keys, meter, workers=fleet.names)
        await self._server.start(front.app(), front.board.close)
        return front

    def _renew(self, group: asyncio.TaskGroup, fleet: Fleet) -> None:
        if self._renewing:
            self._tell("renewing", "the workers are being replaced already")
            return

        async def all_of_them() -> None:
            for name in fleet.names:
                await fleet.renew(name)
            self._tell("renewed", "all workers are new")

        task = group.create_task(all_of_them())
        self._renewing.add(task)
        task.add_done_callback(self._renewing.discard)

    async def _drain(self, router: Router, front: Front) -> None:
        router.is_draining = True
        under_way = f"{many(front.num_open, 'request')} under way"
        self._tell("ending", f"ending: {under_way}, nothing new is begun", requests=front.num_open)
        deadline = time.monotonic() + self._setup.grace_s
        while front.num_open and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        if front.num_open:
            late = f"{many(front.num_open, 'request')} did not finish in {self._setup.grace_s:g} s"
            self._tell("unfinished", late, requests=front.num_open)


async def _answers(target: str) -> bool:
    """Whether a service is there."""
    try:
        await asyncio.to_thread(lambda: prefixcache.connect(target).close())
    except ServiceUnavailable:
        return False
    return True


def _check_layout(target: str, folder: Path, setup: Setup) -> None:
    """Attach as a worker will, but before one has loaded its model, which takes long.

    Raises:
        LayoutMismatch: the service's pool has another layout.
    """
    try:
        layout = read_layout(folder, setup.dtype)
    except InvalidRequest:
        return  # the worker will say what it cannot read
    if not layout.is_ours:
        return  # its pages are a worker's matter
    try:
        with prefixcache.connect(target) as client:
            client.attach(setup.served_name, layout, name="prefixcache up").close()
    except LayoutMismatch as error:
        raise LayoutMismatch(
            f"the service at {target} cannot be used: {error}; or give another address with "
            "--connect: where none answers, one is started"
        ) from None


async def _keep_service(service: ChildService, say: Say) -> None:
    """Start the service again whenever it ends; workers go on alone meanwhile, and join it."""
    pause_s = 0.0
    while True:
        assert service.process is not None
        await service.process.wait()
        ended = "the service has ended: the workers go on alone until it is there again"
        say(Notice("service_ended", ended))
        try:
            await asyncio.sleep(pause_s)
            await service.ready()
            again = "the service is there again"
            say(Notice("service", again, target=service.target, is_ours=True, pid=service.pid))
            pause_s = 0.0
        except ProcessFailed as failure:
            pause_s = min(_LONGEST_PAUSE_S, max(1.0, 2 * pause_s))
            failed = f"{failure}; again in {pause_s:.0f} s"
            say(Notice("service_failed", failed, retry_s=pause_s))


def _watch(meter: Meter, router: Router, fleet: Fleet, front: Front) -> None:
    meter.watch("workers_ready", "Workers that are given requests.", lambda: fleet.num_ready)
    meter.watch("answers_waiting", "Answers that no worker has.", lambda: router.num_waiting)
    meter.watch("answers_running", "Answers that workers have.", lambda: router.num_running)
    meter.watch_each("worker_answers", "Answers that a worker has.", "worker", router.answers)
    meter.watch_each("worker_tokens", "Tokens it has generated.", "worker", router.generated)
    meter.watch("requests_open", "Requests under way.", lambda: front.num_open)


def _example(url: str, name: str, *, has_keys: bool) -> str:
    key = ' -H "authorization: Bearer $KEY"' if has_keys else ""
    return (
        f"try it: curl {url}/chat/completions -H 'content-type: application/json'{key} -d "
        f"""'{{"model": "{name}", "temperature": 0, "messages": """
        """[{"role": "user", "content": "Hello"}]}'"""
    )
