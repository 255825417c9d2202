"""Speculative against plain decoding of the same prompts, side by side in one run, and where the time goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from mimo_jax.evaluation.bench import Spread, bench_context
from mimo_jax.generate import Generator
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding


@dataclass(frozen=True)
class Speedup:
    """One scenario."""

    scenario: str
    prompts: int
    plain_tokens_per_second: Spread
    speculative_tokens_per_second: Spread
    factor: Spread
    """Speculative over plain, of the same run."""
    accepted_length: float
    drafting_share: float
    """Of the speculative decode time: rounds times the measured time of a draft."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        spreads = {k: vars(v) for k, v in vars(self).items() if isinstance(v, Spread)}
        return vars(self) | spreads


def compare_speed(
    generator: Generator,
    scenario: str,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    *,
    runs: int,
    progress: Callable[[int], None] = lambda answered: None,
) -> Speedup:
    """Decode every prompt by itself, plainly and speculatively in turn, `runs` times after one that warms up.

    Raises:
        ValueError: There is no drafter.
    """
    if generator.model.drafter_config is None:
        raise ValueError("there is nothing to compare: this model has no drafter")
    speeds: dict[bool, list[float]] = {False: [], True: []}
    rounds = 0
    seconds = emitted = 0.0
    for run in range(runs + 1):
        for speculative, done in speeds.items():
            rounds, emitted, seconds = 0, 0, 0.0
            for prompt in prompts:
                decoding = Decoding() if speculative else Decoding(verify_length=1)
                completion = generator.generate(prompt, params, decoding=decoding)
                rounds += completion.stats.rounds
                emitted += completion.stats.round_tokens
                seconds += generator.timing.decode
                progress(1)
            if run > 0:
                done.append(emitted / seconds)
    longest = max(map(len, prompts)) + params.max_new_tokens
    draft = bench_context(generator.model, batch=1, context=longest, runs=max(5, runs)).draft_milliseconds
    assert draft is not None
    return Speedup(
        scenario=scenario,
        prompts=len(prompts),
        plain_tokens_per_second=Spread.of(speeds[False]),
        speculative_tokens_per_second=Spread.of(speeds[True]),
        factor=Spread.of([b / a for a, b in zip(speeds[False], speeds[True], strict=True)]),
        accepted_length=emitted / rounds,
        drafting_share=rounds * draft.median / 1e3 / seconds,
    )
