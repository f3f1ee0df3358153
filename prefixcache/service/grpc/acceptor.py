"""The acceptor: gRPC's own task that takes up every call of a server, and that no call may end.

It decodes a call's path before it asks any interceptor or handler, and whoever can connect may send
one that is no UTF-8, without any proof.  With grpcio 1.85 the task then ends by an error, and with
it the server and all sessions.  No code of ours runs in between but what Python asks when bytes
cannot be decoded: so that gives, in this task alone, a sign that stands for them, and the call is
answered as one of a method that there is not.
"""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Callable
from typing import Final

import grpc.aio

_TASK: Final = "AioServer._server_main_loop"
"""The acceptor, as asyncio names what it runs."""

_REPLACEMENT: Final = "\ufffd"


async def start(
    server: grpc.aio.Server, when_ended: Callable[[BaseException | None], None]
) -> None:
    """Start a server whose acceptor no path ends.

    Args:
        server: Has its addresses and handlers.
        when_ended: Is told once it takes no calls any more, however that came, and why.
    """
    codecs.register_error("strict", _decode_strictly)
    await server.start()

    def ended(task: asyncio.Task[bool]) -> None:
        if not task.cancelled():
            when_ended(task.exception())

    task = asyncio.ensure_future(server.wait_for_termination())
    task.add_done_callback(ended)
    _watching.add(task)
    task.add_done_callback(_watching.discard)


_watching: Final[set[asyncio.Task[bool]]] = set()
"""asyncio keeps no task that nobody else keeps."""


def _decode_strictly(error: UnicodeError) -> tuple[str | bytes, int]:
    """Be what Python does with undecodable bytes: raise, but in the acceptor."""
    if isinstance(error, UnicodeDecodeError) and _is_acceptor():
        return _REPLACEMENT, error.end
    raise error


def _is_acceptor() -> bool:
    try:
        task = asyncio.current_task()
    except RuntimeError:  # no event loop in this thread
        return False
    return task is not None and getattr(task.get_coro(), "__qualname__", "") == _TASK
