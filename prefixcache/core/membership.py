"""The verbs of coming and going: attach, renew, detach."""

from __future__ import annotations

from math import inf

from prefixcache.core.desk import Desk
from prefixcache.core.leases import Worker
from prefixcache.errors import NotFound
from prefixcache.types import Ended, Namespace, WorkerId


class Membership:
    """Who may ask at the desk, and since when nobody has heard of whom."""

    _desk: Desk

    def attach(
        self,
        worker: WorkerId,
        namespace: Namespace,
        *,
        name: str = "",
        first_lease: int = 1,
        now: float,
    ) -> None:
        """Let a worker use a namespace.  Idempotent.

        Args:
            worker: Who.
            namespace: What.
            name: How a new worker is called where people look; by default by its number.
            first_lease: Number of a new worker's first lease.  One that nobody expects keeps a
                worker from taking another's lease for its own.
            now: The time.

        Raises:
            PoolExhausted: there are too many namespaces, and none that only caches.
            NotFound: it was detached, and its leases have not all ended yet.
        """
        desk = self._desk
        members = desk.leases.workers
        if worker in desk.leases.leaving:
            raise NotFound("this worker is leaving: attach again when its leases have ended")
        desk.make_way(namespace)
        desk.root(namespace)
        if worker not in members:
            members[worker] = Worker(worker, name or str(worker), first_lease=first_lease)
        if namespace not in members[worker].namespaces:
            members[worker].namespaces.add(namespace)
            desk.spaces.join(namespace)
        self.renew(worker, now=now)

    def quit(self, worker: WorkerId, namespace: Namespace) -> None:
        """End a worker's use of one namespace; its leases and waits there go on.  Idempotent.

        O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        spaces = self._desk.leases.worker(worker).namespaces
        if namespace in spaces:
            spaces.discard(namespace)
            self._desk.spaces.leave(namespace)

    def renew(self, worker: WorkerId, *, now: float) -> None:
        """Take a sign of life: all leases of the worker live for another TTL.  O(1).

        Raises:
            NotFound: the worker is not attached.
        """
        self._desk.leases.worker(worker).renewed_until = now + self._desk.leases.ttl_s

    def detach(self, worker: WorkerId, *, now: float, gone: bool, most: int | None = None) -> Ended:
        """End a worker's session and its leases; its waiting requests are dropped.

        Args:
            worker: Who leaves.
            now: The time.
            gone: Whether it can no longer write to the pool (it said goodbye, or its process is
                known to be dead).  If not, the blocks it could write to are quarantined until
                `worker_gone`.
            most: How many leases are ended in this step, by default all.  The worker may do nothing
                any more, and `expire` ends the others.

        Returns:
            What was ended in this step.

        Raises:
            NotFound: the worker is not attached.
        """
        desk = self._desk
        member = desk.leases.worker(worker)
        for ticket in desk.room.of(worker):
            desk.room.leave(ticket)
        desk.leases.begin_to_leave(member, gone=gone)
        limit = inf if most is None else most
        ended = Ended.total(desk.end_leaving(now, limit))
        desk.serve(now, inf if most is None else None)
        return ended

    def is_leaving(self, worker: WorkerId | None = None) -> bool:
        """Whether leases of a worker (or of any) that was detached are still out.  O(1)."""
        leaving = self._desk.leases.leaving
        return bool(leaving) if worker is None else worker in leaving

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """Take note that a worker's process has ended: free all it held, and its quarantine.

        Of one that is leaving, the leases that have still to be ended follow.

        Returns:
            How many blocks became free.
        """
        member = self._desk.leases.workers.get(worker)
        if member is not None and member.is_gone is None:
            return self.detach(worker, now=now, gone=True).num_freed
        if member is not None:
            member.is_gone = True
        freed = self._desk.holdings.absolve(worker)
        self._desk.serve(now)
        return freed
