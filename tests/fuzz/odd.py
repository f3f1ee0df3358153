"""Odd values, and good ones with some of their parts made odd: what no schema would let through.

Random bytes seldom are JSON.  Here the input says *what to change* in a value that is right: which
part of it, and which odd value stands there now, so that most inputs reach what is behind a parser.
"""

from __future__ import annotations

import copy
import json
from typing import Any

ODD: tuple[Any, ...] = (
    *(None, True, False, 0, 1, -1, 2, 7, 2**15, 2**31, 2**32 - 1, 2**32, 2**53, 2**63, 2**64),
    *(-(2**31), -(2**63), 10**40, 10**400, 0.5, -0.0, 1e-320, 1e308, float("inf"), -float("inf")),
    *(float("nan"), "", " ", "0", "-1", "1e999", "nan", "a" * 3000, "9" * 5000, "\x00", "a\nb"),
    *(
        "\x1b[2J",
        "\u202e",
        "\u200b",
        "\ud800",
        "\ufeff",
        "é",
        "ü" * 9,
        "2024-01-01T00:00:00Z",
        "AAAA",
    ),
    *("9999-12-31T23:59:59-23:59", "*", "[", "[!", "../../etc/passwd", "1GiB", "-1GiB", "1e400"),
    *([], [[]], [None], [1, "a"], [0.5], [True], [-1], [2**32], ["a"] * 300, list(range(300))),
    *({}, {"": ""}, {"text": None}, {"type": "image_url", "image_url": {"url": "x"}}),
    *({"content": None, "role": None}, {"role": "user"}, [{"type": "text", "text": 5}]),
    *({"name": {"content": []}}, [{"role": "user", "content": ["a", None, 3]}]),
)
"""What stands where something else is expected."""


def changed(good: Any, data: bytes) -> Any:
    """Give a copy of a value with parts of it changed: three bytes name one change.

    The first says what is done (replaced, taken out, doubled, put into a list, nested deeply), the
    second where, the third by what.
    """
    value = copy.deepcopy(good)
    for at in range(0, min(len(data), 12) - 2, 3):
        what, where, by = data[at : at + 3]
        places = list(_places(value))
        if not places:
            return ODD[by % len(ODD)]
        inside, key = places[where % len(places)]
        match what % 8:
            case 5:
                del inside[key]
            case 6:
                inside[key] = [inside[key], inside[key]]
            case 7 if isinstance(inside, dict):
                inside[str(ODD[by % len(ODD)])] = inside[key]
            case 4:
                inside[key] = _deep(by)
            case _:
                inside[key] = copy.deepcopy(ODD[by % len(ODD)])
    return value


def json_line(value: Any) -> bytes:
    """Write JSON as strangers do: also NaN, Infinity and lone surrogates; 1e999 for the infinite.

    >>> json_line([float("inf"), None])
    b'[1e999, null]'
    """
    text = json.dumps(value).replace("Infinity", "1e999")
    return text.encode("utf-8", "surrogatepass")


def toml(tables: Any) -> str:
    """Write a TOML document: values inline, lists of tables as `[[name]]`.

    >>> print(toml({"identity": [{"name": "a", "uid": 7}]}).strip())
    [[identity]]
    "name" = "a"
    "uid" = 7
    """
    if not isinstance(tables, dict):
        return _toml_value(tables)
    plain, apart = [], []
    for name, value in tables.items():
        if isinstance(value, list) and value and all(isinstance(one, dict) for one in value):
            for one in value:
                rows = [f"{_quoted(k)} = {_toml_value(v)}" for k, v in one.items()]
                bare = name if name.isalnum() and name.isascii() else _quoted(name)
                apart.append("\n".join([f"[[{bare}]]", *rows]))
        else:
            plain.append(f"{_quoted(name)} = {_toml_value(value)}")
    return "\n".join([*plain, *apart]) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_quoted(k)} = {_toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml_value, value)) + "]"
    if isinstance(value, str) or value is None:
        return _quoted(value or "")
    return str(value)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=True).replace("\\ud800", "\\ufffd")


def _places(value: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    left = [value]
    while left and len(found) < 256:
        one = left.pop()
        keys = list(one) if isinstance(one, dict) else list(range(len(one)))
        for key in keys[:32]:
            found.append((one, key))
            if isinstance(one[key], dict | list):
                left.append(one[key])
    return found


def _deep(by: int) -> Any:
    value: Any = by
    for _ in range(1 + by % 4 * 60):  # `json_line` goes no deeper; raw bytes do
        value = [value] if by & 8 else {"a": value}
    return value
