"""What a step of drafter training takes at a real size, from shapes alone: bytes of a device, and the least time.

The backbone's weights stay packed and its pass has no gradients. The drafter computes in bfloat16 on float32 parameters
that Muon moves. Arguments are those of the step's program, to the byte; what it needs beside them is an estimate, and
times are those of matrices at peak and of messages at the links' speed, as if neither waited for the other.
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding

from mimo_jax.abstract import abstract_model
from mimo_jax.config import BackboneConfig, DrafterConfig
from mimo_jax.devices import Device
from mimo_jax.drafter import Drafter
from mimo_jax.expert_dispatch import chosen_way, messages
from mimo_jax.params import Declared
from mimo_jax.placement import check
from mimo_jax.plan import ACTIVATION_BYTES, DTYPE, ModelShapes
from mimo_jax.training.drafter_training import DrafterTrainer
from mimo_jax.training.groups import Groups
from mimo_jax.training.local_shard import Edges, skipped
from mimo_jax.training.optimizers import OptimizerConfig, TrainState, is_matrix, make_optimizer
from mimo_jax.training.state_placement import moments
from sharding.topology import Topology

_FLOAT = 4
_NEWTON_SCHULZ = 5  # steps of Muon


@dataclass(frozen=True)
class StepPlan:
    """A step on devices.

    Raises:
        TopologyError: The model cannot be cut that way.
        TrainingError: The step cannot be shared that way.
    """

    config: BackboneConfig
    drafter: DrafterConfig
    topology: Topology
    device: Device
    batch: int
    """Sequences."""
    length: int
    """Positions of each."""
    anchors: int
    """Blocks, of all sequences together."""
    cut_sequences: bool = True
    edges: Edges = "exchange"

    def __post_init__(self) -> None:
        check(self.topology, self.config, self.drafter)
        groups = Groups(self.topology, self._mesh, self.cut_sequences)
        groups.check(self.batch, self.length)
        groups.check_heads(self.drafter.attention)
        skipped(self.drafter, groups, self.edges)

    @property
    def _mesh(self) -> Mesh:
        """One without devices, of which nothing is asked but places."""
        sizes = tuple(self.topology.axes.values())
        return cast(Mesh, AbstractMesh(sizes, tuple(self.topology.axes), axis_types=(AxisType.Auto,) * len(sizes)))

    @property
    def groups(self) -> int:
        """Data-parallel groups."""
        return self.topology.data_parallel

    @property
    def positions(self) -> int:
        """Of all sequences, those that one group has."""
        return self.batch * self.length // self.groups

    def program(self, mesh: Mesh) -> tuple[DrafterTrainer, tuple[Any, ...]]:
        """The trainer, and what else `drafter_step` takes, as shapes, dtypes and places on a mesh."""
        topology, groups = self.topology, Groups(self.topology, mesh, self.cut_sequences)
        model = abstract_model(self.config, None, DTYPE, topology, mesh)
        drafter = Declared(lambda: Drafter(self.drafter, DTYPE, topology))
        optimizer = make_optimizer(drafter.axes, OptimizerConfig(), 1000)
        trainer = DrafterTrainer(
            model.models.backbone, drafter, optimizer, self.anchors, groups=groups, edges=self.edges
        )

        def placed(shapes: Any, specs: Any) -> Any:
            def one(s: jax.ShapeDtypeStruct, spec: jax.P) -> jax.ShapeDtypeStruct:
                return jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=NamedSharding(mesh, spec))

            return jax.tree.map(one, shapes, specs)

        floats = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s.shape, jnp.float32), drafter.shapes)
        kept = jax.eval_shape(optimizer.init, floats)
        state = TrainState(
            placed(floats, groups.specs(floats, drafter.axes)), placed(kept, moments(kept, drafter.axes, topology))
        )
        rows = self.batch, self.length
        given = {
            "ids": jax.ShapeDtypeStruct(rows, jnp.int32),
            "answer": jax.ShapeDtypeStruct(rows, jnp.bool),
            "lengths": jax.ShapeDtypeStruct(rows[:1], jnp.int32),
        }
        if not self.cut_sequences:  # rows are packed
            given["positions"] = given["ids"]
        key = jax.eval_shape(lambda: jax.random.key(0))
        batch = placed(given, dict.fromkeys(given, groups.ids))
        return trainer, (state, batch, model.params.backbone, placed(key, jax.P()))

    @cached_property
    def arguments(self) -> dict[str, int]:
        """Bytes that every device has before a step, and again after it."""
        _, (state, batch, frozen, key) = self.program(self._mesh)
        return {
            "backbone": held(frozen),
            "drafter, float32": held(state.params),
            "optimiser": held(state.optimizer),
            "ids": held(batch) + held(key),
        }

    @cached_property
    def workspace(self) -> dict[str, int]:
        """An estimate of the bytes that a step needs beside its arguments; not all of them at one time."""
        config, drafter, topology = self.config, self.drafter, self.topology
        attention, hidden = drafter.attention, config.hidden_size
        features = self.positions * len(drafter.target_layer_ids) * hidden * ACTIVATION_BYTES
        kv = (attention.qk_dim + attention.v_dim) * attention.kv_heads // topology.width("kv_heads")
        context = self.positions * drafter.num_layers * kv * ACTIVATION_BYTES
        everyone = self.groups if self._way == "sum" else 1
        gathered = self.length * config.full.kv_heads // topology.width("kv_heads") * self.batch
        return {
            "backbone: rows and experts": self.positions * hidden * (4 * ACTIVATION_BYTES + everyone * 6),
            "backbone: keys of whole sequences": gathered
            * (config.full.qk_dim + config.full.v_dim)
            * ACTIVATION_BYTES
            * self.cut_sequences,
            "features": features,
            "context and its gradients": 3 * context,
            "gradients, float32": self.arguments["drafter, float32"],
            "Muon: a stack of matrices": 4 * max(self._cut(w.shape, w.axes) for w in self._matrices) * _FLOAT,
            "logits of a chunk": 3 * 1024 * config.vocab_size // topology.width("logits") * _FLOAT,
        }

    @cached_property
    def flops(self) -> dict[str, float]:
        """Of one device, as if all had as much to do: two a weight and row, and two a head dimension, row and key."""
        config, drafter, topology = self.config, self.drafter, self.topology
        everywhere = self.batch * self.length
        found = dict.fromkeys(("backbone", "context", "blocks", "LM head", "Muon"), 0.0)
        rows = self.anchors * drafter.block_size
        for weight in self.model.weights:
            size, name = math.prod(weight.shape), weight.path[-1]
            if weight.component == "drafter" and name == "fc":
                found["context"] += 6 * everywhere * size
            elif weight.component == "drafter" and is_matrix(weight.axes):
                found["blocks"] += 8 * rows * size  # forward, again for the gradients, and these, which take two
                if name in ("k", "v"):
                    found["context"] += 6 * everywhere * size
            elif name == "lm_head":
                # twice more to have the logits again, and no gradient of the head
                found["LM head"] += 8 * self.anchors * (drafter.block_size - 1) * size
            elif weight.component == "experts":
                found["backbone"] += 2 * everywhere * size * config.moe.top_k / config.moe.experts
            elif weight.component in ("attention", "dense MLPs", "router"):
                found["backbone"] += 2 * everywhere * size
        for attention, layers in self.model.attentions():
            keys = self.length / 2 if attention.visible_keys is None else min(self.length, attention.visible_keys)
            found["backbone"] += 2 * layers * everywhere * keys * attention.heads * (attention.qk_dim + attention.v_dim)
        own = drafter.attention
        seen = min(self.length, own.visible_keys or self.length)
        found["blocks"] += 8 * drafter.num_layers * rows * seen * own.heads * (own.qk_dim + own.v_dim)
        for weight in self._matrices:
            short, long = sorted(weight.shape[-2:])
            each = 4 * short * short * long + 2 * short**3
            found["Muon"] += _NEWTON_SCHULZ * each * math.prod(weight.shape[:-2])
        return {name: total / topology.tensor_parallel for name, total in found.items()}

    @cached_property
    def sent(self) -> dict[str, float]:
        """Bytes that one device sends: what a step cannot do without."""
        config, drafter, topology = self.config, self.drafter, self.topology
        row, tensor, groups = config.hidden_size * ACTIVATION_BYTES, topology.attention_tensor, self.groups
        moe = sum(layer.mlp == "moe" for layer in config.layers)
        full = sum(layer.attention == "full" for layer in config.layers)

        def reduced(width: int, nbytes: float) -> float:
            return 2 * (width - 1) / width * nbytes

        way = messages(topology, self.positions, config.hidden_size, config.moe.top_k, ACTIVATION_BYTES)[self._way]
        dense = len(config.layers) - moe if topology.width("mlp") > 1 else 0
        rows = self.anchors // groups * drafter.block_size
        kv = config.full.kv_heads // topology.width("kv_heads") * (config.full.qk_dim + config.full.v_dim)
        own = drafter.attention
        window = drafter.num_layers * own.kv_heads // tensor * (own.qk_dim + own.v_dim) * ACTIVATION_BYTES
        exchanged = self.batch * ((own.visible_keys or 1) - 1) if self.cut_sequences and self.edges == "exchange" else 0
        parameters = sum(self._cut(w.shape, w.axes) for w in self.model.weights if w.component == "drafter")
        return {
            "backbone: attention and dense MLPs": reduced(tensor, (len(config.layers) + dense) * self.positions * row),
            "backbone: experts": moe * sum(m.sent for m in way),
            "backbone: keys of whole sequences": (groups - 1)
            * self.positions
            * full
            * kv
            * ACTIVATION_BYTES
            * self.cut_sequences,
            # there, again, and back
            "drafter: attention and MLPs": 3 * reduced(tensor, 2 * drafter.num_layers * rows * row),
            "drafter: windows of context": 2 * exchanged * window * (groups > 1),
            "gradients": reduced(groups, parameters * ACTIVATION_BYTES),
        }

    @property
    def seconds(self) -> dict[str, float]:
        """Of a step: FLOPs at peak, and bytes at the speed of the slowest link that is in use."""
        beyond = self.topology.tensor_parallel > self.device.linked_devices and self.device.network_bytes_per_s
        between = beyond or self.device.link_bytes_per_s
        compute = sum(self.flops.values()) / self.device.bf16_flops
        inside = {"backbone: attention and dense MLPs", "drafter: attention and MLPs"}
        return {
            "FLOPs": compute,
            "messages within groups": sum(self.sent[name] for name in inside) / self.device.link_bytes_per_s,
            "messages between groups": sum(n for name, n in self.sent.items() if name not in inside) / between,
        }

    @property
    def used(self) -> int:
        """Bytes of a device, all of the workspace counted."""
        return sum(self.arguments.values()) + sum(self.workspace.values())

    @cached_property
    def model(self) -> ModelShapes:
        """Shapes of all weights."""
        return ModelShapes.of(self.config, self.drafter)

    @property
    def _matrices(self) -> list[Any]:
        return [w for w in self.model.weights if w.component == "drafter" and is_matrix(w.axes)]

    @property
    def _way(self) -> Any:
        config = self.config
        return chosen_way(self.topology, self.positions, config.hidden_size, config.moe.top_k, ACTIVATION_BYTES)

    def _cut(self, shape: tuple[int, ...], axes: tuple[str, ...]) -> int:
        """Elements that one device has of a parameter."""
        return math.prod(size // self.topology.width(axis) for size, axis in zip(shape, axes, strict=True))


def held(tree: Any) -> int:
    """Bytes of arrays, or of their shapes and places, that one device has."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
