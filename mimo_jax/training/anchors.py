"""Where the blocks of a step may begin."""

from typing import Literal

import jax
import jax.numpy as jnp

Choice = Literal["random", "fixed"]
"""Anywhere in an answer, drawn anew every step; or only where an answer that is cut into blocks has one begin."""


def candidates(choice: Choice, block: int, answer: jax.Array, positions: jax.Array) -> jax.Array:
    """Positions t of answers whose next is an answer of the same document.

    Args:
        choice: Which of them.
        block: Rows of a block.
        answer: [batch, length] bool.
        positions: [batch, length] int32: where each stands in its document.

    Returns:
        [batch, length] bool.
    """
    follows = jnp.pad(answer[:, 1:] & (positions[:, 1:] > 0), ((0, 0), (0, 1)))
    if choice == "random":
        return answer & follows
    counted = answer.astype(jnp.int32)
    before = jnp.cumsum(counted, axis=1) - counted  # in the row; and next, before the document
    earlier = jnp.take_along_axis(before, jnp.arange(answer.shape[1], dtype=jnp.int32) - positions, axis=1)
    return answer & follows & ((before - earlier) % block == 0)


def draw_anchors(key: jax.Array, candidate: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """Draw anchors uniformly without replacement.

    Args:
        key: Of the step.
        candidate: [batch, length] bool.
        count: Anchors a row.

    Returns:
        Anchors [batch, count] int32 and whether each is one, [batch, count] bool: rows may have fewer candidates.
    """
    order = jnp.where(candidate, jax.random.uniform(key, candidate.shape), 2.0)
    drawn, anchors = jax.lax.top_k(-order, min(count, candidate.shape[1]))
    return anchors.astype(jnp.int32), drawn > -2.0
