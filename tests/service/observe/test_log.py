"""What callers do is no fault of the service, and fills no log with how it was noticed."""

from __future__ import annotations

import io
import logging
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket

import grpc
import pytest
from google.protobuf.message import DecodeError

import prefixcache
from fuzz.wire import PREFACE, SETTINGS, call
from patience import PATIENCE_S
from prefixcache.service.observe import log as log_module
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service:
        yield service


def written(name: str, message: str, error: Exception) -> str:
    """What is written of a line that a library logs with an error."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(log_module._Plain())
    handler.addFilter(log_module._of_callers)
    try:
        raise error
    except (grpc.aio.BaseError, DecodeError, ValueError, KeyError) as raised:
        exc_info = (type(raised), raised, raised.__traceback__)
        handler.handle(logging.LogRecord(name, 40, "", 0, message, (), exc_info))
    return stream.getvalue()


def test_who_hangs_up_is_no_event_and_bytes_that_are_none_are_a_line() -> None:
    grpcs = "grpc._cython.cygrpc"
    assert written(grpcs, "raised in core", grpc.aio.BaseError()) == ""
    assert written(grpcs, "Unexpected [DecodeError]", DecodeError("x")).count("\n") == 1
    assert written(grpcs, "Invalid encoding on b'x'", ValueError("x")).count("\n") == 1
    assert "Traceback" in written(grpcs, "Unexpected [KeyError]", KeyError("ours"))
    assert "Traceback" in written("asyncio", "never retrieved", DecodeError("ours"))


def test_callers_put_no_traceback_into_the_log(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("m", LAYOUT) as session,
    ):
        for path in ("/grpc.health.v1.Health/Check", "/prefixcache.v1.PrefixCache/Lookup"):
            with pytest.raises(grpc.RpcError):
                client.channel.unary_unary(path)(b"\xff\xff\xff", timeout=PATIENCE_S)
        for _ in range(40):
            with socket(AF_UNIX, SOCK_STREAM) as raw:
                raw.connect(service.target.removeprefix("unix:"))
                raw.sendall(PREFACE + SETTINGS + call(b"/prefixcache.v1.PrefixCache/Watch"))
                raw.sendall(call(b"/prefixcache.v1.PrefixCache/Snapshot", 3))
        eventually(lambda: "DecodeError" in service.log())
        session.renew()
    assert "Traceback" not in service.log()
