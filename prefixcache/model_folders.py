"""Where the folders of models are on this machine: in our own cache, and in Hugging Face's.

```
name                 looked for as
smollm2              ~/.cache/prefixcache/smollm2, and .../smollm2-135m-instruct-v1, if only one begins so
org/name@revision    ~/.cache/huggingface/hub/models--org--name/snapshots/revision...
```
"""  # noqa: E501 - a table

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from prefixcache.user_folders import caches

_PART: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,95}")
"""What a part of a model's name is made of, where it names a folder."""


def own_cache() -> Path:
    """Give the folder in which models are that this project has made itself.

    `$PREFIXCACHE_CACHE`, else `prefixcache` among the caches of this user.

    Raises:
        InvalidRequest: this user has no home.
    """
    own = os.environ.get("PREFIXCACHE_CACHE")
    return Path(own) if own else caches() / "prefixcache"


def places(model: str) -> Iterator[Path]:
    """Give the folders in which a model of that name may be, the likeliest first.

    The name may be what some worker has sent: it finds folders below the caches of this machine,
    and is itself no path.

    Raises:
        OSError: a cache cannot be read.
        InvalidRequest: this user has no home.
    """
    name, _, revision = model.partition("@")
    parts = name.split("/")
    if len(parts) > 2 or not all(_PART.fullmatch(part) for part in parts):
        return
    if len(parts) == 1:
        yield own_cache() / name
        longer = [one for one in own_cache().glob(f"{name}-*") if one.is_dir()]
        if len(longer) == 1:
            yield longer[0]
    home = os.environ.get("HF_HOME")
    hub = (Path(home) if home else caches() / "huggingface") / "hub"
    snapshots = hub / f"models--{'--'.join(parts)}" / "snapshots"
    if snapshots.is_dir():
        found = sorted(snapshots.iterdir(), key=lambda folder: folder.stat().st_mtime)
        yield from (one for one in reversed(found) if one.name.startswith(revision))
