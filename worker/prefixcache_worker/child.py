"""A child process: started, watched, ended; it never outlives who started it.

```
parent ─┬─ prefixcache serve                      stdin: nothing
        ├─ prefixcache worker --name w1           stdin: requests, stdout: events, one JSON a line
        └─ prefixcache worker --name w2           stderr: a file
```
A normal end, an error and Ctrl-C take the children down in order; if the parent itself is killed,
the kernel ends them.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Coroutine, Sequence
from pathlib import Path
from typing import Any, ClassVar, Final

from prefixcache import tied

LINE_BYTES: Final = 1 << 24
"""Longest line that is read from a child."""

STOP_S: Final = 5.0
"""How long a process may take to end by itself before it is killed."""


class ProcessFailed(Exception):
    """A child ended, or said nothing, when it should have been ready."""


class Child:
    """One process, and what it writes.

    Args:
        name: what people call it.
        arguments: its command line.
        folder: where its standard error is kept.
        threads: that its libraries may start.
    """

    orphan_signal: ClassVar[signal.Signals] = signal.SIGTERM
    """What the kernel sends it when its parent has died."""

    def __init__(
        self, name: str, arguments: Sequence[str], folder: Path, *, threads: int = 1
    ) -> None:
        self.name = name
        self.arguments = list(arguments)
        self.threads = threads
        self.errors = folder / f"{name}.stderr"
        self.process: asyncio.subprocess.Process | None = None
        self.killed = False
        """Whether its parent has killed it."""
        self.gone = asyncio.Event()
        """Set by who reads what it writes, when that ends."""

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self.process.pid if self.process else 0

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process is not None and self.process.returncode is None

    @property
    def exit_code(self) -> int | None:
        """How it ended: below 0 by that signal; None: it has not, or nobody has waited for it."""
        return self.process.returncode if self.process else None

    async def start(self, *, stdin: int, stdout: int) -> None:
        """Start the process, in a session of its own so that Ctrl-C reaches the parent alone.

        Raises:
            ProcessFailed: the machine has no room for one more, or for what it writes.
        """
        try:
            # Of a parent that runs for weeks, somebody may have tidied the folder away.
            self.errors.parent.mkdir(mode=0o700, exist_ok=True)
            with self.errors.open("wb") as errors:
                self.process = await asyncio.create_subprocess_exec(
                    *tied.to_this(self.orphan_signal),
                    *self.arguments,
                    stdin=stdin,
                    stdout=stdout,
                    stderr=errors,
                    env=self.environment(),
                    start_new_session=True,
                    limit=LINE_BYTES,
                )
        except OSError as error:
            why = error.strerror or str(error)
            raise ProcessFailed(f"{self.name} cannot be started: {why}") from None

    def environment(self) -> dict[str, str]:
        """Give what it runs in: so many threads, and the modules that this process sees."""
        return {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            "PYTHONUNBUFFERED": "1",
            "OMP_NUM_THREADS": str(self.threads),
            "TOKENIZERS_PARALLELISM": "false",
        }

    def complaint(self) -> str:
        """Give the last lines of its standard error, for a message about its failure."""
        text = self.errors.read_text(errors="replace") if self.errors.exists() else ""
        return "\n".join(text.strip().splitlines()[-15:])

    async def guard(self) -> None:
        """Wait for its end.

        Raises:
            ProcessFailed: it has ended, and its parent has not killed it.
        """
        await self.gone.wait()
        if not self.killed:
            raise ProcessFailed(f"{self.name} ended by itself:\n{self.complaint()}")

    def kill(self) -> None:
        """Send SIGKILL: the process gets no chance to say or clean up anything."""
        if self.process is not None:
            self.killed = True
            self._signal(signal.SIGKILL)

    async def stop(self) -> None:
        """End the process: SIGTERM, a few seconds of patience, SIGKILL.  Idempotent."""
        if self.process is None or self.process.returncode is not None:
            return
        if self.gone.is_set():
            # It ends by itself: a signal would change how.
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_S)
                return
        self._signal(signal.SIGTERM)
        try:
            await asyncio.wait_for(self.process.wait(), STOP_S)
        except TimeoutError:
            self.kill()
            await self.process.wait()

    def _signal(self, number: int) -> None:
        """Signal it.

        Not by what asyncio has for it, which looks first whether the process has ended: where it
        has just now, asyncio then asks in vain how, and says so on standard error.
        """
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)


@contextlib.asynccontextmanager
async def stopping(children: Sequence[Child]) -> AsyncIterator[None]:
    """Take all `children` down at the end, whatever happened, all at the same time."""
    try:
        yield
    finally:
        # Shielded: a second Ctrl-C must not leave processes behind.
        await asyncio.shield(asyncio.gather(*(child.stop() for child in children)))


@contextlib.asynccontextmanager
async def beside(*jobs: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run `jobs` beside the body; if one fails, the body is cancelled and the failure raised."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(job) for job in jobs]
        yield
        for task in tasks:
            task.cancel()
