"""Workers: who is attached, and how each one's death is noticed.

```
attached ─┬─ detach ──────────────────────────────► its blocks are free
          ├─ stream ends, process lives ─► lost ─┬─ pidfd fires, or its client says so ─► free
          │                                      └─ unwatched, and quarantine is over ──► free
          └─ pidfd fires ─────────────────────────► free
```
The blocks that a lost worker could write to are quarantined: its process may still be writing.
"""

from __future__ import annotations

import asyncio
import itertools
import math
import os
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

import structlog

from prefixcache.client.address import this_host
from prefixcache.config import ServeSettings
from prefixcache.core.shares import Shares
from prefixcache.errors import CacheError, InvalidRequest, NotFound
from prefixcache.service.auth.identity import Identities, Identity
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import MOST_ENDS, Deliveries
from prefixcache.service.names import Names
from prefixcache.service.processes import Process, Processes, User
from prefixcache.service.worker import Worker, WorkerStatus
from prefixcache.types import Ended, WorkerId

MAX_NAME = 128
"""Characters of a worker's name."""

MAX_GROUP = 256
"""Workers of one group, those included that have ended and wait for others."""

_MOST_SILENT = 16
"""Workers that end in one go since nothing was heard of them."""
_MOST_REFUSED = 16
"""Requests that are refused in one go when the service ends."""
_PAUSE_S = 0.001
"""Between those and the next ones."""

_SHOWN_NAMESPACES = 4
"""Of a worker that has gone."""
_REMEMBERED = 64
"""Workers that are shown after they have gone."""

log = structlog.get_logger(__name__)


@dataclass(slots=True)
class Group:
    """Workers that write to each other's blocks."""

    writers: set[str] = field(default_factory=set)
    """Keys of those that may write."""
    outlived: list[Worker] = field(default_factory=list)
    """Those whose processes have ended, and whose blocks wait for the writers."""


@dataclass(frozen=True, slots=True)
class JointProgress:
    """What all attached workers tell of themselves, together."""

    in_hand: int
    untaken: int
    longest_stalled_s: float
    oldest_untaken_s: float


