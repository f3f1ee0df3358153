"""The authenticator: who is calling?  Asked once per unary call, and once per session.

```
a socket of its own    ─► that identity: the kernel let only its user connect (mode 0600)
a client certificate   ─► by the names in it, which TLS has verified
a bearer token         ─► by its digest
none of them           ─► UNAUTHENTICATED; without --identities, the user whose socket it is
```

gRPC's Python server does not show a Unix socket's peer credentials, and a proxy of our own in front
of it that could would read and write every byte once more.  So a socket's mode and owner are the
credential: connect(2) asks the kernel for write permission on the socket's file, in a folder that
nobody else may change.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import structlog

from prefixcache.errors import InvalidRequest, Unauthenticated
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.identity import LOCAL, Identities, Identity, Proof, Socket
from prefixcache.texts import escape

LOOK_EVERY_S = 1.0
"""How often the file of identities is looked at."""
_BEARER = "bearer "
_NAMES = ("x509_common_name", "x509_subject_alternative_name")
MAX_TOKEN = 1024
"""Characters of a bearer token."""

log = structlog.get_logger(__name__)


class IdentityFile:
    """The identities of a file, read again when it changes; nothing is ever half taken over."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._looked_at = time.monotonic()
        self._version = _version(path)
        self._identities = None if path is None else Identities(path)
        self.edition = 0
        """Which reading of the file counts by now; greater with each change that is taken over."""
        self._listeners: list[Callable[[Identities], None]] = []

    @property
    def current(self) -> Identities | None:
        """The identities by now; None where there is no file."""
        now = time.monotonic()
        if self._path is not None and now - self._looked_at >= LOOK_EVERY_S:
            self._looked_at = now
            version = _version(self._path)
            if version != self._version:
                self._version = version
                self._reload(self._path)
        return self._identities

    def tell(self, listener: Callable[[Identities], None]) -> None:
        """Tell `listener` the identities, now and whenever they change, if there are any."""
        self._listeners.append(listener)
        if self._identities is not None:
            listener(self._identities)

    def _reload(self, path: Path) -> None:
        try:
            self._identities = Identities(path)
        except InvalidRequest as error:
            log.error("identities are as before: the new file is wrong", cause=str(error))
        else:
            self.edition += 1
            log.info("identities read again", path=str(path))
            for listener in self._listeners:
                listener(self._identities)


class Authenticator:
    """Tells who calls through one set of addresses.

    Args:
        identity_file: All identities.
        own: The socket, if it is one identity's own.
        connections: Hear of each caller who came over one of them; None where none is by TCP.
    """

    def __init__(
        self,
        identity_file: IdentityFile,
        own: Socket | None = None,
        connections: Connections | None = None,
    ) -> None:
        self.identity_file = identity_file
        self._own = own
        self._connections = connections

    def identify(self, context: Any) -> Identity:
        """Give who makes a call.

        Raises:
            Unauthenticated: nobody known, or a proof that proves nothing.
            PoolExhausted: its tenant has as many connections as it may.
        """
        identity = self._identify(context)
        if self._connections is not None:
            self._connections.prove(context.peer(), identity)
        return identity

    def proof(self, context: Any) -> Proof | None:
        """Give what a call brings as proof; None where nobody has to prove anything.

        Raises:
            Unauthenticated: it brings none, or none that can be one.
        """
        if self.identity_file.current is None:
            return None
        if self._own is not None:
            return Proof(socket=(self._own.path, self._own.uid))
        if names := tuple(_certificate_names(context)):
            return Proof(certificate=names)
        if token := _token(context):
            return Proof.by_token(token)
        raise Unauthenticated(
            "who are you? Send a bearer token (connect(token=…), --token-file or "
            "$PREFIXCACHE_TOKEN), or use a client certificate"
        )

    def _identify(self, context: Any) -> Identity:
        proof = self.proof(context)
        identities = self.identity_file.current
        if identities is None or proof is None:
            return LOCAL
        found = identities.of(proof)
        if found is not None:
            return found
        if proof.socket is not None:
            raise Unauthenticated(
                "the file of identities no longer names this socket, or gives it to another user"
            )
        if proof.certificate:
            raise Unauthenticated(
                f"no identity has a certificate for {escape(', '.join(proof.certificate)[:200])}"
            )
        raise Unauthenticated("nobody has this token")


def _certificate_names(context: Any) -> Iterator[str]:
    proofs = context.auth_context()
    if not proofs:
        return
    for key in _NAMES:
        for value in proofs.get(key, ()):
            yield value.decode(errors="replace")


def _token(context: Any) -> str:
    for key, value in context.invocation_metadata() or ():
        if key == "authorization" and isinstance(value, str):
            if value[: len(_BEARER)].lower() == _BEARER and len(value) <= MAX_TOKEN:
                return value[len(_BEARER) :].strip()
            raise Unauthenticated("the authorization is no bearer token")
    return ""


def _version(path: Path | None) -> tuple[int, ...]:
    if path is None:
        return ()
    try:
        status = path.stat()
    except OSError:
        return ()
    return (status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size)
