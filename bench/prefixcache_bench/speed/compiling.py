"""A compiled core to measure, beside the checkout's own: in a copy of the sources.

What is measured there is what `make compiled` makes, and the checkout stays as it is.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[3]


class NotMeasured(RuntimeError):
    """Why a subject has no figures."""


@contextlib.contextmanager
def sources_alone() -> Iterator[tuple[Path, Path]]:
    """Give two folders with the package's sources and nothing compiled: one is to be compiled."""
    with tempfile.TemporaryDirectory(prefix="prefixcache-core-") as name:
        folders = Path(name, "pure"), Path(name, "compiled")
        for folder in folders:
            ignored = shutil.ignore_patterns("*.so", "__pycache__")
            shutil.copytree(ROOT / "prefixcache", folder / "prefixcache", ignore=ignored)
        yield folders


def compile_core(folder: Path) -> None:
    """Compile the sources in a folder, in place.  A minute."""
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    done = subprocess.run(
        [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"],
        cwd=folder,
        env=os.environ | {"PREFIXCACHE_COMPILED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise NotMeasured(f"compiling failed: {done.stdout.strip().splitlines()[-1]}")
