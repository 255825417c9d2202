"""SwiGLU experts in MXFP4, interleaved for the Hopper kernel when they were loaded."""

import jax

from pallas_kernels import backends
from pallas_kernels.backends import Backend


def interleaved_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_words: jax.Array,
    gate_up_scales: jax.Array,
    down_words: jax.Array,
    down_scales: jax.Array,
    *,
    layer: jax.Array | int,
    routed: int | None = None,
    backend: Backend | None = None,
) -> jax.Array:
    """`expert_mlp` on stacked weights of `interleaved_mxfp4`, of which only the chosen experts of one layer are read.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32.
        weights: [tokens, top_k] float32.
        gate_up_words: [layers, experts, 2, inner, hidden / 4] int16; gate is 0, up is 1.
        gate_up_scales: [layers, experts, 2, hidden / 128, 4, inner] uint8.
        down_words: [layers, experts, hidden, inner / 4] int16.
        down_scales: [layers, experts, inner / 128, 4, hidden] uint8.
        layer: Scalar int32: the row of the leading axis to use.
        routed: As in `expert_mlp`.
        backend: Of `backends.Backend`; None: what `backends.use` asked for.

    Returns:
        [tokens, hidden] float32.

    Raises:
        NotImplementedError: The backend that was asked for does not support these arguments.
    """
    packed = gate_up_words, gate_up_scales, down_words, down_scales
    return backends.run("interleaved_expert_mlp", backend, x, ids, weights, *packed, layer, routed=routed)
