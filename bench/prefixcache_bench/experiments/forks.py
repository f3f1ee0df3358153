"""Processes that have a trace already: they are forked from this one, and nothing is sent."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.pool import Pool

from prefixcache_bench.experiments.traces import Trace

_trace: Trace | None = None


@contextmanager
def forked(trace: Trace, processes: int | None = None) -> Iterator[Pool]:
    """Start processes in which `inherited` gives `trace`.  They leave Ctrl-C to this one.

    They end by SIGTERM whatever this process does with it: a handler of ours, which they would
    inherit, would leave them waiting for ever.  Until they have their own, it is held back.

    Args:
        trace: What they have.
        processes: How many; one for each core if not given.
    """
    global _trace
    _trace = trace
    gc.collect()
    gc.freeze()  # so that collections in the children leave the shared pages alone
    with warnings.catch_warnings():
        # Forking while another library's threads run is unsafe for what they hold; the children
        # use nothing but the core.
        warnings.simplefilter("ignore", DeprecationWarning)
        held_back = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        try:
            pool = multiprocessing.get_context("fork").Pool(processes or cores(), _own_signals)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, held_back)
    try:
        yield pool
    finally:
        pool.terminate()
        pool.join()
        gc.unfreeze()
        _trace = None


def inherited() -> Trace:
    """Give the trace that this process was forked with."""
    if _trace is None:
        raise AssertionError("this process was not forked with a trace")
    return _trace


def cores() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _own_signals() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
