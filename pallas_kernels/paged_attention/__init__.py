"""Attention over all committed keys, which lie in pages, and causally over the block of rows being computed."""

import jax

from pallas_kernels import backends
from pallas_kernels.backends import Backend


def paged_attention(
    q: jax.Array,
    k_pages: jax.Array,
    v_pages: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    *,
    layer: jax.Array | int,
    page_table: jax.Array,
    lengths: jax.Array,
    sink: jax.Array | None,
    backend: Backend | None = None,
) -> jax.Array:
    """Attend from a block's rows to every committed position and to earlier rows of the block.

    Args:
        q: [batch, rows, heads, qk_dim]; row r of sequence b stands at position lengths[b] + r.
        k_pages: [layers, pages, page_size, kv_heads, qk_dim].
        v_pages: [layers, pages, page_size, kv_heads, v_dim].
        block_k: [batch, rows, kv_heads, qk_dim].
        block_v: [batch, rows, kv_heads, v_dim].
        layer: Scalar int32: the row of the pages' leading axis to read.
        page_table: [batch, pages per sequence] int32.
        lengths: [batch] int32, committed positions.
        sink: [heads] float32 or None: a logit per head that takes part in the softmax and has no value.
        backend: Of `backends.Backend`; None: what `backends.use` asked for.

    Returns:
        [batch, rows, heads, v_dim] in q's dtype; scores and softmax in float32.

    Raises:
        NotImplementedError: The backend that was asked for does not support these arguments.
    """
    return backends.run(
        "paged_attention", backend, q, k_pages, v_pages, block_k, block_v, layer, page_table, lengths, sink
    )
