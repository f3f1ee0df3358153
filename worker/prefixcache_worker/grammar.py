r"""What an answer must look like: JSON of a schema, one of some texts, calls, a text with calls.

```
choices  yes                                                                  one of them, no more
schema   {"n": 1}                                                             JSON, and nothing else
calls    <tool_call>  \n   {"name": "f", "arguments":  {"a": 1}  }    \n</tool_call>
         trigger     open  begin                       schema    end  close, or between and begin
text     Let me see. <tool_call> ...       from the trigger on it is held to the calls
```
A schema is a stranger's program for the compiler: its size, its depth and what is known to take
long are bounded here, before anything is compiled.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final
from urllib.parse import unquote

from prefixcache.errors import InvalidRequest
from prefixcache.plain_json import json_text

LONGEST_SCHEMAS: Final = 256 << 10
"""Characters of a grammar's schemas together, as JSON."""
MOST_PROPERTIES: Final = 2048
"""Properties of a grammar's objects together, and names that they require: what compiling takes
grows with their square."""
MOST_BRANCHES: Final = 100
"""Ways of a grammar's `anyOf` together that are no plain values: what a mask takes may grow with
their cube, where each leads to all of them again."""
DEEPEST: Final = 64
MOST_LEVELS: Final = 512
"""Levels of all that is referred to, together: where one refers to the next, and that to the next,
they are compiled inside of each other, and a stack that is full ends the process."""
MOST_TOGETHER: Final = 12
"""Patterns and formats that one text must match together: with two more compiling takes five times
as long."""
LONGEST_PATTERNS: Final = 16 << 10
"""Characters of a grammar's patterns together."""
MOST_CALLS: Final = 128
"""Different ones."""
MOST_CHOICES: Final = 1024
LONGEST_TEXT: Final = 512
"""Characters of a choice, or of what is around a call's arguments."""
MOST_STEPS: Final = 10_000
"""Of a `multipleOf`, or of several that must hold together, without what is easy in decimals."""
_FAR: Final = 10**30
_BESIDE: Final = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""Written as Python's `json` does.  With other spaces a small model may write nothing but these."""
_WAYS: Final = ("anyOf", "oneOf")
_PLAIN: Final = ("string", "integer", "number", "boolean", "null")
_PARTS: Final = {"schema", "lenient", "text", "calls", "choices"}
_AROUND: Final = ("trigger", "open", "between", "close")


@dataclass(frozen=True, slots=True)
class Value:
    """JSON of a schema."""

    schema: Mapping[str, Any]
    lenient: bool = False
    """Whether what the compiler does not know is left out of it, and told; else it is refused."""

    def lark(self) -> str:
        """Write it as a rule."""
        terms = _BESIDE | {"lenient": self.lenient, "coerce_one_of": self.lenient}
        return f"%json {json_text(dict(self.schema) | {'x-guidance': terms})}"


@dataclass(frozen=True, slots=True)
class Call:
    """One way to call: which tool, with what arguments."""

    begin: str
    value: Value
    end: str = ""


@dataclass(frozen=True, slots=True)
class Calls:
    """How calls are written."""

    each: tuple[Call, ...]
    trigger: str = ""
    """What all calls begin with.  Empty: the first character of a call; no text begins with it."""
    open: str = ""
    between: str | None = None
    """From one call to the next one; None: there is one call only."""
    close: str = ""


