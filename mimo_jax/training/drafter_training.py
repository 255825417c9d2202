"""Training a drafter by self-distillation: blocks at random anchors of the backbone's own answers.

The backbone is frozen and runs once over a sequence; its captured features give every position's context keys and
values. A block at anchor t then runs through the drafter as in decoding, on the positions before t: what is trained is
what is served.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mimo_jax.backbone import Backbone
from mimo_jax.cache import SequenceKV, backbone_cache
from mimo_jax.drafter import Drafter
from mimo_jax.params import Declared, Params
from mimo_jax.training.block_losses import Loss, score_blocks
from mimo_jax.training.optimizers import TrainState, descend


@dataclass(frozen=True, eq=False)
class DrafterTrainer:
    """What a step is made of; programs are compiled once an instance."""

    backbone: Declared[Backbone]
    drafter: Declared[Drafter]
    optimizer: optax.GradientTransformation
    anchors: int = 512
    """Blocks a step, equally many in each sequence."""
    loss: Loss = "hard"
    gamma: float = 7.0
    """Row r of a block weighs exp(-(r - 1) / gamma); 7 is the release's figure, 4 the paper's for blocks of 8."""
    blocks_at_once: int = 128
    """Blocks whose attention and logits exist at a time."""

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return TrainState(params, self.optimizer.init(params))


def draw_anchors(key: jax.Array, answer: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draw anchors uniformly without replacement among positions t such that t and t + 1 are answers.

    Args:
        key: Of the step.
        answer: [batch, length] bool.
        count: Anchors a row.

    Returns:
        Anchors [batch, count] int32 and whether each is one, [batch, count] bool: rows may have fewer candidates.
    """
    candidate = answer & jnp.pad(answer[:, 1:], ((0, 0), (0, 1)))
    order = jnp.where(candidate, jax.random.uniform(key, answer.shape), 2.0)
    drawn, anchors = jax.lax.top_k(-order, min(count, answer.shape[1]))
    return anchors.astype(jnp.int32), drawn > -2.0


def block_loss(
    trainer: DrafterTrainer,
    backbone: Backbone,
    params: Params,
    captured: jax.Array,
    final: jax.Array,
    ids: jax.Array,
    answer: jax.Array,
    anchors: jax.Array,
    drawn: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted mean loss of the rows of all blocks.

    Args:
        trainer: Settings.
        backbone: Bound; its embedding and head are used.
        params: The drafter's.
        captured: [batch, length, captured layers, hidden] features.
        final: [batch, length, hidden]: the backbone's last hidden states, which its logits are made of.
        ids: [batch, length] int32.
        answer: [batch, length] bool; rows whose label is no answer, or lies beyond the sequence, weigh nothing.
        anchors: [batch, blocks] int32.
        drawn: [batch, blocks] bool: blocks that count.

    Returns:
        The loss and metrics: accuracy of each draft row, and the accepted length it would give.
    """
    drafter = trainer.drafter.bind(params)
    config, (batch, length) = drafter.config, ids.shape
    context = SequenceKV(*drafter.context(captured, jnp.zeros(batch, jnp.int32)))

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
        hidden = drafter(backbone.embed(ids[row, anchor]), context, anchor)[:, 1:]  # [batch * size, block - 1, hidden]
        at = anchor[:, None] + rows  # labels stand at the rows' own positions
        inside = jnp.minimum(at, length - 1)
        labelled = counts[:, None] & (at < length) & answer[row[:, None], inside]
        labels, before = ids[row[:, None], inside], final[row[:, None], inside - 1]
        scores = score_blocks(
            trainer.loss, trainer.gamma, backbone.head, hidden, labels, labelled, backbone.logits, before
        )
        right = scores.correct
        prefix = jnp.cumprod(right.astype(jnp.int32), axis=1)
        new = (scores.loss, scores.total, jnp.sum(right, 0), jnp.sum(labelled, 0), jnp.sum(prefix), jnp.sum(counts))
        return jax.tree.map(jnp.add, sums, tuple(jnp.asarray(n, jnp.float32) for n in new)), None

    zero, by_row = jnp.zeros((), jnp.float32), jnp.zeros(rows.size, jnp.float32)
    sums, _ = jax.lax.scan(some_blocks, (zero, zero, by_row, by_row, zero, zero), (cut(anchors), cut(drawn)))
    loss, total, right, labelled, prefix, counted = sums
    accuracy = right / jnp.maximum(labelled, 1.0)
    metrics = {f"accuracy_{r + 1}": accuracy[r] for r in range(rows.size)}
    return loss / jnp.maximum(total, 1e-9), metrics | {"accepted_length": 1.0 + prefix / jnp.maximum(counted, 1.0)}


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def drafter_step(
    trainer: DrafterTrainer, state: TrainState, batch: dict[str, jax.Array], frozen: Params, key: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch (see `Answers.batch`); the backbone's parameters stay as they are."""
    backbone = trainer.backbone.bind(frozen)
    ids, answer = batch["ids"], batch["answer"]
    cache = backbone_cache(backbone.config, ids.shape[0], 0, 1, "float32")
    capture = trainer.drafter.module.config.target_layer_ids
    seen = jax.lax.stop_gradient(backbone(ids, cache, capture, batch["lengths"]))
    anchors, drawn = draw_anchors(key, answer, -(-trainer.anchors // ids.shape[0]))

    def loss(params: Params) -> tuple[jax.Array, dict[str, jax.Array]]:
        return block_loss(trainer, backbone, params, seen.captured, seen.hidden, ids, answer, anchors, drawn)

    (value, metrics), gradients = jax.value_and_grad(loss, has_aux=True)(state.params)
    return descend(trainer.optimizer, state, gradients), {"loss": value, **metrics}
