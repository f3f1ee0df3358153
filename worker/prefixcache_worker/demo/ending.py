"""How a demo ends: by itself, by a signal, or by the first of its errors."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable
from typing import Any, Final

import typer
from rich.console import Console
from rich.text import Text

from prefixcache.errors import CacheError
from prefixcache_worker.child import ProcessFailed
from prefixcache_worker.demo.failure import DemoError
from prefixcache_worker.demo.view import View

WRONG: Final = 1
USAGE: Final = 2
"""Exit codes."""


def play(console: Console, view: View, execute: Callable[[], Any]) -> Any:
    """Run a demo to its end, and close its view; a demo that cannot be run says why in one line.

    Raises:
        typer.Exit: it could not be run (1), or was told to end (128 + the signal).
    """
    try:
        return run_to_end(execute)
    except* (DemoError, ProcessFailed, CacheError) as group:
        view.close()
        console.print(Text(f"FAILED: {_first_error(group)}", style="bold red"))
        raise typer.Exit(WRONG) from None
    finally:
        view.close()


def run_to_end(execute: Callable[[], Any]) -> Any:
    """Run it; Ctrl-C, SIGTERM and SIGHUP end it in order, with the shell's exit codes."""
    received: list[int] = []

    async def main() -> Any:
        task = asyncio.current_task()
        assert task is not None

        def end(number: int) -> None:
            if not received:
                sys.stderr.write("ending all that was started …\n")
                task.cancel()
            received.append(number)

        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, end, number)
        return await execute()

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        if not received:
            raise
        sys.stderr.write("stopped; no process was left behind\n")
        raise typer.Exit(128 + received[0]) from None


def _first_error(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Give the first error of a group of groups."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error
