"""Chats on real worker processes: pinned to one, or moving to another worker at every turn.

```
service ─── one pool                      service  service  service    one pool each: private caches
  │   │   │                                  │        │        │
 w1  w2  w3   one process, one thread each  w1       w2       w3

pinned    chat 7   w2 ── w2 ── w2          moving    chat 7   w2 ── w3 ── w1
restart   after the first turn of all chats w1 is killed and started again
```
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.errors import ServiceUnavailable
from prefixcache.plain_json import json_text

IN_FLIGHT: Final = 8
NEW_TOKENS: Final = 24
TURNS: Final = 3
USER_TOKENS: Final = (20, 60)
_READY_S: Final = 120.0
_LOWEST_ID, _HIGHEST_ID = 100, 40_000


@dataclass(frozen=True, slots=True)
class Load:
    """What is asked of the workers."""

    name: str
    chats: int
    systems: int
    """Different system prompts."""
    system_tokens: int
    moving: bool
    restart: bool


@dataclass(frozen=True, slots=True)
class Turn:
    """One answered turn."""

    chat: int
    number: int
    ttft_s: float
    """From handing it to the worker to its first token, as the client sees it."""
    num_prompt: int
    num_reused: int
    num_computed: int


@dataclass(frozen=True, slots=True)
class Played:
    """A load, played."""

    workers: int
    shared: bool
    seconds: float
    turns: tuple[Turn, ...]

    def ttft_ms(self, *, later: bool) -> list[float]:
        """Times to the first token; of the later turns, or of all."""
        return [t.ttft_s * 1e3 for t in self.turns if t.number > 0 or not later]

    def fields(self) -> dict[str, Any]:
        """Give it as numbers."""
        later = self.ttft_ms(later=True)
        return {
            "workers": self.workers,
            "shared": self.shared,
            "seconds": self.seconds,
            "ttft_ms_median": statistics.median(self.ttft_ms(later=False)),
            "later_ttft_ms_min": min(later),
            "later_ttft_ms_median": statistics.median(later),
            "later_ttft_ms_max": max(later),
            "later_reused": sum(t.num_reused for t in self.turns if t.number),
            "later_prompt": sum(t.num_prompt for t in self.turns if t.number),
            "tokens_prompt": sum(t.num_prompt for t in self.turns),
            "tokens_computed": sum(t.num_computed for t in self.turns),
            "tokens_per_s": NEW_TOKENS * len(self.turns) / self.seconds,
        }


class Worker:
    """One worker process; requests go in, each answer is a future."""

    def __init__(self, target: str, model: str, dtype: str) -> None:
        self._command = [
            *(sys.executable, "-m", "prefixcache_worker", "--connect", target),
            *("--model", model, "--dtype", dtype, "--threads", "1"),
        ]
        self._waiting: dict[str, tuple[Future[dict[str, Any]], float]] = {}
        self._first: dict[str, float] = {}
        self._reused: dict[str, int] = {}
        self.start()

    def start(self) -> None:
        """Start the process; `ready` waits for it."""
        self._ready = threading.Event()
        self._process = subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        threading.Thread(target=self._read, args=(self._process,), daemon=True).start()

    def ready(self) -> None:
        """Wait until the model is loaded."""
        if not self._ready.wait(_READY_S):
            raise SystemExit(f"a worker did not start: {' '.join(self._command)}")

    def ask(self, request_id: str, tokens: Sequence[int]) -> Future[dict[str, Any]]:
        """Hand over a request; its future has the finished event, with the client's own times."""
        answer: Future[dict[str, Any]] = Future()
        self._waiting[request_id] = (answer, time.perf_counter())
        request = {
            "id": request_id,
            "tokens": list(tokens),
            "max_new_tokens": NEW_TOKENS,
            "stop_ids": [],
        }
        assert self._process.stdin is not None
        self._process.stdin.write(json_text(request).encode() + b"\n")
        self._process.stdin.flush()
        return answer

    def restart(self) -> None:
        """Kill the process and start another; what it had in hand is lost."""
        self._process.kill()
        self._process.wait()
        self.start()
        self.ready()

    def stop(self) -> None:
        """End the process."""
        self._process.terminate()
        self._process.wait()

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            now = time.perf_counter()
            event = json.loads(line)
            request_id = str(event.get("id", ""))
            if event["event"] == "ready":
                self._ready.set()
            elif event["event"] == "started":
                self._reused[request_id] = event["num_cached"]
            elif event["event"] == "token":
                self._first.setdefault(request_id, now)
            elif event["event"] == "finished":
                answer, sent = self._waiting.pop(request_id)
                first = self._first.pop(request_id)
                event |= {"ttft_s": first - sent, "reused": self._reused.pop(request_id)}
                answer.set_result(event)
            elif event["event"] == "failed":
                self._waiting.pop(request_id)[0].set_exception(RuntimeError(event["message"]))


