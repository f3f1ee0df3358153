"""What can be known to fail is refused before the service listens, not when a worker attaches.

Without a layout the pool is made when the first worker comes; but a policy that there is not, or
memory that the machine has not, are then as wrong as they are at the start.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Mapping
from pathlib import Path

from prefixcache.config import ServeSettings, format_size
from prefixcache.core.policies import policy_named
from prefixcache.errors import InvalidRequest, PoolExhausted
from prefixcache.pool import HEADER_BYTES, check_room
from prefixcache.service.backing import disk_folder
from prefixcache.service.tiers.disk import KEPT
from prefixcache.user_folders import expand, is_folder

_IS_FOR = {
    "disk_write": "disk",
    "remote_secret": "remote",
    "remote_interface": "remote",
    "segments_threshold": "segments",
    "http_tokens": "http",
    "events_replay": "events",
    "max_shadow_lag": "shadow",
}
"""Which settings mean something only beside another one."""

_LEAST = 64 * 2**10
"""Bytes of a pool whose layout is not known yet: real ones have more in a block."""


def check(settings: ServeSettings, domains: Mapping[str, int]) -> None:
    """Refuse settings with which no worker could ever be served.

    Args:
        settings: all of them.
        domains: bytes of the pools of further trust domains, by name.

    Raises:
        InvalidRequest: a name that there is not, or a size that cannot be meant.
        PoolExhausted: the machine has not so much memory.
    """
    policy_named(settings.policy)
    _refuse_idle(settings)
    if settings.layout is not None and settings.model is not None:
        raise InvalidRequest("--model and --layout both say what the layout is: give one of them")
    if settings.dtype is not None and settings.model is None:
        raise InvalidRequest(
            "--dtype is the type of the keys and values of --model, which is not given; a --layout "
            "names its own"
        )
    is_open = settings.layout is None and settings.model is None and settings.state is None
    for name, num_bytes in {"": settings.memory, **domains}.items():
        if is_open and num_bytes < _LEAST and settings.pool != "none":
            where = f"domain {name}: memory" if name else "--memory"
            raise InvalidRequest(
                f"{where}: {num_bytes:,} bytes hold not one block of any model; sizes have a unit, "
                "for example 2GiB"
            )
    if settings.pool != "shm":
        return
    _check_disk(settings, domains)
    total = sum((settings.memory, *domains.values()))
    below = 0 if settings.host is None else int(settings.host * total / settings.memory)
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if settings.state is None:
        count = 1 + len(domains)
        what = "the pool" if count == 1 else f"the {count} pools together"
        what += " with what is below (--host)" if below else ""
        check_room(total + below + count * HEADER_BYTES, what)
    elif total > (room := _room(settings.state, domains, "pool")):
        raise PoolExhausted(
            f"a pool of {format_size(total)} does not fit in {settings.state}, where "
            f"{format_size(room)} are free or its own. Lower --memory, or choose another --state."
        )
    elif below:
        check_room(below, "what is below the pool (--host)")
    shared = below + (total if settings.state is None else 0)
    if shared > machine:
        raise PoolExhausted(
            f"{format_size(shared)} of shared memory are more than this machine's "
            f"{format_size(machine)}. Lower --memory{' or --host' if below else ''}."
        )


def _refuse_idle(settings: ServeSettings) -> None:
    """Refuse what would not be read, since what it is about is not given.

    Raises:
        InvalidRequest: as said.
    """
    for name, other in _IS_FOR.items():
        given = getattr(settings, name) != ServeSettings.model_fields[name].default
        if given and not getattr(settings, other):
            flag, about = (f"--{one.replace('_', '-')}" for one in (name, other))
            raise InvalidRequest(f"{flag} is for {about}, which is not given")
    if settings.device and settings.pool != "cuda":
        raise InvalidRequest("--device is the GPU of --pool cuda, which is not given")


def _check_disk(settings: ServeSettings, domains: Mapping[str, int]) -> None:
    """Refuse a tier on disk that has no folder, or not the room.

    Raises:
        InvalidRequest, PoolExhausted: as said.
    """
    if settings.disk is None:
        return
    folder = disk_folder(settings)
    share = sum((settings.memory, *domains.values())) / settings.memory
    total = int(settings.disk.num_bytes * share)
    if total > (room := _room(folder, domains, *KEPT)):
        raise PoolExhausted(
            f"--disk: {format_size(total)} do not fit in {folder}, where {format_size(room)} are "
            "free or its own. Lower it, or name a folder on another disk."
        )


def _room(named: Path, domains: Mapping[str, int], *files: str) -> int:
    """Bytes that such files in this folder may take: what is free, and what those there have.

    Looks at nothing else in it, which may be the whole of a disk.
    """
    folder = expand(named).absolute()
    place = next(one for one in (folder, *folder.parents) if is_folder(one))
    own = 0
    if place == folder:
        parts = (folder, *(folder / f"domain-{name}" for name in domains))
        own = sum(_taken(part / name) for part in parts for name in files)
    return shutil.disk_usage(place).free + own


def _taken(file: Path) -> int:
    """Bytes that a file takes; none, if it is not there."""
    try:
        status = file.lstat()
    except OSError:
        return 0
    return status.st_blocks * 512 if stat.S_ISREG(status.st_mode) else 0
