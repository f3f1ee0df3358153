"""Identities: who may use which namespaces, read from a file that the operator writes.

```toml
[[identity]]
name = "acme-serving"
tenant = "acme"                      # all its namespaces get this tenant, whatever it says itself
models = ["llama-*", "tiny"]         # shell patterns; all, if not given
token_sha256 = ["9f86d08…"]          # digests of bearer tokens, in hexadecimal …
certificates = ["serving.acme"]      # … or names in client certificates (CN, DNS, URI) …
socket = "/run/prefixcache/acme.sock"   # … or a Unix socket of its own …
uid = 1001                           # … that belongs to this user

domain = "acme"                      # in a pool of its own, which nobody else can map

[[domain]]
name = "acme"
memory = "1GiB"

[[identity]]
name = "operator"
admin = true                         # sees and steers every tenant; may set quotas
token_sha256 = ["60303ae…"]
```

`prefixcache token` makes a token and its digest.  The file holds no secret, but who may write it
decides who may read: neither it nor a folder on the way to it may be writable by others.
"""

from __future__ import annotations

import hmac
import os
import re
import stat
import tomllib
from dataclasses import dataclass
from fnmatch import fnmatchcase
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

from prefixcache.bounded_files import read_stream
from prefixcache.config import parse_size
from prefixcache.errors import InvalidRequest, NotFound, PermissionDenied
from prefixcache.private_files import check_path
from prefixcache.texts import check_text, escape
from prefixcache.types import Namespace

MAX_IDENTITIES: Final = 4096

_LONGEST: Final = 64 << 20
"""Bytes of the file."""
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
_DIGEST = re.compile(r"[0-9a-f]{64}")
_KEYS: Final = {
    *("name", "tenant", "models", "token_sha256", "certificates", "socket", "uid", "admin"),
    "domain",
}


@dataclass(frozen=True, slots=True)
class Identity:
    """Who a caller is, and what it may."""

    name: str
    tenant: str | None = None
    """Whose namespaces it may use; None: any."""
    models: tuple[str, ...] = ("*",)
    """Shell patterns of the models it may use."""
    admin: bool = False
    """Whether it sees and steers every tenant."""
    domain: str = ""
    """In whose pool it works."""
    uid: int | None = None
    """Whose processes its workers are; None: those of the service's own user."""

    def own(self, asked: Namespace) -> Namespace:
        """Give the namespace that a request means: the tenant comes from here, not from it.

        Raises:
            NotFound: it names another tenant, or a model it may not use.
        """
        space = asked
        if self.tenant is not None and not self.admin:
            if asked.tenant not in ("", self.tenant):
                raise NotFound(f"no namespace {asked}")
            space = Namespace(asked.model, asked.adapter, self.tenant, asked.salt)
        if not self.sees(space):
            raise NotFound(f"no namespace {asked}")
        return space

    def sees(self, namespace: Namespace) -> bool:
        """Whether it may use a namespace, and so see what goes on there: all views ask this."""
        if not (self.admin or self.tenant is None or namespace.tenant == self.tenant):
            return False
        return any(fnmatchcase(namespace.model, pattern) for pattern in self.models)

    @property
    def sees_all(self) -> bool:
        """Whether there is no namespace that it may not see."""
        return self.admin and "*" in self.models

    def refuse_unless_admin(self, what: str) -> None:
        """Check that it may steer what others use.

        Raises:
            PermissionDenied: it may not.
        """
        if not self.admin:
            raise PermissionDenied(f"{self.name} may not {what}: that takes an admin's identity")


LOCAL: Final = Identity("this user", admin=True)
"""Where no file says anything: whoever reaches a 0600 socket or loopback is the operator."""


