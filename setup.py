"""The optional compiled build of the core: `make compiled`, `PREFIXCACHE_COMPILED=1 pip wheel .`.

Everything else about the package is in pyproject.toml.  The same sources are compiled by mypyc; the
`.py` files stay beside the extensions, for tracebacks and for whoever reads them.
"""

import os
import shutil
import sys
from pathlib import Path

from setuptools import setup

NEEDED = ["mypy>=1.15", "numpy>=1.26"]
"""What compiling takes: mypyc, and numpy's types."""


def extensions() -> list:
    """Compile the core's modules to C."""
    from mypyc.build import mypycify

    sys.path.insert(0, str(Path(__file__).parent))
    from prefixcache import core_build

    for former in Path("build").glob("lib.*"):  # a wheel takes whatever lies there
        shutil.rmtree(former)
    sources = [str(path.relative_to(Path.cwd())) for path in core_build.sources()]
    # What the core does not import need not be installed: nothing is said of what is only read.
    return mypycify(["--follow-imports=silent", *sources], group_name=core_build.library())


def asked_for() -> dict:
    """Say what to build beside the packages: nothing, unless it was asked for."""
    if os.environ.get("PREFIXCACHE_COMPILED", "0") in ("", "0"):
        return {}
    if {"egg_info", "dist_info"} & set(sys.argv):  # pip asks what it takes, and what it will be
        return {"setup_requires": NEEDED}
    return {"ext_modules": extensions()}


setup(**asked_for())
