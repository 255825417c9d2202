"""How fast decoding is: prefill, plain and speculative decode, what a dispatch costs, how cost grows with context."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.model import Model
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.session import Decoding, Session
from mimo_jax.speculative import DecodeState, ModelParams, Models, Requests, decode


@dataclass(frozen=True)
class Spread:
    """Median and extremes of repeated measurements."""

    median: float
    low: float
    high: float
    runs: int

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """The spread of some values."""
        return cls(float(np.median(values)), min(values), max(values), len(values))


@dataclass(frozen=True)
class DecodeResult:
    """End-to-end decoding of random prompts at one verify length."""

    verify_length: int
    batch: int
    prompt_tokens: int
    new_tokens: int
    prefill_tokens_per_second: Spread
    decode_tokens_per_second: Spread
    accepted_length: float
    """Tokens emitted by rounds over rounds; the prompt's first token is no round's."""
    compile_seconds: float
    dispatch_microseconds: Spread
    """A dispatched call that finds nothing to do: what Python, JAX and the runtime cost a call."""


@dataclass(frozen=True)
class ContextResult:
    """One round at a given context, caches filled with random keys and values."""

    context: int
    batch: int
    draft_milliseconds: Spread | None
    verify_milliseconds: Spread
    plain_milliseconds: Spread


def bench_decode(
    model: Model, *, batch: int, prompt_tokens: int, new_tokens: int, runs: int, verify_length: int, seed: int = 0
) -> DecodeResult:
    """Decode random prompts greedily, end tokens ignored, `runs` times after one that warms up."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(0, model.config.vocab_size, (batch, prompt_tokens)).tolist()
    params = [SamplingParams(max_new_tokens=new_tokens, ignore_eos=True)] * batch
    prefill, speed, compile_seconds = [], [], 0.0
    emitted = rounds = 0
    session = None
    for run in range(runs + 1):
        session = Session(model, prompts, params, Decoding(verify_length))
        compile_seconds = max(compile_seconds, session.compile_seconds)
        first = session.prefill()
        seconds, emitted, rounds = 0.0, 0, 0
        while session.active.any():
            step = session.step()
            assert step.rounds is not None
            seconds += step.seconds
            emitted += sum(map(len, step.tokens))
            rounds += int((step.rounds.counts > 0).sum())
        if run > 0:
            prefill.append(batch * prompt_tokens / first.seconds)
            speed.append(emitted / seconds if seconds else 0.0)
    assert session is not None
    return DecodeResult(
        verify_length=verify_length,
        batch=batch,
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
        prefill_tokens_per_second=Spread.of(prefill),
        decode_tokens_per_second=Spread.of(speed),
        accepted_length=emitted / rounds if rounds else 0.0,
        compile_seconds=compile_seconds,
        dispatch_microseconds=Spread.of([1e6 * session.step().seconds for _ in range(max(50, runs))]),
    )


def bench_context(model: Model, *, batch: int, context: int, runs: int, seed: int = 0) -> ContextResult:
    """Time one round's parts at a context of `context` committed positions; groups have equally many sequences."""
    groups = model.models.topology.data_parallel
    batch = -(-batch // groups) * groups
    block = model.drafter_config.block_size if model.drafter_config else 1
    prompts = [[0]] * batch
    settings = [SamplingParams(ignore_eos=True)] * batch
    requests = model.placed(batch_requests(prompts, settings, (), model.config.vocab_size))
    state = _filled_state(model, batch, context, block, seed)
    draft = None
    if model.drafter_config is not None:
        draft_only = model.compiled(_draft_only, (state,), {})

        def call() -> jax.Array:
            nonlocal state
            state, drafts = draft_only(model.params, state)
            return drafts

        draft = _time(call, runs)
    both = _time_rounds(model, state, requests, block, runs) if block > 1 else None
    plain = _time_rounds(model, state, requests, 1, runs)
    verify = plain
    if both is not None and draft is not None:
        cost = draft.median
        verify = Spread(both.median - cost, both.low - cost, both.high - cost, both.runs)
    return ContextResult(context, batch, draft, verify, plain)


def _filled_state(model: Model, batch: int, context: int, block: int, seed: int) -> DecodeState:
    state = model.empty_state(batch, context + 2 * block)
    keys = iter(jax.random.split(jax.random.key(seed), len(jax.tree.leaves(state))))
    state = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape, x.dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    cache = replace(state.cache, lengths=jnp.full(batch, context, jnp.int32))
    return model.placed(replace(state, cache=cache, active=jnp.ones(batch, bool)))


@partial(jax.jit, static_argnames="models")
def _draft_only(models: Models, params: ModelParams, state: DecodeState) -> tuple[DecodeState, jax.Array]:
    assert state.ring is not None
    backbone, drafter = models.backbone.bind(params.backbone), models.bind_drafter(params)
    hidden = drafter(backbone.embed(state.anchor), state.ring, state.cache.lengths)
    drafts = models.topology.cut("logits").argmax(backbone.head(hidden[:, 1:]))
    return state, models.topology.cut("batch").gather(drafts, 0)


def _time(call: Callable[[], Any], runs: int) -> Spread:
    jax.block_until_ready(call())
    times = []
    for _ in range(runs):
        begin = time.perf_counter()
        jax.block_until_ready(call())
        times.append(1e3 * (time.perf_counter() - begin))
    return Spread.of(times)


def _time_rounds(model: Model, state: DecodeState, requests: Requests, verify_length: int, runs: int) -> Spread:
    program = model.compiled(decode, (state, requests), {"rounds": 1, "verify_length": verify_length})
    times = []
    for _ in range(runs + 1):
        # the program consumes its state, and every run is to see the same context
        mine = jax.block_until_ready(jax.tree.map(jnp.copy, state))
        begin = time.perf_counter()
        jax.block_until_ready(program(model.params, mine, requests))
        times.append(1e3 * (time.perf_counter() - begin))
    return Spread.of(times[1:])


def as_json(results: Sequence[DecodeResult | ContextResult]) -> list[dict[str, Any]]:
    """Results as plain values."""
    return [asdict(r) for r in results]
