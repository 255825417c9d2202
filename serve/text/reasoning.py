"""An answer's thinking apart from what it says: `<think>...</think>` at its beginning."""

from collections.abc import Sequence
from enum import Enum

from mimo_jax.tokenizer import Tokenizer, overlap

OPEN, CLOSE = "<think>", "</think>"


class Thinking(Enum):
    """Where an answer stands."""

    BEFORE = "before"
    """It may yet open with `<think>`."""
    INSIDE = "inside"
    AFTER = "after"


def thinking_of_prompt(tokenizer: Tokenizer, prompt_ids: Sequence[int]) -> Thinking:
    """Where a conversation's prompt leaves the answer: a template may open the thinking, or open and close it.

    Only what follows the last special token counts, which only the template can have written.
    """
    opened, closed = tokenizer.token_id(OPEN), tokenizer.token_id(CLOSE)
    for token in reversed(prompt_ids):
        if token == closed:
            return Thinking.AFTER
        if token == opened:
            return Thinking.INSIDE
        if token in tokenizer.special_ids:
            break
    return Thinking.BEFORE


class ReasoningParser:
    """Splits a streamed answer, wherever its pieces were cut.

    Nothing is lost but the two tags, and blanks before the first: thinking and text are exact to the line break.
    """

    def __init__(self, thinking: Thinking = Thinking.BEFORE) -> None:
        self._thinking = thinking
        self._held = ""

    def push(self, text: str) -> tuple[str, str]:
        """Take more of the answer; gives thinking and text that are certain."""
        if self._thinking is Thinking.AFTER:
            return "", text
        text, self._held = self._held + text, ""
        if self._thinking is Thinking.BEFORE:
            bare = text.lstrip()
            if OPEN.startswith(bare):
                if bare != OPEN:
                    self._held = text
                    return "", ""
            elif not bare.startswith(OPEN):
                self._thinking = Thinking.AFTER
                return "", text
            self._thinking, text = Thinking.INSIDE, bare[len(OPEN) :]
        thoughts, tag, rest = text.partition(CLOSE)
        if tag:
            self._thinking = Thinking.AFTER
            return thoughts, rest
        certain = len(text) - overlap(text, CLOSE)
        self._held = text[certain:]
        return text[:certain], ""

    def flush(self) -> tuple[str, str]:
        """End the answer: what was held back is no tag after all."""
        rest, self._held = self._held, ""
        return (rest, "") if self._thinking is Thinking.INSIDE else ("", rest)
