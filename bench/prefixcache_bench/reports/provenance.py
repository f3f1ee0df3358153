"""Where a result comes from: command, commit, machine, time.  Every result file begins with it."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path


def provenance() -> dict[str, str]:
    """Give the command, the commit, the machine and the time of this run."""
    module = sys.modules["__main__"].__spec__
    program = ["python", "-m", module.name] if module else [Path(sys.argv[0]).name or "python"]
    return {
        "command": shlex.join([*program, *map(_told, sys.argv[1:])]),
        "commit": commit(),
        "machine": f"{processor()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _told(argument: str) -> str:
    """Give an argument without the folders of this machine that lead to a file or a folder."""
    option, sign, value = argument.rpartition("=")
    return f"{option}{sign}{Path(value).name}" if value.startswith("/") else argument


def commit() -> str:
    """Name the commit; `-dirty` if the code differs from it (results that were redrawn do not)."""
    name = _git("describe", "--always")
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", ":/", ":(top,exclude)docs"
    )
    return name + ("-dirty" if changed else "") if name else "unknown"


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(Path(__file__).parent), *arguments]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return found.stdout.strip()


def processor() -> str:
    """Name the processor."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
