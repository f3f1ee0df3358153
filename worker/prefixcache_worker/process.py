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
```
At the end of its input it finishes what it has in hand; SIGTERM and Ctrl-C end it at once.  In both
cases it gives its blocks back.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import IO, Any, Final

import torch

import prefixcache
from prefixcache.client import Client, Session
from prefixcache.errors import CacheError, InvalidRequest
from prefixcache.plain_json import json_text
from prefixcache_kernels import SharedPool
from prefixcache_kernels.cpu.library import describe
from prefixcache_worker.engine import Engine
from prefixcache_worker.membership import Join
from prefixcache_worker.model import Model
from prefixcache_worker.request import Failed, Request, to_json
from prefixcache_worker.sampling import Sampling

_IDLE_S: Final = 1.0
_FIELDS: Final = {
    *("id", "messages", "prompt", "tokens", "max_new_tokens", "temperature", "top_p", "seed"),
    *("stop", "stop_ids", "wait_s", "log_logits"),
}


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


def read_request(fields: dict[str, Any], model: Model) -> Request:
    """Turn the object of one line into a request.

    Raises:
        InvalidRequest: a field is missing, unknown or of the wrong type.
        Unsupported: text for a model without a tokenizer.
    """
    if unknown := fields.keys() - _FIELDS:
        raise InvalidRequest(f"unknown fields {sorted(unknown)}; known are {sorted(_FIELDS)}")
    sources = [key for key in ("messages", "prompt", "tokens") if key in fields]
    if len(sources) != 1:
        raise InvalidRequest(f"one of messages, prompt and tokens is needed, not {sources}")
    try:
        if "messages" in fields:
            tokens = model.chat(fields["messages"])
        elif "prompt" in fields:
            tokens = model.encode(str(fields["prompt"]))
        else:
            tokens = [int(token) for token in fields["tokens"]]
        stop = fields.get("stop", ())
        stop_ids = fields.get("stop_ids")
        seed = fields.get("seed")
        return Request(
            id=str(fields["id"]),
            tokens=tokens,
            max_new_tokens=int(fields.get("max_new_tokens", 128)),
            sampling=Sampling(
                temperature=float(fields.get("temperature", 0.0)),
                top_p=float(fields.get("top_p", 1.0)),
                seed=None if seed is None else int(seed),
            ),
            stop_ids=None if stop_ids is None else tuple(int(i) for i in stop_ids),
            stop_strings=(stop,) if isinstance(stop, str) else tuple(str(s) for s in stop),
            wait_s=float(fields.get("wait_s", 30.0)),
            log_logits=bool(fields.get("log_logits", False)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidRequest(f"{type(error).__name__}: {error}") from error


def read_lines(fd: int) -> Iterator[bytes]:
    """Give the lines of a file descriptor, the last one also if it does not end in a newline.

    Not `sys.stdin`: its lock would be held by the thread that waits for a line, and Python aborts
    at exit if it is.
    """
    rest = b""
    while data := os.read(fd, 1 << 16):
        *whole, rest = (rest + data).split(b"\n")
        yield from whole
    if rest:
        yield rest


class WorkerProcess:
    """Reads requests, runs the engine, writes events.

    Args:
        model: loaded.
        target: address of the service; None: alone, without any cache.
        name: for people: appears in the service's snapshots.
        chunk: tokens per step.
        max_batch: requests in hand at a time.
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
        lines: Iterable[bytes] | None = None,
        out: IO[bytes] | None = None,
    ) -> None:
        self.model = model
        self._lines = read_lines(sys.stdin.fileno()) if lines is None else lines
        self._out = sys.stdout.buffer if out is None else out
        self._writing = threading.Lock()
        self._ended = threading.Event()
        self._stopped = False
        self._client: Client | None = None
        session, pool, join = None, None, None
        if not solo:
            self._client = prefixcache.connect(target)
            join = joiner(self._client, model, name)
            session, pool = join()
        self.worker = str(session.attachment.worker) if session is not None else ""
        self.pool = pool
        self.engine = Engine(model, pool, session, chunk=chunk, max_batch=max_batch, join=join)

    def run(self) -> None:
        """Serve until the input ends and all is answered, or until SIGTERM or Ctrl-C."""
        signal.signal(signal.SIGTERM, self._stop)
        signal.signal(signal.SIGINT, self._stop)
        self._write(self._ready())
        threading.Thread(target=self._read, name="requests", daemon=True).start()
        engine = self.engine
        try:
            while not self._stopped and not (self._ended.is_set() and engine.idle):
                for event in engine.step():
                    self._write(to_json(event))
                if engine.stalled:
                    engine.wait(_IDLE_S)
        except BrokenPipeError:
            # Nobody reads the events any more.  Python would complain again at exit.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        finally:
            engine.close()
            if self._client is not None:
                self._client.close()

    def _ready(self) -> dict[str, Any]:
        return {
            "event": "ready",
            "pid": os.getpid(),
            "worker": self.worker,
            "shared": self.pool is not None,
            "model": self.model.name,
            "network": self.model.kind,
            "probe_gap": self.model.gap,
            "attention": describe(),
            "layout": dataclasses.asdict(self.model.layout),
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
        """Read requests until the input ends; runs in a thread of its own."""
        for line in self._lines:
            if not line.strip():
                continue
            request_id = ""
            try:
                fields = json.loads(line)
                if not isinstance(fields, dict):
                    raise InvalidRequest("a request is a JSON object")
                request_id = str(fields.get("id", ""))
                if "cancel" in fields:
                    self.engine.cancel(str(fields["cancel"]))
                else:
                    self.engine.submit(read_request(fields, self.model))
            except (CacheError, ValueError, RecursionError) as error:
                failed = Failed(request_id, type(error).__name__, str(error))
                self._write(to_json(failed))
        self._ended.set()
        self.engine.wake()

    def _write(self, event: dict[str, Any]) -> None:
        with self._writing:
            self._out.write(json_text(event).encode() + b"\n")
            self._out.flush()
