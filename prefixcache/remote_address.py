"""The address of a store that several machines share.

| address | store |
|---|---|
| `valkey+unix:///run/valkey.sock` | Valkey, or Redis, of this machine |
| `valkey://host:port` | one that other machines have, too |
| `valkeys://host:port` | the same by TLS |
| `mooncake://host:port` | Mooncake Store, by its master |
"""

from __future__ import annotations

import ipaddress
import os
from typing import Final, NamedTuple
from urllib.parse import SplitResult, unquote, urlsplit

from prefixcache.texts import is_plain

MOONCAKE: Final = "mooncake"
_UNIX: Final = "valkey+unix"
_TLS: Final = "valkeys"
_PORTS: Final = {"valkey": 6379, _TLS: 6379, MOONCAKE: 50051}
_LONGEST_PATH: Final = 107
"""Bytes of the name of a socket."""


class RemoteAddress(NamedTuple):
    """Which store, and where."""

    scheme: str
    host: str = ""
    port: int = 0
    path: str = ""
    """Of a socket; else empty."""
    user: str = ""
    password: str = ""

    @property
    def is_tls(self) -> bool:
        """Whether who is reached there shows a certificate, and nobody reads what is said."""
        return self.scheme == _TLS

    @property
    def is_near(self) -> bool:
        """Whether nobody but this machine's users can listen on the way there."""
        if self.path:
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    def __str__(self) -> str:
        """Write it without what is secret.

        >>> print(parse_remote("valkey://me:secret@10.0.0.7:6379"))
        valkey://10.0.0.7:6379
        """
        if self.path:
            return f"{self.scheme}://{self.path}"
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.scheme}://{host}:{self.port}"


def parse_remote(text: str | RemoteAddress | None) -> RemoteAddress | None:
    """Read the address of a store.

    What nobody could ever connect to is refused here: later it would be a store that fails.

    Raises:
        ValueError: it is none that is known; the message never repeats what may be a password.

    >>> parse_remote("valkey+unix:///run/valkey.sock").path
    '/run/valkey.sock'
    """
    if text is None or isinstance(text, RemoteAddress):
        return text
    try:
        return _parse(text)
    except ValueError as error:
        known = (
            "write valkey://HOST:PORT, valkeys://HOST:PORT for TLS, valkey+unix:///PATH or "
            "mooncake://MASTER:PORT"
        )
        raise ValueError(f"{error}; {known}") from None


def _parse(text: str) -> RemoteAddress:
    if not is_plain(text):  # some of it would be left out in silence
        raise ValueError("an address is made of printable characters only; write others as %XX")
    parts = _split(text)
    scheme = parts.scheme
    if scheme != _UNIX and scheme not in _PORTS:
        given = f"'{scheme}'" if scheme else "what was given"  # which may begin with anything
        raise ValueError(f"{given} is no kind of store that is known")
    if parts.query or parts.fragment:
        raise ValueError(f"{scheme}://…: nothing may follow the address")
    user, password = _decoded(parts.username, "user"), _decoded(parts.password, "password")
    if scheme == MOONCAKE and (user or password):
        raise ValueError("mooncake: has neither users nor passwords")
    if user and not password:
        raise ValueError(f"{scheme}: a user is named, and no password")
    if scheme == _UNIX:
        if parts.hostname or len(parts.path) < 2:
            raise ValueError(f"{_UNIX}: names no absolute path of a socket")
        path = _decoded(parts.path, "path")
        if "\0" in path or len(os.fsencode(path)) > _LONGEST_PATH:
            raise ValueError(f"{_UNIX}: no socket has that path; {_LONGEST_PATH} bytes at most")
        return RemoteAddress(scheme, path=path, user=user, password=password)
    if not parts.hostname or parts.path not in ("", "/"):
        raise ValueError(f"{scheme}: names no host")
    return RemoteAddress(scheme, _host(parts.hostname), _port(parts), user=user, password=password)


def _split(text: str) -> SplitResult:
    try:
        return urlsplit(text)
    except ValueError as error:
        raise ValueError(f"cannot read the store's address: {error}") from None


def _port(parts: SplitResult) -> int:
    """Give the port; where none is named, that of its kind of store."""
    try:
        port = parts.port
    except ValueError:
        port = 0
    if port == 0:
        raise ValueError(f"cannot read the store's address: {parts.scheme}: ports are 1 to 65535")
    return _PORTS[parts.scheme] if port is None else port


def _host(name: str) -> str:
    """See that a name, or an address, can be looked up."""
    try:
        name.encode("idna")
    except UnicodeError:
        name = ""
    if not name or " " in name:
        raise ValueError("cannot read the store's address: no host has that name")
    return name


def _decoded(text: str | None, what: str) -> str:
    """Give what was written as %XX where it has to be."""
    try:
        return unquote(text or "", errors="strict")
    except UnicodeDecodeError:
        raise ValueError(f"cannot read the store's address: its {what} is no UTF-8") from None
