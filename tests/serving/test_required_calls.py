"""Answers that must be tool calls: what the grammar allows, and that the parser reads all of it."""

import json
import random

import jsonschema
import numpy as np
import pytest

from serve.constraint import ConstraintCompiler
from serve.text.required_calls import calls_grammar
from serve.text.tool_calls import ToolCallParser
from tests.serving.text_server import VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
FUNCTIONS = {
    "weather": {
        "type": "object",
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["C", 'F"']},
            "at": {"$ref": "#/$defs/Point"},
            "anything": {},
        },
        "required": ["city", "days"],
        "$defs": {
            "Point": {
                "type": "object",
                "properties": {"x": {"type": "number"}},
                "required": ["x"],
                "additionalProperties": False,
            }
        },
    },
    "now": {},
    "odd": {"properties": [], "required": True},
}
NOW = "<tool_call>\n<function=now>\n</function>\n</tool_call>"


@pytest.fixture(scope="module")
def compiler():
    return ConstraintCompiler(TOKENIZER, VOCABULARY, TOKENIZER.eos_ids)


def weather(*parameters):
    lines = "".join(f"<parameter={key}>{value}</parameter>\n" for key, value in parameters)
    return f"<tool_call>\n<function=weather>\n{lines}</function>\n</tool_call>"


def allowed(compiler, text, once=False, functions=FUNCTIONS):
    """Whether it may be said, and that be all."""
    constraint = compiler.compile("lark", calls_grammar(functions, once=once))
    try:
        constraint.advance([*TOKENIZER.encode(text), TOKENIZER.eos_ids[0]])
    except ValueError:
        return False
    return True


def test_calls_that_keep_to_their_schema(compiler):
    tricky = "a</parameter\n<parameter=days>é"
    for given in (
        [("city", "Paris"), ("days", 3)],
        [("city", tricky), ("days", 9), ("unit", 'F"'), ("at", '{"x":-1.5e3}')],
        [("city", ""), ("days", 1), ("anything", "[] or so")],
    ):
        text = weather(*given)
        assert allowed(compiler, text)
        parser = ToolCallParser(FUNCTIONS)
        plain, (call,) = parser.push(text)
        assert plain + parser.flush() == ""
        assert call.name == "weather"
        assert [str(call.arguments["city"]), call.arguments["days"]] == [given[0][1], given[1][1]]
    assert allowed(compiler, NOW)
    assert allowed(compiler, f"\n\n{NOW}\n{weather(('city', 'x'), ('days', 2))}{NOW}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "It is noon.",
        f"{NOW} There.",
        NOW.replace("now", "later"),
        NOW.replace("</tool_call>", ""),
        weather(("city", "Paris")),
        weather(("days", 3), ("city", "Paris")),
        weather(("city", "Paris"), ("days", 10)),
        weather(("city", "Paris"), ("days", "three")),
        weather(("city", "Paris"), ("days", 3), ("unit", "K")),
        weather(("city", "Paris"), ("days", 3), ("at", "{}")),
        weather(("city", "Paris"), ("days", 3), ("colour", "red")),
    ],
)
def test_what_is_no_such_call_is_not_allowed(compiler, text):
    assert not allowed(compiler, text)


def test_one_named_tool_is_called_once(compiler):
    assert allowed(compiler, NOW, once=True, functions={"now": {}})
    assert not allowed(compiler, NOW + NOW, once=True, functions={"now": {}})
    assert not allowed(compiler, weather(("city", "x"), ("days", 1)), once=True, functions={"now": {}})


def test_whatever_is_said_under_it_is_read_as_calls_that_conform(compiler, seed):
    rng, finished = random.Random(seed), 0
    grammar = calls_grammar(FUNCTIONS)
    for _ in range(30):
        constraint, said = compiler.compile("lark", grammar), []
        for _ in range(400):
            masks = np.zeros((1, -(-VOCABULARY // 32)), np.int32)
            constraint.fill_masks([], masks)
            choices = np.flatnonzero(np.unpackbits(masks.view(np.uint8), bitorder="little")[:VOCABULARY]).tolist()
            # to come to an end, which uniform choice would not: closing what is open
            closing = [t for t in choices if chr(t) in '<"/}' or t in TOKENIZER.eos_ids] if rng.random() < 0.6 else []
            said.append(rng.choice(closing or choices))
            constraint.advance(said[-1:])
            if said[-1] in TOKENIZER.eos_ids:
                break
        if said[-1] not in TOKENIZER.eos_ids:
            continue
        finished += 1
        parser = ToolCallParser(FUNCTIONS)
        text, calls = parser.push(TOKENIZER.decode(said[:-1]))
        assert (text + parser.flush()).strip("\n") == ""
        assert calls
        for call in calls:
            if call.name == "weather":
                jsonschema.validate(json.loads(call.arguments_json), FUNCTIONS["weather"])
    assert finished >= 3
