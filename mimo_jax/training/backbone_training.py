"""Pretraining a small backbone: next-token cross-entropy, experts balanced by bias, weights as they will be stored."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mimo_jax.backbone import Backbone
from mimo_jax.params import Declared, Params
from mimo_jax.training.fake_quantization import as_stored
from mimo_jax.training.groups import Groups
from mimo_jax.training.objective import cross_entropy
from mimo_jax.training.optimizers import TrainState, descend
from mimo_jax.training.state_placement import as_declared, kept_in_place, start


@dataclass(frozen=True, eq=False)
class BackboneTrainer:
    """What a step is made of; programs are compiled once an instance."""

    backbone: Declared[Backbone]
    optimizer: optax.GradientTransformation
    qat: bool
    """Whether the forward pass sees the weights as they will be stored."""
    groups: Groups = field(default_factory=Groups)

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return start(self.optimizer, params, self.backbone.axes, self.groups)

    def stored(self, params: Params) -> Params:
        """The weights that the forward pass sees."""
        return as_declared(as_stored(params, self.backbone.axes) if self.qat else params, self.backbone)


def next_token_loss(trainer: BackboneTrainer, params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of every token but the first of rows ids [batch, length], and the share predicted right."""
    params, groups = trainer.stored(params), trainer.groups
    given = groups.specs(params, trainer.backbone.axes), groups.ids
    return groups.on_all(partial(_local_loss, trainer), given, jax.P())(params, ids)


def _local_loss(trainer: BackboneTrainer, params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The same, on one of several devices."""
    backbone, groups = trainer.backbone.bind(params), trainer.groups
    given, labels = groups.sequence.part(ids[:, :-1], 1), groups.sequence.part(ids[:, 1:], 1).reshape(-1)
    hidden = backbone(given, groups.parts(backbone.config, given)).hidden
    vocabulary = backbone.topology.cut("logits")
    scores = cross_entropy(backbone.logits, hidden.reshape(labels.size, -1), labels, vocabulary)
    sums = jnp.stack([jnp.sum(scores.loss), jnp.sum(scores.correct.astype(jnp.float32))])
    loss, correct = groups.together.sum(sums) / (labels.size * groups.together.width)
    return loss, correct


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def backbone_step(
    trainer: BackboneTrainer, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch of `ids` [batch, length]; metrics are loss, accuracy and the experts' imbalance."""
    loss = jax.value_and_grad(partial(next_token_loss, trainer), has_aux=True)
    (value, accuracy), gradients = loss(state.params, batch["ids"])
    metrics = {"loss": value, "accuracy": accuracy, "busiest_expert": _busiest(gradients, trainer.groups)}
    state = descend(trainer.optimizer, state, gradients)
    return kept_in_place(state, trainer.backbone.axes, trainer.groups), metrics


def _busiest(gradients: Params, groups: Groups) -> jax.Array:
    """The largest share of tokens that one expert of one layer has, in units of an even share."""
    devices = groups.topology.tensor_parallel  # which all add the load of what they see
    loads = [
        jnp.max(g) / devices * g.shape[-1] + 1.0
        for path, g in jax.tree.leaves_with_path(gradients)
        if path[-1].key == "correction_bias"
    ]
    return jnp.max(jnp.stack(loads))
