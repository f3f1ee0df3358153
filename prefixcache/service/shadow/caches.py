"""Shadow caches: what would another block size, policy or size have brought, on live requests?

```
event loop ── deque.append ──► log ── thread, 20 × a second ───► pipe ──► process: up to 4 caches
                  └─ too far behind: off, counted, until it has caught up            │ sums, as JSON
event loop ◄─────────────────────────────────────────────────────────────────────────┘ once a second
```
The service comes first: its part is one append of a tuple per step.  What a thread writes to the
pipe is bounded; when the other process cannot keep up, requests are left out, whole, and counted.
Both sides of the comparison are sums over the very same requests.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import subprocess
import sys
import threading
from collections import deque
from itertools import islice
from time import monotonic, thread_time
from typing import Any

import structlog

from prefixcache.config import ServeSettings, ShadowSpec
from prefixcache.core.cache import PrefixCache
from prefixcache.core.oplog import GRANTED, Entry
from prefixcache.core.policies import policy_named
from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.service.backing import Backing, Sizes
from prefixcache.service.failures import Failures
from prefixcache.service.shadow.oplog_codec import CUT, write_chunk
from prefixcache.v1 import prefixcache_pb2 as pb

_EVERY_S = 0.05
_SOON_S = 0.005
"""Pause after the pipe was full."""
_LAST_WORDS_S = 5.0
_PIPE_BYTES = 2**20
_MAX_PIECES = 64

log = structlog.get_logger(__name__)


class ShadowCaches:
    """The shadow caches of one service, from the moment it has a cache of its own.

    Args:
        settings: those of the service; `shadow` lists what is tried.
        backing: its cache.
        failures: is told when they end by an error.

    Raises:
        InvalidRequest: a policy that there is not.
    """

    def __init__(
        self, settings: ServeSettings, backing: Backing, failures: Failures | None = None
    ) -> None:
        for spec in settings.shadow:
            policy_named(spec.policy or settings.policy)
        self._settings = settings
        self._backing = backing
        self._failures = Failures() if failures is None else failures
        self._max_behind = settings.max_shadow_lag
        self._cache: PrefixCache | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._thread: threading.Thread | None = None
        self._oplog: deque[Entry] = deque()
        self._stop = threading.Event()
        self._has_failed = False
        """Whether the thread has come to an end that nobody foresaw."""
        self._answers = b""
        self.results: list[dict[str, Any]] = []
        """What the process told last; see `ShadowCache.told`."""
        self.writing_s = 0.0
        """CPU time of the thread that writes the oplog."""
        self.num_dropped = 0
        """Requests that the shadows have not seen."""

    def begin(self) -> None:
        """Start the process, once there is a cache.  Idempotent."""
        cache, sizes = self._backing.cache, self._backing.sizes
        if self._process is not None or cache is None or sizes is None:
            return
        made = [self._configuration(spec, sizes) for spec in self._settings.shadow]
        self._process = subprocess.Popen(  # noqa: S603 - our own module, our own settings
            [sys.executable, "-m", "prefixcache.service.shadow.process", json_text(made)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C in the terminal is for the service
        )
        assert self._process.stdout is not None
        os.set_blocking(self._process.stdout.fileno(), False)
        asyncio.get_running_loop().add_reader(self._process.stdout.fileno(), self._hear)
        self._cache = cache
        self._thread = threading.Thread(target=self._run, name="shadows", daemon=True)
        self._thread.start()
        cache.record(self._oplog.append)
        log.info("shadow caches started", shadows=[spec.name for spec in self._settings.shadow])

    def close(self) -> None:
        """End the process.  Idempotent."""
        process, self._process = self._process, None
        if process is None or self._thread is None:
            return
        if self._cache is not None:
            self._cache.record(None)
        self._stop.set()
        self._thread.join(_LAST_WORDS_S)
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(RuntimeError):  # the loop may be closed
            asyncio.get_event_loop().remove_reader(process.stdout.fileno())
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.kill()
        process.wait()
        process.stdout.close()

    def _configuration(self, spec: ShadowSpec, sizes: Sizes) -> dict[str, Any]:
        settings = self._settings
        block_size = spec.block_size or settings.block_size
        num_tokens = (spec.memory or settings.memory) * sizes.block_size // sizes.block_bytes
        num_blocks = num_tokens // block_size - sizes.first_block
        if num_blocks < 1:
            raise InvalidRequest(f"--shadow {spec.name}: not one block fits into that memory")
        return {
            "name": spec.name,
            "policy": spec.policy or settings.policy,
            "partial": str(spec.partial or settings.partial),
            "block_size": block_size,
            "num_blocks": num_blocks,
        }

    def _hear(self) -> None:
        """Take what the process tells."""
        process = self._process
        if process is None or process.stdout is None:
            return
        told = process.stdout.read()
        if told == b"":
            if not self._has_failed:
                self._failures.tell("shadow caches", OSError("their process has ended"))
            asyncio.get_running_loop().remove_reader(process.stdout.fileno())
            if self._cache is not None:
                self._cache.record(None)
            self._oplog.clear()
            self._stop.set()
            return
        *lines, self._answers = (self._answers + (told or b"")).split(b"\n")
        if lines:
            self.results = json.loads(lines[-1])["shadows"]

    def _drop(self, entry: Entry) -> None:
        """Stand in for the log while the process is too far behind."""
        if entry[0] == GRANTED:
            self.num_dropped += 1

    # ------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._write_all()
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody waits for this thread
            self._has_failed = True
            self._failures.tell("shadow caches", error)
            if self._process is not None:
                self._process.kill()  # the event loop hears of it, and ends the rest in order

    def _write_all(self) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._cache is not None
        oplog = self._oplog
        pipe = self._process.stdin.fileno()
        os.set_blocking(pipe, False)
        with contextlib.suppress(OSError):
            fcntl.fcntl(pipe, fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
        behind: deque[bytes] = deque()
        waiting = 0
        is_off = False
        last_words = False
        while not last_words:
            self.writing_s = thread_time()
            last_words = self._stop.wait(_SOON_S if behind else _EVERY_S)
            entries = [oplog.popleft() for _ in range(len(oplog))]
            # Also without entries: the time goes on, and the process answers.
            chunk = write_chunk(monotonic(), entries)
            if entries or not behind:
                behind.extend(chunk)
                waiting += sum(map(len, chunk))
            try:
                waiting -= _write(pipe, behind)
            except OSError:
                return  # the process has died: who reads its answers sees it
            if not is_off and waiting > self._max_behind:
                is_off = True
                self._cache.record(self._drop)
                log.warning("shadow caches cannot keep up, requests are left out")
            elif is_off and not waiting:
                is_off = False
                oplog.append((CUT, 0, 0, b"", None))
                self._cache.record(oplog.append)


def write_shadows(shadows: ShadowCaches, message: pb.SnapshotResponse) -> None:
    """Fill in what the shadow caches told last."""
    message.shadow_dropped = shadows.num_dropped
    for told in shadows.results:
        message.shadows.add(
            name=told["name"],
            num_blocks=told["num_blocks"],
            block_size=told["block_size"],
            last_hour=pb.ShadowSums(**told["hour"]),
            whole=pb.ShadowSums(**told["whole"]),
        )


def _write(pipe: int, behind: deque[bytes]) -> int:
    """Write as long as the pipe takes more; give how many bytes that were."""
    written = 0
    while behind:
        pieces = list(islice(behind, _MAX_PIECES))
        try:
            count = os.writev(pipe, pieces)
        except BlockingIOError:
            break
        written += count
        whole = 0
        while whole < len(pieces) and count >= len(pieces[whole]):
            count -= len(pieces[whole])
            whole += 1
            behind.popleft()
        if whole < len(pieces):
            behind[0] = pieces[whole][count:]
            break
    return written
