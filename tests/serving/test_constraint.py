"""Constraints: random walks along the masks always give text that independent judges accept."""

import json
import random
import re

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mimo_jax.presets import NANO
from mimo_jax.tokenizer import Tokenizer
from serve.constraint import MAX_EBNF_RULES, MAX_TEXT_BYTES, ConstraintCompiler
from serve.generation import InvalidRequest, Unsupported

TOKENIZER = Tokenizer.from_folder(NANO)
VOCABULARY = TOKENIZER.vocab_size + 45
"""Padded beyond the tokenizer's, and to no whole number of words."""
EOS = set(TOKENIZER.eos_ids)
COMPILER = ConstraintCompiler(TOKENIZER, VOCABULARY, TOKENIZER.eos_ids)
CLOSING = [TOKENIZER.encode(c)[0] for c in '"}],:']
PEOPLE = json.dumps(
    {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
)


def masks_of(constraint, drafts=()):
    """What is allowed after each prefix of the drafts; the array holds rubbish before."""
    masks = np.full((len(drafts) + 1, -(-VOCABULARY // 32)), 0x55555555, np.int32)
    constraint.fill_masks(drafts, masks)
    return masks


def allowed(row):
    return np.flatnonzero(np.unpackbits(row.view(np.uint8), bitorder="little")).tolist()


def next_tokens(constraint):
    return allowed(masks_of(constraint)[0])


def walk(constraint, choose, hurry=40, longest=400):
    """A random output; after `hurry` tokens whatever brings its end nearer is chosen first."""
    ids = []
    while (not ids or ids[-1] not in EOS) and len(ids) < longest:
        can = next_tokens(constraint)
        assert can
        assert max(can) < TOKENIZER.vocab_size
        assert EOS.issuperset(can) or not set(can) & (TOKENIZER.special_ids - EOS)
        assert set(can) & EOS in (set(), EOS)
        ends = [t for t in (*TOKENIZER.eos_ids, *CLOSING) if t in can]
        ids.append(ends[0] if len(ids) >= hurry and ends else choose.choice(can))
        constraint.advance(ids[-1:])
        assert constraint.failure is None
    return ids


names = st.text('abcdé_"\\ ', min_size=1, max_size=4)
numbers = st.integers(-20, 200)
leaves = st.one_of(
    st.just({"type": "null"}),
    st.just({"type": "boolean"}),
    st.just({"type": "number"}),
    st.tuples(numbers, st.integers(0, 300)).map(lambda x: {"type": "integer", "minimum": x[0], "maximum": x[0] + x[1]}),
    st.integers(0, 6).map(lambda n: {"type": "string", "maxLength": n}),
    st.lists(st.one_of(names, numbers, st.none()), min_size=1, max_size=4).map(lambda values: {"enum": values}),
    names.map(lambda value: {"const": value}),
    st.sampled_from(["[a-c]{2,5}", "x(y|z)*", "\\d{3}-\\d{4}"]).map(lambda p: {"type": "string", "pattern": f"^{p}$"}),
)


def _object(fields, required):
    wanted = [name for name, must in zip(fields, required, strict=False) if must]
    return {"type": "object", "properties": fields, "required": wanted, "additionalProperties": False}


schemas = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.tuples(inner, st.integers(0, 2), st.integers(0, 2)).map(
            lambda x: {"type": "array", "items": x[0], "minItems": x[1], "maxItems": x[1] + x[2]}
        ),
        st.builds(_object, st.dictionaries(names, inner, max_size=3), st.lists(st.booleans(), min_size=3, max_size=3)),
        st.lists(inner, min_size=1, max_size=3).map(lambda options: {"anyOf": options}),
    ),
    max_leaves=6,
)

pieces = st.sampled_from(["a", "b", "é", "0", " ", "\\.", "\\*", "[a-f]", "[^a-z\\n]", "[0-9]", ".", "😀"])
regexes = st.recursive(
    # nothing unbounded inside another: Python's engine would take for ever to say no
    st.tuples(pieces, st.sampled_from(["", "*", "+"])).map("".join),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map(lambda options: f"({'|'.join(options)})"),
        st.tuples(inner, st.sampled_from(["?", "{2}", "{0,2}"])).map(lambda x: f"({x[0]}){x[1]}"),
    ),
    max_leaves=6,
)


@settings(max_examples=60, deadline=None)
@given(schemas, st.integers(0, 2**32))
def test_walks_satisfy_their_schema(schema, seed):
    constraint = COMPILER.compile("json_schema", json.dumps(schema))
    text = TOKENIZER.decode(walk(constraint, random.Random(seed)))
    jsonschema.validate(json.loads(text), schema)


@settings(max_examples=60, deadline=None)
@given(regexes, st.integers(0, 2**32))
def test_a_walk_may_end_exactly_where_its_expression_matches(regex, seed):
    constraint = COMPILER.compile("regex", regex)
    ids = walk(constraint.copy(), random.Random(seed), hurry=12, longest=30)
    for n, token in enumerate(ids):
        text = b"".join(TOKENIZER.token_bytes(i) for i in ids[:n])
        try:
            matches = re.fullmatch(regex, text.decode()) is not None
        except UnicodeDecodeError:
            matches = False
        assert EOS.issubset(next_tokens(constraint)) == matches
        constraint.advance([token])


@settings(max_examples=60, deadline=None)
@given(schemas, st.integers(0, 2**32))
def test_masks_over_drafts_are_those_of_a_copy_that_advances(schema, seed):
    choose = random.Random(seed)
    constraint = COMPILER.compile("json_schema", json.dumps(schema))
    for _ in range(12):
        drafts, expected, ahead = [], [masks_of(constraint)[0]], constraint.copy()
        while len(drafts) < 7 and choose.random() < 0.9:
            can = allowed(expected[-1])
            drafts.append(choose.choice(can))
            if drafts[-1] in EOS:
                break
            ahead.advance(drafts[-1:])
            expected.append(masks_of(ahead)[0])
        # a draft that cannot stand, or the end of the text, and what may come after it
        drafts += [choose.randrange(VOCABULARY) for _ in range(7 - len(drafts))]
        at = len(expected) - 1
        if at < 7 and drafts[at] in allowed(expected[at]) and drafts[at] not in EOS:
            drafts[at] = VOCABULARY - 1
        given_masks = masks_of(constraint, drafts)
        assert np.array_equal(given_masks[: len(expected)], expected)
        assert (given_masks[len(expected) :] == -1).all()
        assert np.array_equal(masks_of(constraint)[0], expected[0])  # nothing was advanced
        stand = drafts[: choose.randint(0, at)]
        constraint.advance(stand)
        if len(stand) == at and at < 7 and drafts[at] in EOS:
            break


def test_nothing_but_the_end_is_allowed_after_the_end():
    constraint = COMPILER.compile("regex", "a*")
    for eos in EOS:
        ended = constraint.copy()
        ended.advance([*TOKENIZER.encode("aa"), eos, 5, 6])
        assert set(next_tokens(ended)) == EOS
        ended.advance([7])
        copied = ended.copy()
        copied.advance([8])
        assert set(next_tokens(copied)) == EOS
    assert set(next_tokens(constraint)) - EOS == {t for t in range(VOCABULARY) if set(TOKENIZER.token_bytes(t)) == {97}}


@pytest.mark.parametrize("tokens", [TOKENIZER.encode("b"), [VOCABULARY - 1], list(EOS)], ids=["text", "padding", "end"])
def test_a_token_that_is_not_allowed_cannot_be_advanced_by(tokens):
    constraint = COMPILER.compile("regex", "a+")
    with pytest.raises(ValueError, match=f"does not allow token {tokens[0]}"):
        constraint.advance(tokens)


@pytest.mark.parametrize("shape", [(1, 66), (2, 65), (2, 67)])
def test_masks_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match=r"contiguous int32 of \(2, 66\)") as error:
        COMPILER.compile("regex", "a").fill_masks([3], np.zeros(shape, np.int32))
    assert str(shape) in str(error.value)


