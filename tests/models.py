"""Small models for tests: the golden ones, and random ones of any shape without a checkpoint."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from mimo_jax.backbone import Backbone
from mimo_jax.byte_tokenizer import SMALLEST_VOCABULARY, build_byte_tokenizer
from mimo_jax.cache import backbone_cache, drafter_ring
from mimo_jax.chat_template import ChatTemplate, default_chat_template
from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig, LayerKind, MoeConfig
from mimo_jax.drafter import Drafter
from mimo_jax.generate import Generator
from mimo_jax.model import LoadOptions, Model, load_model
from mimo_jax.params import Declared, Params
from mimo_jax.request import SamplingParams, batch_requests
from mimo_jax.speculative import DecodeState, ModelParams, Models, PromptChunk, Requests, decode, empty_state, prefill
from mimo_jax.tokenizer import Tokenizer


@cache
def golden_model(folder: Path, **options) -> Model:
    """A golden checkpoint, loaded once a set of options."""
    return load_model(folder, LoadOptions(**options))


def random_params(declared: Declared, seed: int, scale: float = 1.0) -> Params:
    """Normal weights of standard deviation scale / sqrt(fan in); norms near one."""
    leaves, structure = jax.tree.flatten(declared.shapes)
    rng = np.random.default_rng(seed)

    def leaf(shape, axes: tuple[str, ...], dtype) -> jax.Array:
        if axes[-1] == "embed" and len(shape) <= 2 and "vocab" not in axes and "features" not in axes:
            return jnp.asarray(1 + 0.1 * rng.standard_normal(shape), dtype)
        return jnp.asarray(scale * rng.standard_normal(shape) / np.sqrt(shape[-1]), dtype)

    named = jax.tree.leaves(declared.axes, is_leaf=lambda a: isinstance(a, tuple))
    return jax.tree.unflatten(structure, [leaf(s.shape, axes, s.dtype) for s, axes in zip(leaves, named, strict=True)])


def tiny_configs(
    window: int = 6, drafter_window: int | None = 10, vocab: int = 61, block: int = 8
) -> tuple[BackboneConfig, DrafterConfig]:
    """A backbone of five layers and its drafter; nothing is a multiple of anything by accident."""

    def attention(kv_heads: int, theta: float, sink: bool, visible: int | None, qk_dim: int = 12) -> AttentionConfig:
        return AttentionConfig(4, kv_heads, qk_dim, 8, 4, theta, sink, visible, 0.7)

    full, swa = LayerKind("full", "dense"), LayerKind("swa", "moe")
    backbone = BackboneConfig(
        vocab_size=vocab,
        hidden_size=32,
        layers=(full, swa, swa, LayerKind("full", "moe"), swa),
        full=attention(1, 1e6, False, None),
        swa=attention(2, 1e4, True, window),
        sliding_window=window - 1,
        dense_intermediate=40,
        moe=MoeConfig(6, 2, 24, 1, 1, True, 1.0),
        rms_eps=1e-5,
        max_positions=1 << 20,
        router_dtype="float32",
        fused_qkv=False,
        quantization=None,
        eos_ids=(),
    )
    drafter = DrafterConfig(
        hidden_size=32,
        num_layers=2,
        attention=attention(2, 1e4, True, drafter_window, 8),
        intermediate=40,
        rms_eps=1e-5,
        block_size=block,
        target_layer_ids=(0, 2, 4),
        num_target_layers=5,
        mask_token_id=vocab - 1,
    )
    return backbone, drafter


@cache  # programs are compiled once an instance
def _tiny_models(dtype: str, **shape) -> Models:
    config, drafter_config = tiny_configs(**shape)
    return Models(Declared(lambda: Backbone(config, dtype)), Declared(lambda: Drafter(drafter_config, dtype)))


def tiny_model(seed: int, dtype="float32", **shape) -> tuple[Models, ModelParams]:
    """A random backbone and drafter of `tiny_configs`."""
    models = _tiny_models(dtype, **shape)
    assert models.drafter is not None
    return models, ModelParams(random_params(models.backbone, seed, 1.5), random_params(models.drafter, seed + 1))


class Oracle(Drafter):
    """Knows that the backbone of `counting_model` counts: row r drafts the anchor + r, plus `offset`."""

    offset = 0

    def __call__(self, anchor, ring, lengths):
        size = self.config.hidden_size
        drafts = jnp.argmax(anchor, axis=-1)[:, None] + jnp.arange(self.config.block_size) + self.offset
        return jax.nn.one_hot((drafts - 1) % size, size, dtype=anchor.dtype)  # the head adds one


@cache
def counting_model(vocab: int, offset: int) -> tuple[Models, ModelParams]:
    """A backbone that follows token t with t + 1, and a drafter that is `offset` beyond: perfect at 0, else wrong.

    The embedding is the identity, layers add nothing, and the head is shifted by one.
    """
    config, drafter_config = tiny_configs(vocab=vocab)
    config, drafter_config = replace(config, hidden_size=vocab), replace(drafter_config, hidden_size=vocab)
    oracle = type("Oracle", (Oracle,), {"offset": offset})
    models = Models(Declared(lambda: Backbone(config, "float32")), Declared(lambda: oracle(drafter_config, "float32")))
    assert models.drafter is not None
    silent = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), models.backbone.shapes)
    identity = jnp.eye(vocab)
    head = jnp.roll(identity, 1, axis=0)
    params = silent | {"embedding": identity, "lm_head": head, "final_norm": jnp.ones(vocab)}
    return models, ModelParams(params, random_params(models.drafter, 0))


def byte_generator(models: Models, params: ModelParams, with_tokenizer: bool = True) -> Generator:
    """A model of the smallest vocabulary, whose tokens are bytes."""
    backend, ids = build_byte_tokenizer(SMALLEST_VOCABULARY)
    tokenizer = Tokenizer(backend, [ids.im_end], ChatTemplate(default_chat_template(), "default"))
    return Generator(Model(models, params, "float32", tokenizer if with_tokenizer else None))


@cache
def counter(offset: int = 0, with_tokenizer: bool = True) -> Generator:
    """Follows every byte with the next one; drafts are always right at offset 0 and always wrong otherwise."""
    return byte_generator(*counting_model(SMALLEST_VOCABULARY, offset), with_tokenizer)


def started(
    models: Models,
    params: ModelParams,
    prompts: list[list[int]],
    settings: list[SamplingParams],
    *,
    capacity: int = 256,
    chunk: int | None = None,
    eos: tuple[int, ...] = (),
) -> tuple[DecodeState, Requests, np.ndarray]:
    """A batch after its prefill: the state, the requests and the first tokens."""
    config = models.backbone.module.config
    requests = batch_requests(prompts, settings, eos, config.vocab_size)
    block = models.drafter.module.config.block_size if models.drafter else 1
    ring = drafter_ring(models.drafter.module.config, len(prompts), capacity, "float32") if models.drafter else None
    state = empty_state(
        backbone_cache(config, len(prompts), capacity, block, "float32", page_size=16), ring, config.vocab_size
    )
    chunk = chunk or max(map(len, prompts))
    firsts = np.zeros(len(prompts), np.int32)
    for start in range(0, max(map(len, prompts)), chunk):
        parts = [p[start : start + chunk] for p in prompts]
        last = np.array([start < len(p) <= start + chunk for p in prompts])
        tokens = jnp.asarray(np.array([p + [0] * (chunk - len(p)) for p in parts], np.int32))
        counts = jnp.asarray(np.array([len(p) for p in parts], np.int32))
        state, done = prefill(models, params, state, requests, PromptChunk(tokens, counts, jnp.asarray(last)))
        firsts = np.where(last, np.asarray(done.tokens)[:, 0], firsts)
    return state, requests, firsts


def decoded(
    models: Models,
    params: ModelParams,
    prompts: list[list[int]],
    settings: list[SamplingParams],
    verify_length: int,
    rounds: int = 64,
    **more,
) -> tuple[list[list[int]], list[list[int]]]:
    """Every row's new tokens, and the accepted lengths of its rounds (uncut, bonus included)."""
    state, requests, firsts = started(models, params, prompts, settings, **more)
    tokens = [[int(t)] for t in firsts]
    lengths: list[list[int]] = [[] for _ in prompts]
    while bool(np.asarray(state.active).any()):
        state, log = decode(models, params, state, requests, rounds=rounds, verify_length=verify_length)
        for r in range(log.ran):
            for row, n in enumerate(np.asarray(log.counts[r])):
                tokens[row] += np.asarray(log.tokens[r, row, :n]).tolist()
                if n:
                    lengths[row].append(int(log.accepted[r, row]) + 1)
    return tokens, lengths
