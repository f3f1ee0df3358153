"""Processes: which ones workers run in, when they end, and who else may write with their memory.

```
claimed pid ─ is it one that may have come in by that door? ─ no ─► nobody watches: time decides
     └ yes ─► one pidfd for all its workers ─ ends ─► does a process it forked still map the pool?
                                                        ├ no ──► none of its workers writes any more
                                                        └ yes ─► looked at again until there is none
```

A client says which process it is; gRPC does not show who is at the other end of a socket.  So what
it says is checked as far as it can be: the process lives, belongs to the user who may use that
socket, and is none that could never be a worker.  More is not asked for: a worker that does not map
the pool yet may do so after a pause of any length.  Who claims another process of the same user
waits for the end of that one, and what he left counts as held by him until then.

What a worker's process forked has its mapping, too, unless it was told not to pass it on (as
`prefixcache.map_pool` does).  Such a process is found by what it maps, its user, and that it is
younger; one that has attached itself is a worker of its own, and the porter is the service's.
"""

from __future__ import annotations

import asyncio
import os
import select
from collections import OrderedDict
from collections.abc import Callable, Collection
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

import structlog

T = TypeVar("T")

PF_KTHREAD: Final = 0x0020_0000
_LOOK_AGAIN_S: Final = 0.25
_KNOWN: Final = 4096
"""Processes that have attached, to be told from those that were forked."""

log = structlog.get_logger(__name__)


class Facts(NamedTuple):
    """What the kernel says of a process."""

    uid: int
    """Its real user."""
    started: int
    """In clock ticks since the machine's start: with the pid, a name that is never used twice."""
    flags: int


def facts(pid: int) -> Facts | None:
    """Ask the kernel about a process; None if there is none, or it must not be asked.  O(1)."""
    try:
        status = Path(f"/proc/{pid}/status").read_bytes()
        # The name in brackets may hold anything; the fields begin after the last one.
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        uid = int(status.partition(b"\nUid:")[2].split(None, 1)[0])
        return Facts(uid, int(fields[19]), int(fields[6]))
    except (OSError, ValueError, IndexError):
        return None


def maps(pid: int, path: str) -> bool | None:
    """Whether a process maps a file; None if it must not be asked.  O(its mappings): in a thread.

    The file may have been unlinked since: its mappings are as writable as before.
    """
    try:
        return os.fsencode(path) in Path(f"/proc/{pid}/maps").read_bytes()
    except ProcessLookupError:
        return False
    except FileNotFoundError:
        return False
    except OSError:
        return None


def heirs(
    pid: int, of: Facts, path: str, known: Collection[tuple[int, int]], own: int = 0
) -> list[int]:
    """Give the processes that may have been forked by one that has ended, and map its pool.

    O(processes of the machine): in a thread.

    Args:
        pid: The one that has ended.
        of: What was known of it.
        path: The pool's file.
        known: Processes that have attached themselves, by pid and start.
        own: One that the service has started, which maps the pool as well; 0: there is none.
    """
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal():
            continue
        if (other := int(folder.name)) in (pid, own, os.getpid()):
            continue
        one = facts(other)
        if one is None or one.uid != of.uid or one.started < of.started:
            continue
        if (other, one.started) not in known and maps(other, path):
            found.append(other)
    return found


class User(NamedTuple):
    """What a worker is told of its process."""

    gone: Callable[[], None]
    """Neither it nor what it forked can write any more."""
    survived: Callable[[], None]
    """It has ended, but what it forked may write on; `gone` follows when that has ended."""


class Process:
    """One process, in which any number of workers live, or lived and may write on."""

    __slots__ = ("_ended", "facts", "is_survived", "pid", "pidfd", "users")

    def __init__(self, pid: int, pidfd: int, what: Facts) -> None:
        self.pid = pid
        self.pidfd = pidfd
        self.facts = what
        self.users: dict[object, User] = {}
        self.is_survived = False
        """Whether it is known to have ended, and something that it forked to go on."""
        self._ended = False

    @property
    def name(self) -> tuple[int, int]:
        """What no other process is ever called: its pid and its start."""
        return (self.pid, self.facts.started)

    @property
    def is_dead(self) -> bool:
        """Whether it has ended; a pidfd is readable from then on."""
        if not self._ended:
            poll = select.poll()
            poll.register(self.pidfd, select.POLLIN)
            self._ended = bool(poll.poll(0))
        return self._ended


