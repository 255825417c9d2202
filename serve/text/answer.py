"""From the tokens of one sample to what it says, thinks and calls, round by round."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_jax.tokenizer import StopStrings, StreamDecoder, Tokenizer
from serve.text.reasoning import ReasoningParser, Thinking
from serve.text.tool_calls import ToolCall, ToolCallParser


@dataclass(frozen=True, slots=True)
class Said:
    """What became certain."""

    text: str
    reasoning: str = ""
    calls: Sequence[ToolCall] = ()


class Answer:
    """One sample's text, cut before its first stop string.

    Without `thinking` and `functions` all pieces of text together are the one-shot decoding of all ids.

    Args:
        tokenizer: Of the model.
        stop: Strings that end the text.
        thinking: Where the prompt leaves the answer, if its thinking is to come apart from its text.
        functions: The JSON schema of each offered function's parameters; calls of these come apart.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Sequence[str] = (),
        thinking: Thinking | None = None,
        functions: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        self._decoder = StreamDecoder(tokenizer)
        self._stops = StopStrings(stop) if stop else None
        self._reasoning = ReasoningParser(thinking) if thinking is not None else None
        self._calls = ToolCallParser(functions) if functions else None

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._stops.matched if self._stops else None

    def push(self, token_ids: Sequence[int]) -> Said:
        """Take a round's tokens."""
        decode = self._decoder.push
        text = "".join([decode(token) for token in token_ids])
        return self._parse(self._stops.push(text) if self._stops else text)

    def finish(self) -> Said:
        """End the sample: gives what was held back."""
        text = self._decoder.flush()
        if self._stops:
            text = self._stops.push(text) + self._stops.flush()
        said = self._parse(text)
        text, reasoning = said.text, said.reasoning
        calls = list(said.calls)
        if self._reasoning:
            thoughts, rest = self._reasoning.flush()
            reasoning += thoughts
            if self._calls:
                rest, more = self._calls.push(rest)
                calls += more
            text += rest
        if self._calls:
            text += self._calls.flush()
        return Said(text, reasoning, calls)

    def _parse(self, text: str) -> Said:
        reasoning = ""
        if self._reasoning:
            reasoning, text = self._reasoning.push(text)
        if self._calls:
            text, calls = self._calls.push(text)
            return Said(text, reasoning, calls)
        return Said(text, reasoning)
