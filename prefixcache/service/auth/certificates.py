"""Certificates: TLS for the service, read again when the files change, without a restart.

gRPC asks for the configuration at every handshake.  So a new certificate serves the next
connection, and those that stand go on with what they began with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import structlog

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest
from prefixcache.private_files import check_path, check_secret

_LONGEST = 4 << 20
"""Bytes of a file with certificates or a key."""

log = structlog.get_logger(__name__)


class Certificates:
    """A chain, its key, and perhaps who may sign clients' certificates; all PEM files.

    Raises:
        InvalidRequest: a file cannot be read, others can put another in its place, or read the key.
    """

    def __init__(self, chain: Path, key: Path, client_ca: Path | None) -> None:
        self._key = key
        self._files = [chain, key] + ([client_ca] if client_ca else [])
        self._asks_clients = client_ca is not None
        self._cause = ""
        """Why the files as they are now are not used."""
        self._version = self._look()
        self._configuration = self._load()

    def credentials(self) -> grpc.ServerCredentials:
        """Make what a server's port takes."""
        fetch: Any = self._fetch  # None says "as before", which its published type forgets
        return grpc.dynamic_ssl_server_credentials(
            self._configuration, fetch, require_client_authentication=self._asks_clients
        )

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """Give the configuration if it has changed; called by gRPC at every handshake."""
        try:
            version = self._look()
            if version == self._version:
                return None
            self._version = version  # tried once: what is wrong is logged once, not per stranger
            self._configuration = self._load()
        except InvalidRequest as error:
            if self._cause != str(error):
                self._cause = str(error)
                log.error("certificates are as before: the new ones are wrong", cause=self._cause)
            return None
        self._cause = ""
        log.info("certificates read again", chain=str(self._files[0]))
        return self._configuration

    def _look(self) -> tuple[tuple[int, ...], ...]:
        try:
            found = [path.stat() for path in self._files]
        except OSError as error:
            raise InvalidRequest(f"cannot read {error.filename}: {error.strerror}") from None
        return tuple((one.st_ino, one.st_mtime_ns, one.st_size, one.st_mode) for one in found)

    def _load(self) -> grpc.ServerCertificateConfiguration:
        parts = []
        for path in self._files:
            check_path(path, "TLS file")
            parts.append(read_file(path, _LONGEST))
            if b"-----BEGIN " not in parts[-1]:
                raise InvalidRequest(f"{path} is no PEM file")
            if path == self._key or b"PRIVATE KEY-----" in parts[-1]:
                check_secret(path, "TLS file")
        chain, key, *client_ca = parts
        return grpc.ssl_server_certificate_configuration(
            [(key, chain)], client_ca[0] if client_ca else None
        )
