"""Addresses that cannot be served at: each is refused for its own reason, and nothing is made."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from prefixcache.errors import InvalidRequest, ServiceUnavailable
from prefixcache.service.grpc.listener import Listener
from prefixcache.service.http.http_server import read_address
from service.events.publishing import published
from service.http.scraped import free_port


@pytest.mark.parametrize(
    "target",
    ["tcp://0.0.0.0:50051", "tcp:/0.0.0.0:50051", "http://localhost:1", "dns:///localhost:1"],
)
def test_a_scheme_that_is_not_known_is_no_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InvalidRequest, match="has the scheme"):
        Listener([target]).claim()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("target", "told"),
    [
        ("8080", "the host is missing; write 127.0.0.1:8080"),
        ("localhost", "the host is missing; write 127.0.0.1:8080"),
        ("127.0.0.1:99999", "'99999' is no port"),
        ("127.0.0.1:-1", "'-1' is no port"),
        ("127.0.0.1:", "'' is no port"),
        ("127.0.0.1:" + "9" * 5000, "is no port"),
        ("0.0.0.0:8080", "on this machine only; write 127.0.0.1:8080"),
        ("[::]:8080", "on this machine only; write 127.0.0.1:8080"),
        ("example.org:80", "on this machine only; write 127.0.0.1:80"),
        ("unix:/run/page.sock", "neither sockets nor paths; write 127.0.0.1:PORT"),
        ("/run/page.sock", "neither sockets nor paths; write 127.0.0.1:PORT"),
    ],
)
def test_the_page_says_what_is_wrong_with_its_address(target: str, told: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        read_address(target)
    assert str(refused.value).startswith("--http")
    assert told in str(refused.value)
    assert "gRPC" not in str(refused.value)
    assert "pool" not in str(refused.value)


@pytest.mark.parametrize("target", ["127.0.0.1:0", "localhost:8080", "[::1]:65535"])
def test_the_page_is_shown_on_the_loopback_device(target: str) -> None:
    assert str(read_address(target)) == target


def claim(path: Path) -> None:
    listener = Listener([f"unix:{path}"])
    try:
        listener.claim()
    finally:
        listener.close()


def publish(path: Path) -> None:
    pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    asyncio.run(published(f"ipc://{path}", None))


def give_again(path: Path) -> None:
    pytest.importorskip("zmq", reason="the extra 'events' is not installed")
    asyncio.run(published(f"tcp://127.0.0.1:{free_port()}", f"ipc://{path}"))


LISTENS = pytest.mark.parametrize("listen", [claim, publish, give_again])


@LISTENS
def test_what_is_no_socket_stays_where_it_is(
    tmp_path: Path, listen: Callable[[Path], None]
) -> None:
    path, kept = tmp_path / "socket", tmp_path / "kept"
    kept.write_text("kept")
    for put in (
        lambda: path.write_text("kept"),
        lambda: path.symlink_to(kept),
        lambda: path.symlink_to(tmp_path / "nowhere"),
        lambda: path.mkdir(),
    ):
        put()
        before = path.lstat()
        with pytest.raises(InvalidRequest, match="something that is no socket is there"):
            listen(path)
        assert path.lstat() == before
        path.rmdir() if path.is_dir() else path.unlink()
    assert kept.read_text() == "kept"


@LISTENS
def test_a_socket_at_which_somebody_listens_stays_his(
    sockets: Path, request: pytest.FixtureRequest, listen: Callable[[Path], None]
) -> None:
    path = sockets / request.node.name[-40:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as his:
        his.bind(str(path))
        his.listen(0)
        inode = path.lstat().st_ino
        with pytest.raises(ServiceUnavailable, match="somebody listens there already"):
            listen(path)
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            other.setblocking(False)
            other.connect_ex(str(path))  # now nobody else is taken in: he is busy, not dead
            with pytest.raises(ServiceUnavailable):
                listen(path)
        assert path.lstat().st_ino == inode


@LISTENS
def test_a_socket_that_a_dead_process_left_is_removed(
    sockets: Path, request: pytest.FixtureRequest, listen: Callable[[Path], None]
) -> None:
    path = sockets / request.node.name[-40:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as his:
        his.bind(str(path))
        his.listen(1)
    listen(path)
    assert not path.exists()
