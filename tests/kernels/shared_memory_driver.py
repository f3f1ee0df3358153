"""A device for tests without one: its memory is files, shared by all processes as a GPU's is."""

from __future__ import annotations

import mmap
import secrets
from pathlib import Path

from prefixcache.errors import NotFound, PoolExhausted


class SharedMemoryDriver:
    """A device whose memory is a file in shared memory, and whose addresses are numbers."""

    def __init__(self, folder: str, room: int = 1 << 24) -> None:
        self.folder, self.room = Path(folder), room
        self.maps: dict[int, mmap.mmap] = {}
        self.names: dict[int, str] = {}

    def alloc(self, num_bytes: int) -> int:
        if num_bytes > self.room:
            raise PoolExhausted(f"{num_bytes} bytes do not fit into {self.room}")
        name = secrets.token_hex(8)
        (self.folder / name).write_bytes(b"\xff" * num_bytes)
        address = self.open(name)
        self.names[address] = name
        return address

    def zero(self, address: int, num_bytes: int) -> None:
        self.maps[address][:num_bytes] = bytes(num_bytes)

    def write(self, address: int, content: bytes) -> None:
        self.maps[address][: len(content)] = content

    def read(self, address: int, num_bytes: int) -> bytes:
        return self.maps[address][:num_bytes]

    def export(self, address: int) -> str:
        return self.names[address]

    def open(self, name: str) -> int:
        try:
            with (self.folder / name).open("r+b") as file:
                address = 4096 * (len(self.maps) + 1)
                self.maps[address] = mmap.mmap(file.fileno(), 0)
        except FileNotFoundError:
            raise NotFound(f"no memory {name}") from None
        return address

    def close(self, address: int) -> None:
        del self.maps[address]
