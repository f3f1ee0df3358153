"""What is fuzzed: functions that take any bytes, and raise nothing but what they promise.

Each is called with bytes that mean nothing, or nearly something; whatever it raises is a finding.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import sqlite3
import tempfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import structlog

from certificate_file import write
from fuzz import below, strangers
from prefixcache.client.ops import read_result
from prefixcache.config import load, parse_layout, parse_size
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import CacheError
from prefixcache.service.auth.identity import LOCAL
from prefixcache.service.backing import Backing
from prefixcache.service.deliveries import Deliveries
from prefixcache.service.grpc.bad_request import BadRequest, reader
from prefixcache.service.grpc.session import SessionStream
from prefixcache.service.handlers import Handlers
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.persistence.directory import StateDirectory
from prefixcache.service.persistence.manifest import Manifest, ManifestRow, key_of
from prefixcache.service.persistence.recovery import recover
from prefixcache.service.persistence.stamps import Stamps
from prefixcache.service.persistence.writer import describe
from prefixcache.service.workers import Workers
from prefixcache.types import Layout, Namespace, Partial, PoolHandle, WorkerId
from prefixcache.v1 import prefixcache_pb2 as pb

LAYOUT = Layout(1, 1, 2, "float32")
BLOCKS, SIZE = 32, 4

structlog.configure(logger_factory=structlog.ReturnLoggerFactory())

_INTERNAL = 13


class Messages:
    """A whole service without a socket: bytes go in as its stream would get them."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._count = 0
        self._renew()

    def _renew(self) -> None:
        memory = BLOCKS * SIZE * LAYOUT.token_bytes
        with tempfile.TemporaryDirectory() as folder:
            self._begin(memory, write(Path(folder), model="m"))

    def _begin(self, memory: int, segments: Path) -> None:
        settings = load({"memory": memory, "block_size": SIZE, "segments": segments})
        settings = settings.model_copy(update={"pool": "none", "layout": LAYOUT, "max_forks": 8})
        backing = Backing(settings)
        deliveries = Deliveries(backing)
        self._handlers = Handlers(
            settings, backing, deliveries, Workers(backing, deliveries, settings)
        )
        self._read = reader(pb.OpBatch, 4096)

    def __call__(self, data: bytes) -> None:
        self._loop.run_until_complete(self._take(data))

    def close(self) -> None:
        self._loop.close()

    async def _take(self, data: bytes) -> None:
        batch = self._read(data)
        if isinstance(batch, BadRequest):
            return
        hello = pb.OpBatch()
        hello.ops.add().attach.namespace.model = "m"
        hello.ops[0].attach.layout.num_layers = 1
        hello.ops[0].attach.layout.num_kv_heads = 1
        hello.ops[0].attach.layout.head_dim = 2
        hello.ops[0].attach.layout.dtype = pb.ELEMENT_TYPE_FLOAT32
        stream: Any = SessionStream(self._handlers, None, LOCAL)
        task = asyncio.current_task()
        for one in (hello, batch, batch):  # once more: then there are leases, and things to find
            results = await stream.answer(one, task)
            stream._is_taken()  # else long answers wait for those before them to be read
            for result in results.results:
                assert result.error.code != _INTERNAL, result.error.message
        cache = self._handlers.backing.cache
        assert cache is not None
        cache.check()
        if stream._worker is not None:
            self._handlers.workers.leave(stream._worker, gone=True)
        self._handlers.deliveries.close()
        self._count += 1
        if self._count % 500 == 0:
            self._renew()


def answers(data: bytes) -> None:
    """What a client does with whatever a service sends."""
    results = reader(pb.OpResults, 4096)(data)
    if isinstance(results, BadRequest):
        return
    for result in results.results:
        with contextlib.suppress(CacheError):
            read_result(result)


