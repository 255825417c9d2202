"""The mixture of all scenarios: an endless stream in which every position can be produced on its own."""

import random
from collections.abc import Callable, Iterator, Mapping
from itertools import count as count_from

from mimo_jax.training.corpus import (
    Document,
    dialogues,
    drills,
    edits,
    functions,
    is_reserved,
    library,
    math_problems,
    web,
)

_GENERATORS: dict[str, Callable[[random.Random], Document]] = {
    "web": web.generate,
    "math": math_problems.generate,
    "code": functions.generate,
    "chat": dialogues.generate,
    "edits": edits.generate,
    "drills": drills.generate,
}
SOURCES = (*_GENERATORS, "library")
"""What documents are drawn from: the five scenarios, drills, and Python's own library, whose documents belong to `code`
too."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "web": web.TEMPLATES,
    "math": math_problems.TEMPLATES,
    "code": functions.TEMPLATES,
    "chat": dialogues.TEMPLATES,
    "edits": edits.TEMPLATES,
    "drills": drills.TEMPLATES,
}
"""Format strings of every request that can occur in training, by scenario."""

DEFAULT_MIXTURE: dict[str, float] = {
    "web": 1.0, "math": 2.0, "code": 1.5, "library": 0.6, "chat": 2.0, "edits": 1.5, "drills": 3.0,
}  # fmt: skip
"""How often documents of each source are drawn; web pages and library sources are longer than the others."""


def document(seed: int, index: int, scenario_weights: Mapping[str, float] | None = None) -> Document:
    """The document at one position of the stream.

    Args:
        seed: Names the stream.
        index: Position, from 0.
        scenario_weights: How often each of `SOURCES` is drawn; the default mixture without it.

    Raises:
        ValueError: A weight for something that is no source, or none above 0.
    """
    weights = DEFAULT_MIXTURE if scenario_weights is None else scenario_weights
    if not set(weights) <= set(SOURCES):
        raise ValueError(
            f"no such source: {', '.join(sorted(set(weights) - set(SOURCES)))}; there are {', '.join(SOURCES)}"
        )
    if min(weights.values(), default=0) < 0 or sum(weights.values()) <= 0:
        raise ValueError(f"weights must not be negative and one must be above 0: {dict(weights)}")
    rng = random.Random(f"training {seed} {index}")
    source = rng.choices(list(weights), weights=list(weights.values()))[0]
    # where the library's sources are absent, generated code stands in
    return _draw(rng, source, False) or _generated(rng, "code", False)


def documents(scenario_weights: Mapping[str, float] | None = None, seed: int = 0) -> Iterator[Document]:
    """The endless stream; see `document`."""
    return (document(seed, index, scenario_weights) for index in count_from())


def held_out(scenario: str, count: int, seed: int = 0) -> list[Document]:
    """Documents for evaluation, from the same generators; their first requests are kept out of every training stream.

    Args:
        scenario: One of `SOURCES`.
        count: How many. Fewer come back only for `library` where its sources are absent.
        seed: Another seed gives other documents.

    Raises:
        ValueError: There is no such source.
    """
    if scenario not in SOURCES:
        raise ValueError(f"no such source: {scenario}; there are {', '.join(SOURCES)}")
    rngs = (random.Random(f"held out {scenario} {seed} {index}") for index in range(count))
    return [found for rng in rngs if (found := _draw(rng, scenario, True)) is not None]


def _draw(rng: random.Random, source: str, reserved: bool) -> Document | None:
    return library.generate(rng, reserved) if source == "library" else _generated(rng, source, reserved)


def _generated(rng: random.Random, source: str, reserved: bool) -> Document:
    while is_reserved(document := _GENERATORS[source](rng)) != reserved:
        pass
    return document
