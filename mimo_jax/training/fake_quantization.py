"""Quantisation-aware training: the forward pass sees the weights that will be stored, gradients pass straight through.

Experts see MXFP4, the linears that the release keeps in FP8 see four significant bits, all else but the router sees
bfloat16.
"""

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

    def stored(path: tuple, value: jax.Array, names: tuple[str, ...]) -> jax.Array:
        leaf = path[-1].key
        if leaf in _FLOAT32:
            return value
        if "expert" in names:
            return _straight_through(value, mxfp4.decode(*mxfp4.encode(value), value.dtype))
        # o_proj stays in bfloat16, as in the release
        bits = 3 if is_matrix(names) and leaf != "o" else 7
        return _straight_through(value, jax.lax.reduce_precision(value, exponent_bits=8, mantissa_bits=bits))

    return jax.tree_util.tree_map_with_path(stored, params, axes)


@jax.custom_vjp
def _straight_through(value: jax.Array, stored: jax.Array) -> jax.Array:
    """`stored`, exactly, with the gradient of `value`: adding a difference would round."""
    return stored


def _forward(value: jax.Array, stored: jax.Array) -> tuple[jax.Array, None]:
    return stored, None


def _backward(_: None, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    return gradient, jnp.zeros_like(gradient)


_straight_through.defvjp(_forward, _backward)
