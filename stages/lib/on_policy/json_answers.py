"""Whether a text is JSON that a JSON schema allows, as the package jsonschema says.

Called in a process of its own: a `pattern` of a schema may take forever on what a policy writes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, NoReturn


def load_jsonschema() -> None:
    """Loads what the first check would load."""
    is_valid("0", {"type": "integer"})


def validator_of(schema: Any) -> Any:
    """What validates by the schema; a schema without `$schema` is of the draft 2020-12. Nothing is fetched for a `$ref`."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    return validator_for(schema, default=Draft202012Validator)(schema, registry=Registry())


def schema_fault(schema: Any) -> str | None:
    """What is wrong with a schema, or None."""
    from jsonschema.exceptions import SchemaError

    if not isinstance(schema, dict | bool):
        return "a JSON schema is an object, or true or false"
    try:
        validator = validator_of(schema)
        type(validator).check_schema(schema)
    except SchemaError as error:
        return f"{error.json_path}: {error.message[:200]}"
    except re.error as error:
        return f"a pattern is no regular expression: {error}"
    for reference in outer_references(schema):
        return f"$ref {reference!r} leads out of the schema, and nothing is fetched: write its text under $defs"
    return None


def outer_references(schema: Any) -> Iterator[str]:
    """Each `$ref` that does not begin with `#` and is no `$id` of a part of the schema."""
    inner = {part["$id"] for part in schema_parts(schema) if isinstance(part.get("$id"), str)}
    for part in schema_parts(schema):
        reference = part.get("$ref")
        if isinstance(reference, str) and not reference.startswith("#") and reference.partition("#")[0] not in inner:
            yield reference


def schema_parts(schema: Any) -> Iterator[dict[str, Any]]:
    """Every object within the schema, itself included."""
    waiting = [schema]
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            yield part
        waiting += part.values() if isinstance(part, dict) else part if isinstance(part, list) else []


def refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def is_valid(text: str | None, schema: Any) -> float:
    """1 if the text is JSON that the schema allows, else 0."""
    if text is None:
        return 0.0
    try:
        value = json.loads(text, parse_constant=refuse_constant)
    except (ValueError, RecursionError):
        return 0.0
    return float(validator_of(schema).is_valid(value))
