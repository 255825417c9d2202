"""The drafter: golden blocks of independent references, and the properties its mask must have."""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mimo_jax.cache import RingKV, drafter_ring
from mimo_jax.drafter import Drafter
from mimo_jax.evaluation.score import score_draft
from mimo_jax.params import Declared
from mimo_jax.speculative import ModelParams, Models
from tests.conftest import golden_folders, golden_id
from tests.models import golden_model, random_params, tiny_configs

PLAIN = {"sink": False, "visible_keys": None, "value_scale": 1.0, "rotary_dim": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "mimo": {},
    "mimo_no_sinks": {"sink": False},
    "mimo_no_window": {"visible_keys": None},
    "mimo_no_vscale": {"value_scale": 1.0},
    "mimo_full_rotary": {"rotary_dim": 16},
    "mimo_theta_backbone": {"rope_theta": 5e6},
    "mimo_causal": {},
    "mimo_postnorm_last": {},
    "zlab_plain": PLAIN,
    "zlab_plain_window": {k: v for k, v in PLAIN.items() if k != "visible_keys"},
    "sinks_only_full_rotary": {k: v for k, v in PLAIN.items() if k != "sink"},
}
"""What each reference run changes in the attention that the drafter's configuration names."""


@pytest.mark.parametrize("folder", golden_folders("dflash_*"), ids=golden_id)
@pytest.mark.parametrize("variant", VARIANTS)
def test_blocks_equal_the_reference(folder, variant):
    expected = load_file(folder / "block_golden.safetensors")
    model = golden_model(folder / "target", drafter=folder / "drafter_random")
    config, given = model.drafter_config, model.params.drafter
    assert config is not None
    assert given is not None
    assert config.attention.qk_dim == 16
    attention = replace(config.attention, **VARIANTS[variant])
    config = replace(config, attention=attention, block_causal=variant == "mimo_causal")
    params = {k: v for k, v in given["attention"].items() if attention.sink or k != "sink"}
    model = replace(
        model,
        models=Models(model.models.backbone, Declared(lambda: Drafter(config, "float32"))),
        params=ModelParams(model.params.backbone, given | {"attention": params}),
    )
    suffix = "_postnorm_last" if variant == "mimo_postnorm_last" else ""
    contexts = sorted({key.split(".")[0] for key in expected})
    longest = max(expected[f"{c}.target_features"].shape[1] for c in contexts)
    for context in contexts:
        features = expected[f"{context}.target_features{suffix}"]
        batch, length = features.shape[:2]
        # one width for all contexts: one compilation; what lies beyond the position is not seen
        padded = np.pad(features, ((0, 0), (0, longest - length), (0, 0)), constant_values=9.0)
        got = score_draft(model, padded, expected[f"{context}.anchor_token"], np.full(batch, length))
        for name in ("logits", "hidden"):
            np.testing.assert_allclose(got[name], expected[f"{context}.{variant}.{name}"], atol=2e-5, err_msg=context)


def _drafter(seed: int, layers: int = 2, window: int | None = 10, block: int = 8, causal: bool = False):
    _, config = tiny_configs(drafter_window=window, block=block)
    config = replace(config, num_layers=layers, block_causal=causal)
    declared = Declared(lambda: Drafter(config, "float32"))
    return config, declared, random_params(declared, seed, 1.5)


def _features(seed: int, config, length: int) -> jax.Array:
    """Features of at least `length` positions; one width for short contexts, so that they share a compilation."""
    shape = (1, max(48, length), len(config.target_layer_ids), config.hidden_size)
    return jax.random.normal(jax.random.key(seed), shape)


def _block(declared, params, features, anchor, position: int, slots: int | None = None) -> np.ndarray:
    """The block at `position`, its context computed by `context` and read from a ring."""
    return np.asarray(_filled(declared, params, features, anchor, jnp.array([position]), slots)[0])


@partial(jax.jit, static_argnames=("declared", "slots"))
def _filled(declared, params, features, anchor, count, slots) -> jax.Array:
    drafter, start = declared.bind(params), jnp.zeros(1, jnp.int32)
    ring = drafter_ring(drafter.config, 1, features.shape[1], "float32")
    if slots is not None:
        ring = RingKV(ring.k[:, :, :slots], ring.v[:, :, :slots])
    ring = ring.commit(drafter.context(features, start), start, count)
    return drafter(anchor, ring, count)


