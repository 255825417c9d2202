"""What a tool call's argument is: the model writes text, the tool's JSON schema says which type it stands for."""

import json
from collections.abc import Mapping
from typing import Any

_PYTHON = {"True": True, "False": False, "None": None}
"""Literals as some templates write them, and models after them."""


def typed_value(text: str, key: str, schema: Mapping[str, Any]) -> Any:
    """The value that a parameter's text stands for.

    A string parameter's value is the text itself, exactly. Any other is JSON, if it has a type that the schema allows;
    what does not fit the schema stays text, for the tool to judge.

    Args:
        text: As the model wrote it.
        key: Name of the parameter.
        schema: JSON schema of the function's parameters, a mapping with `properties`.
    """
    properties = schema.get("properties")
    declared = properties.get(key) if isinstance(properties, Mapping) else None
    allowed = value_types(declared, schema)
    if allowed == {"string"}:
        return text
    bare = text.strip()
    try:
        value = _PYTHON[bare] if bare in _PYTHON else json.loads(bare, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return text
    kind = _type(value)
    if allowed is None or kind in allowed or (kind == "integer" and "number" in allowed):
        return text if kind == "string" else value
    if kind == "number" and "integer" in allowed and value.is_integer():
        return int(value)
    return text


def value_types(schema: Any, root: Mapping[str, Any], depth: int = 8) -> set[str] | None:
    """The JSON types that a schema allows; None for any, or where it cannot be told.

    Args:
        schema: Of a value.
        root: In which its references are.
        depth: Of schemas in schemas that are looked into.
    """
    if not isinstance(schema, Mapping) or not depth:
        return None
    if isinstance(kind := schema.get("type"), str):
        return {kind}
    if isinstance(kind, list):
        return {k for k in kind if isinstance(k, str)}
    if "const" in schema:
        return {_type(schema["const"])}
    if isinstance(values := schema.get("enum"), list):
        return {_type(v) for v in values}
    if isinstance(target := schema.get("$ref"), str):
        return value_types(_resolve(target, root), root, depth - 1)
    for word in ("anyOf", "oneOf"):
        if isinstance(options := schema.get(word), list):
            found = [value_types(option, root, depth - 1) for option in options]
            return None if None in found else set().union(*(f for f in found if f))
    return None


def _resolve(target: str, root: Mapping[str, Any]) -> Any:
    """What a reference inside the same schema, such as `#/$defs/Point`, points to; None if it points nowhere."""
    place: Any = root
    for step in target.removeprefix("#/").split("/"):
        place = place.get(step) if isinstance(place, Mapping) else None
    return place


def _type(value: Any) -> str:
    """JSON's name for a value's type."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case int():
            return "integer"
        case float():
            return "number"
        case str():
            return "string"
        case list():
            return "array"
    return "object"


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no JSON")
