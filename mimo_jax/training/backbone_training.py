"""Pretraining a small backbone: next-token cross-entropy, experts balanced by bias, weights as they will be stored."""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import optax

from mimo_jax.backbone import Backbone
from mimo_jax.cache import backbone_cache
from mimo_jax.params import Declared, Params
from mimo_jax.training.fake_quantization import as_stored
from mimo_jax.training.objective import cross_entropy
from mimo_jax.training.optimizers import TrainState, descend


@dataclass(frozen=True, eq=False)
class BackboneTrainer:
    """What a step is made of; programs are compiled once an instance."""

    backbone: Declared[Backbone]
    optimizer: optax.GradientTransformation
    qat: bool
    """Whether the forward pass sees the weights as they will be stored."""

    def start(self, params: Params) -> TrainState:
        """The state before the first step."""
        return TrainState(params, self.optimizer.init(params))

    def stored(self, params: Params) -> Params:
        """The weights that the forward pass sees."""
        return as_stored(params, self.backbone.axes) if self.qat else params


def next_token_loss(trainer: BackboneTrainer, params: Params, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean cross-entropy of every token but the first of rows ids [batch, length], and the share predicted right."""
    backbone = trainer.backbone.bind(trainer.stored(params))
    # caches without room: nothing is committed, and every row sees its own window alone
    cache = backbone_cache(backbone.config, ids.shape[0], 0, 1, "float32")
    hidden = backbone(ids[:, :-1], cache).hidden
    labels = ids[:, 1:].reshape(-1)
    scores = cross_entropy(backbone.logits, hidden.reshape(labels.size, -1), labels)
    return jnp.mean(scores.loss), jnp.mean(scores.correct.astype(jnp.float32))


@partial(jax.jit, static_argnums=0, donate_argnums=1)
def backbone_step(
    trainer: BackboneTrainer, state: TrainState, batch: dict[str, jax.Array]
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One step on a batch of `ids` [batch, length]; metrics are loss, accuracy and the experts' imbalance."""
    loss = jax.value_and_grad(partial(next_token_loss, trainer), has_aux=True)
    (value, accuracy), gradients = loss(state.params, batch["ids"])
    metrics = {"loss": value, "accuracy": accuracy, "busiest_expert": _busiest(gradients)}
    return descend(trainer.optimizer, state, gradients), metrics


def _busiest(gradients: Params) -> jax.Array:
    """The largest share of tokens that one expert of one layer has, in units of an even share."""
    loads = [
        jnp.max(g) * g.shape[-1] + 1.0
        for path, g in jax.tree.leaves_with_path(gradients)
        if path[-1].key == "correction_bias"
    ]
    return jnp.max(jnp.stack(loads))
