"""What of a request of vLLM's decides its keys and values, in the pool's words.

vLLM puts the same placeholder wherever an image's embeddings go, and tells beside the tokens which
image is where.  The service knows tokens only: it is asked with words of the images' digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

from prefixcache.client import MediaItem


def can_share(request: Any) -> bool:
    """Whether what is said here is all that its keys and values depend on."""
    return request.prompt_embeds is None and not request.pooling_params


class Adapters:
    """The adapters of one engine, by names that tell them from those of all others.

    vLLM tells them apart by name and path, which are its own process's: another engine may stand in
    another folder, or was started before what lies there was trained anew.  So the path is made
    absolute, and the files in it are looked at when an adapter is first asked for, which is about
    when vLLM loads it.  Files that change while an engine serves them are not noticed.
    """

    def __init__(self) -> None:
        self._keys: dict[tuple[int, str, str], str] = {}

    def key_of(self, request: Any) -> str | None:
        """Name the adapter that computes a request; None: none does.

        O(1); the first time, and where vLLM reads it for each request, one look into its folder.
        """
        lora = request.lora_request
        if lora is None:
            return None
        name = lora.lora_int_id, lora.lora_name, lora.lora_path
        if name not in self._keys or lora.load_inplace:
            self._keys[name] = f"{lora.lora_name}#{_files_at(lora.lora_path)}"
        return self._keys[name]


def _files_at(path: str) -> str:
    """Tell a folder from others, and from itself with other files."""
    try:
        folder = Path(path).expanduser().resolve(strict=True)
        found = sorted((one.name, one.stat()) for one in folder.iterdir() if one.is_file())
    except (OSError, RuntimeError):
        return path  # no folder: a name at a hub, from where vLLM downloads it
    files = "".join(f"{name}/{stat.st_size}/{stat.st_mtime_ns}/" for name, stat in found)
    return f"{folder}#{sha256(files.encode()).hexdigest()[:32]}"


def media_of(request: Any) -> Sequence[MediaItem]:
    """Tell which image, recording or video is where.

    vLLM's name for one is a hash of its content, of the processor's settings and, where that
    matters, of the adapter; or what the caller of its API names it.  Those that lie in each other,
    as a video and its sound may, are one.
    """
    found: list[MediaItem] = []
    features = request.mm_features or ()
    for one in sorted(features, key=lambda feature: int(feature.mm_position.offset)):
        place = one.mm_position
        digest = sha256(f"{one.modality}/{one.identifier}".encode()).digest()
        item = MediaItem(int(place.offset), int(place.length), digest)
        before = found[-1] if found else None
        if before is not None and item.offset < before.offset + before.length:
            found[-1] = _joined(before, item)
        else:
            found.append(item)
    return found


def _joined(one: MediaItem, other: MediaItem) -> MediaItem:
    end = max(one.offset + one.length, other.offset + other.length)
    places = f"{one.length}/{other.offset - one.offset}/{other.length}/".encode()
    digest = sha256(places + one.digest + other.digest).digest()
    return MediaItem(one.offset, end - one.offset, digest)
