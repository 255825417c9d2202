"""Structural tags: text that is free until a trigger appears, such as `<tool_call>`, and then follows a schema."""

import json
from collections.abc import Iterable
from typing import Any

from llguidance import StructTag

from serve.generation import Unsupported


def structural_tag_grammar(text: str, special: Iterable[str]) -> str:
    """A grammar in llguidance's form of a structural tag in either of the JSON forms that SGLang takes.

    These are `{"structures": [{"begin", "schema", "end"}], "triggers": [...]}`, and `{"format": {"type":
    "triggered_tags", "triggers": [...], "tags": [{"begin", "content": {"type": "json_schema", "json_schema"},
    "end"}]}}`.

    Args:
        text: The JSON.
        special: How the tokenizer's special tokens are spelled; no tag can contain one.

    Raises:
        ValueError: It is malformed.
        Unsupported: It is another kind of format, of content, or a tag of special tokens.
    """
    whole = json.loads(text)
    try:
        triggers, tags = _legacy(whole) if "structures" in whole else _triggered(whole["format"])
        if not triggers or not tags or not all(isinstance(s, str) and s for s in triggers):
            raise ValueError("a structural tag needs triggers and tags")
        made = [_tag(begin, schema, end, triggers) for begin, schema, end in tags]
    except (KeyError, TypeError) as error:
        raise ValueError(f"malformed structural tag: {type(error).__name__}: {error}") from None
    for tag in made:
        if found := next((s for s in special if s in tag.begin or s in tag.end), None):
            raise Unsupported(f"structural_tag: {found} is a special token, and tags are text")
    return StructTag.to_grammar(made, assume_special=False)


def _legacy(whole: Any) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    return whole["triggers"], [(s["begin"], s["schema"], s["end"]) for s in whole["structures"]]


def _triggered(form: Any) -> tuple[Any, list[tuple[Any, Any, Any]]]:
    if form["type"] != "triggered_tags":
        raise Unsupported(f"structural_tag: formats of type {form['type']!r} are not supported, only triggered_tags")
    for option in ("at_least_one", "stop_after_first", "excludes"):
        if form.get(option):
            raise Unsupported(f"structural_tag: {option} is not supported")
    found = []
    for tag in form["tags"]:
        content = tag["content"]
        if content["type"] != "json_schema":
            raise Unsupported(f"structural_tag: content of type {content['type']!r} is not supported, only json_schema")
        found.append((tag["begin"], content["json_schema"], tag["end"]))
    return form["triggers"], found


def _tag(begin: Any, schema: Any, end: Any, triggers: Any) -> StructTag:
    if not isinstance(begin, str) or not isinstance(end, str) or not isinstance(schema, dict):
        raise ValueError("a tag's begin and end must be strings, and its schema an object")
    trigger = next((t for t in triggers if begin.startswith(t)), None)
    if trigger is None:
        raise ValueError(f"no trigger begins the tag {begin!r}")
    return StructTag(trigger=trigger, begin=begin, grammar=schema, end=end)
