"""What lies below the pool, where strangers may have been: a disk's folder, a store's answers."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from pathlib import Path

import numpy as np

from prefixcache.core.found import Found
from prefixcache.errors import InvalidRequest
from prefixcache.remote_address import RemoteAddress
from prefixcache.service.tiers.disk import HEADS_AT, DiskFolder
from prefixcache.service.tiers.remote.store import Got, RemoteError
from prefixcache.service.tiers.remote.valkey import Valkey
from prefixcache.service.tiers.seals import Seals
from prefixcache.service.tiers.slab import head_type, slot_bytes
from prefixcache.types import Layout, PoolHandle

SIZE, NUM_SLOTS = 4, 12
HANDLE = PoolHandle("shm", "", 8, SIZE, Layout(1, 1, 2, "float32"), 1, 0)
NUM_BYTES = HEADS_AT + NUM_SLOTS * slot_bytes(HANDLE)


class Folders:
    """A folder whose files were changed: the service takes it, and offers what is whole of it.

    The input is changes of three or more bytes: of which file, where, and what is there then.
    """

    FILES = ("heads", "secret", "resets", "slab", "lock")

    def __init__(self) -> None:
        self._home = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._good = Path(self._home.name) / "good"
        folder = DiskFolder(self._good, NUM_BYTES)
        folder.open(HANDLE)
        heads = np.zeros(NUM_SLOTS, head_type(SIZE))
        for slot in range(1, NUM_SLOTS):  # the first holds nothing
            heads[slot]["stamp"], heads[slot]["key"] = slot, (slot, slot + 1)
            heads[slot]["tokens"] = 2**32 - 1 - slot  # to the last byte: a part is no whole
        Seals(folder.seed, SIZE).put(heads)
        os.pwrite(folder.order()["heads"], heads.tobytes(), HEADS_AT)
        folder.close()
        assert self._found(self._good) == NUM_SLOTS - 1

    def __call__(self, data: bytes) -> None:
        copy = Path(self._home.name) / "copy"
        shutil.copytree(self._good, copy)
        try:
            for at in range(0, min(len(data), 40) - 4, 5):
                self._change(copy, *data[at : at + 5])
            if not (copy / "lock").exists() and any(copy.iterdir()):
                self._refuse(copy)
                return
            first = self._found(copy)
            assert self._found(copy) <= first  # what the first start made of it is whole
        finally:
            shutil.rmtree(copy)

    def close(self) -> None:
        self._home.cleanup()

    def _change(self, folder: Path, kind: int, page: int, place: int, new: int, much: int) -> None:
        path = folder / self.FILES[kind % len(self.FILES)]
        size = path.stat().st_size if path.exists() else 0
        at = min((page % 4) * (HEADS_AT // 2) + place, size)
        match kind // len(self.FILES) % 4:
            case 0:
                path.unlink(missing_ok=True)
            case 1 if path.exists():
                os.truncate(path, at + much)
            case _ if path.exists():
                with path.open("r+b") as file:
                    file.seek(at)
                    file.write(bytes([new]) * (1 + much % 64))

    @staticmethod
    def _refuse(folder: Path) -> None:
        """Without a lock all of it may be somebody's own."""
        before = {one: one.read_bytes() for one in folder.iterdir()}
        try:
            DiskFolder(folder, NUM_BYTES).close()
        except InvalidRequest:
            assert {one: one.read_bytes() for one in folder.iterdir()} == before
        else:
            raise AssertionError("files of somebody's own were taken for ours")

    def _found(self, path: Path) -> int:
        """Take a folder as a service does; give how much it offers."""
        folder = DiskFolder(path, NUM_BYTES)
        try:
            remains = folder.open(HANDLE)
            slots = remains.slots.tolist()
            assert all(0 <= slot < folder.num_slots for slot in slots)
            assert remains.keys.tolist() == [[slot, slot + 1] for slot in slots]
            if slots:
                found = Found(remains.keys, remains.slots, remains.stamps)
                assert found.look(remains.keys).tolist() == slots
            return len(slots)
        finally:
            folder.close()


class _Answered(Valkey):
    """A connection over which the answer waits before anything is asked."""

    def __init__(self, line: socket.socket) -> None:
        super().__init__(RemoteAddress("valkey+unix", path="/nowhere"))
        self._socket = line

    def _begin(self) -> socket.socket:
        return self._connected()


def stores(data: bytes) -> None:
    """Bytes as what a store answers: it is what was asked for, or the store fails, by our error."""
    if not data:
        return
    call, count, answer = data[0] % 4, 1 + data[0] // 4 % 3, data[1:]
    names = [f"pc1/{number:032x}" for number in range(count)]
    pages = bytearray(b"\xaa" * 8 * count)
    slots = [memoryview(pages)[8 * at : 8 * at + 8] for at in range(count)]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.settimeout(1.0)
        theirs.sendall(answer)
        theirs.shutdown(socket.SHUT_WR)
        store = _Answered(ours)
        with contextlib.suppress(RemoteError):
            match call:
                case 0:
                    assert len(store.exists(names)) == count
                case 1:
                    store.remove(names)
                case 2:
                    assert len(store.put_from(names, slots)) == count
                case _:
                    told = store.get_into(names, slots)
                    for got, slot in zip(told, slots, strict=True):
                        assert got is not Got.GOOD or bytes(slot) in answer
        store.close()
