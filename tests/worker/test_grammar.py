"""What a line's `grammar` may be; what would take too long is refused before it is compiled."""

from __future__ import annotations

import json
from typing import Any

import pytest

from prefixcache.errors import InvalidRequest
from prefixcache_worker.grammar import (
    DEEPEST,
    MOST_CALLS,
    MOST_CHOICES,
    MOST_PROPERTIES,
    read_grammar,
)

CALL = {"begin": '{"name": "f", "arguments": ', "schema": {"type": "object"}, "end": "}"}


def nested(depth: int) -> Any:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


def many(count: int) -> dict[str, Any]:
    return {"properties": {f"p{number}": {} for number in range(count)}}


def chain(count: int, more: dict[str, Any]) -> dict[str, Any]:
    """Definitions of which each refers to the next one: from its items, its property, or itself."""
    parts: dict[str, Any] = {f"d{count}": more}
    for number in range(count):
        following = {"$ref": f"#/$defs/d{number + 1}"}
        inside = {"items": {"items": following}, "properties": {"properties": {"p": following}}}
        parts[f"d{number}"] = inside.get(next(iter(more)), more | following)
    return {"$defs": parts, "$ref": "#/$defs/d0"}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (7, "grammar is 7; it takes an object"),
        ({}, "a schema, calls, or choices are missing"),
        ({"schema": None}, "a schema, calls, or choices are missing"),
        ({"text": True}, "a schema, calls, or choices are missing"),
        ({"text": True, "schema": {}}, "a schema, calls, or choices are missing"),
        ({"schema": "x"}, "grammar.schema is 'x'; it takes a JSON schema"),
        ({"schema": False}, "grammar.schema is false; it takes a JSON schema"),
        ({"schema": {"x-guidance": {}}}, "x-guidance, which would have no effect"),
        ({"schema": {}, "lenient": 1}, "grammar.lenient is 1; it takes true or false"),
        ({"schema": {}, "lark": "x"}, "'lark' is unknown; known are"),
        ({"calls": {"each": [CALL]}, "lenient": True}, "lenient goes with a schema"),
        (
            {"calls": {"each": [CALL]}, "schema": {}, "text": True},
            "a text or of a schema, not both",
        ),
        ({"choices": ["a"], "schema": {}}, "beside choices nothing else may stand"),
        ({"choices": "yes"}, "grammar.choices is 'yes'; it takes a list of 1 to 1,024 texts"),
        ({"choices": []}, "grammar.choices is a list of 0"),
        ({"choices": ["a"] * (MOST_CHOICES + 1)}, "grammar.choices is a list of 1,025"),
        ({"choices": ["a", 7]}, "grammar.choices.1 is 7; it takes a text of up to 512"),
        ({"choices": ["a", None]}, "grammar.choices.1 is null"),
        ({"choices": ["a", ""]}, "grammar.choices.1 is empty"),
        ({"choices": ["\ud800"]}, "half a character"),
        ({"calls": [CALL]}, "grammar.calls is a list of 1; it takes an object"),
        ({"calls": {"each": []}}, "each is a list of 0; it takes a list of 1 to 128"),
        ({"calls": {"each": [CALL] * (MOST_CALLS + 1)}}, "it takes a list of 1 to"),
        ({"calls": {"each": [7]}}, r"grammar.calls.each\[0\] is 7"),
        ({"calls": {"each": [CALL | {"begin": ""}]}}, r"each\[0\].begin is missing"),
        ({"calls": {"each": [CALL | {"end": "x" * 600}]}}, "it takes a text of up to 512"),
        ({"calls": {"each": [CALL | {"end": "\ud800"}]}}, "half a character"),
        ({"calls": {"each": [CALL], "trigger": 5}}, "grammar.calls.trigger is 5"),
        ({"schema": nested(DEEPEST + 1)}, f"nested more than {DEEPEST} deep"),
        ({"schema": {"enum": ["x" * 300_000]}}, "more than 262,144 characters"),
        ({"schema": {"enum": [0] * 100_000}}, "more than 262,144 characters"),
        ({"schema": many(MOST_PROPERTIES + 1)}, "more than 2,048 properties"),
        ({"schema": {"required": ["a"] * (MOST_PROPERTIES + 1)}}, "more than 2,048 properties"),
        ({"schema": chain(1100, {"items": {}})}, "refers to has 2,202 levels together"),
        ({"schema": chain(1500, {"properties": {}})}, "refers to has 4,502 levels together"),
        ({"schema": chain(13, {"pattern": "x"})}, "14 patterns and formats must hold together"),
        ({"schema": {"allOf": [{"pattern": f"x{n}"} for n in range(20)]}}, "20 patterns and"),
        (
            {"schema": {"allOf": [{"anyOf": [{"format": "date"}, {"pattern": "x"}]}] * 13}},
            "13 patterns and formats",
        ),
        ({"schema": {"pattern": "(a?)" * 5000}}, "more than 16,384 characters"),
        ({"schema": {"patternProperties": {"(a?)" * 5000: {}}}}, "more than 16,384 characters"),
        (
            {"schema": {"$ref": "#a", "$defs": {"b": {"$anchor": "a"}}}},
            r"names a part by .anchor or .id",
        ),
        ({"schema": {"const": "\udc00"}}, "half a character"),
        ({"schema": {"$ref": "#"}}, r"\$ref '#' leads to nothing but itself"),
        ({"schema": {"items": {"$ref": ""}, "$ref": ""}}, r"\$ref '' leads to nothing but itself"),
        ({"schema": {"allOf": [{"$ref": "#"}]}}, "leads to nothing but itself"),
        ({"schema": {"anyOf": [{"$ref": "#"}, {"allOf": [{"$ref": "#"}]}]}}, "but itself"),
        (
            {
                "schema": {
                    "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"oneOf": [{"$ref": "#/$defs/a"}]}},
                    "properties": {"n": {"$ref": "#/$defs/a", "type": "string"}},
                }
            },
            "leads to nothing but itself",
        ),
        ({"schema": {"properties": {"\udc00": {}}}}, "half a character"),
        ({"schema": {"patternProperties": {"\ud83d": {}}}}, "half a character"),
        ({"schema": {"$defs": {"\udc00": {}}}}, "half a character"),
        ({"schema": {"enum": [{"a": [{"\ud800": 1}]}]}}, "half a character"),
        (
            {"schema": {"maximum": 10**4000}},
            "'maximum' is a number of 13288 bits, which is too far",
        ),
        ({"schema": {"minimum": float("-inf")}}, "'minimum' is -inf, which is too far"),
        ({"schema": {"anyOf": [{"items": {}}] * 101}}, "more than 100 ways in anyOf and oneOf"),
        ({"schema": {"multipleOf": 999_983}}, "multipleOf 999983 would take 999,983 steps"),
        ({"schema": {"multipleOf": 7.654321}}, "would take 7,654,321 steps"),
        ({"schema": {"allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, "988,027 steps"),
    ],
)
def test_what_is_no_grammar_is_refused_by_place(given: Any, said: str) -> None:
    with pytest.raises(InvalidRequest, match=said):
        read_grammar(given)


def test_two_schemas_are_bounded_together() -> None:
    half = CALL | {"schema": many(MOST_PROPERTIES // 2 + 1)}
    read_grammar({"calls": {"each": [half]}})
    with pytest.raises(InvalidRequest, match="properties"):
        read_grammar({"calls": {"each": [half, half]}})


def test_steps_that_are_easy_in_decimals_may_be_of_any_size() -> None:
    for step in (0.01, 1e-9, 1000, 10**12, 0.25, 12.5, 7.31):
        read_grammar({"schema": {"multipleOf": step}})


def test_ways_that_are_plain_values_may_be_many() -> None:
    plain = [{"type": "string"}, {"const": [1]}, {"enum": [{}]}, {"type": "null"}] * 100
    read_grammar({"schema": {"anyOf": [*plain, {"$ref": "#"}]}})
    optional = {"anyOf": [{"type": "array"}, {"type": "null"}]}
    read_grammar({"schema": {"properties": {f"p{number}": optional for number in range(300)}}})


def test_special_tokens_are_told_from_their_text() -> None:
    calls = {"trigger": "[CALLS]", "open": "[", "each": [CALL], "close": "]", "between": ", "}
    source = read_grammar({"calls": calls, "text": True}).lark({"[CALLS]": 7, "<|end|>": 1})
    start, *rules = source.splitlines()
    assert start == 'start: TEXT | TEXT <[7]> "[" call (", " call)* "]"'
    assert f'call_0: {json.dumps(CALL["begin"])} call_0_value "}}"' in rules
    plain = read_grammar({"calls": calls, "text": True}).lark({})
    assert 'head[lazy]: TEXT "[CALLS]"' in plain


def test_what_is_referred_to_may_be_as_much_as_people_write() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/n"}, "$ref": {}}}
    day = {"type": "string", "pattern": "^[0-9]+$", "format": "date"}
    fields = {f"p{number}": {"$ref": "#/$defs/day", "description": "a day"} for number in range(90)}
    parts = {"n": node, "day": day, "a/b": {"allOf": [{"$ref": "#/$defs/day"}, day]}}
    whole = {"$defs": parts, "properties": fields | {"n": {"$ref": "#/$defs/a~1b"}}}
    read_grammar({"schema": whole | {"const": {"$ref": "http://a.example/"}}})
    read_grammar({"schema": {"anyOf": [{"$ref": "#/anyOf/1"}, {"$ref": "#/anyOf/2"}, {}]}})
    read_grammar({"schema": {"anyOf": [{"$ref": "#"}, {"items": {"$ref": "#"}}], "$ref": "#/x"}})
    read_grammar({"schema": chain(200, {"items": {}})})
    read_grammar({"schema": chain(11, {"pattern": "x"})})
