"""Mooncake Store: objects lie in the memory of data nodes; a master knows which one has what.

Needs the extra `mooncake`.  Each of its clients listens on all interfaces of the machine, whatever
address it is given, without asking anybody who he is: who reaches them may read and write what is
registered.  So nothing is registered but the slots through which objects go, and a client is made
only if every interface that is up was named as safe, but for the loopback: in a network namespace,
or a container, with one of its own, or on a machine that has no other.

A call may hang for as long as a data node does.  Nobody here can end it: the service ends the
carrier.
"""

from __future__ import annotations

import fcntl
import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from prefixcache.extras import how_to_install
from prefixcache.remote_address import RemoteAddress
from prefixcache.service.tiers.remote.store import Got, RemoteError

_GET_FLAGS: Final = 0x8913
_GET_ADDRESS: Final = 0x8915
_IS_UP: Final = 1
_LOOPBACK: Final = "lo"
_REQUEST: Final = struct.Struct("16sh22x")

_NOT_THERE: Final = (-704, -707)
"""What a client says of an object that is not there, or no more."""
_THERE: Final = (0, -705)
"""What it says once an object is stored, or was there already."""
_NO_ROOM: Final = -200
_BUFFER_BYTES: Final = 16 << 20


def interfaces_up() -> dict[str, str]:
    """Give the interfaces of this network namespace that are up, each with its address, if any."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        for _, name in socket.if_nameindex():
            told = fcntl.ioctl(asked, _GET_FLAGS, _REQUEST.pack(name.encode(), 0))
            if not _REQUEST.unpack(told)[1] & _IS_UP:
                continue
            try:
                told = fcntl.ioctl(asked, _GET_ADDRESS, _REQUEST.pack(name.encode(), 0))
            except OSError:
                found[name] = ""
            else:
                found[name] = str(ipaddress.IPv4Address(told[20:24]))
    return found


def check_interfaces(safe: str) -> str:
    """See that all of our interfaces are safe; give the address of the one that is named.

    Raises:
        RemoteError: another is up; or the named one is not, or has no address.
    """
    up = interfaces_up()
    if not safe:
        raise RemoteError(
            f"a Mooncake client listens on all interfaces ({', '.join(up)}), and lets everybody "
            "in: name the one that is safe with --remote-interface, in a network namespace that "
            "has no other"
        )
    if others := sorted(set(up) - {safe, _LOOPBACK}):
        raise RemoteError(
            f"a Mooncake client listens on all interfaces, and {', '.join(others)} "
            f"{'is' if len(others) == 1 else 'are'} up beside {safe}, which alone was said to be "
            "safe: run the service in a network namespace without"
        )
    if not up.get(safe):
        raise RemoteError(f"the interface {safe} is not up here, or has no IPv4 address")
    return up[safe]


class Mooncake:
    """A client of a master, made when it is first needed; all threads of a carrier share it.

    Args:
        address: Of the master.
        interface: The one that is safe.
        memory: Address and size of the slots.

    Raises:
        RemoteError: not all interfaces are safe.
    """

    def __init__(self, address: RemoteAddress, interface: str, memory: tuple[int, int]) -> None:
        check_interfaces(interface)
        self._address = address
        self._interface = interface
        self._memory = memory
        self._client: Any = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Make the client, if there is none.

        Raises:
            RemoteError: it cannot be made.
        """
        with self._lock:
            if self._client is None:
                self._client = self._make()

    def _make(self) -> Any:
        host = check_interfaces(self._interface)
        os.environ.setdefault("GLOG_minloglevel", "2")  # it writes a page for each start
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")
        try:
            from mooncake.store import MooncakeDistributedStore
        except ImportError as error:
            raise RemoteError(f"{error}: {how_to_install('mooncake', module='mooncake')}") from None
        client = MooncakeDistributedStore()
        master = f"{self._address.host}:{self._address.port}"
        # No segment of its own: nobody's objects lie in this process.
        told = client.setup(
            f"{host}:{_free_port(host)}", "P2PHANDSHAKE", 0, _BUFFER_BYTES, "tcp", "", master
        )
        if told:
            raise RemoteError(f"{self._address}: no client can be made ({told})")
        if told := client.register_buffer(*self._memory):
            raise RemoteError(f"{self._address}: the slots cannot be registered ({told})")
        return client

    def exists(self, names: Sequence[str]) -> bytes:
        """Say which of these it has: a byte for each, 0 for no."""
        told = self._call(lambda client: client.batch_is_exist(list(names)), len(names))
        self._refuse([one for one in told if one < 0])
        return bytes(one == 1 for one in told)

    def get_into(self, names: Sequence[str], slots: Sequence[memoryview]) -> list[Got]:
        """Fetch objects, each into its slot; see `RemoteTier`."""
        places, sizes = self._places(slots)
        told = self._call(
            lambda client: client.batch_get_into(list(names), places, sizes), len(names)
        )
        self._refuse([one for one in told if one < 0 and one not in _NOT_THERE])
        return [_got(one, size) for one, size in zip(told, sizes, strict=True)]

    def put_from(self, names: Sequence[str], slots: Sequence[memoryview]) -> list[bool]:
        """Store what lies in slots; see `RemoteTier`."""
        places, sizes = self._places(slots)
        told = self._call(
            lambda client: client.batch_put_from(list(names), places, sizes), len(names)
        )
        self._refuse([one for one in told if one not in _THERE])
        return [one in _THERE for one in told]

    def remove(self, names: Sequence[str]) -> None:
        """Remove objects, those that are not there as well."""
        told = self._call(lambda client: [client.remove(name) for name in names], len(names))
        self._refuse([one for one in told if one < 0 and one not in _NOT_THERE])

    def _call(self, call: Callable[[Any], Any], count: int) -> list[int]:
        self.connect()
        try:
            told = [int(one) for one in call(self._client)]
        except (TypeError, ValueError, RuntimeError) as error:
            raise RemoteError(f"{self._address}: {error}") from None
        if len(told) != count:
            raise RemoteError(f"{self._address}: {len(told)} answers for {count} objects")
        return told

    def _refuse(self, codes: list[int]) -> None:
        """Raise if a call has failed for another reason than what it was about."""
        if codes:
            why = "has no room" if codes[0] == _NO_ROOM else f"fails (code {codes[0]})"
            raise RemoteError(f"{self._address}: {why}")

    def _places(self, slots: Sequence[memoryview]) -> tuple[list[int], list[int]]:
        """Give where slots are in memory, and their sizes."""
        arrays = [np.frombuffer(slot, np.uint8) for slot in slots]
        return [int(one.ctypes.data) for one in arrays], [len(one) for one in arrays]


def _got(told: int, size: int) -> Got:
    """Give what became of an object: a client tells its bytes, or why it has none."""
    if told < 0:
        return Got.NOTHING
    return Got.GOOD if told == size else Got.WRONG


def _free_port(host: str) -> int:
    """Give a port that nobody has now."""
    with socket.socket() as asked:
        asked.bind((host, 0))
        port: int = asked.getsockname()[1]
        return port
