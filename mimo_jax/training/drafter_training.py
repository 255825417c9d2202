"""Training a drafter by self-distillation: blocks at random anchors of the backbone's own answers.

The backbone is frozen and runs once over a sequence; its captured features give every position's context keys and
values. A block at anchor t then runs through the drafter as in decoding, on the positions before t: what is trained is
what is served.
"""

from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.flatten_util import ravel_pytree

from mimo_jax.backbone import Backbone
from mimo_jax.cache import Documents
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.training import TrainingError
from mimo_jax.training.anchors import Choice, candidates, draw_anchors
from mimo_jax.training.block_losses import Loss, score_blocks
from mimo_jax.training.groups import Groups
from mimo_jax.training.local_shard import Edges, context, drawable, skipped
from mimo_jax.training.optimizers import TrainState, descend
from mimo_jax.training.state_placement import as_declared, kept_in_place, start


@dataclass(frozen=True, eq=False)
class DrafterTrainer:
    """What a step is made of; programs are compiled once an instance."""

    backbone: Declared[Backbone]
    drafter: Declared[Drafter]
    optimizer: optax.GradientTransformation
    anchors: int = 512
    """Blocks a step, equally many in each row."""
    choice: Choice = "random"
    loss: Loss = "hard"
    gamma: float = 7.0
    """Row r of a block weighs exp(-(r - 1) / gamma); 7 is the release's figure, 4 the paper's for blocks of 8."""
    blocks_at_once: int = 128
    """Blocks whose attention and logits exist at a time."""
    groups: Groups = field(default_factory=Groups)
    edges: Edges = "exchange"

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return start(self.optimizer, params, self.drafter.axes, self.groups)


class Text(NamedTuple):
    """A batch (see `Answers.batch`), and what the backbone made of it, as one device has them.

    Where sequences are cut, `length` is that of whole ones and `part` the positions that are this device's, from
    `Groups.first` on; elsewhere both are the same.
    """

    ids: jax.Array
    """[batch, length] int32."""
    answer: jax.Array
    """[batch, length] bool: what may be a label."""
    positions: jax.Array
    """[batch, length] int32: where each stands in its document."""
    captured: jax.Array
    """[batch, part, captured layers, hidden] features."""
    final: jax.Array
    """[batch, part, hidden]: the last hidden states, which the backbone's logits are made of. For distillation with
    edges that are exchanged, also those that labels of the last positions need of the next part.
    """

    @classmethod
    def lies(cls, groups: Groups) -> "Text":
        """How it lies on a mesh: a `PartitionSpec` in the place of each array."""
        whole: Any = groups.ids
        part: Any = groups.rows
        return cls(whole, whole, whole, part, part)


class Filled(NamedTuple):
    """What blocks came to, on one device."""

    loss: jax.Array
    """Sum of weighted losses."""
    total: jax.Array
    """What it is to be divided by."""
    right: jax.Array
    """[block - 1] float32: how many of each draft row were right."""
    labelled: jax.Array
    """[block - 1] float32: how many of each had a label."""
    stood: jax.Array
    """[batch, blocks] int32: right drafts before the first wrong one."""


def read(trainer: DrafterTrainer, frozen: Params, batch: dict[str, jax.Array]) -> Text:
    """Let the frozen backbone read this device's part of a batch (see `drafter_step`)."""
    backbone, groups, config = trainer.backbone.bind(frozen), trainer.groups, trainer.drafter.module.config
    ids, positions = batch["ids"], batch.get("positions")
    here = groups.sequence.part(ids, 1)
    if positions is None:
        cache = groups.parts(backbone.config, here)
        positions = jnp.broadcast_to(jnp.arange(ids.shape[1], dtype=jnp.int32), ids.shape)
    elif groups.cut_sequences:
        raise TrainingError(
            "rows with `positions` hold several documents, and with `cut_sequences` a device has a part of a row and "
            "sees all before it: give rows of one document each, without `positions` (`Answers.batch(alone=True)`), "
            "or do not cut sequences"
        )
    else:
        cache = Documents(positions)
    seen = backbone(here, cache, config.target_layer_ids, batch["lengths"] - groups.first(here.shape[1]))
    captured, final = jax.lax.stop_gradient((seen.captured, seen.hidden))
    if trainer.loss == "kd" and trainer.edges == "exchange" and groups.sequence.axes:
        final = jnp.concatenate([final, groups.sequence.after(final, config.block_size - 2, 1)], axis=1)
    return Text(ids, batch["answer"], positions, captured, final)


