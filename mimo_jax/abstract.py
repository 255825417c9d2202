"""Models without weights: shapes, dtypes and places of what a checkpoint would fill, to plan and to compile with."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig
from mimo_jax.gpu_weights import can_interleave, outline
from mimo_jax.model import Dtype, Model, declare_models
from mimo_jax.params import Declared, Params
from mimo_jax.placement import check
from mimo_jax.qkv_layout import fused_rows, plain_rows
from mimo_jax.quantization import FP8BlockWeight, MXFP4Weight
from mimo_jax.speculative import ModelParams
from pallas_kernels.fp8 import COLUMNS as FP8_COLUMNS
from pallas_kernels.mxfp4 import BLOCK
from sharding.topology import Topology


def abstract_model(
    config: BackboneConfig, drafter: DrafterConfig | None, dtype: Dtype, topology: Topology, mesh: Mesh
) -> Model:
    """A model as loading on GPUs would give it, all of whose parameters are `jax.ShapeDtypeStruct`s on a mesh.

    Its programs can be lowered and compiled, also for devices that are not there; nothing can be run.

    Raises:
        TopologyError: The model cannot be cut that way.
    """
    check(topology, config, drafter)
    models = declare_models(config, drafter, dtype, topology)
    backbone = _placed(models.backbone, config, topology, mesh)
    held = _placed(models.drafter, None, topology, mesh) if models.drafter else None
    return Model(models, ModelParams(backbone, held), dtype, None, mesh)


def _placed(declared: Declared[Any], config: BackboneConfig | None, topology: Topology, mesh: Mesh) -> Params:
    def leaf(keys: tuple, shape: jax.ShapeDtypeStruct, axes: tuple[str, ...]) -> Any:
        path = tuple(str(key.key) for key in keys)
        width = topology.width(axes[-2]) if len(axes) > 1 else 1
        stored = shape if config is None else packed(path, shape, config, width)
        if config is not None and isinstance(stored, MXFP4Weight) and can_interleave(config, topology):
            return outline(stored, axes, topology, mesh)
        return jax.tree.map(
            lambda s: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=topology.sharding(mesh, axes, s.shape)), stored
        )

    return jax.tree_util.tree_map_with_path(leaf, declared.shapes, declared.axes)


def packed(path: tuple[str, ...], plain: jax.ShapeDtypeStruct, config: BackboneConfig, width: int = 1) -> Any:
    """A backbone's declared parameter as the release's layout stores it: a weight of `jax.ShapeDtypeStruct`s.

    Args:
        path: Of the parameter.
        plain: Its shape [..., out, in] and dtype.
        config: Says what is quantised, and how.
        width: Parts its rows are cut into; no tile of FP8 scales is.
    """
    quantized, shape = config.quantization, plain.shape
    name, (*lead, rows, columns) = path[-1], shape if len(shape) > 1 else (1, *shape)
    if quantized is None:
        return plain
    if len(lead) > 1 and quantized.expert_format == "mxfp4":  # layers, experts, ...
        return MXFP4Weight(
            _array((*lead, rows, columns // 2), jnp.uint8), _array((*lead, rows, columns // BLOCK), jnp.uint8)
        )
    if name in ("q", "k", "v"):
        tile = _fused_tile(name, config, config.swa if any(p.startswith("swa_") for p in path) else config.full)
    elif name in ("gate", "up", "down", "gate_up"):
        tile = plain_rows(rows, quantized.fp8_block[0]).tile
    else:
        return plain
    tiles = rows // math.gcd(tile, rows // width), math.ceil(columns / FP8_COLUMNS)
    return FP8BlockWeight(_array(shape, jnp.float8_e4m3fn), _array((*lead, *tiles), jnp.float32))


def _array(shape: tuple[int, ...], dtype: jax.typing.DTypeLike) -> Any:
    return jax.ShapeDtypeStruct(shape, dtype)


def _fused_tile(name: str, config: BackboneConfig, attention: AttentionConfig) -> int:
    """Rows of q, k or v that share scales, where each chunk of the fused weight begins with a tile of its own."""
    assert config.quantization is not None
    chunks = config.full.kv_heads if attention.kv_heads % config.full.kv_heads == 0 else 1
    return fused_rows(attention, chunks, config.quantization.fp8_block[0], True)["qkv".index(name)].tile
