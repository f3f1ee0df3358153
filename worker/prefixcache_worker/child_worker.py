"""`prefixcache worker` as a child: takes requests, tells events, one JSON a line."""

from __future__ import annotations

import asyncio
import json
import signal
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any, Final

from prefixcache.plain_json import json_text
from prefixcache_worker.child import Child, ProcessFailed

WORKER: Final = (sys.executable, "-m", "prefixcache_worker")
"""`prefixcache worker` with this very interpreter, installed or not."""


class ChildWorker(Child):
    """One worker.

    Args:
        name: what the service and people call it.
        folder: where its standard error is kept.
        tell: called for every event.
        target: the service's address; None: a worker without any cache.
        options: of `prefixcache worker`.
        command: the command line of a worker, to which the options are added.
        threads: that it computes with.
    """

    # Nobody hears it any more, the service takes its blocks back, and where it is stopped or hangs,
    # no other signal would end it.
    orphan_signal = signal.SIGKILL

    def __init__(
        self,
        name: str,
        folder: Path,
        tell: Callable[[dict[str, Any]], None],
        *,
        target: str | None,
        options: Sequence[str] = (),
        command: Sequence[str] = WORKER,
        threads: int = 1,
    ) -> None:
        where = ["--solo"] if target is None else ["--connect", target]
        arguments = [*command, *where, "--name", name, "--threads", str(threads), *options]
        super().__init__(name, arguments, folder, threads=threads)
        self._tell = tell
        self._reader: asyncio.Task[None] | None = None
        self.about: dict[str, Any] = {}
        """What it said of itself when it was ready."""

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

    def send(self, line: dict[str, Any]) -> None:
        """Hand over one line; returns at once.

        Raises:
            ProcessFailed: it is gone.
        """
        if self.process is None or self.process.stdin is None or self.gone.is_set():
            raise ProcessFailed(f"{self.name} takes no requests: it is gone")
        self.process.stdin.write(json_text(line).encode() + b"\n")

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
            if line.startswith(b"{") and line.endswith(b"\n"):  # not what a kill has cut
                yield json.loads(line)

    async def _listen(self, events: AsyncIterator[dict[str, Any]]) -> None:
        try:
            async for event in events:
                self._tell(event)
        finally:
            self.gone.set()