class Processes:
    """All processes that are watched: one descriptor each, closed with the last worker in it."""

    def __init__(self) -> None:
        self._watched: dict[tuple[int, int], Process] = {}
        self._known: OrderedDict[tuple[int, int], None] = OrderedDict()
        self._thread: ThreadPoolExecutor | None = None
        self._timers: set[asyncio.TimerHandle] = set()
        self.own: Callable[[], int] = int
        """Gives the process of the service's own that maps the pool, too: no worker, and no heir of
        one.  0: there is none."""

    def __len__(self) -> int:
        return len(self._watched)

    def watch(
        self, pid: int, uid: int, key: object, user: User, path: Callable[[], str]
    ) -> Process | str:
        """Watch a process for a worker, or say why that cannot be done.

        Args:
            pid: What the client says that it is.
            uid: The user who may use the door it came in by.
            key: For which worker; `leave` ends it.
            user: What that is told.
            path: Gives the pool's file, "" if there is none to be mapped.
        """
        if pid <= 1 or pid in (os.getpid(), self.own()):
            return f"process {pid} is no worker"
        try:
            pidfd = os.pidfd_open(pid)
        except (OSError, OverflowError) as error:
            return str(error)
        what = facts(pid)
        if what is None:
            os.close(pidfd)
            return f"process {pid} has ended"
        process = Process(pid, pidfd, what)
        why = ""
        if process.is_dead:
            why = f"process {pid} has ended"
        elif what.flags & PF_KTHREAD:
            why = f"process {pid} is the kernel's"
        elif what.uid != uid:
            why = f"process {pid} belongs to user {what.uid}, this door to user {uid}"
        found = self._watched.get(process.name)
        if why or found is not None:
            os.close(pidfd)
        if why:
            return why
        if found is not None:
            process = found
        else:
            self._watched[process.name] = process
            asyncio.get_running_loop().add_reader(pidfd, self._ended, process, path)
        self._known.pop(process.name, None)
        self._known[process.name] = None
        if len(self._known) > _KNOWN:
            self._known.popitem(last=False)
        process.users[key] = user
        return process

    def leave(self, process: Process, key: object) -> None:
        """Watch a process no longer for one of its workers; not at all, if it was the last."""
        process.users.pop(key, None)
        if not process.users and process.name in self._watched:
            del self._watched[process.name]
            asyncio.get_running_loop().remove_reader(process.pidfd)
            os.close(process.pidfd)

    def close(self) -> None:
        """Watch nobody any more."""
        for timer in self._timers:
            timer.cancel()
        for process in list(self._watched.values()):
            for key in list(process.users):
                self.leave(process, key)
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _ended(self, process: Process, path: Callable[[], str]) -> None:
        """Look for what a process that has ended left behind."""
        asyncio.get_running_loop().remove_reader(process.pidfd)
        self._look_for_heirs(process, path)

    def _look_for_heirs(self, process: Process, path: Callable[[], str], seen: int = 0) -> None:
        if not process.users:
            return
        if not (file := path()):
            self._tell(process)
            return
        known, own = frozenset(self._known), self.own()

        def answer(found: list[int]) -> None:
            if not found:
                self._tell(process)
                return
            if len(found) != seen:
                log.warning("what a dead worker forked still maps the pool", pids=found[:8])
            if not process.is_survived:
                process.is_survived = True
                for user in list(process.users.values()):
                    user.survived()
            loop = asyncio.get_running_loop()

            def again() -> None:
                self._timers.discard(timer)
                self._look_for_heirs(process, path, len(found))

            timer = loop.call_later(_LOOK_AGAIN_S, again)
            self._timers.add(timer)

        self._ask(lambda: heirs(process.pid, process.facts, file, known, own), answer)

    @staticmethod
    def _tell(process: Process) -> None:
        for user in list(process.users.values()):
            user.gone()

    def _ask(self, work: Callable[[], T], answer: Callable[[T], None]) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="processes")
        loop = asyncio.get_running_loop()

        def told(done: Future[T]) -> None:
            if not done.cancelled():
                with suppress(RuntimeError):  # the service has ended meanwhile: nobody waits
                    loop.call_soon_threadsafe(answer, done.result())

        self._thread.submit(work).add_done_callback(told)
