"""Certificates as `verify-segments` writes them, with the numbers that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

KINDS = ("edited history", "documents in another order")

MEASURED = {
    "none": ((0.002, 0.0), (0.13, 0.0)),
    "first 2": ((0.001, 0.1), (0.009, 0.2)),
    "deviation 50%": ((0.001, 0.5), (0.004, 0.6)),
    "first 128": ((0.0, 0.7), (0.0, 1.0)),
    "all": ((0.0, 1.0), (0.0, 1.0)),
}
"""By policy: divergence and share that is computed again, of each kind of text."""


def certificate(
    model: str = "model",
    dtype: str = "float32",
    measured: Mapping[str, Any] = MEASURED,
) -> dict[str, Any]:
    return {
        "format": "prefixcache segments 1",
        "model": model,
        "dtype": dtype,
        "policies": [
            {
                "policy": policy,
                "kinds": {
                    kind: {"kl_mean": kl, "again_share": share}
                    for kind, (kl, share) in zip(KINDS, rows, strict=True)
                },
            }
            for policy, rows in measured.items()
        ],
    }


def write(folder: Path, name: str = "model", **fields: Any) -> Path:
    """Write one into a folder; give the file."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(certificate(**fields)))
    return file
