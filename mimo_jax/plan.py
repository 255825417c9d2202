"""What fits where, from shapes alone: bytes a device holds of weights, caches and workspace.

Nothing here needs a device or a weight. Shapes and logical axes are those that the modules declare, stored formats
those of the release's layout, and the topology cuts them as it cuts arrays. `floors` has what a round costs at least.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from typing import Any

import jax

from mimo_jax.abstract import packed
from mimo_jax.backbone import Backbone
from mimo_jax.cache import backbone_cache, drafter_ring
from mimo_jax.config import AttentionConfig, BackboneConfig, DrafterConfig
from mimo_jax.devices import Device
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared
from mimo_jax.placement import check
from mimo_jax.session import MAX_CHUNK
from sharding.topology import Topology, TopologyError

DTYPE = "bfloat16"
"""Of activations, caches and plain weights."""
ACTIVATION_BYTES = 2
SUM_BYTES = 4
"""Of a float32, in which experts are summed and logits are kept."""
PAGE = 64
"""Positions a page holds."""

COMPONENTS = ("experts", "attention", "dense MLPs", "router", "embedding and LM head", "norms")
_ONE_DEVICE = Topology()
_GROUP = 8  # devices of a data-parallel group where nothing is said


def default_topology(devices: int) -> Topology:
    """Whole experts, and attention over all devices; beyond 8, over groups of 8, as the release is served on 16."""
    if devices <= _GROUP or devices % _GROUP:
        return Topology(devices, expert_parallel=devices)
    return Topology(devices, devices // _GROUP, devices, dp_attention=True, dp_lm_head=True, dense_tensor_parallel=1)


@dataclass(frozen=True)
class Weight:
    """A declared parameter, its layers stacked, as memory holds it."""

    path: tuple[str, ...]
    component: str
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    arrays: tuple[tuple[tuple[int, ...], int], ...]
    """Shape and bytes an element of what stands for it: values, or codes and scales."""
    kv_heads: int

    def parameters(self, topology: Topology = _ONE_DEVICE) -> int:
        """Elements that one device has, before packing; by default, all."""
        return self._cut(self.shape, topology)

    def nbytes(self, topology: Topology = _ONE_DEVICE) -> int:
        """Bytes that one device has, scales included; by default, all."""
        return sum(self._cut(shape, topology) * size for shape, size in self.arrays)

    def _cut(self, shape: tuple[int, ...], topology: Topology) -> int:
        """Elements of one device's part. What does not divide, such as a few rows of scales, counts as a whole."""
        count = 1
        for axis, size in zip(self.axes, shape, strict=True):
            width = topology.width(axis)
            if axis == "kv_heads":
                width = min(width, self.kv_heads)  # beyond, each head is copied
            count *= size if size % width else size // width
        return count


@dataclass(frozen=True, eq=False)
class ModelShapes:
    """A model's configurations and all its weights, none of which exist."""

    config: BackboneConfig
    drafter: DrafterConfig | None
    weights: tuple[Weight, ...]

    @classmethod
    def of(cls, config: BackboneConfig, drafter: DrafterConfig | None = None) -> "ModelShapes":
        """The shapes of a model that is loaded with packed weights and bfloat16 activations."""
        weights = list(_weights(Declared(lambda: Backbone(config, DTYPE)), config))
        if drafter is not None:
            weights += _weights(Declared(lambda: Drafter(drafter, DTYPE)), drafter)
        return cls(config, drafter, tuple(weights))

    def attentions(self) -> Iterator[tuple[AttentionConfig, int]]:
        """Each kind of the backbone's attention and how many layers have it."""
        for kind in self.config.attention_kinds:
            yield self.config.attention(kind), sum(layer.attention == kind for layer in self.config.layers)


