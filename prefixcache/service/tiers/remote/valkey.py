"""Valkey (and Redis): objects are plain strings, which the server evicts as it is told to.

```
EXISTS key        :1                           one after the other in one go, answers in order
GET key           $377664 … bytes │ $-1        received into the slot, not through a buffer
SET key …         +OK │ -OOM …                 sent out of the slot
INFO memory       $1203 … maxmemory:0 …        once, at the start: how much it holds
```
The few commands of the protocol that this takes are written here: no client library receives into
memory that it is given.  A call that gets nothing for a second fails; the connection is made anew
with the next one.
"""

from __future__ import annotations

import contextlib
import re
import select
import socket
import ssl
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from prefixcache.remote_address import RemoteAddress
from prefixcache.service.tiers.remote.store import Got, RemoteError

_PATIENCE_S: Final = 1.0
_CHUNK: Final = 65_536
_LONGEST_LINE: Final = 4096
_LONGEST_INFO: Final = 65_536
_LONGEST_SKIPPED: Final = 64 << 20
"""Bytes of an object of another size that are read to get at what follows it."""


class Valkey:
    """One connection to a server, made when it is first needed.

    Args:
        address: Where.
        ca: The file with the certificates that sign its own, if it has one; empty: those that this
            machine trusts.
    """

    def __init__(self, address: RemoteAddress, ca: str = "") -> None:
        self._address = address
        self._tls = tls_to(Path(ca) if ca else None) if address.is_tls else None
        self._socket: socket.socket | None = None
        self._buffer = bytearray()

    def connect(self) -> None:
        """Connect, unless that is done; see `RemoteTier`."""
        with self._failing():
            self._connected()

    def exists(self, names: Sequence[str]) -> bytes:
        """Say which of these it has: a byte for each, 0 for no."""
        replies = self._call([(b"EXISTS", name.encode()) for name in names])
        return bytes(reply == b":1" for reply in replies)

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, those that are not there as well."""
        self._call([(b"UNLINK", name.encode()) for name in names])

    def capacity(self) -> int | None:
        """Say how many bytes it holds, for all who use it; None: nobody has told it, or it won't.

        Raises:
            RemoteError: It cannot be reached.
        """
        with self._failing():
            self._send(_command(b"INFO", b"memory"))
            head = self._line()
            if head.startswith(b"-"):
                return None
            if not head.startswith(b"$") or not head[1:].isdigit() or int(head[1:]) > _LONGEST_INFO:
                raise RemoteError(f"{self._address}: answers {head[:40]!r} to INFO")
            end = int(head[1:])
            while len(self._buffer) < end + 2:
                self._more()
            told = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
            self._end()
        found = re.search(rb"^maxmemory:(\d{1,18})\r?$", told, re.MULTILINE)
        return int(found[1]) or None if found else None

    def get_into(self, names: Sequence[str], slots: Sequence[memoryview]) -> list[Got]:
        """Fetch objects, each into its slot; see `RemoteTier`."""
        with self._failing():
            self._send(b"".join(_command(b"GET", name.encode()) for name in names))
            found = [self._receive(slot) for slot in slots]
            self._end()
        return found

    def put_from(self, names: Sequence[str], slots: Sequence[memoryview]) -> list[bool]:
        """Store what lies in slots; see `RemoteTier`."""
        with self._failing():
            line = self._begin()
            for name, slot in zip(names, slots, strict=True):
                key = name.encode()
                head = b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(key), key, len(slot))
                line.sendall(head)
                line.sendall(slot)
                line.sendall(b"\r\n")
            replies = [self._line() for _ in names]
            self._end()
        if refused := next((reply for reply in replies if reply.startswith(b"-")), None):
            raise RemoteError(_said(refused))
        return [reply == b"+OK" for reply in replies]

    def close(self) -> None:
        """Hang up.  Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None
        self._buffer.clear()

    # ------------------------------------------------------------------ the protocol

    def _call(self, commands: Iterable[tuple[bytes, ...]]) -> list[bytes]:
        """Send commands that are answered in a line each; give the answers.

        Raises:
            RemoteError: one is refused, or the server does not answer.
        """
        told = [_command(*command) for command in commands]
        with self._failing():
            self._send(b"".join(told))
            replies = [self._line() for _ in told]
            self._end()
        for reply in replies:
            if reply.startswith(b"-"):
                raise RemoteError(_said(reply))
        return replies

    @contextlib.contextmanager
    def _failing(self) -> Iterator[None]:
        """Hang up after an error in between: nobody knows what is still to come."""
        try:
            yield
        except RemoteError:
            self.close()
            raise
        except OSError as error:
            self.close()
            why = "does not answer" if isinstance(error, TimeoutError) else str(error)
            raise RemoteError(f"{self._address}: {why}") from None

    def _connected(self) -> socket.socket:
        if self._socket is not None:
            return self._socket
        address = self._address
        if address.path:
            line = socket.socket(socket.AF_UNIX)
            line.settimeout(_PATIENCE_S)
            try:
                line.connect(address.path)
            except BaseException:
                line.close()
                raise
        else:
            line = socket.create_connection((address.host, address.port), _PATIENCE_S)
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            if self._tls is not None:
                line = self._tls.wrap_socket(line, server_hostname=address.host)
        self._socket = line
        if address.password:
            who = (address.user.encode(),) if address.user else ()
            line.sendall(_command(b"AUTH", *who, address.password.encode()))
            if (reply := self._line()) != b"+OK":
                raise RemoteError(_said(reply))
        return line

    def _begin(self) -> socket.socket:
        """Give a connection over which nothing was said that nobody has asked for, nor its end."""
        if self._socket is not None and not _is_silent(self._socket):
            self.close()
        return self._connected()

    def _send(self, told: bytes) -> None:
        self._begin().sendall(told)

    def _more(self) -> None:
        part = self._connected().recv(_CHUNK)
        if not part:
            raise ConnectionResetError("hung up")
        self._buffer += part

    def _end(self) -> None:
        """See that nothing follows the answers: it would be taken for the next ones."""
        if self._buffer:
            raise RemoteError(f"{self._address}: answers what nobody has asked")

    def _line(self) -> bytes:
        """Read an answer of one line."""
        while (end := self._buffer.find(b"\r\n", 0, _LONGEST_LINE)) < 0:
            if len(self._buffer) >= _LONGEST_LINE:
                raise RemoteError(f"{self._address}: answers with what is no line")
            self._more()
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return line

    def _receive(self, slot: memoryview) -> Got:
        """Read an object into a slot."""
        line = self._line()
        if line == b"$-1":
            return Got.NOTHING
        if line.startswith(b"-WRONGTYPE"):  # a list, say: of this one object alone
            return Got.WRONG
        if line.startswith(b"-"):
            raise RemoteError(_said(line))
        if not line.startswith(b"$") or not line[1:].isdigit():
            raise RemoteError(f"{self._address}: answers {line[:40]!r} to GET")
        size = int(line[1:])
        if size != len(slot):
            if size > _LONGEST_SKIPPED:
                raise RemoteError(f"{self._address}: has an object of {size:,} bytes")
            self._skip(size + 2)
            return Got.WRONG
        at = min(size, len(self._buffer))
        slot[:at] = self._buffer[:at]
        del self._buffer[:at]
        line_in = self._connected()
        while at < size:
            got = line_in.recv_into(slot[at:])
            if not got:
                raise ConnectionResetError("hung up")
            at += got
        if self._line():
            raise RemoteError(f"{self._address}: an object does not end where it should")
        return Got.GOOD

    def _skip(self, count: int) -> None:
        while count > len(self._buffer):
            count -= len(self._buffer)
            self._buffer.clear()
            self._more()
        del self._buffer[:count]