@dataclass(frozen=True, slots=True)
class Grammar:
    """What an answer must look like: one of its parts."""

    value: Value | None = None
    calls: Calls | None = None
    text: bool = False
    """Whether it may be a text instead, which ends where the trigger of calls is."""
    choices: tuple[str, ...] = ()
    """Texts of which the answer is one."""

    def lark(self, special: Mapping[str, int]) -> str:
        """Write it in the compiler's language, a variant of Lark's.

        Args:
            special: tokens that are no text, by what they are called.
        """
        ways: list[str] = []
        rules: list[str] = []
        if self.value is not None:
            ways.append("value")
            rules.append(f"value: {self.value.lark()}")
        if self.choices:
            ways.append("choice")
            rules.append(f"choice: {' | '.join(_literal(one, special) for one in self.choices)}")
        if (calls := self.calls) is not None:
            head = _literal(calls.trigger, special)
            if self.text:
                ways.append("TEXT")
                if not calls.trigger:
                    begins = {(calls.open or one.begin)[0] for one in calls.each}
                    first = "".join(sorted(map(re.escape, begins)))
                    rules.append(rf"TEXT: /([^{first}](.|\n)*)?/")
                elif calls.trigger in special:
                    rules.append(r"TEXT: /(.|\n)*/")
                    head = f"TEXT {head}"
                else:
                    rules.append(r"TEXT: /(.|\n)*/")
                    rules.append(f"head[lazy]: TEXT {head}")
                    head = "head"
            names = [f"call_{number}" for number in range(len(calls.each))]
            more = ""
            if calls.between is not None:
                more = f" ({_literal(calls.between, special)} call)*"
            around = (_literal(calls.open, special), _literal(calls.close, special))
            ways.append(f"{head} {around[0]} call{more} {around[1]}")
            rules.append(f"call: {' | '.join(names)}")
            for name, one in zip(names, calls.each, strict=True):
                begin, end = _literal(one.begin, special), _literal(one.end, special)
                rules += [
                    f"{name}: {begin} {name}_value {end}",
                    f"{name}_value: {one.value.lark()}",
                ]
        return "\n".join([f"start: {' | '.join(ways)}", *rules, ""])


def read_grammar(given: Any) -> Grammar:
    """Read a grammar as a request's line holds it.  O(its size).

    ```
    {"schema": {...}, "lenient": false}
    {"choices": ["yes", "no"]}
    {"calls": {"trigger": ..., "open": ..., "between": ..., "close": ...,
               "each": [{"begin": ..., "schema": {...}, "lenient": false, "end": ...}]},
     "text": true}
    ```

    Raises:
        InvalidRequest: it is none, or beyond a bound.
    """
    if not isinstance(given, dict):
        raise InvalidRequest(f"grammar is {_show(given)}; it takes an object")
    found = _known(given, _PARTS, "grammar")
    value, calls = None, None
    if "schema" in found:
        value = _value(found, "grammar")
    elif "lenient" in found:
        raise InvalidRequest("grammar: lenient goes with a schema")
    if "calls" in found:
        calls = _calls(found["calls"])
    text = _flag(found, "text", "grammar")
    if "choices" in found:
        if len(found) > 1:
            raise InvalidRequest("grammar: beside choices nothing else may stand")
        return Grammar(choices=_choices(found["choices"]))
    if calls is None and (text or value is None):
        raise InvalidRequest("grammar: a schema, calls, or choices are missing")
    if calls is not None and text and value is not None:
        raise InvalidRequest("grammar: what is no call is a text or of a schema, not both")
    grammar = Grammar(value, calls, text)
    _check_schemas(
        ([] if value is None else [value])
        + ([] if calls is None else [e.value for e in calls.each])
    )
    return grammar


def _choices(given: Any) -> tuple[str, ...]:
    if not isinstance(given, list) or not 1 <= len(given) <= MOST_CHOICES:
        raise InvalidRequest(
            f"grammar.choices is {_show(given)}; it takes a list of 1 to {MOST_CHOICES:,} texts"
        )
    texts = tuple(
        _text({str(number): one}, str(number), "grammar.choices")
        for number, one in enumerate(given)
    )
    if "" in texts:
        raise InvalidRequest(f"grammar.choices.{texts.index('')} is empty")
    return texts


