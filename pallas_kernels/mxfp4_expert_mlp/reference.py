"""MXFP4 experts in plain `jnp`: weights are expanded one expert at a time."""

import jax

from pallas_kernels import mxfp4
from pallas_kernels.expert_mlp import expert_mlp, inputs_first


def mxfp4_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_codes: jax.Array,
    gate_up_scales: jax.Array,
    down_codes: jax.Array,
    down_scales: jax.Array,
    layer: jax.Array | int,
    *,
    routed: int | None,
) -> jax.Array:
    """See `pallas_kernels.mxfp4_expert_mlp`."""

    def expert(e: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_up = mxfp4.decode(gate_up_codes[layer, e], gate_up_scales[layer, e], x.dtype)
        down = mxfp4.decode(down_codes[layer, e], down_scales[layer, e], x.dtype)
        return inputs_first(gate_up), inputs_first(down)

    return expert_mlp(x, ids, weights, expert, gate_up_codes.shape[1], routed)