def test_plain_added_tokens_are_text_and_special_ones_are_not():
    think = TOKENIZER.token_id("<think>")
    anything = next_tokens(COMPILER.compile("regex", "(?s).*"))
    assert think in anything
    assert TOKENIZER.special_ids.intersection(anything) == EOS
    assert next_tokens(COMPILER.compile("regex", "<think>ok")) == [think]


def test_json_object():
    for seed in range(10):
        text = TOKENIZER.decode(walk(COMPILER.compile("json_object", ""), random.Random(seed), hurry=15))
        assert isinstance(json.loads(text), dict)


def test_choices():
    choices = ["yes", "yes, but", 'a "quoted" one\n', "é 😀"]
    compiled = [COMPILER.compile("choices", json.dumps(choices)) for _ in range(60)]
    found = {TOKENIZER.decode(walk(c, random.Random(seed))) for seed, c in enumerate(compiled)}
    assert found == set(choices)


LARK = 'start: "[" item ("," item)* "]"\nitem: /[0-9]{1,3}/ | start'
GBNF = 'root ::= "[" item ("," item)* "]"\nitem ::= [0-9] [0-9]? [0-9]? | root'


@pytest.mark.parametrize(("kind", "text"), [("lark", LARK), ("ebnf", LARK), ("ebnf", GBNF)])
def test_grammars(kind, text):
    for seed in range(10):
        found = TOKENIZER.decode(walk(COMPILER.compile(kind, text), random.Random(seed), hurry=20))
        assert re.fullmatch(r"(\[|\d{1,3}|,|\])+", found)
        assert found.count("[") == found.count("]")
        assert "[]" not in found


