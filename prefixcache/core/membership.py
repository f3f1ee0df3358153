"""The verbs of coming and going: attach, renew, detach."""

from __future__ import annotations

from prefixcache.core.desk import Desk
from prefixcache.core.leases import Worker
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
        """
        desk = self._desk
        desk.make_way(namespace)
        desk.root(namespace)
        members = desk.leases.workers
        if worker not in members:
            members[worker] = Worker(worker, name or str(worker), first_lease=first_lease)
        if namespace not in members[worker].namespaces:
            members[worker].namespaces.add(namespace)
            desk.spaces.join(namespace)
        self.renew(worker, now=now)

    def quit(self, worker: WorkerId, namespace: Namespace) -> None:
        """End a worker's use of one namespace; its leases there go on.  O(1).  Idempotent.

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

    def detach(self, worker: WorkerId, *, now: float, gone: bool) -> Ended:
        """End a worker's session and its leases; its waiting requests are dropped.

        Args:
            worker: Who leaves.
            now: The time.
            gone: Whether it can no longer write to the pool (it said goodbye, or its process is
                known to be dead).  If not, the blocks it could write to are quarantined until
                `worker_gone`.

        Raises:
            NotFound: the worker is not attached.
        """
        member = self._desk.leases.worker(worker)
        for ticket in [t for t in self._desk.room.tickets.values() if t.request.worker == worker]:
            self._desk.room.leave(ticket)
        leases = list(member.leases.values())
        ended = Ended.total([self._desk.end(lease, now, writes_on=not gone) for lease in leases])
        del self._desk.leases.workers[worker]
        for namespace in member.namespaces:
            self._desk.spaces.leave(namespace)
        if gone:
            ended += Ended(num_freed=self._desk.holdings.absolve(worker))
        self._desk.serve_line(now)
        return ended

    def worker_gone(self, worker: WorkerId, *, now: float) -> int:
        """Take note that a worker's process has ended: free all it held, and its quarantine.

        Returns:
            How many blocks became free.
        """
        if worker in self._desk.leases.workers:
            return self.detach(worker, now=now, gone=True).num_freed
        freed = self._desk.holdings.absolve(worker)
        self._desk.serve_line(now)
        return freed
