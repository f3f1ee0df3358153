"""What to install for a part of a package that is not there.

Packages are named, never an extra of ours: `pip install 'NAME[extra]'` takes NAME from an index,
where it may be anybody's, and replaces a checkout that was installed with `-e`.
"""

from __future__ import annotations

import re
from importlib import metadata
from typing import Final

_NAME: Final = re.compile(r"[A-Za-z0-9._-]+")
_EXTRA: Final = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


def how_to_install(extra: str, distribution: str = "prefixcache", *, module: str = "") -> str:
    """Give the command that installs what an extra needs.  Reads the installed package's metadata.

    Args:
        extra: of the distribution.
        distribution: whose extra; an extra of its own that it asks for is resolved.
        module: what is missing, told if the distribution does not say what it needs.

    >>> how_to_install("events")
    "pip install 'pyzmq>=26' 'msgspec>=0.19'"
    """
    needed = _needed(extra, distribution, set())
    if not needed:
        return f"install the package that provides {module or extra}"
    return f"pip install {' '.join(dict.fromkeys(needed))}"


def _needed(extra: str, distribution: str, seen: set[str]) -> list[str]:
    seen.add(extra)
    try:
        lines = metadata.requires(distribution) or []
    except metadata.PackageNotFoundError:
        return []
    needed = []
    for line in lines:
        what, _, marker = line.partition(";")
        if extra not in _EXTRA.findall(marker):
            continue
        what = what.strip()
        name = _NAME.match(what)
        if name is None or name[0].lower() != distribution.lower():
            needed.append(f"'{what}'")
            continue
        for inner in re.findall(r"[A-Za-z0-9._-]+", what.partition("[")[2].partition("]")[0]):
            needed += [] if inner in seen else _needed(inner, distribution, seen)
    return needed
