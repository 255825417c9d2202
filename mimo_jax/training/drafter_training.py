"""Training a drafter by self-distillation: blocks at random anchors of the backbone's own answers.

The backbone is frozen and runs once over a sequence; its captured features give every position's context keys and
values. A block at anchor t then runs through the drafter as in decoding, on the positions before t: what is trained is
what is served.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from mimo_jax.backbone import Backbone
from mimo_jax.cache import Documents, SequenceKV
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.training.anchors import Choice, candidates, draw_anchors
from mimo_jax.training.block_losses import Loss, score_blocks
from mimo_jax.training.optimizers import TrainState, descend


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

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return TrainState(params, self.optimizer.init(params))


class Text(NamedTuple):
    """A batch (see `Answers.batch`), and what the backbone made of it."""

    ids: jax.Array
    """[batch, length] int32."""
    answer: jax.Array
    """[batch, length] bool: what may be a label."""
    positions: jax.Array
    """[batch, length] int32: where each stands in its document."""
    captured: jax.Array
    """[batch, length, captured layers, hidden] features."""
    final: jax.Array
    """[batch, length, hidden]: the last hidden states, which the backbone's logits are made of."""


class Filled(NamedTuple):
    """What blocks came to."""

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


def read(trainer: DrafterTrainer, backbone: Backbone, batch: dict[str, jax.Array]) -> Text:
    """Let the frozen backbone, bound, read a batch."""
    ids, positions = batch["ids"], batch["positions"]
    capture = trainer.drafter.module.config.target_layer_ids
    seen = backbone(ids, Documents(positions), capture, batch["lengths"])
    captured, final = jax.lax.stop_gradient((seen.captured, seen.hidden))
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
        anchors: [batch, blocks] int32.
        drawn: [batch, blocks] bool: blocks that count.
    """
    drafter = trainer.drafter.bind(params)
    ids, answer, positions, captured, final = text
    config, (batch, length) = drafter.config, ids.shape
    # positions start again with every document, so each is given its own
    kv = drafter.context(captured.reshape(batch * length, 1, *captured.shape[2:]), positions.reshape(-1))
    context = SequenceKV(*(x.reshape(x.shape[0], batch, length, *x.shape[3:]) for x in kv))

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
        hidden = drafter(backbone.embed(ids[row, anchor]), replace(context, starts=anchor - position), position)[:, 1:]
        at = anchor[:, None] + rows  # labels stand at the rows' own positions
        inside = jnp.minimum(at, length - 1)
        same = positions[row[:, None], inside] == position[:, None] + rows  # not beyond the row, nor the document
        labelled = counts[:, None] & same & answer[row[:, None], inside]
        labels, before = ids[row[:, None], inside], final[row[:, None], inside - 1]
        scores = score_blocks(
            trainer.loss, trainer.gamma, backbone.head, hidden, labels, labelled, backbone.logits, before
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
    """Weighted mean loss of the rows of all blocks; arguments as for `fill_blocks`.

    Returns:
        The loss and metrics: accuracy of each draft row, and the accepted length it would give.
    """
    filled = fill_blocks(trainer, backbone, params, text, anchors, drawn)
    accuracy = filled.right / jnp.maximum(filled.labelled, 1.0)
    metrics = {f"accuracy_{r + 1}": accuracy[r] for r in range(accuracy.size)}
    accepted = jnp.sum(filled.stood) / jnp.maximum(jnp.sum(drawn), 1)
    return filled.loss / jnp.maximum(filled.total, 1e-9), metrics | {"accepted_length": 1.0 + accepted}


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def drafter_step(
    trainer: DrafterTrainer, state: TrainState, batch: dict[str, jax.Array], frozen: Params, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch (see `Answers.batch`); the backbone's parameters stay as they are."""
    backbone = trainer.backbone.bind(frozen)
    text = read(trainer, backbone, batch)
    candidate = candidates(trainer.choice, trainer.drafter.module.config.block_size, text.answer, text.positions)
    anchors, drawn = draw_anchors(key, candidate, -(-trainer.anchors // candidate.shape[0]))

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return block_loss(trainer, backbone, params, text, anchors, drawn)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return descend(trainer.optimizer, state, gradients), {"loss": value, **metrics}
