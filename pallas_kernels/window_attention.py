"""Attention over a ring of committed keys and the block of rows being computed.

One op serves sliding-window layers (prefill chunks, verification, decode) and the drafter's bidirectional block.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import grouped_scores, weighted_values


def window_attention(
    q: jax.Array,
    ring_k: jax.Array,
    ring_v: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    *,
    layer: jax.Array,
    lengths: jax.Array,
    visible_keys: int | None,
    causal: bool,
    sink: jax.Array | None,
) -> jax.Array:
    """Attend from a block's rows to the ring and to the block.

    Args:
        q: [batch, rows, heads, qk_dim]; row r of sequence b stands at position lengths[b] + r.
        ring_k: [layers, batch, slots, kv_heads, qk_dim]; position c < length lies in slot c mod slots.
        ring_v: [layers, batch, slots, kv_heads, v_dim].
        block_k: [batch, rows, kv_heads, qk_dim].
        block_v: [batch, rows, kv_heads, v_dim].
        layer: Scalar int32: the row of the ring's leading axis to read.
        lengths: [batch] int32, committed positions.
        visible_keys: A query at position t sees keys after t - visible_keys, itself included; None: all. Where the
            ring is shorter than that minus one, the oldest of these keys are gone.
        causal: Whether a row sees only itself and earlier rows of the block.
        sink: [heads] float32 or None: a logit per head that takes part in the softmax and has no value.

    Returns:
        [batch, rows, heads, v_dim] in q's dtype; scores and softmax in float32.
    """
    rows, slots = q.shape[1], ring_k.shape[2]
    k = jnp.concatenate([jax.lax.dynamic_index_in_dim(ring_k, layer, keepdims=False), block_k.astype(ring_k.dtype)], 1)
    v = jnp.concatenate([jax.lax.dynamic_index_in_dim(ring_v, layer, keepdims=False), block_v.astype(ring_v.dtype)], 1)

    # Positions relative to the first row: committed keys are negative, and none is older than the sequence's start.
    row = jnp.arange(rows, dtype=jnp.int32)
    last = lengths[:, None] - 1
    age = (last - jnp.arange(slots, dtype=jnp.int32)) % slots  # [batch, slots], 0 for the newest position
    in_ring = jnp.broadcast_to((age < lengths[:, None])[:, None], (q.shape[0], rows, slots))
    in_block = jnp.broadcast_to(row <= row[:, None] if causal else jnp.ones((rows, rows), bool), (1, rows, rows))
    if visible_keys is not None:
        in_ring &= row[:, None] + age[:, None] + 1 < visible_keys
        in_block &= row[:, None] - row < visible_keys
    in_block = jnp.broadcast_to(in_block, (q.shape[0], rows, rows))
    visible = jnp.concatenate([in_ring, in_block], axis=-1)  # [batch, rows, slots + rows]

    scores = jnp.where(visible[:, None, None], grouped_scores(q, k), -jnp.inf)
    top = jnp.max(scores, axis=-1, keepdims=True)
    if sink is not None:
        logit = sink.astype(jnp.float32).reshape(1, *scores.shape[1:3], 1, 1)
        top = jnp.maximum(top, logit)
    weights = jnp.exp(scores - top)
    total = jnp.sum(weights, axis=-1, keepdims=True)
    if sink is not None:
        total = total + jnp.exp(logit - top)
    return weighted_values(weights / total, v).astype(q.dtype)
