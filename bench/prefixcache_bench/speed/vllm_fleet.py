"""Engines of vLLM around one service: alone, in place, with connectors, and their memory."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import prefixcache
from prefixcache.types import Counts
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.vllm_chats import tokens
from prefixcache_bench.speed.vllm_figures import Say
from prefixcache_bench.speed.vllm_peer import (
    BLOCK_SIZE,
    MEMORY_BYTES,
    Vllm,
    VllmFailed,
    environment,
    vllm,
    warm,
)

DTYPE: Final = "bfloat16"
MAX_REQUESTS: Final = 16
_STARTING: Final = 2
"""Engines that start at a time: as many as the smallest machine has cores."""
_START_S: Final = 300.0


def offloading(folder: str) -> dict[str, Any]:
    """Give the settings by which vLLM itself offloads KV to files that engines share."""
    return {
        "kv_transfer_config": {
            "kv_connector": "OffloadingConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {
                "spec_name": "TieringOffloadingSpec",
                "cpu_bytes_to_use": 1 << 29,
                "secondary_tiers": [{"type": "fs", "root_dir": folder}],
            },
        }
    }


def example(folder: str) -> dict[str, Any]:
    """Give those of vLLM's connector that shows how one is made, with the same purpose."""
    return {
        "kv_transfer_config": {
            "kv_connector": "ExampleConnector",
            "kv_role": "kv_both",
            "kv_connector_extra_config": {"shared_storage_path": folder},
        }
    }


FILES: Final = {"OffloadingConnector": offloading, "ExampleConnector": example}
"""vLLM's own ways to share KV through files, the better one first."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that processes take, each page of memory counted once."""

    own: int
    """What each has for itself."""
    shared: int
    """What they map together: the pool."""

    @classmethod
    def of(cls, rollups: Iterable[str]) -> Memory:
        r"""Add up what `/proc/PID/smaps_rollup` says: a page of n processes is 1/n of each.

        >>> Memory.of(["Pss:  90 kB\nPss_Anon:\t 10 kB\nPss_Shmem:\t 5 kB\n"] * 3)
        Memory(own=30720, shared=15360)
        """
        rows = [line.split() for text in rollups for line in text.splitlines()]
        own, shared = [
            sum(int(row[1]) << 10 for row in rows if row[0] == name)
            for name in ("Pss_Anon:", "Pss_Shmem:")
        ]
        return cls(own, shared)


@dataclass(frozen=True, slots=True)
class Kept:
    """KV that a system has in memory, in bytes, and the room that it has for it."""

    kept: int
    room: int


def left_behind(counts: Counts, leases: int) -> list[str]:
    """Say what an idle pool should not have.  A lease of spare blocks is a flight that never lands.

    >>> left_behind(Counts(num_leases=2, num_flights=2), 2)
    []
    >>> left_behind(Counts(num_leases=3, quarantined=4, waiting=1, num_flights=1), 0)
    ['3 leases, not 0', '4 quarantined', '1 waiting', '1 flights, not 0']
    """
    found = [f"{counts.num_leases} leases, not {leases}"] if counts.num_leases != leases else []
    rows = (("quarantined", counts.quarantined), ("waiting", counts.waiting))
    found += [f"{number} {name}" for name, number in rows if number]
    if counts.num_flights != leases:
        found.append(f"{counts.num_flights} flights, not {leases}")
    return found


def layout_of(python: str, model: str, dtype: str = DTYPE) -> str:
    """Ask vLLM how it keeps the model's KV.

    Raises:
        VllmFailed: it does not say.
    """
    command = [
        *(python, "-m", "prefixcache_vllm.description", "in-place", model),
        *("--dtype", dtype, "--block-size", str(BLOCK_SIZE)),
    ]
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            check=False,
            env=environment(python, keep_path=True),
        )
    except OSError as error:
        raise VllmFailed(f"{python} does not start: {error.strerror}") from error
    told = json.loads(done.stdout) if done.returncode == 0 else {}
    if "layout" not in told:
        last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        raise VllmFailed(f"vLLM does not tell its layout: {told.get('refused', last)}")
    return str(told["layout"])


def block_bytes(layout: str) -> int:
    """Give the bytes of one block.

    >>> block_bytes("pages:30x24576:vllm")
    737280
    """
    planes, page = layout.split(":")[1].split("x")
    return int(planes) * int(page)


