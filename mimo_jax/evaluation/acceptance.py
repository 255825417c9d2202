"""How many tokens a round of speculative decoding gives, by scenario, beside how predictable the text was.

A drafter looks good on text that repeats itself. Perplexity and entropy of the backbone on its own answers say how much
of an accepted length is the drafter's merit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mimo_jax.evaluation.score import log_probabilities
from mimo_jax.generate import Completion, Generator
from mimo_jax.request import SamplingParams
from mimo_jax.stats import DecodeStats

RELEASE_CARD = {"web": 6.30, "math": 5.56, "code": 4.54, "chat": 3.18, "edits": 4.29}
"""Accepted lengths that the release's card gives for MiMo-V2.5-Pro, of the benchmarks the scenarios follow."""


@dataclass(frozen=True)
class Acceptance:
    """One scenario at one temperature."""

    scenario: str
    temperature: float
    prompts: int
    tokens: int
    """Emitted by rounds."""
    rounds: int
    accepted_length: float
    """Tokens over rounds, the backbone's own token included."""
    per_position: list[float]
    """Share of rounds in which the draft at each position stood."""
    perplexity: float
    """Of the backbone on its own answers."""
    entropy: float
    """Mean of the backbone's distribution at the answers' positions, in nats."""

    def as_json(self) -> dict[str, Any]:
        """As plain values, the release card's figure beside."""
        return vars(self) | {"release_card": RELEASE_CARD.get(self.scenario)}


def measure(
    generator: Generator,
    scenario: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    batch: int = 8,
    progress: Callable[[int], None] = lambda answered: None,
) -> Acceptance:
    """Answer prompts speculatively and score the answers.

    Args:
        generator: With a drafter.
        scenario: Its name.
        prompts: Token ids.
        params: Settings; prompt i is sampled with seed `params.seed` + i.
        batch: Prompts at a time.
        progress: Told of every batch's number of answers.

    Raises:
        ValueError: There is no drafter, or there are no prompts.
    """
    if generator.model.drafter_config is None:
        raise ValueError("acceptance is a drafter's, and this model has none: give one with --drafter")
    if not prompts:
        raise ValueError(f"{scenario}: no prompts")
    completions: list[Completion] = []
    for start in range(0, len(prompts), batch):
        part = prompts[start : start + batch]
        settings = [replace(params, seed=params.seed + start + i) for i in range(len(part))]
        completions += generator.generate_batch(part, settings)
        progress(len(part))
    stats = sum((c.stats for c in completions), DecodeStats())
    losses, entropies = zip(*(_scored(generator, c) for c in completions), strict=True)
    return Acceptance(
        scenario=scenario,
        temperature=params.temperature,
        prompts=len(prompts),
        tokens=stats.round_tokens,
        rounds=stats.rounds,
        accepted_length=stats.accepted_length,
        per_position=stats.acceptance,
        perplexity=float(np.exp(np.concatenate(losses).mean())),
        entropy=float(np.concatenate(entropies).mean()),
    )


def _scored(generator: Generator, completion: Completion) -> tuple[np.ndarray, np.ndarray]:
    """Loss and entropy at every token of an answer."""
    answer = completion.token_ids
    log_p = log_probabilities(generator.model, completion.prompt_ids, answer)
    return -log_p[np.arange(len(answer)), answer], -(np.exp(log_p) * log_p).sum(-1)
