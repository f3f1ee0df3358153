"""A service in another process, for benchmarks that need a real one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def served(*flags: str, layout: str = "2x2x16:float32") -> Iterator[tuple[str, int]]:
    """Start `prefixcache serve` at a Unix socket of its own; give its address and process id."""
    with tempfile.TemporaryDirectory(prefix="prefixcache-") as folder:
        target = f"unix:{Path(folder)}/bench.sock"
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target),
                *("--layout", layout, "--log-level", "warning", *flags),
            ],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            if not any(line.startswith("listening") for line in process.stdout):
                raise SystemExit("the service did not start")
            yield target, process.pid
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
