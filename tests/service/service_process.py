"""A real service in another process, for tests."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from patience import PATIENCE_S
from prefixcache.types import Layout

ROOT = Path(__file__).resolve().parents[2]
LAYOUT = Layout(1, 1, 4, "float32")
"""32 bytes a token: a pool of a few kilobytes."""


def environment(*first: Path) -> dict[str, str]:
    """Give that of a process; modules are looked for in `first`, then in ours."""
    ours = [ROOT / part for part in (".", "kernels", "worker", "bench", "tests")]
    path = os.pathsep.join(map(str, [*first, *ours]))
    clean = {k: v for k, v in os.environ.items() if not k.startswith("PREFIXCACHE_")}
    return clean | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefixcache.cli", *arguments]


class ServiceProcess:
    """`prefixcache serve` in a subprocess.

    Args:
        target: Where it listens.
        flags: Of `serve`.
        num_files: Descriptors that it may have; None: as many as this process.
        first: Where its processes look for modules first.
    """

    def __init__(
        self, target: str, *flags: str, num_files: int | None = None, first: tuple[Path, ...] = ()
    ) -> None:
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - lives as long as the process
        limited = ["sh", "-c", 'ulimit -n "$0"; exec "$@"', str(num_files)] if num_files else []
        self.process = subprocess.Popen(
            limited + command("serve", "--listen", target, *flags),
            stdout=subprocess.PIPE,
            stderr=self.errors,
            env=environment(*first),
            text=True,
        )
        assert self.process.stdout is not None
        self.lines: list[str] = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            if line.startswith("listening at "):
                self.target = line.removeprefix("listening at ").strip()
                break
        else:
            told = self.log()
            self.close()
            raise AssertionError(f"no service: {told}")

    def log(self) -> str:
        self.errors.seek(0)
        return self.errors.read()

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        return self.process.wait(timeout_s)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        self.errors.close()

    def stop(self) -> int:
        """End it as a user would, twice Ctrl-C; give the exit code."""
        if self.process.poll() is None:
            self.signal(signal.SIGINT)
            time.sleep(0.05)
            if self.process.poll() is None:
                self.signal(signal.SIGINT)
        code = self.wait()
        self.close()
        return code


def sizes(num_blocks: int, block_size: int, layout: Layout = LAYOUT) -> list[str]:
    memory = num_blocks * block_size * layout.token_bytes
    return ["--memory", str(memory), "--block-size", str(block_size), "--layout", str(layout)]


@contextmanager
def running(
    target: str, *flags: str, num_files: int | None = None, first: tuple[Path, ...] = ()
) -> Iterator[ServiceProcess]:
    service = ServiceProcess(target, *flags, num_files=num_files, first=first)
    try:
        yield service
    finally:
        service.close()


def eventually(check: object) -> None:
    """Wait until `check()` holds."""
    assert callable(check)
    deadline = time.monotonic() + PATIENCE_S
    while not check():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.01)


def stop(pid: int) -> None:
    """Stop a process; come back once none of its threads runs any more."""
    os.kill(pid, signal.SIGSTOP)

    def is_stopped() -> bool:
        tasks = Path(f"/proc/{pid}/task").iterdir()
        states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks]
        return set(states) == {"T"}

    eventually(is_stopped)
