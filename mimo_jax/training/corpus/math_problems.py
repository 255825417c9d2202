"""Scenario `math`: a problem, its solution step by step, and a last line `Answer: N`.

Every equality in a solution is made of numbers and holds, so that a reader (and a test) can check each step.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter

from mimo_jax.training.corpus import Document, conversation
from mimo_jax.training.corpus.math_stories import STORIES
from mimo_jax.training.corpus.words import BOXES, CITIES, DAYS, NAMES, THINGS

_ASKS = ("", "Solve step by step. ", "Please show the steps. ")
_SUM_ASKS = ("What is {expression}?", "Calculate {expression}.", "Work out {expression} step by step.")
_EQUATION_ASKS = (
    "Solve for {letter}: {equation}", "Find {letter} if {equation}", "What is {letter} when {equation}?",
)  # fmt: skip
_SEQUENCE_ASKS = (
    "What is the next number: {numbers}?",
    "Find the next number of the sequence {numbers}.",
    "Which number follows {numbers}?",
)
TEMPLATES: tuple[str, ...] = (
    *(ask + story.request for story in STORIES for ask in _ASKS),
    *_SUM_ASKS,
    *_EQUATION_ASKS,
    *_SEQUENCE_ASKS,
)
"""Format strings of all requests."""


def generate(rng: random.Random) -> Document:
    """One problem and its solution, at times a second one in the same conversation."""
    turns = [*_problem(rng)]
    if rng.random() < 0.3:
        turns += _problem(rng)
    return conversation("math", *turns)


def _problem(rng: random.Random) -> tuple[str, str]:
    """A request and its answer."""
    kinds: tuple[Callable[[random.Random], tuple[str, list[str], int]], ...] = (_story, _sum, _equation, _sequence)
    request, steps, answer = rng.choices(kinds, weights=(12, 2, 2, 1))[0](rng)
    lines = [f"{i}. {step}" for i, step in enumerate(steps, 1)]
    return request, "\n".join(["Let us solve this step by step.", *lines, "", f"Answer: {answer}"])


def product(one: int, other: int) -> str:
    """`a * b = c`, through tens and ones where a factor has two digits: `23 * 4 = 80 + 12 = 92`."""
    tens, ones = one - one % 10, one % 10
    if one < 10 or other < 2 or ones == 0 or other % 10 == 0:
        return f"{one} * {other} = {one * other}"
    return f"{one} * {other} = {tens} * {other} + {ones} * {other} = {tens * other} + {ones * other} = {one * other}"


@dataclass(frozen=True)
class _Numbers(Mapping[str, object]):
    """What a story's format strings may name: drawn values, and any expression of them."""

    values: dict[str, object]

    def __getitem__(self, key: str) -> object:
        return eval(key, {"__builtins__": {}, "mul": product, "min": min, "max": max}, self.values)

    def __iter__(self):
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)


def fill(text: str, numbers: Mapping[str, object]) -> str:
    """A format string with every field replaced by the value of its expression."""
    parts = Formatter().parse(text)
    return "".join(before + ("" if field is None else str(numbers[field])) for before, field, _, _ in parts)


def _story(rng: random.Random) -> tuple[str, list[str], int]:
    story = rng.choice(STORIES)
    one, other = rng.sample(NAMES, 2)
    first, second = rng.sample(THINGS, 2)
    words = {"name": one, "other": other, "things": first, "others": second, "boxes": rng.choice(BOXES)}
    words |= {"city": rng.choice(CITIES), "day": rng.choice(DAYS)}
    while True:
        values: dict[str, object] = dict(words)
        numbers = _Numbers(values)
        for name, (low, high) in story.draws.items():
            values[name] = rng.randint(low, high)
        for name, expression in story.lets.items():
            values[name] = numbers[expression]
        if numbers[story.when]:
            break
    answer = numbers[story.answer]
    assert isinstance(answer, int), story.request
    return rng.choice(_ASKS) + fill(story.request, numbers), [fill(step, numbers) for step in story.steps], answer


