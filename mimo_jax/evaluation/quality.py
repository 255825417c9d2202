"""What a change to a model's weights costs: perplexity on held-out text and exact answers of two checkpoints.

Both see the same text and prompts, so differences are paired: intervals are bootstrapped over documents and prompts.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo_jax.evaluation.exact import is_right
from mimo_jax.evaluation.prompts import Prompt
from mimo_jax.evaluation.score import log_probabilities
from mimo_jax.generate import Generator
from mimo_jax.request import SamplingParams

_RESAMPLES = 2000


@dataclass(frozen=True)
class Comparison:
    """One measure of two checkpoints."""

    name: str
    first: float
    second: float
    change: float
    """Of the second relative to the first, as a share."""
    low: float
    """Lower end of the change's 95 % interval."""
    high: float
    count: int
    """Documents or prompts."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self)


@dataclass(frozen=True)
class Text:
    """A held-out document: what is given, and what the model is to predict."""

    given: Sequence[int]
    answer: Sequence[int]


def losses(generator: Generator, texts: Sequence[Text], progress: Callable[[], None] = lambda: None) -> np.ndarray:
    """[documents, 2]: every document's summed loss over its answer, and its number of tokens."""
    found = []
    for text in texts:
        log_p = log_probabilities(generator.model, text.given, text.answer)
        found.append((-log_p[np.arange(len(text.answer)), text.answer].sum(), len(text.answer)))
        progress()
    return np.array(found, np.float64)


def compare_perplexity(name: str, first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Perplexities of two checkpoints from `losses` on the same documents."""

    def perplexity(rows: np.ndarray) -> np.ndarray:
        sums = rows.sum(axis=-2)
        return np.exp(sums[..., 0] / sums[..., 1])

    return _compared(name, first, second, perplexity, seed)


def exact_answers(generator: Generator, prompts: Sequence[Prompt], *, max_new_tokens: int = 256) -> np.ndarray:
    """[prompts, 1]: 1 where the greedy answer is right, else 0."""
    asked = [generator.tokenizer.encode_chat(p.messages) for p in prompts]
    completions = generator.generate_batch(asked, SamplingParams(max_new_tokens=max_new_tokens))
    right = [is_right(p, c.text) for p, c in zip(prompts, completions, strict=True)]
    return np.array(right, np.float64)[:, None]


def compare_exact(name: str, first: np.ndarray, second: np.ndarray, seed: int = 0) -> Comparison:
    """Shares of exact answers of two checkpoints from `exact_answers` on the same prompts."""
    return _compared(name, first, second, lambda rows: rows.mean(axis=-2)[..., 0], seed)


def _compared(
    name: str, first: np.ndarray, second: np.ndarray, measure: Callable[[np.ndarray], np.ndarray], seed: int
) -> Comparison:
    count = len(first)
    drawn = np.random.default_rng(seed).integers(0, count, (_RESAMPLES, count))
    one, other = measure(first[drawn]), measure(second[drawn])
    changes = np.divide(other - one, one, out=np.zeros_like(one), where=one != 0)
    low, high = np.quantile(changes, (0.025, 0.975))
    a, b = float(measure(first)), float(measure(second))
    return Comparison(name, a, b, (b - a) / a if a else 0.0, float(low), float(high), count)
