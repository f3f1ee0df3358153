"""The input of `/v1/responses` as the messages of a chat: the same prompt as a chat that says so.

```
instructions                                {"role": "system"}
input, a text                               {"role": "user"}
message          role, content              the same; its parts are texts
function_call    call_id, name, arguments   a call of the assistant, in its message before if any
function_call_output   call_id, output      {"role": "tool"}
```
Nothing is stored, so whatever names what was said earlier, instead of saying it, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

from prefixcache_serving.content import TEXT, read_content, refuse_others
from prefixcache_serving.fields import show, text, wrong
from prefixcache_serving.refusals import Refused

_ROLES: Final = ("user", "assistant", "system", "developer")
_STATES: Final = ("in_progress", "completed", "incomplete")
_PARTS: Final[Mapping[str, str]] = {
    "input_text": "text",
    "output_text": "text",
    "refusal": "refusal",
}
"""Where a part has its text."""
_OF_AN_ANSWER: Final = ("annotations", "logprobs")
"""What parts of an earlier answer have besides; a prompt shows neither."""


def messages(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Give the messages that `instructions` and `input` are.  O(items).

    Raises:
        Refused: an item, or something in it, would not be seen by the model; `param` names it.
    """
    made: list[dict[str, Any]] = []
    if "instructions" in found:
        made.append({"role": "system", "content": found["instructions"]})
    if "input" not in found:
        raise Refused("an input is missing", param="input", code="missing_field")
    given = found["input"]
    if isinstance(given, str):
        return [*made, {"role": "user", "content": TEXT(given, "input")}]
    if not isinstance(given, list) or not given:
        raise wrong("input", given, "a text, or a list of at least one item")
    follows_assistant = False
    for at, item in enumerate(given):
        where = f"input[{at}]"
        if not isinstance(item, dict):
            raise wrong(where, item, "an object")
        kind = item.get("type")
        if kind is None and "role" in item:
            kind = "message"
        read = _ITEMS.get(kind) if isinstance(kind, str) else None
        if read is None:
            raise Refused(
                f"{where} is an item of type {show(kind)}; {', '.join(_ITEMS)} are taken",
                param=f"{where}.type",
                code="unsupported_field",
            )
        message = read({key: one for key, one in item.items() if one is not None}, where)
        if kind == "function_call" and follows_assistant:
            made[-1].setdefault("tool_calls", []).extend(message["tool_calls"])
        else:
            made.append(message)
        follows_assistant = message["role"] == "assistant"
    return made


def _message(item: dict[str, Any], where: str) -> dict[str, Any]:
    _only(item, where, "type", "role", "content", "id", "status")
    if item.get("role") not in _ROLES:
        raise wrong(f"{where}.role", item.get("role"), ", ".join(_ROLES))
    if "content" not in item:
        raise Refused(f"{where} has no content", param=f"{where}.content", code="missing_field")
    return {"role": item["role"], "content": _content(item["content"], f"{where}.content")}


def _call(item: dict[str, Any], where: str) -> dict[str, Any]:
    _only(item, where, "type", "id", "status", "call_id", "name", "arguments")
    called = {key: _named(item, key, where) for key in ("name", "arguments")}
    call = {"id": _named(item, "call_id", where), "type": "function", "function": called}
    return {"role": "assistant", "tool_calls": [call]}


def _output(item: dict[str, Any], where: str) -> dict[str, Any]:
    _only(item, where, "type", "id", "status", "call_id", "output")
    if "output" not in item:
        raise Refused(f"{where} has no output", param=f"{where}.output", code="missing_field")
    return {
        "role": "tool",
        "tool_call_id": _named(item, "call_id", where),
        "content": _content(item["output"], f"{where}.output"),
    }


_ITEMS: Final[Mapping[str, Callable[[dict[str, Any], str], dict[str, Any]]]] = {
    "message": _message,
    "function_call": _call,
    "function_call_output": _output,
}


def _only(item: dict[str, Any], where: str, *names: str) -> None:
    """Refuse what would have no effect; an id and a state are what we gave the item ourselves."""
    refuse_others(item, where, *names)
    if "id" in item:
        text(1024)(item["id"], f"{where}.id")
    if item.get("status", _STATES[0]) not in _STATES:
        raise wrong(f"{where}.status", item["status"], ", ".join(_STATES))


def _named(item: dict[str, Any], name: str, where: str) -> str:
    if name not in item:
        raise Refused(f"{where} has no {name}", param=f"{where}.{name}", code="missing_field")
    given: str = TEXT(item[name], f"{where}.{name}")
    return given


def _content(given: Any, where: str) -> str | list[dict[str, str]]:
    return read_content(given, where, _PARTS, _OF_AN_ANSWER)
