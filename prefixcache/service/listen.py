"""Where the service listens: who may reach it is decided here.

A Unix socket is 0600 in a folder of 0700: only this user.  TCP is for the loopback device: without
authentication, any other address would lend the pool to strangers, so it is refused.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import stat
from collections.abc import Iterable
from pathlib import Path

import grpc.aio

from prefixcache.client.address import Address
from prefixcache.errors import InvalidRequest, ServiceUnavailable


class Listener:
    """The addresses of one service.  Holds a lock per Unix socket for as long as it lives."""

    def __init__(self, targets: Iterable[str]) -> None:
        self._addresses = [Address.parse(target) for target in targets]
        self._locks: list[int] = []
        self._bound: list[Path] = []
        for address in self._addresses:
            if not address.path:
                check_loopback(address)

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
                port = server.add_insecure_port(str(address))
            except RuntimeError as error:
                raise ServiceUnavailable(f"cannot listen at {address}: {error}") from None
            finally:
                os.umask(mask)
            if address.path:
                self._bound.append(Path(address.path))
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

    def _prepare(self, address: Address) -> None:
        path = Path(address.path)
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            address.refuse_strangers()
            lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise ServiceUnavailable(f"cannot listen at {address}: {error.strerror}") from None
        self._locks.append(lock)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise _taken(address) from None
        try:
            mode = path.lstat().st_mode
        except FileNotFoundError:
            return
        if not stat.S_ISSOCK(mode):
            raise InvalidRequest(f"{path} is no socket; choose another --listen or remove it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(path))
            except OSError:
                path.unlink(missing_ok=True)  # its service died without removing it
                return
        raise _taken(address)


def _taken(address: Address) -> ServiceUnavailable:
    return ServiceUnavailable(
        f"a service is listening at {address} already; use it, stop it, or choose another --listen"
    )


def check_loopback(address: Address) -> None:
    """Refuse a TCP address that others than this machine can reach.

    Raises:
        InvalidRequest: it is one.
    """
    host = "127.0.0.1" if address.host == "localhost" else address.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise InvalidRequest(
            f"refused to listen at {address}: whoever reaches the service may use its pool, and "
            "there is no authentication. Listen on unix:PATH or 127.0.0.1:PORT."
        )