def _sum(rng: random.Random) -> tuple[str, list[str], int]:
    """Arithmetic without a story, of two to four numbers."""
    a, b, c = rng.randint(11, 99), rng.randint(2, 12), rng.randint(2, 99)
    d = rng.randint(2, 12)
    kind = rng.randrange(6)
    if kind == 0:
        expression, steps, answer = f"{a} * {b}", [f"Split {a} into tens and ones: {product(a, b)}."], a * b
    elif kind == 1:
        steps = [f"Multiply first: {product(a, b)}.", f"Then add: {a * b} + {c} = {a * b + c}."]
        expression, answer = f"{a} * {b} + {c}", a * b + c
    elif kind == 2:
        e = max(a, c) + rng.randint(1, 40)
        steps = [f"Start inside the brackets: {e} - {c} = {e - c}.", f"Then multiply: {product(e - c, b)}."]
        expression, answer = f"({e} - {c}) * {b}", (e - c) * b
    elif kind == 3:
        steps = [f"Add the first two: {a} + {c} = {a + c}.", f"Then add the third: {a + c} + {b} = {a + c + b}."]
        expression, answer = f"{a} + {c} + {b}", a + b + c
    elif kind == 4:
        steps = [f"Divide first: {b * d} / {d} = {b}.", f"Then add: {b} + {c} = {b + c}."]
        expression, answer = f"{b * d} / {d} + {c}", b + c
    else:
        steps = [f"First product: {a} * 2 = {a * 2}.", f"Second product: {product(b, d)}."]
        steps += [f"Then add: {a * 2} + {b * d} = {a * 2 + b * d}."]
        expression, answer = f"{a} * 2 + {b} * {d}", a * 2 + b * d
    return rng.choice(_SUM_ASKS).format(expression=expression), steps, answer


def _equation(rng: random.Random) -> tuple[str, list[str], int]:
    """A linear equation with a whole solution."""
    letter, x, a, b = rng.choice("xyzn"), rng.randint(1, 20), rng.randint(2, 9), rng.randint(1, 40)
    kind = rng.randrange(4)
    if kind == 0:
        equation = f"{a}{letter} + {b} = {a * x + b}"
        steps = [f"Take {b} away from both sides: {a * x + b} - {b} = {a * x}."]
    elif kind == 1:
        equation = f"{a}{letter} - {b} = {a * x - b}"
        steps = [f"Add {b} to both sides: {a * x - b} + {b} = {a * x}."]
    elif kind == 2:
        equation = f"{a}({letter} + {b}) = {a * (x + b)}"
        steps = [f"Divide both sides by {a}: {a * (x + b)} / {a} = {x + b}."]
        steps += [f"Take {b} away: {x + b} - {b} = {x}.", f"Check: {a} * ({x} + {b}) = {a * (x + b)}."]
    else:
        c = rng.randint(1, a - 1)
        equation = f"{a}{letter} = {c}{letter} + {(a - c) * x}"
        steps = [f"Take {c}{letter} away from both sides. On the left this leaves {a} - {c} = {a - c} times {letter}."]
        steps += [
            f"Divide by {a - c}: {(a - c) * x} / {a - c} = {x}.",
            f"Check: {a} * {x} = {c} * {x} + {(a - c) * x}.",
        ]
    if kind < 2:
        steps += [f"Now {a}{letter} stands alone. Divide both sides by {a}: {a * x} / {a} = {x}."]
        sign = "+" if kind == 0 else "-"
        steps += [f"Check: {a} * {x} {sign} {b} = {a * x} {sign} {b} = {a * x + b if kind == 0 else a * x - b}."]
    steps += [f"So {letter} is {x}."]
    return rng.choice(_EQUATION_ASKS).format(letter=letter, equation=equation), steps, x


def _sequence(rng: random.Random) -> tuple[str, list[str], int]:
    """A sequence that grows by a constant, or by a factor."""
    if rng.random() < 0.7:
        start, step = rng.randint(1, 40), rng.randint(2, 15)
        numbers = [start + step * i for i in range(5)]
        pairs = [f"From {a} to {b}: {b} - {a} = {step}." for a, b in pairwise(numbers[:4])]
        steps = [*pairs, f"Each number grows by {step}: {numbers[3]} + {step} = {numbers[4]}."]
    else:
        start, step = rng.randint(1, 6), rng.randint(2, 3)
        numbers = [start * step**i for i in range(5)]
        pairs = [f"From {a} to {b}: {b} / {a} = {step}." for a, b in pairwise(numbers[:4])]
        steps = [*pairs, f"Each number is {step} times the one before: {numbers[3]} * {step} = {numbers[4]}."]
    shown = ", ".join(str(n) for n in numbers[:4])
    return rng.choice(_SEQUENCE_ASKS).format(numbers=shown), steps, numbers[4]
