"""Pieces that backbone and drafter share: declared parameters, RMSNorm, partial RoPE, linear over any weight type."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from mimo_jax.quantization import ByLayer, FP8BlockWeight, FP8Layer, Swapped, Weight, dequantize, inputs_first
from pallas_kernels.fp8_linear import fp8_linear
from pallas_kernels.precision import matmul_precision

Layer = jax.Array | int
"""Number of a layer: of its row in a stack, or of one held by layer."""


def declare(shape: tuple[int, ...], axes: tuple[str, ...], dtype: jax.typing.DTypeLike) -> nnx.Param:
    """A parameter that has a shape, a dtype and logical axis names, and no values worth keeping.

    Modules are built under `jax.eval_shape`: they declare what a checkpoint must fill.
    """
    return nnx.Param(jnp.zeros(shape, dtype), axes=axes)


def weight(parameter: nnx.Param, layer: Layer | None = None) -> Weight:
    """The weight in a parameter, of any type; with `layer`, that row of a stack of layers."""
    stack = parameter.get_value()
    if layer is None:
        return stack
    if isinstance(stack, ByLayer):
        return stack.layers[layer]
    if isinstance(stack, FP8BlockWeight):
        return FP8Layer(stack, layer)
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, layer, axis=0, keepdims=False), stack)


def array(parameter: nnx.Param, layer: Layer | None = None) -> jax.Array:
    """The same for a parameter that is never quantised."""
    held: Any = weight(parameter, layer)
    return dequantize(held, held.values.dtype) if isinstance(held, Swapped) else held


def over_layers[X, Y](step: Callable[[X, Layer], tuple[X, Y]], x: X, count: int, stack: nnx.Param) -> tuple[X, Y]:
    """Run step(x, i) for i below `count`, as `lax.scan`; `stack` is a parameter of the layers that it runs."""
    if not isinstance(stack.get_value(), ByLayer):
        return jax.lax.scan(step, x, jnp.arange(count, dtype=jnp.int32))
    made = []
    for i in range(count):
        x, y = step(x, i)
        made.append(y)
    return x, jax.tree.map(lambda *parts: jnp.stack(parts), *made)


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """X [..., in] times a weight [out, in] of any type, accumulated in float32: [..., out] in x's dtype."""
    if isinstance(w, FP8Layer):
        return fp8_linear(x, w.stack.values, w.stack.scales, layer=w.layer)
    # XLA's CPU backend reads a weight as it lies if the product is written so
    if isinstance(w, Swapped):
        spec, plain = "...i,io->...o", inputs_first(w, x.dtype)
    else:
        spec, plain = "...i,oi->...o", dequantize(w, x.dtype)
    y = jnp.einsum(spec, x, plain, precision=matmul_precision(x.dtype), preferred_element_type=jnp.float32)
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