class Rows:
    """A manifest whose rows are cut from the input: all that it offers must be whole."""

    def __init__(self) -> None:
        folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
        handle = PoolHandle("shm", "", BLOCKS, SIZE, LAYOUT, 1, 0)
        self._stamps = Stamps(folder / "stamps", BLOCKS)
        self._sums = Checksums(bytearray(handle.num_bytes), handle, 5)

    def __call__(self, data: bytes) -> None:
        manifest = Manifest(Path(":memory:"))
        rows = []
        take = iter(np.frombuffer(data.ljust(64, b"\0"), np.uint8).tolist())
        with contextlib.suppress(StopIteration):
            for number in range(1, 1 + next(take) % 6):
                rows += [self._row(number, take)]
        manifest._base.executemany("INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?,?)", rows)
        manifest._base.execute("INSERT INTO namespaces VALUES (0, x'00', 'm', '', '', '')")
        key = key_of(Namespace("m"))
        manifest._base.execute("UPDATE namespaces SET key = ?", (key,))
        found = recover(manifest, self._stamps, self._sums, SIZE, tails=True)
        cache = PrefixCache(BLOCKS, SIZE)
        cache.restore(found.runs, array("i"), WorkerId("before"))
        cache.check()
        manifest.close()

    def _row(self, number: int, take: Iterator[int]) -> tuple[Any, ...]:
        kind, count = next(take), 1 + next(take) % 3
        blocks = np.array([next(take) % (BLOCKS + 2) for _ in range(count)], np.int32)
        tokens = np.array([next(take) for _ in range(count * SIZE)], np.uint32).tobytes()
        parent = next(take) % (BLOCKS + 2) - 1
        stamps = np.array([next(take) % 4 * (kind & 1) for _ in range(count)], np.uint32)
        if kind & 2:
            tokens = tokens[: len(tokens) - next(take) % 17]
        sums = np.zeros(count, np.uint64).tobytes()
        if kind & 4:  # a row that says of itself what is right
            sums = self._right(blocks, stamps, tokens, parent)
        row: list[Any] = [number, next(take) % 3 - 1, 0, parent, 0, tokens, blocks.tobytes()]
        row += [stamps.tobytes(), sums]
        if kind & 8:
            row[next(take) % 9] = (None, "text", -1, 2**62, b"", 1.5)[next(take) % 6]
            row[0] = number
        return tuple(row)

    def _right(self, blocks: Any, stamps: Any, tokens: bytes, parent: int) -> bytes:
        if len(tokens) != len(blocks) * SIZE * 4 or (blocks >= BLOCKS).any():
            return bytes(8 * len(blocks))
        heads = np.array([[0, 0, parent, 0]], np.int64)
        counts = np.array([len(blocks)], np.int64)
        facts, words = describe(heads, counts, blocks.view(np.uint32), stamps, tokens, SIZE)
        return self._sums.of(facts, words).tobytes()


