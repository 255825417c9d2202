"""A constraint that waits for the end of the thinking, over real grammars."""

import numpy as np
import pytest

from serve.constraint import ConstraintCompiler
from serve.text.reasoning import Thinking
from serve.text.thinking_constraint import AfterThinking
from tests.serving.text_server import VOCABULARY, byte_tokenizer

TOKENIZER = byte_tokenizer()
OPEN, CLOSE = TOKENIZER.encode("<think></think>")
EOS = TOKENIZER.eos_ids
WORDS = -(-VOCABULARY // 32)


@pytest.fixture(scope="module")
def compiler():
    return ConstraintCompiler(TOKENIZER, VOCABULARY, EOS)


def allowed(constraint, drafts=()):
    """For each prefix of the drafts, the ids that may follow."""
    masks = np.zeros((len(drafts) + 1, WORDS), np.int32)
    constraint.fill_masks(drafts, masks)
    bits = np.unpackbits(masks.view(np.uint8), axis=1, bitorder="little")[:, :VOCABULARY]
    return [set(np.flatnonzero(row).tolist()) for row in bits]


def ids(text):
    return TOKENIZER.encode(text)


EVERYTHING = set(range(VOCABULARY))
AWAKE = EVERYTHING - set(EOS)


def test_it_may_think_or_not(compiler):
    bare = compiler.compile("regex", "ab")
    constraint = AfterThinking(bare, Thinking.BEFORE, TOKENIZER, EOS)
    [start] = allowed(constraint)
    assert start == allowed(bare)[0] | {OPEN}
    a, b, x = ids("abx")
    # thinking, its end, and what the expression wants
    rows = allowed(constraint, [OPEN, x, CLOSE, a])
    assert rows == [start, AWAKE, AWAKE, allowed(bare)[0], *allowed(bare, [a])[1:]]
    # no thinking
    assert allowed(constraint, [a, b]) == [start, *allowed(bare, [a, b])[1:]]
    assert allowed(constraint, [a, b])[2] == set(EOS)


def test_it_advances(compiler):
    bare = compiler.compile("regex", "ab")
    constraint = AfterThinking(bare, Thinking.BEFORE, TOKENIZER, EOS)
    a, b, x = ids("abx")
    other = constraint.copy()
    constraint.advance([OPEN, x])
    assert allowed(constraint) == [AWAKE]
    constraint.advance([x, CLOSE, a])
    assert allowed(constraint) == [{b}]
    constraint.advance([b])
    assert allowed(constraint) == [set(EOS)]
    # the copy stood still, and goes its own way
    assert OPEN in allowed(other)[0]
    other.advance([a])
    assert allowed(other) == [{b}]


def test_a_prompt_that_opened_the_thinking(compiler):
    a, b = ids("ab")
    constraint = AfterThinking(compiler.compile("regex", "ab"), Thinking.INSIDE, TOKENIZER, EOS)
    assert allowed(constraint, [OPEN, CLOSE, a])[:2] == [AWAKE, AWAKE]
    constraint.advance([a, CLOSE])
    constraint.advance([a])
    assert allowed(constraint) == [{b}]


def test_advancing_in_any_portions_is_the_same(compiler):
    tokens = [OPEN, *ids("hm, a<"), CLOSE, *ids('{"a":1')]
    constraint = AfterThinking(compiler.compile("json_schema", "{}"), Thinking.BEFORE, TOKENIZER, EOS)
    expected = allowed(constraint, tokens)[-1]
    assert expected < EVERYTHING
    for size in (1, 2, 5, len(tokens)):
        other = constraint.copy()
        for i in range(0, len(tokens), size):
            other.advance(tokens[i : i + size])
        assert allowed(other) == [expected]
