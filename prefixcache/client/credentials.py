"""Credentials: what a client shows, and what it wants to see, where a socket's mode is not enough.

```python
prefixcache.connect("cache.example:7070", tls=Tls(ca="ca.pem"), token="…")
prefixcache.connect("cache.example:7070", tls=Tls(ca="ca.pem", certificate="me.pem", key="me.key"))
```

What is not given comes from the environment: `$PREFIXCACHE_TLS_CA`, `$PREFIXCACHE_TLS_CERT`,
`$PREFIXCACHE_TLS_KEY`, `$PREFIXCACHE_TLS_NAME`, and `$PREFIXCACHE_TOKEN` or the file that
`$PREFIXCACHE_TOKEN_FILE` names.  A key, or a file with a token, is refused if others can read it.
"""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

from prefixcache.bounded_files import read_file
from prefixcache.client.address import Address
from prefixcache.errors import InvalidRequest
from prefixcache.private_files import check_secret
from prefixcache.types import shown

_LONGEST = 4 << 20
"""Bytes of a file with certificates, a key or a token."""


@dataclass(frozen=True, slots=True)
class Tls:
    """How to speak TLS.  Files are PEM; they are read when the connection is made."""

    ca: str | Path | None = None
    """Who may have signed the service's certificate; by default, who the system trusts."""
    certificate: str | Path | None = None
    """This client's own chain, for a service that asks for one."""
    key: str | Path | None = None
    name: str = ""
    """The name that the service's certificate must have, if it is not the address's host."""


class Access:
    """How one client reaches one service: its channel, and what it says with every call.

    Args:
        address: The service's.
        tls: How to speak TLS; None takes the environment's, or none.
        token: The bearer token; None takes the environment's, or none.

    Raises:
        InvalidRequest: a file cannot be read, others can read one with a secret, or a token would
            travel in the clear.
    """

    def __init__(self, address: Address, tls: Tls | None, token: str | None) -> None:
        self._address = address
        if tls is not None and not isinstance(tls, Tls):
            raise InvalidRequest(f"tls is {shown(tls)}, not a Tls")
        self._tls = None if address.path else tls or _tls_of_environment()
        if token is None:
            token = _token_of_environment()
        if not isinstance(token, str):
            raise InvalidRequest(f"a token is a text, not a {type(token).__name__}")
        if (token and not token.isascii()) or any(c.isspace() for c in token or ""):
            raise InvalidRequest("a token has no spaces, and nothing but ASCII")
        if token and self._tls is None and not address.path and not is_loopback(address.host):
            raise InvalidRequest(
                f"refused to send a token to {address} in the clear: give tls=Tls(ca=…) "
                "($PREFIXCACHE_TLS_CA)"
            )
        self.metadata = (("authorization", f"Bearer {token}"),) if token else None

    def channel(self, grpc_module: Any, options: Any) -> Any:
        """Make a channel of `grpc` or of `grpc.aio`."""
        target = str(self._address)
        if self._tls is None:
            return grpc_module.insecure_channel(target, options)
        tls = self._tls
        if tls.name:
            options = (*options, ("grpc.ssl_target_name_override", tls.name))
        credentials = grpc.ssl_channel_credentials(
            root_certificates=_read(tls.ca),
            private_key=_read_secret(tls.key, "the TLS key"),
            certificate_chain=_read(tls.certificate),
        )
        return grpc_module.secure_channel(target, credentials, options)


def is_loopback(host: str) -> bool:
    """Whether a host is this very machine.

    >>> is_loopback("localhost"), is_loopback("::1"), is_loopback("10.0.0.7")
    (True, True, False)
    """
    try:
        return ipaddress.ip_address("127.0.0.1" if host == "localhost" else host).is_loopback
    except ValueError:
        return False


def _tls_of_environment() -> Tls | None:
    names = {"ca": "CA", "certificate": "CERT", "key": "KEY", "name": "NAME"}
    found = {
        field: value
        for field, name in names.items()
        if (value := os.environ.get(f"PREFIXCACHE_TLS_{name}"))
    }
    return Tls(**found) if found else None


def _token_of_environment() -> str:
    if token := os.environ.get("PREFIXCACHE_TOKEN"):
        return token
    path = os.environ.get("PREFIXCACHE_TOKEN_FILE")
    if not path:
        return ""
    return (_read_secret(path, "the token file") or b"").decode(errors="replace").strip()


def _read(path: str | Path | None) -> bytes | None:
    return None if path is None else read_file(path, _LONGEST)


def _read_secret(path: str | Path | None, what: str) -> bytes | None:
    """Read a file that is refused where others can read it, as the service does with its own."""
    read = _read(path)
    if path is not None:
        check_secret(Path(path), what)
    return read