def _dense(declared, params, features, anchor, position: int) -> np.ndarray:
    """The same in one piece, in float64 NumPy: context and block concatenated under one explicit mask."""
    config, p = declared.module.config, jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    a = config.attention

    def norm(x, w):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.rms_eps) * w

    def rotate(x, positions):
        half = a.rotary_dim // 2
        angle = positions[:, None, None] * a.rope_theta ** (-np.arange(half) / half)
        z = (x[..., :half] + 1j * x[..., half : a.rotary_dim]) * np.exp(1j * angle)
        return np.concatenate([z.real, z.imag, x[..., a.rotary_dim :]], -1)

    def silu(x):
        return x / (1 + np.exp(-x))

    context = norm(
        np.asarray(features, np.float64)[0, :position].reshape(position, p["fc"].shape[1]) @ p["fc"].T, p["hidden_norm"]
    )
    x = np.concatenate([np.asarray(anchor, np.float64), np.tile(p["mask_embedding"], (config.block_size - 1, 1))])
    key_positions, rows = np.arange(position + config.block_size), position + np.arange(config.block_size)
    distance = rows[:, None] - key_positions
    visible = (key_positions < position) | (not config.block_causal) | (distance >= 0)
    if a.visible_keys is not None:
        visible = visible & (distance < a.visible_keys)
    for i in range(config.num_layers):
        n = norm(x, p["attention_norm"][i])
        both = np.concatenate([context, n])
        q = rotate(norm((n @ p["attention"]["q"][i].T).reshape(-1, a.heads, a.qk_dim), p["q_norm"][i]), rows)
        k = norm((both @ p["attention"]["k"][i].T).reshape(-1, a.kv_heads, a.qk_dim), p["k_norm"][i])
        k, v = (
            rotate(k, key_positions),
            (both @ p["attention"]["v"][i].T).reshape(-1, a.kv_heads, a.v_dim) * a.value_scale,
        )
        k, v = (np.repeat(t, a.heads // a.kv_heads, axis=1) for t in (k, v))
        scores = np.where(visible, np.einsum("rhd,khd->hrk", q, k) / np.sqrt(a.qk_dim), -np.inf)
        weights = np.exp(scores)
        sink = np.exp(p["attention"]["sink"][i])[:, None, None] if a.sink else 0.0
        out = np.einsum("hrk,khd->rhd", weights / (weights.sum(-1, keepdims=True) + sink), v)
        x = x + out.reshape(len(x), -1) @ p["attention"]["o"][i].T
        n = norm(x, p["mlp_norm"][i])
        x = x + (silu(n @ p["gate"][i].T) * (n @ p["up"][i].T)) @ p["down"][i].T
    return norm(x, p["final_norm"])


@pytest.mark.parametrize("window", [10, 4, None])
@pytest.mark.parametrize("causal", [False, True])
def test_cached_context_equals_one_dense_pass(seed, window, causal):
    config, declared, params = _drafter(seed, window=window, causal=causal)
    anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
    for position in (0, 1, 7, 8, 9, 10, 11, 17, 40):
        features = _features(seed, config, position)
        got = _block(declared, params, features, anchor, position)
        np.testing.assert_allclose(got, _dense(declared, params, features, anchor, position), atol=1e-5)


def test_window_of_1024_at_its_edges(seed):
    config, declared, params = _drafter(seed, window=1024)
    anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
    for position in (1022, 1023, 1024, 1030, 5000):
        features = _features(seed, config, position)
        got = _block(declared, params, features, anchor, position)
        np.testing.assert_allclose(got, _dense(declared, params, features, anchor, position), atol=1e-5)


def test_which_context_a_row_sees(seed):
    """Window W: position p - W reaches nothing, p - W + 1 reaches row 0 of one layer only, p never anything."""
    window, position = 10, 30
    for layers in (1, 2):
        config, declared, params = _drafter(seed, layers=layers, window=window)
        anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
        features = _features(seed, config, position + 1)
        base = _block(declared, params, features, anchor, position)

        def moved(at, declared=declared, params=params, features=features, anchor=anchor, base=base):
            changed = _block(declared, params, features.at[:, at].add(1.0), anchor, position)
            return np.abs(changed - base).max(-1) > 0

        assert not moved(position - window).any()
        assert not moved(position).any()
        edge = moved(position - window + 1)
        assert edge[0]
        assert edge[1:].any() == (layers > 1)
        assert moved(position - 1).all()


@pytest.mark.parametrize("causal", [False, True])
def test_later_rows_reach_earlier_ones_only_if_bidirectional(seed, causal):
    config, declared, params = _drafter(seed, causal=causal)
    anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
    features = _features(seed, config, 12)
    base = _block(declared, params, features, anchor, 12)
    # the anchor is row 0: under a causal mask every row still sees it; a longer block must not change earlier rows
    longer = replace(config, block_size=config.block_size + 1)
    extended = _block(Declared(lambda: Drafter(longer, "float32")), params, features, anchor, 12)
    same = np.allclose(extended[: config.block_size], base, atol=1e-6)
    assert same == causal


def test_sink_at_minus_infinity_is_plain_softmax_and_value_scale_is_linear(seed):
    config, declared, params = _drafter(seed, layers=1)
    anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
    features = _features(seed, config, 12)
    attention = params["attention"]
    off = params | {"attention": attention | {"sink": jnp.full_like(attention["sink"], -jnp.inf)}}
    plain_config = replace(config, attention=replace(config.attention, sink=False))
    plain = params | {"attention": {k: v for k, v in attention.items() if k != "sink"}}
    np.testing.assert_allclose(
        _block(declared, off, features, anchor, 12),
        _block(Declared(lambda: Drafter(plain_config, "float32")), plain, features, anchor, 12),
        atol=1e-6,
    )
    # doubling the scale equals doubling W_v
    doubled = replace(config, attention=replace(config.attention, value_scale=2 * config.attention.value_scale))
    np.testing.assert_allclose(
        _block(Declared(lambda: Drafter(doubled, "float32")), params, features, anchor, 12),
        _block(declared, params | {"attention": attention | {"v": 2 * attention["v"]}}, features, anchor, 12),
        atol=1e-5,
    )


def test_ring_needs_the_window_minus_one_and_no_more(seed):
    config, declared, params = _drafter(seed, window=10)
    anchor = jax.random.normal(jax.random.key(seed + 1), (1, config.hidden_size))
    for position in (5, 9, 10, 23, 31):
        features = _features(seed, config, position)
        whole = _block(declared, params, features, anchor, position)
        np.testing.assert_allclose(_block(declared, params, features, anchor, position, slots=9), whole, atol=1e-5)
    short = _block(declared, params, features, anchor, position, slots=8)
    assert np.abs(short - whole).max() > 1e-3
