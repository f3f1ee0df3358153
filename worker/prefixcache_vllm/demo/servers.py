"""The demo's servers: the service, engines on its pool, and vLLM alone.

```
demo ─┬─ prefixcache serve                  private Unix socket in a temporary folder
      ├─ prefixcache vllm MODEL --port …    vLLM's API server ─ its engine's core ─ its worker
      ├─ prefixcache vllm MODEL --port …    all of one session: killed as one, gone as one
      └─ vllm serve MODEL --port …          alone, after the others have ended
```
vLLM runs in an environment of its own, whose Python is told; what it writes to temporary folders is
in the demo's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shlex
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any, Final

import prefixcache
import prefixcache_kernels
import prefixcache_vllm
from prefixcache.types import Ledger, Snapshot
from prefixcache_vllm.demo.stream import Refused, ask, completion, is_healthy
from prefixcache_worker.child import Child, ProcessFailed

START_S: Final = 900.0
"""How long an engine may take to answer: guards against hanging only."""
STILL_S: Final = 15.0
"""How often one that starts is spoken of."""
STOP_S: Final = 12.0
"""How long it may take to end by itself."""
NUM_TOPS: Final = 5
"""In bfloat16 more than two tokens may be equally good."""
_ENGINE: Final = re.compile(r"vllm-engine-(\d+)")
SHARED: Final = Path("/dev/shm")  # noqa: S108 - what the kernel shares memory through
POOLS: Final = "prefixcache-"
"""How the names of pools there begin; they are the service's to remove."""


@dataclass(frozen=True, slots=True)
class Model:
    """What all engines run, and how.

    Attributes:
        python: of an environment with vLLM.
        folder: the model's.
        dtype: of weights, keys and values.
        max_len: tokens of a prompt and its answer.
        chunk: prompt tokens of a step.
        sequences: requests that an engine computes at a time.
        spare_blocks: what an engine keeps for the time after the service's death.
        memory: of the pool.
    """

    python: str
    folder: str
    dtype: str = "float32"
    max_len: int = 4096
    chunk: int = 256
    sequences: int = 4
    spare_blocks: int = 48
    memory: str = "1GiB"

    def arguments(self) -> list[str]:
        """Give vLLM's arguments, for an engine on the pool as for one alone."""
        return [
            *("--dtype", self.dtype, "--enforce-eager", "--enable-prompt-tokens-details"),
            *("--max-model-len", str(self.max_len), "--max-num-seqs", str(self.sequences)),
            *("--max-num-batched-tokens", str(self.chunk)),
        ]

    def on_pool(self, target: str) -> list[str]:
        """Give the command of an engine on the pool, but for its port."""
        return [
            *(self.python, "-m", "prefixcache.cli", "vllm", self.folder),
            *("--connect", target, "--memory", self.memory),
            *("--spare-blocks", str(self.spare_blocks)),
            *self.arguments(),
        ]

    def alone(self) -> list[str]:
        """Give the command of vLLM by itself, which computes every prompt as a whole."""
        return [
            *(self.python, "-m", "vllm.entrypoints.cli.main", "serve", self.folder),
            *self.arguments(),
            *("--block-size", "32", "--no-enable-prefix-caching", "--host", "127.0.0.1"),
            *("--kv-cache-memory-bytes", str(1 << 30)),
        ]


def environment(folder: Path) -> dict[str, str]:
    """Give what vLLM runs in: one thread, and no network.

    Its own environment's packages count; of this process's, only a checkout's are added.
    """
    ours = {
        Path(package.__file__ or "").parents[1]
        for package in (prefixcache, prefixcache_kernels, prefixcache_vllm)
    }
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(
            sorted(str(path) for path in ours if "site-packages" not in path.parts)
        ),
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_RPC_BASE_PATH": str(folder),
        # A request keeps the id that its client gave it, so that the service can be asked about it.
        "VLLM_DISABLE_REQUEST_ID_RANDOMIZATION": "1",
        "TMPDIR": str(folder),
        "HF_HUB_OFFLINE": "1",
    }


