"""The demo's processes: one service and some workers, each a real process of its own.

```
demo ─┬─ prefixcache serve                      private Unix socket in a temporary folder
      ├─ prefixcache worker --name w1           stdin: requests, stdout: events, one JSON a line
      ├─ prefixcache worker --name w2           stderr: a file in the temporary folder
      └─ prefixcache worker --name w3
```
None of them outlives the demo, however that ends: a normal end, an error and Ctrl-C take them
down in order; if the demo itself is killed, the kernel sends them SIGTERM.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from prefixcache.errors import ServiceUnavailable
from prefixcache.plain_json import json_text
from prefixcache_worker.demo.failure import ProcessFailed

LINE_BYTES: Final = 1 << 24
"""Longest line that is read from a worker."""

CHUNK: Final = 128
"""Tokens of a worker's step.  Half a server's usual: in float32, which the comparison needs, a step
of 256 takes a processor core most of a second, and warm requests wait behind it."""

STOP_S: Final = 5.0
"""How long a process may take to end by itself before it is killed."""

SERVE: Final = (sys.executable, "-m", "prefixcache.cli", "serve")
"""`prefixcache serve` with this very interpreter, installed or not."""
WORKER: Final = (sys.executable, "-m", "prefixcache_worker")
"""`prefixcache worker`, likewise."""

_TIED: Final = Path(__file__).with_name("tied.py")


class Child:
    """One process of the demo, and what it writes.

    Args:
        name: what people call it.
        arguments: its command line.
        folder: where its standard error is kept.
    """

    def __init__(self, name: str, arguments: Sequence[str], folder: Path) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.errors = folder / f"{name}.stderr"
        self.process: asyncio.subprocess.Process | None = None
        self.killed = False
        """Whether the demo has killed it."""

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self.process.pid if self.process else 0

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.returncode is None

    async def start(self, *, stdin: int, stdout: int) -> None:
        """Start the process, in a session of its own so that Ctrl-C reaches the demo alone."""
        with self.errors.open("wb") as errors:
            self.process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-S", str(_TIED), str(os.getpid())),
                *self.arguments,
                stdin=stdin,
                stdout=stdout,
                stderr=errors,
                env=self.environment(),
                start_new_session=True,
                limit=LINE_BYTES,
            )

    def environment(self) -> dict[str, str]:
        """Give what it runs in: one thread, and the modules that this process sees."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }

    def complaint(self) -> str:
        """Give the last lines of its standard error, for a message about its failure."""
        text = self.errors.read_text(errors="replace") if self.errors.exists() else ""
        return "\n".join(text.strip().splitlines()[-15:])

    def kill(self) -> None:
        """Send SIGKILL: the process gets no chance to say or clean up anything."""
        if self.process is not None:
            self.killed = True
            with contextlib.suppress(ProcessLookupError):
                self.process.kill()

    async def stop(self) -> None:
        """End the process: SIGTERM, a few seconds of patience, SIGKILL.  Idempotent."""
        if self.process is None or self.process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            self.process.terminate()
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()


class Service(Child):
    """`prefixcache serve` on a socket in `folder`, for a float32 pool.

    Args:
        folder: for the socket and what the service writes.
        memory: size of the pool.
        model: if it is a folder, the service derives and prints the pool's layout at once.
    """

    def __init__(self, folder: Path, memory: str, model: str) -> None:
        self.target = f"unix:{folder}/cache.sock"
        serve = [*SERVE, "--listen", self.target, "--memory", memory, "--grace", "1"]
        if (Path(model) / "config.json").is_file():
            serve += ["--model", model, "--dtype", "float32"]
        super().__init__("service", serve, folder)
        self.output = folder / "service.stdout"

    async def ready(self, timeout_s: float = 30.0) -> None:
        """Start it and wait until it answers.

        Raises:
            ProcessFailed: it ended, or did not answer in time; with what it wrote.
        """
        import prefixcache

        with self.output.open("wb") as output:
            await self.start(stdin=asyncio.subprocess.DEVNULL, stdout=output.fileno())
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            try:
                with prefixcache.connect(self.target, timeout_s=2) as client:
                    await asyncio.to_thread(client.snapshot)
                    return
            except ServiceUnavailable:
                await asyncio.sleep(0.05)
        raise ProcessFailed(f"the service did not start:\n{self.complaint()}")


class Worker(Child):
    """`prefixcache worker`: takes requests, tells events.

    Args:
        name: what the service and people call it.
        folder: where its standard error is kept.
        command: the command line of a worker, to which the options are added.
        model: path or id for `--model`.
        target: the service's address; None: a worker without any cache.
        tell: called for every event, with the clock's reading when its line arrived.
        clock: seconds since the run began.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        command: Sequence[str],
        model: str,
        target: str | None,
        tell: Callable[[Worker, dict[str, Any], float], None],
        clock: Callable[[], float],
    ) -> None:
        where = ["--solo"] if target is None else ["--connect", target]
        super().__init__(
            name,
            [
                *command,
                *where,
                *("--name", name),
                *("--model", model, "--dtype", "float32", "--threads", "1"),
                *("--chunk", str(CHUNK)),
            ],
            folder,
        )
        self._tell = tell
        self._clock = clock
        self._reader: asyncio.Task[None] | None = None
        self.about: dict[str, Any] = {}
        """What it said of itself when it was ready."""
        self.gone = asyncio.Event()

    async def ready(self, timeout_s: float = 180.0) -> None:
        """Start it, wait until its model is loaded, then listen to its events.

        Raises:
            ProcessFailed: it ended, or was not ready in time; with what it wrote.
        """
        await self.start(stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE)
        events = self._events()
        try:
            async with asyncio.timeout(timeout_s):
                async for event in events:
                    if event.get("event") == "ready":
                        self.about = event
                        break
        except TimeoutError:
            raise ProcessFailed(f"{self.name} was not ready in {timeout_s:.0f} s") from None
        if not self.about:
            raise ProcessFailed(f"{self.name} did not start:\n{self.complaint()}")
        self._reader = asyncio.create_task(self._listen(events))

    def send(self, request: dict[str, Any]) -> None:
        """Hand over one request; returns at once."""
        if self.process is None or self.process.stdin is None or self.gone.is_set():
            raise ProcessFailed(f"{self.name} takes no requests: it is gone")
        self.process.stdin.write(json_text(request).encode() + b"\n")

    async def stop(self) -> None:
        """Close its input, end it, and stop listening.  Idempotent."""
        if self.process is not None and self.process.stdin is not None:
            self.process.stdin.close()
        await super().stop()
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    async def _events(self) -> AsyncIterator[dict[str, Any]]:
        assert self.process is not None
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            if line.startswith(b"{"):
                yield json.loads(line)

    async def _listen(self, events: AsyncIterator[dict[str, Any]]) -> None:
        try:
            async for event in events:
                self._tell(self, event, self._clock())
        finally:
            self.gone.set()


@contextlib.asynccontextmanager
async def stopping(children: Sequence[Child]) -> AsyncIterator[None]:
    """Take all `children` down at the end, whatever happened, all at the same time."""
    try:
        yield
    finally:
        # Shielded: a second Ctrl-C must not leave processes behind.
        await asyncio.shield(asyncio.gather(*(child.stop() for child in children)))
