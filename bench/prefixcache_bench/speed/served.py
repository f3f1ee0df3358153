"""A service in another process, for benchmarks that need a real one."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from prefixcache_bench.speed.signals import tied_to_this

_LISTENING = "listening at "


@contextmanager
def served(*flags: str, layout: str = "2x2x16:float32", at: str = "") -> Iterator[tuple[str, int]]:
    """Start `prefixcache serve`; give its address and process id.

    Args:
        flags: More options.
        layout: Of its pool.
        at: Where it listens, 127.0.0.1:0 for any port; a Unix socket of its own, if not given.
    """
    with tempfile.TemporaryDirectory(prefix="prefixcache-") as folder:
        target = at or f"unix:{Path(folder)}/bench.sock"
        process = subprocess.Popen(
            tied_to_this(
                [
                    *(sys.executable, "-m", "prefixcache.cli", "serve", "--listen", target),
                    *("--layout", layout, "--log-level", "warning", *flags),
                ]
            ),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert process.stdout is not None
        try:
            told = next((line for line in process.stdout if line.startswith(_LISTENING)), "")
            if not told:
                raise SystemExit("the service did not start")
            yield told.removeprefix(_LISTENING).strip(), process.pid
        finally:
            process.terminate()
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()
