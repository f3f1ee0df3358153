"""What a certificate compares on: stored prompts, and one that has much of them elsewhere.

```
{"parts": {"ferry": "The ferry leaves …"},
 "texts": [{"kind": "documents in another order", "name": "turned around",
            "stored": [{"messages": [{"role": "user", "content": "{ferry} {mill} When?"}]}],
            "asked": {"messages": [{"role": "user", "content": "{mill} {ferry} How much?"}]}}]}
```
A request is in any form that servers log; `{name}` stands for a part.  Ours, written for this
project, are in `texts.json`.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from hashlib import blake2b
from importlib import resources
from pathlib import Path
from typing import Any, Final

from prefixcache.bounded_files import read_file
from prefixcache.errors import InvalidRequest
from prefixcache.prompts.logged_request import LoggedRequest, read_logged
from prefixcache.types import shown

_MOST_BYTES: Final = 16 << 20
_PART: Final = re.compile(r"\{(\w+)\}")


@dataclass(frozen=True, slots=True)
class Text:
    """One comparison."""

    kind: str
    """What is moved, and why; figures are told by kind."""
    name: str
    stored: tuple[LoggedRequest, ...]
    asked: LoggedRequest


@dataclass(frozen=True, slots=True)
class Texts:
    """All comparisons of a file."""

    digest: str
    """Of the file's bytes."""
    all: tuple[Text, ...]


def load(path: Path | None = None) -> Texts:
    """Read texts from a file; ours if None.

    Raises:
        InvalidRequest: it cannot be read, or is not as drawn above; the message says where.
    """
    if path is None:
        data = (resources.files(__package__) / "texts.json").read_bytes()
    else:
        data = read_file(path, _MOST_BYTES)
    name = "texts" if path is None else str(path)
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"{name} is no JSON: {error}") from None
    found = whole.get("texts") if isinstance(whole, dict) else None
    parts = whole.get("parts", {}) if isinstance(whole, dict) else None
    if not isinstance(found, list) or not found or not isinstance(parts, dict):
        raise InvalidRequest(f'{name} is not {{"parts": {{…}}, "texts": [at least one]}}')
    texts = tuple(_text(one, parts, f"{name}: text {at}") for at, one in enumerate(found))
    return Texts(blake2b(data, digest_size=8).hexdigest(), texts)


def _text(value: Any, parts: dict[str, Any], where: str) -> Text:
    if not isinstance(value, dict) or not {"kind", "stored", "asked"} <= value.keys():
        raise InvalidRequest(f'{where} is {shown(value)}, without "kind", "stored" and "asked"')
    if not isinstance(value["stored"], list) or not value["stored"]:
        raise InvalidRequest(f"{where}: stored is {shown(value['stored'])}, no list of requests")
    try:
        stored = tuple(_request(one, parts) for one in value["stored"])
        asked = _request(value["asked"], parts)
    except InvalidRequest as error:
        raise InvalidRequest(f"{where}: {error}") from None
    return Text(str(value["kind"]), str(value.get("name", "")), stored, asked)


def _request(value: Any, parts: dict[str, Any]) -> LoggedRequest:
    found = read_logged(_filled(value, parts))
    if len(found) != 1:
        raise InvalidRequest(f"a request with {len(found)} prompts: one is compared at a time")
    return found[0]


def _filled(value: Any, parts: dict[str, Any]) -> Any:
    """Put parts in the places of their names; what stands in no braces, or names none, stays."""
    if isinstance(value, str):
        return _PART.sub(lambda found: str(parts.get(found[1], found[0])), value)
    if isinstance(value, dict):
        return {key: _filled(one, parts) for key, one in value.items()}
    return [_filled(one, parts) for one in value] if isinstance(value, list) else value
