"""What serving costs in tokens a second: one batch through the server and through offline decoding, in turn."""

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

import jax

from mimo_jax.evaluation.bench import Spread
from mimo_jax.evaluation.prompts import SCENARIOS
from mimo_jax.model import Model
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding, Session
from mimo_jax.tokenizer import Tokenizer
from serve.bench_client import Answer, Ask, Question, asked_by_turns
from serve.engine.batching import BatchingEngine
from serve.engine.building import build_engine
from serve.generation import Load
from serve.local_server import served
from serve.metrics import Metrics
from serve.options import ServerOptions

logger = logging.getLogger(__name__)

_TRIES = 3
"""Pairs for each that counts: one in which a program was compiled does not."""


@dataclass(frozen=True)
class Side:
    """The same batch, run after run."""

    tokens_per_second: Spread
    """From the first request to the last token, prompts included."""
    first_tokens_seconds: Spread
    """Until every request had its first token."""
    processor_seconds: Spread
    """Of all threads of the process that decodes; on a CPU that is the model's work, too, whatever else runs there."""


@dataclass(frozen=True)
class Comparison:
    """The server against offline decoding."""

    requests: int
    prompt_tokens: int
    new_tokens: int
    offline: Side
    server: Side
    ratio: Spread
    """Tokens a second of the server over offline's, pair by pair."""
    processor_ratio: Spread
    """Processor time of offline decoding over the server's: above 1, the server took less."""
    different: int
    """Requests whose tokens the two sides did not agree on, in any pair."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


@dataclass(frozen=True)
class _Run:
    seconds: float
    first: float
    processor: float
    tokens: list[list[int]]


def compare(
    client: Executor,
    options: ServerOptions,
    ask: Ask,
    *,
    runs: int,
    progress: Callable[[int], None] = lambda _: None,
) -> Comparison:
    """Answer frozen prompts, as many as the server runs at once, on both sides in turn; the model is loaded once.

    Args:
        client: Asks the server (see `local_server`).
        options: Of the server.
        ask: What every request asks for; the i-th adds i to the seed.
        runs: Pairs, after one that warms up.
        progress: Told of every pair that counts.

    Raises:
        ValueError: A prompt and its answer are longer than the context, or the model has no tokenizer.
        RuntimeError: Programs were compiled in too many pairs.
    """
    return asyncio.run(_compare(client, options, ask, runs, progress))


async def _compare(
    client: Executor,
    options: ServerOptions,
    ask: Ask,
    runs: int,
    progress: Callable[[int], None],
) -> Comparison:
    questions = asked_by_turns(Tokenizer.from_folder(options.tokenizer), SCENARIOS, options.max_running_requests)
    if (longest := max(len(q.ids) for q in questions) + ask.max_new_tokens) > options.context_length:
        raise ValueError(
            f"prompts and answers of up to {longest} tokens do not fit a context of {options.context_length}: lower "
            "--max-new-tokens or raise --context-length"
        )
    metrics = Metrics(options.served_model_name, Load, options.verify_length - 1)
    built = await asyncio.to_thread(build_engine, options, metrics, None, logger.info, lambda _: None)
    built.engine.start()
    pairs: list[tuple[_Run, _Run]] = []
    compiled = _Compilations()
    try:
        async with served(built.engine, options.model, options.tokenizer, client) as asking:
            for number in range(1 + _TRIES * runs):
                before = compiled.count
                offline = _offline(built.model, questions, ask, options.verify_length)
                server = await _served(built.engine, asking, questions, ask)
                if number and compiled.count == before:
                    pairs.append((offline, server))
                    progress(1)
                if len(pairs) == runs:
                    break
            else:
                raise RuntimeError(f"programs were compiled in all but {len(pairs)} of {1 + _TRIES * runs} pairs")
    finally:
        compiled.close()
        await built.engine.drain(0)
    new_tokens = sum(map(len, pairs[0][0].tokens))
    different = {i for a, b in pairs for i, (x, y) in enumerate(zip(a.tokens, b.tokens, strict=True)) if x != y}
    return Comparison(
        len(questions),
        sum(len(q.ids) for q in questions),
        new_tokens,
        _side([offline for offline, _ in pairs]),
        _side([server for _, server in pairs]),
        Spread.of([_speed(server) / _speed(offline) for offline, server in pairs]),
        Spread.of([offline.processor / server.processor for offline, server in pairs]),
        len(different),
    )


def _offline(model: Model, questions: Sequence[Question], ask: Ask, verify_length: int) -> _Run:
    params = [
        SamplingParams(ask.max_new_tokens, ask.temperature, ignore_eos=ask.ignore_eos, seed=ask.seed + i)
        for i in range(len(questions))
    ]
    session = Session(model, [q.ids for q in questions], params, Decoding(verify_length))
    begun, processor = time.perf_counter(), time.process_time()
    tokens = [list(t) for t in session.prefill().tokens]
    first = time.perf_counter() - begun
    while session.active.any():
        for row, new in zip(tokens, session.step().tokens, strict=True):
            row += new
    return _Run(time.perf_counter() - begun, first, time.process_time() - processor, tokens)


async def _served(engine: BatchingEngine, asking: Any, questions: Sequence[Question], ask: Ask) -> _Run:
    await engine.flush_cache()
    processor = time.process_time()
    answers: list[Answer]
    answers, seconds = await asking(questions, ask)
    processor = time.process_time() - processor
    begun = min(a.begun for a in answers)
    first = max(a.arrivals[0][0] for a in answers) - begun
    return _Run(seconds, first, processor, [a.token_ids for a in answers])


def _speed(run: _Run) -> float:
    return sum(map(len, run.tokens)) / run.seconds


def _side(runs: Sequence[_Run]) -> Side:
    return Side(
        Spread.of([_speed(run) for run in runs]),
        Spread.of([run.first for run in runs]),
        Spread.of([run.processor for run in runs]),
    )


class _Compilations:
    """Counts the programs that are compiled from now on."""

    def __init__(self) -> None:
        self.count = 0
        jax.monitoring.register_event_duration_secs_listener(self._heard)

    def close(self) -> None:
        jax.monitoring.unregister_event_duration_listener(self._heard)

    def _heard(self, event: str, duration_secs: float, **_: Any) -> None:
        self.count += event == "/jax/core/compile/backend_compile_duration"
