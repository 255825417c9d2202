"""Losses of rows over a large vocabulary, a chunk of rows at a time, so that logits never exist whole."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sharding.collectives import Cut

Head = Callable[[jax.Array], jax.Array]
"""Rows [n, hidden] to logits [n, vocab] float32, or to a device's part of them."""


class Scores(NamedTuple):
    """What each row gets."""

    loss: jax.Array
    """[rows] float32."""
    correct: jax.Array
    """[rows] bool: whether the best token is the label."""


def cross_entropy(
    head: Head, hidden: jax.Array, labels: jax.Array, vocabulary: Cut = Cut(), chunk: int = 1024
) -> Scores:
    """Cross-entropy of `head(hidden)` against labels; logits are made, and made again for the gradient.

    Args:
        head: Makes logits.
        hidden: [rows, hidden].
        labels: [rows] int32.
        vocabulary: What cuts the logits, of which a device has a part.
        chunk: Rows whose logits exist at a time.
    """

    def one(hidden: jax.Array, labels: jax.Array) -> Scores:
        logits = head(hidden)
        loss = vocabulary.logsumexp(logits) - vocabulary.take(logits, labels)
        return Scores(loss, _best(logits, vocabulary) == labels)

    return _in_chunks(one, chunk, hidden, labels)


def distillation(
    head: Head,
    hidden: jax.Array,
    labels: jax.Array,
    teacher: Head,
    seen: jax.Array,
    vocabulary: Cut = Cut(),
    chunk: int = 1024,
) -> Scores:
    """Cross-entropy of `head(hidden)` against the distribution of `teacher(seen)`, both made as in `cross_entropy`.

    Args:
        head: Makes logits.
        hidden: [rows, hidden].
        labels: [rows] int32; for `correct` only.
        teacher: Makes the logits to follow, of which no gradient is taken.
        seen: [rows, teacher's hidden].
        vocabulary: What cuts the logits of both.
        chunk: Rows whose logits exist at a time.
    """

    def one(hidden: jax.Array, labels: jax.Array, seen: jax.Array) -> Scores:
        logits = head(hidden)
        given = jax.lax.stop_gradient(teacher(seen))
        wanted = jnp.exp(given - vocabulary.logsumexp(given)[:, None])
        loss = vocabulary.logsumexp(logits) - vocabulary.sum(jnp.sum(wanted * logits, axis=-1))
        return Scores(loss, _best(logits, vocabulary) == labels)

    return _in_chunks(one, chunk, hidden, labels, seen)


def _best(logits: jax.Array, vocabulary: Cut) -> jax.Array:
    return vocabulary.argmax(jax.lax.stop_gradient(logits))


def _in_chunks(one: Callable[..., Scores], chunk: int, *rows: jax.Array) -> Scores:
    """`one` applied to arrays [rows, ...], some rows at a time."""
    count = rows[0].shape[0]
    chunk = min(chunk, count)
    chunks = -(-count // chunk)

    def cut(x: jax.Array) -> jax.Array:
        return jnp.pad(x, [(0, chunks * chunk - count)] + [(0, 0)] * (x.ndim - 1)).reshape(chunks, chunk, *x.shape[1:])

    found = jax.lax.map(jax.checkpoint(lambda part: one(*part)), tuple(map(cut, rows)))
    return jax.tree.map(lambda x: x.reshape(-1)[:count], found)
