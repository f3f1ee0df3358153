"""The folder of a state: taken by one service at a time, opened warm or cold, closed whole.

A state is a convenience: whatever is wrong with it costs what was in it, never the service.
"""

from __future__ import annotations

import contextlib
import gc
import os
import secrets
import sqlite3
from array import array
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import numpy as np
import structlog

from prefixcache.config import parse_layout
from prefixcache.core.cache import PrefixCache
from prefixcache.errors import ServiceUnavailable
from prefixcache.pool import PoolFile
from prefixcache.private_files import (
    check_path,
    lock_private,
    make_private_folder,
    refuse_strangers,
    remove_foreign,
)
from prefixcache.service.isolated_listener import IsolatedListener
from prefixcache.service.persistence.checksums import Checksums
from prefixcache.service.persistence.manifest import FORMAT, Manifest
from prefixcache.service.persistence.recovery import Recovery, recover
from prefixcache.service.persistence.stamps import Stamps
from prefixcache.service.persistence.writer import ManifestWriter
from prefixcache.types import BlockTable, Layout, Partial, WorkerId
from prefixcache.user_folders import expand

FORMER = WorkerId(0)
"""All workers of an earlier life of the pool: a number that nobody who attaches is given."""
"""Under this name, blocks that they may still write to are quarantined."""

_MANIFEST = ("manifest", "manifest-wal", "manifest-shm", "manifest-journal")
"""The files of the database."""
_KEPT = (*_MANIFEST, "pool", "stamps")

_NOT_ITS_FAULT = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_NOMEM,
}
"""What may befall a manifest that is in order, which therefore stays for the next start."""

log = structlog.get_logger(__name__)


class Condition(NamedTuple):
    """How it stands with a state, for people and monitoring."""

    folder: str
    failure: str
    """Why nothing is kept (now); empty if all is well."""
    restored_blocks: int
    restored_tokens: int
    damaged_blocks: int
    """Blocks whose bytes were not those that were noted: they are not used."""
    restore_s: float
    written_blocks: int
    dropped_runs: int
    pending_bytes: int


