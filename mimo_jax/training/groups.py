"""How the groups of a mesh share a step of training: each has sequences of its own, or a part of every sequence.

Programs are written for one device, as in decoding. What they differentiate is the loss of all devices together, so
gradients of what several devices have alike come out summed.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from mimo_jax.cache import EarlierParts, PartsOfSequences
from mimo_jax.config import AttentionConfig, BackboneConfig
from mimo_jax.gpu_weights import specs
from mimo_jax.params import Params
from mimo_jax.training import TrainingError
from sharding.collectives import Cut
from sharding.layout import place
from sharding.topology import Topology


@dataclass(frozen=True)
class Groups:
    """The data-parallel groups of a mesh."""

    topology: Topology = Topology()
    mesh: Mesh = field(default_factory=Topology().mesh)
    cut_sequences: bool = False
    """Whether a group has consecutive positions of every sequence, rather than sequences of its own."""

    @property
    def together(self) -> Cut:
        """What all groups have of a step."""
        return self.topology.cut("batch")

    @property
    def sequence(self) -> Cut:
        """What cuts a sequence."""
        return self.topology.cut("sequence") if self.cut_sequences else Cut()

    @property
    def ids(self) -> PartitionSpec:
        """How arrays [batch, length] of ids lie. Cut sequences are whole everywhere: a block at the end of a part needs
        labels from the next, and ids are few bytes.
        """
        return PartitionSpec() if self.cut_sequences else PartitionSpec(self.topology.rules["batch"])

    @property
    def rows(self) -> PartitionSpec:
        """How arrays [batch, positions, ...] lie."""
        cut = self.topology.rules["sequence" if self.cut_sequences else "batch"]
        return PartitionSpec(None, cut) if self.cut_sequences else PartitionSpec(cut)

    def part(self, x: jax.Array) -> jax.Array:
        """What this device has of an array [batch, positions, ...] of a whole step."""
        return self.together.part(x, 1 if self.cut_sequences else 0)

    def first(self, positions: int) -> jax.Array | int:
        """Where this device's `positions` of a sequence begin."""
        return self.sequence.index() * positions

    def parts(self, config: BackboneConfig, ids: jax.Array) -> PartsOfSequences:
        """What this device's rows ids [batch, positions] see beside themselves: the parts before theirs, if any."""
        batch, positions = ids.shape
        kv = dict.fromkeys(config.attention_kinds, EarlierParts(self.sequence))
        return PartsOfSequences(jnp.full(batch, self.first(positions), jnp.int32), kv)

    def check(self, rows: int, length: int) -> None:
        """Raise `TrainingError` unless steps of `rows` sequences of `length` positions fall into equal shares."""
        size, what = (length, "positions") if self.cut_sequences else (rows, "rows")
        if size % self.together.width:
            raise TrainingError(f"{size} {what} cannot be shared equally by {self.together.width} data-parallel groups")

    def check_heads(self, *attentions: AttentionConfig) -> None:
        """Raise `TrainingError` if devices would have copies of KV heads, each of which would be trained apart."""
        width = self.topology.width("kv_heads")
        for attention in attentions:
            if attention.kv_heads % width:
                raise TrainingError(
                    f"{attention.kv_heads} KV heads cannot be trained on {width} devices that share attention: "
                    f"choose fewer devices, or more data-parallel groups, so that each has at least one of its own"
                )

    def on_all(self, program: Callable, given: tuple[Any, ...], made: Any) -> Callable:
        """A program of one device, run by all of them.

        Args:
            program: Takes this device's parts.
            given: The `PartitionSpec`s of its arguments.
            made: Those of its results.
        """
        return jax.shard_map(program, mesh=self.mesh, in_specs=given, out_specs=made, check_vma=False)

    def specs(self, params: Params, axes: Params) -> Params:
        """How parameters of any weight type lie, given the logical axes that they were declared with."""
        return specs(params, axes, self.topology)

    def placed(self, params: Params, axes: Params) -> Params:
        """Parameters on the mesh."""
        return place(params, self.specs(params, axes), self.mesh)

    def shardings(self, tree: Any) -> Any:
        """`PartitionSpec`s as places on the mesh."""
        return jax.tree.map(lambda spec: NamedSharding(self.mesh, spec), tree, is_leaf=_is_spec)


def _is_spec(value: Any) -> bool:
    return isinstance(value, PartitionSpec)