def _calls(given: Any) -> Calls:
    where = "grammar.calls"
    if not isinstance(given, dict):
        raise InvalidRequest(f"{where} is {_show(given)}; it takes an object")
    found = _known(given, {*_AROUND, "each"}, where)
    each = found.get("each")
    if not isinstance(each, list) or not 1 <= len(each) <= MOST_CALLS:
        raise InvalidRequest(f"{where}.each is {_show(each)}; it takes a list of 1 to {MOST_CALLS}")
    made = []
    for number, one in enumerate(each):
        place = f"{where}.each[{number}]"
        if not isinstance(one, dict):
            raise InvalidRequest(f"{place} is {_show(one)}; it takes an object")
        known = _known(one, {"begin", "schema", "lenient", "end"}, place)
        if not (begin := _text(known, "begin", place)):
            raise InvalidRequest(f"{place}.begin is missing")
        made.append(Call(begin, _value(known, place), _text(known, "end", place)))
    around = {name: _text(found, name, where) for name in _AROUND if name in found}
    return Calls(tuple(made), **around)


def _value(found: Mapping[str, Any], where: str) -> Value:
    schema = found.get("schema")
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise InvalidRequest(f"{where}.schema is {_show(schema)}; it takes a JSON schema")
    if "x-guidance" in schema:
        raise InvalidRequest(f"{where}.schema has x-guidance, which would have no effect here")
    return Value(schema, _flag(found, "lenient", where))


def _check_schemas(values: Iterable[Value]) -> None:
    """Bound what compiling takes."""
    size = num_properties = num_branches = num_required = pattern_size = 0
    steps = 1
    for value in values:
        _check_references(value.schema)
        for key, one, depth in _walk(value.schema):
            if depth > DEEPEST:
                raise InvalidRequest(f"grammar: a schema is nested more than {DEEPEST} deep")
            if any(
                "\ud800" <= char <= "\udfff"
                for text in (key, one)
                if isinstance(text, str)
                for char in text
            ):
                raise InvalidRequest("grammar: a schema holds half a character (U+D800 to U+DFFF)")
            if isinstance(one, str):
                size += len(one) + 4
            else:
                size += 4
            if isinstance(one, dict):
                size += sum(len(name) + 4 for name in one)
                if key in ("properties", "patternProperties"):
                    num_properties += len(one)
                if key == "patternProperties":
                    pattern_size += sum(map(len, one))
                if isinstance(pattern := one.get("pattern"), str):
                    pattern_size += len(pattern)
                if isinstance(required := one.get("required"), list):
                    num_required += len(required)
                num_branches += sum(_num_branches(one.get(name)) for name in _WAYS)
            elif isinstance(one, int | float) and not isinstance(one, bool):
                steps = _bounded(key, one, steps)
            if size > LONGEST_SCHEMAS:
                raise InvalidRequest(
                    f"grammar: its schemas have more than {LONGEST_SCHEMAS:,} characters"
                )
            if num_branches > MOST_BRANCHES:
                raise InvalidRequest(
                    f"grammar: its schemas have more than {MOST_BRANCHES} ways in anyOf and oneOf "
                    "that may be objects or lists"
                )
            if max(num_properties, num_required) > MOST_PROPERTIES:
                raise InvalidRequest(
                    f"grammar: its schemas have more than {MOST_PROPERTIES:,} properties, or names "
                    "that they require"
                )
            if pattern_size > LONGEST_PATTERNS:
                raise InvalidRequest(
                    f"grammar: its patterns have more than {LONGEST_PATTERNS:,} characters"
                )


