"""Thinking and tool calls in streamed text: any cutting of the stream gives the same, and nothing is lost."""

import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mimo_jax.byte_tokenizer import write_byte_tokenizer
from mimo_jax.chat_template import ChatTemplate, default_chat_template
from mimo_jax.tokenizer import Tokenizer
from serve.text.reasoning import ReasoningParser, Thinking, thinking_of_prompt
from serve.text.tool_arguments import typed_value
from serve.text.tool_calls import ToolCall, ToolCallParser

SCHEMA = {
    "type": "object",
    "properties": {"text": {"type": "string"}, "count": {"type": "integer"}, "extra": {}},
}
OFFERED = {"write": SCHEMA, "stop": {}}

PIECES = [
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<function=write>",
    "<function=stop>",
    "<function=unknown>",
    "</function>",
    "<parameter=text>",
    "<parameter=count>",
    "</parameter>",
    "<parameter=",
    "<tool_",
    "</th",
    "\n",
    " ",
    "<",
    ">",
    "12",
    "é",
]
CALL = "<tool_call>\n<function=write>\n<parameter=text>a\n b</parameter>\n</function>\n</tool_call>"
answers = st.lists(st.one_of(st.sampled_from([*PIECES, CALL]), st.text(max_size=4)), max_size=14).map("".join)


@st.composite
def cut_answers(draw):
    text = draw(answers)
    marks = sorted(draw(st.lists(st.integers(0, len(text)), max_size=12)))
    return text, [text[a:b] for a, b in zip([0, *marks], [*marks, len(text)], strict=True)]


def split_reasoning(pieces, thinking):
    parser = ReasoningParser(thinking)
    given = [*(parser.push(p) for p in pieces), parser.flush()]
    return "".join(r for r, _ in given), "".join(t for _, t in given)


def find_calls(pieces, offered=OFFERED):
    parser = ToolCallParser(offered)
    given = [parser.push(p) for p in pieces]
    return "".join(t for t, _ in given) + parser.flush(), [c for _, calls in given for c in calls]


class TestReasoning:
    @given(cut=cut_answers(), thinking=st.sampled_from(Thinking))
    def test_cuts_do_not_matter(self, cut, thinking):
        text, pieces = cut
        assert split_reasoning(pieces, thinking) == split_reasoning([text], thinking)

    @given(text=answers, thinking=st.sampled_from(Thinking))
    def test_equals_a_regular_expression(self, text, thinking):
        opening = {Thinking.BEFORE: r"\s*<think>", Thinking.INSIDE: "", Thinking.AFTER: "(?!)"}[thinking]
        match = re.match(rf"{opening}(.*?)(?:</think>(.*)|\Z)", text, re.DOTALL)
        assert split_reasoning([text], thinking) == ((match[1], match[2] or "") if match else ("", text))

    def test_text_is_not_held_longer_than_it_may_be_a_tag(self):
        parser = ReasoningParser()
        assert parser.push("<thi") == ("", "")
        assert parser.push("nk>yes</") == ("yes", "")
        assert parser.push("b></think") == ("</b>", "")
        assert parser.push(">no</think>") == ("", "no</think>")

    def test_where_a_prompt_leaves_the_answer(self, tmp_path):
        write_byte_tokenizer(tmp_path, 300)
        tokenizer = Tokenizer.from_folder(tmp_path)
        said = [{"role": "user", "content": "<think> is a tag"}]
        assert thinking_of_prompt(tokenizer, tokenizer.encode_chat(said)) is Thinking.BEFORE
        off = tokenizer.encode_chat(said, enable_thinking=False)
        assert thinking_of_prompt(tokenizer, off) is Thinking.AFTER
        opened = [*tokenizer.encode_chat(said), *tokenizer.encode("<think>\n")]
        assert thinking_of_prompt(tokenizer, opened) is Thinking.INSIDE


