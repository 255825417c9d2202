"""What serving costs the host: the whole server, with only the device's programs replaced by fixed times."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import asdict, dataclass
from typing import Any

from mimo_jax.evaluation.bench import Spread
from mimo_jax.presets import NANO, PRESETS
from serve.bench_client import Ask, Question
from serve.engine.batching import BatchingEngine
from serve.engine.scheduler import Sizes
from serve.generation import EngineInfo
from serve.local_server import served
from serve.metrics import Metrics
from serve.scripted_device import ScriptedDevice

_MODEL = PRESETS["mimo-v2.5-pro"]
_BLOCK = 8
_TOKENS = 4
"""That a round gives a row."""
_PROMPT = 64
_PAGE = 64


@dataclass(frozen=True)
class HostCost:
    """Of one number of streams on a device whose steps take a fixed time. A message is one round of one stream.

    Measured from the first round to the last answer, all streams decoding in every round, in microseconds.
    """

    streams: int
    step_milliseconds: float
    rounds: int
    """A run."""
    messages: int
    """A run."""
    round: Spread
    """Wall time between two rounds, the device's included."""
    beyond_device: Spread
    """What of that is not the device's."""
    cpu_round: Spread
    """Processor time of all the server's threads a round; with several threads at once it may exceed wall time."""
    engine_round: Spread
    """Of that, the engine's thread: planning, building commands, handing out."""
    cpu_message: Spread
    """Processor time of all the server's threads a message."""

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def measure_host(
    client: Executor,
    streams: int,
    step_seconds: float,
    *,
    rounds: int,
    runs: int,
    progress: Callable[[int], None] = lambda _: None,
) -> HostCost:
    """Serve so many requests at once, each for so many rounds; `runs` times after one that warms up.

    Args:
        client: Asks (see `local_server`).
        streams: Requests at once, which is also how many the server has slots for.
        step_seconds: That a prefill or a round takes on the device.
        rounds: Of each request.
        runs: Measured ones.
        progress: Told of every run.
    """
    return asyncio.run(_measure(client, streams, step_seconds, rounds, runs, progress))


async def _measure(
    client: Executor, streams: int, step_seconds: float, rounds: int, runs: int, progress: Callable[[int], None]
) -> HostCost:
    new_tokens = 1 + rounds * _TOKENS  # the first is the prefill's
    found = []
    for run in range(runs + 1):
        one = await _run(client, streams, step_seconds, new_tokens)
        progress(1)
        found += [one] if run else []
    a_round = {name: [1e6 * getattr(run, name) / run.steps for run in found] for name in ("wall", "cpu", "engine")}
    return HostCost(
        streams,
        1e3 * step_seconds,
        found[0].steps,
        found[0].messages,
        Spread.of(a_round["wall"]),
        Spread.of([wall - 1e6 * step_seconds for wall in a_round["wall"]]),
        Spread.of(a_round["cpu"]),
        Spread.of(a_round["engine"]),
        Spread.of([1e6 * run.cpu / run.messages for run in found]),
    )


@dataclass(frozen=True)
class _Run:
    steps: int
    messages: int
    wall: float
    cpu: float
    engine: float


async def _run(client: Executor, streams: int, step_seconds: float, new_tokens: int) -> _Run:
    capacity = _PROMPT + new_tokens
    sizes = Sizes(
        groups=1,
        slots=streams,
        pages=2 * streams * -(-capacity // _PAGE),
        page_size=_PAGE,
        snapshots=8 * streams,
        slack=_BLOCK,
        verify_length=_BLOCK,
        rounds=1,
        prefills=((1, _PROMPT), (min(streams, 4), _PROMPT)),
    )
    vocabulary = _MODEL.backbone["vocab_size"]
    device = ScriptedDevice(sizes, vocab_size=vocabulary, capacity=capacity, seconds=step_seconds, tokens=_TOKENS)
    info = EngineInfo(
        model="scripted",
        vocab_size=vocabulary,
        eos_ids=(),
        context_length=capacity,
        max_running=streams,
        max_queued=streams,
        page_size=_PAGE,
        block_size=_BLOCK,
    )
    engine = BatchingEngine(device, info, Metrics("scripted", lambda: engine.load(), _BLOCK - 1))
    engine.start()
    try:
        async with served(engine, NANO, NANO, client) as ask:
            answers, _ = await ask(_questions(streams), Ask(new_tokens, ignore_eos=True))
            cpu = time.process_time()
    finally:
        await engine.drain(0)
    if short := [a.tokens for a in answers if a.tokens != new_tokens]:
        raise RuntimeError(f"{len(short)} of {streams} requests got {short[0]} tokens or so, and not {new_tokens}")
    begun, streamed = device.begun, streams * device.steps
    messages = sum(len(a.arrivals) - 1 for a in answers)
    if messages != streamed:
        raise RuntimeError(f"{streams} requests of {device.steps} rounds came in {messages} messages")
    wall = max(a.ended for a in answers) - begun.wall
    return _Run(device.steps, messages, wall, cpu - begun.process, device.ended.engine - begun.engine)


def _questions(count: int) -> Sequence[Question]:
    """Prompts that share no beginning."""
    return [Question("scripted", [i + 1, *range(_PROMPT - 1)]) for i in range(count)]
