"""Tools as they are asked for, and what an answer may be because of them.

```
tools          [{"type": "function", "function": {"name": "f", "parameters": {...}}}]
tool_choice    none │ auto │ required │ one function │ allowed_tools: some, auto or required
```
Both forms are read: that of chats, and that of responses, where a function is not inside of another
object.  How calls are enforced: see `answer_form`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixcache_serving.content import refuse_others
from prefixcache_serving.fields import flag, show, text, wrong
from prefixcache_serving.refusals import Refused

MOST_TOOLS: Final = 128
_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_LONGEST_DESCRIPTION: Final = 16_384
_OF_A_FUNCTION: Final = ("name", "description", "parameters", "strict")
_MODES: Final = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that may be called."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    """JSON schema of its arguments, an object's."""
    is_strict: bool
    """Whether a schema that cannot be enforced wholly is refused."""

    @property
    def shown(self) -> dict[str, Any]:
        """What the model is shown."""
        function = {"name": self.name, "description": self.description}
        return {"type": "function", "function": function | {"parameters": dict(self.parameters)}}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """What may be called, and what must."""

    tools: tuple[Tool, ...]
    """All that the model is shown."""
    allowed: tuple[Tool, ...]
    """Those that may be called."""
    must_call: bool
    several: bool
    """Whether there may be more than one call in an answer."""


def read_use(found: Mapping[str, Any], *, is_flat: bool = False) -> ToolUse | None:
    """Read `tools`, `tool_choice` and `parallel_tool_calls`; None: nothing is called.

    Args:
        found: the fields of a body, as they are.
        is_flat: a function is written as responses have it.

    Raises:
        Refused: one of them is wrong, with where.
    """
    given = found.get("tools")
    tools = () if given is None else read_tools(given, "tools", is_flat=is_flat)
    choice = found.get("tool_choice")
    if not tools:
        if choice is not None and choice != "none":
            raise Refused("tool_choice goes with tools", param="tool_choice", code="invalid_value")
        if found.get("parallel_tool_calls") is not None:
            raise Refused(
                "parallel_tool_calls goes with tools",
                param="parallel_tool_calls",
                code="invalid_value",
            )
        return None
    mode, allowed = _choice("auto" if choice is None else choice, tools, is_flat=is_flat)
    several = found.get("parallel_tool_calls")
    if several is not None:
        flag(several, "parallel_tool_calls")
    if mode == "none":
        return None
    is_named = isinstance(choice, dict) and choice.get("type") == "function"
    return ToolUse(tools, allowed, mode == "required", several is not False and not is_named)


def read_tools(given: Any, name: str, *, is_flat: bool = False) -> tuple[Tool, ...]:
    """Read a list of tools.

    Raises:
        Refused: one of them is wrong, or no function.
    """
    if not isinstance(given, list) or len(given) > MOST_TOOLS:
        raise wrong(name, given, f"a list of up to {MOST_TOOLS} tools")
    tools = tuple(_tool(one, f"{name}[{at}]", is_flat) for at, one in enumerate(given))
    if len({tool.name for tool in tools}) < len(tools):
        raise Refused(f"two of {name} have one name", param=name, code="invalid_value")
    return tools


def _tool(given: Any, where: str, is_flat: bool) -> Tool:
    kept = _object(given, where, ("type", *_OF_A_FUNCTION) if is_flat else ("type", "function"))
    if kept.get("type") != "function":
        raise Refused(
            f"{where} is of type {show(kept.get('type'))}; functions are served",
            param=f"{where}.type",
            code="unsupported_field",
        )
    if is_flat:
        inner = kept
    else:
        where = f"{where}.function"
        inner = _object(kept.get("function"), where, _OF_A_FUNCTION)
    parameters = _object(inner.get("parameters", {}), f"{where}.parameters")
    if parameters.get("type", "object") != "object":
        raise Refused(
            f"{where}.parameters is of type {show(parameters['type'])}; arguments are an object",
            param=f"{where}.parameters",
            code="invalid_value",
        )
    return Tool(
        _function_name(inner.get("name"), f"{where}.name"),
        text(_LONGEST_DESCRIPTION)(inner.get("description", ""), f"{where}.description"),
        {"type": "object", **parameters},
        flag(inner.get("strict", False), f"{where}.strict"),
    )


def _choice(
    given: Any, tools: tuple[Tool, ...], *, is_flat: bool, name: str = "tool_choice"
) -> tuple[str, tuple[Tool, ...]]:
    """Give the mode, and those that may be called."""
    if isinstance(given, str):
        if given not in _MODES:
            raise wrong(name, given, f"{', '.join(_MODES)}, or an object")
        return given, tools
    kind = _object(given, name).get("type")
    by_name = {tool.name: tool for tool in tools}
    if kind == "function":
        return "required", (_named(given, name, by_name, is_flat),)
    if kind != "allowed_tools":
        raise Refused(
            f"{name} is of type {show(kind)}; it takes function and allowed_tools",
            param=name,
            code="unsupported_field",
        )
    where = name
    inner = given
    if not is_flat:
        where = f"{name}.allowed_tools"
        inner = _object(_object(given, name, ("type", "allowed_tools")).get("allowed_tools"), where)
    known = _object(inner, where, ("type", "mode", "tools") if is_flat else ("mode", "tools"))
    mode = known.get("mode")
    if mode not in ("auto", "required") or not isinstance(mode, str):
        raise wrong(f"{where}.mode", mode, "auto or required")
    listed = known.get("tools")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MOST_TOOLS:
        raise wrong(f"{where}.tools", listed, f"a list of 1 to {MOST_TOOLS} tools")
    found = [_named(one, f"{where}.tools[{at}]", by_name, is_flat) for at, one in enumerate(listed)]
    return mode, tuple({tool.name: tool for tool in found}.values())


def _named(given: Any, where: str, tools: Mapping[str, Tool], is_flat: bool) -> Tool:
    kept = _object(given, where, ("type", "name") if is_flat else ("type", "function"))
    if kept.get("type") != "function":
        raise wrong(f"{where}.type", kept.get("type"), "function")
    if not is_flat:
        where = f"{where}.function"
        kept = _object(kept.get("function"), where, ("name",))
    name = _function_name(kept.get("name"), f"{where}.name")
    if name not in tools:
        raise Refused(
            f"{where}.name is {show(name)}, which is none of tools",
            param=f"{where}.name",
            code="invalid_value",
        )
    return tools[name]


def _function_name(given: Any, where: str) -> str:
    if not isinstance(given, str) or not _NAME.fullmatch(given):
        raise wrong(where, given, "1 to 64 letters, digits, _ and -")
    return given


def _object(given: Any, where: str, names: tuple[str, ...] | None = None) -> dict[str, Any]:
    """Take an object of certain names; null is as good as left out."""
    if not isinstance(given, dict):
        raise wrong(where, given, "an object")
    if names is not None:
        refuse_others(given, where, *names)
    return {key: value for key, value in given.items() if value is not None}
