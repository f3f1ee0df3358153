"""Supervisor: keeps one process of the service's own at work.  Starts it, watches it, replaces it.

```
start ─► starting ─► ready ─► … ─► has ended ─► a pause, 1 s, 2 s, … 30 s ─► again
            │          │               ▲
            └──────────┴─ is silent ─► killed
```
It ends with the service, however that ends, from its first moment on (`tied.py`).

What such a process had in hand may be taken back only once it is known to have ended: until then
it might write.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Final

import structlog

from prefixcache import tied
from prefixcache.service.failures import Failures
from prefixcache.texts import many

SILENT_S: Final = 10.0
FIRST_PAUSE_S: Final = 1.0
LONGEST_PAUSE_S: Final = 30.0
_START_S: Final = 60.0
"""How long a process may take to be ready, on whatever machine."""

log = structlog.get_logger(__name__)


class Supervisor:
    """One process after the other, all of the same program.

    Args:
        part: How it is called among the parts that have ended.
        module: The program: a module of ours, which is given the numbers of its descriptors.
        failures: Told of a process that has ended, and that there is one again.
        in_hand_since: Since when it has had something in hand without an answer; None: it has
            nothing.
        ended: Called when a process has ended.
        again: Called when the next one may be started.
        silent_s: How long it may have something in hand.
        first_pause_s: Between one that has ended and the next; doubled each time.
    """

    def __init__(
        self,
        part: str,
        module: str,
        failures: Failures,
        *,
        in_hand_since: Callable[[], float | None],
        ended: Callable[[], None],
        again: Callable[[], None],
        silent_s: float = SILENT_S,
        first_pause_s: float = FIRST_PAUSE_S,
    ) -> None:
        self._part = part
        self._module = module
        self._failures = failures
        self._in_hand_since = in_hand_since
        self._on_end = ended
        self._again = again
        self._silent_s = silent_s
        self._first_pause_s = self._pause_s = first_pause_s
        self._process: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._started_at = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False
        self.is_ready = False
        """Whether the present process has said that it is."""
        self.num_ended = 0
        """Processes that have ended before the service."""

    @property
    def pid(self) -> int:
        """The present process; 0 if there is none."""
        return 0 if self._process is None else self._process.pid

    def start(
        self, lines: Sequence[socket.SocketKind], files: Sequence[int] = ()
    ) -> list[socket.socket]:
        """Start a process, unless there is one or its time has not come.

        Args:
            lines: Kinds of the sockets that lead to it.
            files: Further descriptors that it inherits under their numbers.

        Returns:
            Our ends of the lines; none where no process was started.
        """
        if self._process is not None or self._timer is not None or self._is_closed:
            return []
        ours: list[socket.socket] = []
        theirs: list[socket.socket] = []
        try:
            for kind in lines:
                pair = socket.socketpair(socket.AF_UNIX, kind)
                ours.append(pair[0])
                theirs.append(pair[1])
            numbers = [one.fileno() for one in theirs]
            module = [sys.executable, "-m", self._module, *map(str, numbers)]
            self._process = subprocess.Popen(  # noqa: S603 - this interpreter
                [*tied.to_this(signal.SIGKILL), *module],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # some store's library writes there
                pass_fds=[*numbers, *files],
                start_new_session=True,  # Ctrl-C is for the service
            )
            self._pidfd = os.pidfd_open(self._process.pid)
        except OSError as error:  # no descriptor is left, or no process
            for one in ours:
                one.close()
            self._kill_now()
            self._start_later(f"cannot be started: {error}")
            return []
        finally:
            for one in theirs:
                one.close()
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)
        self._started_at = time.monotonic()
        self._watch()
        return ours

    def ready(self) -> None:
        """Take note that the process is at work: its start counts as a success."""
        log.info(f"{self._part} at work", pid=self.pid)
        self.is_ready = True
        self._pause_s = self._first_pause_s
        self._failures.forget(self._part)

    def kill(self, why: str) -> None:
        """Have the process end; `ended` follows when it has.  Nothing, if there is none."""
        if self._process is not None:
            log.error(f"{self._part} killed", pid=self.pid, why=why)
            self._process.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """End the process, and start no other.  Idempotent."""
        self._is_closed = True
        self._let_go()
        self._kill_now()  # it has nothing to put in order

    def _watch(self) -> None:
        """Look now and then whether the process still answers."""
        self._timer = asyncio.get_running_loop().call_later(self._silent_s / 4, self._look)

    def _look(self) -> None:
        if self.is_ready:
            since, silent_s = self._in_hand_since(), self._silent_s
        else:
            since, silent_s = self._started_at, max(self._silent_s, _START_S)
        if since is not None and time.monotonic() - since > silent_s:
            self.kill(f"has not answered for {silent_s:g} s")
        self._watch()

    def _ended(self) -> None:
        process, self._process = self._process, None
        self._let_go()
        code = 0 if process is None else process.wait()
        self.num_ended += 1
        self._start_later(f"has ended with {code}")
        self._on_end()

    def _start_later(self, why: str) -> None:
        pause_s = self._pause_s
        self._pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        why += f" ({many(self.num_ended, 'time')}); the next one comes after {pause_s:g} s"
        self._failures.tell(self._part, OSError(why))
        self._timer = asyncio.get_running_loop().call_later(pause_s, self._start_again)

    def _start_again(self) -> None:
        self._timer = None
        self._again()

    def _let_go(self) -> None:
        """Watch the process no longer."""
        self.is_ready = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _kill_now(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
