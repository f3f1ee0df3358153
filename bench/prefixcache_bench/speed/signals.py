"""How a benchmark that has started processes is ended from outside: they end with it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Final

from prefixcache import tied

SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def ending_in_order() -> Iterator[None]:
    """Have SIGTERM and SIGHUP do in this block what Ctrl-C does: all that was started is ended.

    Another one of these signals changes nothing: that is under way.  For the main thread.

    Raises:
        SystemExit: One has come; with the shell's exit code for it.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        received.append(number)
        if len(received) == 1:
            sys.stderr.write("ending all that was started …\n")
            raise KeyboardInterrupt  # what no `except Exception` on the way takes for a failure

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        yield
    except KeyboardInterrupt:
        if not received:
            raise
        raise SystemExit(128 + received[0]) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def tied_to_this(command: Sequence[str]) -> list[str]:
    """Give a command whose process the kernel ends when this one is killed.

    To be started by the thread that waits for it: what it is tied to is that thread.
    """
    program = shutil.which(command[0]) or command[0]
    return [*tied.to_this(signal.SIGTERM), program, *command[1:]]


def kill_session(process: subprocess.Popen[Any]) -> None:
    """Kill a process that was started in a session of its own, and whatever it has started there.

    That it has ended itself, and left them, changes nothing.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
