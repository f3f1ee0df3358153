"""The worker process: requests come in as JSON lines, events go out as JSON lines.

```
stdin   {"id": "a", "messages": [{"role": "user", "content": "Hello"}], "max_new_tokens": 32}
        {"id": "b", "tokens": [1, 4093, 198], "temperature": 0.7, "seed": 1, "stop": ["###"]}
        {"cancel": "b"}
stdout  {"event": "ready", "worker": "w1", "layout": {...}, ...}
        {"event": "started", "id": "a", "ledger": {"hit": 16, ...}, "num_cached": 16, ...}
        {"event": "token", "id": "a", "token": 28120, "text": "Hello"}
        {"event": "finished", "id": "a", "text": "Hello!", "tokens": [...], "ttft_ms": 31.2, ...}
        {"event": "alone", ...}  {"event": "joined", ...}   when the service goes and comes back
        {"event": "step", "num_tokens": 256}   with --tell-steps, if there is nothing else to tell
```
The fields of a request: see `request_line`.
At the end of its input it finishes what it has in hand; SIGTERM and Ctrl-C end it at once.  In both
cases it gives its blocks back.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import IO, Any, Final

import torch

import prefixcache
from prefixcache.client import Client, Session
from prefixcache.errors import CacheError
from prefixcache.plain_json import json_text
from prefixcache_kernels import SharedPool
from prefixcache_kernels.cpu.library import describe
from prefixcache_worker.child import LINE_BYTES
from prefixcache_worker.engine import Engine
from prefixcache_worker.membership import Join
from prefixcache_worker.model import Model
from prefixcache_worker.request import Failed, to_json
from prefixcache_worker.request_line import (
    LONGEST_LINE,
    name_of,
    read_id,
    read_object,
    read_request,
)

_IDLE_S: Final = 1.0

_SHAPE: Final = ("num_layers", "num_kv_heads", "head_dim", "dtype")
"""What a layout of our own format is made of."""


def joiner(client: Client, model: Model, name: str) -> Join:
    """Make the function that attaches a worker and maps the pool, as often as it is needed."""

    def join() -> tuple[Session, SharedPool]:
        session = client.attach(model.name, model.layout, name=name)
        try:
            return session, SharedPool.map(session.pool)
        except BaseException:
            session.close()
            raise

    return join


def read_lines(fd: int) -> Iterator[bytes]:
    """Give the lines of a file descriptor, the last one also if it does not end in a newline.

    Not `sys.stdin`: its lock would be held by the thread that waits for a line, and Python aborts
    at exit if it is.
    """
    parts: list[bytes] = []
    size = 0
    while data := os.read(fd, 1 << 16):
        *ends, rest = data.split(b"\n")
        for end in ends:
            yield b"".join([*parts, end])
            parts.clear()
            size = 0
        if size <= LONGEST_LINE:  # of a longer one, its beginning is enough to refuse it
            parts.append(rest)
        size += len(rest)
    if parts:
        yield b"".join(parts)


class WorkerProcess:
    """Reads requests, runs the engine, writes events.

    Args:
        model: loaded.
        target: address of the service; None: alone, without any cache.
        name: for people: appears in the service's snapshots.
        chunk: tokens per step.
        max_batch: requests in hand at a time.
        drafts: most tokens a step that are looked up and tried for an answer.
        tells_steps: tell also a step of which there is nothing else to tell, and once a second that
            there was none: who hears neither knows that the engine is stuck.
        lines: where requests come from.
        out: where events go.

    Raises:
        ServiceUnavailable: nobody answers at `target`.
    """

    def __init__(
        self,
        model: Model,
        target: str | None,
        *,
        solo: bool = False,
        name: str = "",
        chunk: int = 256,
        max_batch: int = 16,
        drafts: int = 0,
        tells_steps: bool = False,
        lines: Iterable[bytes] | None = None,
        out: IO[bytes] | None = None,
    ) -> None:
        self.model = model
        self._lines = read_lines(sys.stdin.fileno()) if lines is None else lines
        self._out = sys.stdout.buffer if out is None else out
        self._writing = threading.Lock()
        self._tells_steps = tells_steps
        self._told_s = time.monotonic()
        self._num_told = 0
        """Tokens that the engine had computed when something was told of a step."""
        self._ended = threading.Event()
        self._stopped = False
        self._failure: BaseException | None = None
        """What ended the thread that reads requests, if not the end of the input."""
        self._client: Client | None = None
        session, pool, join = None, None, None
        if not solo:
            self._client = prefixcache.connect(target)
            join = joiner(self._client, model, name)
            session, pool = join()
        self.worker = str(session.attachment.worker) if session is not None else ""
        self.pool = pool
        self.engine = Engine(
            model, pool, session, chunk=chunk, max_batch=max_batch, join=join, drafts=drafts
        )
        self.engine.prepare_segments()

    def run(self) -> None:
        """Serve until the input ends and all is answered, or until SIGTERM or Ctrl-C."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._write(self._ready())
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        engine = self.engine
        try:
            while not (self._stopped or self._failure) and not (
                self._ended.is_set() and engine.idle
            ):
                events = engine.step()
                for event in events:
                    self._write(to_json(event))
                if self._tells_steps:
                    self._tell_step(is_told=bool(events))
                if engine.stalled:
                    engine.wait(_IDLE_S)
        except BrokenPipeError:
            pass  # nobody reads the events any more
        finally:
            engine.close()
            if self._client is not None:
                self._client.close()
            self._hang_up()
        if self._failure is not None and not isinstance(self._failure, BrokenPipeError):
            raise RuntimeError(
                "the worker cannot read requests any more and ends: "
                f"{type(self._failure).__name__}: {self._failure}"
            ) from self._failure

    def _hang_up(self) -> None:
        """Let whoever reads the events know that there will be none, before the process has ended.

        Taking torch down takes a while, and an answer that is to go on elsewhere waits for this.
        """
        if self._out is not sys.stdout.buffer:
            return  # whose it is closes it
        with self._writing:
            with suppress(BrokenPipeError):
                self._out.flush()
            # Python flushes standard output once more at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self._out.fileno())

    def _tell_step(self, *, is_told: bool) -> None:
        now, count = time.monotonic(), self.engine.num_computed - self._num_told
        if not is_told and (count or now - self._told_s >= _IDLE_S):
            self._write({"event": "step", "num_tokens": count})
            is_told = True
        if is_told:
            self._told_s, self._num_told = now, self.engine.num_computed

    def _ready(self) -> dict[str, Any]:
        layout = self.model.layout
        return {
            "event": "ready",
            "pid": os.getpid(),
            "worker": self.worker,
            "shared": self.pool is not None,
            "model": self.model.name,
            "network": self.model.kind,
            "probe_gap": self.model.gap,
            "attention": describe(),
            "max_tokens": self.model.max_tokens,
            "vocab_size": self.model.vocab_size,
            "stop_ids": list(self.model.stop_ids),
            "layout": {name: getattr(layout, name) for name in _SHAPE},
            "block_size": self.pool.block_size if self.pool else 0,
            "num_blocks": self.pool.num_blocks if self.pool else 0,
            "chunk": self.engine.chunk,
            "max_batch": self.engine.max_batch,
            "threads": torch.get_num_threads(),
            "load_ms": round(self.model.load_s * 1e3, 1),
        }

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._stopped = True
        self.engine.wake()

    def _read(self) -> None:
        """Read requests until the input ends; runs in a thread of its own.

        Whatever a line does wrong is told as that line's failure.  If the thread itself breaks, so
        does the process: one that lives on and takes nothing would keep what it holds.
        """
        try:
            for line in self._lines:
                if line.strip():
                    self.engine.inbox.begin()
                    self._take(line)
                    self.engine.inbox.done()
        except BaseException as error:  # noqa: BLE001 - told by `run`, in the other thread
            self.engine.inbox.begin()  # whatever comes now is read by nobody: `doctor` says so
            self._failure = error
        finally:
            self._ended.set()
            self.engine.wake()

    def _take(self, line: bytes) -> None:
        request_id = ""
        try:
            request_id = name_of(line)
            fields = read_object(line)
            if "cancel" in fields:
                self.engine.cancel(read_id(fields, "cancel"))
                return
            request_id = fields["id"] = read_id(fields)
            self.engine.submit(read_request(fields, self.model))
        except Exception as error:  # noqa: BLE001 - a stranger's line ends nothing but itself
            message = str(error) if isinstance(error, CacheError) else f"not foreseen: {error}"
            self._write(to_json(Failed(request_id, type(error).__name__, message)))

    def _write(self, event: dict[str, Any]) -> None:
        line = json_text(event).encode() + b"\n"
        if len(line) > LINE_BYTES:  # who reads it would take that for the end of this process
            told = (
                f"what is to be told of it has {len(line):,} bytes; a line has {LINE_BYTES:,} at "
                "most: ask for fewer answers, or for shorter ones"
            )
            name = str(event.get("id", ""))
            if event["event"] != "finished":
                self.engine.cancel(name)
            failed = Failed(name, "Unsupported", told)
            line = json_text(to_json(failed)).encode() + b"\n"
        with self._writing:
            self._out.write(line)
            self._out.flush()