def _check_references(schema: Mapping[str, Any]) -> None:
    """Bound what comes of a schema that refers to its parts.

    Raises:
        InvalidRequest: too many levels are in each other so, or patterns must hold together; or it
            names its parts in a way that is not followed here, or leads to nothing but itself.
    """
    objects = [one for _, one, _ in _walk(schema) if isinstance(one, dict)]
    found: dict[int, Any] = {}
    for one in objects:
        if isinstance(reference := one.get("$ref"), str):
            found[id(one)] = target = _target(schema, reference)
            if target is None and any("$anchor" in each or "$id" in each for each in objects):
                raise InvalidRequest(
                    f"grammar: $ref {_show(reference)} names a part by $anchor or $id; write where "
                    "it is, as #/$defs/name"
                )
    if (circle := _circle(objects, found)) is not None:
        raise InvalidRequest(
            f"grammar: $ref {_show(circle)} leads to nothing but itself, which no value fits; let "
            "it lead to a type, an enum, or an anyOf of which one way does not come back"
        )
    targets = {id(one): one for one in found.values()}
    levels = sum(map(_num_levels, targets.values()))
    if levels > MOST_LEVELS:
        raise InvalidRequest(
            f"grammar: what a schema refers to has {levels:,} levels together; at most "
            f"{MOST_LEVELS:,}"
        )
    known: dict[int, int] = {}
    try:
        most = max((_num_together(one, found, known) for one in objects), default=0)
    except RecursionError:
        raise InvalidRequest("grammar: a schema refers to itself too deeply") from None
    if most > MOST_TOGETHER:
        raise InvalidRequest(
            f"grammar: {most:,} patterns and formats must hold together (allOf, or beside a $ref); "
            f"at most {MOST_TOGETHER}"
        )


def _circle(objects: Iterable[dict[str, Any]], targets: Mapping[int, Any]) -> str | None:
    """Find a reference that leads to itself before anything is said of a value; None: none does.

    Whatever has nothing that must hold in its place is settled; and what has, once that is: the
    target of its reference, all of allOf, and one way of each anyOf and oneOf.  What is never
    settled so goes round in circles.  O(the schema's size).

    Args:
        objects: all that are in a schema.
        targets: what references name, by the `id` of what holds them.
    """
    num_left: dict[int, int] = {}
    above: dict[int, list[tuple[int, int]]] = {}
    for one in objects:
        together = one.get("allOf")
        needs = [[part] for part in together] if isinstance(together, list) else []
        needs += [ways for ways in map(one.get, _WAYS) if isinstance(ways, list) and ways]
        if isinstance(target := targets.get(id(one)), dict):
            needs.append([target])
        open_needs = [need for need in needs if all(isinstance(part, dict) for part in need)]
        num_left[id(one)] = len(open_needs)
        for number, need in enumerate(open_needs):
            for part in need:
                above.setdefault(id(part), []).append((id(one), number))
    settled = [one for one, count in num_left.items() if not count]
    met: set[tuple[int, int]] = set()
    while settled:
        for place in above.pop(settled.pop(), ()):
            if place not in met:
                met.add(place)
                num_left[place[0]] -= 1
                if not num_left[place[0]]:
                    settled.append(place[0])
    return next((one["$ref"] for one in objects if num_left[id(one)] and id(one) in targets), None)


def _num_levels(schema: Any) -> int:
    """Count the objects and lists that are in each other."""
    return max(1 + depth * isinstance(one, dict | list) for _, one, depth in _walk(schema))


def _target(schema: Mapping[str, Any], reference: str) -> Any:
    """Find what a reference names inside of a schema; None: it names nothing there by its place."""
    where, _, pointer = reference.partition("#")
    if where or (pointer and not pointer.startswith("/")):
        return None
    found: Any = schema
    for name in pointer.split("/")[1:]:
        name = unquote(name).replace("~1", "/").replace("~0", "~")
        if isinstance(found, dict):
            found = found.get(name)
        elif isinstance(found, list) and name.isascii() and name.isdecimal():
            found = found[int(name[:9])] if int(name[:9]) < len(found) else None
        else:
            found = None
    return found


def _num_together(one: Any, targets: Mapping[int, Any], known: dict[int, int]) -> int:
    """Count the patterns and formats that a text of this schema must match, each once.

    Args:
        one: the schema.
        targets: what references name, by the `id` of what holds them.
        known: what was counted already; is added to.
    """
    if not isinstance(one, dict):
        return 0
    if id(one) not in known:
        known[id(one)] = 0  # what refers to itself is counted once
        parts = one.get("allOf")
        inner = [*parts] if isinstance(parts, list) else []
        inner.append(targets.get(id(one)))
        count = sum(isinstance(one.get(name), str) for name in ("pattern", "format"))
        count += sum(_num_together(part, targets, known) for part in inner)
        for ways in (one.get(name) for name in _WAYS):
            if isinstance(ways, list):
                count += max((_num_together(way, targets, known) for way in ways), default=0)
        known[id(one)] = count
    return known[id(one)]


