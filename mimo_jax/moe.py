"""The mixture of experts: a sigmoid router with a correction bias, and SwiGLU experts without clamp."""

from functools import partial

import jax
import jax.numpy as jnp
from flax import nnx

from mimo_jax.config import MoeConfig
from mimo_jax.expert_dispatch import on_all_devices
from mimo_jax.layers import Layer, array, declare
from mimo_jax.quantization import ByLayer, InterleavedWeight, MXFP4Weight, inputs_first
from pallas_kernels.expert_mlp import expert_mlp, plain_expert_mlp
from pallas_kernels.interleaved_expert_mlp import interleaved_expert_mlp
from pallas_kernels.mxfp4_expert_mlp import mxfp4_expert_mlp
from sharding.topology import Topology


class MoE(nnx.Module):
    """Routers and experts of the MoE layers of one kind, stacked.

    Every device of a mesh has all of the router, and some experts, or slices of some.
    """

    def __init__(
        self,
        config: MoeConfig,
        hidden: int,
        router_dtype: str,
        layers: int,
        dtype: jax.typing.DTypeLike,
        topology: Topology,
    ):
        self.config, self.router_dtype, self.topology = config, router_dtype, topology
        experts, inner = config.experts, config.intermediate
        self.router = declare((layers, experts, hidden), ("layers", "choices", "embed"), "float32")
        self.correction_bias = declare((layers, experts), ("layers", "choices"), "float32")
        self.gate_up = declare(
            (layers, experts, 2, inner, hidden), ("layers", "expert", "gate_up", "expert_inner", "embed"), dtype
        )
        self.down = declare((layers, experts, hidden, inner), ("layers", "expert", "embed", "expert_inner"), dtype)

    def __call__(self, x: jax.Array, layer: Layer, wanted: jax.Array | None = None) -> jax.Array:
        """Run x [tokens, hidden] through the chosen experts: [tokens, hidden].

        Where `wanted` [tokens] is false a token chooses none, and no expert is read for it; its row is zero.
        """
        precision = jnp.finfo(self.router_dtype)

        def rounded(a: jax.Array) -> jax.Array:
            # two casts may be optimised away under jit, this may not
            return jax.lax.reduce_precision(a.astype(jnp.float32), precision.nexp, precision.nmant)

        inputs, router = rounded(x), rounded(array(self.router, layer))
        logits = jnp.dot(inputs, router.T, precision=jax.lax.Precision.HIGHEST)
        ids, weights = route(logits, array(self.correction_bias, layer), self.config)
        if wanted is not None:
            ids = jnp.where(wanted[:, None], ids, self.config.experts)
        run = partial(self._run, layer)
        return on_all_devices(x, ids, weights, self.config.experts, self.topology, run).astype(x.dtype)

    def _run(self, layer: Layer, x: jax.Array, ids: jax.Array, weights: jax.Array) -> jax.Array:
        """The experts that this device has (see `ExpertMLP`)."""
        gate_up, down, routed = self.gate_up.get_value(), self.down.get_value(), self.config.experts
        given = x, ids, weights
        if isinstance(gate_up, MXFP4Weight):
            parts = gate_up.codes, gate_up.scales, down.codes, down.scales
            return mxfp4_expert_mlp(*given, *parts, layer=layer, routed=routed)
        if isinstance(gate_up, InterleavedWeight):
            parts = gate_up.words, gate_up.scales, down.words, down.scales
            return interleaved_expert_mlp(*given, *parts, layer=layer, routed=routed)
        if isinstance(gate_up, jax.Array):
            return plain_expert_mlp(*given, gate_up, down, layer, routed)
        stacks, row = (gate_up, down), (layer,)
        if isinstance(gate_up, ByLayer):
            stacks, row = (gate_up.layers[layer], down.layers[layer]), ()

        def expert(e: jax.Array) -> tuple[jax.Array, jax.Array]:
            at = jax.tree.map(lambda w: w[*row, e], stacks)
            return inputs_first(at[0], x.dtype), inputs_first(at[1], x.dtype)

        return expert_mlp(*given, expert, routed // self.topology.cut("expert").width, routed)


def route(logits: jax.Array, correction_bias: jax.Array, config: MoeConfig) -> tuple[jax.Array, jax.Array]:
    """Choose experts by biased score, weigh them by unbiased score (DeepSeek-V3's auxiliary-loss-free routing).

    Args:
        logits: [tokens, experts] float32.
        correction_bias: [experts] float32: moves the choice, not the weights.
        config: Number of experts a token, groups, normalisation and scaling.

    Returns:
        ids [tokens, top_k] int32 and weights [tokens, top_k] float32. Equal scores go to the lower id.
    """
    scores = jax.nn.sigmoid(logits)
    choice = scores + correction_bias
    if config.groups > 1:
        grouped = choice.reshape(-1, config.groups, config.experts // config.groups)
        group_scores = jnp.sum(jax.lax.top_k(grouped, 2)[0], axis=-1)  # [tokens, groups]
        _, best = jax.lax.top_k(group_scores, config.top_groups)
        kept = jnp.any(jax.nn.one_hot(best, config.groups, dtype=bool), axis=1)
        choice = jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)
    _, ids = jax.lax.top_k(choice, config.top_k)
    weights = jnp.take_along_axis(scores, ids, axis=-1)
    if config.normalize and config.top_k > 1:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    return ids, _with_load(weights * config.scaling, correction_bias, ids)


@jax.custom_vjp
def _with_load(weights: jax.Array, correction_bias: jax.Array, ids: jax.Array) -> jax.Array:
    """The weights as they are. The correction bias moves no weight, so its gradient is free to carry something else:
    each expert's share of the tokens beyond an even one, which a step against the gradient's sign evens out.
    """
    return weights


def _load_forward(
    weights: jax.Array, correction_bias: jax.Array, ids: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return weights, (correction_bias, ids)


def _load_backward(kept: tuple[jax.Array, jax.Array], gradient: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    bias, ids = kept
    share = jnp.zeros_like(bias).at[ids.reshape(-1)].add(1.0) / ids.size
    return gradient, share - 1.0 / bias.size, None


_with_load.defvjp(_load_forward, _load_backward)
