"""What the rows of a drafter's blocks are trained towards, and what each of them weighs.

A block has a row for each of its draft tokens, the anchor's left out: row r of n stands r + 1 positions after it.
"""

from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from mimo_jax.training.objective import Head, cross_entropy, distillation
from sharding.collectives import Cut

Loss = Literal["hard", "kd", "d-pace"]
"""Cross-entropy against the answer's tokens; against the backbone's distribution there; against the tokens, weighed by
what each row adds to the accepted length (D-PACE, arXiv 2605.18810)."""

_SMOOTHING = 0.5
"""Least that D-PACE takes a token's probability for, so that rows after a bad one are trained, too."""


class BlockScores(NamedTuple):
    """Of some blocks."""

    loss: jax.Array
    """Sum of the rows' weighted losses, float32."""
    total: jax.Array
    """What the sum over all blocks is to be divided by: the weights, or with D-PACE the blocks that have labels."""
    correct: jax.Array
    """[blocks, rows] bool: whether the row has a label, and its best token is the label."""


def score_blocks(
    loss: Loss,
    gamma: float,
    head: Head,
    hidden: jax.Array,
    labels: jax.Array,
    labelled: jax.Array,
    teacher: Head,
    seen: jax.Array,
    vocabulary: Cut = Cut(),
) -> BlockScores:
    """Score the draft rows of blocks.

    Args:
        loss: Of which kind.
        gamma: Row r weighs exp(-r / gamma); not with D-PACE.
        head: The LM head.
        hidden: [blocks, rows, hidden], of the drafter.
        labels: [blocks, rows] int32.
        labelled: [blocks, rows] bool: rows that have a label. Others, and with D-PACE rows after one without, weigh
            nothing.
        teacher: From the backbone's last hidden states to its logits.
        seen: [blocks, rows, hidden]: the backbone's last hidden state at the position before each row's.
        vocabulary: What cuts the logits of both.
    """
    rows = hidden.reshape(labels.size, -1)
    if loss == "kd":
        scores = distillation(head, rows, labels.reshape(-1), teacher, seen.reshape(labels.size, -1), vocabulary)
    else:
        scores = cross_entropy(head, rows, labels.reshape(-1), vocabulary)
    losses = scores.loss.reshape(labels.shape)
    if loss == "d-pace":
        weights, total = _gains(losses, labelled), jnp.sum(jnp.any(labelled, axis=1))
    else:
        decay = jnp.exp(-jnp.arange(labels.shape[1], dtype=jnp.float32) / gamma)
        weights = jnp.where(labelled, decay, 0.0)
        total = jnp.sum(weights)
    correct = scores.correct.reshape(labels.shape) & labelled
    return BlockScores(jnp.sum(weights * losses), total.astype(jnp.float32), correct)


def _gains(losses: jax.Array, labelled: jax.Array) -> jax.Array:
    """What the expected accepted length gains with each row's log-probability, from losses [blocks, rows] of labels.

    Row s is accepted with the product of the probabilities of rows up to s. Row r is a factor of all from r on, whose
    sum is the derivative. No gradient passes through it.
    """
    probability = jnp.exp(-jax.lax.stop_gradient(losses))
    stands = jnp.where(labelled, (1 - _SMOOTHING) * probability + _SMOOTHING, 0.0)
    accepted = jnp.cumprod(stands, axis=1)
    return jnp.flip(jnp.cumsum(jnp.flip(accepted, axis=1), axis=1), axis=1)
