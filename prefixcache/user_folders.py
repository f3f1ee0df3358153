"""The folders of the user who runs this: what `~` stands for, and where caches and state are kept.

A user may have no home: a container runs as a number that no table of users knows, and `~name` may
name nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

from prefixcache.errors import InvalidRequest


def expand(path: str | os.PathLike[str]) -> Path:
    """Put the home for which `~` or `~name` stands in its place.

    Raises:
        InvalidRequest: there is no such home.
    """
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise InvalidRequest(
            f"{os.fspath(path)!r}: there is no such home; write the whole path"
        ) from None


def is_file(path: Path) -> bool:
    """Whether a file is there.  Where none can have that name, as it is too long, there is none."""
    return os.path.isfile(path)  # noqa: PTH113 - to `pathlib` that is an error


def is_folder(path: Path) -> bool:
    """Whether a folder is there; see `is_file`."""
    return os.path.isdir(path)  # noqa: PTH112


def caches() -> Path:
    """Give the folder of what may be deleted at any time: `$XDG_CACHE_HOME`, else `~/.cache`.

    Raises:
        InvalidRequest: this user has no home.
    """
    return _folder("XDG_CACHE_HOME", ".cache")


def state() -> Path:
    """Give the folder of what is kept between runs: `$XDG_STATE_HOME`, else `~/.local/state`.

    Raises:
        InvalidRequest: this user has no home.
    """
    return _folder("XDG_STATE_HOME", ".local/state")


def _folder(variable: str, below_home: str) -> Path:
    if named := os.environ.get(variable):
        return Path(named)
    try:
        return Path.home() / below_home
    except RuntimeError:
        raise InvalidRequest(f"this user has no home: set $HOME or ${variable}") from None
