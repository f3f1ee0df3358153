from __future__ import annotations

import asyncio
import gc
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from client.backends import BACKENDS, Backend

CtrlC = Callable[[float], AbstractContextManager[None]]


@pytest.fixture
def ctrl_c() -> Iterator[CtrlC]:
    """Give a context in which Ctrl-C comes after so many seconds.

    It comes again later: Python ignores what is raised while it lets go of something, and tells
    its hook of it, which pytest would take for a failure.  So would it take a socket that was made
    in the very moment and is held by nobody: such ones are let go of here, not in a later test.
    """

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    def tell(ignored: sys.UnraisableHookArgs) -> None:
        if ignored.exc_type not in (KeyboardInterrupt, ResourceWarning):
            told(ignored)

    @contextmanager
    def coming(seconds: float) -> Iterator[None]:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds, 0.5)
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)

    async def begin() -> None:
        grpc.aio.init_grpc_aio()

    told, sys.unraisablehook = sys.unraisablehook, tell
    before = signal.signal(signal.SIGALRM, interrupt)
    # The last channel takes down what all share, in its destructor: cut short, that would leave one
    # of two sockets to whoever opens the next channel.
    asyncio.run(begin())
    yield coming
    grpc.aio.shutdown_grpc_aio()
    signal.signal(signal.SIGALRM, before)
    gc.collect()
    sys.unraisablehook = told


@pytest.fixture(scope="session")
def sockets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("s")


@pytest.fixture(scope="module", params=list(BACKENDS))
def shared_backend(request: pytest.FixtureRequest, sockets: Path) -> Iterator[Backend]:
    name = request.param.replace(" ", "-")
    backend = BACKENDS[request.param](f"unix:{sockets}/{name}.sock")
    yield backend
    backend.close()


@pytest.fixture
def cache(shared_backend: Backend) -> Iterator[Backend]:
    """One cache of 64 blocks of 4 tokens, empty, with a ttl of 1 s."""
    yield shared_backend
    shared_backend.clean()
    left = shared_backend.snapshot()
    assert left.free + left.evictable == left.num_blocks, left
    assert not left.leases