def _weights(declared: Declared[Any], config: BackboneConfig | DrafterConfig) -> Iterator[Weight]:
    axes = jax.tree.leaves(declared.axes, is_leaf=lambda node: isinstance(node, tuple))
    for (keys, leaf), names in zip(jax.tree.leaves_with_path(declared.shapes), axes, strict=True):
        path = tuple(str(key.key) for key in keys)
        if isinstance(config, DrafterConfig):
            component, attention, stored = "drafter", config.attention, leaf
        else:
            attention = config.swa if any(part.startswith("swa_") for part in path) else config.full
            component, stored = _component(path, names), packed(path, leaf, config)
        arrays = tuple((array.shape, array.dtype.itemsize) for array in jax.tree.leaves(stored))
        yield Weight(path, component, leaf.shape, names, arrays, attention.kv_heads)


def _component(path: tuple[str, ...], axes: tuple[str, ...]) -> str:
    name = path[-1]
    if name in ("embedding", "lm_head"):
        return "embedding and LM head"
    if name.endswith("_norm"):
        return "norms"
    if "attention" in path:
        return "attention"
    if name in ("router", "correction_bias"):
        return "router"
    return "experts" if "expert_inner" in axes else "dense MLPs"


@dataclass(frozen=True)
class Memory:
    """Bytes of the device that has most, by what holds them."""

    weights: dict[str, int]
    drafter: int
    caches: dict[str, int]
    workspace: dict[str, int]
    """An estimate."""
    capacity: int

    @property
    def used(self) -> int:
        """All of it."""
        parts = (*self.weights.values(), self.drafter, *self.caches.values(), *self.workspace.values())
        return sum(parts)

    @property
    def free(self) -> int:
        """Left of the device's memory; below 0 by what is too much."""
        return self.capacity - self.used