class Service(Child):
    """`prefixcache serve`, by the command that `prefixcache vllm --print` shows.

    Args:
        name: of this start of it.
        folder: for the socket and what it writes.
        command: that was shown.
    """

    def __init__(self, name: str, folder: Path, command: Iterable[str]) -> None:
        self.target = target_in(folder)
        self.traces: set[Path] = set()
        """Shared memory that it had: its pool."""
        _, *words = command
        super().__init__(
            name, [sys.executable, "-m", "prefixcache.cli", *words, "--grace", "1"], folder
        )

    async def ready(self, timeout_s: float = 120.0) -> None:
        """Start it and wait until it answers.

        Raises:
            ProcessFailed: It ended, or did not answer in time; with what it wrote.
        """
        from prefixcache.errors import ServiceUnavailable

        await self.start(stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL)
        deadline = time.monotonic() + timeout_s
        while self.alive and time.monotonic() < deadline:
            with contextlib.suppress(ServiceUnavailable):
                with prefixcache.connect(self.target, timeout_s=2) as client:
                    await asyncio.to_thread(client.snapshot)
                self.traces = {
                    path for path in shared_by([self.pid]) if path.name.startswith(POOLS)
                }
                return
            await asyncio.sleep(0.05)
        raise ProcessFailed(f"the service did not start:\n{self.complaint()}")


def target_in(folder: Path) -> str:
    """Give the address of the service whose socket is in a folder."""
    return f"unix:{folder}/cache.sock"


