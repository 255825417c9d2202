"""Interleaved experts in plain `jnp`: weights are expanded one expert at a time."""

import jax

from pallas_kernels.expert_mlp import expert_mlp, inputs_first
from pallas_kernels.interleaved_mxfp4 import decode


def interleaved_expert_mlp(
    x: jax.Array,
    ids: jax.Array,
    weights: jax.Array,
    gate_up_words: jax.Array,
    gate_up_scales: jax.Array,
    down_words: jax.Array,
    down_scales: jax.Array,
    layer: jax.Array | int,
    *,
    routed: int | None,
) -> jax.Array:
    """See `pallas_kernels.interleaved_expert_mlp`."""

    def expert(e: jax.Array) -> tuple[jax.Array, jax.Array]:
        gate_up = decode(gate_up_words[layer, e], gate_up_scales[layer, e], x.dtype)
        down = decode(down_words[layer, e], down_scales[layer, e], x.dtype)
        return inputs_first(gate_up), inputs_first(down)

    return expert_mlp(x, ids, weights, expert, gate_up_words.shape[1], routed)
