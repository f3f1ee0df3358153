"""Where the service listens: who may reach it is decided here.

A Unix socket is 0600 in a folder of 0700: only this user, or the one user it was given to.  TCP is
for the loopback device; any other address is refused unless it speaks TLS and knows its callers.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from pathlib import Path

import grpc.aio

from prefixcache.client.address import Address
from prefixcache.client.credentials import is_loopback
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.private_files import (
    check_path,
    clear_socket,
    make_private_folder,
    open_private,
)
from prefixcache.service.auth.certificates import Certificates


class Listener:
    """The addresses of one service.  Holds a lock per Unix socket for as long as it lives."""

    def __init__(
        self,
        targets: Iterable[str],
        *,
        certificates: Certificates | None = None,
        is_guarded: bool = False,
        owner: int | None = None,
    ) -> None:
        self._addresses = [Address.parse(target) for target in targets]
        self._certificates = certificates
        self._owner = owner
        self._locks: list[int] = []
        self._bound: list[Path] = []
        for address in self._addresses:
            if not address.path:
                _check_reach(address, has_tls=certificates is not None, is_guarded=is_guarded)

    @property
    def has_tcp(self) -> bool:
        """Whether one of the addresses is none of a Unix socket."""
        return any(not address.path for address in self._addresses)

    def claim(self) -> None:
        """Make sure that nobody else listens there; remove what a dead service left.

        Raises:
            ServiceUnavailable: another service listens there, or the system refuses it.
            InvalidRequest: something that is no socket is in the way.
        """
        for address in self._addresses:
            if address.path:
                self._prepare(address)

    def bind(self, server: grpc.aio.Server) -> list[str]:
        """Add all addresses to `server`; give them as people write them, with the real ports.

        Raises:
            ServiceUnavailable: the system refuses it.
        """
        bound = []
        for address in self._addresses:
            mask = os.umask(0o177)
            try:
                if address.path or self._certificates is None:
                    port = server.add_insecure_port(str(address))
                else:
                    credentials = self._certificates.credentials()
                    port = server.add_secure_port(str(address), credentials)
            except RuntimeError as error:
                raise ServiceUnavailable(f"cannot listen at {address}: {error}") from None
            finally:
                os.umask(mask)
            if address.path:
                self._bound.append(Path(address.path))
                self._give_away(Path(address.path))
                bound.append(str(address))
            else:
                bound.append(str(Address(host=address.host, port=port)))
        return bound

    def close(self) -> None:
        """Remove the sockets and drop the locks.  Idempotent."""
        for path in self._bound:
            path.unlink(missing_ok=True)
        self._bound.clear()
        for lock in self._locks:
            os.close(lock)
        self._locks.clear()

    def _give_away(self, path: Path) -> None:
        """Let a socket belong to its identity's user: from then on only that user can connect."""
        if self._owner is None or self._owner == os.getuid():
            return
        try:
            os.chown(path, self._owner, -1)
        except OSError as error:
            raise InvalidRequest(
                f"cannot give {path} to user {self._owner}: {error.strerror}. Only root may give a "
                "socket away: run the service as root, or as that user"
            ) from None

    def _prepare(self, address: Address) -> None:
        path = Path(address.path)
        try:
            check_path(path.parent, "--listen in")
            if not path.parent.exists():
                make_private_folder(path.parent, "--listen in")
            lock = open_private(Path(f"{path}.lock"), os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise ServiceUnavailable(f"cannot listen at {address}: {error.strerror}") from None
        self._locks.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(address) from None
        clear_socket(path, "--listen")


def _taken(address: Address) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"a service is listening at {address} already; use it, stop it, or choose another --listen"
    )


def _check_reach(address: Address, *, has_tls: bool, is_guarded: bool) -> None:
    if is_loopback(address.host) or (has_tls and is_guarded):
        return
    lacking = [] if has_tls else ["no TLS (--tls-cert, --tls-key)"]
    lacking += [] if is_guarded else ["no authentication (--identities)"]
    raise InvalidRequest(
        f"refused to listen at {address}: whoever reaches the service may use its pool, and there "
        f"is {' and '.join(lacking)}. Listen on unix:PATH or 127.0.0.1:PORT."
    )
