"""Unary calls: paths and messages of every verb, requests that need no session, and rich errors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import grpc
from google.protobuf.message_factory import GetMessageClass

from prefixcache.client import codec
from prefixcache.client.address import Address
from prefixcache.errors import CacheError, InvalidRequest, Unauthenticated
from prefixcache.types import Namespace, TokensLike, pack
from prefixcache.v1 import prefixcache_pb2 as pb

SERVICE: Final = pb.DESCRIPTOR.services_by_name["PrefixCache"].full_name
SESSION_PATH: Final = f"/{SERVICE}/Session"
WATCH_PATH: Final = f"/{SERVICE}/Watch"
ERROR_DOMAIN: Final = "prefixcache"
DETAILS_KEY: Final = "grpc-status-details-bin"

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


@codec.no_foreign_errors("lookup")
def lookup(namespace: Namespace, tokens: TokensLike) -> pb.LookupRequest:
    """Build a request that needs no worker."""
    request = pb.LookupRequest(tokens=pack(tokens))
    codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("explain")
def explain(namespace: Namespace, tokens: TokensLike) -> pb.ExplainRequest:
    """Build a request that needs no worker."""
    request = pb.ExplainRequest(tokens=pack(tokens))
    codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("check")
def check(max_runs: int) -> pb.CheckRequest:
    """Build a request that needs no worker."""
    return pb.CheckRequest(max_runs=max_runs)


@codec.no_foreign_errors("recount")
def recount(name: str, namespace: Namespace | None) -> pb.ExplainRequest:
    """Build a request that needs no worker."""
    request = pb.ExplainRequest(request_id=name)
    if namespace is not None:
        codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("reset")
def reset(namespace: Namespace) -> pb.ResetRequest:
    """Build a request that needs no worker."""
    request = pb.ResetRequest()
    codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("pin")
def pin(namespace: Namespace, tokens: TokensLike, ttl_s: float) -> pb.PinRequest:
    """Build a request that needs no worker."""
    codec.check_seconds("ttl_s", ttl_s)
    request = pb.PinRequest(tokens=pack(tokens), ttl_s=ttl_s)
    codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("unpin")
def unpin(namespace: Namespace, tokens: TokensLike) -> pb.UnpinRequest:
    """Build a request that needs no worker."""
    request = pb.UnpinRequest(tokens=pack(tokens))
    codec.write_namespace(namespace, request.namespace)
    return request


@codec.no_foreign_errors("quota")
def quota(
    scope: Namespace | str,
    *,
    change: bool = False,
    max_held: int | None = None,
    guaranteed: int = 0,
) -> pb.QuotaRequest:
    """Build a request that tells, or changes, a quota.

    Raises:
        InvalidRequest: a number that no message can hold.
    """
    request = pb.QuotaRequest(set=change)
    if isinstance(scope, str):
        request.tenant = scope
    else:
        request.namespace.SetInParent()
        codec.write_namespace(scope, request.namespace)
    if max_held is not None:
        request.max_held = max_held
    request.guaranteed = guaranteed
    return request


def read_rpc_error(error: Any, address: Address, timeout_s: float) -> CacheError:
    """Give the exception for a call that failed: the service's own, or one about the connection."""
    # Imported here: a client that meets no error never pays for these modules.
    from google.rpc import error_details_pb2, status_pb2  # type: ignore[import-untyped]

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
