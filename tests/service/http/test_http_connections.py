"""Who only sits on the page's connections takes nothing from workers, nor from the monitoring."""

from __future__ import annotations

import contextlib
import resource
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import prefixcache
from patience import PATIENCE_S
from prefixcache.errors import InvalidRequest
from prefixcache.service.descriptors import Descriptors, raise_limit
from prefixcache.service.http.http_connections import Bound
from service.http.scraped import FLAGS, get, url_of
from service.service_process import LAYOUT, ServiceProcess, eventually, running, sizes

FILES = 256


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServiceProcess]:
    folder = tmp_path_factory.mktemp("c")
    with running(f"unix:{folder}/s.sock", *sizes(64, 4), *FLAGS, num_files=FILES) as service:
        yield service


def num_open(service: ServiceProcess) -> int:
    return len(list(Path(f"/proc/{service.process.pid}/fd").iterdir()))


@contextlib.contextmanager
def connections(
    service: ServiceProcess, count: int, said: bytes = b""
) -> Iterator[list[socket.socket]]:
    """Connections of somebody who says this much and then nothing, and reads nothing."""
    host, port = url_of(service).removeprefix("http://").split(":")
    with contextlib.ExitStack() as stack:
        held = []
        for _ in range(count):
            one = stack.enter_context(socket.socket())
            one.settimeout(60.0)
            one.connect((host, int(port)))
            with contextlib.suppress(OSError):
                one.sendall(said.replace(b"HOST", f"{host}:{port}".encode()))
            held.append(one)
        yield held


SAID = {
    "nothing": b"",
    "half a head": b"GET /metrics HTTP/1.1\r\nHost: ",
    "a head and half a body": b"GET /healthz HTTP/1.1\r\nHost: HOST\r\nContent-Length: 9\r\n\r\nx",
    "a head without its body": b"GET /metrics HTTP/1.1\r\nHost: HOST\r\nContent-Length: 9\r\n\r\n",
    "chunks that do not come": b"GET / HTTP/1.1\r\nHost: HOST\r\n"
    b"Transfer-Encoding: chunked\r\n\r\nff",
    "a page that stays open": b"GET /live HTTP/1.1\r\nHost: HOST\r\n\r\n",
}


SILENT = tuple(SAID)[:-1]


@dataclass
class Left:
    """Connections that were left alone, all at once: each waits for as long as the service does."""

    num_before: int
    silent: dict[str, socket.socket]


@pytest.fixture(scope="module")
def left(service: ServiceProcess) -> Iterator[Left]:
    """Of those who say no more, and one with many requests in one go and no answer read."""
    num_before = num_open(service)
    many = b"GET /metrics HTTP/1.1\r\nHost: HOST\r\n\r\n" * 2000
    with connections(service, 1, many), contextlib.ExitStack() as stack:
        eventually(lambda: num_open(service) > num_before)
        silent = {said: stack.enter_context(connections(service, 1, SAID[said])) for said in SILENT}
        yield Left(num_before, {said: one for said, (one,) in silent.items()})


@pytest.mark.parametrize("said", SILENT)
def test_who_says_no_more_is_hung_up_on(left: Left, said: str) -> None:
    with contextlib.suppress(ConnectionResetError):
        while left.silent[said].recv(4096):
            pass


def test_who_reads_no_more_is_hung_up_on(service: ServiceProcess, left: Left) -> None:
    """The service does not keep many answers for ever."""
    eventually(lambda: num_open(service) <= left.num_before)


@pytest.mark.parametrize("said", SAID)
def test_a_flood_of_connections_takes_no_descriptor_from_workers(
    service: ServiceProcess, said: str
) -> None:
    with connections(service, 300, SAID[said]):
        with (
            prefixcache.connect(service.target) as client,
            client.attach("tiny", LAYOUT) as session,
            session.acquire(range(8)) as lease,
        ):
            lease.commit(8)
        assert num_open(service) < FILES // 2
        assert get(url_of(service) + "/healthz")[:2] == (200, "serving\n")
        assert get(url_of(service) + "/metrics")[0] == 200


@pytest.mark.parametrize("said", ["a head without its body", "chunks that do not come"])
def test_one_whose_question_never_ends_keeps_nobody_out(service: ServiceProcess, said: str) -> None:
    with connections(service, 1, SAID[said]) as (one,):
        assert one.recv(12) == b"HTTP/1.1 413"
        assert get(url_of(service) + "/metrics")[0] == 200


def test_who_asks_for_metrics_without_a_pause_keeps_nobody_else_out(
    service: ServiceProcess,
) -> None:
    """Nor does who asks and leaves: what nobody waits for is not made."""
    ask = b"GET /metrics HTTP/1.1\r\nHost: HOST\r\n\r\n"
    for _ in range(10):
        with connections(service, 30, ask):
            pass
    with (
        connections(service, 30, ask * 100),
        prefixcache.connect(service.target) as client,
        client.attach("tiny", LAYOUT) as session,
    ):
        for _ in range(100):
            with session.acquire(range(8)) as lease:
                lease.commit(8)
    eventually(lambda: get(url_of(service) + "/healthz")[:2] == (200, "serving\n"))