class Server(Child):
    """A server of vLLM's: takes requests as the dispatcher sends them, and tells what it hears.

    Args:
        name: what people call it.
        command: its command line, without the port.
        folder: for what it writes.
        clock: seconds since the run began.
        tell: called for every event with the clock's reading when it came.
        ledger: tells the fate of a request's prompt tokens by its id; None where nobody knows.
    """

    def __init__(
        self,
        name: str,
        command: list[str],
        folder: Path,
        *,
        clock: Callable[[], float],
        tell: Callable[[Server, dict[str, Any], float], None],
        ledger: Callable[[str], Ledger | None] = lambda request_id: None,
    ) -> None:
        self.port = free_port()
        super().__init__(name, [*command, "--port", str(self.port)], folder)
        self.output = folder / f"{name}.stdout"
        self._folder = folder
        self._clock = clock
        self._tell = tell
        self._ledger = ledger
        self._loop: asyncio.AbstractEventLoop | None = None
        self._unseen: dict[int, list[tuple[str, float]]] = {}
        """Requests that no lease was seen of, by the length of their prompts."""
        self._granted: dict[str, float] = {}
        self._asked: dict[str, tuple[str, float]] = {}
        """Requests in hand: how vLLM and the service call them, and when they were sent."""
        self._tries = 0
        self._watcher: asyncio.Task[None] | None = None
        self.traces: set[Path] = set()
        """Shared memory that it had."""
        self.listener: Any = None
        """The dispatcher that hears of it."""
        self.lease_name = ""
        """What snapshots call it, once one has shown it."""

    def environment(self) -> dict[str, str]:
        """Give what it runs in."""
        return environment(self._folder)

    async def ready(self, say: Callable[[str], None], timeout_s: float = START_S) -> None:
        """Start it and wait until it answers.

        Raises:
            ProcessFailed: It ended, or was not ready in time; with what it wrote.
        """
        self._loop = asyncio.get_running_loop()
        began_s = told_s = time.monotonic()
        with self.output.open("wb") as output:
            await self.start(stdin=asyncio.subprocess.DEVNULL, stdout=output.fileno())
        assert self.process is not None
        self._watcher = asyncio.create_task(self._wait())
        while self.alive and (now_s := time.monotonic()) - began_s < timeout_s:
            if await asyncio.to_thread(is_healthy, self.port):
                say(f"{self.name} (pid {self.pid}) answers after {now_s - began_s:.0f} s")
                return
            if now_s - told_s >= STILL_S:
                told_s = now_s
                say(f"{self.name}: {now_s - began_s:.0f} s, {self._last_line()}")
            await asyncio.sleep(0.5)
        why = "is not ready" if self.alive else "has ended"
        raise ProcessFailed(f"{self.name} {why}:\n{self.complaint()}\n{tail(self.output, 25)}")

    async def _wait(self) -> None:
        assert self.process is not None
        await self.process.wait()
        self.gone.set()

    def _last_line(self) -> str:
        line = (tail(self.output, 1) or tail(self.errors, 1) or "says nothing yet").strip()
        return line if len(line) <= 100 else line[:99] + "…"

    # ------------------------------------------------------------------------------------ requests

    def send(self, request: dict[str, Any]) -> None:
        """Hand over one request; returns at once.  A thread asks, and listens to the stream."""
        self._tries += 1
        request_id = f"{request['id'].replace('/', '.')}-{self.name}-{self._tries}"
        self._asked[request["id"]] = request_id, self._clock()
        key = len(request["tokens"])
        self._unseen.setdefault(key, []).append((request["id"], self._clock()))
        Thread(target=self._ask, args=(request, request_id), daemon=True).start()

    def _ask(self, request: dict[str, Any], request_id: str) -> None:
        name, prompt = request["id"], request["tokens"]
        sent_s = self._clock()
        num_tops = NUM_TOPS if request["log_logits"] else 0
        answer: list[int] = []
        cached = 0
        try:
            for piece in ask(
                self.port,
                completion(prompt, request["max_new_tokens"], num_tops=num_tops),
                request_id,
            ):
                now = self._clock()
                cached = cached if piece.cached is None else piece.cached
                for i, token in enumerate(piece.tokens):
                    event: dict[str, Any] = {"event": "token", "id": name, "token": token}
                    if i < len(piece.tops) and len(piece.tops[i]) > 1:
                        event["top"] = piece.tops[i][:NUM_TOPS]
                    self._hear(event, now)
                answer += piece.tokens
        except (OSError, Refused) as error:
            self._asked.pop(name, None)
            if not self.killed:
                self._hear({"event": "failed", "id": name, "why": repr(error)}, self._clock())
            return
        self._asked.pop(name, None)
        known = self._ledger(granted_as(request_id))
        ledger = known or Ledger(hit=cached, cold=len(prompt) - cached)
        waited_s = self._granted.pop(name, sent_s) - sent_s
        now = self._clock()
        self._hear(
            {"event": "started", "id": name, "waited_ms": max(0.0, waited_s) * 1e3}
            | {"ledger": ledger._asdict()},
            now,
        )
        self._hear(
            {
                "event": "finished",
                "id": name,
                "tokens": answer,
                "text": "",
                "num_computed": len(prompt) - cached + max(len(answer) - 1, 0),
                "kv_read_bytes": 0,
                "kv_alone_bytes": 0,
            },
            now,
        )

    def _hear(self, event: dict[str, Any], now: float) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has ended: nobody listens any more
            self._loop.call_soon_threadsafe(self._tell, self, event, now)

    def seen(self, snapshot: Snapshot, at_s: float) -> None:
        """Tell which requests have their leases by now: vLLM's stream does not say it."""
        if not self.alive:
            return
        for lease in snapshot.leases:
            if lease.worker != self.lease_name:
                found = _ENGINE.search(lease.worker)
                if found is None or session_of(int(found[1])) != self.pid:
                    continue
                self.lease_name = lease.worker
            waiting = self._unseen.get(lease.num_tokens)
            if not waiting:
                continue
            name, sent_s = waiting.pop(0)
            self._granted[name] = at_s
            ledger = Ledger(hit=lease.num_committed, cold=lease.num_tokens - lease.num_committed)
            self._tell(
                self,
                {"event": "started", "id": name, "waited_ms": max(0.0, at_s - sent_s) * 1e3}
                | {"ledger": ledger._asdict()},
                at_s,
            )

    # ----------------------------------------------------------------------------------- its end

    def kill(self) -> None:
        """Kill all of its processes at once, as the kernel does when memory runs out."""
        if self.process is None or self.process.returncode is not None:
            return
        self.killed = True
        self.traces |= shared_by(members(self.pid))
        in_hand = dict(self._asked)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._tell_granted(in_hand)

    def _tell_granted(self, in_hand: Mapping[str, tuple[str, float]]) -> None:
        """Tell what requests had found when their leases were granted, as the service knows it.

        What was seen of them meanwhile (`seen`) may contain what they had computed by then.
        """
        now = self._clock()
        for name, (request_id, sent_s) in in_hand.items():
            ledger = self._ledger(granted_as(request_id))
            if ledger is not None:
                waited_s = self._granted.get(name, now) - sent_s
                event = {"event": "started", "id": name, "waited_ms": max(0.0, waited_s) * 1e3}
                self._tell(self, event | {"ledger": ledger._asdict()}, now)

    async def stop(self) -> None:
        """End it: SIGTERM, patience, SIGKILL for whatever is left; and what it left in memory."""
        if self.process is None:
            return
        if self.process.returncode is None:
            self.killed = True
            self.traces |= shared_by(members(self.pid))
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_S)
        rest = members(self.pid)
        self.traces |= shared_by(rest)
        for pid in rest:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        await self.process.wait()
        while members(self.pid):
            await asyncio.sleep(0.05)
        for path in self.traces:
            if not path.name.startswith(POOLS):
                path.unlink(missing_ok=True)


