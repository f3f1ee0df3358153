"""Hypothesis profiles: `normal` in every run, `soak` under PREFIXCACHE_SOAK=<factor>."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from prefixcache import core_build

# Several processes with tensors share a few cores here: threads that wait leave those to others, as
# the OpenMP runtime is told before it is loaded.  By default they look for work in circles.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Hundreds of processes start here.  Where the environment says that nothing compiled is kept, as
# containers do, each of them would compile all it imports: three times the work of importing it.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

TESTS = Path(__file__).parent
SOAK = float(os.environ.get("PREFIXCACHE_SOAK", "1"))

# Every run draws the same examples and keeps no database: a red run is red again anywhere.
settings.register_profile(
    "normal",
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
settings.register_profile("soak", settings.get_profile("normal"), derandomize=False)
settings.load_profile("soak" if SOAK > 1 else "normal")


def pytest_configure() -> None:
    """Test nothing else than what stands here."""
    if core_build.kind() == core_build.STALE:
        raise pytest.UsageError(f"the core is {core_build.STALE}: {core_build.ADVICE}")


def pytest_report_header() -> str:
    """Say which core is tested."""
    return f"core: {core_build.kind()}"


LONGEST = (
    *("chaos/test_storm.py", "kernels/test_triton.py", "serving/test_up.py", "demo/test_runner.py"),
    *("core/test_machine.py", "serving/test_up_ends.py", "serving/test_takeover_processes.py"),
    *("worker/test_process.py", "worker/test_stuck.py", "kernels/test_library.py"),
    *("core/test_steps.py", "service/http/test_http_connections.py", "client/test_cancellation.py"),
    *("experiments/test_reference_rows.py", "fuzz/test_targets.py", "kernels/test_checks.py"),
)
"""Files that take longest.  They come first, so that nobody waits for one of them in the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest files first, and leave out what is to be seen in plain Python only."""
    rank = {TESTS / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path, len(rank)))
    if core_build.kind() != core_build.PURE:
        pure = pytest.mark.skip(reason="shows in the core as plain Python only")
        for item in items:
            if item.get_closest_marker("pure_core"):
                item.add_marker(pure)


def pytest_collection_finish() -> None:
    """Have the collector never look again at what thousands of collected tests are made of."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def signals() -> Iterator[None]:
    """What is done about Ctrl-C and SIGTERM is as before when a test is over.

    A service or a worker that a test runs in its own process changes that, and each process that a
    later test starts would inherit it.
    """
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """What a test has opened, and its fixtures: closed when it is over, the last first."""
    with ExitStack() as stack:
        yield stack


@pytest.fixture
def tmp_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Give a folder with a short name: the path of a socket in it may have 107 bytes."""
    return tmp_path_factory.mktemp("t")
