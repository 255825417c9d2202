"""Text for training small models: generated conversations in five scenarios, and the sources of Python's own library.

Every generator is a pure function of a `random.Random`. An answer's free choices follow from its request wherever they
can, so that a small model is able to learn them.
"""

import random
import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from mimo_jax.chat_template import ChatTemplate


@dataclass(frozen=True)
class Document:
    """One training example: a conversation, or plain text."""

    scenario: str
    """`web`, `math`, `code`, `chat`, `edits` or `drills`."""
    messages: tuple[dict[str, str], ...] = ()
    """Role (user or assistant, in turns) and content; empty for plain text."""
    text: str | None = None
    """Plain text; None for a conversation."""

    def render(self, template: ChatTemplate) -> str:
        """The document as a model reads it: plain text as it is, a conversation through the chat template."""
        if self.text is not None:
            return self.text
        return template.render(self.messages, add_generation_prompt=False)


RESERVED_SHARE = 20
"""One request (of the library: one document) in so many is kept out of training, for evaluation."""


def is_reserved(document: Document) -> bool:
    """Whether a document is kept for evaluation; its first request decides, so no later turn gives it away."""
    key = document.messages[0]["content"] if document.messages else document.text or ""
    return zlib.crc32(key.encode()) % RESERVED_SHARE == 0  # not `hash`, which differs between processes


def conversation(scenario: str, *turns: str) -> Document:
    """A conversation whose turns alternate between user and assistant, the user's first."""
    roles = ("user", "assistant")
    return Document(scenario, tuple({"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)))


def listed(parts: Sequence[str]) -> str:
    """Parts as an enumeration in a sentence: `a`, `a and b`, `a, b and c`."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def a_or_an(noun: str) -> str:
    """A noun behind its indefinite article."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def capitalized(text: str) -> str:
    """Text with its first letter in upper case, the others untouched."""
    return text[:1].upper() + text[1:]


def sample(rng: random.Random, stock: Sequence[str], low: int, high: int) -> list[str]:
    """Between `low` and `high` different entries of a stock, in the stock's own order."""
    chosen = sorted(rng.sample(range(len(stock)), rng.randint(low, high)))
    return [stock[i] for i in chosen]


def request_pattern(template: str) -> re.Pattern[str]:
    """A request template (a format string) as a pattern of all requests it can make, and many more."""
    parts = (re.escape(text) + ("" if field is None else "(?:.+)") for text, field, _, _ in Formatter().parse(template))
    return re.compile("".join(parts), re.DOTALL)
