"""Pieces that backbone and drafter share: declared parameters, RMSNorm, partial RoPE, linear over any weight type."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.quantization import Weight, dequantize
from pallas_kernels.precision import matmul_precision


def declare(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jax.typing.DTypeLike) -> nnx.Param:
    """A parameter that has a shape, a dtype and logical axis names, and no values worth keeping.

    Modules are built under `jax.eval_shape`: they declare what a checkpoint must fill.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def weight(parameter: nnx.Param, layer: jax.Array | None = None) -> Weight:
    """The weight in a parameter, of any type; with `layer`, that row of a stack of layers."""
    stack = parameter.get_value()
    return stack if layer is None else jax.tree.map(partial(_row, layer=layer), stack)


def array(parameter: nnx.Param, layer: jax.Array | None = None) -> jax.Array:
    """The same for a parameter that is never quantised."""
    stack = parameter.get_value()
    return stack if layer is None else _row(stack, layer)


def _row(stack: jax.Array, layer: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(stack, layer, axis=0, keepdims=False)


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """X [..., in] times a weight [out, in] of any type, accumulated in float32: [..., out] in x's dtype."""
    plain = dequantize(w, x.dtype)
    y = jnp.einsum("...i,oi->...o", x, plain, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
    return y.astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis in float32, rounded to x's dtype before the learned scale is applied."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return normed.astype(x.dtype) * scale.astype(x.dtype)


def rope(x: jax.Array, positions: jax.Array, rotary_dim: int, theta: float) -> jax.Array:
    """Rotate the first `rotary_dim` dimensions of every head, the rest pass through (NeoX halves: pairs i, i + R/2).

    Args:
        x: [batch, rows, heads, dim].
        positions: [batch, rows] int32, absolute.
        rotary_dim: R, even.
        theta: Base of the frequencies theta**(-2i / R).

    Angles are float32 products of integer positions; at a million positions bfloat16 would lose all of them.
    """
    half = rotary_dim // 2
    frequencies = (1.0 / theta ** (np.arange(half, dtype=np.float64) / half)).astype(np.float32)
    angles = positions[..., None, None].astype(jnp.float32) * frequencies  # [batch, rows, 1, R / 2]
    cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
    first, second, rest = jnp.split(x, [half, rotary_dim], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1)


def swiglu(x: jax.Array, gate: Weight, up: Weight, down: Weight) -> jax.Array:
    """The dense MLP: down(silu(gate x) * up x), with neither clamp nor bias."""
    return linear(jax.nn.silu(linear(x, gate)) * linear(x, up), down)
