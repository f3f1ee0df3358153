"""`prefixcache serve` as a child."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import prefixcache
from prefixcache.errors import ServiceUnavailable
from prefixcache_worker.child import Child, ProcessFailed

SERVE: Final = (sys.executable, "-m", "prefixcache.cli", "serve")
"""`prefixcache serve` with this very interpreter, installed or not."""
_LISTENS: Final = b"listening at "
"""In what it says, once it does."""


class ChildService(Child):
    """A service on an address of its own.

    Args:
        folder: for what the service writes.
        target: where it listens.
        options: of `prefixcache serve`.
    """

    def __init__(self, folder: Path, target: str, options: Sequence[str]) -> None:
        self.target = target
        super().__init__("service", [*SERVE, "--listen", target, *options], folder)
        self.output = folder / "service.stdout"

    async def ready(self, timeout_s: float = 30.0) -> None:
        """Start it and wait until it answers.

        Raises:
            ProcessFailed: it ended, or did not answer in time; with what it wrote.
        """
        try:
            self.output.parent.mkdir(mode=0o700, exist_ok=True)
            with self.output.open("wb") as output:
                await self.start(stdin=asyncio.subprocess.DEVNULL, stdout=output.fileno())
        except OSError as error:
            raise ProcessFailed(f"{self.name} cannot be started: {error.strerror}") from None
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            # Another one may have been started there at the same moment: then it answers, not ours.
            if _LISTENS in self.output.read_bytes():
                with suppress(ServiceUnavailable):
                    with prefixcache.connect(self.target, timeout_s=2) as client:
                        await asyncio.to_thread(client.snapshot)
                    return
            await asyncio.sleep(0.05)
        raise ProcessFailed(f"the service did not start:\n{self.complaint()}")