@dataclass(frozen=True)
class Plan:
    """A model on devices, at a load.

    Raises:
        TopologyError: The model cannot be cut that way.
        ValueError: The load is none that the model can have.
    """

    model: ModelShapes
    topology: Topology
    device: Device
    batch: int
    """Sequences, over all data-parallel groups."""
    context: int
    """Committed positions of each."""
    verify_length: int
    """Rows the backbone verifies a round; 1 is plain decoding."""

    def __post_init__(self) -> None:
        config, drafter = self.model.config, self.model.drafter
        check(self.topology, config, drafter)
        if not 1 <= self.verify_length <= self.block:
            limit = f"1 to {self.block}, the drafter's block" if drafter else "1: this model has no drafter"
            raise ValueError(f"verify_length must be {limit}, not {self.verify_length}")
        if self.context > config.max_positions:
            raise ValueError(f"context {self.context:,} is beyond the model's {config.max_positions:,} positions")

    @property
    def block(self) -> int:
        """Rows the drafter fills; 1 without one."""
        return self.model.drafter.block_size if self.model.drafter else 1

    @property
    def group_batch(self) -> int:
        """Sequences of the data-parallel group that has most."""
        return -(-self.batch // self.topology.data_parallel)

    @property
    def rows(self) -> int:
        """Rows that group verifies."""
        return self.group_batch * self.verify_length

    def kv_heads(self, attention: AttentionConfig) -> int:
        """Key-value heads that one device has of an attention's."""
        return max(1, attention.kv_heads // self.topology.width("kv_heads"))

    def memory(self) -> Memory:
        """Bytes of the device that has most."""
        weights: dict[str, int] = dict.fromkeys(COMPONENTS, 0)
        drafter = 0
        for weight in self.model.weights:
            if weight.component == "drafter":
                drafter += weight.nbytes(self.topology)
            else:
                weights[weight.component] += weight.nbytes(self.topology)
        return Memory(weights, drafter, self.caches(), self.workspace(), int(self.device.memory_bytes))

    def caches(self) -> dict[str, int]:
        """Bytes of one device's pages and rings: its group's sequences, its key-value heads."""
        config, drafter = self.model.config, self.model.drafter
        make = partial(backbone_cache, config, self.group_batch, self.context, self.block, DTYPE, page_size=PAGE)
        held = {"pages": 0, "SWA rings": 0, "drafter ring": 0}
        for kind, cache in jax.eval_shape(make).kv.items():
            held["pages" if kind == "full" else "SWA rings"] += self._cached(cache, config.attention(kind))
        if drafter is not None:
            ring = jax.eval_shape(partial(drafter_ring, drafter, self.group_batch, self.context, DTYPE))
            held["drafter ring"] = self._cached(ring, drafter.attention)
        return held

    def _cached(self, cache: Any, attention: AttentionConfig) -> int:
        whole = sum(array.size * array.dtype.itemsize for array in (cache.k, cache.v))
        return whole // attention.kv_heads * self.kv_heads(attention)

    def workspace(self) -> dict[str, int]:
        """An estimate of what a round, or a chunk of one prompt, needs beside weights and caches."""
        config, drafter, topology = self.model.config, self.model.drafter, self.topology
        hidden, rows = config.hidden_size, max(self.rows, MAX_CHUNK)
        row = 4 * hidden * SUM_BYTES  # the residual stream, a norm of it, a sum, a copy
        for attention, layers in self.model.attentions():
            row += layers * self.kv_heads(attention) * (attention.qk_dim + attention.v_dim) * ACTIVATION_BYTES
        heads = config.full.heads // topology.width("heads")
        row += heads * (config.full.qk_dim + config.full.v_dim) * ACTIVATION_BYTES
        row += len(drafter.target_layer_ids if drafter else ()) * hidden * ACTIVATION_BYTES
        gathered = hidden * (ACTIVATION_BYTES + SUM_BYTES)  # every device of a mesh has every row at the experts
        gathered += config.moe.top_k * 3 * config.moe.intermediate * ACTIVATION_BYTES // topology.tensor_parallel
        vocabulary = config.vocab_size // topology.width("vocab")
        return {
            "activations": rows * (row + topology.data_parallel * gathered),
            # logits, the same processed and sorted; and how often each token was emitted
            "logits": self.rows * 3 * vocabulary * SUM_BYTES + self.group_batch * config.vocab_size * SUM_BYTES,
        }

    def fits(self) -> bool:
        """Whether a device's memory holds it all."""
        return self.memory().free >= 0

    def longest_context(self) -> int:
        """Positions, in whole pages and no more than the model has, that fit at this batch; 0: none."""
        most = self.model.config.max_positions
        pages = _largest(lambda pages: replace(self, context=min(PAGE * pages, most)).fits(), -(-most // PAGE))
        return min(PAGE * pages, most)

    def largest_batch(self) -> int:
        """Sequences that fit at this context, the same number in every data-parallel group; 0: none."""
        groups = self.topology.data_parallel
        return groups * _largest(lambda n: replace(self, batch=n * groups).fits())

    def shortage(self) -> str:
        """By how much it does not fit, and what helps."""
        memory = self.memory()
        helps = []
        if context := self.longest_context():
            helps.append(f"--context {context} at most at this batch")
        if batch := self.largest_batch():
            helps.append(f"--batch {batch} at most at this context")
        none = "" if helps else " Neither a smaller batch nor a shorter context helps alone."
        if devices := self._enough_devices():
            helps.append(f"--devices {devices}x{self.device.name}")
        what = f" What helps: {', or '.join(helps)}." if helps else " Nor do many times as many devices."
        return (
            f"does not fit: each of {self.topology.tensor_parallel} x {self.device.name} would need {memory.used:,} "
            f"bytes and has {memory.capacity:,}, which is {-memory.free:,} too few.{none}{what}"
        )

    def _enough_devices(self) -> int | None:
        """The least of 2, 4, ... 64 times as many devices that hold it, spread as `default_topology` says."""
        for times in (2, 4, 8, 16, 32, 64):
            try:
                topology = default_topology(times * self.topology.tensor_parallel)
                if replace(self, topology=topology).fits():
                    return topology.tensor_parallel
            except TopologyError:
                continue
        return None


def _largest(fits: Any, most: int = 1 << 30) -> int:
    """The largest number up to `most` that fits, 0 if none does; what fits, fits in smaller numbers, too."""
    below = max(takewhile(lambda n: n <= most and fits(n), (1 << i for i in range(31))), default=0)
    above = min(2 * below or 1, most + 1)
    while above - below > 1:
        middle = (below + above) // 2
        below, above = (middle, above) if fits(middle) else (below, middle)
    return below
