"""What the server did, in numbers that Prometheus reads.

Counts are plain numbers that the engine adds to once a round and row, and become Prometheus' words only when somebody
looks. Names end as SGLang's do, so that what people know and have drawn for it fits; its own prefix can be had, too.
"""

import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Literal

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from serve.generation import Load, Usage

PREFIXES = ("mimo:", "sglang:")
"""That names may begin with."""

# Not OpenMetrics, which Prometheus would rather have: there the client library writes the colon as an underscore.
CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_TOKEN_SECONDS = (0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.04, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2)
_WAIT_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120)
_REQUEST_SECONDS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 120, 300, 600, 1800)
_STEP_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.06, 0.08, 0.1, 0.15, 0.2, 0.5, 1, 2, 5)


class Metrics(Collector):
    """The numbers of one server.

    Every method but `text` takes next to no time, and is to be called from one thread only (each from whichever).
    Token counts of a finished request enter when it ends; those of rounds, at once.

    Args:
        model: Name that it is served under, a label of every metric.
        load: Asked when somebody looks.
        drafts: Positions that a round can draft: one less than the block; 0 without a drafter.
        prefix: One of `PREFIXES`.
        clock: Seconds, for gauges that look back.
    """

    def __init__(
        self,
        model: str,
        load: Callable[[], Load],
        drafts: int,
        *,
        prefix: str = "mimo:",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if prefix not in PREFIXES:
            raise ValueError(f"metrics begin with {' or '.join(PREFIXES)}, not {prefix!r}")
        self._model, self._load, self._prefix, self._clock = model, load, prefix, clock
        self._steps = {"prefill": _Histogram(_STEP_SECONDS), "decode": _Histogram(_STEP_SECONDS)}
        self._real = {"prefill": 0, "decode": 0}
        self._padded = {"prefill": 0, "decode": 0}
        self._emitted = self._first_tokens = self._drafted = 0
        self._accepted = [0] * (drafts + 1)
        """Rounds by how many drafts stood."""
        self._ttft, self._itl = _Histogram(_WAIT_SECONDS), _Histogram(_TOKEN_SECONDS)
        self._queue, self._whole = _Histogram(_WAIT_SECONDS), _Histogram(_REQUEST_SECONDS)
        self._finished: defaultdict[str, int] = defaultdict(
            int, dict.fromkeys(("stop", "length", "abort", "deadline"), 0)
        )
        self._refused: defaultdict[str, int] = defaultdict(int)
        self._prompt = self._cached = self._retracted = self._queued = 0
        self._compiles = self._late_compiles = 0
        self._compile_seconds = self._load_seconds = self._start_seconds = 0.0
        self._window = _Window(clock())
        self._registry = CollectorRegistry()
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def step(self, kind: Literal["prefill", "decode"], seconds: float, real_tokens: int, padded_tokens: int) -> None:
        """A program ran, over so many tokens that somebody asked for and so many that only fill the bucket."""
        self._steps[kind].add(seconds)
        self._real[kind] += real_tokens
        self._padded[kind] += padded_tokens

    def round(self, drafted: int, accepted: int, emitted: int) -> None:
        """One row went through one round (one token, without a drafter)."""
        self._drafted += drafted
        self._accepted[accepted] += 1
        self._emitted += emitted

    def first_token(self, seconds: float) -> None:
        """A prefill gave a sample's first token, so long after the request came."""
        self._first_tokens += 1
        self._ttft.add(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """A sample got so many tokens; `seconds` is each one's share of the time since the ones before."""
        self._itl.add(seconds, tokens)

    def finished(self, reason: str, usage: Usage, queue_seconds: float, seconds: float) -> None:
        """A sample ended: time until its prefill began, and all of it."""
        self._finished[reason] += 1
        self._prompt += usage.prompt_tokens
        self._cached += usage.cached_tokens
        self._queue.add(queue_seconds)
        self._whole.add(seconds)

    def retracted(self, count: int) -> None:
        """So many were sent back to the queue for want of pages."""
        self._retracted += count

    def compiled(self, seconds: float, after_ready: bool) -> None:
        """A program was compiled; none should be after the server was ready."""
        self._compiles += 1
        self._late_compiles += after_ready
        self._compile_seconds += seconds

    def loaded(self, seconds: float) -> None:
        """The weights are in memory."""
        self._load_seconds = seconds

    def started(self, seconds: float) -> None:
        """The server is ready, so long after it was started."""
        self._start_seconds = seconds

    def queued(self) -> None:
        """A request was taken."""
        self._queued += 1

    def refused(self, status: str) -> None:
        """A request was not; `status` is the gRPC code's name."""
        self._refused[status] += 1

    def text(self) -> bytes:
        """Everything in Prometheus' text format, of type `CONTENT_TYPE`."""
        return generate_latest(self._registry)

    def describe(self) -> Iterator[Metric]:
        """Nothing: a registry would look at everything once to find its names."""
        yield from ()

    def collect(self) -> Iterator[Metric]:
        """The metrics as they stand."""
        yield from self._load_gauges()
        yield from self._recent_gauges()
        yield from self._counters()
        histograms = (
            ("time_to_first_token_seconds", "From a request's arrival to its first token", {"": self._ttft}, None),
            ("inter_token_latency_seconds", "Between tokens; a round's share its time", {"": self._itl}, None),
            ("queue_time_seconds", "From a request's arrival to its prefill", {"": self._queue}, None),
            ("e2e_request_latency_seconds", "From a request's arrival to its end", {"": self._whole}, None),
            ("step_duration_seconds", "One run of a program", self._steps, "kind"),
        )
        for name, text, by_value, label in histograms:
            labels = ["model_name", *([label] if label else [])]
            family = HistogramMetricFamily(self._prefix + name, text, labels=labels)
            for value, histogram in by_value.items():
                family.add_metric([self._model, *([value] if label else [])], histogram.buckets(), histogram.total)
            yield family

    def _load_gauges(self) -> Iterator[Metric]:
        load = self._load()
        yield self._gauge("num_running_reqs", "Sequences in slots", load.running)
        yield self._gauge("num_queue_reqs", "Requests that wait", load.waiting)
        yield self._gauge("max_running_requests", "Slots", load.slots)
        yield self._gauge("num_used_tokens", "Positions of full-attention pages in use", load.used_tokens)
        yield self._gauge("max_total_num_tokens", "Positions of full-attention pages", load.total_tokens)
        yield self._gauge("num_cached_tokens", "Positions held only for later prefix hits", load.cached_tokens)
        full, rings = _share(load.used_tokens, load.total_tokens), _share(load.running, load.slots)
        yield self._gauge("token_usage", "The fuller of pages and rings, 0 to 1", max(full, rings))
        yield self._gauge("full_token_usage", "Share of full-attention pages in use, 0 to 1", full)
        yield self._gauge("swa_token_usage", "Share of sliding-window rings in use, one a slot, 0 to 1", rings)
        yield self._gauge("num_snapshots", "Ring snapshots held for prefix hits", load.snapshots)
        yield self._gauge("max_snapshots", "Ring snapshots there is room for", load.total_snapshots)

    def _recent_gauges(self) -> Iterator[Metric]:
        """Gauges over the last 10 to 20 seconds, or since the last look where that is longer ago."""
        rounds, generated = sum(self._accepted), self._emitted + self._first_tokens
        now = (generated, self._emitted, rounds, self._drafted, self._stood(), self._prompt, self._cached)
        seconds, change = self._window.change(self._clock(), now)
        generated, emitted, rounds, drafted, stood, prompt, cached = change
        yield self._gauge("gen_throughput", "Tokens generated a second, lately", _share(generated, seconds))
        yield self._gauge("spec_accept_length", "Tokens a round, its own included, lately", _share(emitted, rounds))
        yield self._gauge("spec_accept_rate", "Share of drafts that stood, lately", _share(stood, drafted))
        yield self._gauge("cache_hit_rate", "Share of prompt tokens found cached, lately", _share(cached, prompt))
        yield self._gauge("startup_time_seconds", "From start to ready", self._start_seconds)
        yield self._gauge("weight_load_duration_seconds", "Reading the weights", self._load_seconds)

    def _counters(self) -> Iterator[Metric]:
        yield self._counter("requests_received", "Requests taken", self._queued)
        yield self._counter("requests_refused", "Requests not taken", dict(self._refused), "status")
        yield self._counter("requests_finished", "Samples that ended", dict(self._finished), "reason")
        yield self._counter("num_requests", "Samples that ended", sum(self._finished.values()))
        aborted = self._finished["abort"] + self._finished["deadline"]
        yield self._counter("num_aborted_requests", "Samples ended by clients or deadlines", aborted)
        yield self._counter("num_retracted_requests", "Requests sent back to the queue for pages", self._retracted)
        yield self._counter("prompt_tokens", "Of prompts, cached ones included", self._prompt)
        yield self._counter("cached_tokens", "Of prompts, found in the prefix cache", self._cached)
        yield self._counter("generation_tokens", "Tokens generated", self._emitted + self._first_tokens)
        yield self._counter("spec_verify_calls", "Rounds, counted in every row", sum(self._accepted))
        yield self._counter("spec_round_tokens", "Tokens generated by rounds, their own included", self._emitted)
        yield self._counter("spec_drafted_tokens", "Drafts verified", self._drafted)
        yield self._counter("spec_accepted_tokens", "Drafts that stood", self._stood())
        by_position = {str(p): sum(self._accepted[p:]) for p in range(1, len(self._accepted))}
        text = "Rounds in which the draft at a position of the block stood, 1 the first"
        yield self._counter("spec_accepted_tokens_per_position", text, by_position, "position")
        yield self._counter("step_tokens", "Tokens that programs ran over and somebody asked for", self._real, "kind")
        yield self._counter("step_padded_tokens", "Tokens that only fill a bucket", self._padded, "kind")
        yield self._counter("jit_compiles", "Programs compiled", self._compiles)
        yield self._counter("jit_compiles_after_ready", "Of these, on a live server: a fault", self._late_compiles)
        yield self._counter("compile_seconds", "Time that compiling took", self._compile_seconds)

    def _stood(self) -> int:
        return sum(accepted * rounds for accepted, rounds in enumerate(self._accepted))

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(self._prefix + name, text, labels=["model_name"])
        family.add_metric([self._model], value)
        return family

    def _counter(self, name: str, text: str, value: float | dict[str, int], label: str = "") -> Metric:
        family = CounterMetricFamily(self._prefix + name, text, labels=["model_name", *([label] if label else [])])
        for key, count in value.items() if isinstance(value, dict) else (("", value),):
            family.add_metric([self._model, *([key] if label else [])], count)
        return family


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds, self._counts, self.total = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float, count: int = 1) -> None:
        self._counts[bisect_left(self._bounds, value)] += count
        self.total += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Upper bounds with the values up to there."""
        found, below = [], 0
        for bound, count in zip((*map(float, self._bounds), "+Inf"), self._counts, strict=True):
            below += count
            found.append((str(bound), below))
        return found


class _Window:
    """What counts grew by since a look 10 to 20 seconds ago, or since the last one where that is longer ago."""

    def __init__(self, now: float) -> None:
        self._older: tuple[float, tuple[float, ...]] = (now, ())
        self._newer = self._older

    def change(self, now: float, counts: tuple[float, ...]) -> tuple[float, list[float]]:
        if now - self._newer[0] >= 10:
            self._older, self._newer = self._newer, (now, counts)
        before, old = self._older
        return now - before, [new - o for new, o in zip(counts, old or (0,) * len(counts), strict=True)]


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0
