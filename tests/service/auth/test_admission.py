"""Calls that prove nothing, and tenants that want every place: neither keeps others out."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import unary
from prefixcache.errors import CacheError
from prefixcache.service.auth.admission import Admission, Places
from prefixcache.service.auth.authenticator import Authenticator, IdentityFile
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.standing import OpenCalls
from prefixcache.service.grpc.unary import refuse
from prefixcache.v1 import prefixcache_pb2 as pb
from service.auth.keys import TOKENS, identities
from service.service_process import ServiceProcess, eventually, running, sizes

MAX_CALLS = 24
CHECK = "/grpc.health.v1.Health/Check"
OTHERS = (
    *(rpc.path for rpc in unary.RPCS.values()),
    unary.SESSION_PATH,
    unary.WATCH_PATH,
    "/grpc.health.v1.Health/Watch",
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo",
    "/grpc.channelz.v1.Channelz/GetServers",
    "/prefixcache.v1.PrefixCache/NobodyHasThis",
)


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("a")
    flags = ("--identities", str(identities(folder)), "--max-calls", str(MAX_CALLS))
    with running(f"unix:{folder}/s.sock", *sizes(64, 4), *flags) as service:
        yield service


def watch(channel: grpc.Channel, who: str) -> Any:
    method: Any = channel.unary_stream(
        unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
    )
    return method(pb.WatchRequest(), metadata=(("authorization", f"Bearer {TOKENS[who]}"),))


def test_a_tenant_watches_with_no_more_than_its_share(tmp_path: Path) -> None:
    flags = ("--identities", str(identities(tmp_path)), "--max-watchers", "6")
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service,
        grpc.insecure_channel(service.target) as channel,
    ):
        held = [watch(channel, "acme") for _ in range(5)]
        refused = []
        for call in held:
            try:
                next(call)
            except grpc.RpcError as error:
                refused.append(str(error.details()))
        assert len(refused) == 1
        assert "2 are kept for the 2 other tenants" in refused[0]
        for who in ("bolt", "boss"):
            held.append(watch(channel, who))
            next(held[-1])
        for call in held:
            call.cancel()


@pytest.fixture
def stranger(service: ServiceProcess) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(service.target) as channel:
        yield channel


class HungUp:
    """A call whose caller hangs up while it is told that it is let in."""

    def auth_context(self) -> dict[str, Any]:
        return {}

    def invocation_metadata(self) -> tuple[tuple[str, str], ...]:
        return (("authorization", f"Bearer {TOKENS['acme']}"),)

    async def send_initial_metadata(self, metadata: tuple[tuple[str, str], ...]) -> None:
        raise asyncio.CancelledError


def test_who_hangs_up_while_he_is_let_in_gives_his_place_back(tmp_path: Path) -> None:
    async def story() -> int:
        file = IdentityFile(identities(tmp_path))
        places, calls = Places(file, MAX_CALLS, Connections()), OpenCalls(file)
        admission = Admission(Authenticator(file), places, calls, refuse)

        async def find(details: Any) -> Any:
            return grpc.unary_stream_rpc_method_handler(lambda asked, context: None)

        class Details:
            method = unary.WATCH_PATH

        handler = await admission.intercept_service(find, Details)
        for _ in range(2 * MAX_CALLS):
            with pytest.raises(asyncio.CancelledError):
                await handler.stream_stream(None, HungUp())
        assert not len(calls)
        return places.calls.total

    assert asyncio.run(story()) == 0


def test_streams_that_are_hung_up_at_once_leave_their_places(service: ServiceProcess) -> None:
    with grpc.insecure_channel(service.target) as channel:
        for number in range(8 * MAX_CALLS):
            call = watch(channel, "acme")
            time.sleep(0.0003 * (number % 8))
            call.cancel()
    with prefixcache.connect(service.target, token=TOKENS["acme"]) as client:

        def has_places() -> bool:
            try:
                return client.snapshot() is not None
            except CacheError:
                return False

        eventually(has_places)


class Silent:
    """A call whose caller sends its headers, and then nothing for as long as it likes."""

    def __init__(self, channel: grpc.Channel, path: str, token: str | None = None) -> None:
        method: Any = channel.stream_stream(path, bytes, bytes)
        metadata = None if token is None else (("authorization", f"Bearer {token}"),)
        self._end = threading.Event()
        self.call = method(self._nothing(), metadata=metadata, timeout=PATIENCE_S)
        self.call.add_callback(self._end.set)

    def _nothing(self) -> Iterator[bytes]:
        self._end.wait(PATIENCE_S)
        yield from ()


def is_answered(service: ServiceProcess, who: str) -> bool:
    with prefixcache.connect(service.target, token=TOKENS[who], timeout_s=PATIENCE_S) as client:
        try:
            client.snapshot()
        except CacheError:
            return False
    return True


@pytest.mark.parametrize("path", OTHERS)
def test_nothing_but_the_health_check_is_answered_without_proof(
    stranger: grpc.Channel, path: str
) -> None:
    """Nor is anything waited for: the refusal comes before the first message."""
    call = Silent(stranger, path).call
    with pytest.raises(grpc.RpcError) as refused:
        next(call)
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
    call.cancel()


def test_who_proves_himself_is_told_that_nobody_has_a_method(service: ServiceProcess) -> None:
    proof = (("authorization", f"Bearer {TOKENS['acme']}"),)
    with grpc.insecure_channel(service.target) as channel:
        method: Any = channel.unary_unary("/prefixcache.v1.PrefixCache/NobodyHasThis", bytes, bytes)
        with pytest.raises(grpc.RpcError) as refused:
            method(b"", metadata=proof, timeout=PATIENCE_S)
    assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED


@pytest.mark.slow
def test_all_of_many_calls_at_once_are_answered(tmp_path: Path) -> None:
    """Left to itself gRPC ends some at random, of a thousand that nobody has looked at yet."""
    proof = (("authorization", f"Bearer {TOKENS['acme']}"),)
    flags = ("--identities", str(identities(tmp_path)), "--max-calls", "4096")
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service,
        grpc.insecure_channel(service.target) as channel,
    ):
        rpc = unary.RPCS["snapshot"]
        ask = unary.asking(channel, "snapshot")
        ask(rpc.request(), metadata=proof, timeout=PATIENCE_S)
        calls = [ask.future(rpc.request(), metadata=proof, timeout=PATIENCE_S) for _ in range(2000)]
        failed = [call.code() for call in calls if call.exception() is not None]
    assert failed == []


def test_the_health_check_is(stranger: grpc.Channel) -> None:
    method: Any = stranger.unary_unary(
        CHECK,
        health_pb2.HealthCheckRequest.SerializeToString,
        health_pb2.HealthCheckResponse.FromString,
    )
    answer = method(health_pb2.HealthCheckRequest(), timeout=PATIENCE_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_who_proves_nothing_takes_no_place_from_who_does(
    service: ServiceProcess, stranger: grpc.Channel
) -> None:
    held = [Silent(stranger, CHECK).call for _ in range(4 * MAX_CALLS)]
    held += [Silent(stranger, path).call for path in OTHERS for _ in range(4)]
    assert all(is_answered(service, who) for who in TOKENS)
    for call in held:
        call.cancel()


def test_a_tenant_takes_no_place_that_is_kept_for_another(service: ServiceProcess) -> None:
    with grpc.insecure_channel(service.target) as channel:
        method: Any = channel.unary_stream(
            unary.WATCH_PATH, pb.WatchRequest.SerializeToString, pb.WatchResponse.FromString
        )
        metadata = (("authorization", f"Bearer {TOKENS['acme']}"),)
        held = [method(pb.WatchRequest(), metadata=metadata) for _ in range(2 * MAX_CALLS)]
        codes = set()
        for call in held:
            try:
                next(call)
            except grpc.RpcError as error:
                codes.add((error.code(), "--max-calls" in str(error.details())))
        assert codes == {(grpc.StatusCode.RESOURCE_EXHAUSTED, True)}
        assert not is_answered(service, "acme")
        assert is_answered(service, "bolt")
        assert is_answered(service, "boss")
        for call in held:
            call.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("path", [CHECK, unary.RPCS["lookup"].path])
def test_a_call_without_its_message_ends(service: ServiceProcess, path: str) -> None:
    with grpc.insecure_channel(service.target) as channel:
        call = Silent(channel, path, TOKENS["acme"]).call
        with pytest.raises(grpc.RpcError) as refused:
            next(call)
        assert refused.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
        assert "no message" in refused.value.details()
        call.cancel()
