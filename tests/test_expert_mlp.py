"""Experts over routed tokens, against one token and one expert at a time in float64 NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import expert_mlp as op
from pallas_kernels.expert_mlp import expert_mlp, plain_expert_mlp
from pallas_kernels.mxfp4_expert_mlp import mxfp4_expert_mlp

MAGNITUDES = [0, 0.5, 1, 1.5, 2, 3, 4, 6]


@jax.jit
def run_plain(x, ids, weights, gate_up, down):
    return expert_mlp(
        x, ids, weights, lambda e: (gate_up[e].swapaxes(-1, -2), down[e].swapaxes(-1, -2)), gate_up.shape[0]
    )


run_packed = jax.jit(mxfp4_expert_mlp)


def expected(x, ids, weights, gate_up, down):
    x, weights, gate_up, down = (np.asarray(a, np.float64) for a in (x, weights, gate_up, down))
    out = np.zeros_like(x)
    for token in range(x.shape[0]):
        for expert, weight in zip(ids[token], weights[token], strict=True):
            gate, up = gate_up[expert] @ x[token]
            out[token] += weight * (down[expert] @ (gate / (1 + np.exp(-gate)) * up))
    return out


def routing(kind, tokens, top_k, experts, rng):
    """ids [tokens, top_k], different within a token unless the kind says otherwise."""
    if kind == "random":
        ids = np.stack([rng.permutation(experts)[:top_k] for _ in range(tokens)])
    elif kind == "one takes all":  # its tiles are full, one expert a further place, all others are empty
        ids = np.tile(np.roll(np.arange(experts), -(experts - 1))[:top_k], (tokens, 1))
    elif kind == "last only":  # the same expert top_k times, which no router gives
        ids = np.full((tokens, top_k), experts - 1)
    else:
        assert kind == "uneven"
        odds = 2.0 ** -np.arange(experts)
        ids = np.stack([rng.choice(experts, top_k, replace=False, p=odds / odds.sum()) for _ in range(tokens)])
    return ids.astype(np.int32)


def make(tokens, top_k, experts, hidden, inner, kind, rng):
    x = rng.normal(size=(tokens, hidden)).astype(np.float32)
    gate_up = (rng.normal(size=(experts, 2, inner, hidden)) / np.sqrt(hidden)).astype(np.float32)
    down = (rng.normal(size=(experts, hidden, inner)) / np.sqrt(inner)).astype(np.float32)
    weights = rng.uniform(0.1, 1, size=(tokens, top_k)).astype(np.float32)
    return x, routing(kind, tokens, top_k, experts, rng), weights, gate_up, down


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "kind"),
    [
        (1, 1, 5, 12, 6, "random"),
        (1, 8, 12, 12, 6, "random"),
        (7, 2, 4, 12, 6, "random"),
        (7, 2, 4, 12, 6, "last only"),
        (8, 3, 9, 20, 10, "one takes all"),
        (8, 8, 8, 12, 6, "random"),
        (9, 1, 3, 12, 6, "one takes all"),
        (40, 5, 16, 12, 6, "uneven"),
        (33, 1, 1, 12, 6, "random"),
        (33, 4, 6, 12, 6, "last only"),
        (300, 2, 3, 12, 6, "uneven"),
        (300, 2, 3, 12, 6, "one takes all"),
    ],
)
def test_float32(tokens, top_k, experts, hidden, inner, kind, rng):
    given = make(tokens, top_k, experts, hidden, inner, kind, rng)
    out = run_plain(*given)
    assert out.dtype == jnp.float32
    np.testing.assert_allclose(out, expected(*given), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "kind"),
    [
        (1, 1, 3, "random"),
        (9, 2, 4, "uneven"),
        (40, 3, 5, "one takes all"),
        (300, 2, 3, "uneven"),
        (7, 2, 4, "last only"),
    ],
)
def test_gradients_equal_those_of_the_dense_sum(tokens, top_k, experts, kind, rng):
    """Stacked, one layer of three in use: the others' gradients are zero."""
    x, ids, weights, gate_up, down = make(tokens, top_k, experts, 12, 6, kind, rng)
    stacked = [np.stack([rng.normal(size=w.shape).astype(np.float32), w, w]) for w in (gate_up, down)]
    direction = rng.normal(size=x.shape).astype(np.float32)

    def dense(x, weights, gate_up, down):
        share = jnp.zeros((tokens, experts)).at[jnp.arange(tokens)[:, None], ids].add(weights)
        gate, up = jnp.einsum("ti,egoi->geto", x, gate_up[1], precision="highest")
        y = jnp.einsum("eto,eio->eti", jax.nn.silu(gate) * up, down[1], precision="highest")
        return jnp.vdot(jnp.einsum("te,eti->ti", share, y, precision="highest"), direction)

    def tiled(x, weights, gate_up, down):
        return jnp.vdot(plain_expert_mlp(x, jnp.asarray(ids), weights, gate_up, down, jnp.int32(1)), direction)

    for got, wanted in zip(
        *(jax.jit(jax.grad(f, argnums=(0, 1, 2, 3)))(x, weights, *stacked) for f in (tiled, dense)), strict=True
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tokens", [16, 17, 32, 33, 64, 65, 128, 129])
def test_every_tile_size(tokens, rng):
    """4 experts, 2 a token: a tile of 8 up to 16 tokens, then 16, 32, 64, and 128 from 129 on; edges of each."""
    given = make(tokens, 2, 4, 8, 4, "uneven", rng)
    np.testing.assert_allclose(run_plain(*given), expected(*given), rtol=1e-5, atol=1e-5)


def test_only_chosen_experts_are_read(rng):
    x, _, weights, gate_up, down = make(6, 2, 8, 12, 6, "random", rng)
    ids = rng.permuted(np.tile([2, 5], (6, 1)), axis=1).astype(np.int32)
    broken = np.isin(np.arange(8), [2, 5], invert=True)
    gate_up[broken], down[broken] = np.nan, np.nan
    assert np.isfinite(run_plain(x, ids, weights, gate_up, down)).all()


def test_a_token_does_not_depend_on_the_others(rng):
    given = make(21, 3, 5, 12, 6, "random", rng)
    whole = run_plain(*given)
    x, ids, weights, *matrices = given
    for token in (0, 13, 20):
        alone = run_plain(x[token : token + 1], ids[token : token + 1], weights[token : token + 1], *matrices)
        np.testing.assert_allclose(alone[0], whole[token], rtol=1e-5, atol=1e-6)


def test_bfloat16(rng):
    x, ids, weights, gate_up, down = make(24, 3, 5, 32, 16, "random", rng)
    x, gate_up, down = (jnp.asarray(a, jnp.bfloat16) for a in (x, gate_up, down))
    out = run_plain(x, ids, weights, gate_up, down)
    assert out.dtype == jnp.float32  # sums stay as accurate as they were made
    x, gate_up, down = (np.asarray(a.astype(jnp.float32)) for a in (x, gate_up, down))
    reference = expected(x, ids, weights, gate_up, down)
    np.testing.assert_allclose(np.asarray(out.astype(jnp.float32)), reference, rtol=2e-2, atol=2e-2)


def packed(shape, rng):
    """Random codes and scales [..., out, in] and what they stand for, decoded here in float64."""
    codes = rng.integers(0, 256, size=(*shape[:-1], shape[-1] // 2), dtype=np.uint8)
    scales = rng.integers(121, 127, size=(*shape[:-1], shape[-1] // 32), dtype=np.uint8)
    nibbles = np.stack([codes & 15, codes >> 4], axis=-1).reshape(shape)
    values = np.array([*MAGNITUDES, *(-m for m in MAGNITUDES)])[nibbles]
    return codes, scales, values * np.repeat(2.0 ** (scales.astype(np.int64) - 127), 32, axis=-1)


@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "hidden", "inner", "kind"),
    [
        (1, 1, 3, 32, 32, "random"),
        (8, 8, 9, 64, 32, "random"),
        (6, 4, 16, 32, 96, "uneven"),
        (70, 2, 3, 64, 32, "one takes all"),
    ],
)
def test_packed(tokens, top_k, experts, hidden, inner, kind, rng):
    layers = 3
    x, ids, weights, _, _ = make(tokens, top_k, experts, hidden, inner, kind, rng)
    x /= np.float32(4)
    gate_up_codes, gate_up_scales, gate_up = packed((layers, experts, 2, inner, hidden), rng)
    down_codes, down_scales, down = packed((layers, experts, hidden, inner), rng)
    for layer in range(layers):
        out = run_packed(
            x, ids, weights, gate_up_codes, gate_up_scales, down_codes, down_scales, layer=jnp.int32(layer)
        )
        expanded = run_plain(x, ids, weights, gate_up[layer].astype(np.float32), down[layer].astype(np.float32))
        np.testing.assert_array_equal(out, expanded)
        reference = expected(x, ids, weights, gate_up[layer], down[layer])
        np.testing.assert_allclose(out, reference, rtol=2e-5, atol=2e-5 * np.abs(reference).max())


def test_packed_reads_only_the_layer_and_experts_it_needs(rng):
    x, _, weights, _, _ = make(5, 2, 6, 32, 32, "random", rng)
    ids = np.tile(np.array([1, 4], np.int32), (5, 1))
    gate_up_codes, gate_up_scales, _ = packed((2, 6, 2, 32, 32), rng)
    down_codes, down_scales, _ = packed((2, 6, 32, 32), rng)
    args = x, ids, weights, gate_up_codes
    before = run_packed(*args, gate_up_scales, down_codes, down_scales, layer=jnp.int32(1))
    for scales in (gate_up_scales, down_scales):
        scales[0], scales[1, [0, 2, 3, 5]] = 255, 255  # NaN
    after = run_packed(*args, gate_up_scales, down_codes, down_scales, layer=jnp.int32(1))
    np.testing.assert_array_equal(before, after)


def test_tile_bounds_are_what_the_cases_assume():
    assert (op.MIN_TILE, op.MAX_TILE) == (8, 128)
