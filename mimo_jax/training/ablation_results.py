"""What arms of an ablation came to, beside their base, with intervals."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

_RESAMPLES = 2000


@dataclass(frozen=True)
class Effect:
    """One arm on one set of prompts."""

    arm: str
    prompts: str
    """Name of the set."""
    verify_length: int
    """Rows that a round verifies."""
    accepted_length: float
    """Tokens over rounds; mean over seeds."""
    by_seed: list[float]
    change: float
    """Against the base, seed by seed, in tokens a round; 0 for the base."""
    low: float | None
    """Lower end of the change's 95 % interval; None with one seed, and for the base."""
    high: float | None

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return vars(self)


def read_results(path: Path) -> list[dict[str, Any]]:
    """Finished arms, in the order they finished; a last line that was cut short is left out."""
    if not path.is_file():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def effects(results: Sequence[dict[str, Any]], base: str) -> Iterator[Effect]:
    """Every arm against the base, over the seeds that both have.

    Args:
        results: Of `read_results`: `arm`, `seed` and `measured` (see `ablation.measure`).
        base: Name of the arm to compare with, whose blocks are verified whole.
    """
    by_arm: dict[str, dict[int, Any]] = {}
    for result in results:
        by_arm.setdefault(result["arm"], {})[result["seed"]] = result["measured"]
    if base not in by_arm:
        return
    for arm, seeds in by_arm.items():
        shared = sorted({*seeds} & {*by_arm[base]})
        for prompts in next(iter(seeds.values())):
            both = [(by_arm[base][s][prompts], seeds[s][prompts]) for s in shared]
            if not both:
                continue
            (verified,) = both[0][0]["rounds"]
            for length in both[0][1]["rounds"]:
                first = _counts([one for one, _ in both], verified)
                second = _counts([other for _, other in both], length)
                lengths = _accepted(second)
                change, low, high = _change(first, second)
                if arm == base:
                    low = high = None
                yield Effect(arm, prompts, int(length), float(lengths.mean()), lengths.tolist(), change, low, high)


def _counts(measured: Sequence[dict[str, Any]], verify_length: str) -> np.ndarray:
    """Tokens and rounds, [2, seeds, answers]."""
    return np.array([[m["tokens"] for m in measured], [m["rounds"][verify_length] for m in measured]], np.float64)


def _accepted(counts: np.ndarray) -> np.ndarray:
    """[...] of counts [2, ..., answers]."""
    tokens, rounds = counts.sum(axis=-1)
    return tokens / rounds


def _change(first: np.ndarray, second: np.ndarray) -> tuple[float, float | None, float | None]:
    """Mean difference of accepted lengths over seeds, and its 95 % interval.

    Two things make it uncertain: seeds, of which there are few, and answers, which all seeds share. Their variances
    add; Student's distribution, with the seeds' degrees of freedom, keeps few seeds from looking certain.
    """
    by_seed = _accepted(second) - _accepted(first)
    seeds, answers = len(by_seed), first.shape[-1]
    if seeds < 2:
        return float(by_seed.mean()), None, None
    drawn = np.random.default_rng(0).integers(0, answers, (_RESAMPLES, answers))
    resampled = (_accepted(second[..., drawn]) - _accepted(first[..., drawn])).mean(axis=0)
    deviation = np.sqrt(by_seed.var(ddof=1) / seeds + resampled.var())
    half = float(stdtrit(seeds - 1, 0.975) * deviation)
    mean = float(by_seed.mean())
    return mean, mean - half, mean + half
