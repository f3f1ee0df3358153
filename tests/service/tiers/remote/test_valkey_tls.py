"""A Valkey server behind TLS: who it is has to be shown, and the rest is as without."""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import ssl
from contextlib import ExitStack, closing
from pathlib import Path

import pytest
import trustme

from chaos.proxy import Proxy
from patience import PATIENCE_S
from prefixcache.config import ServeSettings
from prefixcache.errors import InvalidRequest
from prefixcache.remote_address import parse_remote
from prefixcache.service.backing import Backing
from prefixcache.service.tiers.remote.store import Got, RemoteError
from prefixcache.service.tiers.remote.valkey import Valkey
from service.service_process import eventually, running, sizes
from service.valkey_server import ValkeyServer, needs_valkey

SIZE = 100_000
NAMES = [f"k{at}" for at in range(5)]


class Front(Proxy):
    """Takes TLS, and passes on what is said to a server that has none."""

    def __init__(self, target: Path, leaf: trustme.LeafCert) -> None:
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        leaf.configure_cert(self.context)
        self.port = 0
        super().__init__(target.with_suffix(".unused"), target)

    async def _start(self) -> None:
        self._speaks = asyncio.Event()
        self._speaks.set()
        self._server = await asyncio.start_server(
            self._serve, "127.0.0.1", 0, ssl=self.context, ssl_handshake_timeout=PATIENCE_S
        )
        self.port = self._server.sockets[0].getsockname()[1]


@pytest.fixture
def server(tmp_path: Path, stack: ExitStack) -> ValkeyServer:
    server = ValkeyServer(tmp_path)
    stack.callback(server.kill)
    return server


@pytest.fixture
def authority(tmp_path: Path) -> trustme.CA:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    return authority


def front(stack: ExitStack, server: ValkeyServer, leaf: trustme.LeafCert) -> Front:
    front = Front(server.path, leaf)
    stack.callback(front.close)
    return front


def connect(stack: ExitStack, port: int, ca: Path | None) -> Valkey:
    address = parse_remote(f"valkeys://localhost:{port}")
    assert address is not None
    assert address.is_tls
    return stack.enter_context(closing(Valkey(address, "" if ca is None else str(ca))))


@needs_valkey
def test_what_is_said_by_tls_is_answered_as_without(
    tmp_path: Path,
    stack: ExitStack,
    server: ValkeyServer,
    authority: trustme.CA,
) -> None:
    before = front(stack, server, authority.issue_cert("localhost"))
    store = connect(stack, before.port, tmp_path / "ca.pem")
    store.connect()
    line = store._socket
    assert line is not None
    waiting = select.poll()
    waiting.register(line, select.POLLIN)
    assert waiting.poll(1000 * PATIENCE_S), "a ticket, which nobody has asked for"
    objects = [memoryview(bytearray(os.urandom(SIZE))) for _ in NAMES]
    assert store.put_from(NAMES, objects) == [True] * 5
    for _ in range(3):
        found = [memoryview(bytearray(SIZE)) for _ in NAMES]
        assert store.get_into(NAMES, found) == [Got.GOOD] * 5
        assert found == objects
        assert store.exists([*NAMES, "other"]) == b"\1" * 5 + b"\0"
    assert store._socket is line, "one connection, whatever TLS says of itself"
    before.drop()

    def is_another() -> bool:
        with contextlib.suppress(RemoteError):
            store.exists(NAMES)
        return store._socket not in (None, line)

    eventually(is_another)
    assert store.exists(NAMES) == b"\1" * 5


@needs_valkey
def test_who_does_not_show_who_he_is_is_told_nothing(
    tmp_path: Path, stack: ExitStack, server: ValkeyServer, authority: trustme.CA
) -> None:
    before = front(stack, server, authority.issue_cert("localhost"))
    with pytest.raises(RemoteError, match="certificate verify failed"):
        connect(stack, before.port, None).exists(NAMES)
    other = trustme.CA()
    other.cert_pem.write_to_path(tmp_path / "other.pem")
    with pytest.raises(RemoteError, match="certificate verify failed"):
        connect(stack, before.port, tmp_path / "other.pem").exists(NAMES)
    elsewhere = front(stack, server, authority.issue_cert("store.example"))
    with pytest.raises(RemoteError, match="certificate is not valid for 'localhost'"):
        connect(stack, elsewhere.port, tmp_path / "ca.pem").exists(NAMES)


@needs_valkey
def test_a_service_stores_by_tls(
    tmp_path: Path, stack: ExitStack, server: ValkeyServer, authority: trustme.CA
) -> None:
    before = front(stack, server, authority.issue_cert("localhost"))
    server.call("CONFIG", "SET", "maxmemory", "4mb")
    flags = ("--remote", f"valkeys://localhost:{before.port}")
    flags += ("--remote-ca", str(tmp_path / "ca.pem"))
    service = stack.enter_context(running(f"unix:{tmp_path}/s", *sizes(64, 4), *flags))
    (told,) = [line for line in service.lines if "it holds" in line]
    assert "it holds 4 MiB = about " in told, told
    assert told.endswith("tokens, of all who use it")


@pytest.mark.parametrize(
    ("remote", "ca", "why"),
    [
        ("valkey://localhost:1", "ca.pem", "--remote-ca is for"),
        (None, "ca.pem", "--remote-ca is for"),
        ("valkeys://localhost:1", "none.pem", "No such file"),
        ("valkeys://localhost:1", "garbage.pem", "--remote-ca .*garbage.pem: "),
    ],
)
def test_certificates_that_nobody_can_look_at_are_refused(
    tmp_path: Path, authority: trustme.CA, remote: str | None, ca: str, why: str
) -> None:
    (tmp_path / "garbage.pem").write_text("hello")
    with pytest.raises(InvalidRequest, match=why):
        Backing(ServeSettings(remote=remote, remote_ca=tmp_path / ca))  # type: ignore[arg-type]
