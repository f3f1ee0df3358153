"""Beside tiers: what others feel of them while they work, and when whoever moves the bytes ends.

```
hits      one client finds 1,000 tokens in the pool, over and over: alone, and while others' chats
          go down and come back as fast as the porter can; the 99th percentile of its acquires.
          And without tiers: beside others who ask as often, and find all in a larger pool, and a
          neighbour that copies memory, for as much of a processor as the porter took and in the
          same class.  What is longer than alone then is the machine's doing: who wakes up waits
          for a processor
dropped   what was evicted and not copied, where half as much is evicted as the porter can copy
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
import psutil

import prefixcache
from prefixcache.client import Client
from prefixcache.config import parse_layout
from prefixcache.service.tiers.porter import NICENESS
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
_PIECE: Final = 16
"""Blocks that a neighbour copies at once, as the porter does."""
_NEIGHBOUR: Final = "neighbour"


class Hits(NamedTuple):
    """The 99th percentiles of one who finds all in the pool, in seconds."""

    alone_s: float
    beside_s: float
    without_s: float
    """Beside as many requests of others and a neighbour that copies memory, without tiers."""
    blocks_per_s: float
    """That went down and came back meanwhile."""
    share: float
    """Of a processor, that the porter took: so much the neighbour takes as well."""
    dropped: float
    """Share of the blocks evicted that were not copied, where half as many were as before."""


class _Load:
    """What others and the porter did, summed over the times they were looked at."""

    def __init__(self, client: Client, service: int) -> None:
        self._client, self._service = client, service
        self.seconds = self.cpu_s = 0.0
        self.requests = self.moved = self.evicted = self.sunk = 0

    @contextlib.contextmanager
    def seen(self) -> Iterator[None]:
        """Add what is done meanwhile."""
        porter = psutil.Process(_porter(self._service))
        first, began, before = self._client.snapshot(), time.perf_counter(), porter.cpu_times()
        yield
        last, ended, after = self._client.snapshot(), time.perf_counter(), porter.cpu_times()
        self.seconds += ended - began
        self.cpu_s += after.user + after.system - before.user - before.system
        self.requests += last.requests - first.requests
        self.evicted += last.evicted - first.evicted
        self.sunk += last.sunk - first.sunk
        self.moved += last.sunk + last.restored - first.sunk - first.restored


def prompt(number: int) -> np.ndarray:
    """Give a chat's prompt."""
    return np.arange(TOKENS + 1, dtype=np.uint32) + np.uint32(number * 10_000)


