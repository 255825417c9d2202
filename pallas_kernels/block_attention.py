"""Attention of many blocks of a sequence, each over the positions before it and over itself, to train a drafter with.

Decoding has one block a sequence, and the context before it in a ring (`window_attention`). Here blocks share the keys
of the whole sequence, which are read where they lie. Where it is longer than a few windows, each block's window is
taken out of it first, as one range: then a block costs the same whatever the length.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.softmax import exponentials, grouped_scores, weighted_values

LONG = 2
"""Windows that a context holds from which on they are taken out of it. Loss and gradients of 128 blocks with windows of
256 took half the time at 2 windows and a ninth at 8, on a CPU.
"""


def block_attention(
    q: jax.Array,
    context_k: jax.Array,
    context_v: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    *,
    layer: jax.Array | int,
    anchors: jax.Array,
    visible_keys: int | None,
    causal: bool,
    sink: jax.Array | None,
    first: jax.Array | int = 0,
    starts: jax.Array | int = 0,
) -> jax.Array:
    """Attend from each block's rows to the positions before its anchor and to the block.

    Args:
        q: [batch * blocks, rows, heads, qk_dim], sequence by sequence; row r of block n stands at anchors[n] + r.
        context_k: [layers, batch, positions, kv_heads, qk_dim].
        context_v: [layers, batch, positions, kv_heads, v_dim].
        block_k: [batch * blocks, rows, kv_heads, qk_dim].
        block_v: [batch * blocks, rows, kv_heads, v_dim].
        layer: Scalar int32: the row of the context's leading axis to read.
        anchors: [batch * blocks] int32.
        visible_keys: A query at position t sees keys after t - visible_keys, itself included; None: all.
        causal: Whether a row sees only itself and earlier rows of the block.
        sink: [heads] float32 or None: a logit per head that takes part in the softmax and has no value.
        first: Scalar int32: where the first of the context's positions stands; no row sees what stands below 0.
        starts: [batch * blocks] int32, or one for all, at least 0: where each block's document begins; no row sees what
            stands before it.

    Returns:
        [batch * blocks, rows, heads, v_dim] in q's dtype; scores and softmax in float32.
    """
    keys, values = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in (context_k, context_v))
    first = jnp.broadcast_to(jnp.asarray(first, jnp.int32), keys.shape[:1])
    if visible_keys is not None and keys.shape[1] > LONG * visible_keys:
        keys, values, first = _windows(keys, values, first, anchors, visible_keys - 1)
    batch, positions = keys.shape[:2]
    rows = q.shape[1]

    def by_sequence(x: jax.Array) -> jax.Array:
        """[batch * blocks, kv_heads, group, rows, keys] to [batch, kv_heads, group, blocks * rows, keys]."""
        x = x.reshape(batch, -1, *x.shape[1:])
        return x.transpose(0, 2, 3, 1, 4, 5).reshape(batch, *x.shape[2:4], -1, x.shape[5])

    def by_block(x: jax.Array) -> jax.Array:
        """The way back."""
        x = x.reshape(*x.shape[:3], -1, rows, x.shape[4])
        return x.transpose(0, 3, 1, 2, 4, 5).reshape(-1, *x.shape[1:3], *x.shape[4:])

    row = jnp.arange(rows, dtype=jnp.int32)
    at, begin = (x.reshape(batch, -1, 1) for x in (anchors, jnp.broadcast_to(starts, anchors.shape)))
    position = first[:, None, None] + jnp.arange(positions, dtype=jnp.int32)
    before = (position >= begin) & (position < at)
    in_context = jnp.broadcast_to(before[:, :, None], (*at.shape[:2], rows, positions))
    in_block = row <= row[:, None] if causal else jnp.ones((rows, rows), bool)
    if visible_keys is not None:
        in_context = in_context & ((at + row)[..., None] - position[:, :, None] < visible_keys)
        in_block = in_block & (row[:, None] - row < visible_keys)

    context = grouped_scores(q.reshape(batch, -1, *q.shape[2:]), keys)
    context = jnp.where(in_context.reshape(batch, 1, 1, -1, positions), context, -jnp.inf)
    own = by_sequence(jnp.where(in_block, grouped_scores(q, block_k), -jnp.inf))
    _, weights, total = exponentials(jnp.concatenate([context, own], axis=-1), sink)
    weights = weights / total
    out = weighted_values(weights[..., :positions], values).reshape(*q.shape[:3], -1)
    return (out + weighted_values(by_block(weights[..., positions:]), block_v)).astype(q.dtype)


def _windows(
    keys: jax.Array, values: jax.Array, first: jax.Array, anchors: jax.Array, width: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of keys and values [batch, positions, ...] the `width` positions before each anchor, as sequences of their own.

    Returns:
        [batch * blocks, width, ...] of both, and where each window begins.
    """
    batch, positions = keys.shape[:2]
    sequence = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), anchors.size // batch)
    start = jnp.clip(anchors - width - first[sequence], 0, positions - width)

    def window(x: jax.Array) -> jax.Array:
        def one(sequence: jax.Array, start: jax.Array) -> jax.Array:
            return jax.lax.dynamic_slice(x, (sequence, start, 0, 0), (1, width, *x.shape[2:]))[0]

        return jax.vmap(one)(sequence, start)

    return window(keys), window(values), first[sequence] + start
