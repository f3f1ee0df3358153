"""What an answer must look like: JSON, calls of tools, a text; and what workers hold it to.

| asked | the answer |
|---|---|
| `json_schema`, strict or not | is JSON of that schema |
| `json_object` | is an object of JSON |
| tools, `required` or one by name | is calls of what may be called |
| tools, `auto` | is a text; if it comes to the form's trigger, calls follow |
| tools, `auto`, with one of the first two | is such JSON, or calls |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from prefixcache.errors import InvalidRequest
from prefixcache_serving.call_form import CallForm
from prefixcache_serving.content import refuse_others
from prefixcache_serving.fields import flag, object_, text, wrong
from prefixcache_serving.refusals import Refused
from prefixcache_serving.tools import ToolUse
from prefixcache_worker.grammar import read_grammar

_NAME: Final = re.compile(r"[A-Za-z0-9_-]{1,64}", re.ASCII)
_OF_A_SCHEMA: Final = ("name", "description", "schema", "strict")


@dataclass(frozen=True, slots=True)
class JsonForm:
    """JSON that is asked for."""

    schema: Mapping[str, Any]
    is_strict: bool
    """Whether a schema that cannot be enforced wholly is refused."""


def read_form(given: Any, name: str, *, is_flat: bool = False) -> JsonForm | None:
    """Read a `response_format`, or what responses have in `text.format`; None: a text.

    Args:
        given: the object.
        name: of the field.
        is_flat: the schema is not inside of another object, as responses have it.

    Raises:
        Refused: it is wrong, with where.
    """
    kind = object_(given, name).get("type")
    if kind not in ("text", "json_object", "json_schema") or not isinstance(kind, str):
        raise wrong(f"{name}.type", kind, "text, json_object or json_schema")
    flat = _OF_A_SCHEMA if is_flat else ("json_schema",)
    refuse_others(given, name, "type", *(flat if kind == "json_schema" else ()))
    if kind != "json_schema":
        return None if kind == "text" else JsonForm({"type": "object"}, is_strict=True)
    inner = given
    if not is_flat:
        name = f"{name}.json_schema"
        inner = given.get("json_schema")
        refuse_others(object_(inner, name), name, *_OF_A_SCHEMA)
    called = inner.get("name")
    if not isinstance(called, str) or not _NAME.fullmatch(called):
        raise wrong(f"{name}.name", called, "1 to 64 letters, digits, _ and -")
    if inner.get("description") is not None:
        text(16_384)(inner["description"], f"{name}.description")
    strict = inner.get("strict")
    schema = inner.get("schema")
    return JsonForm(
        {"type": "object"} if schema is None else object_(schema, f"{name}.schema"),
        flag(False if strict is None else strict, f"{name}.strict"),
    )


def grammar_of(
    form: JsonForm | None, use: ToolUse | None, calls: CallForm, name: str
) -> dict[str, Any] | None:
    """Give what a worker holds the answer to, as its line's `grammar`; None: nothing.

    Args:
        form: JSON that is asked for.
        use: tools.
        calls: how the model writes calls.
        name: of the field that `form` is from.

    Raises:
        Refused: it is beyond a bound, or both cannot be told apart.
    """
    value: dict[str, Any] = {}
    if form is not None:
        value = {"schema": dict(form.schema), "lenient": not form.is_strict}
    if use is None:
        made = value or None
    else:
        allowed = [(one.name, one.parameters, not one.is_strict) for one in use.allowed]
        made = {"calls": calls.grammar(allowed, use.several)}
        if not use.must_call:
            if value and not calls.trigger:
                raise Refused(
                    f"{name} beside tools: this model writes calls as JSON, too, and one could not "
                    "be told from the other; give one of them, or tool_choice",
                    param=name,
                    code="unsupported_field",
                )
            made |= value or {"text": True}
    if made is not None:
        try:
            read_grammar(made)
        except InvalidRequest as error:
            raise refused_grammar(error, form, name) from None
    return made


def refused_grammar(error: Exception, form: JsonForm | None, name: str) -> Refused:
    """Name the field of a request for what workers call its grammar."""
    param = name if form is not None else "tools"
    said = str(error).removeprefix("grammar").removeprefix(": ")
    return Refused(f"{param}: {said}", param=param, code="invalid_value")
