"""Real engines over small random models, and what to ask of them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from typing import Any

from mimo_jax.model import Model
from mimo_jax.request import SamplingParams
from mimo_jax.session import Decoding, Session
from serve.engine.batching import BatchingEngine
from serve.engine.executor import Executor
from serve.engine.scheduler import Sizes
from serve.generation import EngineInfo, Event, Finished, GenerationRequest, RoundTokens
from serve.metrics import Metrics

CAPACITY = 256


def sizes(**changes: Any) -> Sizes:
    """Small ones, enough for a few sequences of `CAPACITY`."""
    usual: dict[str, Any] = {
        "groups": 1,
        "slots": 3,
        "pages": 64,
        "page_size": 16,
        "snapshots": 6,
        "slack": 8,
        "verify_length": 8,
        "rounds": 2,
        "prefills": ((1, 16), (2, 16)),
    }
    return Sizes(**{**usual, **changes})


def executor(model: Model, **changes: Any) -> Executor:
    """Compiled for these sizes."""
    made = Executor(model, sizes(**changes), CAPACITY)
    made.compile_all()
    return made


@asynccontextmanager
async def serving(device: Any, model: Model, **options: Any) -> AsyncIterator[BatchingEngine]:
    """An engine, ended and checked at the end."""
    of = device.sizes
    info = EngineInfo(
        model="test",
        vocab_size=model.config.vocab_size,
        eos_ids=model.eos_ids,
        context_length=CAPACITY,
        max_running=of.slots * of.groups,
        max_queued=64,
        page_size=of.page_size,
        block_size=of.verify_length,
    )
    engine = BatchingEngine(
        device, info, Metrics("test", lambda: engine.load(), of.verify_length - 1), model.tokenizer, **options
    )
    engine.start()
    try:
        yield engine
        assert await engine.drain(120)
    finally:
        with contextlib.suppress(Exception):
            await engine.drain(0)
    engine.check()
    for state in ("running", "waiting", "used_tokens"):
        assert getattr(engine.load(), state) == 0


async def collect(stream: AsyncIterator[Event]) -> list[Event]:
    """All events of a request."""
    return [event async for event in stream]


def tokens_of(events: Iterable[Event], index: int = 0) -> list[int]:
    """A sample's tokens."""
    return [t for e in events if isinstance(e, RoundTokens) and e.index == index for t in e.token_ids]


def end_of(events: Iterable[Event], index: int = 0) -> Finished:
    """A sample's last event."""
    (end,) = (e for e in events if isinstance(e, Finished) and e.index == index)
    return end


async def answers(engine: BatchingEngine, requests: Iterable[GenerationRequest]) -> list[list[Event]]:
    """The events of several requests at once."""
    streams = [engine.submit(request) for request in requests]
    return await asyncio.gather(*map(collect, streams))


def offline(model: Model, prompt: list[int], params: SamplingParams) -> list[int]:
    """The tokens of one request by itself, without an engine."""
    session = Session(model, [prompt], [params], Decoding())
    tokens = list(session.prefill().tokens[0])
    while session.active.any():
        tokens += session.step().tokens[0]
    return tokens
