"""The carrier: who asks little is not behind all that another asks."""

from __future__ import annotations

import socket
import threading
from array import array
from collections.abc import Iterator, Sequence

import pytest

from patience import PATIENCE_S
from prefixcache.core.remote import NAME_BYTES
from prefixcache.service.tiers.carrier import Carrier, serve_questions
from prefixcache.service.tiers.errands import (
    HEAD_BYTES,
    Answer,
    Errand,
    length_of,
    pack_errand,
    read_answer,
)
from prefixcache.service.tiers.objects import Namer
from prefixcache.service.tiers.remote.store import RemoteError
from prefixcache.types import Namespace, pack

NAMER = Namer("3x2x8:bfloat16", 4)
BASE = NAMER.base(Namespace("m@1"), b"")
LONG, SHORT = pack(range(40_000)), pack(range(40))


class Store:
    """Has all that it is asked for, once it may say so."""

    def __init__(self) -> None:
        self.may_go_on = threading.Event()
        self.asked: list[int] = []
        self.fails = False

    def exists(self, names: Sequence[str]) -> bytes:
        assert self.may_go_on.wait(PATIENCE_S)
        self.asked.append(len(names))
        if self.fails and len(self.asked) > 1:
            raise RemoteError("it is gone")
        return b"\1" * len(names)


class Line:
    """The service's end of a carrier's line for questions."""

    def __init__(self, store: Store) -> None:
        self.ours, self.theirs = socket.socketpair()
        self.ours.settimeout(PATIENCE_S)
        self.stream = self.ours.makefile("rb")
        carrier = Carrier(store, None, NAMER)  # type: ignore[arg-type]
        self.thread = threading.Thread(
            target=serve_questions, args=(self.theirs, carrier), daemon=True
        )
        self.thread.start()

    def ask(self, number: int, tokens: bytes, first: int = 0) -> None:
        self.ours.sendall(pack_errand(Errand(number, first, array("i"), BASE + tokens)))

    def hear(self) -> Answer:
        return read_answer(self.stream.read(length_of(self.stream.read(HEAD_BYTES))))

    def close(self) -> None:
        self.ours.shutdown(socket.SHUT_RDWR)
        self.thread.join(PATIENCE_S)
        assert not self.thread.is_alive()
        self.stream.close()
        self.ours.close()
        self.theirs.close()


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def line(store: Store) -> Iterator[Line]:
    line = Line(store)
    yield line
    store.may_go_on.set()
    line.close()


def test_a_short_question_is_answered_before_a_long_one_that_came_first(
    line: Line, store: Store
) -> None:
    line.ask(1, LONG)
    line.ask(2, SHORT)
    line.ask(3, SHORT, first=4)
    store.may_go_on.set()
    assert [line.hear().number for _ in range(3)] == [2, 3, 1]


@pytest.mark.parametrize("first", [0, 3, 5_000, 9_999, 10_000])
def test_what_is_answered_is_the_same_in_parts(line: Line, store: Store, first: int) -> None:
    store.may_go_on.set()
    line.ask(7, LONG + b"torn", first)
    answer = line.hear()
    assert answer.number == 7
    assert answer.names == NAMER.names(BASE, LONG, first)
    assert answer.names[-NAME_BYTES:] == NAMER.names(BASE, LONG, 9_999) or first == 10_000
    assert answer.each == b"\1" * (10_000 - first)
    assert sum(store.asked) == 10_000 - first
    assert max(store.asked, default=0) <= 1024


def test_a_store_that_fails_in_the_middle_of_a_question_has_answered_none_of_it(
    line: Line, store: Store
) -> None:
    store.fails = True
    store.may_go_on.set()
    line.ask(1, LONG)
    answer = line.hear()
    assert (answer.number, answer.each, answer.error) == (1, b"", "it is gone")
    store.fails = False
    line.ask(2, SHORT)
    assert line.hear().each == b"\1" * 10
