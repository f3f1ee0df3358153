"""Where a service listens: a Unix socket (the default) or a TCP address.

```
unix:/run/user/1000/prefixcache.sock    or only the path
127.0.0.1:7070    localhost:7070    [::1]:7070
```
"""

from __future__ import annotations

import os
import re
import socket
import tempfile
from dataclasses import dataclass
from pathlib import Path

from prefixcache.errors import CacheError, InvalidRequest, ServiceUnavailable
from prefixcache.types import shown
from prefixcache.user_folders import expand

_SCHEME = re.compile(r"([^/]*):/")

MAX_UNIX_PATH = 107
"""Bytes of a socket's path that the kernel accepts."""


@dataclass(frozen=True, slots=True)
class Address:
    """One parsed address: either `path` is set, or `host` and `port`."""

    path: str = ""
    host: str = ""
    port: int = 0

    @classmethod
    def parse(cls, target: str) -> Address:
        """Read an address as people write it.  Changes nothing.

        Raises:
            InvalidRequest: it is neither a path nor host:port.

        >>> str(Address.parse("/run/cache.sock")), str(Address.parse("localhost:7070"))
        ('unix:/run/cache.sock', 'localhost:7070')
        """
        if not isinstance(target, str):
            raise InvalidRequest(f"an address is a text, not {shown(target)}")
        scheme = _SCHEME.match(target)
        if scheme and scheme[1] != "unix":
            raise InvalidRequest(
                f"address {target!r} has the scheme {scheme[1]!r}; write unix:/path/to/socket or "
                "host:port"
            )
        if target.startswith("unix:") or "/" in target:
            path = target.removeprefix("unix:")
            if path.startswith("//"):
                path = path[2:]
            if not path:
                raise InvalidRequest(
                    f"address {target!r} names no path; write unix:/path/to/socket"
                )
            path = str(expand(path).absolute())
            if (size := len(os.fsencode(path))) > MAX_UNIX_PATH:
                raise InvalidRequest(
                    f"socket path of {size} bytes, the kernel takes {MAX_UNIX_PATH}: {path}"
                )
            return cls(path=path)
        host, colon, port = target.rpartition(":")
        if not colon or not port.isdecimal() or int(port) > 65535:
            raise InvalidRequest(
                f"cannot read the address {target!r}; write unix:/path/to/socket or host:port"
            )
        return cls(host=host.removeprefix("[").removesuffix("]") or "localhost", port=int(port))

    def __str__(self) -> str:
        if self.path:
            return f"unix:{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    def probe(self, timeout_s: float) -> None:
        """Connect once and hang up, so that a missing service is told at once and by its cause.

        Raises:
            ServiceUnavailable: nobody listens there.
            InvalidRequest: the socket lies in a folder of a stranger.
        """
        self.refuse_strangers()
        try:
            self._connect(timeout_s).close()
        except OSError as error:
            raise self.unavailable(error.strerror or str(error)) from None
        except ValueError as error:  # a NUL in a path, a host that is no name
            raise InvalidRequest(f"cannot read the address {str(self)!r}: {error}") from None

    def answers(self) -> bool:
        """Whether a service lives there at this moment.  Takes up to a fifth of a second.

        A socket whose process is just being killed may still take a connection, and drops it at
        once; a living service says something, or at least stays on the line.
        """
        try:
            self.refuse_strangers()
            with self._connect(1.0) as probe:
                probe.settimeout(0.2)
                return bool(probe.recv(1))
        except TimeoutError:
            return True
        except (OSError, ValueError, CacheError):
            return False

    def _connect(self, timeout_s: float) -> socket.socket:
        if not self.path:
            return socket.create_connection((self.host, self.port), timeout_s)
        probe = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            probe.settimeout(timeout_s)
            probe.connect(self.path)
        except BaseException:
            probe.close()
            raise
        return probe

    def refuse_strangers(self) -> None:
        """Keep away from a socket that another user may have put there to read prompts.

        Raises:
            InvalidRequest: its folder belongs neither to this user nor to root.
        """
        if not self.path:
            return
        try:
            owner = Path(self.path).parent.stat().st_uid
        except OSError:
            return  # no such folder: who connects will say so
        if owner != 0 and os.getuid() not in (0, owner):
            raise InvalidRequest(
                f"{Path(self.path).parent} belongs to user {owner}, you are {os.getuid()}: choose "
                "another address"
            )

    def unavailable(self, cause: str) -> ServiceUnavailable:
        """Build the error for a service that does not answer, with the command that starts one."""
        where = "" if self == Address.parse(default_target()) else f" --listen {self}"
        return ServiceUnavailable(
            f"no prefixcache service at {self} ({cause.lower()}). "
            f"Start one with: prefixcache serve --memory 2GiB{where}"
        )


def default_target() -> str:
    """Where client and service meet unless told otherwise.

    `$PREFIXCACHE_TARGET`, else `$XDG_RUNTIME_DIR/prefixcache.sock`, else a folder of this user in
    the folder for temporary files.
    """
    if target := os.environ.get("PREFIXCACHE_TARGET"):
        return target
    if folder := os.environ.get("XDG_RUNTIME_DIR"):
        return f"unix:{folder}/prefixcache.sock"
    return f"unix:{tempfile.gettempdir()}/prefixcache-{os.getuid()}/prefixcache.sock"


def this_host() -> str:
    """Name the kernel and the pid namespace of this process: where its process id counts.

    Empty where the system does not tell; then nobody watches the process id.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return ""
