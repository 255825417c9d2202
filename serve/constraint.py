"""Constrained output: JSON schemas, regular expressions and grammars as masks over the vocabulary, by llguidance."""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, get_args

import llguidance
import numpy as np

from mimo_jax.tokenizer import Tokenizer
from serve.generation import InvalidRequest
from serve.structural_tag import structural_tag_grammar

logger = logging.getLogger(__name__)

Kind = Literal["json_schema", "json_object", "regex", "lark", "ebnf", "choices", "structural_tag"]
"""What a constraint is written in. `ebnf`: GBNF as llama.cpp and XGrammar read it, or Lark; `choices`: a JSON list of
strings; `json_object`: any JSON object, whatever the text says; `structural_tag`: SGLang's JSON form."""

MAX_TEXT_BYTES = 128 * 1024
"""Of one constraint."""
MAX_EBNF_RULES = 300
"""Of one grammar in GBNF: converting it takes time with the square of them."""

# llguidance descends into a grammar by recursion, and overflows its stack (which ends the process) on a few thousand
# rules or definitions that refer to one another in a chain. As many as MAX_TEXT_BYTES can hold fit this stack.
_STACK_BYTES = 512 * 1024 * 1024

# A lexer state takes about 2 kB, and there is a lexer in every sequence; llguidance's own limit is 250,000. Its errors
# are for the client and the log: not for dumps of what the parser holds.
_LIMITS = llguidance.LLParserLimits(max_lexer_states=50_000, verbose_errors=False)


