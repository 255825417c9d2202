"""What a run of requests amounts to: figures, tables and a picture."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from mimo_jax.progress import drawing
from mimo_jax.stats import DecodeStats
from serve.bench_client import Answer


@dataclass(frozen=True)
class Latency:
    """Of one kind, in seconds."""

    name: str
    mean: float
    median: float
    p90: float
    p99: float
    longest: float
    count: int

    @classmethod
    def of(cls, name: str, seconds: Sequence[float]) -> "Latency":
        """Of some values, one at least."""
        values = np.asarray(seconds, float)
        p50, p90, p99 = (float(p) for p in np.percentile(values, (50, 90, 99)))
        return cls(name, float(values.mean()), p50, p90, p99, float(values.max()), len(values))


@dataclass(frozen=True)
class Scenario:
    """The requests of one scenario that were answered."""

    name: str
    requests: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    tokens_per_second: float
    """That one request saw after its first: all of theirs over all of their time; 0 if none had a second."""
    decoding: DecodeStats
    """Of the answers that came a round a message."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        own = {name: value for name, value in vars(self).items() if name != "decoding"}
        return own | self.decoding.as_json()


@dataclass(frozen=True)
class Report:
    """All figures of a run."""

    seconds: float
    """From the first request to the last answer."""
    answered: int
    failed: int
    prompt_tokens: int
    new_tokens: int
    latencies: list[Latency]
    scenarios: list[Scenario]
    """And all of them together, last, if there are several."""
    errors: dict[str, int]
    """Requests that failed, by what they were told."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {
            "seconds": self.seconds,
            "answered": self.answered,
            "failed": self.failed,
            "requests_per_second": self.answered / self.seconds,
            "prompt_tokens_per_second": self.prompt_tokens / self.seconds,
            "new_tokens_per_second": self.new_tokens / self.seconds,
            "latencies": [asdict(latency) for latency in self.latencies],
            "scenarios": [scenario.as_json() for scenario in self.scenarios],
            "errors": self.errors,
        }


def summarize(answers: Sequence[Answer], seconds: float) -> Report:
    """The figures of a run that took so long; requests that failed count as errors and in nothing else."""
    good = [a for a in answers if not a.error]
    errors = Counter(a.error for a in answers if a.error)
    latencies = []
    if good:
        between = [gap for a in good for gap, count in a.gaps() for _ in range(count)]
        each = [t for a in good if (t := a.time_per_token) is not None]
        kinds = {
            "time to first token": [a.time_to_first_token for a in good],
            "between tokens": between,
            "a token, mean of a request": each,
            "whole request": [a.ended - a.begun for a in good],
        }
        latencies = [Latency.of(name, values) for name, values in kinds.items() if values]
    names = list(dict.fromkeys(a.scenario for a in good))
    scenarios = [_scenario(name, [a for a in good if a.scenario == name]) for name in names]
    if len(names) > 1:
        scenarios.append(_scenario("all", good))
    prompt, new = sum(a.prompt_tokens for a in good), sum(a.tokens for a in good)
    return Report(seconds, len(good), sum(errors.values()), prompt, new, latencies, scenarios, dict(errors))


def _scenario(name: str, answers: Sequence[Answer]) -> Scenario:
    # what is more than the fewest drafts a message came in messages of several rounds, which tell nothing of each
    drafts = min((a.drafted / (len(a.arrivals) - 1) for a in answers if len(a.arrivals) > 1), default=0.0)
    rounds = [a.decoding(round(drafts) + 1) for a in answers if a.drafted == drafts * (len(a.arrivals) - 1)]
    later = sum(a.tokens - a.arrivals[0][1] for a in answers)
    decoding = sum(a.arrivals[-1][0] - a.arrivals[0][0] for a in answers)
    return Scenario(
        name,
        len(answers),
        sum(a.prompt_tokens for a in answers),
        sum(a.cached_tokens for a in answers),
        sum(a.tokens for a in answers),
        later / decoding if decoding else 0.0,
        sum(rounds, DecodeStats()),
    )


def tables(report: Report) -> list[Table]:
    """For the terminal."""
    latency = Table(title="Latency in milliseconds", title_justify="left")
    latency.add_column("")
    for name in ("mean", "median", "90 %", "99 %", "longest", "n"):
        latency.add_column(name, justify="right")
    for kind in report.latencies:
        figures = (kind.mean, kind.median, kind.p90, kind.p99, kind.longest)
        latency.add_row(kind.name, *(f"{1e3 * f:,.1f}" for f in figures), f"{kind.count:,}")
    by_scenario = Table(title="Answers by scenario", title_justify="left")
    by_scenario.add_column("scenario")
    names = ("requests", "prompt tokens", "cached", "new tokens", "tok/s of one", "accepted length", "drafts stood, %")
    for name in names:
        by_scenario.add_column(name, justify="right")
    for s in report.scenarios:
        cached = f"{s.cached_tokens / s.prompt_tokens:.0%}"
        counts = (f"{s.requests:,}", f"{s.prompt_tokens:,}", cached, f"{s.new_tokens:,}")
        speeds = (f"{s.tokens_per_second:,.1f}", f"{s.decoding.accepted_length:.2f}")
        stood = " ".join(f"{100 * share:.0f}" for share in s.decoding.acceptance) or "-"
        by_scenario.add_row(s.name, *counts, *speeds, stood)
    shown = [latency, by_scenario] if report.answered else []
    if report.errors:
        failed = Table(title="Requests that failed", title_justify="left")
        failed.add_column("what they were told", overflow="fold")
        failed.add_column("n", justify="right")
        for error, count in sorted(report.errors.items(), key=lambda e: -e[1]):
            failed.add_row(error, str(count))
        shown.append(failed)
    return shown


def headline(report: Report) -> str:
    """One line of throughput."""
    requests, prompt, new = (n / report.seconds for n in (report.answered, report.prompt_tokens, report.new_tokens))
    return (
        f"{report.answered} answered, {report.failed} failed in {report.seconds:.1f} s: {requests:.2f} requests/s, "
        f"{prompt:,.0f} prompt tokens/s, {new:,.0f} new tokens/s"
    )


def draw(answers: Sequence[Answer], report: Report, path: Path) -> None:
    """How latencies are distributed, and acceptance by position."""
    good = [a for a in answers if not a.error]
    if not good:
        raise ValueError("no request was answered: there is nothing to draw")
    with drawing(path, columns=3) as (first, between, acceptance):
        _shares(first, [a.time_to_first_token for a in good], "time to first token, ms")
        _shares(between, [gap for a in good for gap, n in a.gaps() for _ in range(n)], "between tokens, ms")
        for s in report.scenarios:
            stood = s.decoding.acceptance
            label = f"{s.name}: {s.decoding.accepted_length:.2f} tokens a round"
            acceptance.plot(range(1, len(stood) + 1), stood, marker="o", label=label)
        acceptance.set_xlabel("position in the block")
        acceptance.set_ylabel("share of rounds in which the draft stood")
        acceptance.set_ylim(0, 1)
        acceptance.legend()


def _shares(axis: Any, seconds: Sequence[float], label: str) -> None:
    values = np.sort(np.asarray(seconds, float)) * 1e3
    axis.step(values, np.arange(1, len(values) + 1) / max(len(values), 1), where="post")
    axis.set_xlabel(label)
    axis.set_ylabel("share that took at most so long")
    axis.set_ylim(0, 1)
