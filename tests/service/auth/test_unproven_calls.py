"""Calls without proof: some are answered, and whoever makes more is hung up on."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from patience import PATIENCE_S
from prefixcache.client import unary
from prefixcache.service.auth.unproven_calls import PER_CONNECTION
from service.auth.keys import TOKENS, identities
from service.service_process import ServiceProcess, running, sizes

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
LOOKUP, CHECK = "/prefixcache.v1.PrefixCache/Lookup", "/grpc.health.v1.Health/Check"
HEADERS, RESET = 1, 3
ENDS_STREAM = 1


def field(name: str, value: str) -> bytes:
    return b"\0" + bytes([len(name)]) + name.encode() + bytes([len(value)]) + value.encode()


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def call(path: str, stream: int, token: str = "") -> bytes:
    """A call with an empty message, as bytes of HTTP/2."""
    said = {":method": "POST", ":scheme": "http", ":path": path, ":authority": "x"}
    said |= {"content-type": "application/grpc", "te": "trailers"}
    if token:
        said["authorization"] = f"Bearer {token}"
    headers = b"".join(field(*one) for one in said.items())
    return frame(HEADERS, 4, stream, headers) + frame(0, 1, stream, bytes(5))


class Line:
    """A connection of somebody who writes HTTP/2 by hand."""

    def __init__(self, service: ServiceProcess) -> None:
        port = int(service.target.rpartition(":")[2])
        self.socket = socket.create_connection(("127.0.0.1", port), PATIENCE_S)
        self.socket.sendall(PREFACE)
        self._read = b""
        self._stream = 1
        self.is_open = True

    def ask(self, path: str, token: str = "") -> bool:
        """Make a call; give whether it was answered."""
        stream, self._stream = self._stream, self._stream + 2
        try:
            self.socket.sendall(call(path, stream, token))
            while True:
                kind, flags, of = self._frame()
                if of == stream and (flags & ENDS_STREAM and kind in (0, HEADERS)):
                    return True
                if of == stream and kind == RESET:
                    return False
        except (ConnectionError, EOFError):
            self.is_open = False
            return False

    def _frame(self) -> tuple[int, int, int]:
        head = self._take(9)
        length = int.from_bytes(head[:3], "big")
        kind, flags, stream = struct.unpack(">BBI", head[3:])
        self._take(length)
        return kind, flags, stream

    def _take(self, size: int) -> bytes:
        while len(self._read) < size:
            more = self.socket.recv(1 << 16)
            if not more:
                raise EOFError
            self._read += more
        taken, self._read = self._read[:size], self._read[size:]
        return taken


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    flags = ("--identities", str(identities(tmp_path_factory.mktemp("a"))))
    with running("127.0.0.1:0", *sizes(64, 4), *flags) as service:
        yield service


@pytest.mark.parametrize("path", [LOOKUP, CHECK, "/nobody.has/This"])
def test_whoever_goes_on_without_proof_is_hung_up_on(service: ServiceProcess, path: str) -> None:
    line = Line(service)
    with line.socket:
        answered = 0
        while line.is_open and answered <= 10 * PER_CONNECTION:
            answered += line.ask(path)
    assert not line.is_open
    assert answered <= PER_CONNECTION


def test_who_has_proven_himself_is_not_hung_up_on(service: ServiceProcess) -> None:
    """Whatever he forgets afterwards."""
    line = Line(service)
    with line.socket:
        assert line.ask(LOOKUP, TOKENS["acme"])
        for _ in range(3 * PER_CONNECTION):
            assert line.ask(LOOKUP)


def test_a_client_may_make_more_calls_than_a_connection_takes(service: ServiceProcess) -> None:
    """They wait in the client, and none is refused."""
    proof = (("authorization", f"Bearer {TOKENS['bolt']}"),)
    with grpc.insecure_channel(service.target) as channel:
        rpc = unary.RPCS["snapshot"]
        ask: Any = unary.asking(channel, "snapshot")
        calls = [ask.future(rpc.request(), metadata=proof, timeout=PATIENCE_S) for _ in range(1000)]
        assert [call.code() for call in calls if call.exception() is not None] == []


def test_a_socket_of_one_user_is_not_counted(tmp_path: Path) -> None:
    """There gRPC tells no callers apart, and the kernel let in nobody else."""
    flags = ("--identities", str(identities(tmp_path)))
    with (
        running(f"unix:{tmp_path}/s.sock", *sizes(64, 4), *flags) as service,
        grpc.insecure_channel(service.target) as channel,
    ):
        ask: Any = unary.asking(channel, "snapshot")
        for _ in range(10 * PER_CONNECTION):
            with pytest.raises(grpc.RpcError) as refused:
                ask(unary.RPCS["snapshot"].request(), timeout=PATIENCE_S)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