def manifest_file(data: bytes) -> None:
    """Bytes as a manifest's file: opened and read, or refused by SQLite."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        path = Path(folder) / "manifest"
        path.write_bytes(data)
        with contextlib.suppress(sqlite3.Error):
            manifest = Manifest(path)
            try:
                manifest.facts()
                manifest.namespaces()
                manifest.runs()
            finally:
                manifest.close()


class States:
    """A state whose manifest was changed by SQL: the service starts, and what it offers holds.

    The input names changes: a column of some row gets another value, or the tables others.
    """

    VALUES = (
        *(None, 0, -1, 1, 7, 70_000, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, -(2**63)),
        *(1e999, -1e999, 0.5, "", "text", "1", "9" * 5000, "30x3x64:float32", "\x00", "1e999"),
        *(b"", b"\0", b"\xff" * 3, b"\xff" * 4, b"\0" * 16, b"\xff" * 64),
    )
    COLUMNS = (
        *(("meta", name) for name in ("format", "layout", "num_blocks", "block_size", "seed")),
        *(("namespaces", name) for name in ("number", "key", "model", "tenant", "salt")),
        *(("runs", name) for name in ManifestRow._fields),
    )
    TABLES = (
        "DROP TABLE runs",
        "DROP TABLE meta",
        "ALTER TABLE runs ADD COLUMN more",
        "ALTER TABLE namespaces ADD COLUMN more",
        "ALTER TABLE runs DROP COLUMN sums",
        "ALTER TABLE runs RENAME COLUMN tokens TO text",
        "CREATE TABLE other (x)",
        "CREATE TRIGGER t AFTER INSERT ON runs BEGIN DELETE FROM runs; END",
        "CREATE VIEW v AS SELECT * FROM runs",
        "CREATE INDEX i ON runs (namespace)",
        "DELETE FROM meta WHERE name = 'seed'",
        "INSERT INTO meta VALUES ('more', NULL)",
        "UPDATE runs SET parent = id",
        "UPDATE runs SET parent = (SELECT max(id) FROM runs)",
        "UPDATE runs SET blocks = (SELECT blocks FROM runs LIMIT 1)",
        "INSERT INTO runs SELECT id + 99, namespace, resets, parent, parent_stamp, tokens, blocks,"
        " stamps, sums FROM runs",
        "UPDATE namespaces SET number = number + 1",
        "UPDATE namespaces SET model = CAST(x'ff' AS TEXT)",
        "PRAGMA user_version = 9",
        "PRAGMA application_id = 9",
    )

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(dir="/dev/shm")
        self._good = Path(self._folder.name) / "good"
        cache = self._open(self._good)
        for start in range(4):
            self._store(cache, start)
        self._close()
        assert self._restored(self._good) == 8

    def __call__(self, data: bytes) -> None:
        copy = Path(self._folder.name) / "copy"
        shutil.copytree(self._good, copy)
        try:
            base = sqlite3.connect(copy / "manifest", isolation_level=None)
            for at in range(0, min(len(data), 12) - 2, 3):
                with contextlib.suppress(sqlite3.Error, OverflowError):
                    base.execute(*self._change(*data[at : at + 3]))
            base.close()
            self._restored(copy)
            self._restored(copy)  # and what the first start made of it is whole
        finally:
            shutil.rmtree(copy)

    def close(self) -> None:
        self._folder.cleanup()

    def _change(self, kind: int, place: int, value: int) -> tuple[str, tuple[Any, ...]]:
        if kind % 4 == 0:
            return self.TABLES[value % len(self.TABLES)], ()
        table, column = self.COLUMNS[place % len(self.COLUMNS)]
        new = self.VALUES[value % len(self.VALUES)]
        if table == "meta":
            return "UPDATE meta SET value = ? WHERE name = ?", (new, column)
        rows = f"rowid % 3 = {kind % 3}" if kind & 64 else "1"
        return f"UPDATE {table} SET {column} = ? WHERE {rows}", (new,)  # noqa: S608 - from above

    def _restored(self, folder: Path) -> int:
        """Start with a state, store more, and end; give how many blocks were restored."""
        cache = self._open(folder)
        cache.check()
        restored = self._state.condition.restored_blocks
        self._store(cache, 50)
        self._close()
        assert not self._state.condition.failure
        return restored

    def _open(self, folder: Path) -> PrefixCache:
        self._state = StateDirectory(folder)
        layout = self._state.layout
        assert layout in (None, LAYOUT)
        file = self._state.open_pool(LAYOUT, BLOCKS, SIZE)
        assert file is not None
        self._file = file
        cache = PrefixCache(BLOCKS, SIZE)
        self._state.restore(cache, Partial.TAILS)
        return cache

    def _store(self, cache: PrefixCache, start: int) -> None:
        worker, namespace = WorkerId("w"), Namespace("m")
        cache.attach(worker, namespace, now=1.0)
        tokens = np.arange(start * 100, start * 100 + 2 * SIZE, dtype=np.uint32).tobytes()
        grant = cache.acquire(worker, namespace, tokens, now=1.0)
        cache.commit(worker, grant.lease, 2 * SIZE, now=1.0)
        cache.release(worker, grant.lease, now=1.0)

    def _close(self) -> None:
        self._state.close()
        self._file.close()


def settings(data: bytes) -> None:
    """Bytes as what a user may write behind a flag."""
    text = data.decode("utf-8", "replace")
    for parse in (parse_size, parse_layout):
        with contextlib.suppress(ValueError):
            parse(text)


TARGETS: dict[str, Callable[[], Callable[[bytes], None]]] = {
    "messages": Messages,
    "answers": lambda: answers,
    "rows": Rows,
    "manifest": lambda: manifest_file,
    "states": States,
    "folders": below.Folders,
    "stores": lambda: below.stores,
    "traces": strangers.Traces,
    "conversations": strangers.Conversations,
    "prompts": strangers.Prompts,
    "logged": lambda: strangers.logged,
    "workers": lambda: strangers.worker_lines,
    "identities": strangers.IdentityFiles,
    "configs": strangers.Configs,
    "texts": lambda: strangers.texts,
    "settings": lambda: settings,
}
"""Makers of targets by name."""
