"""The transport: paths and messages of every verb, options of a channel, and rich errors."""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from prefixcache.client import codec
from prefixcache.client.address import Address
from prefixcache.errors import CacheError, InvalidRequest, Unauthenticated
from prefixcache.types import shown
from prefixcache.v1 import prefixcache_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["PrefixCache"].full_name
SESSION_PATH: Final = f"/{SERVICE}/Session"
WATCH_PATH: Final = f"/{SERVICE}/Watch"
ERROR_DOMAIN: Final = "prefixcache"
DETAILS_KEY: Final = "grpc-status-details-bin"

_GRANTS: Final = frozenset(("acquire", "fork"))
"""Verbs whose answers are leases."""

FIRST_MESSAGE_BYTES: Final = 1 << 20
"""What a client may send before the service has told its limits."""

CHANNEL_OPTIONS: Final = (
    # The service bounds what it accepts; what it answers is welcome at any size.
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    # A worker that lost its service wants to notice within a second that it is back.
    ("grpc.initial_reconnect_backoff_ms", 100),
    # In spite of its name, how long one attempt to connect may take: a busy service is not absent.
    ("grpc.min_reconnect_backoff_ms", 5000),
    ("grpc.max_reconnect_backoff_ms", 500),
    # Two clients of one process must not share the state of one broken connection.
    ("grpc.use_local_subchannel_pool", 1),
    # The service is on this machine: an HTTP proxy can only be in the way.
    ("grpc.enable_http_proxy", 0),
)


@dataclass(frozen=True, slots=True)
class Rpc:
    """One unary RPC: its path and the classes of its messages."""

    path: str
    request: Any
    response: Any


RPCS: Final[dict[str, Rpc]] = {
    method.name.lower(): Rpc(
        f"/{SERVICE}/{method.name}",
        GetMessageClass(method.input_type),
        GetMessageClass(method.output_type),
    )
    for method in pb.DESCRIPTOR.services_by_name["PrefixCache"].methods
    if not method.server_streaming
}
"""Unary RPCs by verb, read from the generated descriptor."""


def asking(channel: Any, verb: str) -> Any:
    """Give the method of a channel that makes one unary call.

    Raises:
        InvalidRequest: there is no such call.
    """
    rpc = RPCS.get(verb) if isinstance(verb, str) else None
    if rpc is None:
        raise InvalidRequest(f"{shown(verb)} is none of {', '.join(RPCS)}")
    return channel.unary_unary(rpc.path, rpc.request.SerializeToString, rpc.response.FromString)


def undoable(verb: str, request: Any) -> tuple[Any, pb.ReleaseRequest | None]:
    """Give a request, and what undoes it if its answer is lost; None where nothing has to be.

    Whoever hangs up cannot know whether leases were on their way to him.  A request without an id
    gets one; with an id of its own it can be made again, and whoever does that gets its leases.
    """
    if verb not in _GRANTS or request.request_id:
        return request, None
    named = type(request)()
    named.CopyFrom(request)
    named.request_id = secrets.token_hex(8)
    return named, pb.ReleaseRequest(worker_key=named.worker_key, request_id=named.request_id)


def watching(channel: Any) -> Any:
    """Give the method of a channel that opens a stream of events."""
    return channel.unary_stream(
        WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
    )


def session_of(channel: Any) -> Any:
    """Give the method of a channel that opens a session; its messages are bytes already."""
    return channel.stream_stream(SESSION_PATH, None, pb.OpResults.FromString)


def read_rpc_error(error: Any, address: Address, timeout_s: float) -> CacheError:
    """Give the exception for a call that failed: the service's own, or one about the connection."""
    # Imported here: a client that meets no error never pays for these modules.
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

    # A call that has failed is the exception itself, and the frames that it has passed know it.  In
    # such a circle they, and the pool that a caller of theirs has mapped, would stay until the
    # garbage collector comes by.
    error.__traceback__ = None
    code: grpc.StatusCode = error.code()
    text: str = error.details() or ""
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        kind, retry_s = "", 0.0
        for detail in status_pb2.Status.FromString(value).details:
            if detail.Is(error_details_pb2.ErrorInfo.DESCRIPTOR):
                info = error_details_pb2.ErrorInfo()
                detail.Unpack(info)
                kind = info.reason
            elif detail.Is(error_details_pb2.RetryInfo.DESCRIPTOR):
                retry = error_details_pb2.RetryInfo()
                detail.Unpack(retry)
                retry_s = retry.retry_delay.ToTimedelta().total_seconds()
        return codec.make_error(kind, code.name, text, retry_s)
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return address.unavailable(f"no answer within {timeout_s:g} s")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return address.unavailable(text.partition("\n")[0] or "connection lost")
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED and "larger than max" in text:
        # The transport's limit on a message: it would be refused as often as it is sent.
        return InvalidRequest(text)
    return codec.make_error("", code.name, f"{code.name}: {text}")


def read_stream_error(error: Any) -> CacheError | str:
    """Give why a session's stream ended: in words, or as the error if nobody may attach again."""
    if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED):
        return (error.details() or "").partition("\n")[0] or "connection lost"
    cause = read_rpc_error(error, Address(), 0.0)
    return cause if isinstance(cause, Unauthenticated) else str(cause)