def _num_branches(ways: Any) -> int:
    """Count the ways that may be objects or lists; one that is alone is told from the others."""
    if not isinstance(ways, list):
        return 0
    found = sum(
        not (isinstance(way, dict) and ("const" in way or "enum" in way or _is_plain(way)))
        for way in ways
    )
    return found if found > 1 else 0


def _is_plain(way: dict[str, Any]) -> bool:
    kind = way.get("type")
    return isinstance(kind, str) and kind in _PLAIN


def _bounded(key: str, number: float, steps: int) -> int:
    """Check a number of a schema; give how many steps its multiples take with those before."""
    if not -_FAR < number < _FAR:  # nor if it is no number
        raise InvalidRequest(
            f"grammar: a schema's {key[:40]!a} is {_show(number)}, which is too far"
        )
    if key != "multipleOf" or not number:
        return steps
    top = int("".join(map(str, Decimal(repr(number)).as_tuple().digits)))
    for easy in (2, 5):
        while top % easy == 0:
            top //= easy
    steps = math.lcm(steps, top)
    if steps > MOST_STEPS:
        raise InvalidRequest(
            f"grammar: multipleOf {_show(number)} would take {steps:,} steps, with those "
            f"beside it; at most {MOST_STEPS:,}"
        )
    return steps


def _walk(schema: Any) -> Iterator[tuple[str, Any, int]]:
    """Give all values in a schema, each with the name that it stands under, and how deep."""
    left: list[tuple[str, Any, int]] = [("", schema, 0)]
    while left:
        key, one, depth = left.pop()
        yield key, one, depth
        if isinstance(one, dict):
            left.extend((name, inner, depth + 1) for name, inner in one.items())
        elif isinstance(one, list):
            left.extend((key, inner, depth + 1) for inner in one)


def _literal(text: str, special: Mapping[str, int]) -> str:
    """Write a text, of which some parts may be tokens of their own."""
    names = [name for name in special if name in text]
    parts = [text]
    if names:
        longest_first = sorted(names, key=len, reverse=True)
        parts = re.split("(" + "|".join(map(re.escape, longest_first)) + ")", text)
    return " ".join(
        f"<[{special[part]}]>" if part in special else json_text(part) for part in parts if part
    )


def _known(given: dict[str, Any], names: set[str], where: str) -> dict[str, Any]:
    found = {name: one for name, one in given.items() if one is not None}
    if unknown := sorted(found.keys() - names):
        raise InvalidRequest(f"{where}: {unknown[0][:40]!a} is unknown; known are {sorted(names)}")
    return found


def _text(found: Mapping[str, Any], name: str, where: str) -> str:
    value = found.get(name, "")
    if not isinstance(value, str) or len(value) > LONGEST_TEXT:
        raise InvalidRequest(
            f"{where}.{name} is {_show(value)}; it takes a text of up to {LONGEST_TEXT} characters"
        )
    if any("\ud800" <= char <= "\udfff" for char in value):
        raise InvalidRequest(f"{where}.{name} holds half a character (U+D800 to U+DFFF)")
    return value


def _flag(found: Mapping[str, Any], name: str, where: str) -> bool:
    value = found.get(name, False)
    if not isinstance(value, bool):
        raise InvalidRequest(f"{where}.{name} is {_show(value)}; it takes true or false")
    return value


def _show(value: Any) -> str:
    if isinstance(value, dict):
        return "an object"
    if isinstance(value, list):
        return f"a list of {len(value):,}"
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > _FAR:
        return f"a number of {value.bit_length()} bits"
    text = json_text(value) if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
