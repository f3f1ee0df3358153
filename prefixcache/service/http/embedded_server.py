"""An HTTP server that is one part of a process among others, at a socket that was opened before.

Both the service's page and the front of `prefixcache up` are such servers: signals are not theirs,
nothing is logged for each request, and on the loopback device only our own names are answered.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Iterator

import uvicorn
from starlette.types import ASGIApp

from prefixcache.service.http.http_connections import STALL_S, Bound, within


class EmbeddedServer(uvicorn.Server):
    """Answers for one application.

    Args:
        app: What answers.
        bound: The connections that there may be.
        backlog: Connections that the kernel keeps until they are accepted.
        stall_s: How long an answer may wait for its reader.
        last_words_s: How long what is being answered may go on after `close`.
    """

    def __init__(
        self,
        app: ASGIApp,
        bound: Bound,
        *,
        backlog: int,
        last_words_s: int,
        stall_s: float = STALL_S,
    ) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",  # of a stranger's half request there is nothing to say
                access_log=False,
                lifespan="off",
                http=within(bound, stall_s=stall_s),
                ws="none",
                server_header=False,
                backlog=backlog,
                timeout_graceful_shutdown=last_words_s,
            )
        )
        self._answering: asyncio.Task[None] | None = None

    def begin(self, listening: socket.socket) -> asyncio.Task[None]:
        """Begin to answer who connects there; give the task that does, until `close`."""
        self._answering = asyncio.create_task(self.serve([listening]))
        return self._answering

    async def close(self) -> None:
        """Stop answering.  Idempotent."""
        if self._answering is not None:
            self.should_exit = True
            await self._answering
            self._answering = None

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals to the process."""
        yield


def own_names(port: int) -> frozenset[bytes]:
    """Give what a browser calls a server of ours on the loopback device, in a Host header.

    A page of a stranger may have a name that was made to resolve to 127.0.0.1: it is none of them.

    >>> sorted(own_names(8080))
    [b'127.0.0.1:8080', b'[::1]:8080', b'localhost:8080']
    """
    names = ("127.0.0.1", "localhost", "[::1]")
    bare = names if port == 80 else ()
    return frozenset(name.encode() for name in (*(f"{name}:{port}" for name in names), *bare))
