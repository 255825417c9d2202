"""The FP8 linear layer in plain `jnp`: the weight is expanded."""

import jax
import jax.numpy as jnp

from pallas_kernels import fp8
from pallas_kernels.precision import matmul_precision


def fp8_linear(x: jax.Array, values: jax.Array, scales: jax.Array, layer: jax.Array | int) -> jax.Array:
    """See `pallas_kernels.fp8_linear`."""
    own, tiles = (jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False) for stack in (values, scales))
    y = jnp.einsum(
        "...i,oi->...o",
        x,
        fp8.decode(own, tiles, x.dtype),
        precision=matmul_precision(x.dtype),
        preferred_element_type=jnp.float32,
    )
    return y.astype(x.dtype)
