"""Who connects to a TCP address: fewer are let in while those who come do too much."""

from __future__ import annotations

import contextlib
import selectors
import socket
from collections.abc import Iterator
from time import monotonic

import pytest

from prefixcache.service import newcomers as module
from prefixcache.service.newcomers import Newcomers

TRIES = 12


@pytest.fixture
def listening() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0), backlog=TRIES * 4) as listening:
        yield listening


def come(listening: socket.socket) -> int:
    """Connect some at once; give how many came before a kernel that hears nothing tries again."""
    with contextlib.ExitStack() as leaving, selectors.DefaultSelector() as coming:
        for _ in range(TRIES):
            one = leaving.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(listening.getsockname())
            coming.register(one, selectors.EVENT_WRITE)
        came = 0
        until = monotonic() + 0.9
        while came < TRIES and (left := until - monotonic()) > 0:
            for key, _ in coming.select(left):
                coming.unregister(key.fileobj)
                came += 1
        return came


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [0.0]
    monkeypatch.setattr(module, "monotonic", lambda: now[0])
    return now


def test_fewer_are_let_in_while_they_do_too_much_and_then_all_again(
    listening: socket.socket, now: list[float]
) -> None:
    newcomers = Newcomers(100)
    newcomers.add(listening.fileno())
    assert come(listening) == TRIES
    for _ in range(8):
        now[0] += 0.1
        newcomers.count(1000)
        assert newcomers.pace()
    assert newcomers.share == 1 / 256
    assert come(listening) < TRIES
    looks = 0
    while newcomers.pace():
        now[0] += 0.1
        looks += 1
    assert looks == 58  # of a tenth more each
    assert come(listening) == TRIES


def test_what_they_may_do_changes_nothing(listening: socket.socket, now: list[float]) -> None:
    newcomers = Newcomers(100)
    newcomers.add(listening.fileno())
    for _ in range(8):
        now[0] += 0.1
        newcomers.count(9)
        assert not newcomers.pace()
    assert newcomers.share == 1


def test_who_is_connected_stays(listening: socket.socket, now: list[float]) -> None:
    newcomers = Newcomers(1)
    newcomers.add(listening.fileno())
    with socket.create_connection(listening.getsockname()) as ours, listening.accept()[0] as theirs:
        for _ in range(20):
            now[0] += 0.1
            newcomers.count(1000)
            newcomers.pace()
        ours.sendall(b"still here")
        assert theirs.recv(64) == b"still here"


def test_a_socket_that_was_closed_is_left_alone(listening: socket.socket, now: list[float]) -> None:
    """Its descriptor may be somebody else's by then."""
    newcomers = Newcomers(1)
    newcomers.add(listening.fileno())
    number = listening.fileno()
    listening.close()
    with socket.create_server(("127.0.0.1", 0), backlog=TRIES * 4) as other:
        assert other.fileno() == number
        for _ in range(8):
            now[0] += 0.1
            newcomers.count(1000)
            newcomers.pace()
        assert come(other) == TRIES