@contextlib.contextmanager
def _service(layout: Layout, *, has_tier: bool = True) -> Iterator[tuple[str, int]]:
    handle = PoolHandle("none", "", 1, SIZE, layout, 0, 0)
    slots = 2 * _CHATS * _WORKERS * (TOKENS // SIZE)
    num_blocks = _POOL_BLOCKS if has_tier else _POOL_BLOCKS + slots
    flags = ["--memory", str(num_blocks * layout.block_bytes(SIZE)), "--grace", "0"]
    if has_tier:
        flags += ["--host", str(slots * slot_bytes(handle))]
    with served(*flags, layout=str(layout)) as told:
        yield told


class _Hitter:
    """Who finds all in the pool of a service, and others beside."""

    def __init__(self, stack: contextlib.ExitStack, layout: Layout, *, has_tier: bool) -> None:
        self.target, self.pid = stack.enter_context(_service(layout, has_tier=has_tier))
        self.client = stack.enter_context(prefixcache.connect(self.target))
        self._session = stack.enter_context(self.client.attach("m", layout))
        self._layout = layout

    def ask(self, count: int) -> list[float]:
        """Give how long each of so many acquires took."""
        took = []
        for _ in range(count):
            began = time.perf_counter()
            with self._session.acquire(prompt(0), wait_s=30.0) as lease:
                took.append(time.perf_counter() - began)
                lease.commit(TOKENS)
            time.sleep(_PAUSE_S)
        return took

    @contextlib.contextmanager
    def others(self, per_s: float = 0.0) -> Iterator[None]:
        """Have others, once all of their chats have been computed; so many requests a second."""
        before = self.client.snapshot().requests
        with _other(self.target, str(self._layout), str(per_s)):
            until(lambda: self.client.snapshot().requests - before > 2 * _CHATS * _WORKERS)
            yield


def hits(layout: Layout, count: int) -> Hits:
    """Measure `count` acquires alone, as many beside others, and as many without tiers.

    Half of each in this order and half in the other, so that what changes meanwhile is in all.
    """
    alone: list[float] = []
    beside: list[float] = []
    without: list[float] = []
    half = count // 2
    with contextlib.ExitStack() as stack:
        below = _Hitter(stack, layout, has_tier=True)
        large = _Hitter(stack, layout, has_tier=False)
        below.ask(half)
        large.ask(half)
        load = _Load(below.client, below.pid)
        for turn in ("alone", "beside", "without", "without", "beside", "alone"):
            if turn == "alone":
                alone += below.ask(half)
            elif turn == "beside":
                with below.others(), load.seen():
                    beside += below.ask(half)
                load.requests -= half
            else:
                per_s, share = load.requests / load.seconds, load.cpu_s / load.seconds
                with large.others(per_s), _other(_NEIGHBOUR, str(layout), str(share)) as one:
                    until(lambda: psutil.Process(one.pid).nice() >= NICENESS)
                    without += large.ask(half)
        slower = _Load(below.client, below.pid)
        with below.others(load.requests / load.seconds / 2), slower.seen():
            time.sleep(load.seconds / 2)
    return Hits(
        _p99(alone),
        _p99(beside),
        _p99(without),
        load.moved / load.seconds,
        load.cpu_s / load.seconds,
        1 - min(1.0, slower.sunk / max(1, slower.evicted)),
    )


@contextlib.contextmanager
def _other(*arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have another process of this file, until this ends."""
    command = [sys.executable, "-m", __spec__.name, *arguments]
    other = subprocess.Popen(tied_to_this(command))
    try:
        yield other
    finally:
        other.terminate()
        other.wait()


def _p99(seconds: list[float]) -> float:
    return quantiles(seconds, n=100)[98]


def copy(layout: Layout, share: float) -> None:
    """Be a neighbour, until this process is ended: copy memory for a share of a processor."""
    size = _PIECE * layout.block_bytes(SIZE)
    here, there = np.ones(size, np.uint8), np.zeros(size, np.uint8)
    os.nice(NICENESS)
    while True:
        began, worked = time.perf_counter(), time.process_time()
        there[:] = here
        due = (time.process_time() - worked) / share
        time.sleep(max(0.0, began + due - time.perf_counter()))


def churn(target: str, layout: Layout, per_s: float) -> None:
    """Be the others, until this process is ended: their chats come back in turn.

    Args:
        target: Where the service listens.
        layout: Of its blocks.
        per_s: How often they ask in a second, all together; 0: without a pause.
    """

    def work(number: int) -> None:
        with prefixcache.connect(target) as client, client.attach("m", layout) as session:
            at, due = 0, time.perf_counter()
            while True:
                at = at % _CHATS + 1
                with session.acquire(prompt(number * 100 + at), wait_s=30.0) as lease:
                    if lease.num_cached < TOKENS // 2:
                        time.sleep(_COMPUTING_S)  # else computing would be the quicker way
                    lease.commit(TOKENS)
                if per_s:
                    due = max(due + _WORKERS / per_s, time.perf_counter())
                    time.sleep(max(0.0, due - time.perf_counter()))

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
    """Be the others of `hits`, or the neighbour, in a process of their own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("target", help=f"where the service listens, or {_NEIGHBOUR!r}")
    parser.add_argument("layout", type=parse_layout)
    parser.add_argument("rate", type=float, help="requests a second, or a neighbour's share")
    options = parser.parse_args(argv)
    if options.target == _NEIGHBOUR:
        copy(options.layout, options.rate)
    churn(options.target, options.layout, options.rate)
    return 0


if __name__ == "__main__":
    sys.exit(main())