@dataclass(frozen=True, slots=True)
class Proof:
    """What somebody showed to prove who he is: one of these."""

    socket: tuple[str, int | None] | None = None
    """Path and user of a socket that is one identity's own."""
    certificate: tuple[str, ...] = ()
    """Names in a verified certificate."""
    digest: bytes = b""
    """Of a bearer token, in hexadecimal."""

    @classmethod
    def by_token(cls, token: str) -> Proof:
        """Give what a bearer token is."""
        digest = sha256(token.encode("utf-8", "surrogatepass")).hexdigest()
        return cls(digest=digest.encode())


@dataclass(frozen=True, slots=True)
class Socket:
    """A Unix socket of one identity's own."""

    path: str
    uid: int | None
    identity: Identity


class Identities:
    """All identities of a file, by what proves them."""

    def __init__(self, path: Path) -> None:
        self.sockets: list[Socket] = []
        self._by_name: dict[str, Identity] = {}
        self._by_certificate: dict[str, Identity] = {}
        self._digests: list[tuple[bytes, Identity]] = []
        self._by_digest: dict[bytes, Identity] = {}
        self.domains: dict[str, int] = {}
        """Bytes of each named domain's pool."""
        fields = _read(path)
        if unknown := set(fields) - {"identity", "domain"}:
            raise InvalidRequest(
                f"{path}: unknown table {min(unknown)[:60]!a}; write [[identity]] or [[domain]]"
            )
        domains = fields.get("domain", [])
        if not isinstance(domains, list):
            raise InvalidRequest(f"{path}: domain is no list of tables; write [[domain]]")
        for entry in domains:
            self._add_domain(f"{path}: domain", entry)
        entries = fields.get("identity", [])
        if not isinstance(entries, list) or not entries:
            raise InvalidRequest(f"{path} names no [[identity]]: nobody could use the service")
        if len(entries) > MAX_IDENTITIES:
            raise InvalidRequest(
                f"{path}: {len(entries)} identities; the limit is {MAX_IDENTITIES}"
            )
        for number, entry in enumerate(entries, start=1):
            self._add(f"{path}: identity {number}", entry)

    @property
    def tenants(self) -> set[str]:
        """Whose prompts these identities serve; "" stands for admins of no tenant.  O(all)."""
        return {identity.tenant or "" for identity in self._by_name.values()}

    def has(self, identity: Identity) -> bool:
        """Whether an identity is in the file just as it is.  O(1)."""
        return self._by_name.get(identity.name) == identity

    def tenants_of(self, domain: str) -> set[str]:
        """Give whose prompts a domain serves; "" stands for admins of no tenant.  O(all)."""
        return {one.tenant or "" for one in self._by_name.values() if one.domain == domain}

    def of(self, proof: Proof) -> Identity | None:
        """Give whom a proof proves; None if nobody.

        A token's digest is compared with every known one, each time in constant time, so that how
        long it takes tells nothing about any of them.
        """
        if proof.socket is not None:
            for socket in self.sockets:
                if (socket.path, socket.uid) == proof.socket:
                    return socket.identity
            return None
        for name in proof.certificate:
            if (identity := self._by_certificate.get(name)) is not None:
                return identity
        if proof.certificate:
            return None
        found = None
        for known, identity in self._digests:
            if hmac.compare_digest(known, proof.digest):
                found = identity
        return found

    def of_former(self, proof: Proof) -> Identity | None:
        """Give whom a proof proves that was good before; None if nobody.  O(1) for tokens.

        How long it takes may tell something of the digests: not for what strangers show.
        """
        if proof.digest:
            return self._by_digest.get(proof.digest)
        return self.of(proof)

    def _add_domain(self, where: str, entry: Any) -> None:
        if not isinstance(entry, dict) or set(entry) != {"name", "memory"}:
            raise InvalidRequest(f"{where} is a table of a name and its memory")
        name = _text(where, entry, "name")
        if not _NAME.fullmatch(name) or name in self.domains:
            raise InvalidRequest(f"{where} needs a name of its own: letters, digits, - and _")
        try:
            memory = parse_size(entry["memory"])
        except (ValueError, TypeError) as error:
            raise InvalidRequest(f"{where} {name}: {error}") from None
        if isinstance(entry["memory"], bool) or not 0 < memory < 2**63:
            raise InvalidRequest(f"{where} {name}: memory is a size, and not {memory} bytes")
        self.domains[name] = memory

    def _add(self, where: str, entry: Any) -> None:
        if not isinstance(entry, dict):
            raise InvalidRequest(f"{where} is no table; write [[identity]]")
        if unknown := set(entry) - _KEYS:
            known = ", ".join(sorted(_KEYS))
            raise InvalidRequest(f"{where} has {min(unknown)[:60]!a}; there are: {known}")
        name = _text(where, entry, "name")
        if not name or name in self._by_name:
            raise InvalidRequest(f"{where} needs a name of its own")
        where = f"{where} ({name})"
        admin = entry.get("admin", False)
        if not isinstance(admin, bool):
            raise InvalidRequest(f"{where}: admin is true or false")
        if not admin and "tenant" not in entry:
            raise InvalidRequest(f"{where} needs a tenant, or admin = true")
        identity = Identity(
            name=name,
            tenant=_text(where, entry, "tenant") if "tenant" in entry else None,
            models=tuple(_texts(where, entry, "models")) or ("*",),
            admin=admin,
            domain=_text(where, entry, "domain"),
            uid=_uid(where, entry),
        )
        if identity.domain and identity.domain not in self.domains:
            raise InvalidRequest(f"{where}: there is no [[domain]] named {identity.domain}")
        self._by_name[name] = identity
        proofs = 0
        for digest in _texts(where, entry, "token_sha256"):
            if not _DIGEST.fullmatch(digest):
                raise InvalidRequest(f"{where}: token_sha256 takes 64 hexadecimal digits")
            self._digests.append((digest.encode(), identity))
            self._by_digest[digest.encode()] = identity
            proofs += 1
        for certificate in _texts(where, entry, "certificates"):
            if certificate in self._by_certificate:
                raise InvalidRequest(f"{where}: certificate {certificate} is another's, too")
            self._by_certificate[certificate] = identity
            proofs += 1
        if socket := _text(where, entry, "socket"):
            self.sockets.append(Socket(socket, identity.uid, identity))
            proofs += 1
        elif "uid" in entry:
            raise InvalidRequest(f"{where}: uid says whose the socket is; name a socket")
        if not proofs:
            raise InvalidRequest(
                f"{where} can prove itself by nothing; give token_sha256, certificates or socket"
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                raise InvalidRequest(
                    f"{path} can be written by others than its owner: chmod go-w {path}"
                )
            if status.st_uid not in (0, os.getuid()):
                raise InvalidRequest(f"{path} belongs to user {status.st_uid}, not to this one")
            check_path(path, "--identities")
            return tomllib.loads(read_stream(file, _LONGEST, str(path)).decode())
    except OSError as error:
        raise InvalidRequest(f"cannot read {path}: {error.strerror}") from None
    except RecursionError:
        raise InvalidRequest(f"{path} is nested too deeply") from None
    except ValueError as error:  # not TOML, not UTF-8, or a number of thousands of digits
        raise InvalidRequest(f"{path} is no TOML: {escape(str(error))}") from None


def _uid(where: str, entry: dict[str, Any]) -> int | None:
    uid = entry.get("uid")
    if uid is not None and (not isinstance(uid, int) or isinstance(uid, bool) or uid < 0):
        raise InvalidRequest(f"{where}: uid is the number of a user")
    return uid


def _text(where: str, entry: dict[str, Any], key: str) -> str:
    value = entry.get(key, "")
    if not isinstance(value, str):
        raise InvalidRequest(f"{where}: {key} is a text")
    check_text(value, f"{where}: {key}")
    return value


def _texts(where: str, entry: dict[str, Any], key: str) -> list[str]:
    value = entry.get(key, [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or not all(isinstance(one, str) and one for one in value):
        raise InvalidRequest(f"{where}: {key} is a list of texts")
    for one in value:
        check_text(one, f"{where}: one of {key}")
    return value
