"""Window attention in plain `jnp`."""

import jax
import jax.numpy as jnp

from pallas_kernels.row_tiles import over_row_tiles, padded_rows
from pallas_kernels.softmax import exponentials, grouped_scores, weighted_values


def window_attention(
    q: jax.Array,
    ring_k: jax.Array,
    ring_v: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    layer: jax.Array | int,
    lengths: jax.Array,
    sink: jax.Array | None,
    *,
    visible_keys: int | None,
    causal: bool,
) -> jax.Array:
    """See `pallas_kernels.window_attention`."""
    rows, slots = q.shape[1], ring_k.shape[2]
    keys, values = (jax.lax.dynamic_index_in_dim(ring, layer, keepdims=False) for ring in (ring_k, ring_v))
    tail = ((0, 0), (0, padded_rows(rows) - rows), (0, 0), (0, 0))
    block_k, block_v = jnp.pad(block_k.astype(ring_k.dtype), tail), jnp.pad(block_v.astype(ring_v.dtype), tail)
    # by age, 0 for the newest committed position; none is older than the sequence's start
    age = (lengths[:, None, None] - 1 - jnp.arange(slots, dtype=jnp.int32)) % slots  # [batch, 1, slots]
    committed = age < lengths[:, None, None]

    def attend(first: jax.Array, q: jax.Array) -> jax.Array:
        # of a long block, rows need the keys of their windows alone
        count = block_k.shape[1]
        if causal and visible_keys is not None:
            count = min(count, q.shape[1] + visible_keys - 1)
        start = jnp.maximum(first + q.shape[1] - count, 0)
        k, v = (
            jnp.concatenate([ring, jax.lax.dynamic_slice_in_dim(block, start, count, axis=1)], axis=1)
            for ring, block in ((keys, block_k), (values, block_v))
        )
        row = first + jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
        key = start + jnp.arange(count, dtype=jnp.int32)
        in_ring, in_block = committed, key <= row if causal else key < rows
        if visible_keys is not None:
            in_ring = in_ring & (row + age + 1 < visible_keys)
            in_block = in_block & (row - key < visible_keys)
        shape = q.shape[0], q.shape[1]
        visible = jnp.concatenate(
            [jnp.broadcast_to(in_ring, (*shape, slots)), jnp.broadcast_to(in_block, (*shape, count))], axis=-1
        )
        scores = jnp.where(visible[:, None, None], grouped_scores(q, k), -jnp.inf)
        _, weights, total = exponentials(scores, sink)
        return weighted_values(weights / total, v).astype(q.dtype)

    return over_row_tiles(attend, q)