CALL = {"begin": "<tool_call>get(", "schema": json.loads(PEOPLE), "end": ")</tool_call>"}
STRUCTURES = {"structures": [CALL], "triggers": ["<tool_call>"]}
TRIGGERED = {
    "type": "structural_tag",
    "format": {
        "type": "triggered_tags",
        "triggers": ["<tool_call>"],
        "tags": [
            {
                "begin": CALL["begin"],
                "content": {"type": "json_schema", "json_schema": CALL["schema"]},
                "end": CALL["end"],
            }
        ],
    },
}


@pytest.mark.parametrize("tag", [STRUCTURES, TRIGGERED], ids=["structures", "triggered"])
def test_structural_tags(tag):
    constraint = COMPILER.compile("structural_tag", json.dumps(tag))
    assert EOS.issubset(next_tokens(constraint))
    constraint.advance(TOKENIZER.encode("<think>Let me call it.</think> Well: <tool_call>"))
    assert not EOS.intersection(next_tokens(constraint))
    assert b"get(".startswith(TOKENIZER.token_bytes(next_tokens(constraint)[0]))
    text = TOKENIZER.decode(walk(constraint.copy(), random.Random(0), hurry=20, longest=900).copy())
    call, _ = json.JSONDecoder().raw_decode(text.removeprefix("get("))
    jsonschema.validate(call, CALL["schema"])
    constraint.advance(TOKENIZER.encode('get({"name": "Ada", "age": 36})</tool_call>'))
    assert EOS.issubset(next_tokens(constraint))


