"""JSON that every reader takes: Python's own writes NaN and Infinity, and reads names twice."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, Final

from prefixcache.texts import is_plain

_FEW: Final = 256
"""Of a longer list so many are written at a time."""


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


def json_parts(value: object, **options: Any) -> Iterator[str]:
    """Write a value as `json_text` does, in parts that take some milliseconds at most.

    Where it is written in a thread, others have their turn between two of them; within one they
    have none, as Python's encoder is a single call.

    Args:
        value: what `json.dumps` takes; the names of its objects are texts.
        options: of `json.dumps`, but for `indent`.

    >>> "".join(json_parts({"a": [{"b": 1.5}, None], "c": {}}))
    '{"a": [{"b": 1.5}, null], "c": {}}'
    """
    comma, colon = options.get("separators") or (", ", ": ")
    if isinstance(value, dict):
        yield "{"
        for number, (name, one) in enumerate(value.items()):
            yield f"{comma * (number > 0)}{json_text(name, **options)}{colon}"
            yield from json_parts(one, **options)
        yield "}"
    elif isinstance(value, list) and len(value) > _FEW:
        yield "["
        for at in range(0, len(value), _FEW):
            yield comma * (at > 0) + json_text(value[at : at + _FEW], **options)[1:-1]
        yield "]"
    elif isinstance(value, list):
        yield "["
        for number, one in enumerate(value):
            yield comma * (number > 0)
            yield from json_parts(one, **options)
        yield "]"
    else:
        yield json_text(value, **options)


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
