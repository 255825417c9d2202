"""A grammar of answers that are tool calls and nothing else, as `serve.text.tool_calls` reads them."""

import json
from collections.abc import Mapping
from typing import Any

from serve.text.tool_arguments import value_types
from serve.text.tool_calls import CLOSE, FUNCTION, FUNCTION_END, OPEN, PARAMETER, PARAMETER_END


def calls_grammar(functions: Mapping[str, Mapping[str, Any]], *, once: bool = False) -> str:
    """A grammar, in llguidance's form of Lark, of one call or more.

    Parameters come in the order of their schema, those that are not required may be missing, and none comes that the
    schema does not name. What is no string is JSON of its schema; of a string's, only `enum` and `const` hold.

    Args:
        functions: For each that may be called, the JSON schema of its parameters.
        once: Exactly one call.
    """
    rules = ["start: /\\n{0,2}/ call" + ("" if once else " (/\\n{0,2}/ call)*")]
    rules.append("call: " + " | ".join(f"f{i}" for i in range(len(functions))))
    for i, (name, schema) in enumerate(functions.items()):
        properties, required = schema.get("properties"), schema.get("required")
        properties = properties if isinstance(properties, Mapping) else {}
        required = required if isinstance(required, list) else ()
        parts = [_literal(f"{OPEN}\n{FUNCTION}{name}>\n")]
        for j, (key, declared) in enumerate(properties.items()):
            parts.append(f"f{i}p{j}" if key in required else f"f{i}p{j}?")
            rules.append(f"f{i}p{j}: {_literal(f'{PARAMETER}{key}>')} f{i}v{j} {_literal('\n')}")
            rules.append(_value(f"f{i}v{j}", declared, schema))
        rules.append(f"f{i}: {' '.join(parts)} {_literal(f'{FUNCTION_END}\n{CLOSE}')}")
    return "\n".join(rules)


def _value(rule: str, declared: Any, root: Mapping[str, Any]) -> str:
    """The rules of a parameter's value and its closing tag."""
    end, types = _literal(PARAMETER_END), value_types(declared, root)
    if types is None or "string" in types:
        texts = declared.get("enum", [declared["const"]] if "const" in declared else None) if types else None
        if texts and all(isinstance(text, str) for text in texts):
            return f"{rule}: ({' | '.join(map(_literal, texts))}) {end}"
        return f"{rule}[suffix={end}]: /(?s:.*)/"
    shared = {word: root[word] for word in ("$defs", "definitions") if word in root}
    schema = {**shared, **declared, "x-guidance": {"whitespace_flexible": False}}
    return f"{rule}: {rule}j {end}\n{rule}j: %json {json.dumps(schema)}"


def _literal(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
