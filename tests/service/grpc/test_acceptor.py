"""No call ends the task that takes calls up; where it ends all the same, so does the service."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import Iterator
from pathlib import Path
from socket import AF_UNIX, SOCK_STREAM, socket

import grpc.aio
import pytest

import prefixcache
from fuzz.wire import PREFACE, SETTINGS, call
from patience import PATIENCE_S
from prefixcache.errors import ServiceUnavailable
from prefixcache.service import server as service_module
from prefixcache.service.grpc import acceptor
from service.service_process import LAYOUT, ServiceProcess, running, sizes

OURS = b"/prefixcache.v1.PrefixCache/"

PATHS = (
    *(OURS + b"Sess\xefon", OURS + b"\xed\xa0\x80", OURS + b"Lookup\xff", b"/\xc3\x28/x", b"\xff"),
    *(
        b"",
        b"/",
        b"//",
        OURS,
        OURS + b"\x00",
        b"\xc0\xaf" * 900,
        b"/\xf4\x90\x80\x80",
        b"\x80" * 99,
    ),
)


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceProcess]:
    with running(f"unix:{tmp_path}/s.sock", *sizes(64, 4)) as service:
        yield service


def test_no_path_of_a_call_ends_what_others_have(service: ServiceProcess) -> None:
    with (
        prefixcache.connect(service.target) as client,
        client.attach("m", LAYOUT) as session,
        session.acquire([1, 2, 3]) as lease,
    ):
        for path in PATHS:
            with socket(AF_UNIX, SOCK_STREAM) as raw:
                raw.settimeout(PATIENCE_S)
                raw.connect(service.target.removeprefix("unix:"))
                raw.sendall(PREFACE + SETTINGS + call(path))
                said = b""
                while b"grpc-status" not in said and (more := raw.recv(4096)):
                    said += more
        lease.commit(3)
        session.renew()
        assert session.alive
        with prefixcache.connect(service.target) as other:
            assert other.snapshot().num_leases == 1
    assert "Traceback" not in service.log()


def test_a_path_that_is_no_text_is_that_of_a_method_that_there_is_not(
    service: ServiceProcess,
) -> None:
    with socket(AF_UNIX, SOCK_STREAM) as raw:
        raw.settimeout(PATIENCE_S)
        raw.connect(service.target.removeprefix("unix:"))
        raw.sendall(PREFACE + SETTINGS + call(OURS + b"Look\xffup"))
        said = b""
        while b"grpc-message" not in said and (more := raw.recv(4096)):
            said += more
    assert grpc.StatusCode.UNIMPLEMENTED.value[0] == 12
    assert b"grpc-status\x0212" in said


def test_elsewhere_what_is_no_text_is_an_error_as_ever() -> None:
    before = codecs.lookup_error("strict")
    try:
        codecs.register_error("strict", acceptor._decode_strictly)
        with pytest.raises(UnicodeDecodeError):
            b"\xff".decode()
        with pytest.raises(UnicodeEncodeError):
            "\ud800".encode()

        async def here() -> str:
            return b"\xff".decode()

        with pytest.raises(UnicodeDecodeError):
            asyncio.run(here())
    finally:
        codecs.register_error("strict", before)


def test_a_service_that_takes_no_calls_ends_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[grpc.aio.Server] = []
    really = acceptor.start

    async def start(server: grpc.aio.Server, when_ended: object) -> None:
        await really(server, when_ended)  # type: ignore[arg-type]
        started.append(server)
        asyncio.get_running_loop().create_task(server.stop(None))

    monkeypatch.setattr(acceptor, "start", start)
    settings = service_module.ServeSettings(
        listen=[f"unix:{tmp_path}/s.sock"], memory=2**20, layout=LAYOUT, pool="none"
    )
    before = codecs.lookup_error("strict")
    try:
        with pytest.raises(ServiceUnavailable, match="gRPC took no calls any more"):
            asyncio.run(_serve(settings))
    finally:
        codecs.register_error("strict", before)
    assert len(started) == 1


async def _serve(settings: service_module.ServeSettings) -> None:
    await asyncio.wait_for(
        service_module._serve(settings, lambda line: None, service_module.Backing), PATIENCE_S
    )
