"""Source `drills`: repeat, list and look up what the request says.

A small model learns from little text to write in patterns, but not to take names and numbers from what it was given:
that is learnt here, on random words that nothing else predicts.
"""

import random
from collections.abc import Callable

from mimo_jax.training.corpus import Document, conversation
from mimo_jax.training.corpus.words import BOXES, CITIES, COLORS, DAYS, MONTHS, NAMES, THINGS

_REPEAT = ("Repeat: {words}", "Say this again: {words}", "Copy this line.\n{words}")
_OFTEN = ("Repeat {n} times: {words}", "Write this line {n} times.\n{words}")
_ITEMS = ("Make a list of {words}", "Write one word a line: {words}")
_TABLE = ("Remember this.\n{table}\nWhat is {key}?", "{table}\nTell me the value of {key}.")
_MORE = ("Tell me the value of {key} now.", "And the value of {key}?")
_NEXT = ("Which word comes after {word}?\n{words}", "{words}\nWhat follows {word}?")
TEMPLATES: tuple[str, ...] = (*_REPEAT, *_OFTEN, *_ITEMS, *_TABLE, *_MORE, *_NEXT)
"""Format strings of all requests."""

_STOCK = (*NAMES, *CITIES, *DAYS, *MONTHS, *THINGS, *BOXES, *COLORS)
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def generate(rng: random.Random) -> Document:
    """One drill."""
    kinds: tuple[Callable[[random.Random], tuple[str, ...]], ...] = (_repeat, _often, _items, _table, _next)
    return conversation("drills", *rng.choices(kinds, weights=(4, 2, 2, 3, 2))[0](rng))


def _repeat(rng: random.Random) -> tuple[str, str]:
    line = " ".join(_words(rng, 4, 40))
    return rng.choice(_REPEAT).format(words=line), line


def _often(rng: random.Random) -> tuple[str, str]:
    n, line = rng.randint(2, 4), " ".join(_words(rng, 3, 16))
    return rng.choice(_OFTEN).format(n=n, words=line), "\n".join([line] * n)


def _items(rng: random.Random) -> tuple[str, str]:
    words = _words(rng, 4, 24)
    return rng.choice(_ITEMS).format(words=", ".join(words)), "\n".join(f"- {word}" for word in words)


def _table(rng: random.Random) -> tuple[str, ...]:
    keys = list(dict.fromkeys(_words(rng, 4, 12)))
    values = dict(zip(keys, _words(rng, len(keys), len(keys)), strict=True))
    asked = rng.sample(keys, 3)
    table = "\n".join(f"{key}: {value}" for key, value in values.items())
    first = rng.choice(_TABLE).format(table=table, key=asked[0])
    turns = [first, *(rng.choice(_MORE).format(key=key) for key in asked[1:])]
    return tuple(text for turn, key in zip(turns, asked, strict=True) for text in (turn, f"{key}: {values[key]}"))


def _next(rng: random.Random) -> tuple[str, str]:
    words = list(dict.fromkeys(_words(rng, 8, 30)))
    at = rng.randrange(len(words) - 1)
    request = rng.choice(_NEXT).format(word=words[at], words=" ".join(words))
    return request, f"After {words[at]} comes {words[at + 1]}."


def _words(rng: random.Random, low: int, high: int) -> list[str]:
    """Words, numbers and random letters, so that nothing but the request tells which."""
    return [_word(rng) for _ in range(rng.randint(low, high))]


def _word(rng: random.Random) -> str:
    kind = rng.random()
    if kind < 0.6:
        return rng.choice(_STOCK)
    if kind < 0.8:
        return str(rng.randint(0, 999))
    return "".join(rng.choices(_LETTERS, k=rng.randint(2, 6)))
