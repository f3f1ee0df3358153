"""Marks: counters of a service kept under a name, to tell later what *this run* did.

One small file each, in `$XDG_STATE_HOME/prefixcache/marks` (`~/.local/state/…`).
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefixcache import user_folders
from prefixcache.bounded_files import read_file
from prefixcache.cli import view
from prefixcache.errors import InvalidRequest, NotFound
from prefixcache.plain_json import json_text
from prefixcache.private_files import own_folder

if TYPE_CHECKING:
    from prefixcache.cli.status import Status

_LONGEST = 16 << 20
"""Bytes of a mark."""
_NAME = re.compile(r"[\w.-]{1,64}")


def counters(now: Status) -> dict[str, Any]:
    """Give what only grows, as plain values."""
    snapshot = now.snapshot
    return {
        "requests": snapshot.requests,
        "evicted_blocks": snapshot.evicted,
        "ledger": view.ledger_fields(snapshot.ledger),
        "shortage": [list(step) for step in snapshot.shortage],
    }


def keep(name: str, now: Status) -> None:
    """Keep the counters of this moment; an earlier mark of that name is replaced.

    Raises:
        InvalidRequest: that cannot be a file's name, or the file cannot be written.
    """
    path = _path(name)
    text = json_text(counters(now) | _service(now) | {"at": time.time()})
    try:
        own_folder(path.parent)
        fresh = path.with_suffix(".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(path)
    except OSError as error:
        raise InvalidRequest(f"cannot keep a mark in {path}: {error.strerror}") from None


def difference(name: str, now: Status) -> dict[str, Any]:
    """Give what the counters of a mark have grown by.

    Raises:
        NotFound: there is no such mark, or it is of another service, or of an earlier life of it.
        InvalidRequest: that cannot be a mark's name.
    """
    path = _path(name)
    try:
        if not path.exists():
            raise NotFound(
                f"there is no mark {name!r}; set one with: prefixcache stat --mark {name}"
            )
        return _grown(name, json.loads(read_file(path, _LONGEST)), now)
    except (InvalidRequest, OSError, ValueError, RecursionError) as error:
        raise NotFound(f"the mark {name!r} in {path} cannot be read: {error}") from None
    except (LookupError, TypeError, AttributeError):
        raise NotFound(
            f"the mark {name!r} in {path} is none: set it again with: prefixcache stat "
            f"--mark {name}"
        ) from None


def _grown(name: str, old: Any, now: Status) -> dict[str, Any]:
    """Compare a mark as it was kept, whatever has become of its file, with now."""
    here = _service(now)
    if old.get("pid") != here["pid"] or abs(old.get("started", 0.0) - here["started"]) > 5:
        raise NotFound(
            f"the mark {name!r} is of another service, or this one was restarted since: "
            "its counters began again at 0"
        )
    grown = counters(now)
    grown["requests"] -= old["requests"]
    grown["evicted_blocks"] -= old["evicted_blocks"]
    grown["ledger"] = {
        fate: tokens - old["ledger"].get(fate, 0) for fate, tokens in grown["ledger"].items()
    }
    before = dict(old["shortage"])
    grown["shortage"] = [
        [blocks, tokens - before.get(blocks, 0)] for blocks, tokens in grown["shortage"]
    ]
    return grown | {"seconds": time.time() - old["at"]}


def _service(now: Status) -> dict[str, Any]:
    return {"pid": now.info.pid, "started": time.time() - now.info.uptime_s}


def _path(name: str) -> Path:
    if not _NAME.fullmatch(name):
        raise InvalidRequest(f"{name!r} is no name for a mark: letters, digits, '-', '_' and '.'")
    return user_folders.state() / "prefixcache" / "marks" / f"{name}.json"
