"""The optional compiled build of the core: `make compiled`, `PREFIXCACHE_COMPILED=1 pip wheel .`.

Everything else about the package is in pyproject.toml.  The same sources are compiled by mypyc; the
`.py` files stay beside the extensions, for tracebacks and for whoever reads them.
"""

import os
from pathlib import Path

from setuptools import setup

PURE = {
    "__init__",
    "build",  # it looks at the others
    "eviction",  # its policies are open to plug-ins, which are subclasses in plain Python
}
"""Modules of the core that stay as they are; so do the policies."""


def extensions() -> list:
    """Compile the core's modules to C; nothing unless it was asked for."""
    if os.environ.get("PREFIXCACHE_COMPILED", "0") in ("", "0"):
        return []
    from mypyc.build import mypycify

    core = sorted(Path("prefixcache/core").glob("*.py"))
    return mypycify(
        [str(path) for path in core if path.stem not in PURE],
        group_name="prefixcache_core",
    )


setup(ext_modules=extensions())