class Fleet:
    """Engines of one part of the benchmark, and the service that some of them lease from.

    Args:
        stack: what ends the engines.
        python: the one that has vLLM.
        model: folder of the model.
        layout: of the pool.
        service: its address and its process.
        eager: whether vLLM does not compile the model.
        say: told what starts.
    """

    def __init__(
        self,
        stack: contextlib.ExitStack,
        python: str,
        model: str,
        layout: str,
        service: tuple[str, int],
        *,
        eager: bool,
        say: Say,
    ) -> None:
        self._stack = stack
        self._python = python
        self._model = model
        self._layout = layout
        self.target, self.service_pid = service
        self.eager = eager
        self._say = say

    def start(self, **counts: int) -> dict[str, list[Vllm]]:
        """Start engines of kinds (`in_place=2, alone=1`), a few at a time; they end with the fleet.

        Raises:
            VllmFailed: one does not start.
        """
        kinds = [kind for kind, count in counts.items() for _ in range(count)]
        self._say.progress(f"{len(kinds)} engines start: {', '.join(dict.fromkeys(kinds))}")
        settings = {"alone": {}, "in_place": self._in_place(), "connector": self._connector()}
        engines = self._started(self._stack, [settings[kind] for kind in kinds])
        found: dict[str, list[Vllm]] = {kind: [] for kind in counts}
        for kind, engine in zip(kinds, engines, strict=True):
            found[kind].append(engine)
        return found

    def start_files(self, count: int, folder: Path) -> tuple[str, list[Vllm], list[str]]:
        """Start engines that share files by vLLM's own means: the first that do.

        Returns:
            What shares, the engines, and why others do not; no name and no engines if none does.
        """
        refused: list[str] = []
        for name, settings in FILES.items():
            place = folder / name
            place.mkdir()
            self._say.progress(f"{count} engines start: {name}")
            with contextlib.ExitStack() as tried:
                try:
                    engines = self._started(tried, [settings(str(place))])
                    engines += self._started(tried, [settings(str(place))] * (count - 1))
                except VllmFailed as error:
                    last = str(error).rpartition(" / ")[2].removeprefix("[rank0]: ")
                    refused.append(f"{name}: does not run here: {last}")
                    continue
                try:
                    share(engines)
                except VllmFailed as error:
                    refused.append(f"{name}: shares no prompt that goes on from another: {error}")
                    continue
                self._stack.push(tried.pop_all())
                return name, engines, refused
        return "", [], refused

    def start_lmcache(self, count: int, python: str, memory_gb: int) -> tuple[list[Vllm], int]:
        """Start engines that share through a server of LMCache's, in its mode of many processes.

        Args:
            count: of the engines.
            python: the one that has vLLM and LMCache.
            memory_gb: of the server, for KV.

        Returns:
            The engines, and the server's process.

        Raises:
            VllmFailed: the server or an engine does not start, or they do not share.
        """
        self._say.progress(f"{count} engines start: LMCache")
        port, pid = self._stack.enter_context(lmcache_server(python, memory_gb))
        settings = {
            "kv_transfer_config": {
                "kv_connector": "LMCacheMPConnector",
                "kv_role": "kv_both",
                "kv_connector_extra_config": {
                    "lmcache.mp.host": "tcp://127.0.0.1",
                    "lmcache.mp.port": port,
                },
            }
        }
        engines = self._started(self._stack, [settings] * count, python)
        share(engines)
        return engines, pid

    def kept_in_pool(self) -> Kept:
        """Give what the pool has of KV: once, whoever computed it."""
        with prefixcache.connect(self.target) as client:
            counts = client.snapshot()
        size = block_bytes(self._layout)
        return Kept(counts.indexed * size, counts.num_blocks * size)

    def kept_by(self, engines: Sequence[Vllm]) -> Kept:
        """Give what engines have of KV, each in a cache of its own.

        Raises:
            VllmFailed: one ended.
        """
        blocks = sum(engine.counts()["kv_blocks"] for engine in engines)
        return Kept(blocks * block_bytes(self._layout), len(engines) * MEMORY_BYTES)

    def memory_of(self, engines: Sequence[Vllm], server: int | None = None) -> Memory:
        """Measure running engines, and the process of the server that holds what they share."""
        pids = [engine.pid for engine in engines] + ([] if server is None else [server])
        return Memory.of(Path(f"/proc/{pid}/smaps_rollup").read_text("utf-8") for pid in pids)

    def left(self) -> list[str]:
        """Say what is wrong with the pool while no engine computes.

        Raises:
            CacheError: the service does not answer.
        """
        with prefixcache.connect(self.target) as client:
            failure = client.check().failure
            return left_behind(client.snapshot(), 0) + ([failure] if failure else [])

    def _started(
        self,
        stack: contextlib.ExitStack,
        settings: Sequence[Mapping[str, Any]],
        python: str | None = None,
    ) -> list[Vllm]:
        made: list[Vllm] = []
        for first in range(0, len(settings), _STARTING):
            few = settings[first : first + _STARTING]
            begun = [stack.enter_context(self._engine(python or self._python, one)) for one in few]
            made += [engine.ready() for engine in begun]
        return made

    def _engine(
        self, python: str, settings: Mapping[str, Any]
    ) -> contextlib.AbstractContextManager[Vllm]:
        return vllm(
            python,
            self._model,
            DTYPE,
            MAX_REQUESTS,
            keep_path=True,
            wait=False,
            enforce_eager=self.eager,
            async_scheduling=False,
            **settings,
        )

    def _in_place(self) -> dict[str, Any]:
        return {
            "scheduler_cls": "prefixcache_vllm.scheduler.LeaseScheduler",
            "worker_cls": "prefixcache_vllm.worker.CPUWorker",
            "enable_prefix_caching": False,
            "kv_cache_memory_bytes": None,
            "additional_config": {"prefixcache": {"connect": self.target}},
        }

    def _connector(self) -> dict[str, Any]:
        return {
            "kv_transfer_config": {
                "kv_connector": "PrefixcacheConnector",
                "kv_connector_module_path": "prefixcache_vllm.connector",
                "kv_role": "kv_both",
                "kv_load_failure_policy": "recompute",
                "kv_connector_extra_config": {"connect": self.target},
            }
        }


