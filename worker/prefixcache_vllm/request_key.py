"""What of a request of vLLM's decides its keys and values, in the pool's words.

vLLM puts the same placeholder wherever an image's embeddings go, and tells beside the tokens which
image is where.  The service knows tokens only: it is asked with words of the images' digests.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from typing import Any

from prefixcache.client import MediaItem


def can_share(request: Any) -> bool:
    """Whether what is said here is all that its keys and values depend on."""
    return request.prompt_embeds is None and not request.pooling_params


def adapter_of(request: Any) -> str | None:
    """Name the adapter that computes a request; None: none does."""
    lora = request.lora_request
    return None if lora is None else f"{lora.lora_name}#{lora.lora_path}"


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
