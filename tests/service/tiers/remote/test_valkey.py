"""What is said to a Valkey server, and what becomes of one object when others are not there."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from patience import PATIENCE_S
from prefixcache.remote_address import parse_remote
from prefixcache.service.tiers.remote.store import Got, RemoteError
from prefixcache.service.tiers.remote.valkey import Valkey
from service.valkey_server import ValkeyServer, needs_valkey

SIZE = 100_000


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ValkeyServer]:
    server = ValkeyServer(tmp_path)
    yield server
    server.kill()


@pytest.fixture
def store(server: ValkeyServer) -> Iterator[Valkey]:
    store = connect(server.address)
    yield store
    store.close()


def connect(address: str) -> Valkey:
    found = parse_remote(address)
    assert found is not None
    return Valkey(found)


def slots(count: int, size: int = SIZE) -> list[memoryview]:
    return [memoryview(bytearray(size)) for _ in range(count)]


def contents(count: int) -> list[memoryview]:
    return [memoryview(bytearray(os.urandom(SIZE))) for _ in range(count)]


@needs_valkey
def test_what_is_stored_is_there_and_comes_back(store: Valkey) -> None:
    told, names = contents(5), [f"k{at}" for at in range(5)]
    assert store.exists(names) == bytes(5)
    assert store.put_from(names, told) == [True] * 5
    assert store.exists([*names, "k9"]) == b"\1" * 5 + b"\0"
    found = slots(5)
    assert store.get_into(names, found) == [Got.GOOD] * 5
    assert found == told
    store.remove([*names[:2], "k9"])
    assert store.exists(names) == bytes([0, 0, 1, 1, 1])


@needs_valkey
def test_one_object_that_is_missing_or_cannot_be_it_is_no_matter_to_the_others(
    server: ValkeyServer, store: Valkey
) -> None:
    told, found = contents(4), slots(4)
    store.put_from(["a", "c", "d"], told[:3])
    server.call("SET", "b", "short")
    server.call("SET", "d", b"\r\n" * SIZE)
    good, nothing, wrong = Got.GOOD, Got.NOTHING, Got.WRONG
    assert store.get_into(["b", "a", "x", "c"], found) == [wrong, good, nothing, good]
    assert found[1] == told[0]
    assert found[3] == told[1]
    for words in (("LPUSH", "b", "1"), ("HSET", "d", "k", "v")):
        server.call("UNLINK", words[1])
        server.call(*words)
    assert store.get_into(["d", "a", "b", "c"], found) == [wrong, good, wrong, good]
    assert found[3] == told[1]
    store.remove(["b", "d"])
    assert store.exists(["a", "b", "c", "d"]) == bytes([1, 0, 1, 0])


@needs_valkey
def test_a_server_says_how_much_it_holds_if_it_was_told(
    server: ValkeyServer, store: Valkey
) -> None:
    assert store.capacity() == 64 << 20
    server.call("CONFIG", "SET", "maxmemory", "0")
    assert store.capacity() is None
    server.call("ACL", "SETUSER", "default", "-info")
    assert store.capacity() is None
    assert store.exists(["a"]) == b"\0", "and what comes next is understood"
    server.kill()
    with pytest.raises(RemoteError):
        store.capacity()


@needs_valkey
def test_a_full_server_refuses_and_says_so(tmp_path: Path, stack: ExitStack) -> None:
    server = ValkeyServer(tmp_path, "--maxmemory-policy", "noeviction", "--maxmemory", "1")
    try:
        store = stack.enter_context(closing(connect(server.address)))
        with pytest.raises(RemoteError, match="the server says: OOM"):
            store.put_from(["a"], contents(1))
    finally:
        server.kill()


@needs_valkey
def test_a_password_is_sent_and_never_shown(tmp_path: Path, stack: ExitStack) -> None:
    server = ValkeyServer(tmp_path, "--requirepass", "sesame")
    try:
        address = parse_remote(server.address.replace("://", "://:sesame@"))
        assert address is not None
        assert "sesame" not in str(address)
        store = stack.enter_context(closing(Valkey(address)))
        assert store.exists(["a"]) == b"\0"
        for password, why in (("", "NOAUTH"), ("open", "WRONGPASS")):
            wrong = stack.enter_context(closing(Valkey(address._replace(password=password))))
            with pytest.raises(RemoteError, match=why):
                wrong.exists(["a"])
    finally:
        server.kill()


@needs_valkey
def test_a_server_that_hangs_is_waited_for_a_moment_and_found_again(
    server: ValkeyServer, store: Valkey
) -> None:
    (told,) = contents(1)
    store.put_from(["a"], [told])
    server.stop()
    try:
        with pytest.raises(RemoteError, match="does not answer"):
            store.get_into(["a"], slots(1))
    finally:
        server.go_on()
    (found,) = slots(1)
    assert store.get_into(["a"], [found]) == [Got.GOOD]
    assert found == told


@needs_valkey
def test_a_server_that_ends_is_an_error_and_the_next_one_is_used(
    server: ValkeyServer, store: Valkey
) -> None:
    assert store.exists(["a"]) == b"\0"
    server.kill()
    with pytest.raises(RemoteError, match=str(server.path)):
        store.exists(["a"])
    server.restart()
    assert store.exists(["a"]) == b"\0"


class Liar:
    """A server that says one thing after another, each once it has been asked something."""

    def __init__(self, path: Path, *answers: bytes) -> None:
        self.address = f"valkey+unix://{path}"
        self.num_calls = 0
        self._answers = answers
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen()
        self._thread = threading.Thread(target=self._lie, daemon=True)
        self._thread.start()

    def _lie(self) -> None:
        left = list(self._answers)
        while left:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return
            with peer:
                self.num_calls += 1
                while left and peer.recv(65_536):
                    peer.sendall(left.pop(0))

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join(PATIENCE_S)


@pytest.mark.parametrize(
    "answer",
    [
        *(b"$99999999999\r\n", b"hello\r\n", b"$5\r\nab", b"x" * 9000, b"", b"-ERR no\r\n"),
        *(b"$-5\r\n", b"$" + b"9" * 5000 + b"\r\n", b"*" + b"1" * 90_000 + b"\r\n"),
        *(b"$5\r\nabcdef\r\n", b"$5\r\nabcde\r\n$5\r\nfghij\r\n", b"*1\r\n" * 500),
        *(b"$\xd9\xa5\r\nabcde\r\n", b"\r\n", b"$\r\n", b"$+5\r\nabcde\r\n", b"_\r\n"),
    ],
)
def test_who_answers_with_something_else_is_an_error(tmp_path: Path, answer: bytes) -> None:
    with (
        closing(Liar(tmp_path / "s", answer)) as liar,
        closing(connect(liar.address)) as store,
        pytest.raises(RemoteError),
    ):
        store.get_into(["a"], slots(1, 5))


def test_what_nobody_has_asked_for_is_not_taken_for_the_next_answer(tmp_path: Path) -> None:
    one, other = b"$5\r\nabcde\r\n", b"$5\r\nfghij\r\n"
    with (
        closing(Liar(tmp_path / "s", one, other, b":1\r\n:1\r\n", b":0\r\n")) as liar,
        closing(connect(liar.address)) as store,
    ):
        for told in (b"abcde", b"fghij"):
            (found,) = slots(1, 5)
            assert store.get_into(["a"], [found]) == [Got.GOOD]
            assert found == told
        assert liar.num_calls == 1
        with contextlib.suppress(RemoteError):  # what follows may come later than the answer
            store.exists(["a"])
        assert store.exists(["b"]) == b"\0"
        assert liar.num_calls == 2


@needs_valkey
def test_a_connection_that_the_server_has_ended_meanwhile_is_made_anew(
    server: ValkeyServer, store: Valkey
) -> None:
    assert store.exists(["a"]) == b"\0"
    server.call("CLIENT", "KILL", "TYPE", "normal")
    assert store.exists(["a"]) == b"\0"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("http://host", "no kind of store"),
        ("valkey://", "names no host"),
        ("valkey://host/3", "names no host"),
        ("valkey+unix://host/x", "no absolute path"),
        ("valkey+unix://", "no absolute path"),
        ("valkey://host:99999", "cannot read"),
        ("valkey://host:1?x=y", "nothing may follow"),
        ("host", "no kind of store"),
        ("valkey://host:0", "ports are 1 to 65535"),
        ("valkey://host:1_0", "ports are 1 to 65535"),
        ("valkey://a..b", "no host has that name"),
        ("valkey://" + "x" * 64, "no host has that name"),
        ("valkey://a b", "no host has that name"),
        ("valkey://a\tb", "printable characters"),
        ("valkey://a\u202eb", "printable characters"),
        ("valkey://me:\udcff@host", "printable characters"),
        ("valkey://me@host", "no password"),
        ("valkey://me:%ff@host", "password is no UTF-8"),
        ("valkey+unix:///a%00b", "no socket has that path"),
        ("valkey+unix:///" + "a" * 107, "no socket has that path"),
    ],
)
def test_what_is_no_address_is_refused_with_what_one_looks_like(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=f"{why}.*; write valkey://"):
        parse_remote(text)


@pytest.mark.parametrize(
    "text", ["me_too:s3same@host:1", "valkey://me:s3s/ame@host", "valkey://me:s3same/"]
)
def test_an_address_that_cannot_be_read_tells_no_password(text: str) -> None:
    with pytest.raises(ValueError) as error:
        parse_remote(text)
    assert "s3" not in str(error.value)


def test_which_addresses_nobody_else_can_listen_to() -> None:
    near = ["valkey+unix:///s", "valkey://127.0.0.1", "valkey://[::1]:1", "valkey://localhost"]
    far = ["valkey://10.0.0.1", "valkey://store.example:7000"]
    assert [parse_remote(one).is_near for one in near + far] == [True] * 4 + [False] * 2  # type: ignore[union-attr]
