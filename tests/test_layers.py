"""Norm, rotary embedding and linear layers against NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from mimo_jax.layers import linear, rms_norm, rope, swiglu
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def rotated(x: np.ndarray, angles: np.ndarray) -> np.ndarray:
    """x [rows, heads, dim] with its first 2n dimensions turned by angles [rows, n], in float64."""
    n = angles.shape[-1]
    x = x.astype(np.float64)
    pairs = (x[..., :n] + 1j * x[..., n : 2 * n]) * np.exp(1j * angles[:, None])
    return np.concatenate([pairs.real, pairs.imag, x[..., 2 * n :]], axis=-1)


ROPES = [(12, 4, 1e4), (12, 12, 1e4), (192, 64, 1e7), (128, 64, 5e6), (48, 16, 1e5)]


@pytest.mark.parametrize(("dim", "rotary", "theta"), ROPES)
def test_rope_at_small_positions(rng, dim, rotary, theta):
    x = rng.standard_normal((1, 40, 3, dim)).astype(np.float32)
    angles = np.arange(40)[:, None] * theta ** (-2 * np.arange(rotary // 2) / rotary)
    out = np.asarray(rope(jnp.asarray(x), jnp.arange(40)[None], rotary, theta))
    np.testing.assert_allclose(out[0], rotated(x[0], angles), atol=1e-5)
    np.testing.assert_array_equal(out[..., rotary:], x[..., rotary:])


@pytest.mark.parametrize(("dim", "rotary", "theta"), ROPES)
def test_rope_to_a_million_positions(rng, dim, rotary, theta):
    """The angle is the float32 product of position and frequency, as in every engine; its sine is then exact.

    At a million radians float32 angles lie 1/16 apart, so angles in float64 would be another model.
    """
    positions = np.array([0, 1, 131_071, 262_143, 524_288, 999_983, 1_048_574, 1_048_575])
    x = rng.standard_normal((1, len(positions), 2, dim)).astype(np.float32)
    frequencies = (theta ** (-2 * np.arange(rotary // 2) / rotary)).astype(np.float32)
    angles = (positions.astype(np.float32)[:, None] * frequencies).astype(np.float64)
    out = np.asarray(rope(jnp.asarray(x), jnp.asarray(positions)[None], rotary, theta))
    np.testing.assert_allclose(out[0], rotated(x[0], angles), atol=2e-5)


def test_rope_scores_depend_on_the_distance(rng):
    q, k = (jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.float32) for _ in range(2))

    def score(i: int, j: int) -> float:
        at = partial(rope, rotary_dim=8, theta=1e4)
        return float(jnp.sum(at(q, jnp.array([[i]])) * at(k, jnp.array([[j]]))))

    for distance in (0, 1, 17):
        np.testing.assert_allclose([score(s + distance, s) for s in (0, 5, 300)], score(distance, 0), atol=1e-4)


def test_rope_of_bfloat16_keeps_float32_angles(rng):
    x = jnp.asarray(rng.standard_normal((1, 1, 1, 16)), jnp.bfloat16)
    position = jnp.array([[1_000_001]])
    exact = rope(x.astype(jnp.float32), position, 16, 1e4)
    assert np.abs(np.asarray(rope(x, position, 16, 1e4).astype(jnp.float32) - exact)).max() < 0.05


@pytest.mark.parametrize("shape", [(3, 8), (2, 5, 64), (1, 1, 200)])
def test_rms_norm(rng, shape):
    x, scale = rng.standard_normal(shape).astype(np.float32), rng.standard_normal(shape[-1]).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + 1e-5) * scale
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5), wanted, rtol=1e-5, atol=1e-6)


def test_rms_norm_rounds_before_it_scales(rng):
    x, scale = (rng.standard_normal(256).astype(ml_dtypes.bfloat16) for _ in range(2))
    wide = x.astype(np.float32)
    normed = wide / np.sqrt((wide**2).mean() + np.float32(1e-5))
    first = (normed.astype(ml_dtypes.bfloat16) * scale).astype(np.float32)
    last = (normed * scale.astype(np.float32)).astype(ml_dtypes.bfloat16).astype(np.float32)
    got = np.asarray(rms_norm(jnp.asarray(x), jnp.asarray(scale), 1e-5).astype(jnp.float32))
    assert (first != last).any()
    assert (got == first).mean() > 0.98  # a last bit of the norm itself may differ
    assert (got == last).mean() < 0.9


def weights(kind: str, rows: int, columns: int, rng):
    """A weight of one stored kind, and its values in float64."""
    if kind == "plain":
        w = rng.standard_normal((rows, columns)).astype(np.float32)
        return jnp.asarray(w), w.astype(np.float64)
    if kind == "mxfp4":
        codes = rng.integers(0, 256, (rows, columns // 2), np.uint8)
        scales = rng.integers(120, 130, (rows, columns // 32), np.uint8)
        values = np.stack([E2M1[codes & 15], E2M1[codes >> 4]], -1).reshape(rows, columns)
        values *= np.repeat(2.0 ** (scales.astype(np.float64) - 127), 32, axis=1)
        return MXFP4Weight(jnp.asarray(codes), jnp.asarray(scales)), values
    tile = int(kind.removeprefix("fp8/"))
    stored = rng.standard_normal((rows, columns)).astype(ml_dtypes.float8_e4m3fn)
    scales = rng.uniform(0.1, 2, (rows // tile, -(-columns // 128))).astype(np.float32)
    values = np.repeat(np.repeat(scales, tile, 0), 128, 1)[:, :columns] * stored.astype(np.float64)
    return FP8BlockWeight(jnp.asarray(stored), jnp.asarray(scales)), values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("kind", "rows", "columns"),
    [
        ("plain", 24, 40),
        ("mxfp4", 24, 64),
        ("mxfp4", 5, 96),
        ("fp8/128", 256, 128),
        ("fp8/128", 128, 200),
        ("fp8/64", 192, 192),
        ("fp8/64", 64, 72),
    ],
)
def test_linear_on_every_kind_of_weight(rng, kind, rows, columns, dtype):
    w, values = weights(kind, rows, columns, rng)
    x = jnp.asarray(rng.standard_normal((2, 3, columns)), dtype)
    if dtype == "bfloat16":  # weights are rounded to the dtype of what they multiply
        values = values.astype(ml_dtypes.bfloat16).astype(np.float64)
    wanted = np.asarray(x.astype(jnp.float32), np.float64) @ values.T
    got = jax.jit(linear)(x, w)
    assert got.dtype == x.dtype
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    np.testing.assert_allclose(
        np.asarray(got.astype(jnp.float32)), wanted, atol=tolerance * np.abs(wanted).max(), rtol=0
    )


def test_swiglu(rng):
    gate, up = (rng.standard_normal((10, 6)).astype(np.float32) for _ in range(2))
    down, x = rng.standard_normal((6, 10)).astype(np.float32), rng.standard_normal((4, 6)).astype(np.float32)
    g = x.astype(np.float64) @ gate.T
    wanted = (g / (1 + np.exp(-g)) * (x.astype(np.float64) @ up.T)) @ down.T
    np.testing.assert_allclose(swiglu(*map(jnp.asarray, (x, gate, up, down))), wanted, rtol=1e-4, atol=1e-4)
