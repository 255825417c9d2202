"""Cross-entropy over a large vocabulary, a chunk of rows at a time, so that logits never exist whole."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.collectives import Cut


class Scores(NamedTuple):
    """Weighted sums over rows."""

    loss: jax.Array
    """Sum of weight * cross-entropy, float32."""
    weight: jax.Array
    """Sum of weights."""
    correct: jax.Array
    """[rows] bool: whether the best token is the label."""


def cross_entropy(
    head: Callable[[jax.Array], jax.Array],
    hidden: jax.Array,
    labels: jax.Array,
    weights: jax.Array,
    chunk: int = 1024,
    vocabulary: Cut = Cut(),
) -> Scores:
    """Weighted cross-entropy of `head(hidden)` against labels; logits are made, and made again for the gradient.

    Args:
        head: Rows [n, hidden] to logits [n, vocab] float32.
        hidden: [rows, hidden].
        labels: [rows] int32.
        weights: [rows] float32; rows of weight 0 count for nothing.
        chunk: Rows whose logits exist at a time.
        vocabulary: What cuts the logits, of which a device has a part.
    """
    rows = labels.shape[0]
    chunks = -(-rows // chunk)
    pad = chunks * chunk - rows

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, pad)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, chunk, *x.shape[1:])

    @jax.checkpoint
    def one(sums: tuple[jax.Array, jax.Array], part: tuple[jax.Array, ...]):
        hidden, labels, weights = part
        logits = head(hidden)
        loss = vocabulary.logsumexp(logits) - vocabulary.take(logits, labels)
        correct = vocabulary.argmax(jax.lax.stop_gradient(logits)) == labels
        return (sums[0] + jnp.sum(weights * loss), sums[1] + jnp.sum(weights)), correct

    zero = jnp.zeros((), jnp.float32)
    (loss, weight), correct = jax.lax.scan(one, (zero, zero), tuple(map(cut, (hidden, labels, weights))))
    return Scores(loss, weight, correct.reshape(-1)[:rows])