def _is_silent(line: socket.socket) -> bool:
    """Whether nothing was said over a connection that is yet to be read, nor its end."""
    tls = line if isinstance(line, ssl.SSLSocket) else None
    if tls is not None and tls.pending():
        return False
    waiting = select.poll()
    waiting.register(line, select.POLLIN)
    if not waiting.poll(0):
        return True
    if tls is None:
        return False
    tls.settimeout(0)
    try:
        tls.recv(1)
    except ssl.SSLWantReadError:
        return True  # it was of the connection itself: tickets for the next one
    except OSError:
        return False
    finally:
        tls.settimeout(_PATIENCE_S)
    return False


def tls_to(ca: Path | None) -> ssl.SSLContext:
    """Make what a server's certificate is looked at with: its name has to be right, too.

    Raises:
        OSError: There are no certificates in that file.
    """
    return ssl.create_default_context(cafile=ca)


def _command(*words: bytes) -> bytes:
    r"""Write a command.

    >>> _command(b"GET", b"k")
    b'*2\r\n$3\r\nGET\r\n$1\r\nk\r\n'
    """
    return b"*%d\r\n" % len(words) + b"".join([b"$%d\r\n%b\r\n" % (len(w), w) for w in words])


def _said(reply: bytes) -> str:
    """Write what a server has refused with."""
    return f"the server says: {reply[1:200].decode(errors='replace')}"
