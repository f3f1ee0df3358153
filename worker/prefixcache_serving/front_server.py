"""Where the front listens: on the loopback device, a Unix socket, or, with keys, on any interface.

A page of a stranger in somebody's browser can talk to the loopback device, too.  Without keys only
our own names are answered (a name that was made to resolve to 127.0.0.1 is none), and only JSON is
read, which a browser does not send to another origin without asking.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Final

from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from prefixcache.client.address import Address
from prefixcache.client.credentials import is_loopback
from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.private_files import check_path, clear_socket
from prefixcache.service.http.embedded_server import EmbeddedServer, own_names
from prefixcache.service.http.http_connections import Bound
from prefixcache_serving.refusals import Refused

MOST_CONNECTIONS: Final = 512
STALL_S: Final = 600.0
"""How long a stream may wait for its reader; its answer holds nothing meanwhile."""
_BACKLOG: Final = 256
_LAST_WORDS_S: Final = 2


def read_address(target: str, *, has_keys: bool) -> Address:
    """Read where the front is to listen.

    Raises:
        InvalidRequest: it is no address, or others could reach it and nobody is asked for a key.
    """
    if target.isascii() and target.isdecimal():
        raise InvalidRequest(f"--http {target}: the host is missing; write 127.0.0.1:{target}")
    try:
        address = Address.parse(f"127.0.0.1{target}" if target.startswith(":") else target)
    except InvalidRequest as error:
        raise InvalidRequest(f"--http: {error}") from None
    if not (address.path or has_keys or is_loopback(address.host)):
        raise InvalidRequest(
            f"--http {target}: other machines could reach it, and anybody could ask: give "
            f"--api-keys FILE, or listen at 127.0.0.1:{address.port}"
        )
    return address


class FrontServer:
    """Listens for one application.

    Args:
        address: where.
        has_keys: whether callers show who they are; if not, only our own names are answered.
    """

    def __init__(self, address: Address, *, has_keys: bool) -> None:
        self.address = address
        self._has_keys = has_keys
        self._end: Callable[[], None] = lambda: None
        self._bound = Bound(MOST_CONNECTIONS, only_kept_stay=True)
        self._server: EmbeddedServer | None = None
        self._socket: socket.socket | None = None

    def bind(self) -> str:
        """Take the address; give what clients use as their base URL.

        Raises:
            ServiceUnavailable: it cannot be had.
            InvalidRequest: something that is no socket of ours is in the way.
        """
        address = self.address
        try:
            self._socket = _unix(address) if address.path else _tcp(address)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise ServiceUnavailable(
                    f"somebody listens at {address} already: give another --http, "
                    f"{address.host}:0 takes any port that is free"
                ) from None
            why = os.strerror(error.errno) if error.errno else str(error)
            raise ServiceUnavailable(f"cannot listen for HTTP at {address}: {why}") from None
        if address.path:
            return str(address)
        port = int(self._socket.getsockname()[1])
        self.address = Address(host=address.host, port=port)
        return f"http://{self.address}/v1"

    async def start(self, app: ASGIApp, end: Callable[[], None] = lambda: None) -> None:
        """Begin to answer.

        Args:
            app: answers.
            end: is called when no more is to be answered; ends what would not end by itself.
        """
        self._end = end
        assert self._socket is not None
        if not (self._has_keys or self.address.path):
            app = _OwnNames(app, self.address.port)
        self._server = EmbeddedServer(
            app, self._bound, backlog=_BACKLOG, last_words_s=_LAST_WORDS_S, stall_s=STALL_S
        )
        self._server.begin(self._socket)

    async def close(self) -> None:
        """Stop answering.  Idempotent."""
        if self._server is not None:
            self._end()
            await self._server.close()
            self._server = None
        if self._socket is not None:
            self._socket.close()
            self._socket = None
            if self.address.path:
                Path(self.address.path).unlink(missing_ok=True)


class _OwnNames:
    """Answers only to the names of the loopback device."""

    def __init__(self, app: ASGIApp, port: int) -> None:
        self._app = app
        self._hosts = own_names(port)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] == "http":
            host = dict(scope["headers"]).get(b"host", b"").lower()
            if host not in self._hosts:
                told = Refused(
                    "this host name is not served here; without --api-keys only 127.0.0.1 and "
                    "localhost are",
                    status=421,
                )
                await JSONResponse(told.body, told.status)(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _tcp(address: Address) -> socket.socket:
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    return socket.create_server((address.host, address.port), family=family, backlog=_BACKLOG)


def _unix(address: Address) -> socket.socket:
    """Listen on a socket that only this user can open; one that a dead front left is removed."""
    path = Path(address.path)
    check_path(path.parent, "--http")
    clear_socket(path, "--http")
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    before = os.umask(0o177)
    try:
        listening.bind(str(path))
    except BaseException:
        listening.close()
        raise
    finally:
        os.umask(before)
    listening.listen(_BACKLOG)
    return listening
