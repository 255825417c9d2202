"""Attention in rows that hold several documents, one after the other: each sees itself alone, as it would by itself.

For training, where nothing is cached.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.row_tiles import over_row_tiles, padded_rows
from pallas_kernels.softmax import exponentials, grouped_scores, weighted_values


def packed_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    positions: jax.Array,
    visible_keys: int | None,
    sink: jax.Array | None,
) -> jax.Array:
    """Attend from each row to itself and to earlier rows of its document.

    Args:
        q: [batch, rows, heads, qk_dim].
        k: [batch, rows, kv_heads, qk_dim].
        v: [batch, rows, kv_heads, v_dim].
        positions: [batch, rows] int32: where each row stands in its document, whose first row is the one at 0.
        visible_keys: A query at position t sees keys after t - visible_keys, itself included; None: all.
        sink: [heads] float32 or None: a logit per head that takes part in the softmax and has no value.

    Returns:
        [batch, rows, heads, v_dim] in q's dtype; scores and softmax in float32.
    """
    tail = (0, padded_rows(q.shape[1]) - q.shape[1])
    k, v = (jnp.pad(x, ((0, 0), tail, (0, 0), (0, 0))) for x in (k, v))
    # documents lie whole, so how far back a row sees says all
    reach = positions if visible_keys is None else jnp.minimum(positions, visible_keys - 1)
    reach = jnp.pad(reach, ((0, 0), tail))

    def attend(first: jax.Array, q: jax.Array) -> jax.Array:
        rows, count = q.shape[1], k.shape[1]
        if visible_keys is not None:
            count = min(count, rows + visible_keys - 1)
        start = jnp.maximum(first + rows - count, 0)
        keys, values = (jax.lax.dynamic_slice_in_dim(x, start, count, axis=1) for x in (k, v))
        back = (first + jnp.arange(rows, dtype=jnp.int32))[:, None] - (start + jnp.arange(count, dtype=jnp.int32))
        visible = (back >= 0) & (back <= jax.lax.dynamic_slice_in_dim(reach, first, rows, axis=1)[..., None])
        scores = jnp.where(visible[:, None, None], grouped_scores(q, keys), -jnp.inf)
        _, weights, total = exponentials(scores, sink)
        return weighted_values(weights / total, values).astype(q.dtype)

    return over_row_tiles(attend, q)