def fill_blocks(
    trainer: DrafterTrainer, backbone: Backbone, params: Params, text: Text, anchors: jax.Array, drawn: jax.Array
) -> Filled:
    """Let the drafter fill blocks of a text, and score their rows.

    Args:
        trainer: Settings.
        backbone: Bound; its embedding and head are used.
        params: The drafter's.
        text: What blocks are of. Rows whose label is no answer, or lies beyond the document, weigh nothing.
        anchors: [batch, blocks] int32, among this device's positions.
        drawn: [batch, blocks] bool: blocks that count.
    """
    drafter = trainer.drafter.bind(params)
    ids, answer, positions, captured, final = text
    config, (batch, length) = drafter.config, ids.shape
    seen, first = (
        context(drafter, captured, positions, trainer.groups, trainer.edges),
        trainer.groups.first(captured.shape[1]),
    )

    rows = jnp.arange(config.block_size, dtype=jnp.int32)[1:]
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
        position = positions[row, anchor]
        hidden = drafter(backbone.embed(ids[row, anchor]), replace(seen, starts=anchor - position), position)[:, 1:]
        at = anchor[:, None] + rows  # labels stand at the rows' own positions
        inside = jnp.minimum(at, length - 1)
        same = positions[row[:, None], inside] == position[:, None] + rows  # not beyond the row, nor the document
        labelled = counts[:, None] & same & answer[row[:, None], inside]
        labels, before = ids[row[:, None], inside], final[row[:, None], inside - 1 - first]
        scores = score_blocks(
            trainer.loss,
            trainer.gamma,
            backbone.head,
            hidden,
            labels,
            labelled,
            backbone.logits,
            before,
            vocabulary=backbone.topology.cut("logits"),
        )
        right = scores.correct.astype(jnp.int32)
        new = scores.loss, scores.total, jnp.sum(right, 0), jnp.sum(labelled, 0)
        sums = jax.tree.map(jnp.add, sums, tuple(jnp.asarray(n, jnp.float32) for n in new))
        return sums, jnp.sum(jnp.cumprod(right, axis=1), axis=1)

    zero, by_row = jnp.zeros((), jnp.float32), jnp.zeros(rows.size, jnp.float32)
    sums, stood = jax.lax.scan(some_blocks, (zero, zero, by_row, by_row), (cut(anchors), cut(drawn)))
    stood = stood.reshape(chunks, batch, size).swapaxes(0, 1).reshape(batch, -1)[:, :blocks]
    return Filled(*sums, stood)


def block_loss(
    trainer: DrafterTrainer, backbone: Backbone, params: Params, text: Text, anchors: jax.Array, drawn: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean loss of the rows of all blocks, those of other devices included; arguments as for `fill_blocks`.

    Returns:
        The loss and metrics: accuracy of each draft row, and the accepted length it would give.
    """
    *sums, stood = fill_blocks(trainer, backbone, params, text, anchors, drawn)
    sums = _over_all(trainer.groups, (*sums, *(jnp.sum(x).astype(jnp.float32) for x in (stood, drawn))))
    loss, total, right, labelled, stood, blocks = sums
    accuracy = right / jnp.maximum(labelled, 1.0)
    metrics = {f"accuracy_{r + 1}": accuracy[r] for r in range(accuracy.size)}
    return loss / jnp.maximum(total, 1e-9), metrics | {"accepted_length": 1.0 + stood / jnp.maximum(blocks, 1.0)}


def _over_all[T](groups: Groups, sums: T) -> T:
    """Sums over all groups, in one message."""
    flat, back = ravel_pytree(sums)
    return back(groups.together.sum(flat))


def local_loss(
    trainer: DrafterTrainer, params: Params, frozen: Params, text: Text, key: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """`block_loss` of anchors that every device draws for itself."""
    groups, config, (rows, length) = trainer.groups, trainer.drafter.module.config, text.ids.shape
    candidate = candidates(trainer.choice, config.block_size, text.answer, text.positions)
    candidate &= drawable(skipped(config, groups, trainer.edges), groups, length)
    devices = groups.together.width  # that share rows, or have rows of their own
    anchors, drawn = draw_anchors(key, candidate, -(-trainer.anchors // (rows * devices)), groups)
    return block_loss(trainer, trainer.backbone.bind(frozen), params, text, anchors, drawn)


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def drafter_step(
    trainer: DrafterTrainer, state: TrainState, batch: dict[str, jax.Array], frozen: Params, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch (see `Answers.batch`); the backbone's parameters stay as they are.

    Raises:
        TrainingError: Rows hold several documents (the batch has `positions`), and sequences are cut.
    """
    groups, everywhere = trainer.groups, jax.P()
    frozen_lie, ids_lie = groups.specs(frozen, trainer.backbone.axes), groups.ids
    text_lies = Text.lies(groups)
    text = groups.on_all(partial(read, trainer), (frozen_lie, ids_lie), text_lies)(frozen, batch)

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        params = as_declared(params, trainer.drafter)
        given = groups.specs(params, trainer.drafter.axes), frozen_lie, text_lies, everywhere
        return groups.on_all(partial(local_loss, trainer), given, everywhere)(params, frozen, text, key)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    state = descend(trainer.optimizer, state, gradients)
    return kept_in_place(state, trainer.drafter.axes, groups), {"loss": value, **metrics}
