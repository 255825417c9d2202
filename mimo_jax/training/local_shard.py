"""Blocks of sequences that are cut over devices: each device draws and trains those that begin in its own part.

A block needs the context keys and values of the window before its anchor. For anchors near the beginning of a part,
these are the neighbour's: either they are fetched once a step (`exchange`), or no such anchor is drawn (`skip`). Both
give a block what it has in a whole sequence. Where parts are much longer than windows, skipping loses few anchors and
sends nothing at all.
"""

from typing import Literal

import jax
import jax.numpy as jnp

from mimo_jax.cache import SequenceKV
from mimo_jax.config import DrafterConfig
from mimo_jax.drafter import Drafter
from mimo_jax.training import TrainingError
from mimo_jax.training.groups import Groups

Edges = Literal["exchange", "skip"]
"""What is done about anchors whose window or labels reach beyond their device's part."""


def skipped(config: DrafterConfig, groups: Groups, edges: Edges) -> tuple[int, int]:
    """How many of the first and of the last positions of a part are no anchors, where there is a part beyond.

    Raises:
        TrainingError: All of them, as the drafter has no window.
    """
    if edges == "exchange" or not groups.sequence.axes:
        return 0, 0
    if config.attention.visible_keys is None:
        raise TrainingError("a drafter without a window needs every position before a block: edges cannot be skipped")
    return config.attention.visible_keys - 1, config.block_size - 1


def draw_anchors(
    key: jax.Array, answer: jax.Array, count: int, groups: Groups, skip: tuple[int, int] = (0, 0)
) -> tuple[jax.Array, jax.Array]:
    """Draw anchors uniformly without replacement among positions t such that t and t + 1 are answers.

    Of sequences that are cut over devices, each device draws among its own positions. What is drawn does not depend on
    how many devices there are, except by which positions are whose.

    Args:
        key: Of the step.
        answer: [batch, length] bool, as `Groups.ids` says.
        count: Anchors of a row, on each device.
        groups: Of the mesh.
        skip: See `skipped`.

    Returns:
        Anchors [batch, count] int32 and whether each is one, [batch, count] bool: rows may have fewer candidates.
    """
    sequence = groups.sequence
    candidate = sequence.part(answer & jnp.pad(answer[:, 1:], ((0, 0), (0, 1))), 1)
    rows, positions = candidate.shape
    here = jnp.arange(positions, dtype=jnp.int32)
    candidate &= (here >= skip[0]) | (sequence.index() == 0)
    candidate &= (here < positions - skip[1]) | (sequence.index() == sequence.width - 1)
    whole = rows if sequence.axes else rows * groups.together.width, answer.shape[1]
    order = jnp.where(candidate, groups.part(jax.random.uniform(key, whole)), 2.0)
    drawn, anchors = jax.lax.top_k(-order, min(count, positions))
    return anchors.astype(jnp.int32) + groups.first(positions), drawn > -2.0


def context(drafter: Drafter, captured: jax.Array, groups: Groups, edges: Edges) -> SequenceKV:
    """Context keys and values that this device's blocks may see.

    Args:
        drafter: Bound.
        captured: [batch, positions, captured layers, hidden] features of this device's positions.
        groups: Of the mesh.
        edges: Whether those of the window before them are fetched.
    """
    batch, positions = captured.shape[:2]
    first = groups.first(positions)
    k, v = drafter.context(captured, jnp.full(batch, first, jnp.int32))
    if edges == "skip" or not groups.sequence.axes:
        return SequenceKV(k, v, first)
    beyond = positions * (groups.sequence.width - 1)
    if (visible := drafter.config.attention.visible_keys) is not None:
        beyond = min(beyond, visible - 1)
    both = jnp.concatenate([k, v], axis=-1)  # one message
    both = jnp.concatenate([groups.sequence.before(both, beyond, 2), both], axis=2)
    k, v = jnp.split(both, [k.shape[-1]], axis=-1)
    return SequenceKV(k, v, first - beyond)
