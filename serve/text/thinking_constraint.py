"""A constraint on what an answer says, which leaves its thinking free."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mimo_jax.tokenizer import Tokenizer
from serve.generation import Constraint
from serve.text.reasoning import CLOSE, OPEN, Thinking


class AfterThinking:
    """Holds from the end of the thinking on, or from the beginning of an answer that does not think.

    While it thinks, the model may write anything but an end of text.

    Args:
        constraint: On what comes after.
        thinking: Where the prompt leaves the answer.
        tokenizer: Has the two tags as tokens.
        eos_ids: The model's end-of-text tokens.
    """

    def __init__(
        self, constraint: Constraint, thinking: Thinking, tokenizer: Tokenizer, eos_ids: Sequence[int]
    ) -> None:
        self._constraint, self._thinking = constraint, thinking
        self._open, self._close = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
        self._eos_ids = tuple(eos_ids)

    def fill_masks(self, drafts: Sequence[int], masks: Any) -> None:
        """Say what is allowed after each prefix of some drafts."""
        thinking = self._thinking
        for i in range(len(drafts) + 1):
            if thinking is Thinking.INSIDE:
                masks[i] = -1
                for token in self._eos_ids:
                    masks[i, token // 32] &= ~_bit(token)
            else:
                opens = thinking is Thinking.BEFORE and i < len(drafts) and drafts[i] == self._open
                # what follows an opened thinking is not for the constraint to judge
                rest = () if opens else drafts[i:]
                self._constraint.fill_masks(rest, masks[i : i + len(rest) + 1])
                if thinking is Thinking.BEFORE and self._open is not None:
                    masks[i, self._open // 32] |= _bit(self._open)
                if not opens:
                    return
            if i < len(drafts):
                thinking = self._after(drafts[i], thinking)

    def advance(self, tokens: Sequence[int]) -> None:
        """Take tokens that stand."""
        for i, token in enumerate(tokens):
            before, self._thinking = self._thinking, self._after(token, self._thinking)
            if before is not Thinking.INSIDE and self._thinking is Thinking.AFTER:
                self._constraint.advance(tokens[i:])
                return

    def copy(self) -> "AfterThinking":
        """One in the same state that advances on its own."""
        other = object.__new__(AfterThinking)
        other.__dict__.update(self.__dict__)
        other._constraint = self._constraint.copy()
        return other

    def _after(self, token: int, thinking: Thinking) -> Thinking:
        if thinking is Thinking.BEFORE:
            return Thinking.INSIDE if token == self._open else Thinking.AFTER
        return Thinking.AFTER if token == self._close else thinking


def _bit(token: int) -> np.int32:
    """The token's bit in its word of a mask."""
    return np.uint32(1 << token % 32).view(np.int32)
