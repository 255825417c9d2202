"""One device's share of a round at real size, with random weights and without collectives, beside its floor."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from mimo_jax.abstract import abstract_model
from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig
from mimo_jax.devices import Device
from mimo_jax.evaluation.bench import ContextResult, bench_context
from mimo_jax.floors import floor
from mimo_jax.model import Dtype, Model, available_memory
from mimo_jax.placement import check
from mimo_jax.plan import ModelShapes, Plan
from mimo_jax.quantization import FP8BlockWeight, InterleavedWeight, MXFP4Weight
from mimo_jax.speculative import ModelParams
from sharding.topology import Topology

ONE = Topology()
_PACKED = (FP8BlockWeight, InterleavedWeight, MXFP4Weight)


@dataclass(frozen=True)
class ShardResult:
    """Rounds of one batch at one context."""

    batch: int
    context: int
    measured: ContextResult | None
    """None: it did not fit into memory."""
    floor_milliseconds: float | None
    """Of draft and verify together; None: nothing is known of the device."""

    @property
    def milliseconds(self) -> float | None:
        """Of a whole round: draft, verify and commit."""
        if self.measured is None:
            return None
        draft = self.measured.draft_milliseconds
        return self.measured.verify_milliseconds.median + (draft.median if draft else 0.0)

    def as_json(self) -> dict[str, Any]:
        """As plain values."""
        return {**asdict(self), "milliseconds": self.milliseconds}


def share(
    config: BackboneConfig, drafter: DrafterConfig | None, devices: int
) -> tuple[BackboneConfig, DrafterConfig | None]:
    """A model that is as much work as what one of `devices` has of this one: TP over all, whole experts on each.

    Of every token's experts as many as fall on a device on average, so that its experts are read as often. The router,
    which every device has whole, is smaller: some 4 % of a small batch's bytes are missing.

    Raises:
        TopologyError: The model cannot be cut that way.
        ValueError: The experts of a token do not divide by `devices`.
    """
    check(Topology(devices, expert_parallel=devices), config, drafter)
    if config.moe.top_k % devices:
        raise ValueError(f"a token's {config.moe.top_k} experts do not divide by {devices} devices")
    moe = replace(config.moe, experts=config.moe.experts // devices, top_k=config.moe.top_k // devices)
    part = replace(
        config,
        full=_heads(config.full, devices),
        swa=_heads(config.swa, devices),
        moe=replace(moe, groups=1, top_groups=1),
        dense_intermediate=config.dense_intermediate // devices,
        vocab_size=config.vocab_size // devices,
        eos_ids=(),
    )
    if drafter is None:
        return part, None
    inner, mask = drafter.intermediate // devices, min(drafter.mask_token_id, part.vocab_size - 1)
    return part, replace(drafter, attention=_heads(drafter.attention, devices), intermediate=inner, mask_token_id=mask)


def _heads(attention: AttentionConfig, devices: int) -> AttentionConfig:
    return replace(attention, heads=attention.heads // devices, kv_heads=max(1, attention.kv_heads // devices))


def random_model(config: BackboneConfig, drafter: DrafterConfig | None, dtype: Dtype, seed: int = 0) -> Model:
    """A model on one device with random weights, stored as loading would leave them on a GPU.

    Raises:
        ValueError: They do not fit into the device's memory.
    """
    mesh = ONE.mesh()
    model = abstract_model(config, drafter, dtype, ONE, mesh)
    needed = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(model.params))
    room = (mesh.devices.flat[0].memory_stats() or {}).get("bytes_limit") or available_memory()
    if needed > room:
        raise ValueError(
            f"the share's weights take {needed / 1e9:.1f} GB and there are {room / 1e9:.1f} GB: share the model among "
            "more devices, or take a smaller preset"
        )
    leaves, structure = jax.tree.flatten(model.params, is_leaf=lambda leaf: isinstance(leaf, _PACKED))
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    filled = [_random(leaf, key) for leaf, key in zip(leaves, keys, strict=True)]
    params: ModelParams = jax.tree.unflatten(structure, filled)
    return replace(model, params=params)


def _random(leaf: Any, key: jax.Array) -> Any:
    """A weight like one of `jax.ShapeDtypeStruct`s: of about 1 / sqrt(in); norms and what is as small are ones."""

    def bits(shape: Any) -> jax.Array:
        return jax.jit(
            lambda: jax.random.bits(key, shape.shape, f"uint{8 * shape.dtype.itemsize}").view(shape.dtype),
            out_shardings=shape.sharding,
        )()

    def full(shape: Any, value: float) -> jax.Array:
        return jnp.full(shape.shape, value, shape.dtype, device=shape.sharding)

    match leaf:
        case InterleavedWeight(words, scales):
            return InterleavedWeight(bits(words), full(scales, 95 + _scale_byte(4 * words.shape[-1])))
        case MXFP4Weight(codes, scales):
            return MXFP4Weight(bits(codes), full(scales, _scale_byte(2 * codes.shape[-1])))
        case FP8BlockWeight(values, scales):
            return FP8BlockWeight(_normal(values, 1.0, key), full(scales, values.shape[-1] ** -0.5))
        case jax.ShapeDtypeStruct() if leaf.ndim < 2 or leaf.shape[-2] < 128:
            return full(leaf, 1.0)
        case _:
            return _normal(leaf, leaf.shape[-1] ** -0.5, key)


def _scale_byte(inputs: int) -> int:
    return 127 - 2 - round(math.log2(math.sqrt(inputs)))


def _normal(shape: Any, deviation: float, key: jax.Array) -> jax.Array:
    @jax.jit
    def layer(key: jax.Array) -> jax.Array:
        return (deviation * jax.random.normal(key, shape.shape[1:], jnp.bfloat16)).astype(shape.dtype)

    stacked = jax.jit(lambda keys: jax.lax.map(layer, keys), out_shardings=shape.sharding)
    return stacked(jax.random.split(key, shape.shape[0]))


def bench_shard(model: Model, device: Device | None, batches: Sequence[int], contexts: Sequence[int], runs: int) -> Any:
    """Rounds at every batch and context, one after another, as they are measured."""
    shapes = ModelShapes.of(model.config, model.drafter_config)
    block = model.drafter_config.block_size if model.drafter_config else 1
    for batch in batches:
        for context in contexts:
            least = None
            if device is not None:
                plan = Plan(shapes, ONE, device, batch=batch, context=context, verify_length=block)
                least = 1e3 * floor(plan).seconds
            try:
                measured = bench_context(model, batch=batch, context=context, runs=runs)
            except jax.errors.JaxRuntimeError as error:
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                measured = None
            yield ShardResult(batch, context, measured, least)
