"""The content of a message: a text, or parts of text; nothing in it is ignored in silence.

```
"Hello"      [{"type": "text", "text": "Hello"}]      [{"type": "input_text", "text": "Hello"}]
```
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Final

from prefixcache_serving.fields import inside, show, text, wrong
from prefixcache_serving.refusals import Refused

TEXT: Final = text(2**31)


def read_content(
    given: Any, where: str, parts: Mapping[str, str], beside: Iterable[str] = ()
) -> str | list[dict[str, str]]:
    """Give a text, or the texts of parts.

    Args:
        given: what stands there.
        where: in the request.
        parts: the types that are taken, and where each has its text.
        beside: what a part may have besides, without effect.

    Raises:
        Refused: something in it would not be seen by the model; `param` names it.
    """
    if isinstance(given, str):
        made: str = TEXT(given, where)
        return made
    if not isinstance(given, list) or not given:
        raise wrong(where, given, "a text, or a list of at least one part")
    return [_part(part, f"{where}[{at}]", parts, beside) for at, part in enumerate(given)]


def refuse_others(given: Mapping[str, Any], where: str, *names: str) -> None:
    """Refuse what would have no effect: all that has another name and is not null."""
    for key, value in given.items():
        if key not in names and value is not None:
            raise Refused(
                f"unknown field {show(key)} in {where}: it would have no effect here",
                param=inside(where, key),
                code="unknown_field",
            )


def _part(part: Any, where: str, parts: Mapping[str, str], beside: Iterable[str]) -> dict[str, str]:
    if not isinstance(part, dict):
        raise wrong(where, part, "an object")
    kind = part.get("type")
    name = parts.get(kind) if isinstance(kind, str) else None
    if name is None:
        raise Refused(
            f"{where} is a part of type {show(kind)}; the model reads text: {', '.join(parts)}",
            param=f"{where}.type",
            code="unsupported_field",
        )
    refuse_others(part, where, "type", name, *beside)
    if part.get(name) is None:
        raise Refused(f"{where} has no {name}", param=f"{where}.{name}", code="missing_field")
    return {"type": "text", "text": TEXT(part[name], f"{where}.{name}")}