class StateDirectory:
    """A folder that one service has taken.

    Args:
        path: the folder; made, for this user alone, if it is not there and the one above it is.

    Raises:
        ServiceUnavailable: another service has it.
        InvalidRequest: it is somebody else's, others may write to it, or there is none above it.
    """

    def __init__(self, path: Path) -> None:
        self.path = expand(path).absolute()
        self.failure = ""
        self._lock: int | None = None
        self._manifest: Manifest | None = None
        self._stamps: Stamps | None = None
        self._sums: Checksums | None = None
        self._writer: ManifestWriter | None = None
        self._file: PoolFile | None = None
        self._restored = (0, 0, 0, 0.0)
        self._first_block = 0
        try:
            check_path(self.path.parent, "--state")
            make_private_folder(self.path, "--state")
            refuse_strangers(self.path, "lock", _KEPT, "--state")
            self._lock = lock_private(self.path / "lock")
            self._remove_foreign(*_KEPT)
            self._manifest = self._open_manifest()
        except BlockingIOError:
            self.close()
            raise ServiceUnavailable(
                f"another service keeps its state in {self.path}; choose another --state"
            ) from None
        except (OSError, sqlite3.Error) as error:
            self._give_up(error)

    @property
    def layout(self) -> Layout | None:
        """The layout of the pool that is there; None if there is none, or it cannot be known."""
        try:
            facts = {} if self._manifest is None else self._manifest.facts()
            layout = parse_layout(str(facts["layout"]))
            sizes = int(facts["num_blocks"]), int(facts["block_size"])
        except (sqlite3.Error, KeyError, ValueError):
            return None
        return layout if PoolFile.is_of(self.path / "pool", layout, *sizes) else None

    @property
    def condition(self) -> Condition:
        """How it stands."""
        writer = self._writer
        return Condition(
            str(self.path),
            self.failure or ("" if writer is None else writer.given_up or writer.failure),
            *self._restored,
            0 if writer is None else writer.num_written,
            0 if writer is None else writer.num_dropped,
            0 if writer is None else writer.num_pending,
        )

    def open_pool(
        self, layout: Layout, num_blocks: int, block_size: int, first_block: int = 0
    ) -> PoolFile | None:
        """Take over the pool, or make a new one.  None if that cannot be done here.

        What lies in blocks before the first that can be lent is not taken over.

        Raises:
            PoolExhausted: there is no room for a pool of that size.
        """
        if self._manifest is None:
            return None
        facts: dict[str, str | int] = {"format": FORMAT, "layout": str(layout)}
        facts |= {"num_blocks": num_blocks, "block_size": block_size}
        self._first_block = first_block
        found = self._facts()
        fits = {name: found.get(name) for name in facts} == facts
        reuse = fits and Stamps.fit(self.path / "stamps", num_blocks)
        try:
            # Without stamps nobody knows where workers of the pool may still write: another pool.
            file, warm = PoolFile.keep(
                self.path / "pool", layout, num_blocks, block_size, reuse=reuse
            )
        except OSError as error:
            self._give_up(error)
            return None
        try:
            if not warm:
                if found:
                    log.warning("the state is of another pool: starting cold", state=str(self.path))
                (self.path / "stamps").unlink(missing_ok=True)
                found = facts | {"seed": secrets.randbits(62)}
                self._manifest = self._restart_manifest(found)
            self._stamps = Stamps(self.path / "stamps", num_blocks)
            self._sums = Checksums(file.map(), file.handle, int(found["seed"]))
        except (OSError, sqlite3.Error, ValueError, KeyError) as error:
            self._give_up(error)
            self._stamps = self._sums = None
        self._file = file
        return file

    def restore(self, cache: PrefixCache, partial: Partial) -> None:
        """Put into an empty cache what still holds, and keep what happens to it from now on."""
        stamps, sums, manifest, file = self._stamps, self._sums, self._manifest, self._file
        if stamps is None or sums is None or manifest is None or file is None:
            return
        started = perf_counter()
        collects = gc.isenabled()
        gc.disable()  # a million new objects, none of them garbage
        try:
            self._restore(cache, partial, stamps, sums, manifest, file, started)
        finally:
            if collects:
                gc.enable()

    def _restore(
        self,
        cache: PrefixCache,
        partial: Partial,
        stamps: Stamps,
        sums: Checksums,
        manifest: Manifest,
        file: PoolFile,
        started: float,
    ) -> None:
        size = cache.block_size
        try:
            recovery = recover(
                *(manifest, stamps, sums, size),
                first_block=self._first_block,
                tails=partial is Partial.TAILS,
            )
        except Exception as error:  # noqa: BLE001 - foreign data: it costs what is in it, no more
            log.warning("the state cannot be read: starting cold", cause=repr(error))
            try:
                facts = self._facts()
                stamps.resets[:] += 1  # whatever else there is, it counts no more
                manifest = self._manifest = self._restart_manifest(facts)
            except (sqlite3.Error, OSError, KeyError) as worse:
                self._give_up(worse)
                return
            recovery = Recovery([], [], [], 0, {})
        aside = array("i") if not file.has_former_workers() else self._writable(stamps)
        count = cache.restore(recovery.runs, aside, FORMER)
        stamps.blocks[:] += stamps.blocks & 1
        if aside:
            stamps.lend(aside)
        tokens = sum(len(run.tokens) for run in recovery.runs) // 4
        took_s = perf_counter() - started
        self._restored = (count, tokens, recovery.num_doubtful, took_s)
        indexed = {run.namespace for run in recovery.runs}
        named = {n: space for n, space in recovery.namespaces.items() if space in indexed}
        self._writer = ManifestWriter(manifest, stamps, sums, size, named)
        ear = IsolatedListener(self._writer, self._writer.give_up)
        cache.observe(ear, ear)
        self._writer.start(recovery.kept, recovery.lost)
        # The service says it, too, where it says what it derived: one of both is enough for people.
        tell = log.warning if recovery.num_doubtful or len(aside) else log.debug
        tell(
            "state restored",
            blocks=count,
            tokens=tokens,
            damaged=recovery.num_doubtful,
            quarantined=len(aside),
            seconds=round(took_s, 3),
        )

    def has_former_workers(self) -> bool:
        """Whether a process still maps the pool as it was before this service."""
        return self._file is not None and self._file.has_former_workers()

    def close(self) -> None:
        """Write what is left, and let go of everything but the pool's file.  Idempotent."""
        ended = self._writer is None or self._writer.close()
        if ended and self._manifest is not None:
            self._manifest.close()
            self._manifest = None
        if ended and self._stamps is not None:
            self._stamps.close()
            self._stamps = None
        if ended and self._sums is not None:
            self._sums.close()
            self._sums = None
        self._writer = None
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _open_manifest(self) -> Manifest:
        try:
            return Manifest(self.path / "manifest")
        except (sqlite3.Error, UnicodeError) as error:
            if getattr(error, "sqlite_errorcode", 0) & 0xFF in _NOT_ITS_FAULT:
                raise
            log.warning("the manifest is broken: starting cold", cause=str(error))
            return self._new_manifest()

    def _new_manifest(self) -> Manifest:
        if self._manifest is not None:
            self._manifest.close()
        for name in _MANIFEST:
            (self.path / name).unlink(missing_ok=True)
        return Manifest(self.path / "manifest")

    def _remove_foreign(self, *names: str) -> None:
        """Remove what is no file of this user alone: a symlink, say, leads who knows where."""
        for name in names:
            if remove_foreign(self.path / name):
                log.warning("removed what was no file of this user", path=str(self.path / name))

    def _restart_manifest(self, facts: dict[str, str | int]) -> Manifest:
        manifest = self._new_manifest()
        manifest.begin(facts)
        return manifest

    def _facts(self) -> dict[str, str | int]:
        try:
            return {} if self._manifest is None else self._manifest.facts()
        except sqlite3.Error as error:
            log.warning("the manifest is broken: starting cold", cause=str(error))
            return {}

    def _writable(self, stamps: Stamps) -> BlockTable:
        odd = np.flatnonzero(stamps.blocks & 1).astype(np.int32)
        return array("i", odd[odd >= self._first_block].tobytes())

    def _give_up(self, error: Exception) -> None:
        """Go on without a state; what is there must not come back after resets it never saw."""
        self.failure = str(error) or type(error).__name__
        with contextlib.suppress(OSError):
            (self.path / "stamps").unlink(missing_ok=True)
        log.error(
            "nothing is kept for the next start, the service goes on",
            state=str(self.path),
            cause=self.failure,
        )
