"""Recording: live requests as a trace, one JSON object `{t, namespace, tokens}` a line.

```
event loop ── record() ──► queue, at most 64 MiB ──► thread: anonymise, encode, compress, write
                  └─ no room: dropped, and counted
```
The service comes first: recording never makes a request wait, and a disk that is full or broken
ends the recording only.  The tokens are base64 of packed little-endian uint32: that is encoded in a
fraction of the time that lists of numbers take, during which the event loop would stand still.
"""

from __future__ import annotations

import base64
import contextlib
import os
import queue
import threading
import zlib
from pathlib import Path
from time import monotonic
from typing import Any, TypeAlias

import structlog

from prefixcache.client.codec import seal
from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache.private_files import open_private
from prefixcache.service.events.anonymiser import Anonymiser
from prefixcache.service.failures import Failures
from prefixcache.types import Namespace

_MAX_PENDING = 64 * 2**20
"""Bytes that may wait for the thread."""

_REQUEST_BYTES = 256
"""What a request takes in the queue beside its tokens."""

_FLUSH_S = 1.0
"""After this long a line is in the file, so that a killed service loses no more."""

_LAST_LINES_S = 30.0
"""What the thread gets to write what is queued, at the end: a disk may hang for ever."""

_GZIP = 16 + zlib.MAX_WBITS
_FASTEST = 1

_Request: TypeAlias = "tuple[float, Namespace, bytes]"

log = structlog.get_logger(__name__)


class Recorder:
    """Writes requests to a new file, which only this user can read; as gzip if it ends in `.gz`.

    Args:
        path: the file.  What exists is not overwritten (a device such as /dev/null can be named).
        anonymiser: replaces tokens and names, if given.
        max_pending: bytes that may wait to be written.
        failures: is told when recording ends by an error.

    Raises:
        InvalidRequest: the file exists or cannot be created.
    """

    def __init__(
        self,
        path: Path,
        anonymiser: Anonymiser | None = None,
        *,
        max_pending: int = _MAX_PENDING,
        failures: Failures | None = None,
    ) -> None:
        self._path = path
        self._file = os.fdopen(_create(path), "wb")
        self._packer = zlib.compressobj(_FASTEST, wbits=_GZIP) if path.suffix == ".gz" else None
        self._anonymiser = anonymiser
        self._max_pending = max_pending
        self._failures = Failures() if failures is None else failures
        self._queue: queue.SimpleQueue[_Request | None] = queue.SimpleQueue()
        self._started_at = monotonic()
        self._offered = 0
        # Two counters with one writer each need no lock.
        self._bytes_in = 0  # the event loop's
        self._bytes_out = 0  # the thread's
        self._full = False
        self._lines = 0
        self._kept = 0
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="recorder", daemon=True)
        self._thread.start()

    @property
    def num_kept(self) -> int:
        """Requests that are in the file for certain."""
        return self._kept

    @property
    def num_dropped(self) -> int:
        """Requests that are not in the file; final once it is closed."""
        return self._offered - self._kept

    def record(self, namespace: Namespace, tokens: bytes) -> None:
        """Note a request.  Never blocks: what there is no room for is dropped.  O(1)."""
        self._offered += 1
        size = len(tokens) + _REQUEST_BYTES
        if self._bytes_in - self._bytes_out + size > self._max_pending:
            if not self._full:
                self._full = True
                log.warning("recording cannot keep up, requests are missing", file=str(self._path))
            return
        self._bytes_in += size
        self._queue.put((monotonic() - self._started_at, namespace, tokens))

    def close(self) -> None:
        """Write what is queued, and say how much there is.  Blocks for that long.  Idempotent."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join(_LAST_LINES_S)
        tell = log.warning if self.num_dropped else log.info
        tell(
            "recording ended",
            file=str(self._path),
            requests=self.num_kept,
            dropped=self.num_dropped,
        )

    # ------------------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._write_all()
            self._flush(zlib.Z_FINISH)
        except Exception as error:  # noqa: BLE001 - whatever it is, nobody waits for this thread
            self._failures.tell("recording", error)
            while (request := self._queue.get()) is not None:
                self._bytes_out += len(request[2]) + _REQUEST_BYTES
        finally:
            # The last flush has succeeded, or what is left cannot be written anyhow.
            with contextlib.suppress(OSError, ValueError):
                self._file.close()

    def _write_all(self) -> None:
        due: float | None = None
        while True:
            with contextlib.suppress(queue.Empty):
                wait_s = None if due is None else max(0.0, due - monotonic())
                request = self._queue.get(timeout=wait_s)
                if request is None:
                    return
                self._write(request)
                due = due or monotonic() + _FLUSH_S
            if due is not None and monotonic() >= due:
                self._flush(zlib.Z_SYNC_FLUSH)
                due = None

    def _write(self, request: _Request) -> None:
        t, namespace, tokens = request
        self._bytes_out += len(tokens) + _REQUEST_BYTES
        if self._anonymiser is not None:
            namespace = self._anonymiser.namespace(namespace)
            salt = namespace.salt
            tokens = self._anonymiser.tokens(tokens)
        else:
            salt = seal(namespace.salt)
        named: Any = namespace.model
        if namespace.adapter or namespace.tenant or namespace.salt:
            named = [namespace.model, namespace.adapter, namespace.tenant, salt]
        fields = {
            "t": round(t, 6),
            "namespace": named,
            "tokens": base64.b64encode(tokens).decode(),
        }
        line = json_text(fields, separators=(",", ":")).encode() + b"\n"
        self._file.write(line if self._packer is None else self._packer.compress(line))
        self._lines += 1

    def _flush(self, mode: int) -> None:
        if self._packer is not None:
            self._file.write(self._packer.flush(mode))
        self._file.flush()
        self._kept = self._lines


def _create(path: Path) -> int:
    """Create a file of mode 0600 that was not there; give its descriptor.

    Raises:
        InvalidRequest: it exists or cannot be created.
    """
    try:
        if path.is_char_device():
            return os.open(path, os.O_WRONLY | os.O_CLOEXEC)
        return open_private(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
    except FileExistsError:
        raise InvalidRequest(
            f"{path} exists: a recording does not overwrite. Remove it or name another file."
        ) from None
    except OSError as error:
        raise InvalidRequest(f"cannot record to {path}: {error.strerror}") from None
