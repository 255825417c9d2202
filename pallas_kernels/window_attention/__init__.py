"""Attention over a ring of committed keys and the block of rows being computed.

One op serves sliding-window layers (prefill chunks, verification, decode) and the drafter's bidirectional block.
"""

import jax

from pallas_kernels import backends
from pallas_kernels.backends import Backend


def window_attention(
    q: jax.Array,
    ring_k: jax.Array,
    ring_v: jax.Array,
    block_k: jax.Array,
    block_v: jax.Array,
    *,
    layer: jax.Array | int,
    lengths: jax.Array,
    visible_keys: int | None,
    causal: bool,
    sink: jax.Array | None,
    backend: Backend | None = None,
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
        backend: Of `backends.Backend`; None: what `backends.use` asked for.

    Returns:
        [batch, rows, heads, v_dim] in q's dtype; scores and softmax in float32.

    Raises:
        NotImplementedError: The backend that was asked for does not support these arguments.
    """
    return backends.run(
        "window_attention",
        backend,
        q,
        ring_k,
        ring_v,
        block_k,
        block_v,
        layer,
        lengths,
        sink,
        visible_keys=visible_keys,
        causal=causal,
    )