class TestToolCalls:
    @given(cut=cut_answers())
    def test_cuts_do_not_matter(self, cut):
        text, pieces = cut
        assert find_calls(pieces) == find_calls([text])

    @given(cut=cut_answers())
    def test_what_is_no_call_is_text_to_the_letter(self, cut):
        text, pieces = cut
        assert find_calls(pieces, {}) == (text, [])

    @given(text=answers)
    def test_equals_a_regular_expression(self, text):
        value = r"<parameter=(?:text|count)>(?:(?!</parameter>).)*</parameter>\s*"
        call = rf"<tool_call>\s*<function=(write|stop)>\s*((?:{value})*)</function>\s*</tool_call>"
        names = []

        def note(match):
            keys = re.findall(r"<parameter=(\w+)>(?:(?!</parameter>).)*</parameter>", match[2], re.DOTALL)
            if len(set(keys)) < len(keys):
                return match[0]
            names.append(match[1])
            return ""

        # an open value swallows what a pattern would find in it: the end of the text settles it, and here it is text
        rest = re.sub(call, note, text, flags=re.DOTALL)
        found, calls = find_calls([text])
        if len(calls) == len(names):
            assert (found, [c.name for c in calls]) == (rest, names)
        else:
            assert len(calls) < len(names)
            assert re.search(r"<tool_call>\s*<function=(write|stop)>\s*(.*?)<parameter=", found, re.DOTALL)

    @given(
        calls=st.lists(
            st.builds(
                ToolCall,
                st.just("write"),
                st.fixed_dictionaries(
                    {},
                    optional={
                        "text": st.text().filter(lambda s: "</parameter>" not in s),
                        "count": st.integers(),
                        "extra": st.one_of(
                            st.booleans(), st.none(), st.lists(st.integers()), st.dictionaries(st.text(), st.text())
                        ),
                    },
                ),
            ),
            min_size=1,
            max_size=3,
        ),
        size=st.integers(1, 9),
    )
    def test_what_the_template_writes_is_read_back(self, calls, size):
        said = [{"function": {"name": c.name, "arguments": c.arguments}} for c in calls]
        turn = {"role": "assistant", "content": "Well.", "tool_calls": said}
        text = ChatTemplate(default_chat_template()).render([{"role": "user", "content": "?"}, turn])
        text = text.split("</think>", 1)[1].rsplit("<|im_end|>", 1)[0]
        pieces = [text[i : i + size] for i in range(0, len(text), size)]
        if all("</parameter>" not in json.dumps(c.arguments, ensure_ascii=False) for c in calls):
            assert find_calls(pieces) == ("Well.", calls)

    def test_a_value_may_hold_tags(self):
        value = "x </tool_call> </function> <tool_call>"
        text = f"<tool_call><function=write><parameter=text>{value}</parameter></function></tool_call>"
        assert find_calls([text]) == ("", [ToolCall("write", {"text": value})])

    @pytest.mark.parametrize(
        "text",
        [
            "<tool_call>write</tool_call>",
            "<tool_call><function=unknown></function></tool_call>",
            "<tool_call><function=write><parameter=>1</parameter></function></tool_call>",
            "<tool_call><function=write><parameter=text>1</parameter><parameter=text>2</parameter></function></tool_call>",
            "<tool_call><function=write>text</function></tool_call>",
            "<tool_call><function=write></tool_call>",
            "<tool_call><function=write><parameter=text>never closed</function></tool_call>",
        ],
    )
    def test_a_malformed_call_is_text_and_the_next_one_counts(self, text):
        assert find_calls([text]) == (text, [])
        if "never" not in text:
            assert find_calls([text + CALL]) == (text, [ToolCall("write", {"text": "a\n b"})])

    def test_it_is_known_for_malformed_as_soon_as_it_is(self):
        parser = ToolCallParser(OFFERED)
        assert parser.push("so: <tool_call>\n<func") == ("so: ", [])
        assert parser.push("!") == ("<tool_call>\n<func!", [])

    def test_long_values_take_linear_time(self):
        parser = ToolCallParser(OFFERED)
        parser.push("<tool_call><function=write><parameter=text>")
        for _ in range(20_000):
            parser.push("0123456789")
        _, [call] = parser.push("</parameter></function></tool_call>")
        assert call.arguments == {"text": "0123456789" * 20_000}


@pytest.mark.parametrize(
    ("schema", "text", "value"),
    [
        ({"type": "string"}, " 12\n", " 12\n"),
        ({"type": "string"}, '"quoted"', '"quoted"'),
        ({"type": "integer"}, "\n12\n", 12),
        ({"type": "integer"}, "12.0", 12),
        ({"type": "integer"}, "12.5", "12.5"),
        ({"type": "integer"}, "true", "true"),
        ({"type": "number"}, "12", 12),
        ({"type": "number"}, "NaN", "NaN"),
        ({"type": "boolean"}, "True", True),
        ({"type": "boolean"}, "false", False),
        ({"type": "array"}, '[1, "a"]', [1, "a"]),
        ({"type": "object"}, '{"a": {}}', {"a": {}}),
        ({"type": "object"}, "{a}", "{a}"),
        ({"type": ["string", "null"]}, "null", None),
        ({"type": ["string", "null"]}, "12", "12"),
        ({"enum": ["1", "2"]}, "1", "1"),
        ({"enum": [1, 2]}, "1", 1),
        ({"const": None}, "None", None),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/list"}]}, "[1]", [1]),
        ({"anyOf": [{"type": "integer"}, {"$ref": "#/$defs/list"}]}, "one", "one"),
        ({"$ref": "#/$defs/loop"}, "1", 1),
        ({}, '{"a": 1}', {"a": 1}),
        ({}, '"text"', '"text"'),
        ({}, "[" * 100_000, "[" * 100_000),
        (None, "1", 1),
    ],
)
def test_typed_values(schema, text, value):
    root = {"properties": {"key": schema} if schema is not None else {}}
    root["$defs"] = {"list": {"type": "array"}, "loop": {"$ref": "#/$defs/loop"}}
    got = typed_value(text, "key", root)
    assert (got, type(got)) == (value, type(value))
