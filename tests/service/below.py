"""A worker that fills the tiers below a service's pool, and sees that what comes back is right."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np

import prefixcache
from patience import PATIENCE_S
from prefixcache.client import Client
from prefixcache.client.session import Session
from prefixcache.core.cache import PrefixCache
from prefixcache.pool import SHARED_MEMORY, map_pool, pages_of
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.tiers.slab import slot_bytes
from prefixcache.types import Grant, Namespace, PoolHandle, WorkerId, pack
from service.service_process import LAYOUT, ServiceProcess, eventually

SPACE = Namespace("model")
NUM_BLOCKS, SIZE = 64, 4
CHAT = 20
"""Tokens of a chat that are kept: five whole blocks."""


def slots(count: int) -> str:
    """Bytes of so many slots."""
    return str(count * slot_bytes(PoolHandle("none", "", NUM_BLOCKS, SIZE, LAYOUT, 0, 0)))


def porters(service: ServiceProcess) -> list[int]:
    """The porters of a service that live."""
    return _children(service, b"tiers.porter")


def carriers(service: ServiceProcess) -> list[int]:
    """The carriers of a service that live."""
    return _children(service, b"tiers.carrier")


def _children(service: ServiceProcess, module: bytes) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdecimal():
            try:
                status = (folder / "stat").read_bytes().rpartition(b")")[2].split()
                line = (folder / "cmdline").read_bytes()
            except OSError:
                continue
            if int(status[1]) == service.process.pid and module in line:
                found.append(int(folder.name))
    return found


def shared_files(service: ServiceProcess) -> set[Path]:
    """Files in shared memory that a service has open: other tests' services have theirs there."""
    found = set()
    for descriptor in Path(f"/proc/{service.process.pid}/fd").iterdir():
        try:
            path = descriptor.readlink()
        except OSError:  # closed meanwhile
            continue
        if path.parent == SHARED_MEMORY and path.name.startswith("prefixcache-"):
            found.add(path)
    return found


class Writer:
    """A worker that computes: what a block holds depends on all tokens up to its end."""

    def __init__(self, client: Client) -> None:
        self.session: Session = client.attach("model", LAYOUT)
        handle = self.session.pool
        self.pages = pages_of(map_pool(handle), handle)
        self.num_wrong = 0

    @staticmethod
    def chat(number: int) -> list[int]:
        return [number * 1000 + at for at in range(CHAT + 1)]

    def content(self, tokens: list[int], at: int) -> np.ndarray:
        """What block `at` of a prompt is to hold."""
        seed = blake2b(repr(tokens[: (at + 1) * SIZE]).encode(), digest_size=8).digest()
        shape = self.pages[:, 0].shape
        return np.random.default_rng(int.from_bytes(seed)).integers(0, 256, shape, np.uint8)

    def ask(self, number: int, wait_s: float = 30.0) -> prefixcache.types.Ledger:
        """Have a chat computed, as far as it is not cached; see that what is cached is right."""
        tokens = self.chat(number)
        with self.session.acquire(tokens, wait_s=wait_s) as lease:
            for at in range(CHAT // SIZE):
                block = lease.block_table[at]
                if at * SIZE < lease.num_cached:
                    self.num_wrong += not (self.pages[:, block] == self.content(tokens, at)).all()
                else:
                    self.pages[:, block] = self.content(tokens, at)
            lease.commit(CHAT)
            return lease.ledger


def settled(client: Client) -> bool:
    """Whether as many blocks are free as there should be, and none is on its way."""
    now = client.snapshot()
    return now.leaving == 0 and now.free >= NUM_BLOCKS // 8 - 1


def comes_back(writer: Writer, numbers: Iterable[int]) -> bool:
    """Whether a chat came back as a whole: one that takes too long is computed."""
    return CHAT in [writer.ask(number).restored for number in numbers]


def filled(client: Client) -> Writer:
    """Ask for more than the pool holds, one after the other: the first ones lie below it then."""
    writer = Writer(client)
    for number in range(30):
        writer.ask(number)
        eventually(lambda: settled(client))
    return writer


def fill(cache: PrefixCache, deliveries: Deliveries, num_chats: int = 15) -> None:
    """Do as a worker who computes chats, one after the other, in a cache of this process."""
    worker = WorkerId(1)
    cache.attach(worker, SPACE, now=time.monotonic())
    for number in range(num_chats):
        tokens, now = pack(Writer.chat(number)), time.monotonic()
        grant = cache.acquire(worker, SPACE, tokens, now=now)
        assert isinstance(grant, Grant)
        cache.commit(worker, grant.lease, CHAT, now=now)
        cache.release(worker, grant.lease, now=now)
        deliveries.settle()


async def eventually_here(check: Callable[[], bool]) -> None:
    """As `eventually`, where the service is in this process."""
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, "it never came about"
        await asyncio.sleep(0.01)
