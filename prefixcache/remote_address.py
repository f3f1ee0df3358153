"""The address of a store that several machines share.

| address | store |
|---|---|
| `valkey+unix:///run/valkey.sock` | Valkey, or Redis, of this machine |
| `valkey://host:port` | one that other machines have, too |
| `mooncake://host:port` | Mooncake Store, by its master |
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Final, NamedTuple
from urllib.parse import unquote, urlsplit

MOONCAKE: Final = "mooncake"
_PORTS: Final = {"valkey": 6379, MOONCAKE: 50051}


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

    Raises:
        ValueError: it is none that is known.

    >>> parse_remote("valkey+unix:///run/valkey.sock").path
    '/run/valkey.sock'
    """
    if text is None or isinstance(text, RemoteAddress):
        return text
    known = "write valkey://HOST:PORT, valkey+unix:///PATH or mooncake://MASTER:PORT"
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise ValueError(f"cannot read the store's address: {error}; {known}") from None
    user, password = unquote(parts.username or ""), unquote(parts.password or "")
    if parts.query or parts.fragment:
        raise ValueError(f"{parts.scheme}://…: nothing may follow the address; {known}")
    if parts.scheme == "valkey+unix":
        if parts.hostname or not Path(parts.path).is_absolute() or len(parts.path) < 2:
            raise ValueError(f"valkey+unix: names no absolute path of a socket; {known}")
        return RemoteAddress("valkey+unix", path=unquote(parts.path), user=user, password=password)
    if parts.scheme in _PORTS:
        if not parts.hostname or parts.path not in ("", "/"):
            raise ValueError(f"{parts.scheme}: names no host; {known}")
        if parts.scheme == MOONCAKE and (user or password):
            raise ValueError(f"mooncake: has neither users nor passwords; {known}")
        where = (parts.hostname, port or _PORTS[parts.scheme])
        return RemoteAddress(parts.scheme, *where, user=user, password=password)
    raise ValueError(f"{parts.scheme or text!r} is no kind of store that is known; {known}")
