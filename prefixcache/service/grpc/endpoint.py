"""Endpoints: where callers come in, each a gRPC server of its own before the same handlers.

```
front     --listen …            the authenticator asks each caller who he is
own       a socket of the file  whoever can connect is that identity
```
gRPC does not tell a handler through which address a call came; so addresses that mean different
things are different servers, with the same handlers behind them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import grpc.aio

from prefixcache.client.address import default_target
from prefixcache.config import ServeSettings
from prefixcache.errors import InvalidRequest
from prefixcache.service.auth.admission import Admission, Places
from prefixcache.service.auth.authenticator import Authenticator, IdentityFile
from prefixcache.service.auth.certificates import Certificates
from prefixcache.service.auth.connections import MOST_STREAMS, Connections
from prefixcache.service.auth.identity import Socket
from prefixcache.service.auth.standing import OpenCalls
from prefixcache.service.descriptors import Descriptors
from prefixcache.service.grpc.listener import Listener
from prefixcache.service.grpc.unary import refuse

_HANDSHAKE_MS = 10_000
_MOST_PENDING = 1 << 14
"""Calls of which gRPC has read no more than the headers: beyond it, it ends some, whosever."""
_IDLE_MS = 60_000
"""After this long without a call a connection is closed; clients open another when they need it."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Some addresses, the authenticator behind them, and their server."""

    listener: Listener
    authenticator: Authenticator
    server: grpc.aio.Server
    most: int
    """Connections at each of the addresses."""


def make_endpoints(
    settings: ServeSettings,
    identity_file: IdentityFile,
    calls: OpenCalls,
    descriptors: Descriptors,
    connections: Connections,
) -> list[Endpoint]:
    """Make all endpoints; nothing listens yet.

    Args:
        settings: The service's.
        identity_file: Who may come in.
        calls: Gets what is open at all of them, where callers have to prove who they are.
        descriptors: How many connections there may be.
        connections: Gets all of them that come by TCP.

    Raises:
        InvalidRequest: an address must not be listened at, or a certificate cannot be read.
    """
    certificates = None
    if settings.tls_cert is not None:
        if settings.tls_key is None:
            raise InvalidRequest("--tls-cert needs --tls-key, the key of the certificate")
        certificates = Certificates(settings.tls_cert, settings.tls_key, settings.tls_ca)
    identities = identity_file.current
    front = Listener(
        settings.listen or [default_target()],
        certificates=certificates,
        is_guarded=identities is not None,
    )
    places = Places(identity_file, settings.max_calls, connections)

    def endpoint(listener: Listener, own: Socket | None = None) -> Endpoint:
        authenticator = Authenticator(identity_file, own, connections if listener.has_tcp else None)
        guards = () if identities is None else (Admission(authenticator, places, calls, refuse),)
        most = descriptors.front if own is None else descriptors.own
        streams = settings.max_workers * 2
        if guards and listener.has_tcp:
            streams = MOST_STREAMS
        return Endpoint(listener, authenticator, _server(settings, guards, most, streams), most)

    endpoints = [endpoint(front)]
    for socket in identities.sockets if identities is not None else ():
        listener = Listener([f"unix:{socket.path}"], owner=socket.uid)
        endpoints.append(endpoint(listener, socket))
    return endpoints


def _server(
    settings: ServeSettings,
    guards: Sequence[grpc.aio.ServerInterceptor],
    most: int,
    most_streams: int,
) -> grpc.aio.Server:
    return grpc.aio.server(
        # Where callers prove who they are, their calls are counted once that is known: gRPC's own
        # count would let those who prove nothing take the last place.
        maximum_concurrent_rpcs=None if guards else settings.max_calls,
        interceptors=guards,
        options=(
            ("grpc.max_receive_message_length", settings.max_message),
            ("grpc.max_send_message_length", -1),
            ("grpc.max_metadata_size", 16 * 1024),
            ("grpc.max_concurrent_streams", most_streams),
            # Who makes more calls waits for his own; gRPC would refuse some of them, by lot.
            ("grpc.http.overload_protection", 0),
            ("grpc.server.max_pending_requests", _MOST_PENDING),
            ("grpc.server.max_pending_requests_hard_limit", _MOST_PENDING),
            ("grpc.server_handshake_timeout_ms", _HANDSHAKE_MS),
            ("grpc.http2.settings_timeout", _HANDSHAKE_MS),
            # A session is a call: only connections without any are idle.
            ("grpc.max_connection_idle_ms", _IDLE_MS),
            ("grpc.max_allowed_incoming_connections", most),
            # Two services must not share one TCP port without knowing of each other.
            ("grpc.so_reuseport", 0),
        ),
    )


def open_endpoints(
    endpoints: list[Endpoint],
    handler_of: Callable[[Authenticator], grpc.GenericRpcHandler],
    connections: Connections,
) -> list[str]:
    """Put the handlers behind all endpoints, and bind their addresses; give these.

    Args:
        endpoints: All of them.
        handler_of: Makes the handlers behind an authenticator.
        connections: Look after the addresses from then on.

    Raises:
        ServiceUnavailable: the system refuses an address.
    """
    listening = []
    for endpoint in endpoints:
        endpoint.server.add_generic_rpc_handlers((handler_of(endpoint.authenticator),))
        for address in endpoint.listener.bind(endpoint.server):
            connections.add(address, endpoint.most)
            listening.append(address)
    return listening
