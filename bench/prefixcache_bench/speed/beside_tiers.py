"""Beside tiers: what others feel of them while they work, and when whoever moves the bytes ends.

```
hits      one client finds 1,000 tokens in the pool, over and over: alone, and while others' chats
          go down and come back as fast as the porter can; the 99th percentile of its acquires
killed    somebody waits for what is on its way back, and the porter is killed: how long until he is
          served without it
```
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import quantiles
from typing import Final, NamedTuple

import numpy as np

import prefixcache
from prefixcache.config import parse_layout
from prefixcache.service.tiers.slab import slot_bytes
from prefixcache.types import Layout, Namespace, PoolHandle
from prefixcache_bench.speed.served import served
from prefixcache_bench.speed.signals import tied_to_this
from prefixcache_bench.speed.waiting import until

SIZE: Final = 16
TOKENS: Final = 1008
_CHATS, _WORKERS, _POOL_BLOCKS = 6, 6, 1024
"""Of each of the others, and how many of them there are: five times what fits into the pool."""
_COMPUTING_S: Final = 0.5
_PAUSE_S: Final = 0.002


class Hits(NamedTuple):
    """The 99th percentiles of one who finds all in the pool, in seconds."""

    alone_s: float
    beside_s: float
    blocks_per_s: float
    """That went down and came back meanwhile."""


def prompt(number: int) -> np.ndarray:
    """Give a chat's prompt."""
    return np.arange(TOKENS + 1, dtype=np.uint32) + np.uint32(number * 10_000)


@contextlib.contextmanager
def _service(layout: Layout) -> Iterator[tuple[str, int]]:
    handle = PoolHandle("none", "", 1, SIZE, layout, 0, 0)
    slots = 2 * _CHATS * _WORKERS * (TOKENS // SIZE)
    flags = ["--memory", str(_POOL_BLOCKS * layout.block_bytes(SIZE)), "--grace", "0"]
    with served(*flags, "--host", str(slots * slot_bytes(handle)), layout=str(layout)) as told:
        yield told


def hits(layout: Layout, count: int) -> Hits:
    """Measure `count` acquires alone, and as many beside others."""
    with (
        _service(layout) as (target, _),
        prefixcache.connect(target) as client,
        client.attach("m", layout) as session,
    ):

        def measure() -> list[float]:
            took = []
            for _ in range(count):
                began = time.perf_counter()
                with session.acquire(prompt(0), wait_s=30.0) as lease:
                    took.append(time.perf_counter() - began)
                    lease.commit(TOKENS)
                time.sleep(_PAUSE_S)
            return took

        measure()
        alone = measure()
        command = [sys.executable, "-m", __spec__.name, target, str(layout)]
        others = subprocess.Popen(tied_to_this(command))
        try:
            until(lambda: client.snapshot().restored > 2 * _CHATS * (TOKENS // SIZE))
            before, began = client.snapshot(), time.perf_counter()
            beside = measure()
            after, seconds = client.snapshot(), time.perf_counter() - began
        finally:
            others.terminate()
            others.wait()
    moved = after.sunk + after.restored - before.sunk - before.restored
    return Hits(_p99(alone), _p99(beside), moved / seconds)


def _p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[98]


def churn(target: str, layout: Layout) -> None:
    """Be the others, until this process is ended: their chats come back in turn."""

    def work(number: int) -> None:
        with prefixcache.connect(target) as client, client.attach("m", layout) as session:
            at = 0
            while True:
                at = at % _CHATS + 1
                with session.acquire(prompt(number * 100 + at), wait_s=30.0) as lease:
                    if lease.num_cached < TOKENS // 2:
                        time.sleep(_COMPUTING_S)  # else computing would be the quicker way
                    lease.commit(TOKENS)

    threads = [threading.Thread(target=work, args=(one + 1,)) for one in range(_WORKERS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def killed(layout: Layout, rounds: int) -> list[float]:
    """Give the seconds from the porter's end until who waited was served, of each round."""
    took: list[float] = []
    with (
        _service(layout) as (target, pid),
        prefixcache.connect(target) as client,
        client.attach("m", layout) as session,
    ):
        num_chats = 2 * _POOL_BLOCKS // (TOKENS // SIZE)
        for number in range(num_chats):
            with session.acquire(prompt(number), wait_s=30.0) as lease:
                time.sleep(_COMPUTING_S)
                lease.commit(TOKENS)
        for number in range(rounds):
            tokens = prompt(number)
            until(lambda: client.explain(Namespace("m"), tokens).below)  # noqa: B023
            porter = _porter(pid)
            os.kill(porter, signal.SIGSTOP)
            served_at: list[float] = []

            def wait() -> None:
                with session.acquire(tokens, wait_s=30.0) as lease:  # noqa: B023
                    served_at.append(time.perf_counter())  # noqa: B023
                    lease.commit(TOKENS)

            waiter = threading.Thread(target=wait)
            waiter.start()
            until(lambda: client.snapshot().waiting or served_at)  # noqa: B023
            was_served = bool(served_at)
            ended = time.perf_counter()
            os.kill(porter, signal.SIGKILL)
            waiter.join()
            if not was_served:
                took.append(served_at[0] - ended)
    return took


def _porter(service: int) -> int:
    """Give the process of a service's porter."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            above = int(path.read_text().rpartition(")")[2].split()[1])
            if above == service and b"tiers.porter" in path.with_name("cmdline").read_bytes():
                return int(path.parent.name)
    raise SystemExit("the service has no porter")


def main(argv: list[str] | None = None) -> int:
    """Be the others of `hits`, in a process of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target")
    parser.add_argument("layout", type=parse_layout)
    options = parser.parse_args(argv)
    churn(options.target, options.layout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
