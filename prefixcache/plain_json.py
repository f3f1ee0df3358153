"""JSON that every reader takes: Python's own writes NaN and Infinity, which are none."""

from __future__ import annotations

import json
import math
from typing import Any


def json_text(value: object, **options: Any) -> str:
    """Write a value as JSON; a number that is not finite, which JSON has no word for, as null.

    Args:
        value: what `json.dumps` takes.
        options: its options.

    >>> json_text({"share": float("nan"), "left_s": [1.5, float("inf")]})
    '{"share": null, "left_s": [1.5, null]}'
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
