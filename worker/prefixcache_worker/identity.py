"""The name under which a model's prefixes are stored: equal only for equal weights.

Keys and values computed with other weights are wrong ones, so a folder's name is not enough: a
fine-tuned copy may have the same.
"""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path
from typing import Any, Final

_WHOLE_BYTES: Final = 64 << 20
"""Files up to this size are read in full (0.1 s)."""
_SAMPLES: Final = 1024
_SAMPLE_BYTES: Final = 4096
_WEIGHTS: Final = (".safetensors", ".bin")


def identify(source: str, config: Any) -> str:
    """Name a model by its origin and its content.  Reads at most 64 MiB of each weight file.

    Of a hub id the commit tells one revision from another.  Of a folder the config and the weights
    are hashed; of larger files, 1,024 pages spread over each.

    Args:
        source: folder or hub id.
        config: as transformers loaded it.
    """
    folder = Path(source)
    if folder.is_dir():
        return f"{folder.resolve().name}@{_digest(folder)}"
    revision = getattr(config, "_commit_hash", None)
    return f"{source}@{revision[:16]}" if revision else source


def _digest(folder: Path) -> str:
    digest = blake2b(digest_size=8, person=b"pfxcache-model")
    files = sorted(
        path
        for path in folder.iterdir()
        if path.is_file() and (path.suffix in _WEIGHTS or path.name == "config.json")
    )
    for path in files:
        size = path.stat().st_size
        # Lengths are part of what is hashed, so that no two lists of files give the same bytes.
        digest.update(f"{len(path.name)}:{path.name}:{size}:".encode())
        with path.open("rb") as file:
            if size <= _WHOLE_BYTES:
                digest.update(file.read())
                continue
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