@contextlib.contextmanager
def service(folder: Path, name: str, memory: str) -> Iterator[str]:
    """Run a service in a process of its own; give its address."""
    target = f"unix:{folder}/{name}.sock"
    command = [
        *(sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target),
        *("--memory", memory, "--log-level", "error"),
    ]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + _READY_S
        while True:
            try:
                prefixcache.connect(target).close()
                break
            except ServiceUnavailable:
                if time.monotonic() > deadline or process.poll() is not None:
                    raise
                time.sleep(0.02)
        yield target
    finally:
        process.terminate()
        process.wait()


@contextlib.contextmanager
def workers(
    count: int, *, shared: bool, model: str, dtype: str, memory: str
) -> Iterator[list[Worker]]:
    """Run workers on one service, or each on a service of its own."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pfx")))
        targets = [
            stack.enter_context(service(folder, f"s{i}", memory))
            for i in range(1 if shared else count)
        ]
        started = []
        for i in range(count):
            started.append(Worker(targets[i % len(targets)], model, dtype))
            stack.callback(started[-1].stop)
        for worker in started:
            worker.ready()
        yield started


def play(load: Load, team: Sequence[Worker], *, shared: bool, seed: int) -> Played:
    """Play a load; the same seed gives the same chats, whoever answers."""
    draw = random.Random(seed)
    systems = [_tokens(draw, load.system_tokens) for _ in range(load.systems)]
    words = [
        [_tokens(draw, draw.randint(*USER_TOKENS)) for _ in range(TURNS)] for _ in range(load.chats)
    ]
    prompts = [list(systems[number % load.systems]) for number in range(load.chats)]
    turns: list[Turn] = []

    def advance(number: int, turn: int) -> None:
        prompt = prompts[number]
        prompt += words[number][turn]
        worker = team[(number + (turn if load.moving else 0)) % len(team)]
        event = worker.ask(f"{number}.{turn}", prompt).result()
        turns.append(
            Turn(number, turn, event["ttft_s"], len(prompt), event["reused"], event["num_computed"])
        )
        prompt += event["tokens"]

    def chat(number: int) -> None:
        for turn in range(TURNS):
            advance(number, turn)

    seconds = 0.0
    with ThreadPoolExecutor(IN_FLIGHT) as pool:
        if not load.restart:
            started = time.perf_counter()
            list(pool.map(chat, range(load.chats)))
            seconds = time.perf_counter() - started
        for turn in range(TURNS if load.restart else 0):
            if turn == 1:
                # With nothing in hand; the time that the model takes to load is not counted.
                team[0].restart()
            started = time.perf_counter()
            list(pool.map(partial(advance, turn=turn), range(load.chats)))
            seconds += time.perf_counter() - started
    return Played(len(team), shared, seconds, tuple(turns))


def _tokens(draw: random.Random, count: int) -> list[int]:
    return [draw.randrange(_LOWEST_ID, _HIGHEST_ID) for _ in range(count)]
