"""The manifest: which prefix lies in which blocks, in SQLite, and for which pool all this holds.

```
meta         what the pool is, and whose: format, layout, sizes, seed of the checksums
namespaces   number ─► the namespace's fields, under a BLAKE2b key over them
runs         blocks in a row that were stored together: behind which block, tokens, stamps, sums
```

Written in batches by one thread, each batch one transaction in the write-ahead log, so that a
process that dies at any moment leaves whole batches.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from hashlib import blake2b
from pathlib import Path
from typing import Final, NamedTuple

from prefixcache.private_files import open_private
from prefixcache.service.persistence.stamps import MAX_NAMESPACES
from prefixcache.types import Namespace

FORMAT: Final = 2
"""1 summed only the first slots of a partly filled block."""

_TABLES: Final = """
CREATE TABLE meta (name TEXT PRIMARY KEY, value) WITHOUT ROWID;
CREATE TABLE namespaces (
    number INTEGER PRIMARY KEY, key BLOB UNIQUE,
    model TEXT, adapter TEXT, tenant TEXT, salt TEXT
);
CREATE TABLE runs (
    id INTEGER PRIMARY KEY,
    namespace INTEGER, resets INTEGER, parent INTEGER, parent_stamp INTEGER,
    tokens BLOB, blocks BLOB, stamps BLOB, sums BLOB
);
"""


_FACTS: Final = {"format": int, "layout": str, "num_blocks": int, "block_size": int, "seed": int}

MAX_RUN: Final = 2**62
"""Ids of runs are below; what is beyond was not written by us."""


class ManifestRow(NamedTuple):
    """A row of the manifest: blocks in a row that were stored together."""

    id: int
    namespace: int
    resets: int
    """How often the namespace had been reset before."""
    parent: int
    """The block before; -1 where there is none."""
    parent_stamp: int
    tokens: bytes
    blocks: bytes
    """Packed int32."""
    stamps: bytes
    """Packed uint32."""
    sums: bytes
    """Packed uint64."""


def key_of(namespace: Namespace) -> bytes:
    """Give the key of a namespace: no two, however their fields are cut, have the same.

    >>> key_of(Namespace("ab", "c")) == key_of(Namespace("a", "bc"))
    False
    """
    digest = blake2b(digest_size=32, person=b"prefixcache ns 1")
    for field in (namespace.model, namespace.adapter, namespace.tenant, namespace.salt):
        raw = field.encode("utf-8", "surrogatepass")
        digest.update(len(raw).to_bytes(8, "little") + raw)
    return digest.digest()


def _schema(base: sqlite3.Connection) -> set[tuple[str, ...]]:
    return set(base.execute("SELECT type, name, tbl_name, sql FROM sqlite_master"))


def _our_schema() -> set[tuple[str, ...]]:
    with closing(sqlite3.connect(":memory:")) as base:
        base.executescript(_TABLES)
        return _schema(base)


_OURS: Final = _our_schema()
"""A table with one column more, a trigger or a view would have statements do what nobody meant."""


class Manifest:
    """One SQLite database.

    Args:
        path: its file; made if it is not there.

    Raises:
        sqlite3.Error: it cannot be opened, or is none: other tables than ours, or one thing more.
        OSError: it cannot be made, or is no regular file of this user.
    """

    def __init__(self, path: Path) -> None:
        if path.name != ":memory:":
            # SQLite gives its other files the mode of this one, and would follow a symlink.
            os.close(open_private(path, os.O_RDWR | os.O_CREAT))
        self._base = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
        try:
            self._base.execute("PRAGMA trusted_schema = OFF")
            self._base.execute("PRAGMA journal_mode = WAL")
            self._base.execute("PRAGMA synchronous = NORMAL")
            self._base.execute("PRAGMA journal_size_limit = 67108864")
            self._base.execute("PRAGMA temp_store = MEMORY")
            found = _schema(self._base)
            if found and found != _OURS:
                raise sqlite3.DatabaseError("these are not the tables of a manifest")
            if not found:
                self._base.executescript(_TABLES)
        except BaseException:
            self._base.close()
            raise

    def facts(self) -> dict[str, str | int]:
        """Give what the pool is; empty if nothing has been said yet.

        Raises:
            sqlite3.Error: what is there cannot be read, or cannot be true.
        """
        found = dict(self._base.execute("SELECT name, value FROM meta"))
        if not found:
            return {}
        for name, kind in _FACTS.items():
            if type(found.get(name)) is not kind:
                raise sqlite3.DatabaseError(
                    f"what it says of the pool's {name} is no {kind.__name__}"
                )
        if not 0 <= found["seed"] < 2**62:
            raise sqlite3.DatabaseError("the seed of its checksums is out of range")
        return found

    def begin(self, facts: dict[str, str | int]) -> None:
        """Forget everything, and say what the pool is from now on."""
        with self._base:
            self._base.execute("BEGIN IMMEDIATE")
            for table in ("meta", "namespaces", "runs"):
                self._base.execute(f"DELETE FROM {table}")  # noqa: S608 - names from the line above
            self._base.executemany("INSERT INTO meta VALUES (?, ?)", facts.items())

    def namespaces(self) -> dict[int, Namespace]:
        """Give the known namespaces by number, without those whose number or key is not right."""
        rows = self._base.execute(
            "SELECT number, key, model, adapter, tenant, salt FROM namespaces ORDER BY number"
        )
        found = {}
        for number, key, *fields in rows:
            if 0 <= number < MAX_NAMESPACES and all(isinstance(field, str) for field in fields):
                namespace = Namespace(*fields)
                if key == key_of(namespace):
                    found[number] = namespace
        return found

    def runs(self) -> list[tuple[int, int, int, int, int, bytes, bytes, bytes, bytes]]:
        """Give all rows, as `ManifestRow` has them, in the order in which they were stored."""
        columns = ", ".join(ManifestRow._fields)
        return self._base.execute(f"SELECT {columns} FROM runs ORDER BY id").fetchall()  # noqa: S608 - our own names

    def write(
        self,
        namespaces: Iterable[tuple[int, Namespace]],
        added: Iterable[ManifestRow],
        grown: Iterable[ManifestRow],
        gone: Iterable[int],
        cleared: Iterable[tuple[int, int]],
    ) -> None:
        """Add and remove, all or nothing.  Blocks for the disk.

        Args:
            namespaces: new ones, by number.
            added: new runs.
            grown: blocks for the end of the run of that id.
            gone: ids of runs of which nothing is left.
            cleared: (namespace, resets): runs of that namespace from before as many resets.

        Raises:
            sqlite3.Error: nothing was written; the disk may be full.
        """
        base = self._base
        with base:
            base.execute("BEGIN IMMEDIATE")
            base.executemany(
                "INSERT OR REPLACE INTO namespaces VALUES (?, ?, ?, ?, ?, ?)",
                (
                    (number, key_of(one), one.model, one.adapter, one.tenant, one.salt)
                    for number, one in namespaces
                ),
            )
            base.executemany("INSERT OR REPLACE INTO runs VALUES (?,?,?,?,?,?,?,?,?)", added)
            base.executemany(
                "UPDATE runs SET tokens = CAST(tokens || ? AS BLOB),"
                " blocks = CAST(blocks || ? AS BLOB), stamps = CAST(stamps || ? AS BLOB),"
                " sums = CAST(sums || ? AS BLOB) WHERE id = ?",
                ((run.tokens, run.blocks, run.stamps, run.sums, run.id) for run in grown),
            )
            base.executemany("DELETE FROM runs WHERE id = ?", ((one,) for one in gone))
            base.executemany("DELETE FROM runs WHERE namespace = ? AND resets < ?", cleared)

    def close(self) -> None:
        """Close the database; the write-ahead log becomes part of it."""
        self._base.close()
