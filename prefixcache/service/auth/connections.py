"""Connections: who has proven nothing over one keeps nobody out who would.

```
TCP address      most ─┬─ proven: its caller made a call that was let in     a share per tenant
(gRPC's bound)         ├─ unproven: up to a quarter, for 10 s; over it, the silent and the oldest go
                       └─ as many more: room for who comes until the next look
               while calls without proof come by the thousand: fewer who connect are let in
Unix socket      most ─── over half of them, the newest go of the process that has the most
```
gRPC accepts connections itself, bounds them by number alone, and shows only a call's peer.  So this
looks at the process's own sockets: a few times a second, and fifty times while somebody presses in.
What has to go is shut down at the socket, and gRPC sees a caller who hung up.

At a Unix socket no call can be told from another by its peer: there the kernel has asked who
connects, and what is bounded is each process.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import stat
import struct
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, TypeAlias
from urllib.parse import unquote

import structlog

from prefixcache.core.shares import Shares
from prefixcache.service.auth.identity import Identities, Identity
from prefixcache.service.newcomers import Newcomers

PROVE_S = 10.0
"""How long a connection may take until a call over it is let in."""

MOST_STREAMS = 100
"""Calls at a time over one connection, where strangers can connect: more wait in the client."""
_MOST_UNPROVEN = 64
"""At one address, however many connections there may be.  What all send is less than gRPC keeps
unread, so that it ends nobody's call for it."""
_FEW = 8
"""Connections that any one process may have at a Unix socket, however many others have."""

_LOOK_EVERY_S = 0.25
_PRESSED_S = 0.02
"""The same while there are more than there may be."""
_AT_A_TIME = 64
_LOG_EVERY_S = 10.0
_MOST_CALLS = 1000
"""Calls without proof a second, a fifth of the event loop's time; beyond, fewer are let in."""

_PEERCRED = struct.Struct("iII")
_RECEIVED = struct.Struct("Q")
_RECEIVED_AT = 128
"""Where Linux's tcp_info has the number of bytes received."""

Peer: TypeAlias = "tuple[str, int]"
"""Host and port of a caller; process and user at a Unix socket."""

log = structlog.get_logger(__name__)


@dataclass(slots=True, eq=False)
class _Connection:
    """An open socket whose other end is a caller."""

    fd: int
    inode: int
    peer: Peer
    since: float
    num_calls: int = 0
    """Calls over it that brought no proof."""
    is_ended: bool = False
    """Whether it was shut down, and gRPC is about to close it."""


