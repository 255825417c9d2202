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


def exponentials(scores: jax.Array, sink: jax.Array | None) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A softmax before its division.

    Args:
        scores: [batch, kv_heads, group, rows, keys] float32; -inf for keys that a row does not see.
        sink: [heads] float32 or None: a logit per head that takes part in the softmax and has no value.

    Returns:
        The highest logit of each row [..., rows, 1], the keys' exponentials relative to it [..., rows, keys], and the
        sum of all exponentials, the sink's included [..., rows, 1].
    """
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sink is None:
        weights = jnp.exp(scores - top)
        return top, weights, jnp.sum(weights, axis=-1, keepdims=True)
    logit = sink.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
    top = jnp.maximum(top, logit)
    weights = jnp.exp(scores - top)
    return top, weights, jnp.sum(weights, axis=-1, keepdims=True) + jnp.exp(logit - top)


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
