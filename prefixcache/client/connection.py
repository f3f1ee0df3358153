"""What both clients know of their connection: all but the sending.

A client belongs to the process that made it.  gRPC's threads and the service's view of a worker do
not come through a fork, so a copy of it in another process refuses every call, and closing that
copy only forgets it: the parent's sessions are not touched.
"""

from __future__ import annotations

import os
import threading
from typing import Any, NoReturn, Protocol

from prefixcache.client import codec
from prefixcache.client.address import Address, this_host
from prefixcache.client.credentials import Access
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.pool import check_block_size
from prefixcache.types import Layout, Namespace
from prefixcache.v1 import prefixcache_pb2 as pb


class OpenedSession(Protocol):
    """What a connection needs to know of its sessions."""

    key: str

    @property
    def is_spent(self) -> bool:
        """Whether it is lost, and none of its leases may be in use."""
        ...


def refuse_pickle(self: object, protocol: Any) -> NoReturn:
    """Refuse to pickle or copy what belongs to one connection of one process.

    Raises:
        InvalidRequest: always.
    """
    raise InvalidRequest(
        f"a {type(self).__name__} cannot be pickled or copied: it belongs to one connection of one "
        "process. Connect in the other process"
    )


_MOST_FINISHED = 1024
"""Lost sessions that one attach speaks for; the next one speaks for others."""


class Connection:
    """One client's connection: where to, for whom, and which of its sessions came to nothing.

    Attributes:
        address: the service's.
        timeout_s: how long any call may go unanswered.
        metadata: what goes with every call.
        finished: keys of lost sessions that nothing writes for any more; attach passes them on.
    """

    channel: Any

    def __init__(self, address: Address, timeout_s: float, access: Access) -> None:
        self.address = address
        self.timeout_s = check_timeout(timeout_s)
        self.metadata = access.metadata
        self.finished: list[str] = []
        self._sessions: list[Any] = []
        self._closed = False
        self._pid = os.getpid()

    @property
    def is_inherited(self) -> bool:
        """Whether this object came through a fork: the connection is the parent's."""
        return os.getpid() != self._pid

    def guard(self) -> None:
        """Refuse a call that cannot be made.

        Raises:
            InvalidRequest: this process has the client by a fork.
            ServiceUnavailable: the client is closed.
        """
        if self.is_inherited:
            raise InvalidRequest(
                f"this client belongs to process {self._pid} and came through fork: connect in "
                "this process"
            )
        if self._closed:
            raise ServiceUnavailable("this client is closed: connect again")

    def attach_request(
        self,
        namespace: Namespace,
        layout: Layout,
        block_size: int | None,
        name: str,
        group: str = "",
    ) -> pb.AttachRequest:
        """Build an attach.  It passes on the keys of lost sessions whose leases nobody uses.

        Raises:
            InvalidRequest: a word or a number that no message can hold.
        """
        for session in [session for session in self._sessions if session.is_spent]:
            self.pass_on(session)
            self.drop(session)
        with codec.no_foreign_errors("attach"):
            request = pb.AttachRequest(
                name=name,
                pid=os.getpid(),
                host=this_host(),
                finished=self.finished[:_MOST_FINISHED],
                group=group,
            )
            codec.write_namespace(namespace, request.namespace)
            codec.write_layout(layout, request.layout)
            if block_size is not None:
                request.block_size = check_block_size(block_size)
        return request

    def attached(self, session: OpenedSession, request: pb.AttachRequest) -> None:
        """Note a new session, and that the service has heard of those that are finished."""
        told = set(request.finished)
        self.finished[:] = [key for key in self.finished if key not in told]
        self._sessions.append(session)

    def pass_on(self, session: OpenedSession) -> None:
        """Let the next attach say that nothing writes to the blocks of a lost session any more."""
        key, session.key = session.key, ""
        if key:
            self.finished.append(key)

    def drop(self, session: OpenedSession) -> None:
        """Forget a session that is over."""
        self._sessions[:] = [other for other in self._sessions if other is not session]

    def __repr__(self) -> str:
        state = "closed, " if self._closed else ""
        return f"<{type(self).__name__} at {self.address}: {state}{len(self._sessions)} sessions>"

    __reduce_ex__ = refuse_pickle


def check_timeout(timeout_s: float) -> float:
    """Give a time limit back.

    Raises:
        InvalidRequest: it is no positive number of seconds.
    """
    if isinstance(timeout_s, int | float) and 0 < timeout_s <= threading.TIMEOUT_MAX:
        return float(timeout_s)
    raise InvalidRequest(
        f"timeout_s is {timeout_s!a:.60}; it must be a positive number of seconds, at most "
        f"{threading.TIMEOUT_MAX:.0f}"
    )