def test_who_opens_more_pages_than_there_may_be_is_told(service: ServiceProcess) -> None:
    with connections(service, FILES // 8, SAID["a page that stays open"]) as held:
        firsts = [one.recv(64).split(b"\r\n")[0] for one in held]
        assert firsts.count(b"HTTP/1.1 200 OK") == FILES // 16
        assert set(firsts) == {b"HTTP/1.1 200 OK", b"HTTP/1.1 503 Service Unavailable"}


def test_who_asks_for_the_head_of_a_page_that_stays_open_has_it_and_no_more(
    service: ServiceProcess,
) -> None:
    ask = b"HEAD /live HTTP/1.1\r\nHost: HOST\r\nConnection: close\r\n\r\n"
    with connections(service, 1, ask) as (one,):
        said = b"".join(iter(lambda: one.recv(4096), b""))
    assert said.startswith(b"HTTP/1.1 200 OK")
    assert said.endswith(b"\r\n\r\n")


class Stub:
    """A connection that is busy or not."""

    def __init__(self, *, is_busy: bool, is_waiting: bool = False, num_in_a_row: int = 0) -> None:
        self.is_busy = is_busy
        self.is_waiting = is_waiting
        self.num_in_a_row = num_in_a_row
        self.has_ended = False

    def end(self) -> None:
        self.has_ended = True


def test_the_longest_idle_connection_makes_room_and_a_busy_one_never() -> None:
    bound = Bound(3)
    busy, first, second, third = (Stub(is_busy=busy) for busy in (True, False, False, False))
    assert all(bound.enter(one) for one in (busy, first, second, third))  # type: ignore[arg-type]
    assert [one.has_ended for one in (busy, first, second, third)] == [False, True, False, False]
    second.is_busy = third.is_busy = True
    assert not bound.enter(first)  # type: ignore[arg-type]
    bound.leave(busy)  # type: ignore[arg-type]
    assert bound.enter(first)  # type: ignore[arg-type]


def test_one_that_asks_without_a_pause_makes_room_where_it_waits_again() -> None:
    reading = Stub(is_busy=True, num_in_a_row=9)
    first = Stub(is_busy=True, is_waiting=True)
    hurried = Stub(is_busy=True, is_waiting=True, num_in_a_row=1)
    more = Stub(is_busy=True, is_waiting=True, num_in_a_row=2)
    new = Stub(is_busy=True, is_waiting=True)
    for hurried_go in (False, True):
        bound = Bound(4, hurried_go=hurried_go)
        assert all(bound.enter(one) for one in (reading, first, hurried, more))  # type: ignore[arg-type]
        assert bound.enter(new) is hurried_go  # type: ignore[arg-type]
    assert [one.has_ended for one in (reading, first, hurried, more)] == [False, False, False, True]


def is_answered(service: ServiceProcess) -> bool:
    with contextlib.suppress(OSError):
        return get(url_of(service) + "/healthz")[0] == 200
    return False


@pytest.mark.parametrize("at_once", [1, 60])
def test_no_number_of_questions_without_a_pause_keeps_others_out(
    service: ServiceProcess, at_once: int
) -> None:
    """Whether they come in one go or each with the answer to the one before."""
    host, port = url_of(service).removeprefix("http://").split(":")
    ask = f"GET /metrics HTTP/1.1\r\nHost: {host}:{port}\r\n\r\n".encode() * at_once
    is_over = threading.Event()
    progress = [0] * (FILES // 8)

    def insist(number: int) -> None:
        while not is_over.is_set():
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as one:
                one.settimeout(60.0)
                one.sendall(ask)
                while not is_over.is_set() and (answer := one.recv(1 << 16)):
                    progress[number] += b"prefixcache_build_info" in answer
                    if at_once == 1 and b"prefixcache_build_info" in answer:
                        one.sendall(ask)
            is_over.wait(0.2)

    threads = [
        threading.Thread(target=insist, args=[number], daemon=True)
        for number in range(len(progress))
    ]
    for one in threads:
        one.start()
    try:
        eventually(lambda: min(progress) > 0)  # all of them have asked again
        assert sum(is_answered(service) for _ in range(10)) > 5
    finally:
        is_over.set()
        for one in threads:
            one.join(PATIENCE_S)


@pytest.mark.parametrize("total", [128, 256, 1024, 4096, 1 << 20])
@pytest.mark.parametrize("num_sockets", [0, 1, 16])
@pytest.mark.parametrize("num_addresses", [1, 3])
def test_there_are_descriptors_for_everybody(
    total: int, num_sockets: int, num_addresses: int
) -> None:
    """Also when every connection is a worker's, whose process is watched by one more."""
    split = Descriptors.split(total, num_sockets, num_addresses)
    callers = num_addresses * split.front + num_sockets * split.own
    assert split.front > 0
    assert split.http > 0
    assert not num_sockets or split.own > 0
    assert 2 * callers + split.http < total


def test_the_soft_limit_is_raised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = {"now": (256, 4096)}
    monkeypatch.setattr(resource, "getrlimit", lambda which: limits["now"])
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.update(now=new))
    assert raise_limit() == 4096
    assert limits["now"] == (4096, 4096)
    limits["now"] = (64, 64)
    with pytest.raises(InvalidRequest, match="ulimit -n"):
        raise_limit()