class Workers:
    """All workers of the service, attached and lost."""

    def __init__(self, backing: Backing, deliveries: Deliveries, settings: ServeSettings) -> None:
        self._backing = backing
        self._deliveries = deliveries
        self._settings = settings
        self._host = this_host()
        self._processes = Processes()
        self.shares = Shares(settings.max_workers, "--max-workers", "workers, lost ones included,")
        """Whose the workers are that are attached, or lost with blocks that they may write to."""
        self.on_leave: Callable[[Worker], object] = lambda worker: None
        """Hears of each worker that leaves, however it does."""
        self._attached: dict[str, Worker] = {}
        self.num_streams = 0
        """How many of the attached ones hold a session open."""
        self._lost: dict[str, Worker] = {}
        self._groups: dict[tuple[Identity, str], Group] = {}
        self._leaving: list[Worker] = []
        """Of the lost ones, those whose leases have not all ended yet."""
        deliveries.on_end = self._have_ended
        self._names = Names()
        self._next = itertools.count(1)  # 0 is `FORMER`
        self._past: deque[Worker] = deque(maxlen=_REMEMBERED)
        self._patrol: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._attached)

    def set_own_process(self, own: Callable[[], int]) -> None:
        """Say who gives the process of the service's own that maps the pool; 0: there is none."""
        self._processes.own = own

    def roll(self) -> list[Worker]:
        """Give the workers that are attached, and the last ones that were.  O(workers)."""
        return [*self._attached.values(), *self._past]

    def status(self, worker: Worker, asker: Identity, now: float) -> WorkerStatus:
        """Tell of a worker what somebody is shown who may see it.  O(1)."""
        cache = self._backing.cache
        since = None if cache is None else cache.uncommitted_since(worker.id)
        return WorkerStatus(
            worker=worker.name_for(asker),
            pid=worker.pid,
            state=worker.state,
            since_s=now - worker.since,
            leases=0 if cache is None else cache.count_leases(worker.id),
            has_session=worker.hang_up is not None,
            in_hand=worker.in_hand,
            stalled_s=worker.stalled_s(now),
            untaken=worker.untaken,
            oldest_untaken_s=worker.oldest_untaken_s(now),
            uncommitted_s=0.0 if since is None else now - max(since, worker.committed_at),
        )

    def progress(self) -> JointProgress:
        """Sum up what the attached workers tell of themselves.  O(workers)."""
        now, workers = time.monotonic(), self._attached.values()
        return JointProgress(
            in_hand=sum(one.in_hand for one in workers),
            untaken=sum(one.untaken for one in workers),
            longest_stalled_s=max((one.stalled_s(now) for one in workers), default=0.0),
            oldest_untaken_s=max((one.oldest_untaken_s(now) for one in workers), default=0.0),
        )

    def find(self, key: str, identity: Identity) -> Worker:
        """Give the worker that a unary request speaks for, and note its sign of life.

        Raises:
            NotFound: no worker of this identity has that key.
        """
        worker = self._attached.get(key)
        if worker is None or worker.identity != identity:
            raise NotFound("no worker has this key: attach first, or again after a longer silence")
        worker.seen_at = time.monotonic()
        return worker

    def check_new(self, identity: Identity, name: str, group: str) -> None:
        """Check that a worker of an identity can be registered.  Changes nothing.

        Raises:
            InvalidRequest: the name cannot be shown, or the group is full.
            PoolExhausted: there are too many workers.
        """
        if len(name) > MAX_NAME:
            raise InvalidRequest(
                f"a worker's name has up to {MAX_NAME} characters, this has {len(name)}"
            )
        members = self._groups.get((identity, group))
        if members and len(members.writers) + len(members.outlived) >= MAX_GROUP:
            raise InvalidRequest(f"this group has {MAX_GROUP} workers, and takes no more")
        self.shares.check(identity.tenant or "")

    def join(
        self,
        identity: Identity,
        name: str,
        pid: int,
        host: str,
        hang_up: Callable[[], object] | None,
        group: str = "",
    ) -> Worker:
        """Register a new worker, and watch its process where that can be done.

        Args:
            identity: who it is.
            name: what it wishes to be called.
            pid: its process, as it says.
            host: where that counts.
            hang_up: ends its stream; None for one without.
            group: of workers of this identity that write to each other's blocks; "" for none.

        Raises:
            PoolExhausted: there are too many workers.
        """
        self.shares.take(identity.tenant or "")
        shown = self._names.take(identity.tenant or "", name)
        key = secrets.token_hex(16)
        if group:
            self._groups.setdefault((identity, group), Group()).writers.add(key)
        number = WorkerId(next(self._next))
        worker = Worker(number, shown, key, hang_up, identity, pid=pid, group=group)
        worker.seen_at = worker.since = time.monotonic()
        if pid and host and host == self._host:
            self._watch(worker)
        self._attached[worker.key] = worker
        self.num_streams += hang_up is not None
        if hang_up is None and self._patrol is None:
            self._set_patrol()
        log.info("worker attached", worker=shown, pid=pid, watched=worker.process is not None)
        return worker

    def leave(self, worker: Worker, *, gone: bool) -> Ended:
        """End a worker.  Idempotent.

        Args:
            worker: who.
            gone: whether it can no longer write: it said so, or its process is known to be dead.
        """
        process = worker.process
        dead = process is not None and process.is_dead
        survived = worker.is_outlived or (process is not None and process.is_survived)
        if dead and not gone and not survived:
            return Ended()  # who watches it is looking for what it forked, and says at once
        if self._attached.pop(worker.key, None) is None:
            return Ended()
        self.num_streams -= worker.hang_up is not None
        cache, now = self._backing.cache, time.monotonic()
        ended = Ended()
        worker.state = "died" if dead else "left" if gone else "lost"
        worker.since = now
        self._past.append(worker)
        self.on_leave(worker)
        tickets, worker.tickets = worker.tickets, {}
        for op, ticket in tickets.items():
            if op < 0:  # a call of its own, also with a session's key: no stream's end tells it
                self._deliveries.refuse(
                    ticket, NotFound(f"{worker.name} left while this call waited")
                )
            self._deliveries.leave(ticket)
        if cache is not None:
            ended = cache.detach(worker.id, now=now, gone=gone, most=MOST_ENDS)
            if gone:
                cache.worker_gone(worker.id, now=now)
        log.info(
            "worker left",
            worker=worker.name,
            known_to_be_gone=gone,
            leases=len(ended.leases),
            freed=ended.num_freed,
            quarantined=ended.num_quarantined,
            others_follow=cache is not None and cache.is_leaving(worker.id),
        )
        for one in list(worker.namespaces)[_SHOWN_NAMESPACES:]:
            worker.namespaces.leave(one)
        if gone or cache is None or not self._may_be_writing(worker):
            self._forget(worker)
        else:
            self._lost[worker.key] = worker
            if cache.is_leaving(worker.id):
                self._leaving.append(worker)
            if worker.process is None:  # a watched process is waited for, however long it hangs
                worker.forget = asyncio.get_running_loop().call_later(
                    self._settings.quarantine, self._stopped, worker, "quarantine time is over"
                )
        self._deliveries.settle()
        return ended

    def _may_be_writing(self, worker: Worker) -> bool:
        """Whether a worker holds blocks that it may still write to, or is about to."""
        cache = self._backing.cache
        assert cache is not None
        if worker.group and not worker.is_outlived:
            return True  # to the blocks of others
        return cache.is_leaving(worker.id) or cache.count_quarantined(worker.id) > 0

    def _have_ended(self) -> None:
        """Forget lost workers whose last leases have ended, and left nothing to wait for."""
        for worker in self._leaving:
            if worker.key in self._lost and not self._may_be_writing(worker):
                del self._lost[worker.key]
                self._forget(worker)
        cache = self._backing.cache
        assert cache is not None
        self._leaving = [one for one in self._leaving if cache.is_leaving(one.id)]

    def end_strangers(self, identities: Identities) -> None:
        """End workers without a stream who could not call again as they did last, in parts."""
        for worker in self._attached.values():
            if worker.hang_up is None and not _stands(worker, identities):
                worker.seen_at = -math.inf
        if self._patrol is not None:
            self._patrol.cancel()
            self._look_round()

    async def refuse_waiting(self, error: CacheError) -> None:
        """Answer every request that waits with an error, and give it up, in parts."""
        refused = 0
        for worker in tuple(self._attached.values()):
            for op in tuple(worker.tickets):
                if (ticket := worker.tickets.pop(op, None)) is None:
                    continue
                self._deliveries.refuse(ticket, error)
                if self._backing.cache is not None:
                    self._backing.cache.cancel(worker.id, ticket, now=time.monotonic())
                refused += 1
                if refused % _MOST_REFUSED == 0:
                    self._deliveries.settle()
                    await asyncio.sleep(0)

    def finished(self, keys: Iterable[str], identity: Identity) -> None:
        """Take the word of a client that lost workers of its own write to nothing any more.

        A key is of no use to whoever else has got hold of it.
        """
        who = identity.name, identity.tenant
        for key in keys:
            worker = self._lost.get(key)
            if worker is not None and (worker.identity.name, worker.identity.tenant) == who:
                self._stopped(worker, "its client says that it has stopped")

    def close(self) -> None:
        """Stop watching; nobody's blocks change."""
        self._groups.clear()
        for worker in (*self._attached.values(), *self._lost.values()):
            self._forget(worker)
        self._processes.close()
        if self._patrol is not None:
            self._patrol.cancel()

    def _watch(self, worker: Worker) -> None:
        uid = worker.identity.uid
        user = User(partial(self._died, worker), partial(self._left_heirs, worker))
        found = self._processes.watch(
            worker.pid, os.getuid() if uid is None else uid, worker.key, user, self._pool_path
        )
        if isinstance(found, Process):
            worker.process = found
        else:
            log.warning("cannot watch a worker's process", worker=worker.name, cause=found)

    def _pool_path(self) -> str:
        """Give the file that a process must map to write to a block; "" if there is none."""
        handle = self._backing.handle
        return handle.name if handle is not None and handle.kind == "shm" else ""

    def _died(self, worker: Worker) -> None:
        """Free all that a worker held: its process has ended, and nothing goes on.

        If others of its group may write on, it waits for them.
        """
        if worker.key not in self._attached:
            self._stopped(worker, "its process ended")
            return
        group = self._stop_writing(worker)
        worker.is_outlived = group is not None
        self.leave(worker, gone=group is None)
        if worker.hang_up is not None:
            worker.hang_up()
        if group is not None:
            self._wait_for(group, worker)

    def _stopped(self, worker: Worker, why: str) -> None:
        """Take it that a lost worker writes no more: free its blocks, once its group does not, too.

        It speaks for its own process, and not for the others that write to its blocks.
        """
        if worker.key not in self._lost or worker.is_outlived:
            return
        group = self._stop_writing(worker)
        if group is None:
            self._absolve(worker, why)
            return
        worker.is_outlived = True
        if not self._may_be_writing(worker):
            del self._lost[worker.key]
            self._forget(worker)
        self._wait_for(group, worker)

    def _wait_for(self, group: Group, worker: Worker) -> None:
        """Keep a worker's blocks, if it left any, until its group has ended.  O(group)."""
        group.outlived = [one for one in (*group.outlived, worker) if one.key in self._lost]

    def _stop_writing(self, worker: Worker) -> Group | None:
        """Note that a worker writes no more; absolve its group if it was the last.  Idempotent.

        Returns:
            Its group, if others of it may write on.
        """
        name = worker.identity, worker.group
        group = self._groups.get(name)
        if group is None:
            return None
        group.writers.discard(worker.key)
        if group.writers:
            return group
        del self._groups[name]
        for one in group.outlived:
            if one.key in self._lost:
                self._absolve(one, "all processes of its group ended")
        return None

    def _left_heirs(self, worker: Worker) -> None:
        """End a worker whose process has ended; its blocks wait for what that has forked."""
        if worker.key in self._attached:
            self.leave(worker, gone=False)
            if worker.hang_up is not None:
                worker.hang_up()

    def _unwatch(self, worker: Worker) -> None:
        if worker.process is not None:
            self._processes.leave(worker.process, worker.key)
            worker.process = None

    def _absolve(self, worker: Worker, why: str) -> None:
        freed = 0
        if self._backing.cache is not None:
            freed = self._backing.cache.worker_gone(worker.id, now=time.monotonic())
        if freed:
            log.info("quarantine ended", worker=worker.name, freed=freed, why=why)
        if self._lost.pop(worker.key, None) is not None:
            worker.state, worker.since = "died", time.monotonic()
            self._forget(worker)
        self._deliveries.settle()

    def _forget(self, worker: Worker) -> None:
        """Let go of all that was kept for a worker.  Once."""
        self._stop_writing(worker)
        self._names.free(worker.tenant, worker.name)
        self.shares.give(worker.tenant)
        if worker.forget is not None:
            worker.forget.cancel()
            worker.forget = None
        self._unwatch(worker)

    def _set_patrol(self) -> None:
        loop = asyncio.get_running_loop()
        self._patrol = loop.call_later(self._settings.ttl / 4, self._look_round)

    def _look_round(self) -> None:
        """End workers without a stream that gave no sign of life for a whole ttl."""
        self._patrol = None
        silent_since = time.monotonic() - self._settings.ttl
        unary = [worker for worker in self._attached.values() if worker.hang_up is None]
        silent = [worker for worker in unary if worker.seen_at < silent_since]
        for worker in silent[:_MOST_SILENT]:
            self.leave(worker, gone=False)
        if len(silent) > _MOST_SILENT:
            self._patrol = asyncio.get_running_loop().call_later(_PAUSE_S, self._look_round)
        elif unary:
            self._set_patrol()


def _stands(worker: Worker, identities: Identities) -> bool:
    if worker.proof is None:
        return identities.has(worker.identity)
    return identities.of_former(worker.proof) == worker.identity