def share(engines: Sequence[Vllm]) -> None:
    """Let a prompt go on from what another engine has computed.

    Raises:
        VllmFailed: it is computed from its beginning.
    """
    draw = random.Random(1)
    prompt = tokens(draw, 300)
    engines[0].generate([prompt], 1)
    goes_on = engines[1].generate([prompt + tokens(draw, 50)], 1)
    warm(goes_on[0], len(prompt))


@contextlib.contextmanager
def lmcache_server(python: str, memory_gb: int) -> Iterator[tuple[int, int]]:
    """Run LMCache's server until the end; give its port and its process.

    Raises:
        VllmFailed: it does not start.
    """
    port = free_port()
    command = [
        *(str(Path(python).parent / "lmcache"), "server", "--host", "127.0.0.1"),
        *("--port", str(port), "--http-host", "127.0.0.1", "--http-port", str(free_port())),
        *("--chunk-size", str(BLOCK_SIZE), "--supported-transfer-mode", "auto"),
        *("--l1-size-gb", str(memory_gb), "--l1-init-size-gb", str(memory_gb)),
        *("--eviction-policy", "LRU", "--disable-observability"),
    ]
    quiet = {"LMCACHE_TRACK_USAGE": "false", "DO_NOT_TRACK": "1"}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environment(python) | quiet
            )
        except OSError as error:
            raise VllmFailed(f"{command[0]} does not start: {error.strerror}") from error
        try:
            deadline = time.monotonic() + _START_S
            while not listens(port):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    last = log.read().strip().splitlines()[-3:]
                    raise VllmFailed(f"LMCache's server did not start: {' / '.join(last)}")
                time.sleep(0.5)
            yield port, process.pid
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def free_port() -> int:
    """Find a port of this machine's that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def listens(port: int) -> bool:
    """Whether somebody listens at a port of this machine."""
    with socket.socket() as asking:
        return asking.connect_ex(("127.0.0.1", port)) == 0


@contextlib.contextmanager
def fleet(
    python: str, model: str, layout: str, pool: str, *, eager: bool, say: Say
) -> Iterator[Fleet]:
    """Run a service, and the engines that are started until the end.

    Args:
        python: the one that has vLLM.
        model: folder of the model.
        layout: of the pool.
        pool: its size (`"1GiB"`).
        eager: whether vLLM does not compile the model.
        say: told what starts.
    """
    flags = ("--memory", pool, "--block-size", str(BLOCK_SIZE), "--first-block", "1")
    with served(*flags, layout=layout) as service, contextlib.ExitStack() as stack:
        yield Fleet(stack, python, model, layout, service, eager=eager, say=say)
