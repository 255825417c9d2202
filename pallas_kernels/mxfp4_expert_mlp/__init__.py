"""SwiGLU experts in MXFP4, as checkpoints store them."""

import jax

from pallas_kernels import backends
from pallas_kernels.backends import Backend


def mxfp4_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_codes: jax.Array,
    gate_up_scales: jax.Array,
    down_codes: jax.Array,
    down_scales: jax.Array,
    *,
    layer: jax.Array | int,
    routed: int | None = None,
    backend: Backend | None = None,
) -> jax.Array:
    """`expert_mlp` on stacked MXFP4 weights, of which only the chosen experts of one layer are read.

    Args:
        x: [tokens, hidden].
        ids: [tokens, top_k] int32.
        weights: [tokens, top_k] float32.
        gate_up_codes: [layers, experts, 2, inner, hidden / 2] uint8; gate is 0, up is 1.
        gate_up_scales: [layers, experts, 2, inner, hidden / 32] uint8.
        down_codes: [layers, experts, hidden, inner / 2] uint8.
        down_scales: [layers, experts, hidden, inner / 32] uint8.
        layer: Scalar int32: the row of the leading axis to use.
        routed: As in `expert_mlp`.
        backend: Of `backends.Backend`; None: what `backends.use` asked for.

    Returns:
        [tokens, hidden] float32.

    Raises:
        NotImplementedError: The backend that was asked for does not support these arguments.
    """
    packed = gate_up_codes, gate_up_scales, down_codes, down_scales
    return backends.run("mxfp4_expert_mlp", backend, x, ids, weights, *packed, layer, routed=routed)
