"""Connections over which nothing is proven: whatever they do, they keep nobody out."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Tls, unary
from prefixcache.errors import PoolExhausted
from prefixcache.service.auth import connections as module
from prefixcache.service.auth.connections import Connections
from prefixcache.service.auth.identity import Identities, Identity
from prefixcache.v1 import prefixcache_pb2 as pb
from service.auth.keys import TOKENS, identities
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

NUM_FILES = 256
"""So few that a connection more or less counts: 80 for callers, a quarter of them unproven."""
FLOOD = 300
MANY = "RESOURCE_EXHAUSTED"

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes.fromhex("000000040000000000")
HALF_HEADERS = bytes.fromhex("000040010000000001") + b"\x40"
"""The head of a frame that promises 64 bytes of headers, and one of them."""
ACKNOWLEDGED = bytes.fromhex("000000040100000000")
"""Without it gRPC itself ends a connection after 10 s."""
PING = bytes.fromhex("000008060000000000") + bytes(8)


class Setup:
    """A service at a TLS port, with a page."""

    def __init__(self, folder: Path) -> None:
        self.ca = folder / "ca.pem"
        authority = trustme.CA()
        authority.cert_pem.write_to_path(self.ca)
        issued = authority.issue_cert("localhost", "127.0.0.1")
        chain, key = folder / "chain.pem", folder / "key.pem"
        chain.write_bytes(b"".join(pem.bytes() for pem in issued.cert_chain_pems))
        issued.private_key_pem.write_to_path(key)
        key.chmod(0o600)
        self.flags = ["--identities", str(identities(folder)), "--http", "127.0.0.1:0"]
        self.flags += ["--tls-cert", str(chain), "--tls-key", str(key)]
        self.context = ssl.create_default_context(cafile=str(self.ca))
        self.context.set_alpn_protocols(["h2"])
        self.service: ServiceProcess

    @property
    def port(self) -> int:
        return int(self.service.target.rpartition(":")[2])

    @property
    def page(self) -> str:
        (line,) = (line for line in self.service.lines if line.startswith("page at "))
        return str(line.split()[2].rstrip("/"))

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_S)

    def speak(self, *words: bytes) -> socket.socket:
        raw = self.connect()
        try:
            spoken = self.context.wrap_socket(raw, server_hostname="localhost")
        except OSError:
            raw.close()
            raise
        try:
            for word in words:
                spoken.sendall(word)
        except OSError:
            spoken.close()
            raise
        return spoken

    def greet(self, *words: bytes) -> socket.socket:
        """Speak as a client does, until it would call."""
        spoken = self.speak(PREFACE)
        try:
            spoken.recv(4096)
            spoken.sendall(b"".join((ACKNOWLEDGED, *words)))
        except OSError:
            spoken.close()
            raise
        return spoken

    def client(self, who: str) -> prefixcache.Client:
        tls = Tls(ca=self.ca)
        return prefixcache.connect(
            f"localhost:{self.port}", tls=tls, token=TOKENS[who], timeout_s=PATIENCE_S
        )

    def is_served(self, who: str) -> None:
        """Let a worker attach and work, and somebody read the metrics."""
        with self.client(who) as client, client.attach("tiny", LAYOUT) as session:
            lease = session.acquire([1, 2, 3])
            lease.commit(3)
            lease.release()
        page = f"{self.page}/metrics"
        with urllib.request.urlopen(page, timeout=PATIENCE_S) as answer:  # noqa: S310 - our own
            assert answer.status == 200


@pytest.fixture
def setup(tmp_path: Path) -> Iterator[Setup]:
    setup = Setup(tmp_path)
    with running("127.0.0.1:0", *sizes(64, 4), *setup.flags, num_files=NUM_FILES) as setup.service:
        yield setup


def half_a_handshake(setup: Setup) -> socket.socket:
    hello, out = ssl.MemoryBIO(), ssl.MemoryBIO()
    with contextlib.suppress(ssl.SSLWantReadError):
        setup.context.wrap_bio(hello, out, server_hostname="localhost").do_handshake()
    raw = setup.connect()
    raw.sendall(out.read())
    return raw


KINDS: dict[str, Callable[[Setup], socket.socket]] = {
    "silent": Setup.connect,
    "half a handshake": half_a_handshake,
    "a handshake and no more": Setup.speak,
    "half a preface": lambda setup: setup.speak(PREFACE[:10]),
    "settings that are not acknowledged": lambda setup: setup.speak(PREFACE),
    "no call": Setup.greet,
    "pings": lambda setup: setup.greet(PING),
    "half the headers of a call": lambda setup: setup.greet(HALF_HEADERS),
}


@pytest.mark.parametrize("kind", KINDS)
def test_connections_that_prove_nothing_keep_no_worker_out(setup: Setup, kind: str) -> None:
    with contextlib.ExitStack() as held:
        for _ in range(FLOOD):
            with contextlib.suppress(OSError):  # refused: there are too many
                held.enter_context(KINDS[kind](setup))
        for who in ("acme", "bolt"):
            setup.is_served(who)


def test_a_connection_without_proof_ends_and_one_with_it_stays(setup: Setup) -> None:
    with setup.client("acme") as client, client.attach("tiny", LAYOUT) as session:
        lease = session.acquire([1, 2, 3])
        with setup.greet(HALF_HEADERS) as half, setup.greet(PING) as none:
            for later in (half, none):
                later.settimeout(PATIENCE_S)
                with contextlib.suppress(ConnectionResetError):
                    while later.recv(4096):
                        pass
        lease.commit(3)
        assert session.alive


def own_channel(setup: Setup) -> grpc.Channel:
    """Give a channel with a connection of its own."""
    credentials = grpc.ssl_channel_credentials(setup.ca.read_bytes())
    return grpc.secure_channel(
        f"localhost:{setup.port}", credentials, (("grpc.use_local_subchannel_pool", 1),)
    )


def test_a_tenant_has_no_more_connections_than_its_share(setup: Setup) -> None:
    rpc = unary.RPCS["snapshot"]
    refused = []
    metadata = (("authorization", f"Bearer {TOKENS['acme']}"),)
    with contextlib.ExitStack() as held:
        for _ in range(40):
            channel = held.enter_context(own_channel(setup))
            method: Any = channel.unary_unary(
                rpc.path, rpc.request.SerializeToString, rpc.response.FromString
            )
            try:
                method(pb.SnapshotRequest(), metadata=metadata, timeout=PATIENCE_S)
            except grpc.RpcError as error:
                refused.append((error.code().name, str(error.details())))
        assert len(refused) == 40 - 28
        for code, told in refused:
            assert code == MANY
            assert "tenant 'acme' has 28 connections over TCP" in told
            assert "12 are kept for the 2 other tenants" in told
        setup.is_served("bolt")
    eventually(lambda: is_answered(setup, "acme"))  # closed, they count no more


def is_answered(setup: Setup, who: str) -> bool:
    with setup.client(who) as client:
        try:
            client.snapshot()
        except PoolExhausted:
            return False
    return True


CROWD = f"""
import socket, sys
held = []
for _ in range({FLOOD}):
    one = socket.socket(socket.AF_UNIX)
    one.connect(sys.argv[1])
    try:
        one.sendall({PREFACE!r})
        one.recv(4096)
        one.sendall({ACKNOWLEDGED + HALF_HEADERS!r})
    except OSError:
        pass
    held.append(one)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_does_not_take_all_of_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "s.sock"
    flags = ("--identities", str(identities(tmp_path)))
    with (
        running(f"unix:{path}", *sizes(64, 4), *flags, num_files=NUM_FILES) as service,
        prefixcache.connect(service.target, token=TOKENS["bolt"]) as before,
        before.attach("tiny", LAYOUT) as session,
        subprocess.Popen(
            [sys.executable, "-c", CROWD, str(path)], stdin=-1, stdout=-1, text=True
        ) as crowd,
    ):
        try:
            assert crowd.stdout is not None
            assert crowd.stdout.readline() == "held\n"
            channel: Any = grpc.insecure_channel(
                service.target, (("grpc.use_local_subchannel_pool", 1),)
            )
            with channel:
                rpc = unary.RPCS["snapshot"]
                method = channel.unary_unary(
                    rpc.path, rpc.request.SerializeToString, rpc.response.FromString
                )
                metadata = (("authorization", f"Bearer {TOKENS['acme']}"),)
                method(
                    pb.SnapshotRequest(), metadata=metadata, timeout=PATIENCE_S, wait_for_ready=True
                )
            session.acquire([1, 2, 3]).commit(3)
        finally:
            crowd.kill()


