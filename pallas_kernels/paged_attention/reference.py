"""Paged attention in plain `jnp`.

It walks the pages with an online softmax, so that neither time nor memory depends on how far a sequence may
grow, only on how far it has grown.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.row_tiles import over_row_tiles
from pallas_kernels.softmax import exponentials, grouped_scores, weighted_values

KEYS_PER_STEP = 256


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    layer: jax.Array | int,
    page_table: jax.Array,
    lengths: jax.Array,
    sink: jax.Array | None,
) -> jax.Array:
    """See `pallas_kernels.paged_attention`."""
    batch, _, heads, _ = q.shape
    kv_heads, v_dim = v_pages.shape[3:]
    page_size, columns = k_pages.shape[2], page_table.shape[1]
    step = min(columns, max(1, KEYS_PER_STEP // page_size))  # pages a step
    keys = step * page_size

    def by_row(x: jax.Array) -> jax.Array:
        """[batch, kv_heads, group, rows, 1] to [batch, rows, heads, 1]."""
        return x.transpose(0, 3, 1, 2, 4).reshape(batch, x.shape[3], heads, 1)

    def attend(first: jax.Array, q: jax.Array) -> jax.Array:
        row = first + jnp.arange(q.shape[1], dtype=jnp.int32)[:, None]
        earlier = jnp.arange(block_k.shape[1], dtype=jnp.int32) <= row
        scores = jnp.where(earlier, grouped_scores(q, block_k), -jnp.inf)  # [batch, kv_heads, group, rows, block]
        top, weights, total = exponentials(scores, sink)
        out = weighted_values(weights, block_v)  # [batch, rows, heads, v_dim]

        def add_pages(
            i: jax.Array, carry: tuple[jax.Array, jax.Array, jax.Array]
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            top, total, out = carry
            # the last step is moved back inside the table; what earlier steps have seen is masked
            start = jnp.minimum(i * step, columns - step)
            page = jax.lax.dynamic_slice_in_dim(page_table, start, step, axis=1)
            k = k_pages[layer, page].reshape(batch, keys, kv_heads, -1)
            v = v_pages[layer, page].reshape(batch, keys, kv_heads, v_dim)
            position = start * page_size + jnp.arange(keys, dtype=jnp.int32)
            visible = (position < lengths[:, None]) & (position >= i * keys)  # [batch, keys]
            scores = jnp.where(visible[:, None, None, None], grouped_scores(q, k), -jnp.inf)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1, keepdims=True))
            shrink = jnp.exp(top - new_top)
            weights = jnp.exp(scores - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1, keepdims=True)
            return new_top, total, out * by_row(shrink) + weighted_values(weights, v)

        if columns:  # without pages, as in training, nothing is committed and no loop stands in the way of gradients
            steps = (jnp.max(lengths) + keys - 1) // keys
            _, total, out = jax.lax.fori_loop(0, steps, add_pages, (top, total, out))
        return (out / by_row(total)).astype(q.dtype)

    return over_row_tiles(attend, q)
