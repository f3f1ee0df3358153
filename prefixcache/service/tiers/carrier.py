"""The carrier: the process that talks to a store which other machines have, too.

    python -m prefixcache.service.tiers.carrier FD FD FD   started by `carriage.py`, one at a time

What a store, its library or the network does to who talks to it happens to this process, and not to
the service; and all of the memory that it has mapped is the slots through which objects go
(`objects.py`): neither the pool nor what lies below it.  What a store has sent is believed by
nobody here: the porter compares it where it has arrived.

It ends with the service.
"""

from __future__ import annotations

import contextlib
import json
import select
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from prefixcache.core.remote import NAME_BYTES
from prefixcache.remote_address import MOONCAKE, RemoteAddress
from prefixcache.service.tiers.errands import (
    HEAD_BYTES,
    MOST_BYTES,
    READY,
    Answer,
    Errand,
    Kind,
    length_of,
    pack_answer,
    read_errand,
)
from prefixcache.service.tiers.objects import Namer, map_stage
from prefixcache.service.tiers.remote.mooncake import Mooncake
from prefixcache.service.tiers.remote.store import (
    RemoteError,
    RemoteTier,
    object_names,
)
from prefixcache.service.tiers.remote.valkey import Valkey

_LONGEST_ERROR: Final = 400
"""Characters."""
_NAMED: Final = 1024
"""Blocks of one question that are named and asked for before others have their turn."""
_READ_BYTES: Final = 1 << 20
"""Of one reading, which is less than a millisecond."""


class Carrier:
    """Runs the errands of one socket.

    Args:
        store: This one's own connection.
        slots: `[slot, bytes of an object]`.
        namer: Names what is asked for.
    """

    def __init__(self, store: RemoteTier, slots: Any, namer: Namer) -> None:
        self._store = store
        self._slots = slots
        self._namer = namer

    def connect(self) -> None:
        """Connect now; if that fails, the first errand says so."""
        with contextlib.suppress(RemoteError):
            self._store.connect()

    def ask(self, errand: Errand) -> Iterator[Answer | None]:
        """Name what is asked for, and ask for it, in steps of some milliseconds.

        The last step gives the answer, however it fails; those before give none.
        """
        base, tokens = errand.text[:NAME_BYTES], errand.text[NAME_BYTES:]
        each, names, took_s = [], [], 0.0
        parts = self._namer.parts(base, tokens, errand.first, _NAMED)
        try:
            while True:
                began = time.perf_counter()
                part = next(parts, None)
                if part is None:
                    break
                if part:
                    each.append(self._store.exists(object_names(part)))
                    names.append(part)
                took_s += time.perf_counter() - began
                yield None
        except RemoteError as error:
            yield Answer(errand.number, took_s, error=str(error)[:_LONGEST_ERROR])
            return
        yield Answer(errand.number, took_s, b"".join(each), b"".join(names))

    def run(self, kind: Kind, errand: Errand) -> Answer:
        """Run an errand.  However it fails, the answer says so.  O(its bytes)."""
        began = time.perf_counter()
        try:
            each, names = self._run(kind, errand)
        except RemoteError as error:
            took_s = time.perf_counter() - began
            return Answer(errand.number, took_s, error=str(error)[:_LONGEST_ERROR])
        return Answer(errand.number, time.perf_counter() - began, each, names)

    def _run(self, kind: Kind, errand: Errand) -> tuple[bytes, bytes]:
        named = object_names(errand.text)
        if not errand.slots:
            self._store.remove(named)
            return b"", b""
        slots = [memoryview(self._slots[slot]) for slot in errand.slots]
        move = self._store.get_into if kind is Kind.GET else self._store.put_from
        return bytes(move(named, slots)), b""


def opener(
    address: RemoteAddress, interface: str, memory: tuple[int, int], ca: str = ""
) -> Callable[[], RemoteTier]:
    """Give what makes each thread's end of a store.  Connects to nothing yet.

    Args:
        address: Of the store.
        interface: Over which its clients may be reached, where they listen.
        memory: Address and size of the slots.
        ca: The file with the certificates that sign that of a store; empty: those of this machine.

    Raises:
        RemoteError: a client would listen where that is not safe.
    """
    if address.scheme == MOONCAKE:
        client = Mooncake(address, interface, memory)
        return lambda: client
    return lambda: Valkey(address, ca)


def serve(line: socket.socket, kind: Kind, carrier: Carrier) -> None:
    """Run errands until the other end closes."""
    with line.makefile("rb") as stream:
        while len(head := stream.read(HEAD_BYTES)) == HEAD_BYTES:
            frame = stream.read(length_of(head))
            line.sendall(pack_answer(carrier.run(kind, read_errand(frame))))


def serve_questions(line: socket.socket, carrier: Carrier) -> None:
    """Answer questions until the other end closes, all that there are in turn, step by step.

    So a short one is behind one step of each other, and not behind all of a long one.
    """
    asked: deque[Iterator[Answer | None]] = deque()
    buffer = bytearray()
    while True:
        if not asked or select.select([line], [], [], 0.0)[0]:
            got = line.recv(_READ_BYTES)
            if not got:
                return
            buffer += got
            asked += [carrier.ask(errand) for errand in _cut_errands(buffer)]
            continue
        question = asked.popleft()
        answer = next(question)
        if answer is None:
            asked.append(question)
        else:
            line.sendall(pack_answer(answer))


def _cut_errands(buffer: bytearray) -> list[Errand]:
    """Cut the errands off that a buffer begins with."""
    errands, at = [], 0
    while len(buffer) - at >= HEAD_BYTES:
        end = at + HEAD_BYTES + length_of(bytes(buffer[at : at + HEAD_BYTES]))
        if len(buffer) < end:
            break
        errands.append(read_errand(bytes(buffer[at + HEAD_BYTES : end])))
        at = end
    del buffer[:at]
    return errands


def _serve_all(lines: Sequence[socket.socket], make: Callable[[], Carrier]) -> None:
    """Run the errands of all sockets, each in a thread; until one of them ends."""
    ended = threading.Event()

    def work(line: socket.socket, kind: Kind, carrier: Carrier) -> None:
        try:
            if kind is Kind.ASK:
                serve_questions(line, carrier)
            else:
                serve(line, kind, carrier)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the service has ended
        finally:
            ended.set()

    for kind, line in zip(Kind, lines, strict=True):
        carrier = make()
        carrier.connect()
        told = (line, kind, carrier)
        threading.Thread(target=work, args=told, daemon=True, name=kind.name).start()
    lines[0].sendall(pack_answer(Answer(READY, 0.0)))
    ended.wait()


def main(arguments: Sequence[str] | None = None) -> int:
    """Be a service's carrier: the descriptors of our ends of the sockets are the arguments."""
    numbers = sys.argv[1:] if arguments is None else arguments
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the service
    lines = [socket.socket(fileno=int(number)) for number in numbers]
    with lines[0].makefile("rb") as stream:
        order: dict[str, Any] = json.loads(stream.readline(MOST_BYTES))
    address = RemoteAddress(*order["address"])
    _, slots = map_stage(order["stage"])
    namer = Namer(order["layout"], order["block_size"], bytes.fromhex(order["secret"]))
    try:
        connect = opener(
            address, order["interface"], (slots.ctypes.data, slots.nbytes), order["ca"]
        )
    except RemoteError as error:
        sys.stderr.write(f"the carrier does not start: {error}\n")
        return 1
    _serve_all(lines, lambda: Carrier(connect(), slots, namer))
    return 0


if __name__ == "__main__":
    sys.exit(main())
