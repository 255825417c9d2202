"""Where the blocks of a step may begin."""

from typing import Literal

import jax
import jax.numpy as jnp

from mimo_jax.training.groups import Groups

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


def draw_anchors(key: jax.Array, candidate: jax.Array, count: int, groups: Groups) -> tuple[jax.Array, jax.Array]:
    """Draw anchors uniformly without replacement.

    Of sequences that are cut over devices, each device draws among its own positions. What is drawn does not depend on
    how many devices there are, except by which positions are whose.

    Args:
        key: Of the step.
        candidate: [batch, length] bool, as `Groups.ids` says.
        count: Anchors of a row, on each device.
        groups: Of the mesh.

    Returns:
        Anchors [batch, count] int32 and whether each is one, [batch, count] bool: rows may have fewer candidates.
    """
    rows, length = candidate.shape
    whole = rows if groups.cut_sequences else rows * groups.together.width, length
    candidate = groups.sequence.part(candidate, 1)
    order = jnp.where(candidate, groups.part(jax.random.uniform(key, whole)), 2.0)
    drawn, anchors = jax.lax.top_k(-order, min(count, candidate.shape[1]))
    return anchors.astype(jnp.int32) + groups.first(candidate.shape[1]), drawn > -2.0
