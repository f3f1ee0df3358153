"""JSON that every reader takes: Python's own writes NaN and Infinity, and reads names twice."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from prefixcache.texts import is_plain


def json_text(value: object, **options: Any) -> str:
    r"""Write a value as JSON; a number that is not finite, which JSON has no word for, as null.

    What does not show itself on a terminal is escaped also where other letters are not.

    Args:
        value: what `json.dumps` takes.
        options: its options.

    >>> json_text({"share": float("nan"), "left_s": [1.5, float("inf")]})
    '{"share": null, "left_s": [1.5, null]}'
    >>> print(json_text({"name": "müller\u202e"}, ensure_ascii=False))
    {"name": "müller\u202e"}
    """
    try:
        text = json.dumps(value, allow_nan=False, **options)
    except ValueError:
        text = json.dumps(_finite(value), allow_nan=False, **options)
    if options.get("ensure_ascii", True) or is_plain(text.replace("\n", "")):
        return text
    return _NOT_ASCII.sub(_escaped, text)  # they stand in strings only


class TwiceNamed(ValueError):
    """An object has a field twice."""


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of its fields, for `json.loads`, which keeps the last of equal names itself.

    Raises:
        TwiceNamed: one is there twice: which of them is meant, readers do not agree.

    >>> json.loads('{"a": 1}', object_pairs_hook=once_each)
    {'a': 1}
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = counts.most_common(1)[0][0]
        raise TwiceNamed(f"the field {twice[:40]!a} is there twice")
    return made


_NOT_ASCII = re.compile(r"[^\x00-\x7f]")


def _escaped(found: re.Match[str]) -> str:
    return found[0] if is_plain(found[0]) else json.dumps(found[0])[1:-1]


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
