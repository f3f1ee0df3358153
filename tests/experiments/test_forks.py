"""Processes that are forked with a trace: they end, whatever this process does with signals."""

from __future__ import annotations

import subprocess
import sys

from patience import PATIENCE_S
from service.service_process import ROOT, environment

SCRIPT = """
import signal
import threading

from prefixcache_bench.experiments.forks import forked, inherited
from prefixcache_bench.experiments.traces import Trace

def size(_):
    return len(inherited().requests)

heard = threading.Event()
signal.signal(signal.SIGTERM, lambda *_: heard.set())  # as servers and workers do
with forked(Trace("empty", []), 2) as pool:
    print(pool.map(size, range(4)))
print(signal.pthread_sigmask(signal.SIG_BLOCK, []))
"""


def test_they_end_though_this_process_handles_sigterm() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=5 * PATIENCE_S,
    )
    assert done.stdout.splitlines() == ["[0, 0, 0, 0]", "set()"], done.stderr
    assert done.returncode == 0
