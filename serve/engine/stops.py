"""Finds stop strings in a sequence's tokens as they come."""

from collections.abc import Sequence

from mimo_jax.tokenizer import StopStrings, StreamDecoder, Tokenizer


class StopWatcher:
    """Reads one sequence's text.

    Args:
        tokenizer: Of the model.
        stops: None of them empty.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self._decoder, self._stops = StreamDecoder(tokenizer), StopStrings(stops)

    @property
    def matched(self) -> str | None:
        """The stop string that was found."""
        return self._stops.matched

    def push(self, tokens: Sequence[int]) -> int:
        """Take more tokens; gives how many of them stand: all, or up to the one that completes a stop string."""
        for i, token in enumerate(tokens):
            self._stops.push(self._decoder.push(token))
            if self._stops.stopped:
                return i + 1
        return len(tokens)
