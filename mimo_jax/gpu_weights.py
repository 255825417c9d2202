"""How MXFP4 experts lie on a GPU: interleaved, as the Hopper kernel reads them, on every device for itself."""

from typing import Any

import jax
from jax.sharding import Mesh

from mimo_jax.config import BackboneConfig
from mimo_jax.params import Params
from mimo_jax.quantization import InterleavedWeight, MXFP4Weight
from pallas_kernels.interleaved_mxfp4 import WIDTH, interleave
from sharding.topology import Topology


def can_interleave(config: BackboneConfig, topology: Topology) -> bool:
    """Whether what a device has of every expert falls into whole words."""
    inner = config.moe.intermediate // topology.width("expert_inner")
    return not config.hidden_size % (2 * WIDTH) and not inner % WIDTH


def interleaved(params: Params, axes: Params, topology: Topology, mesh: Mesh) -> Params:
    """Parameters of a module with all MXFP4 weights interleaved, on their devices.

    Args:
        params: Of which each gives way to what is made of it: no more than one stack of weights is there twice.
        axes: The logical axes of each (see `Declared.axes`).
        topology: Where they lie; `can_interleave` with it.
        mesh: On what.
    """
    made: Params = {}
    for name, names in axes.items():
        value = params.pop(name)
        if isinstance(names, dict):
            value = interleaved(value, names, topology, mesh)
        elif isinstance(value, MXFP4Weight):
            value = InterleavedWeight(*_interleave(value, names, topology, mesh))
        made[name] = value
    return made


def outline(weight: MXFP4Weight, axes: tuple[str, ...], topology: Topology, mesh: Mesh) -> InterleavedWeight:
    """The `jax.ShapeDtypeStruct`s of what `interleaved` would make of a weight's."""
    shapes = jax.eval_shape(interleave, weight.codes, weight.scales)
    placed: list[Any] = [
        jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=topology.sharding(mesh, names, s.shape))
        for s, names in zip(shapes, _interleaved_axes(axes), strict=True)
    ]
    return InterleavedWeight(*placed)


def specs(params: Params, axes: Params, topology: Topology) -> Params:
    """The `PartitionSpec` of every array of parameters whose logical axes are these."""

    def leaf(names: tuple[str, ...], weight: Any) -> Any:
        if isinstance(weight, InterleavedWeight):
            parts = zip((weight.words, weight.scales), _interleaved_axes(names), strict=True)
            return InterleavedWeight(*(topology.spec(of_part, x.shape) for x, of_part in parts))  # pyright: ignore
        return jax.tree.map(lambda x: topology.spec(names, x.shape), weight)

    return jax.tree.map(leaf, axes, params, is_leaf=lambda node: isinstance(node, tuple))


def _interleave(weight: MXFP4Weight, axes: tuple[str, ...], topology: Topology, mesh: Mesh) -> Any:
    def layer_by_layer(codes: jax.Array, scales: jax.Array) -> Any:
        return jax.lax.map(lambda layer: interleave(*layer), (codes, scales))

    given = weight.codes, weight.scales
    into = tuple(x.sharding for x in jax.tree.leaves(outline(weight, axes, topology, mesh)))
    on_all = jax.shard_map(
        layer_by_layer,
        mesh=mesh,
        in_specs=tuple(topology.spec(axes, x.shape) for x in given),
        out_specs=tuple(sharding.spec for sharding in into),
    )
    return jax.jit(on_all, out_shardings=into)(*given)


def _interleaved_axes(axes: tuple[str, ...]) -> tuple[tuple[str | None, ...], tuple[str | None, ...]]:
    *lead, out, into = axes
    return axes, (*lead, into, None, out)
