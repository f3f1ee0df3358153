"""A proxy between workers and the service that can drop connections, or leave them half open."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from pathlib import Path

from patience import PATIENCE_S


class Proxy:
    """Listens on a Unix socket and passes bytes on; lives in a thread of its own.

    Args:
        listen: path of the socket that workers use.
        target: path of the service's.
    """

    def __init__(self, listen: Path, target: Path) -> None:
        self._listen, self._target = str(listen), str(target)
        self._open: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        self._run(self._start())

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_S)  # type: ignore[arg-type]

    async def _start(self) -> None:
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._server = await asyncio.start_unix_server(self._serve, self._listen)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            there = await asyncio.open_unix_connection(self._target)
        except OSError:
            writer.close()
            return
        both = {writer, there[1]}
        self._open |= both
        ways = (self._pass(reader, there[1]), self._pass_back(there[0], writer))
        try:
            await asyncio.gather(*ways)
        except OSError:
            pass
        finally:
            self._open -= both
            for one in both:
                one.close()

    async def _pass(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._speaks.wait()
            writer.write(data)
            await writer.drain()
        with contextlib.suppress(OSError, RuntimeError):
            writer.write_eof()

    async def _pass_back(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await self._pass(reader, writer)

    def drop(self) -> None:
        """Close all connections that pass through, without a word."""
        self._loop.call_soon_threadsafe(self._drop)

    def _drop(self) -> None:
        for writer in list(self._open):
            writer.transport.abort()

    def mute(self) -> None:
        """Leave connections open, and pass nothing on."""
        self._loop.call_soon_threadsafe(self._speaks.clear)

    def speak(self) -> None:
        """Pass on again, also what was held back."""
        self._loop.call_soon_threadsafe(self._speaks.set)

    def close(self) -> None:
        """Drop everything and end."""

        async def stop() -> None:
            self._speaks.set()
            self._server.close()
            self._drop()
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

        self._run(stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_S)
        self._loop.close()
