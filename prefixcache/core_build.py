"""What the core runs as: plain Python, or what `make compiled` made of the same sources.

```
prefixcache/core/radix_tree.py                 the source, for whoever reads it, and tracebacks
prefixcache/core/radix_tree.cpython-….so       imported in its place, where it is there
prefixcache_core_1a2b3c4d5e6f7081__mypyc….so   the code of them all, for which that asks by name
```
The library is named for the digest of what it was compiled from: whether the sources are still
those is seen without loading anything, and no extension can find the code of another build.
"""

from __future__ import annotations

from hashlib import sha256
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

PURE, COMPILED, STALE = "pure Python", "compiled", "compiled from other sources"
"""What `kind` says."""
ADVICE = (
    "`make compiled` compiles what is there now, `make pure` removes what was compiled; a wheel is "
    "installed again."
)
"""What to do about `STALE`."""

_PACKAGE = Path(__file__).parent
_INTERPRETED = {
    "__init__",
    "eviction",  # its policies are open to plug-ins, which are subclasses in plain Python
}
"""Modules of the core that stay as they are; so do the policies."""
_BELOW = ("errors", "outline", "texts", "types")
"""What the core imports from below: constants of theirs are compiled into it."""


def sources(package: Path = _PACKAGE) -> list[Path]:
    """List the modules that are compiled."""
    core = sorted((package / "core").glob("*.py"))
    return [path for path in core if path.stem not in _INTERPRETED]


def library(package: Path = _PACKAGE) -> str:
    """Give the name of the library that is compiled from the sources as they are.  Reads them."""
    digest = sha256()
    below = [package / f"{name}.py" for name in _BELOW]
    for path in (*sources(package), package / "core" / "eviction.py", *below):
        digest.update(f"{path.stem}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return f"prefixcache_core_{digest.hexdigest()[:16]}"


def kind(package: Path = _PACKAGE) -> str:
    """Say what an interpreter that starts now runs: `PURE`, `COMPILED`, or `STALE`.

    Stale is also what was compiled in part only, or more than once.  Reads the sources, about a
    millisecond, where there is anything compiled.
    """
    suffix = EXTENSION_SUFFIXES[0]
    compiled = {path.name.removesuffix(suffix) for path in (package / "core").glob(f"*{suffix}")}
    if not compiled:
        return PURE
    libraries = [path.name for path in package.parent.glob(f"prefixcache_core_*{suffix}")]
    is_whole = compiled == {path.stem for path in sources(package)}
    is_fresh = is_whole and libraries == [f"{library(package)}__mypyc{suffix}"]
    return COMPILED if is_fresh else STALE
