"""Long contexts end to end: the end of a prompt of 128K, decode there and at the edge of a million positions."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mimo_jax.backbone import Backbone
from mimo_jax.cache import RingKV, backbone_cache, drafter_ring
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import DecodeState, ModelParams, Models, PromptChunk, decode, empty_state, prefill
from tests.models import random_params, tiny_configs

NEW = 24


def _tokens(models, params, state, requests, verify_length) -> list[list[int]]:
    """Greedy tokens from a state, which is left as it was."""
    state = jax.tree.map(jnp.copy, state)
    out: list[list[int]] = [[] for _ in range(state.anchor.shape[0])]
    while bool(np.asarray(state.active).any()):
        state, log = decode(models, params, state, requests, rounds=32, verify_length=verify_length)
        for r in range(log.ran):
            for row, tokens in enumerate(out):
                tokens += np.asarray(log.tokens[r, row, : int(log.counts[r, row])]).tolist()
    return out


def _one_head_model(seed: int) -> tuple[Models, ModelParams]:
    """One full-attention layer of one head, one windowed layer: a long prompt in reasonable time."""
    config, drafter_config = tiny_configs()
    config = replace(config, layers=config.layers[:2], full=replace(config.full, heads=1))
    drafter_config = replace(drafter_config, target_layer_ids=(0, 1), num_target_layers=2)
    models = Models(Declared(lambda: Backbone(config, "float32")), Declared(lambda: Drafter(drafter_config, "float32")))
    assert models.drafter is not None
    return models, ModelParams(random_params(models.backbone, seed, 1.5), random_params(models.drafter, seed + 1))


def _filled(models: Models, context: int, seed: int, room: int = 64) -> DecodeState:
    """A state in which `context` positions are committed, with random keys and values; `room` more can be."""
    assert models.drafter is not None
    config = models.backbone.module.config
    cache = backbone_cache(config, 1, context + room, 8, "float32")
    ring = drafter_ring(models.drafter.module.config, 1, context + room, "float32")
    state = empty_state(cache, ring, config.vocab_size)
    keys = iter(jax.random.split(jax.random.key(seed), 64))
    state = jax.tree.map(
        lambda x: jax.random.normal(next(keys), x.shape) if jnp.issubdtype(x.dtype, jnp.floating) else x, state
    )
    cache = replace(state.cache, lengths=jnp.array([context], jnp.int32))
    return replace(state, cache=cache, anchor=jnp.array([5], jnp.int32), active=jnp.array([True]))


@pytest.mark.slow
def test_the_end_of_a_prompt_of_128k(seed):
    """Its last chunks go through pages and rings, then speculative decoding equals plain decoding."""
    models, params = _one_head_model(seed)
    chunk, chunks = 1024, 3
    prompt = np.random.default_rng(seed).integers(0, 61, (chunks, 1, chunk)).astype(np.int32)
    requests = batch_requests([prompt.reshape(-1).tolist()], [SamplingParams(max_new_tokens=NEW)], (), 61)
    before = 131_072 - chunk * chunks
    state = replace(_filled(models, before, seed, chunk * chunks + 64), active=jnp.array([False]))
    for i in range(chunks):
        part = PromptChunk(jnp.asarray(prompt[i]), jnp.array([chunk], jnp.int32), jnp.array([i == chunks - 1]))
        state, _ = prefill(models, params, state, requests, part)
    assert int(state.cache.lengths[0]) == 131_072
    plain = _tokens(models, params, state, requests, 1)
    assert len(plain[0]) == NEW - 1
    assert _tokens(models, params, state, requests, 8) == plain


@pytest.mark.slow
@pytest.mark.parametrize("context", [131_072, 1_048_000])
def test_decoding_at_far_positions_equals_plain_decoding(seed, context):
    models, params = _one_head_model(seed)
    requests = batch_requests([[0]], [SamplingParams(max_new_tokens=NEW)], (), 61)
    state = _filled(models, context, seed)
    plain = _tokens(models, params, state, requests, 1)
    assert len(plain[0]) == NEW
    assert _tokens(models, params, state, requests, 8) == plain


@pytest.mark.slow
def test_dead_ring_slots_do_not_reach_the_windowed_layers_at_a_million_positions(seed):
    """Slots that hold positions outside every window may hold anything."""
    models, params = _one_head_model(seed)
    requests = batch_requests([[0]], [SamplingParams(max_new_tokens=NEW)], (), 61)
    state = _filled(models, 1_048_000, seed)
    ring = state.cache.kv["swa"]
    slots, window = ring.k.shape[2], models.backbone.module.config.swa.visible_keys
    assert window is not None
    age = (1_048_000 - 1 - np.arange(slots)) % slots
    dead = jnp.asarray(age >= window - 1)[None, None, :, None, None]
    poisoned = RingKV(jnp.where(dead, 1e6, ring.k), jnp.where(dead, 1e6, ring.v))
    assert bool(dead.any())
    other = replace(state, cache=replace(state.cache, kv={**state.cache.kv, "swa": poisoned}))
    assert _tokens(models, params, other, requests, 8) == _tokens(models, params, state, requests, 8)
