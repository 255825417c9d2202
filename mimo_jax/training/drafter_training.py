"""Training a drafter by self-distillation: blocks at random anchors of the backbone's own answers.

The backbone is frozen and runs once over a sequence; its captured features give every position's context keys and
values. A block at anchor t then runs through the drafter as in decoding, on the positions before t: what is trained is
what is served.
"""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mimo_jax.backbone import Backbone
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.training.groups import Groups
from mimo_jax.training.local_shard import Edges, context, draw_anchors, skipped
from mimo_jax.training.objective import cross_entropy
from mimo_jax.training.optimizers import TrainState, descend
from mimo_jax.training.state_placement import as_declared, kept_in_place, start


@dataclass(frozen=True, eq=False)
class DrafterTrainer:
    """What a step is made of; programs are compiled once an instance."""

    backbone: Declared[Backbone]
    drafter: Declared[Drafter]
    optimizer: optax.GradientTransformation
    anchors: int = 512
    """Blocks a step, equally many in each sequence."""
    gamma: float = 7.0
    """Row r of a block weighs exp(-(r - 1) / gamma); 7 is the release's figure, 4 the paper's for blocks of 8."""
    blocks_at_once: int = 128
    """Blocks whose attention and logits exist at a time."""
    groups: Groups = field(default_factory=Groups)
    edges: Edges = "exchange"

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return start(self.optimizer, params, self.drafter.axes, self.groups)


def block_loss(
    trainer: DrafterTrainer,
    backbone: Backbone,
    params: Params,
    captured: jax.Array,
    ids: jax.Array,
    answer: jax.Array,
    anchors: jax.Array,
    drawn: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean cross-entropy of the rows of all blocks, those of other devices included.

    Args:
        trainer: Settings.
        backbone: Bound; its embedding and head are used.
        params: The drafter's.
        captured: [batch, positions, captured layers, hidden] features of this device's positions.
        ids: [batch, length] int32.
        answer: [batch, length] bool; rows whose label is no answer, or lies beyond the sequence, weigh nothing.
        anchors: [batch, blocks] int32, among this device's positions.
        drawn: [batch, blocks] bool: blocks that count.

    Returns:
        The loss and metrics: accuracy of each draft row, and the accepted length it would give.
    """
    drafter = trainer.drafter.bind(params)
    config, (batch, length) = drafter.config, ids.shape
    seen = context(drafter, captured, trainer.groups, trainer.edges)

    rows = jnp.arange(config.block_size, dtype=jnp.int32)[1:]
    weights = jnp.exp(-(rows - 1).astype(jnp.float32) / trainer.gamma)
    blocks = anchors.shape[1]
    size = min(max(1, trainer.blocks_at_once // batch), blocks)
    chunks = -(-blocks // size)

    def cut(x: jax.Array) -> jax.Array:
        """[batch, blocks] to [chunks, batch * size]."""
        x = jnp.pad(x, ((0, 0), (0, chunks * size - blocks)))
        return x.reshape(batch, chunks, size).swapaxes(0, 1).reshape(chunks, -1)

    row = jnp.repeat(jnp.arange(batch, dtype=jnp.int32), size)

    @jax.checkpoint
    def some_blocks(sums: tuple[jax.Array, ...], part: tuple[jax.Array, ...]):
        anchor, counts = part  # [batch * size] each
        hidden = drafter(backbone.embed(ids[row, anchor]), seen, anchor)[:, 1:]  # [batch * size, block - 1, hidden]
        at = anchor[:, None] + rows  # labels stand at the rows' own positions
        inside = jnp.minimum(at, length - 1)
        labelled = counts[:, None] & (at < length) & answer[row[:, None], inside]
        labels, weight = ids[row[:, None], inside], jnp.where(labelled, weights, 0.0)
        scores = cross_entropy(
            backbone.head,
            hidden.reshape(labels.size, -1),
            labels.reshape(-1),
            weight.reshape(-1),
            vocabulary=backbone.topology.cut("logits"),
        )
        right = scores.correct.reshape(labels.shape) & labelled
        prefix = jnp.cumprod(right.astype(jnp.int32), axis=1)
        new = (scores.loss, scores.weight, jnp.sum(right, 0), jnp.sum(labelled, 0), jnp.sum(prefix), jnp.sum(counts))
        return jax.tree.map(jnp.add, sums, tuple(jnp.asarray(n, jnp.float32) for n in new)), None

    zero, by_row = jnp.zeros((), jnp.float32), jnp.zeros(rows.size, jnp.float32)
    sums, _ = jax.lax.scan(some_blocks, (zero, zero, by_row, by_row, zero, zero), (cut(anchors), cut(drawn)))
    loss, weight, right, labelled, prefix, counted = _over_all(trainer.groups, sums)
    accuracy = right / jnp.maximum(labelled, 1.0)
    metrics = {f"accuracy_{r + 1}": accuracy[r] for r in range(rows.size)}
    return loss / jnp.maximum(weight, 1e-9), metrics | {"accepted_length": 1.0 + prefix / jnp.maximum(counted, 1.0)}


def _over_all[T](groups: Groups, sums: T) -> T:
    """Sums over all groups, in one message."""
    flat, back = ravel_pytree(sums)
    return back(groups.together.sum(flat))


def features(trainer: DrafterTrainer, frozen: Params, batch: dict[str, jax.Array]) -> jax.Array:
    """What the backbone gives the drafter of a batch (see `drafter_step`), on the device that has these positions:
    [batch, positions, captured layers, hidden].
    """
    backbone, groups = trainer.backbone.bind(frozen), trainer.groups
    ids = groups.sequence.part(batch["ids"], 1)
    counts = batch["lengths"] - groups.first(ids.shape[1])
    capture = trainer.drafter.module.config.target_layer_ids
    return jax.lax.stop_gradient(backbone(ids, groups.parts(backbone.config, ids), capture, counts).captured)


def local_loss(
    trainer: DrafterTrainer,
    params: Params,
    frozen: Params,
    captured: jax.Array,
    batch: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`block_loss` of anchors that every device draws for itself."""
    groups, skip = trainer.groups, skipped(trainer.drafter.module.config, trainer.groups, trainer.edges)
    sequences = batch["ids"].shape[0] * (1 if groups.sequence.axes else groups.together.width)
    count = -(-trainer.anchors // (sequences * groups.sequence.width))
    anchors, drawn = draw_anchors(key, batch["answer"], count, groups, skip)
    backbone = trainer.backbone.bind(frozen)
    return block_loss(trainer, backbone, params, captured, batch["ids"], batch["answer"], anchors, drawn)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def drafter_step(
    trainer: DrafterTrainer, state: TrainState, batch: dict[str, jax.Array], frozen: Params, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch (see `Answers.batch`); the backbone's parameters stay as they are."""
    groups, everywhere = trainer.groups, jax.P()
    frozen_lie, ids_lie = groups.specs(frozen, trainer.backbone.axes), groups.ids
    captured = groups.on_all(partial(features, trainer), (frozen_lie, ids_lie), groups.rows)(frozen, batch)

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = as_declared(params, trainer.drafter)
        given = groups.specs(params, trainer.drafter.axes), frozen_lie, groups.rows, ids_lie, everywhere
        return groups.on_all(partial(local_loss, trainer), given, everywhere)(params, frozen, captured, batch, key)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = descend(trainer.optimizer, state, gradients)
    return kept_in_place(state, trainer.drafter.axes, groups), {"loss": value, **metrics}