class ConstraintCompiler:
    """Makes constraints for one model. Threads may share it.

    Args:
        tokenizer: Of the model. Special tokens but those that end a text are never allowed, except where a Lark grammar
            names one; other added tokens, such as `<think>`, are the text that they spell.
        vocab_size: Of the model's logits; ids beyond the tokenizer's are never allowed.
        eos_ids: Tokens that end a text. All are allowed exactly where the constraint may end.
        cached: How many compiled constraints are kept, the latest used.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int], *, cached: int = 128) -> None:
        if vocab_size < tokenizer.vocab_size:
            raise ValueError(f"the model's vocabulary of {vocab_size} is smaller than the tokenizer's")
        if not eos_ids:
            raise ValueError("constrained output needs a token that ends a text: the model names none")
        vocabulary: Any = _Vocabulary(tokenizer, vocab_size, eos_ids[0])
        self._tokenizer = llguidance.LLTokenizer(vocabulary, n_vocab=vocab_size, eos_token=list(eos_ids))
        self._special = [
            t for i in sorted(tokenizer.special_ids) if (t := tokenizer.token_bytes(i, skip_special=False))
        ]
        self._vocab_size, self._eos = vocab_size, frozenset(eos_ids)
        self._compiled: OrderedDict[tuple[Kind, str], llguidance.LLMatcher] = OrderedDict()
        self._cached, self._lock = cached, threading.Lock()
        self._worker = _deep_worker()

    def compile(self, kind: Kind, text: str) -> "GrammarConstraint":
        """A constraint at its beginning. Takes milliseconds, up to a second for what is just within the limits.

        Raises:
            InvalidRequest: The text is no such constraint, is too large or too complex, or no output can satisfy it.
            Unsupported: It is a structural tag of a kind that cannot be expressed.
        """
        if kind not in get_args(Kind):
            raise InvalidRequest(f"no such kind of constraint: {kind}; there are {', '.join(get_args(Kind))}")
        key = (kind, "" if kind == "json_object" else text)
        with self._lock:
            matcher = self._compiled.get(key)
            if matcher is not None:
                self._compiled.move_to_end(key)
        if matcher is None:
            matcher = self._worker.submit(self._compile, kind, text).result()
            with self._lock:
                self._compiled[key] = matcher
                while len(self._compiled) > self._cached:
                    self._compiled.popitem(last=False)
        return GrammarConstraint(matcher.deep_copy(), self._vocab_size, self._eos)

    def _compile(self, kind: Kind, text: str) -> llguidance.LLMatcher:
        if (size := len(text.encode(errors="replace"))) > MAX_TEXT_BYTES:
            raise InvalidRequest(f"{kind}: {size:,} bytes are more than the {MAX_TEXT_BYTES:,} that are allowed")
        try:
            grammar = self._grammar(kind, text)
        except (ValueError, RecursionError) as error:  # both also of llguidance's own converters
            raise InvalidRequest(f"{kind}: {_brief(error)}") from None
        matcher = llguidance.LLMatcher(self._tokenizer, grammar, limits=_LIMITS, log_level=0)
        if not matcher.is_error():
            matcher.compute_bitmask()  # finds out whether anything can come first, and whether that is within limits
        if matcher.is_error():
            raise InvalidRequest(f"{kind}: {_reason(matcher)}")
        return matcher

    def _grammar(self, kind: Kind, text: str) -> str:
        match kind:
            case "json_object":
                return _json_grammar('{"type": "object"}')
            case "json_schema":
                if not isinstance(json.loads(text), dict | bool):
                    raise ValueError("a schema is a JSON object")
                return _json_grammar(text)
            case "choices":
                choices = json.loads(text)
                if not isinstance(choices, list) or not choices or not all(isinstance(c, str) for c in choices):
                    raise ValueError("expected a JSON list of strings, one at least")
                return llguidance.grammar_from("choice", text)
            case "structural_tag":
                return structural_tag_grammar(text, [t.decode() for t in self._special])
            case "ebnf":
                if (rules := text.count("::=")) > MAX_EBNF_RULES:
                    raise ValueError(f"{rules:,} rules are more than the {MAX_EBNF_RULES:,} that are allowed")
                return llguidance.grammar_from("ebnf", text)
            case _:
                return llguidance.grammar_from(kind, text)


def _json_grammar(schema: str) -> str:
    """JSON as machines write it: a model in doubt would otherwise write white space until its tokens run out."""
    return llguidance.LLMatcher.grammar_from_json_schema(schema, overrides={"whitespace_flexible": False})


class GrammarConstraint:
    """The `Constraint` of one sequence; made by `ConstraintCompiler`.

    A constraint may turn out too complex in the middle of an output. It then allows only the end of the text, and
    `failure` says why.
    """

    def __init__(self, matcher: llguidance.LLMatcher, vocab_size: int, eos: frozenset[int]) -> None:
        self._matcher, self._vocab_size, self._eos = matcher, vocab_size, eos
        self._ended = False
        self.failure: str | None = None
        """Why nothing but the end of the text is allowed any more, where that is not the constraint's own end."""

    def fill_masks(self, drafts: Sequence[int], masks: Any) -> None:
        """See `Constraint.fill_masks`. After an end-of-text token among the drafts everything is allowed, too."""
        shape = (len(drafts) + 1, -(-self._vocab_size // 32))
        if masks.shape != shape or masks.dtype != np.int32 or not masks.flags.c_contiguous:
            raise ValueError(f"masks must be contiguous int32 of {shape}, not {masks.dtype} of {masks.shape}")
        address, row_bytes = masks.ctypes.data, masks.strides[0]
        row = 0
        while True:
            self._matcher.unsafe_compute_mask_ptr(address + row * row_bytes, row_bytes)
            row += 1
            if row > len(drafts) or self._matcher.is_error():
                break
            token = drafts[row - 1]
            # of text that it forces, llguidance would consume any split into tokens, and allows only the tokenizer's
            if token in self._eos or not masks[row - 1, token >> 5] >> (token & 31) & 1:
                break
            if not self._matcher.try_consume_tokens([token]):
                break
        masks[row:] = -1
        if self._matcher.is_error():
            self._fail()
        elif row > 1:
            self._matcher.rollback(row - 1)

    def advance(self, tokens: Sequence[int]) -> None:
        """See `Constraint.advance`. Raises `ValueError` for a token that is not allowed."""
        if self._ended:
            return
        end = next((i for i, t in enumerate(tokens) if t in self._eos), len(tokens))
        text = list(tokens[:end])
        taken = self._matcher.try_consume_tokens(text)
        if self._matcher.is_error():
            self._fail()
            return
        may_end = self._matcher.is_stopped() or self._matcher.is_accepting()
        if taken < end or (end < len(tokens) and not may_end):
            raise ValueError(f"the constraint does not allow token {tokens[taken]}, number {taken} of {list(tokens)}")
        if end < len(tokens):
            self._ended = self._matcher.consume_token(tokens[end])

    def copy(self) -> "GrammarConstraint":
        """See `Constraint.copy`."""
        other = GrammarConstraint(self._matcher.deep_copy(), self._vocab_size, self._eos)
        other._ended, other.failure = self._ended, self.failure
        return other

    def _fail(self) -> None:
        if self.failure is None:
            self.failure = _reason(self._matcher)
            logger.warning("a constraint failed in the middle of an output, which ends: %s", self.failure)


class _Vocabulary:
    """What llguidance asks of a tokenizer. It calls it for text that a grammar forces, to force its tokens, too."""

    bos_token_id = None
    is_tokenizer_wrapper = True

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_id: int) -> None:
        self.eos_token_id = eos_id
        self.special_token_ids = sorted(tokenizer.special_ids)
        known = [tokenizer.token_bytes(i, skip_special=False) for i in range(tokenizer.vocab_size)]
        self.tokens = known + [b""] * (vocab_size - len(known))
        self._encode = tokenizer.encode

    def __call__(self, text: str) -> list[int]:
        return self._encode(text)


def _deep_worker() -> ThreadPoolExecutor:
    """One thread with a stack of `_STACK_BYTES`, of which only what is used takes memory."""
    before = threading.stack_size(_STACK_BYTES)
    try:
        worker = ThreadPoolExecutor(1, "constraint")
        worker.submit(int).result()  # a pool starts its thread with the first piece of work
    finally:
        threading.stack_size(before)
    return worker


def _reason(matcher: llguidance.LLMatcher) -> str:
    message = _brief(matcher.get_error())
    return "no output satisfies it" if message.startswith("NoExtension") else message


def _brief(error: object) -> str:
    """What llguidance has to say, without the quoted grammar after it."""
    text = str(error).replace("<non-verbose/>", "").strip()
    return text if len(text) <= 500 else f"{text[:500]}..."
