"""One decision about matmul precision, for kernels and models alike."""

import jax
import jax.numpy as jnp


def matmul_precision(dtype: jax.typing.DTypeLike) -> jax.lax.Precision:
    """float32 means float32, not the tensor cores' TF32; anything shorter takes the fast path."""
    return jax.lax.Precision.HIGHEST if dtype == jnp.float32 else jax.lax.Precision.DEFAULT