def test_structural_tags_that_cannot_be_expressed():
    with pytest.raises(Unsupported, match="only triggered_tags"):
        COMPILER.compile("structural_tag", '{"format": {"type": "sequence", "elements": []}}')
    one = json.loads(json.dumps(TRIGGERED))
    one["format"]["stop_after_first"] = True
    with pytest.raises(Unsupported, match="stop_after_first"):
        COMPILER.compile("structural_tag", json.dumps(one))
    special = {"structures": [{**CALL, "begin": "<|im_start|>tool"}], "triggers": ["<|im_start|>"]}
    with pytest.raises(Unsupported, match=r"<\|im_start\|> is a special token"):
        COMPILER.compile("structural_tag", json.dumps(special))


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("regex", "(", "unclosed group"),
        ("regex", "a[^\\s\\S]", "no output satisfies it"),
        ("json_schema", '{"type": "foo"}', "Invalid type: foo"),
        ("json_schema", '{"type": "array", "uniqueItems": true}', "uniqueItems"),
        ("json_schema", "[1]", "a schema is a JSON object"),
        ("json_schema", '{"type"', "Expecting"),
        ("json_schema", '{"items":' * 5000 + "{}" + "}" * 5000, "recursion"),
        ("json_schema", '{"$ref": "#"}', "no output satisfies it"),
        ("lark", "start: foo", 'unknown name: "foo"'),
        ("ebnf", "root ::= foo", "Rule 'foo' not found"),
        ("ebnf", "nonsense", "Failed to convert"),
        ("ebnf", "r ::= r\n" * (MAX_EBNF_RULES + 1), "301 rules are more than the 300"),
        ("choices", "[]", "one at least"),
        ("choices", '["a", 1]', "list of strings"),
        ("structural_tag", "{}", "malformed structural tag: KeyError: 'format'"),
        ("structural_tag", '{"structures": [], "triggers": []}', "needs triggers and tags"),
        ("structural_tag", json.dumps({**STRUCTURES, "triggers": ["<x>"]}), "no trigger begins the tag"),
        ("regex", "a" * (MAX_TEXT_BYTES + 1), "131,073 bytes are more than the 131,072"),
        ("lark", "start: " + '"a"? ' * 20000, "Too many items"),
        ("yaml", "a: b", "no such kind of constraint: yaml; there are json_schema"),
    ],
)
def test_what_is_no_constraint_is_refused(kind, text, message):
    with pytest.raises(InvalidRequest) as error:
        COMPILER.compile(kind, text)
    assert message in str(error.value)
    assert len(str(error.value)) < 600


def test_the_longest_chain_of_rules_does_not_overflow_a_stack():
    rules = [f"r{i}: r{i + 1} r{i + 1}" for i in range(6500)]
    text = "\n".join(["start: r0", *rules, 'r6500: "a"'])
    assert MAX_TEXT_BYTES * 0.9 < len(text) < MAX_TEXT_BYTES
    constraint = COMPILER.compile("lark", text)
    constraint.advance(next_tokens(constraint)[:1])
    assert constraint.failure is not None  # twice as many items with every rule
    assert set(next_tokens(constraint)) == EOS


def test_a_constraint_that_grows_too_complex_only_ends(caplog):
    constraint = COMPILER.compile("regex", "(a|b)*a(a|b){30}")  # an automaton of two to the 30 states
    choose = random.Random(0)
    a_or_b = [TOKENIZER.encode(c)[0] for c in "ab"]
    for _ in range(9000):
        drafts = choose.choices(a_or_b, k=7)
        masks = masks_of(constraint, drafts)
        if constraint.failure:
            break
        assert (masks[-1] != -1).any()
        constraint.advance(drafts)
    assert constraint.failure is not None
    assert "too many states" in constraint.failure
    assert "too many states" in caplog.text
    assert set(next_tokens(constraint)) == EOS
    assert set(next_tokens(constraint.copy())) == EOS
    constraint.advance([2038])


def test_compiled_constraints_are_kept_and_share_nothing():
    compiler = ConstraintCompiler(TOKENIZER, VOCABULARY, TOKENIZER.eos_ids, cached=2)
    first = compiler.compile("regex", "abc")
    first.advance(TOKENIZER.encode("ab"))
    assert b"abc".startswith(TOKENIZER.token_bytes(next_tokens(compiler.compile("regex", "abc"))[0]))
    for text in ("b", "abc", "c"):
        compiler.compile("regex", text)
    assert [text for _, text in compiler._compiled] == ["abc", "c"]


def test_a_model_must_have_the_tokens_that_are_needed():
    with pytest.raises(ValueError, match="smaller than the tokenizer's"):
        ConstraintCompiler(TOKENIZER, 100, TOKENIZER.eos_ids)
    with pytest.raises(ValueError, match="needs a token that ends a text"):
        ConstraintCompiler(TOKENIZER, VOCABULARY, ())
