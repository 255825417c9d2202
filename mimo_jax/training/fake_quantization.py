"""Quantisation-aware training: the forward pass sees the weights that will be stored, gradients pass straight through.

Experts see MXFP4, the linears that the release keeps in FP8 see e4m3's values, all else but the router sees bfloat16.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.params import Params
from mimo_jax.training.optimizers import is_matrix
from pallas_kernels import mxfp4

_FLOAT32 = frozenset({"router", "correction_bias"})


def as_stored(params: Params, axes: Params) -> Params:
    """A backbone's plain parameters as they come back from a checkpoint; gradients are those of `params`.

    Args:
        params: Float32.
        axes: The logical axes of each (`Declared.axes`).
    """
    # o_proj stays in bfloat16, as in the release
    fp8 = {k for k, names in axes.items() if isinstance(names, tuple) and is_matrix(names) and k != "o"}
    fp8 -= {k for k in fp8 if "expert" in axes[k]}
    return {name: _leaf(value, axes[name], params, fp8, name) for name, value in params.items()}


def _leaf(value: Any, names: Any, siblings: Params, fp8: set[str], name: str) -> Any:
    if isinstance(value, dict):
        return as_stored(value, names)
    if name in _FLOAT32:
        return value
    if "expert" in names:
        return _straight_through(value, mxfp4.decode(*mxfp4.encode(value), value.dtype))
    if name not in fp8:
        return _straight_through(value, jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=7))
    # A tile of scales may hold rows of several siblings (q, k and v): what is a multiple of the smallest step under the
    # largest scale that any of them can have, is one under all.
    largest = jnp.stack([jnp.max(jnp.abs(_four_bits(siblings[k]))) for k in sorted(fp8)]).max()
    mantissa, exponent = jnp.frexp(largest / 448)
    step = jnp.ldexp(jnp.float32(2.0**-9), exponent - (mantissa == 0.5).astype(exponent.dtype))
    rounded = _four_bits(value)
    subnormal = jnp.abs(rounded) < 8 * step
    return _straight_through(value, jnp.where(subnormal, jnp.round(value / step) * step, rounded))


def _four_bits(value: jax.Array) -> jax.Array:
    """Rounded to e4m3's four significant bits, with any exponent."""
    return jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=3)


@jax.custom_vjp
def _straight_through(value: jax.Array, stored: jax.Array) -> jax.Array:
    """`stored`, exactly, with the gradient of `value`: adding a difference would round."""
    return stored


def _forward(value: jax.Array, stored: jax.Array) -> tuple[jax.Array, None]:
    return stored, None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.zeros_like(gradient)


_straight_through.defvjp(_forward, _backward)