def test_no_address_takes_the_connections_of_another(tmp_path: Path) -> None:
    """Nor the descriptors of the page: there are as many as for one address, for all together."""
    setup = Setup(tmp_path)
    more = ["--listen", "127.0.0.1:0", "--listen", "127.0.0.1:0"]
    with running(
        f"unix:{tmp_path}/s.sock", *more, *sizes(64, 4), *setup.flags, num_files=NUM_FILES
    ) as setup.service:
        ports = [int(one.rpartition(":")[2]) for one in setup.service.target.split(", ")[1:]]
        before = num_open(setup.service)
        with contextlib.ExitStack() as held:
            for port in ports:
                for _ in range(FLOOD):
                    held.enter_context(socket.create_connection(("127.0.0.1", port), PATIENCE_S))
            assert num_open(setup.service) - before < 80
            setup.is_served("acme")


def num_open(service: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


# ------------------------------------------------------------- the doorkeeper, with sockets of ours


class Port:
    """A listening socket of this process, and who is connected to it."""

    def __init__(self, most: int) -> None:
        self.listening = socket.create_server(("127.0.0.1", 0))
        self.connections = Connections()
        self.port = self.listening.getsockname()[1]
        self.connections.add(f"127.0.0.1:{self.port}", most)
        self.pairs: list[tuple[socket.socket, socket.socket]] = []

    def come(self) -> int:
        """Connect once more; give its number."""
        ours = socket.create_connection(("127.0.0.1", self.port))
        self.pairs.append((ours, self.listening.accept()[0]))
        return len(self.pairs) - 1

    def prove(self, number: int, identity: Identity) -> None:
        port = self.pairs[number][0].getsockname()[1]
        self.connections.prove(f"ipv4:127.0.0.1:{port}", identity)

    def left(self) -> list[int]:
        """Look; give the numbers of those that are still open."""
        asyncio.run(self.connections.look())
        left = []
        for number, (ours, _) in enumerate(self.pairs):
            ours.setblocking(False)
            try:
                ours.recv(1)
            except BlockingIOError:
                left.append(number)
            except OSError:
                pass
        return left

    def close(self) -> None:
        for one in (self.listening, *(end for pair in self.pairs for end in pair)):
            one.close()


ACME = Identity("acme-serving", "acme")


@pytest.fixture
def port() -> Iterator[Port]:
    port = Port(16)
    yield port
    port.close()


def test_of_the_unproven_the_silent_go_first_and_then_the_oldest(port: Port) -> None:
    for number in range(8):
        port.come()
        if number in (0, 2, 5, 6, 7):
            port.pairs[number][0].sendall(b"x")
    assert port.left() == [2, 5, 6, 7]
    port.prove(2, ACME)
    for _ in range(2):
        port.come()
    assert port.left() == [2, 5, 6, 7, 9]


def test_what_is_proven_is_so_until_its_identity_is_no_longer_as_it_was(
    port: Port, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 100.0
    monkeypatch.setattr(module, "monotonic", lambda: clock)
    file = Identities(identities(tmp_path))
    (acme,) = (one for one in file._by_name.values() if one.tenant == "acme")
    port.prove(port.come(), acme)
    port.come()
    assert port.left() == [0, 1]
    clock += module.PROVE_S + 1
    assert port.left() == [0]
    port.connections.set_tenants(file)
    assert port.left() == [0]
    (tmp_path / "other").mkdir()
    text = identities(tmp_path / "other").read_text().replace('"tiny*"', '"other"', 1)
    (tmp_path / "other" / "identities.toml").write_text(text)
    port.connections.set_tenants(Identities(tmp_path / "other" / "identities.toml"))
    assert port.connections.shares.total == 0
    assert port.left() == [0]  # it may prove who it is again
    clock += module.PROVE_S + 1
    assert port.left() == []


def test_a_connection_counts_until_it_is_closed(
    port: Port, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(module, "monotonic", lambda: float(next(clock)))
    limit = port.connections.shares.limit
    for _ in range(limit):
        port.prove(port.come(), ACME)
        port.prove(len(port.pairs) - 1, ACME)  # another call
    with pytest.raises(PoolExhausted, match=f"{limit} connections over TCP.*ulimit -n"):
        port.prove(port.come(), ACME)
    port.left()
    for end in port.pairs[0]:
        end.close()
    asyncio.run(port.connections.look())
    assert port.connections.shares.total == limit - 1
    port.connections.shares.check_counts()


def test_who_comes_from_the_same_port_to_another_address_takes_no_proof_away() -> None:
    port, other = Port(16), socket.create_server(("127.0.0.1", 0))
    port.connections.add(f"127.0.0.1:{other.getsockname()[1]}", 16)
    port.prove(port.come(), ACME)
    port.left()
    ours = port.pairs[0][0].getsockname()
    with (
        socket.socket() as second,
        other,
        contextlib.suppress(OSError),  # where the kernel does not let it
    ):
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(ours)
        second.connect(other.getsockname())
        with other.accept()[0]:
            assert port.left() == [0]
            assert port.connections.shares.total == 1
    assert port.left() == [0]
    port.close()


def test_the_patrol_goes_on_after_a_moment_without_a_descriptor(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It needs one itself to look at what is open: while there is none, it looks again later."""
    looks = 0

    def listdir(path: str) -> list[str]:
        nonlocal looks
        looks += 1
        if looks < 3:
            raise OSError(errno.EMFILE, "Too many open files", path)
        return []

    async def story() -> None:
        patrol = asyncio.ensure_future(Connections().patrol())
        async with asyncio.timeout(PATIENCE_S):
            while looks < 4 and not patrol.done():
                await asyncio.sleep(0.01)
        assert not patrol.done()
        patrol.cancel()

    monkeypatch.setattr(os, "listdir", listdir)
    asyncio.run(story())
    assert looks >= 4
