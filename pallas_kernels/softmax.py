"""What the attention references share: scores and weighted values with heads grouped over their KV head."""

import jax
import jax.numpy as jnp

from pallas_kernels.precision import matmul_precision


def grouped_scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Scaled scores [batch, kv_heads, group, rows, keys] float32 of q [batch, rows, heads, qk_dim] on k.

    Query head h uses KV head h div group; k is [batch, keys, kv_heads, qk_dim]. The scale is qk_dim ** -0.5.
    """
    batch, rows, heads, dim = q.shape
    grouped = q.reshape(batch, rows, k.shape[2], heads // k.shape[2], dim)
    scores = jnp.einsum(
        "btgrd,bsgd->bgrts",
        grouped,
        k.astype(q.dtype),
        precision=matmul_precision(q.dtype),
        preferred_element_type=jnp.float32,
    )
    return scores * dim**-0.5


def weighted_values(weights: jax.Array, v: jax.Array) -> jax.Array:
    """Sum of values v [batch, keys, kv_heads, v_dim] by weights [batch, kv_heads, group, rows, keys] float32.

    Returns [batch, rows, heads, v_dim] float32. Weights are rounded to v's dtype, as flash kernels do.
    """
    out = jnp.einsum(
        "bgrts,bsgd->btgrd",
        weights.astype(v.dtype),
        v,
        precision=matmul_precision(v.dtype),
        preferred_element_type=jnp.float32,
    )
    return out.reshape(*out.shape[:2], -1, out.shape[-1])