@dataclass(slots=True, eq=False)
class _Address:
    """One address that callers connect to."""

    name: str
    most: int
    """Connections that gRPC accepts."""
    is_unix: bool
    connections: list[_Connection] = field(default_factory=list)
    """As at the last look."""
    num_ended: int = 0
    """Since the last line in the log."""

    @property
    def most_unproven(self) -> int:
        return min(_MOST_UNPROVEN, self.most // 4)


@dataclass(slots=True, eq=False)
class _Proof:
    """A connection over which a call was let in."""

    name: str
    """gRPC's, of the other end."""
    peer: Peer
    identity: Identity
    at: float
    """When that was, the last time."""
    inode: int = 0
    """Its socket's; 0 until the next look."""


class Connections:
    """All connections of callers, at all endpoints."""

    def __init__(self) -> None:
        self._addresses: dict[Any, _Address] = {}
        """By port, or path."""
        self._seen: dict[int, tuple[_Address, _Connection] | None] = {}
        """All sockets of the process by inode; None: no caller's."""
        self._by_peer: dict[Peer, tuple[_Address, _Connection]] = {}
        """Those of them that came by TCP."""
        self._search_at = 0.0
        """When connections may be searched for again."""
        self._gone: set[Peer] = set()
        """Searched for since the last look, and not there any more."""
        self._newcomers = Newcomers(_MOST_CALLS)
        self._proofs: dict[Peer, _Proof] = {}
        self._by_name: dict[str, _Proof] = {}
        self.shares = Shares(0, "the limit of open files (ulimit -n)", "connections over TCP")
        self._logged_at = 0.0

    def add(self, address: str, most: int) -> None:
        """Look after an address that gRPC is bound to, as people write it.

        Args:
            address: unix:PATH or HOST:PORT.
            most: How many connections gRPC accepts there.
        """
        is_unix = address.startswith("unix:")
        key = address[5:] if is_unix else int(address.rpartition(":")[2])
        one = self._addresses.setdefault(key, _Address(address, 0, is_unix))
        one.most += most
        if not is_unix:
            self.shares.limit += most - 2 * min(_MOST_UNPROVEN, most // 4)

    def set_tenants(self, identities: Identities) -> None:
        """Say for whom a part is kept; forget proofs of who is no longer as he was."""
        self.shares.set_tenants(identities.tenants)
        now = monotonic()
        for proof in list(self._proofs.values()):
            if not identities.has(proof.identity):
                self._forget(proof)
                if (seen := self._seen.get(proof.inode)) is not None:
                    seen[1].since = now

    def prove(self, name: str, identity: Identity) -> None:
        """Note that a call was let in over a connection.  O(1).

        Args:
            name: gRPC's name of its other end.
            identity: Who made the call.

        Raises:
            PoolExhausted: its tenant has as many connections as it may.
        """
        proof = self._by_name.get(name)
        if proof is not None:
            if proof.identity == identity:
                proof.at = monotonic()
                return
            self._forget(proof)
        if (peer := _read_peer(name)) is None:
            return
        self.shares.take(identity.tenant or "")
        self._proofs[peer] = self._by_name[name] = _Proof(name, peer, identity, monotonic())

    def count_unproven(self, name: str) -> int:
        """Count a call without proof; give how many that are over its connection, as far as known.

        0 where it came over one that has proven something, or not by TCP.  O(1), but for the first
        call over a connection: O(open files).
        """
        if name in self._by_name or (peer := _read_peer(name)) is None:
            return 0
        self._newcomers.count()
        found = self._find(peer)
        if found is None:
            return 1
        found[1].num_calls += 1
        return found[1].num_calls

    def shut(self, name: str) -> None:
        """Shut the connection that a call without proof came over, if it can be found in time."""
        peer = _read_peer(name)
        found = None if peer is None else self._find(peer)
        if found is None or found[1].is_ended:
            return
        found[0].num_ended += _end(found[1])
        self._newcomers.count(MOST_STREAMS)  # calls that it has sent are still handed out
        self._tell()

    def _find(self, peer: Peer) -> tuple[_Address, _Connection] | None:
        """Find a connection, if need be among those that have come since the last look."""
        found = self._by_peer.get(peer)
        if found is not None or peer in self._gone or monotonic() < self._search_at:
            return found
        began = monotonic()
        with contextlib.suppress(OSError):  # there may be no descriptor left for this
            for name in os.listdir("/proc/self/fd"):  # noqa: PTH208 - names alone
                self._survey(int(name))
        ended = monotonic()
        self._search_at = ended + 4 * (ended - began)
        if peer not in self._by_peer:
            self._gone.add(peer)
        return self._by_peer.get(peer)

    async def patrol(self) -> None:
        """End what has to go, for ever.  Each look is O(open files), a few at a time."""
        while True:
            began = monotonic()
            try:
                is_pressed = await self.look()
            except OSError:  # not one more descriptor is to be had, not even for this look
                is_pressed = True
            took = monotonic() - began
            # Whatever is open, and however hard others press: no more than a fifth of the time.
            await asyncio.sleep(max(_PRESSED_S if is_pressed else _LOOK_EVERY_S, 4 * took))

    async def look(self) -> bool:
        """Look once; give whether somebody presses in."""
        began = monotonic()
        seen: dict[int, tuple[_Address, _Connection] | None] = {}
        for address in self._addresses.values():
            address.connections = []
        for number, name in enumerate(os.listdir("/proc/self/fd")):  # noqa: PTH208 - names alone
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                await asyncio.sleep(0)
            inode, known = self._survey(int(name))
            if not inode:
                continue
            seen[inode] = known
            if known is not None and not known[1].is_ended:
                known[0].connections.append(known[1])
        for inode, known in self._seen.items():
            if known is not None and known[1].since >= began:
                seen.setdefault(inode, known)  # it came while this looked
        self._seen = seen
        self._gone.clear()
        self._by_peer = {
            known[1].peer: known
            for known in seen.values()
            if known is not None and not known[0].is_unix
        }
        await self._match(began)
        is_pressed = self._newcomers.pace()
        for address in self._addresses.values():
            surplus = self._crowd(address) if address.is_unix else self._unproven(address)
            for number, connection in enumerate(surplus):
                if number % _AT_A_TIME == _AT_A_TIME - 1:
                    await asyncio.sleep(0)
                address.num_ended += _end(connection)
                is_pressed = True
        self._tell()
        return is_pressed

    def _survey(self, fd: int) -> tuple[int, tuple[_Address, _Connection] | None]:
        """Give a socket's inode, 0 if it is none, and whose it is; None: no caller's."""
        try:
            status = os.fstat(fd)
        except OSError:
            return 0, None  # closed meanwhile
        if not stat.S_ISSOCK(status.st_mode):
            return 0, None
        inode = status.st_ino
        known = self._seen.get(inode)
        if known is None:
            self._seen[inode] = known = self._read(fd, inode)
            if known is not None and not known[0].is_unix:
                self._by_peer[known[1].peer] = known
        if known is not None:
            known[1].fd = fd
        return inode, known

    def _read(self, fd: int, inode: int) -> tuple[_Address, _Connection] | None:
        """Give whose socket it is; None: no caller's."""
        try:
            with _borrow(fd) as one:
                here = one.getsockname()
                address = self._addresses.get(here[1] if isinstance(here, tuple) else here)
                if address is None:
                    return None
                if one.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    if not address.is_unix:
                        self._newcomers.add(fd)
                    return None
                there = one.getpeername()
                peer = _process_of(one) if address.is_unix else (_plain(there[0]), there[1])
        except OSError:
            return None  # its other end has gone
        return address, _Connection(fd, inode, peer, monotonic())

    async def _match(self, began: float) -> None:
        """Forget proofs of connections that are no more."""
        alive: dict[Peer, list[int]] = {}
        for address in self._addresses.values():
            if not address.is_unix:
                for one in address.connections:
                    alive.setdefault(one.peer, []).append(one.inode)
        for number, proof in enumerate(list(self._proofs.values())):
            if number % _AT_A_TIME == _AT_A_TIME - 1:
                await asyncio.sleep(0)
            if proof.at >= began or self._proofs.get(proof.peer) is not proof:
                continue  # it may have come after the look
            # Two may have one peer, at two of our addresses: what is proven stays what it was.
            inodes = alive.get(proof.peer, ())
            if not inodes or (proof.inode and proof.inode not in inodes):
                self._forget(proof)
            elif not proof.inode:
                proof.inode = inodes[0]

    def _unproven(self, address: _Address) -> list[_Connection]:
        """Give what has to go at a TCP address."""
        late = monotonic() - PROVE_S
        unproven = [one for one in address.connections if one.peer not in self._proofs]
        ended = [one for one in unproven if one.since < late]
        waiting = [one for one in unproven if one.since >= late]
        surplus = len(waiting) - address.most_unproven
        if surplus > 0:
            # Who means to prove something begins at once, and has not been here for long.
            waiting.sort(key=lambda one: (_has_spoken(one), one.since))
            ended += waiting[:surplus]
        return ended

    @staticmethod
    def _crowd(address: _Address) -> list[_Connection]:
        """Give what has to go at a Unix socket: the newest of who has the most."""
        surplus = len(address.connections) - address.most // 2
        if surplus <= 0:
            return []
        counts = Counter(one.peer for one in address.connections)
        level = _level(list(counts.values()), surplus)
        ended: list[_Connection] = []
        for one in sorted(address.connections, key=lambda one: -one.since):
            if counts[one.peer] > level and len(ended) < surplus:
                counts[one.peer] -= 1
                ended.append(one)
        return ended

    def _forget(self, proof: _Proof) -> None:
        del self._proofs[proof.peer], self._by_name[proof.name]
        self.shares.give(proof.identity.tenant or "")

    def _tell(self) -> None:
        now = monotonic()
        if now - self._logged_at < _LOG_EVERY_S:
            return
        for address in self._addresses.values():
            if address.num_ended:
                self._logged_at = now
                log.warning(
                    "connections ended that kept others out"
                    if address.is_unix
                    else "connections ended that proved nothing",
                    address=address.name,
                    number=address.num_ended,
                )
                address.num_ended = 0


def _level(counts: list[int], surplus: int) -> int:
    """Give down to how many each has to go, so that `surplus` go of those who have the most.

    >>> _level([30, 20, 1], 12), _level([30, 20, 1], 1), _level([1] * 60, 10)
    (19, 29, 8)
    """
    counts = sorted(counts, reverse=True)
    total = 0
    for number, count in enumerate(counts, start=1):
        total += count
        below = counts[number] if number < len(counts) else 0
        if total - number * below >= surplus:
            return max(_FEW, (total - surplus) // number)
    return _FEW


@contextlib.contextmanager
def _borrow(fd: int) -> Iterator[socket.socket]:
    """Look at a socket that is somebody else's, and leave it open."""
    one = socket.socket(fileno=fd)
    try:
        yield one
    finally:
        one.detach()


def _end(connection: _Connection) -> int:
    """Shut a connection down, if its descriptor is still its own; give how many that were."""
    connection.is_ended = True
    try:
        with socket.socket(fileno=os.dup(connection.fd)) as one:  # so that it is no other meanwhile
            if os.fstat(one.fileno()).st_ino != connection.inode:
                return 0
            one.shutdown(socket.SHUT_RDWR)
    except OSError:
        return 0  # it has gone by itself
    return 1


def _has_spoken(connection: _Connection) -> bool:
    """Whether anything ever came over a TCP connection."""
    try:
        with _borrow(connection.fd) as one:
            told = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
    except OSError:
        return False
    end = _RECEIVED_AT + _RECEIVED.size
    # An older kernel says nothing of it: then all are alike.
    return len(told) < end or _RECEIVED.unpack_from(told, _RECEIVED_AT)[0] > 0


def _process_of(one: socket.socket) -> Peer:
    told = one.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEERCRED.size)
    pid, uid, _ = _PEERCRED.unpack(told)
    return f"user {uid}", pid


def _read_peer(name: str) -> Peer | None:
    """Read gRPC's name of a caller; None if it did not come over TCP.

    >>> _read_peer("ipv4:127.0.0.1:5000"), _read_peer("ipv6:%5B::1%5D:5000"), _read_peer("unix:")
    (('127.0.0.1', 5000), ('::1', 5000), None)
    """
    scheme, _, rest = unquote(name).partition(":")
    host, _, port = rest.rpartition(":")
    if scheme not in ("ipv4", "ipv6") or not port.isdecimal():
        return None
    return _plain(host.strip("[]")), int(port)


def _plain(host: str) -> str:
    """Give an address of IPv4 as such, also where it came to a socket of IPv6."""
    return host.removeprefix("::ffff:")