def granted_as(request_id: str) -> str:
    """Give the name under which a completion's only prompt is leased."""
    return f"cmpl-{request_id}-0"


def free_port() -> int:
    """Give a port that nobody listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def tail(path: Path, num_lines: int) -> str:
    """Give the last lines of a file; empty if there is none."""
    if not path.exists():
        return ""
    return "\n".join(path.read_text(errors="replace").strip().splitlines()[-num_lines:])


def session_of(pid: int) -> int:
    """Give the session of a process; 0 if there is none."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0


def members(session: int) -> list[int]:
    """Give the processes of a session that have not ended.  O(processes of the machine)."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or session_of(int(folder.name)) != session:
            continue
        with contextlib.suppress(OSError):
            if (folder / "stat").read_text().rpartition(")")[2].split()[0] != "Z":
                found.append(int(folder.name))
    return found


def shared_by(pids: Iterable[int]) -> set[Path]:
    """Give the files in shared memory that these processes have."""
    found: set[Path] = set()
    for pid in pids:
        found |= set(SHARED.glob(f"__KMP_REGISTERED_LIB_{pid}_*"))
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
                path = Path(line.split(maxsplit=5)[-1].removesuffix(" (deleted)"))
                if path.parent == SHARED:
                    found.add(path)
    return found


@contextlib.asynccontextmanager
async def spoken_of(what: str, say: Callable[[str], None]) -> AsyncIterator[None]:
    """Say now and then that something goes on."""

    async def tick() -> None:
        began_s = time.monotonic()
        while True:
            await asyncio.sleep(STILL_S)
            say(f"{what}: {time.monotonic() - began_s:.0f} s")

    say(what)
    task = asyncio.create_task(tick())
    try:
        yield
    finally:
        task.cancel()


async def told_commands(model: Model, folder: Path) -> list[str]:
    """Have `prefixcache vllm --print` say how the service is to be started.

    Raises:
        ProcessFailed: It refuses; with why.
    """
    command = [*model.on_pool(target_in(folder)), "--print"]
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment(folder),
    )
    try:
        out, err = await process.communicate()
    except asyncio.CancelledError:
        process.kill()
        await process.wait()
        raise
    lines = out.decode(errors="replace").splitlines()
    if process.returncode or len(lines) != 2:
        raise ProcessFailed(
            f"{shlex.join(command)} says:\n{err.decode(errors='replace').strip()[-2000:]}"
        )
    return shlex.split(lines[0])
