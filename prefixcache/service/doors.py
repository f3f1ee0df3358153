"""Doors: where callers come in.  One gRPC server per door, since what is behind them is one.

```
front door   --listen …            the gate asks each caller who he is
own door     a socket of the file  whoever can connect is that identity
```
gRPC does not tell a handler through which address a call came; so addresses that mean different
things are different servers, with the same handlers behind them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import grpc.aio

from prefixcache.client.address import default_target
from prefixcache.config import ServeSettings
from prefixcache.errors import InvalidRequest
from prefixcache.service.certificates import Certificates
from prefixcache.service.gate import Gate, Register
from prefixcache.service.listen import Listener


@dataclass(frozen=True, slots=True)
class Door:
    """Some addresses, the gate behind them, and their server."""

    listener: Listener
    gate: Gate
    server: grpc.aio.Server


def make_doors(settings: ServeSettings, register: Register) -> list[Door]:
    """Make all doors; nothing listens yet.

    Raises:
        InvalidRequest: an address must not be listened at, or a certificate cannot be read.
    """
    certificates = None
    if settings.tls_cert is not None:
        if settings.tls_key is None:
            raise InvalidRequest("--tls-cert needs --tls-key, the key of the certificate")
        certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_ca)
    identities = register.current
    front = Listener(
        settings.listen or [default_target()],
        certificates=certificates,
        is_guarded=identities is not None,
    )
    doors = [Door(front, Gate(register), _server(settings))]
    for socket in identities.sockets if identities is not None else ():
        listener = Listener([f"unix:{socket.path}"], owner=socket.uid)
        doors.append(Door(listener, Gate(register, socket.identity), _server(settings)))
    return doors


def _server(settings: ServeSettings) -> grpc.aio.Server:
    return grpc.aio.server(
        maximum_concurrent_rpcs=settings.max_calls,
        options=(
            ("grpc.max_receive_message_length", settings.max_message),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.max_concurrent_streams", settings.max_workers * 2),
            # Two services must not share one TCP port without knowing of each other.
            ("grpc.so_reuseport", 0),
        ),
    )


def open_doors(
    doors: list[Door], handler_of: Callable[[Gate], grpc.GenericRpcHandler]
) -> list[str]:
    """Put the handlers behind all doors, and bind their addresses; give these.

    Raises:
        ServiceUnavailable: the system refuses an address.
    """
    listening = []
    for door in doors:
        door.server.add_generic_rpc_handlers((handler_of(door.gate),))
        listening.extend(door.listener.bind(door.server))
    return listening
